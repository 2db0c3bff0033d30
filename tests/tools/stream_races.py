"""Detects races between the streams of a GPU on a CPU, independent of timing.

All work runs at once, in the order in which the host issues it. In addition, each stream has a vector clock, which
events pass on to other streams, and each storage has a list of the accesses to its bytes with their times. If two
accesses touch the same bytes and one of them writes, they are a race unless the later stream waited for the earlier.
This holds for every stream, including the compute stream. As with torch's allocator, memory belongs to the stream that
allocated it. Another stream may touch it only after the work that its owner had been given when it was allocated, and
it may be freed only when its owner has waited for all other streams that touched it.

    with watched(monkeypatch):    replaces streaming.SideStream and its events; raises Race
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox.memory import buffers, streaming
from cogvideox.optimizer import adam_groups, adam_weights
from cogvideox.planning import stack

Event = dict[int, int]  # a vector clock: for each stream, the time up to which its work is known to be done
COMPUTE, HOST = range(2)  # the host has a clock too: work that it issues comes after everything that it waited for


class Race(AssertionError):
    """Two streams touched the same memory, and neither waited for the other."""


class Access(NamedTuple):
    """An access of a stream to bytes of a storage."""

    start: int
    end: int
    stream: int
    writes: bool


class Streams(TorchDispatchMode):
    """Records the work of each stream and its accesses to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.clocks: list[Event] = [{COMPUTE: 0}, {HOST: 0}]
        self.current = COMPUTE
        self.touched: dict[
            int, dict[Access, int]
        ] = {}  # for each storage, its accesses, each with the last time of its stream
        self.owners: dict[int, int] = {}  # for each storage, the stream that owns it
        self.freed: list[str] = []  # problems that were found where no exception can be raised

    def add(self) -> int:
        """Adds a stream, whose work comes after everything that the host has waited for."""
        number = len(self.clocks)
        self.clocks.append({number: 0})
        return number

    def mark(self, stream: int) -> Event:
        """Returns an event after the work that a stream has been given so far."""
        clock = self.clocks[stream]
        event = dict(clock)
        clock[stream] += 1
        return event

    def wait(self, stream: int, event: Event | None) -> None:
        """Makes a stream wait for an event."""
        for other, time in (event or {}).items():
            clock = self.clocks[stream]
            clock[other] = max(time, clock.get(other, -1))

    def host_waits(self, event: Event | None) -> None:
        """Makes the host wait for an event. All work that it issues later comes after the event."""
        for stream in range(len(self.clocks)):
            self.wait(stream, event)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Gives the work that is issued within the context to a stream."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        schema = function._schema
        if any(r.alias_info and not r.alias_info.is_write for r in schema.returns):  # a view touches no memory
            return found
        for number, argument in enumerate(schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in(value):
                self.touch(tensor, bool(argument.alias_info and argument.alias_info.is_write))
        for tensor in tensors_in(found):
            self.touch(tensor, writes=True)
        return found

    def touch(self, tensor: Tensor, writes: bool) -> None:
        """Records an access by the current stream.

        Raises:
            Race: The stream did not wait for an earlier access.
        """
        if not tensor.numel() or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.touched:
            self.touched[key], self.owners[key] = {}, self.current
            finalize(storage, self.free, key).atexit = False
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        start = int(tensor.storage_offset()) * tensor.element_size()
        stream, clock = self.current, self.clocks[self.current]
        now = Access(start, start + span * tensor.element_size(), stream, writes)
        for other, time in self.touched[key].items():
            overlaps = other.start < now.end and now.start < other.end
            if overlaps and (writes or other.writes) and clock.get(other.stream, -1) < time:
                raise Race(f"stream {stream} did not wait for stream {other.stream}")
        self.touched[key][now] = clock[stream]

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Returns host memory that is freed as soon as the last reference is gone."""
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        self.owners[buffer.untyped_storage()._cdata] = HOST
        return buffer

    def free(self, key: int) -> None:
        """Records that memory was freed and returns to its owner."""
        owner = self.owners.pop(key)
        clock = self.clocks[owner]
        for other, time in self.touched.pop(key).items():
            if clock.get(other.stream, -1) < time:
                self.freed.append(f"stream {owner} gets back memory that stream {other.stream} still uses")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Returns the tensors in an argument or a result, which may be a tensor or a list of tensors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """Watches all streams that are created within the context."""
    streams = Streams()

    class SideStream(streaming.SideStream):
        def __init__(self, device: torch.device, urgent: bool = False) -> None:
            super().__init__(device)
            self.number = streams.add()

        def after(self, *events: Any) -> AbstractContextManager[Any]:
            for event in events:
                streams.wait(self.number, event)
            return streams.on(self.number)

        def synchronize(self) -> None:
            streams.host_waits(self.record_event())

        def record_event(self) -> Any:
            return streams.mark(self.number)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "SideStream", SideStream)
        for module in (buffers, adam_groups, stack):
            patch.setattr(module, "host_buffer", streams.host_buffer)
        patch.setattr(streaming, "compute_event", lambda device: streams.mark(COMPUTE))
        patch.setattr(streaming, "host_waits_for", streams.host_waits)
        for module in (streaming, adam_weights):
            patch.setattr(module, "compute_waits_for", lambda event: streams.wait(COMPUTE, event))
        with streams:
            yield streams
    if streams.freed:
        raise Race(streams.freed[0])
