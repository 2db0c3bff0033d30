"""Measures the memory rows of the published guides that a single GPU can run, ours beside theirs.

    python benchmarks/guide_memory.py --results benchmarks/results --seconds 560   # again until all rows are measured
    python benchmarks/guide_memory.py --rows 5b-r16-adamw-budget 5b-sft-8bit-lean
    python benchmarks/guide_memory.py --list                        # the rows by importance, and what they likely take
    python benchmarks/guide_memory.py --table docs/benchmarks.md

A row is a row of a guide with one of two plans: "budget" is what --vram_budget chooses within the memory that training
takes in the guide, and "lean" what --plan lean needs at least. Each takes four steps with random weights, samples and
decodes a video with two sampling steps, and does so again without the state of training. The four peaks are those that
the guide of the CogVideoX factory has: before training, in training, in validation, and in the test afterwards.
Rows with a result, and those that do not fit in the time left, are skipped. A process makes the weights once, and uses
the host memory of a row for the next one, because the system creates new memory slowly.

To run several of these programs on one GPU at the same time, give each its own --rows, and --shared_gpu: memory is that
of each process, and seconds are not recorded.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import mmap
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from arms import GIB, Training, Work, attempt, make_room, peak_gib, sample
from random_models import ROOT
from record import device_and_versions, put_into, write_result
from torch import nn

from cogvideox.host_memory import free_host_bytes
from cogvideox.memory import buffers
from cogvideox.planning import execution
from cogvideox.planning.plan import CONTEXT

SCRIPT, PREFIX = "guide_memory.py", "memory_"
STEPS = 4
LARGEST_CARD = 80.0  # GiB, of the A100 on which the factory measured
SPARE = 4 * GIB  # bytes of host memory that stay free when a row allocates more
OPTIMIZERS = {  # flags with which we do what the guides' optimizer does
    "adamw": (),
    "8bit": ("--use_8bit",),
    "offload": ("--optimizer_state_on", "host"),  # torchao's CPUOffloadOptimizer; ZeRO-2 with the optimizer offloaded
}
BUDGET, LEAN = "budget", "lean"
FACTORY = """
2b 16 1 adamw kept 12.945 43.764 46.918 24.234
2b 16 1 adamw checkpointed 12.945 12.945 21.121 24.234
2b 64 1 adamw kept 13.035 44.314 47.469 24.469
2b 64 1 adamw checkpointed 13.036 13.035 21.564 24.500
2b 256 1 adamw kept 13.095 45.826 48.990 25.543
2b 256 1 adamw checkpointed 13.094 13.095 22.344 25.537
5b 16 1 adamw checkpointed 19.742 19.742 28.746 38.123
5b 64 1 adamw checkpointed 20.006 20.818 30.338 38.738
5b 256 1 adamw checkpointed 20.771 22.119 31.939 41.537
2b 16 4 adamw checkpointed 12.945 21.803 21.814 24.322
2b 64 4 adamw checkpointed 13.035 22.254 22.254 24.572
2b 256 4 adamw checkpointed 13.094 22.020 22.033 25.574
5b 16 4 adamw checkpointed 19.742 46.492 46.492 38.197
5b 64 4 adamw checkpointed 20.006 47.805 47.805 39.365
5b 256 4 adamw checkpointed 20.771 47.268 47.332 41.008
2b 16 1 8bit kept 12.945 43.732 46.887 24.195
2b 16 1 8bit checkpointed 12.945 12.945 21.430 24.195
2b 64 1 8bit kept 13.035 44.004 47.158 24.369
2b 64 1 8bit checkpointed 13.035 13.035 21.297 24.357
2b 256 1 8bit kept 13.035 45.291 48.455 24.836
2b 256 1 8bit checkpointed 13.035 13.035 21.625 24.869
5b 16 1 8bit checkpointed 19.742 19.742 28.602 38.049
5b 64 1 8bit checkpointed 20.006 20.818 29.359 38.520
5b 256 1 8bit checkpointed 20.771 21.352 30.727 39.596
2b 16 4 8bit checkpointed 12.945 21.734 21.775 24.281
2b 64 4 8bit checkpointed 13.036 21.941 21.941 24.445
2b 256 4 8bit checkpointed 13.094 22.020 22.266 24.943
5b 16 4 8bit checkpointed 19.742 46.320 46.326 38.104
5b 64 4 8bit checkpointed 20.006 46.820 46.820 38.588
5b 256 4 8bit checkpointed 20.771 47.920 47.980 40.002
2b 16 1 offload kept 12.945 43.705 46.859 24.180
2b 16 1 offload checkpointed 12.945 12.945 21.395 24.180
2b 64 1 offload kept 13.035 43.916 47.070 24.234
2b 64 1 offload checkpointed 13.035 13.035 20.887 24.266
2b 256 1 offload kept 13.095 44.947 48.111 24.607
2b 256 1 offload checkpointed 13.095 13.095 21.391 24.635
5b 16 1 offload checkpointed 19.742 19.742 28.533 38.002
5b 64 1 offload checkpointed 20.006 20.006 29.107 38.785
5b 256 1 offload checkpointed 20.771 20.771 30.078 39.559
2b 16 4 offload checkpointed 12.945 21.709 21.762 24.254
2b 64 4 offload checkpointed 13.035 21.844 21.855 24.338
2b 256 4 offload checkpointed 13.094 22.020 22.031 24.709
5b 16 4 offload checkpointed 19.742 46.262 46.297 38.400
5b 64 4 offload checkpointed 20.006 46.561 46.574 38.840
5b 256 4 offload checkpointed 20.771 47.268 47.332 39.623
2b 0 1 adamw checkpointed 16.396 33.934 43.848 37.520
5b 0 1 adamw checkpointed 30.061 inf inf inf
2b 0 4 adamw checkpointed 16.396 38.281 48.341 37.544
5b 0 4 adamw checkpointed 30.061 inf inf inf
2b 0 1 8bit checkpointed 16.396 16.447 27.555 27.156
5b 0 1 8bit checkpointed 30.061 52.826 58.570 49.541
2b 0 4 8bit checkpointed 16.396 27.930 27.990 27.326
5b 0 4 8bit checkpointed 16.396 66.648 66.705 48.828
2b 0 1 offload checkpointed 16.396 16.396 26.100 23.832
5b 0 1 offload checkpointed 30.061 39.359 48.307 37.947
2b 0 4 offload checkpointed 16.396 27.916 27.975 23.936
5b 0 4 offload checkpointed 30.061 66.607 66.668 38.061
"""
"""The guide of the CogVideoX factory: model, rank (0: all weights), batch size, optimizer, whether activations are kept
or checkpointed, and its four columns in GiB, inf where it ran out of memory."""
CARDS = """
2b 128 1 adamw fp16 16
5b 128 1 adamw bf16 24
1.5-5b 128 1 adamw bf16 35
2b 0 1 adamw fp16 36
2b 0 1 offload fp16 17
5b 0 1 offload bf16 42
1.5-5b 0 1 offload bf16 56
"""
"""The guide of CogVideoX, rows of a single card: model, rank, batch size, optimizer, precision, and the card in GiB."""
ORDER = (("5b", True), ("5b", False), ("2b", False), ("2b", True), ("1.5-5b", True), ("1.5-5b", False))
"""The most important rows first: the model, and whether a LoRA is trained."""
HEAD = (
    "model",
    "rank, batch",
    "optimizer",
    "guide: activations",
    "guide: GiB before, in training, in validation, in test",
    "ours within the guide's memory",
    "GiB before, in training, in validation, in test",
    "lean",
    "GiB before, in training, in validation, in test",
)
UNKNOWN = ""


@dataclass(frozen=True)
class GuideRow:
    """Holds a row of a guide."""

    kind: str
    rank: int  # of the LoRA; 0: all weights are trained
    batch: int
    optimizer: str  # a key of OPTIMIZERS
    activations: str = "checkpointed"  # or kept
    peaks: tuple[float, ...] = ()  # GiB: before training, in training, in validation, in the test
    precision: str = "bf16"
    card: float | None = None  # GiB of the card that the guide asks for, where it has no peaks

    @property
    def name(self) -> str:
        """Returns the name of the row."""
        parts = [self.kind, f"r{self.rank}" if self.rank else "sft", *[f"b{self.batch}"] * (self.batch > 1)]
        parts += [self.optimizer, *["kept"] * (self.activations == "kept")]
        parts += [] if self.card is None else [self.precision, f"{self.card:.0f}gb"]
        return "-".join(parts)

    @property
    def budget(self) -> float:
        """Returns the GiB of a card that has room for what training takes in the guide."""
        if self.card is not None:
            return self.card
        return self.peaks[1] + CONTEXT / GIB if math.isfinite(self.peaks[1]) else LARGEST_CARD

    def flags(self, plan: str) -> tuple[str, ...]:
        """Returns the flags of the training script for a plan, BUDGET or LEAN."""
        where = ("--vram_budget", f"{self.budget:.3f}") if plan == BUDGET else ("--plan", "lean")
        return *where, *(OPTIMIZERS[self.optimizer] if plan == BUDGET or self.optimizer == "8bit" else ())

    @property
    def seconds(self) -> float:
        """Returns the seconds that the row likely takes."""
        start, step = {"2b": (15, 1.0), "5b": (30, 2.5), "1.5-5b": (110, 11.0)}[self.kind]
        return start + step * (STEPS + 1) * self.batch * (1 if self.rank else 1.5) + (0 if self.rank else start / 2)


@dataclass(frozen=True)
class Arm:
    """Holds a measurement: a row of a guide, and our plan."""

    row: GuideRow
    plan: str

    @property
    def name(self) -> str:
        """Returns the name of the measurement, which is part of a file name."""
        return f"{self.row.name}-{self.plan}"

    @property
    def process(self) -> tuple[str, str]:
        """Returns what a process loads once: the model and its precision."""
        return self.row.kind, self.row.precision


def guide_rows() -> list[GuideRow]:
    """Returns the rows of both guides, in the order of the table: by importance, then those that share graphs."""
    rows = []
    for line in FACTORY.strip().splitlines():
        kind, rank, batch, optimizer, activations, *peaks = line.split()
        rows.append(GuideRow(kind, int(rank), int(batch), optimizer, activations, tuple(map(float, peaks))))
    for line in CARDS.strip().splitlines():
        kind, rank, batch, optimizer, precision, card = line.split()
        rows.append(GuideRow(kind, int(rank), int(batch), optimizer, precision=precision, card=float(card)))
    optimizers = list(OPTIMIZERS)

    def place(row: GuideRow) -> tuple[Any, ...]:
        """Returns the sort key of a row."""
        group = ORDER.index((row.kind, row.rank > 0))
        return group, row.batch, row.precision, row.rank, row.activations, optimizers.index(row.optimizer)

    return sorted(rows, key=place)


ROWS = guide_rows()


def arms_of(rows: Sequence[GuideRow]) -> list[Arm]:
    """Returns all measurements by importance: one of each row before any other, and single samples before batches.

    Under lean, all optimizer state is on the host, so that the rows of a guide that offload it, or store few numbers
    of a LoRA in 8 bits, would repeat those of AdamW.
    """
    lean = [row for row in rows if row.optimizer == "adamw" or (row.optimizer == "8bit" and not row.rank)]
    lean = [row for row in lean if row.activations == "checkpointed"]
    arms = [Arm(row, BUDGET) for row in rows] + [Arm(row, LEAN) for row in lean]
    return sorted(arms, key=lambda arm: (arm.plan == LEAN, arm.row.batch))


ARMS = {arm.name: arm for arm in arms_of(ROWS)}


def path_of(results: Path, arm: Arm) -> Path:
    """Returns the path of a result."""
    return results / f"{PREFIX}{arm.name}.json"


# -- one process -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def base_of(kind: str, precision: str, device: torch.device) -> Any:
    """Returns a random transformer in host memory, which all rows of a process copy."""
    return Work.make_transformer(Work(kind, 0, 1, device, precision)).to("cpu")


class SharedWork(Work):
    """Makes transformers that share the memory of one random transformer until a plan moves them."""

    def make_transformer(self) -> Any:
        """Returns a frozen transformer with parameters of its own, whose memory is that of ``base_of``."""
        base = base_of(self.kind, self.precision, self.device)
        shared: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters()}
        return copy.deepcopy(base, shared)


class ReusedMappings:
    """Stands for the module mmap, and gives host memory of an earlier row to the next one. New pages take longer.

    What no tensor uses counts as free when a plan is chosen, and is freed before new memory would take the last.
    """

    def __init__(self) -> None:
        # Each with what was lent of it last. A tensor refers to what it was made from, so that ends with its last view.
        self._mappings: dict[mmap.mmap, weakref.ref[Any]] = {}
        self._taken: set[int] = set()  # of this row, by id

    def __getattr__(self, name: str) -> Any:
        return getattr(mmap, name)

    def _unused(self) -> list[mmap.mmap]:
        return [mapping for mapping, lent in self._mappings.items() if lent() is None]

    def mmap(self, fileno: int, length: int, flags: int) -> Any:
        """Returns zeroed memory of at least ``length`` bytes, with the arguments and ``madvise`` of ``mmap.mmap``."""
        unused = self._unused()
        found = min((m for m in unused if length <= len(m) <= 1.1 * length), key=len, default=None)
        if found is None:
            if free_host_bytes() < length + SPARE:
                self._mappings = {m: lent for m, lent in self._mappings.items() if m not in unused}
            del unused
            found = mmap.mmap(fileno, length, flags=flags)
        else:
            torch.frombuffer(found, dtype=torch.uint8).zero_()
        self._taken.add(id(found))
        lent: Any = (ctypes.c_char * len(found)).from_buffer(found)
        lent.madvise = found.madvise
        self._mappings[found] = weakref.ref(lent)
        return lent

    def free_host_bytes(self) -> int:
        """Returns the host memory that a row may allocate: what is free, and what earlier rows have left."""
        return free_host_bytes() + sum(map(len, self._unused()))

    def lent(self, run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """Calls a function that chooses a plan and allocates host memory."""
        original = execution.free_host_bytes
        buffers.mmap, execution.free_host_bytes = self, self.free_host_bytes  # type: ignore[assignment]
        try:
            return run(*arguments)
        finally:
            buffers.mmap, execution.free_host_bytes = mmap, original

    def next_row(self) -> None:
        """Frees what the last row did not use."""
        self._mappings = {m: lent for m, lent in self._mappings.items() if id(m) in self._taken}
        self._taken.clear()


def validation_peak(sampled: dict[str, Any]) -> float | None:
    """Returns the higher peak of sampling and decoding, in GiB."""
    return max(
        filter(None, (sampled[name]["allocated"] for name in ("sampling_peak_gib", "decoding_peak_gib"))), default=None
    )


def measure(arm: Arm, device: torch.device) -> dict[str, Any]:
    """Returns the figures of a measurement: peaks by column, seconds of a step, and what the plan says.

    As in the guide, the peak before training starts with the memory that is allocated then.
    """
    row = arm.row
    training = Training(SharedWork(row.kind, row.rank, row.batch, device, row.precision), row.flags(arm.plan))
    gc.collect()
    peak_gib(device)
    before = peak_gib(device)["allocated"]
    figures = training.measure(STEPS)
    reserved = figures["peak_gib"]["reserved"]
    validation = training.sample(reserved if arm.plan == LEAN else None)
    training.end()
    test = sample(training.work, training.transformer)
    peaks = [before, figures["peak_gib"]["allocated"], validation_peak(validation), validation_peak(test)]
    return {"peaks_gib": peaks} | figures | {"validation": validation, "test": test}


def run_arms(arms: Sequence[Arm], results: Path, device: torch.device, seconds: float, shared: bool) -> int:
    """Runs the measurements of one process for which there is time; returns how many failed.

    Seconds are not recorded if other programs share the GPU.
    """
    began, failed, graphs = time.perf_counter(), 0, None
    memory = ReusedMappings()
    for arm in arms:
        started = time.perf_counter()
        if started - began > seconds - arm.row.seconds:
            continue
        shapes = arm.row.rank, arm.row.batch
        make_room(device, keeps_graphs=graphs == shapes)
        memory.next_row()
        graphs = shapes
        result: dict[str, Any] = {"arm": arm.name, "row": asdict(arm.row), "plan": arm.plan}
        result |= (
            {"flags": arm.row.flags(arm.plan)}
            | attempt(memory.lent, measure, arm, device)
            | {"arm_seconds": round(time.perf_counter() - started, 1)}
        )
        if shared:
            result |= {"seconds_per_step": None, "seconds": None, "shared_gpu": True}
        shown = ("arm", "peaks_gib", "seconds_per_step", "predicted", "execution", "arm_seconds", "failed")
        print(json.dumps({name: result[name] for name in shown if name in result}), flush=True)
        if "failed" in result:
            failed += 1
            continue
        write_result(path_of(results, arm), result | device_and_versions())
    return failed


# -- all of them -------------------------------------------------------------------------------------------------------


def spawn(arguments: Sequence[str]) -> None:
    """Runs this script in a new process."""
    subprocess.run([sys.executable, __file__, *arguments], check=False)


def drive(arms: Sequence[Arm], results: Path, device: torch.device, seconds: float, shared: bool) -> int:
    """Runs the measurements without a result, a process for each model; returns how many have none in the end."""
    began = time.perf_counter()
    todo = [arm for arm in arms if not path_of(results, arm).is_file()]
    for _, group in groupby(todo, key=lambda arm: arm.process):
        names = [arm.name for arm in group]
        left = seconds - (time.perf_counter() - began)
        if left > min(ARMS[name].row.seconds for name in names):
            flags = ["--results", str(results), "--device", str(device), "--seconds", str(left)]
            flags += ["--shared_gpu"] * shared
            spawn(["--in_process", "--rows", *names, *flags])
    missing = [arm.name for arm in arms if not path_of(results, arm).is_file()]
    print(json.dumps({"missing": missing}), flush=True)
    return len(missing)


# -- the table ---------------------------------------------------------------------------------------------------------


def peaks_cell(peaks: Sequence[float | None]) -> str:
    """Returns peaks in GiB as text."""
    return ", ".join("?" if gib is None else "OOM" if math.isinf(gib) else f"{gib:.1f}" for gib in peaks)


def our_cells(result: dict[str, Any] | None) -> tuple[str, str]:
    """Returns the seconds of a step, if they were recorded, and the peaks of a result; empty cells without one."""
    if result is None:
        return UNKNOWN, UNKNOWN
    seconds = result["seconds_per_step"]
    return UNKNOWN if seconds is None else f"{seconds:.2f} s", peaks_cell(result["peaks_gib"])


def cells_of(row: GuideRow, found: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Returns the cells of a row of a guide, in the order of HEAD."""
    ours = [our_cells(found.get(f"{row.name}-{plan}")) for plan in (BUDGET, LEAN)]
    return (
        f"{row.kind}, {row.precision}",
        f"{row.rank or 'all weights'}, {row.batch}",
        row.optimizer,
        UNKNOWN if row.card is not None else row.activations,
        f"a card of {row.card:.0f} GB" if row.card is not None else peaks_cell(row.peaks),
        *ours[0],
        *ours[1],
    )


def table(results: Path) -> str:
    """Returns the Markdown table of the rows of the guides that have a result; empty without any."""
    read = [json.loads(path.read_text()) for path in sorted(results.glob(f"{PREFIX}*.json"))]
    found = {result["arm"]: result for result in read if result["arm"] in ARMS}
    rows = [row for row in ROWS if any(f"{row.name}-{plan}" in found for plan in (BUDGET, LEAN))]
    if not rows:
        return ""
    lines = [HEAD, ("---",) * len(HEAD), *(cells_of(row, found) for row in rows)]
    sources = {f"{r['device']}, torch {r['versions']['torch']}, commit {r['commit'][:7]}" for r in found.values()}
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\nMeasured on {'; '.join(sorted(sources))}.\n"


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ARMS, metavar="NAME", help="only these, see --list")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1e9, help="start only rows that end in this time")
    parser.add_argument("--shared_gpu", action="store_true", help="other programs use the GPU: record memory only")
    parser.add_argument("--list", action="store_true", help="print the rows by importance, with the seconds they take")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="only write the table of all results into this page")
    parser.add_argument("--in_process", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script, and returns the exit status."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    arms = [arm for arm in ARMS.values() if not flags.rows or arm.name in flags.rows]
    if flags.table:
        put_into(flags.table, SCRIPT, table(flags.results))
        return 0
    if flags.list:
        print("\n".join(f"{arm.row.seconds:4.0f} s  {arm.name}  {' '.join(arm.row.flags(arm.plan))}" for arm in arms))
        return 0
    device = torch.device(flags.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {device}: there is no GPU; --device cpu takes hours")
    run = run_arms if flags.in_process else drive
    return min(1, run(arms, flags.results, device, flags.seconds, flags.shared_gpu))


if __name__ == "__main__":
    sys.exit(main())
