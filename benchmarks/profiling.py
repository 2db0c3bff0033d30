"""Measures the kernels of a call with torch's profiler, one by one or in groups.

``kernels_of`` and ``shares_of`` return milliseconds. Copies run at the same time as kernels, on separate streams, so
the sum can exceed the duration of the call.
"""

from collections.abc import Callable
from typing import Any

import torch

MOST = 24
GROUPS = (  # parts of a kernel's name, of which the first match decides
    ("attention", ("sdpa", "flash", "fmha", "attn")),
    ("copies", ("memcpy",)),
    ("matrix products", ("nvjet", "gemm", "cutlass", "cublas")),
)
REST = "elementwise and norms"
HOST_CALLS = ("cuda", "cuLaunch", "Activity Buffer")  # prefixes of names of calls on the host


def events_of(run: Callable[[], Any]) -> list[Any]:
    """Returns the kernels and copies of a call, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if not e.key.startswith(HOST_CALLS)]
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
