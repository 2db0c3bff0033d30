"""Tests which plans fit, which one is chosen, and the memory and the time that are predicted for them."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import TRANSFORMERS
from sizes_of_5b import LORA, SFT
from torch import Tensor

from cogvideox.memory.streaming import STAGES, TRANSFER_SLOTS, HostGradients, HostStore
from cogvideox.optimizer.adam_groups import RANGE_BYTES
from cogvideox.planning.choice import AS_FAST, choose_plan, compile_seconds, mixture, mixtures
from cogvideox.planning.costs import ENDS_UNITS, EXCHANGED_UNITS, Costs, Kinds
from cogvideox.planning.plan import (
    DEVICE,
    GIB,
    HOST,
    LEVELS,
    PRESETS,
    Axes,
    BlockPlan,
    Machine,
    NoPlanError,
    Sizes,
)
from cogvideox.planning.timeline import Timeline

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FAST = Machine(
    78 * GIB,
    100 * GIB,
    matmul=7e14,
    attention=4.3e14,
    attention_backward=4.3e14,
    memory=2.6e12,
    copies=5e10,
    both_ways=7.5e10,
)
LEAN = {BlockPlan(HOST, "attention", HOST, HOST): 42}


def costs(kinds: Kinds, state: str = HOST, sizes: Sizes = SFT) -> Costs:
    return Costs(kinds, state, True, sizes)


def seconds(kinds: Kinds, state: str = HOST, sizes: Sizes = SFT, machine: Machine = FAST) -> float:
    return float(Timeline(costs(kinds, state, sizes), machine).seconds()[0])


def pick(gib: float, axes: Axes = PRESETS["auto"], machine: Machine = FAST, compiled: bool = True):  # type: ignore[no-untyped-def]
    return choose_plan(axes, LORA, replace(machine, device_bytes=int(gib * GIB)), compiled, "cudnn")


@pytest.mark.parametrize("gib", [70, 40, 22.5, 14, 10, 6.5, 4])
def test_the_plan_fits_and_more_memory_is_never_slower(gib: float) -> None:
    plan = pick(gib)
    assert plan.peak <= gib * GIB
    assert plan.seconds <= pick(3.95).seconds * AS_FAST
    assert pick(gib + 8).seconds <= plan.seconds * AS_FAST


@pytest.mark.parametrize(("gib", "steps"), [(70, 20), (14, 20), (8, 60), (14, 2)])
def test_a_second_level_must_save_more_than_its_compilation_takes(gib: float, steps: int) -> None:
    machine = replace(FAST, device_bytes=int(gib * GIB))
    short, long = (choose_plan(PRESETS["auto"], replace(LORA, steps=n), machine, True, "cudnn") for n in (steps, 3000))
    assert [len({block.keep for block in plan.blocks}) for plan in (short, long)] == [1, 2]
    assert 0 < (short.seconds - long.seconds) * steps < 12  # these are the seconds of a step without compilation


def test_an_eager_plan_compiles_nothing() -> None:
    machine = replace(FAST, device_bytes=40 * GIB)
    long, short = (choose_plan(PRESETS["auto"], replace(LORA, steps=n), machine, False, "cudnn") for n in (0, 2))
    assert long == short
    assert long.compilation == 0


@pytest.mark.parametrize(
    ("parallel", "lengths", "any_length", "graphs", "levels"),
    [(1, 1, False, 1, 2), (1, 3, True, 1, 2), (2, 1, False, 1, 2), (2, 3, False, 3, 1)],
)
def test_blocks_are_compiled_for_each_length_if_samples_are_divided(
    parallel: int, lengths: int, any_length: bool, graphs: int, levels: int
) -> None:
    """A second level then has to save three times as much."""
    divided = replace(LORA, tokens=LORA.tokens // parallel, sequence_parallel=parallel)
    machine = replace(FAST, device_bytes=7 * GIB)
    plan = choose_plan(PRESETS["auto"], replace(divided, lengths=lengths, steps=450), machine, True, "cudnn")
    assert len({block.keep for block in plan.blocks}) == levels
    assert (plan.any_length, plan.compilation) == (any_length, 12 * levels * graphs)


def test_divided_tokens_take_less_memory_and_time() -> None:
    """Two processes need half of the time and the activations, and in addition what they exchange."""
    kinds = {BlockPlan(DEVICE, "attention"): 42}
    half = replace(LORA, tokens=LORA.tokens // 2, sequence_parallel=2)
    fast = replace(FAST, exchange=1e30)
    assert seconds(kinds, DEVICE, half, fast) == pytest.approx(seconds(kinds, DEVICE, LORA) / 2, rel=0.01)
    exchanged = 42 * (4 + 8) * half.unit_bytes / FAST.exchange
    assert seconds(kinds, DEVICE, half) == pytest.approx(seconds(kinds, DEVICE, half, fast) + exchanged)
    one, two = (costs(kinds, DEVICE, sizes).activation_bytes for sizes in (LORA, half))
    assert two - one / 2 == pytest.approx((ENDS_UNITS + EXCHANGED_UNITS) * half.unit_bytes)
    plan = choose_plan(PRESETS["auto"], half, FAST, True, "cudnn")
    assert plan.exchanging == pytest.approx(exchanged)
    assert f"tokens divided between 2 processes; predicted: peak {plan.peak / GIB:.2f} GiB" in str(plan)
    assert str(plan).endswith(f"s a step, {plan.exchanging:.3f} s of it communication")


def test_a_complete_sample_fits_in_evaluation() -> None:
    """If few tokens are trained on each process, a pass over all of them needs the most memory."""
    kinds = {BlockPlan(DEVICE, "input"): 42}
    for parallel, evaluation_is_larger in ((1, False), (2, False), (16, True)):
        sizes = replace(LORA, tokens=LORA.tokens // parallel, sequence_parallel=parallel)
        found = costs(kinds, DEVICE, sizes)
        assert (found.complete_sample_bytes > found.activation_bytes) == evaluation_is_larger
        assert found.peak_bytes >= found.held(DEVICE, "weights") + found.complete_sample_bytes


def test_what_fits_stays_on_the_device() -> None:
    plan = pick(75)
    assert {block.weights for block in plan.blocks} == {DEVICE}
    assert {block.kept for block in plan.blocks} == {DEVICE}
    assert plan.state == DEVICE


def test_the_smallest_card() -> None:
    plan = pick(3.7)
    assert {block.weights for block in plan.blocks} == {HOST}
    assert plan.state == HOST
    with pytest.raises(NoPlanError, match=r"needs 3\.\d GiB of device memory.* 3\.0 and 90\.0 GiB are available"):
        pick(3)


def test_slow_copies_keep_weights_on_the_device() -> None:
    slow = replace(FAST, copies=2e9, both_ways=3e9)
    assert sum(block.weights == HOST for block in pick(24, machine=slow).blocks) < 42
    assert pick(24, machine=slow).seconds > pick(24).seconds


def test_too_little_host_memory() -> None:
    with pytest.raises(NoPlanError):
        pick(5, machine=replace(FAST, host_bytes=2 * GIB))
    assert pick(30, machine=replace(FAST, host_bytes=2 * GIB)).state == DEVICE


@pytest.mark.parametrize(("gib", "least", "most"), [(20, 0.6, 0.9), (28, 0.4, 0.6)])
def test_host_memory_is_filled_only_if_nothing_else_fits(gib: int, least: float, most: float) -> None:
    """On a card of 4 GiB, saving the attention outputs of all blocks would be faster, but take 70 % of 28 GiB."""
    machine = replace(FAST, host_bytes=gib * GIB)
    plan = pick(4, machine=machine)
    kinds = {kind: plan.blocks.count(kind) for kind in set(plan.blocks)}
    assert least < costs(kinds, plan.state, LORA).host_bytes / machine.host_bytes <= most


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_obeyed(name: str) -> None:
    axes = PRESETS[name]
    plan = pick(75, axes)
    assert all(b.weights in axes.weights and b.keep in axes.keep and b.kept in axes.kept for b in plan.blocks)
    assert plan.state in axes.state


def test_a_mixture_is_spread_evenly() -> None:
    first, second = BlockPlan(HOST), BlockPlan(DEVICE)
    for blocks in (mixture({first: 10, second: 32}), mixture({second: 32, first: 10})):
        assert blocks.count(first) == 10
        places = [i for i, block in enumerate(blocks) if block == first]
        gaps = {b - a for a, b in itertools.pairwise(places)}
        assert gaps <= {4, 5}


@pytest.mark.parametrize("count", [1, 10, 21, 41])
def test_a_mixture_begins_and_ends_with_what_is_on_the_device(count: int) -> None:
    """Then forward begins before a copy has ended, and so does backward."""
    here, away = BlockPlan(HOST, "attention", HOST, DEVICE), BlockPlan(HOST, "attention", HOST, HOST)
    for kinds in ({here: count, away: 42 - count}, {away: 42 - count, here: count}):
        assert mixture(kinds)[0] == here
    saved, others = BlockPlan(HOST, "linear", DEVICE), BlockPlan(HOST, "attention", HOST)
    for kinds in ({saved: count, others: 42 - count}, {others: 42 - count, saved: count}):
        assert mixture(kinds)[-1] == saved


@pytest.mark.parametrize("count", [1, 10, 21, 41])
def test_the_order_of_a_mixture_does_not_depend_on_the_order_of_its_kinds(count: int) -> None:
    every = mixtures(PRESETS["auto"], SFT)
    for one, other in itertools.combinations(every, 2):
        assert mixture({one: count, other: 42 - count}) == mixture({other: 42 - count, one: count})


@pytest.mark.parametrize("count", [1, 10, 21, 41])
def test_a_mixture_ends_with_what_saves_most(count: int) -> None:
    """Backward has deleted that when it comes to blocks that compute more, which need 8 units more."""
    more, less = BlockPlan(keep="linear"), BlockPlan(keep="attention")
    saved = count * SFT.kept_bytes("linear") + (42 - count) * SFT.kept_bytes("attention")
    for kinds in ({more: count, less: 42 - count}, {less: 42 - count, more: count}):
        assert mixture(kinds)[-1] == more
        assert costs(kinds, DEVICE).activation_bytes == saved + costs(kinds).work_bytes(more)


def test_keeping_more_costs_memory_and_saves_time() -> None:
    kinds = [{BlockPlan(keep=level): 42} for level in LEVELS[:3]]
    peaks = [costs(kind, DEVICE, LORA).peak_bytes for kind in kinds]
    times = [seconds(kind, DEVICE, LORA, FAST) for kind in kinds]
    assert peaks == sorted(peaks)
    assert times == sorted(times, reverse=True)
    assert costs({BlockPlan(kept=HOST, keep="attention"): 42}, HOST, LORA).host_bytes > 8 * GIB


def test_a_quantized_block_is_smaller_and_little_of_it_is_dequantized() -> None:
    small = replace(LORA, block_bytes=LORA.block_bytes // 2, matrix_bytes=LORA.block_bytes)
    for weights, stored in ((DEVICE, LORA.blocks), (HOST, 3)):
        kinds = {BlockPlan(weights): LORA.blocks}
        saved = costs(kinds, HOST, LORA).peak_bytes - costs(kinds, HOST, small).peak_bytes
        assert saved == pytest.approx((stored / 2 - 0.1) * LORA.block_bytes)


@pytest.mark.parametrize("sizes", [LORA, replace(SFT, passes=2), replace(SFT, average_bytes=4)])
def test_predictions_for_all_mixtures_at_once_are_those_for_each(sizes: Sizes) -> None:
    kinds = mixtures(PRESETS["auto"], sizes)
    every = np.stack([*kinds.values()], axis=1)
    assert (every.sum(axis=1) == 42).all()
    assert len(np.unique(every, axis=0)) == len(every) == len(kinds) + math.comb(len(kinds), 2) * 41
    predict = {
        "peak": lambda kinds, state: costs(kinds, state, sizes).peak_bytes,
        "host": lambda kinds, state: costs(kinds, state, sizes).host_bytes,
        "seconds": lambda kinds, state: Timeline(costs(kinds, state, sizes), FAST).seconds(),
        "compilation": lambda kinds, state: compile_seconds(kinds, True, sizes),
    }
    for name, state in itertools.product(predict, (DEVICE, HOST)):
        at_once = predict[name](kinds, state)
        for index in range(0, len(every), 389):
            one = {kind: int(numbers[index]) for kind, numbers in kinds.items() if numbers[index]}
            assert predict[name](one, state) == pytest.approx(at_once[index], rel=1e-12), name


@pytest.mark.parametrize("kept", [DEVICE, HOST])
def test_bytes_in_flight_equal_those_of_a_host_store(kept: str) -> None:
    """Compares every mixture with a HostStore. Tensors that stay on the device do not displace those that leave it."""
    heavy, other = BlockPlan(HOST, "linear", HOST), BlockPlan(HOST, "attention", kept)
    units = {heavy: 10, other: 2}
    for count in range(1, 13):
        store, most = HostStore(torch.device("cpu")), 0
        blocks = mixture({heavy: count, other: 12 - count})
        for i, block in enumerate(blocks):
            if block.kept == HOST:
                store.put(i, {"kept": torch.zeros(units[block], dtype=torch.uint8)})
            most = max(most, sum(tensors["kept"].numel() for tensors, _ in store.leaving.values()))
        small = replace(LORA, blocks=12, tokens=1, width=1, item_bytes=1, heads=0)
        kinds = {kind: blocks.count(kind) for kind in set(blocks)}
        assert costs(kinds, HOST, small).in_flight_bytes == most


def test_of_equally_fast_plans_the_one_that_copies_least_is_taken() -> None:
    """Optimizer state counts too: on this card it fits together with blocks that copy a little more."""
    assert pick(18).state == DEVICE
    kinds = {kind: pick(75).blocks.count(kind) for kind in set(pick(75).blocks)}
    assert costs(kinds, DEVICE, LORA).all_copied_bytes == 0
    assert costs(kinds, HOST, LORA).all_copied_bytes == LORA.trained * LORA.state_bytes


def test_the_text_of_a_plan() -> None:
    text = str(pick(10))
    assert "42 blocks compiled" in text
    assert "streamed from the host" in text
    assert "attention by cudnn" in text
    assert "optimizer state on the" in text
    rest = replace(pick(10).blocks[0], state=HOST)
    plan = replace(pick(10), blocks=(rest,), state=DEVICE)
    assert str(plan).startswith("1 block compiled, ")
    assert "optimizer state on the device, of 1 block on the host" in str(plan)
    assert re.search(r"predicted: peak 9\.\d\d GiB, \d+\.\d GiB of host memory, \d\.\d\d s a step$", text)


def test_memory_of_a_streamed_base_and_an_average() -> None:
    lean = {BlockPlan(HOST, "attention", HOST): 42}
    weights = 42 * LORA.block_bytes
    resident = {BlockPlan(DEVICE, "attention", HOST): 42}
    assert costs(lean, HOST, LORA).host_bytes - costs(resident, HOST, LORA).host_bytes == weights
    here = replace(LORA, ranks=4)  # the processes of a machine have one copy
    assert costs(lean, HOST, LORA).host_bytes - costs(lean, HOST, here).host_bytes == weights * 3 // 4
    with_average = replace(LORA, average_bytes=4)
    assert (
        costs(resident, DEVICE, with_average).peak_bytes - costs(resident, DEVICE, LORA).peak_bytes == 4 * LORA.trained
    )


# -- all weights -------------------------------------------------------------------------------------------------------


def test_all_weights_of_5b_are_trained_on_a_card_of_8_gib_out_of_host_memory() -> None:
    plan = choose_plan(
        PRESETS["lean"], SFT, replace(FAST, device_bytes=int(7.4 * GIB), host_bytes=128 * GIB), True, "cudnn"
    )
    assert plan.blocks == mixture(LEAN)
    per_number = 2 + 2 + 2 + 8  # weight, gradient, low bits of the master, two moments
    kept = 42 * SFT.kept_bytes("attention")
    assert plan.pinned == 42 * SFT.block_trained * per_number + kept + SFT.trained * 10
    assert costs(LEAN, HOST, replace(SFT, ranks=4)).pinned_bytes == plan.pinned  # trained weights are not shared
    with pytest.raises(NoPlanError, match="of host memory"):
        choose_plan(PRESETS["lean"], SFT, replace(FAST, host_bytes=64 * GIB), True, "cudnn")


def test_state_on_the_device_takes_memory_and_is_not_copied() -> None:
    kept_state = {BlockPlan(HOST, "attention", HOST, DEVICE): 10, next(iter(LEAN)): 32}
    numbers = 10 * SFT.block_trained
    assert costs(kept_state).peak_bytes - costs(LEAN).peak_bytes == SFT.state_bytes * numbers
    assert costs(LEAN).pinned_bytes - costs(kept_state).pinned_bytes == SFT.state_bytes * numbers
    assert costs(LEAN).all_copied_bytes - costs(kept_state).all_copied_bytes == SFT.state_bytes * numbers
    assert seconds(kept_state) < seconds(LEAN)


@pytest.mark.parametrize(("gib", "least", "most"), [(10, 0, 8), (24, 0, 20), (80, 30, 42)])
def test_as_much_state_as_fits_stays_on_the_device(gib: float, least: int, most: int) -> None:
    machine = replace(FAST, device_bytes=int(gib * GIB), host_bytes=160 * GIB)
    chosen = choose_plan(PRESETS["auto"], SFT, machine, True, "cudnn")
    here = sum(block.state == DEVICE for block in chosen.blocks)
    assert least <= here <= most
    text = re.search(r"optimizer state on the (\w+)(?:, of (\d+) blocks? on the (\w+))?;", str(chosen))
    there = len(chosen.blocks) - here
    expected = {("host", f"{here}", "device"), ("device", f"{there}", "host"), ("device", None, None)}
    expected |= set() if here else {("host", None, None)}
    assert text is not None
    assert text.groups() in expected
    assert chosen.peak <= machine.device_bytes
    assert chosen.seconds < choose_plan(PRESETS["lean"], SFT, machine, True, "cudnn").seconds


def test_neither_a_checkpoint_nor_the_export_needs_host_memory() -> None:
    """A checkpoint is written tensor by tensor. The export loads weights that were freed when they were placed."""
    for sizes in (SFT, replace(SFT, ranks=4), LORA):
        assert costs({BlockPlan(keep="attention"): 42}, DEVICE, sizes).host_bytes == 0


def test_a_plan_says_how_much_host_memory_it_leaves() -> None:
    machine = replace(FAST, device_bytes=23 * GIB, host_bytes=160 * GIB)
    chosen = choose_plan(PRESETS["lean"], SFT, machine, True, "cudnn")
    assert chosen.spare_host == 160 * GIB - chosen.pinned


def test_an_average_on_the_host_prevents_overlap() -> None:
    averaged = replace(SFT, average_bytes=4)
    here = {BlockPlan(HOST, "attention", HOST, DEVICE): 42}
    assert seconds(LEAN, HOST, averaged, FAST) > seconds(LEAN) + 0.2
    assert costs(LEAN, HOST, averaged).all_copied_bytes == costs(LEAN).all_copied_bytes
    assert costs(here, HOST, averaged).peak_bytes - costs(here).peak_bytes == 4 * 42 * SFT.block_trained


@pytest.mark.parametrize(
    ("weights", "state", "follows", "on_device"),
    [
        (HOST, HOST, False, 0),
        (HOST, DEVICE, False, 42 * SFT.block_trained),
        (DEVICE, HOST, False, 0),
        (DEVICE, HOST, True, SFT.all_trained),
        (HOST, HOST, True, SFT.trained),
    ],
)
def test_averages_take_memory_where_masters_are_and_are_not_pinned(
    weights: str, state: str, follows: bool, on_device: int
) -> None:
    kinds = {BlockPlan(weights, "attention", HOST, state): 42}
    averaged = costs(kinds, sizes=replace(SFT, average_bytes=4, average_follows_weight=follows))
    assert averaged.peak_bytes - costs(kinds).peak_bytes == 4 * on_device
    assert averaged.host_bytes - costs(kinds).host_bytes == 4 * (SFT.all_trained - on_device)
    assert averaged.pinned_bytes == costs(kinds).pinned_bytes


def test_state_on_the_device_does_not_depend_on_where_weights_are() -> None:
    """This holds for the state of blocks and of layers outside them."""
    for gib in (75, 85, 110):
        chosen = choose_plan(Axes(state=(DEVICE,)), SFT, replace(FAST, device_bytes=gib * GIB), True, "cudnn")
        kinds = {kind: chosen.blocks.count(kind) for kind in chosen.blocks}
        assert costs(kinds, chosen.state).state_at(DEVICE) == SFT.all_trained * SFT.state_bytes


def test_a_lora_s_state_may_stay_while_weights_are_streamed() -> None:
    assert choose_plan(Axes(weights=(HOST,), state=(DEVICE,)), LORA, FAST, True, "cudnn").state == DEVICE


@pytest.mark.parametrize("tokens", [482, 17776])
def test_forward_may_need_more_than_backward(tokens: int) -> None:
    """With short clips and small blocks, updates that pass take more memory than what backward computes."""
    lean = costs(LEAN, sizes=replace(SFT, tokens=tokens, block_trained=SFT.block_trained // 10))
    slot = RANGE_BYTES * (1 + 2 / 14)  # state outside the blocks, and the gradients of a range of a block
    assert lean.transfer_slot_bytes == pytest.approx(TRANSFER_SLOTS * slot)
    backward = lean.activation_bytes + lean.moving_gradient_bytes
    assert lean.forward_bytes > lean.transfer_slot_bytes + lean.saved_bytes
    stored = lean.peak_bytes - max(backward, lean.forward_bytes)
    assert stored == costs(LEAN).peak_bytes - costs(LEAN).activation_bytes - costs(LEAN).moving_gradient_bytes
    assert (lean.forward_bytes > backward) == (tokens == 482)
    assert costs(LEAN, HOST, LORA).transfer_slot_bytes == STAGES * RANGE_BYTES  # of a LoRA, before the blocks compute


def test_weights_without_optimizer_state_are_planned() -> None:
    """As in fp32 with SGD."""
    stateless = replace(SFT, item_bytes=4, state_bytes=0)
    plan = choose_plan(Axes(weights=(DEVICE,), state=(DEVICE,)), stateless, FAST, False, "cpu")
    assert plan.peak > SFT.all_trained * 4


def test_sums_of_several_passes_take_twice_the_memory() -> None:
    several = replace(SFT, passes=2)
    more = costs(LEAN, HOST, several).pinned_bytes - costs(LEAN).pinned_bytes
    assert more == 2 * 42 * SFT.block_trained
    more = costs(LEAN, HOST, several).peak_bytes - costs(LEAN).peak_bytes
    # Two blocks are copied out, and one is copied back in bf16, to which another is added.
    assert more == SFT.block_trained * (2 * (4 - 2) + 2 + 4)


@pytest.mark.parametrize("name", ["5b", "5b_sft", "1.5-5b_sft", "2b_sft"])
def test_the_memory_of_a_block_s_backward_pass_is_what_was_measured(name: str) -> None:
    """The measured blocks differ in how many tokens there are for each weight, and so for each gradient."""
    measured = json.loads((RESULTS / f"one_block_{name}.json").read_text())
    config = TRANSFORMERS[measured["kind"]]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    # Four square layers of attention, two of the MLP that are four times as large, and two that make 6 vectors each.
    weights = (12 * width + 2 * 6 * config["time_embed_dim"]) * width
    trained = weights if measured["rank"] == 0 else 0
    sizes = replace(SFT, tokens=measured["tokens"], width=width, block_trained=trained)
    for row in measured["rows"]:
        of_all = Costs({}, HOST, row["how"] != "eager", sizes).work_bytes(BlockPlan(keep=row["level"]))
        found = (of_all - ENDS_UNITS * sizes.unit_bytes) / 2**20
        assert row["backward_mib"] * 0.99 < found < row["backward_mib"] * 1.07, row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_gradients_on_the_device_take_what_host_gradients_need(
    dtype: torch.dtype, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts, whenever a block begins to leave and when its sums exist, what is on the device."""
    host, peak, size = HostGradients(torch.device("cpu")), 0, 512
    add, put = HostGradients._sums, HostStore.put

    def count(*more: Iterable[Tensor]) -> None:
        nonlocal peak
        moving = [tensors.values() for tensors, _ in (*host.store.leaving.values(), *host.store.arriving.values())]
        peak = max(peak, sum(tensor.nbytes for tensors in (*moving, *more) for tensor in tensors))

    def counted_sums(earlier: dict[str, Tensor], gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        sums, array = add(earlier, gradients)
        count(gradients, earlier.values(), [array])
        return sums, array

    def counted_put(store: HostStore, block: int, kept: dict[str, Tensor]) -> None:
        count(kept.values())
        put(store, block, kept)

    monkeypatch.setattr(HostGradients, "_sums", staticmethod(counted_sums))
    monkeypatch.setattr(HostStore, "put", counted_put)
    for _ in range(passes):
        for block in reversed(range(6)):
            host.add(block, [torch.ones(size, dtype=dtype)])
    sizes = replace(SFT, blocks=6, block_trained=size, item_bytes=dtype.itemsize, passes=passes)
    moving = costs({BlockPlan(HOST): 6}, sizes=sizes).moving_gradient_bytes
    assert moving + size * dtype.itemsize == peak  # with the gradients of the current block


def test_the_optimizer_step_counts_once_for_all_passes() -> None:
    """Copies of four passes take four times as long as those of one, but the optimizer step takes the same time."""
    fp32 = replace(SFT, item_bytes=4)  # so that gradients of all passes have the same size
    one, two, four = (seconds(LEAN, HOST, replace(fp32, passes=n), FAST) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


def test_training_all_weights_takes_more_of_everything() -> None:
    resident = {BlockPlan(keep="attention"): 42}
    for kinds, state in ((LEAN, HOST), (resident, DEVICE), (resident, HOST)):
        assert seconds(kinds, state, SFT, FAST) > seconds(kinds, state, LORA, FAST)
        assert costs(kinds, state, SFT).peak_bytes > costs(kinds, state, LORA).peak_bytes
