"""Tensors that live in host memory and pass through the device when they are needed, without anybody waiting.

Ring: the weights of blocks, one flat pinned buffer a block, copied ahead of use into a few slots of the device.
HostStore: what forward keeps for backward, sent to the host and brought back one such block ahead.
HostTrainedBlocks: blocks that are trained on the host: their weights, and the sums of their gradients.
TransferPipeline: host memory that the device changes, a load after the other: in, worked on, and out again.
Copies run on streams of their own; events order them against the compute stream, and the host never waits for the
device. Without a GPU the same code copies at once.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property, partial
from itertools import accumulate, islice
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch.nn import Parameter

ALIGNMENT = 256  # numbers, and so bytes at least; kernels read 16 at once, and one layout serves host and device
WEIGHT_SLOTS = 3  # one in use, one arriving, one that was used last and is needed first when the direction turns
ADVICE = ("MADV_DONTFORK", "MADV_HUGEPAGE")  # the second: fewer pages to make and to register
IN_FLIGHT = 2  # blocks whose kept tensors may be on their way to the host
TRANSFER_SLOTS = 3  # of a TransferPipeline: one comes, one is worked on, one leaves


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
    """Where tensors of given shapes and types lie in one flat buffer of bytes.

    If all are of one type, the same shapes of another begin at the same numbers.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.entries: list[tuple[int, int, torch.Size, torch.dtype]] = []
        self.num_bytes = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            self.entries.append((self.num_bytes, size, tensor.shape, tensor.dtype))
            self.num_bytes += aligned(tensor.numel()) * tensor.element_size()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer."""
        memory = buffer.view(torch.uint8)
        return [memory[start : start + size].view(dtype).view(shape) for start, size, shape, dtype in self.entries]

    def flat(self, buffer: Tensor) -> Tensor:
        """All numbers in a buffer, those between the tensors too, which mean nothing; of tensors of one type."""
        return buffer[: self.num_bytes].view(self._dtype)

    @property
    def numbers(self) -> int:
        """How many these are."""
        return self.num_bytes // self._dtype.itemsize

    @cached_property
    def starts(self) -> list[int]:
        """The number that each tensor begins with."""
        return [start // self._dtype.itemsize for start, *_ in self.entries]

    @cached_property
    def _dtype(self) -> torch.dtype:
        (dtype,) = {dtype for *_, dtype in self.entries}
        return dtype


def aligned(size: int) -> int:
    """After how many numbers, or bytes, the next tensor begins."""
    return -(-size // ALIGNMENT) * ALIGNMENT


# -- streams -----------------------------------------------------------------------------------------------------------


class SideStream:
    """A stream beside the compute stream; without a GPU nothing at all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_compute(self) -> AbstractContextManager[Any]:
        """Copies in this block follow what the compute stream was given so far."""
        return self.after(computed(self.device))

    def after(self, *events: Any) -> AbstractContextManager[Any]:
        """Copies in this block follow events."""
        if self.stream is None:
            return nullcontext()
        for event in filter(None, events):
            self.stream.wait_event(event)
        return torch.cuda.stream(self.stream)

    def does(self, work: Callable[[], None], event: Any) -> None:
        """Work that is not only copies follows an event."""
        with self.after(event):
            work()

    def wait(self) -> None:
        """The host waits for all that this stream was given so far."""
        if self.stream is not None:
            self.stream.synchronize()

    def mark(self) -> Any:
        """An event after what this stream was given so far."""
        return self.stream.record_event() if self.stream is not None else None


def computed(device: torch.device) -> Any:
    """An event after what the compute stream was given so far."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def compute_waits_for(event: Any) -> None:
    """The compute stream goes on after an event."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def host_waits_for(event: Any) -> None:
    """The host goes on after an event."""
    if event is not None:
        event.synchronize()


# -- weights -----------------------------------------------------------------------------------------------------------


class Ring:
    """Slots of the device for blocks that live on the host.

    Args:
        hosts: the flat host buffer of each block by its number, all of one size.
        slots: on the device; 2 are enough where the direction never turns.
    """

    def __init__(self, hosts: dict[int, Tensor], device: torch.device, slots: int = WEIGHT_SLOTS) -> None:
        self.hosts = hosts
        self.written: dict[int, Callable[[], Any]] = {}  # the event after which a changed block may be read
        self.side = SideStream(device)
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
        written = self.written[block]() if block in self.written else None
        with self.side.after(computed(self.side.device), written):  # the first: the last use of the slot
            self.copy(self.slots[slot], self.hosts[block])
        self.arrived[block] = self.side.mark()
        self.holds[block] = slot

    def copy(self, slot: Tensor, host: Tensor) -> None:
        """One copy, on the current stream."""
        slot.copy_(host, non_blocking=True)

    def forget(self) -> None:
        """What the slots have is out of date."""
        self.holds.clear()
        self.arrived.clear()

    def after(self, block: int, step: int) -> int | None:
        """The next block of the ring in a direction, 1 or -1."""
        ahead = [other for other in self.hosts if (other - block) * step > 0]
        return min(ahead, key=lambda other: abs(other - block), default=None)


# -- what forward keeps ------------------------------------------------------------------------------------------------


class HostStore:
    """Named tensors of each block, on the host between forward and backward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = SideStream(device), SideStream(device)
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
            host_waits_for(computed(self.device))  # which is behind the optimizer's pass over gradients
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

    def clear(self) -> None:
        """Forgets all that was put and not taken; buffers stay."""
        for _, event in (*self.leaving.values(), *self.arriving.values()):
            compute_waits_for(event)  # their memory may be given to what is computed next
        for held in (self.layouts, self.leaving, self.arriving):
            held.clear()

    def take(self, block: int) -> dict[str, Tensor]:
        """A block's tensors, once, for what the compute stream gets next."""
        self.fetch(block)
        del self.layouts[block]
        kept, event = self.leaving.pop(block) if block in self.leaving else self.arriving.pop(block)
        compute_waits_for(event)
        return kept


# -- what is trained ---------------------------------------------------------------------------------------------------


class HostGradients:
    """Gradients of blocks, on the host: of each the sum over the backward passes of a step, with its norms."""

    def __init__(self, device: torch.device) -> None:
        self.store = HostStore(device)
        self.norms: dict[int, list[Tensor]] = {}

    def add(self, block: int, gradients: list[Tensor]) -> None:
        """Adds a block's gradients, of the type that they have; a sum of several is in fp32."""
        if block in self.norms:
            earlier = self.store.take(block).values()
            gradients = [one.float() + other for one, other in zip(earlier, gradients, strict=True)]
            if following := [other for other in self.norms if other < block]:
                self.store.fetch(max(following))  # a backward pass goes from the last block to the first
        self.store.put(block, {str(k): gradient for k, gradient in enumerate(gradients)})
        self.norms[block] = norms_of(gradients)

    def settle(self) -> None:
        """What the compute stream gets next finds all sums on the host, and their memory free."""
        compute_waits_for(self.store.out.mark())
        self.store.leaving.clear()

    def flat(self, block: int) -> Tensor:
        """All numbers of a block's gradients, where they lie."""
        return self.store.layouts[block][1].flat(self.store.buffers[block])

    def clear(self) -> None:
        """Begins a step."""
        self.store.clear()
        self.norms.clear()


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each, fp32: the same wherever they lie; of several at once, as fast as a kernel can read."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return list(torch._foreach_norm(list(gradients)))
    return [torch._foreach_norm([gradient.float()])[0] for gradient in gradients]


class HostTrainedBlocks:
    """Blocks that are trained while they live on the host.

    Args:
        parameters: of each block by its number, in the order of the layout; views of its buffer in the ring.
        device_state_blocks: the blocks that have masters and moments on the device all the same.
    """

    def __init__(
        self, parameters: dict[int, list[Parameter]], ring: Ring, layout: Layout, device_state_blocks: frozenset[int]
    ) -> None:
        self.parameters, self.ring, self.layout, self.device_state_blocks = (
            parameters,
            ring,
            layout,
            device_state_blocks,
        )
        self.gradients = HostGradients(ring.side.device)

    def flat(self, block: int) -> Tensor:
        """All numbers of a block's weights, where they lie."""
        return self.layout.flat(self.ring.hosts[block])

    def changed(self, block: int, event: Callable[[], Any]) -> None:
        """They are others after an event, which who reads them asks for."""
        self.ring.written[block] = event


# -- what the device changes -------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """Some of what a TransferPipeline carries at a time."""

    home: Tensor  # its numbers on the host, in a row
    comes: bool = True
    leaves: bool = True


class Transfer(NamedTuple):
    """What a TransferPipeline carries at a time, and what is done with it on the device."""

    parts: Sequence[Slice]
    work: Callable[[list[Tensor]], None]


class TransferPipeline:
    """Host memory that passes through a few slots of the device, a load after the other, beside the compute stream.

    While one is worked on, the next comes in and the last goes out. A pass goes as far as somebody asks for: what needs
    its first loads runs beside the others. The slots are there until ``finish``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.into, self.work, self.out = SideStream(device), SideStream(device), SideStream(device)
        self.events: list[Any] = []  # of each load so far, after which it is where it belongs
        self.rest: Iterator[Any] = iter(())
        self.held: list[Tensor] = []

    def start(self, loads: Sequence[Transfer], *needed: Tensor) -> None:
        """Begins a pass, after what the compute stream was given so far.

        Args:
            needed: what the work reads beside its load.
        """
        self.finish()
        size = max(sum(aligned(part.home.nbytes) for part in load.parts) for load in loads)
        slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in loads[:TRANSFER_SLOTS]]
        self.events, self.rest = [], self._pass(loads, slots, computed(self.device))
        self.held = [*slots, *needed]

    def reach(self, count: int) -> Any:
        """Lets the first so many loads pass; returns the event after which they are where they belong."""
        self.events += islice(self.rest, max(0, count - len(self.events)))
        return self.events[count - 1]

    def finish(self) -> None:
        """What the compute stream gets next finds all of a pass where it belongs, and the memory of the slots free."""
        self.events += self.rest
        if self.held:
            compute_waits_for(self.events[-1])
            self.held = []

    def wait(self) -> None:
        """Waits for the device: then the host may read and write the buffers."""
        self.finish()
        host_waits_for(computed(self.device))

    def _pass(self, loads: Sequence[Transfer], slots: list[Tensor], start: Any) -> Iterator[Any]:
        free = [start] * len(slots)
        coming = self._fetch(slots[0], loads[0], start)
        for number, load in enumerate(loads):
            here, ahead = number % len(slots), (number + 1) % len(slots)
            tensors, arrived = coming
            self.work.does(partial(load.work, tensors), arrived)
            if number + 1 < len(loads):
                coming = self._fetch(slots[ahead], loads[number + 1], free[ahead])
            with self.out.after(self.work.mark()):
                for part, tensor in zip(load.parts, tensors, strict=True):
                    if part.leaves:
                        part.home.copy_(tensor, non_blocking=True)
            free[here] = self.out.mark()
            yield free[here]

    def _fetch(self, slot: Tensor, load: Transfer, free: Any) -> tuple[list[Tensor], Any]:
        """Starts the copies of a load; returns its tensors, and the event after which they are there."""
        tensors = placed(load.parts, slot)
        with self.into.after(free):
            for part, tensor in zip(load.parts, tensors, strict=True):
                if part.comes:
                    tensor.copy_(part.home, non_blocking=True)
        return tensors, self.into.mark()


def placed(parts: Sequence[Slice], slot: Tensor) -> list[Tensor]:
    """Each part of a load in a slot, one behind the other."""
    starts = accumulate((aligned(part.home.nbytes) for part in parts), initial=0)
    return [slot[i : i + part.home.nbytes].view(part.home.dtype) for i, part in zip(starts, parts, strict=False)]
