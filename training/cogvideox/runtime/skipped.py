"""Reports and counts optimizer steps that changed no weight, and ends the run if there are too many.

A step is skipped if one of its gradients is not finite. A step of fp16 that lowers a loss scale above 1 is reported but
not counted, because such overflows belong to the search for the scale. A resumed run continues to count, because
metrics.jsonl has all that counting needs: "skipped" and, with fp16, "loss_scale".
"""

import math
from collections import Counter

from cogvideox.errors import NonFiniteError, plural
from cogvideox.optimizer.step import LOSS_SCALE
from cogvideox.runtime.checkpoint_files import resume_hint
from cogvideox.runtime.metrics import read_records
from cogvideox.runtime.run import METRICS_NAME, Run, TrainedSample

MAX_IN_A_ROW = 8
MAX_SKIPPED_SHARE = 0.01  # of all steps
SHARE_FROM = 500  # the number of steps from which on MAX_SKIPPED_SHARE applies
SAMPLES_SHOWN, SUSPECTS_SHOWN = 8, 3  # samples in a line


class SkippedSteps:
    """Counts the skipped steps of a run. All ranks call ``add`` for each step whose numbers have arrived.

    Attributes:
        good_until: The step before the current streak of skipped steps; None if the last step was not skipped.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        """Counts the skipped steps that metrics.jsonl has.

        Args:
            run: The run.
            first_step: The number of steps that are done.
        """
        self.run = run
        self.good_until: int | None = None
        self.in_a_row = self.counted = self.reported = 0
        self.seen: Counter[str] = Counter()  # for each sample, the number of reported and counted steps that had it
        for step, skipped, scale in run.from_main(earlier_steps(run, first_step) if run.is_main else []):
            self._count(step, skipped, scale)

    def _count(self, step: int, skipped: bool, scale: float) -> None:
        if not skipped:
            self.in_a_row, self.good_until = 0, None
        elif scale <= 1:
            self.good_until = step - 1 if self.good_until is None else self.good_until
            self.in_a_row += 1
            self.counted += 1

    def add(self, step: int, numbers: dict[str, float], samples: list[TrainedSample]) -> None:
        """Counts a step, and prints a line if it was skipped.

        Args:
            step: The number of the step.
            numbers: The values of its StepResult by name.
            samples: The samples of this rank in the step.

        Raises:
            NonFiniteError: Too many steps were skipped.
        """
        skipped, scale = numbers["skipped"] > 0, numbers[LOSS_SCALE]
        self._count(step, skipped, scale)
        if skipped:
            self._report(step, scale, self.run.ranks.gather(samples))
        if self.in_a_row >= MAX_IN_A_ROW:
            self._end(step, f"the last {self.in_a_row} optimizer steps, up to {step},")
        if self.reported and step >= SHARE_FROM and self.counted > MAX_SKIPPED_SHARE * step:
            self._end(step, f"{self.counted} of {step} optimizer steps, more than {MAX_SKIPPED_SHARE:.0%},")

    def _report(self, step: int, scale: float, samples: list[TrainedSample]) -> None:
        """Prints why a step was skipped, with the samples of all ranks."""
        if scale > 1:
            why = f"fp16 overflowed with a loss scale of {scale:g}, which is lowered; not counted"
        else:
            why = f"its gradients were not finite; {self.counted} skipped so far, {self.in_a_row} in a row"
            self.reported += 1
            self.seen.update({sample for sample, _ in samples})
        shown = ", ".join(f"{sample} at timestep {timestep}" for sample, timestep in samples[:SAMPLES_SHOWN])
        more = f" and {len(samples) - SAMPLES_SHOWN} more" if len(samples) > SAMPLES_SHOWN else ""
        self.run.say(f"step {step} changed no weight: {why}; samples: {shown}{more}")

    def _end(self, step: int, which: str) -> None:
        hint = resume_hint(self.run.output_dir, step if self.good_until is None else self.good_until)
        why = "were skipped because their gradients were not finite"
        precision = ", or start a new run with --mixed_precision bf16" if self.run.precision == "fp16" else ""
        raise NonFiniteError(f"{which} {why}; {self._suspects()}; {hint}{precision}")

    def _suspects(self) -> str:
        """Returns, for a message, the samples that more than half of the skipped steps had, unless all samples were."""
        often = [(sample, times) for sample, times in self.seen.most_common() if 2 * times > self.reported]
        if not often or len(often) == len(self.seen) > 1:
            return "no sample occurs in most of them"
        shown = ", ".join(f"{sample} ({times} of {self.reported})" for sample, times in often[:SUSPECTS_SHOWN])
        return f"most of them had {shown}: check it, or leave it out"

    def summary(self) -> str | None:
        """Returns a line with the number of skipped steps of the run, or None if no step was skipped."""
        if not self.counted:
            return None
        steps = plural(self.counted, "optimizer step")
        why = "because gradients were not finite"
        return f'{steps} changed no weight in this run, {why}; metrics.jsonl marks each as "skipped"'


def earlier_steps(run: Run, last: int) -> list[tuple[int, bool, float]]:
    """Reads the steps up to ``last`` from metrics.jsonl.

    Older versions wrote no loss scale. With fp16 it was most likely above 1 where a step was skipped, so such steps are
    not counted.

    Returns:
        For each step its number, whether it was skipped, and its loss scale.
    """
    unknown = math.inf if run.precision == "fp16" else 1.0
    records = read_records(run.output_dir / METRICS_NAME)
    steps = [record for record in records if "skipped" in record and record["step"] <= last]
    return [(r["step"], bool(r["skipped"]), r.get(LOSS_SCALE) or unknown) for r in steps]
