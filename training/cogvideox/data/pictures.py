"""Still pictures as clips of one frame: is_picture(), probe_picture() -> VideoInfo, read_picture() -> pixels.

Owns what becomes of EXIF orientation (applied), transparency (laid on black, as the videos' is), 16 bits (the upper 8
are kept), palettes and CMYK (converted to RGB; colour profiles are not applied). Shape suffixes as in decode.py.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from cogvideox.data.faults import VideoError, check_size, naming
from cogvideox.data.frames import VideoInfo

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")

# The first bytes of a file; an animated gif is a video.
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_WIDER = ("I", "F")


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts as a still picture does, whatever its name. Raises VideoError, OSError."""
    with naming(path), open(path, "rb") as file:
        start = file.read(12)
    return start.startswith(_MAGIC) or (start[:4], start[8:]) == (b"RIFF", b"WEBP")


def probe_picture(path: str | os.PathLike[str]) -> VideoInfo:
    """Reads the header only. Raises VideoError, also for animations and for what is too large to decode."""
    with _opened(path) as picture:
        width, height = picture.size
        if picture.getexif().get(_ORIENTATION, 1) >= 5:
            height, width = width, height
        return VideoInfo((0.0,), height, width, 0, (picture.format or "").lower())


def read_picture(path: str | os.PathLike[str], info: VideoInfo, count: int, height: int, width: int) -> np.ndarray:
    """`count` times the picture as uint8 RGB (F, height, width, 3), upright, resized as the frames of videos are.

    Raises VideoError if it is damaged or truncated, or another size than `info` says.
    """
    with _opened(path) as picture:
        upright = ImageOps.exif_transpose(_rgb(picture))
        if upright.size != (info.width, info.height):
            raise VideoError("has changed since it was probed; start again")
        shrinks = height <= upright.height and width <= upright.width
        method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        frame_HWC = np.asarray(upright.resize((width, height), method))
    return np.repeat(frame_HWC[None], count, axis=0)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    # Decoders of pictures raise whatever they stumble over in a damaged file: SyntaxError, struct.error, KeyError.
    with naming(path, Exception), warnings.catch_warnings(), _own_limit():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=FORMATS) as picture:
            _check_header(picture)
            yield picture


@contextmanager
def _own_limit() -> Iterator[None]:
    # Pillow's own does not say the size of the picture.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _check_header(picture: Image.Image) -> None:
    check_size(picture.height, picture.width)
    if picture.height * picture.width > MAX_PIXELS:
        size = f"{picture.width}x{picture.height}"
        raise VideoError(f"is {size}; at most {MAX_PIXELS // 10**6} million pixels are read; make it smaller")
    # The second picture of an MPO is another view or a preview of the same photo.
    num_frames = getattr(picture, "n_frames", 1)
    if num_frames > 1 and picture.format != "MPO":
        raise VideoError(f"holds {num_frames} pictures, only single ones are read; convert it to mp4 or gif")
    if picture.mode in _WIDER:
        raise VideoError(f"has pixels of 32 bits (mode {picture.mode}); save it with 8 or 16")


def _rgb(picture: Image.Image) -> Image.Image:
    """8 bits RGB on black, with the EXIF data that it had."""
    if picture.mode in _SIXTEEN_BITS:
        values = np.asarray(picture)
        converted = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    elif picture.has_transparency_data:
        clear = picture.convert("RGBA")
        converted = Image.composite(clear.convert("RGB"), Image.new("RGB", clear.size), clear.getchannel("A"))
    else:
        converted = picture.convert("RGB")
    converted.info["exif"] = picture.getexif().tobytes()
    return converted
