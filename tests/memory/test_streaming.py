"""Tests streaming.py: weights and activations have the right values at the right time, in few slots."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from mmap import PAGESIZE
from pathlib import Path

import pytest
import stream_races
import torch

from cogvideox.memory import streaming
from cogvideox.memory.buffers import Layout, pinned
from cogvideox.memory.streaming import IN_FLIGHT, WEIGHT_SLOTS, HostStore, Ring

CPU = torch.device("cpu")


def ring_of(count: int) -> tuple[Ring, list[int]]:
    """Returns a ring whose block i has i in every byte, and the list of blocks that it has copied so far."""
    ring = Ring({i: torch.full((512,), i, dtype=torch.uint8) for i in range(count)}, CPU)
    copied: list[int] = []
    copy = ring.copy

    def counting(slot: torch.Tensor, host: torch.Tensor) -> None:
        copied.append(int(host[0]))
        copy(slot, host)

    ring.copy = counting  # type: ignore[method-assign]
    return ring, copied


def use(ring: Ring, block: int, step: int) -> None:
    """Uses a block as a Stack does: gets it, and fetches the next one ahead."""
    ahead = ring.next_block(block, step)
    slot = ring.get(block)
    if ahead is not None:
        ring.fetch(ahead)
    assert (ring.slots[slot] == block).all()  # the copy ahead did not replace it


def test_a_step_copies_each_block_twice_except_the_last_ones() -> None:
    ring, copied = ring_of(8)
    assert len(ring.slots) == WEIGHT_SLOTS
    for block in range(8):
        use(ring, block, 1)
    for block in reversed(range(8)):
        use(ring, block, -1)
    assert copied == [0, 1, 2, 3, 4, 5, 6, 7, 4, 3, 2, 1, 0]
    copied.clear()
    for block in range(8):
        use(ring, block, 1)
    assert copied == [3, 4, 5, 6, 7]


def test_the_next_block_skips_resident_ones() -> None:
    ring = Ring({i: torch.zeros(256, dtype=torch.uint8) for i in (1, 4, 7)}, CPU)
    assert [ring.next_block(i, 1) for i in range(9)] == [1, 4, 4, 4, 7, 7, 7, None, None]
    assert [ring.next_block(i, -1) for i in range(9)] == [None, None, 1, 1, 1, 4, 4, 4, 7]


def test_a_layout_is_aligned_and_gives_views() -> None:
    tensors = [torch.arange(5.0), torch.arange(3, dtype=torch.bfloat16), torch.ones(2, 3)]
    layout = Layout(tensors)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for view, tensor in zip(layout.views(buffer), tensors, strict=True):
        assert view.data_ptr() % 256 == buffer.data_ptr() % 256
        view.copy_(tensor)
    assert all(view.equal(tensor) for view, tensor in zip(layout.views(buffer), tensors, strict=True))


def test_a_fork_does_not_copy_pinned_memory() -> None:
    """A fork copies pinned pages at once, so the worker processes that load data must not inherit them."""
    buffer = pinned(3 * PAGESIZE + 5)
    assert buffer.data_ptr() % PAGESIZE == 0
    assert int(buffer.sum()) == 0
    child = os.fork()
    if not child:
        ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        there = any(int(start, 16) <= buffer.data_ptr() < int(end, 16) for start, end in ranges)
        os._exit(int(there))
    assert os.waitpid(child, 0)[1] == 0
    storage = weakref.ref(buffer.untyped_storage())
    view = buffer[7:]
    del buffer
    assert storage() is not None
    del view
    assert storage() is None


def test_a_host_buffer_is_freed_only_after_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies on a CPU end at once, so the test checks that the host waits for both streams while the buffer exists."""
    store = HostStore(CPU)
    store.put(0, {"x": torch.zeros(4)})
    store.take(0)
    buffer, waited = weakref.ref(store.buffers[0].untyped_storage()), []
    for side in (store.out, store.back):
        monkeypatch.setattr(side, "synchronize", lambda: waited.append(buffer() is not None))
    store.put(0, {"x": torch.zeros(3)})
    assert waited == []
    store.take(0)
    store.put(0, {"x": torch.zeros(4096)})
    assert waited == [True, True]
    assert buffer() is None


def larger_while_compute_reads(store: HostStore) -> None:
    """Puts tensors of a larger bucket while the optimizer's pass may still read the host buffer of the last one."""
    store.put(0, {"x": torch.zeros(4)})
    store.take(0)
    store.buffers[0].sum()
    store.put(0, {"x": torch.zeros(4096)})


def given_up(store: HostStore) -> None:
    """Drops a step while its copies are in progress."""
    for block in range(4):
        store.put(block, {"x": torch.zeros(4)})
    store.fetch(1)
    store.clear()
    torch.zeros(4)


@pytest.mark.parametrize("left_out", [None, "host_waits_for", "compute_waits_for"])
def test_memory_is_freed_only_after_its_last_use(left_out: str | None) -> None:
    def races(use: Callable[[HostStore], None]) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            try:
                with stream_races.watched(patch):
                    if left_out:
                        patch.setattr(streaming, left_out, lambda event: None)
                    store = HostStore(
                        CPU
                    )  # It outlives ``watched``, so its buffers are still in use when the races are reported.
                    use(store)
            except stream_races.Race:
                return True
        return False

    assert races(larger_while_compute_reads) is (left_out is not None)
    assert races(given_up) is (left_out == "compute_waits_for")


def test_saved_tensors_of_any_shape_are_returned() -> None:
    store = HostStore(CPU)
    for size in (4, 9, 2):  # larger and smaller than the existing buffers
        kept = [{"x": torch.full((size,), float(block)), "o": torch.arange(size)} for block in range(5)]
        for block, tensors in enumerate(kept):
            store.put(block, dict(tensors))
        assert len(store.leaving) == IN_FLIGHT
        for block in reversed(range(5)):
            store.fetch(block - 1)
            taken = store.take(block)
            assert taken.keys() == kept[block].keys()
            assert all(taken[name].equal(kept[block][name]) for name in taken)
        assert not store.arriving
        assert not store.leaving


def test_tensors_that_were_not_taken_are_not_overwritten() -> None:
    store = HostStore(CPU)
    store.put(0, {"x": torch.ones(3)})
    with pytest.raises(RuntimeError, match="block 0: tensors saved by an earlier forward pass"):
        store.put(0, {"x": torch.zeros(3)})
