"""Reads metrics.jsonl: a JSON object per line for each optimizer step, held-out loss, and set of validation videos.

``read_records`` returns the lines, and ``column`` extracts one number by step. Held-out losses can be compared only if
they were measured on the same grid of clips, timesteps and noises; ``of_grid`` and ``by_grid`` separate the grids.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox.files import write_atomically

GRID = "held_out_grid"  # fingerprint of the clips and noises of the held-out loss; older versions did not write it
MOTION = "validation_motion"  # every record with the numbers of validation videos has it
BY_TIMESTEP = "held_out_by_timestep"  # mean losses in equal parts of the noise schedule, least noise first

MetricRecords = list[dict[str, Any]]  # lines of metrics.jsonl


def read_records(metrics: Path) -> MetricRecords:
    """Returns the lines that are complete and have a step; none if the file does not exist."""
    records = []
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:  # A kill while the line was written leaves a part of it.
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def keep_records(metrics: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Removes the records that are not wanted from metrics.jsonl, and lines that are not complete."""
    if metrics.is_file():
        kept = filter(wanted, read_records(metrics))
        write_atomically(metrics, "".join(f"{json.dumps(record)}\n" for record in kept).encode())


def of_grid(records: MetricRecords, grid: str | None) -> MetricRecords:
    """Returns the records with a held-out loss that was measured on a grid."""
    return [record for record in records if "held_out_loss" in record and grid_of(record) == grid]


def by_grid(records: MetricRecords) -> list[MetricRecords]:
    """Returns the records with a held-out loss, grouped by grid. The grid of the newest record comes last."""
    newest_first = dict.fromkeys(grid_of(record) for record in reversed(records) if "held_out_loss" in record)
    return [of_grid(records, grid) for grid in reversed(newest_first)]


def grid_of(record: dict[str, Any]) -> str | None:
    """Returns the fingerprint of a record's grid, or None if it has none."""
    grid = record.get(GRID)
    return grid if isinstance(grid, str) else None


def column(records: MetricRecords, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values, as arrays of equal length, of the records that have a finite number of that name."""
    pairs = [(record["step"], value) for record in records if is_finite(value := record.get(name))]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def is_finite(value: object) -> bool:
    """Returns whether the value is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)
