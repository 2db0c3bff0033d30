"""trackers.py: what TensorBoard, wandb and trackio have of a run, read back from their own files."""

from __future__ import annotations

import filecmp
import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import run_alone
from PIL import Image, ImageSequence
from running import LORA_SCRIPT, PROMPT, Forked, finish, lora_flags, python

from cogvideox.config.conflicts import check_trackers
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.evaluation.health import read_video
from cogvideox.runtime import trackers

VIDEO = "prompt-0_TOKEN-a-red-square-moves_0"
MEDIA = {0: {"contact_sheet", f"validation/{VIDEO}"}, 2: {"contact_sheet", "curves", f"validation/{VIDEO}"}}  # by step


def run_with(tracker: str, model: Path, tensors: Path, output: Path, **more: str) -> None:
    """Runs two steps with validation videos before and after them."""
    flags = ("--load_tensors", "--max_train_steps", 2, "--validation_prompt", PROMPT, "--report_to", tracker)
    finish(Forked(python(LORA_SCRIPT, *lora_flags(model, tensors, output, *flags)), **more))


@pytest.fixture(scope="module")
def output(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with TensorBoard and wandb. Read only."""
    folder = tmp_path_factory.mktemp("trackers") / "lora"
    run_with("all", model, tensors, folder)
    return folder


def video_of(output: Path, step: int) -> Path:
    return output / "validation" / f"step-{step:06d}_{VIDEO}.mp4"


def logged_images(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    """Returns (tag, step, content of the file) of all images that TensorBoard finds below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path), {"images": 0}).Reload()
        for tag in events.Tags()["images"]:
            yield from ((tag, image.step, image.encoded_image_string) for image in events.Images(tag))


def frames_of(gif: bytes) -> np.ndarray:
    """Returns the frames of an animation, (F, H, W, 3)."""
    return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(io.BytesIO(gif)))])


def test_tensorboard_has_videos_and_pictures(output: Path) -> None:
    from tensorboard.util import img_mime_type_detector as served_as

    images = {(tag, step): content for tag, step, content in logged_images(output / "logs")}
    assert images.keys() == {(tag, step) for step, tags in MEDIA.items() for tag in tags}
    assert images["curves", 2] == (output / "curves.png").read_bytes()
    assert images["contact_sheet", 2] == (output / "contact_sheet.png").read_bytes()
    for step in MEDIA:
        gif = images[f"validation/{VIDEO}", step]
        assert served_as.from_bytes(gif) == "image/gif"
        frames, expected = frames_of(gif).astype(int), read_video(video_of(output, step)).astype(int)
        assert frames.shape == expected.shape
        # A GIF has 256 colors, so its frames are not exact. They must be far from the frames before and after them.
        assert np.abs(frames - expected).mean() < np.abs(np.diff(expected, axis=0)).mean() / 2


def test_wandb_has_videos_and_pictures(output: Path) -> None:
    (media,) = output.glob("wandb/offline-run-*/files/media")
    found = {str(path.relative_to(media).with_suffix("")).rpartition("_")[0]: path for path in media.rglob("*.*")}
    names = {"images/contact_sheet_0", "images/contact_sheet_2", "images/curves_2"}
    assert found.keys() == names | {"videos/validation_0", "videos/validation_2"}
    for step in MEDIA:
        assert filecmp.cmp(found[f"videos/validation_{step}"], video_of(output, step), shallow=False)
    assert filecmp.cmp(found["images/curves_2"], output / "curves.png", shallow=False)


def test_trackio_has_numbers_videos_and_pictures(model: Path, tensors: Path, tmp_path: Path) -> None:
    output, store = tmp_path / "lora", tmp_path / "trackio"
    run_with("trackio", model, tensors, output, TRACKIO_DIR=str(store))
    with sqlite3.connect(store / "cogvideox.db") as database:
        rows = [(step, json.loads(text)) for step, text in database.execute("SELECT step, metrics FROM metrics")]
        configs = [json.loads(text) for (text,) in database.execute("SELECT config FROM configs")]
    assert [config["learning_rate"] for config in configs] == ["0.01"]
    assert [step for step, values in rows if "loss" in values] == [1, 2]
    media = {step: values for step, values in rows if "contact_sheet" in values}
    assert {step: set(values) for step, values in media.items()} == MEDIA
    for step, values in media.items():
        video = store / "media" / values[f"validation/{VIDEO}"]["file_path"]
        assert filecmp.cmp(video, video_of(output, step), shallow=False)


def test_trackio_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options: Any = SimpleNamespace(train=SimpleNamespace(report_to="trackio"))
    assert list(check_trackers(options)) == [
        "--report_to trackio: trackio is not installed; pip install trackio, or leave the flag out"
    ]


def test_large_videos_become_smaller_animations(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    shades = np.linspace(0, 255, 5).astype(np.uint8)
    write_video(path, np.broadcast_to(shades[:, None, None, None], (5, 480, 720, 3)), fps=8)
    gif = Image.open(io.BytesIO(trackers.animation(path)))
    assert gif.size == (384, 256)
    assert gif.info["loop"] == 0
    assert [frame.info["duration"] for frame in ImageSequence.Iterator(gif)] == [120] * 5  # 125 ms in units of 10 ms


def test_a_video_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    good, bad = tmp_path / "step-000004_good.mp4", tmp_path / "step-000004_bad.mp4"
    write_video(good, np.zeros((3, 64, 96, 3), np.uint8), fps=8)
    bad.write_bytes(good.read_bytes()[:100])
    run = run_alone(tmp_path)
    writer = SummaryWriter(str(tmp_path / "logs"))
    run.accelerator.trackers.append(SimpleNamespace(name="tensorboard", writer=writer))  # type: ignore[arg-type]
    trackers.log_media(run, 4, [bad, good], [tmp_path / "missing.png"])
    trackers.log_media(run, 5, [], [tmp_path / "missing.png"])
    assert [(tag, step) for tag, step, _ in logged_images(tmp_path / "logs")] == [("validation/good", 4)]


def test_wandb_gets_videos_of_an_earlier_step(tmp_path: Path) -> None:
    """wandb ignores values of a step that is over, such as that of the best checkpoint at the end of a run."""
    video = tmp_path / "step-000002_a.mp4"
    write_video(video, np.zeros((3, 64, 96, 3), np.uint8), fps=8)
    steps = []
    run = SimpleNamespace(step=6)
    tracker = SimpleNamespace(tracker=run, log=lambda values, step: steps.append((list(values), step)))
    trackers.send_to_wandb(tracker, 2, [video], [])
    trackers.send_to_wandb(tracker, 8, [video], [])
    assert steps == [(["validation"], 6), (["validation"], 8)]
