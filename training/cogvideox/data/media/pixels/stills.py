"""Reads small frames of a clip, and encodes them as JPEG for models that look at pictures.

The functions return a line in place of an error, because they run in worker processes on files that may be bad.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import Section, VideoInfo, frame_indices
from cogvideox.data.media.pixels.decode import probe, probe_once, read_frames

JPEG_QUALITY = 90


@dataclass(frozen=True)
class Stills:
    """Frames of a clip.

    Attributes:
        jpegs: The frames in the order in which they are shown, each as a JPEG file.
        times: Seconds at which each is shown, from the start of the clip.
        duration: Length of the clip in seconds.
    """

    jpegs: tuple[bytes, ...]
    times: tuple[float, ...]
    duration: float


def stills_of(path: str, count: int, size: int, section: Section | None = None) -> Stills | str:
    """Returns frames at equal distances in time, from the first to the last frame of the clip.

    Args:
        path: The clip, or a picture, which has one frame.
        count: How many frames; a shorter clip gives each of its frames.
        size: Pixels of the longer side. Smaller frames are not enlarged.
        section: The part of the file that the clip is; None for all of it.

    Returns:
        The frames, or a line that says why the file cannot be used.
    """
    try:
        info = probe_once(path)
        clip = range(info.num_frames) if section is None else section.frames(info)
        skipped = (clip.start, info.num_frames - clip.stop)
        indices = frame_indices(info.times, min(count, len(clip)), None, "uniform", *skipped)
        frames_FHWC = read_frames(path, info, indices, *small_size(info, size))
    except (OSError, VideoError) as error:
        return str(error)
    times = tuple(info.times[index] - info.times[clip.start] for index in indices)
    return Stills(tuple(map(_jpeg, frames_FHWC)), times, info.seconds_of(clip))


def info_of(path: str) -> VideoInfo | str:
    """Returns what ``probe`` finds out about a file, or a line that says why the file cannot be used."""
    try:
        return probe(path)
    except (OSError, VideoError) as error:
        return str(error)


def small_frames(path: str, info: VideoInfo, indices: Sequence[int], size: int) -> np.ndarray | str:
    """Returns frames of a clip, or a line that says why they cannot be read.

    Args:
        path: The clip.
        info: What ``probe`` returned for it.
        indices: The frames in display order, counted from 0.
        size: Pixels of the longer side. Smaller frames are not enlarged.

    Returns:
        uint8 RGB frames of shape (F, H, W, 3), or a line.
    """
    try:
        return read_frames(path, info, indices, *small_size(info, size))
    except (OSError, VideoError) as error:
        return str(error)


def small_size(info: VideoInfo, size: int) -> tuple[int, int]:
    """Returns height and width with a longer side of ``size`` pixels, or those of the clip if it is smaller."""
    scale = min(1.0, size / max(info.height, info.width))
    return max(1, round(info.height * scale)), max(1, round(info.width * scale))


def _jpeg(frame_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame_HWC).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
