"""Decides which frame counts and sizes are valid, and which buckets a clip belongs to.

All clips of one bucket become tensors of one shape, so a batch never mixes buckets. Sizes are in pixels of the
video that the model is trained on, before the VAE.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ASPECT_SLACK = 1.2  # with every bucket: 16:9 clips go to 480x720 too, portrait ones do not


@dataclass(frozen=True, order=True)
class Bucket:
    """One training shape: frames, then height and width in pixels; written as 49x480x720."""

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
    """Returns why a VAE with this temporal compression cannot encode `frames` frames, with the nearest counts; or None.

    With compression c, 1 and kc+1 are exact. kc is accepted as well: published commands use 16, 24 and 48.
    """
    c = temporal_compression
    if frames >= 1 and (frames == 1 or frames % c in (0, 1 % c)):
        return None
    below = (frames - 1) // c * c + 1
    nearest = [str(count) for count in (below, below + c) if count >= 1]
    return f"CogVideoX encodes {c}k+1 frames; nearest: {', '.join(nearest) if frames >= 1 else 1}"


def size_problem(size: int, multiple: int) -> str | None:
    """Returns why `size` pixels cannot be a height or width, with the nearest valid sizes; or None."""
    if size > 0 and size % multiple == 0:
        return None
    below = size // multiple * multiple
    nearest = [str(legal) for legal in (below, below + multiple) if legal > 0] or [str(multiple)]
    return f"must be a multiple of {multiple}; nearest: {', '.join(nearest)}"


def choose_buckets(
    buckets: Sequence[Bucket], frames: int, height: int, width: int, max_upscale: float, every: bool = False
) -> tuple[Bucket, ...]:
    """Returns the buckets for a clip with `frames` frames of height x width pixels; () if it fills no bucket.

    A clip fills a bucket that asks for no more frames than it has, and for which it is not enlarged more than
    max_upscale times. Of those, the nearest one: frames first (the most), then the aspect ratio (least stretching or
    cutting), then the largest size that needs no upscaling, or the smallest there is if all do. `every`: of each frame
    count all whose aspect ratio is at most ASPECT_SLACK times farther than the nearest one's. The order of `buckets`
    has no effect.
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
    """Returns the factor by which a clip of height x width pixels is enlarged to fill a bucket; 1 or less is none."""
    return max(bucket.height / height, bucket.width / width)


def _nearest_bucket(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    best = min(buckets, key=lambda bucket: (_aspect_distance(bucket, height, width), bucket.height / bucket.width))
    alike = [bucket for bucket in buckets if bucket.width * best.height == best.width * bucket.height]
    covered = [bucket for bucket in alike if upscale(bucket, height, width) <= 1]
    return max(covered, key=_area) if covered else min(alike, key=_area)


def _aspect_distance(bucket: Bucket, height: int, width: int) -> float:
    # Rounded, so that two mirrored ratios tie exactly whatever the floats say; the wider one is then taken.
    return round(abs(math.log(bucket.width * height / (bucket.height * width))), 9)


def _area(bucket: Bucket) -> int:
    return bucket.height * bucket.width
