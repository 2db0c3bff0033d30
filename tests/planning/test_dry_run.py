"""Tests --dry_run: its figures for an H100 are compared with measured ones, and its steps with those of a run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from hub_stand_in import in_hub_cache
from preparing import complete
from random_models import TRANSFORMERS, vae_config
from safetensors.torch import load_file
from tiny_cogvideox import make_tiny

from cogvideox import host_memory
from cogvideox.config import args
from cogvideox.config.buckets import Bucket
from cogvideox.config.cards import CARDS
from cogvideox.config.geometry import read_geometry
from cogvideox.config.options import SCRIPTS, LoraOptions
from cogvideox.data.cache import CachedSample, CacheIndex, hash_of, open_index
from cogvideox.errors import UsageError
from cogvideox.model.methods import FullFinetune, Lora
from cogvideox.model.models import load_transformer
from cogvideox.planning import dry_run
from cogvideox.planning.plan import GIB
from cogvideox.runtime.resume import StartPoint

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GUIDE = " ".join((Path(__file__).parents[2] / "docs" / "guide.md").read_text().split())
TEXT_LORA, IMAGE_SFT = "cogvideox_text_to_video_lora.py", "cogvideox_image_to_video_sft.py"
TEXT_SFT = "cogvideox_text_to_video_sft.py"
SIZE = ("--height_buckets", "32", "--width_buckets", "48", "--frame_buckets", "9")
BUDGETS = {"8gb": "8", "12gb": "12", "24gb": "24"}
pytestmark = pytest.mark.usefixtures("threads")
Tiny = Callable[[str], Path]


def configs_of(pipeline: Path, folder: Path) -> Path:
    """Copies a pipeline without its weights."""
    for part in ("transformer", "vae", "scheduler", "tokenizer"):
        (folder / part).mkdir(parents=True)
        for path in (pipeline / part).glob("*[!s]"):
            shutil.copy(path, folder / part)
    return folder


def configs_of_kind(kind: str, folder: Path) -> Path:
    """Writes the configs of a published model."""
    scheduler = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
    configs = {
        "transformer/config.json": TRANSFORMERS[kind] | {"_class_name": "CogVideoXTransformer3DModel"},
        "vae/config.json": vae_config(kind),
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs of CogVideoX-5b, without weights."""
    return configs_of_kind("5b", tmp_path_factory.mktemp("5b"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of thirty clips of 49x480x720 that has only its index."""
    folder = tmp_path_factory.mktemp("tensors")
    keys = hash_of("clip"), hash_of("caption")
    samples = tuple(CachedSample(str(i), "a caption", Bucket(49, 480, 720), keys[:1], keys[1]) for i in range(30))
    dtypes = {"vae": "bf16", "text_encoder": "bf16"}
    CacheIndex(samples, keys[1], 8.0, "v", "t", dtypes, 226).save(folder)
    return folder


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every disk enough free space."""
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**50))


def add_checkpoint(output: Path, step: int, index: Path) -> None:
    """Adds a checkpoint of a step, without weights, to the output folder of a run on prepared data."""
    (output / f"checkpoint-{step}").mkdir(parents=True)
    (output / "config.json").touch()
    progress = {"step": step, "recipe": {"data": open_index(index).fingerprint}}
    (output / f"checkpoint-{step}" / "progress.json").write_text(json.dumps(progress))


def predict(model: Path, data: Path, output: Path, *more: str, script: str = TEXT_LORA, bf16: bool = True) -> int:
    """Runs a training script with --dry_run in this process; returns the exit status."""
    argv = ["--pretrained_model_name_or_path", str(model), "--data_root", str(data), "--output_dir", str(output)]
    argv += ["--dry_run", *(["--mixed_precision", "bf16"] if bf16 else []), *more]
    module: Any = import_module(script.removesuffix(".py"))
    return module.main(args.parse(SCRIPTS[script], None, argv))


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["fast", "24gb", "12gb", "8gb", "lean", "fast-cudnn", "24gb-cudnn", "lean-int8"])
def test_figures_of_an_h100_are_those_that_were_measured(row: str, published: Path) -> None:
    measured = json.loads((RESULTS / f"bench_5b-r128-{row}.json").read_text())
    plan, _, more = row.partition("-")
    flags = [
        "--gpu",
        "h100",
        "--dry_run",
        "--mixed_precision",
        "bf16",
        "--train_batch_size",
        "1",
        "--host_memory",
        "112",
    ]
    flags += ["--vram_budget", BUDGETS[plan]] if plan in BUDGETS else ["--plan", plan]
    flags += ["--base_precision", "int8"] if more == "int8" else []
    flags += ["--attention_backend", "cudnn" if more == "cudnn" else "flash-4", "--rank", "128"]
    named = ["--pretrained_model_name_or_path", str(published), "--data_root", "d"]
    options = args.read_flags(LoraOptions, [*named, *flags], None)[0]
    geometry, device = read_geometry(options.model), torch.device("cuda")
    run = dry_run.PlannedRun(geometry, Lora, device, torch.bfloat16, world=1, compiled=False)
    buckets = [Bucket(49, 480, 720)]
    sizes = dry_run.sizes_from_options(run, options, geometry, buckets, dry_run.expected_transformer(run, options))
    machine, backend, _ = dry_run.machine_for(run, options, sizes)
    plan_made = dry_run.plan_for(run, options, buckets, machine, backend)
    assert plan_made.seconds == pytest.approx(measured["seconds_per_step"], rel=0.05)
    # Cards differ a little, so that another plan may be the fastest. It needs about as much memory.
    assert plan_made.peak <= machine.device_bytes
    assert plan_made.peak / GIB == pytest.approx(measured["peak_gib"]["allocated"], rel=0.08, abs=0.5)


@pytest.mark.parametrize(("card", "title"), [("rtx4090", "RTX 4090"), ("rtx3060", "RTX 3060, 12 GB")])
def test_the_guide_has_the_predictions(
    card: str, title: str, published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/guide.md has what is predicted for 64 GiB of host memory, and the pinned memory also for 32 GiB."""
    flags = ("--load_tensors", "--preset", "style", "--max_train_steps", "2800", "--gpu", card, "--host_memory")
    assert predict(published, index, tmp_path / "out", *flags, "64") == 0
    text = capsys.readouterr().out
    seconds, hours = number(r"([\d.]+) s a step, ", text), number(r"a step, ([\d.]+) hours", text)
    pinned = r"pinned host memory \(predicted\): ([\d.]+)"
    times = f"{seconds:.2f} s | {seconds / 3.6:.1f} hours | {hours:.1f} hours"
    assert f"| {title} | {times} | {number(pinned, text):.1f} GiB | predicted |" in GUIDE
    assert predict(published, index, tmp_path / "out", *flags, "32") == 0
    name = title.partition(",")[0]
    assert f"{number(pinned, capsys.readouterr().out):.1f} GiB on an {name}" in GUIDE


@pytest.mark.parametrize("name", list(CARDS))
def test_every_card_has_plausible_rates(name: str) -> None:
    card = CARDS[name]
    assert 6 <= card.gib <= 200
    assert 1e13 < card.matmul < 1e15
    assert all(0.2 * card.matmul < rate < card.matmul for rates in card.attention.values() for rate in rates)
    assert 1e11 < card.memory < 1e13
    assert 1e10 < card.copies <= card.exchange < 3e11


@pytest.mark.parametrize(("name", "total"), [("rtx4090", 23.64), ("rtx5090", 31.37), ("l40s", 44.42)])
def test_a_plan_does_not_fill_more_than_cuda_has(name: str, total: float) -> None:
    """The totals, in GiB, are those of torch's messages that memory does not suffice."""
    options = args.read_flags(LoraOptions, ["--pretrained_model_name_or_path", "m", "--data_root", "d"], None)[0]
    machine, _ = dry_run.machine_of_card(options, name)
    assert machine.device_bytes / GIB < 0.95 * total


def test_cards_without_nvlink_exchange_divided_tokens_slowly(
    published: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    seconds = {}
    for card in ("h200", "rtx4090"):
        flags = ("--load_tensors", "--gpu", card, "--host_memory", "112", "--sequence_parallel", "2")
        assert predict(published, index, tmp_path / "out", *flags, "--train_batch_size", "1") == 0
        seconds[card] = number(r"s a step, ([\d.]+) s of it communication", capsys.readouterr().out)
    # 12 units of 8888 tokens of 3072 numbers for each of 42 blocks, or 16 where attention is computed again.
    assert seconds["h200"] == pytest.approx(12 * 42 * 8888 * 3072 * 2 / 2.4e11, rel=0.01)
    assert 6 < seconds["rtx4090"] / seconds["h200"] < 16


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("local", ["1", "2"])
def test_gradients_are_summed_over_all_machines(
    local: str,
    published: Path,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One GPU on each of two machines sums as many gradients as two GPUs of one machine."""
    given = ("--load_tensors", "--gpu", "h200", "--host_memory", "400", "--train_batch_size", "1")
    seconds = []
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", min(local, processes))
        assert predict(published, index, tmp_path / "out", *given, script=TEXT_SFT) == 0
        seconds.append(number(r"([\d.]+) s a step, ", capsys.readouterr().out))
    assert seconds[1] - seconds[0] > 0.16


# -- data and steps ----------------------------------------------------------------------------------------------------


def test_clips_are_counted_without_weights_or_encoding(
    tiny: Tiny, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = configs_of(tiny("5b"), tmp_path / "model"), Path(shutil.copytree(clips, tmp_path / "data"))
    flags = ("--num_train_epochs", "3", "--train_batch_size", "4", "--gpu", "rtx3060", *SIZE)
    assert predict(model, data, tmp_path / "out", *flags) == 0
    text = capsys.readouterr().out
    assert "data: 6 of 9x32x48\nsteps: 5 of 4 samples\n" in text  # 18 samples; the last batch is filled
    assert "time (predicted)" in text
    assert "rtx3060, 12 GiB; the rates are those of a table of cards, not measured here" in text
    assert number(r"tensors ([\d.]+)", text) >= 0
    assert not (tmp_path / "out").exists()
    assert not list(data.rglob("*.safetensors"))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "prepare_dataset.py"])
def test_every_script_predicts_the_steps_of_prepared_data(
    script: str, tiny: Tiny, tensors: Path, image_tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = "image" in script
    data = image_tensors if image else tensors
    model = configs_of(tiny("5b-i2v" if image else "5b"), tmp_path / "model")
    flags = ("--load_tensors", "--gpu", "rtx4090", "--train_batch_size", "1", "--num_train_epochs", "2")
    more = ("--ignore_learned_positional_embeddings",) if image else ()
    assert predict(model, data, tmp_path / "out", *flags, *more, script=script) == 0
    samples = len(json.loads((data / "index.json").read_text())["samples"])
    text = capsys.readouterr().out
    assert f"steps: {2 * samples} of 1 sample\n" in text
    assert number(r"GPU memory \(predicted\): ([\d.]+)", text) < 1.0


def test_only_tensors_that_are_not_in_the_cache_need_space(model: Path, clips: Path, tmp_path: Path) -> None:
    """Without the encoders, the tensors are expected in 16 bits. The weights of this model are in fp32."""
    cache = tmp_path / "cache"

    def encoded_bytes(folder: Path, *more: str) -> int:
        given = ["--pretrained_model_name_or_path", str(folder), "--data_root", str(clips), *SIZE, *more]
        options = args.parse(LoraOptions, None, [*given, "--tensor_cache", str(cache), "--dry_run"])
        return dry_run.promised_samples(options, read_geometry(options.model), StartPoint()).encoded_bytes

    configs, fp32 = configs_of(model, tmp_path / "configs"), encoded_bytes(model)
    assert encoded_bytes(configs) == fp32 / 2
    assert encoded_bytes(configs, "--dtype", "fp32") == fp32
    flags = {name.removeprefix("--"): (int(value),) for name, value in zip(SIZE[::2], SIZE[1::2], strict=True)}
    complete(model, clips, cache, **flags)
    tensors = [tensor for path in cache.rglob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(tensor.nbytes for tensor in tensors) == fp32
    assert encoded_bytes(model) == 0


@pytest.mark.parametrize("full", [None, "data", "out"])
def test_tensors_may_be_on_another_disk(
    full: str | None,
    tiny: Tiny,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, output = Path(shutil.copytree(clips, tmp_path / "data")), tmp_path / "out"
    disks: dict[str, Any] = {
        name: SimpleNamespace(name=name, stat=lambda number=number: SimpleNamespace(st_dev=number))
        for number, name in enumerate(("data", "out"))
    }
    monkeypatch.setattr(dry_run, "nearest_folder", lambda path: disks["data" if data in path.parents else "out"])
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda disk: SimpleNamespace(free=2**40 * (disk.name != full)))
    flags = ("--gpu", "h100", "--max_train_steps", "1", *SIZE)
    assert predict(configs_of(tiny("5b"), tmp_path / "model"), data, output, *flags) == bool(full)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("disk: ")]
    assert ["(tensors" in line for line in lines] == [True, False]
    assert [line.endswith("free space") for line in lines] == [full == "data", full == "out"]


def test_a_folder_of_the_factory_needs_its_index(published: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "video_latents").mkdir(parents=True)
    with pytest.raises(UsageError, match="has no index until a run has converted it"):
        predict(published, tmp_path / "data", tmp_path / "out", "--load_tensors", "--gpu", "h100")


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (TEXT_SFT, ""),
        (TEXT_LORA, "--use_dora"),
        (TEXT_LORA, "--init_lora_weights pissa"),
        (TEXT_LORA, "--init_lora_weights gaussian"),
    ],
)
def test_sizes_are_those_of_a_run_with_weights(kind: str, flags: str, script: str, tmp_path: Path) -> None:
    """2b has positions in fp64, and PiSSA keeps its initial matrices."""
    model = make_tiny(tmp_path / "model", kind)
    script = script.replace("text", "image") if "i2v" in kind else script
    rank = ("--rank", "4") if script.endswith("lora.py") else ()
    named = ["--pretrained_model_name_or_path", str(model), "--data_root", "d", *rank, *flags.split()]
    options = args.read_flags(SCRIPTS[script], named, None)[0]
    geometry, method = read_geometry(options.model), Lora if rank else FullFinetune
    run = dry_run.PlannedRun(geometry, method, torch.device("cpu"), torch.bfloat16, world=1, compiled=False)
    transformer = method(load_transformer(options.model, run.dtype), options).transformer
    predicted, real = (
        dry_run.sizes_from_options(run, options, geometry, [geometry.own_bucket], one)
        for one in (dry_run.expected_transformer(run, options), transformer)
    )
    assert predicted == real


# -- host memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "precision", "loaded"), [("2b", "bf16", 3.2), ("2b", "fp16", 0), ("5b", "bf16", 0), ("5b", "fp16", 10.4)]
)
def test_weights_that_are_converted_take_host_memory_before_they_are_placed(
    kind: str, precision: str, loaded: float, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2b is published in fp16 and all other models in bf16. Other weights are pages of their file."""
    model = configs_of_kind(kind, tmp_path / kind)
    flags = ["--load_tensors", "--gpu", "h100", "--host_memory", "12", "--train_batch_size", "4", "--plan", "lean"]
    assert predict(model, index, tmp_path / "out", *flags, "--mixed_precision", precision, "--rank", "4") == 1
    available = number(r"does not fit: .*; [\d.]+ and ([\d.]+) GiB are available", capsys.readouterr().out)
    assert available == pytest.approx(0.9 * (12 - loaded), abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_of_the_weights_is_that_of_their_files(dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    """Before they are downloaded, it is that of the published model."""
    model = make_tiny(tmp_path / "model", "2b")
    transformer = CogVideoXTransformer3DModel.from_pretrained(model / "transformer")
    transformer.to(dtype).save_pretrained(model / "transformer")
    for folder, expected in ((model, dtype), (configs_of(model, tmp_path / "configs"), torch.float16)):
        named = ["--pretrained_model_name_or_path", str(folder), "--data_root", "d"]
        options = args.read_flags(LoraOptions, named, None)[0]
        assert dry_run.stored_type(options, read_geometry(options.model)) == expected


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        ("--gpu rtx3060 --host_memory 16 --plan fast --train_batch_size 1", "leave out --plan"),
        (
            "--gpu rtx3060 --host_memory 64 --train_batch_size 8",
            "--train_batch_size 4 --gradient_accumulation_steps 2",
        ),
        ("--gpu rtx3060 --host_memory 8 --rank 256 --train_batch_size 1", "--base_precision int8"),
    ],
)
def test_the_cheapest_change_makes_it_fit(
    flags: str, change: str, published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--load_tensors", *flags.split()]
    assert predict(published, index, tmp_path / "out", *given) == 1
    text = capsys.readouterr().out
    assert "does not fit: the smallest allowed plan needs" in text
    assert f"cheapest change: {change}: " in text
    if change.startswith("leave out"):
        given = [text for text in given if text not in ("--plan", "fast")]
    else:
        names = change.split()[::2]
        given = [text for i, text in enumerate(given) if not {text, given[i - 1]} & set(names)]
        given += change.split()
    assert predict(published, index, tmp_path / "out", *given) == 0
    assert number(r"GPU memory \(predicted\): ([\d.]+)", capsys.readouterr().out) == pytest.approx(
        number(r"cheapest change: .*: ([\d.]+) GiB", text), abs=0.02
    )


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(
    ("flags", "change"),
    [
        ("--host_memory 32 --use_cpu_offload_optimizer", "--use_cpu_offload_optimizer"),
        (
            "--host_memory 32 --use_cpu_offload_optimizer --offload_gradients",
            "--use_cpu_offload_optimizer --offload_gradients",
        ),
        ("--host_memory 8 --vram_budget 79 --compile_blocks no", "--compile_blocks"),
    ],
)
def test_every_flag_that_forces_a_plan_may_be_left_out(
    flags: str, change: str, published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--load_tensors", "--gpu", "h200", "--train_batch_size", "1", "--optimizer", "adamw"]
    assert predict(published, index, tmp_path / "out", *given, *flags.split(), script=TEXT_SFT) == 1
    assert f"cheapest change: leave out {change}: " in capsys.readouterr().out
    left = [flag for flag in flags.replace(" no", "").split() if flag not in change.split()]
    assert predict(published, index, tmp_path / "out", *given, *left, script=TEXT_SFT) == 0


TIGHT = "--gpu rtx4090 --vram_budget 3 --host_memory 24 --train_batch_size 1 --rank 16 --base_precision int8"
IMAGE_LORA = "cogvideox_image_to_video_lora.py"


@pytest.mark.parametrize(("more", "shorter"), [("", False), ("--ignore_learned_positional_embeddings", True)])
def test_sizes_that_learned_positions_do_not_fit_are_not_proposed(
    more: str, shorter: bool, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, flags = configs_of_kind("5b-i2v", tmp_path / "model"), ("--load_tensors", *TIGHT.split(), *more.split())
    assert predict(model, index, tmp_path / "out", *flags, script=IMAGE_LORA) == 1
    text = capsys.readouterr().out
    assert ("cheapest change: clips prepared again with --train_resolution 33x480x720: " in text) == shorter
    assert ("no change of flags was found with which it fits\n" in text) != shorter
    assert "\nor --vram_budget 12, on a card of 12 GiB, such as rtx3060\n" in text


@pytest.mark.parametrize("resumes", [False, True])
def test_settings_that_the_checkpoint_does_not_have_are_not_proposed(
    resumes: bool, published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    if resumes:
        add_checkpoint(output, 5, index)
    flags = ["--load_tensors", "--gpu", "rtx3060", "--host_memory", "8", "--train_batch_size", "1"]
    assert predict(published, index, output, *flags, "--max_train_steps", "100") == 1
    text = capsys.readouterr().out
    assert ("cheapest change: --base_precision int8: " in text) != resumes
    assert ("no change of flags was found with which it fits\n" in text) == resumes


@pytest.mark.parametrize("launcher", ["", "DeepSpeed"])
def test_a_change_that_the_launcher_does_not_allow_is_not_proposed(
    launcher: str,
    published: Path,
    index: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if launcher:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    flags = ["--load_tensors", "--gpu", "rtx3060", "--host_memory", "8", "--train_batch_size", "1"]
    assert predict(published, index, tmp_path / "out", *flags) == 1
    assert ("--base_precision" in capsys.readouterr().out) != bool(launcher)


def test_hardware_that_suffices_is_named(
    published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load_tensors", "--gpu", "rtx3060", "--host_memory", "4", "--plan", "fast", "--train_batch_size", "1"]
    assert predict(published, index, tmp_path / "out", *flags) == 1
    assert "or a card of 24 GiB, such as rtx" in capsys.readouterr().out


def test_a_container_of_64_gb_decides_on_a_machine_of_256(
    published: Path,
    index: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4 GiB of the container are in use, a quarter of which are cached pages of files, such as mapped weights."""
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=256 * GIB))
    monkeypatch.setattr(host_memory, "MOUNT", tmp_path)
    monkeypatch.setattr(host_memory, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    (tmp_path / "self").write_text("0::/\n")
    flags = ["--load_tensors", "--gpu", "rtx4090", "--train_batch_size", "1", "--max_train_steps", "100"]
    flags += ["--optimizer", "adamw"]
    assert predict(published, index, tmp_path / "out", *flags, script=TEXT_SFT) == 0
    assert number(r"; ([\d.]+) GiB of free host memory", capsys.readouterr().out) == 256
    contents = {"memory.max": 64 * 10**9, "memory.current": 4 * GIB, "memory.stat": f"anon 7\nactive_file {GIB}"}
    for name, content in contents.items():
        (tmp_path / name).write_text(f"{content}\n")
    assert predict(published, index, tmp_path / "out", *flags, script=TEXT_SFT) == 1
    text = capsys.readouterr().out
    assert number(r"; ([\d.]+) GiB of free host memory", text) == pytest.approx(64e9 / GIB - 3, abs=0.05)
    available = number(
        r"does not fit: .* GiB of host memory in addition .*; [\d.]+ and ([\d.]+) GiB are available", text
    )
    assert available == pytest.approx(0.9 * (64e9 / GIB - 3), abs=0.1)
    assert predict(published, index, tmp_path / "out", *flags, "--use_8bit", script=TEXT_SFT) == 0
    text = capsys.readouterr().out
    assert number(r"pinned host memory \(predicted\): ([\d.]+) of", text) <= 51


def test_a_full_disk_is_reported(
    published: Path,
    index: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--load_tensors", "--gpu", "h100", "--train_batch_size", "1", "--max_train_steps", "1200", "--rank", "128"]
    assert predict(published, index, tmp_path / "out", *flags) == 0
    text = capsys.readouterr().out
    elements = 4 * 2 * 128 * 3072 * 42  # four layers of each block have two matrices of rank 128
    assert number(r"3 checkpoints of ([\d.]+)", text) == pytest.approx(elements * 14 / GIB, abs=0.01)
    assert number(r"result ([\d.]+)", text) == pytest.approx(elements * 2 / GIB, abs=0.01)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB))
    assert predict(published, index, tmp_path / "out", *flags) == 1
    assert "give --checkpoints_total_limit, or free space" in capsys.readouterr().out


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(
    ("card", "flags", "processes", "bytes_of_a_weight"),
    [
        ("h200", "", 1, 12),  # the bf16 weight, 16 low bits of its master, and two fp32 moments
        ("h200", "", 2, 12),  # a complete copy of the model on each GPU
        ("h100", "", 2, 14),  # sharded: the masters are saved completely
        ("h200", "--use_ema", 1, 18),  # the saved weights are those of the average, so the masters are saved too
        ("h200", "--use_8bit", 2, 6),
        ("h200", "--plan off", 2, 12),
    ],
)
def test_the_size_of_a_checkpoint_follows_from_what_stores_the_weights(
    card: str,
    flags: str,
    processes: int,
    bytes_of_a_weight: int,
    published: Path,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    given = ["--load_tensors", "--gpu", card, "--host_memory", "400", "--train_batch_size", "1", *flags.split()]
    assert predict(published, index, tmp_path / "out", *given, script=TEXT_SFT) == 0
    text = capsys.readouterr().out
    assert ("sharded over" in text) == (bytes_of_a_weight == 14)
    one, result = number(r"checkpoints? of ([\d.]+)", text), number(r"result ([\d.]+)", text)
    assert one / result == pytest.approx(bytes_of_a_weight / 2, rel=0.01)


def test_what_no_plan_runs_is_not_predicted(
    published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(published, index, tmp_path / "out", "--load_tensors", "--gpu", "h100", bf16=False) == 0
    text = capsys.readouterr().out
    assert "not predicted: requires --mixed_precision bf16 or fp16 on a GPU" in text
    assert "disk: " in text  # which does not depend on a plan


def test_checkpoints_by_the_clock_are_predicted(
    published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load_tensors", "--gpu", "h100", "--train_batch_size", "1", "--max_train_steps", "400"]
    assert predict(published, index, tmp_path / "out", *flags, "--save_every_minutes", "2") == 0
    text = capsys.readouterr().out
    seconds = number(r"time \(predicted\): ([\d.]+) s a step", text)
    assert number(r"(\d+) checkpoints of", text) == pytest.approx(1 + 400 * seconds / 120, abs=1)


def mixed_index(index: Path, folder: Path, *buckets: Bucket) -> Path:
    """Writes an index whose samples are divided equally among buckets."""
    samples = open_index(index).samples
    mixed = [replace(sample, bucket=buckets[i % len(buckets)]) for i, sample in enumerate(samples)]
    folder.mkdir()
    replace(open_index(index), samples=tuple(mixed)).save(folder)
    return folder


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(("processes", "script"), [("1", TEXT_LORA), ("2", TEXT_SFT)])
def test_hours_are_those_of_all_buckets(
    processes: str,
    script: str,
    published: Path,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan is that of the largest bucket, here with sharded weights for two processes."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    large, small = Bucket(49, 480, 720), Bucket(9, 480, 720)
    flags = ["--load_tensors", "--gpu", "h100", "--train_batch_size", "1", "--max_train_steps", "90000"]
    found = []
    for number_of, buckets in enumerate([(large,), (small,), (large, small, small)]):
        data = mixed_index(index, tmp_path / str(number_of), *buckets)
        keep = ("--keep", "attention", "--kept_on", "device")  # so that all have the same plan
        assert predict(published, data, tmp_path / "out", *flags, *keep, "--host_memory", "400", script=script) == 0
        text = capsys.readouterr().out
        of_plan, mean = number(r"([\d.]+) s a step\n", text), number(r"time \(predicted\): ([\d.]+) s a step", text)
        hours = number(r"([\d.]+) hours for 90000 steps", text)
        assert hours == pytest.approx(25 * mean, abs=0.2)
        assert ("s a step on average, " in text) == (len(set(buckets)) > 1)
        assert ("sharded over 2 processes" in text) == (processes == "2")
        found.append((of_plan, mean))
    assert found[2] == (found[0][0], pytest.approx((found[0][1] + 2 * found[1][1]) / 3, abs=0.011))


def test_compilation_is_predicted_for_each_bucket_whose_samples_are_divided(
    published: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, sizes = {}, (Bucket(49, 480, 720), Bucket(49, 720, 480), Bucket(25, 480, 720))
    mixed = mixed_index(index, tmp_path / "mixed", *sizes)
    flags = ["--load_tensors", "--gpu", "h200", "--train_batch_size", "1", "--max_train_steps", "2", "--plan", "fast"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for divided in ("1", "2"):
        for data in (index, mixed):
            given = [*flags, "--sequence_parallel", divided]
            assert predict(published, data, tmp_path / "out", *given) == 0
            text = capsys.readouterr().out
            found[divided, data] = number(r"([\d.]+) s for 2 steps", text), "for any length" in text
    assert found["1", mixed] == (pytest.approx(found["1", index][0], abs=1), True)
    assert found["2", mixed] == (pytest.approx(found["2", index][0] + 12, abs=1), False)


@pytest.mark.parametrize("wanted", ["", "--resume_from_checkpoint checkpoint-40"])
def test_a_resumed_run_is_predicted_from_its_checkpoint(
    wanted: str, published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, times = tmp_path / "out", []
    flags = ["--load_tensors", "--gpu", "h200", "--train_batch_size", "1", "--max_train_steps", "100"]
    flags += ["--checkpointing_steps", "20", "--checkpoints_total_limit", "2", "--compile_blocks", "no"]
    for steps in ((), (20, 40)):
        for step in steps:
            add_checkpoint(output, step, index)
        assert predict(published, index, output, *flags, *(wanted.split() if steps else [])) == 0
        text = capsys.readouterr().out
        assert ("steps: 100 of 1 sample; 40 are done, in checkpoint-40\n" in text) == bool(steps)
        unchecked = "not checked: whether checkpoint-40 was made with these settings; "
        assert (f"{unchecked}{published} has no transformer here\n" in text) == bool(steps)
        times.append(number(r"([\d.]+) (?:s|min) for ", text))
        kept = "1 checkpoint of" if steps else "3 checkpoints of"
        assert kept in text  # the oldest one is deleted when a new one is complete
    assert times[1] == pytest.approx(0.6 * times[0], rel=0.05)
    with pytest.raises(UsageError, match="is at step 40 already"):
        predict(published, index, output, *flags, "--max_train_steps", "30")
    with pytest.raises(UsageError, match="--resume_from_checkpoint checkpoint-7: "):
        predict(published, index, output, *flags, "--resume_from_checkpoint", "checkpoint-7")


# -- what the run itself refuses ---------------------------------------------------------------------------------------


def test_a_plan_that_the_run_cannot_follow_is_refused(published: Path, index: Path, tmp_path: Path) -> None:
    flags = ("--load_tensors", "--gpu", "h100", "--plan", "lean")
    with pytest.raises(UsageError, match="--plan lean: requires --mixed_precision bf16 or fp16 on a GPU; leave it out"):
        predict(published, index, tmp_path / "out", *flags, bf16=False)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--keep_best", "--keep_best: there are no clips to measure the loss on"),
        ("--id_token ANOTHER", "--id_token ANOTHER: the captions were prepared without it"),
    ],
)
def test_prepared_data_that_the_run_refuses_are_refused(
    flags: str, problem: str, published: Path, index: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=problem):
        predict(published, index, tmp_path / "out", "--load_tensors", "--gpu", "h100", *flags.split())


@pytest.mark.parametrize(
    ("file", "flags", "problem"),
    [
        ("notes.txt", (), "is not empty and not a run of this trainer"),
        ("config.json", ("--no_resume",), "--no_resume: .* is not empty"),
    ],
)
def test_a_folder_that_the_run_refuses_is_refused(
    file: str, flags: tuple[str, ...], problem: str, published: Path, index: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).touch()
    with pytest.raises(UsageError, match=problem):
        predict(published, index, tmp_path / "out", "--load_tensors", "--gpu", "h100", *flags)


@pytest.mark.parametrize("hub", [False, True], ids=["folder", "hub"])
def test_tensors_of_another_model_are_refused(hub: bool, tensors: Path, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", "5b", seed=1)
    in_hub_cache(tmp_path / "cache", "other", other)
    flags = ("--load_tensors", "--gpu", "h100", "--train_batch_size", "1", "--cache_dir", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="its tensors were made with another VAE and text encoder than this model's"):
        predict(Path("me/other") if hub else other, tensors, tmp_path / "out", *flags)


@pytest.mark.parametrize("hub", [False, True], ids=["folder", "hub"])
def test_without_weights_the_encoders_are_not_compared(
    hub: bool, published: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_hub_cache(tmp_path / "cache", "5b", published)
    model = Path("me/5b") if hub else published
    flags = ("--load_tensors", "--gpu", "h100", "--train_batch_size", "1", "--cache_dir", str(tmp_path / "cache"))
    assert predict(model, index, tmp_path / "out", *flags, "--max_train_steps", "10") == 0
    line = f"not checked: whether this model encoded the tensors; {model} has no vae and text_encoder here"
    assert line in capsys.readouterr().out.splitlines()


def as_variant(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


def as_one_of_two_shards(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}-00001-of-00002.safetensors"))


def without_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("change", "variant", "absent"),
    [
        (None, "fp16", "vae and text_encoder"),
        (as_variant, None, "vae and text_encoder"),
        (as_variant, "fp16", None),
        (as_one_of_two_shards, None, "vae and text_encoder"),
        (without_tokenizer, None, "tokenizer"),
        (None, None, None),
    ],
)
def test_what_is_missing_in_the_cache_is_not_downloaded(
    change: Callable[[Path], None] | None,
    variant: str | None,
    absent: str | None,
    model: Path,
    tensors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    in_hub_cache(cache, "5b", model)
    if change:
        change(next((cache / "models--me--5b" / "snapshots").iterdir()))
    flags = ("--load_tensors", "--gpu", "h100", "--train_batch_size", "1", "--cache_dir", str(cache))
    flags += ("--max_train_steps", "10", *(("--variant", variant) if variant else ()))
    assert predict(Path("me/5b"), tensors, tmp_path / "out", *flags) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not checked")]
    rule = "not checked: whether this model encoded the tensors; me/5b has no {} here"
    assert lines == ([rule.format(absent)] if absent else [])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test fail that would download weights."""
    find = huggingface_hub.snapshot_download

    def find_only(*arguments: Any, local_files_only: bool = False, **more: Any) -> str:
        assert local_files_only
        return find(*arguments, local_files_only=True, **more)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", find_only)


@pytest.mark.usefixtures("offline")
def test_clips_that_cannot_be_used_are_listed_without_weights(
    tiny: Tiny, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_hub_cache(tmp_path / "cache", "5b", configs_of(tiny("5b"), tmp_path / "model"))
    data = Path(shutil.copytree(clips, tmp_path / "data"))
    video = next(data.rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:1000])
    with pytest.raises(UsageError, match="--max_bad_fraction"):
        predict(Path("me/5b"), data, tmp_path / "out", "--gpu", "h100", "--cache_dir", str(tmp_path / "cache"), *SIZE)
    assert "5 of 6 clips are used, and these are not:" in capsys.readouterr().out


# -- flags -------------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_needs_a_card(published: Path, index: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="this machine has no GPU; name a card, such as --gpu rtx4090"):
        predict(published, index, tmp_path / "out", "--load_tensors")


def test_a_prediction_must_be_asked_for() -> None:
    named = ["--pretrained_model_name_or_path", "m", "--data_root", "d"]
    with pytest.raises(UsageError, match=r"is only used to predict a run; add --dry_run, or leave it out"):
        args.parse(LoraOptions, None, [*named, "--gpu", "h100"])


def test_a_backend_without_a_rate_is_refused(published: Path, index: Path, tmp_path: Path) -> None:
    flags = ("--load_tensors", "--gpu", "a100", "--attention_backend", "cudnn")
    with pytest.raises(UsageError, match="its rate on a100 is not known; known are flash"):
        predict(published, index, tmp_path / "out", *flags)


def test_only_the_main_process_predicts(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert predict(published, tmp_path / "nothing", tmp_path / "out", "--gpu", "h100") == 0
