"""Tests warm_up.py: a run is the same with and without the pass of its largest bucket before the first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import (
    LORA_SCRIPT,
    SFT_SCRIPT,
    WEIGHTS,
    equal,
    finish,
    fork_ranks,
    lora_flags,
    losses,
    python,
    safetensors_of,
    sft_flags,
    train,
    train_all,
    weights,
)
from safetensors.torch import load_file

from cogvideox import loop
from cogvideox.config.buckets import Bucket
from cogvideox.errors import UsageError
from cogvideox.optimizer.resident_weights import Resident
from cogvideox.planning import warm_up
from cogvideox.planning.plan import ModulePlan
from cogvideox.planning.warm_up import has_no_bound, largest_batch

LORAS: dict[str, list[object]] = {
    "dropout": ["--lora_dropout", 0.5, "--train_batch_size", 2],
    "DoRA, recomputed": ["--use_dora", "--gradient_checkpointing"],
    "prodigy": ["--optimizer", "prodigy", "--learning_rate", 1],
    "averaged": ["--use_ema", "--init_lora_weights", "pissa"],
}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Makes runs on the CPU start with a pass of their largest bucket; returns a list of the losses of these passes."""
    found: list[torch.Tensor] = []

    def watched(*given: Any) -> None:
        *others, losses_of = given
        before = torch.get_rng_state()

        def seen(model: Any, batch: Any) -> torch.Tensor:
            found.append(losses_of(model, batch))
            return found[-1]

        warm_up.warm_up(*others, seen)
        assert torch.get_rng_state().equal(before)

    monkeypatch.setattr(loop, "has_no_bound", lambda *_: True)
    monkeypatch.setattr(loop, "warm_up", watched)
    return found


@pytest.mark.parametrize("name", LORAS)
def test_a_run_is_the_same_to_the_bit(
    model: Path,
    tensors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    name: str,
) -> None:
    flags = ["--load_tensors", "--max_train_steps", 2, *LORAS[name]]
    assert train(lora_flags(model, tensors, tmp_path / "without", *flags)) == 0
    passes = request.getfixturevalue("forced")
    assert train(lora_flags(model, tensors, tmp_path / "with", *flags)) == 0
    assert len(passes) == 1
    assert passes[0].requires_grad
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert equal(weights(tmp_path / "with"), weights(tmp_path / "without"))
    for step in (tmp_path / "with").glob("checkpoint-*"):
        assert equal(safetensors_of(step), safetensors_of(tmp_path / "without" / step.name))


def test_training_all_weights_is_the_same_too(
    model: Path, tensors: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    flags = ["--load_tensors", "--max_train_steps", 2, "--checkpointing_steps", 2]
    assert train_all(sft_flags(model, tensors, tmp_path / "without", *flags)) == 0
    assert not request.getfixturevalue("forced")
    assert train_all(sft_flags(model, tensors, tmp_path / "with", *flags)) == 0
    ends = [safetensors_of(tmp_path / name / "checkpoint-2") for name in ("with", "without")]
    assert equal(*ends)


@pytest.mark.fault("memory: the largest bucket does not fit, and no plan predicted it")
def test_a_bucket_that_does_not_fit_is_reported_before_the_first_step(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop, "has_no_bound", lambda *_: True)
    monkeypatch.setattr(loop, "losses_of", no_memory)
    with pytest.raises(UsageError, match=r"--plan lean.*largest bucket, latents 1x3x16x8x12: CUDA out of memory"):
        train(lora_flags(model, tensors, tmp_path, "--load_tensors"))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.fault("memory: the largest bucket does not fit on another rank")
def test_all_ranks_end_where_one_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = torch.zeros(1, 2, 3)
    batch = SimpleNamespace(x0_BFCHW=sample, to=lambda _: None)
    ranks = SimpleNamespace(together=nullcontext, gather=lambda items: [*items, "none left"])
    run: Any = SimpleNamespace(ranks=ranks, device=None, say=lambda _: None)
    engine: Any = SimpleNamespace(rehearse=lambda loss_of: loss_of(None))
    data: Any = None
    monkeypatch.setattr(warm_up, "largest_batch", lambda *_: batch)
    with pytest.raises(torch.OutOfMemoryError, match="latents 1x2x3: none left"):
        warm_up.warm_up(run, engine, data, 1, lambda *_: torch.zeros(1))


def test_only_gpus_without_a_plan_need_it() -> None:
    module = ModulePlan(recompute=False, compiled=False)
    assert has_no_bound(module, torch.device("cuda"))
    assert not has_no_bound(module, torch.device("cpu"))
    assert not has_no_bound(object(), torch.device("cuda"))  # type: ignore[arg-type]


def test_the_largest_bucket_has_the_most_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = [Bucket(9, 64, 96), Bucket(1, 256, 256), Bucket(17, 64, 96), Bucket(17, 64, 64)]

    class Data:
        index = SimpleNamespace(samples=[SimpleNamespace(bucket=bucket) for bucket in buckets])
        geometry = SimpleNamespace(tokens=lambda bucket: bucket.frames * bucket.height * bucket.width)

        def __getitem__(self, visit: Any) -> int:
            return visit.index

    monkeypatch.setattr(warm_up, "collate", list)
    data: Any = Data()
    assert largest_batch(data, 3) == [2, 2, 2]


def test_memory_of_the_first_optimizer_step_is_reserved() -> None:
    parameter = torch.nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16))

    def resident(make: Callable[..., torch.optim.Optimizer]) -> Resident:
        return Resident({"a": parameter}, [torch.zeros(8, 4)], make)

    lazy = resident(lambda masters: torch.optim.AdamW(masters, lr=1.0))
    assert lazy.missing_bytes() == 32 * 8
    lazy.update([torch.zeros(8, 4)], 0.0, torch.ones(()), torch.zeros(()))
    assert lazy.missing_bytes() == 0
    assert resident(lambda masters: torch.optim.AdamW(masters, lr=1.0, fused=True)).missing_bytes() == 0


FORCED = """
import runpy, sys
sys.path[0] = {folder!r}
from cogvideox import loop
loop.has_no_bound = lambda *_: {force}
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_under_deepspeed_a_run_is_the_same(model: Path, tensors: Path, tmp_path: Path, stage: str) -> None:
    """A LoRA is trained by ZeRO-2, and all weights by ZeRO-3."""
    ends = []
    for force in (False, True):
        script = tmp_path / f"{force}.py"
        given = LORA_SCRIPT if stage == "2" else SFT_SCRIPT
        script.write_text(FORCED.format(folder=str(given.parent), script=str(given), force=force))
        launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
        launched |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
        launched |= {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "none" for what in ("OPTIMIZER", "PARAM")}
        output = tmp_path / str(force)
        more = ["--load_tensors", "--max_train_steps", 2]
        if stage == "2":
            flags = lora_flags(model, tensors, output, *more, "--lora_dropout", 0.5)
        else:
            flags = sft_flags(model, tensors, output, *more)
        said = [finish(rank) for rank in fork_ranks(2, python(script, *flags), **launched)]
        assert ("no plan bounds the memory" in said[0]) == force
        [result] = [*output.glob(WEIGHTS), *output.glob("transformer/*.safetensors")]
        ends.append((losses(output), load_file(result)))
    assert ends[0][0] == ends[1][0]
    assert equal(ends[0][1], ends[1][1])
