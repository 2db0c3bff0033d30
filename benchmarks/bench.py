"""Measures training of full-size CogVideoX models with random weights on a GPU: seconds per step, memory, utilization.

    python benchmarks/bench.py --all                     # all rows without a result
    python benchmarks/bench.py --rows 5b-r128-fast       # some rows; --seconds 500 stops in time
    python benchmarks/bench.py --rows 5b-sft-auto --trace  # also trace a step
    python benchmarks/bench.py --copy_rate 12            # rows whose copies are as slow as those of a desktop
    python benchmarks/bench.py --table                   # print the table; --table FILE writes it into a file
    python benchmarks/bench.py --traces                  # print the table of the traced steps

A row is a model, a rank (or sft: all weights), a batch size and a plan, which arms.PLAN_FLAGS translates into flags of
training. Rows that differ only in their plan share a process, in which the stock arm runs first, so that the numbers of
a ratio come from one run. The result of a row is a JSON file. Rows with a result are not run again, and a row that
fails does not prevent others from running.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import NO_MEMORY, PLAN_FLAGS, Work, attempt, make_room, ours, stock
from bench_table import OFFLOAD, PREFIX, STOCK, read_rows, speed_figures, table, trace_table, useful_flops
from random_models import ROOT
from record import device_and_versions, put_into, write_result
from slow_copies import slowed

COPY_RATES = (12, 25)  # GB/s in one direction, of a PCIe connection of version 3 and 4 with 16 lanes
ROW_SECONDS = {"2b": 45, "5b": 90, "1.5-5b": 120}  # what a row takes, by its model


@dataclass(frozen=True)
class Process:
    """Describes rows that differ only in their plan, and the number of steps of each arm."""

    kind: str
    rank: int  # 0: all weights are trained
    batch: int
    plans: tuple[str, ...]
    steps: int = 8
    stock_steps: int = 6  # 0: there is no stock arm
    validates: bool = False  # the lean plan samples and decodes too
    precision: str = "bf16"
    copy_rate: int | None = None  # GB/s to which copies between host and device are slowed

    @property
    def rows(self) -> dict[str, str]:
        """Returns the plan of each row, by the name of the row."""
        batch = f"-b{self.batch}" if self.batch > 1 else ""
        trained = f"r{self.rank}" if self.rank else "sft"
        end = f"-{self.precision}" if self.precision != "bf16" else ""
        end += f"-copies{self.copy_rate}" if self.copy_rate else ""
        return {f"{self.kind}-{trained}{batch}-{plan}{end}": plan for plan in self.plans}


EIGHT_BIT = ("24gb-8bit", "lean-8bit", "auto-8bit")
EIGHT_BIT_5B = ("80gb-8bit", "80gb-device-8bit", *EIGHT_BIT)
PROCESSES = (
    Process("2b", 128, 1, ("stock", "fast", "24gb", "lean"), validates=True),
    Process("5b", 128, 1, ("stock", "fast", "24gb", "12gb", "8gb", "lean", "lean-int8", "lean-nf4"), validates=True),
    Process("5b", 16, 1, ("stock", "lean"), stock_steps=4),
    Process("5b", 256, 1, ("stock", "lean"), stock_steps=4),
    Process("5b", 64, 4, ("stock", "lean"), steps=4, stock_steps=3),
    Process("1.5-5b", 128, 1, ("stock", "fast", "24gb", "lean"), steps=4, stock_steps=2),
    Process("2b", 0, 1, ("stock", "fast", "24gb", "lean", *EIGHT_BIT), stock_steps=4),
    Process("5b", 0, 1, (*STOCK, "lean", "24gb", "auto", "80gb", *EIGHT_BIT_5B), steps=5, stock_steps=4),
    Process("1.5-5b", 0, 1, ("24gb", "24gb-8bit"), steps=3, stock_steps=0),
    Process("2b", 128, 1, ("stock", "fast", "24gb", "lean"), precision="fp16"),
    Process("2b", 0, 1, ("stock", "fast", "24gb", "lean"), stock_steps=4, precision="fp16"),
    Process("5b", 128, 1, ("lean",), stock_steps=0, precision="fp16"),
    *(
        Process(kind, rank, 1, ("24gb", "lean", *more), steps=5, stock_steps=0, copy_rate=rate)
        for rate in COPY_RATES
        for rank, more in ((0, ("24gb-8bit", "lean-8bit")), (128, ()))
        for kind in ("5b", "2b")
    ),
)
ROWS = {row: process for process in PROCESSES for row in process.rows}
SLOWED = {rate: [row for row, process in ROWS.items() if process.copy_rate == rate] for rate in COPY_RATES}


def path_of(results: Path, row: str) -> Path:
    """Returns the path of a row's result."""
    return results / f"{PREFIX}{row}.json"


def is_done(results: Path, row: str, traces: bool) -> bool:
    """Returns whether a row has a result, and a trace in it if traces are wanted."""
    path = path_of(results, row)
    return path.is_file() and (not traces or ROWS[row].rows[row] in STOCK or "trace" in json.loads(path.read_text()))


# -- one process -------------------------------------------------------------------------------------------------------


def stock_arm(work: Work, steps: int, offloads: bool = False) -> dict[str, Any]:
    """Returns the figures of a stock arm, or its error. That it does not fit into memory is a result too."""
    make_room(work.device)
    return attempt(stock, work, steps, offloads)


def measured_arm(work: Work, plan: str, process: Process, traces: bool) -> dict[str, Any]:
    """Returns the figures of a row other than the first stock arm, or the error."""
    if plan == OFFLOAD:
        return stock_arm(work, process.stock_steps, offloads=True)
    make_room(work.device)
    with slowed(process.copy_rate, work.device) as copies:
        validates = process.validates and plan == "lean"
        arm = attempt(ours, work, PLAN_FLAGS[plan], process.steps, validates, traces)
    return arm | copies


def is_measured(plan: str, arm: dict[str, Any], stock: dict[str, Any] | None) -> bool:
    """Returns whether no part of a row failed. That a stock arm does not fit into memory is a result too."""
    parts = [arm.get(name, {}) for name in ("kernels_ms", "trace", "validation")]
    ours, theirs = (parts, arm) if plan in STOCK else ([arm, *parts], stock or {})
    return not any("failed" in part for part in ours) and theirs.get("failed", NO_MEMORY) == NO_MEMORY


def result_of(row: str, work: Work, arm: dict[str, Any], stock: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the result of a row: the task, the versions, the figures of its arm, and those of the stock arm."""
    plan = ROWS[row].rows[row]
    result = {"row": row, "kind": work.kind, "rank": work.rank, "batch": work.batch, "plan": plan}
    result |= {"clip": str(work.bucket), "tokens": work.tokens, "precision": work.precision}
    result |= device_and_versions() | {"command": f"python benchmarks/bench.py --row {row}"}
    layers, batch = work.config["num_layers"], work.batch
    result["useful_flops"] = useful_flops(work.tokens, work.width, layers, batch, trains_all=not work.rank)
    result |= arm
    if "failed" not in arm:
        result |= speed_figures(result) | {"ratio": None}
    if plan not in STOCK and stock is not None:
        result["stock"] = stock
        if "failed" not in stock:
            result["ratio"] = round(stock["seconds_per_step"] / arm["seconds_per_step"], 4)
    return result


def run_rows(rows: Sequence[str], results: Path, device: torch.device, seconds: float, traces: bool) -> int:
    """Runs the stock arm and then the rows of one process for which there is time; returns how many rows failed."""
    process, began, failed = ROWS[rows[0]], time.perf_counter(), 0
    work = Work(process.kind, process.rank, process.batch, device, process.precision)
    stock = stock_arm(work, process.stock_steps) if process.stock_steps else None
    for row, plan in process.rows.items():
        if row not in rows or time.perf_counter() - began > seconds - ROW_SECONDS[process.kind]:
            continue
        arm = stock if stock and plan == "stock" else measured_arm(work, plan, process, traces)
        print(json.dumps({"row": row, **arm}), flush=True)
        if not is_measured(plan, arm, stock):
            failed += 1
            continue
        result = result_of(row, work, arm, stock)
        write_result(path_of(results, row), result)
    return failed


# -- all of them -------------------------------------------------------------------------------------------------------


def spawn(arguments: Sequence[str]) -> None:
    """Runs this script in a new process. Rows without a result have failed."""
    subprocess.run([sys.executable, __file__, *arguments], check=False)


def drive(rows: Sequence[str], results: Path, device: torch.device, seconds: float, traces: bool) -> int:
    """Runs the rows without a result, one process after another; returns how many rows have none in the end."""
    missing: list[str] = []
    began, flags = time.perf_counter(), ["--results", str(results), "--device", str(device), *["--trace"] * traces]
    for process in PROCESSES:
        todo = [row for row in process.rows if row in rows and not is_done(results, row, traces)]
        left = seconds - (time.perf_counter() - began)
        if todo and left > ROW_SECONDS[process.kind]:
            spawn(["--row", *todo, *flags, "--seconds", str(left)])
        missing += [row for row in todo if not is_done(results, row, traces)]
    print(json.dumps({"missing": missing}), flush=True)
    return len(missing)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every row")
    which.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"some of {', '.join(ROWS)}")
    which.add_argument(
        "--row", nargs="+", choices=ROWS, metavar="ROW", help="run rows in this process, even if they have results"
    )
    which.add_argument("--copy_rate", type=int, choices=COPY_RATES, help="the rows with copies at this rate, in GB/s")
    which.add_argument("--traces", action="store_true", help="print the table of the traced steps")
    which.add_argument("--table", nargs="?", const="", metavar="FILE", help="print the table, or write it into a file")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trace", action="store_true", help="trace a step of each row, too")
    parser.add_argument("--seconds", type=float, default=1e9, help="start only rows that end in this time")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script, and returns the exit status."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    if flags.table is not None or flags.traces:
        rows = read_rows(flags.results)
        if flags.traces:
            print(trace_table(rows), end="")
        elif flags.table:
            put_into(Path(flags.table), "bench.py", table(rows))
        else:
            print(table(rows), end="")
        return 0
    device = torch.device(flags.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {device}: there is no GPU; --device cpu takes hours")
    if flags.row:
        if len({ROWS[row] for row in flags.row}) > 1:
            parser.error("--row: these rows do not share a process; give --rows")
        return min(1, run_rows(flags.row, flags.results, device, flags.seconds, flags.trace))
    names = SLOWED[flags.copy_rate] if flags.copy_rate else flags.rows or list(ROWS)
    return min(1, drive(names, flags.results, device, flags.seconds, flags.trace))


if __name__ == "__main__":
    sys.exit(main())
