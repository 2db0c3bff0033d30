"""Buckets that suit a folder: what its clips could give, and the model's rules -> --train_resolution.

A clip is (frames that it can give, height, width). Candidates are all frame counts and sizes that the model takes and
the clips call for. Of those the ones are chosen that together cover the most clips and then keep the most of them:
pixels times frames, less what enlarging makes up and what stretching or cutting loses. One clip more outweighs all that
COVERED others lose, so that a few very short or small clips do not make a large folder short and small.
A clip of which more than a third would be cut, or that would be stretched as much, does not count as covered, nor does
a video by a bucket of one frame.
Nothing here opens a file or reads weights.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cogvideox.config.buckets import Bucket, choose_buckets
from cogvideox.config.geometry import Geometry

USUAL = 4  # buckets to propose where nobody said how many
WORTH = 0.02  # share of the clips' pixels that one more bucket must keep
MOST_PIXELS = 768 * 1360  # of a frame: the size that 1.5 was trained at; some configs allow far more
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16)  # width / height
SHARES = (1.0, 0.5, 0.25, 0.125)  # of the model's own pixels: smaller sizes are for clips of few pixels
ASPECT_ERROR = 0.02  # to which a size may miss its aspect ratio
COVERED = 4.0  # what it is worth that a clip is covered; the largest bucket's pixels, all kept, are worth 1
MOST_CUT = 1.5  # how far a clip's aspect ratio may be from that of a bucket that covers it
MOST_KINDS = 2_000  # the most frequent combinations of length and size among which buckets are chosen
SMALLER = 0.85  # share of the pixels for which a size may be smaller to meet its ratio exactly

Clip = tuple[int, int, int]  # frames that it can give at the rate asked for, height, width in pixels


@dataclass(frozen=True)
class Proposal:
    """Buckets, how many clips fill one, and how many clips there are."""

    buckets: tuple[Bucket, ...]
    fitting: int
    num_clips: int

    @property
    def flags(self) -> str:
        """To be pasted into a command in place of the other flags for buckets."""
        return f"--train_resolution {' '.join(map(str, self.buckets))}"


def propose(
    clips: Iterable[Clip], geometry: Geometry, max_upscale: float, most_frames: int, number: int = USUAL
) -> Proposal:
    """At most ``number`` buckets of at most ``most_frames`` frames that cover the most clips and keep the most of them.

    There are fewer where another one would make no difference worth having, and none if no clip fills any. Clips that
    can give one frame only are taken for pictures.
    """
    counted = Counter(clips)
    kinds = [kind for kind, _ in counted.most_common(MOST_KINDS) if kind[0] > 0]
    sizes = legal_sizes(geometry)
    candidates = [Bucket(count, *size) for count in _wanted_frames(kinds, geometry, most_frames) for size in sizes]
    chosen: list[int] = []
    if kinds and candidates:
        chosen = _choice_of(candidates, kinds, [counted[kind] for kind in kinds], max_upscale).choose(
            number, len(sizes)
        )
    buckets = [candidates[place] for place in chosen]
    used = {kind: choose_buckets(buckets, *kind, max_upscale) for kind in counted}
    filled = {bucket for found in used.values() for bucket in found}
    fitting = sum(counted[kind] for kind, found in used.items() if found)
    return Proposal(tuple(sorted(filled, key=lambda bucket: (-bucket.frames, bucket))), fitting, counted.total())


def legal_frames(geometry: Geometry, most: int) -> list[int]:
    """The frame counts from 1 to ``most`` that inference makes just so, and the shortest of several frames."""
    step = geometry.temporal_compression
    exact = [count for count in range(1, most + 1, step) if geometry.problem("frames", count) is None]
    return [count for count in exact if count == step + 1 or geometry.inference_frames(count) == count]


def legal_sizes(geometry: Geometry) -> list[tuple[int, int]]:
    """(height, width) of the model's own size, and of the usual aspect ratios at its pixels and at fewer."""
    own = geometry.own_bucket
    if geometry.learned_positions:  # which are for this size alone
        return [(own.height, own.width)]
    pixels = min(own.height * own.width, MOST_PIXELS)
    sides = range(geometry.size_multiple, math.isqrt(2 * pixels) + 1, geometry.size_multiple)
    heights = [side for side in sides if geometry.problem("height", side) is None]
    widths = {side for side in sides if geometry.problem("width", side) is None}
    found = {(own.height, own.width)} if own.height * own.width == pixels else set()
    for aspect in ASPECTS:
        near = [(h, w) for h in heights for w in _near_widths(h, aspect, geometry.size_multiple) if w in widths]
        found |= {size for share in SHARES for size in _best_size(near, aspect, share * pixels)}
    return sorted(found)


def _near_widths(height: int, aspect: float, multiple: int) -> Iterator[int]:
    below = int(height * aspect / multiple) * multiple
    yield from (
        width for width in (below, below + multiple) if width and _error((height, width), aspect) <= ASPECT_ERROR
    )


def _error(size: tuple[int, int], aspect: float) -> float:
    return abs(math.log(size[1] / size[0] / aspect))


def _best_size(sizes: Sequence[tuple[int, int]], aspect: float, pixels: float) -> list[tuple[int, int]]:
    """Of the sizes with at most so many pixels the largest, or one a little smaller that meets the ratio better."""
    fitting = [(height, width) for height, width in sizes if height * width <= pixels]
    most = max((height * width for height, width in fitting), default=0)
    large = [(height, width) for height, width in fitting if height * width >= SMALLER * most]
    return sorted(large, key=lambda size: (round(_error(size, aspect), 9), -size[0] * size[1]))[:1]


def _wanted_frames(kinds: Sequence[Clip], geometry: Geometry, most_frames: int) -> list[int]:
    """The frame counts that are the most that some clip can give; of one frame only for pictures."""
    counts = legal_frames(geometry, most_frames)
    if geometry.learned_positions:
        counts = [count for count in counts if count == geometry.sample_frames]
    longest = {max((count for count in counts if count <= frames), default=0) for frames, _, _ in kinds}
    pictures = any(frames == 1 for frames, _, _ in kinds)
    return sorted(count for count in longest if count > 1 or (count == 1 and pictures))


@dataclass(frozen=True)
class _Choice:
    """For each candidate (rows) and kind of clip (columns): what the clip is worth there, and which candidates it
    prefers, as choose_buckets does; and how many clips of each kind there are.
    """

    values: np.ndarray
    preferences: np.ndarray  # minus infinity where the clip does not fill the bucket
    weights: np.ndarray

    def best(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of each kind the value and the preference in the one of the rows that it goes to."""
        values, preferences = np.zeros(len(self.weights)), np.full(len(self.weights), -np.inf)
        for row in rows:
            wins = self.preferences[row] > preferences
            values = np.where(wins, self.values[row], values)
            preferences = np.where(wins, self.preferences[row], preferences)
        return values, preferences

    def worth(self, rows: Sequence[int]) -> float:
        """What all clips are worth in the rows."""
        return float(self.best(rows)[0] @ self.weights)

    def best_addition(self, rows: Sequence[int], among: slice = slice(None)) -> tuple[int, float]:
        """The row ``among`` all that would make these rows worth the most, and how much that is."""
        values, preferences = self.best(rows)
        worth = np.where(self.preferences[among] > preferences, self.values[among], values) @ self.weights
        return int(worth.argmax()) + (among.start or 0), float(worth.max())

    def choose(self, number: int, sizes: int) -> list[int]:
        """At most ``number`` rows that are worth the most; of rows, each group of ``sizes`` has one frame count.

        A single long bucket takes all long clips, whatever their shape, so that it often pays only together with
        others of its length: the search starts at each frame count in turn.
        """
        starts = (self.added([], number, slice(first, first + sizes)) for first in range(0, len(self.values), sizes))
        return max((self._exchanged(self.added(start, number)) for start in starts), key=self.worth)

    def added(self, rows: list[int], number: int, among: slice = slice(None)) -> list[int]:
        """The rows and the best additions, up to ``number``, as long as one is worth it."""
        rows, least = list(rows), 0.0
        while len(rows) < number:
            row, worth = self.best_addition(rows, among)
            if worth <= self.worth(rows) + least:
                break
            rows.append(row)
            least = WORTH * float(self.weights.sum())
        return rows

    def _exchanged(self, chosen: list[int]) -> list[int]:
        """The rows, each replaced as long as that makes them worth more."""
        improved = True
        while improved:
            improved = False
            for place in range(len(chosen)):
                others = chosen[:place] + chosen[place + 1 :]
                row, worth = self.best_addition(others)
                if worth > self.worth(chosen) * (1 + 1e-9):
                    chosen, improved = [*others, row], True
        return chosen


def _choice_of(candidates: Sequence[Bucket], kinds: Sequence[Clip], weights: Sequence[int], limit: float) -> _Choice:
    """What each kind of clip is worth in each candidate that does not enlarge it more than ``limit`` times: the share
    of the largest candidate that is the clip's own pixels, and COVERED more where the bucket covers it.
    """
    frames, heights, widths = np.array(kinds, float).T
    numbers = np.array([(bucket.frames, bucket.height, bucket.width) for bucket in candidates], float)
    bucket_frames, bucket_heights, bucket_widths = numbers.T[:, :, None]
    enlarged = np.maximum(bucket_heights / heights, bucket_widths / widths)
    distance = np.abs(np.log(bucket_widths * heights / (bucket_heights * widths))).round(9)
    volume = numbers.prod(axis=1, keepdims=True)
    kept = volume / volume.max() / (np.maximum(1.0, enlarged) * np.exp(distance)) ** 2
    covers = (distance <= math.log(MOST_CUT)) & ((bucket_frames > 1) | (frames == 1))
    area = bucket_heights * bucket_widths / volume.max()
    # Frames first, then the shape, then the largest that enlarges nothing: each step far below the one before.
    preferences = bucket_frames - distance / 100 + 1e-12 * np.where(enlarged <= 1, area, -area)
    fills = (bucket_frames <= frames) & (enlarged <= limit)
    values = np.where(fills, kept + COVERED * covers, 0.0)
    return _Choice(values, np.where(fills, preferences, -np.inf), np.array(weights, float))
