"""The checkpoint with the lowest held-out loss: kept beyond the limit, named in best.json, exported where wanted.

Only losses that were measured on the grid of the current run are compared (held_out.py). Which one it is follows from
the checkpoints that are there and from metrics.jsonl, so a kill at any moment, a resumed run and one that goes back to
an earlier checkpoint come to the same. best.json says it to others.
"""

import json
from pathlib import Path
from typing import Any

from cogvideox.errors import UsageError
from cogvideox.files import write_atomically
from cogvideox.runtime.checkpoint import PREFIX, Saver, checkpoints, fault, step_of
from cogvideox.runtime.metrics import column, of_grid, read_records
from cogvideox.runtime.run import METRICS_NAME

BEST_NAME = "best.json"


def losses_on(output_dir: Path, grid: str) -> dict[float, float]:
    """The held-out loss by step, as far as it was measured on this grid."""
    records = of_grid(read_records(output_dir / METRICS_NAME), grid)
    return dict(zip(*column(records, "held_out_loss"), strict=True))


def not_comparable(output_dir: Path, grid: str) -> list[int]:
    """The steps of the checkpoints that have a held-out loss, but none on this grid."""
    measured = dict(zip(*column(read_records(output_dir / METRICS_NAME), "held_out_loss"), strict=True))
    steps = measured.keys() - losses_on(output_dir, grid).keys()
    return sorted(step for step in map(step_of, checkpoints(output_dir)) if step in steps)


def best_of(output_dir: Path, last: int, grid: str) -> dict[str, Any] | None:
    """Of the checkpoints up to a step with a held-out loss on this grid, the lowest; the earlier one of two equals."""
    measured = losses_on(output_dir, grid)
    steps = [step for step in map(step_of, checkpoints(output_dir)) if step <= last and step in measured]
    if not steps:
        return None
    best = min(steps, key=lambda step: (measured[step], step))
    return {"step": best, "checkpoint": f"{PREFIX}{best}", "held_out_loss": float(measured[best])}


class Best:
    """Keeps the best checkpoint of ``saver``; ``wanted`` is --keep_best, ``grid`` what losses are measured on."""

    def __init__(self, saver: Saver, wanted: bool, grid: str) -> None:
        self.saver, self.wanted, self.grid = saver, wanted, grid
        self.folder, self.run = saver.run.output_dir, saver.run

    def start(self, step: int) -> None:
        """As ``update``, at the start, and says which checkpoints have a loss that cannot be compared."""
        if self.wanted and self.run.is_main and (others := not_comparable(self.folder, self.grid)):
            names = ", ".join(f"{PREFIX}{other}" for other in others)
            self.run.say(f"--keep_best: {names}: measured on other held-out clips, and so never the best from now on")
        self.update(step)

    def update(self, step: int) -> None:
        """Finds the best checkpoint up to a step, after measuring, and lets go of the one before."""
        if not self.run.is_main:
            return
        path = self.folder / BEST_NAME
        best = best_of(self.folder, step, self.grid) if self.wanted else None
        self.saver.kept = best["step"] if best else None
        if best is None:
            path.unlink(missing_ok=True)  # of a run that was begun anew, or that keeps none any more
        else:
            self._name(path, best)
        self.saver.trim(step)  # at the start too: a kill may have come before

    def _name(self, path: Path, best: dict[str, Any]) -> None:
        """Says which it is, if the file does not say so already."""
        content = json.dumps(best, indent=1).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
            self.run.say(f"best so far: {best['checkpoint']}, held-out loss {best['held_out_loss']:.5f}")

    def step(self) -> int:
        """The best checkpoint's step, on every rank.

        Raises:
            UsageError: there is none, or it is damaged.
        """
        found, problem = None, None
        if self.run.is_main:
            found = self.saver.kept
            problem = (
                "no checkpoint has a held-out loss of the current clips" if found is None else fault(self.path(found))
            )
        found, problem = self.run.from_main((found, problem))
        if problem:
            rule = "leave the flag out to export the last step"
            raise UsageError(f"--export_best: {self.folder}: {problem}; {rule}")
        return int(found)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"{PREFIX}{step}"
