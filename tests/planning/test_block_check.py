"""Tests block_check.py: blocks under a plan pass the comparison with diffusers, and every injected fault is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import block_faults
import pytest
import torch
import torch._dynamo.utils as dynamo
from block_faults import BLOCK_FAULTS
from fakes import run_alone
from peft import LoraConfig
from tiny_cogvideox import KINDS
from tiny_transformers import TARGETS, arguments_of, make_trainable, make_with_lora

from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.model import blocks
from cogvideox.model.sequence import SequenceGroup
from cogvideox.planning import block_check, stack
from cogvideox.planning.block_check import BlockError, check_blocks, copy_of, cosine_between
from cogvideox.planning.execution import apply_plan
from cogvideox.planning.plan import DEVICE, HOST, BlockPlan, ExecutionPlan, ModulePlan

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
HERE, AWAY = BlockPlan(DEVICE, "all", DEVICE), BlockPlan(HOST, "attention", HOST)
BUCKETS = (Bucket(9, 64, 96), Bucket(1, 64, 96))
pytestmark = pytest.mark.usefixtures("small")


def check(tiny: Tiny, kind: str, transformer: Any, plan: Any, samples: int = 1) -> str:
    """Runs the check of a run, and returns the messages that it printed."""
    geometry = read_geometry(ModelFlags(str(tiny(kind))))
    tensors: Any = SimpleNamespace(geometry=geometry)
    tensors.index = SimpleNamespace(samples=[SimpleNamespace(bucket=bucket) for bucket in BUCKETS])
    run, said = run_alone(Path("/tmp")), []
    run.say = said.append  # type: ignore[method-assign]
    check_blocks(run, samples, tensors, transformer, plan)
    return "".join(said)


def plan_of(*kinds: BlockPlan, **more: Any) -> ExecutionPlan:
    return ExecutionPlan((kinds[0], HERE, kinds[-1]), more.pop("compiled", False), "cpu", **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_passes(tiny: Tiny, kind: str, dtype: torch.dtype) -> None:
    for made in (make_with_lora, make_trainable):
        said = check(tiny, kind, made(kind).to(dtype), plan_of(HERE, AWAY), samples=2)
        text = "blocks compute the same as those of diffusers, cosine at least"
        assert re.fullmatch(rf"checked on \d+ tokens: {text} (1.0000|0.9999)\d\d", said)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantized_base_is_compared_with_its_rounded_values(tiny: Tiny, precision: str) -> None:
    """The tolerance is far smaller than the difference between quantized and original values."""
    for dtype in (torch.float32, torch.bfloat16):
        said = check(tiny, "5b", make_with_lora("5b").to(dtype), plan_of(HERE, AWAY, base_precision=precision))
        assert float(said.split("cosine at least ")[1]) > 0.99995


@pytest.mark.parametrize("error", [0.019, 0.021, float("nan")])
def test_wrong_exchanges_between_processes_end_the_run(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    run, group = run_alone(Path("/tmp")), SequenceGroup("", 0, 2)
    monkeypatch.setattr(block_check, "division_error", lambda *_: error)
    with pytest.raises(BlockError, match="process 0: attention of divided tokens") if error != 0.019 else nullcontext():
        block_check.check_division(run, group, plan_of(HERE))


def test_the_check_does_not_change_the_model(tiny: Tiny) -> None:
    """This includes a LoRA whose matrices B are zero: only those of the copy are randomized."""
    transformer = make_trainable("5b").requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    check(tiny, "5b", transformer, plan_of(AWAY))
    after = transformer.state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in transformer.parameters())
    assert all("forward" not in vars(block) for block in transformer.transformer_blocks)
    layers = stack.lora_layers(copy_of(transformer.transformer_blocks[0]))
    assert len(layers) == 6
    assert all(layer.lora_B["default"].weight.any() for layer in layers)


def test_a_nonzero_lora_is_compared_unchanged() -> None:
    block = make_with_lora("5b").transformer_blocks[0]
    copied = copy_of(block).state_dict()
    assert all(copied[name].equal(tensor) for name, tensor in block.state_dict().items())


def test_blocks_of_diffusers_are_not_compared_with_themselves(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(block_check, "check_block")
    assert check(tiny, "5b", make_with_lora("5b"), ModulePlan(recompute=True, compiled=False)) == ""


# -- what must be found ------------------------------------------------------------------------------------------------


@pytest.mark.fault("numbers: a hand-written block that differs from diffusers' block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", [make_with_lora, make_trainable])
@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_each_difference_is_found(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, fault: str, made: Callable[[str], Any], dtype: torch.dtype
) -> None:
    block_faults.plant(monkeypatch, fault)
    with pytest.raises(
        BlockError, match=r"block 1 of 3, .*: training and diffusers differ, cosine .*nothing was trained"
    ):
        check(tiny, "5b", made("5b").to(dtype), plan_of(HERE))


def test_the_last_block_is_checked_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, right = make_with_lora("5b"), block_check.compare_block

    def only_last(module: Any, *rest: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if module is transformer.transformer_blocks[-1]:
                block_faults.plant(patch, next(iter(BLOCK_FAULTS)))
            return right(module, *rest)

    monkeypatch.setattr(block_check, "compare_block", only_last)
    with pytest.raises(BlockError, match="block 3 of 3"):
        check(tiny, "5b", transformer, plan_of(HERE))


def test_a_wrong_size_of_a_gradient_is_found(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain cosine would not find it."""
    right = blocks.linears_backward

    def doubled(dys: Any, x: Any, layers: Any) -> Any:
        dx, found = right(dys, x, layers)
        return dx, [tuple(gradient * 1.1 for gradient in gradients) for gradients in found]

    monkeypatch.setattr(blocks, "linears_backward", doubled)
    with pytest.raises(BlockError, match="block 1 of 3, gradient of "):
        check(tiny, "5b", make_with_lora("5b").bfloat16(), plan_of(HERE))


def test_cosine_between() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([4.0, -3.0])
    assert cosine_between(one, one, CPU) == 1
    assert cosine_between(one, other, CPU) == 0
    assert cosine_between(one, -one, CPU) == -1
    assert cosine_between(one, 2 * one, CPU) == pytest.approx(0.8)
    for bad in (torch.tensor([torch.nan, 1.0]), torch.tensor([torch.inf, 1.0])):
        assert not cosine_between(one, bad, CPU) >= -1
    assert not cosine_between(one * 0, one * 0, CPU) >= -1


def test_fewer_tokens_are_used_if_all_do_not_fit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter length is then not compiled, because no training step would use that graph."""
    real, seen = block_check.compare_block, []

    def scarce(module: Any, plan: Any, i: int, inputs: Any, device: torch.device) -> Any:
        seen.append((inputs.video.shape[1], len(inputs.rotary[0]), plan.compiled))
        if inputs.video.shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(module, plan, i, inputs, device)

    monkeypatch.setattr(block_check, "compare_block", scarce)
    monkeypatch.setattr(block_check, "LEAST_PATCHES", 10)
    said = check(tiny, "5b", make_with_lora("5b"), plan_of(HERE, compiled=True))
    tokens = read_geometry(ModelFlags(str(tiny("5b")))).max_text_seq_length + 18
    assert said.startswith(f"checked on {tokens} tokens")
    assert seen == [(72, 72, True), (36, 36, False), (18, 18, False)] * 2
    monkeypatch.setattr(block_check, "LEAST_PATCHES", 30)
    with pytest.raises(torch.OutOfMemoryError):
        check(tiny, "5b", make_with_lora("5b"), plan_of(HERE))


@pytest.mark.parametrize("plan", [plan_of(AWAY, compiled=True), ModulePlan(recompute=False, compiled=True)])
def test_training_uses_the_graphs_of_the_check(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, plan: Any) -> None:
    """The check must not compile any graph that training would not compile anyway."""
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="eager")
    )  # traced, but not compiled to kernels
    counts = []
    for checked in (False, True):
        torch._dynamo.reset()
        dynamo.counters.clear()
        transformer = make_with_lora("5b")
        if checked:
            check(tiny, "5b", transformer, plan)
            assert dynamo.counters["stats"]["unique_graphs"]
        apply_plan(transformer, plan, CPU)
        transformer(**arguments_of("5b", frames=3, samples=1))[0].square().mean().backward()
        counts.append(dynamo.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("peak", "limit"), [(50_000_000, 1 / 80), (40 * 2**30, 1 / 2)])
def test_the_check_stays_within_the_plan_but_libraries_have_their_workspaces(
    peak: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [1.0]
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: shares[0])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    plan = replace(plan_of(BlockPlan("all")), peak=peak)
    with block_check.limited_to_plan(plan, torch.device("cuda")):
        assert shares[-1] == limit
    assert shares[-1] == 1.0
