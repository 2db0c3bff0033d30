"""Slows copies between host memory and a GPU to the rate of a slower connection, for bench.py --copy_rate.

The idea: at a quarter of the rate, a copy occupies the connection as long as four copies do at the full rate. So every
asynchronous copy is repeated, completely or in part, on its own stream, until as many bytes have crossed as the full
rate moves in the time that the copy takes at the lower rate. Repeating a copy changes nothing: later work on either
tensor waits for an event that is recorded after it. No kernel has to wait on the GPU, streams share the connection as
they do otherwise, and the probe of the planner, execution.measure_machine, finds the lower rate by itself.

Both directions together reach the share of the lower rate that they reach of the full rate on this machine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from profiling import IN, OUT
from torch import Tensor

from cogvideox.memory.buffers import pinned
from cogvideox.planning.probes import COPY_BYTES, seconds_per_call

GB = 10**9
LEAST = 64 * 1024  # bytes; smaller parts of a copy are added to the next one
Copy = Callable[..., Tensor]


def direction_of(target: Tensor, source: Tensor) -> str | None:
    """Returns the direction of a copy between host and device, or None for any other copy."""
    if target.is_cuda == source.is_cuda:
        return None
    return IN if target.is_cuda else OUT


def full_rates(device: torch.device) -> dict[str, float]:
    """Measures the rate of copies in each direction, in bytes per second; 0 on a CPU, which has no connection."""
    if device.type != "cuda":
        return {IN: 0.0, OUT: 0.0}
    host, here = pinned(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    return {
        IN: COPY_BYTES / seconds_per_call(lambda: here.copy_(host, non_blocking=True)),
        OUT: COPY_BYTES / seconds_per_call(lambda: host.copy_(here, non_blocking=True)),
    }


class SlowConnection:
    """Repeats copies so that each takes as long as at a lower rate.

    Args:
        copy: Copies a tensor: the original ``torch.Tensor.copy_``.
        slowdown: By direction, the ratio of the full rate to the lower rate.
    """

    def __init__(self, copy: Copy, slowdown: dict[str, float]) -> None:
        self.copy, self.slowdown = copy, slowdown
        self.counted = {IN: 0, OUT: 0}  # bytes of copies, without repetitions
        self.owed = {IN: 0.0, OUT: 0.0}  # bytes that must cross in addition

    def copied(self, target: Tensor, source: Tensor, direction: str) -> None:
        """Repeats an asynchronous copy that was just issued, on the same stream."""
        size = source.nbytes
        self.counted[direction] += size
        self.owed[direction] += max(0.0, self.slowdown[direction] - 1) * size
        while size and self.owed[direction] >= size:
            self.copy(target, source, True)
            self.owed[direction] -= size
        if self.owed[direction] >= LEAST and target.is_contiguous() and source.is_contiguous():
            part = int(self.owed[direction]) // source.element_size()
            self.copy(target.view(-1)[:part], source.view(-1)[:part], True)
            self.owed[direction] -= part * source.element_size()


@contextmanager
def slowed(rate: float | None, device: torch.device) -> Iterator[dict[str, Any]]:
    """Slows copies between host and device within the context, if there is a rate.

    Args:
        rate: The rate in GB/s, in each direction; None leaves copies alone.
        device: The device. Copies of a CPU are not slowed.

    Yields:
        A dictionary for the JSON of a result. At the end of the context it has the rates, and the bytes of all copies
        without repetitions, those of the planner's probes included.
    """
    record: dict[str, Any] = {}
    if rate is None:
        yield record
        return
    full = full_rates(device)
    original = torch.Tensor.copy_
    connection = SlowConnection(original, {name: value / (rate * GB) for name, value in full.items()})

    def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copies like ``torch.Tensor.copy_``, but takes longer."""
        original(target, source, non_blocking)
        direction = direction_of(target, source) if non_blocking and isinstance(source, Tensor) else None
        if direction is not None:
            connection.copied(target, source, direction)
        return target

    torch.Tensor.copy_ = copy_  # type: ignore[method-assign, assignment]
    try:
        yield record
    finally:
        del torch.Tensor.copy_  # the original is an attribute of the base class
        record["copy_rate"] = rate
        record["full_copy_rates"] = {name: round(value / GB, 2) for name, value in full.items()}
        record["copied_bytes"] = connection.counted
