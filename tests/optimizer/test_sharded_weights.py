"""sharded_weights.py: steps on shards equal those of MasterWeights, and gathered weights serve work without others.

One process shards over itself, so its rows are complete tensors. tests/project/test_engines.py has several processes.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from running import finish, fork_ranks, python
from stepping import values
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Linear, Module, Sequential

from cogvideox.config.flags import OptimizerFlags
from cogvideox.config.optimizers import make_optimizer
from cogvideox.optimizer.ema import Ema
from cogvideox.optimizer.engine import EMA_NAME, STATE_NAME, LocalEngine, ShardedEngine
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.rule import make_masters
from cogvideox.optimizer.shard_files import own_or_raise
from cogvideox.optimizer.sharded_weights import ShardedWeights, gathered, gathered_modules, is_sharded
from cogvideox.optimizer.step import LOSS_SCALE, RankNumbers

pytestmark = pytest.mark.usefixtures("process_group")
MAKE = partial(make_optimizer, OptimizerFlags(optimizer="adamw", weight_decay=0.01))
CPU = torch.device("cpu")
STEPS = 4


def model_of(dtype: torch.dtype = torch.float32) -> Sequential:
    """Returns two layers with the same random weights at every call."""
    torch.manual_seed(0)
    return Sequential(Linear(4, 6), Linear(6, 3)).to(dtype)


def sharded(dtype: torch.dtype = torch.float32) -> Sequential:
    """Returns the same model after fully_shard, as planning/sharded.py calls it."""
    model = model_of(dtype).float()
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(model[0], mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def loss_of(model: Module, step: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = size * torch.randn(5, 4, generator=generator)
    return model(x).float().square().mean()


def masters(model: Module, norm: float = 0.0, scaled: bool = False) -> MasterWeights:
    return make_masters(dict(model.named_parameters()), MAKE, norm, scaled)


def shards(model: Module, norm: float = 0.0, scaled: bool = False) -> ShardedWeights:
    return ShardedWeights(model, MAKE, norm, scaled, CPU)


def train(model: Module, weights: MasterWeights | ShardedWeights, first: int = 0, last: int = STEPS) -> list[float]:
    """Makes steps of two micro-batches, and returns the numbers of all of them."""
    numbers: list[float] = []
    for step in range(first, last):
        for part in range(2):
            weights.backward(loss_of(model, 2 * step + part) / 2)
        numbers += values(weights.step(0.01)).values()
    return numbers


@pytest.mark.parametrize("norm", [0.0, 0.1])
@pytest.mark.parametrize("scaled", [False, True])
def test_steps_equal_those_of_master_weights(norm: float, scaled: bool) -> None:
    """Numbers are loss, norm, whether the step was skipped, and the loss scale."""
    one, other = model_of(), sharded()
    right, own = masters(one, norm, scaled), shards(other, norm, scaled)
    assert train(other, own) == pytest.approx(train(one, right), rel=1e-5)
    state = right.tensors()
    assert own.tensors().keys() == state.keys()
    for name, tensor in own.tensors().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-7)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = sharded()
    weights = shards(model, scaled=True)
    train(model, weights, 0, 1)
    before = {name: tensor.clone() for name, tensor in weights.named_masters().items()}
    weights.backward(loss_of(model, 1, float("inf")))
    found = values(weights.step(0.01))
    assert found["skipped"] == 1
    assert weights.scale.value.item() == found[LOSS_SCALE] / 2
    assert all(before[name].equal(tensor) for name, tensor in weights.named_masters().items())
    train(model, weights, 2, 3)
    assert not any(before[name].equal(tensor) for name, tensor in weights.named_masters().items())


@pytest.mark.parametrize("copies", [1, 2])
def test_an_overflow_of_one_rank_skips_the_step_on_all(copies: int, tmp_path: Path) -> None:
    """In fp16, the gradients of one of four ranks overflow at the second step, on copies and on shards."""
    overflow = Path(__file__).parents[1] / "shared" / "fp16_ranks.py"
    for rank in fork_ranks(4, python(overflow, copies, tmp_path)):
        finish(rank)
    for rank in range(4):
        right, own = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [skipped for _, _, skipped, _ in own] == [0, 1, 0]
        assert [scale for _, _, _, scale in own] == [2**16, 2**16, 2**15]
        assert torch.tensor(own[::2]).allclose(torch.tensor(right[::2]), rtol=1e-3)
        assert own[1][2:] == right[1][2:]


def test_the_numbers_of_all_ranks_are_combined_with_the_loss(tmp_path: Path) -> None:
    """Bad clips are added up, seconds and memory are the largest, and the loss needs no second operation for them."""
    script = Path(__file__).parents[1] / "shared" / "rank_numbers.py"
    for rank in fork_ranks(2, python(script, tmp_path)):
        finish(rank)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    # Copies sum all gradients in one array and shards sum the squares of their norms; the loss is one operation more.
    for own, other in zip(first, second, strict=True):
        for step, ((mine, result, operations), (theirs, same, _)) in enumerate(zip(own, other, strict=True)):
            assert result == same
            assert result["loss"] == pytest.approx((mine[0] + theirs[0]) / 2)
            numbers = [result[name] for name in RankNumbers._fields]
            assert numbers == [7 + 2 * step, 1.25, 20.5, 24.0]
            assert operations == 2


@pytest.mark.parametrize(("size", "names"), [(65503.0, []), (65520.0, ["weight/0.weight"]), (torch.inf, None)])
def test_masters_that_are_too_large_for_fp16_are_found(size: float, names: list[str] | None) -> None:
    model = sharded(torch.float16)
    engine = ShardedEngine(model, shards(model, scaled=True), True, own_or_raise, torch.float16)
    engine.masters.named_masters()["0.weight"].detach()[2, 1] = size
    assert engine.not_finite() == (["master/0.weight", "weight/0.weight"] if names is None else names)


def test_dropped_gradients_have_no_effect() -> None:
    one, other = sharded(), sharded()
    first, second = shards(one), shards(other)
    first.backward(loss_of(one, 9))
    first.drop()
    assert train(one, first) == train(other, second)


def test_gathered_weights_are_those_of_the_last_step_in_the_compute_type() -> None:
    """A gathered copy from before the step, or one that was changed, must not be used again."""
    model = sharded(torch.bfloat16)
    weights = shards(model)
    train(model, weights)
    for _ in range(2):
        with gathered(model):
            found = {name: p.detach().clone() for name, p in model.named_parameters()}
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        for name, master in weights.named_masters().items():
            assert found[name].equal(master.bfloat16()), name
    assert all(map(math.isfinite, train(model, weights, STEPS, STEPS + 1)))


def test_training_continues_after_an_error_while_weights_are_gathered() -> None:
    one, other = sharded(), sharded()
    first, second = shards(one), shards(other)
    with pytest.raises(ZeroDivisionError), gathered(one):
        raise ZeroDivisionError
    assert train(one, first) == train(other, second)


def test_sharded_modules_are_recognized() -> None:
    plain, model = model_of(), sharded()
    assert (is_sharded(plain), is_sharded(model)) == (False, True)
    assert gathered_modules(model) == [model, model[0]]


def test_a_parameter_without_a_gradient_is_named() -> None:
    model = sharded()
    weights = shards(model)
    with pytest.raises(AssertionError, match=r"0\.weight has no gradient"):
        weights.step(0.01)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def local_engine() -> LocalEngine:
    model = model_of()
    weights = masters(model)
    parameters = dict(model.named_parameters())
    return LocalEngine(model, weights, True, Ema(parameters, weights.named_masters(), 0.5))


def sharded_engine() -> ShardedEngine:
    model = sharded()
    weights = shards(model)
    ema = Ema(weights.parameters, weights.named_masters(), 0.5)
    return ShardedEngine(model, weights, True, own_or_raise, torch.float32, ema)


def advance(engine: LocalEngine | ShardedEngine, first: int, last: int) -> list[float]:
    numbers: list[float] = []
    for step in range(first, last):
        engine.backward(loss_of(engine.model, step))
        numbers += values(engine.step(0.01)).values()
    return numbers


def exported(engine: LocalEngine | ShardedEngine) -> dict[str, Tensor]:
    """Returns the weights for validation and export, which are the averages."""
    with engine.averaged():
        return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


ENGINES = {"local": local_engine, "sharded": sharded_engine}


@pytest.mark.parametrize("writer", ENGINES)
@pytest.mark.parametrize("reader", ENGINES)
def test_engines_read_the_checkpoints_of_each_other(tmp_path: Path, writer: str, reader: str) -> None:
    straight = local_engine()
    right = advance(straight, 0, STEPS)
    first, second = ENGINES[writer](), ENGINES[reader]()
    numbers = advance(first, 0, 2)
    first.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {STATE_NAME, EMA_NAME}
    advance(second, 7, 8)  # something that loading must replace
    second.load(tmp_path)
    assert numbers + advance(second, 2, STEPS) == pytest.approx(right, rel=1e-5)
    for name, tensor in exported(second).items():
        torch.testing.assert_close(tensor, exported(straight)[name], rtol=1e-5, atol=1e-7)


def test_loading_and_saving_change_no_bit(tmp_path: Path) -> None:
    engine = sharded_engine()
    advance(engine, 0, 2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    engine.save(tmp_path / "one")
    other = sharded_engine()
    other.load(tmp_path / "one")
    other.save(tmp_path / "two")
    for file in (STATE_NAME, EMA_NAME):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_is_not_finite_is_named() -> None:
    engine = sharded_engine()
    advance(engine, 0, 1)
    assert engine.not_finite() == []
    with torch.no_grad():
        engine.masters.named_masters()["1.bias"][0] = torch.nan
    assert engine.not_finite() == ["master/1.bias"]
