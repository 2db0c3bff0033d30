"""offload.py: the same steps as MasterWeights, with a stand-in for torchao's class on a CPU and with it on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchao.optim
from fakes import options_of
from safetensors.torch import load_file, save_file
from stepping import loss_of, parameters, state_equal, train, values
from torch.nn import Parameter

from cogvideox.config.flags import OptimizerFlags
from cogvideox.config.optimizers import make_optimizer
from cogvideox.optimizer.engine import STATE_NAME, LocalEngine, make_engine
from cogvideox.optimizer.offload import HostMasters, OffloadedWeights
from cogvideox.optimizer.step import MasterWeights

FLAGS = OptimizerFlags(optimizer="adamw", weight_decay=0.01)
MAKE = partial(make_optimizer, FLAGS)


class OnTheCpu:
    """Imitates torchao's CPUOffloadOptimizer without streams or a device, according to its source."""

    def __init__(
        self, params: list[Parameter], optimizer_class: Callable[[Any], HostMasters], *, offload_gradients: bool
    ) -> None:
        self.queue: dict[Parameter, Any] = {}
        self.optim_dict, self.hosts = {}, {}
        self.offload_gradients = offload_gradients
        for parameter in (p for p in params if p.numel() >= 4096):
            self.hosts[parameter] = host = parameter.detach().clone()
            host.grad = torch.empty_like(host)
            self.optim_dict[parameter] = optimizer_class([{"params": host}])
            parameter.register_post_accumulate_grad_hook(self.take)
        small = [p for p in params if p.numel() < 4096]
        self.d_opt = optimizer_class([{"params": small}]) if small else None

    def take(self, parameter: Parameter) -> None:
        self.hosts[parameter].grad.copy_(parameter.grad)
        self.queue[parameter] = None
        if self.offload_gradients:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        if self.d_opt is not None:
            self.d_opt.step()
        for parameter in self.queue:
            self.optim_dict[parameter].step()
            parameter.copy_(self.hosts[parameter])
        self.queue.clear()

    def zero_grad(self) -> None:
        for parameter in self.hosts:
            parameter.grad = None
        if self.d_opt is not None:
            self.d_opt.zero_grad()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":
        monkeypatch.setattr(torchao.optim, "CPUOffloadOptimizer", OnTheCpu)
    return torch.device(request.param)


def placed(device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Parameter]:
    return {name: Parameter(p.detach().to(device)) for name, p in parameters(dtype, seed).items()}


def assert_rounded_alike(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> None:
    """Asserts equality except for the rounding of CPU and GPU kernels.

    A master halfway between two bf16 numbers may be rounded to either, which changes all that follows from this weight
    by a unit of bf16. At most one of a thousand elements may differ so much.
    """
    far = (first - second).abs() > 1e-5
    assert far.float().mean() <= (0.0 if dtype == torch.float32 else 1e-3)
    torch.testing.assert_close(first[far], second[far], rtol=2.0**-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload_gradients", [False, True])
def test_equals_masters_on_the_device(device: torch.device, dtype: torch.dtype, offload_gradients: bool) -> None:
    ours, theirs = placed(device, dtype), placed(device, dtype)
    engine, reference = OffloadedWeights(ours, MAKE, offload_gradients), MasterWeights(theirs, MAKE, 0.0, False)
    for step in range(8):
        (result,), (wanted,) = train(engine, ours, step, step + 1), train(reference, theirs, step, step + 1)
        assert values(result) == pytest.approx(values(wanted), rel=1e-5)
    state = reference.state()
    for name, tensor in engine.state().items():
        if device.type == "cpu":
            torch.testing.assert_close(tensor, state[name], rtol=0.0, atol=0.0)
        else:
            assert_rounded_alike(tensor, state[name], dtype)
        assert tensor.dtype == torch.float32
    assert all(parameter.grad is None for parameter in ours.values())
    assert all(ours[name].equal(engine.state()[f"master/{name}"].to(device, dtype)) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_continues_bit_for_bit(device: torch.device, dtype: torch.dtype, tmp_path: Path) -> None:
    reference, again = placed(device, dtype), placed(device, dtype, seed=1)
    engine, resumed = OffloadedWeights(reference, MAKE, True), OffloadedWeights(again, MAKE, True)
    train(engine, reference, 0, 4)
    save_file(engine.state(), tmp_path / "state.safetensors")
    train(engine, reference, 4, 8)
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    train(resumed, again, 4, 8)
    assert state_equal(engine.state(), resumed.state())
    assert all(reference[name].equal(again[name]) for name in reference)


@pytest.mark.parametrize("offload_gradients", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(device: torch.device, offload_gradients: bool) -> None:
    params = placed(device, torch.bfloat16)
    engine = OffloadedWeights(params, MAKE, offload_gradients)
    train(engine, params, 0, 3)
    before, state = {name: p.detach().clone() for name, p in params.items()}, engine.state()
    engine.backward(sum((p.float() * (0.0 if name == "up" else float("inf"))).sum() for name, p in params.items()))
    assert values(engine.step(0.1))["skipped"] == 1
    assert all(params[name].equal(before[name]) for name in params)
    assert state_equal(engine.state(), state)
    after = values(train(engine, params, 3, 4)[0])
    assert after["skipped"] == 0
    assert not params["down"].equal(before["down"])
    engine.backward(params["down"].float().sum() * float("nan"))
    engine.step(0.1)
    # This step has no gradient for "down", and must not use the one of the skipped step.
    engine.backward(params["up"].float().sum())
    assert values(engine.step(0.1))["skipped"] == 0
    assert all(torch.isfinite(parameter).all() for parameter in params.values())


def test_gradients_of_micro_batches_are_summed(device: torch.device) -> None:
    """Without --offload_gradients they are summed in the type of the parameters. The norm is that of the sum."""
    ours, theirs = placed(device, torch.float32), placed(device, torch.float32)
    engine, reference = OffloadedWeights(ours, MAKE, False), MasterWeights(theirs, MAKE, 0.0, False)
    for step in range(3):
        for one, params in ((engine, ours), (reference, theirs)):
            for part in range(2):
                one.backward(loss_of(params, 2 * step + part) / 2)  # type: ignore[attr-defined]
        assert values(engine.step(0.01)) == pytest.approx(values(reference.step(0.01)), rel=1e-5)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_the_flag_selects_it(device: torch.device, tmp_path: Path) -> None:
    params = placed(device, torch.bfloat16)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None), is_main_process=True)
    flags = ["--use_cpu_offload_optimizer", "--max_grad_norm", 0, "--offload_gradients"]
    options = options_of(Path("x"), *flags, "--gradient_accumulation_steps", 1)
    engine: Any = make_engine(accelerator, None, SimpleNamespace(parameters=lambda: params), options, torch.bfloat16)
    assert isinstance(engine, LocalEngine)
    assert isinstance(engine.masters, OffloadedWeights)
    train(engine, params, 0, 2)
    assert all(parameter.grad is None for parameter in params.values())
    engine.save(tmp_path)
    assert load_file(tmp_path / STATE_NAME).keys() == engine.masters.state().keys()
