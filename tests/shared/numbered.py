"""Makes media files in which each picture shows its number, so that tests read from the pixels which frame it is.

``picture`` draws a number, ``encode`` and ``plain`` make files, and ``number_in`` reads the number of a frame.
``sequential`` is the reference for readers: a plain decode from start to end, without an index and without seeking.
Shape suffixes: F frames, H height, W width, C color channels.
"""

import functools
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from cogvideox.data.media.container.packets import ANY_METADATA

HEIGHT, WIDTH, RATE, COUNT = 64, 96, 24, 36  # pixels, frames per second, frames
MARKS = ((255, 255, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0))  # colors of the top row of an upright picture

X264 = {"g": "12", "bf": "2", "sc_threshold": "0"}
X265 = {"x265-params": "keyint=12:log-level=none:pools=none:frame-threads=1", "preset": "ultrafast"}
VPX = {"g": "12", "lag-in-frames": "10", "deadline": "realtime", "cpu-used": "8"}
AV1 = {"preset": "12", "g": "12", "svtav1-params": "lp=1"}
OPTIONS = {"libx264": X264, "libx265": X265, "libvpx-vp9": VPX, "libvpx": VPX, "libsvtav1": AV1, "prores_ks": {}}

os.environ.setdefault("SVT_LOG", "1")  # errors only


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Draws a number in 3 rows of 4 fields.

    The top row is white, red, blue and black. The other rows show the eight bits of the number in light and dark gray.
    """
    bits = [(200 if number >> bit & 1 else 55,) * 3 for bit in range(8)]
    fields = np.array([*MARKS, *bits], np.uint8).reshape(3, 4, 3)
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    return fields[rows][:, columns]


def number_in(frame_HWC: np.ndarray, *, gray: bool = False) -> int:
    """Returns the number that a picture shows, or -1 if its top row is wrong.

    That is so if the picture is rotated, mirrored or damaged.

    Args:
        frame_HWC: The picture, as uint8.
        gray: Whether the picture is gray.
    """
    height, width = frame_HWC.shape[:2]
    middles = [(height * (2 * row + 1) // 6, width * (2 * column + 1) // 8) for row in range(3) for column in range(4)]
    fields = np.array([frame_HWC[y - 2 : y + 2, x - 2 : x + 2].mean((0, 1)) for y, x in middles])
    marks = np.array(MARKS, float)
    if gray:
        marks = np.repeat(marks @ [[0.299], [0.587], [0.114]], 3, axis=1)
    if np.abs(fields[:4] - marks).max() > 48:
        return -1
    return sum(int(field.mean() > 127) << bit for bit, field in enumerate(fields[4:]))


def pictures(numbers: Sequence[int] = range(COUNT), height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """Returns the pictures of these numbers."""
    return [picture(number, height, width) for number in numbers]


def written(container: str, fill: Callable[[Any], object], **muxer: str) -> bytes:
    """Returns the bytes of a file.

    Args:
        container: Format of the file.
        fill: Writes packets into the open container.
        muxer: Options of the container.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        with av.open(str(path), "w", format=container, options=muxer) as output:
            fill(output)
        return path.read_bytes()


def add_stream(output: Any, codec: str, frame_HWC: np.ndarray, pix_fmt: str = "yuv420p", **options: str) -> Any:
    """Adds a video stream for frames of this size. One thread encodes it, so that the bytes are always the same."""
    stream = output.add_stream(codec, rate=RATE, options=options)
    stream.height, stream.width, stream.pix_fmt = *frame_HWC.shape[:2], pix_fmt
    stream.codec_context.thread_count = 1
    stream.codec_context.time_base = Fraction(1, RATE)
    return stream


def encode(
    container: str,
    codec: str = "libx264",
    frames: Sequence[np.ndarray] | None = None,
    *,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    pts: Sequence[int] | None = None,
    aspect: Fraction = Fraction(1),
    full_range: bool = False,
    sound: bool = False,
) -> bytes:
    """Returns the bytes of a video file. By default it has a keyframe every 12 frames.

    Args:
        container: Format of the file.
        codec: FFmpeg's name of the encoder.
        frames: RGB or RGBA frames; by default the pictures 0 ... COUNT - 1.
        options: Options of the encoder; by default those of OPTIONS.
        muxer: Options of the container.
        pix_fmt: Pixel format.
        pts: Timestamps in units of 1 / RATE seconds; by default 0, 1, 2 and so on.
        aspect: Width of a pixel divided by its height.
        full_range: Whether the codes of colors have the full range.
        sound: Whether the file gets a second of silence.
    """
    frames = pictures() if frames is None else frames

    def fill(output: Any) -> None:
        chosen = OPTIONS.get(codec, {"g": "12"}) if options is None else options
        stream = add_stream(output, codec, frames[0], pix_fmt, **chosen)
        stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.color_range = 2 if full_range else 0
        audio = output.add_stream("aac", rate=44100, layout="mono") if sound else None
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            if full_range:
                frame = frame.reformat(format=pix_fmt, dst_color_range="JPEG")
            frame.pts, frame.time_base = pts[number] if pts else number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux([*stream.encode(), *(silence(audio) if audio else [])])

    return written(container, fill, **(muxer or {}))


def silence(stream: Any) -> list[Any]:
    """Returns the packets of a second of silence."""
    packets = []
    for number in range(44):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 44100, number * 1024
        packets += stream.encode(frame)
    return packets + stream.encode(None)


@functools.cache
def plain(container: str = "mp4", codec: str = "libx264") -> bytes:
    """Returns the bytes of a file with the pictures in this container and codec; the index of an mp4 comes first."""
    pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
    return encode(container, codec, pix_fmt=pix_fmt, muxer={"movflags": "faststart"} if container == "mp4" else None)


def remux(data: bytes, container: str, skip: int = 0) -> bytes:
    """Copies the packets of a file into another container, without the first ``skip`` packets."""

    def fill(output: Any) -> None:
        with av.open(io.BytesIO(data), "r") as source:
            stream = output.add_stream_from_template(source.streams.video[0])
            for packet in [packet for packet in source.demux(video=0) if packet.size][skip:]:
                packet.stream = stream
                output.mux(packet)

    return written(container, fill)


def differ(frame_HWC: np.ndarray, other_HWC: np.ndarray) -> bool:
    """Returns whether two frames differ by more than rounding."""
    return bool(np.abs(frame_HWC.astype(int) - other_HWC).max() > 2)


def sequential(
    path: Path,
    height: int,
    width: int,
    start: int = 0,
    limit: int = 2000,
    stream: int = 0,
    *,
    on_black: bool = False,
    new_memory: bool = False,
) -> list[tuple[int | None, np.ndarray]]:
    """Decodes a video from start to end, without an index and without seeking.

    Packets that do not decode are skipped.

    Args:
        path: The file.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        start: How many packets at the start are left out.
        limit: Number of frames after which decoding ends.
        stream: Position of the stream among the video streams.
        on_black: Whether frames with alpha are composited on black.
        new_memory: Whether the decoder gets new memory for each frame. Otherwise it uses the memory of earlier frames
            again, which shows where it writes no pixels.

    Returns:
        (timestamp, upright uint8 RGB) of each frame, in the order in which they are decoded.
    """
    pairs: list[tuple[int | None, np.ndarray]] = []
    kept: list[av.VideoFrame] = []
    with av.open(os.path.abspath(path), **ANY_METADATA) as container:
        video = container.streams.video[stream]
        video.codec_context.thread_count = 1
        for packet in itertools.islice(container.demux(video), start, None):
            try:
                frames = packet.decode()
                kept += frames if new_memory else ()
                pairs += [
                    (frame.pts, resized(composited(frame) if on_black else frame, height, width)) for frame in frames
                ]
            except av.FFmpegError:
                continue
            if len(pairs) > limit:
                break
    return pairs


def composited(frame: av.VideoFrame) -> av.VideoFrame:
    """Composites a frame on black; a frame without alpha is returned unchanged."""
    if not any(component.is_alpha for component in frame.format.components):
        return frame
    rgba = frame.to_ndarray(format="rgba").astype(int)
    visible = av.VideoFrame.from_ndarray(((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8))
    visible.pts = frame.pts
    return visible


def shown(source: Path | io.BytesIO, stream: int = 0) -> list[int]:
    """Returns the sorted timestamps of the frames that are shown, from the first keyframe on, as packets have them."""
    with av.open(source, "r", **ANY_METADATA) as container:
        packets = [(packet.pts, packet) for packet in container.demux(video=stream) if packet.size]
    timed = [(pts, packet) for pts, packet in packets if pts is not None]
    first = min((pts for pts, packet in timed if packet.is_keyframe), default=0)
    return sorted({pts for pts, packet in timed if not packet.is_discard and pts >= first})


def keyframes(path: Path, stream: int = 0) -> list[int]:
    """Returns the positions of the keyframes among the packets."""
    with av.open(os.path.abspath(path), **ANY_METADATA) as container:
        packets = enumerate(container.demux(video=stream))
        return [position for position, packet in packets if packet.size and packet.is_keyframe]


def resized(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """Returns a frame as upright uint8 RGB of this size; the rotation that the frame stores is applied."""
    # Without these flags, the pixels differ between CPUs, by more than the reader's pixels differ from these.
    exact = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    if frame.rotation % 180:
        height, width = width, height
    method = Interpolation.AREA if height <= frame.height and width <= frame.width else Interpolation.BICUBIC
    pixels = frame.reformat(width, height, "rgb24", interpolation=method | exact, threads=1).to_ndarray()
    return np.rot90(pixels, frame.rotation // 90)
