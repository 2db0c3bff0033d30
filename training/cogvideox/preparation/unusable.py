"""Checks how many clips of a data set cannot be used, against --max_bad_fraction, and lists files that are skipped.

``check_bad`` raises ``UnusableClips`` if there are too many. It carries the records, for the table of causes.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence

from cogvideox.data.clips import max_bad
from cogvideox.data.forms.unused import Unused
from cogvideox.data.records import ClipRecord
from cogvideox.errors import UsageError, one_line, plural
from cogvideox.preparation.captions import indented


class UnusableClips(UsageError):
    """Reports that too many clips cannot be used.

    Attributes:
        records: The record of every sample, for the table of causes.
    """

    def __init__(self, problem: str, records: Sequence[ClipRecord]) -> None:
        super().__init__(problem)
        self.records = records


def check_bad(records: Sequence[ClipRecord], max_bad_fraction: float) -> None:
    """Checks the number of bad clips.

    Raises:
        UnusableClips: More clips are bad than ``max_bad_fraction`` allows.
    """
    if count := too_many_bad(records, max_bad_fraction):
        rule = f"--max_bad_fraction {max_bad_fraction:g}: {count} of {plural(len(records), 'clip')} cannot be used"
        fix = f"fix or remove them, see the table (ledger.jsonl has all), or continue without: {allowing(records)}"
        raise UnusableClips(f"{rule}; {fix}", records)


def too_many_bad(records: Sequence[ClipRecord], max_bad_fraction: float) -> int:
    """Returns how many clips cannot be used, or 0 if that many are allowed."""
    bad = sum(not record.usable for record in records)
    return bad if bad > max_bad(max_bad_fraction, len(records)) else 0


def allowing(records: Sequence[ClipRecord]) -> str:
    """Returns the flag that allows as many bad clips as there are."""
    bad = sum(not record.usable for record in records)
    return f"--max_bad_fraction {math.ceil(bad / len(records) * 1000) / 1000:g}"


def unused_notes(unused: Unused) -> list[str]:
    """Returns lines about files that are not used, although somebody may have meant them to be."""
    lines = skipped_notes(unused.unsupported)
    for file, texts in unused.captions.items():
        say = plural(len(texts), "text file next to a clip says", "text files next to clips say")
        rule = f"{say} something else than {one_line(file)}, which is read instead"
        lines += [f"{rule}; copy what is new into it, or remove the text files:", *indented(texts)]
    for file, clips in unused.clips.items():
        are = plural(len(clips), "clip with a caption next to it is", "clips with a caption next to them are")
        lines += [f"{are} not in {one_line(file)}, and thus not used; add a row or line for each:", *indented(clips)]
    if unused.tables:
        are = plural(len(unused.tables), "table is", "tables are")
        rule = f"{are} not read, because captions are next to the clips"
        lines += [f"{rule}; to use one, name it with --dataset_file:", *indented(unused.tables)]
    return lines


def skipped_notes(skipped: Sequence[str]) -> list[str]:
    """Returns lines about files that may be clips, captions or tables but have an unsupported format."""
    if not skipped:
        return []
    suffixes = Counter(os.path.splitext(path)[1].lower() for path in skipped).most_common()
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes)
    fix = "convert clips to mp4, and save captions as .txt and tables as CSV"
    return [f"files skipped because their format is not supported: {kinds}; {fix}:", *indented(skipped)]
