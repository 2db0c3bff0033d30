"""Media files whose every picture shows its number, so "which frame is this" is read from the pixels, not believed.

picture -> encode (or plain: one of each container and codec) -> number_in. sequential() is the reference for readers.
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

HEIGHT, WIDTH, RATE, COUNT = 64, 96, 24, 36  # pixels, frames per second, frames
MARKS = ((255, 255, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0))  # the top row of a picture that is upright

X264 = {"g": "12", "bf": "2", "sc_threshold": "0"}
X265 = {"x265-params": "keyint=12:log-level=none:pools=none:frame-threads=1", "preset": "ultrafast"}
VPX = {"g": "12", "lag-in-frames": "10", "deadline": "realtime", "cpu-used": "8"}
AV1 = {"preset": "12", "g": "12", "svtav1-params": "lp=1"}
OPTIONS = {"libx264": X264, "libx265": X265, "libvpx-vp9": VPX, "libvpx": VPX, "libsvtav1": AV1, "prores_ks": {}}

os.environ.setdefault("SVT_LOG", "1")  # errors only


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """3 x 4 fields: white, red, blue, black, and below them the eight bits of the number in light and dark gray."""
    bits = [(200 if number >> bit & 1 else 55,) * 3 for bit in range(8)]
    fields = np.array([*MARKS, *bits], np.uint8).reshape(3, 4, 3)
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    return fields[rows][:, columns]


def number_in(frame_HWC: np.ndarray, *, gray: bool = False) -> int:
    """The number that a picture shows; -1 if its top row is not there, as when it is turned, mirrored or damaged."""
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
    """The pictures of these numbers."""
    return [picture(number, height, width) for number in numbers]


def written(container: str, fill: Callable[[Any], object], **muxer: str) -> bytes:
    """The bytes of the file that `fill` writes into the open container."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        with av.open(str(path), "w", format=container, options=muxer) as output:
            fill(output)
        return path.read_bytes()


def add_stream(output: Any, codec: str, frame_HWC: np.ndarray, pix_fmt: str = "yuv420p", **options: str) -> Any:
    """A video stream for frames of this size, coded by one thread, so that the bytes are the same each time."""
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
    """The bytes of a file with these frames (pictures 0 ... COUNT - 1); pts in frames. A keyframe every 12 frames."""
    frames = pictures() if frames is None else frames

    def fill(output: Any) -> None:
        chosen = OPTIONS.get(codec, {"g": "12"}) if options is None else options
        stream = add_stream(output, codec, frames[0], pix_fmt, **chosen)
        stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.color_range = 2 if full_range else 0
        audio = output.add_stream("aac", rate=44100, layout="mono") if sound else None
        for place, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            if full_range:
                frame = frame.reformat(format=pix_fmt, dst_color_range="JPEG")
            frame.pts, frame.time_base = pts[place] if pts else place, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux([*stream.encode(), *(silence(audio) if audio else [])])

    return written(container, fill, **(muxer or {}))


def silence(stream: Any) -> list[Any]:
    """Packets of a second without sound."""
    packets = []
    for place in range(44):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 44100, place * 1024
        packets += stream.encode(frame)
    return packets + stream.encode(None)


@functools.cache
def plain(container: str = "mp4", codec: str = "libx264") -> bytes:
    """The pictures as this container and codec hold them; an mp4 has its index in front."""
    pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
    return encode(container, codec, pix_fmt=pix_fmt, muxer={"movflags": "faststart"} if container == "mp4" else None)


def remux(data: bytes, container: str, skip: int = 0) -> bytes:
    """The packets of a file but for the first ones, copied into another container."""

    def fill(output: Any) -> None:
        with av.open(io.BytesIO(data), "r") as source:
            stream = output.add_stream_from_template(source.streams.video[0])
            for packet in [packet for packet in source.demux(video=0) if packet.size][skip:]:
                packet.stream = stream
                output.mux(packet)

    return written(container, fill)


def differ(frame_HWC: np.ndarray, other_HWC: np.ndarray) -> bool:
    """Whether two frames differ by more than two ways of rounding do."""
    return bool(np.abs(frame_HWC.astype(int) - other_HWC).max() > 2)


def sequential(
    path: Path, height: int, width: int, start: int = 0, limit: int = 2000, stream: int = 0, *, on_black: bool = False
) -> list[tuple[int | None, np.ndarray]]:
    """(timestamp, RGB of this size, upright) of all that a plain decode to the end gives, in its order.

    Independent of the reader: no index, no seek. The first `start` packets are left out, those that do not decode are
    passed over, and after `limit` frames it ends. stream: which one of the videos. on_black: with their alpha applied.
    """
    pairs: list[tuple[int | None, np.ndarray]] = []
    with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
        video = container.streams.video[stream]
        video.codec_context.thread_count = 1
        for packet in itertools.islice(container.demux(video), start, None):
            try:
                pairs += [
                    (frame.pts, resized(composited(frame) if on_black else frame, height, width))
                    for frame in packet.decode()
                ]
            except av.FFmpegError:
                continue
            if len(pairs) > limit:
                break
    return pairs


def composited(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame as it looks on black; one without alpha as it is."""
    if not any(component.is_alpha for component in frame.format.components):
        return frame
    rgba = frame.to_ndarray(format="rgba").astype(int)
    visible = av.VideoFrame.from_ndarray(((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8))
    visible.pts = frame.pts
    return visible


def shown(source: Path | io.BytesIO, stream: int = 0) -> list[int]:
    """The timestamps of the frames that are shown, in that order, by the packets: those from the first keyframe on."""
    with av.open(source, "r", metadata_errors="ignore") as container:
        packets = [(packet.pts, packet) for packet in container.demux(video=stream) if packet.size]
    timed = [(pts, packet) for pts, packet in packets if pts is not None]
    first = min((pts for pts, packet in timed if packet.is_keyframe), default=0)
    return sorted({pts for pts, packet in timed if not packet.is_discard and pts >= first})


def keyframes(path: Path, stream: int = 0) -> list[int]:
    """The places of the keyframes among the packets."""
    with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
        packets = enumerate(container.demux(video=stream))
        return [place for place, packet in packets if packet.size and packet.is_keyframe]


def resized(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """RGB of this size, upright: what `frame` says of its rotation is followed."""
    # Without these flags the pixels differ from CPU to CPU, and by more than the reader's do from these.
    exact = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    if frame.rotation % 180:
        height, width = width, height
    method = Interpolation.AREA if height <= frame.height and width <= frame.width else Interpolation.BICUBIC
    pixels = frame.reformat(width, height, "rgb24", interpolation=method | exact, threads=1).to_ndarray()
    return np.rot90(pixels, frame.rotation // 90)
