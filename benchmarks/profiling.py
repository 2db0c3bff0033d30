"""Measures the kernels of a call with torch's profiler, one by one or in groups, and when its streams are busy.

``kernels_of`` and ``shares_of`` return milliseconds. Copies run at the same time as kernels, on separate streams, so
the sum can exceed the duration of the call. ``trace_of`` says how much of them overlaps, and when kernels wait.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MOST = 24
GROUPS = (  # parts of a kernel's name, of which the first match decides
    ("attention", ("sdpa", "flash", "fmha", "attn")),
    ("copies", ("memcpy",)),
    ("matrix products", ("nvjet", "gemm", "cutlass", "cublas")),
)
REST = "elementwise and norms"
COMPUTE, IN, OUT = "compute", "copies in", "copies out"
GAP_MS = 1.0  # shorter gaps between kernels are not listed
LONGEST_GAPS = 20  # that are listed
HOST_CALLS = ("cuda", "cuLaunch", "Activity Buffer")  # prefixes of names of calls on the host


def events_of(run: Callable[[], Any]) -> list[Any]:
    """Returns the kernels and copies of a call, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if not e.key.startswith(HOST_CALLS)]
    return sorted(events, key=lambda e: -e.self_device_time_total)


def kernels_of(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Returns the kernels that take longest."""
    events = events_of(run)[:MOST]
    return [{"kernel": e.key[:90], "calls": e.count, "ms": round(e.self_device_time_total / 1000, 3)} for e in events]


def group_of(kernel: str) -> str:
    """Returns the group of a kernel, by its name."""
    name = kernel.lower()
    return next((group for group, parts in GROUPS if any(part in name for part in parts)), REST)


def shares_of(run: Callable[[], Any]) -> dict[str, float]:
    """Returns milliseconds by group, the longest first."""
    sums: dict[str, float] = {}
    for event in events_of(run):
        group = group_of(event.key)
        sums[group] = sums.get(group, 0.0) + event.self_device_time_total / 1000
    return {group: round(ms, 1) for group, ms in sorted(sums.items(), key=lambda item: -item[1])}


# -- when the streams are busy -----------------------------------------------------------------------------------------

Interval = tuple[float, float]  # start and end, in ms


def trace_of(run: Callable[[], Any]) -> dict[str, Any]:
    """Traces a call and returns the summary of its trace."""
    on_device = torch.cuda.is_available()
    if on_device:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as profiler:
        run()
        if on_device:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return summary_of(json.loads(path.read_text())["traceEvents"])


def work_of(event: dict[str, Any]) -> str | None:
    """Returns the kind of work that an event of a trace is on the device, or None if it is not on the device."""
    if event.get("cat") == "gpu_memcpy":
        return IN if "HtoD" in event["name"] else OUT if "DtoH" in event["name"] else COMPUTE
    return COMPUTE if event.get("cat") in ("kernel", "gpu_memset") else None


def summary_of(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes the events of a Chrome trace, in ms.

    Returns:
        The time from the first to the last event on the device; for each kind of work how long any stream was busy
        with it, in all and for each stream; the GiB of copies; how long kinds overlap; the sum of the gaps between
        kernels longer than GAP_MS, and the longest ones with the copies in each; how long the device had no work at
        all; and how long the host waited for the device.
    """
    spans: dict[tuple[int, str], list[Interval]] = {}
    waiting, copied = 0.0, {IN: 0, OUT: 0}
    for event in events:
        work, duration = work_of(event), event.get("dur", 0) / 1000
        if work:
            start = event["ts"] / 1000
            if work in copied:
                copied[work] += event["args"].get("bytes", 0)
            spans.setdefault((event["args"]["stream"], work), []).append((start, start + duration))
        elif "Synchronize" in event.get("name", ""):
            waiting += duration
    kinds = {
        kind: merged(span for (_, work), s in spans.items() if work == kind for span in s)
        for kind in (COMPUTE, IN, OUT)
    }
    compute, into, out = kinds.values()
    every = merged(compute + into + out)
    whole = (every[0][0], every[-1][1]) if every else (0.0, 0.0)
    streams: dict[str, dict[str, float]] = {}
    for (stream, work), own in sorted(spans.items()):
        streams.setdefault(str(stream), {})[work] = length(merged(own))
    overlaps = {"compute and copies in": (compute, into), "compute and copies out": (compute, out)}
    overlaps["copies in and out"] = (into, out)
    long_gaps = [gap for gap in gaps(compute, whole) if gap[1] - gap[0] > GAP_MS]
    return {
        "ms": length([whole]),
        "busy_ms": {COMPUTE: length(compute), IN: length(into), OUT: length(out)},
        "streams_ms": streams,
        "copied_gib": {kind: round(size / 2**30, 3) for kind, size in copied.items()},
        "overlap_ms": {name: length(common(*both)) for name, both in overlaps.items()},
        "idle_ms": length(gaps(every, whole)),
        "host_waits_ms": round(waiting, 2),
        "gaps_ms": length(long_gaps),
        "compute_gaps": [
            {"at_ms": round(gap[0] - whole[0], 2), "ms": length([gap])}
            | {kind: length(common([gap], own)) for kind, own in ((IN, into), (OUT, out))}
            for gap in sorted(long_gaps, key=lambda gap: gap[0] - gap[1])[:LONGEST_GAPS]
        ],
    }


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the union of intervals, sorted and disjoint."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def common(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Returns the intersection of two sorted lists of disjoint intervals."""
    both, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            both.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return both


def gaps(intervals: list[Interval], whole: Interval) -> list[Interval]:
    """Returns the parts of ``whole`` that disjoint sorted intervals inside it do not cover."""
    edges = [whole[0], *(edge for interval in intervals for edge in interval), whole[1]]
    return [(start, end) for start, end in list(pairwise(edges))[::2] if end > start]


def length(intervals: list[Interval]) -> float:
    """Returns the sum of the lengths of disjoint intervals."""
    return round(sum(end - start for start, end in intervals), 2)
