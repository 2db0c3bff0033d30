import itertools

import pytest

from cogvideox.config.buckets import Bucket, choose_buckets, frame_problem, make_buckets, size_problem, upscale

BUCKETS = make_buckets((9, 49), (256, 480, 720), (256, 480, 720))


def test_text():
    assert str(Bucket(49, 480, 720)) == "49x480x720"


def test_make_buckets_is_the_sorted_product_without_repeats():
    buckets = make_buckets([49, 9, 49], [480, 256], [720])
    assert buckets == (Bucket(9, 256, 720), Bucket(9, 480, 720), Bucket(49, 256, 720), Bucket(49, 480, 720))
    assert make_buckets(iter([9]), iter([16, 32]), iter([16, 32])) == make_buckets([9], [16, 32], [16, 32])


@pytest.mark.parametrize("frames", [1, 4, 5, 8, 9, 16, 24, 45, 48, 49, 53, 77, 81, 85])
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


def nearest(buckets, frames, height, width, max_upscale=10.0):
    """Returns the one bucket that is chosen, or None."""
    chosen = choose_buckets(buckets, frames, height, width, max_upscale)
    assert len(chosen) <= 1
    return chosen[0] if chosen else None


def test_frames_come_first():
    assert nearest(BUCKETS, 300, 480, 720) == Bucket(49, 480, 720)
    assert nearest(BUCKETS, 48, 480, 720) == Bucket(9, 480, 720)
    assert nearest(BUCKETS, 8, 480, 720) is None
    assert nearest((), 300, 480, 720) is None


def test_aspect_comes_before_size():
    # A clip of 1440x2160 fills every bucket; the one with its aspect ratio is chosen before larger ones.
    assert nearest(BUCKETS, 49, 1440, 2160) == Bucket(49, 480, 720)
    assert nearest(BUCKETS, 49, 2160, 1440) == Bucket(49, 720, 480)


def test_largest_without_upscaling_else_smallest():
    assert nearest(BUCKETS, 49, 700, 700) == Bucket(49, 480, 480)
    assert nearest(BUCKETS, 49, 720, 720) == Bucket(49, 720, 720)
    assert nearest(BUCKETS, 49, 100, 100) == Bucket(49, 256, 256)


def test_the_order_of_the_list_has_no_effect():
    # A square clip is equally far from landscape and portrait.
    pair = [Bucket(9, 480, 720), Bucket(9, 720, 480)]
    assert {nearest(order, 9, 500, 500) for order in itertools.permutations(pair)} == {Bucket(9, 480, 720)}
    for clip in [(500, 500), (333, 777), (100, 3000)]:
        assert len({nearest(order, 49, *clip) for order in (BUCKETS, BUCKETS[::-1])}) == 1


def test_upscale_is_the_larger_of_both_factors():
    assert upscale(Bucket(9, 480, 720), 240, 720) == 2.0
    assert upscale(Bucket(9, 480, 720), 480, 360) == 2.0
    assert upscale(Bucket(9, 480, 720), 960, 1440) == 0.5


def test_no_clip_is_enlarged_beyond_the_limit():
    buckets = [Bucket(9, 480, 720), Bucket(49, 480, 720), Bucket(9, 240, 360)]
    assert nearest(buckets, 49, 320, 480, 1.5) == Bucket(49, 480, 720)
    assert nearest(buckets, 49, 319, 480, 1.5) == Bucket(9, 240, 360)  # Fewer frames are better than more enlarging.
    assert nearest(buckets, 49, 100, 150, 1.5) is None
    assert nearest(buckets, 49, 100, 150, 4.8) == Bucket(49, 480, 720)


def test_every_bucket_that_a_clip_fills_and_whose_shape_is_about_as_near():
    sizes = [(480, 720), (768, 1360), (720, 480), (256, 384)]
    buckets = [Bucket(frames, *size) for frames in (1, 9, 49) for size in sizes]
    chosen = choose_buckets(buckets, 20, 1080, 1920, 1.5, every=True)
    landscape = [(256, 384), (480, 720), (768, 1360)]
    assert chosen == tuple(Bucket(frames, *size) for frames in (1, 9) for size in landscape)
    assert choose_buckets(buckets, 9, 1280, 720, 1.5, every=True) == (Bucket(1, 720, 480), Bucket(9, 720, 480))
    # A clip of 300x400 would be enlarged too much for all buckets except the smallest.
    assert choose_buckets(buckets, 9, 300, 400, 1.5, every=True) == (Bucket(1, 256, 384), Bucket(9, 256, 384))
    assert choose_buckets(buckets, 0, 300, 400, 1.5, every=True) == ()
    assert choose_buckets(buckets[::-1], 20, 1080, 1920, 1.5, every=True) == chosen
