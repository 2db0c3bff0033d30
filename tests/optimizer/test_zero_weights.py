"""zero_weights.py: steps by DeepSpeed equal those of MasterWeights, and so do the checkpoints.

One process divides weights between itself and nobody else. tests/project/test_engines.py has several processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import options_of
from safetensors.torch import load_file
from stepping import values
from torch import Tensor
from torch.nn import Linear, Module, Sequential

from cogvideox.config.deepspeed import offload_device
from cogvideox.optimizer import zero_weights
from cogvideox.optimizer.engine import EMA_NAME, STATE_NAME, DeepSpeedEngine, LocalEngine, make_engine
from cogvideox.optimizer.step import GROWTH_INTERVAL, INITIAL_SCALE
from cogvideox.optimizer.zero_weights import ZeroWeights, configure

STEPS = 4
FLAGS = ("--gradient_accumulation_steps", 2, "--max_grad_norm", 0.05, "--use_ema", "--optimizer", "adamw")
STAGES = pytest.mark.parametrize("stage", [2, 3])
NO_FP16 = not torch.ops.mkldnn._is_mkldnn_fp16_supported()
FP16 = pytest.param(torch.float16, marks=pytest.mark.skipif(NO_FP16, reason="DeepSpeed has no fp16 on this CPU"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP16], ids=str)


@pytest.fixture(scope="module", autouse=True)
def launched(process_group: None) -> Iterator[None]:
    """A process group of this process, with the environment variable that DeepSpeed wants from a launcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield


def accelerator_of(stage: int, precision: str | None = None) -> Any:
    """Imitates an Accelerator whose configuration asks for DeepSpeed."""
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 8, "reduce_bucket_size": 1}
    if offload_device("offload_optimizer") == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    if precision:
        settings[precision] = {"enabled": True}

    def prepare(model: Module, optimizer: Any) -> tuple[Any, Any]:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as runtime/run.py does on a CPU
        engine, made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        return engine, made

    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=settings)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(state=state, is_main_process=True, device=torch.device("cpu"), prepare=prepare)


def model_of(dtype: torch.dtype = torch.float32) -> Sequential:
    """Returns two layers with the same random weights at every call."""
    torch.manual_seed(0)
    return Sequential(Linear(4, 6), Linear(6, 3)).to(dtype)


def zero(stage: int, dtype: torch.dtype = torch.float32) -> DeepSpeedEngine:
    model = model_of(dtype)
    method: Any = SimpleNamespace(parameters=lambda: dict(model.named_parameters()))
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    made = make_engine(accelerator_of(stage, precision), model, method, options_of(Path("x"), *FLAGS), dtype)
    assert isinstance(made, DeepSpeedEngine)
    return made


def local(dtype: torch.dtype = torch.float32) -> LocalEngine:
    model = model_of(dtype)
    method: Any = SimpleNamespace(parameters=lambda: dict(model.named_parameters()))
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None), is_main_process=True)
    made = make_engine(accelerator, model, method, options_of(Path("x"), *FLAGS), dtype)
    assert isinstance(made, LocalEngine)
    return made


def loss_of(model: Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(iter(model.state_dict().values())).dtype
    return model(torch.randn(5, 4, generator=generator).to(dtype)).float().square().mean()


def train(
    engine: DeepSpeedEngine | LocalEngine, first: int = 0, last: int = STEPS, rate: float = 0.01
) -> list[dict[str, float]]:
    """Makes steps of two micro-batches, and returns the numbers of each."""
    numbers: list[dict[str, float]] = []
    for step in range(first, last):
        for part in range(2):
            engine.backward(loss_of(engine.model, 2 * step + part) / 2)
        numbers.append(values(engine.step(rate)))
    return numbers


def check_numbers(own: list[dict[str, float]], right: list[dict[str, float]]) -> None:
    """Checks that the numbers of each step are close to the right ones."""
    for found, expected in zip(own, right, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def check_close(own: Path, right: Path) -> None:
    for name in (STATE_NAME, EMA_NAME):
        found, expected = load_file(own / name), load_file(right / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-7)


@STAGES
@DTYPES
def test_steps_and_files_are_those_of_one_process(tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    own, right = zero(stage, dtype), local(dtype)
    own.rehearse(partial(loss_of, step=9))
    check_numbers(train(own), train(right))
    for name, engine in (("own", own), ("right", right)):
        (tmp_path / name).mkdir()
        engine.save(tmp_path / name)
    check_close(tmp_path / "own", tmp_path / "right")
    with own.averaged(), right.averaged():
        for parameter, expected in zip(own.model.module.parameters(), right.model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)
    check_numbers(train(own, STEPS, 6), train(right, STEPS, 6))


@STAGES
@DTYPES
def test_checkpoints_cross_in_both_directions(tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    expected = train(local(dtype), 0, 6)
    for engines in ((zero(stage, dtype), local(dtype)), (local(dtype), zero(stage, dtype))):
        first, second = engines
        train(first)
        first.save(tmp_path)
        second.load(tmp_path)
        check_numbers(train(second, STEPS, 6), expected[STEPS:])


def test_deepspeed_receives_the_flags() -> None:
    """Also where its configuration says something else, which config/deepspeed.py has refused before."""
    flags = ("--gradient_accumulation_steps", 3, "--max_grad_norm", 0.5, "--train_batch_size", 2)
    settings: dict[str, Any] = {"gradient_accumulation_steps": 7, "zero_optimization": {"stage": 3}}
    configure(settings, options_of(Path("x"), *flags).train, 45)
    found = [settings[name] for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert [*found, settings["gradient_clipping"]] == [2, 3, 0.5]
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert settings["fp16"]["auto_cast"] is False  # It would round positions to fp16.
    assert settings["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False, "reduce_bucket_size": 45}


def test_the_bucket_of_deepspeed_is_limited_and_that_of_a_user_is_kept() -> None:
    settings: dict[str, dict[str, Any]] = {"zero_optimization": {}}
    configure(settings, options_of(Path("x")).train, 10**10)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 5 * 10**8
    settings["zero_optimization"]["reduce_bucket_size"] = 7
    configure(settings, options_of(Path("x")).train, 10**10)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16], ids=str)
def test_a_single_gradient_goes_to_the_host_without_fp32_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """With the same bits as through the fp32 share of the gradients, which only sums need."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", (*FLAGS, "--gradient_accumulation_steps", 1))

    def trained() -> tuple[bool, list[Tensor]]:
        engine = zero(2, dtype)
        for step in range(STEPS):
            engine.backward(loss_of(engine.model, step))
            engine.step(0.01)
        shares = engine.masters.optimizer._use_compact_grad_partition_buffer(0)
        return shares, [tensor.clone() for tensor in engine.masters.tensors().values()]

    alone = trained()
    monkeypatch.setattr(zero_weights, "sums_gradients", lambda *_: True)
    summed = trained()
    assert (alone[0], summed[0]) == (False, True)
    for found, expected in zip(alone[1], summed[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_fragment_without_elements_is_part_of_the_file() -> None:
    """With ZeRO-2, a process has no element of most weights, but all processes name the same tensors."""
    weights = object.__new__(ZeroWeights)
    fragments = zero(2).masters.fragments
    weights.fragments = fragments
    name, fragment = next(iter(fragments.items()))
    shard = weights.shards({f"exp_avg/{name}": fragment.flat[0:0]})[f"exp_avg/{name}"]
    assert (shard.shape, shard.local.numel(), shard.first) == (torch.Size((6, 4)), 0, 0)


@STAGES
def test_the_rate_is_ours(stage: int) -> None:
    """With a rate of 0 nothing changes."""
    own = zero(stage)
    before = {name: master.clone() for name, master in own.masters.named_masters().items()}
    train(own, 0, 1, rate=0.0)
    assert all(master.equal(before[name]) for name, master in own.masters.named_masters().items())


def step_of(engine: DeepSpeedEngine | LocalEngine, size: float) -> dict[str, float]:
    """Makes a step whose loss is multiplied by ``size``, and returns its numbers."""
    for part in range(2):
        engine.backward(loss_of(engine.model, part) * size)
    return values(engine.step(0.01))


@STAGES
@pytest.mark.skipif(NO_FP16, reason="DeepSpeed has no fp16 on this CPU")
@pytest.mark.fault("numbers: an overflow in fp16 under DeepSpeed", times=3)
def test_the_loss_scale_of_fp16_is_that_of_one_process(tmp_path: Path, stage: int) -> None:
    """It is halved by each overflow, also after a checkpoint crosses, and skipped steps are logged alike."""
    own, right = zero(stage, torch.float16), local(torch.float16)
    for size in (0.5, 1e6, 0.5, 1e6, 1e6, 0.5):
        found, expected = step_of(own, size), step_of(right, size)
        assert found["skipped"] == expected["skipped"] == (size > 1)
        assert found["loss_scale"] == expected["loss_scale"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    own.save(tmp_path)
    right.load(tmp_path)
    assert (right.masters.scale.value.item(), right.masters.scale.good_steps.item()) == (INITIAL_SCALE / 8, 1.0)


@STAGES
@pytest.mark.skipif(NO_FP16, reason="DeepSpeed has no fp16 on this CPU")
def test_the_loss_scale_of_fp16_grows_and_has_a_lower_limit(tmp_path: Path, stage: int) -> None:
    """At the limit, DeepSpeed alone would end the run with a traceback."""
    own, right = zero(stage, torch.float16), local(torch.float16)
    right.masters.scale.value.fill_(1.0)
    right.masters.scale.good_steps.fill_(GROWTH_INTERVAL)
    right.save(tmp_path)
    own.load(tmp_path)
    assert [step_of(own, size)["loss_scale"] for size in (0.5, 1e9, 1e9, 0.5)] == [1.0, 2.0, 1.0, 1.0]


@STAGES
@pytest.mark.fault("numbers: an overflow under DeepSpeed")
def test_a_step_that_is_not_finite_is_skipped_and_counted(stage: int) -> None:
    own = zero(stage)
    train(own, 0, 1)
    before = {name: tensor.clone() for name, tensor in own.masters.tensors().items()}
    averages = {name: tensor.clone() for name, tensor in own.ema.averages.items()} if own.ema else {}
    for part in range(2):
        own.backward(loss_of(own.model, part) * (math.inf if part else 1.0))
    assert values(own.step(0.01))["skipped"] == 1.0
    assert all(tensor.equal(before[name]) for name, tensor in own.masters.tensors().items())
    assert own.ema is not None
    assert all(average.equal(averages[name]) for name, average in own.ema.averages.items())
    assert own.not_finite() == []
    next(iter(own.masters.named_masters().values())).view(-1)[0] = math.nan
    assert own.not_finite() == ["master/0.weight"]
