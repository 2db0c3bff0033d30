import itertools

import pytest

from cogvideox.data.buckets import Bucket, frame_problem, make_buckets, nearest_bucket, size_problem

BUCKETS = make_buckets((9, 49), (256, 480, 720), (256, 480, 720))


def test_text():
    assert str(Bucket(49, 480, 720)) == "49x480x720"


def test_make_buckets_is_the_sorted_product_without_repeats():
    buckets = make_buckets([49, 9, 49], [480, 256], [720])
    assert buckets == (Bucket(9, 256, 720), Bucket(9, 480, 720), Bucket(49, 256, 720), Bucket(49, 480, 720))
    assert make_buckets(iter([9]), iter([16, 32]), iter([16, 32])) == make_buckets([9], [16, 32], [16, 32])


@pytest.mark.parametrize("frames", [1, 4, 5, 8, 9, 16, 24, 48, 49, 81])
def test_legal_frames(frames):
    assert frame_problem(frames, 4) is None


@pytest.mark.parametrize(
    ("frames", "nearest"),
    [(50, "49, 53"), (51, "49, 53"), (2, "1, 5"), (3, "1, 5"), (7, "5, 9"), (0, "1"), (-3, "1")],
)
def test_illegal_frames_name_the_nearest(frames, nearest):
    assert frame_problem(frames, 4) == f"CogVideoX encodes 4k+1 frames; nearest: {nearest}"


def test_frame_problem_uses_the_compression():
    assert frame_problem(50, 1) is None
    assert frame_problem(9, 8) is None
    assert frame_problem(13, 8) == "CogVideoX encodes 8k+1 frames; nearest: 9, 17"


@pytest.mark.parametrize(
    ("size", "nearest"), [(490, "480, 496"), (8, "16"), (0, "16"), (-20, "16"), (481, "480, 496"), (495, "480, 496")]
)
def test_size_problem(size, nearest):
    assert size_problem(size, 16) == f"must be a multiple of 16; nearest: {nearest}"
    assert size_problem(480, 16) is None


def test_frames_come_first():
    assert nearest_bucket(BUCKETS, 300, 480, 720) == Bucket(49, 480, 720)
    assert nearest_bucket(BUCKETS, 48, 480, 720) == Bucket(9, 480, 720)
    assert nearest_bucket(BUCKETS, 8, 480, 720) is None
    assert nearest_bucket((), 300, 480, 720) is None


def test_aspect_comes_before_size():
    # 1440x2160 holds every bucket; the one of its own aspect ratio wins over larger ones.
    assert nearest_bucket(BUCKETS, 49, 1440, 2160) == Bucket(49, 480, 720)
    assert nearest_bucket(BUCKETS, 49, 2160, 1440) == Bucket(49, 720, 480)


def test_largest_without_upscaling_else_smallest():
    assert nearest_bucket(BUCKETS, 49, 700, 700) == Bucket(49, 480, 480)
    assert nearest_bucket(BUCKETS, 49, 720, 720) == Bucket(49, 720, 720)
    assert nearest_bucket(BUCKETS, 49, 100, 100) == Bucket(49, 256, 256)


def test_the_order_of_the_list_has_no_effect():
    # A square clip is equally far from landscape and portrait.
    pair = [Bucket(9, 480, 720), Bucket(9, 720, 480)]
    assert {nearest_bucket(order, 9, 500, 500) for order in itertools.permutations(pair)} == {Bucket(9, 480, 720)}
    for clip in [(500, 500), (333, 777), (100, 3000)]:
        assert len({nearest_bucket(order, 49, *clip) for order in (BUCKETS, BUCKETS[::-1])}) == 1
