"""Measures training of full-size CogVideoX models with random weights on a GPU: seconds per step, memory, utilization.

    python benchmarks/bench.py --all                     # all rows without a result
    python benchmarks/bench.py --rows 5b-r128-fast       # some rows
    python benchmarks/bench.py --table                   # print the table; --table FILE writes it into a file

A row is a model, a rank (or sft: all weights), a batch size and a plan, which arms.PLAN_FLAGS translates into flags of
training. Rows that differ only in their plan share a process, in which the stock arm runs first, so that the numbers of
a ratio come from one run. The result of a row is a JSON file. Rows with a result are not run again, and a row that
fails does not prevent others from running.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import NO_MEMORY, Work, attempt, make_room, ours, stock
from bench_table import PREFIX, put_into, read_rows, speed_figures, table, useful_flops
from random_models import ROOT
from record import device_and_versions

from cogvideox.files import write_atomically


@dataclass(frozen=True)
class Process:
    """Describes rows that differ only in their plan, and the number of steps of each arm."""

    kind: str
    rank: int  # 0: all weights are trained
    batch: int
    plans: tuple[str, ...]
    steps: int = 8
    stock_steps: int = 6
    validates: bool = False  # the lean plan samples and decodes too

    @property
    def rows(self) -> dict[str, str]:
        """Returns the plan of each row, by the name of the row."""
        batch = f"-b{self.batch}" if self.batch > 1 else ""
        trained = f"r{self.rank}" if self.rank else "sft"
        return {f"{self.kind}-{trained}{batch}-{plan}": plan for plan in self.plans}


PROCESSES = (
    Process("2b", 128, 1, ("stock", "fast", "24gb", "lean"), validates=True),
    Process("5b", 128, 1, ("stock", "fast", "24gb", "12gb", "8gb", "lean", "lean-int8", "lean-nf4"), validates=True),
    Process("5b", 16, 1, ("stock", "lean"), stock_steps=4),
    Process("5b", 256, 1, ("stock", "lean"), stock_steps=4),
    Process("5b", 64, 4, ("stock", "lean"), steps=4, stock_steps=3),
    Process("1.5-5b", 128, 1, ("stock", "fast", "24gb", "lean"), steps=4, stock_steps=2),
    Process("2b", 0, 1, ("stock", "fast", "24gb", "lean"), stock_steps=4),
    Process("5b", 0, 1, ("stock", "lean", "24gb", "auto"), steps=5, stock_steps=4),
)
ROWS = {row: process for process in PROCESSES for row in process.rows}


def path_of(results: Path, row: str) -> Path:
    """Returns the path of a row's result."""
    return results / f"{PREFIX}{row}.json"


# -- one process -------------------------------------------------------------------------------------------------------


def stock_arm(work: Work, steps: int) -> dict[str, Any]:
    """Returns the figures of the stock arm, or its error. That it does not fit into memory is a result too."""
    make_room(work.device)
    return attempt(stock, work, steps)


def our_arm(work: Work, plan: str, process: Process) -> dict[str, Any]:
    """Returns our figures, or the error."""
    make_room(work.device)
    return attempt(ours, work, plan, process.steps, process.validates and plan == "lean")


def result_of(row: str, work: Work, arm: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of a row: the task, the versions, the figures of its arm, and those of the stock arm."""
    plan = ROWS[row].rows[row]
    result = {"row": row, "kind": work.kind, "rank": work.rank, "batch": work.batch, "plan": plan}
    result |= {"clip": str(work.bucket), "tokens": work.tokens, "precision": "bf16"}
    result |= device_and_versions() | {"command": f"python benchmarks/bench.py --row {row}"}
    layers, batch = work.config["num_layers"], work.batch
    result["useful_flops"] = useful_flops(work.tokens, work.width, layers, batch, trains_all=not work.rank)
    result |= arm
    if "failed" not in arm:
        result |= speed_figures(result) | {"ratio": None}
    if plan != "stock":
        result["stock"] = stock
        if "failed" not in stock:
            result["ratio"] = round(stock["seconds_per_step"] / arm["seconds_per_step"], 4)
    return result


def run_rows(rows: Sequence[str], results: Path, device: torch.device) -> int:
    """Runs the stock arm and then the rows of one process; returns how many rows failed."""
    process = ROWS[rows[0]]
    work = Work(process.kind, process.rank, process.batch, device)
    stock = stock_arm(work, process.stock_steps)
    failed = 0
    for row, plan in process.rows.items():
        if row not in rows:
            continue
        arm = stock if plan == "stock" else our_arm(work, plan, process)
        print(json.dumps({"row": row, **arm}), flush=True)
        is_result = plan == "stock" and arm.get("failed") == NO_MEMORY
        if not is_result and ("failed" in arm or "failed" in arm.get("validation", {})):
            failed += 1
            continue
        result = result_of(row, work, arm, stock)
        results.mkdir(parents=True, exist_ok=True)
        write_atomically(path_of(results, row), (json.dumps(result, indent=1) + "\n").encode())
    return failed


# -- all of them -------------------------------------------------------------------------------------------------------


def spawn(arguments: Sequence[str]) -> None:
    """Runs this script in a new process. Rows without a result have failed."""
    subprocess.run([sys.executable, __file__, *arguments], check=False)


def drive(rows: Sequence[str], results: Path, device: torch.device) -> int:
    """Runs the rows without a result, one process after another; returns how many rows failed."""
    failed: list[str] = []
    for process in PROCESSES:
        todo = [row for row in process.rows if row in rows and not path_of(results, row).is_file()]
        if todo:
            spawn(["--row", *todo, "--results", str(results), "--device", str(device)])
        failed += [row for row in todo if not path_of(results, row).is_file()]
    print(json.dumps({"failed": failed}), flush=True)
    return len(failed)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every row")
    which.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"some of {', '.join(ROWS)}")
    which.add_argument(
        "--row", nargs="+", choices=ROWS, metavar="ROW", help="run rows in this process, even if they have results"
    )
    which.add_argument("--table", nargs="?", const="", metavar="FILE", help="print the table, or write it into a file")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", default="cuda")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script, and returns the exit status."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    if flags.table is not None:
        rows = read_rows(flags.results)
        if flags.table:
            put_into(Path(flags.table), rows)
        else:
            print(table(rows), end="")
        return 0
    device = torch.device(flags.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {device}: there is no GPU; --device cpu takes hours")
    if flags.row:
        if len({ROWS[row] for row in flags.row}) > 1:
            parser.error("--row: these rows do not share a process; give --rows")
        return min(1, run_rows(flags.row, flags.results, device))
    return min(1, drive(flags.rows or list(ROWS), flags.results, device))


if __name__ == "__main__":
    sys.exit(main())
