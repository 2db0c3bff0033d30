"""Tests benchmarks/slow_copies.py on a CPU, where buffers of the host are told by their addresses."""

from collections.abc import Callable
from typing import Any

import arms
import profiling
import pytest
import random_models
import slow_copies
import torch
from profiling import IN, OUT
from slow_copies import GB, SlowConnection, slowed
from tiny_benchmarks import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox.memory.buffers import pinned
from cogvideox.planning.probes import COPY_BYTES, seconds_per_call

CPU = torch.device("cpu")
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)


@pytest.fixture
def direction_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor], str | None]:
    """Takes memory mappings for the host and all other memory for the device, and returns the direction of a copy."""
    mappings: list[range] = []
    make = torch.frombuffer

    def mapped(*args: Any, **kwargs: Any) -> Tensor:
        buffer = make(*args, **kwargs)
        mappings.append(range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes))
        return buffer

    def is_host(tensor: Tensor) -> bool:
        return any(tensor.data_ptr() in mapping for mapping in mappings)

    def direction(target: Tensor, source: Tensor) -> str | None:
        return None if is_host(target) == is_host(source) else OUT if is_host(target) else IN

    monkeypatch.setattr(torch, "frombuffer", mapped)
    monkeypatch.setattr(slow_copies, "direction_of", direction)
    return direction


class Counted(TorchDispatchMode):
    """Counts the bytes of all asynchronous copies in each direction, however they are called."""

    def __init__(self, direction_of: Callable[[Tensor, Tensor], str | None]) -> None:
        super().__init__()
        self.direction_of = direction_of
        self.bytes = {IN: 0, OUT: 0}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in COPIES and args[2:] == (True,):
            targets, sources = ([item] if isinstance(item, Tensor) else item for item in args[:2])
            for target, source in zip(targets, sources, strict=True):
                if direction := self.direction_of(target, source):
                    self.bytes[direction] += source.nbytes
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rank", [16, 0])
def test_every_byte_of_training_is_slowed_once(
    rank: int, direction_of: Callable[[Tensor, Tensor], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(random_models.TRANSFORMERS, "5b", random_models.TRANSFORMERS["5b"] | TINY | {"num_layers": 6})
    monkeypatch.setattr(random_models, "clip_size", lambda kind: (9, 64, 96))
    monkeypatch.setattr(slow_copies, "full_rates", lambda device: {IN: 54 * GB, OUT: 30 * GB})
    monkeypatch.setattr(slow_copies, "LEAST", 1)
    training = arms.Training(arms.Work("5b", rank, 1, CPU), arms.PLAN_FLAGS["lean"])
    with slowed(12, CPU) as record, Counted(direction_of) as crossed:
        training.step(0, 2)
        training.step(1, 2)
    for name, slowdown in ((IN, 54 / 12), (OUT, 30 / 12)):
        copied = record["copied_bytes"][name]
        assert copied > 100_000
        assert crossed.bytes[name] == pytest.approx(slowdown * copied, abs=8)  # less than a number is still owed
    assert record["copy_rate"] == 12


def test_repetitions_carry_over_what_is_smaller_than_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_copies, "LEAST", 40)
    sizes: list[int] = []
    connection = SlowConnection(lambda target, source, _: sizes.append(source.nbytes) or target, {IN: 2.25, OUT: 0.5})
    small, large = torch.zeros(10), torch.zeros(100)
    connection.copied(small, small, IN)
    assert (sizes, connection.owed[IN]) == ([40], 10)
    connection.copied(large, large, IN)
    assert (sizes, connection.owed[IN]) == ([40, 400, 108], 2)  # 500 more bytes: one copy, and 27 of its numbers
    connection.copied(large.view(10, 10).T, large.view(10, 10).T, IN)
    assert (sizes[3:], connection.owed[IN]) == ([400], 102)  # a part of it is not one piece of memory
    connection.copied(large, large, OUT)
    assert (sizes[4:], connection.owed[OUT]) == ([], 0)  # the connection is slower than that anyway
    assert connection.counted == {IN: 840, OUT: 400}


def test_copies_keep_their_result_and_are_fast_again_at_the_end() -> None:
    original = torch.Tensor.copy_
    with slowed(12, CPU):
        assert torch.Tensor.copy_ is not original
        assert torch.equal(torch.zeros(3).copy_(torch.ones(3), non_blocking=True), torch.ones(3))
        assert torch.zeros(3).copy_(2.0).sum() == 6  # type: ignore[arg-type]
    assert torch.Tensor.copy_ is original
    with pytest.raises(ZeroDivisionError), slowed(12, CPU):
        _ = 1 / 0
    assert torch.Tensor.copy_ is original
    with slowed(None, CPU) as record:
        assert torch.Tensor.copy_ is original
    assert record == {}


@pytest.mark.gpu
@pytest.mark.timed
@pytest.mark.parametrize("name", [IN, OUT])
def test_copies_have_the_rate_that_was_asked_for(name: str) -> None:
    device = torch.device("cuda", 0)
    host, here = pinned(COPY_BYTES), torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target, source = (here, host) if name == IN else (host, here)
    with slowed(8, device):
        seconds = seconds_per_call(lambda: target.copy_(source, non_blocking=True))
    assert COPY_BYTES / seconds == pytest.approx(8 * GB, rel=0.1)


@pytest.mark.gpu
@pytest.mark.timed
def test_a_trace_has_the_copies_of_both_directions() -> None:
    host, here = pinned(COPY_BYTES), torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")

    def run() -> None:
        here.copy_(host, non_blocking=True)
        here.add_(1)
        host.copy_(here, non_blocking=True)

    summary = profiling.trace_of(run)
    assert summary["copied_gib"] == {name: pytest.approx(COPY_BYTES / 2**30, abs=1e-3) for name in (IN, OUT)}
    assert all(ms > 0 for ms in summary["busy_ms"].values())
