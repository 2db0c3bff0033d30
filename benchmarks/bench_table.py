"""Computes utilization from measured steps, and writes the table of docs/benchmarks.md.

A row is a result of bench.py. ``table`` returns the Markdown that is in docs/benchmarks.md.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PREFIX = "bench_"
OFFLOAD = "stock-offload"  # the stock loop with torchao's optimizer on the host
STOCK = ("stock", OFFLOAD)
PLANS = (
    *STOCK,
    *("fast", "auto", "auto-8bit", "80gb", "80gb-8bit", "80gb-device-8bit", "24gb", "24gb-8bit", "12gb", "8gb"),
    *("lean", "lean-8bit", "lean-int8", "lean-nf4"),
)
MODELS = ("2b", "5b", "1.5-5b")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # per second, dense bf16; the key is a part of the device's name
LIMITS = {"2b": dict.fromkeys(PLANS, 0.68), "1.5-5b": dict.fromkeys(PLANS, 8.75)}
LIMITS["5b"] = {name: 1.84 if name.startswith("lean") else 1.66 for name in PLANS}
LIMITS_OF_ALL = {"5b": 2.0}  # limits for training all weights
"""Seconds a sample, on an H100: matmuls and attention at the rates measured there, all else fused to its fewest bytes,
nothing computed again; for 5b lean with attention outputs kept alone, what that plan can reach.
At rank 128; the LoRA's own matmuls are 3 % of a step there, less at lower ranks."""
GUIDE = {
    ("2b", 16, 1): (12.945, 21.121),
    ("2b", 64, 1): (13.035, 21.564),
    ("2b", 256, 1): (13.095, 22.344),
    ("5b", 16, 1): (19.742, 28.746),
    ("5b", 64, 1): (20.818, 30.338),
    ("5b", 256, 1): (22.119, 31.939),
    ("2b", 16, 4): (21.803, 21.814),
    ("2b", 64, 4): (22.254, 22.254),
    ("2b", 256, 4): (22.020, 22.033),
    ("5b", 16, 4): (46.492, 46.492),
    ("5b", 64, 4): (47.805, 47.805),
    ("5b", 256, 4): (47.268, 47.332),
}
"""(kind, rank, batch) -> GiB of training without validation and with it, of the CogVideoX factory's guide: AdamW, with
gradient checkpointing; its columns memory_before_validation and memory_after_validation."""
HEAD = (
    "model, clip",
    "rank, batch",
    "plan",
    "a step (predicted)",
    "stock / ours",
    "peak (reserved)",
    "in validation",
    "on the host",
    "MFU",
    "of the limit",
    "factory's guide (in validation)",
)
UNKNOWN = ""


# -- figures -----------------------------------------------------------------------------------------------------------


def useful_flops(tokens: int, width: int, layers: int, batch: int, trains_all: bool = False) -> float:
    """Returns the FLOPs of the matmuls and the attention of a step that cannot be avoided.

    The forward pass of a block takes 24 N D^2 for the linear layers and 4 N^2 D for attention. The backward pass takes
    as much for the inputs of the linear layers, as much again for their weights if these are trained, and twice as much
    for attention. The matmuls of a LoRA and recomputation are not counted.
    """
    linear, attention = 24 * tokens * width**2, 4 * tokens**2 * width
    return float(batch * layers * ((3 if trains_all else 2) * linear + 3 * attention))


def speed_figures(row: dict[str, Any]) -> dict[str, float | None]:
    """Returns the model FLOPs utilization and the share of the limit; empty for devices without known peak FLOPs."""
    flops = next((flops for name, flops in PEAK_FLOPS.items() if name in row["device"]), None)
    if flops is None:
        return {"mfu": None, "limit_ratio": None}
    seconds = row["seconds_per_step"]
    limit = LIMITS[row["kind"]][row["plan"]] if row["rank"] else LIMITS_OF_ALL.get(row["kind"])
    reached = None if limit is None else round(limit * row["batch"] / seconds, 4)
    return {"mfu": round(row["useful_flops"] / (seconds * flops), 4), "limit_ratio": reached}


# -- the table ---------------------------------------------------------------------------------------------------------


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Returns all measured rows, in the order of the table."""
    rows = [json.loads(path.read_text()) for path in results.glob(f"{PREFIX}*.json")]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        """Returns the sort key of a row: model, method, batch size, rank, precision, rate of copies, plan, name."""
        kind, plan = MODELS.index(row["kind"]), PLANS.index(row["plan"])
        task = kind, not row["rank"], row["batch"], row["rank"]
        return *task, row["precision"], row.get("copy_rate", 0), plan, row["row"]

    return sorted(rows, key=place)


def number(form: str, value: float | None) -> str:
    """Returns a number as text, or an empty text for None."""
    return UNKNOWN if value is None else form.format(value)


def peak(peaks: dict[str, float | None]) -> str:
    """Returns the peak of allocated memory, followed by that of reserved memory."""
    return number("{:.1f}", peaks["allocated"]) + number(" ({:.1f})", peaks["reserved"])


def validation_peak(row: dict[str, Any]) -> str:
    """Returns the higher peak of sampling and decoding."""
    if "validation" not in row:
        return UNKNOWN
    both = [row["validation"][name] for name in ("sampling_peak_gib", "decoding_peak_gib")]
    return peak(max(both, key=lambda peaks: peaks["allocated"] or 0.0))


def described_plan(row: dict[str, Any]) -> str:
    """Returns the plan of a row, with everything by which rows of one plan differ."""
    rate = [f"copies at {row['copy_rate']} GB/s"] if "copy_rate" in row else []
    attention = [row["attention"].split(":")[0]] if "attention" in row else []
    return ", ".join([row["plan"], *[row["precision"]] * (row["precision"] != "bf16"), *rate, *attention])


def step_time(row: dict[str, Any]) -> str:
    """Returns the measured time of a step, followed by the predicted one."""
    return f"{row['seconds_per_step']:.2f} s" + number(" ({:.2f})", row.get("predicted", {}).get("seconds_per_step"))


def cells(row: dict[str, Any]) -> Iterator[str]:
    """Returns the cells of a row, in the order of HEAD."""
    yield f"{row['kind']}, {row['clip']}"
    yield f"{row['rank'] or 'all weights'}, {row['batch']}"
    yield described_plan(row)
    if "failed" in row:
        yield from (row["failed"], *[UNKNOWN] * 6)
    else:
        yield step_time(row)
        yield number("{:.2f}x", row["ratio"])
        yield peak(row["peak_gib"])
        yield validation_peak(row)
        yield number("{:.0f}", None if row.get("host_gib") is None else max(0.0, row["host_gib"]))
        yield number("{:.0%}", row["mfu"])
        yield number("{:.0%}", row["limit_ratio"])
    guide = GUIDE.get((row["kind"], row["rank"], row["batch"]))
    yield UNKNOWN if guide is None else "{:.1f} ({:.1f})".format(*guide)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table in Markdown; empty without rows."""
    if not rows:
        return ""
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[f"{row['device']}, torch {row['versions']['torch']}, commit {row['commit']}"].append(row["row"])
    shown = [name if len(groups) == 1 else f"{name}: {', '.join(names)}" for name, names in groups.items()]
    return f"{text}\nMemory in GiB. Measured on {'; '.join(shown)}.\n"


TRACE_HEAD = (
    "row",
    "a step (predicted)",
    "kernels",
    "copies in",
    "copies out",
    "both directions",
    "copies beside kernels",
    "gaps between kernels",
    "no work at all",
)


def trace_cells(row: dict[str, Any]) -> Iterator[str]:
    """Returns the cells of a row with a trace, in the order of TRACE_HEAD."""
    trace = row["trace"]
    overlap, copied = trace["overlap_ms"], trace["copied_gib"]
    yield row["row"]
    yield step_time(row)
    for kind, ms in trace["busy_ms"].items():
        yield f"{ms:,.0f}" + number(" ({:.1f} GiB)", copied.get(kind))
    yield f"{overlap['copies in and out']:,.0f}"
    yield f"{overlap['compute and copies in']:,.0f} in, {overlap['compute and copies out']:,.0f} out"
    which = "".join(f", the longest {gap['ms']:,.0f} at {gap['at_ms']:,.0f}" for gap in trace["compute_gaps"][:1])
    yield f"{trace['gaps_ms']:,.0f}{which}"
    yield f"{trace['idle_ms']:,.0f}"


def trace_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of the traced steps in Markdown; empty without one."""
    traced = [row for row in rows if "trace" in row]
    lines = [TRACE_HEAD, ["---"] * len(TRACE_HEAD), *map(trace_cells, traced)] if traced else []
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
