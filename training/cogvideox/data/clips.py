"""Plans which frames of a file are used and in which shape, and decodes them according to the plan.

``plan_clip`` reads the packets of a file and returns its ledger record: a hash of its content, and for each bucket and
each augmentation variant the frame indices and the crop. ``decode_variant`` later turns one variant into uint8 pixels:

    path + ClipRecipe --plan_clip--> record: content hash, bucket, Variants --decode_variant--> uint8 (F, H, W, 3)

Random choices depend only on the seed, the content of the file and the number of the variant. Nothing here imports
torch, so that decode workers need little memory.
"""

import errno
import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from cogvideox.config.buckets import Bucket, choose_buckets, upscale
from cogvideox.data.cache import hash_of
from cogvideox.data.media.decode import probe, read_frames
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import VideoInfo, frame_indices, frames_available
from cogvideox.data.media.transforms import apply_fit, fit
from cogvideox.data.records import FAILED, OK, SHORT, SMALL, UNREADABLE, ClipRecord, Cut, Source, Variant
from cogvideox.errors import UsageError, one_line
from cogvideox.files import stamp_of
from cogvideox.rng import uniform

StrPath = str | os.PathLike[str]

# Must change whenever the same flags begin to mean other frames or crops, so that all files are planned again.
PLAN_VERSION = 3

# Largest ratio between the aspect ratios of an image and its clip. It is above 1 because sizes are whole pixels.
IMAGE_STRETCH = 1.03


@dataclass(frozen=True)
class ClipRecipe:
    """Holds all settings that decide which pixels of a file are used; see the flags of the same names."""

    buckets: tuple[Bucket, ...]
    fps: float | None  # None: the frames are spread over the clip
    frame_selection: str
    skip_frames_start: int
    skip_frames_end: int
    reshape_mode: str
    flip_probability: float
    variants: int
    seed: int
    max_upscale: float = 1.5
    every_bucket: bool = False
    reader: str = "pyav"

    @cached_property
    def digest(self) -> str:
        """Hash of all fields and of the version of the planning rules."""
        return hash_of([PLAN_VERSION, asdict(self)])

    def request(self, path: StrPath) -> str:
        """Returns the ledger key of this recipe applied to the current state of a file, without reading its content.

        The state is the size and the time of the last change; a file that does not exist has a key, too.
        """
        return hash_of([str(path), stamp_of(path), self.digest])


def content_hash(path: StrPath) -> str:
    """Returns the SHA-256 of the bytes of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_change(path: str, content: str) -> str | None:
    """Returns what changed about a file whose content hash was ``content``; None if nothing did."""
    try:
        return None if content_hash(path) == content else "its content has changed since it was planned"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def plan_clip(path: StrPath, recipe: ClipRecipe) -> ClipRecord:
    """Plans a clip from its packets, without decoding more than the first frame.

    A bad file never raises an error. Its record says what is wrong with it.
    """
    return _probe_and_plan(path, recipe.request(path), lambda record, info: plan_cuts(record, info, recipe))


def measure_clip(path: StrPath, recipe: ClipRecipe) -> ClipRecord:
    """Returns a record of the size of a clip and of how many frames it can give, without planning it.

    This is faster than ``plan_clip`` because the content is not hashed. A bad file never raises an error.
    """
    return _probe_and_plan(
        path, "", lambda record, info: replace(record, status=OK, available=frames_at_recipe_rate(info, recipe))
    )


def frames_at_recipe_rate(info: VideoInfo, recipe: ClipRecipe) -> int:
    """Returns how many frames a clip can give at the frame rate of a recipe, after its skipped frames."""
    return frames_available(info.times, recipe.fps, recipe.skip_frames_start, recipe.skip_frames_end)


def image_request(path: StrPath) -> str:
    """Returns the ledger key of the current state of an image that is a first frame, without reading its content."""
    return hash_of(["first frame", str(path), stamp_of(path)])


def plan_image(path: StrPath) -> ClipRecord:
    """Returns the record of an image that is a first frame. It has no cuts: the image is cut as its clip is."""
    return _probe_and_plan(
        path, image_request(path), lambda record, _: replace(record, status=OK, content=content_hash(path))
    )


def _probe_and_plan(path: StrPath, request: str, plan: Callable[[ClipRecord, VideoInfo], ClipRecord]) -> ClipRecord:
    """Probes a file and returns its record as ``plan`` completes it, or with the reason why it cannot be used."""
    record = ClipRecord(request, str(path), FAILED, stamp=stamp_of(path))
    try:
        info = probe(path)
        record = replace(record, source=Source.of(info))
        return plan(record, info)
    except VideoError as error:
        return replace(record, reason=str(error))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise  # the worker exceeded its memory limit; the file may be fine
        return replace(record, status=UNREADABLE, reason=str(error))


def plan_cuts(record: ClipRecord, info: VideoInfo, recipe: ClipRecipe) -> ClipRecord:
    """Returns the record of a clip with the buckets that it fills and how, or the reason why it fills none."""
    available = frames_at_recipe_rate(info, recipe)
    size = (info.height, info.width)
    buckets = choose_buckets(recipe.buckets, available, *size, recipe.max_upscale, recipe.every_bucket)
    if not buckets:
        status, reason = why_no_bucket(info, recipe, available)
        return replace(record, status=status, reason=reason, available=available)
    content = content_hash(record.path)
    cuts = tuple(plan_cut(info, bucket, recipe, content) for bucket in buckets)
    return replace(record, status=OK, available=available, content=content, cuts=cuts)


def image_refusal(clip: Source, image: Source) -> str | None:
    """Returns why an image cannot be the first frame of a clip, judged by their sizes; None if it can."""
    ratio = (image.width * clip.height) / (image.height * clip.width)
    if max(ratio, 1 / ratio) <= IMAGE_STRETCH:
        return None
    sizes = f"is {image.width}x{image.height}, but its clip is {clip.width}x{clip.height}"
    return f"{sizes}: a first frame must have the aspect ratio of its clip; crop it, or list no images"


def why_no_bucket(info: VideoInfo, recipe: ClipRecipe, available: int) -> tuple[str, str]:
    """Returns the status and the reason of a clip that fills no bucket, because it is too short or too small."""
    shortest = min(bucket.frames for bucket in recipe.buckets)
    if not available:
        skipped = f"--skip_frames_start {recipe.skip_frames_start} and --skip_frames_end {recipe.skip_frames_end}"
        return SHORT, f"{skipped} leave none of its {info.num_frames} frames; lower them"
    if available < shortest:
        rate = f" at {recipe.fps:g} frames per second" if recipe.fps else ""
        frames = f"{available} {'frame' if available == 1 else 'frames'}"
        given = f"{info.duration:.2f} s give {frames}{rate}"
        return SHORT, f"{given}, but the shortest bucket has {shortest}; add a shorter bucket"
    filled = [bucket for bucket in recipe.buckets if bucket.frames <= available]
    least = min(upscale(bucket, info.height, info.width) for bucket in filled)
    limit = f"--max_upscale allows {recipe.max_upscale:g}; add a smaller bucket, or allow more"
    return SMALL, f"{info.width}x{info.height} pixels would be enlarged {least:.2f} times, but {limit}"


def plan_cut(info: VideoInfo, bucket: Bucket, recipe: ClipRecipe, content: str) -> Cut:
    """Returns how a clip is cut for one bucket: the frames and the crop of each variant."""
    return Cut(bucket, tuple(plan_variant(info, bucket, recipe, content, k) for k in range(recipe.variants)))


def plan_variant(info: VideoInfo, bucket: Bucket, recipe: ClipRecipe, content: str, number: int) -> Variant:
    """Chooses the frames and the crop of one variant.

    Args:
        info: What ``probe`` returned for the file.
        bucket: The shape that the clip gets.
        recipe: Settings and seed.
        content: Content hash of the file. Random choices follow from (seed, content, number) alone.
        number: Which of the variants this is, from 0.
    """
    draw = (recipe.seed, content, number)
    indices = frame_indices(
        info.times,
        bucket.frames,
        recipe.fps or 1.0,
        recipe.frame_selection,
        recipe.skip_frames_start,
        recipe.skip_frames_end,
        uniform(*draw, "window"),
    )
    flip = uniform(*draw, "flip") < recipe.flip_probability
    top, left = uniform(*draw, "top"), uniform(*draw, "left")
    size = (bucket.height, bucket.width)
    shape = fit(info.height, info.width, *size, recipe.reshape_mode, top, left, flip)
    return Variant(tuple(indices), shape, recipe.reader, info.conversions)


def decode_variant(path: StrPath, variant: Variant, stamp: list[int] | None = None) -> np.ndarray | str:
    """Decodes the frames of a variant.

    Args:
        path: The file.
        variant: Which frames, and how they are cut.
        stamp: Size and time of the last change when the variant was planned, if the file must still be the same.

    Returns:
        uint8 RGB frames of shape (F, H, W, 3), or a line that says why they could not be read.

    Raises:
        UsageError: The file system or the machine refuses, though the file may be fine.
    """
    try:
        size = (variant.fit.resize_height, variant.fit.resize_width)
        frames = read_frames(path, probe(path), variant.indices, *size, variant.reader)
    except VideoError as error:
        return str(error)
    except OSError as error:  # the file may be fine, so nothing about it goes into the ledger
        raise UsageError(f"{error}; fix that and run the same command again") from None
    if stamp is not None and stamp_of(path) != stamp:
        return f"{path}: has changed since it was planned"
    return apply_fit(frames, variant.fit)


def max_bad(fraction: float, number: int) -> int:
    """Returns how many of a number of clips may be bad, for --max_bad_fraction."""
    # The small addend makes up for rounding: 0.07 * 100 is a little less than 7 or a little more.
    return math.floor(fraction * number + 1e-6)


def time_decode(path: StrPath, variant: Variant) -> tuple[float, np.ndarray] | str:
    """Returns the seconds that ``decode_variant`` takes and its frames, or why they could not be read."""
    start = time.perf_counter()
    frames = decode_variant(path, variant)
    return frames if isinstance(frames, str) else (time.perf_counter() - start, frames)


def bad_line(path: str, reason: str) -> str:
    """Returns "file: reason" in one line; a reason that already begins with the file is not prefixed again."""
    return one_line(f"{path}: {reason.removeprefix(f'{path}: ')}")
