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
from typing import Any

import numpy as np

from cogvideox.config.buckets import Bucket, choose_buckets, upscale
from cogvideox.data.cache import hash_of
from cogvideox.data.media.decode import probe, read_frames
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import VideoInfo, frame_indices, frames_available
from cogvideox.data.media.transforms import Fit, apply_fit, fit
from cogvideox.errors import UsageError, one_line
from cogvideox.files import stamp_of
from cogvideox.rng import uniform

StrPath = str | os.PathLike[str]

# Must change whenever the same flags begin to mean other frames or crops, so that all files are planned again.
PLAN_VERSION = 3

# Largest ratio between the aspect ratios of an image and its clip. It is above 1 because sizes are whole pixels.
IMAGE_STRETCH = 1.03

OK, FAILED, SHORT, SMALL = "ok", "failed", "short", "small"
UNREADABLE = "unreadable"  # the file system refused access; the next preparation tries again
KILLED = "killed"  # the decoder crashed, hung or used too much memory; tried again under other limits
STATUSES = (OK, FAILED, SHORT, SMALL, UNREADABLE, KILLED)


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


@dataclass(frozen=True)
class Variant:
    """Describes one way to cut a clip.

    Attributes:
        indices: Frames of the file, in display order, counted from 0.
        fit: How a frame becomes the size of the bucket.
        reader: Which library decodes, "pyav" or "decord".
        conversions: Names of what is done to the pixels beyond a plain decode; see ``VideoInfo``.
    """

    indices: tuple[int, ...]
    fit: Fit
    reader: str
    conversions: tuple[str, ...] = ()

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> "Variant":
        """Restores a variant from its entry in a ledger record."""
        conversions = tuple(values.get("conversions", ()))
        return cls(tuple(values["indices"]), Fit(**values["fit"]), values["reader"], conversions)

    def record(self) -> dict[str, Any]:
        """Returns the JSON form for ledger records and for the hashes that become cache keys.

        Conversions are left out where there are none, because older versions did not have the field, and the keys of
        such files must not change.
        """
        values = asdict(self)
        return values if self.conversions else {name: values[name] for name in values if name != "conversions"}

    def first_frame(self, image: dict[str, Any] | None = None) -> "Variant":
        """Returns the variant for the first frame of the clip.

        Args:
            image: Ledger record of an image that replaces the clip's own first frame; it is cut as the clip is.
        """
        if image is None:
            return replace(self, indices=self.indices[:1])
        return replace(self, indices=(0,), conversions=tuple(image["source"].get("conversions", ())))


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


def plan_clip(path: StrPath, recipe: ClipRecipe) -> dict[str, Any]:
    """Plans a clip from its packets, without decoding more than the first frame.

    A bad file never raises an error. Its record says what is wrong with it.

    Returns:
        The ledger record: status, size and rate of the file, and its content hash and cuts, or the reason why it
        cannot be used.
    """
    return _record(path, recipe.request(path), lambda info: plan_cuts(path, info, recipe))


def measure_clip(path: StrPath, recipe: ClipRecipe) -> dict[str, Any]:
    """Returns a record of the size of a clip and of how many frames it can give, without planning it.

    This is faster than ``plan_clip`` because the content is not hashed. A bad file never raises an error.
    """
    return _record(path, "", lambda info: {"status": OK, "available": frames_at_recipe_rate(info, recipe)})


def frames_at_recipe_rate(info: VideoInfo, recipe: ClipRecipe) -> int:
    """Returns how many frames a clip can give at the frame rate of a recipe, after its skipped frames."""
    return frames_available(info.times, recipe.fps, recipe.skip_frames_start, recipe.skip_frames_end)


def image_request(path: StrPath) -> str:
    """Returns the ledger key of the current state of an image that is a first frame, without reading its content."""
    return hash_of(["first frame", str(path), stamp_of(path)])


def plan_image(path: StrPath) -> dict[str, Any]:
    """Returns the ledger record of an image that is a first frame. It has no cuts: the image is cut as its clip is."""
    return _record(path, image_request(path), lambda _: {"status": OK, "content": content_hash(path), "cuts": []})


def _record(path: StrPath, request: str, plan: Callable[[VideoInfo], dict[str, Any]]) -> dict[str, Any]:
    """Probes a file and returns its record with what ``plan`` adds, or with the reason why it cannot be used."""
    record: dict[str, Any] = {"request": request, "path": str(path), "stamp": stamp_of(path)}
    try:
        info = probe(path)
        source = {"frames": info.num_frames, "fps": round(info.fps, 3), "height": info.height, "width": info.width}
        record |= {"source": source | {"codec": info.codec}}
        if info.conversions:
            record["source"] |= {"conversions": info.conversions}
        if info.matrix_is_assumed:
            record["source"] |= {"matrix_is_assumed": True}
        return record | plan(info)
    except VideoError as error:
        return record | {"status": FAILED, "reason": str(error)}
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise  # the worker exceeded its memory limit; the file may be fine
        return record | {"status": UNREADABLE, "reason": str(error)}


def plan_cuts(path: StrPath, info: VideoInfo, recipe: ClipRecipe) -> dict[str, Any]:
    """Returns the part of a clip's record that says which buckets it fills and how, or why it fills none."""
    available = frames_at_recipe_rate(info, recipe)
    size = (info.height, info.width)
    buckets = choose_buckets(recipe.buckets, available, *size, recipe.max_upscale, recipe.every_bucket)
    if not buckets:
        return no_bucket_record(info, recipe, available) | {"available": available}
    content = content_hash(path)
    cuts = [plan_cut(info, bucket, recipe, content) for bucket in buckets]
    return {"status": OK, "available": available, "content": content, "cuts": cuts}


def image_refusal(clip: dict[str, Any], image: dict[str, Any]) -> str | None:
    """Returns why an image cannot be the first frame of a clip, judged by their ledger records; None if it can."""
    (height, width), (clip_height, clip_width) = ((r["source"]["height"], r["source"]["width"]) for r in (image, clip))
    ratio = (width * clip_height) / (height * clip_width)
    if max(ratio, 1 / ratio) <= IMAGE_STRETCH:
        return None
    shapes = f"is {width}x{height}, its clip {clip_width}x{clip_height}"
    return f"{shapes}: a first frame has its clip's shape; cut it to that, or list no images"


def no_bucket_record(info: VideoInfo, recipe: ClipRecipe, available: int) -> dict[str, Any]:
    """Returns the part of a clip's record that says why it fills no bucket: it is too short or too small."""
    shortest = min(bucket.frames for bucket in recipe.buckets)
    if not available:
        skipped = f"--skip_frames_start {recipe.skip_frames_start} and --skip_frames_end {recipe.skip_frames_end}"
        return {"status": SHORT, "reason": f"{skipped} leave nothing of its {info.num_frames} frames; give less"}
    if available < shortest:
        rate = f" at {recipe.fps:g} frames a second" if recipe.fps else ""
        frames = f"{available} {'frame' if available == 1 else 'frames'}"
        reason = (
            f"{info.duration:.2f} s give {frames}{rate}, and the shortest bucket has {shortest}; give a shorter one"
        )
        return {"status": SHORT, "reason": reason}
    filled = [bucket for bucket in recipe.buckets if bucket.frames <= available]
    least = min(upscale(bucket, info.height, info.width) for bucket in filled)
    limit = f"{recipe.max_upscale:g} is the most; give a smaller bucket, or a larger --max_upscale"
    reason = f"{info.width}x{info.height} pixels would be enlarged {least:.2f} times, and {limit}"
    return {"status": SMALL, "reason": reason}


def plan_cut(info: VideoInfo, bucket: Bucket, recipe: ClipRecipe, content: str) -> dict[str, Any]:
    """Returns the ledger entry of a clip in one bucket: the frames and the crop of each variant."""
    variants = [plan_variant(info, bucket, recipe, content, number).record() for number in range(recipe.variants)]
    return {"bucket": asdict(bucket), "variants": variants}


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


def is_record(record: dict[str, Any]) -> bool:
    """Returns whether a ledger record has all required fields; one that does not is ignored."""
    names = ("path", "content", "cuts", "stamp", "source") if record.get("status") == OK else ("path", "reason")
    return record.get("status") in STATUSES and all(name in record for name in names)


def bad_line(path: str, reason: str) -> str:
    """Returns "file: reason" in one line; a reason that already begins with the file is not prefixed again."""
    return one_line(f"{path}: {reason.removeprefix(f'{path}: ')}")
