"""adam.py: masters are exact, steps are those of torch.optim, and 8-bit moments behave like exact ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from stepping import ADAM_CLASSES, parameters, rate, state_equal, train
from torch import Tensor

from cogvideox.optimizer import adam_groups
from cogvideox.optimizer.adam import (
    BF16,
    CODES_FIRST,
    CODES_SECOND,
    EIGHT_BIT,
    FIRST,
    FIRST_SCALE,
    FP32,
    GROUP,
    LOW,
    SECOND,
    SECOND_SCALE,
    Adam,
    hashed,
    join,
    read_master,
    read_moments,
    rounded_at_random,
    split,
    stored_moments,
    update,
)
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.rule import make_masters

GROUPS = 8
ONE, ZERO = torch.ones(()), torch.zeros(())


def adam(moments: str = FP32, decoupled: bool = True, weight_decay: float = 0.01, beta2: float = 0.95) -> Adam:
    return Adam(0.9, beta2, 1e-8, weight_decay, decoupled, moments)


def fresh(settings: Adam, dtype: torch.dtype, groups: int = GROUPS) -> dict[str, Tensor]:
    """Returns the state of weights that have made no step."""
    types = settings.state_types(dtype).items()
    return {n: torch.zeros((groups,) if n.endswith(".scale") else (groups, GROUP), dtype=t) for n, t in types}


def step_of(settings: Adam, lr: float, step: int, skipped: Tensor = ZERO, divisor: Tensor = ONE) -> Tensor:
    """Returns the scalars of a step, counted from 1."""
    return settings.scalars(lr, divisor, skipped, torch.tensor(float(step), dtype=torch.float64))


def gradient_of(step: int, groups: int = GROUPS) -> Tensor:
    """Returns gradients whose sizes differ by up to 10**5 within a group."""
    sizes = torch.logspace(-5, 0, GROUP)
    return torch.randn(groups, GROUP, generator=torch.Generator().manual_seed(step)) * sizes


# -- masters -----------------------------------------------------------------------------------------------------------

SPECIAL = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38, 3.3895314e38, -3.3895314e38, 1.0, 1.00390625, 1.01171875]
)


def random_masters(seed: int, number: int = 2**20) -> Tensor:
    """Returns finite fp32 numbers with random bits."""
    generator = torch.Generator().manual_seed(seed)
    masters = torch.randint(-(2**31), 2**31, (number,), generator=generator).to(torch.int32).view(torch.float32)
    return masters[torch.isfinite(masters)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


@pytest.mark.parametrize("name", ["special", "random", "ties", "one exponent"])
def test_split_masters_are_joined_bit_for_bit(name: str) -> None:
    """Ties have the low bits 0x8000, which int16 has only as a negative number."""
    masters = {
        "special": SPECIAL,
        "random": random_masters(0),
        "ties": ((bits(random_masters(1)) & -65536) | 0x8000).view(torch.float32),
        "one exponent": torch.arange(0x3F80_0000, 0x3F90_0000, dtype=torch.int32).view(torch.float32),
    }[name]
    weight, low = split(masters)
    assert (weight.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits(join(weight, low)), bits(masters))  # bits, because 0.0 equals -0.0


def test_a_weight_is_the_nearest_bf16_number_and_ties_are_rounded_away_from_zero() -> None:
    masters = torch.cat([random_masters(2), SPECIAL])
    masters = masters[masters.abs() < 3e38]
    weight = split(masters)[0].double()
    below = (bits(masters) & -65536).view(torch.float32).double()  # the nearest number that is closer to zero
    above = ((bits(masters) & -65536) + 65536).view(torch.float32).double()
    to_below, to_above = (masters.double() - below).abs(), (above - masters.double()).abs()
    assert torch.equal(weight, torch.where(to_above <= to_below, above, below))
    ties = torch.tensor([1.00390625, -1.00390625, 1.01171875])
    assert split(ties)[0].tolist() == [1.0078125, -1.0078125, 1.015625]


def test_a_weight_differs_from_the_cast_of_torch_in_half_of_the_ties_by_one_step() -> None:
    """A tie is one of 65,536 masters. In half of them the even number, which torch takes, is the one nearer to zero."""
    weight, cast = split(random_masters(3, 2**23))[0], random_masters(3, 2**23).to(torch.bfloat16)
    differ = weight != cast
    low = bits(random_masters(3, 2**23)) & 0xFFFF
    assert (low[differ] == 0x8000).all()
    steps = weight[differ].view(torch.int16).int() - cast[differ].view(torch.int16).int()
    assert (steps == 1).all()  # of the magnitude, whatever the sign
    expected = 2**23 / 131_072
    assert abs(differ.sum().item() - expected) < 5 * math.sqrt(expected)
    every = torch.arange(0x3F80_0000, 0x3F80_0000 + 2**18, dtype=torch.int32).view(torch.float32)
    assert (split(every)[0] != every.to(torch.bfloat16)).sum() == 2**18 // 131_072


# -- exact moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", ADAM_CLASSES)
def test_fp32_equals_torch_bit_for_bit(rule: str, weight_decay: float) -> None:
    settings = adam(decoupled=rule == "adamw", weight_decay=weight_decay)
    ours = torch.randn(GROUPS, GROUP, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.Parameter(ours.clone())
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay, "foreach": False, "fused": False}
    optimizer = ADAM_CLASSES[rule]([theirs], lr=0.0, **options)
    state = fresh(settings, torch.float32)
    for step in range(1, 21):
        theirs.grad = gradient_of(step)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        update(ours, gradient_of(step), state, step_of(settings, rate(step), step), settings)
        assert torch.equal(ours, theirs)
        assert all(torch.equal(state[name], optimizer.state[theirs][name]) for name in (FIRST, SECOND))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments", [FP32, BF16, EIGHT_BIT])
def test_masters_of_16_bit_weights_are_those_of_fp32_weights(dtype: torch.dtype, moments: str) -> None:
    """Only the weights are rounded; the state beside them is the same."""
    settings = adam(moments)
    master = torch.randn(GROUPS, GROUP, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    weight, state, exact = master.to(dtype), fresh(settings, dtype), fresh(settings, torch.float32)
    if "master" in state:
        state["master"].copy_(master)
    for step in range(1, 21):
        for tensor, arrays in ((weight, state), (master, exact)):
            update(tensor, gradient_of(step), arrays, step_of(settings, rate(step), step), settings)
        assert torch.equal(read_master(weight, state), master)
        assert torch.equal(weight, split(master)[0] if dtype == torch.bfloat16 else master.to(dtype))
        assert all(torch.equal(state[name], exact[name]) for name in exact)


@pytest.mark.parametrize("moments", [FP32, BF16, EIGHT_BIT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_skipped_step_changes_no_bit(dtype: torch.dtype, moments: str, bad: float) -> None:
    settings = adam(moments)
    weight, state = gradient_of(0).to(dtype), fresh(settings, dtype)
    update(weight, gradient_of(1), state, step_of(settings, 0.1, 1), settings)
    before = {name: tensor.clone() for name, tensor in {**state, "weight": weight}.items()}
    gradient = gradient_of(2)
    gradient[:, 0] = bad
    update(weight, gradient, state, step_of(settings, 0.1, 1, skipped=ONE, divisor=torch.tensor(bad)), settings)
    assert state_equal(before, {**state, "weight": weight})
    update(weight, gradient_of(2), state, step_of(settings, 0.1, 2), settings)
    assert not any(torch.equal(before[name], tensor) for name, tensor in {**state, "weight": weight}.items())


# -- random rounding ---------------------------------------------------------------------------------------------------


def test_rounding_to_bf16_at_random_gives_a_neighbor_and_is_right_on_average() -> None:
    values = torch.randn(512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 512)
    below = values.view(torch.int32) & ~0xFFFF
    neighbors = [bits.view(torch.float32) for bits in (below, below + (1 << 16))]
    found = [rounded_at_random(values, hashed(torch.tensor(float(seed)), values)).float() for seed in range(2000)]
    assert all(((one == neighbors[0]) | (one == neighbors[1])).all() for one in found)
    distance = (neighbors[1] - neighbors[0]).abs()
    error = (torch.stack(found).double().mean(0) - values).abs() / distance
    assert error.max() < 0.06  # five deviations of the mean of 2,000 coins
    exact = values.bfloat16().float()
    assert torch.equal(rounded_at_random(exact, hashed(ONE, values)).float(), exact)


@pytest.mark.parametrize("moments", [FP32, BF16, EIGHT_BIT])
def test_weights_without_masters_follow_those_with_masters(moments: str) -> None:
    """Steps of a hundredth of the distance to the next bf16 number are lost if they are rounded to the nearest."""
    with_masters, without = adam(moments, weight_decay=0.0), replace(adam(moments, weight_decay=0.0), masters=False)
    moved = {}
    for settings in (with_masters, without):
        weight, state = torch.ones(64, GROUP, dtype=torch.bfloat16), fresh(settings, torch.bfloat16, 64)
        assert ("low" in state) == settings.masters
        for step in range(1, 101):
            gradient = gradient_of(step, 64) + torch.logspace(-5, 0, GROUP)
            update(weight, gradient, state, step_of(settings, 1e-4, step), settings)
        moved[settings.masters] = 1.0 - read_master(weight, state).mean()
    assert moved[True] > 2e-3
    torch.testing.assert_close(moved[False], moved[True], rtol=0.03, atol=0.0)


def test_bf16_moments_decay_at_the_rate_of_beta() -> None:
    """With 0.999, the decay of a step is a quarter of half the distance to the next bf16 number."""
    settings = adam(BF16, weight_decay=0.0, beta2=0.999)
    generator = torch.Generator().manual_seed(0)
    weight, start = torch.randn(64, GROUP, generator=generator), torch.rand(64, GROUP, generator=generator) + 1.0
    state = fresh(settings, torch.float32, 64)
    state[SECOND].copy_(start)
    for step in range(1, 101):
        update(weight, torch.zeros(64, GROUP), state, step_of(settings, 0.0, 1000 + step), settings)
    part = (state[SECOND].float() / start).mean()
    torch.testing.assert_close(part, torch.tensor(0.999**100), rtol=2e-3, atol=0.0)


# -- 8-bit moments -----------------------------------------------------------------------------------------------------


def stored(first: Tensor, second: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Returns moments in 8 bits."""
    return stored_moments(first, second, torch.int8, hashed(torch.tensor(float(seed)), first, second))


def some_moments(groups: int = GROUPS) -> tuple[Tensor, Tensor]:
    """Returns moments of which the second ones span ten orders of magnitude."""
    second = gradient_of(1, groups).square()
    return torch.randn(groups, GROUP, generator=torch.Generator().manual_seed(9)) * second.sqrt(), second


def test_the_error_of_8_bit_moments_is_less_than_the_distance_of_two_codes() -> None:
    """It is relative to the largest second moment, and to the largest ratio of a first moment to its root."""
    first, second = some_moments()
    found_first, found_second = read_moments(stored(first, second))
    largest = second.amax(-1, keepdim=True)
    code = CODES_SECOND * (second / largest) ** 0.125
    distance = ((code.floor() + 1) / CODES_SECOND) ** 8 - (code.floor() / CODES_SECOND) ** 8
    assert ((found_second - second).abs() <= 1.001 * distance * largest).all()
    assert ((found_second - second).abs() / largest).max() < 8 / CODES_SECOND
    ratio, found_ratio = first / second.sqrt(), found_first / found_second.sqrt()
    assert ((found_ratio - ratio).abs() / ratio.abs().amax(-1, keepdim=True)).max() < 2 / CODES_FIRST
    clear = second > 1e-6 * largest  # a thousandth of the largest gradient
    assert ((found_second - second).abs() / second)[clear].max() < 0.25
    assert torch.equal(found_second.amax(-1, keepdim=True), largest)
    assert found_first.sign().mul(first.sign()).min() >= 0


def test_rounding_is_right_on_average() -> None:
    """The mean of many roundings is the value. Rounding to the nearest would give one of the two codes always."""
    first, second = some_moments(2)
    repeated = [read_moments(stored(first, second, seed)) for seed in range(600)]
    means = [torch.stack([pair[i] for pair in repeated]).mean(0) for i in range(2)]
    assert len(torch.stack([pair[1] for pair in repeated])[:, 0, 7].unique()) == 2
    ratios = torch.stack([one / two.sqrt() for one, two in repeated]).mean(0)
    assert ((means[1] - second) / second).abs().max() < 0.06  # five deviations of the mean at the smallest element
    assert (ratios - first / second.sqrt()).abs().max() < 0.005


def test_elements_with_equal_gradients_are_not_rounded_alike() -> None:
    """Errors of many elements in one direction would add up."""
    settings = adam(EIGHT_BIT)
    weight, state = torch.randn(1, GROUP, generator=torch.Generator().manual_seed(0)), fresh(settings, torch.float32, 1)
    gradient = torch.full((1, GROUP), 0.3)
    gradient[:, 0] = 1.0
    update(weight, gradient, state, step_of(settings, 0.1, 1), settings)
    codes = state[SECOND][0, 1:].float()
    assert codes.max() - codes.min() == 1
    assert 20 < (codes == codes.max()).sum() < GROUP - 20


def test_moments_decay_at_the_rate_of_beta() -> None:
    """Without gradients codes that are rounded to the nearest would stay where they are."""
    settings = adam(EIGHT_BIT, weight_decay=0.0)
    weight, state = torch.zeros(64, GROUP), fresh(settings, torch.float32, 64)
    first, second = some_moments(64)
    first = second.sqrt() * first.sign()
    second[:, 0] = 1.0
    for name, tensor in stored(first, second).items():
        state[name].copy_(tensor)
    for step in range(1, 11):
        gradient = torch.zeros(64, GROUP)
        gradient[:, 0] = 1.0  # keeps the scale
        update(weight, gradient, state, step_of(settings, 0.0, 1000 + step), settings)
    found = read_moments(state)[1]
    part = (found / second)[:, 1:].mean(0)  # over the groups, by the size of the gradients
    torch.testing.assert_close(part.mean(), torch.tensor(0.95**10), rtol=0.05, atol=0.0)
    assert (part > 0.3).all()
    assert (part < 1.0).all()


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_no_step_is_longer_than_exact_moments_allow(beta2: float) -> None:
    """However small a second moment is beside the largest of its group, its first moment is small enough too.

    Exact moments satisfy |first| <= limit * sqrt(second), because of the inequality of Cauchy and Schwarz.
    """
    settings = adam(EIGHT_BIT, weight_decay=0.0, beta2=beta2)
    limit = math.sqrt(0.1**2 / (1 - beta2) / (1 - 0.9**2 / beta2))
    weight, state = torch.zeros(GROUPS, GROUP), fresh(settings, torch.float32)
    for step in range(1, 201):
        before = weight.clone()
        burst = 1e4 if step % 50 == 0 else 1.0  # of the largest gradients, so that scales change at once
        gradient = gradient_of(step) * torch.where(torch.arange(GROUP) > 250, burst, 1e-4)
        update(weight, gradient, state, step_of(settings, 1.0, 10**6 + step), settings)
        assert (weight - before).abs().max() <= 1.001 * limit
    first, second = read_moments(state)
    assert (first.abs() <= 1.001 * limit * second.sqrt()).all()


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_weights_move_as_with_exact_moments_however_small_their_gradients_are(beta2: float) -> None:
    """Gradients have a mean of 0.3 deviations, and sizes from 1 to 10**-5 within each group."""
    moved = {}
    for moments in (FP32, EIGHT_BIT):
        settings = Adam(0.9, beta2, 1e-12, 0.0, True, moments)
        weight, state = torch.zeros(128, GROUP), fresh(settings, torch.float32, 128)
        generator = torch.Generator().manual_seed(0)
        for step in range(1, 251):
            if step == 100:
                start = weight.clone()
            gradient = (torch.randn(128, GROUP, generator=generator) + 0.3) * torch.logspace(-5, 0, GROUP)
            update(weight, gradient, state, step_of(settings, 1.0, step), settings)
        moved[moments] = (start - weight).mean(0) / 151  # by the size of the gradients
    sizes = moved[EIGHT_BIT].view(8, -1).mean(-1) / moved[FP32].view(8, -1).mean(-1)
    torch.testing.assert_close(sizes, torch.ones(8), rtol=0.0, atol=0.02 if beta2 == 0.95 else 0.1)


def test_extreme_gradients_leave_8_bit_moments_finite() -> None:
    """Squares of the smallest gradients are zero in fp32, and a group may have no gradient at all."""
    settings = adam(EIGHT_BIT)
    weight, state = torch.ones(GROUPS, GROUP), fresh(settings, torch.float32)
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 1e-22, 1e-19, 1.0, 1e10, 1e18]).unsqueeze(-1)
    for step in range(1, 6):
        gradient = torch.randn(GROUPS, GROUP, generator=torch.Generator().manual_seed(step)) * sizes
        update(weight, gradient, state, step_of(settings, 1e-3, step), settings)
        assert all(torch.isfinite(tensor.float()).all() for tensor in (weight, *state.values(), *read_moments(state)))
    torch.testing.assert_close(weight[0], torch.full((GROUP,), (1 - 1e-5) ** 5), rtol=1e-6, atol=0.0)
    assert state[FIRST_SCALE][:1].item() == state[SECOND_SCALE][:1].item() == 0.0


def test_random_bits_are_uniform_and_depend_on_step_and_values() -> None:
    """Equal gradients, and none, still give random bits, because the step and the master are hashed too."""
    master, step = torch.randn(2**16, generator=torch.Generator().manual_seed(0)), torch.tensor(7.0)
    nothing = torch.zeros(2**16)
    for noise in (hashed(step, nothing, master), hashed(step, master, nothing)):
        for half in (noise, noise >> 16):
            counts = torch.bincount((half & 0xFFFF) >> 8, minlength=256).float()
            assert ((counts - 256).square() / 256).sum() < 400  # chi-square of 255 degrees of freedom: 255 +- 23
    assert not torch.equal(hashed(step, nothing, master), hashed(step + 1, nothing, master))
    over_steps = torch.stack([hashed(torch.tensor(float(s)), nothing[:4], master[:4]) & 0xFFFF for s in range(4096)])
    torch.testing.assert_close(over_steps.float().mean(0), torch.full((4,), 32767.5), rtol=0.03, atol=0.0)


# -- few bits in MasterWeights -----------------------------------------------------------------------------------------


def engine_of(
    moments: str, dtype: torch.dtype = torch.bfloat16, masters: bool = True, state_on_host: bool = False
) -> tuple[MasterWeights, dict[str, torch.nn.Parameter]]:
    params = parameters(dtype)
    return make_masters(params, replace(adam(moments), masters=masters), 5.0, False, state_on_host), params


SMALLER = [(EIGHT_BIT, True), (BF16, True), (FP32, False), (EIGHT_BIT, False)]  # moments, and whether there are masters


@pytest.mark.parametrize(("moments", "masters"), SMALLER)
def test_the_sign_of_a_gradient_of_zero_changes_no_bit(moments: str, masters: bool) -> None:
    """Adding a gradient to zeros, as is done on the device, turns -0 into 0; one that is stored on the host stays."""
    settings = replace(adam(moments), masters=masters)
    found = []
    for zero in (0.0, -0.0):
        weight, state = gradient_of(9).bfloat16(), fresh(settings, torch.bfloat16)
        for step in (1, 2):
            gradient = gradient_of(step)
            gradient[:, ::2] = zero if step == 2 else 1e-3
            update(weight, gradient, state, step_of(settings, 1e-3, step), settings)
        found.append({"weight": weight} | state)
    assert state_equal(*found)


@pytest.mark.parametrize(("moments", "masters"), SMALLER)
def test_smaller_state_is_the_same_wherever_it_is_stored(
    monkeypatch: pytest.MonkeyPatch, moments: str, masters: bool
) -> None:
    """Random bits depend on the numbers alone, not on the ranges in which arrays pass through the device."""
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", 12 * 512)
    on_device, params = engine_of(moments, masters=masters)
    on_host, again = engine_of(moments, masters=masters, state_on_host=True)
    assert len(on_host.passing[0]._ranges) > 1
    train(on_device, params, 0, 5)
    train(on_host, again, 0, 5)
    assert state_equal(on_device.state(), on_host.state())
    assert all(params[name].equal(again[name]) for name in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("moments", "masters"), SMALLER)
def test_a_resumed_run_with_smaller_state_continues_bit_for_bit(
    dtype: torch.dtype, moments: str, masters: bool
) -> None:
    one, params = engine_of(moments, dtype, masters)
    train(one, params, 0, 5)
    other, again = engine_of(moments, dtype, masters)
    train(other, again, 50, 52)  # Loading must overwrite this state.
    other.load_state(one.state())
    assert state_equal(one.state(), other.state())
    train(one, params, 5, 10)
    train(other, again, 5, 10)
    assert state_equal(one.state(), other.state())
    assert all(params[name].equal(again[name]) for name in params)
    types = {EIGHT_BIT: torch.int8, BF16: torch.bfloat16, FP32: torch.float32}
    assert one.state()[f"{FIRST}/down"].dtype == types[moments]
    assert LOW not in {name.split("/")[0] for name in one.state()}


def test_a_checkpoint_can_change_the_format_of_moments() -> None:
    """Codes that are written as fp32 and loaded again differ by what is rounded twice."""
    (exact, params), (low, coarse), (back, _) = engine_of(FP32), engine_of(EIGHT_BIT), engine_of(FP32)
    train(exact, params, 0, 5)
    low.load_state(exact.state())
    back.load_state(low.state())
    for name in params:
        wanted, found = exact.state(), back.state()
        assert found[f"{FIRST}/{name}"].dtype == torch.float32
        assert torch.equal(found[f"master/{name}"], wanted[f"master/{name}"])
        largest = wanted[f"{SECOND}/{name}"].max()
        error = (found[f"{SECOND}/{name}"] - wanted[f"{SECOND}/{name}"]).abs().max() / largest
        assert 0 < error < 8 / CODES_SECOND
        difference = (found[f"{FIRST}/{name}"] - wanted[f"{FIRST}/{name}"]).abs().max()
        assert 0 < difference < 0.05 * wanted[f"{FIRST}/{name}"].abs().max()
    train(exact, params, 5, 10)
    train(low, coarse, 5, 10)
    for name, master in exact.named_masters().items():
        torch.testing.assert_close(low.named_masters()[name], master, rtol=0.0, atol=0.02)
    fresh_state, _ = engine_of(EIGHT_BIT)
    low.load_state(fresh_state.state())  # of weights that never made a step
    assert not any(tensor.any() for name, tensor in low.state().items() if name.startswith((FIRST, SECOND)))
