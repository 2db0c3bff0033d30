"""Explains why clips cannot be used: groups ledger records by cause, with examples and a flag that helps.

``cause_lines`` returns the text. Records have one cause if their status and reason agree except for numbers. Proposed
flags are legal for the model, and were tried on the clips to count how many could be used with them.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cogvideox.config.buckets import Bucket, choose_buckets, upscale
from cogvideox.config.flags import DataFlags
from cogvideox.config.geometry import Geometry
from cogvideox.data.clips import bad_line
from cogvideox.data.forms.columns import EXAMPLES
from cogvideox.data.recipe import list_buckets
from cogvideox.data.records import FAILED, KILLED, SHORT, SMALL, UNREADABLE, ClipRecord
from cogvideox.data.used import Records
from cogvideox.errors import plural
from cogvideox.preparation.proposals import Clip, Proposal, legal_frames, propose

WORDS = {
    FAILED: "cannot be read or trained on",
    SHORT: "too short",
    SMALL: "too small",
    UNREADABLE: "refused by the file system",
    KILLED: "given up because decoding took too long or too much memory",
}
NO_CLIP: Clip = (0, 1, 1)


@dataclass(frozen=True)
class Cause:
    """Groups the records of clips that cannot be used for the same reason."""

    status: str
    records: Records

    def lines(self, data: DataFlags, geometry: Geometry) -> Iterator[str]:
        """Yields some of the clips with the reason, how many more there are, and what helps."""
        examples = list(dict.fromkeys(bad_line(record.path, record.reason) for record in self.records))
        yield from examples[:EXAMPLES]
        if len(examples) > EXAMPLES:
            yield f"... and {len(examples) - EXAMPLES} more for the same reason"
        if (fix := self.fix(data, geometry)) is not None:
            yield fix

    def fix(self, data: DataFlags, geometry: Geometry) -> str | None:
        """Returns a flag with which some clips could be used; None if no flag helps or the reason says what does."""
        clips = [clip_of(record) for record in self.records]
        if self.status == SHORT:
            return shorter_buckets(clips, data, geometry)
        return more_upscaling(clips, data) if self.status == SMALL else None


def causes_by_status(records: Records) -> dict[str, list[Cause]]:
    """Returns, by status, the causes why clips cannot be used, the most frequent first."""
    found: dict[tuple[str, str], list[ClipRecord]] = {}
    for record in records:
        if not record.usable:
            reason = record.reason.replace(record.path, "")
            found.setdefault((record.status, re.sub(r"\d+(\.\d+)?", "0", reason)), []).append(record)
    causes: dict[str, list[Cause]] = {}
    for (status, _), grouped in sorted(found.items(), key=lambda item: -len(item[1])):
        causes.setdefault(status, []).append(Cause(status, grouped))
    return causes


def cause_lines(records: Records, data: DataFlags, geometry: Geometry) -> Iterator[str]:
    """Yields the lines that say why clips cannot be used: each kind with its number, its causes indented under it."""
    for status, causes in causes_by_status(records).items():
        yield f"{sum(len(cause.records) for cause in causes)} {WORDS[status]}:"
        yield from (f"  {line}" for cause in causes for line in cause.lines(data, geometry))


def clip_of(record: ClipRecord) -> Clip:
    """Returns (frames at the sampled rate, height, width) of a clip; it has no frames if it could not be read."""
    source = record.source
    return (record.available or 0, source.height, source.width) if source else NO_CLIP


def shorter_buckets(clips: Sequence[Clip], data: DataFlags, geometry: Geometry) -> str | None:
    """Proposes the current flags with one more frame count: the longest of those that most of the clips fill."""
    shortest = min(bucket.frames for bucket in list_buckets(data))
    counts = [] if geometry.learned_positions else legal_frames(geometry, shortest - 1)
    pictures = all(frames == 1 for frames, _, _ in clips)
    counts = [count for count in counts if count > 1 or pictures]
    sizes = list(dict.fromkeys((bucket.height, bucket.width) for bucket in list_buckets(data)))
    number, count = max(
        ((usable([Bucket(c, *s) for s in sizes], clips, data.max_upscale), c) for c in counts), default=(0, 0)
    )
    if not number:
        return None
    return f"to use {number_of(number, clips)}: {with_frames(count, sizes, data)}"


def with_frames(count: int, sizes: Sequence[tuple[int, int]], data: DataFlags) -> str:
    """Returns the current bucket flags with one more frame count."""
    if data.train_resolution:
        more = (str(Bucket(count, *size)) for size in sizes)
        return f"--train_resolution {' '.join([*data.train_resolution, *more])}"
    return f"--frame_buckets {' '.join(map(str, [*data.frame_buckets, count]))}"


def more_upscaling(clips: Sequence[Clip], data: DataFlags) -> str:
    """Proposes the --max_upscale with which all of the clips could be used."""
    buckets = list_buckets(data)
    least = max(
        min(upscale(bucket, height, width) for bucket in buckets if bucket.frames <= frames)
        for frames, height, width in clips
    )
    return (
        f"to use {number_of(len(clips), clips)}: --max_upscale {math.ceil(least * 100) / 100:g} (they become blurred)"
    )


def usable(buckets: Sequence[Bucket], clips: Sequence[Clip], max_upscale: float) -> int:
    """Returns how many of the clips fill a bucket."""
    return sum(bool(choose_buckets(buckets, *clip, max_upscale)) for clip in clips)


def number_of(number: int, clips: Sequence[Clip]) -> str:
    """Returns "N of them", "them" or "it"."""
    if number < len(clips):
        return f"{number} of them"
    return "it" if number == 1 else "them"


def proposal_of(records: Records, data: DataFlags, geometry: Geometry, number: int) -> Proposal:
    """Proposes buckets for the clips of a data set, no longer than the flags or the model's own frame count allow."""
    most = data.max_num_frames or geometry.sample_frames
    if data.train_resolution:  # of which --max_num_frames is the longest, unless it was given
        most = max(most, geometry.sample_frames)
    return propose((clip_of(record) for record in records), geometry, data.max_upscale, most, number)


def proposal_line(proposal: Proposal, data: DataFlags) -> str:
    """Returns a line with the number of clips that fit the proposed buckets, and the flags to get them."""
    instead = "" if data.train_resolution else " (in place of other flags for buckets)"
    fit = plural(proposal.num_clips, "clip fits", "clips fit")
    return f"{proposal.fitting} of {fit} {flags_of(proposal, data)}{instead}"


def flags_of(proposal: Proposal, data: DataFlags) -> str:
    """Returns the flags of a proposal for a command, with --max_num_frames if its value is too small."""
    longest = max(bucket.frames for bucket in proposal.buckets)
    most = f" --max_num_frames {longest}" if longest > (data.max_num_frames or longest) else ""
    return proposal.flags + most
