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
from cogvideox.optimizer.adam_weights import RANGE_BYTES
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
# By compiled and level: the units that backward needs in addition if all weights are trained, without their gradients.
TRAINED_UNITS = {
    True: {"input": 0.6, "attention": 1.5, "linear": 0.0, "all": 0.0},
    False: {"input": 7.5, "attention": 7.4, "linear": 6.4, "all": 1.4},
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
        backward = self.activation_bytes + self.gradient_bytes + dequantized
        return stored + largest(backward, self.forward_bytes, self.complete_sample_bytes)

    @property
    def complete_sample_bytes(self) -> int:
        """Returns the device bytes of a pass without gradients over all tokens, if training divides them, else 0."""
        parallel = self.sizes.sequence_parallel
        units = (WORKSPACE_UNITS[self.compiled]["attention"] + ENDS_UNITS) * parallel * (parallel > 1)
        return round(units * self.sizes.unit_bytes / self.sizes.samples)

    @cached_property
    def activation_bytes(self) -> Numbers:
        """Returns the device bytes of saved activations, and of those that a backward pass computes."""
        more = TRAINED_UNITS[self.compiled] if self.sizes.block_trained else dict.fromkeys(LEVELS, 0.0)
        units = {level: WORKSPACE_UNITS[self.compiled][level] + more[level] for level in LEVELS}
        work = largest(*((n > 0) * units[kind.keep] for kind, n in self.kinds.items()))
        exchanged = EXCHANGED_UNITS * (self.sizes.sequence_parallel > 1)
        return self.saved_bytes + np.rint((work + exchanged + self.ends_units) * self.sizes.unit_bytes).astype(int)

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
    def gradient_bytes(self) -> Numbers:
        """Returns the device bytes of block gradients: of the current block, and of those on their way to the host."""
        sizes = self.sizes
        sums = sizes.sum_bytes * np.minimum(IN_FLIGHT, self.streamed)
        if sizes.passes > 1:
            # Earlier gradients are copied back, one block ahead, and added to a new sum. Those of one pass are no sums.
            earlier = sizes.item_bytes if sizes.passes == 2 else sizes.sum_bytes
            sums = sums + (self.streamed > 0) * (sizes.sum_bytes + earlier)
        return sizes.block_trained * (sizes.item_bytes + sums)

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
        are stored on the host. Two blocks are gathered at a time; the gradients of one are in the compute type, and
        become fp32 before they are summed. To sample and to export, each process gathers all weights.
        """
        sizes = self.sizes
        rows = sizes.all_trained // sizes.shards - sizes.rows_on_host
        gathered = sizes.trained * sizes.item_bytes
        kept = sizes.rest_bytes + rows * (sizes.state_bytes + sizes.average_bytes) + gathered
        blocks = 2 * sizes.block_bytes + sizes.block_trained * (sizes.item_bytes + 4)
        start = self.activation_bytes + (4 * rows if sizes.passes > 1 else 0)
        work = round((WORKSPACE_UNITS[self.compiled]["attention"] + self.ends_units) * sizes.unit_bytes)
        evaluation = sizes.blocks * sizes.block_bytes + largest(work, self.complete_sample_bytes)
        return kept + largest(blocks + start, blocks + work + 4 * rows, evaluation)

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
        full = full + largest(copies, backward - self.saved_bytes)
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
