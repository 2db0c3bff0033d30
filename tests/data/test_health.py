"""Tests health.py: numbers of frames, and which clips are called odd."""

from __future__ import annotations

import numpy as np
import pytest

from cogvideox.data.health import (
    FEWEST,
    LOOK_BITS,
    STATIC,
    Health,
    alike,
    clip_oddities,
    health_of,
    look_of,
    mean_health,
    usual_health,
)

USUAL = Health(0.5, 0.3, 0.02)


def test_means_over_frames_and_pixels() -> None:
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    frames[1, ..., 0] = 255  # a red frame between black ones
    assert health_of(frames) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert health_of(frames[:1]) == (0, 0, 0)
    assert mean_health([Health(0, 0.2, 0.4), Health(1, 0.4, 0)]) == pytest.approx((0.5, 0.3, 0.2))


def test_numbers_are_those_of_the_definition() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)
    wide = frames.astype(float) / 255
    highest, lowest = wide.max(-1), wide.min(-1)
    wanted = (highest.mean(), (highest - lowest).mean(), np.abs(np.diff(wide, axis=0)).mean())
    assert health_of(frames) == pytest.approx(wanted)
    assert health_of(frames).whiteness == pytest.approx(lowest.mean())


@pytest.mark.parametrize(
    ("clip", "frames", "usual", "odd"),
    [
        (USUAL, 9, USUAL, []),
        (Health(0.01, 0.0, 0.0), 9, USUAL, ["black"]),
        (Health(0.99, 0.0, 0.02), 9, None, ["white"]),
        (Health(0.5, 0.3, STATIC / 2), 9, None, ["static"]),
        (Health(0.5, 0.3, 0.0), 1, USUAL, []),  # a picture
        (Health(0.08, 0.05, 0.02), 9, USUAL, ["very dark, unlike most clips"]),
        (Health(0.08, 0.05, 0.02), 9, Health(0.09, 0.05, 0.02), []),  # most clips are
        (Health(0.95, 0.05, 0.02), 9, USUAL, ["very bright, unlike most clips"]),
        (Health(0.98, 0.95, 0.02), 9, USUAL, []),  # a bright color
        (Health(0.5, 0.0, 0.02), 9, USUAL, ["without color, unlike most clips"]),
        (Health(0.5, 0.3, 0.2), 9, USUAL, ["moves 10 times as much as the median clip"]),
        (Health(0.5, 0.3, 0.0022), 9, USUAL, ["moves 0.11 times as much as the median clip"]),
        (Health(0.5, 0.3, 0.2), 9, None, []),  # nothing to compare with
    ],
)
def test_odd_clips_are_named(clip: Health, frames: int, usual: Health | None, odd: list[str]) -> None:
    assert list(clip_oddities(clip, frames, usual)) == odd


def test_clips_are_compared_with_the_median_of_several() -> None:
    few = [USUAL] * (FEWEST - 2) + [Health(1.0, 0.0, 1.0)]
    assert usual_health(few) is None
    assert usual_health([*few, USUAL]) == USUAL


def test_copies_of_another_quality_are_alike() -> None:
    rng = np.random.default_rng(0)
    first, other = (rng.integers(0, 256, (9, 32, 48, 3), np.uint8) for _ in range(2))
    blocks = [np.kron(frames[:, :8, :9], np.ones((1, 4, 5, 1), np.uint8)) for frames in (first, other)]
    noisy = np.clip(blocks[0].astype(int) + rng.integers(-3, 4, blocks[0].shape), 0, 255).astype(np.uint8)
    looks = [look_of(frames) for frames in (*blocks, noisy)]
    assert all(len(look) == LOOK_BITS // 4 for look in looks)
    assert alike(looks) == {2: 0}
    red_is_blue = look_of(blocks[0][..., ::-1])
    assert alike([*looks, red_is_blue]) == {2: 0}
    plain = look_of(np.full((5, 32, 48, 3), 7, np.uint8))
    assert alike([plain] * 2) == {}
    assert alike([]) == {}
