"""Reads metrics.jsonl, which has one JSON object per line for each optimizer step or measurement of the held-out loss.

``read_records`` returns the lines, ``column`` one number of them by step. Held-out losses can only be compared where
they were measured on the same grid of clips, timesteps and noises; ``of_grid`` and ``by_grid`` separate them.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

GRID = "held_out_grid"  # the fingerprint of what the held-out loss is measured on; older versions wrote none
BY_TIMESTEP = "held_out_by_timestep"  # mean losses in equal parts of the schedule, the least noise first

Records = list[dict[str, Any]]


def read_records(metrics: Path) -> Records:
    """The lines that are whole and have a step."""
    records = []
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def of_grid(records: Records, grid: str | None) -> Records:
    """The records of held-out losses that were measured on a grid; those of two grids cannot be compared."""
    return [record for record in records if "held_out_loss" in record and grid_of(record) == grid]


def by_grid(records: Records) -> list[Records]:
    """The records of held-out losses, those of each grid by themselves; that of the newest record comes last."""
    newest_first = dict.fromkeys(grid_of(record) for record in reversed(records) if "held_out_loss" in record)
    return [of_grid(records, grid) for grid in reversed(newest_first)]


def grid_of(record: dict[str, Any]) -> str | None:
    """The fingerprint of a record's grid, if it has one."""
    grid = record.get(GRID)
    return grid if isinstance(grid, str) else None


def column(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have a finite number of that name."""
    pairs = [(record["step"], value) for record in records if is_finite(value := record.get(name))]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def is_finite(value: Any) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)
