"""Proposes buckets that suit the clips of a data set and the rules of a model, as values of --train_resolution.

A clip is described by (frames that it can give, height, width). Candidates are buckets with a frame count and a size
that the model accepts and that some clip can fill. ``propose`` chooses a few candidates so that the clips have the
largest total value. A clip in a bucket has this value:

    share of the pixels of the largest candidate that are pixels of the clip    between 0 and 1
    + COVERED, if the bucket covers the clip

Pixels that are made by enlarging, or lost by stretching or cutting, do not count. A bucket covers a clip if at most a
third of the clip is cut off or stretched away, and if a video does not become a single frame. COVERED is several times
the largest share, so the number of covered clips matters most. But covering one more clip is not worth it if many other
clips lose most of their pixels, so a few very short or small clips do not make the buckets of a large data set short
and small. No file is opened and no weights are read here.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cogvideox.config.buckets import Bucket, choose_buckets
from cogvideox.config.geometry import Geometry

USUAL = 4  # number of buckets to propose if the user does not give one
WORTH = 0.02  # value per clip that another bucket must add to be proposed
MOST_PIXELS = 768 * 1360  # largest frame: CogVideoX 1.5 was trained at this size; some configs allow much larger ones
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16)  # proposed ratios of width to height
SHARES = (1.0, 0.5, 0.25, 0.125)  # proposed sizes, as shares of the pixels of the model's own size
ASPECT_ERROR = 0.02  # largest difference between the logarithms of a size's aspect ratio and the proposed ratio
COVERED = 4.0  # value of covering a clip; keeping as many pixels as the largest candidate has is worth 1
MOST_CUT = 1.5  # largest factor between the aspect ratios of a clip and of a bucket that covers it
MOST_KINDS = 2_000  # number of combinations of length and size that are considered, the most frequent ones
SMALLER = 0.85  # a size may have this share of the largest possible pixels if it is closer to the proposed ratio

Clip = tuple[int, int, int]  # frames that the clip can give at the requested rate; height and width in pixels


@dataclass(frozen=True)
class Proposal:
    """Contains proposed buckets, and how many of the clips they suit.

    Attributes:
        buckets: The proposed buckets, the longest first.
        fitting: Number of clips that fill one of the buckets.
        num_clips: Number of all clips.
    """

    buckets: tuple[Bucket, ...]
    fitting: int
    num_clips: int

    @property
    def flags(self) -> str:
        """The flag with the buckets, which replaces all other flags for buckets in a command."""
        return f"--train_resolution {' '.join(map(str, self.buckets))}"


def propose(
    clips: Iterable[Clip], geometry: Geometry, max_upscale: float, most_frames: int, number: int = USUAL
) -> Proposal:
    """Proposes the buckets in which the clips have the largest total value.

    Args:
        clips: The clips; a clip that can give only one frame counts as a picture.
        geometry: The model's rules for frame counts and sizes.
        max_upscale: Largest factor by which a clip may be enlarged.
        most_frames: Largest number of frames of a bucket.
        number: Largest number of buckets. Fewer are proposed if another one adds too little.

    Returns:
        The proposal; it has no buckets if no clip fills any.
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
    """Returns the frame counts up to ``most`` that are proposed.

    Inference makes exactly as many frames for each of them, except perhaps for the shortest count above 1.
    """
    step = geometry.temporal_compression
    exact = [count for count in range(1, most + 1, step) if geometry.problem("frames", count) is None]
    return [count for count in exact if count == step + 1 or geometry.inference_frames(count) == count]


def legal_sizes(geometry: Geometry) -> list[tuple[int, int]]:
    """Returns the (height, width) of the model's own size, and of each proposed aspect ratio at several sizes."""
    own = geometry.own_bucket
    if geometry.learned_positions:  # they exist for this size only
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
    """Yields the multiples next to the exact width for an aspect ratio that meet the ratio closely enough."""
    below = int(height * aspect / multiple) * multiple
    yield from (
        width for width in (below, below + multiple) if width and _error((height, width), aspect) <= ASPECT_ERROR
    )


def _error(size: tuple[int, int], aspect: float) -> float:
    """Returns the difference between the logarithms of a size's aspect ratio and of the given one."""
    return abs(math.log(size[1] / size[0] / aspect))


def _best_size(sizes: Sequence[tuple[int, int]], aspect: float, pixels: float) -> list[tuple[int, int]]:
    """Returns the best size with at most ``pixels`` pixels in a list; an empty list if there is none.

    It is the largest one, or a slightly smaller one that is closer to the aspect ratio.
    """
    fitting = [(height, width) for height, width in sizes if height * width <= pixels]
    most = max((height * width for height, width in fitting), default=0)
    large = [(height, width) for height, width in fitting if height * width >= SMALLER * most]
    return sorted(large, key=lambda size: (round(_error(size, aspect), 9), -size[0] * size[1]))[:1]


def _wanted_frames(kinds: Sequence[Clip], geometry: Geometry, most_frames: int) -> list[int]:
    """Returns the frame counts that are the longest possible for some clip; one frame only if there are pictures."""
    counts = legal_frames(geometry, most_frames)
    if geometry.learned_positions:
        counts = [count for count in counts if count == geometry.sample_frames]
    longest = {max((count for count in counts if count <= frames), default=0) for frames, _, _ in kinds}
    pictures = any(frames == 1 for frames, _, _ in kinds)
    return sorted(count for count in longest if count > 1 or (count == 1 and pictures))


@dataclass(frozen=True)
class _Choice:
    """Chooses among candidates. Clips with the same length and size form a kind.

    A clip goes to the chosen bucket that ``choose_buckets`` prefers for it, even if another one has a larger value.

    Attributes:
        values: Value of a clip of each kind in each candidate, (candidates, kinds).
        preferences: How much a kind prefers each candidate, (candidates, kinds); minus infinity if the clip does not
            fill the bucket.
        weights: Number of clips of each kind, (kinds,).
    """

    values: np.ndarray
    preferences: np.ndarray
    weights: np.ndarray

    def best(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the value and the preference of each kind in the candidate of ``rows`` that it prefers."""
        values, preferences = np.zeros(len(self.weights)), np.full(len(self.weights), -np.inf)
        for row in rows:
            wins = self.preferences[row] > preferences
            values = np.where(wins, self.values[row], values)
            preferences = np.where(wins, self.preferences[row], preferences)
        return values, preferences

    def worth(self, rows: Sequence[int]) -> float:
        """Returns the total value of all clips if the candidates of ``rows`` are the buckets."""
        return float(self.best(rows)[0] @ self.weights)

    def best_addition(self, rows: Sequence[int], among: slice = slice(None)) -> tuple[int, float]:
        """Returns the candidate of ``among`` that increases the total value most, and the total value with it."""
        values, preferences = self.best(rows)
        worth = np.where(self.preferences[among] > preferences, self.values[among], values) @ self.weights
        return int(worth.argmax()) + (among.start or 0), float(worth.max())

    def choose(self, number: int, sizes: int) -> list[int]:
        """Returns the candidates with the largest total value that the search finds.

        The search adds one candidate after the other and then exchanges them. A single long bucket takes all long
        clips, whatever their shape, so it often pays only together with others of its length. Therefore the search is
        repeated from each frame count: it first chooses among buckets of that count, then among all.

        Args:
            number: Largest number of candidates to return.
            sizes: Number of candidates of each frame count, which follow each other.
        """
        starts = (self.added([], number, slice(first, first + sizes)) for first in range(0, len(self.values), sizes))
        return max((self._exchanged(self.added(start, number)) for start in starts), key=self.worth)

    def added(self, rows: list[int], number: int, among: slice = slice(None)) -> list[int]:
        """Returns the rows with the best additions, up to ``number``, as long as each adds enough value."""
        rows, least = list(rows), 0.0
        while len(rows) < number:
            row, worth = self.best_addition(rows, among)
            if worth <= self.worth(rows) + least:
                break
            rows.append(row)
            least = WORTH * float(self.weights.sum())
        return rows

    def _exchanged(self, chosen: list[int]) -> list[int]:
        """Returns the chosen rows after replacing one at a time, as long as that increases the total value."""
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
    """Computes the value of each kind of clip in each candidate, as the module's docstring defines it.

    Args:
        candidates: Buckets to choose from.
        kinds: Length and size of each kind of clip.
        weights: Number of clips of each kind.
        limit: Largest factor by which a clip may be enlarged to fill a bucket.
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
    # A clip prefers the bucket with most frames, then the closest shape, then the largest one that enlarges nothing.
    # The factors keep each criterion smaller than any difference in the one before.
    preferences = bucket_frames - distance / 100 + 1e-12 * np.where(enlarged <= 1, area, -area)
    fills = (bucket_frames <= frames) & (enlarged <= limit)
    values = np.where(fills, kept + COVERED * covers, 0.0)
    return _Choice(values, np.where(fills, preferences, -np.inf), np.array(weights, float))
