"""Keeps the checkpoint with the lowest held-out loss beyond the limit, and finds it for --export_best.

Held-out losses are compared only if they were measured on the current grid (see evaluation/held_out.py). The best
checkpoint is derived from the checkpoints that exist and from metrics.jsonl. The result is therefore the same after a
kill at any moment, in a resumed run, and in a run that returns to an earlier checkpoint. best.json names it for others.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from cogvideox.errors import UsageError
from cogvideox.files import write_atomically
from cogvideox.runtime.checkpoint import Saver
from cogvideox.runtime.checkpoint_files import CHECKPOINT_PREFIX, checkpoints, damage_of, step_of
from cogvideox.runtime.metrics import column, is_finite, of_grid, read_records
from cogvideox.runtime.resume import StartPoint
from cogvideox.runtime.run import METRICS_NAME

BEST_NAME = "best.json"


class BestEntry(TypedDict):
    """The content of best.json."""

    step: int
    checkpoint: str
    held_out_loss: float


def losses_on_grid(output_dir: Path, grid: str) -> dict[float, float]:
    """Returns, by step, the held-out losses of a run that were measured on a grid; infinity in place of NaN."""
    records = of_grid(read_records(output_dir / METRICS_NAME), grid)
    losses = ((record["step"], record["held_out_loss"]) for record in records)
    return {step: loss if is_finite(loss) else math.inf for step, loss in losses}


def not_comparable(output_dir: Path, grid: str) -> list[int]:
    """Returns the steps of the checkpoints whose held-out loss was measured on other grids only."""
    measured = dict(zip(*column(read_records(output_dir / METRICS_NAME), "held_out_loss"), strict=True))
    steps = measured.keys() - losses_on_grid(output_dir, grid).keys()
    return sorted(step for step in map(step_of, checkpoints(output_dir)) if step in steps)


def best_of(output_dir: Path, last: int, grid: str) -> BestEntry | None:
    """Returns the checkpoint with the lowest held-out loss, the earliest of equals, or None if none was measured.

    Args:
        output_dir: The output folder of the run.
        last: The step after which checkpoints are ignored.
        grid: The fingerprint of the grid on which the loss must have been measured.
    """
    measured = {step: loss for step, loss in losses_on_grid(output_dir, grid).items() if math.isfinite(loss)}
    steps = [step for step in map(step_of, checkpoints(output_dir)) if step <= last and step in measured]
    if not steps:
        return None
    best = min(steps, key=lambda step: (measured[step], step))
    return {"step": best, "checkpoint": f"{CHECKPOINT_PREFIX}{best}", "held_out_loss": float(measured[best])}


def not_better(measured: Mapping[float, float], last: int) -> int:
    """Returns how many of the newest measurements in a row were not better than the best one before them.

    Args:
        measured: Held-out losses by step, all on one grid.
        last: The step after which measurements are ignored.
    """
    steps = sorted(step for step in measured if step <= last)
    best = min(steps, key=lambda step: (measured[step], step), default=None)
    return len(steps) - 1 - steps.index(best) if best is not None else 0


def harm(measured: Mapping[float, float], step: int) -> str | None:
    """Returns, for a message, that training has raised the held-out loss up to a step, or None if it has not.

    Args:
        measured: Held-out losses by step, all on one grid.
        step: The step whose weights are the result.
    """
    before, after = measured.get(0), measured.get(step)
    if before is None or after is None or after <= before:
        return None
    fix = "give a lower --learning_rate or fewer steps"
    return f"the result has a held-out loss of {after:.5f}, more than the {before:.5f} before training; {fix}"


class BestCheckpoint:
    """Protects the best checkpoint from the limit of ``saver``, and writes best.json."""

    def __init__(self, saver: Saver, wanted: bool, grid: str) -> None:
        """Stores what to compare; ``start`` makes the first comparison.

        Args:
            saver: What writes the checkpoints of the run.
            wanted: Whether --keep_best is given; otherwise no checkpoint is protected.
            grid: The fingerprint of the grid on which the run measures held-out losses.
        """
        self.saver, self.wanted, self.grid = saver, wanted, grid
        self.folder, self.run = saver.run.output_dir, saver.run

    def start(self, step: int, exports: bool = False) -> None:
        """Updates at the start of a run, and prints which checkpoints have a loss that cannot be compared.

        Args:
            step: The number of steps that are done.
            exports: Whether the best checkpoint will be the result of the run.

        Raises:
            UsageError: The best checkpoint so far could not be the result, because it has only the weights.
        """
        if self.wanted and self.run.is_main and (others := not_comparable(self.folder, self.grid)):
            names = ", ".join(f"{CHECKPOINT_PREFIX}{other}" for other in others)
            self.run.say(f"--keep_best: {names}: measured on other held-out clips, so not compared with the current")
        self.update(step)
        best = self.run.from_main(self.saver.kept)
        if exports and best is not None and StartPoint(self.path(best)).weights_only:
            rule = "is the best checkpoint so far, and has only the weights"
            fix = f"leave the flag out, or export it with --resume_from_checkpoint {self.path(best).name}"
            raise UsageError(f"--export_best: {self.path(best)}: {rule}; {fix} --max_train_steps {best}")

    def update(self, step: int) -> None:
        """Finds the best checkpoint up to a step after a measurement, and removes what the limit no longer protects."""
        if not self.run.is_main:
            return
        path = self.folder / BEST_NAME
        best = best_of(self.folder, step, self.grid) if self.wanted else None
        self.saver.kept = best["step"] if best else None
        if best is None:
            path.unlink(missing_ok=True)  # It may be left from an earlier run in the folder, or a run with --keep_best.
        else:
            self._write(path, best)
        self.saver.trim(step)  # This is needed at the start too, because a kill may have come before it.

    def _write(self, path: Path, best: BestEntry) -> None:
        """Writes best.json and prints its content, unless the file has this content already."""
        content = json.dumps(best, indent=1).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
            self.run.say(f"best so far: {best['checkpoint']}, held-out loss {best['held_out_loss']:.5f}")

    def has_worsened(self, step: int, limit: int) -> bool:
        """Returns, on every rank, whether the held-out loss has not improved in ``limit`` measurements up to a step."""
        count = not_better(losses_on_grid(self.folder, self.grid), step) if self.run.is_main else 0
        return bool(self.run.from_main(count >= limit))

    def report_harm(self, step: int) -> None:
        """Prints that the held-out loss of the result, of a step, is higher than before training, if it is."""
        if self.run.is_main and (line := harm(losses_on_grid(self.folder, self.grid), step)):
            self.run.say(line)

    def step(self) -> int:
        """Returns the step of the best checkpoint, on every rank.

        Raises:
            UsageError: There is no best checkpoint, or it is damaged.
        """
        found, problem = None, None
        if self.run.is_main:
            found = self.saver.kept
            none_measured = "no checkpoint has a held-out loss of the current clips"
            problem = none_measured if found is None else damage_of(self.path(found))
        found, problem = self.run.from_main((found, problem))
        if problem:
            rule = "leave the flag out to export the last step"
            raise UsageError(f"--export_best: {self.folder}: {problem}; {rule}")
        assert found is not None
        return found

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of a step."""
        return self.folder / f"{CHECKPOINT_PREFIX}{step}"
