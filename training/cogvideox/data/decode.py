"""Video files: probe() -> VideoInfo, frame_indices() -> which frames, read_frames() -> their pixels; write_video().

Owns everything that touches a container or a codec. A frame is named by its place in display order among the frames
that are shown (edit lists are honoured) and found again by its timestamp, so a frame is the right one or an error.
Nothing here imports torch: decode workers stay small. Shape suffixes: F frames, H height, W width, C colour channels.
"""

import errno
import math
import os
import statistics
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation
from av.video.stream import VideoStream

from cogvideox.files import temporary_of

MAX_SIDE = 16384  # pixels
MAX_FRAMES = 200_000
SELECTIONS = ("middle", "head", "random", "uniform")

# A text file may be a playlist that names other files of this machine, so the readable formats are listed.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,ivf,h264,hevc,m4v"
# Without the last three, chroma is not interpolated and the pixels depend on the instruction set of the CPU.
_EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_TIME_SLACK = 1e-6  # seconds, or frames; above float noise, far below a frame


# Of the file system or the machine, not of the file: tried again another time
REFUSALS = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class VideoError(ValueError):
    """A video that cannot be used, with a reason of one line."""


@dataclass(frozen=True)
class VideoInfo:
    """What is shown of a video, read from its packets.

    times: seconds of each shown frame in display order, from the first one. height, width: pixels as shown, after
    rotation and with non-square pixels made square. rotation: 0, 90, 180 or 270 degrees counter-clockwise, what
    read_frames applies to the coded frames. header_rate: frames per second as declared, 0.0 if it is not.
    """

    times: tuple[float, ...]
    height: int
    width: int
    rotation: int
    codec: str
    header_rate: float = 0.0

    @property
    def num_frames(self) -> int:
        return len(self.times)

    @cached_property
    def fps(self) -> float:
        """Frames per second: 1 / median interval; the declared rate (else 1.0) if there is only one frame."""
        return 1 / _median_interval(self.times) if len(self.times) > 1 else self.header_rate or 1.0

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last, which is taken to last one median interval."""
        return self.times[-1] - self.times[0] + 1 / self.fps


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Reads all packets and decodes the first frame (the rotation is stored with it). Raises VideoError."""
    index = _index_packets(path)
    with _reading(path) as (container, stream):
        frame = next(_decode(container, stream, index, index.pts[:1], seek=False))
        rotation = _rotation(frame)
        height, width = _shown_size(frame, stream, rotation)
        _check_size(height, width)
        times = tuple(float((pts - index.pts[0]) * index.time_base) for pts in index.pts)
        codec = stream.codec_context.codec.canonical_name
        return VideoInfo(times, height, width, rotation, codec, float(stream.average_rate or 0))


def frames_available(times: Sequence[float], target_fps: float | None, skip_start: int = 0, skip_end: int = 0) -> int:
    """How many frames the clip can give at target_fps (None: each source frame), at least 1 if any are left.

    times: seconds of the source frames; skip_start, skip_end: source frames cut off first. 0 if nothing is left.
    """
    window = _window(times, skip_start, skip_end)
    if not window or target_fps is None:
        return len(window)
    seconds = window[-1] - window[0] + _median_interval(times)
    return max(1, math.floor(seconds * target_fps + _TIME_SLACK))


def frame_indices(
    times: Sequence[float],
    count: int,
    target_fps: float | None,
    selection: str,
    skip_start: int = 0,
    skip_end: int = 0,
    draw: float = 0.0,
) -> tuple[int, ...]:
    """The `count` source frames to read, as non-decreasing indices into `times` (seconds).

    "head", "middle" and "random" take the frames nearest to t0 + k / target_fps (None: one source frame after the
    other), where t0 is a source frame: the first, the middle or, by draw in [0, 1), any one from which all fit.
    "uniform" spreads them over the whole window and ignores the rate. skip_start and skip_end source frames are cut
    off first. Raises VideoError if the window is too short, ValueError for bad arguments.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"frame selection {selection!r}: must be one of {', '.join(SELECTIONS)}")
    if count < 1 or not 0 <= draw < 1:
        raise ValueError(f"count {count} must be at least 1 and draw {draw} in [0, 1)")
    window = _window(times, skip_start, skip_end)
    rate = None if selection == "uniform" else target_fps
    available = frames_available(times, rate, skip_start, skip_end)
    if available < count:
        at_rate = f" at {rate:g} fps" if rate else ""
        raise VideoError(f"too short: {count} frames asked for, {available} available{at_rate}")
    if selection == "uniform":
        chosen = _spread(window, count)
    else:
        chosen = _at_rate(window, count, rate, selection, draw, _median_interval(times))
    return tuple(skip_start + index for index in chosen)


def read_frames(
    path: str | os.PathLike[str], info: VideoInfo, indices: Sequence[int], height: int, width: int
) -> np.ndarray:
    """The frames of `indices` (any order, repeats allowed) as uint8 RGB (F, height, width, 3), upright.

    info: what probe() said of this file. Resized from the decoded picture in one step, without keeping the aspect
    ratio. Raises VideoError if a frame is damaged or does not come out, or if the file has changed since probe().
    """
    if any(not 0 <= index < info.num_frames for index in indices):
        raise VideoError(f"frame indices must be in 0 ... {info.num_frames - 1}, got {min(indices)} ... {max(indices)}")
    index = _index_packets(path)
    if len(index.pts) != info.num_frames:
        raise VideoError(f"{path}: has {len(index.pts)} frames, but had {info.num_frames} when it was probed")
    places: dict[int, list[int]] = {}
    for place, source in enumerate(indices):
        places.setdefault(index.pts[source], []).append(place)
    frames_FHWC = np.empty((len(indices), height, width, 3), np.uint8)
    for frame in _wanted_frames(path, index, sorted(places)):
        assert frame.pts is not None
        frames_FHWC[places.pop(frame.pts)] = _pixels(frame, info.rotation, height, width)
    assert not places
    return frames_FHWC


def write_video(path: str | os.PathLike[str], frames_FHWC: np.ndarray, fps: float, *, crf: int = 18) -> None:
    """Write uint8 RGB (F, H, W, 3) as h264 in mp4, under a temporary name until it is complete.

    Odd sizes are made even by repeating the last row or column (yuv420p stores colour for 2 x 2 pixels). Raises
    ValueError for other arrays and OSError where the folder cannot be written.
    """
    if frames_FHWC.dtype != np.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[3] != 3 or not frames_FHWC.size:
        raise ValueError(f"frames must be uint8 (F, H, W, 3), got {frames_FHWC.dtype} {frames_FHWC.shape}")
    _, height, width, _ = frames_FHWC.shape
    even_FHWC = np.pad(frames_FHWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    path = Path(path)
    temporary = temporary_of(path)
    try:
        _encode(temporary, even_FHWC, fps, crf)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Missed(VideoError):
    """A frame that the packets promise did not come out of the decoder."""


@dataclass(frozen=True)
class _PacketIndex:
    """Timestamps in units of time_base seconds: of the shown frames, and of the frames where decoding can start.

    seek_to holds, for each keyframe, the timestamp that finds it in this container.
    """

    pts: tuple[int, ...]
    keyframes: tuple[int, ...]
    seek_to: tuple[int, ...]
    time_base: Fraction

    def keyframe_before(self, pts: int) -> int:
        """The place in `keyframes` of the last one that is not shown after `pts`."""
        return bisect_right(self.keyframes, pts) - 1


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream; every error of the libraries inside the block becomes a VideoError."""
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    try:
        # Absolute, because a relative name with a colon would be taken for a protocol.
        with av.open(os.path.abspath(path), options=options) as container:
            yield container, _video_stream(container)
    except VideoError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        if error.errno in REFUSALS:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
        raise VideoError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (av.FFmpegError, EOFError) as error:
        raise VideoError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _video_stream(container: InputContainer) -> VideoStream:
    # The cover picture of an audio file is a video stream too.
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise VideoError("has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError("no decoder for its codec; re-encode it as h264")
    stream.codec_context.thread_count = 1  # the workers are the parallel part
    return stream


def _check_size(height: int, width: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise VideoError(f"is {width}x{height}; at most {MAX_SIDE} pixels a side are read")


def _index_packets(path: str | os.PathLike[str]) -> _PacketIndex:
    """Reads the timestamps of all packets; nothing is decoded."""
    with _reading(path) as (container, stream):
        _check_size(stream.height, stream.width)
        packets = _timestamps(container, stream)
        # mp4 and mkv are searched by display time; the others by decoding time, where the former lands too late.
        by_display = container.format.name.startswith(("mov", "matroska"))
        keyframes = sorted((pts, pts if by_display else dts) for pts, dts, is_keyframe, _ in packets if is_keyframe)
        # What precedes the first keyframe in display order refers to frames that are not in the file.
        first = keyframes[0][0] if keyframes else math.inf
        shown = {pts for pts, _, _, is_shown in packets if is_shown and pts >= first}
        if not shown:
            raise VideoError("has no frames")
        pts, seek_to = zip(*keyframes, strict=True)
        return _PacketIndex(tuple(sorted(shown)), pts, seek_to, Fraction(stream.time_base or 1))


def _timestamps(container: InputContainer, stream: VideoStream) -> list[tuple[int, int, bool, bool]]:
    """(presentation time, decoding time, is a keyframe, is shown) of each packet, in the order of the file."""
    packets = []
    for packet in container.demux(stream):
        if not packet.size:  # a dropped frame in avi, or the end
            continue
        if packet.pts is None:
            raise VideoError("its packets have no timestamps; re-encode it as h264 in mp4")
        dts = packet.pts if packet.dts is None else min(packet.pts, packet.dts)
        packets.append((packet.pts, dts, packet.is_keyframe, not packet.is_discard))
        if len(packets) > MAX_FRAMES:
            raise VideoError(f"has more than {MAX_FRAMES} frames; cut it into clips")
    # The header of an mp4 lists every frame, so a file that was cut off says so itself.
    if "mov" in container.format.name and len(packets) < len(stream.index_entries):
        raise VideoError(f"is truncated: {len(packets)} of {len(stream.index_entries)} frames are there")
    return packets


def _wanted_frames(path: str | os.PathLike[str], index: _PacketIndex, wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """The frames with the wanted timestamps (increasing), each once."""
    num_done = 0
    try:
        with _reading(path) as (container, stream):
            for frame in _decode(container, stream, index, wanted, seek=True):
                yield frame
                num_done += 1
    except _Missed:
        # Some containers find a later keyframe than asked for; read from the start, every frame is met.
        with _reading(path) as (container, stream):
            yield from _decode(container, stream, index, wanted[num_done:], seek=False)


def _decode(
    container: InputContainer, stream: VideoStream, index: _PacketIndex, wanted: Sequence[int], seek: bool
) -> Iterator[VideoFrame]:
    """The wanted frames of a container just opened; jumps only where a keyframe lies in between."""
    last = index.keyframes[0]
    frames = _frames(container, stream, last)
    for pts in wanted:
        place = index.keyframe_before(pts)
        if seek and index.keyframes[place] > last:
            container.seek(index.seek_to[place], stream=stream)
            frames = _frames(container, stream, index.keyframes[place])
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= pts), None)
        if frame is None or frame.pts != pts:
            raise _Missed(f"decode failed near frame {bisect_left(index.pts, pts)} of {len(index.pts)}")
        last = pts
        yield frame


def _frames(container: InputContainer, stream: VideoStream, keyframe: int) -> Iterator[VideoFrame]:
    """What comes out of the decoder from here on; `keyframe` is the timestamp at which decoding could start."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise VideoError("is damaged: a packet is incomplete")
        for frame in packet.decode():
            # Frames shown before the keyframe but stored after it lack their references, and nobody asks for them.
            # Any other damaged frame is a reference of those that follow, so none of them can be trusted.
            if frame.is_corrupt and frame.pts is not None and frame.pts >= keyframe:
                raise VideoError(f"is damaged: the frame at {frame.time:.3f} s does not decode")
            yield frame


def _pixels(frame: VideoFrame, rotation: int, height: int, width: int) -> np.ndarray:
    """uint8 RGB (height, width, 3) of a decoded frame, turned upright after the resize."""
    if rotation % 180:
        height, width = width, height
    # Averaging keeps fine patterns from flickering when shrinking; when enlarging it would give blocks.
    shrinks = height <= frame.height and width <= frame.width
    method = Interpolation.AREA if shrinks else Interpolation.BICUBIC
    picture = frame.reformat(width, height, "rgb24", interpolation=method | _EXACT, threads=1)
    return np.rot90(picture.to_ndarray(), rotation // 90)


def _rotation(frame: VideoFrame) -> int:
    """Degrees counter-clockwise that turn the coded picture upright: 0, 90, 180 or 270."""
    side_data: Any = frame.side_data
    if "DISPLAYMATRIX" not in side_data:
        return 0
    a, b, _, c, d = struct.unpack_from("=5i", bytes(side_data["DISPLAYMATRIX"]))
    if a * d - b * c < 0:
        raise VideoError("is mirrored by its display matrix; re-encode it")
    if frame.rotation % 90:
        raise VideoError(f"is rotated by {frame.rotation} degrees; only 90, 180 and 270 are applied, so re-encode it")
    return frame.rotation % 360


def _shown_size(frame: VideoFrame, stream: VideoStream, rotation: int) -> tuple[int, int]:
    """(height, width) in square pixels, upright."""
    width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
    return (width, frame.height) if rotation % 180 else (frame.height, width)


def _window(times: Sequence[float], skip_start: int, skip_end: int) -> Sequence[float]:
    if skip_start < 0 or skip_end < 0:
        raise ValueError(f"skip_start {skip_start} and skip_end {skip_end} must not be negative")
    return times[skip_start : max(skip_start, len(times) - skip_end)]


def _median_interval(times: Sequence[float]) -> float:
    """Seconds between frames; 0.0 if there is only one."""
    return statistics.median(b - a for a, b in pairwise(times)) if len(times) > 1 else 0.0


def _spread(window: Sequence[float], count: int) -> list[int]:
    if count == 1:
        return [_nearest(window, (window[0] + window[-1]) / 2)]
    step = (window[-1] - window[0]) / (count - 1)
    return [_nearest(window, window[0] + k * step) for k in range(count)]


def _at_rate(
    window: Sequence[float], count: int, rate: float | None, selection: str, draw: float, interval: float
) -> list[int]:
    if rate is None:
        start = _start(len(window) - count + 1, selection, draw)
        return list(range(start, start + count))
    # Starting on a source frame keeps equal rates exact: half a frame off, float noise would repeat and skip.
    spare = window[-1] - window[0] + interval - count / rate
    start = _start(max(1, bisect_right(window, window[0] + spare + _TIME_SLACK)), selection, draw)
    return [_nearest(window, window[start] + k / rate) for k in range(count)]


def _start(num_starts: int, selection: str, draw: float) -> int:
    return {"head": 0, "middle": (num_starts - 1) // 2}.get(selection, int(draw * num_starts))


def _nearest(window: Sequence[float], time: float) -> int:
    """The frame nearest to `time` seconds; of two equally near ones the earlier, whatever the floats say."""
    right = min(bisect_left(window, time), len(window) - 1)
    left = max(0, right - 1)
    return right if window[right] - time < time - window[left] - _TIME_SLACK else left


def _encode(path: Path, frames_FHWC: np.ndarray, fps: float, crf: int) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf)}
        # Tagged, because players guess the matrix of untagged files from the size of the picture.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
        context.color_range = av.video.reformatter.ColorRange.MPEG
        for frame_HWC in frames_FHWC:
            picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            coded = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=Interpolation.AREA | _EXACT
            )
            container.mux(stream.encode(coded))
        container.mux(stream.encode())
