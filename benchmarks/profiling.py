"""Where the device's time goes: kernels of a call by torch's profiler, one by one or in groups.

kernels_of(run) and shares_of(run) -> milliseconds. Copies run beside the kernels, on streams of their own.
"""

from collections.abc import Callable
from typing import Any

import torch

MOST = 24
GROUPS = (  # by parts of a kernel's name; the first that matches
    ("attention", ("sdpa", "flash", "fmha", "attn")),
    ("copies", ("memcpy",)),
    ("matrix products", ("nvjet", "gemm", "cutlass", "cublas")),
)
REST = "elementwise and norms"
HOST_CALLS = ("cuda", "cuLaunch", "Activity Buffer")  # beginnings of names that are not the device's work


def events_of(run: Callable[[], Any]) -> list[Any]:
    """Kernels and copies of a call, those that take longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if not e.key.startswith(HOST_CALLS)]
    return sorted(events, key=lambda e: -e.self_device_time_total)


def kernels_of(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels that take longest."""
    events = events_of(run)[:MOST]
    return [{"kernel": e.key[:90], "calls": e.count, "ms": round(e.self_device_time_total / 1000, 3)} for e in events]


def group_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((group for group, parts in GROUPS if any(part in name for part in parts)), REST)


def shares_of(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds by group, the longest first."""
    sums: dict[str, float] = {}
    for event in events_of(run):
        group = group_of(event.key)
        sums[group] = sums.get(group, 0.0) + event.self_device_time_total / 1000
    return {group: round(ms, 1) for group, ms in sorted(sums.items(), key=lambda item: -item[1])}
