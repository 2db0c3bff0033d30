"""Simulates the side streams of a GPU on a CPU, and delays their copies as long as the waits in the code allow.

The work of the compute stream runs at once. If the code forgets to wait for a copy, the copy therefore comes too late,
or overwrites newer content, and the result of the test is wrong. Memory that is freed before its copy is reported.
``use(monkeypatch, seed)`` replaces streaming.SideStream; with a seed, copies are delayed at random.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cogvideox.memory import streaming
from cogvideox.optimizer import adam_weights


class Freed(AssertionError):
    """Memory was freed while a copy from it or to it was still pending."""


class Place(NamedTuple):
    """Refers to a tensor without keeping its memory alive."""

    storage: weakref.ref[Any]
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        storage = weakref.ref(tensor.untyped_storage())
        return cls(storage, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    def tensor(self) -> Tensor:
        storage = self.storage()
        if storage is None:
            raise Freed
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Recorded(TorchFunctionMode):
    """Records copies for a stream instead of making them."""

    def __init__(self, side: LateSideStream, events: tuple[Event | None, ...]) -> None:
        super().__init__()
        self.side, self.events = side, events

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.copy_:
            return function(*args, **(kwargs or {}))
        self.side.give(partial(copy, Place.of(args[0]), Place.of(args[1])), self.events)
        return args[0]


def copy(target: Place, source: Place) -> None:
    target.tensor().copy_(source.tensor())


class LateSideStream:
    """A side stream. The compute stream, in contrast, has always finished all of its work."""

    late: Callable[[], bool] = staticmethod(lambda: True)

    def __init__(self, device: torch.device, urgent: bool = False) -> None:
        self.device = device
        self.given: list[tuple[Callable[[], None], tuple[Event | None, ...]]] = []
        self.done = 0

    def after_compute(self) -> AbstractContextManager[Any]:
        return Recorded(self, ())

    def after(self, *events: Event | None) -> AbstractContextManager[Any]:
        self.give(done, events)  # the stream waits even if no copy follows
        return Recorded(self, events)

    def run_after(self, work: Callable[[], None], *events: Event | None) -> None:
        self.give(work, events)

    def give(self, work: Callable[[], None], events: tuple[Event | None, ...]) -> None:
        self.given.append((work, events))
        if not self.late():
            self.run(len(self.given))

    def run(self, count: int) -> None:
        """Runs the recorded work up to a position, unless it has already run."""
        while self.done < count:
            work, events = self.given[self.done]
            for event in events:
                reach(event)
            work()
            self.given[self.done] = (done, ())
            self.done += 1

    def synchronize(self) -> None:
        self.run(len(self.given))

    def record_event(self) -> Event:
        return self, len(self.given)


def done() -> None:
    """Replaces work that has run, because the work would keep memory alive."""


Event = tuple[LateSideStream, int]  # a stream, and the position in its recorded work


def reach(event: Event | None) -> None:
    """Runs the work that an event waits for. Computed work needs no wait, because it runs at once."""
    if event is not None:
        event[0].run(event[1])


def use(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    """Delays the copies of all side streams as long as possible or, with a seed, a random half of them."""
    draw = random.Random(seed)
    monkeypatch.setattr(LateSideStream, "late", staticmethod(lambda: seed is None or draw.random() < 0.5))
    monkeypatch.setattr(streaming, "SideStream", LateSideStream)
    for module in (streaming, adam_weights):
        monkeypatch.setattr(module, "compute_waits_for", reach)
