"""Tests of proposals.py: proposed buckets are legal for the model and fit as many clips as announced."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cogvideox.config.buckets import choose_buckets
from cogvideox.config.geometry import Geometry, geometry_of
from cogvideox.preparation.proposals import Clip, legal_frames, legal_sizes, propose

ROTARY = {"use_rotary_positional_embeddings": True}
OF_1_5 = {"patch_size_t": 2, "sample_height": 96, "sample_width": 170, "sample_frames": 81}
MODELS: dict[str, dict[str, Any]] = {
    "1.0": ROTARY,
    "1.5": ROTARY | OF_1_5,
    "1.5 for images": ROTARY | OF_1_5 | {"sample_height": 300, "sample_width": 300},
    "learned positions": ROTARY | {"use_learned_positional_embeddings": True},
}
PHONE: list[Clip] = [(100, 1920, 1080)] * 14 + [(100, 1080, 1920)] * 10 + [(20, 1080, 1920)] * 6


def geometry(model: str) -> Geometry:
    """Returns the geometry of one of MODELS."""
    return geometry_of(MODELS[model], {}, {})


def some_clips(seed: int) -> list[Clip]:
    """Returns 30 clips of random lengths, in four random sizes."""
    rng = random.Random(seed)
    sizes = [(rng.choice((240, 480, 720, 1080, 1920)), rng.choice((240, 480, 720, 1080, 1920))) for _ in range(4)]
    return [(rng.choice((0, 1, 3, 8, 20, 49, 60, 300)), *rng.choice(sizes)) for _ in range(30)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_proposals_are_legal_and_fit_the_announced_number_of_clips(model: str, seed: int) -> None:
    of, clips = geometry(model), some_clips(seed)
    fitting = 0
    for number in range(1, 6):
        found = propose(clips, of, 1.5, of.sample_frames, number)
        assert len(found.buckets) <= number
        for bucket in found.buckets:
            assert bucket.frames % of.temporal_compression == 1
            assert bucket.frames <= of.sample_frames
            assert of.has_positions(bucket)
            assert not any(of.problem(kind, getattr(bucket, kind)) for kind in ("frames", "height", "width"))
        used = [choose_buckets(found.buckets, *clip, 1.5) for clip in clips]
        assert (found.fitting, found.num_clips) == (sum(map(bool, used)), len(clips))
        assert {bucket for some in used for bucket in some} == set(found.buckets)
        fitting = max(fitting, found.fitting)
    assert fitting == found.fitting


def test_clips_of_a_phone_keep_their_aspect_ratios() -> None:
    assert propose(PHONE, geometry("1.0"), 1.5, 49, 1).fitting == 24
    found = propose(PHONE, geometry("1.0"), 1.5, 49)
    assert found.flags == "--train_resolution 49x432x768 49x768x432 17x432x768"
    assert found.fitting == 30
    found = propose(PHONE, geometry("1.5 for images"), 1.5, 81)
    assert found.flags == "--train_resolution 81x720x1280 81x1280x720 17x720x1280"
    assert propose(PHONE, geometry("learned positions"), 1.5, 49).flags == "--train_resolution 49x480x720"


def test_the_models_own_size_is_proposed_for_clips_of_its_aspect_ratio() -> None:
    clips: list[Clip] = [(60, 480, 720)] * 3 + [(60, 720, 480)]
    assert propose(clips, geometry("1.0"), 1.5, 49).flags == "--train_resolution 49x480x720 49x720x480"


def test_a_few_very_short_clips_do_not_shorten_the_buckets() -> None:
    clips: list[Clip] = [(60, 480, 720)] * 50 + [(6, 480, 720)]
    assert propose(clips, geometry("1.0"), 1.5, 49, 1).flags == "--train_resolution 49x480x720"
    assert propose(clips, geometry("1.0"), 1.5, 49, 2).flags == "--train_resolution 49x480x720 5x480x720"


def test_small_clips_and_pictures() -> None:
    assert propose([(49, 240, 320)], geometry("1.0"), 1.5, 49).flags == "--train_resolution 49x240x320"
    assert propose([(49, 10, 10), (0, 480, 720)], geometry("1.0"), 1.5, 49).buckets == ()
    assert propose([], geometry("1.0"), 1.5, 49).buckets == ()
    assert propose([(1, 480, 720)], geometry("1.0"), 1.5, 49).flags == "--train_resolution 1x480x720"
    # A video that is too short for any longer bucket does not become a still picture.
    assert propose([(3, 480, 720), (49, 480, 720)], geometry("1.0"), 1.5, 49).fitting == 1


def test_legal_counts_and_sizes() -> None:
    assert legal_frames(geometry("1.0"), 49) == [1, 5, 9, 17, 25, 33, 41, 49]
    sizes = legal_sizes(geometry("1.0"))
    assert {(480, 720), (720, 480), (432, 768), (768, 432), (576, 576), (480, 640)} <= set(sizes)
    assert max(height for height, _ in legal_sizes(geometry("1.5"))) == 768  # its positions end there
    assert (768, 1360) in legal_sizes(geometry("1.5"))
