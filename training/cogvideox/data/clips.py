"""From a video file to frames in a bucket's shape: planned from the header, then decoded. No torch: workers stay light.

path -> plan_clip: content hash, bucket, and for each variant frame indices and Fit -> decode_variant: uint8 FHWC
"""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox.data.buckets import Bucket, nearest_bucket
from cogvideox.data.cache import hash_of
from cogvideox.data.decode import VideoError, VideoInfo, frame_indices, frames_available, probe, read_frames
from cogvideox.data.transforms import Fit, apply_fit, fit
from cogvideox.draws import uniform
from cogvideox.errors import UsageError

OK, FAILED, SHORT = "ok", "failed", "short"
UNREADABLE = "unreadable"  # the file system refused: tried again at the next preparation


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

    def request(self, path: Path) -> str:
        """Names this recipe applied to the file as it is now, without reading it."""
        status = os.stat(path)
        return hash_of([str(path), status.st_size, status.st_mtime_ns, asdict(self)])


@dataclass(frozen=True)
class Variant:
    """One way to cut a clip: which frames, and how they get the bucket's shape."""

    indices: tuple[int, ...]
    fit: Fit

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> "Variant":
        """Out of a ledger record."""
        return cls(tuple(values["indices"]), Fit(**values["fit"]))


def content_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_clip(path: Path, recipe: ClipRecipe) -> dict[str, Any]:
    """The ledger record of a file: its plan, or why there is none. Decodes nothing; never raises for a bad file."""
    record: dict[str, Any] = {"request": recipe.request(path), "path": str(path)}
    try:
        info = probe(path)
        source = {"frames": info.num_frames, "fps": round(info.fps, 3), "height": info.height, "width": info.width}
        record |= {"source": source | {"codec": info.codec}}
        available = frames_available(info.times, recipe.fps, recipe.skip_frames_start, recipe.skip_frames_end)
        bucket = nearest_bucket(recipe.buckets, available, info.height, info.width)
        if bucket is None:
            return record | {"status": SHORT, "reason": short_reason(info, recipe, available)}
        content = content_hash(path)
        variants = [plan_variant(info, bucket, recipe, content, k) for k in range(recipe.variants)]
    except VideoError as error:
        return record | {"status": FAILED, "reason": str(error)}
    except OSError as error:
        return record | {"status": UNREADABLE, "reason": str(error)}
    plans = [asdict(variant) for variant in variants]
    return record | {"status": OK, "content": content, "bucket": asdict(bucket), "variants": plans}


def short_reason(info: VideoInfo, recipe: ClipRecipe, available: int) -> str:
    """Why a clip has no bucket."""
    shortest = min(bucket.frames for bucket in recipe.buckets)
    rate = f" at {recipe.fps:g} frames a second" if recipe.fps else ""
    return f"{info.duration:.2f} s give {available} frames{rate}; the shortest bucket has {shortest}"


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
    return Variant(tuple(indices), fit(info.height, info.width, *size, recipe.reshape_mode, top, left, flip))


def decode_variant(path: Path, variant: Variant) -> np.ndarray | str:
    """The frames of a variant, uint8 (F, H, W, 3), or why they could not be read."""
    try:
        frames = read_frames(path, probe(path), variant.indices, variant.fit.resize_height, variant.fit.resize_width)
    except VideoError as error:
        return str(error)
    except OSError as error:  # not the file's fault: nothing is written down about it
        raise UsageError(f"{error}; mend that and run the same command again") from None
    return apply_fit(frames, variant.fit)
