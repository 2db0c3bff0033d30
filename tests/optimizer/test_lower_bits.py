"""A checkpoint of bf16 weights has the lower bits of masters, whose upper bits are the weights that users load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import equal, sft_flags
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cogvideox.config import args
from cogvideox.config.optimizers import make_optimizer
from cogvideox.config.options import SftOptions
from cogvideox.model.methods import FullFinetune
from cogvideox.model.models import load_transformer
from cogvideox.optimizer.engine import STATE_NAME, LocalEngine, ShardedEngine
from cogvideox.optimizer.rule import make_masters, rule_of
from cogvideox.optimizer.shard_files import own_or_raise
from cogvideox.optimizer.sharded_weights import ShardedWeights


def options_of(model: Path, *more: object) -> SftOptions:
    return args.parse(SftOptions, None, sft_flags(model, Path("d"), Path("o"), *more), ())


def engine_of(options: SftOptions, refers: bool, seed: int) -> tuple[LocalEngine, FullFinetune]:
    """Returns an engine that has made two steps with random gradients."""
    method = FullFinetune(load_transformer(options.model, torch.bfloat16), options)
    masters = make_masters(method.parameters(), rule_of(options.optimizer), 1.0, dynamic_scale=False)
    engine = LocalEngine(method.transformer, masters, writes=True, refers=refers)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        noise = (p * torch.randn(p.shape, generator=generator) for p in method.parameters().values())
        engine.backward(torch.stack([one.float().sum() for one in noise]).sum())
        engine.step(1e-3)
    return engine, method


@pytest.mark.parametrize(
    "flags", [(), ("--use_8bit",), ("--use_bf16_moments",), ("--use_stochastic_rounding", "--mixed_precision", "bf16")]
)
def test_the_masters_are_restored_bit_for_bit(model: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    options = options_of(model, *flags)
    engine, method = engine_of(options, refers=True, seed=1)
    engine.save(tmp_path)
    engine.save_weights(method, tmp_path)
    saved = load_file(tmp_path / STATE_NAME)
    lows = {name: tensor for name, tensor in saved.items() if name.startswith("low/")}
    assert {name.removeprefix("low/"): tensor.shape for name, tensor in lows.items()} == {
        name: parameter.shape for name, parameter in method.parameters().items()
    }
    assert {tensor.dtype for tensor in lows.values()} == {torch.int16}
    assert any(tensor.any() for tensor in lows.values()) == ("--use_stochastic_rounding" not in flags)
    assert not any(name.startswith("master/") for name in saved)
    other, again = engine_of(options, refers=True, seed=2)
    assert not equal(other.masters.state(), engine.masters.state())
    other.load(tmp_path)
    assert equal(other.masters.state(), engine.masters.state())
    assert equal(again.transformer.state_dict(), method.transformer.state_dict())


def test_complete_masters_are_read_too(model: Path, tmp_path: Path) -> None:
    """Engines that shard the state, and earlier versions, write these."""
    engine, method = engine_of(options_of(model), refers=False, seed=1)
    engine.save(tmp_path)
    engine.save_weights(method, tmp_path)
    assert any(name.startswith("master/") for name in load_file(tmp_path / STATE_NAME))
    other, _ = engine_of(options_of(model), refers=True, seed=2)
    other.load(tmp_path)
    assert equal(other.masters.state(), engine.masters.state())


@pytest.mark.usefixtures("process_group")
def test_a_sharded_engine_joins_its_rows(model: Path, tmp_path: Path) -> None:
    options = options_of(model)
    engine, method = engine_of(options, refers=True, seed=1)
    engine.save(tmp_path)
    engine.save_weights(method, tmp_path)
    transformer = load_transformer(options.model, torch.bfloat16).float().requires_grad_(True)
    fully_shard(transformer, mesh=init_device_mesh("cpu", (1,)))
    weights = ShardedWeights(
        transformer, lambda parameters: make_optimizer(options.optimizer, parameters), 1.0, False, torch.device("cpu")
    )
    sharded = ShardedEngine(transformer, weights, True, own_or_raise, torch.bfloat16)
    sharded.load(tmp_path)
    expected = engine.masters.state()
    found = {name: tensor.detach() for name, tensor in weights.tensors().items() if name.startswith("master/")}
    assert found.keys() == {name for name in expected if name.startswith("master/")}
    assert all(
        (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).equal(expected[name])
        for name, tensor in found.items()
    )
