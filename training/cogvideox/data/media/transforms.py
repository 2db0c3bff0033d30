"""Fits frames to the size of a bucket, with one resize, one crop and one flip for all frames of a clip.

``fit_image`` does the same for an image from which a pipeline makes a video.

``fit`` decides the geometry and returns a ``Fit``, which consists of integers, so that it can be hashed into a cache
key. The reader resizes while it decodes (decode.read_frames), and ``apply_fit`` crops and flips.

Shape suffixes: F frames, H height, W width, C color channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cogvideox.config.flags import RESHAPE_MODES

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Fit:
    """Describes how to fit frames: resize, then crop height x width at (top, left), then flip; all in pixels."""

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
    """Decides how a clip becomes the size of a bucket.

    Args:
        height: Height of the clip as shown, in pixels.
        width: Width of the clip as shown, in pixels.
        bucket_height: Height of the bucket in pixels.
        bucket_width: Width of the bucket in pixels.
        mode: "none" resizes to exactly the bucket, which may stretch; "center" covers the bucket and crops the middle;
            "random" covers it and crops at a random position.
        draw_top: Random number in [0, 1) for the vertical position of the crop.
        draw_left: Random number in [0, 1) for the horizontal position of the crop.
        flip: Whether frames are mirrored horizontally.

    Raises:
        ValueError: The mode or a random number is not valid.
    """
    if mode not in RESHAPE_MODES:
        raise ValueError(f"crop mode {mode!r}: must be one of {', '.join(RESHAPE_MODES)}")
    if mode == "none":
        return Fit(bucket_height, bucket_width, 0, 0, bucket_height, bucket_width, flip)
    resize_height, resize_width = _cover(height, width, bucket_height, bucket_width)
    spare_top, spare_left = resize_height - bucket_height, resize_width - bucket_width
    if mode == "center":
        top, left = spare_top // 2, spare_left // 2
    else:
        top, left = _crop_offset(spare_top, draw_top), _crop_offset(spare_left, draw_left)
    return Fit(resize_height, resize_width, top, left, bucket_height, bucket_width, flip)


def stretch(fit: Fit, height: int, width: int) -> float:
    """Returns how far the aspect ratio of a height x width clip is distorted: 1.0 not at all, 2.0 twofold."""
    ratio = (fit.resize_width * height) / (fit.resize_height * width)
    return max(ratio, 1 / ratio)


def resize_factor(fit: Fit, height: int, width: int) -> float:
    """Returns the larger of the two resize factors of a height x width clip; above 1 it is enlarged."""
    return max(fit.resize_height / height, fit.resize_width / width)


def apply_fit(frames_FHWC: np.ndarray, fit: Fit) -> np.ndarray:
    """Crops and flips frames that were resized for a ``Fit``.

    Args:
        frames_FHWC: Frames as uint8 of shape (F, resize_height, resize_width, 3).
        fit: What to do.

    Returns:
        Contiguous uint8 array of shape (F, height, width, 3).

    Raises:
        ValueError: The frames do not have the size of the fit.
    """
    expected = (fit.resize_height, fit.resize_width, 3)
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[1:] != expected:
        raise ValueError(f"frames have shape {frames_FHWC.shape}, expected (F, {', '.join(map(str, expected))})")
    cut = frames_FHWC[:, fit.top : fit.top + fit.height, fit.left : fit.left + fit.width]
    return np.ascontiguousarray(cut[:, :, ::-1] if fit.flip else cut)


def _cover(height: int, width: int, bucket_height: int, bucket_width: int) -> tuple[int, int]:
    """Returns the smallest height and width with the clip's aspect ratio that cover the bucket."""
    # Integer arithmetic decides which side fits exactly; with floats that side could be off by one pixel.
    if bucket_height * width >= bucket_width * height:
        return bucket_height, max(bucket_width, round(width * bucket_height / height))
    return max(bucket_height, round(height * bucket_width / width)), bucket_width


def _crop_offset(spare: int, draw: float) -> int:
    """Returns the offset of a crop in 0 ... ``spare`` for a random number in [0, 1)."""
    if not 0 <= draw < 1:
        raise ValueError(f"crop draw {draw}: must be in [0, 1)")
    return int(draw * (spare + 1))


# inference.py has a copy of the source of this function.
def fit_image(
    image: "Image.Image", width: int, height: int, crop: bool, tolerance: float
) -> tuple["Image.Image", str | None]:
    """Fits an image to the shape of a video of width x height, to which the pipeline then resizes it.

    Args:
        image: The image.
        width: Width of the video in pixels.
        height: Height of the video in pixels.
        crop: Whether to cut out the middle. Otherwise the pipeline stretches the image.
        tolerance: The factor by which the aspect ratios may differ without a crop.

    Returns:
        The image, and what is done to it, for a message; None for nothing that is visible.
    """
    scales = image.width / width, image.height / height
    if max(scales) <= tolerance * min(scales):
        return image, None
    found, shape = f"is {image.width}x{image.height}", f"{width}x{height}"
    if not crop:
        return image, f"{found} and is stretched to {shape}, as clips were in training; crop it to the shape of {shape}"
    cut = [max(1, round(min(scales) * side)) for side in (width, height)]
    left, top = (image.width - cut[0]) // 2, (image.height - cut[1]) // 2
    note = f"{found}, and the video is {shape}: only the middle of the image, {cut[0]}x{cut[1]}, is used"
    return image.crop((left, top, left + cut[0], top + cut[1])), note
