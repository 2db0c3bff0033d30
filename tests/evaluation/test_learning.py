"""The trained tiny model learns a new subject, and stock diffusers shows what it learned.

A run with a learning rate of 0 fails each of these checks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_clips import CLIPS, make_clips
from running import ROOT, frames_of, in_process, metrics, train

from cogvideox.config.flags import DataFlags, ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.config.options import PrepareOptions
from cogvideox.data.clips import decode_variant, plan_clip
from cogvideox.data.media.pixels.decode import probe, read_frames
from cogvideox.data.recipe import clip_recipe

MODEL = ROOT / "examples" / "model"
SIZE = ["--train_resolution", "9x64x96"]
STEPS = 70
PROMPT = "BUNNY A big grey cartoon rabbit stands up in a sunlit meadow and throws both arms into the air."


@pytest.fixture(scope="module")
def data(real_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepares two clips of the rabbit for training and a third one for validation."""
    import prepare_dataset

    folder = tmp_path_factory.mktemp("rabbit")
    by_name = {clip.name: clip for clip in CLIPS}
    packages = real_clips / "packages"
    make_clips(folder / "clips", [by_name["rabbit_stands"], by_name["rabbit_rubs_brow"]], packages)
    make_clips(folder / "unseen", [by_name["rabbit_yawns"]], packages)
    flags = ["--model_id", MODEL, "--data_root", folder / "clips", "--validation_data_root", folder / "unseen", *SIZE]
    flags += ["--output_dir", folder / "tensors", "--id_token", "BUNNY", "--video_reshape_mode", "center"]
    flags += ["--dtype", "fp32"]
    assert in_process(prepare_dataset, PrepareOptions, [str(flag) for flag in flags]) == 0
    return folder


def run(data: Path, output: Path, learning_rate: float, steps: int) -> Path:
    """Trains a LoRA with a validation video before and after; returns the output folder."""
    flags = ["--pretrained_model_name_or_path", MODEL, "--data_root", data / "tensors", "--load_tensors"]
    flags += ["--output_dir", output, *SIZE, "--rank", 32, "--lora_alpha", 32, "--train_batch_size", 2]
    flags += ["--target_modules", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    flags += ["--optimizer", "adamw", "--learning_rate", learning_rate, "--max_train_steps", steps]
    flags += ["--validation_prompt", PROMPT, "--num_inference_steps", 10, "--guidance_scale", 2]
    assert train([str(flag) for flag in flags]) == 0
    return output


def target(data: Path) -> np.ndarray:
    """Returns the frames of the clip that the prompt describes, as training reads them, (F, H, W, 3)."""
    flags = DataFlags((str(data),), train_resolution=("9x64x96",), video_reshape_mode="center", max_num_frames=9)
    path = data / "clips" / "videos" / "rabbit_stands.mp4"
    record = plan_clip(path, clip_recipe(flags, read_geometry(ModelFlags(str(MODEL)))))
    frames = decode_variant(path, record.cuts[0].variants[0])
    assert isinstance(frames, np.ndarray)
    return frames


def video(output: Path, step: int) -> np.ndarray:
    """Returns the frames of the validation video of a step, (F, H, W, 3)."""
    (path,) = output.glob(f"validation/step-{step:06d}_*.mp4")
    info = probe(path)
    return read_frames(path, info, tuple(range(info.num_frames)), info.height, info.width)


def error(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the mean squared difference of two videos."""
    return float(np.square(first.astype(float) - second).mean())


def failed_signs(data: Path, output: Path, steps: int) -> list[str]:
    """Returns the signs of learning that a run does not show."""
    failed = []
    losses = {line["step"]: line["held_out_loss"] for line in metrics(output) if "held_out_loss" in line}
    if not losses[steps] < 0.5 * losses[0]:
        failed.append("the loss on the clip that was not trained on")
    expected = target(data)
    if not error(video(output, steps), expected) < 0.3 * error(video(output, 0), expected):
        failed.append("the video")
    return failed


@pytest.fixture(scope="module")
def learned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a LoRA for a few steps. Tests must not change its folder."""
    return run(data, tmp_path_factory.mktemp("learned") / "lora", 4e-3, STEPS)


@pytest.mark.slow
def test_a_new_subject_is_learned(data: Path, learned: Path) -> None:
    assert failed_signs(data, learned, STEPS) == []


@pytest.mark.slow
def test_stock_diffusers_shows_what_was_learned(learned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = frames_of(learned / "inference.py", monkeypatch).numpy()
    # The video file is compressed. tests/project/test_scripts.py compares the frames before compression.
    assert error(stock, video(learned, STEPS)) < 0.02 * error(video(learned, 0), video(learned, STEPS))


@pytest.mark.slow
def test_without_a_learning_rate_nothing_is_learned(data: Path, tmp_path: Path) -> None:
    output = run(data, tmp_path / "lora", 0.0, 2)
    assert len(failed_signs(data, output, 2)) == 2
