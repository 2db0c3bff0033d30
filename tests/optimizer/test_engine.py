"""engine.py: only trainable parameters change, and a loaded engine continues bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import options_of
from running import equal, lora_flags, train
from safetensors.torch import load_file, save_file

from cogvideox import loop
from cogvideox.config.optimizers import make_optimizer
from cogvideox.errors import UsageError
from cogvideox.optimizer.engine import EMA_NAME, STATE_NAME, LocalEngine, check_state, make_engine
from cogvideox.optimizer.rule import make_masters


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_two_steps_change_every_trainable_parameter_and_no_frozen_one(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Weight decay is off, because it would change parameters without a gradient too."""
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    make, publish = loop.make_engine, loop.publish

    def made(accelerator: Any, transformer: Any, *rest: Any) -> Any:
        before.update({name: p.detach().clone() for name, p in transformer.named_parameters()})
        before.update({name: b.clone() for name, b in transformer.named_buffers()})
        return make(accelerator, transformer, *rest)

    def published(run: Any, options: Any, task: Any, method: Any, *rest: Any) -> None:
        after.update({name: p.detach().clone() for name, p in method.transformer.named_parameters()})
        after.update({name: b.clone() for name, b in method.transformer.named_buffers()})
        publish(run, options, task, method, *rest)

    monkeypatch.setattr(loop, "make_engine", made)
    monkeypatch.setattr(loop, "publish", published)
    flags = ["--load_tensors", "--max_train_steps", 2, "--weight_decay", 0, "--mixed_precision", precision]
    # With fp16 the first steps may only lower the loss scale, so there are more steps.
    flags += ["--caption_dropout", 0, *(["--max_train_steps", 8] if precision == "fp16" else [])]
    assert train(lora_flags(model, tensors, tmp_path / "lora", *flags)) == 0
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 4 * 2
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def engine_of(seed: int, dtype: torch.dtype, writes: bool = True) -> tuple[LocalEngine, torch.nn.Module]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 16).to(dtype)
    flags = options_of(Path("x")).optimizer
    make = partial(make_optimizer, flags)
    masters = make_masters(dict(model.named_parameters()), make, 1.0, dynamic_scale=dtype == torch.float16)
    return LocalEngine(model, masters, writes), model


def advance(engine: LocalEngine, steps: range) -> list[list[float]]:
    results = []
    for step in steps:
        features = torch.full((4, 4), float(step + 1)).to(engine.model.weight.dtype)
        engine.backward(engine.model(features).float().square().mean())
        results.append(engine.step(0.01).values.tolist())
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_engine_continues_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    reference, model = engine_of(0, dtype)
    first = advance(reference, range(3))
    reference.save(tmp_path)
    then = advance(reference, range(3, 6))
    assert first != then
    other, again = engine_of(1, dtype)
    assert not again.weight.equal(model.weight)
    other.load(tmp_path)
    assert advance(other, range(3, 6)) == then
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_NAME]
    assert {t.dtype for n, t in load_file(tmp_path / STATE_NAME).items() if n.startswith("master/")} == {torch.float32}


def test_one_rank_writes(tmp_path: Path) -> None:
    engine, _ = engine_of(0, torch.float32, writes=False)
    engine.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_accelerate_s_configuration_selects_the_engine() -> None:
    model = torch.nn.Linear(4, 16)
    method = SimpleNamespace(parameters=lambda: dict(model.named_parameters()))
    options = options_of(Path("x"))

    def made(main: bool = True) -> Any:
        state = SimpleNamespace(deepspeed_plugin=None)
        accelerator = SimpleNamespace(state=state, is_main_process=main, num_processes=2)
        return make_engine(accelerator, model, method, options, torch.float16)

    local = made()
    assert (local.writes, made(main=False).writes) == (True, False)
    assert local.masters.scale.dynamic


def made_with(*flags: object, deepspeed: Any = None, model: torch.nn.Module | None = None, host: bool = True) -> Any:
    """Makes an engine with these flags, with its masters on the host if ``host``."""
    model = model or torch.nn.Linear(4, 16)
    state = SimpleNamespace(deepspeed_plugin=deepspeed)
    accelerator = SimpleNamespace(state=state, is_main_process=True, num_processes=1)
    method = SimpleNamespace(parameters=lambda: dict(model.named_parameters()))
    return make_engine(accelerator, model, method, options_of(Path("x"), *flags), torch.bfloat16, state_on_host=host)


@pytest.mark.parametrize("ema", [(), ("--use_ema",)])
@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_resumes_with_masters_elsewhere(tmp_path: Path, first: bool, ema: tuple[str, ...]) -> None:
    models = [torch.nn.Linear(4, 16).bfloat16() for _ in range(2)]
    one, other = (made_with(*ema, model=m, host=h) for m, h in zip(models, (first, not first), strict=True))
    assert (one.masters.transfers is None, other.masters.transfers is None) == (not first, first)
    advance(one, range(3))
    one.save(tmp_path)
    other.load(tmp_path)
    assert advance(one, range(3, 6)) == advance(other, range(3, 6))
    assert all(p.equal(q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    one.save(tmp_path)
    names = (STATE_NAME, *([EMA_NAME] if ema else []))
    assert all(equal(load_file(tmp_path / name), load_file(tmp_path / "other" / name)) for name in names)


@pytest.mark.parametrize(
    ("flags", "deepspeed", "named", "fix"),
    [
        (["--optimizer", "prodigy"], None, "--optimizer prodigy cannot keep", "adam or adamw without --use_torchao"),
        (["--optimizer", "came"], None, "--optimizer came cannot keep its state", "keep its state on the device"),
        (["--use_4bit", "--use_torchao"], None, "--use_torchao cannot keep its state", "keep its state on the device"),
        (["--optimizer", "torch.optim.AdamW"], None, "--optimizer torch.optim.AdamW cannot", "--optimizer adam"),
        ([], SimpleNamespace(zero_stage=2), "DeepSpeed places", "offload_optimizer_device: cpu"),
    ],
)
def test_refused_masters_on_the_host(flags: list[object], deepspeed: Any, named: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        made_with(*flags, deepspeed=deepspeed)
    (problem,) = caught.value.problems
    assert problem.startswith("--optimizer_state_on host: ")
    assert named in problem
    assert fix in problem


@pytest.mark.fault("checkpoints: a file without a weight, or with one in another shape")
@pytest.mark.parametrize(
    ("file", "name", "shape", "rule"),
    [
        (STATE_NAME, "master/bias", None, "master/bias is missing, and this model has (16,)"),
        (STATE_NAME, "low/weight", None, "master/weight is missing, and this model has (16, 4)"),
        (STATE_NAME, "low/weight", (1, 4), "low/weight has the shape (1, 4), and this model has (16, 4)"),
        (STATE_NAME, "low/9", (16, 4), "low/9 has the shape (16, 4), and this model has no such weight"),
        ("transformer", "weight", None, "weight is missing, and this model has (16, 4)"),
        ("transformer", "weight", (1, 4), "weight has the shape (1, 4), and this model has (16, 4)"),
        (EMA_NAME, "average/bias", None, "average/bias is missing, and this model has (16,)"),
        (EMA_NAME, "average/bias", (1,), "average/bias has the shape (1,), and this model has (16,)"),
        (EMA_NAME, "average/9", (4,), "average/9 has the shape (4,), and this model has no such weight"),
    ],
)
def test_files_of_a_checkpoint_that_do_not_fit_are_named(
    tmp_path: Path, file: str, name: str, shape: tuple[int, ...] | None, rule: str
) -> None:
    """One weight has a complete master, and the other has lower bits next to the weight that users load."""
    shapes = {"weight": torch.Size([16, 4]), "bias": torch.Size([16])}
    weight, bias = map(torch.ones, shapes.values())
    files = {
        STATE_NAME: {"low/weight": weight, "master/bias": bias, "scale": torch.ones(())},
        "transformer/model.safetensors": {"weight": weight, "buffer": bias},
        EMA_NAME: {"steps": torch.ones(()), "average/weight": weight, "average/bias": bias},
    }
    (tmp_path / "transformer").mkdir()
    for path, content in files.items():
        save_file(content, tmp_path / path)
    check_state(tmp_path, shapes, averaged=True)
    (path,) = (path for path in files if path.startswith(file))
    kept = {key: tensor for key, tensor in files[path].items() if key != name}
    save_file(kept if shape is None else kept | {name: torch.ones(shape)}, tmp_path / path)
    with pytest.raises(UsageError) as caught:
        check_state(tmp_path, shapes, averaged=True)
    problem = f"{tmp_path / file}: 1 tensor does not fit: {rule}"
    assert str(caught.value) == f"{problem}; give another checkpoint with --resume_from_checkpoint"


def test_an_engine_compares_a_checkpoint_with_its_model(tmp_path: Path) -> None:
    made_with("--use_ema", model=torch.nn.Linear(4, 8)).save(tmp_path)
    with pytest.raises(UsageError, match="2 tensors do not fit: master/weight has the shape"):
        made_with("--use_ema").load(tmp_path)
