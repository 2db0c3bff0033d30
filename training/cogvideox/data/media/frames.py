"""Chooses which frames of a clip are used, by the times at which they are shown.

``VideoInfo`` describes a file, ``PacketIndex`` says how to find its frames again, ``Section`` is a part of a file, and
``frame_indices`` selects frames for a target frame rate. All functions depend only on the times of the frames, and no
file is opened here.
"""

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from cogvideox.config.flags import FRAME_SELECTIONS
from cogvideox.data.media.faults import VideoError
from cogvideox.errors import plural

# Names of conversions in VideoInfo.conversions.
ON_BLACK = "alpha on black"
ICC = "icc"


_CLOCK = 1e-3  # seconds; mkv, webm and flv round their timestamps to milliseconds
_SECTION_SLACK = 1e-3  # seconds; the times of a section are rounded to milliseconds
_TIME_SLACK = 1e-6  # seconds or frames; larger than rounding errors of floats, and much smaller than a frame


@dataclass(frozen=True)
class PacketIndex:
    """Says when the frames of a video are shown, and where decoding can start.

    All timestamps are in units of ``time_base`` seconds.

    Attributes:
        pts: Timestamps of the shown frames, in display order.
        keyframes: Presentation times of the frames at which decoding can start.
        seek_to: For each keyframe, the timestamp with which the container finds it.
        time_base: Length of one unit in seconds.
        stores_pts: Whether the container stores display times, so that they are known without decoding.
        is_closed: Whether no frame is stored after a keyframe and shown before it.
        size: Height and width of the coded pictures in pixels.
        stamp: Size in bytes and time of the last change of the file that was read.
        pictures: For each shown frame, the timestamp of the picture that is decoded for it. It is that of an earlier
            picture where a frame was dropped.
        labels: Timestamps of all pictures in the order of the file, where they differ from those of the packets.
        stream: Index of the stream in the file.
        num_streams: How many video streams the file has, covers included.
        conversions: Names of what is done beyond a plain decode; see ``VideoInfo``.
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
        """Returns the index in ``keyframes`` of the last keyframe that is not shown after ``pts``."""
        return bisect_right(self.keyframes, pts) - 1


@dataclass(frozen=True)
class VideoInfo:
    """Describes what is shown of a video, or of a still picture, which counts as a clip of one frame.

    Attributes:
        times: Seconds at which each frame is shown, in display order, counted from the first frame.
        height: Height in pixels as shown, after rotation and with pixels made square.
        width: Width in pixels, likewise.
        rotation: 0, 90, 180 or 270 degrees counter-clockwise, which ``read_frames`` applies to the coded frames.
        codec: FFmpeg's name of the codec.
        header_rate: Frames per second that the header declares; 0.0 if it does not.
        packets: How ``read_frames`` finds the frames; None for a still picture.
        conversions: Names of what ``read_frames`` does to the pixels of this file beyond a plain decode. They are part
            of the keys of cached tensors, so a new rule must get a new name.
        matrix: How YUV becomes RGB, as a number of AVColorSpace, from the stream or else the container; 2 if unknown.
        matrix_is_assumed: Whether the matrix is needed and unknown, so that ``read_frames`` uses bt601.
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
        """Number of frames that are shown."""
        return len(self.times)

    @cached_property
    def fps(self) -> float:
        """Frames per second: 1 / the usual interval. For a single frame, the declared rate, or else 1.0."""
        if len(self.times) < 2:
            return self.header_rate or 1.0
        near = _usual_intervals(self.times)
        interval = statistics.fmean(near)
        # The rounded timestamps of a short clip are consistent with several rates. The declared one is exact, so it is
        # used if it is consistent with them.
        fits = self.header_rate > 0 and abs(1 / self.header_rate - interval) * len(near) <= _CLOCK
        return self.header_rate if fits else 1 / interval

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last, which is assumed to last one usual interval."""
        return self.times[-1] - self.times[0] + 1 / self.fps

    def seconds_of(self, frames: range) -> float:
        """Returns how long consecutive frames, given by their indices, are shown."""
        end = self.times[frames.stop] if frames.stop < self.num_frames else self.duration
        return end - self.times[frames.start]


class Section(NamedTuple):
    """A part of a video, in seconds from its first frame.

    Attributes:
        start: Time of the first frame.
        end: Time of the first frame after the part; None for the end of the video.
    """

    start: float
    end: float | None

    def __str__(self) -> str:
        """Describes the section, such as "from 3 s to 4.5 s"."""
        until = "the end" if self.end is None else f"{self.end:g} s"
        return f"from {self.start:g} s to {until}"

    def frames(self, info: VideoInfo) -> range:
        """Returns the indices of the frames of a video that are shown in the section.

        Raises:
            VideoError: There are none.
        """
        first = bisect_left(info.times, self.start - _SECTION_SLACK)
        end = info.num_frames if self.end is None else bisect_left(info.times, self.end - _SECTION_SLACK)
        if first >= end:
            reason = f"no frame is shown {self}, and the video lasts {info.duration:.2f} s"
            raise VideoError(f"{reason}; correct start and end in the table")
        return range(first, end)


def overlap(one: Section | None, other: Section | None) -> bool:
    """Returns whether two parts of a video have a moment in common; None is all of it."""
    first, second = one or Section(0.0, None), other or Section(0.0, None)
    return all(a.end is None or b.start < a.end for a, b in ((first, second), (second, first)))


def frames_available(times: Sequence[float], target_fps: float | None, skip_start: int = 0, skip_end: int = 0) -> int:
    """Returns how many frames a clip can give at a frame rate.

    A frame counts if it is due before the last source frame or, at rates above the rate of the source, while the last
    source frame is still shown.

    Args:
        times: Seconds of the source frames.
        target_fps: Frames per second; None takes each source frame.
        skip_start: Number of source frames to remove from the start.
        skip_end: Number of source frames to remove from the end.

    Returns:
        The number of frames; at least 1 if any source frame is left, else 0.
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
    """Selects ``count`` source frames.

    "head", "middle" and "random" choose a start frame and take the frames that are nearest to the times
    start + k / target_fps. "head" starts at the first frame, "middle" in the middle, and "random" at any frame after
    which all fit. "uniform" spreads the frames over the complete clip and ignores the rate.

    Args:
        times: Seconds of the source frames.
        count: How many frames to select.
        target_fps: Frames per second; None takes consecutive source frames.
        selection: "head", "middle", "random" or "uniform".
        skip_start: Number of source frames to remove from the start.
        skip_end: Number of source frames to remove from the end.
        draw: Random number in [0, 1) for "random".

    Returns:
        Indices into ``times``, not decreasing.

    Raises:
        VideoError: The clip is too short.
        ValueError: An argument is out of range.
    """
    if selection not in FRAME_SELECTIONS:
        raise ValueError(f"frame selection {selection!r}: must be one of {', '.join(FRAME_SELECTIONS)}")
    if count < 1 or not 0 <= draw < 1:
        raise ValueError(f"count {count} must be at least 1 and draw {draw} in [0, 1)")
    window = _window(times, skip_start, skip_end)
    rate = None if selection == "uniform" else target_fps
    available = frames_available(times, rate, skip_start, skip_end)
    if available < count:
        at_rate = f" at {rate:g} fps" if rate else ""
        raise VideoError(f"too short: {plural(count, 'frame')} asked for, {available} available{at_rate}")
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
    """Returns the intervals in seconds that differ from the median only by the rounding of timestamps."""
    intervals = [b - a for a, b in pairwise(times)]
    median = statistics.median_low(intervals)
    return [interval for interval in intervals if abs(interval - median) <= _CLOCK + _TIME_SLACK]


def _usual_interval(times: Sequence[float]) -> float:
    """Returns the mean of the usual intervals in seconds; 0.0 if there is only one frame."""
    return statistics.fmean(_usual_intervals(times)) if len(times) > 1 else 0.0


def _spread(window: Sequence[float], count: int) -> list[int]:
    """Returns the indices of frames at equal distances in time, from the first to the last frame of the window."""
    if count == 1:
        return [_nearest_frame(window, (window[0] + window[-1]) / 2)]
    step = (window[-1] - window[0]) / (count - 1)
    return [_nearest_frame(window, window[0] + k * step) for k in range(count)]


def _at_rate(
    window: Sequence[float], count: int, rate: float | None, selection: str, draw: float, interval: float
) -> list[int]:
    """Returns the indices of frames at a rate, from a start that the selection chooses."""
    if rate is None:
        start = _start(len(window) - count + 1, selection, draw)
        return list(range(start, start + count))
    # The start is always a source frame. If the rates are equal, a start between two frames would be equally near to
    # both, and rounding errors would repeat some frames and skip others.
    # The selected frames last until the end of the last one, and that end may not be after the end of the window.
    spare = window[-1] - window[0] + interval - count / rate
    start = _start(max(1, bisect_right(window, window[0] + spare + _TIME_SLACK)), selection, draw)
    return [_nearest_frame(window, window[start] + k / rate) for k in range(count)]


def _start(num_starts: int, selection: str, draw: float) -> int:
    """Chooses one of the possible start frames."""
    return {"head": 0, "middle": (num_starts - 1) // 2}.get(selection, int(draw * num_starts))


def _nearest_frame(window: Sequence[float], time: float) -> int:
    """Returns the index of the frame nearest to a time in seconds.

    If two are equally near up to rounding errors, it is the earlier one.
    """
    right = min(bisect_left(window, time), len(window) - 1)
    left = max(0, right - 1)
    return right if window[right] - time < time - window[left] - _TIME_SLACK else left
