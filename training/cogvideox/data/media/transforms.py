"""From decoded frames to the size of a bucket: one resize, one crop and one flip for the whole clip.

Owns the geometry only. A Fit says what to do in plain whole numbers, so it can be hashed into a cache key; the reader
does the resize while it decodes (decode.read_frames), apply_fit does the rest.
Shape suffixes: F frames, H height, W width, C colour channels.
"""

from dataclasses import dataclass

import numpy as np

CROP_MODES = ("none", "center", "random")


@dataclass(frozen=True)
class Fit:
    """Resize to resize_height x resize_width, cut height x width at (top, left), then mirror; all in pixels."""

    resize_height: int
    resize_width: int
    top: int
    left: int
    height: int
    width: int
    flip: bool


def fit(
    height: int,
    width: int,
    bucket_height: int,
    bucket_width: int,
    mode: str,
    draw_top: float = 0.5,
    draw_left: float = 0.5,
    flip: bool = False,
) -> Fit:
    """How a clip of height x width pixels, as shown, becomes bucket_height x bucket_width.

    mode "none" resizes to exactly the bucket and so may stretch; "center" covers the bucket and cuts the middle;
    "random" covers it and cuts at draw_top, draw_left, both in [0, 1). Raises ValueError for other modes and draws.
    """
    if mode not in CROP_MODES:
        raise ValueError(f"crop mode {mode!r}: must be one of {', '.join(CROP_MODES)}")
    if mode == "none":
        return Fit(bucket_height, bucket_width, 0, 0, bucket_height, bucket_width, flip)
    resize_height, resize_width = _cover(height, width, bucket_height, bucket_width)
    spare_top, spare_left = resize_height - bucket_height, resize_width - bucket_width
    if mode == "center":
        top, left = spare_top // 2, spare_left // 2
    else:
        top, left = _place(spare_top, draw_top), _place(spare_left, draw_left)
    return Fit(resize_height, resize_width, top, left, bucket_height, bucket_width, flip)


def stretch(fit: Fit, height: int, width: int) -> float:
    """How far the aspect ratio of a height x width clip is distorted: 1.0 is not at all, 2.0 twice as wide or tall."""
    ratio = (fit.resize_width * height) / (fit.resize_height * width)
    return max(ratio, 1 / ratio)


def scale(fit: Fit, height: int, width: int) -> float:
    """The larger of the two resize factors of a height x width clip: above 1 means that it is enlarged."""
    return max(fit.resize_height / height, fit.resize_width / width)


def apply_fit(frames_FHWC: np.ndarray, fit: Fit) -> np.ndarray:
    """Cut and mirror uint8 (F, resize_height, resize_width, 3) to a contiguous (F, height, width, 3).

    Raises ValueError if the frames do not have the size that `fit` was made for.
    """
    expected = (fit.resize_height, fit.resize_width, 3)
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[1:] != expected:
        raise ValueError(f"frames have shape {frames_FHWC.shape}, expected (F, {', '.join(map(str, expected))})")
    cut = frames_FHWC[:, fit.top : fit.top + fit.height, fit.left : fit.left + fit.width]
    return np.ascontiguousarray(cut[:, :, ::-1] if fit.flip else cut)


def _cover(height: int, width: int, bucket_height: int, bucket_width: int) -> tuple[int, int]:
    """The smallest size of the clip's own aspect ratio, in whole pixels, that covers the bucket."""
    # Whole numbers decide which side fits exactly: floats could leave that side a pixel off.
    if bucket_height * width >= bucket_width * height:
        return bucket_height, max(bucket_width, round(width * bucket_height / height))
    return max(bucket_height, round(height * bucket_width / width)), bucket_width


def _place(spare: int, draw: float) -> int:
    if not 0 <= draw < 1:
        raise ValueError(f"crop draw {draw}: must be in [0, 1)")
    return int(draw * (spare + 1))
