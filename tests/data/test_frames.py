import itertools

import pytest

from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import VideoInfo, frame_indices, frames_available


def regular(count: int, rate: float) -> tuple[float, ...]:
    return tuple(number / rate for number in range(count))


def test_frames_available():
    times = regular(300, 30)
    assert frames_available(times, None) == 300
    assert frames_available(times, 8) == 80
    assert frames_available(times, 30) == 300
    assert frames_available(times, 60) == 600
    assert frames_available(times, 8, skip_start=30, skip_end=30) == 64
    assert frames_available(times, None, 299, 0) == 1
    assert frames_available(times, 8, 299, 0) == 1
    assert frames_available(times, 8, 200, 100) == frames_available(times, None, 301, 5) == 0
    assert frames_available((0.0,), 8) == 1


@pytest.mark.fault("data: a clip with exactly the frames that its bucket needs")
@pytest.mark.parametrize(
    ("source", "target", "count", "least"), [(24, 8, 49, 145), (25, 8, 9, 26), (30, 8, 9, 31), (60, 16, 81, 301)]
)
def test_a_clip_that_just_suffices_gives_its_frames(source: int, target: int, count: int, least: int) -> None:
    """The last frame that is due is not later than the last frame of the clip, so all frames are available."""
    for selection, draw in (("head", 0), ("middle", 0), ("random", 0.999)):
        chosen = frame_indices(regular(least, source), count, target, selection, draw=draw)
        assert chosen[-1] <= least - 1
        assert len(set(chosen)) == count
        if source % target == 0:
            assert chosen == tuple(range(0, least, source // target))
    assert frames_available(regular(least, source), target) == count
    assert frames_available(regular(least - 1, source), target) == count - 1


@pytest.mark.parametrize("rate", [23.976, 24, 25, 29.97, 30, 48, 59.94, 60])
@pytest.mark.parametrize("count", [9, 49, 300])
def test_rates_survive_timestamps_in_milliseconds(rate: float, count: int) -> None:
    times = tuple(round(time, 3) for time in regular(count, rate))
    declared, bare = VideoInfo(times, 8, 8, 0, "vp9", rate), VideoInfo(times, 8, 8, 0, "vp9")
    assert declared.fps == rate
    assert bare.fps == pytest.approx(rate, rel=1e-3 if count > 40 else 5e-3)
    assert frames_available(times, rate) == count
    assert frame_indices(times, count, rate, "middle") == tuple(range(count))


def test_a_variable_rate_is_computed_from_its_timestamps() -> None:
    times = tuple(itertools.accumulate([0.0, *[0.04] * 30, *[1.0] * 5]))
    info = VideoInfo(times, 8, 8, 0, "vp9", 36 / (30 * 0.04 + 6))  # the declared rate is the average
    assert info.fps == pytest.approx(25)
    assert VideoInfo(times, 8, 8, 0, "vp9", 1e6).fps == pytest.approx(25)


def test_head_middle_random_uniform():
    times = regular(300, 30)
    assert frame_indices(times, 5, None, "head") == (0, 1, 2, 3, 4)
    assert frame_indices(times, 5, 10, "head") == (0, 3, 6, 9, 12)
    assert frame_indices(times, 4, 8, "head") == (0, 4, 7, 11)  # nearest to 0, 3.75, 7.5 (the earlier one) and 11.25
    assert frame_indices(times, 100, None, "middle") == tuple(range(100, 200))
    assert frame_indices(times, 300, 30, "middle") == tuple(range(300))
    assert frame_indices(times, 299, 30, "random", draw=0.49) == tuple(range(299))
    assert frame_indices(times, 299, 30, "random", draw=0.51) == tuple(range(1, 300))
    assert frame_indices(times, 4, 999, "uniform") == (0, 100, 199, 299)
    assert frame_indices(times, 1, None, "uniform") == (149,)
    assert frame_indices(times, 3, None, "head", skip_start=7) == (7, 8, 9)
    assert frame_indices(times, 3, None, "uniform", skip_start=7, skip_end=10) == (7, 148, 289)


@pytest.mark.parametrize("rate", [24, 25, 30, 30000 / 1001, 60])
@pytest.mark.parametrize("count", [2, 49, 50])
def test_equal_rates_take_consecutive_frames(rate, count):
    times = tuple(round(time * 12800) / 12800 for time in regular(121, rate))  # rounded as a container rounds them
    for selection, draw in [("head", 0), ("middle", 0), ("random", 0.999), ("random", 0.37)]:
        chosen = frame_indices(times, count, rate, selection, draw=draw)
        assert {b - a for a, b in itertools.pairwise(chosen)} == {1}


@pytest.mark.parametrize("source", [8, 24, 25, 30, 60])
@pytest.mark.parametrize("target", [8, 16])
@pytest.mark.fault("data: a clip that is one to two buckets long")
def test_windows_stay_inside_and_reach_both_ends(source, target):
    times = regular(200, source)
    most = frames_available(times, target)
    count = most // 2
    chosen = [frame_indices(times, count, target, "random", draw=k / 997) for k in range(997)]
    assert min(indices[0] for indices in chosen) == 0
    assert max(indices[-1] for indices in chosen) >= 199 - source / target - 1
    assert max(indices[-1] for indices in chosen) <= 199
    middle = frame_indices(times, count, target, "middle")
    assert abs(middle[0] - (199 - middle[-1])) <= source / target + 1
    for indices in (*chosen, frame_indices(times, most, target, "middle")):
        assert list(indices) == sorted(indices)


def test_too_short_says_how_short():
    with pytest.raises(VideoError, match="49 frames asked for, 27 available at 8 fps"):
        frame_indices(regular(100, 30), 49, 8, "middle")
    with pytest.raises(VideoError, match="49 frames asked for, 48 available"):
        frame_indices(regular(48, 30), 49, 8, "uniform")
    with pytest.raises(VideoError, match="0 available"):
        frame_indices(regular(10, 30), 1, 8, "head", 5, 5)


@pytest.mark.parametrize("bad", [{"selection": "tail"}, {"draw": 1.0}, {"count": 0}, {"skip_start": -1}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=r"selection|count|skip"):
        frame_indices(**{"times": regular(9, 30), "count": 1, "target_fps": 8, "selection": "head", **bad})


def test_single_frame_uses_the_declared_rate():
    assert VideoInfo((0.0,), 8, 8, 0, "h264", 25.0).duration == pytest.approx(1 / 25)
    assert VideoInfo((0.0,), 8, 8, 0, "h264").fps == 1
    assert frame_indices((0.0,), 1, 8, "middle") == (0,)
