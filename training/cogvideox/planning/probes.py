"""Measures the rates of a device: matrix products, attention, memory traffic, copies, and exchanges between processes.

The probes have the shapes of one sample of the run, and take about two seconds in all. ``timeline.py`` predicts the
seconds of a step from these rates.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from cogvideox.memory.buffers import pinned
from cogvideox.memory.streaming import SideStream, compute_waits_for
from cogvideox.model.attention import CPU, attend, attend_backward
from cogvideox.model.sequence import SequenceGroup, to_heads
from cogvideox.planning.plan import Machine, Sizes

PROBE_SECONDS = 0.2
TURNS_SECONDS = 1.0  # long enough for a card to reach its power limit, as it does in training
PRODUCTS_PER_BLOCK = 8  # of width x 4 width: three in forward; two to three for gradients and to compute outputs again
COPY_BYTES = 64 * 2**20
EXCHANGES = 10


def with_rates(machine: Machine, device: torch.device, dtype: torch.dtype, backend: str, sizes: Sizes) -> Machine:
    """Returns the machine with measured rates: FLOP/s of matrix products and attention, bytes/s of memory and copies.

    Probes use the shapes of one sample, so they need less memory than the backward pass of a block.
    """
    assert backend != CPU
    tokens, width, heads, parallel = sizes.tokens, sizes.width, sizes.heads, sizes.sequence_parallel
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    w = torch.randn(4 * width, width, device=device, dtype=dtype)
    q = torch.randn(1, tokens * parallel, -(-heads // parallel), width // heads, device=device, dtype=dtype)
    o, lse = attend(q, q, q, backend)
    host, here = pinned(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    scores = 4 * q.shape[1] * q.numel()
    product, forward, backward = seconds_in_turns(
        (lambda: x @ w.mT, PRODUCTS_PER_BLOCK),
        (lambda: attend(q, q, q, backend), 1),
        (lambda: attend_backward(o, q, q, q, o, lse, backend), 1),
    )
    return replace(
        machine,
        matmul=8 * tokens * width**2 / product,
        attention=scores / forward,
        attention_backward=2.5 * scores / backward,
        memory=2 * here.numel() / seconds_per_call(lambda: here.clone()),
        copies=host.numel() / seconds_per_call(lambda: here.copy_(host, non_blocking=True)),
        both_ways=rate_of_both_ways(device),
    )


def exchange_rate(device: torch.device, dtype: torch.dtype, sizes: Sizes, group: SequenceGroup) -> float:
    """Returns the bytes per second of a tensor of one sample's tokens that the processes of a group exchange."""
    division = group.division_of(sizes.tokens * group.size)
    x = torch.zeros(1, sizes.tokens, sizes.heads, sizes.width // sizes.heads, dtype=dtype, device=device)
    # Each process makes the same number of calls. Those before the first mark connect the processes, and make each
    # device wait for the others; otherwise the time until the last process starts would count.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for mark in marks:
        for _ in range(EXCHANGES):
            to_heads(x, division)
        mark.record()
    torch.cuda.synchronize()
    return EXCHANGES * x.nbytes * 1000 / marks[0].elapsed_time(marks[1])


def rate_of_both_ways(device: torch.device) -> float:
    """Returns the bytes per second of copies in both directions at once, together."""
    sides = SideStream(device), SideStream(device)
    hosts = [pinned(COPY_BYTES) for _ in sides]
    here = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in sides]
    pairs = (here[0], hosts[0]), (hosts[1], here[1])
    number = 4  # copies in a row, so that the waits between the streams do not count

    def copy() -> None:
        for side, (target, source) in zip(sides, pairs, strict=True):
            with side.after_compute():
                for _ in range(number):
                    target.copy_(source, non_blocking=True)
        for side in sides:
            compute_waits_for(side.record_event())

    return 2 * number * COPY_BYTES / seconds_per_call(copy)


def seconds_in_turns(*runs: tuple[Callable[[], object], int]) -> list[float]:
    """Returns the seconds of one call of each function on the device, while they take turns as in training.

    A card at its power limit lowers its clock, by an amount that depends on what it computes and on how long it has
    been computing. So the calls follow each other for TURNS_SECONDS, and only the second half of them counts.

    Args:
        runs: The functions, each with the number of calls in a turn.
    """

    def turn() -> list[torch.cuda.Event]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        marks[0].record()
        for mark, (run, calls) in zip(marks[1:], runs, strict=True):
            for _ in range(calls):
                run()
            mark.record()
        return marks

    turns = calls_within(TURNS_SECONDS, turn)
    marked = [turn() for _ in range(turns)][turns // 2 :]
    torch.cuda.synchronize()
    return [
        sum(marks[i].elapsed_time(marks[i + 1]) for marks in marked) / 1000 / len(marked) / calls
        for i, (_, calls) in enumerate(runs)
    ]


def seconds_per_call(run: Callable[[], object]) -> float:
    """Returns the seconds of one call on the device, averaged over calls that take about PROBE_SECONDS together."""
    calls = calls_within(PROBE_SECONDS, run)
    return seconds_of(run, calls) / calls


def calls_within(seconds: float, run: Callable[[], object]) -> int:
    """Returns how many calls take about some seconds, at least one."""
    seconds_of(run, 1)  # the first call chooses and compiles kernels
    return max(1, round(seconds / seconds_of(run, 1)))


def seconds_of(run: Callable[[], object], calls: int) -> float:
    """Returns the seconds of some calls on the device."""
    # Calls return before the device has executed them. Earlier work must not count, and these calls must end.
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - started
