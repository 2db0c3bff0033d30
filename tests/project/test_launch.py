"""Tests the launch scripts and accelerate's configurations: the commands and exit statuses. Nothing is trained."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import launched_environment, parsed_launch
from script_options import OPTIONS
from waiting import eventually

from cogvideox.checks import TRAINING_CHECKS
from cogvideox.config import args
from cogvideox.config.conflicts import check_launcher, flag_problems
from cogvideox.config.deepspeed import offload_device, zero_stage
from cogvideox.config.geometry import check_heads
from cogvideox.config.optimizers import check_optimizer
from cogvideox.config.options import (
    LoraOptions,
    PrepareOptions,
    SftOptions,
    TrainOptions,
    copies_and_shards,
    derive,
    fsdp_offloads,
    under_deepspeed,
    under_fsdp,
)
from cogvideox.errors import UsageError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
SHARDINGS = {"fsdp2": (1, 2), "fsdp2_offload": (1, 2), "hsdp": (2, 2)}  # copies, and shards of each
ONE_PROCESS = ("cpu", "uncompiled_1", "compiled_1")
OFFLOADING = ("deepspeed", "zero2_offload", "zero3_offload")
DEEPSPEED_STAGES = {"deepspeed": 2, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}
SHELL = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh")])
TRAIN = sorted(ROOT.glob("train_*.sh"))
LORA = "train_text_to_video_lora.sh"
HOSTILE = "BW_STYLE $(touch PWNED) `touch PWNED` \"q\" 'q' ; touch PWNED #\n* \\ é & | > PWNED :::two"

# Writes the arguments of each call to a file in $CALLS, and then runs the Python code in $STUB, which may use `argv`.
STUB = """#!{python}
import os, sys, tempfile
argv = sys.argv[1:]
calls = os.environ["CALLS"]
with open(os.path.join(calls, "%03d" % len(os.listdir(calls))), "wb") as file:
    file.write(b"\\0".join(os.fsencode(text) for text in argv))
exec(os.environ.get("STUB", ""))
"""


class Sandbox:
    """A copy of the launch scripts in which a stub replaces accelerate, python and torchrun and records each call."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout; touch PWNED"
        self.root.mkdir()
        for path in (*SHELL, *CONFIGS):
            target = self.root / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(path, target)
        (self.root / "video-dataset-disney").mkdir()
        self.calls_folder = folder / "calls"
        self.calls_folder.mkdir()
        self.stub = folder / "a stub"
        self.stub.write_text(STUB.format(python=sys.executable))
        self.stub.chmod(0o755)
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        tools = dict.fromkeys(("ACCELERATE", "PYTHON", "TORCHRUN"), str(self.stub))
        self.env = {**kept, **tools, "CALLS": str(self.calls_folder)}

    def start(self, script: str, **env: object) -> subprocess.Popen:
        values = {name: str(value) for name, value in env.items()}
        pipe = subprocess.PIPE
        command = [self.root / script]
        return subprocess.Popen(
            command, cwd="/", env=self.env | values, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, script: str, **env: object) -> subprocess.CompletedProcess:
        process = self.start(script, **env)
        out, err = process.communicate(timeout=60)
        assert not list(self.root.parent.rglob("PWNED")), "a value was executed"
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        """Returns the arguments of each call of the stub."""
        files = sorted(self.calls_folder.iterdir())
        return [path.read_bytes().decode().split("\0") for path in files]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def after_script(command: list[str]) -> tuple[str, list[str]]:
    """Returns the name of the training script and its arguments."""
    index = next(i for i, text in enumerate(command) if text.endswith(".py"))
    return Path(command[index]).name, command[index + 1 :]


def read(command: list[str]) -> tuple[PrepareOptions | TrainOptions, dict[str, str]]:
    """Returns the options of a command line. Raises UsageError if the script would."""
    name, flags = after_script(command)
    options, sources = args.read_flags(OPTIONS[name], flags, None)
    options = derive(options, sources)
    assert not list(flag_problems(options, sources))
    return options, sources


def value(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1, f"{flag} is there {command.count(flag)} times"
    return command[command.index(flag) + 1]


# -- the shell files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_files_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    code = [line.split("#")[0] for line in path.read_text().splitlines()]
    assert not any("eval" in line.split() for line in code)
    if path.parent == ROOT:
        assert os.access(path, os.X_OK)
        assert "set -euo pipefail" in code


@pytest.mark.parametrize("path", [*TRAIN, ROOT / "prepare_dataset.sh"], ids=lambda path: path.name)
def test_a_dry_run_prints_commands_that_the_scripts_take(path, sandbox):
    done = sandbox.run(path.name, DRY_RUN=1)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert commands
    for command in commands:
        read(command)
        assert (ROOT / next(text for text in command if text.endswith(".py"))).is_file()
    assert sandbox.calls() == []


@pytest.mark.parametrize(("path", "name"), [(LORA, "LEARNING_RATES"), ("prepare_dataset.sh", "HEIGHT_BUCKETS")])
def test_commas_between_values_are_refused_in_a_dry_run_too(path, name, sandbox):
    done = sandbox.run(path, DRY_RUN=1, **{name: "480, 720"})
    assert done.returncode == 2
    assert f"{name}=480, 720: has commas; separate values by spaces" in done.stderr
    assert sandbox.run(path, DRY_RUN=1, EXTRA_FLAGS="--id_token a,b").returncode == 0


@pytest.mark.parametrize("path", [LORA, "prepare_dataset.sh"])
def test_lists_are_named_only_if_they_are_those_of_the_guide_or_given(path, sandbox):
    for given in ({}, {"CAPTION_COLUMN": "a b.txt"}):
        done = sandbox.run(path, DRY_RUN=1, DATA_ROOT="my-clips", **given)
        assert done.returncode == 0, done.stderr
        options, _ = read(shlex.split(done.stdout.splitlines()[0]))
        columns = options.data.data_root, options.data.caption_column, options.data.video_column
        assert columns == (("my-clips",), given.get("CAPTION_COLUMN"), None)


def test_the_sweep_of_the_guide(sandbox):
    done = sandbox.run(LORA)
    assert done.returncode == 0, done.stderr
    seen = []
    for command in sandbox.calls():
        options, _ = read(command)
        seen.append((options.optimizer.learning_rate, options.optimizer.optimizer))
        name = (
            f"cogvideox-lora__optimizer_{options.optimizer.optimizer}__steps_3000"
            f"__lr-schedule_cosine_with_restarts__learning-rate_{value(command, '--learning_rate')}"
        )
        assert options.train.output_dir == f"./runs/{name}"
        assert command[:5] == ["launch", "--config_file", "accelerate_configs/uncompiled_1.yaml", "--gpu_ids", "0"]
    assert seen == [(1e-4, "adamw"), (1e-4, "adam"), (1e-3, "adamw"), (1e-3, "adam")]
    expected = {
        "pretrained_model_name_or_path": "THUDM/CogVideoX-5b",
        "data_root": ("./video-dataset-disney",),
        "caption_column": "prompt.txt",
        "video_column": "videos.txt",
        "id_token": "BW_STYLE",
        "height_buckets": (480,),
        "width_buckets": (720,),
        "frame_buckets": (49,),
        "max_num_frames": 49,
        "load_tensors": False,  # the data set has clips, not tensors
        "dataloader_num_workers": 8,
        "pin_memory": True,
        "validation_prompt_separator": ":::",
        "num_validation_videos": 1,
        "validation_epochs": 10,
        "seed": 42,
        "rank": 128,
        "lora_alpha": 128.0,
        "mixed_precision": "bf16",
        "train_batch_size": 1,
        "max_train_steps": 3000,
        "checkpointing_steps": 1000,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "lr_scheduler": "cosine_with_restarts",
        "lr_warmup_steps": 400,
        "lr_num_cycles": 1,
        "enable_slicing": True,
        "enable_tiling": True,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.001,
        "max_grad_norm": 1.0,
        "allow_tf32": True,
        "report_to": "wandb",
        "nccl_timeout": 1800,
    }
    values = args.config_dict(options)
    assert {name: values[name] for name in expected} == expected
    prompts = options.validation.validation_prompt.split(":::")
    assert len(prompts) == 2
    assert all(prompt.startswith("BW_STYLE ") for prompt in prompts)


def test_the_image_to_video_sweeps(sandbox):
    images = {"VALIDATION_IMAGES": "a b.png:::$(touch PWNED).png"}
    assert sandbox.run("train_image_to_video_lora.sh", **images).returncode == 0
    assert sandbox.run("train_image_to_video_sft.sh", **images).returncode == 0
    *loras, sft = (read(command)[0] for command in sandbox.calls())
    assert len(loras) == 4
    assert {run.model.pretrained_model_name_or_path for run in loras} == {"THUDM/CogVideoX-5b-I2V"}
    assert {(run.data.frame_buckets, run.data.id_token, run.lora.rank) for run in loras} == {((49,), "BW_STYLE", 128)}
    assert sft.model.pretrained_model_name_or_path == "THUDM/CogVideoX1.5-5B-I2V"
    assert (sft.data.frame_buckets, sft.data.max_num_frames, sft.data.id_token) == ((77,), 77, "BW_STYLE")
    assert (sft.train.max_train_steps, sft.train.gradient_accumulation_steps) == (20000, 4)
    assert (sft.optimizer.learning_rate, sft.optimizer.lr_warmup_steps, sft.train.checkpointing_steps) == (
        1e-5,
        800,
        2000,
    )
    for run in (*loras, sft):
        assert (run.image.noised_image_dropout, run.image.validation_images) == (0.05, images["VALIDATION_IMAGES"])
        assert all(prompt.startswith("BW_STYLE ") for prompt in run.validation.validation_prompt.split(":::"))
        assert "i2v" in run.train.output_dir  # a finished text-to-video run with the same values is a different run


def test_without_images_there_are_no_validation_videos(sandbox):
    done = sandbox.run("train_image_to_video_sft.sh")
    assert done.returncode == 0
    assert "VALIDATION_IMAGES is not set" in done.stderr
    options, _ = read(sandbox.calls()[0])
    assert (options.image.validation_images, options.validation.validation_prompt) == (None, None)
    assert "VALIDATION_IMAGES" not in sandbox.run("train_image_to_video_sft.sh", VALIDATION_PROMPT="").stderr


def test_the_environment_sets_values_and_extra_flags_come_last(sandbox):
    done = sandbox.run(
        LORA,
        LEARNING_RATES="2e-5  3e-5",
        OPTIMIZERS="adamw",
        MAX_TRAIN_STEPS="7",
        HEIGHT_BUCKETS="480 720",
        RANK=0,  # RANK belongs to the process group of a cluster, not to the LoRA
        LORA_RANK=16,
        VALIDATION_PROMPT="",
        EXTRA_FLAGS="--seed 7 --allow_path one * --max_grad_norm 0",
    )
    assert done.returncode == 0, done.stderr
    first, second = (read(command)[0] for command in sandbox.calls())
    assert (first.optimizer.learning_rate, second.optimizer.learning_rate) == (2e-5, 3e-5)
    assert (first.train.max_train_steps, first.data.height_buckets, first.lora.rank) == (7, (480, 720), 16)
    assert (first.data.seed, first.train.max_grad_norm, first.data.allow_path) == (7, 0.0, ("one", "*"))
    assert first.validation.validation_prompt is None


@pytest.mark.fault("security: shell commands in prompts, paths and settings")
def test_hostile_values_are_one_argument_each(sandbox):
    data = sandbox.root / "clips $(touch PWNED)\n'x'"
    data.mkdir()
    hostile = {"VALIDATION_PROMPT": HOSTILE, "ID_TOKEN": HOSTILE, "DATA_ROOT": data, "OUTPUT_ROOT": "o`touch PWNED` ;x"}
    done = sandbox.run(LORA, LEARNING_RATES="1e-4", OPTIMIZERS="adam", **hostile)
    assert done.returncode == 0, done.stderr
    [command] = sandbox.calls()
    options, _ = read(command)
    assert options.validation.validation_prompt == options.data.id_token == HOSTILE
    assert options.data.data_root == (str(data),)
    assert options.train.output_dir.startswith("o`touch PWNED` ;x/cogvideox-lora__")
    dry = sandbox.run(LORA, LEARNING_RATES="1e-4", OPTIMIZERS="adam", DRY_RUN=1, **hostile)
    again = subprocess.run(["bash", "-c", f"printf '%s\\0' {dry.stdout}"], capture_output=True, cwd=sandbox.root)
    assert again.stdout.decode().split("\0")[1:-1] == command  # the printed command can be pasted into a shell
    assert not list(sandbox.root.parent.rglob("PWNED"))


@pytest.mark.parametrize(
    ("config", "env", "flags"),
    [
        ("cpu", {"GPU_IDS": "0"}, []),
        ("uncompiled_1", {"CUDA_VISIBLE_DEVICES": "3"}, ["--gpu_ids", "3"]),
        ("compiled_1", {}, ["--gpu_ids", "0"]),
        ("uncompiled_2", {}, ["--gpu_ids", "all"]),
        ("deepspeed", {"GPU_IDS": "2,5"}, ["--gpu_ids", "2,5"]),
    ],
)
def test_gpus_of_each_configuration(config, env, flags, sandbox):
    path = f"accelerate_configs/{config}.yaml"
    done = sandbox.run(LORA, LEARNING_RATES="1e-4", OPTIMIZERS="adam", ACCELERATE_CONFIG_FILE=path, **env)
    assert done.returncode == 0, done.stderr
    [command] = sandbox.calls()
    script = "training/cogvideox_text_to_video_lora.py"
    assert command[: 4 + len(flags)] == ["launch", "--config_file", path, *flags, script]


def test_prepare_uses_torchrun_for_several_gpus(sandbox):
    assert sandbox.run("prepare_dataset.sh").returncode == 0
    assert sandbox.run("prepare_dataset.sh", NUM_GPUS=8, ID_TOKEN=HOSTILE, TARGET_FPS=12).returncode == 0
    one, eight = sandbox.calls()
    assert one[0] == "training/prepare_dataset.py"
    assert eight[:3] == ["--nproc_per_node", "8", "training/prepare_dataset.py"]
    assert (read(eight)[0].data.id_token, read(eight)[0].data.fps) == (HOSTILE, 12.0)
    # Without a frame rate, it is that of the model, which differs between CogVideoX 1.0 and 1.5.
    expected = {"dtype": "bf16", "fps": None, "max_sequence_length": 226, "batch_size": 1, "frame_buckets": (49,)}
    values = args.config_dict(read(one)[0])
    assert {name: values[name] for name in expected} == expected


def test_tensors_are_written_next_to_their_clips(sandbox):
    for given, folder in (({}, "./video-dataset-disney"), ({"DATA_ROOT": "clips of mine/"}, "clips of mine")):
        done = sandbox.run("prepare_dataset.sh", DRY_RUN=1, **given)
        assert read(shlex.split(done.stdout))[0].prepare.output_dir == f"{folder}-prepared"


# -- how a run ends ----------------------------------------------------------------------------------------------------

OUTPUT = "output = argv[argv.index('--output_dir') + 1]; "


def test_finished_runs_are_skipped(sandbox):
    finish = OUTPUT + "os.makedirs(output); open(output + '/recipe.json', 'w')"
    assert sandbox.run(LORA, STUB=finish, OPTIMIZERS="adam").returncode == 0
    assert len(sandbox.calls()) == 2
    done = sandbox.run(LORA, STUB=finish)
    assert done.returncode == 0
    assert done.stderr.count("finished already, skipped even if other settings have changed: ./runs/") == 2
    assert done.stderr.count("to train it again, remove this folder or set another OUTPUT_ROOT") == 2
    assert [value(command, "--optimizer") for command in sandbox.calls()] == ["adam", "adam", "adamw", "adamw"]


def test_failures_are_listed_and_the_rest_is_run(sandbox):
    fail = OUTPUT + "sys.exit(3 if 'optimizer_adam_' in output else 0)"
    done = sandbox.run(LORA, STUB=fail)
    assert done.returncode == 1
    assert len(sandbox.calls()) == 4
    listed = done.stderr.split("failed:\n")[1].splitlines()
    assert len(listed) == 2
    assert all("exit status 3" in line and "optimizer_adam_" in line for line in listed)


def test_a_launcher_that_turns_every_exit_status_into_1(sandbox):
    """accelerate and torchrun do this, so the training script writes its own status to a file."""
    lost = "open(os.environ['COGVIDEOX_EXIT_FILE'], 'w').write('{}'); sys.exit(1)"
    done = sandbox.run(LORA, STUB=lost.format(2), OPTIMIZERS="adam")
    assert (done.returncode, done.stderr.count("failed with exit status 2")) == (1, 2)
    assert sandbox.run(LORA, STUB=lost.format(75)).returncode == 75
    assert len(sandbox.calls()) == 3


def test_75_ends_the_sweep_and_is_passed_on(sandbox):
    done = sandbox.run(LORA, STUB="sys.exit(75)")
    assert done.returncode == 75
    assert len(sandbox.calls()) == 1
    assert "stopped and saved" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(("saves", "to_group"), [(True, False), (False, False), (True, True)])
def test_a_signal_goes_to_the_training_process_once(sandbox, tmp_path, number, saves, to_group):
    """The launcher does not get the signal, because it would die. The sweep ends whether or not the run could save.

    Ctrl-C in a terminal sends the signal to the complete process group.
    """
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, sys, time\n"
        "seen = []\n"
        f"for number in ({signal.SIGHUP}, {signal.SIGTERM}, {signal.SIGINT}, {signal.SIGUSR1}):\n"
        "    signal.signal(number, lambda n, f: seen.append(n))\n"
        "open(os.environ['READY'], 'w')\n"
        "end = time.time() + 20\n"
        "while not seen and time.time() < end: time.sleep(0.02)\n"
        "time.sleep(0.2)\n"
        f"sys.exit({75 if saves else 1} if len(seen) == 1 else 9)\n"
    )
    launcher = f"import subprocess; sys.exit(subprocess.run([sys.executable, {str(worker)!r}]).returncode)"
    ready = tmp_path / "ready"
    process = sandbox.start(LORA, STUB=launcher, READY=ready)
    eventually(ready.exists)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (75 if saves else 128 + number), err
    assert len(sandbox.calls()) == 1


@pytest.mark.parametrize("script", [LORA, "prepare_dataset.sh"])
def test_missing_data_says_how_to_get_it(script, sandbox):
    (sandbox.root / "video-dataset-disney").rmdir()
    command = (
        "hf download --repo-type dataset Wild-Heart/Disney-VideoGeneration-Dataset --local-dir video-dataset-disney"
    )
    done = sandbox.run(script)
    assert (done.returncode, sandbox.calls()) == (2, [])
    assert command in done.stderr
    dry = sandbox.run(script, DRY_RUN=1)
    assert dry.returncode == 0
    assert command in dry.stderr
    assert dry.stdout


def test_missing_launcher_and_configuration(sandbox):
    done = sandbox.run(LORA, ACCELERATE="no-such-launcher")
    assert (done.returncode, "no-such-launcher: not found" in done.stderr) == (2, True)
    done = sandbox.run(LORA, ACCELERATE_CONFIG_FILE="no.yaml")
    assert (done.returncode, "no.yaml: no such file" in done.stderr) == (2, True)


def test_the_virtual_environment_wins_over_path(sandbox):
    target = sandbox.root / ".venv" / "bin" / "accelerate"
    target.parent.mkdir(parents=True)
    target.symlink_to(sandbox.stub)
    del sandbox.env["ACCELERATE"]
    assert sandbox.run(LORA, DRY_RUN=1).stdout.startswith(".venv/bin/accelerate launch")
    assert sandbox.run(LORA, OPTIMIZERS="adam").returncode == 0
    assert len(sandbox.calls()) == 2


# -- accelerate's configurations ---------------------------------------------------------------------------------------


def test_every_way_of_running_has_a_configuration():
    names = {path.stem for path in CONFIGS}
    assert names == {"cpu", "uncompiled_1", "compiled_1", "uncompiled_2", *SHARDINGS, *DEEPSPEED_STAGES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_accepted(path):
    from accelerate.commands.config.config_args import load_config_from_file

    lines = path.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:2])
    config = load_config_from_file(str(path))  # raises an error on keys that accelerate does not know
    assert config.num_processes == {"hsdp": 4, **dict.fromkeys(ONE_PROCESS, 1)}.get(path.stem, 2)
    assert (config.num_machines, config.machine_rank) == (1, 0)
    assert config.use_cpu == (path.stem == "cpu")
    assert config.mixed_precision == ("bf16" if path.stem in DEEPSPEED_STAGES else "no")
    kinds = {"uncompiled_2": "MULTI_GPU"} | dict.fromkeys(SHARDINGS, "FSDP")
    kinds |= dict.fromkeys(DEEPSPEED_STAGES, "DEEPSPEED")
    assert config.distributed_type == kinds.get(path.stem, "NO")
    backend = config.dynamo_config.get("dynamo_backend", "no")
    assert (backend.lower() != "no") == path.stem.startswith("compiled")


@pytest.mark.parametrize(("name", "stage"), DEEPSPEED_STAGES.items())
def test_deepspeed_leaves_the_scripts_flags_to_the_scripts(name, stage):
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())["deepspeed_config"]
    assert config["zero_stage"] == stage
    offloads = name in OFFLOADING
    assert config["offload_optimizer_device"] == ("cpu" if offloads else "none")
    assert config["offload_param_device"] == ("cpu" if offloads and stage == 3 else "none")
    left_to_the_scripts = {"gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"}
    assert not left_to_the_scripts & set(config), json.dumps(config)


def test_zero2_with_offloading_has_the_name_that_the_guide_uses_too():
    """The memory that the factory's guide reports for DeepSpeed is that of a file with offloading."""
    own, other = ((ROOT / "accelerate_configs" / f"{name}.yaml").read_text() for name in ("deepspeed", "zero2_offload"))
    assert yaml.safe_load(own) == yaml.safe_load(other)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_passes_on_every_key_of_a_configuration(path):
    """accelerate ignores keys in the sections of a configuration that it does not know."""
    config, passed = yaml.safe_load(path.read_text()), vars(parsed_launch(path))
    for name, section in config.items():
        if isinstance(section, dict):
            assert {key: passed[key] for key in section} == section, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_agrees_with_the_flags(path, monkeypatch):
    environment = {k: v for k, v in launched_environment(path).items() if os.environ.get(k) != v}
    assert launch_problems(monkeypatch, SftOptions, environment) == []
    world = int(environment["WORLD_SIZE"])
    assert under_fsdp() == (path.stem in SHARDINGS)
    assert fsdp_offloads() == (path.stem == "fsdp2_offload")
    if under_fsdp():
        assert copies_and_shards(world) == SHARDINGS[path.stem]
    assert under_deepspeed() == (path.stem in DEEPSPEED_STAGES)
    if under_deepspeed():
        assert zero_stage() == str(DEEPSPEED_STAGES[path.stem])
        assert (offload_device("offload_optimizer") == "cpu") == (path.stem in OFFLOADING)


def test_a_configuration_reaches_the_scripts(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    cpu, eager, compiled = (
        launched_environment(ROOT / "accelerate_configs" / f"{name}.yaml")
        for name in ("cpu", "uncompiled_1", "compiled_1")
    )
    assert [env["ACCELERATE_USE_CPU"] for env in (cpu, eager, compiled)] == ["True", "False", "False"]
    assert [env["ACCELERATE_DYNAMO_BACKEND"] for env in (cpu, eager, compiled)] == ["NO", "NO", "INDUCTOR"]
    assert {env["ACCELERATE_MIXED_PRECISION"] for env in (cpu, eager, compiled)} == {"no"}
    assert eager["CUDA_VISIBLE_DEVICES"] == "6"  # the scheduler's choice takes precedence


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "4"}
HSDP = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")


def launch_problems(
    monkeypatch: pytest.MonkeyPatch, options_type: type[TrainOptions], environment: dict[str, str], *flags: str
) -> list[str]:
    """Returns what is refused of a launch, before any model is loaded."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    required = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o", "--optimizer", "adamw"]
    try:
        args.parse(options_type, None, [*required, *flags], (check_launcher, check_optimizer))
    except UsageError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    "environment",
    [FSDP, FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, FSDP | dict.fromkeys(HSDP, "2"), {"WORLD_SIZE": "4"}],
)
@pytest.mark.parametrize("plan", ["auto", "fast", "balanced"])
def test_all_weights_train_under_fsdp(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], plan: str) -> None:
    assert launch_problems(monkeypatch, SftOptions, environment, "--plan", plan) == []


@pytest.mark.parametrize(
    ("environment", "flags", "problem", "fix"),
    [
        ({"FSDP_VERSION": "1"}, (), "only version 2", "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "1"}, (), "only version 2", "fsdp_version: 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, (), "fsdp_activation_checkpointing", "--keep"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, (), "fsdp_cpu_ram_efficient_loading", "set it to false"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, (), "fsdp_reshard_after_forward", "set it to true"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (), "nothing to shard", "--num_processes 2"),
        ({HSDP[0]: "3", HSDP[1]: "2"}, (), "dp_replicate_size 3 times dp_shard_size 2", "4"),
        ({HSDP[0]: "4", HSDP[1]: "1"}, (), "dp_replicate_size 4 times dp_shard_size 1", "at least 2 shards"),
        ({"FSDP_IGNORED_MODULES": "proj_out"}, (), "fsdp_ignored_modules", "leave it out"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, (), "parallelism_config_tp_size 2", "--sequence_parallel"),
        ({}, ("--plan", "off"), "--plan off", "--plan auto"),
        ({}, ("--optimizer_state_on", "host"), "--optimizer_state_on host", "fsdp_offload_params: true"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, ("--weights_on", "device"), "--weights_on device", "leave out one"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, ("--optimizer_state_on", "device"), "--optimizer_state_on", "leave out one"),
        ({}, ("--use_cpu_offload_optimizer",), "--use_cpu_offload_optimizer", "fsdp_offload_params: true"),
        ({}, ("--use_8bit",), "--use_8bit", "--optimizer adam or adamw"),
        ({}, ("--use_bf16_moments",), "--use_bf16_moments", "--optimizer adam or adamw"),
        (
            {},
            ("--use_stochastic_rounding", "--mixed_precision", "bf16"),
            "--use_stochastic_rounding",
            "--optimizer adam or adamw",
        ),
        ({}, ("--optimizer", "prodigy"), "--optimizer prodigy", "--optimizer adam or adamw"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_a_fix(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: tuple[str, ...], problem: str, fix: str
) -> None:
    (line,) = (
        line
        for line in launch_problems(monkeypatch, SftOptions, FSDP | environment, *flags)
        if line.startswith("accelerate launch (FSDP): ")
    )
    assert problem in line
    assert fix in line.split(problem, 1)[1]


def test_a_lora_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = launch_problems(monkeypatch, LoraOptions, FSDP)
    assert "a LoRA trains few; launch with accelerate_configs/uncompiled_2.yaml" in line


def test_these_checks_run_before_any_model_is_loaded() -> None:
    assert {check_launcher, check_optimizer} <= set(TRAINING_CHECKS)


@pytest.mark.parametrize(("number", "sizes"), [(4, (2, 2)), (6, (2, 3)), (16, (2, 8)), (2, None), (5, None)])
def test_copies_are_sharded_over_all_processes(
    monkeypatch: pytest.MonkeyPatch, number: int, sizes: tuple[int, int] | None
) -> None:
    environment = launched_environment(ROOT / "accelerate_configs" / "hsdp.yaml", "--num_processes", str(number))
    problems = launch_problems(monkeypatch, SftOptions, environment)
    assert bool(problems) == (sizes is None)
    assert sizes in (copies_and_shards(number), None)


ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("environment", "flags", "problem", "fix"),
    [
        ({"WORLD_SIZE": "3"}, (), "--sequence_parallel 2: must divide the number of processes, 3", "--num_processes 4"),
        (ZERO3, (), "accelerate launch (DeepSpeed): --sequence_parallel 2: zero_stage 3", "fsdp2.yaml"),
        ({}, ("--lora_dropout", "0.1"), "--sequence_parallel: contradicts --lora_dropout 0.1", "leave one of them out"),
        ({}, ("--plan", "off"), "--sequence_parallel 2: contradicts --plan off", "leave one of them out"),
        ({}, ("--use_dora",), "--sequence_parallel 2: contradicts --use_dora", "leave one of them out"),
    ],
)
def test_what_cannot_divide_tokens_is_refused_with_a_fix(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: tuple[str, ...], problem: str, fix: str
) -> None:
    found = launch_problems(
        monkeypatch, LoraOptions, {"WORLD_SIZE": "2"} | environment, "--sequence_parallel", "2", *flags
    )
    (line,) = (line for line in found if line.startswith(problem))
    assert fix in line


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "4"},
        FSDP,
        FSDP | dict.fromkeys(HSDP, "2"),
        {"WORLD_SIZE": "2", **ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    ],
)
def test_tokens_are_divided_with_copies_and_shards(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    assert launch_problems(monkeypatch, SftOptions, environment, "--sequence_parallel", "2") == []


def test_each_process_computes_a_head(model: Path) -> None:
    """The tiny model has two heads."""
    required = ["--pretrained_model_name_or_path", str(model), "--data_root", "d"]
    for number, nearest in ((1, None), (2, None), (3, "nearest: --sequence_parallel 2")):
        options = args.parse(LoraOptions, None, [*required, "--sequence_parallel", str(number)], ())
        problems = list(check_heads(options))
        assert [nearest in problem for problem in problems] == ([True] if nearest else [])
    assert check_heads in TRAINING_CHECKS


def test_a_parallelism_config_without_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", HSDP[0]: "2", "WORLD_SIZE": "4"}
    (line,) = launch_problems(monkeypatch, SftOptions, environment)
    assert "accelerate_configs/hsdp.yaml" in line
