"""Makes clips whose frames show their number as eight black or white stripes.

numbered.py draws larger pictures in color, which also show whether a frame is upright.
Shape suffixes: F frames, H height, W width, C color channels.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream

from cogvideox.data.media.frames import VideoInfo
from cogvideox.data.media.pixels.decode import probe, read_frames

HEIGHT, WIDTH, RATE, COUNT = 64, 96, 30, 60
CLOCK = Fraction(1, RATE)
OPEN_GOP = "open-gop=1:keyint=10:min-keyint=1:bframes=3:b-adapt=0:b-pyramid=normal:scenecut=0"

# Arguments of encode for clips in different containers, codecs and ways of coding.
VIDEOS: dict[str, dict[str, Any]] = {
    "short_gop.mp4": {},
    "long_gop.mp4": {"options": {"g": "600", "bf": "3"}},
    "open_gop.mp4": {"options": {"x264-params": OPEN_GOP}},
    "open_gop.ts": {"options": {"x264-params": OPEN_GOP}},
    "intra_refresh.ts": {"options": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}},
    "fragments.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "blocks.mkv": {},
    "mpeg4.avi": {"codec": "mpeg4"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "lag-in-frames": "10", "deadline": "realtime"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=10:log-level=none", "preset": "ultrafast"}},
}
# Display matrices that phones write: the x and y axes of the picture as shown.
MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Draws a number in binary as eight white or black columns, which survive lossy coding and resizing."""
    bits = [number >> bit & 1 for bit in range(8)]
    row = np.repeat(bits, width // 8)
    frame_HWC = np.broadcast_to(row[None, :, None] * 255, (height, width, 3)).astype(np.uint8)
    # The gray of the top differs from frame to frame, so that the encoder skips no frame.
    frame_HWC[: height // 4] = number * 7 % 256
    return frame_HWC


def number_in(frame_HWC: np.ndarray) -> int:
    """Returns the number that a frame shows."""
    height, width = frame_HWC.shape[:2]
    return sum(int(frame_HWC[height * 3 // 4, width * (2 * bit + 1) // 16].mean() > 127) << bit for bit in range(8))


def numbers_in(frames_FHWC: np.ndarray) -> list[int]:
    """Returns the numbers that frames show."""
    return [number_in(frame_HWC) for frame_HWC in frames_FHWC]


def encode(
    path: Path,
    count: int = COUNT,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    rotation: tuple[Any, ...] | None = None,
    muxer: dict[str, str] | None = None,
    shape: tuple[int, int] = (HEIGHT, WIDTH),
    aspect: Fraction = Fraction(1),
) -> Path:
    """Writes a clip of the pictures 0 ... ``count`` - 1, and returns its path.

    Args:
        path: The file; its suffix chooses the container.
        count: Number of frames.
        codec: FFmpeg's name of the encoder.
        options: Options of the encoder. By default there is a keyframe every 12 frames and two B-frames in a row.
        pts: Timestamps of the frames in units of 1 / RATE seconds; by default 0, 1, 2 and so on.
        rotation: Arguments of set_display_rotation.
        muxer: Options of the container.
        shape: Height and width in pixels.
        aspect: Width of a pixel divided by its height.
    """
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=RATE)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = *shape, "yuv420p"
        stream.options = {"g": "12", "bf": "2", "sc_threshold": "0"} if options is None else {**options}
        stream.codec_context.time_base = CLOCK
        stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(*rotation)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, *shape))
            frame.pts, frame.time_base = pts[number] if pts else number, CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sequential(path: Path) -> list[int]:
    """Returns the numbers that a plain decode from start to end shows."""
    with av.open(str(path)) as container:
        return [number_in(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def read_numbers(path: Path, indices: Sequence[int], info: VideoInfo | None = None) -> list[int]:
    """Returns the numbers on chosen frames as ``read_frames`` returns them; ``info`` is what ``probe`` returned."""
    info = info or probe(path)
    return numbers_in(read_frames(path, info, indices, HEIGHT, WIDTH))
