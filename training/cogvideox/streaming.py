"""Tensors that live in host memory and pass through the device when they are needed, without anybody waiting.

Ring: the frozen weights of blocks, one flat pinned buffer a block, copied ahead of use into a few slots of the device.
HostStore: what forward keeps for backward, sent to the host and brought back one such block ahead.
Conveyor: buffers that the device changes, one after another: in, worked on, and out again.
Copies run on streams of their own; events order them against the compute stream, and the host never waits for the
device. Without a GPU the same code copies at once.
"""

import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes; kernels read 16 at once, and one layout serves host and device
SLOTS = 3  # one in use, one arriving, one that was used last and is needed first when the direction turns
ADVICE = ("MADV_DONTFORK", "MADV_HUGEPAGE")  # the second: fewer pages to make and to register
IN_FLIGHT = 2  # blocks whose kept tensors may be on their way to the host


# -- flat buffers ------------------------------------------------------------------------------------------------------


def pinned(num_bytes: int) -> Tensor:
    """Host memory that the device copies from and to by itself; plain memory without a GPU.

    torch's own pinned allocator rounds up to powers of two, which costs gigabytes here; so plain memory is registered.
    It is a mapping of its own, which processes that load data do not inherit: a fork copies pinned pages at once.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(1, num_bytes), flags=flags)  # whole pages: no two buffers share one
    for name in ADVICE:
        with suppress(AttributeError, OSError):  # a system or a kernel that does not know it
            memory.madvise(getattr(mmap, name))
    buffer = torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]
    buffer.zero_()  # written, so that it is there
    if torch.cuda.is_available():
        runtime: Any = torch.cuda.cudart()
        status = runtime.cudaHostRegister(buffer.data_ptr(), num_bytes, 0)
        if int(status) != 0:
            raise MemoryError(f"the system does not let {num_bytes / 2**30:.1f} GiB more be pinned (CUDA: {status})")
        # when the memory is freed, or the driver would refuse the next buffer there; copies must have ended by then
        finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer


class Layout:
    """Where tensors of given shapes and types lie in one flat buffer of bytes."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.entries: list[tuple[int, int, torch.Size, torch.dtype]] = []
        self.num_bytes = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            self.entries.append((self.num_bytes, size, tensor.shape, tensor.dtype))
            self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer."""
        return [buffer[start : start + size].view(dtype).view(shape) for start, size, shape, dtype in self.entries]


# -- streams -----------------------------------------------------------------------------------------------------------


class Side:
    """A stream beside the compute stream; without a GPU nothing at all."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_compute(self, *others: "Side") -> AbstractContextManager[Any]:
        """Work in this block follows what the compute stream, and others, were given so far."""
        if self.stream is None:
            return nullcontext()
        for stream in (torch.cuda.current_stream(), *(other.stream for other in others)):
            self.stream.wait_stream(stream)
        return torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """The host waits for all that this stream was given so far."""
        if self.stream is not None:
            self.stream.synchronize()

    def mark(self) -> Any:
        """An event after what this stream was given so far."""
        return self.stream.record_event() if self.stream is not None else None


def compute_waits_for(event: Any) -> None:
    """The compute stream goes on after an event."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


# -- weights -----------------------------------------------------------------------------------------------------------


class Ring:
    """Slots of the device for blocks that live on the host.

    Args:
        hosts: the flat host buffer of each block by its number, all of one size.
        slots: on the device; 2 are enough where the direction never turns.
    """

    def __init__(self, hosts: dict[int, Tensor], device: torch.device, slots: int = SLOTS) -> None:
        self.hosts = hosts
        self.side = Side(device)
        size = max(host.numel() for host in hosts.values())
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(slots, len(hosts)))]
        self.holds: OrderedDict[int, int] = OrderedDict()  # block -> slot, the one used longest ago first
        self.arrived: dict[int, Any] = {}  # by block

    def get(self, block: int) -> int:
        """The slot that has a block's weights for what the compute stream gets next."""
        self.fetch(block)
        self.holds.move_to_end(block)
        compute_waits_for(self.arrived[block])
        return self.holds[block]

    def fetch(self, block: int) -> None:
        """Starts the copy of a block, unless it is there: over the one used longest ago."""
        if block in self.holds:
            return
        if len(self.holds) < len(self.slots):
            slot = len(self.holds)
        else:
            last, slot = self.holds.popitem(last=False)
            del self.arrived[last]
        with self.side.after_compute():  # the last use of the slot
            self.copy(self.slots[slot], self.hosts[block])
        self.arrived[block] = self.side.mark()
        self.holds[block] = slot

    def copy(self, slot: Tensor, host: Tensor) -> None:
        """One copy, on the current stream."""
        slot.copy_(host, non_blocking=True)

    def after(self, block: int, step: int) -> int | None:
        """The next block of the ring in a direction, 1 or -1."""
        ahead = [other for other in self.hosts if (other - block) * step > 0]
        return min(ahead, key=lambda other: abs(other - block), default=None)


# -- what forward keeps ------------------------------------------------------------------------------------------------


class HostStore:
    """Named tensors of each block, on the host between forward and backward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = Side(device), Side(device)
        self.buffers: dict[int, Tensor] = {}
        self.layouts: dict[int, tuple[tuple[str, ...], Layout]] = {}
        self.leaving: OrderedDict[int, tuple[dict[str, Tensor], Any]] = OrderedDict()
        self.arriving: dict[int, tuple[dict[str, Tensor], Any]] = {}

    def put(self, block: int, kept: dict[str, Tensor]) -> None:
        """Starts the copy to the host. The tensors stay on the device until two more blocks were put.

        Raises:
            RuntimeError: what is there was not taken: two forward passes came before a backward pass.
        """
        if block in self.layouts:
            raise RuntimeError(f"block {block}: what an earlier forward pass kept was not used yet")
        layout = Layout(list(kept.values()))
        self.layouts[block] = tuple(kept), layout
        self._make_room(block, layout.num_bytes)
        with self.out.after_compute():
            for host, tensor in zip(layout.views(self.buffers[block]), kept.values(), strict=True):
                host.copy_(tensor, non_blocking=True)
        self.leaving[block] = kept, self.out.mark()
        if len(self.leaving) > IN_FLIGHT:
            _, (_, event) = self.leaving.popitem(last=False)
            compute_waits_for(event)  # so that its memory may be given to what is computed next

    def _make_room(self, block: int, num_bytes: int) -> None:
        """A host buffer for a block, of so many bytes at least."""
        if block in self.buffers and self.buffers[block].numel() >= num_bytes:
            return
        if block in self.buffers:  # a larger bucket than before: the last step's copies may not have ended yet
            self.out.wait()
            self.back.wait()
            del self.buffers[block]
        self.buffers[block] = pinned(num_bytes)

    def fetch(self, block: int) -> None:
        """Starts bringing a block's tensors back, unless they are still there."""
        if block in self.leaving or block in self.arriving or block not in self.layouts:
            return
        names, layout = self.layouts[block]
        hosts = layout.views(self.buffers[block])
        kept = {n: torch.empty_like(h, device=self.device) for n, h in zip(names, hosts, strict=True)}
        with self.back.after_compute():  # their memory may still be in use by what was computed before
            for tensor, host in zip(kept.values(), hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
        self.arriving[block] = kept, self.back.mark()

    def fetch_next(self) -> None:
        """``fetch`` of the block that a backward pass takes next, the last one put, if any are left."""
        if self.layouts:
            self.fetch(next(reversed(self.layouts)))

    def take(self, block: int) -> dict[str, Tensor]:
        """A block's tensors, once, for what the compute stream gets next."""
        self.fetch(block)
        del self.layouts[block]
        kept, event = self.leaving.pop(block) if block in self.leaving else self.arriving.pop(block)
        compute_waits_for(event)
        return kept


# -- what the device changes -------------------------------------------------------------------------------------------


class Conveyor:
    """Host buffers that pass through two slots of the device one after another.

    While one is worked on, the next comes in and the last goes out. The slots are there only during a pass.
    """

    def __init__(self, hosts: Sequence[Tensor], device: torch.device) -> None:
        self.hosts, self.device = hosts, device
        self.into, self.out = Side(device), Side(device)

    def passes(self) -> Iterator[tuple[int, Tensor]]:
        """(number, slot that has this buffer) until the next is asked for; the slot is then copied to the host.

        Afterwards the compute stream is behind all copies: what it does next, or who waits for it, finds all written.
        """
        size = max(host.numel() for host in self.hosts)
        slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in self.hosts[:2]]
        self._fetch(slots[0], self.hosts[0])
        for number, host in enumerate(self.hosts):
            slot = slots[number % 2]
            compute_waits_for(self.into.mark())
            if number + 1 < len(self.hosts):
                self._fetch(slots[(number + 1) % 2], self.hosts[number + 1])
            yield number, slot
            with self.out.after_compute():
                host.copy_(slot[: host.numel()], non_blocking=True)
        compute_waits_for(self.out.mark())

    def _fetch(self, slot: Tensor, host: Tensor) -> None:
        """Starts the copy of a buffer over the one before the last, once that is out."""
        with self.into.after_compute(self.out):
            slot[: host.numel()].copy_(host, non_blocking=True)

    def wait(self) -> None:
        """Waits for the device: then the host may read and write the buffers."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
