"""master_weights.py, step.py: steps equal those of torch.optim and clip_grad_norm_."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from stepping import ADAM_CLASSES, SHAPES, loss_of, parameters, rate, state_equal, train, values
from torch.nn import Parameter

from cogvideox.config.flags import OptimizerFlags
from cogvideox.config.optimizers import make_optimizer
from cogvideox.optimizer import step as step_module
from cogvideox.optimizer.adam import split
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.rule import make_masters, rule_of
from cogvideox.optimizer.step import RankNumbers

FLAGS = OptimizerFlags(weight_decay=0.01)


def masters(
    params: dict[str, Parameter], *, norm: float = 0.0, scale: bool = False, rule: str = "adam"
) -> MasterWeights:
    flags = OptimizerFlags(optimizer=rule, weight_decay=FLAGS.weight_decay)
    return make_masters(params, rule_of(flags), norm, scale, passes=2)


# -- against torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ADAM_CLASSES)
def test_ranks_with_the_same_samples_step_like_one_rank(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, norm and loss are means over the ranks, and the mean of four equal values is exact."""
    one, four = parameters(), parameters()
    wanted = train(masters(one, norm=1.0, rule=rule), one, 0, 3)
    monkeypatch.setattr(step_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(step_module.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(step_module.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(step_module.dist, "all_reduce", lambda buffer: buffer.mul_(4))
    found = train(masters(four, norm=1.0, rule=rule), four, 0, 3)
    assert [values(result) for result in found] == [values(result) for result in wanted]
    assert all(four[name].equal(one[name]) for name in one)


@pytest.mark.parametrize("rule", ADAM_CLASSES)
@pytest.mark.parametrize("norm", [0.0, 5.0, 1e6])
def test_fp32_equals_torch(rule: str, norm: float) -> None:
    ours, theirs = parameters(), parameters()
    engine = masters(ours, norm=norm, rule=rule)
    options = {"betas": (FLAGS.beta1, FLAGS.beta2), "eps": FLAGS.epsilon, "weight_decay": FLAGS.weight_decay}
    reference = ADAM_CLASSES[rule](theirs.values(), lr=0.0, **options)
    clipped = 0
    for step in range(20):
        engine.backward(loss_of(ours, step))
        result = values(engine.step(rate(step)))
        loss = loss_of(theirs, step)
        reference.zero_grad()
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(theirs.values(), norm or float("inf"))
        clipped += length.item() > (norm or float("inf"))
        reference.param_groups[0]["lr"] = rate(step)
        reference.step()
        assert result["grad_norm"] == pytest.approx(length.item(), rel=1e-5)
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert result["skipped"] == 0
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-6)
    assert clipped == (20 if norm == 5.0 else 0)


def test_adam_and_adamw_differ() -> None:
    def final(rule: str) -> torch.Tensor:
        params = parameters()
        train(masters(params, rule=rule), params, 0, 5)
        return params["down"].detach()

    assert not torch.allclose(final("adam"), final("adamw"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_equals_fp32_masters_by_hand(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    engine = masters(params, norm=5.0)
    wanted = {name: p.detach().float() for name, p in params.items()}
    first = {name: torch.zeros_like(p) for name, p in wanted.items()}
    second = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for step in range(20):
        engine.backward(loss_of(params, step))
        rounded = {name: Parameter(p.to(dtype)) for name, p in wanted.items()}
        loss_of(rounded, step).backward()
        gradients = {name: p.grad.float() for name, p in rounded.items() if p.grad is not None}
        length = torch.cat([g.flatten() for g in gradients.values()]).norm()
        for name, master in wanted.items():
            gradient = gradients[name] / max(1.0, (length / 5.0).item()) + FLAGS.weight_decay * master
            first[name] = FLAGS.beta1 * first[name] + (1 - FLAGS.beta1) * gradient
            second[name] = FLAGS.beta2 * second[name] + (1 - FLAGS.beta2) * gradient**2
            mean = first[name] / (1 - FLAGS.beta1 ** (step + 1))
            root = (second[name] / (1 - FLAGS.beta2 ** (step + 1))).sqrt()
            wanted[name] = master - rate(step) * mean / (root + FLAGS.epsilon)
        engine.step(rate(step))
        for name, master in engine.named_masters().items():
            assert master.dtype == torch.float32
            torch.testing.assert_close(master.detach(), wanted[name], rtol=1e-5, atol=1e-5)
            assert torch.equal(params[name], split(master)[0] if dtype == torch.bfloat16 else master.to(dtype))
            wanted[name] = master.detach().clone()  # A tie in rounding must not affect later steps.
    assert params["down"].dtype == dtype


def test_updates_too_small_for_bf16_add_up() -> None:
    def moved(step: int) -> torch.Tensor:
        params = {"w": Parameter(torch.ones(4, dtype=torch.bfloat16))}
        engine = make_masters(params, partial(torch.optim.SGD, lr=0.0, fused=True), 0.0, False)
        for _ in range(step):
            engine.backward(params["w"].float().sum())
            engine.step(1e-4)
        return 1 - params["w"].detach().float()

    # The spacing of bf16 below 1 is 2^-8, so one update of 1e-4 is rounded away, but a hundred of them are not.
    assert torch.equal(moved(1), torch.zeros(4))
    torch.testing.assert_close(moved(100), torch.full((4,), 0.01), rtol=0, atol=2**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_micro_batches_equal_one_batch_of_four(dtype: torch.dtype) -> None:
    batch, parts = parameters(dtype), parameters(dtype)
    one, four = masters(batch, norm=5.0), masters(parts, norm=5.0)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.0, "atol": 0.03}
    for step in range(5):
        one.backward(torch.stack([loss_of(batch, 4 * step + k) for k in range(4)]).mean())
        for k in range(4):
            four.backward(loss_of(parts, 4 * step + k) / 4)
        first, second = values(one.step(rate(step))), values(four.step(rate(step)))
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5 if dtype == torch.float32 else 1e-2)
        for name in batch:
            torch.testing.assert_close(batch[name], parts[name], **tolerance)


def test_gradients_are_summed_in_fp32() -> None:
    """A sum of ones in bf16 would stop at 256, because bf16 cannot represent 257."""
    params = {"w": Parameter(torch.zeros(1, dtype=torch.bfloat16))}
    engine = make_masters(params, partial(torch.optim.SGD, lr=0.0, fused=True), 0.0, False)
    for _ in range(300):
        engine.backward(params["w"].float().sum())
    assert values(engine.step(0.0))["grad_norm"] == 300


def test_gradients_and_the_loss_are_zero_after_a_step() -> None:
    params = parameters()
    engine = masters(params)
    train(engine, params, 0, 1)
    assert all(p.grad is None for p in params.values())
    engine.backward(0.0 * loss_of(params, 0))
    right = {"loss": 0.0, "grad_norm": 0.0, "skipped": 0.0, "loss_scale": 1.0}
    assert values(engine.step(0.0)) == right | RankNumbers()._asdict()


# -- steps that are not finite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [0.0, 5.0])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.fault("numbers: a gradient that is not finite")
def test_a_step_that_is_not_finite_changes_nothing(bad: float, dtype: torch.dtype, norm: float, first: int) -> None:
    params, undisturbed = parameters(dtype), parameters(dtype)
    engine, reference = masters(params, norm=norm), masters(undisturbed, norm=norm)
    train(engine, params, 0, first)
    train(reference, undisturbed, 0, first)
    before = {name: p.detach().clone() for name, p in params.items()}
    state = engine.state()
    engine.backward(loss_of(params, 0))
    engine.backward(params["bias"][3].float() * bad)
    assert values(engine.step(0.1))["skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    if first:
        assert state_equal(engine.state(), state)
    # The next steps are the same as without the skipped step.
    assert [values(r)["skipped"] for r in train(engine, params, first, first + 3)] == [0, 0, 0]
    train(reference, undisturbed, first, first + 3)
    assert state_equal(engine.state(), reference.state())


# -- the loss scale of fp16 --------------------------------------------------------------------------------------------


def test_scaled_equals_unscaled() -> None:
    scaled, plain = parameters(), parameters()
    one, other = masters(scaled, norm=5.0, scale=True), masters(plain, norm=5.0)
    results = zip(train(one, scaled, 0, 10), train(other, plain, 0, 10), strict=True)
    for a, b in results:
        assert values(a) == values(b) | {"loss_scale": 2.0**16}
    assert state_equal(one.state(), other.state(), ignore=("loss_scale", "good_steps"))
    assert one.scale.value == step_module.INITIAL_SCALE == 2.0**16
    assert other.scale.value == 1


def test_the_scale_keeps_small_fp16_gradients() -> None:
    """A gradient of 1e-8 is smaller than the smallest positive fp16 number."""

    def norm(scale: bool) -> float:
        params = {"w": Parameter(torch.ones(1, dtype=torch.float16))}
        engine = make_masters(params, rule_of(FLAGS), 0.0, scale)
        engine.backward((params["w"].float() * 1e-8).sum())
        return values(engine.step(0.1))["grad_norm"]

    assert norm(False) == 0
    assert norm(True) == pytest.approx(1e-8, rel=1e-2)


@pytest.mark.fault("numbers: fp16 gradients that overflow")
def test_the_scale_halves_after_an_overflow_and_doubles_after_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "GROWTH_INTERVAL", 3)
    params = parameters(torch.float16)
    engine = masters(params, norm=1.0, scale=True)
    scales = []
    for step, size in enumerate([1e6, 1e6, 0.1, 0.1, 1e6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]):
        with torch.no_grad():
            before = engine.named_masters()["down"].clone()
        engine.backward(sum((p * size).float().sum() for p in params.values()))  # type: ignore[arg-type]
        skipped = values(engine.step(1e-3))["skipped"]
        assert skipped == (size == 1e6)
        assert torch.equal(before, engine.named_masters()["down"]) == bool(skipped)
        scales.append(engine.scale.value.item() / 2**16)
        assert step < 11
    half, quarter, eighth = 1 / 2, 1 / 4, 1 / 8
    assert scales == [half, quarter, quarter, quarter, eighth, eighth, eighth, quarter, quarter, quarter, half]


def test_scale_constants_are_those_of_torch() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_growth_interval() == step_module.GROWTH_INTERVAL
    assert scaler._init_scale == step_module.INITIAL_SCALE
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor()) == (2.0, 0.5)


def test_without_scaling_the_scale_stays_one() -> None:
    params = parameters()
    engine = masters(params)
    engine.backward(params["bias"].sum() * float("inf"))
    engine.step(0.1)
    assert engine.scale.value == 1


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ADAM_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_resumed_run_continues_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    scale = dtype == torch.float16
    reference = parameters(dtype)
    engine = masters(reference, norm=5.0, scale=scale, rule=rule)
    train(engine, reference, 0, 6)
    saved = {name: tensor.clone() for name, tensor in engine.state().items()}
    train(engine, reference, 6, 12)
    again = parameters(dtype, seed=1)
    resumed = masters(again, norm=5.0, scale=scale, rule=rule)
    resumed.load_state(saved)
    results = train(resumed, again, 6, 12)
    assert len(results) == 6
    assert state_equal(engine.state(), resumed.state())
    assert all(torch.equal(reference[name], again[name]) for name in reference)


def test_state_is_a_copy_of_plain_tensors() -> None:
    params = parameters()
    engine = masters(params)
    train(engine, params, 0, 2)
    state = engine.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    train(engine, params, 2, 4)
    assert state_equal(state, kept)
    names = {f"{key}/{name}" for key in ("master", "exp_avg", "exp_avg_sq", "step") for name in SHAPES}
    assert set(state) == names | {"loss_scale", "good_steps"}
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())


def test_state_before_the_first_step() -> None:
    params, other = parameters(), parameters(seed=1)
    engine, resumed = masters(params), masters(other)
    resumed.load_state(engine.state())
    train(engine, params, 0, 3)
    train(resumed, other, 0, 3)
    assert state_equal(engine.state(), resumed.state())


def test_state_of_an_earlier_version_without_a_scale() -> None:
    """Under torchao's optimizer on the host, it saved masters and the state of Adam only."""
    params, other = parameters(), parameters(seed=1)
    engine, resumed = masters(params), masters(other)
    train(engine, params, 0, 2)
    resumed.load_state({name: tensor for name, tensor in engine.state().items() if "/" in name})
    train(engine, params, 2, 4)
    train(resumed, other, 2, 4)
    assert state_equal(engine.state(), resumed.state())


def test_load_state_copies() -> None:
    params = parameters()
    engine = masters(params)
    train(engine, params, 0, 2)
    state = engine.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    engine.load_state(state)
    train(engine, params, 2, 4)
    assert state_equal(state, kept)


def test_the_optimizer_takes_every_flag() -> None:
    flags: Any = OptimizerFlags(optimizer="adamw", beta1=0.8, beta2=0.7, epsilon=1e-3, weight_decay=0.3)
    made = make_optimizer(flags, list(parameters().values()))
    assert isinstance(made, torch.optim.AdamW)
    assert {name: made.defaults[name] for name in ("betas", "eps", "weight_decay")} == {
        "betas": (0.8, 0.7),
        "eps": 1e-3,
        "weight_decay": 0.3,
    }
