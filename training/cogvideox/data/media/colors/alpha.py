"""Composites transparent video frames on black before they are scaled.

``is_transparent`` says whether a file has transparent pixels, and ``on_black`` composites a decoded frame. pictures.py
does the same for pictures, so all transparent files follow one rule. The color that a transparent pixel would have if
it were opaque is arbitrary and often garish. So colors are multiplied by alpha before scaling; otherwise hidden colors
would be mixed into the visible edges.
"""

import os
import re

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from cogvideox.data.media.colors.planes import EXACT_SCALING, plane_array

# A graphic control extension of a gif with a disposal method that clears the area of the frame for the next one.
_GIF_CLEARS = re.compile(rb"!\xf9\x04[\x08-\x0b]...\0", re.DOTALL)


def is_transparent(path: str | os.PathLike[str], stream: VideoStream, frame: VideoFrame) -> bool:
    """Returns whether frames of a video may have transparent pixels, judged by its first frame and its container.

    Formats that always have an alpha channel (gif, palettes) count as transparent only if the first frame uses it, or
    if a gif clears parts of the picture later.

    Raises:
        OSError: The file cannot be read.
    """
    if stream.codec_context.name == "gif" or frame.format.has_palette:
        return _split(frame)[1].min() < 255 or (stream.codec_context.name == "gif" and _clears(path))
    # VP8 and VP9 store alpha in the container as a second stream, which FFmpeg's own decoders ignore.
    return _has_alpha(frame) or stream.metadata.get("alpha_mode") == "1"


def on_black(frame: VideoFrame) -> VideoFrame:
    """Returns the frame with its colors multiplied by alpha, in format gbrp; an opaque frame is returned unchanged."""
    if not (_has_alpha(frame) or frame.format.has_palette):
        return frame
    colors, alpha_HW = _split(frame)
    if alpha_HW.min() == 255:
        return frame
    visible = VideoFrame(frame.width, frame.height, "gbrp")
    for plane, color_HW in zip(visible.planes, colors, strict=True):
        plane_array(plane)[:] = (color_HW.astype(np.uint16) * alpha_HW + 127) // 255
    return visible


def _has_alpha(frame: VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _split(frame: VideoFrame) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the green, blue and red planes, and the alpha plane, as uint8 of shape (height, width) each."""
    planes = frame.reformat(format="gbrap", interpolation=Interpolation.BICUBIC | EXACT_SCALING, threads=1).planes
    *colors, alpha_HW = map(plane_array, planes)
    return colors, alpha_HW


def _clears(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return _GIF_CLEARS.search(file.read()) is not None
