"""Counts clips that cannot be read in training and are replaced by others; ends the run if there are too many."""

import sys
from collections.abc import Sequence

from tqdm import tqdm

from cogvideox.data.clips import max_bad
from cogvideox.errors import UsageError, first_of, plural
from cogvideox.runtime.ranks import Ranks


class BadClips:
    """Counts the clips that could not be read during training and were replaced by other clips.

    Each clip counts once, and is printed when it first fails. Too many of them end the run.

    Args:
        max_fraction: Largest fraction of the clips that may fail, from --max_bad_fraction.
        num_clips: Number of training clips.
    """

    def __init__(self, max_fraction: float, num_clips: int) -> None:
        self.max_fraction, self.num_clips = max_fraction, num_clips
        self.limit = max_bad(max_fraction, num_clips)
        self.reasons: dict[str, str] = {}
        self.checked = 0  # the largest sum over the ranks for which the clips of all ranks were compared

    def count(self, replaced: Sequence[tuple[str, str]]) -> int:
        """Adds replaced clips of this rank, and returns how many different clips have failed on it so far.

        Args:
            replaced: Pairs (id of the clip, reason why it cannot be read).

        Raises:
            UsageError: More clips have failed than --max_bad_fraction allows; the message lists them.
        """
        for clip, reason in replaced:
            if clip not in self.reasons:
                self.reasons[clip] = reason
                tqdm.write(f"{clip}: cannot be read, another clip replaces it; {reason}", file=sys.stderr)
        self._check(self.reasons)
        return len(self.reasons)

    def check_all(self, ranks: Ranks, total: int) -> None:
        """Checks how many different clips have failed on any rank. All ranks call this after each step.

        Args:
            ranks: The ranks of the run.
            total: The sum of the ranks' own counts, which every rank knows. One clip may have failed on several ranks.

        Raises:
            UsageError: They are more than --max_bad_fraction allows. Every rank raises it.
        """
        if total > max(self.limit, self.checked):
            self.checked = total
            self._check(dict(ranks.gather(list(self.reasons.items()))))

    def _check(self, reasons: dict[str, str]) -> None:
        if len(reasons) > self.limit:
            clips = plural(self.num_clips, "clip")
            rule = f"--max_bad_fraction {self.max_fraction:g}: {len(reasons)} of {clips} cannot be read"
            listed = first_of([f"{clip}: {reason}" for clip, reason in reasons.items()])
            raise UsageError([*listed, f"{rule}; fix them, or allow it with a larger fraction"])


def check_same_clips(ranks: Ranks, size: int, ids: tuple[str, ...]) -> None:
    """Checks that ranks which divide the tokens of a sample have read the same clips.

    Args:
        ranks: The ranks of the run.
        size: How many consecutive ranks divide a sample.
        ids: The clips that this rank has read.

    Raises:
        UsageError: A rank could not read a clip that another one has read. Every rank raises it.
    """
    everyone = ranks.gather([ids])
    for number, theirs in enumerate(everyone):
        first = number // size * size
        if theirs != everyone[first]:
            rule = f"process {number} has read {', '.join(theirs)} in place of {', '.join(everyone[first])}"
            raise UsageError(f"--max_bad_fraction: {rule}; check its disk, and start the run again, which resumes it")
