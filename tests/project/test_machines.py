"""Tests runs of several machines, which are launchers next to each other on this one: on the CPU, with a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray_train
import yaml
from accelerate.commands.launch import launch_command_parser
from launching import launched_environment
from running import (
    LORA_SCRIPT,
    ROOT,
    SFT_SCRIPT,
    Forked,
    finish,
    fork_ranks,
    free_port,
    launch_machines,
    lora_flags,
    losses,
    python,
    ranks_environment,
    sft_flags,
    start,
)
from waiting import eventually

from cogvideox.config import args
from cogvideox.config.options import SftOptions

PAGE = (ROOT / "docs" / "distributed.md").read_text()
STEPS = 40


@pytest.fixture(scope="module")
def command(tiny: Callable[[str], Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list]:
    """command(output) is what each process runs: it trains a LoRA, and saves every second step."""
    cache = tmp_path_factory.mktemp("cache")

    def made(output: Path) -> list:
        flags = lora_flags(tiny("5b"), clips, output, "--tensor_cache", cache, "--max_train_steps", STEPS)
        return python(LORA_SCRIPT, *flags, "--gradient_accumulation_steps", 1)

    return made


@pytest.fixture(scope="module")
def right(command: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two processes of one machine."""
    output = tmp_path_factory.mktemp("one") / "lora"
    for rank in fork_ranks(2, command(output)):
        finish(rank)
    return losses(output)


def test_a_request_to_stop_reaches_a_rank_whose_machine_counts_other_restarts(
    command: Callable[..., list], tmp_path: Path
) -> None:
    """torchrun counts on each machine only the failures of that machine's processes."""
    port = free_port()
    given = [ranks_environment(rank, 2, port) | {"TORCHELASTIC_RESTART_COUNT": str(rank)} for rank in range(2)]
    moment = ("^unit micro-batch", 3, signal.SIGUSR1)
    ranks = [Forked(command(tmp_path / "lora"), moment if rank else None, **given[rank]) for rank in range(2)]
    said = [finish(rank, 75) for rank in ranks]
    assert "stopped and saved after step" in said[0]


def test_ranks_without_a_launcher_end_without_errors_of_their_store(
    command: Callable[..., list], tmp_path: Path
) -> None:
    """Rank 0 has the store, as under srun. It must not end while the watcher of another rank uses the store."""
    said = [finish(rank) for rank in fork_ranks(2, command(tmp_path / "lora"))]
    assert "TCPStore" not in "".join(said)


def test_two_machines_train_as_one_does(command: Callable[..., list], right: list[float], tmp_path: Path) -> None:
    where = f"--num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {free_port()}"
    launcher = f"-m accelerate.commands.launch --config_file accelerate_configs/uncompiled_2.yaml {where}"
    launchers = [[sys.executable, *launcher.split(), "--machine_rank", machine] for machine in range(2)]
    folder = tmp_path / "ranks"
    launch_machines(launchers, 2, command(tmp_path / "lora"), folder, ACCELERATE_USE_CPU="true")
    assert [json.loads((folder / f"{rank}.json").read_text())[1]["GROUP_RANK"] for rank in range(2)] == ["0", "1"]
    assert losses(tmp_path / "lora") == right


@pytest.mark.long
def test_hsdp_has_a_sharded_copy_on_each_machine(tiny: Callable[[str], Path], clips: Path, tmp_path: Path) -> None:
    def flags(name: str, ranks: int) -> list:
        more = ("--max_train_steps", 2, "--gradient_accumulation_steps", 4 // ranks)
        return python(SFT_SCRIPT, *sft_flags(tiny("5b"), clips, tmp_path / name, *more))

    finish(Forked(flags("one", 1)))
    where = f"--num_machines 2 --num_processes 4 --main_process_ip 127.0.0.1 --main_process_port {free_port()}"
    launcher = f"-m accelerate.commands.launch --config_file accelerate_configs/hsdp.yaml {where}"
    launchers = [[sys.executable, *launcher.split(), "--machine_rank", machine] for machine in range(2)]
    said = launch_machines(launchers, 4, flags("two", 4), tmp_path / "ranks", ACCELERATE_USE_CPU="true")
    assert "sharded over 2 processes" in said[0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def wait_for(path: Path, processes: "list[subprocess.Popen[str]]") -> None:
    """Waits until a file or folder exists, while all of the processes run."""

    def exists() -> bool:
        assert [process.poll() for process in processes] == [None] * len(processes)
        return path.exists()

    eventually(exists, within=300)


def workers_of(launcher: int) -> list[int]:
    """Returns the processes that a launcher has started, in the order of their ranks."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


MACHINES = "--max_restarts 1 --nnodes 2 --nproc_per_node 1 --rdzv_id run"
LAUNCHES = {
    "one machine": "-m torch.distributed.run --max_restarts 1 --nproc_per_node 2 --master_port {port}",
    "c10d": f"-m torch.distributed.run {MACHINES} --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{{port}}",
    "static": f"-m torch.distributed.run {MACHINES} --master_port {{port}} --node_rank {{machine}}",
    "accelerate": "-m accelerate.commands.launch --config_file accelerate_configs/uncompiled_2.yaml --max_restarts 1 "
    "--num_machines 2 --main_process_ip 127.0.0.1 --main_process_port {port} --machine_rank {machine}",
}


@pytest.mark.parametrize(
    ("kind", "killed"),
    [("one machine", 1), ("c10d", 0), ("c10d", 1), ("static", 0), ("static", 1), ("accelerate", 1)],
)
@pytest.mark.long
@pytest.mark.fault("ranks: a process is killed, and its launcher starts all of them again")
def test_a_launcher_restarts_a_killed_worker_and_the_run_resumes(
    kind: str, killed: int, command: Callable[..., list], right: list[float], tmp_path: Path
) -> None:
    """The restarted processes must not try to reach the addresses of the former ones, which the launcher still has."""
    output, port = tmp_path / "lora", free_port()
    flags = [LAUNCHES[kind].format(port=port, machine=machine) for machine in range(1 if kind == "one machine" else 2)]
    launchers = [[sys.executable, *words.split(), *command(output)[1:]] for words in flags]
    machines = [start(launcher, ACCELERATE_USE_CPU="true") for launcher in launchers]
    try:
        wait_for(output / "checkpoint-4", machines)
        workers = [worker for one in machines for worker in workers_of(one.pid)]
        os.kill(workers[killed], signal.SIGKILL)
        said = "".join(finish(one) for one in machines)
    finally:
        for one in machines:
            one.kill()  # the worker of a launcher that is gone stops by itself
    assert "resuming from" in said
    assert losses(output) == right


class Slurm:
    """Runs examples/slurm.sbatch as a job of two machines with one task each, with stand-ins for srun and scontrol."""

    def __init__(self, folder: Path, python: str) -> None:
        programs = {
            "srun": f'exec {sys.executable} {ROOT}/tests/shared/srun.py "$@"',
            "scontrol": f'case $1 in show) echo 127.0.0.1; echo other ;; *) echo "$@" >> {folder}/asked ;; esac',
            "python": python,
        }
        for name, code in programs.items():
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/bash\n{code}\n")
            program.chmod(0o755)
        self.folder = folder
        self.environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "STEP": str(folder)}
        self.environment |= {"SLURM_JOB_ID": free_port(), "SLURM_JOB_NODELIST": "node[1-2]"}
        self.environment |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "ACCELERATE_USE_CPU": "true"}
        self.environment |= {"SLURM_CPUS_PER_TASK": "8"}

    def submit(self, *command: object) -> "subprocess.Popen[str]":
        return start(["bash", ROOT / "examples" / "slurm.sbatch", *command], **self.environment)

    def signal(self, number: int) -> None:
        """Sends a signal to all processes of the step, but not to the batch script."""
        for task in range(2):
            os.killpg(int((self.folder / str(task)).read_text()), number)

    def asked(self) -> str:
        """Returns what the job asked of SLURM."""
        asked = self.folder / "asked"
        return asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize(("status", "requeues"), [(75, True), (0, False), (1, False), (2, False)])
def test_a_slurm_job_queues_itself_again_only_if_it_was_stopped(status: int, requeues: bool, tmp_path: Path) -> None:
    seen = 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"'
    seen += ' "$SLURM_CPUS_PER_TASK $#" >> "$STEP/seen"'
    slurm = Slurm(tmp_path, f'{seen}; sleep "$RANK"; exit $(({status} * RANK))')
    finish(slurm.submit("script.py", "--validation_prompt", "a b $RANK"), status)
    port = 20000 + int(slurm.environment["SLURM_JOB_ID"]) % 10000
    lines = sorted((tmp_path / "seen").read_text().splitlines())
    assert lines == [f"{rank} 2 0 1 127.0.0.1 {port} 8 3" for rank in range(2)]
    assert slurm.asked() == (f"requeue {slurm.environment['SLURM_JOB_ID']}\n" if requeues else "")


@pytest.mark.long
def test_a_slurm_job_stops_on_a_signal_and_resumes(
    command: Callable[..., list], right: list[float], tmp_path: Path
) -> None:
    slurm = Slurm(tmp_path, f'exec {sys.executable} "$@"')
    flags = command(tmp_path / "lora")[1:]
    job = slurm.submit(*flags)
    wait_for(tmp_path / "lora" / "checkpoint-4", [job])
    slurm.signal(signal.SIGUSR1)
    assert "stopped and saved after step" in finish(job, 75)
    assert slurm.asked().startswith("requeue ")
    assert "resuming from" in finish(slurm.submit(*flags))
    assert losses(tmp_path / "lora") == right
    assert slurm.asked().count("requeue") == 1


def test_slurm_warns_the_tasks_before_the_job_ends() -> None:
    """With "B:", the signal would go to the batch script only, which has to outlive it to queue the job again."""
    settings = re.findall(r"^#SBATCH --([\w-]+) ?(.*)$", (ROOT / "examples" / "slurm.sbatch").read_text(), re.MULTILINE)
    assert dict(settings).items() >= {"signal": "USR1@600", "requeue": "", "open-mode": "append"}.items()


def test_what_skypilot_starts_on_a_machine(tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "volumes", "setup", "run"}
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    accelerate = tmp_path / ".venv" / "bin" / "accelerate"
    accelerate.parent.mkdir(parents=True)
    accelerate.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > called\n')
    accelerate.chmod(0o755)
    machine = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    environment = os.environ | machine | {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=environment, check=True)
    words = (tmp_path / "called").read_text().splitlines()
    launcher = launch_command_parser().parse_args(words[1:])
    assert (launcher.num_machines, launcher.machine_rank, launcher.num_processes) == (2, 1, 16)
    assert (launcher.main_process_ip, launcher.main_process_port) == ("10.0.0.7", 29500)
    assert (ROOT / launcher.config_file).is_file()
    assert (ROOT / launcher.training_script).is_file()
    options, _ = args.read_flags(SftOptions, launcher.training_script_args, None)
    (shared,) = task["volumes"]
    assert all(path.startswith(f"{shared}/") for path in (*options.data.data_root, options.train.output_dir))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--help"], 0, "one for each GPU"),
        (["--workers", "2"], 2, "give a script in training/"),
        (["--workers", "2", "training/cogvideox_text_to_video_sft.py"], 2, "run: pip install 'ray[train]'"),
    ],
)
def test_without_ray_its_script_says_what_it_needs(
    words: list[str], status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ray_train.py", *words])
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as ended:
        ray_train.main()
    assert ended.value.code == status
    assert message in "".join(capsys.readouterr())


@pytest.mark.usefixtures("process_group")
def test_what_ray_starts_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's classes are replaced by one that records its arguments. The worker has Ray's own process group."""
    made: dict[str, dict[str, Any]] = {}

    def stand_in(name: str) -> Callable[..., Any]:
        def make(*positional: Any, **named: Any) -> Any:
            made[name] = named
            run = (lambda: positional[0](named["train_loop_config"])) if positional else None
            return SimpleNamespace(fit=run, **named)

        return make

    classes = {name: stand_in(name) for name in ("FailureConfig", "RunConfig", "ScalingConfig")}
    torch_classes = {name: stand_in(name) for name in ("TorchConfig", "TorchTrainer")}
    monkeypatch.setitem(sys.modules, "ray.train", SimpleNamespace(**classes))
    monkeypatch.setitem(sys.modules, "ray.train.torch", SimpleNamespace(**torch_classes))
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(ray_train.subprocess, "run", lambda words, env, **_: started.append((words, env)))
    monkeypatch.setenv("MASTER_PORT", "29500")
    flags = ["training/cogvideox_text_to_video_sft.py", "--output_dir", "a b", "--max_failures", "7"]
    monkeypatch.setattr(sys, "argv", ["ray_train.py", "--workers", "16", *flags])
    ray_train.main()
    [(words, environment)] = started
    assert words == [sys.executable, *flags]
    assert environment["MASTER_PORT"] not in ("29500", "0")
    assert made["ScalingConfig"] == {"num_workers": 16, "use_gpu": True}
    assert made["FailureConfig"] == {"max_failures": 3}


def test_what_the_page_says_of_fsdp_is_what_its_configuration_sets() -> None:
    """In SLURM there is no launcher that reads accelerate_configs/fsdp2.yaml."""
    exported = re.search(r"--export ALL,(\S+)`", PAGE)
    assert exported
    set_by_page = dict(pair.split("=") for pair in exported[1].split(","))
    set_by_file = launched_environment(ROOT / "accelerate_configs" / "fsdp2.yaml")
    assert {name: set_by_file[name] for name in set_by_page} == set_by_page


def test_messages_about_lost_processes_exist() -> None:
    section = PAGE.split("## When a process is lost")[1].split("\n## ")[0]
    messages = re.findall(r"`([a-z]+ [^`]{15,})`", section)
    # What the code fills in.
    ends = "(process|rank) [0-9]+:? |[0-9]+ processes, at [0-9.:]+|during (step [0-9]+|the export)|[0-9]+ s|[0-9]+$"
    parts = [part.strip(" ,;") for message in messages for part in re.sub(ends, "\n", message).split("\n")]
    source = " ".join(path.read_text() for path in (ROOT / "training" / "cogvideox").rglob("*.py"))
    assert len(messages) == 5
    assert [part for part in parts if part not in source] == []


def test_variables_of_the_guides_are_explained_and_not_set() -> None:
    section = PAGE.split("## Variables in the guides")[1]
    names = set(re.findall(r"^\| `(\w+)", section, re.MULTILINE)) | {"TORCHDYNAMO_VERBOSE"}
    assert len(names) == 8
    names -= {"WANDB_MODE", "TOKENIZERS_PARALLELISM"}  # are harmless
    files = [
        path for folder in ("", "scripts", "examples", "accelerate_configs") for path in (ROOT / folder).glob("*.*")
    ]
    code = "\n".join(path.read_text() for path in files if path.suffix in (".sh", ".sbatch", ".yaml", ".py"))
    assert [name for name in names if re.search(rf"^[^#\n]*\b{name}\b", code, re.MULTILINE)] == []
