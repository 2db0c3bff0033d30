"""Decides which frame counts and sizes are valid, and to which buckets a clip belongs.

All clips of a bucket become tensors of the same shape, and a batch never mixes buckets. Sizes are in pixels of the
video before the VAE encodes it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# With --bucket_choice every, a clip may be stretched this many times more than in its nearest bucket. With this value,
# clips of 16:9 belong to a bucket of 480x720 as well, but portrait clips do not.
ASPECT_SLACK = 1.2


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of training videos: number of frames, then height and width in pixels. It is written as 49x480x720."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def make_buckets(frames: Iterable[int], heights: Iterable[int], widths: Iterable[int]) -> tuple[Bucket, ...]:
    """Returns every combination of the values, sorted by frames, height and width, without repeats."""
    heights, widths = set(heights), set(widths)
    return tuple(sorted(Bucket(f, h, w) for f in set(frames) for h in heights for w in widths))


def frame_problem(frames: int, temporal_compression: int) -> str | None:
    """Returns why the VAE cannot encode a number of frames, with the nearest valid numbers, or None if it can.

    With compression c, the VAE encodes 1 and kc+1 frames exactly. kc frames are accepted as well, because published
    commands use 16, 24 and 48.

    Args:
        frames: The number of frames.
        temporal_compression: The frames per latent frame.
    """
    c = temporal_compression
    if frames >= 1 and (frames == 1 or frames % c in (0, 1 % c)):
        return None
    below = (frames - 1) // c * c + 1
    nearest = [str(count) for count in (below, below + c) if count >= 1]
    return f"CogVideoX encodes {c}k+1 frames; nearest: {', '.join(nearest) if frames >= 1 else 1}"


def size_problem(size: int, multiple: int) -> str | None:
    """Returns why a height or width in pixels is not valid, with the nearest valid sizes, or None if it is."""
    if size > 0 and size % multiple == 0:
        return None
    below = size // multiple * multiple
    nearest = [str(legal) for legal in (below, below + multiple) if legal > 0] or [str(multiple)]
    return f"must be a multiple of {multiple}; nearest: {', '.join(nearest)}"


def choose_buckets(
    buckets: Sequence[Bucket], frames: int, height: int, width: int, max_upscale: float, every: bool = False
) -> tuple[Bucket, ...]:
    """Returns the buckets to which a clip belongs, or () if it fills none of them.

    A clip fills a bucket that has no more frames than the clip, and for which the clip is enlarged at most max_upscale
    times. It belongs to the nearest bucket that it fills: among those with the most frames, the one with the nearest
    aspect ratio, for the least stretching or cropping. Among several with that ratio it is the largest one that needs
    no enlarging, or the smallest one if all do. The order of the buckets has no effect.

    Args:
        buckets: The buckets to choose from.
        frames: The number of frames of the clip.
        height: The height of the clip in pixels.
        width: The width of the clip in pixels.
        max_upscale: The largest factor by which the clip may be enlarged.
        every: Return, for each frame count, all buckets whose aspect ratio is at most ASPECT_SLACK times farther from
            that of the clip than the nearest one.
    """
    filled = [b for b in buckets if b.frames <= frames and upscale(b, height, width) <= max_upscale]
    if not filled:
        return ()
    if not every:
        most = max(bucket.frames for bucket in filled)
        return (_nearest_bucket([bucket for bucket in filled if bucket.frames == most], height, width),)
    counts = sorted({bucket.frames for bucket in filled})
    return tuple(b for count in counts for b in _near_buckets([b for b in filled if b.frames == count], height, width))


def _near_buckets(buckets: Sequence[Bucket], height: int, width: int) -> list[Bucket]:
    least = min(_aspect_distance(bucket, height, width) for bucket in buckets)
    return sorted(b for b in buckets if _aspect_distance(b, height, width) <= least + math.log(ASPECT_SLACK))


def upscale(bucket: Bucket, height: int, width: int) -> float:
    """Returns the factor by which a clip is scaled to fill a bucket; it is enlarged if the factor is more than 1.

    Args:
        bucket: The bucket.
        height: The height of the clip in pixels.
        width: The width of the clip in pixels.
    """
    return max(bucket.height / height, bucket.width / width)


def _nearest_bucket(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    best = min(buckets, key=lambda bucket: (_aspect_distance(bucket, height, width), bucket.height / bucket.width))
    alike = [bucket for bucket in buckets if bucket.width * best.height == best.width * bucket.height]
    covered = [bucket for bucket in alike if upscale(bucket, height, width) <= 1]
    return max(covered, key=_area) if covered else min(alike, key=_area)


def _aspect_distance(bucket: Bucket, height: int, width: int) -> float:
    # The distance is rounded so that two mirrored ratios are exactly equally far; then the wider bucket is chosen.
    return round(abs(math.log(bucket.width * height / (bucket.height * width))), 9)


def _area(bucket: Bucket) -> int:
    return bucket.height * bucket.width
