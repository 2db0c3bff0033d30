"""From a video file to frames in a bucket's shape: planned from the header, then decoded. No torch: workers stay light.

path -> plan_clip: content hash, bucket, and for each variant frame indices and Fit -> decode_variant: uint8 FHWC
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

PLAN_VERSION = 3  # another number where equal flags begin to mean other cuts: what was planned before is planned again

IMAGE_STRETCH = 1.03  # to which an image's aspect ratio may differ from its clip's: sizes are whole pixels

OK, FAILED, SHORT, SMALL = "ok", "failed", "short", "small"
UNREADABLE = "unreadable"  # the file system refused: tried again at the next preparation
KILLED = "killed"  # its decoder crashed, hung or ate the memory: tried again under other limits
STATUSES = (OK, FAILED, SHORT, SMALL, UNREADABLE, KILLED)


@dataclass(frozen=True)
class ClipRecipe:
    """All that decides which pixels of a file are used."""

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
        """Changes with any field."""
        return hash_of([PLAN_VERSION, asdict(self)])

    def request(self, path: StrPath) -> str:
        """Names this recipe applied to the file as it is now, or to its absence, without reading it."""
        return hash_of([str(path), stamp_of(path), self.digest])


@dataclass(frozen=True)
class Variant:
    """One way to cut a clip: which frames, how they get the bucket's shape, what decodes and converts them."""

    indices: tuple[int, ...]
    fit: Fit
    reader: str
    conversions: tuple[str, ...] = ()  # see VideoInfo

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> "Variant":
        """Out of a ledger record."""
        conversions = tuple(values.get("conversions", ()))
        return cls(tuple(values["indices"]), Fit(**values["fit"]), values["reader"], conversions)

    def record(self) -> dict[str, Any]:
        """As in the ledger, and in keys: files without conversions keep the keys that they always had."""
        values = asdict(self)
        return values if self.conversions else {name: values[name] for name in values if name != "conversions"}

    def first_frame(self, image: dict[str, Any] | None = None) -> "Variant":
        """The frame that a clip of this variant begins with, or the image of a ledger record, cut in the same way."""
        if image is None:
            return replace(self, indices=self.indices[:1])
        return replace(self, indices=(0,), conversions=tuple(image["source"].get("conversions", ())))


def content_hash(path: StrPath) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_change(path: str, content: str) -> str | None:
    """What has become of a file whose content hash was ``content``; None: nothing."""
    try:
        return None if content_hash(path) == content else "its content has changed since it was planned"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def plan_clip(path: StrPath, recipe: ClipRecipe) -> dict[str, Any]:
    """The ledger record of a file: its plan, or why there is none. Decodes nothing; never raises for a bad file."""
    return _record(path, recipe.request(path), lambda info: plan_cuts(path, info, recipe))


def measure_clip(path: StrPath, recipe: ClipRecipe) -> dict[str, Any]:
    """The record of a file with its size and the frames that it can give; its content is not hashed, its cuts are not
    planned. Never raises for a bad file.
    """
    return _record(path, "", lambda info: {"status": OK, "available": frames_at_recipe_rate(info, recipe)})


def frames_at_recipe_rate(info: VideoInfo, recipe: ClipRecipe) -> int:
    """How many frames a clip can give at the rate of a recipe."""
    return frames_available(info.times, recipe.fps, recipe.skip_frames_start, recipe.skip_frames_end)


def image_request(path: StrPath) -> str:
    """Names the file of a first frame as it is now, without reading it."""
    return hash_of(["first frame", str(path), stamp_of(path)])


def plan_image(path: StrPath) -> dict[str, Any]:
    """The same of the file of a first frame; how it is cut is its clip's plan."""
    return _record(path, image_request(path), lambda _: {"status": OK, "content": content_hash(path), "cuts": []})


def _record(path: StrPath, request: str, plan: Callable[[VideoInfo], dict[str, Any]]) -> dict[str, Any]:
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
            raise  # of this worker's limit, not of the disk
        return record | {"status": UNREADABLE, "reason": str(error)}


def plan_cuts(path: StrPath, info: VideoInfo, recipe: ClipRecipe) -> dict[str, Any]:
    """What a clip gives to its buckets, or why it fills none: part of its record."""
    available = frames_at_recipe_rate(info, recipe)
    size = (info.height, info.width)
    buckets = choose_buckets(recipe.buckets, available, *size, recipe.max_upscale, recipe.every_bucket)
    if not buckets:
        return no_bucket_record(info, recipe, available) | {"available": available}
    content = content_hash(path)
    cuts = [plan_cut(info, bucket, recipe, content) for bucket in buckets]
    return {"status": OK, "available": available, "content": content, "cuts": cuts}


def image_refusal(clip: dict[str, Any], image: dict[str, Any]) -> str | None:
    """Why an image cannot be the first frame of a clip, from their ledger records; None: it can."""
    (height, width), (clip_height, clip_width) = ((r["source"]["height"], r["source"]["width"]) for r in (image, clip))
    ratio = (width * clip_height) / (height * clip_width)
    if max(ratio, 1 / ratio) <= IMAGE_STRETCH:
        return None
    shapes = f"is {width}x{height}, its clip {clip_width}x{clip_height}"
    return f"{shapes}: a first frame has its clip's shape; cut it to that, or list no images"


def no_bucket_record(info: VideoInfo, recipe: ClipRecipe, available: int) -> dict[str, Any]:
    """Why a clip fills no bucket: part of its record."""
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
    """What a clip gives to one bucket, as in the ledger: every variant's frames and shape."""
    variants = [plan_variant(info, bucket, recipe, content, number).record() for number in range(recipe.variants)]
    return {"bucket": asdict(bucket), "variants": variants}


def plan_variant(info: VideoInfo, bucket: Bucket, recipe: ClipRecipe, content: str, number: int) -> Variant:
    """The frames and the shape of one variant, drawn from (seed, content, number)."""
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
    """The frames of a variant, uint8 (F, H, W, 3), or why they could not be read.

    ``stamp`` is that of the file when the variant was planned, if it must be the same file still.
    """
    try:
        size = (variant.fit.resize_height, variant.fit.resize_width)
        frames = read_frames(path, probe(path), variant.indices, *size, variant.reader)
    except VideoError as error:
        return str(error)
    except OSError as error:  # not the file's fault: nothing is written down about it
        raise UsageError(f"{error}; mend that and run the same command again") from None
    if stamp is not None and stamp_of(path) != stamp:
        return f"{path}: has changed since it was planned"
    return apply_fit(frames, variant.fit)


def max_bad(fraction: float, number: int) -> int:
    """How many of a number of clips may be bad; a fraction that was rounded counts in full."""
    return math.floor(fraction * number + 1e-6)


def time_decode(path: StrPath, variant: Variant) -> tuple[float, np.ndarray] | str:
    """Seconds that decode_variant takes, and its frames; or why they could not be read."""
    start = time.perf_counter()
    frames = decode_variant(path, variant)
    return frames if isinstance(frames, str) else (time.perf_counter() - start, frames)


def is_record(record: dict[str, Any]) -> bool:
    """Whether a line of the ledger says all that it must; one that does not is as good as none."""
    names = ("path", "content", "cuts", "stamp", "source") if record.get("status") == OK else ("path", "reason")
    return record.get("status") in STATUSES and all(name in record for name in names)


def bad_line(path: str, reason: str) -> str:
    """file: reason, in one line."""
    return one_line(f"{path}: {reason.removeprefix(f'{path}: ')}")
