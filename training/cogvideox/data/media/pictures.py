"""Still pictures as clips of one frame: is_picture(), probe_picture() -> VideoInfo, read_picture() -> pixels.

Every picture becomes upright 8-bit sRGB: EXIF orientation is applied, transparency is composited on black as in videos,
of 16 bits the upper 8 are kept, RGB colors with an ICC profile (phones write Display P3) are converted to sRGB, and
palettes and CMYK become RGB as Pillow converts them, without their profiles. Shape suffixes as in decode.py.
"""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from cogvideox.data.media.faults import VideoError, check_size, errors_naming
from cogvideox.data.media.frames import ICC, ON_BLACK, VideoInfo
from cogvideox.data.media.icc import srgb_transform

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")

# The first bytes of a file; an animated gif is a video.
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_WIDER = ("I", "F")

# The brands of ISO media files that are pictures. mif1 and msf1 may be either; then the compatible brands tell.
_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

# FFmpeg gives the tiles of a HEIC photograph one by one, and PyAV does not say how they lie together.
_HEIC = "convert it: `magick IN OUT.jpg`, or on a Mac `sips -s format jpeg IN --out OUT.jpg`"

# What to do with several pictures in a file. FFmpeg does not read animated webp.
_SINGLES = {
    "TIFF": "save each as a file of its own",
    "WEBP": """convert it: `python -c "from PIL import Image; Image.open('IN').save('OUT.gif', save_all=True)"`""",
}
_ANIMATED = "convert it: `ffmpeg -i IN OUT.mp4`"


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts as a still picture does, whatever its name. Raises VideoError, OSError."""
    with errors_naming(path), open(path, "rb") as file:
        start = file.read(12)
    is_webp = (start[:4], start[8:]) == (b"RIFF", b"WEBP")
    is_heif = start[4:8] == b"ftyp" and start[8:] in _AVIF | _HEIF
    return start.startswith(_MAGIC) or is_webp or is_heif


def probe_picture(path: str | os.PathLike[str]) -> VideoInfo:
    """Reads the header only. Raises VideoError, also for animations and for what is too large to decode."""
    with _opened(path) as picture:
        conversions = _conversions(picture)  # first, because reading the EXIF data may decode the picture
        width, height = picture.size
        # Pillow turns tiff pictures itself, and says the size that they will have.
        if picture.format != "TIFF" and picture.getexif().get(_ORIENTATION, 1) >= 5:
            height, width = width, height
        codec = (picture.format or "").lower()
        return VideoInfo((0.0,), height, width, 0, codec, conversions=conversions)


def read_picture(path: str | os.PathLike[str], info: VideoInfo, count: int, height: int, width: int) -> np.ndarray:
    """`count` times the picture as uint8 RGB (F, height, width, 3), upright, resized as the frames of videos are.

    Raises VideoError if it is damaged or truncated, or another size than `info` says.
    """
    with _opened(path) as picture:
        transform = srgb_transform(picture)
        upright = ImageOps.exif_transpose(_rgb(picture))
        if upright.size != (info.width, info.height):
            raise VideoError("has changed since it was probed; start again")
        shrinks = height <= upright.height and width <= upright.width
        method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        resized = upright.resize((width, height), method)
        # After shrinking, because it takes a second for a photograph. Colors that transparency darkened come out right
        # to within rounding: RGB profiles are nearly powers of linear light, and those commute with a factor.
        frame_HWC = np.asarray(transform.apply(resized) if transform else resized)
    return np.repeat(frame_HWC[None], count, axis=0)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    # Decoders of pictures raise whatever they stumble over in a damaged file: SyntaxError, struct.error, KeyError.
    with errors_naming(path, Exception), warnings.catch_warnings(), _own_limit():
        warnings.simplefilter("ignore")
        _check_brand(path)
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


def _check_brand(path: str | os.PathLike[str]) -> None:
    with open(path, "rb") as file:
        size, kind = struct.unpack(">I4s", file.read(8).rjust(8, b"\0"))
        brands = file.read(min(size, 1024) - 8) if kind == b"ftyp" else b""
    if kind == b"ftyp" and not _AVIF & {brands[at : at + 4] for at in range(0, len(brands), 4)}:
        raise VideoError(f"is a HEIC picture, which is not read; {_HEIC}")


def _check_header(picture: Image.Image) -> None:
    check_size(picture.height, picture.width)
    if picture.height * picture.width > MAX_PIXELS:
        size = f"{picture.width}x{picture.height}"
        raise VideoError(f"is {size}; at most {MAX_PIXELS // 10**6} million pixels are read; make it smaller")
    # The second picture of an MPO is another view or a preview of the same photo.
    num_frames = getattr(picture, "n_frames", 1)
    if num_frames > 1 and picture.format != "MPO":
        fix = _SINGLES.get(picture.format or "", _ANIMATED)
        raise VideoError(f"holds {num_frames} pictures, only single ones are read; {fix}")
    if picture.mode in _WIDER:
        raise VideoError(f"has pixels of 32 bits (mode {picture.mode}); save it with 8 or 16")


def _conversions(picture: Image.Image) -> tuple[str, ...]:
    """What is done to this picture that older versions did not do; they read AVIF as a video of one frame."""
    is_new = {
        "avif": picture.format == "AVIF",
        ICC: srgb_transform(picture) is not None,
        ON_BLACK: _is_deep(picture) and "transparency" in picture.info,
    }
    return tuple(name for name, applies in is_new.items() if applies)


def _is_deep(picture: Image.Image) -> bool:
    """Whether a picture that is not decoded yet has 16 bits a channel."""
    return picture.mode in _SIXTEEN_BITS or any(tile.args == "RGB;16B" for tile in getattr(picture, "tile", ()))


def _rgb(picture: Image.Image) -> Image.Image:
    """8 bits RGB on black, with the EXIF data that it had."""
    if picture.mode in _SIXTEEN_BITS:
        values = np.asarray(picture)
        visible = np.where(values == picture.info.get("transparency"), 0, values >> 8)
        converted = Image.fromarray(visible.astype(np.uint8)).convert("RGB")
    elif picture.has_transparency_data:
        if _is_deep(picture):  # Pillow keeps the upper bits of its colors, but the lower ones of the transparent color
            picture.info["transparency"] = tuple(value >> 8 for value in picture.info["transparency"])
        clear = picture.convert("RGBA")
        converted = Image.composite(clear.convert("RGB"), Image.new("RGB", clear.size), clear.getchannel("A"))
    else:
        converted = picture.convert("RGB")
    converted.info["exif"] = picture.getexif().tobytes()
    return converted
