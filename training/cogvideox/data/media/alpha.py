"""Transparency of videos: is_transparent() says whether a file has any, on_black() composites a decoded frame on black.

Pictures do the same in pictures.py, so every transparent file follows one rule. What a transparent pixel's color would
be if it were opaque is arbitrary and often garish. So colors are multiplied by alpha before the frame is scaled:
scaling first would mix hidden colors into the visible edges.
"""

import os
import re

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from cogvideox.data.media.planes import EXACT, plane_array

# A graphic control extension of a gif whose disposal method clears the frame's area for the next one.
_GIF_CLEARS = re.compile(rb"!\xf9\x04[\x08-\x0b]...\0", re.DOTALL)


def is_transparent(path: str | os.PathLike[str], stream: VideoStream, frame: VideoFrame) -> bool:
    """Whether frames of a video may have transparent pixels, judged by its first frame and its container.

    Formats that always have an alpha channel (gif, palettes) count if the first frame uses it, and gif also if it
    clears parts of the picture later. Raises OSError.
    """
    if stream.codec_context.name == "gif" or frame.format.has_palette:
        return _split(frame)[1].min() < 255 or (stream.codec_context.name == "gif" and _clears(path))
    # VP8 and VP9 store alpha in the container, as a second stream that FFmpeg's own decoders leave out.
    return _has_alpha(frame) or stream.metadata.get("alpha_mode") == "1"


def on_black(frame: VideoFrame) -> VideoFrame:
    """The frame with its colors multiplied by alpha, in format gbrp; an opaque frame as it is."""
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
    """The green, blue and red planes and alpha at full size, uint8 (height, width) each."""
    planes = frame.reformat(format="gbrap", interpolation=Interpolation.BICUBIC | EXACT, threads=1).planes
    *colors, alpha_HW = map(plane_array, planes)
    return colors, alpha_HW


def _clears(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return _GIF_CLEARS.search(file.read()) is not None
