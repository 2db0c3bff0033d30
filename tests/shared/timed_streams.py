"""Gives the streams of a simulated GPU a clock on a CPU: all work runs at once, and is recorded with the time it takes.

``timed`` replaces streaming.SideStream and the waits of the compute stream. A copy takes its bytes divided by a rate,
and starts when its stream, all earlier copies in its direction and the events that it waits for have ended. ``taking``
gives a function seconds of the compute stream. So the clock shows when a GPU would finish, by the waits in the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cogvideox.memory import streaming
from cogvideox.optimizer import adam_weights
from cogvideox.optimizer import step as step_module
from cogvideox.planning import stack as stack_module


@dataclass
class Clock:
    """The time of the compute stream, and when each direction of copies is free."""

    rate: float
    now: float = 0.0
    free: dict[str, float] = field(default_factory=lambda: {"in": 0.0, "out": 0.0})
    hosts: set[int] = field(default_factory=set)  # addresses of host memory
    host_bytes: int = 0  # of all host memory that is allocated now

    def direction_of(self, target: Tensor) -> str:
        return "out" if target.untyped_storage().data_ptr() in self.hosts else "in"

    def freed(self, num_bytes: int) -> None:
        self.host_bytes -= num_bytes

    def waits_for(self, event: float | None) -> None:
        self.now = max(self.now, event or 0.0)


class Timed(TorchFunctionMode):
    """Makes copies, and records the time they take on a stream."""

    def __init__(self, side: TimedStream) -> None:
        super().__init__()
        self.side = side

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.copy_:
            clock = self.side.clock
            direction = clock.direction_of(args[0])
            self.side.free = max(self.side.free, clock.free[direction]) + args[0].nbytes / clock.rate
            clock.free[direction] = self.side.free
        return function(*args, **(kwargs or {}))


class TimedStream:
    """A side stream."""

    clock: Clock

    def __init__(self, device: torch.device, urgent: bool = False) -> None:
        self.device, self.free = device, 0.0

    def after_compute(self) -> Timed:
        return self.after(self.clock.now)

    def after(self, *events: float | None) -> Timed:
        self.free = max(self.free, *(event or 0.0 for event in events))
        return Timed(self)

    def run_after(self, work: Callable[[], None], *events: float | None) -> None:
        self.free = max(self.free, *(event or 0.0 for event in events))
        work()

    def synchronize(self) -> None: ...

    def record_event(self) -> float:
        return self.free


@contextmanager
def timed(patch: pytest.MonkeyPatch, rate: float) -> Iterator[Clock]:
    """Replaces streams and events of everything that is made inside the context.

    Args:
        patch: Undoes the replacements.
        rate: Bytes per second of copies in one direction.
    """
    clock = Clock(rate)
    make = streaming.host_buffer

    def host_buffer(num_bytes: int) -> Tensor:
        buffer = make(num_bytes)
        clock.hosts.add(buffer.untyped_storage().data_ptr())
        clock.host_bytes += num_bytes
        finalize(buffer.untyped_storage(), clock.freed, num_bytes)
        return buffer

    for module in (streaming, stack_module, adam_weights):
        patch.setattr(module, "host_buffer", host_buffer)
    patch.setattr(TimedStream, "clock", clock, raising=False)
    patch.setattr(streaming, "SideStream", TimedStream)
    patch.setattr(streaming, "compute_event", lambda _: clock.now)
    patch.setattr(streaming, "host_waits_for", lambda _: None)
    for module in (streaming, step_module):
        patch.setattr(module, "compute_waits_for", clock.waits_for)
    yield clock


def taking(seconds: float, clock: Clock, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose calls take some seconds of the compute stream."""

    def call(*arguments: Any) -> Any:
        clock.now += seconds
        return function(*arguments)

    return call
