"""Keeps tensors in pinned host memory and copies them through a GPU while the GPU computes.

The idea: a GPU can copy in both directions while it computes. A tensor that is not needed right now can therefore live
in host memory, if its copy to the device starts early enough. Copies are issued on side streams. A CUDA stream runs its
work in order, but two streams know nothing of each other; so wherever one stream touches memory that another stream
reads or writes, it first waits for an event of that stream. These waits are made on the device. The host only issues
work and runs ahead of the device. It waits for the device only before it frees, resizes or reads a buffer itself.

Ring: the weights of host-resident blocks. ``fetch`` copies block i + 1 into a slot while block i is computed:

    compute    | block i reads slot 0 | block i + 1 reads slot 1 | block i + 2 reads slot 2 | block i + 3 ...
    side       | copy i + 1 -> slot 1 | copy i + 2 -> slot 2     | copy i + 3 -> slot 0     |
               compute waits for the copy before it reads a slot; the copy waits for compute before it overwrites one.

HostStore: the activations that forward saves for backward. They leave the device on the stream ``out``, and return on
the stream ``back``, one block before backward needs them. HostGradients: the gradients of blocks that are
trained while their weights are in host memory. TrainedBlocks: the order of the optimizer's updates of blocks.

TransferPipeline: host memory that the device modifies, such as optimizer state, in three stages and several slots. With
three of them:

    into       | copy 0 in | copy 1 in | copy 2 in  | copy 3 in  | ...     waits for the copy out, 3 transfers earlier
    work                   | update 0  | update 1   | update 2   | ...     waits for the copy in
    out                                | copy 0 out | copy 1 out | ...     waits for the update; then the slot is free

Without a GPU the same code runs every copy at once, in program order, and there are no events (None).
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.memory.buffers import Layout, aligned, pinned

WEIGHT_SLOTS = 3  # one in use, one arriving, and the one used last, which backward needs first after forward
SUMS = "sums"  # the name of what HostGradients stores if there are several passes
IN_FLIGHT = 2  # blocks whose saved tensors may be on their way to the host at a time
Event: TypeAlias = "torch.cuda.Event | None"  # None without a GPU, where work is complete when a call returns
# Issues an update of weights on the device that begins after an event; returns the event after which they are new, and
# the event after which the new ones are on the host too.
Update: TypeAlias = "Callable[[Tensor, Event], tuple[Event, Event]]"
STAGES = 3  # slots of a TransferPipeline: one is filled, one is worked on, and one is emptied
# The same while blocks compute. A kernel of cuDNN's attention takes the whole device for up to 9 ms. Until it ends, no
# slot is worked on, and further slots are filled.
TRANSFER_SLOTS = 8


# -- streams -----------------------------------------------------------------------------------------------------------


# CUDA distributes streams over hardware queues, of which there are 8 by default. Work of two streams that share a queue
# runs in the order in which it was issued, so kernels would wait behind copies that wait for an event. With the compute
# stream there are eight streams here, and NCCL has others. CUDA reads this when the process first uses a GPU.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class SideStream:
    """Wraps a CUDA stream next to the compute stream. Without a GPU there is no stream, and copies run at once."""

    def __init__(self, device: torch.device, urgent: bool = False) -> None:
        """Creates the stream.

        Args:
            device: The device of the stream.
            urgent: Whether its kernels go before those of the compute stream that have not started yet.
        """
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1 if urgent else 0) if device.type == "cuda" else None

    def after_compute(self) -> AbstractContextManager[object]:
        """Returns a context whose copies start after all work that the compute stream has been given so far."""
        return self.after(compute_event(self.device))

    def after(self, *events: Event) -> AbstractContextManager[object]:
        """Returns a context whose copies run on this stream and start after all given events, except None."""
        if self.stream is None:
            return nullcontext()
        for event in filter(None, events):
            self.stream.wait_event(event)
        return torch.cuda.stream(self.stream)

    def run_after(self, work: Callable[[], None], *events: Event) -> None:
        """Runs work on this stream after all given events. Unlike in ``after``, the work may contain kernels."""
        with self.after(*events):
            work()

    def synchronize(self) -> None:
        """Blocks the host until this stream has finished all work that it has been given."""
        if self.stream is not None:
            self.stream.synchronize()

    def record_event(self) -> Event:
        """Returns an event that happens when this stream has finished all work given so far; None without a GPU."""
        return self.stream.record_event() if self.stream is not None else None


def compute_event(device: torch.device) -> Event:
    """Returns an event that happens when the compute stream has finished all work given so far; None without a GPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def compute_waits_for(event: Event) -> None:
    """Makes the compute stream wait for an event before any later work. The host does not wait."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def host_waits_for(event: Event) -> None:
    """Blocks the host until an event has happened."""
    if event is not None:
        event.synchronize()


# -- weights -----------------------------------------------------------------------------------------------------------


class Ring:
    """Streams the weights of host-resident blocks into a few device slots, replacing the least recently used block.

    Args:
        hosts: Each block's flat host buffer by block number; all have the same size.
        device: The device on which the slots are allocated.
        slots: The number of slots. Two are enough if blocks are always used in the same direction.
    """

    def __init__(self, hosts: dict[int, Tensor], device: torch.device, slots: int = WEIGHT_SLOTS) -> None:
        self.hosts = hosts
        self.updates: dict[int, Update] = {}  # by block: an optimizer's update that its next use has to wait for
        self.side = SideStream(device)
        size = max(host.numel() for host in hosts.values())
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(slots, len(hosts)))]
        self.slot_of: OrderedDict[int, int] = OrderedDict()  # block -> slot, least recently used first
        self.arrived: dict[int, Event] = {}  # block -> event after which its slot may be read
        self.written: dict[int, Event] = {}  # block -> event after which its updated weights are on the host
        self.emptied: dict[int, Event] = {}  # slot -> event after which its updated weights are on the host

    def get(self, block: int) -> int:
        """Returns the number of the slot with a block's weights, which the compute stream may read from now on."""
        self.fetch(block)
        self.slot_of.move_to_end(block)
        # Compute must wait for the copy into the slot, or it reads the weights of the block that was there before.
        compute_waits_for(self.arrived[block])
        return self.slot_of[block]

    def fetch(self, block: int) -> None:
        """Starts copying a block to the device unless it is there; replaces the least recently used block.

        An update of the block by the optimizer is made in the slot, whose new weights then go back to the host too.
        """
        if block not in self.slot_of:
            self._load(block)
        if block in self.updates:
            slot, update = self.slot_of[block], self.updates.pop(block)
            self.arrived[block], self.written[block] = update(self.slots[slot], self.arrived[block])
            self.emptied[slot] = self.written[block]

    def _load(self, block: int) -> None:
        if len(self.slot_of) < len(self.slots):
            slot = len(self.slot_of)
        else:
            last, slot = self.slot_of.popitem(last=False)
            del self.arrived[last]
        # The copy waits for three things. It waits for all compute issued so far, because an earlier block may still
        # read this slot and would see its weights change. It waits until weights that were updated in this slot have
        # left it. And it waits until this block's own updated weights are on the host.
        events = compute_event(self.side.device), self.emptied.get(slot), self.written.get(block)
        with self.side.after(*events):
            self.copy(self.slots[slot], self.hosts[block])
        self.arrived[block] = self.side.record_event()
        self.slot_of[block] = slot

    def copy(self, slot: Tensor, host: Tensor) -> None:
        """Copies a host buffer into a slot on the current stream."""
        slot.copy_(host, non_blocking=True)

    def invalidate(self) -> None:
        """Marks all slots as out of date, so that the next use of each block copies it again."""
        self.slot_of.clear()
        self.arrived.clear()

    def next_block(self, block: int, step: int) -> int | None:
        """Returns the host-resident block that follows a block, or None if there is none.

        Args:
            block: Any block's number.
            step: 1 for ascending numbers, -1 for descending ones.
        """
        ahead = [other for other in self.hosts if (other - block) * step > 0]
        return min(ahead, key=lambda other: abs(other - block), default=None)


# -- saved activations -------------------------------------------------------------------------------------------------


class HostStore:
    """Stores the named tensors that each block saves for backward on the host between forward and backward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = SideStream(device), SideStream(device)
        self.buffers: dict[int, Tensor] = {}
        self.layouts: dict[int, tuple[tuple[str, ...], Layout]] = {}
        self.leaving: OrderedDict[int, tuple[dict[str, Tensor], Event]] = OrderedDict()
        self.arriving: dict[int, tuple[dict[str, Tensor], Event]] = {}

    def put(self, block: int, kept: dict[str, Tensor]) -> None:
        """Starts copying a block's tensors to the host. They stay on the device until IN_FLIGHT more blocks were put.

        Args:
            block: The block's number.
            kept: The tensors by name. The caller must not modify them afterwards.

        Raises:
            RuntimeError: The block's earlier tensors were not taken: two forward passes ran before a backward pass.
        """
        if block in self.layouts:
            raise RuntimeError(f"block {block}: tensors saved by an earlier forward pass were not used yet")
        layout = Layout(list(kept.values()))
        self.layouts[block] = tuple(kept), layout
        self._make_room(block, layout.num_bytes)
        # The copy must follow the kernels that compute these tensors, or it stores what was in their memory before.
        # This also orders it after the last reader of the host buffer, because ``take`` made compute wait for the copy
        # back to the device.
        with self.out.after_compute():
            for host, tensor in zip(layout.views(self.buffers[block]), kept.values(), strict=True):
                host.copy_(tensor, non_blocking=True)
        self.leaving[block] = kept, self.out.record_event()
        if len(self.leaving) > IN_FLIGHT:
            _, (_, event) = self.leaving.popitem(last=False)
            # Dropping the tensors lets the allocator reuse their memory for whatever is computed next. Compute must
            # wait for the copy first, or the copy would store the new values. The copy started IN_FLIGHT blocks ago and
            # has normally ended, so this wait seldom costs time.
            compute_waits_for(event)

    def _make_room(self, block: int, num_bytes: int) -> None:
        """Makes sure that a block has a host buffer of at least ``num_bytes``."""
        if block in self.buffers and self.buffers[block].numel() >= num_bytes:
            return
        if block in self.buffers:
            # A larger bucket needs a larger buffer. Freeing the old one takes effect at once, so the host itself must
            # wait for all that may still use it: copies of the last step on both streams, and the optimizer's
            # pass over the gradients, which the compute stream waits for.
            self.out.synchronize()
            self.back.synchronize()
            host_waits_for(compute_event(self.device))
            del self.buffers[block]
        self.buffers[block] = pinned(num_bytes)

    def fetch(self, block: int) -> None:
        """Starts copying a block's tensors back to the device unless they are still there or already on their way."""
        if block in self.leaving or block in self.arriving or block not in self.layouts:
            return
        names, layout = self.layouts[block]
        hosts = layout.views(self.buffers[block])
        kept = {n: torch.empty_like(h, device=self.device) for n, h in zip(names, hosts, strict=True)}
        # The allocator may have handed out memory that earlier kernels still read or write; the copy must follow them,
        # or it corrupts their values. Waiting for compute also covers the earlier copy into this host buffer: when the
        # tensors were removed from ``leaving``, compute waited for that copy.
        with self.back.after_compute():
            for tensor, host in zip(kept.values(), hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
        self.arriving[block] = kept, self.back.record_event()

    def fetch_next(self) -> None:
        """Fetches the block that backward takes next, which is the last one put, if any is left."""
        if self.layouts:
            self.fetch(next(reversed(self.layouts)))

    def clear(self) -> None:
        """Drops everything that was put and not taken. The host buffers stay allocated."""
        for _, event in (*self.leaving.values(), *self.arriving.values()):
            # As in ``put``: the device memory is about to be reused, and copies may still read or write it.
            compute_waits_for(event)
        for entries in (self.layouts, self.leaving, self.arriving):
            entries.clear()

    def take(self, block: int) -> dict[str, Tensor]:
        """Removes and returns a block's tensors, by name; the compute stream may read them from now on."""
        self.fetch(block)
        del self.layouts[block]
        kept, event = self.leaving.pop(block) if block in self.leaving else self.arriving.pop(block)
        # Tensors that are copied back must have arrived before compute reads them. Tensors that are still leaving have
        # their values, but once the caller drops them their memory is reused, so compute waits for that copy as well.
        compute_waits_for(event)
        return kept


# -- trained blocks ----------------------------------------------------------------------------------------------------


class HostGradients:
    """Stores block gradients on the host, summed over the backward passes of a step, and the norms of the sums."""

    def __init__(self, device: torch.device) -> None:
        self.store = HostStore(device)
        self.norms: dict[int, list[Tensor]] = {}

    def add(self, block: int, gradients: list[Tensor]) -> None:
        """Adds the gradients of one backward pass.

        The gradients of a single pass keep their type; the sum of several passes is in fp32.

        Args:
            block: The block's number.
            gradients: The gradients on the device, in the order of the block's parameters.
        """
        kept = {str(k): gradient for k, gradient in enumerate(gradients)}
        if block in self.norms:
            gradients, array = self._sums(self.store.take(block), gradients)
            # Sums are stored with their zero padding, because it replaces gradients of the first pass.
            kept = {SUMS: array}
            if following := [other for other in self.norms if other < block]:
                self.store.fetch(max(following))  # backward runs from the last block to the first
        self.store.put(block, kept)
        self.norms[block] = norms_of(gradients)

    @staticmethod
    def _sums(earlier: dict[str, Tensor], gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Returns the sums of earlier gradients and new ones in fp32, and the array with padding that they share."""
        layout = Layout(gradients)
        array = torch.zeros(layout.numbers, dtype=torch.float32, device=gradients[0].device)
        sums = layout.views_of(array)
        before = layout.views_of(earlier[SUMS]) if SUMS in earlier else earlier.values()
        for total, one, other in zip(sums, before, gradients, strict=True):
            total.copy_(one).add_(other)
        return sums, array

    def finish_copies(self) -> None:
        """Orders later compute after all copies of gradients to the host, and frees their device memory."""
        # The optimizer's pass starts after compute and reads the host buffers. Without this wait it would read
        # incomplete sums, and the device memory that ``leaving`` refers to would be reused while copies still read it.
        compute_waits_for(self.store.out.record_event())
        self.store.leaving.clear()

    def flat(self, block: int) -> Tensor:
        """Returns all gradients of a block as one vector, with zero padding, that is a view of the host buffer."""
        return self.store.layouts[block][1].flat(self.store.buffers[block])

    def clear(self) -> None:
        """Drops all sums and norms before the next step."""
        self.store.clear()
        self.norms.clear()


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Returns the fp32 norm of each gradient; its value does not depend on the device or grouping of the gradients."""
    return list(torch._foreach_norm(list(gradients), 2, torch.float32))


class TrainedBlocks:
    """Groups the blocks of a transformer of which all weights are trained, and orders the optimizer's updates of them.

    An update that passes through the device is issued before its block is used again, in the order of the blocks, so
    that it runs while earlier blocks compute. That of a block on the host is issued when forward fetches it, and made
    in the slot of the ring. Those of blocks on the device begin one after another, spread evenly over the blocks on the
    device, and none later than with the block before its own. If all began at once, saved activations could not leave
    in between: a direction of the link makes copies of one stream until that has none ready.

    Args:
        parameters: Each block's parameters by block number, in the layout's order; they are views of ``weights``.
        weights: Each block's flat array of weights, on the device or on the host.
        ring: The ring that streams the blocks on the host to the device, if there are any.
        state_on_host: The blocks whose optimizer state is on the host.
        device: Where the blocks compute.
    """

    def __init__(
        self,
        parameters: dict[int, list[Parameter]],
        weights: dict[int, Tensor],
        ring: Ring | None,
        state_on_host: frozenset[int],
        device: torch.device,
    ) -> None:
        self.parameters, self.weights, self.ring, self.state_on_host = parameters, weights, ring, state_on_host
        self.gradients = HostGradients(device)
        self.pending: dict[int, Update] = {}
        self.begins: dict[int, int] = {}  # block on the device -> the block with which its update begins
        self.updated: dict[int, Event] = {}  # block on the device -> event after its update

    def on_host(self, block: int) -> bool:
        """Returns whether a block's weights are on the host."""
        return self.ring is not None and block in self.ring.hosts

    def schedule(self, updates: dict[int, Update]) -> None:
        """Makes the next use of blocks wait for updates of their weights.

        Args:
            updates: By block in ascending order, a function that issues the update of weights on the device. It gets
                the flat array of weights and the event after which the update may begin, and returns the event after
                which they are updated, and the one after which blocks on the host have them there.
        """
        self.pending, self.updated = dict(updates), {}
        if self.ring:
            self.ring.updates = {block: partial(self._in_slot, block) for block in updates if self.on_host(block)}
        here = [block for block in self.weights if not self.on_host(block)]
        passing = [block for block in here if block in updates]
        self.begins = {block: here[number * len(here) // len(passing)] - 1 for number, block in enumerate(passing)}
        self._issue_begun(-1)

    def _in_slot(self, block: int, slot: Tensor, arrived: Event) -> tuple[Event, Event]:
        """Issues the update of a block that was copied into a slot, and those of blocks on the device that follow."""
        weights = slot.view(self.weights[block].dtype)[: self.weights[block].numel()]
        events = self.pending.pop(block)(weights, arrived)
        self._issue_begun(block)
        return events

    def _issue_begun(self, block: int) -> None:
        """Issues the updates of blocks on the device that begin with a block, up to that of a block on the host."""
        while self.pending and self.begins.get(next(iter(self.pending)), len(self.weights)) <= block:
            self._issue(next(iter(self.pending)))

    def _issue(self, block: int) -> None:
        begun = compute_event(self.gradients.store.device)
        self.updated[block] = self.pending.pop(block)(self.weights[block], begun)[0]

    def use(self, block: int) -> None:
        """Makes the compute stream wait until a block on the device has been updated."""
        if block in self.pending:
            self.finish()
        compute_waits_for(self.updated.pop(block, None))
        self._issue_begun(block)

    def finish(self) -> None:
        """Issues all pending updates."""
        while self.pending:
            block = next(iter(self.pending))
            if self.ring and self.on_host(block):
                self.ring.fetch(block)
            else:
                self._issue(block)


# -- host memory that the device modifies ------------------------------------------------------------------------------


class Slice(NamedTuple):
    """Describes one contiguous piece of host memory in a Transfer."""

    host: Tensor  # one-dimensional, on the host
    copy_in: bool = True  # whether it is copied to the device before the work
    copy_out: bool = True  # whether it is copied back to the host after the work


class Transfer(NamedTuple):
    """Describes one pass through a slot of a TransferPipeline: slices of host memory, and the work on their copies."""

    slices: Sequence[Slice]
    work: Callable[[list[Tensor]], None]


class TransferPipeline:
    """Passes host memory through a few device slots, one transfer after another, in parallel with the compute stream.

    While one transfer is worked on, the next one is copied in and the previous one is copied out. The slots are
    allocated by ``start`` and freed by ``finish``.

    Args:
        device: The device with the slots.
        into: The stream of the copies to the device. Streamed weights share it, so that all arrive in the order in
            which they were issued.
        count: The number of slots.
    """

    def __init__(self, device: torch.device, into: SideStream | None = None, count: int = STAGES) -> None:
        self.device, self.count = device, count
        self.into, self.out = into or SideStream(device), SideStream(device)
        # The kernels of an update are short, and those of a block are long, so without priority each would wait.
        self.work = SideStream(device, urgent=True)
        self.slots: list[list[Tensor]] = []
        self.free: list[Event] = []  # for each slot: its last transfer has been copied out
        self.number = 0  # of the next transfer
        self.kept_alive: Sequence[Tensor] = ()

    def start(self, sizes: Sequence[int], *needed: Tensor) -> None:
        """Begins a pass that follows all work that the compute stream has been given so far.

        Args:
            sizes: The bytes of each slice in a slot; see ``slot_bytes``.
            needed: Other device tensors that the work reads. They are kept alive until ``finish``.
        """
        self.finish()
        # Each slice has memory of its own, because torch.compile does not see that views of one buffer are disjoint.
        self.slots = [
            [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes] for _ in range(self.count)
        ]
        # The first copies wait for compute for two reasons. Earlier kernels may still use the memory that the allocator
        # gives out as slots. And earlier copies, which compute waits for, may still write the host memory.
        self.free, self.number, self.kept_alive = [compute_event(self.device)] * self.count, 0, needed

    def run(self, transfer: Transfer, after: Event = None) -> Event:
        """Issues a transfer; returns the event after its work.

        Args:
            transfer: The transfer.
            after: An event that the work has to wait for besides its copies.
        """
        here = self.number % len(self.slots)
        memory = zip(self.slots[here], transfer.slices, strict=False)
        tensors = [buffer[: piece.host.nbytes].view(piece.host.dtype) for buffer, piece in memory]
        # The copies in wait until the transfer that used the slot before has been copied out, or they overwrite its
        # results.
        with self.into.after(self.free[here]):
            for piece, tensor in zip(transfer.slices, tensors, strict=True):
                if piece.copy_in:
                    tensor.copy_(piece.host, non_blocking=True)
        # The work waits for the copies in, or it computes with the previous contents of the slot.
        self.work.run_after(partial(transfer.work, tensors), self.into.record_event(), self.free[here], after)
        worked = self.work.record_event()
        # The copies out wait for the work, or they store values from before the update.
        with self.out.after(worked):
            for piece, tensor in zip(transfer.slices, tensors, strict=True):
                if piece.copy_out:
                    piece.host.copy_(tensor, non_blocking=True)
        self.free[here] = self.out.record_event()
        self.number += 1
        return worked

    def copy_out(self, host: Tensor, tensor: Tensor, after: Event) -> Event:
        """Copies a tensor to the host after an event; returns the event after the copy."""
        with self.out.after(after):
            host.copy_(tensor, non_blocking=True)
        return self.out.record_event()

    def finish(self) -> None:
        """Orders later compute after all transfers and copies, and frees the slots."""
        if self.slots:
            # The slots and ``needed`` go back to the allocator, and later compute reuses their memory. It must wait for
            # the last transfer, or it overwrites values that are still being worked on or copied out.
            compute_waits_for(self.work.record_event())
            compute_waits_for(self.out.record_event())
            self.slots, self.kept_alive = [], ()

    def synchronize(self) -> None:
        """Finishes all transfers and blocks the host until then; afterwards the host may read and write the buffers."""
        self.finish()
        host_waits_for(compute_event(self.device))


def slot_bytes(transfers: Iterable[Transfer]) -> list[int]:
    """Returns the bytes of each slice in a slot that holds any one of some transfers."""
    sizes = ([aligned(piece.host.nbytes) for piece in transfer.slices] for transfer in transfers)
    return [max(same) for same in zip_longest(*sizes, fillvalue=0)]
