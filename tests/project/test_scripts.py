"""Tests the scripts end to end: preparing, training, kills, resuming, exporting, and using the result."""

import ast
import hashlib
import itertools
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import inference as inference_benchmark
import pytest
import torch
from running import (
    LORA_SCRIPT,
    PROMPT,
    ROOT,
    SIZE,
    WEIGHTS,
    Forked,
    equal,
    finish,
    frames_of,
    launch,
    lora_flags,
    losses,
    metrics,
    python,
    safetensors_of,
    sft_flags,
    start,
    train,
    train_all,
    weights,
)
from safetensors import safe_open

from cogvideox import loop
from cogvideox.data.media.pixels.decode import probe
from cogvideox.errors import UsageError


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_four_scripts_differ_in_task_method_and_options() -> None:
    stories = set()
    for task, name in (("TextToVideo", "text_to_video"), ("ImageToVideo", "image_to_video")):
        for method, suffix in (("Lora", "lora"), ("FullFinetune", "sft")):
            code = ast.parse((ROOT / "training" / f"cogvideox_{name}_{suffix}.py").read_text())
            text = ast.unparse(code.body[1:])  # without the docstring
            options = f"{'Image' if task == 'ImageToVideo' else ''}{suffix.title()}Options"
            for word, of in ((task, "TASK"), (method, "METHOD"), (options, "OPTIONS")):
                text, number = re.subn(rf"\b{word}\b", of, text)
                assert number == (3 if of == "OPTIONS" else 2), word  # the scripts can also be imported from their file
            stories.add(text)
    assert len(stories) == 1


def test_run_leaves_what_a_user_needs(reference: Path) -> None:
    there = {path.name for path in reference.iterdir()}
    assert {"config.json", "metrics.jsonl", "recipe.json", "inference.py", WEIGHTS, "validation"} <= there
    assert {"checkpoint-2", "checkpoint-4", "checkpoint-6"} <= there
    assert [line["step"] for line in metrics(reference) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    videos = sorted(path.name for path in (reference / "validation").glob("*.mp4"))
    assert [name[:11] for name in videos] == ["step-000000", "step-000006"]
    assert not list(reference.rglob("*.tmp*"))


def test_exported_lora_carries_rank_and_alpha(reference: Path) -> None:
    with safe_open(reference / WEIGHTS, "pt") as file:
        metadata = file.metadata()["lora_adapter_metadata"]
    assert (
        '"transformer.lora_alpha": 4' in metadata
    )  # alpha 8 and rank 4 give a scale of 2, which is multiplied into the matrices
    assert '"transformer.r": 4' in metadata


@pytest.mark.fault("export: stock diffusers reloads the result, compared pixel by pixel")
def test_stock_diffusers_gives_the_validated_video(
    model: Path, tensors: Path, tmp_path: Path, validated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "lora"
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT)) == 0
    stock = frames_of(output / "inference.py", monkeypatch).numpy()
    assert (stock == validated["step-000006"]).all()
    assert (stock != validated["step-000000"]).any()


def test_inference_script_writes_a_video(reference: Path, tmp_path: Path) -> None:
    video = tmp_path / "again.mp4"
    assert finish(Forked(python(reference / "inference.py", PROMPT, video))).splitlines()[-1] == str(video)
    assert probe(video).num_frames == 9


@pytest.mark.parametrize(("gib", "moved"), [(1.1, ["CogVideoXTransformer3DModel", "T5EncoderModel"]), (9, ["cuda"])])
def test_inference_script_on_a_gpu(
    gib: float, moved: list[str], reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU holds all models if it also has room to decode, else the blocks that compute and come next.

    On a CPU, blocks are copied to the device on which they are, without a stream.
    """
    import diffusers
    from diffusers.hooks import apply_group_offloading

    expected, called = frames_of(reference / "inference.py", monkeypatch), []

    def offload(module: Any, **options: Any) -> None:
        assert options.pop("onload_device") == torch.device("cuda")
        assert options.pop("use_stream")
        called.append(type(module).__name__)
        apply_group_offloading(module, onload_device=torch.device("cpu"), **options)

    pipeline = diffusers.CogVideoXPipeline
    monkeypatch.setattr(pipeline, "to", lambda self, device: called.append(device))
    monkeypatch.setattr(diffusers.CogVideoXTransformer3DModel, "enable_group_offload", offload)
    monkeypatch.setattr("diffusers.hooks.apply_group_offloading", offload)
    monkeypatch.setattr(diffusers.AutoencoderKLCogVideoX, "to", lambda self, device: self)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * 2**30), 80 * 2**30))
    assert frames_of(reference / "inference.py", monkeypatch).equal(expected)
    assert called == moved


def test_inference_script_has_no_warnings_and_obeys_its_flags(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, folder = reference / "inference.py", tmp_path / "new" / "folder"
    small = ("--frames", 17, "--height", 32, "--width", 48, "--steps", 1, "--guidance", 1)
    said = finish(start(python(script, "--output", folder / "all.mp4", *small)))
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip() and "%|" not in line]
    assert lines == [str(folder / "all.mp4")]
    assert not re.search(r"(^|[\r\n])\s*\d+%\|", said)  # the bar of the denoising steps, which has no title
    info = probe(folder / "all.mp4")
    assert (info.num_frames, info.height, info.width) == (17, 32, 48)
    changes = ((), ("--seed", 9), ("--strength", 0), ("--prompt", "x"))
    made = [frames_of(script, monkeypatch, "--output", folder / "again.mp4", *small, *flags) for flags in changes]
    assert all(not one.equal(other) for one, other in itertools.combinations(made, 2))
    assert frames_of(script, monkeypatch, "--output", folder / "again.mp4", *small).equal(made[0])


def test_inference_script_decodes_in_tiles_where_frames_do_not_fit(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLCogVideoX

    real, seen = AutoencoderKLCogVideoX.decode, []

    def decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.use_tiling)
        if not self.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKLCogVideoX, "decode", decode)
    assert len(frames_of(reference / "inference.py", monkeypatch)) == 9
    assert seen == [False, True]


@pytest.mark.slow
def test_published_command_trains_on_real_clips(model: Path, real_clips: Path, tmp_path: Path) -> None:
    """Uses the flags of the guide, except for model, paths, buckets, steps and the mode of the tracker."""
    data = tmp_path / "data"
    shutil.copytree(real_clips, data, ignore=shutil.ignore_patterns("packages"))
    (data / "prompts.txt").rename(data / "prompt.txt")
    output = tmp_path / "cogvideox-lora__optimizer_adamw__steps_3"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    flags = ["--pretrained_model_name_or_path", model, "--data_root", data, "--caption_column", "prompt.txt"]
    flags += ["--video_column", "videos.txt", "--id_token", "BW_STYLE", "--height_buckets", 64, "--width_buckets", 96]
    flags += ["--frame_buckets", 9, "--dataloader_num_workers", 2, "--pin_memory"]
    flags += ["--validation_prompt", 'BW_STYLE A black and white scene:::BW_STYLE A panda\'s song, in a "red" jacket']
    flags += ["--validation_prompt_separator", ":::", "--num_validation_videos", 1, "--validation_epochs", 10]
    flags += ["--num_inference_steps", 5]
    flags += ["--seed", 42, "--rank", 128, "--lora_alpha", 128, "--mixed_precision", "bf16", "--output_dir", output]
    flags += ["--max_num_frames", 49, "--train_batch_size", 1, "--max_train_steps", 3, "--checkpointing_steps", 1000]
    flags += ["--gradient_accumulation_steps", 1, "--gradient_checkpointing", "--learning_rate", "1e-3"]
    flags += ["--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", 400, "--lr_num_cycles", 1]
    flags += ["--enable_slicing", "--enable_tiling", "--optimizer", "adamw", "--beta1", 0.9, "--beta2", 0.95]
    flags += ["--weight_decay", 0.001, "--max_grad_norm", 1.0, "--allow_tf32", "--report_to", "wandb"]
    flags += ["--nccl_timeout", 1800]
    text = finish(start([*launcher, LORA_SCRIPT, *flags], WANDB_MODE="offline"))
    assert "cosine 1.0000" in text
    assert len(weights(output)) == 2 * 4 * 2  # two matrices for each of four layers in each of two blocks
    assert len(list((output / "validation").glob("*.mp4"))) == 4
    assert list(output.glob("wandb/offline-run-*/*.wandb"))
    assert (data / "cogvideox_tensors" / "index.json").is_file()


@pytest.mark.slow
@pytest.mark.fault("kills: SIGKILL while clips are encoded, training, validating and saving", times=6)
def test_killed_at_any_point_ends_with_the_same_lora(model: Path, clips: Path, tmp_path: Path) -> None:
    """Kills the run while it encodes, trains, validates and saves. After a restart, the result is the same."""
    more = ("--validation_prompt", PROMPT, "--validation_steps", 3)
    reference = tmp_path / "reference"
    assert train(lora_flags(model, clips, reference, "--tensor_cache", tmp_path / "cache-reference", *more)) == 0

    output, cache = tmp_path / "killed", tmp_path / "cache"
    command = python(LORA_SCRIPT, *lora_flags(model, clips, output, "--tensor_cache", cache, *more))
    moments = [
        (rf"rename .* {cache}/tensors/.*\.safetensors", 9),
        (r"open .*metrics\.jsonl", 2),
        (r"rename .*\.checkpoint-2\.tmp", 1),
        (r"rename .* .*step-000003.*\.mp4", 1),
        (rf"rename .* {output}/{WEIGHTS}", 1),
        (r"rename .* .*/recipe\.json", 1),
    ]
    for moment in moments:
        assert Forked(command, moment).wait() == -signal.SIGKILL, moment
    finish(Forked(command))
    assert equal(weights(output), weights(reference))
    assert losses(output) == losses(reference)
    assert not [path for folder in (output, cache) for path in folder.rglob(".*.tmp*")]
    videos = [sorted(path.name for path in (run / "validation").iterdir()) for run in (output, reference)]
    assert videos[0] == videos[1]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "plan"), [("accelerate", "off"), ("torchrun", "lean")])
@pytest.mark.fault("ranks: two processes in place of one")
def test_two_processes_have_the_losses_of_one(
    model: Path, tensors: Path, reference: Path, tmp_path: Path, launcher: str, plan: str
) -> None:
    output = tmp_path / "lora"
    commands = {
        "accelerate": "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no --main_process_port 29571",
        "torchrun": "-m torch.distributed.run --nproc_per_node 2 --master_port 29572",
    }
    flags = lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT)
    more = ["--gradient_accumulation_steps", 1, "--plan", plan]
    started = [sys.executable, *commands[launcher].split()]
    printed = launch(started, 2, python(LORA_SCRIPT, *flags, *more), tmp_path / "ranks", ACCELERATE_USE_CPU="true")
    assert ("streamed from the host" in printed[0]) == (plan == "lean")
    assert losses(output) == pytest.approx(losses(reference), rel=1e-5)
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-5} if plan == "off" else {"rtol": 1e-2, "atol": 1e-4}
    )  # two processes round differently
    for name, tensor in weights(reference).items():
        torch.testing.assert_close(weights(output)[name], tensor, **tolerance)


def test_batch_size_and_accumulation_are_interchangeable(
    model: Path, tensors: Path, reference: Path, tmp_path: Path
) -> None:
    more = ["--load_tensors", "--train_batch_size", 2, "--gradient_accumulation_steps", 1]
    assert train(lora_flags(model, tensors, tmp_path / "lora", *more)) == 0
    assert losses(tmp_path / "lora") == pytest.approx(losses(reference), rel=1e-5)


@pytest.mark.fault("ranks: larger batches in place of accumulation", times=2)
def test_the_loss_does_not_depend_on_accumulation_or_resuming(model: Path, tensors: Path, tmp_path: Path) -> None:
    """Uses loss weights, a range of timesteps, strata and an average; accumulates or uses a batch; resumes a run."""
    signal = ["--loss_weighting", "min_snr", "--min_timestep", 100, "--max_timestep", 899, "--use_ema"]
    # A small epsilon would let AdamW enlarge the rounding of gradients that are almost zero.
    more = ["--load_tensors", *signal, "--timestep_sampling", "stratified", "--max_train_steps", 4, "--epsilon", 1e-4]
    reference, batched, resumed = (
        lora_flags(model, tensors, tmp_path / name, *more) for name in ("reference", "b", "resumed")
    )
    assert train(reference) == 0
    assert train([*batched, "--train_batch_size", "2", "--gradient_accumulation_steps", "1"]) == 0
    assert train([*resumed, "--max_train_steps", "3"]) == train(resumed) == 0
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "reference"), rel=1e-5)
    for name, tensor in weights(tmp_path / "reference").items():
        torch.testing.assert_close(weights(tmp_path / "b")[name], tensor, rtol=1e-3, atol=1e-5)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "reference")
    assert equal(weights(tmp_path / "resumed"), weights(tmp_path / "reference"))
    plain = lora_flags(model, tensors, tmp_path / "plain", "--load_tensors", "--max_train_steps", 1)
    assert train(plain) == 0
    assert losses(tmp_path / "plain")[0] != losses(tmp_path / "reference")[0]


def test_the_loss_follows_the_flags(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step has one sample from each half of the range. At the last timestep, the weight of min_snr is zero."""
    seen: list[int] = []
    before = loop.losses_of
    monkeypatch.setattr(loop, "losses_of", lambda *given: (seen.append(int(given[3].timestep_B)), before(*given))[1])
    signal = ["--min_timestep", 100, "--max_timestep", 899, "--timestep_sampling", "stratified"]
    assert train(lora_flags(model, tensors, tmp_path / "strata", "--load_tensors", *signal)) == 0
    assert len(seen) == 12
    assert [(timestep - 100) // 400 for timestep in seen] == [0, 1] * 6
    last = ["--load_tensors", "--min_timestep", 999, "--max_train_steps", 1, "--loss_weighting"]
    for weighting, expected in (("none", False), ("min_snr", True)):
        assert train(lora_flags(model, tensors, tmp_path / weighting, *last, weighting)) == 0
        assert (losses(tmp_path / weighting) == [0.0]) is expected
    assert set(seen[12:]) == {999}


def test_gradient_checkpointing_changes_nothing(model: Path, tensors: Path, reference: Path, tmp_path: Path) -> None:
    assert train(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--gradient_checkpointing")) == 0
    assert equal(weights(tmp_path / "lora"), weights(reference))


@pytest.mark.fault("export: stock diffusers reloads the result, compared pixel by pixel")
def test_all_weights_train_resume_and_give_the_validated_video(
    model: Path, tensors: Path, tmp_path: Path, validated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--load_tensors", "--learning_rate", "1e-3", "--validation_prompt", PROMPT)
    flags = sft_flags(model, tensors, tmp_path / "reference", *more)
    assert train_all(flags) == 0
    stock = frames_of(tmp_path / "reference" / "inference.py", monkeypatch).numpy()
    assert (stock == validated["step-000006"]).all()
    assert (stock != validated["step-000000"]).any()
    before = safetensors_of(model / "transformer")
    after = safetensors_of(tmp_path / "reference" / "transformer")
    assert not [name for name, tensor in before.items() if after[name].equal(tensor)], "a weight did not move"
    resumed = sft_flags(model, tensors, tmp_path / "resumed", *more)
    assert train_all([*resumed, "--max_train_steps", "4"]) == 0
    assert train_all(resumed) == 0
    assert equal(safetensors_of(tmp_path / "resumed" / "transformer"), after)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "reference")


def test_preparing_while_training_is_the_same_as_before(
    model: Path, clips: Path, reference: Path, tmp_path: Path
) -> None:
    flags = lora_flags(model, clips, tmp_path / "lora", "--tensor_cache", tmp_path / "cache", "--id_token", "TOKEN")
    assert train(flags) == 0
    assert equal(weights(tmp_path / "lora"), weights(reference))


@pytest.mark.fault("checkpoints: a run is resumed within an epoch, and after its end")
def test_longer_run_extends_a_finished_one(model: Path, tensors: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    flags = lora_flags(model, tensors, output, "--load_tensors")
    assert train([*flags, "--max_train_steps", "4"]) == 0
    assert train(flags) == 0
    assert equal(weights(output), weights(reference))


def test_seed_matters(model: Path, tensors: Path, reference: Path, tmp_path: Path) -> None:
    assert train(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--seed", 7)) == 0
    assert losses(tmp_path / "lora") != losses(reference)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_like_fp32(
    model: Path, tensors: Path, reference: Path, tmp_path: Path, precision: str
) -> None:
    output = tmp_path / "lora"
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--mixed_precision", precision)) == 0
    assert losses(output) == pytest.approx(losses(reference), rel=0.02)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {tensor.dtype for tensor in weights(output).values()} == {dtype}


def test_trackers(model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 2)
    assert train([*flags, "--report_to", "tensorboard"]) == 0
    assert list((tmp_path / "lora" / "logs").rglob("events.out.tfevents*"))


def test_runs_without_the_optional_packages(model: Path, tensors: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery as m\n"
        "hidden = {'deepspeed', 'bitsandbytes', 'torchao', 'wandb', 'decord', 'tensorboard', 'trackio'}\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = classmethod(\n"
        "    lambda cls, name, *rest: None if name.split('.')[0] in hidden else find(name, *rest))\n"
    )
    probe = [sys.executable, "-c", "import wandb"]
    assert "ModuleNotFoundError" in finish(start(probe, PYTHONPATH=str(tmp_path)), status=1)
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 2)
    finish(start(python(LORA_SCRIPT, *flags), PYTHONPATH=str(tmp_path)))
    assert (tmp_path / "lora" / "recipe.json").is_file()


@pytest.mark.slow
@pytest.mark.fault("checkpoints: a checkpoint of DeepSpeed with two processes")
def test_deepspeed_zero_2_has_the_losses_of_one_process(
    model: Path, tensors: Path, reference: Path, tmp_path: Path
) -> None:
    """One process continues the run of two."""
    output = tmp_path / "lora"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--gradient_accumulation_steps", 1)
    launcher = "-m accelerate.commands.launch --config_file accelerate_configs/deepspeed.yaml --mixed_precision no"
    started = [sys.executable, *launcher.split(), "--num_processes", 2, "--main_process_port", 29573]
    first = python(LORA_SCRIPT, *flags, "--max_train_steps", 4)
    launch(started, 2, first, tmp_path / "ranks", ACCELERATE_USE_CPU="true")
    assert not losses(output)[4:]
    assert train([*flags, "--gradient_accumulation_steps", "2"]) == 0
    assert losses(output) == pytest.approx(losses(reference), rel=1e-4)


def refused(flags: list[str]) -> str:
    with pytest.raises(UsageError) as error:
        train(flags)
    return str(error.value)


def test_other_settings_are_not_mixed_into_a_run(model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 2)
    assert train(flags) == 0
    text = refused([*flags, "--learning_rate", "0.5"])
    assert "--learning_rate: 0.01 there, 0.5 now" in text
    config = json.loads((tmp_path / "lora" / "config.json").read_text())
    assert config["flags"]["learning_rate"] == 0.01
    assert "already" in refused([*flags, "--max_train_steps", "1"])
    assert "is not empty" in refused([*flags, "--no_resume"])
    assert "checkpoint-9" in refused([*flags, "--resume_from_checkpoint", "checkpoint-9"])


def test_foreign_folder_is_refused(model: Path, tensors: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    assert "thesis.txt" in refused(lora_flags(model, tensors, tmp_path, "--load_tensors"))


def test_image_to_video_model_is_refused(tiny: Callable[[str], Path], clips: Path, tmp_path: Path) -> None:
    assert "image-to-video" in refused(lora_flags(tiny("5b-i2v"), clips, tmp_path / "lora"))


def test_all_problems_come_at_once_before_torch(clips: Path, tmp_path: Path) -> None:
    flags = ["--pretrained_model_name_or_path", tmp_path / "nowhere", "--data_root", tmp_path / "nodata", *SIZE]
    text = finish(start(python(LORA_SCRIPT, *flags, "--frame_buckets", "50")), status=2)
    assert "nowhere" in text
    assert "nodata" in text
    assert not (ROOT / "cogvideox-lora").exists()


def test_processes_that_do_not_know_each_other_are_refused(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = SimpleNamespace(num_processes=1, state=SimpleNamespace(deepspeed_plugin=None))
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "do not know each other" in refused(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors"))


def test_the_benchmark_of_inference_measures_a_video_or_gives_the_reason(
    reference: Path, tmp_path: Path, forking_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(forking_python))
    video = tmp_path / "video.mp4"
    flags = ["--steps", "1", "--frames", "17", "--height", "32", "--width", "48", "--output", str(video)]
    figures = inference_benchmark.measure(reference / "inference.py", 8, flags)
    assert probe(video).num_frames == 17
    assert 0 < figures["seconds"] < figures["whole_seconds"]
    assert len(inference_benchmark.row_of(figures).split()) == 4
    figures = inference_benchmark.measure(reference / "inference.py", 8, ["--height", "tall"])
    assert "argument --height: invalid int value" in figures["error"]
    assert inference_benchmark.row_of(figures).endswith(figures["error"])
