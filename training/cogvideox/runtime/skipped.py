"""Optimizer steps that changed no weight, as their gradients were not finite: told, counted, and too many end the run.

Not counted is an overflow that lowers fp16's loss scale while that is above 1: it belongs to finding the scale.
metrics.jsonl has all that counting needs, "skipped" and with fp16 "loss_scale", so a resumed run continues to count.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from cogvideox.errors import NonFiniteError
from cogvideox.optimizer.step import LOSS_SCALE
from cogvideox.runtime.checkpoint import way_back
from cogvideox.runtime.metrics import read_records
from cogvideox.runtime.run import METRICS_NAME, Run, Sample

MAX_IN_A_ROW = 8
MAX_SHARE, SHARE_FROM = 0.01, 500  # of all steps; the number of steps from which on it is looked at
SHOWN, SUSPECTS_SHOWN = 8, 3  # samples in a line


class SkippedSteps:
    """Counts the skipped steps of a run. ``add`` is called on all ranks, with each step whose numbers have arrived.

    Attributes:
        good_until: the step before a streak of skipped steps, as long as that streak lasts; else None.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        self.run = run
        self.good_until: int | None = None
        self.in_a_row = self.counted = self.told = 0
        self.seen: Counter[str] = Counter()  # in how many of the steps that were told each sample was
        for step, skipped, scale in run.from_main(arrived(run, first_step) if run.is_main else None):
            self._count(step, skipped, scale)

    def _count(self, step: int, skipped: bool, scale: float) -> None:
        if not skipped:
            self.in_a_row, self.good_until = 0, None
        elif scale <= 1:
            self.good_until = step - 1 if self.good_until is None else self.good_until
            self.in_a_row += 1
            self.counted += 1

    def add(self, step: int, numbers: dict[str, float], samples: list[Sample]) -> None:
        """Counts a step; ``numbers`` are those of StepResult, ``samples`` those that this rank had in it.

        Raises:
            NonFiniteError: too many steps were skipped.
        """
        skipped, scale = numbers["skipped"] > 0, numbers[LOSS_SCALE]
        self._count(step, skipped, scale)
        if skipped:
            self._tell(step, scale, self.run.ranks.gather(samples))
        if self.in_a_row >= MAX_IN_A_ROW:
            self._end(step, f"the last {self.in_a_row} optimizer steps, up to {step},")
        if self.told and step >= SHARE_FROM and self.counted > MAX_SHARE * step:
            self._end(step, f"{self.counted} of {step} optimizer steps, more than {MAX_SHARE:.0%},")

    def _tell(self, step: int, scale: float, samples: list[Sample]) -> None:
        """A line for the user about a step that was skipped, with the samples of all ranks."""
        if scale > 1:
            why = f"fp16 overflowed with a loss scale of {scale:g}, which is lowered; not counted"
        else:
            why = f"its gradients were not finite; {self.counted} skipped so far, {self.in_a_row} in a row"
            self.told += 1
            self.seen.update({sample for sample, _ in samples})
        shown = ", ".join(f"{sample} at timestep {timestep}" for sample, timestep in samples[:SHOWN])
        more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
        self.run.say(f"step {step} changed no weight: {why}; samples: {shown}{more}")

    def _end(self, step: int, which: str) -> None:
        until = step if self.good_until is None else self.good_until
        back = way_back(self.run.output_dir, until)
        why = "were skipped, as their gradients were not finite"
        precision = ", or start a new run with --mixed_precision bf16" if self.run.precision == "fp16" else ""
        raise NonFiniteError(f"{which} {why}; {self._suspects()}; {back}{precision}")

    def _suspects(self) -> str:
        """The samples that were in more than half of the steps that were told, unless all samples were."""
        often = [(sample, times) for sample, times in self.seen.most_common() if 2 * times > self.told]
        if not often or len(often) == len(self.seen) > 1:
            return "no sample stands out in them"
        shown = ", ".join(f"{sample} ({times} of {self.told})" for sample, times in often[:SUSPECTS_SHOWN])
        return f"in most of them was {shown}: look at it, or leave it out"

    def summary(self) -> str | None:
        """A line about all of the run, if any step was skipped."""
        if not self.counted:
            return None
        steps = "1 optimizer step" if self.counted == 1 else f"{self.counted} optimizer steps"
        return f"{steps} changed no weight in this run, as gradients were not finite; metrics.jsonl has them as skipped"


def arrived(run: Run, last: int) -> list[tuple[int, bool, float]]:
    """(step, whether it was skipped, loss scale) of all steps up to ``last`` that metrics.jsonl has.

    Older versions wrote no loss scale; with fp16 it was most likely above 1 where a step was skipped.
    """
    unknown = math.inf if run.precision == "fp16" else 1.0
    records: Iterable[dict[str, Any]] = read_records(run.output_dir / METRICS_NAME)
    steps = [record for record in records if "skipped" in record and record["step"] <= last]
    return [(r["step"], bool(r["skipped"]), r.get(LOSS_SCALE) or unknown) for r in steps]
