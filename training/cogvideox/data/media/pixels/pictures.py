"""Reads still pictures as clips of one frame.

``is_picture`` recognizes them by their first bytes, ``probe_picture`` returns a ``VideoInfo``, and ``read_picture`` the
pixels. Every picture becomes upright 8-bit sRGB: EXIF orientation is applied, transparency is composited on black as in
videos, only the upper 8 of 16 bits are kept, and colors with an ICC profile for RGB, also those of palettes, are
converted to sRGB. CMYK becomes RGB as Pillow converts it, without its profile. Shape suffixes are those of decode.py.
"""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from cogvideox.data.media.colors.icc import srgb_transform
from cogvideox.data.media.faults import VideoError, check_size, errors_naming
from cogvideox.data.media.frames import ICC, ON_BLACK, VideoInfo

MAX_PIXELS = 100_000_000
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")

# First bytes of the formats. gif is missing, because it is read as a video.
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112  # the EXIF tag; with 5 to 8 the picture is on its side
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_WIDER = ("I", "F")

# Brands of ISO media files that are pictures. mif1 and msf1 may be AVIF or HEIC; their compatible brands tell which.
_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

# FFmpeg returns the tiles of a HEIC photograph one by one, and PyAV does not say how to put them together.
_HEIC = "convert it: `magick IN OUT.jpg`, or on a Mac `sips -s format jpeg IN --out OUT.jpg`"

# What the user can do with several pictures in one file. The ffmpeg program takes the still picture of an animated
# avif, and most of its versions do not read animated webp, so Pillow converts these to animated png. h264 would show
# the colors under transparent parts, but ffv1 keeps the transparency.
_BY_PILLOW = """`python -c "from PIL import Image; Image.open('IN').save('OUT.png', save_all=True)"`"""
_TWO_STEPS = f"convert it: {_BY_PILLOW}, then `ffmpeg -i OUT.png -c:v ffv1 OUT.mkv`"
_SINGLES = {
    "TIFF": "save each one as a separate file",
    "PNG": "convert it: `ffmpeg -i IN -c:v ffv1 OUT.mkv`",
    "WEBP": _TWO_STEPS,
    "AVIF": _TWO_STEPS,
}


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file begins like a still picture, whatever its name is. Raises VideoError or OSError."""
    with errors_naming(path), open(path, "rb") as file:
        start = file.read(12)
    is_webp = (start[:4], start[8:]) == (b"RIFF", b"WEBP")
    is_heif = start[4:8] == b"ftyp" and start[8:] in _AVIF | _HEIF
    return start.startswith(_MAGIC) or is_webp or is_heif


def probe_picture(path: str | os.PathLike[str]) -> VideoInfo:
    """Describes a picture from its header, without decoding it.

    Raises:
        VideoError: The picture is damaged, animated, or too large to decode.
    """
    with _opened(path) as picture:
        conversions = _conversions(picture)  # first, because reading the EXIF data may decode the picture
        width, height = picture.size
        # Pillow turns tiff pictures itself, so it already reports the size of the upright picture.
        if picture.format != "TIFF" and picture.getexif().get(_ORIENTATION, 1) >= 5:
            height, width = width, height
        codec = (picture.format or "").lower()
        return VideoInfo((0.0,), height, width, 0, codec, conversions=conversions)


def read_picture(path: str | os.PathLike[str], info: VideoInfo, count: int, height: int, width: int) -> np.ndarray:
    """Returns a picture, upright and resized as the frames of videos are, repeated ``count`` times.

    Args:
        path: The file.
        info: What ``probe_picture`` returned for it.
        count: How many frames to return.
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Returns:
        uint8 RGB of shape (F, height, width, 3).

    Raises:
        VideoError: The picture is damaged or cut off, or has another size than ``info`` says.
    """
    with _opened(path) as picture:
        transform = srgb_transform(picture)
        upright = ImageOps.exif_transpose(_rgb(picture))
        if upright.size != (info.width, info.height):
            raise VideoError("has changed since it was probed; start again")
        shrinks = height <= upright.height and width <= upright.width
        method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        resized = upright.resize((width, height), method)
        # Colors are converted after shrinking, because a full photograph takes a second. That is also right, up to
        # rounding, for colors that transparency darkened: the curves of RGB profiles are nearly powers of linear light,
        # and a power of a product is the product of the powers.
        frame_HWC = np.asarray(transform.apply(resized) if transform else resized)
    return np.repeat(frame_HWC[None], count, axis=0)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    # For damaged files, decoders of pictures raise many types of errors, as SyntaxError, struct.error and KeyError.
    with errors_naming(path, Exception), warnings.catch_warnings(), _own_limit():
        warnings.simplefilter("ignore")
        _check_brand(path)
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            _check_header(picture)
            yield picture


@contextmanager
def _own_limit() -> Iterator[None]:
    # The error of Pillow's own limit does not name the size of the picture, so _check_header applies ours.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _check_brand(path: str | os.PathLike[str]) -> None:
    with open(path, "rb") as file:
        size, kind = struct.unpack(">I4s", file.read(8).rjust(8, b"\0"))
        brands = file.read(min(size, 1024) - 8) if kind == b"ftyp" else b""
    if kind == b"ftyp" and not _AVIF & {brands[at : at + 4] for at in range(0, len(brands), 4)}:
        raise VideoError(f"is a HEIC picture, which is not supported; {_HEIC}")


def _check_header(picture: Image.Image) -> None:
    check_size(picture.height, picture.width)
    if picture.height * picture.width > MAX_PIXELS:
        size = f"{picture.width}x{picture.height}"
        raise VideoError(f"is {size}; at most {MAX_PIXELS // 10**6} million pixels are supported; make it smaller")
    # The second picture of an MPO is another view or a preview of the same photo.
    num_frames = getattr(picture, "n_frames", 1)
    if num_frames > 1 and picture.format != "MPO":
        fix = _SINGLES.get(picture.format or "", _TWO_STEPS)
        raise VideoError(f"holds {num_frames} pictures, but only single pictures are supported; {fix}")
    if picture.mode in _WIDER:
        raise VideoError(f"has pixels of 32 bits (mode {picture.mode}); save it with 8 or 16 bits")


def _conversions(picture: Image.Image) -> tuple[str, ...]:
    """Returns the names of conversions that older versions did not apply, so that their cached tensors are not reused.

    Older versions read AVIF as a video of one frame.
    """
    is_new = {
        "avif": picture.format == "AVIF",
        ICC: srgb_transform(picture) is not None,
        ON_BLACK: _is_deep(picture) and "transparency" in picture.info,
    }
    return tuple(name for name, applies in is_new.items() if applies)


def _is_deep(picture: Image.Image) -> bool:
    """Returns whether a picture that is not decoded yet has 16 bits per channel."""
    return picture.mode in _SIXTEEN_BITS or any(tile.args == "RGB;16B" for tile in getattr(picture, "tile", ()))


def _rgb(picture: Image.Image) -> Image.Image:
    """Converts a picture to 8-bit RGB on black, and keeps its EXIF data."""
    if picture.mode in _SIXTEEN_BITS:
        values = np.asarray(picture)
        visible = np.where(values == picture.info.get("transparency"), 0, values >> 8)
        converted = Image.fromarray(visible.astype(np.uint8)).convert("RGB")
    elif picture.has_transparency_data:
        # Pillow keeps the upper 8 bits of the colors, but the lower 8 bits of the transparent color.
        if _is_deep(picture):
            picture.info["transparency"] = tuple(value >> 8 for value in picture.info["transparency"])
        clear = picture.convert("RGBA")
        converted = Image.composite(clear.convert("RGB"), Image.new("RGB", clear.size), clear.getchannel("A"))
    else:
        converted = picture.convert("RGB")
    converted.info["exif"] = picture.getexif().tobytes()
    return converted
