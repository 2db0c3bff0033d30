"""Gives access to planes of decoded frames as arrays.

It also defines the flags with which swscale computes the same pixels on all machines.
"""

import numpy as np
from av.video.plane import VideoPlane
from av.video.reformatter import Interpolation

# Without these flags, chroma is not interpolated, and the pixels depend on the instruction set of the CPU.
EXACT_SCALING = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def plane_array(plane: VideoPlane, dtype: type[np.unsignedinteger] = np.uint8) -> np.ndarray:
    """Returns the pixels of a plane as an array (height, width) that shares its memory.

    The bytes that pad its lines are left out.
    """
    lines = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size).view(dtype)
    return lines[:, : plane.width]
