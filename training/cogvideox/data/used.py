"""Says what each clip contributes to the buckets of a data set, for the report of a preparation and its page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cogvideox.config.buckets import Bucket
from cogvideox.config.geometry import Geometry
from cogvideox.data.media.transforms import resize_factor, stretch
from cogvideox.data.records import ClipRecord, Source, Variant

BUCKET_COLUMNS = ("bucket", "clips", "variants", "enlarged", "stretched by", "cut off", "MiB")

Records = Sequence[ClipRecord]


@dataclass(frozen=True)
class Used:
    """Describes what one clip contributes to one bucket.

    Attributes:
        place: Index of the clip among the samples.
        variant: The clip's first variant.
        num_variants: Number of variants of the clip in this bucket.
        tensors: Names of the clip's tensors; equal names mean the same tensor.
        source: Size, rate and codec of the clip's file.
    """

    place: int
    variant: Variant
    num_variants: int
    tensors: frozenset[str]
    source: Source

    @property
    def repeats_frames(self) -> bool:
        """Whether a source frame is used more than once."""
        return len(set(self.variant.indices)) < len(self.variant.indices)


def by_bucket(records: Records) -> dict[Bucket, list[Used]]:
    """Returns the usable clips by bucket, in the order of the buckets."""
    found: dict[Bucket, list[Used]] = {}
    for place, record in enumerate(records):
        for cut in record.cuts:
            tensors = frozenset(f"{record.content} {variant}" for variant in cut.variants)
            used = Used(place, cut.variants[0], len(cut.variants), tensors, record.probed)
            found.setdefault(cut.bucket, []).append(used)
    return dict(sorted(found.items()))


def bucket_rows(
    used: dict[Bucket, list[Used]], geometry: Geometry, number_bytes: int, image_variants: int
) -> list[tuple[str, ...]]:
    """Returns a row for each bucket: its clips, how they are resized, and the size of their tensors in MiB."""
    rows = []
    for bucket, clips in used.items():
        tensors = set().union(*(clip.tensors for clip in clips))  # copies and repeats share theirs
        numbers = math.prod(geometry.moments_shape(bucket)) + image_variants * math.prod(geometry.image_shape(bucket))
        size = len(tensors) * numbers * number_bytes / 2**20
        rows.append((str(bucket), *bucket_cells(clips), f"{size:.1f}"))
    return rows


def bucket_cells(clips: list[Used]) -> tuple[str, ...]:
    """Returns the cells of a bucket's row: clips, variants, clips enlarged, largest stretch, largest part cut off."""
    fits = [(clip.variant.fit, clip.source.height, clip.source.width) for clip in clips]
    upscaled = sum(resize_factor(*fit) > 1.0 for fit in fits)
    stretched = max(stretch(*fit) for fit in fits) - 1
    lost = max(1 - fit.height * fit.width / (fit.resize_height * fit.resize_width) for fit, _, _ in fits)
    counts = (len(clips), sum(clip.num_variants for clip in clips), upscaled)
    return (*map(str, counts), f"{stretched:.0%}", f"{lost:.0%}")
