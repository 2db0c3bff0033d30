"""Predicts the memory of every mixture of blocks; timeline.py predicts the seconds from the same table of bytes.

A block has five parts: its weights, the activations that forward saves for backward, its gradients, its optimizer
state, and the average of its weights (``parts``). A plan says for each part whether it is on the device or on the host.
Two readings follow:

    what is on the device or on the host  --> memory: ``peak_bytes``, ``pinned_bytes``, ``host_bytes``
    what is on the host and needed on the device, or made there  --> copies: ``all_copied_bytes`` and timeline.py

Peak of device memory = parts on the device + slots + the larger need of two moments: the start of backward, when all
saved activations exist, and the optimizer step, when state passes through the device.

A "unit" is the size of a block's input, samples * tokens * width * bytes per element. The measured WORKSPACE_UNITS and
TRAINED_UNITS are those of benchmarks/one_block.py (``backward_mib`` in results/one_block_*.json).

A mixture is a dictionary with the number of blocks of each kind. All predictions accept either a number or, to predict
all mixtures at once, an array with one number for each mixture, where kinds without a block have a zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, TypeAlias

import numpy as np

from cogvideox.config.deepspeed import ZERO_BUCKET, sums_gradients
from cogvideox.memory.streaming import IN_FLIGHT, STAGES, TRANSFER_SLOTS, WEIGHT_SLOTS
from cogvideox.optimizer.adam_groups import RANGE_BYTES
from cogvideox.planning.plan import DEVICE, HOST, LEVELS, BlockPlan, Sizes

WEIGHTS, SAVED, GRADIENTS, STATE, AVERAGE = "weights", "saved", "gradients", "state", "average"
# By compiled and level: the units that a block's backward pass needs in addition to its saved activations.
WORKSPACE_UNITS = {
    True: {"input": 19.1, "attention": 17.2, "linear": 13.2, "all": 9.3},
    False: {"input": 38.2, "attention": 37.2, "linear": 28.2, "all": 25.2},
}
# By compiled: the units that a block's forward pass needs in addition to what it saves, by ``forward_mib`` there.
FORWARD_UNITS = {True: 5.0, False: 22.0}
ENDS_UNITS = 1.8  # tensors before the first and after the last block
EXCHANGED_UNITS = 7.0  # counted, not measured: what attention's backward pass has of all tokens of some heads
# The same by compiled and level, if all weights are trained: the units while no gradient of a weight exists, and those
# that exist together with all gradients. The fuller moment counts. For 5b, 1.5-5b and 2b, compiled, the first are 22.2,
# 21.1, 12.4 to 13.2, and the second at most 7.9 (one_block_*_sft.json). Uncompiled blocks were measured for 5b only.
TRAINED_UNITS = {
    True: {"input": (22.2, 8.0), "attention": (21.2, 8.0), "linear": (13.2, 8.0), "all": (8.0, 8.0)},
    False: {"input": (45.7, 45.7), "attention": (44.6, 44.6), "linear": (34.6, 34.6), "all": (26.6, 26.6)},
}
DEQUANTIZED_SHARE = {True: 0.1, False: 1.2}
"""By compiled: the share of a block's quantized matrices that is dequantized when memory is fullest. In a compiled
graph it is small (measured). Without one, the largest matrix, a third of them, is dequantized by way of fp32."""

Array: TypeAlias = np.ndarray[Any, Any]
Numbers: TypeAlias = Any  # an int or a float, or an array (mixtures,) of them
Kinds: TypeAlias = Mapping[BlockPlan, Numbers]  # a mixture, or an array of mixtures: the number of blocks of each kind


def largest(*numbers: Numbers) -> Numbers:
    """Returns the largest of several numbers, for each mixture if some of them are arrays."""
    return reduce(np.maximum, numbers)


def is_late(kind: BlockPlan) -> bool:
    """Returns whether a kind's weights are on the device while its state passes through the device."""
    return kind.weights == DEVICE and kind.state == HOST


def order(kinds: Kinds, blocks: int) -> Array:
    """Returns how a mixture of at most two kinds is ordered, as positions in ``kinds``, (blocks, mixtures).

    The kinds are spread evenly, so that copies have time to overlap. The first block is the one with less on the host,
    so that forward begins before a copy has ended. If only the saved activations differ, the last block has more of
    them on the device: backward begins before a copy has ended, and has deleted them when it comes to blocks that
    compute more. Blocks on the device whose state is on the host are the last ones, so that their state passes while
    the others compute.
    """
    counts = np.stack([np.atleast_1d(n) for n in kinds.values()])  # (kinds, mixtures)
    first, second = (counts > 0).argmax(axis=0), len(counts) - 1 - (counts[::-1] > 0).argmax(axis=0)
    count, i = np.take_along_axis(counts, first[None], axis=0), np.arange(blocks)[:, None]
    away = np.array([[kind.weights, kind.state].count(HOST) for kind in kinds])
    begins = away[first] != away[second]
    saved = np.array([(kind.kept == DEVICE) * len(LEVELS) + LEVELS.index(kind.keep) for kind in kinds])
    is_first = np.where(begins, away[first] < away[second], saved[first] > saved[second])
    n = np.where(is_first, count, blocks - count)  # of the kind that the model begins or ends with
    spread = np.where(begins, i * n % blocks < n, (i + 1) * n // blocks > i * n // blocks) == is_first
    late = np.array([is_late(kind) for kind in kinds])
    split = np.where(late[first], i >= blocks - count, i < count)
    return np.where(np.where(late[first] == late[second], spread, split), first, second)


@dataclass(frozen=True)
class Costs:
    """Predicts what mixtures hold in memory and copy.

    Attributes:
        kinds: The number of blocks for each kind of block plan.
        state: Where optimizer state is stored unless a block's plan says otherwise.
        compiled: Whether blocks are compiled.
        sizes: The sizes of the run.
    """

    kinds: Kinds
    state: str
    compiled: bool
    sizes: Sizes

    def only(self, chosen: Array) -> "Costs":
        """Returns the costs of some of the mixtures, by a mask (mixtures,)."""
        return replace(self, kinds={kind: numbers[chosen] for kind, numbers in self.kinds.items()})

    @cached_property
    def order(self) -> Array:
        """Returns the kind of each block, as positions in ``kinds``, (blocks, mixtures)."""
        return order(self.kinds, self.sizes.blocks)

    # -- the table of bytes --------------------------------------------------------------------------------------------

    def parts(self, kind: BlockPlan) -> dict[str, tuple[str, float]]:
        """Returns the place and the bytes of each part of one block."""
        sizes = self.sizes
        gradient = sizes.sum_bytes if kind.weights == HOST else sizes.device_gradient_bytes
        state = kind.state or self.state
        average = kind.weights if sizes.average_follows_weight else state
        return {
            WEIGHTS: (kind.weights, sizes.block_bytes),
            SAVED: (kind.kept, sizes.kept_bytes(kind.keep)),
            GRADIENTS: (kind.weights, sizes.block_trained * gradient),
            STATE: (state, sizes.block_trained * sizes.state_bytes),
            AVERAGE: (average, sizes.block_trained * sizes.average_bytes),
        }

    def held(self, place: str, *parts: str) -> Numbers:
        """Returns the bytes of some parts of all blocks at a place."""
        return sum(
            n * num_bytes
            for kind, n in self.kinds.items()
            for part, (where, num_bytes) in self.parts(kind).items()
            if part in parts and where == place
        )

    @cached_property
    def streamed(self) -> Numbers:
        """Returns how many blocks have their weights on the host."""
        return sum(n for kind, n in self.kinds.items() if kind.weights == HOST)

    def state_at(self, place: str) -> Numbers:
        """Returns the bytes of optimizer state at a place: of blocks, and of what else is trained."""
        outside = self.sizes.trained * self.sizes.state_bytes if self.state == place else 0
        return self.held(place, STATE) + outside

    def average_at(self, place: str) -> Numbers:
        """Returns the bytes of averages at a place: of blocks, and of what else is trained."""
        here = DEVICE if self.sizes.average_follows_weight else self.state
        outside = self.sizes.trained * self.sizes.average_bytes if here == place else 0
        return self.held(place, AVERAGE) + outside

    @cached_property
    def all_copied_bytes(self) -> Numbers:
        """Returns the bytes by which equally fast plans are compared: of weights, activations, gradients and state."""
        return self.held(HOST, WEIGHTS, SAVED, GRADIENTS) + self.held(HOST, GRADIENTS) + self.state_at(HOST)

    @cached_property
    def ends_units(self) -> float:
        """Returns the units of tensors outside the blocks, where each process has all tokens."""
        return ENDS_UNITS * self.sizes.sequence_parallel

    # -- device memory -------------------------------------------------------------------------------------------------

    @cached_property
    def peak_bytes(self) -> Numbers:
        """Returns the peak of device memory: at the start of backward, or in forward, while updates pass."""
        if self.sizes.deepspeed:
            return self.zero2_peak_bytes
        if self.sizes.shards > 1:
            return self.sharded_peak_bytes
        sizes = self.sizes
        outside = sizes.rest_bytes + sizes.trained * (sizes.item_bytes + sizes.device_gradient_bytes)
        slots = np.minimum(WEIGHT_SLOTS, self.streamed) * sizes.block_bytes
        state = self.state_at(DEVICE) + self.average_at(DEVICE)
        stored = outside + slots + self.held(DEVICE, WEIGHTS, GRADIENTS) + state
        dequantized = round(sizes.matrix_bytes * DEQUANTIZED_SHARE[self.compiled])
        backward = self.activation_bytes + self.moving_gradient_bytes + dequantized
        return stored + largest(backward, self.forward_bytes, self.complete_sample_bytes)

    @property
    def complete_sample_bytes(self) -> int:
        """Returns the device bytes of a pass without gradients over all tokens, if training divides them, else 0."""
        parallel = self.sizes.sequence_parallel
        units = (WORKSPACE_UNITS[self.compiled]["attention"] + ENDS_UNITS) * parallel * (parallel > 1)
        return round(units * self.sizes.unit_bytes / self.sizes.samples)

    def work_bytes(self, kind: BlockPlan) -> int:
        """Returns the device bytes that the backward pass of one block needs, with its gradients."""
        sizes, own = self.sizes, WORKSPACE_UNITS[self.compiled][kind.keep]
        without, beside = TRAINED_UNITS[self.compiled][kind.keep] if sizes.block_trained else (own, own)
        more = self.ends_units + EXCHANGED_UNITS * (sizes.sequence_parallel > 1)
        gradients = sizes.block_trained * sizes.item_bytes
        return max(round((without + more) * sizes.unit_bytes), round((beside + more) * sizes.unit_bytes) + gradients)

    @cached_property
    def largest_work_bytes(self) -> Numbers:
        """Returns the device bytes that the backward pass of the block that needs most needs, with its gradients."""
        return largest(*((n > 0) * self.work_bytes(kind) for kind, n in self.kinds.items()))

    @cached_property
    def activation_bytes(self) -> Numbers:
        """Returns the device bytes of saved activations, and of what backward computes, when these are most.

        Backward starts with the last block. Before it comes to one of another kind, what the blocks from there on have
        saved is deleted.
        """
        last = self.order[-1]
        at_the_end = np.cumprod(self.order[::-1] == last, axis=0).sum(axis=0)  # number of blocks like the last one
        saved = np.array([self.sizes.kept_bytes(kind.keep) * (kind.kept == DEVICE) for kind in self.kinds])[last]
        work = largest(
            *(
                (n > 0) * (self.work_bytes(kind) - (last != position) * at_the_end * saved)
                for position, (kind, n) in enumerate(self.kinds.items())
            )
        )
        return self.saved_bytes + work

    @cached_property
    def forward_bytes(self) -> Numbers:
        """Returns the device bytes of saved activations, of what forward computes, and of updates that pass."""
        units = FORWARD_UNITS[self.compiled] + self.ends_units
        return self.saved_bytes + self.transfer_slot_bytes + np.rint(units * self.sizes.unit_bytes).astype(int)

    @cached_property
    def saved_bytes(self) -> Numbers:
        """Returns the device bytes of saved activations, including those on their way to or from the host."""
        return self.held(DEVICE, SAVED) + self.in_flight_bytes

    @cached_property
    def in_flight_bytes(self) -> Numbers:
        """Returns the device bytes of saved activations that are on their way to or from the host."""
        away = {kind: n for kind, n in self.kinds.items() if kind.kept == HOST}
        blocks = sum(away.values())
        total, left = 0, np.minimum(IN_FLIGHT, blocks)
        for kind, n in sorted(away.items(), key=lambda item: -self.sizes.kept_bytes(item[0].keep)):
            # Blocks of different kinds alternate, so each kind has its share of the blocks in flight, rounded up.
            count = np.minimum(left, -(-IN_FLIGHT * n // np.maximum(1, blocks)))
            total, left = total + count * self.sizes.kept_bytes(kind.keep), left - count
        return total

    @cached_property
    def moving_gradient_bytes(self) -> Numbers:
        """Returns the device bytes of gradients of earlier blocks that are on their way to the host, or added there."""
        sizes = self.sizes
        sums = sizes.sum_bytes * np.minimum(IN_FLIGHT, self.streamed)
        if sizes.passes > 1:
            # Earlier gradients are copied back, one block ahead, and added to a new sum. Those of one pass are no sums.
            earlier = sizes.item_bytes if sizes.passes == 2 else sizes.sum_bytes
            sums = sums + (self.streamed > 0) * (sizes.sum_bytes + earlier)
        return sizes.block_trained * sums

    @cached_property
    def transfer_slot_bytes(self) -> Numbers:
        """Returns the device bytes of the optimizer's transfer slots, each with room for a range of any parameters.

        Ranges of what is outside the blocks, of blocks on the device and of streamed blocks have different numbers of
        elements. So a slot may have room for the state of the first and for gradients of the last.
        """
        sizes = self.sizes
        with_gradients = min(sizes.block_trained, RANGE_BYTES / (sizes.state_bytes + 4))  # elements of a range
        longest = RANGE_BYTES / max(1, sizes.state_bytes)  # fp32 weights under SGD have no state
        without = min(sizes.block_trained, longest)
        outside = min(sizes.trained, longest) * (self.state == HOST)
        blocks = (
            (n > 0) * (with_gradients if kind.weights == HOST else without)
            for kind, n in self.kinds.items()
            if (kind.state or self.state) == HOST
        )
        slot = largest(outside, *blocks) * sizes.state_bytes + (self.streamed > 0) * with_gradients * sizes.sum_bytes
        return (TRANSFER_SLOTS if sizes.block_trained else STAGES) * np.rint(slot).astype(int)

    @cached_property
    def sharded_peak_bytes(self) -> Numbers:
        """Returns the peak of device memory if weights are sharded: when backward starts or ends, or in evaluation.

        Each process keeps fp32 rows of weights, moments and, from the first backward pass on, gradients, unless they
        are stored on the host. Two blocks are gathered at a time; the gradients of the block before become fp32 and
        are summed while one computes. To sample and to export, each process gathers all weights.
        """
        sizes = self.sizes
        rows = sizes.all_trained // sizes.shards - sizes.rows_on_host
        gathered = sizes.trained * sizes.item_bytes
        kept = sizes.rest_bytes + rows * (sizes.state_bytes + sizes.average_bytes) + gathered
        blocks = 2 * sizes.block_bytes + 4 * sizes.block_trained
        start = blocks + self.activation_bytes + (4 * rows if sizes.passes > 1 else 0)
        end = blocks + self.largest_work_bytes + 4 * rows
        sampling = round((WORKSPACE_UNITS[self.compiled]["attention"] + self.ends_units) * sizes.unit_bytes)
        evaluation = sizes.blocks * sizes.block_bytes + largest(sampling, self.complete_sample_bytes)
        return kept + largest(start, end, evaluation)

    @cached_property
    def zero2_peak_bytes(self) -> Numbers:
        """Returns the peak of device memory under DeepSpeed ZeRO-2: when backward starts or at its first full bucket.

        Each process has all weights in the compute type, and a share of fp32 masters and moments unless these are
        stored on the host. Backward collects gradients in a bucket. When it is full, DeepSpeed copies it, converts the
        copy to fp32, sums it over the processes, and adds this process's part to its share of the gradients. That is an
        fp32 tensor on the device, also if the optimizer is on the host, and it is allocated as a whole at the first
        full bucket. Then the activations of the blocks in this bucket are gone. The first bucket is the last process's,
        so this is its peak.
        """
        sizes = self.sizes
        share = sizes.all_trained // sizes.shards
        weights = sizes.rest_bytes + sizes.blocks * sizes.block_bytes + sizes.trained * sizes.item_bytes
        bucket = min(ZERO_BUCKET, sizes.all_trained)
        state = (share - sizes.rows_on_host) * (sizes.state_bytes + sizes.average_bytes)
        stored = weights + state + bucket * sizes.item_bytes
        backward = self.activation_bytes
        if not sums_gradients(sizes.shards, sizes.passes, sizes.shards_on_host):
            return stored + backward  # each gradient is copied to the host in the compute type
        done = min(1.0, (bucket // sizes.block_trained + 1) / sizes.blocks) if sizes.block_trained else 1.0
        left = replace(self, kinds={kind: n * (1 - done) for kind, n in self.kinds.items()}).saved_bytes
        copies = round(self.ends_units * sizes.unit_bytes) + bucket * (sizes.item_bytes + 4)
        full = np.rint(left) + sizes.block_trained * sizes.item_bytes + 4 * share
        full = full + largest(copies, self.largest_work_bytes)
        return stored + largest(full, backward + (4 * share if sizes.passes > 1 else 0))

    # -- host memory ---------------------------------------------------------------------------------------------------

    @cached_property
    def streamed_bytes(self) -> Numbers:
        """Returns the host bytes of streamed weights: this process's share if the processes of a machine share them."""
        return self.held(HOST, WEIGHTS) // (1 if self.sizes.block_trained else self.sizes.ranks)

    @cached_property
    def pinned_bytes(self) -> Numbers:
        """Returns this process's pinned host memory: weights, saved activations, gradients and optimizer state."""
        rows = 8 * self.sizes.rows_on_host  # FSDP2 pins fp32 weights and gradients
        return self.streamed_bytes + self.held(HOST, SAVED, GRADIENTS) + self.state_at(HOST) + rows

    @cached_property
    def host_bytes(self) -> Numbers:
        """Returns the host memory that is needed in addition to that of the loaded weights.

        Those are pages of their file, which take no memory, or are freed when they are placed, and loaded again for the
        export. A checkpoint needs no further memory: where there is no room for a copy (runtime/background.py), it is
        written tensor by tensor.
        """
        sizes = self.sizes
        # What a device never copies is not pinned: averages, and the moments of rows.
        unpinned = self.average_at(HOST) + sizes.rows_on_host * (sizes.state_bytes + sizes.average_bytes - 4)
        return self.pinned_bytes + unpinned
