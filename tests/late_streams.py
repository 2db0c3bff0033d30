"""Side streams of a GPU, simulated on a CPU: copies happen as late as what waits for them allows, or at random.

What is computed happens at once, so a copy that nobody waited for is seen too late, or over what came after it; and
memory that was let go before its copy is told of. use(monkeypatch, seed) puts them in place of streaming.Side.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cogvideox import optim, streaming


class Freed(AssertionError):
    """Memory was let go while a copy from it or to it was to come."""


class Place(NamedTuple):
    """A tensor, without keeping its memory."""

    storage: weakref.ref[Any]
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        storage = weakref.ref(tensor.untyped_storage())
        return cls(storage, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def tensor(self) -> Tensor:
        storage = self.storage()
        if storage is None:
            raise Freed
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Recorded(TorchFunctionMode):
    """Copies are given to a stream instead of made."""

    def __init__(self, side: LateSide, events: tuple[Event | None, ...]) -> None:
        super().__init__()
        self.side, self.events = side, events

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.copy_:
            return function(*args, **(kwargs or {}))
        self.side.copies.append((Place.of(args[0]), Place.of(args[1]), self.events))
        if not self.side.late():
            self.side.run(len(self.side.copies))
        return args[0]


class LateSide:
    """A stream beside the compute stream, which is done with all that it was given."""

    late: Callable[[], bool] = staticmethod(lambda: True)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: list[tuple[Place, Place, tuple[Event | None, ...]]] = []
        self.done = 0

    def after_compute(self) -> AbstractContextManager[Any]:
        return Recorded(self, ())

    def after(self, *events: Event | None) -> AbstractContextManager[Any]:
        return Recorded(self, events)

    def computing(self, event: Event | None) -> AbstractContextManager[Any]:
        reach(event)
        return nullcontext()

    def run(self, count: int) -> None:
        """Makes the first so many copies, if they are not made yet."""
        while self.done < count:
            target, source, events = self.copies[self.done]
            for event in events:
                reach(event)
            target.tensor().copy_(source.tensor())
            self.done += 1

    def wait(self) -> None:
        self.run(len(self.copies))

    def mark(self) -> Event:
        return self, len(self.copies)


Event = tuple[LateSide, int]  # a stream, and how many of its copies have been made


def reach(event: Event | None) -> None:
    """Makes the copies of an event; of what is computed there are none to wait for."""
    if event is not None:
        event[0].run(event[1])


def use(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    """From now on streams are late: as late as they can be, or half of their copies, at random."""
    draw = random.Random(seed)
    monkeypatch.setattr(LateSide, "late", staticmethod(lambda: seed is None or draw.random() < 0.5))
    monkeypatch.setattr(streaming, "Side", LateSide)
    for module in (streaming, optim):
        monkeypatch.setattr(module, "compute_waits_for", reach)
