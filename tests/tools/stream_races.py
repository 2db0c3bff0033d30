"""Which stream of a GPU touches memory without having waited for another, found on a CPU without any timing.

Everything runs at once, in the order in which the host asks for it. Beside that, each stream has a vector clock, which
events carry from one to another, and each storage has the list of who read and wrote which of its bytes, and when. Two
accesses of which one writes are a race unless the later one's stream waited for the earlier. That is so for compute as
for any other stream: whether it would be late or early does not matter. As with torch's allocator, memory belongs to
the stream that asked for it: another may touch it only after what that had been given by then, and it may be let go
only when its owner waited for all others.

    with watched(monkeypatch):    puts this in place of streaming.SideStream and of its events; raises Race
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

from cogvideox.memory import streaming
from cogvideox.optimizer import master_weights
from cogvideox.optimizer import step as step_module
from cogvideox.planning import stack

Event = dict[int, int]  # of each stream, how much has happened; what has not waited for anything knows nothing
COMPUTE, HOST = range(2)  # the host waits only where it says so; what it asks for then comes later on every stream


class Race(AssertionError):
    """Two streams touch the same memory, and neither waited for the other."""


class Access(NamedTuple):
    """Of bytes of a storage, by a stream."""

    start: int
    end: int
    stream: int
    writes: bool


class Streams(TorchDispatchMode):
    """What has happened on each stream, and what memory was touched."""

    def __init__(self) -> None:
        super().__init__()
        self.clocks: list[Event] = [{COMPUTE: 0}, {HOST: 0}]
        self.current = COMPUTE
        self.touched: dict[int, dict[Access, int]] = {}  # by storage: the last time of its stream's clock
        self.owners: dict[int, int] = {}  # of each storage the stream that it goes back to
        self.freed: list[str] = []  # what went wrong where no exception can be raised

    def add(self) -> int:
        """Another stream, which the host asks for after all that it has waited for."""
        number = len(self.clocks)
        self.clocks.append({number: 0})
        return number

    def mark(self, stream: int) -> Event:
        """An event after what a stream was given so far."""
        clock = self.clocks[stream]
        event = dict(clock)
        clock[stream] += 1
        return event

    def wait(self, stream: int, event: Event | None) -> None:
        """A stream goes on after an event."""
        for other, time in (event or {}).items():
            clock = self.clocks[stream]
            clock[other] = max(time, clock.get(other, -1))

    def host_waits(self, event: Event | None) -> None:
        """The host does: all that it asks for from now on comes later."""
        for stream in range(len(self.clocks)):
            self.wait(stream, event)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """What is asked for in this block is given to a stream."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        schema = function._schema
        if any(r.alias_info and not r.alias_info.is_write for r in schema.returns):  # a view: nothing is touched
            return found
        for number, argument in enumerate(schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in(value):
                self.touch(tensor, bool(argument.alias_info and argument.alias_info.is_write))
        for tensor in tensors_in(found):
            self.touch(tensor, writes=True)
        return found

    def touch(self, tensor: Tensor, writes: bool) -> None:
        """Notes an access by the current stream.

        Raises:
            Race: it did not wait for an earlier one.
        """
        if not tensor.numel() or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.touched:
            self.touched[key], self.owners[key] = {}, self.current
            finalize(storage, self.free, key).atexit = False
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.storage_offset() * tensor.element_size()
        stream, clock = self.current, self.clocks[self.current]
        now = Access(start, start + span * tensor.element_size(), stream, writes)
        for other, time in self.touched[key].items():
            overlaps = other.start < now.end and now.start < other.end
            if overlaps and (writes or other.writes) and clock.get(other.stream, -1) < time:
                raise Race(f"stream {stream} did not wait for stream {other.stream}")
        self.touched[key][now] = clock[stream]

    def pinned(self, num_bytes: int) -> Tensor:
        """Memory of the host, which is gone as soon as it is let go."""
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        self.owners[buffer.untyped_storage()._cdata] = HOST
        return buffer

    def free(self, key: int) -> None:
        """Memory is let go: its owner gets it again."""
        owner = self.owners.pop(key)
        clock = self.clocks[owner]
        for other, time in self.touched.pop(key).items():
            if clock.get(other.stream, -1) < time:
                self.freed.append(f"stream {owner} gets back memory that stream {other.stream} still uses")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument or a result: one, a list of them, or none."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """Watches all streams that are made in this block."""
    streams = Streams()

    class SideStream(streaming.SideStream):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.number = streams.add()

        def after(self, *events: Any) -> AbstractContextManager[Any]:
            for event in events:
                streams.wait(self.number, event)
            return streams.on(self.number)

        def synchronize(self) -> None:
            streams.host_waits(self.record_event())

        def record_event(self) -> Event:
            return streams.mark(self.number)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "SideStream", SideStream)
        for module in (streaming, master_weights, stack):
            patch.setattr(module, "pinned", streams.pinned)
        patch.setattr(streaming, "compute_event", lambda device: streams.mark(COMPUTE))
        patch.setattr(streaming, "host_waits_for", streams.host_waits)
        for module in (streaming, step_module):
            patch.setattr(module, "compute_waits_for", lambda event: streams.wait(COMPUTE, event))
        with streams:
            yield streams
    if streams.freed:
        raise Race(streams.freed[0])
