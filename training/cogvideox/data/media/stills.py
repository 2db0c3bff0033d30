"""Encodes single frames of a clip as JPEG, for models that look at pictures."""

import io
from dataclasses import dataclass

from PIL import Image

from cogvideox.data.media.decode import probe, read_frames
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import frame_indices

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


def stills_of(path: str, count: int, size: int) -> Stills | str:
    """Returns frames at equal distances in time, from the first to the last frame of the clip.

    Args:
        path: The clip, or a picture, which has one frame.
        count: How many frames; a shorter clip gives each of its frames.
        size: Pixels of the longer side. Smaller frames are not enlarged.

    Returns:
        The frames, or a line that says why the file cannot be used.
    """
    try:
        info = probe(path)
        indices = frame_indices(info.times, min(count, info.num_frames), None, "uniform")
        scale = min(1.0, size / max(info.height, info.width))
        height, width = (max(1, round(side * scale)) for side in (info.height, info.width))
        frames_FHWC = read_frames(path, info, indices, height, width)
    except (OSError, VideoError) as error:
        return str(error)
    return Stills(tuple(map(_jpeg, frames_FHWC)), tuple(info.times[index] for index in indices), info.duration)


def _jpeg(frame_HWC: "Image.SupportsArrayInterface") -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame_HWC).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
