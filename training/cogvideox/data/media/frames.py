"""Which frames of a clip: VideoInfo says when each is shown, frame_indices() chooses by time.

Pure functions of the times; nothing here opens a file. What a reader needs to find the frames again is a PacketIndex.
"""

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

from cogvideox.data.media.faults import VideoError

# Among VideoInfo.conversions
ON_BLACK = "alpha on black"
ICC = "icc"

SELECTIONS = ("middle", "head", "random", "uniform")

_CLOCK = 1e-3  # seconds: mkv, webm and flv round their timestamps to milliseconds
_TIME_SLACK = 1e-6  # seconds, or frames; above float noise, far below a frame


@dataclass(frozen=True)
class PacketIndex:
    """Timestamps in units of time_base seconds: of the shown frames, and of the frames where decoding can start.

    seek_to holds, for each keyframe, the timestamp that finds it in this container. stores_pts: whether the container
    stores display times, so that nothing has to be decoded to know them. is_closed: whether no frame is stored after a
    keyframe and shown before it. size: height and width of the coded pictures. stamp: size and time of the last change
    of the file that was read. pictures: for each shown frame the timestamp of the picture that is decoded for it, an
    earlier one where a frame was dropped. labels: the timestamps of all pictures in the order of the file, if not those
    of their packets. stream: its place in the file; num_streams: of videos and covers. conversions: see VideoInfo.
    """

    pts: tuple[int, ...]
    keyframes: tuple[int, ...]
    seek_to: tuple[int, ...]
    time_base: Fraction
    stores_pts: bool
    is_closed: bool
    size: tuple[int, int]
    stamp: tuple[int, int]
    pictures: tuple[int, ...]
    labels: tuple[int, ...]
    stream: int
    num_streams: int
    conversions: tuple[str, ...]

    def keyframe_before(self, pts: int) -> int:
        """The place in `keyframes` of the last one that is not shown after `pts`."""
        return bisect_right(self.keyframes, pts) - 1


@dataclass(frozen=True)
class VideoInfo:
    """What is shown of a video, read from its packets; of a still picture, a clip of one frame.

    times: seconds of each shown frame in display order, from the first one. height, width: pixels as shown, after
    rotation and with non-square pixels made square. rotation: 0, 90, 180 or 270 degrees counter-clockwise, what
    read_frames applies to the coded frames. header_rate: frames per second as declared, 0.0 if it is not.
    packets: how read_frames finds the frames; None for a still picture. conversions: names of what read_frames does to
    this file's pixels beyond a plain decode; part of the keys of cached tensors, so a new rule gets a new name.
    matrix: how YUV becomes RGB, as AVColorSpace counts, by the stream or else its container; 2 if neither says.
    matrix_is_assumed: whether that is needed and missing, so that read_frames takes bt601.
    """

    times: tuple[float, ...]
    height: int
    width: int
    rotation: int
    codec: str
    header_rate: float = 0.0
    packets: PacketIndex | None = field(default=None, repr=False, compare=False)
    conversions: tuple[str, ...] = ()
    matrix: int = 2
    matrix_is_assumed: bool = False

    @property
    def num_frames(self) -> int:
        return len(self.times)

    @cached_property
    def fps(self) -> float:
        """Frames per second: 1 / the usual interval; the declared rate (else 1.0) if there is only one frame."""
        if len(self.times) < 2:
            return self.header_rate or 1.0
        near = _usual_intervals(self.times)
        interval = statistics.fmean(near)
        # Rounded timestamps of a short clip fit several rates; the declared one is taken if it is one of them.
        fits = self.header_rate > 0 and abs(1 / self.header_rate - interval) * len(near) <= _CLOCK
        return self.header_rate if fits else 1 / interval

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last, which is taken to last one usual interval."""
        return self.times[-1] - self.times[0] + 1 / self.fps


def frames_available(times: Sequence[float], target_fps: float | None, skip_start: int = 0, skip_end: int = 0) -> int:
    """How many frames the clip can give at target_fps (None: each source frame), at least 1 if any are left.

    The last one is due while a source frame is still to come or, at rates above the source's, still shown.
    times: seconds of the source frames; skip_start, skip_end: source frames cut off first. 0 if nothing is left.
    """
    window = _window(times, skip_start, skip_end)
    if not window or target_fps is None:
        return len(window)
    shown = max(0.0, _usual_interval(times) - 1 / target_fps)
    seconds = window[-1] - window[0] + shown + _CLOCK
    return 1 + math.floor(seconds * target_fps + _TIME_SLACK)


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
        chosen = _at_rate(window, count, rate, selection, draw, _usual_interval(times))
    return tuple(skip_start + index for index in chosen)


def _window(times: Sequence[float], skip_start: int, skip_end: int) -> Sequence[float]:
    if skip_start < 0 or skip_end < 0:
        raise ValueError(f"skip_start {skip_start} and skip_end {skip_end} must not be negative")
    return times[skip_start : max(skip_start, len(times) - skip_end)]


def _usual_intervals(times: Sequence[float]) -> list[float]:
    """The intervals, in seconds, that differ from the median by no more than rounded timestamps do."""
    intervals = [b - a for a, b in pairwise(times)]
    median = statistics.median_low(intervals)
    return [interval for interval in intervals if abs(interval - median) <= _CLOCK + _TIME_SLACK]


def _usual_interval(times: Sequence[float]) -> float:
    """Seconds between frames; 0.0 if there is only one."""
    return statistics.fmean(_usual_intervals(times)) if len(times) > 1 else 0.0


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
    # A window lasts until its last frame is over; in a clip that ends with that frame it starts at the first one.
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
