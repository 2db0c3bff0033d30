"""Planes of decoded frames as arrays, and the flags with which swscale's pixels are the same on every machine."""

import numpy as np
from av.video.plane import VideoPlane
from av.video.reformatter import Interpolation

# Without these, chroma is not interpolated and the pixels depend on the instruction set of the CPU.
EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def plane_array(plane: VideoPlane, dtype: type[np.unsignedinteger] = np.uint8) -> np.ndarray:
    """What a plane holds as (height, width), without the bytes that pad its lines; shares the plane's memory."""
    lines = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size).view(dtype)
    return lines[:, : plane.width]
