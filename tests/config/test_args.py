"""Tests the command line: flags, their conflicts, and every script in an environment without heavy libraries."""

from __future__ import annotations

import ast
import dataclasses
import errno
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from running import ROOT
from script_options import CAPTION, DOCTOR, IMAGE_LORA, IMAGE_SFT, LORA, OPTIONS, PREPARE, SCENES, SFT

from cogvideox import __version__, stopping
from cogvideox.config import args, flags
from cogvideox.config.conflicts import check_launcher
from cogvideox.config.foreign_flags import GUIDE_DEFAULTS, accepted_flags
from cogvideox.config.optimizers import check_state_place
from cogvideox.config.options import (
    SCRIPTS,
    LoraOptions,
    PrepareOptions,
    fields_of,
    resolutions,
    target_pattern,
    tracker_names,
)
from cogvideox.errors import NonFiniteError, UsageError, public_urls
from cogvideox.files import size_text

TESTS = Path(__file__).parents[1]
TRAINING = TESTS.parent / "training"
GOLDEN = TESTS / "golden"
HEAVY = ("torch", "numpy", "av", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub")
MODEL = ("--pretrained_model_name_or_path", "THUDM/CogVideoX-5b")
TRAIN_LEAST = (*MODEL, "--data_root", "d")
LEAST = dict.fromkeys(OPTIONS, TRAIN_LEAST) | {
    PREPARE: (*TRAIN_LEAST, "--output_dir", "o"),
    CAPTION: (*TRAIN_LEAST, "--endpoint", "http://localhost/v1"),
    DOCTOR: MODEL,
    SCENES: ("--data_root", "d"),
}

# The commands of the guides, with shorter prompts.
FACTORY_LORA = (
    *MODEL,
    *("--data_root", "/path/to/my/datasets/video-dataset-disney"),
    *("--caption_column", "prompt.txt", "--video_column", "videos.txt", "--id_token", "BW_STYLE"),
    *("--height_buckets", "480", "--width_buckets", "720", "--frame_buckets", "49"),
    *("--dataloader_num_workers", "8", "--pin_memory"),
    *("--validation_prompt", "BW_STYLE A black and white scene:::BW_STYLE A panda", "--validation_prompt_separator"),
    *(":::", "--num_validation_videos", "1", "--validation_epochs", "10", "--seed", "42"),
    *("--rank", "128", "--lora_alpha", "128", "--mixed_precision", "bf16", "--output_dir", "/path/to/my/models/lora/"),
    *("--max_num_frames", "49", "--train_batch_size", "1", "--max_train_steps", "3000"),
    *("--checkpointing_steps", "1000", "--gradient_accumulation_steps", "1", "--gradient_checkpointing"),
    *("--learning_rate", "1e-4", "--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", "400"),
    *("--lr_num_cycles", "1", "--enable_slicing", "--enable_tiling", "--optimizer", "adamw"),
    *("--beta1", "0.9", "--beta2", "0.95", "--weight_decay", "0.001", "--max_grad_norm", "1.0", "--allow_tf32"),
    *("--report_to", "wandb", "--nccl_timeout", "1800"),
)
FACTORY_PREPARE = (
    *("--model_id", "THUDM/CogVideoX-2b", "--data_root", "D"),
    *("--caption_column", "prompt.txt", "--video_column", "videos.txt", "--output_dir", "O"),
    *("--height_buckets", "480", "720", "--width_buckets", "720", "960", "--frame_buckets", "49"),
    *("--max_num_frames", "49", "--max_sequence_length", "226", "--target_fps", "8", "--batch_size", "1"),
    *("--dtype", "fp32", "--save_latents_and_embeddings"),
)


FACTORY_SFT = (
    *MODEL,
    *("--data_root", "/path/to/my/datasets/video-dataset-disney"),
    *("--caption_column", "prompt.txt", "--video_column", "videos.txt"),
    *("--height_buckets", "480", "--width_buckets", "720", "--frame_buckets", "49"),
    *("--dataloader_num_workers", "8", "--pin_memory"),
    *("--validation_prompt", "A black and white scene:::A panda", "--validation_prompt_separator", ":::"),
    *("--num_validation_videos", "1", "--validation_epochs", "1", "--seed", "42", "--mixed_precision", "bf16"),
    *("--output_dir", "/path/to/my/models/sft/", "--max_num_frames", "49", "--train_batch_size", "1"),
    *("--max_train_steps", "20000", "--checkpointing_steps", "2000", "--gradient_accumulation_steps", "4"),
    *("--gradient_checkpointing", "--learning_rate", "1e-5", "--lr_scheduler", "cosine_with_restarts"),
    *("--lr_warmup_steps", "800", "--lr_num_cycles", "1", "--enable_slicing", "--enable_tiling"),
    *("--optimizer", "adamw", "--beta1", "0.9", "--beta2", "0.95", "--weight_decay", "0.001"),
    *("--max_grad_norm", "1.0", "--allow_tf32", "--report_to", "wandb", "--nccl_timeout", "1800"),
)
COGVIDEO = (
    *("--model_path", "THUDM/CogVideoX1.5-5B", "--model_name", "cogvideox1.5-t2v", "--model_type", "t2v"),
    *("--output_dir", "O", "--report_to", "tensorboard", "--data_root", "D"),
    *("--caption_column", "prompt.txt", "--video_column", "videos.txt", "--train_resolution", "81x768x1360"),
    *("--train_epochs", "10", "--seed", "42", "--batch_size", "1", "--gradient_accumulation_steps", "1"),
    *("--mixed_precision", "bf16", "--num_workers", "8", "--pin_memory", "True", "--nccl_timeout", "1800"),
    *("--checkpointing_steps", "10", "--checkpointing_limit", "2", "--resume_from_checkpoint", "C"),
    *("--do_validation", "false", "--validation_dir", "V", "--validation_steps", "20"),
    *("--validation_prompts", "prompts.txt", "--gen_fps", "16"),
)
DIFFUSERS = (
    *("--pretrained_model_name_or_path", "THUDM/CogVideoX-2b", "--cache_dir", "C", "--instance_data_root", "D"),
    *("--caption_column", "captions.txt", "--video_column", "videos.txt", "--id_token", "T"),
    *("--validation_prompt", "a:::b", "--validation_prompt_separator", ":::", "--num_validation_videos", "1"),
    *("--validation_epochs", "10", "--seed", "42", "--rank", "64", "--lora_alpha", "64", "--mixed_precision", "fp16"),
    *("--output_dir", "O", "--height", "480", "--width", "720", "--fps", "8", "--max_num_frames", "49"),
    *("--skip_frames_start", "0", "--skip_frames_end", "0", "--train_batch_size", "1", "--num_train_epochs", "30"),
    *("--checkpointing_steps", "1000", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-3"),
    *("--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", "200", "--lr_num_cycles", "1"),
    *("--enable_slicing", "--enable_tiling", "--optimizer", "Adam", "--adam_beta1", "0.9", "--adam_beta2", "0.95"),
    *("--max_grad_norm", "1.0", "--report_to", "wandb"),
)
IMAGES = ("--validation_images", "/path/to/image1.png:::/path/to/image2.png", "--noised_image_dropout", "0.05")
I2V = ("--pretrained_model_name_or_path", "THUDM/CogVideoX-5b-I2V")
I2V_1_5 = ("--pretrained_model_name_or_path", "THUDM/CogVideoX1.5-5B-I2V")
SEVENTY_SEVEN = ("--id_token", "BW_STYLE", "--frame_buckets", "77", "--max_num_frames", "77")
I2V_NAMES = ("--model_name", "cogvideox1.5-i2v", "--model_type", "i2v", "--model_path", "THUDM/CogVideoX1.5-5B-I2V")
COGVIDEO_IMAGES = ("--image_column", "images.txt", "--validation_images", "images.txt")


def instead(command: tuple[str, ...], *flags: str) -> tuple[str, ...]:
    """Returns the command with these flags, each with one value, which replace those that it has."""
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    there = [place for place, text in enumerate(command) if text in pairs]
    kept = [text for place, text in enumerate(command) if place not in there and place - 1 not in there]
    return (*kept, *flags)


PUBLISHED = {
    "factory_image_lora": (IMAGE_LORA, instead(FACTORY_LORA, *I2V, *IMAGES)),
    "factory_image_sft": (IMAGE_SFT, instead(FACTORY_SFT, *I2V_1_5, *IMAGES, *SEVENTY_SEVEN)),
    "factory_prepare_images": (PREPARE, (*FACTORY_PREPARE, "--save_image_latents")),
    "cogvideo_image_lora": (IMAGE_LORA, instead(COGVIDEO, *I2V_NAMES, *COGVIDEO_IMAGES, "--training_type", "lora")),
    "cogvideo_image_sft": (IMAGE_SFT, instead(COGVIDEO, *I2V_NAMES, *COGVIDEO_IMAGES, "--training_type", "sft")),
    "diffusers_image_lora": (IMAGE_LORA, instead(DIFFUSERS, *I2V, *IMAGES)),
    "factory_lora": (LORA, FACTORY_LORA),
    "factory_sft": (SFT, FACTORY_SFT),
    "factory_prepare": (PREPARE, FACTORY_PREPARE),
    "cogvideo_lora": (LORA, (*COGVIDEO, "--training_type", "lora")),
    "cogvideo_sft": (SFT, (*COGVIDEO, "--training_type", "sft")),
    "diffusers_lora": (LORA, DIFFUSERS),
    "diffusers_lora_8bit": (LORA, (*DIFFUSERS, "--use_8bit_adam")),
}
OTHER_DEFAULTS = (
    "flags that are not given have other defaults in the CogVideo guide; to train as it does, add --learning_rate 2e-5 "
    "--optimizer adamw --lr_scheduler constant_with_warmup --lr_warmup_steps 100"
)
OF_VIDEOS = (
    "--height 480 and --width 720: are the size of validation videos; clips are trained at the nearest of all default "
    "sizes; to train at this size, give --height_buckets 480 --width_buckets 720"
)
PUBLISHED_REMARKS = {name: OF_VIDEOS for name in PUBLISHED if name.startswith("diffusers")}
for rank, method in (("", "sft"), (" --rank 128", "lora")):
    for task, dropout in (("", ""), ("image_", " --noised_image_dropout 0")):
        PUBLISHED_REMARKS[f"cogvideo_{task}{method}"] = f"{OTHER_DEFAULTS}{rank} --caption_dropout 0{dropout}"


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns an environment in which no heavy library can be imported."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in HEAVY:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} is blocked')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def parse(*given: str, script: str = LORA, checks: typing.Any = ()) -> typing.Any:
    return args.parse(OPTIONS[script], None, [*LEAST[script], *given], checks)


def problems(*argv: str, script: str = LORA) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        args.parse(OPTIONS[script], None, list(argv))
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


# -- without torch -----------------------------------------------------------------------------------------------------


def test_blocked_libraries_cannot_be_imported(light: dict[str, str], tmp_path: Path) -> None:
    for name in HEAVY:
        assert "is blocked" in run(["-c", f"import {name}"], light, tmp_path).stderr


@pytest.mark.parametrize("script", OPTIONS)
def test_help_all_needs_no_torch_and_names_every_flag(script: str, light: dict[str, str], tmp_path: Path) -> None:
    done = run([str(TRAINING / script), "--help_all"], light, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    shown = set(re.findall(r"--[a-z0-9_]+", done.stdout))
    assert {f"--{item.name}" for _, item, _ in fields_of(OPTIONS[script])} <= shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", OPTIONS)
def test_help_shows_the_main_flags_in_order(script: str, light: dict[str, str], tmp_path: Path) -> None:
    done = run([str(TRAINING / script), "--help"], light, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    own = {item.name for _, item, _ in fields_of(OPTIONS[script])}
    main = [name for names in flags.MAIN_FLAGS.values() for name in names if name in own]
    shown = re.findall(r"^  (?:-h, )?--([a-z0-9_]+)", done.stdout, re.MULTILINE)
    assert shown == [*main, "help", "help_all", "version"]
    lengths = {PREPARE: range(12, 20), CAPTION: range(8, 14), SCENES: range(8, 14), DOCTOR: range(3, 5)}
    assert len(main) in lengths.get(script, range(28, 37))
    assert "--help_all" in done.stdout.splitlines()[-1]


def test_every_main_flag_exists_once() -> None:
    main = [name for names in flags.MAIN_FLAGS.values() for name in names]
    assert len(main) == len(set(main))
    assert set(main) <= {item.name for options in OPTIONS.values() for _, item, _ in fields_of(options)}


@pytest.mark.parametrize("script", OPTIONS)
def test_help_all_ends_with_the_flags_without_effect(script: str) -> None:
    text = args.build_parser(OPTIONS[script], None, every=True).format_help()
    own, _, idle = text.partition(f"\n{args.IDLE_HEADING}:\n")
    main = [name for names in flags.MAIN_FLAGS.values() for name in names]
    shown = re.findall(r"^  (?:-h, )?--([a-z0-9_]+)", own, re.MULTILINE)
    assert [name for name in shown if name in main] == [name for name in main if name in shown]
    expected = {flag.item.name for flag in accepted_flags(OPTIONS[script]) if flag.unused and not flag.refused}
    assert set(re.findall(r"^  --([a-z0-9_]+)", idle, re.MULTILINE)) == expected


@pytest.mark.parametrize("script", OPTIONS)
def test_version(script: str, light: dict[str, str], tmp_path: Path) -> None:
    done = run([str(TRAINING / script), "--version"], light, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands(name: str, light: dict[str, str], tmp_path: Path) -> None:
    """Compares all values except defaults, which test_defaults compares."""
    script, command = PUBLISHED[name]
    done = run([str(TRAINING / script), *command, "--print_config"], light, tmp_path)
    remarks = [PUBLISHED_REMARKS[name]] if name in PUBLISHED_REMARKS else []
    assert (done.returncode, done.stderr.splitlines()) == (0, remarks)
    lines = [line for line in done.stdout.splitlines() if line.split()[1] != "default"]
    assert lines == (GOLDEN / f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize("script", OPTIONS)
def test_defaults(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--print_config", script=script)
    golden = GOLDEN / f"defaults_{Path(script).stem}.txt"
    assert capsys.readouterr().out.splitlines() == golden.read_text().splitlines()


def test_a_bad_command_ends_with_2_and_all_problems_on_stderr(light: dict[str, str], tmp_path: Path) -> None:
    wrong = ("--data_rot=d", "--rank", "0", "--optimizer", "adamm", "--seed", "x", "--print_config")
    done = run([str(TRAINING / LORA), *wrong], light, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    first, *lines = done.stderr.splitlines()
    assert first == f"{LORA}: {len(lines)} problems"
    assert {line.split(":")[0] for line in lines} == {
        "  --data_rot",
        "  --pretrained_model_name_or_path",
        "  --data_root",
        "  --rank 0",
        "  --optimizer adamm",
        "  --seed x",
    }


def test_a_missing_model_and_data_set_come_together(light: dict[str, str], tmp_path: Path) -> None:
    command = ["--pretrained_model_name_or_path", str(tmp_path), "--data_root", str(tmp_path / "no")]
    done = run([str(TRAINING / LORA), *command, "--output_dir", str(tmp_path / "out")], light, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no transformer/config.json" in done.stderr
    assert "no such folder; give the folder of the clips" in done.stderr
    assert not (tmp_path / "out").exists()


# -- reading flags -----------------------------------------------------------------------------------------------------


def test_problems_give_flag_value_rule_and_fix() -> None:
    found = problems(
        *("--data_root", "d", "--optimiser=adam", "adam", "--fps", "0", "--mixed_precision", "bf61", "--learning_rate"),
        *("nan", "--rank", "1.5", "--height_buckets", "480", "0", "--pin_memory", "maybe", "--random_flip", "2"),
    )
    assert set(found) == {
        "--pretrained_model_name_or_path: is required: CogVideoX pipeline: a folder, or a hub id such as "
        "THUDM/CogVideoX-5b",
        "--optimiser: no such flag; nearest: --optimizer",
        "--fps 0: must be at least 0.1; nearest: 0.1",
        "--mixed_precision bf61: must be one of no, fp16, bf16; nearest: bf16",
        "--learning_rate nan: must be a finite number",
        "--rank 1.5: takes a whole number",
        "--height_buckets 0: must be at least 1; nearest: 1",
        "--pin_memory maybe: takes true or false, or nothing for true",
        "--random_flip 2: must be at most 1.0; nearest: 1.0",
    }


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("--max_steps", "nearest: --max_train_steps"),
        ("--batch-size", "nearest: --batch_size"),
        ("--alpha", "nearest: --lora_alpha"),
        ("--learning_raet", "nearest: --learning_rate"),
        ("--output", "nearest: --output_dir"),
        ("--wandb", "see --help_all"),
    ],
)
def test_the_nearest_flag_has_the_words_of_the_given_one(given: str, found: str) -> None:
    assert problems(*LEAST[LORA], f"{given}=1") == (f"{given}: no such flag; {found}",)


@pytest.mark.parametrize("short", ["--data_roo", "--learning", "--ran", "--validation_prom"])
def test_no_abbreviations(short: str) -> None:
    found = problems(*LEAST[LORA], f"{short}=1")
    assert found[0].startswith(f"{short}: no such flag; nearest: --")


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ((), False),
        (("--pin_memory",), True),
        (("--pin_memory", "true"), True),
        (("--pin_memory", "True"), True),
        (("--pin_memory=true",), True),
        (("--pin_memory", "1"), True),
        (("--pin_memory", "false"), False),
        (("--pin_memory", "False"), False),
        (("--pin_memory=false",), False),
        (("--pin_memory=0",), False),
        (("--pin_memory", "no"), False),
        (("--pin_memory", "--allow_tf32"), True),
    ],
)
def test_switches(given: tuple[str, ...], value: bool) -> None:
    assert parse(*given).loader.pin_memory is value


def test_a_flag_with_a_value_for_when_it_is_bare() -> None:
    assert parse().data.random_flip is None
    assert parse("--random_flip").data.random_flip == 0.5
    assert parse("--random_flip", "0.25").data.random_flip == 0.25


@pytest.mark.parametrize("script", OPTIONS)
def test_every_alias_fills_its_flag(script: str) -> None:
    values = {int: ("7", 7), float: ("0.5", 0.5), str: ("text", "text"), bool: ("true", True)}
    aliases = [(item, of, alias) for _, item, of in fields_of(OPTIONS[script]) for alias in item.metadata["aliases"]]
    assert aliases
    for item, annotation, alias in aliases:
        of, many = args.value_type(annotation)
        text, value = values[of]
        others = [flag for flag in zip(*[iter(LEAST[script])] * 2, strict=True) if flag[0] != f"--{item.name}"]
        argv = [part for pair in others for part in pair] + [f"--{alias}", text]
        options, sources = args.read_flags(OPTIONS[script], argv, None)
        assert args.config_dict(options)[item.name] == ((value,) if many else value)
        assert sources[item.name] == f"given as --{alias}"


def test_choices_are_read_in_any_case() -> None:
    assert parse("--optimizer", "AdamW").optimizer.optimizer == "adamw"


def test_init_lora_weights_names_the_nearest_value() -> None:
    (found,) = problems(*LEAST[LORA], "--init_lora_weights", "gausian")
    assert found.endswith("; nearest: gaussian")


def test_a_single_target_that_is_not_a_plain_name_is_a_regular_expression() -> None:
    assert [target_pattern(given) for given in (("to_out.0",), ("a|b",), ("to_q", "to_k"))] == [None, "a|b", None]


def test_derived_values() -> None:
    options = parse("--height_buckets", "256", "320", "--frame_buckets", "9", "17", "81", "--random_flip")
    assert (options.validation.height, options.validation.width) == (256, 720)
    assert options.validation.validation_frames == 17
    assert options.data.num_augmentations == 2
    assert options.loader.tensor_cache == str(Path("d/cogvideox_tensors"))
    given = parse("--height", "64", "--width", "96", "--validation_frames", "9", "--num_augmentations", "3")
    assert (given.validation.height, given.validation.width, given.validation.validation_frames) == (64, 96, 9)
    assert given.data.num_augmentations == 3
    assert parse("--load_tensors").loader.tensor_cache is None


def test_flags_of_the_loss_without_effect_are_refused() -> None:
    wrong = ("--snr_gamma", "4", "--p2_k", "2", "--loss_weighting", "debiased", "--ema_decay", "0.9", "--export_best")
    wrong += ("--min_timestep", "500", "--max_timestep", "499", "--keep_best")
    assert problems(*LEAST[LORA], *wrong) == (
        "--snr_gamma: has no effect with --loss_weighting debiased; leave it out, or give --loss_weighting "
        "min_snr or min_snr_plus_one or soft_min_snr",
        "--p2_k: has no effect with --loss_weighting debiased; leave it out, or give --loss_weighting p2",
        "--max_timestep 499: is before --min_timestep 500; nearest: --max_timestep 500",
        "--ema_decay: has no effect without --use_ema; give it too, or leave this out",
        "--keep_best: there are no clips to measure the loss on; give --validation_data_root",
    )
    assert problems(*LEAST[LORA], "--export_best") == ("--export_best: no checkpoint is kept for it; add --keep_best",)
    right = ("--loss_weighting", "p2", "--p2_k", "2", "--use_ema", "--ema_decay", "0.9", "--keep_best", "--export_best")
    assert parse(*right, "--validation_data_root", "v").train.export_best
    assert parse("--max_timestep", "0").loss.max_timestep == 0


def test_plans_that_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    lean = ("--plan", "lean", "--keep", "input")
    assert problems(*LEAST[LORA], *lean, "--use_dora") == (
        "--plan lean, --keep input: contradicts --use_dora, which needs diffusers modules; leave one of them out",
    )
    assert parse("--use_dora").lora.use_dora
    host = parse("--optimizer_state_on", "host", "--optimizer", "came")
    (found,) = check_state_place(host)
    assert found.startswith("--optimizer_state_on host: --optimizer came cannot keep its state in host memory")
    # No other check reports the same cause again.
    (found,) = check_state_place(parse("--use_cpu_offload_optimizer", "--optimizer", "torch.optim.RAdam"))
    assert found.startswith("--use_cpu_offload_optimizer: --optimizer torch.optim.RAdam cannot keep its state in host")
    assert problems(*LEAST[LORA], "--plan", "off", "--keep", "all")[0].startswith("--keep all: contradicts --plan off")
    assert parse().plan.plan == "auto"


def test_train_resolution_replaces_the_lists_of_buckets() -> None:
    options = parse("--train_resolution", "81x768x1360", "25X256x384")
    assert resolutions(options.data) == [(81, 768, 1360), (25, 256, 384)]
    assert options.data.max_num_frames == 81
    validation = options.validation
    assert (validation.validation_frames, validation.height, validation.width) == (81, 768, 1360)
    shorter = parse("--train_resolution", "81x768x1360", "25x256x384", "--max_num_frames", "49")
    assert shorter.validation.validation_frames == 25


@pytest.mark.parametrize(
    ("script", "given", "flag"),
    [
        (LORA, ("--frame_buckets", "81"), "--max_num_frames"),
        (LORA, ("--train_resolution", "49x480"), "--train_resolution 49x480"),
        (LORA, ("--train_resolution", "49x480x720", "--frame_buckets", "49"), "--train_resolution"),
        (LORA, ("--train_resolution", "81x480x720", "--max_num_frames", "49"), "--max_num_frames 49"),
        (LORA, ("--bucket_choice", "every"), "--bucket_choice every"),
        (LORA, ("--bucket_choice", "every", "--height_buckets", "480"), "--bucket_choice every"),
        (LORA, ("--repeats", "1", "2"), "--repeats 1 2"),
        (LORA, ("--load_tensors", "--data_root", "a", "b"), "--data_root"),
        (LORA, ("--load_tensors", "--validation_data_root", "v"), "--validation_data_root"),
        (PREPARE, ("--verify", "--repair"), "--verify"),
        (PREPARE, ("--verify", "--dry_run"), "--dry_run"),
        (LORA, ("--frame_selection", "uniform", "--fps", "8"), "--frame_selection"),
        (LORA, ("--no_resume", "--resume_from_checkpoint", "latest"), "--no_resume"),
        (LORA, ("--validation_prompt", "p", "--validation_steps", "5", "--validation_epochs", "5"), "--validation_s"),
        (PREPARE, ("--save_latents_and_embeddings", "false"), "--save_latents_and_embeddings"),
        (LORA, ("--hub_token", "hf_abc"), "--hub_token: has no effect without --push_to_hub"),
        (LORA, ("--hub_model_id", "me/x"), "--hub_model_id: has no effect without --push_to_hub"),
        (LORA, ("--hub_private",), "--hub_private: has no effect without --push_to_hub"),
        (LORA, ("--hub_overwrite",), "--hub_overwrite: has no effect without --push_to_hub"),
        (LORA, ("--push_to_hub", "--hub_token", ""), "--hub_token: is empty"),
        (LORA, ("--push_to_hub", "--hub_token", "hf a"), "--hub_token: is empty, or contains spaces"),
        (LORA, ("--push_to_hub", "--hub_token", "hf_\n"), "--hub_token: is empty, or contains spaces"),
        (LORA, ("--do_validation",), "--do_validation"),
        (LORA, ("--do_validation", "--validation_epochs", "10"), "--do_validation"),
        (LORA, ("--validation_prompt", "p", "--validation_prompts", "f"), "--validation_prompt"),
        (LORA, ("--validation_dir", "V"), "--validation_dir V"),
        (LORA, ("--validation_dir", "V", "--validation_prompt", "p"), "--validation_dir V"),
        (LORA, ("--init_lora_weights", "pisa"), "--init_lora_weights pisa: must be one of default, gaussian, pissa"),
        (LORA, ("--init_lora_weights", "pissa_niter_0"), "--init_lora_weights pissa_niter_0: must be one of"),
        (LORA, ("--init_lora_weights", "pissa", "--use_dora"), "--init_lora_weights pissa: contradicts --use_dora"),
        (
            LORA,
            ("--lora_alpha", "0"),
            "--lora_alpha 0: the output of the LoRA is multiplied by it, so that nothing would be trained; ",
        ),
        (LORA, ("--validation_prompt", " "), "--validation_prompt: has no prompt"),
        (LORA, ("--validation_prompt", "::: ", "--do_validation"), "--validation_prompt: has no prompt"),
        (LORA, ("--validation_prompt", "p", "--validation_prompt_separator", ""), "--validation_prompt_separator: is"),
        (LORA, ("--resume_from_checkpoint", ""), "--resume_from_checkpoint: is empty; give a folder"),
        (LORA, ("--gradient_checkpointing", "--keep", "all"), "--gradient_checkpointing: contradicts --keep all"),
        (SFT, ("--gradient_checkpointing", "--keep", "linear"), "--gradient_checkpointing: contradicts --keep linear"),
        (LORA, ("--plan", "lean", "--use_dora"), "--plan lean: contradicts --use_dora"),
        (
            LORA,
            ("--init_lora_weights", "gaussian", "--lora_path", "x"),
            "--init_lora_weights gaussian: contradicts --l",
        ),
        (LORA, ("--target_modules", "(to_q"), "--target_modules (to_q: is not a valid regular expression: missing )"),
        (
            LORA,
            ("--target_modules", "to_k", ".*to_q"),
            "--target_modules .*to_q: there can be only one regular expression",
        ),
    ],
)
def test_contradictions(script: str, given: tuple[str, ...], flag: str) -> None:
    (found,) = problems(*LEAST[script], *given, script=script)
    assert found.startswith(flag)
    assert ";" in found


def test_checks_run_after_the_flags_and_their_problems_are_joined() -> None:
    def first(options: typing.Any) -> typing.Iterator[str]:
        yield f"first saw {options.data.data_root}"

    def second(options: typing.Any) -> typing.Iterator[str]:
        raise UsageError(["second a", "second b"])

    with pytest.raises(UsageError) as caught:
        parse("--frame_buckets", "81", checks=(first, second))
    assert caught.value.problems[0].startswith("--max_num_frames 49")
    assert caught.value.problems[1:] == ("first saw ('d',)", "second a", "second b")


def test_print_config_runs_no_check(capsys: pytest.CaptureFixture[str]) -> None:
    def never(options: typing.Any) -> typing.Iterator[str]:
        raise AssertionError

    with pytest.raises(SystemExit) as ended:
        parse("--print_config", checks=(never,))
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(fields_of(LoraOptions)))


def test_options_are_frozen() -> None:
    options = parse()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.data.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.data = None


def test_a_flag_without_its_value_joins_the_other_problems() -> None:
    assert len(problems("--data_root", "d", "--seed", "x", "--rank")) == 3


def test_an_unknown_flag_is_one_problem_with_its_value() -> None:
    assert len(problems(*LEAST[LORA], "--optimiser", "adam")) == 1


@pytest.mark.parametrize("flag", ["--beta1", "--beta2"])
def test_decays_that_no_optimizer_takes_are_refused(flag: str) -> None:
    problems(*LEAST[LORA], flag, "1.0")


@pytest.mark.parametrize("flag", ["--fps", "--learning_rate", "--lora_alpha", "--weight_decay"])
def test_infinite_values_are_refused(flag: str) -> None:
    problems(*LEAST[LORA], flag, "inf")


# -- other trainers ----------------------------------------------------------------------------------------------------

# Every flag of each published script.
FACTORY_FLAGS = """
    pretrained_model_name_or_path revision variant cache_dir
    data_root dataset_file video_column caption_column id_token height_buckets width_buckets frame_buckets load_tensors
    random_flip dataloader_num_workers pin_memory
    validation_prompt validation_images validation_prompt_separator num_validation_videos validation_epochs
    validation_steps guidance_scale use_dynamic_cfg enable_model_cpu_offload
    seed rank lora_alpha mixed_precision output_dir height width video_reshape_mode fps max_num_frames
    skip_frames_start skip_frames_end train_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power enable_slicing enable_tiling noised_image_dropout
    ignore_learned_positional_embeddings
    optimizer use_8bit use_4bit use_torchao beta1 beta2 beta3 prodigy_decouple weight_decay epsilon max_grad_norm
    prodigy_use_bias_correction prodigy_safeguard_warmup use_cpu_offload_optimizer offload_gradients
    tracker_name push_to_hub hub_token hub_model_id logging_dir allow_tf32 nccl_timeout report_to
"""
FACTORY_PREPARE_FLAGS = """
    model_id data_root dataset_file caption_column video_column id_token height_buckets width_buckets frame_buckets
    random_flip dataloader_num_workers pin_memory video_reshape_mode save_image_latents output_dir max_num_frames
    max_sequence_length target_fps save_latents_and_embeddings use_slicing use_tiling batch_size num_decode_threads
    dtype seed num_artifact_workers save_tensors
"""
DIFFUSERS_FLAGS = """
    dataset_name dataset_config_name instance_data_root use_8bit_adam adam_beta1 adam_beta2 prodigy_beta3
    adam_weight_decay adam_epsilon rank lora_alpha video_reshape_mode validation_epochs output_dir random_flip optimizer
    pretrained_model_name_or_path revision variant cache_dir video_column caption_column id_token
    dataloader_num_workers validation_prompt validation_prompt_separator num_validation_videos guidance_scale
    use_dynamic_cfg seed mixed_precision height width fps max_num_frames skip_frames_start skip_frames_end
    train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
    lr_warmup_steps lr_num_cycles lr_power enable_slicing enable_tiling prodigy_decouple prodigy_use_bias_correction
    prodigy_safeguard_warmup max_grad_norm tracker_name push_to_hub hub_token hub_model_id logging_dir allow_tf32
    report_to
"""
COGVIDEO_FLAGS = """
    model_path model_name model_type training_type output_dir data_root caption_column video_column train_resolution
    report_to seed train_epochs train_steps gradient_accumulation_steps batch_size learning_rate optimizer beta1 beta2
    beta3 epsilon weight_decay max_grad_norm lr_scheduler lr_warmup_steps lr_num_cycles lr_power num_workers pin_memory
    image_column mixed_precision gradient_checkpointing enable_slicing enable_tiling nccl_timeout rank lora_alpha
    target_modules checkpointing_steps checkpointing_limit resume_from_checkpoint do_validation validation_steps
    validation_dir validation_prompts validation_images validation_videos gen_fps tracker_name
"""


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (LORA, FACTORY_FLAGS),
        (SFT, FACTORY_FLAGS),
        (LORA, DIFFUSERS_FLAGS),
        (LORA, COGVIDEO_FLAGS),
        (SFT, COGVIDEO_FLAGS),
        (IMAGE_LORA, FACTORY_FLAGS),
        (IMAGE_SFT, FACTORY_FLAGS),
        (IMAGE_LORA, DIFFUSERS_FLAGS + "validation_images noised_image_dropout nccl_timeout"),
        (IMAGE_LORA, COGVIDEO_FLAGS),
        (IMAGE_SFT, COGVIDEO_FLAGS),
        (PREPARE, FACTORY_PREPARE_FLAGS),
    ],
)
def test_every_published_flag_is_known(script: str, flags: str) -> None:
    known = {name for flag in accepted_flags(OPTIONS[script]) if not flag.refused for name in flag.names}
    assert set(flags.split()) <= known
    assert len(flags.split()) == len(set(flags.split()))


def test_flags_without_effect_say_so(light: dict[str, str], tmp_path: Path) -> None:
    idle = ("--num_artifact_workers", "8", "--use_slicing", "--num_decode_threads", "4", "--pin_memory", "false")
    command = [str(TRAINING / PREPARE), *LEAST[PREPARE], *idle, "--print_config"]
    first, second = (run(command, {**light, "RANK": rank, "WORLD_SIZE": "2"}, tmp_path) for rank in "01")
    assert (first.returncode, second.returncode, second.stderr) == (0, 0, "")
    lines = first.stderr.splitlines()
    assert [line.split(": has no effect here; ")[0] for line in lines] == [
        "--use_slicing",
        "--num_decode_threads",
        "--num_artifact_workers",
    ]


OTHERS_FLAGS = (
    *("--validation_images", "a.png:::b.png", "--noised_image_dropout", "0.05", "--num_image_noise_variants", "2"),
    *("--image_column", "images.txt", "--rank", "128", "--lora_alpha", "64", "--use_dora", "--use_slicing"),
    *("--num_decode_threads", "4", "--save_image_latents", "--dry_run", "false"),
)
OF_IMAGES = {"--validation_images", "--noised_image_dropout", "--num_image_noise_variants", "--image_column"}
OF_LORA = {"--rank", "--lora_alpha", "--use_dora"}
OF_PREPARATION = {"--use_slicing", "--num_decode_threads", "--save_image_latents"}


@pytest.mark.parametrize(
    ("script", "without_effect"),
    [
        (LORA, OF_IMAGES | OF_PREPARATION),
        (SFT, OF_IMAGES | OF_LORA | OF_PREPARATION),
        (IMAGE_LORA, OF_PREPARATION),
        (IMAGE_SFT, OF_LORA | OF_PREPARATION),
        (PREPARE, {"--validation_images", "--noised_image_dropout", "--use_slicing", "--num_decode_threads"} | OF_LORA),
    ],
)
def test_flags_of_other_scripts_are_accepted_and_reported(
    script: str, without_effect: set[str], light: dict[str, str], tmp_path: Path
) -> None:
    """Each script prints one line for each such flag, and its configuration does not contain them."""
    done = run([str(TRAINING / script), *LEAST[script], *OTHERS_FLAGS, "--print_config"], light, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stderr.splitlines())
    assert set(lines) == without_effect
    assert all(line.startswith("has no effect here; ") for line in lines.values())
    shown = {line.split()[0] for line in done.stdout.splitlines()}
    assert shown == {item.name for _, item, _ in fields_of(OPTIONS[script])}


@pytest.mark.parametrize(
    ("script", "given", "found"),
    [
        (SFT, "--lora_path l", f"--lora_path: is for {LORA}, {IMAGE_LORA}; this one would not start from it"),
        (IMAGE_SFT, "--init_lora_from l", f"--lora_path: is for {LORA}, {IMAGE_LORA}; this one would not start"),
        (LORA, "--save_pipeline", f"--save_pipeline: is for {SFT}, {IMAGE_SFT}; this one makes no transformer"),
        (LORA, "--suggest_buckets 4", "--suggest_buckets: is for prepare_dataset.py; this one would train"),
        (IMAGE_LORA, "--verify true", "--verify: is for prepare_dataset.py; this one would train"),
        (PREPARE, "--load_tensors", "--load_tensors: is for the training scripts; this one reads clips"),
        (PREPARE, "--push_to_hub", "--push_to_hub: is for the training scripts; this one uploads nothing"),
        (SFT, "--rank x", "--rank x: takes a whole number"),
        (PREPARE, "--max_train_steps 3 --train_steps 4", "--max_train_steps: is the same flag as --train_steps"),
    ],
)
def test_flags_of_other_scripts_that_would_change_the_result_are_refused(script: str, given: str, found: str) -> None:
    (problem,) = problems(*LEAST[script], *given.split(), script=script)
    assert problem.startswith(found)


def test_a_flag_of_another_script_does_not_clash_with_a_name_of_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    """--batch_size is a flag of prepare_dataset.py, and another name of --train_batch_size in the training scripts."""
    assert parse("--batch_size", "2", "--train_batch_size", "3", script=PREPARE).prepare.batch_size == 2
    assert capsys.readouterr().err == "--train_batch_size: has no effect here; used only by the training scripts\n"


@pytest.mark.parametrize("script", OPTIONS)
def test_help_shows_and_suggests_a_scripts_own_flags_only(script: str) -> None:
    (found,) = problems(*LEAST[script], "--validation_imags", "x", script=script)
    assert ("nearest: --validation_images" in found) == (script in (IMAGE_LORA, IMAGE_SFT))
    text = args.build_parser(OPTIONS[script], None).format_help()
    assert ("--validation_images" in text) == (script in (IMAGE_LORA, IMAGE_SFT))
    assert ("--lora_alpha" in text) == (script in (LORA, IMAGE_LORA))


def test_prodigy_with_the_rate_of_adam_is_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    parse("--optimizer", "prodigy", "--learning_rate", "1")
    assert capsys.readouterr().err == ""
    parse("--optimizer", "prodigy")
    assert capsys.readouterr().err.startswith("--learning_rate 0.0001: prodigy")


@pytest.mark.fault("flags: a validation schedule without a prompt or a clip")
@pytest.mark.parametrize("flag", ["--validation_epochs", "--validation_steps"])
def test_a_schedule_without_anything_to_validate_is_remarked(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Published commands have such flags, so the run continues."""
    parse(flag, "10")
    assert capsys.readouterr().err.startswith(f"{flag} 10: has no effect; there is no --validation_prompt and no clip")
    for more in (("--validation_prompt", "p"), ("--validation_data_root", "v"), ("--do_validation", "false")):
        parse(flag, "10", *more)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "given", "remark"),
    [
        (LORA, "--lr_warmup_steps 100", "--lr_warmup_steps: has no effect; --lr_scheduler constant does not use it"),
        (SFT, "--lr_num_cycles 2 --lr_scheduler cosine", "--lr_num_cycles: has no effect; --lr_scheduler cosine does"),
        (SFT, "--lr_power 2", "--lr_power: has no effect; --lr_scheduler constant does not use it; give polynomial"),
        (LORA, "--frame_buckets 9 49 65", "--frame_buckets: 65 frames are longer than --max_num_frames 49, so no clip"),
        (
            PREPARE,
            "--train_resolution 9x64x96 49x64x96 65x64x96 --max_num_frames 9",
            "--train_resolution: 49 and 65 frames are longer than --max_num_frames 9, so no clip is trained at them; "
            "give --max_num_frames 65",
        ),
        (LORA, "--tracker_name mine", "--tracker_name: has no effect; there is no tracker; give --report_to"),
        (LORA, "--logging_dir l --report_to wandb", "--logging_dir: has no effect; only tensorboard writes there"),
        (LORA, "--num_validation_videos 2", "--num_validation_videos: has no effect; there is no --validation_prompt"),
        (LORA, "--load_tensors --decode_timeout 9", "--decode_timeout: has no effect; --load_tensors decodes no clip"),
        (PREPARE, "--num_augmentations 2", "--num_augmentations: has no effect; all variants of a clip are equal"),
        (
            SFT,
            "--timestep_sampling stratified --train_batch_size 1",
            "--timestep_sampling: has no effect; an optimizer",
        ),
        (
            LORA,
            "--guidance_scale 1 --negative_prompt bad",
            "--negative_prompt: has no effect; --guidance_scale 1 turns guidance off; give a scale above 1",
        ),
        (SFT, "--guidance_scale 0.5 --use_dynamic_cfg", "--use_dynamic_cfg: has no effect; --guidance_scale 0.5 turns"),
        (LORA, "--guidance_scale 1 --use_dynamic_cfg false", ""),
        (LORA, "--guidance_scale 2 --negative_prompt bad --use_dynamic_cfg", ""),
        (LORA, "--num_train_epochs 3 --max_train_steps 9", "--num_train_epochs: has no effect; --max_train_steps"),
        (LORA, "--preset style --max_train_steps 9", ""),
        (PREPARE, "--num_augmentations 2 --random_flip", ""),
        (PREPARE, "--num_augmentations 2 --frame_selection random", ""),
        (PREPARE, "--num_augmentations 1", ""),
        (SFT, "--timestep_sampling stratified --train_batch_size 1 --gradient_accumulation_steps 2", ""),
        (CAPTION, "--endpoint http://localhost/v1 --request_timeout 9", ""),
        (LORA, "--lr_warmup_steps 0 --lr_num_cycles 1 --lr_power 1", ""),
        (LORA, "--lr_warmup_steps 9 --lr_num_cycles 2 --lr_scheduler cosine_with_restarts", ""),
        (LORA, "--preset style --lr_scheduler constant", ""),
        (LORA, "--frame_buckets 9 49 65 --max_num_frames 65", ""),
        (LORA, "--tracker_name mine --logging_dir l --report_to tensorboard", ""),
        (LORA, "--num_validation_videos 2 --validation_prompt p", ""),
    ],
)
def test_flags_without_effect_beside_others_are_remarked(
    script: str, given: str, remark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published commands have such flags, so the run continues."""
    parse(*given.split(), script=script)
    text = capsys.readouterr().err
    assert text.startswith(remark)
    assert len(text.splitlines()) == bool(remark)


def test_a_tracker_that_the_environment_disables_is_remarked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_DISABLED", "true")
    parse("--report_to", "wandb")
    assert capsys.readouterr().err == "--report_to: has no effect; WANDB_DISABLED is set, so nothing is sent to wandb\n"
    parse("--report_to", "tensorboard")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", [LORA, PREPARE, CAPTION, DOCTOR])
def test_a_revision_of_a_local_model_is_remarked(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = LEAST[script][2:]
    for model, remark in ((str(tmp_path), "--revision: has no effect; the model is a folder\n"), ("me/model", "")):
        args.parse(OPTIONS[script], None, ["--model_id", model, *rest, "--revision", "v2"])
        assert capsys.readouterr().err == remark


def test_requests_without_a_server_are_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    args.parse(OPTIONS[CAPTION], None, [*TRAIN_LEAST, "--caption_model", "m", "--request_attempts", "2"])
    assert capsys.readouterr().err.startswith("--request_attempts: has no effect; there is no --endpoint")


@pytest.mark.parametrize("precision", ["fp8", "no"])
def test_a_precision_of_the_launcher_that_is_not_supported_is_refused(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    found = list(check_launcher(parse()))
    assert [text.partition(";")[0] for text in found] == (
        ["accelerate launch: mixed_precision fp8: is not supported"] if precision == "fp8" else []
    )
    assert not list(check_launcher(parse("--mixed_precision", "bf16")))  # which overrides it


SIGNED = "https://me:pass@cdn.example/a/x.png?X-Signature=secret&e=1#part"


@pytest.mark.fault("security: a URL with a password and a signature among the flags")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (SIGNED, "https://cdn.example/a/x.png"),
        (f"{SIGNED}:::{SIGNED}", "https://cdn.example/a/x.png:::https://cdn.example/a/x.png"),
        (f"{SIGNED}|{SIGNED}", "https://cdn.example/a/x.png"),
        ("http://h/x.png:::s3://key:word@b/y:z.png", "http://h/x.png:::s3://b/y:z.png"),
    ],
)
def test_what_is_secret_in_a_url_is_written_nowhere(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse("--validation_prompt", "p", "--validation_images", text, script=IMAGE_LORA)
    assert options.image.validation_images == text
    assert args.config_dict(options)["validation_images"] == shown
    assert "secret" not in args.config_text(options, dict.fromkeys(args.config_dict(options), "given"))
    monkeypatch.setattr(sys, "argv", ["script", "--validation_images", text])
    args.hide_secrets(options)
    assert sys.argv == ["script", "--validation_images", shown]
    (found,) = UsageError(f"--data_root {text}: no such folder").problems
    assert "secret" not in found
    assert "pass" not in found


def test_texts_without_urls_stay_as_they_are() -> None:
    for text in ("a:::b? c#1", "me@host: x", "C:/clips?", "50 % ?", "https://h/a b?", "a://"):
        assert public_urls(text) in (text, text.removesuffix("?"))


@pytest.mark.parametrize(
    ("script", "given", "right"),
    [
        (LORA, "--training_type sft", SFT),
        (SFT, "--model_type t2v --training_type lora", LORA),
        (LORA, "--model_type i2v", "cogvideox_image_to_video_lora.py"),
        (LORA, "--model_type i2v --training_type sft", "cogvideox_image_to_video_sft.py"),
        (SFT, "--model_name cogvideox1.5-i2v", "cogvideox_image_to_video_sft.py"),
        (LORA, "--model_type i2v --nonsense 3", "cogvideox_image_to_video_lora.py"),
        (IMAGE_LORA, "--model_type t2v", LORA),
        (IMAGE_LORA, "--training_type sft", IMAGE_SFT),
        (IMAGE_SFT, "--model_name cogvideox-t2v --training_type lora", LORA),
    ],
)
def test_the_right_script_is_named(script: str, given: str, right: str) -> None:
    found = problems(*LEAST[script], *given.split(), script=script)
    assert found[-1].startswith(given.split(" --nonsense")[0])
    assert found[-1].endswith(f" {right}")
    assert len(found) == 1 + ("--nonsense" in given)


OF_TEXT = set(GUIDE_DEFAULTS) - {"noised_image_dropout"}  # the defaults that concern text-to-video


@pytest.mark.parametrize(
    ("given", "remarked"),
    [
        ((), OF_TEXT),
        (("--batch_size", "2", "--lr", "1e-4"), OF_TEXT - {"train_batch_size", "learning_rate"}),
        (("--train_steps", "7"), OF_TEXT - {"num_train_epochs"}),
        (("--preset", "style"), {"caption_dropout"}),
    ],
)
def test_defaults_of_the_cogvideo_guide_that_differ_are_remarked(
    given: tuple[str, ...], remarked: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    values = args.config_dict(parse("--training_type", "lora", *given))
    said = capsys.readouterr().err
    assert {name for name, value in GUIDE_DEFAULTS.items() if f"--{name} {value}" in said} == remarked
    assert not {name for name in remarked if str(values[name]) == GUIDE_DEFAULTS[name]}
    parse(*given)
    assert "CogVideo guide" not in capsys.readouterr().err
    parse("--model_type", "i2v", *given, script=IMAGE_LORA)
    assert "--noised_image_dropout 0" in capsys.readouterr().err


def test_the_documented_defaults_of_the_cogvideo_guide_are_those_of_the_remark() -> None:
    text = (TRAINING.parent / "docs" / "other_trainers.md").read_text()
    rows = {row.split("`")[1]: row.split("|")[-2].strip() for row in text.splitlines() if row.startswith("| `--")}
    assert {f"--{name}": value for name, value in GUIDE_DEFAULTS.items()}.items() <= rows.items()


def test_a_flag_without_its_value_names_those_that_it_accepts() -> None:
    (line,) = problems(*LEAST[LORA], "--compile_blocks")
    assert line.startswith("--compile_blocks: takes a value, one of auto, yes, no: ")
    (line,) = problems(*LEAST[LORA], "--rank")
    assert line.startswith("--rank: takes a value: ")


def test_a_size_of_clips_in_the_flags_of_validation_videos_is_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    """In the examples of diffusers and in earlier versions of the factory, these flags are the size of the clips."""
    size = ("--height", "480", "--width", "720")
    parse(*size)
    assert "to train at this size, give --height_buckets 480 --width_buckets 720" in capsys.readouterr().err
    for more in (("--train_resolution", "9x64x96"), ("--height_buckets", "64"), ("--load_tensors",)):
        parse(*size, *more)
        assert "--height" not in capsys.readouterr().err
    assert problems(*LEAST[PREPARE], *size, script=PREPARE) == (
        "--height and --width: set the size of validation videos in training, and clips would get the nearest of all "
        "default sizes; give --height_buckets and --width_buckets instead",
    )
    parse(*size, "--height_buckets", "480", "--width_buckets", "720", script=PREPARE)


def test_a_number_of_frames_without_a_bucket_of_this_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(*LEAST[LORA], "--max_num_frames", "25") == (
        "--max_num_frames 25: every frame bucket is longer; to train at that length, add --frame_buckets 25",
    )
    parse("--max_num_frames", "81")
    said = "--max_num_frames 81: clips are trained with 49 frames, the default bucket; give --frame_buckets 81\n"
    assert capsys.readouterr().err == said
    parse("--max_num_frames", "81", "--frame_buckets", "49")
    assert capsys.readouterr().err == ""


def test_a_model_s_name_that_contradicts_its_type() -> None:
    (found,) = problems(*LEAST[LORA], "--model_name", "cogvideox-i2v", "--model_type", "t2v")
    assert found.startswith("--model_name cogvideox-i2v: contradicts --model_type t2v")


@pytest.mark.parametrize(
    ("given", "name"),
    [("--dataset_name N", "N"), ("--dataset_name N --dataset_config_name C", "N"), ("--dataset_config_name C", "NAME")],
)
def test_data_sets_of_the_hub_are_downloaded_first(given: str, name: str) -> None:
    missing, found = problems(*MODEL, *given.split())
    assert missing.startswith("--data_root: is required")
    download = f"hf download --repo-type dataset {name} --local-dir D"
    assert found == f"{given}: data sets of the hub are not downloaded here; {download}, then give --data_root D"


# -- the declarations --------------------------------------------------------------------------------------------------

GROUPS = {name: of for name, of in vars(flags).items() if dataclasses.is_dataclass(of) and name.endswith("Flags")}


def attributes_read(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def test_every_flag_has_a_reader() -> None:
    trees = {path: ast.parse(path.read_text()) for path in TRAINING.rglob("*.py")}
    own = [
        trees.pop(TRAINING / "cogvideox" / "config" / f"{name}.py")
        for name in ("flags", "options", "foreign_flags", "conflicts", "args")
    ]
    readers = set().union(*map(attributes_read, trees.values()))
    defined = [node for tree in own for node in tree.body if isinstance(node, ast.FunctionDef)]
    functions = set().union(*map(attributes_read, defined))
    unread = {
        f"{group}.{item.name}"
        for group, of in GROUPS.items()
        for item in dataclasses.fields(of)
        if item.name not in readers and not item.metadata["idle"]
    }
    # These flags are read only while the command line is parsed.
    only_here = {"ScriptFlags.print_config", "PrepareFlags.save_latents_and_embeddings"}
    only_here |= {"GuideFlags.model_type", "GuideFlags.training_type"}
    only_here |= {"OptimizerFlags.offload_gradients"}  # options.wanted_places turns it into a flag of the plan
    refused = {"DataFlags.dataset_name", "DataFlags.dataset_config_name"}
    assert unread == only_here | refused
    assert {name.split(".")[1] for name in only_here} <= functions


def test_idle_flags_are_read_by_nobody() -> None:
    """No code reads an attribute with the name of such a flag, except pin_memory, which training scripts use."""
    idle = {item.name: of for of in GROUPS.values() for item in dataclasses.fields(of) if item.metadata["idle"]}
    assert {"num_artifact_workers", "use_slicing", "enable_model_cpu_offload"} <= set(idle)
    trees = [ast.parse(path.read_text()) for path in TRAINING.rglob("*.py")]
    read = set().union(*map(attributes_read, trees))
    assert read & set(idle) == {"pin_memory"}


def test_every_group_is_taken_by_a_script() -> None:
    taken = {of for options in OPTIONS.values() for of in typing.get_type_hints(options).values()}
    assert taken == set(GROUPS.values())


def test_trackers_can_be_left_off() -> None:
    given = ((), ("--report_to", "none"), ("--report_to", "wandb"))
    assert [tracker_names(parse(*flags).train.report_to) for flags in given] == [[], [], ["wandb"]]


@pytest.mark.parametrize("group", GROUPS)
def test_every_flag_has_one_help_line(group: str) -> None:
    for item in dataclasses.fields(GROUPS[group]):
        assert item.metadata["help"].strip(), item.name
        assert "\n" not in item.metadata["help"], item.name


@pytest.mark.parametrize("script", OPTIONS)
def test_no_name_is_used_twice_in_a_script(script: str) -> None:
    names = [name for _, item, _ in fields_of(OPTIONS[script]) for name in (item.name, *item.metadata["aliases"])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("group", GROUPS)
def test_defaults_obey_their_own_rules(group: str) -> None:
    types = typing.get_type_hints(GROUPS[group])
    for item in dataclasses.fields(GROUPS[group]):
        if item.default in (dataclasses.MISSING, None):
            continue
        of, many = args.value_type(types[item.name])
        for value in item.default if many else [item.default]:
            assert args.typed_value(item, of, str(value)) == value


# -- the end of a script -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("a\nb"), 2, "script: 1 problem\n  a\\nb\n"),
        (UsageError(["a", "  seed: 1 there, 2 now"]), 2, "script: 1 problem\n  a\n    seed: 1 there, 2 now\n"),
        (UsageError(["a", "  of a", "b"]), 2, "script: 2 problems\n  a\n    of a\n  b\n"),
        (stopping.Stopped(), 75, "stopped; the same command continues\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/d/x"),
            2,
            "script: 1 problem\n  /d/x: No space left on device, ",
        ),
        (
            OSError(errno.EMFILE, "Too many open files"),
            2,
            "script: 1 problem\n  the limit of open files is reached; raise it, such as with: ulimit -n 4096",
        ),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),  # a process that cannot be started
            2,
            "script: 1 problem\n  the limit of processes and threads is reached; raise it (ulimit -u",
        ),
        (
            RuntimeError("can't start new thread"),
            2,
            "script: 1 problem\n  the limit of processes and threads is reached; raise it (ulimit -u",
        ),
    ],
)
def test_an_error_that_the_user_can_fix_is_one_line(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(options: typing.Any) -> int:
        raise error

    monkeypatch.setattr(stopping, "install", lambda: None)
    # The state of another run in this process must not be used.
    monkeypatch.setattr(stopping, "_state", stopping._State())
    monkeypatch.setattr(stopping, "end_process", sys.exit)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # torch.distributed may have put its own there
    monkeypatch.setattr(sys, "argv", ["/some/script", *LEAST[PREPARE]])
    with pytest.raises(SystemExit) as ended:
        args.run_script(main, PrepareOptions, "doc", ())
    assert ended.value.code == status
    assert capsys.readouterr().err.startswith(line)


def test_the_traceback_of_accelerate_is_announced(tmp_path: Path) -> None:
    """It follows the message about the problem, and is what a user sees first."""
    cpu = ROOT / "accelerate_configs" / "cpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", cpu]
    script = [ROOT / "training" / PREPARE, "--model_id", tmp_path, "--data_root", tmp_path / "missing"]
    lines = subprocess.run([*launcher, *script], capture_output=True, text=True, check=False).stderr.splitlines()
    first = lines.index("Traceback (most recent call last):")
    assert lines[0].startswith("prepare_dataset.py: ")
    assert lines[first - 1] == "(A traceback of the launcher follows. It only says that this script ended with 2.)"
    alone = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=False).stderr.splitlines()
    assert alone == lines[: first - 1]


THREE = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "training")!r})
from cogvideox import stopping
from cogvideox.config import args
from cogvideox.errors import UsageError
if os.environ["RANK"] == "2":
    stopping.print_once("only here")
args.parse = lambda *_: None
args.hide_secrets = lambda _: None
def main(_):
    Path(sys.argv[1], os.environ["RANK"]).touch()
    while len(os.listdir(sys.argv[1])) < 3: time.sleep(0.01)
    raise UsageError("of all")
args.run_script(main, None, None, ())
"""


def test_what_all_processes_of_a_launch_have_to_say_is_printed_once(tmp_path: Path) -> None:
    """What only one of them has to say is printed, too, whichever it is."""
    (tmp_path / "ready").mkdir()
    (tmp_path / "three.py").write_text(THREE)
    cpu = ROOT / "accelerate_configs" / "cpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", cpu, "--multi_gpu"]
    command = [*launcher, "--num_processes", "3", tmp_path / "three.py", tmp_path / "ready"]
    environ = os.environ | {"ACCELERATE_USE_CPU": "true"}
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=environ).stderr
    for line in ("only here", "three.py: 1 problem", "  of all", "(A traceback of the launcher follows. It only"):
        assert said.count(line) == 1, said


FAILING = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "training")!r})
from cogvideox import stopping
from cogvideox.config import args
from cogvideox.errors import UsageError
args.parse = lambda *_: None
args.hide_secrets = lambda _: None
def main(_):
    Path(sys.argv[2], os.environ["RANK"]).touch()
    while len(os.listdir(sys.argv[2])) < 2: time.sleep(0.01)
    if os.environ["RANK"] == "0":
        if sys.argv[1] == "saved":
            stopping.allow("and saved after step 3 of 6")
        time.sleep(60)
    raise UsageError("a flag") if sys.argv[1] != "crash" else ValueError("a crash")
args.run_script(main, None, None, ())
"""


@pytest.mark.parametrize(
    ("how", "status", "stopped"),
    [("flag", "2", ""), ("saved", "2", "stopped and saved after step 3"), ("crash", "", "")],
)
def test_a_process_that_is_stopped_because_another_fails_keeps_its_status(
    how: str, status: str, stopped: str, tmp_path: Path
) -> None:
    """The launcher stops the others by a signal. That the same command continues would be wrong, and so would be 75."""
    (tmp_path / "ready").mkdir()
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "exit").touch()
    cpu = ROOT / "accelerate_configs" / "cpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", cpu, "--multi_gpu"]
    command = [*launcher, "--num_processes", "2", tmp_path / "failing.py", how, tmp_path / "ready"]
    environ = os.environ | {"ACCELERATE_USE_CPU": "true", "COGVIDEOX_EXIT_FILE": str(tmp_path / "exit")}
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=environ).stderr
    assert (tmp_path / "exit").read_text() == status
    lines = [line for line in said.splitlines() if line.startswith("stopped")]
    assert [line.startswith(stopped) for line in lines] == ([True] if stopped else []), said
    assert said.count("(A traceback of the launcher follows.") == (0 if how == "crash" else 1 + bool(stopped))


def test_numbers_that_are_not_finite_are_named_also_if_another_process_has_ended_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All processes find them, and only the first one says so."""

    def ends(_: object) -> int:
        raise NonFiniteError("checkpoint-2 is not saved: weight holds NaN")

    monkeypatch.setattr(stopping, "another_failed", lambda: True)
    monkeypatch.setattr(args, "parse", lambda *_: None)
    monkeypatch.setattr(args, "hide_secrets", lambda _: None)
    assert args.exit_status(ends, LoraOptions, None, ()) == args.NON_FINITE_EXIT
    assert capsys.readouterr().err.endswith(": checkpoint-2 is not saved: weight holds NaN\n")


def print_once(folder: Path, printed: Path, launched: bool, *lines: str) -> None:
    """Prints lines from a process of a launch, or from one that no launcher has started."""
    (folder / "attempt_0" / "0").mkdir(parents=True, exist_ok=True)
    code = f"from cogvideox import stopping; stopping.is_launcher = lambda _: {launched}; stopping.print_once(*{lines})"
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'training')!r}); {code}"
    environ = os.environ | {"TORCHELASTIC_ERROR_FILE": str(folder / "attempt_0" / "0" / "error.json")}
    with open(printed, "a") as file:
        subprocess.run([sys.executable, "-c", code], stderr=file, check=True, env=environ)


@pytest.mark.parametrize("printed", ["", "one.log"])
def test_a_line_is_printed_again_to_another_place_and_without_a_launcher(tmp_path: Path, printed: str) -> None:
    """A launcher may write what each process prints to a file of its own. Without a launcher, a run is repeated."""
    for number in range(2):
        path = tmp_path / (printed or f"{number}.log")
        print_once(tmp_path, path, not printed, "a", "b")
    assert path.read_text() == "a\nb\n" * (2 if printed else 1)


def test_a_full_disk_is_reported_once_whatever_each_process_has_measured(tmp_path: Path) -> None:
    problems = [
        f"out: {os.strerror(errno.ENOSPC)}, {size_text(needed)} needed, {size_text(free)} free; free some space"
        for needed, free in ((294, 0), (296, 1), (5 << 30, 2 << 20), (7 << 20, 9 << 10))
    ]
    other = problems[0].replace("out", "another")
    for problem in (*problems, other):
        print_once(tmp_path, tmp_path / "log", True, "prepare_dataset.py: 1 problem", f"  {problem}")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[1::2] == [f"  {problems[0]}", f"  {other}"]


@pytest.mark.parametrize(("written", "kept"), [(None, "1"), ("2", "2")])
def test_an_error_that_the_user_cannot_fix_keeps_its_traceback(
    written: str | None,
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """It may follow from an error of another rank, whose status is kept."""

    def main(options: typing.Any) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    exit_file = tmp_path / "exit"
    if written:
        exit_file.write_text(written)
    monkeypatch.setenv("COGVIDEOX_EXIT_FILE", str(exit_file))
    monkeypatch.setattr(stopping, "install", lambda: None)
    monkeypatch.setattr(stopping, "_state", stopping._State())
    monkeypatch.setattr(stopping, "end_process", sys.exit)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # torch.distributed may have put its own there
    monkeypatch.setattr(sys, "argv", ["/some/script", *LEAST[PREPARE]])
    with pytest.raises(SystemExit) as ended:
        args.run_script(main, PrepareOptions, "doc", ())
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert ", in main\n" in said
    assert said.endswith("\nOSError: [Errno 9] Bad file descriptor\n")
    assert exit_file.read_text() == kept


SUMS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from cogvideox.config import args

def main(options):
    import torch
    torch.manual_seed(0)
    vector, matrix, found = torch.randn(1, 96), torch.randn(48, 96), set()
    for offset in range(16):  # numbers from the address that torch aligns
        moved = torch.empty(matrix.numel() + offset)[offset:].view_as(matrix).copy_(matrix)
        found.add((vector @ moved.T).numpy().tobytes())
    print(len(found))

args.parse = lambda *_: None
args.hide_secrets = lambda _: None
args.run_script(main, None, None, ())
"""


def test_sums_do_not_depend_on_the_place_in_memory() -> None:
    """A restarted run has its weights elsewhere, and so has diffusers when it loads the result.

    The processors of some makers and years never show the difference.
    """
    command = [sys.executable, "-c", SUMS, ROOT / "training"]
    inherited = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    assert subprocess.run(command, capture_output=True, text=True, env=inherited, check=True).stdout == "1\n"


@pytest.mark.parametrize("script", ["doctor.py", "split_scenes.py", "caption_dataset.py", *SCRIPTS])
def test_a_script_without_its_environment_says_how_to_activate_it(script: str, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "rabbit.mp4").touch()
    flags = ["--model_id", str(ROOT / "examples/model"), "--output_dir", str(tmp_path / "out")]
    flags += [] if script == "doctor.py" else ["--data_root", str(tmp_path / "clips")]
    command = [sys.executable, "-S", str(ROOT / "training" / script), *flags]  # -S: no installed packages
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"{script}: 1 problem\n  {sys.executable}: torch is not installed for this Python; activate the environment: "
        "source .venv/bin/activate; docs/troubleshooting.md says how to create it\n"
    )
