"""Tests the summary of a trace in benchmarks/profiling.py and its table, with events as torch's profiler has them."""

from typing import Any

import bench_table
import profiling
import pytest


def event(category: str, name: str, stream: int, start_ms: float, ms: float) -> dict[str, Any]:
    args = {"stream": stream} | ({"bytes": 2**29} if category == "gpu_memcpy" else {})
    return {"cat": category, "name": name, "ts": start_ms * 1000, "dur": ms * 1000, "args": args}


# compute (7)     |    | kernel 10..14 | two kernels 14..20, 19..22 |        | 30..40 |
# copies in (20)  | 5..12              |                            | 24..29          |
# copies out (24)                        | 18..26                   |
EVENTS = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    event("cuda_runtime", "cudaStreamSynchronize", 0, 0, 3),
    event("cpu_op", "aten::mm", 0, 0, 50),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20, 5, 7),
    event("kernel", "gemm", 7, 10, 4),
    event("kernel", "norm", 7, 14, 6),
    event("kernel", "adam", 9, 19, 3),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 24, 18, 8),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20, 24, 5),
    event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 7, 30, 9.5),
    event("gpu_memset", "Memset", 7, 39.5, 0.5),
]


def test_summary_of_a_trace() -> None:
    assert profiling.summary_of(EVENTS) == {
        "ms": 35.0,
        "busy_ms": {"compute": 22.0, "copies in": 12.0, "copies out": 8.0},
        "streams_ms": {
            "7": {"compute": 20.0},
            "9": {"compute": 3.0},
            "20": {"copies in": 12.0},
            "24": {"copies out": 8.0},
        },
        "copied_gib": {"copies in": 1.0, "copies out": 0.5},
        "overlap_ms": {"compute and copies in": 2.0, "compute and copies out": 4.0, "copies in and out": 2.0},
        "idle_ms": 1.0,
        "host_waits_ms": 3.0,
        "gaps_ms": 13.0,
        "compute_gaps": [
            {"at_ms": 17.0, "ms": 8.0, "copies in": 5.0, "copies out": 4.0},
            {"at_ms": 0.0, "ms": 5.0, "copies in": 5.0, "copies out": 0.0},
        ],
    }


def test_table_of_traces() -> None:
    row = {"row": "5b-sft-lean", "seconds_per_step": 4.0, "predicted": {"seconds_per_step": 3.9}}
    traced = row | {"trace": profiling.summary_of(EVENTS)}
    lines = bench_table.trace_table([row, traced]).splitlines()
    assert lines[2:] == [
        "| 5b-sft-lean | 4.00 s (3.90) | 22 | 12 (1.0 GiB) | 8 (0.5 GiB) | 2 | 2 in, 4 out "
        "| 13, the longest 8 at 17 | 1 |"
    ]
    assert {line.count("|") for line in lines} == {len(bench_table.TRACE_HEAD) + 1}
    assert bench_table.trace_table([row]) == ""


@pytest.mark.parametrize(
    ("intervals", "union"), [([], []), ([(3, 4), (0, 2), (1, 3)], [(0, 4)]), ([(0, 1), (2, 3)], [(0, 1), (2, 3)])]
)
def test_union(intervals: list[profiling.Interval], union: list[profiling.Interval]) -> None:
    assert profiling.merged(intervals) == union
