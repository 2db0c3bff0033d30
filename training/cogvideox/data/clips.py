"""Chooses the buckets, frames and crops of each clip, and later decodes the chosen frames.

``plan_clip`` reads the packets of a file and returns a record for the ledger. The record contains a hash of the file's
content, and a list of frame indices and a crop for each bucket and each augmentation variant. ``decode_variant`` turns
one variant into uint8 pixels:

    path + ClipRecipe --plan_clip--> record: content hash, bucket, Variants --decode_variant--> uint8 (F, H, W, 3)

Random choices depend only on the seed, the content of the clip and the number of the variant. Nothing here imports
torch, so that decode workers need little memory.
"""

import errno
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from cogvideox.config.buckets import Bucket, choose_buckets, upscale
from cogvideox.data.cache import hash_of
from cogvideox.data.health import health_of, look_of
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import Section, VideoInfo, frame_indices, frames_available
from cogvideox.data.media.pixels.decode import probe_once, read_frames
from cogvideox.data.media.transforms import apply_fit, fit
from cogvideox.data.records import FAILED, OK, SHORT, SMALL, UNREADABLE, ClipRecord, Cut, Source, Variant
from cogvideox.errors import UsageError, one_line, plural
from cogvideox.files import file_hash, stamp_of
from cogvideox.rng import uniform

StrPath = str | os.PathLike[str]

# Increase this whenever a change of the code makes the same flags select other frames or crops: all files are then
# planned again.
PLAN_VERSION = 5

# The aspect ratios of a first frame and of its clip may differ by this factor, because sizes are rounded to pixels.
IMAGE_STRETCH = 1.03


@dataclass(frozen=True)
class ClipRecipe:
    """Holds all settings that decide which pixels of a file are used; config/flags.py describes them."""

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

    def request(self, path: StrPath, section: Section | None = None) -> str:
        """Returns the ledger key under which the record of a file is stored, without reading the file.

        The key depends on the recipe, and on the path, the size and the time of the last change of the file. It also
        exists for a missing file, whose record says that it is missing.
        """
        # The word tells such records from those of earlier versions, which drew the same for all sections of a file.
        return hash_of([str(path), stamp_of(path), self.digest, *(("section", *section) if section else ())])

    def within(self, section: Section | None, info: VideoInfo) -> "ClipRecipe":
        """Returns the recipe that also skips the frames before and after a section of the video.

        Raises:
            VideoError: The section has no frame.
        """
        if section is None:
            return self
        inside = section.frames(info)
        return replace(
            self,
            skip_frames_start=self.skip_frames_start + inside.start,
            skip_frames_end=self.skip_frames_end + info.num_frames - inside.stop,
        )


# Scenes of a long video follow each other, so a process hashes it once for all of them. A changed file has another
# stamp, see stamp_of.
@lru_cache(maxsize=1)
def _content_of(path: str, _stamp: tuple[int, ...]) -> str:
    return file_hash(path)


def content_change(path: str, content: str) -> str | None:
    """Returns None if a file still has the content hash ``content``, or else a phrase that says why not."""
    try:
        return None if file_hash(path) == content else "its content has changed since it was planned"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def plan_clip(path: StrPath, recipe: ClipRecipe, section: Section | None = None) -> ClipRecord:
    """Plans a clip, or a section of it, from its packets, without decoding more than the first frame.

    A bad file never raises an error. Its record says what is wrong with it.
    """

    def plan(record: ClipRecord, info: VideoInfo) -> ClipRecord:
        planned = plan_cuts(record, info, recipe.within(section, info), section)
        if section and planned.status == SHORT:  # the other sections of the file may be long enough
            return replace(planned, reason=f"{section}: {planned.reason}")
        return planned

    return _probe_and_plan(path, recipe.request(path, section), plan)


def measure_clip(path: StrPath, recipe: ClipRecipe, section: Section | None = None) -> ClipRecord:
    """Returns a record with the size of a clip and its number of available frames, without planning it.

    This is faster than ``plan_clip`` because the content is not hashed. A bad file never raises an error.
    """

    def plan(record: ClipRecord, info: VideoInfo) -> ClipRecord:
        return replace(record, status=OK, available=frames_at_recipe_rate(info, recipe.within(section, info)))

    return _probe_and_plan(path, "", plan)


def frames_at_recipe_rate(info: VideoInfo, recipe: ClipRecipe) -> int:
    """Returns how many frames of a clip are available at a recipe's frame rate, without those that it skips."""
    return frames_available(info.times, recipe.fps, recipe.skip_frames_start, recipe.skip_frames_end)


def image_request(path: StrPath) -> str:
    """Returns the ledger key of a first-frame image: a hash of its path, size and time of the last change."""
    return hash_of(["first frame", str(path), stamp_of(path)])


def plan_image(path: StrPath) -> ClipRecord:
    """Returns the record of a first-frame image, which has no cuts because the cuts of its clip are used.

    A video is refused: its first frame would be taken, although its clip may begin later.
    """

    def plan(record: ClipRecord, info: VideoInfo) -> ClipRecord:
        if info.num_frames > 1:
            rule = f"is a video of {info.num_frames} frames, but a first frame must be a still image"
            return replace(record, reason=f"{rule}; list an image, or no images to take the first frames of the clips")
        return replace(record, status=OK, content=file_hash(path))

    return _probe_and_plan(path, image_request(path), plan)


def _probe_and_plan(path: StrPath, request: str, plan: Callable[[ClipRecord, VideoInfo], ClipRecord]) -> ClipRecord:
    """Probes a file and returns its record, which contains the result of ``plan`` or why the file cannot be used."""
    stamp = stamp_of(path)
    record = ClipRecord(request, str(path), FAILED, stamp=stamp)
    try:
        info = probe_once(path)
        record = replace(record, source=Source.of(info))
        return plan(record, info)
    except VideoError as error:
        return replace(record, reason=str(error))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise  # the worker exceeded its memory limit; the file may be fine
        return replace(record, status=UNREADABLE, reason=str(error))


def plan_cuts(record: ClipRecord, info: VideoInfo, recipe: ClipRecipe, section: Section | None) -> ClipRecord:
    """Returns the record with a cut for each bucket that the clip fills, or with the reason why it fills none.

    Args:
        record: The record of the file.
        info: What ``probe`` returned for the file.
        recipe: The recipe, which skips the frames outside of the section.
        section: The part of the file that the clip is; None for all of it.
    """
    available = frames_at_recipe_rate(info, recipe)
    size = (info.height, info.width)
    buckets = choose_buckets(recipe.buckets, available, *size, recipe.max_upscale, recipe.every_bucket)
    if not buckets:
        status, reason = why_no_bucket(info, recipe, available)
        return replace(record, status=status, reason=reason, available=available)
    content = _content_of(record.path, tuple(record.stamp or ()))
    clip = content, *(section or ())
    cuts = tuple(plan_cut(info, bucket, recipe, clip) for bucket in buckets)
    return replace(record, status=OK, available=available, content=content, cuts=cuts)


def same_aspect(width: int, height: int, other_width: int, other_height: int) -> bool:
    """Returns whether an image can be resized to another size without being visibly stretched."""
    ratio = (width * other_height) / (height * other_width)
    return max(ratio, 1 / ratio) <= IMAGE_STRETCH


def image_refusal(clip: Source, image: Source) -> str | None:
    """Returns why the size of an image prevents it from being the first frame of a clip; None if it fits."""
    if same_aspect(image.width, image.height, clip.width, clip.height):
        return None
    sizes = f"is {image.width}x{image.height}, but its clip is {clip.width}x{clip.height}"
    return f"{sizes}: a first frame must have the aspect ratio of its clip; crop it, or list no images"


def why_no_bucket(info: VideoInfo, recipe: ClipRecipe, available: int) -> tuple[str, str]:
    """Returns the status and the reason of a clip that fills no bucket, because it is too short or too small."""
    shortest = min(bucket.frames for bucket in recipe.buckets)
    if not available:
        skipped = f"--skip_frames_start {recipe.skip_frames_start} and --skip_frames_end {recipe.skip_frames_end}"
        return SHORT, f"{skipped} leave none of its {plural(info.num_frames, 'frame')}; lower them"
    if available < shortest and info.packets is None:
        return SHORT, f"is a single picture, but the shortest bucket has {shortest} frames; add a bucket of one frame"
    if available < shortest:
        rate = f" at {recipe.fps:g} frames per second" if recipe.fps else ""
        frames = plural(available, "frame")
        skipped_seconds = (recipe.skip_frames_start + recipe.skip_frames_end) / info.fps
        given = f"{info.duration - skipped_seconds:.2f} s give {frames}{rate}"
        return SHORT, f"{given}, but the shortest bucket has {shortest}; add a shorter bucket"
    filled = [bucket for bucket in recipe.buckets if bucket.frames <= available]
    least = min(upscale(bucket, info.height, info.width) for bucket in filled)
    limit = f"--max_upscale allows {recipe.max_upscale:g}; add a smaller bucket, or allow more"
    return SMALL, f"{info.width}x{info.height} pixels would be enlarged {least:.2f} times, but {limit}"


def plan_cut(info: VideoInfo, bucket: Bucket, recipe: ClipRecipe, clip: tuple[object, ...]) -> Cut:
    """Returns how a clip is cut for one bucket: the frames and the crop of each variant."""
    return Cut(bucket, tuple(plan_variant(info, bucket, recipe, clip, k) for k in range(recipe.variants)))


def plan_variant(info: VideoInfo, bucket: Bucket, recipe: ClipRecipe, clip: tuple[object, ...], number: int) -> Variant:
    """Chooses the frames and the crop of one variant.

    Args:
        info: What ``probe`` returned for the file.
        bucket: The number of frames and the size to which the clip is cut.
        recipe: Settings and seed.
        clip: Hash of the content of the file, and the section. Random choices depend only on (seed, clip, number).
        number: The index of the variant, from 0.
    """
    draw = (recipe.seed, *clip, number)
    indices = frame_indices(
        info.times,
        bucket.frames,
        recipe.fps,
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
        variant: The frame indices and the crop.
        stamp: Size and time of the last change when the variant was planned. A file that has changed since then is not
            used. None skips this check.

    Returns:
        uint8 RGB frames of shape (F, H, W, 3), or a line that says why they could not be read.

    Raises:
        UsageError: The operating system could not read the file, which itself may be fine.
    """
    try:
        size = (variant.fit.resize_height, variant.fit.resize_width)
        frames = read_frames(path, probe_once(path), variant.indices, *size, variant.reader)
    except VideoError as error:
        return str(error)
    except OSError as error:  # the file may be fine, so nothing about it goes into the ledger
        raise UsageError(f"{error}; fix that and run the same command again") from None
    if stamp is not None and stamp_of(path) != stamp:
        return f"{path}: has changed since it was planned"
    return apply_fit(frames, variant.fit)


def decode_measured(
    path: StrPath, variant: Variant, stamp: list[int] | None = None
) -> tuple[dict[str, object], np.ndarray] | str:
    """Returns the values of a line of health.jsonl and the frames of ``decode_variant``, or its reason."""
    frames = decode_variant(path, variant, stamp)
    if isinstance(frames, str):
        return frames
    numbers = {name: round(value, 5) for name, value in health_of(frames)._asdict().items()}
    return {**numbers, "look": look_of(frames)}, frames


def max_bad(fraction: float, number: int) -> int:
    """Returns how many of ``number`` clips may be unusable if --max_bad_fraction is ``fraction``."""
    # The small addend compensates for rounding: 0.29 * 100 is 28.999999999999996 in floating point.
    return math.floor(fraction * number + 1e-6)


def time_decode(path: StrPath, variant: Variant) -> tuple[float, np.ndarray] | str:
    """Returns the time of ``decode_variant`` in seconds and the frames, or why the frames could not be read."""
    start = time.perf_counter()
    frames = decode_variant(path, variant)
    return frames if isinstance(frames, str) else (time.perf_counter() - start, frames)


def bad_line(path: str, reason: str) -> str:
    """Returns "file: reason" in one line; a reason that already begins with the file is not prefixed again."""
    return one_line(f"{path}: {reason.removeprefix(f'{path}: ')}")
