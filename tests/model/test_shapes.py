"""Tests examples/shapes.py and check_tiny_cogvideox.py: the scenes, the held-out ones, and the limits of the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import check_tiny_cogvideox as check
import numpy as np
import pytest
import shapes
import torch
from running import ROOT

MODEL = ROOT / "examples" / "model"


def words(scene: shapes.Scene) -> tuple[str, ...]:
    return (scene.color, scene.shape, scene.motion, scene.wall)


def test_every_word_is_in_both_parts_and_no_scene_is() -> None:
    train, held_out = shapes.split()
    assert len(train) + len(held_out) == len(shapes.scenes()) == 900
    assert not set(train) & set(held_out)
    assert 100 < len(held_out) < 150
    for place in range(4):
        assert {words(scene)[place] for scene in train} == {words(scene)[place] for scene in held_out}
    for first, second in itertools.combinations(range(4), 2):
        pairs = {(words(scene)[first], words(scene)[second]) for scene in held_out}
        assert pairs <= {(words(scene)[first], words(scene)[second]) for scene in train}


def test_captions_and_clips_belong_to_each_other() -> None:
    every = shapes.scenes()
    assert len({scene.caption for scene in every}) == len(every)
    clips = {scene.frames().tobytes() for scene in every[::7]}
    assert len(clips) == len(every[::7])
    frames = every[0].frames()
    assert (frames.shape, frames.dtype) == ((9, 64, 96, 3), np.uint8)


@pytest.mark.parametrize(
    ("motion", "rows", "columns"),
    [("slides to the right", 0, 1), ("slides to the left", 0, -1), ("rises", -1, 0), ("falls", 1, 0)],
)
def test_shapes_move_as_the_caption_says(motion: str, rows: int, columns: int) -> None:
    first, *_, last = shapes.Scene("red", "disc", motion, "black").frames()[..., 0] > 100
    moved = [np.mean(b) - np.mean(a) for a, b in zip(np.nonzero(first), np.nonzero(last), strict=True)]
    assert np.sign(np.round(moved, -1)).tolist() == [rows, columns]


def test_shapes_grow_and_shrink() -> None:
    sizes = {
        motion: [int((frame[..., 0] > 100).sum()) for frame in shapes.Scene("red", "ring", motion, "black").frames()]
        for motion in ("grows", "shrinks")
    }
    assert sizes["grows"] == sorted(sizes["grows"])
    assert sizes["shrinks"] == sizes["grows"][::-1]


def test_the_nearest_clip_is_found() -> None:
    clips = check.drawn_clips(shapes.scenes()[::50])
    noisy = clips.float() + 40 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert check.nearest(noisy, clips) == list(range(len(clips)))
    assert check.nearest(255 - clips.float(), clips) != list(range(len(clips)))


def test_the_report_fails_with_any_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.report(dict(check.LIMITS))
    for name, limit in check.LIMITS.items():
        assert not check.report(check.LIMITS | {name: 0.99 * limit})
    assert "27" in capsys.readouterr().out


def test_the_model_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) < 12e6


@pytest.mark.long  # takes half a minute, for files that do not change
def test_the_model_meets_its_limits_on_a_sample(real_clips: Path) -> None:
    """The complete measurement, examples/check_tiny_cogvideox.py, takes minutes."""
    figures = measured(MODEL, real_clips)
    assert figures["vae_generated_db"] > check.LIMITS["vae_generated_db"]
    assert figures["vae_real_db"] > check.LIMITS["vae_real_db"]
    assert figures["nearest_caption_share"] >= 0.75


def test_a_random_model_misses_them(tiny: Callable[[str], Path], real_clips: Path) -> None:
    figures = measured(tiny("5b"), real_clips, captions=2, every=64)
    assert all(figures[name] < limit for name, limit in check.LIMITS.items())


def measured(model: Path, real: Path, captions: int = 8, every: int = 16) -> dict[str, float]:
    """Returns the figures over a few captions and every ``every``-th clip."""
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return check.measure_pipeline(pipeline, real, captions=captions, every=every)
