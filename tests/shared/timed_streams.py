"""Gives the streams of a simulated GPU a clock on a CPU: all work runs at once, and is recorded to be timed later.

``timed`` replaces streaming.SideStream and the waits of the compute stream. ``Clock.times`` replays what was recorded,
as a GPU would: the work of a stream runs in order and waits for events, and each direction makes one copy at a time,
in its bytes divided by a rate. As on a GPU (benchmarks/LOG.md), a direction makes copies of one stream until that has
none ready. ``taking`` gives a function seconds of the compute stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cogvideox.memory import buffers, streaming
from cogvideox.optimizer import adam_groups, adam_weights
from cogvideox.planning import stack as stack_module

LATENCY = 1e-12  # seconds from an event to the work that waits for it; so this work is not ready at once


class Event:
    """What a stream records, and other streams wait for."""


class Kernel(NamedTuple):
    """Work of some seconds."""

    seconds: float


class Copy(NamedTuple):
    """A copy in a direction, with its number among all copies."""

    direction: str
    num_bytes: int
    number: int


class Wait(NamedTuple):
    """A wait for an event."""

    event: Event


@dataclass
class Stream:
    """The work of a stream in order; an Event among it is one that it records."""

    work: list[Kernel | Copy | Wait | Event] = field(default_factory=list)
    done: int = 0  # of the work, in a replay
    now: float = 0.0  # when it was done

    def record(self) -> Event:
        """Records an event."""
        event = Event()
        self.work.append(event)
        return event

    def wait(self, *events: Event | None) -> None:
        """Lets all later work wait for events."""
        self.work += [Wait(event) for event in events if event]

    def advance(self, times: dict[Event, float]) -> Copy | None:
        """Replays the work up to the next copy, which is returned, or to a wait for an event without a time."""
        while self.done < len(self.work):
            match self.work[self.done]:
                case Copy() as copy:
                    return copy
                case Wait(event):
                    if event not in times:
                        return None
                    self.now = max(self.now, times[event] + LATENCY)
                case Kernel(seconds):
                    self.now += seconds
                case Event() as event:
                    times[event] = self.now
            self.done += 1
        return None


@dataclass
class Clock:
    """All streams, of which the first one computes."""

    rate: float
    streams: list[Stream] = field(default_factory=lambda: [Stream()])
    hosts: set[int] = field(default_factory=set)  # addresses of host memory
    host_bytes: int = 0  # of all host memory that is allocated now
    copies: int = 0  # that were recorded

    @property
    def compute(self) -> Stream:
        return self.streams[0]

    def direction_of(self, target: Tensor) -> str:
        return "out" if target.untyped_storage().data_ptr() in self.hosts else "in"

    def freed(self, num_bytes: int) -> None:
        self.host_bytes -= num_bytes

    def times(self) -> dict[Event, float]:
        """Replays all work, once; returns when each event happened."""
        times: dict[Event, float] = {}
        free, last = {"in": 0.0, "out": 0.0}, dict.fromkeys(("in", "out"), self.compute)
        while copies := self._ready(times):
            ranks = []
            for stream, copy in copies:
                end = free[copy.direction]
                goes_on = stream is last[copy.direction] and stream.now <= end
                ranks.append((max(stream.now, end), not goes_on, stream.now, copy.number))
            (start, *_), (stream, copy) = min(zip(ranks, copies, strict=True))
            stream.now = free[copy.direction] = start + copy.num_bytes / self.rate
            last[copy.direction] = stream
            stream.done += 1
        return times

    def _ready(self, times: dict[Event, float]) -> list[tuple[Stream, Copy]]:
        """Replays everything but copies; returns the streams that have come to one."""
        known = -1
        while known < len(times):
            known = len(times)
            reached = [(stream, stream.advance(times)) for stream in self.streams]
        return [(stream, copy) for stream, copy in reached if copy]


class Timed(TorchFunctionMode):
    """Makes copies, and records them on a stream."""

    def __init__(self, side: TimedStream) -> None:
        super().__init__()
        self.side = side

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.copy_:
            clock = self.side.clock
            self.side.stream.work.append(Copy(clock.direction_of(args[0]), args[0].nbytes, clock.copies))
            clock.copies += 1
        return function(*args, **(kwargs or {}))


class TimedStream:
    """A side stream."""

    clock: Clock

    def __init__(self, device: torch.device, urgent: bool = False) -> None:
        self.device, self.stream = device, Stream()
        self.clock.streams.append(self.stream)

    def after_compute(self) -> Timed:
        return self.after(self.clock.compute.record())

    def after(self, *events: Event | None) -> Timed:
        self.stream.wait(*events)
        return Timed(self)

    def run_after(self, work: Callable[[], None], *events: Event | None) -> None:
        self.stream.wait(*events)
        work()

    def synchronize(self) -> None: ...

    def record_event(self) -> Event:
        return self.stream.record()


@contextmanager
def timed(patch: pytest.MonkeyPatch, rate: float) -> Iterator[Clock]:
    """Replaces streams and events of everything that is made inside the context.

    Args:
        patch: Undoes the replacements.
        rate: Bytes per second of copies in one direction.
    """
    clock = Clock(rate)
    make = buffers.host_buffer

    def host_buffer(num_bytes: int) -> Tensor:
        buffer = make(num_bytes)
        clock.hosts.add(buffer.untyped_storage().data_ptr())
        clock.host_bytes += num_bytes
        finalize(buffer.untyped_storage(), clock.freed, num_bytes)
        return buffer

    for module in (buffers, stack_module, adam_groups):
        patch.setattr(module, "host_buffer", host_buffer)
    patch.setattr(TimedStream, "clock", clock, raising=False)
    patch.setattr(streaming, "SideStream", TimedStream)
    patch.setattr(streaming, "compute_event", lambda _: clock.compute.record())
    patch.setattr(streaming, "host_waits_for", lambda _: None)
    for module in (streaming, adam_weights):
        patch.setattr(module, "compute_waits_for", clock.compute.wait)
    yield clock


def taking(seconds: float, clock: Clock, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose calls take some seconds of the compute stream."""

    def call(*arguments: Any) -> Any:
        clock.compute.work.append(Kernel(seconds))
        return function(*arguments)

    return call
