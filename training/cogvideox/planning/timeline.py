"""Predicts the seconds of an optimizer step: a simulated timeline of all mixtures at once.

Three streams work at the same time: the device computes, copies come in, and copies go out. The simulation walks the
blocks in the order of a step, and keeps for each stream when it is free. Work starts when its stream is free and what
it waits for has happened; these dependencies are those of memory/streaming.py:

    start      the norm of the gradients; updates of state on the device; state of what is trained outside of blocks
    forward    block i waits for its weights, which come in while the block before computes, and for its update
               in: weights, and of host-trained blocks state and gradients    out: saved activations, updated state
    backward   waits for all updates; block i waits for its weights and saved activations, which come in one block ahead
               in: weights, saved activations, earlier sums of gradients      out: gradients of host-trained blocks

State of blocks whose weights are on the device passes behind that of all others. These blocks are the last ones
(``order``), so that their state has the forward pass of the others to pass in.

Streams do not share a direction of the link: it makes the copies of one stream until that has none ready. All saved
activations of a block are ready at once, but each copy of an update waits for a kernel. So saved activations leave
first, and an update, which passes in ranges through TRANSFER_SLOTS slots, cannot go on before earlier ranges and
weights have left their slots. (Source: the gaps between kernels, of 10 to 34 ms, in the traces of
benchmarks/results/bench_*-sft-24gb*.json, in which only saved activations and then one range are copied.)

The arithmetic of a block is counted: FLOP of matrix products and attention, and bytes of memory traffic for everything
else, at the rates that probes measure (probes.with_rates). Each constant has the measurement that it comes from.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cogvideox.config.cards import NVLINK_4
from cogvideox.memory.streaming import IN_FLIGHT, TRANSFER_SLOTS, WEIGHT_SLOTS
from cogvideox.optimizer.adam_groups import RANGE_BYTES
from cogvideox.planning.costs import GRADIENTS, SAVED, STATE, WEIGHTS, Array, Costs, Numbers
from cogvideox.planning.plan import HOST, Machine, Sizes

IN, OUT, LAST = 0, 1, 2  # copies in; copies out; copies out of updates, which let all others go first

# By compiled and whether all weights are trained: the units of memory traffic outside of matrix products and attention,
# in forward and, by level, in backward. Sources: the kernels in benchmarks/results/one_block_5b.json and
# one_block_5b_sft.json (one_block.py), as times of the H100's 2.8 TB/s; those of eager blocks from the difference of
# ``forward_ms`` and ``backward_ms`` to compiled ones.
TRAFFIC_UNITS = {
    (True, False): (32.0, {"input": 61.0, "attention": 60.0, "linear": 50.0, "all": 41.0}),
    (True, True): (26.0, {"input": 106.0, "attention": 105.0, "linear": 102.0, "all": 90.0}),
    (False, False): (177.0, {"input": 436.0, "attention": 437.0, "linear": 384.0, "all": 290.0}),
    (False, True): (168.0, {"input": 459.0, "attention": 442.0, "linear": 444.0, "all": 300.0}),
}
RECOMPUTED = {"input": (8 / 12, 1.0), "attention": (8 / 12, 0.0), "linear": (0.0, 0.0), "all": (0.0, 0.0)}
"""By level: the shares of a block's linear layers and of its attention that backward computes again (blocks.py)."""
EXCHANGED = (4, 8)
"""Units that processes which divide a sample exchange in forward (q, k, v; o) and backward (do, q, k, v, o; dq, dk, dv)
of a block. Attention that backward computes again exchanges those of forward once more."""
# The products of a LoRA reach half the rate of large ones: they make forward of a 5b block 0.31 ms longer (5.39 and
# 5.08 ms in one_block_5b.json and one_block_5b_sft.json), which are 0.11 TFLOP.
LORA_SLOWNESS = 2.0
# By engine, whether DeepSpeed's: seconds per trained element in which several processes sum gradients, and gather and
# convert weights if these are sharded. By difference of the seconds in benchmarks/results/scale_*_sft_*.json, measured
# on hosts with NVLink, from predictions for one process: 0.16 s for 5.6e9 elements under FSDP2, 0.28 s under ZeRO-2.
# Slower links are assumed to take longer in proportion to their rates.
EXCHANGE_SECONDS = {False: 3e-11, True: 5e-11}
# Seconds per element of an update of 8-bit state, which is bound by its arithmetic: 0.131 ms for 8.36 million weights
# on an H200 (benchmarks/LOG.md).
EIGHT_BIT_SECONDS = 1.57e-11
# Seconds per element of a step on the host: 2b under ZeRO-2 with an offloaded optimizer on one GPU took 1.81 s, where
# 0.85 s without the step were expected (benchmarks/LOG.md).
HOST_STEP_SECONDS = 5.7e-10


def exchange_seconds(level: str, sizes: Sizes, machine: Machine) -> tuple[float, float]:
    """Returns the seconds in which forward and backward of a block exchange tensors between processes."""
    if sizes.sequence_parallel == 1:
        return 0.0, 0.0
    forward, backward = (units * sizes.unit_bytes / machine.exchange for units in EXCHANGED)
    return forward, backward + RECOMPUTED[level][1] * forward


def in_first(present: Array, count: int) -> Array:
    """Returns where the first ``count`` present blocks are, (blocks, mixtures)."""
    return present & (np.cumsum(present, axis=0) <= count)


def following(values: Array, present: Array) -> Array:
    """Returns the value of the first present block, and for each block that of the next present one; 0 if none.

    Args:
        values: (blocks, mixtures).
        present: Which blocks count, of the same shape.

    Returns:
        (blocks + 1, mixtures).
    """
    found = np.zeros((len(values) + 1, *values.shape[1:]))
    for i in reversed(range(len(values))):
        found[i] = np.where(present[i], values[i], found[i + 1])
    return found


class Link:
    """The copies between host and device. Each direction makes one copy after another; together they are slower.

    Args:
        rate: Bytes per second of one direction alone.
        both_ways: Bytes per second of both directions together, if both are busy.
        mixtures: The number of mixtures.
    """

    def __init__(self, rate: float, both_ways: float, mixtures: int) -> None:
        self.rate, self.both_ways = rate, both_ways
        # While both directions are busy, each has half of their common rate, so both lose the same time.
        self.slowness = 2 * rate / both_ways - 1
        self.free = np.zeros((3, mixtures))  # when all copies of a kind that were issued so far have ended
        self.begin = np.zeros(mixtures)  # of the LAST copies since their last pause
        self.reach = np.full(mixtures, np.inf)  # seconds for which copies come in while LAST ones let others go first

    def copy(self, kind: int, ready: Array, num_bytes: Array) -> Array:
        """Makes a copy in or out that may start at ``ready``; returns when it ends. No bytes are there at once."""
        start, alone = np.maximum(ready, self.free[kind]), num_bytes / self.rate
        if kind == IN:
            end = start + alone + np.maximum(self._lose(OUT, start, alone), self._lose(LAST, start, alone))
        else:
            end = start + alone + self._lose(IN, start, np.minimum(alone, self.reach))
            taken = np.maximum(0.0, end - np.maximum(start, self.begin))
            self.free[LAST] += np.where(self.free[LAST] > start, taken, 0.0)
        self.free[kind] = np.where(num_bytes > 0, end, self.free[kind])
        return np.where(num_bytes > 0, end, ready)

    def copy_last(self, ready: Array, seconds: Array) -> None:
        """Makes a copy out that lets all others go first, also those that are still to be issued.

        Args:
            ready: When the copy may start, (mixtures,).
            seconds: How long it takes if no other copy is made meanwhile; 0 if there is none.
        """
        start = np.maximum(ready, self.free[OUT])
        self.begin = np.where((seconds > 0) & (start > self.free[LAST]), start, self.begin)
        start = np.maximum(start, self.free[LAST])
        end = start + seconds + self._lose(IN, start, seconds)
        self.free[LAST] = np.where(seconds > 0, end, self.free[LAST])

    def left(self, now: Array, later: Array) -> Array:
        """Returns when all LAST copies but those of the last ``later`` seconds have ended, or 0 if that was before."""
        end = self.free[LAST] - later
        # They pause while others leave, so what has not ended by now is still to end when these have left.
        return np.where(end > np.maximum(now, self.free[OUT]), end, 0.0)

    def _lose(self, other: int, start: Array, alone: Array) -> Array:
        """Returns the time that a copy loses to copies in the other direction, which lose it, too."""
        lost = self.slowness * np.minimum(alone, np.maximum(0.0, self.free[other] - start))
        self.free[other] += lost
        return lost


class Prefetch:
    """Copies that come in one block ahead: the next one is issued where the one before is taken.

    Args:
        link: Makes the copies.
        now: When the first one may start, (mixtures,).
        present: Which blocks need a copy, (blocks, mixtures) in the order of the pass.
        inward: The bytes that come in for a block, of the same shape; 0 if they are on the device already.
    """

    def __init__(self, link: Link, now: Array, present: Array, inward: Array) -> None:
        self.link, self.present, self.inward = link, present, following(inward, present)
        self.arrived = self.issue(0, now, np.ones_like(now))

    def take(self, i: int, now: Array) -> Array:
        """Issues the copies of the block after the i-th, and returns when the i-th one can be computed."""
        here = self.present[i]
        ready = np.where(here, np.maximum(now, self.arrived), now)
        following_one = self.issue(i + 1, now, here)
        self.arrived = np.where(here, np.maximum(self.arrived, following_one), self.arrived)
        return ready

    def issue(self, i: int, now: Array, some: Array) -> Array:
        """Issues the copy of the first present block from the i-th on, of some mixtures; returns when it ends."""
        return self.link.copy(IN, now, self.inward[i] * some)


class Updates(Prefetch):
    """Weights that come in one block ahead, with the state and gradients that pass through the device to update them.

    They pass in ranges. Those after the first TRANSFER_SLOTS wait for what leaves ``early``, and for all of the block
    before. The ``rest`` leaves when the block has been updated. State of blocks that are not present passes behind all.

    Args:
        link: Makes the copies.
        now: When the first one may start, (mixtures,).
        present: Which blocks come in, (blocks, mixtures).
        weights: The bytes of weights that come in, of the same shape, as all that follow.
        state: The bytes of state, which comes in and leaves.
        gradients: The bytes of gradients, which come in; for them new weights leave.
        ranges: The number of ranges.

    Attributes:
        passes: Whether a block's state passes behind that of all present blocks, because the block is not present.
        later: Seconds in which the state of the blocks after a block passes behind.
        waits: Whether a block has ranges that wait for what leaves early.
        to_come: Seconds in which the last copies of a block come in when its early part has left.
        rest: Seconds of the copies that leave when a block has been updated.
        leaving: Seconds of all copies that leave for the next present block.
        lead: Seconds by which the first of these begins before all copies of that block have come in.
        slots: Seconds of its copies that the slots have room for.
    """

    def __init__(
        self, link: Link, now: Array, present: Array, weights: Array, state: Array, gradients: Array, ranges: Array
    ) -> None:
        behind = np.where(present, 0.0, 2 * state / link.both_ways)  # seconds; as much comes in as leaves
        total = behind.sum(axis=0)
        self.passes, self.later = behind > 0, total - np.cumsum(behind, axis=0)
        state = np.where(present, state, 0.0)
        waiting = np.maximum(0, ranges - TRANSFER_SLOTS) / ranges  # share of the ranges
        self.waits, early = (state + gradients) * waiting > 0, state * waiting
        # What is still to come in when the early part has left: the last range, and gradients for which nothing left.
        to_come = (early > 0) * state / ranges + gradients * waiting
        # Without state nothing leaves meanwhile, and with it the early part starts to leave after the first range.
        idle = np.where(early > 0, 0.0, to_come)
        lead = np.where(early > 0, (state + gradients) * (1 - 1 / ranges), to_come)
        rest = state * (1 - waiting) + (gradients > 0) * weights
        last = present & (np.cumsum(present, axis=0) == np.sum(present, axis=0))
        self.to_come, self.rest = to_come / link.rate, (idle + rest) / link.rate + last * total
        self.leaving = following(early / link.rate + self.rest, present)
        self.lead = following(lead, present) / link.rate
        slots = np.where(early > 0, TRANSFER_SLOTS * (state + gradients) / ranges, np.inf)
        self.slots = following(slots, present) / link.rate
        link.copy_last(now, ~present.any(axis=0) * total)
        super().__init__(link, now, present, weights + state + gradients)

    def take(self, i: int, now: Array) -> Array:
        """Issues the copies of the block after the i-th, and returns when the i-th one can be computed."""
        link, waits = self.link, self.present[i] & self.waits[i]
        come = np.maximum(self.arrived, link.left(now, self.rest[i]) + self.to_come[i])
        self.arrived = np.where(waits, come, self.arrived)
        link.free[IN] = np.where(waits, np.maximum(link.free[IN], self.arrived), link.free[IN])
        return np.maximum(super().take(i, now), link.left(now, self.later[i]) * self.passes[i])

    def issue(self, i: int, now: Array, some: Array) -> Array:
        """Issues the copies of the first present block from the i-th on, of some mixtures; returns when they end."""
        arrived = super().issue(i, now, some)
        self.link.reach = np.where(some > 0, self.slots[i], self.link.reach)
        self.link.copy_last(arrived - self.lead[i], self.leaving[i] * some)
        return np.where(self.leaving[i] * some > 0, np.maximum(arrived, self.link.free[IN]), arrived)


class Leaving:
    """Copies that leave after a block, of which IN_FLIGHT may be on their way when the next block starts."""

    def __init__(self, link: Link, now: Array) -> None:
        self.link, self.ends = link, [now] * IN_FLIGHT

    def put(self, now: Array, num_bytes: Array) -> Array:
        """Issues a copy; returns when the next block may start."""
        some = num_bytes > 0
        oldest, *ends = [*self.ends, self.link.copy(OUT, now, num_bytes)]
        self.ends = [np.where(some, later, earlier) for earlier, later in zip(self.ends, ends, strict=True)]
        return np.where(some, np.maximum(now, oldest), now)


class Timeline:
    """Simulates a step of all mixtures; arrays are (blocks, mixtures) unless described otherwise."""

    def __init__(self, costs: Costs, machine: Machine) -> None:
        self.costs, self.sizes, self.machine = costs, costs.sizes, machine
        self.kinds = list(costs.kinds)
        self.streamed = self.of([kind.weights == HOST for kind in self.kinds])
        self.stored = self.of([kind.kept == HOST for kind in self.kinds])
        self.weights, self.saved = self.on_host(WEIGHTS), self.on_host(SAVED)
        self.gradients = self.on_host(GRADIENTS)
        self.state = self.on_host(STATE)
        # A range has room for fp32 gradients, also if those on the host have another type.
        moving = self.sizes.block_trained * (self.sizes.state_bytes + 4 * self.streamed)
        self.ranges = np.maximum(1, np.ceil(moving / RANGE_BYTES))

    def of(self, values: Sequence[Any]) -> Array:
        """Returns a value of each kind for every block."""
        return np.array(values)[self.costs.order]

    def on_host(self, part: str) -> Array:
        """Returns the bytes of a part of every block, if it is on the host, else 0."""
        own = [self.costs.parts(kind)[part] for kind in self.kinds]
        return self.of([float(num_bytes) if place == HOST else 0.0 for place, num_bytes in own])

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def compute_seconds(self, level: str) -> tuple[float, float]:
        """Returns the seconds that forward and backward of one block compute, if forward saves a level."""
        sizes, machine, trains_all = self.sizes, self.machine, self.sizes.block_trained > 0
        tokens = sizes.samples * sizes.tokens
        # 12 D^2 weights in linear layers, 2 FLOP each per token, and two products of S x S x D per sample.
        linear = 24 * tokens * sizes.width**2 / machine.matmul
        of_lora = 0 if trains_all else sizes.trained / sizes.blocks
        lora = LORA_SLOWNESS * 2 * of_lora * tokens / machine.matmul
        scores = 4 * tokens * sizes.tokens * sizes.sequence_parallel * sizes.width
        attend = scores / machine.attention
        attend_backward = 2.5 * scores / machine.attention_backward
        traffic, backward_traffic = TRAFFIC_UNITS[self.costs.compiled, trains_all]
        unit = sizes.unit_bytes / machine.memory
        linears, attentions = RECOMPUTED[level]
        # Gradients of the gates need the outputs of all linear layers, so all of these are recomputed.
        again = 1.0 if linears and trains_all else linears
        dequantize = sizes.matrix_bytes and (sizes.matrix_bytes + sizes.block_bytes) / machine.memory
        exchange, exchange_backward = exchange_seconds(level, sizes, machine)
        forward = linear + lora + attend + traffic * unit + dequantize + exchange
        backward = (2 if trains_all else 1) * linear + 2 * lora + attend_backward + backward_traffic[level] * unit
        backward += again * linear + (linears > 0) * lora + attentions * attend + (1 + again) * dequantize
        return forward, backward + exchange_backward

    def update_seconds(self, elements: Numbers) -> Numbers:
        """Returns the seconds of an update: it reads gradients, and reads and writes weights and state."""
        sizes = self.sizes
        traffic = 2 * sizes.state_bytes + 2 * sizes.item_bytes + sizes.sum_bytes
        seconds = traffic / self.machine.memory
        # State in 8 bits has a scale for each group, so its bytes per element are not a whole number.
        return elements * (max(seconds, EIGHT_BIT_SECONDS) if sizes.state_bytes % 1 else seconds)

    def norm_seconds(self, elements: Numbers) -> Numbers:
        """Returns the seconds of the norm of gradients, which reads them."""
        return elements * self.sizes.item_bytes / self.machine.memory

    def collect_seconds(self, elements: Numbers) -> Numbers:
        """Returns the seconds of adding gradients to those on the device, which are filled with zeros before."""
        traffic = self.sizes.item_bytes + 3 * self.sizes.device_gradient_bytes
        return elements * traffic / self.machine.memory

    # -- the step ------------------------------------------------------------------------------------------------------

    def seconds(self) -> Array:
        """Returns the seconds of a step of each mixture, (mixtures,)."""
        sizes, passes = self.sizes, self.sizes.passes
        total = self.one_pass(0)
        if passes > 1:
            total = total + self.one_pass(1)
        if passes > 2:
            total = total + (passes - 2) * self.one_pass(2)
        if sizes.processes > 1 or sizes.deepspeed:
            slowness = max(1.0, NVLINK_4 / self.machine.exchange)
            total = total + sizes.all_trained * EXCHANGE_SECONDS[sizes.deepspeed] * slowness
        return total + sizes.rows_on_host * HOST_STEP_SECONDS

    def one_pass(self, number: int) -> Array:
        """Returns the seconds of a forward and a backward pass of a step, counted from 0; those after 2 equal it.

        The first pass begins with the updates of the step before.
        """
        link = Link(self.machine.copies, self.machine.both_ways, self.costs.order.shape[1])
        now = np.zeros(self.costs.order.shape[1])
        if number == 0:
            now = self.start(link, now)
        leaving = Leaving(link, now)
        now = self.forward(link, now, leaving, number == 0 and not self.sizes.average_bytes)
        # Gradients of the first pass keep the compute type, and sums of several have sum_bytes.
        item, total = (
            self.streamed * self.sizes.block_trained * n for n in (self.sizes.item_bytes, self.sizes.sum_bytes)
        )
        now = self.backward(link, now, leaving, (0 * item, item, total)[number], (item, total, total)[number])
        return np.maximum(now, link.free[OUT])

    def start(self, link: Link, now: Array) -> Array:
        """Makes the updates that forward waits for; returns when they have ended."""
        sizes = self.sizes
        outside = sizes.trained * (self.costs.state == HOST)
        blocks = sizes.block_trained * np.sum((self.state == 0) & ~self.streamed, axis=0)
        norms = self.norm_seconds(sizes.trained + sizes.block_trained * np.sum(~self.streamed, axis=0))
        now = now + (norms + self.update_seconds(blocks + sizes.trained - outside)) / sizes.shards
        inward = outward = now * 0 + outside * sizes.state_bytes
        if sizes.average_bytes:  # the average is updated by the host, which waits for all transfers
            inward = inward + np.sum(self.state + self.gradients, axis=0)
            outward = outward + np.sum(self.state + (self.gradients > 0) * self.weights, axis=0)
        link.copy(IN, now, inward)
        link.copy(OUT, now, outward)
        return np.maximum(now, link.free.max(axis=0))

    def forward(self, link: Link, now: Array, saved: Leaving, updates: bool) -> Array:
        """Runs the forward pass; returns when it has ended."""
        forward = np.array([self.compute_seconds(kind.keep)[0] for kind in self.kinds])[self.costs.order]
        # Frozen weights of the blocks that backward has used last are still there.
        there = in_first(self.streamed, 0 if self.sizes.block_trained else WEIGHT_SLOTS)
        state, gradients = self.state * updates, self.gradients * updates
        update = self.update_seconds(self.sizes.block_trained) * ((state > 0) | (gradients > 0))
        incoming = Updates(link, now, self.streamed, self.weights * ~there, state, gradients, self.ranges)
        for i in range(self.sizes.blocks):
            now = np.maximum(incoming.take(i, now), now + update[i]) + forward[i]
            now = saved.put(now, self.saved[i])
        link.reach = np.full_like(now, np.inf)
        return np.maximum(now, link.free[LAST])  # backward waits for all updates

    def backward(self, link: Link, now: Array, left: Leaving, earlier: Array, gradients: Array) -> Array:
        """Runs the backward pass; returns when it has ended.

        Args:
            link: The copies.
            now: When forward has ended, (mixtures,).
            left: The copies of saved activations.
            earlier: The bytes of sums of gradients on the host to which those of each block are added.
            gradients: The bytes of gradients of each block that leave for the host.
        """
        down = slice(None, None, -1)
        backward = np.array([self.compute_seconds(kind.keep)[1] for kind in self.kinds])[self.costs.order][down]
        streamed, stored = self.streamed[down], self.stored[down]
        trained = self.sizes.block_trained
        backward = backward + np.where(streamed, self.norm_seconds(trained), self.collect_seconds(trained))
        # The last saved activations are still on the device, and backward waits until they have been copied too.
        saved = Prefetch(link, left.ends[-1], stored, self.saved[down] * ~in_first(stored, IN_FLIGHT))
        weights = Prefetch(link, now, streamed, self.weights[down] * ~in_first(streamed, WEIGHT_SLOTS))
        sums = Prefetch(link, now, streamed, earlier[down])
        leaving = Leaving(link, now)
        for i in range(self.sizes.blocks):
            ready = np.maximum(saved.take(i, now), weights.take(i, now))
            now = leaving.put(sums.take(i, ready + backward[i]), gradients[down][i])
        return now
