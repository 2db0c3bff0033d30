"""Measures brightness, saturation and motion of frames, by which odd clips and odd validation videos are found.

All values are relative to the range of pixels, so they are between 0 and 1. ``look_of`` describes what a clip shows, by
which ``alike`` finds copies that were encoded again.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

BLACK, WHITE = 0.03, 0.97  # mean brightness of a video that shows nothing
STATIC = 0.002  # motion of a video in which nothing moves; half a level of 255
DARK, BRIGHT = 0.1, 0.85  # brightness below, and whiteness above which a clip is odd if most clips are not like it
GRAY, COLORFUL = 0.01, 0.05  # mean saturation of a clip without color, and of a data set with colors
UNUSUAL = 8.0  # a clip that moves this many times more or less than the median clip is odd
FEWEST = 4  # clips that a clip is compared with
LOOK_GRID = 8  # areas in each direction of a frame in a look
LOOK_BITS = 3 * 3 * LOOK_GRID**2  # bits of a look: of three frames and three colors
SAME_BITS = 40  # bits in which looks of copies differ at most; those of other clips of a place differ in 80 and more
PLAIN = 72  # set bits of a look below which the frames are too plain to tell
COMPARED = 2000  # earlier clips that a clip is compared with


class Health(NamedTuple):
    """Describes a video by means over all frames and pixels, each from 0 to 1."""

    brightness: float  # mean of the largest of red, green and blue
    saturation: float  # mean of largest minus smallest of red, green and blue
    motion: float  # mean absolute difference of neighboring frames; 0 for a single frame

    @property
    def whiteness(self) -> float:
        """Mean of the smallest of red, green and blue. A bright color such as yellow has none."""
        return self.brightness - self.saturation


def health_of(frames_FHWC: np.ndarray) -> Health:
    """Measures a video.

    Args:
        frames_FHWC: (F, H, W, 3), uint8.
    """
    highest = lowest = moved = 0
    before = frames_FHWC[0]
    for frame in frames_FHWC:  # one at a time, with whole planes of colors, is ten times faster than all at once
        planes = np.ascontiguousarray(np.moveaxis(frame, -1, 0))
        highest += int(planes.max(axis=0).sum(dtype=np.int64))
        lowest += int(planes.min(axis=0).sum(dtype=np.int64))
        moved += int((np.maximum(frame, before) - np.minimum(frame, before)).sum(dtype=np.int64))
        before = frame
    pixels = frames_FHWC[..., 0].size * 255
    pairs = max(1, len(frames_FHWC) - 1) * before.size * 255
    return Health(highest / pixels, (highest - lowest) / pixels, moved / pairs)


def look_of(frames_FHWC: np.ndarray) -> str:
    """Returns what a clip looks like, as LOOK_BITS bits in hexadecimal digits.

    A bit says whether an area of the first, middle or last frame has more red, green or blue than the area to its left.
    So a copy has almost the same bits in another size or quality.
    """
    rows = []
    for frame in (frames_FHWC[0], frames_FHWC[len(frames_FHWC) // 2], frames_FHWC[-1]):
        small = np.asarray(Image.fromarray(frame).resize((LOOK_GRID + 1, LOOK_GRID), Image.Resampling.BOX))
        rows.append(small[:, 1:] > small[:, :-1])
    return np.packbits(rows).tobytes().hex()


def alike(looks: Sequence[str]) -> dict[int, int]:
    """Returns, by index, the first earlier clip that looks like a clip. Only the last COMPARED ones are compared."""
    bits = np.array([np.frombuffer(bytes.fromhex(look), np.uint8) for look in looks])
    found = {}
    for index in range(1, len(looks)):
        start = max(0, index - COMPARED)
        same = np.bitwise_count(bits[start:index] ^ bits[index]).sum(axis=1) <= SAME_BITS
        if same.any() and np.bitwise_count(bits[index]).sum() >= PLAIN:
            found[index] = start + int(same.argmax())
    return found


def mean_health(found: Sequence[Health]) -> Health:
    """Returns the means over several videos."""
    return Health(*(float(np.mean(values)) for values in zip(*found, strict=True)))


def blanks(video: Health) -> Iterator[str]:
    """Yields what a video is called that shows nothing."""
    if video.brightness < BLACK:
        yield "black"
    elif video.brightness > WHITE and video.saturation < BLACK:
        yield "white"


def usual_health(found: Sequence[Health]) -> Health | None:
    """Returns the medians over several clips, or None if they are too few to be compared with."""
    if len(found) < FEWEST:
        return None
    return Health(*(float(np.median(values)) for values in zip(*found, strict=True)))


def clip_oddities(clip: Health, frames: int, usual: Health | None) -> Iterator[str]:
    """Yields what is odd about a clip that is to be trained on.

    Args:
        clip: The clip.
        frames: Its number of frames; a single one cannot move.
        usual: The medians over the clips of the data set, or None to judge the clip alone.
    """
    if blank := list(blanks(clip)):
        yield from blank
        return
    if frames > 1 and clip.motion < STATIC:
        yield "static"
    if usual is None:
        return
    if clip.brightness < DARK <= usual.brightness:
        yield "very dark, unlike most clips"
    if clip.whiteness > BRIGHT >= usual.whiteness:
        yield "very bright, unlike most clips"
    if clip.saturation < GRAY < COLORFUL <= usual.saturation:
        yield "without color, unlike most clips"
    if frames > 1 and min(clip.motion, usual.motion) >= STATIC:
        ratio = clip.motion / usual.motion
        if not 1 / UNUSUAL < ratio < UNUSUAL:
            yield f"moves {ratio:.2g} times as much as the median clip"
