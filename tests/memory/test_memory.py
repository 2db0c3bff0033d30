"""Tests that running out of memory in validation or held-out loss is reported, and does not change training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluating import Alone, bare, split
from fakes import run_alone
from running import PROMPT, equal, lora_flags, losses, metrics, train, weights

from cogvideox.evaluation import held_out, validation
from cogvideox.evaluation.validation import Validator
from cogvideox.model.blocks import Block
from cogvideox.model.vae_decoder import Decoder
from cogvideox.planning.stack import Stack

SHOWN = ["--validation_prompt", f"{PROMPT}:::a disc", "--validation_steps", 1, "--num_inference_steps", 2]
Fault = Callable[[pytest.MonkeyPatch], None]


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(scope="module")
def prepared(tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns prepared data of five clips for training and one held out; tests must not change it."""
    return split(tensors, tmp_path_factory.mktemp("held") / "out", 5, train=slice(5))


def while_decoding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Decoder, "__call__", no_memory)


def while_sampling(patch: pytest.MonkeyPatch) -> None:
    """Runs out of memory in the second block of a Stack, after the first one has started to fetch its weights."""
    weights_of = Stack.weights

    def lacking(self: Stack, i: int, direction: int, trained: list[Any]) -> Block:
        return no_memory() if i == 1 and not torch.is_grad_enabled() else weights_of(self, i, direction, trained)

    patch.setattr(Stack, "weights", lacking)


FAULTS: dict[str, tuple[Fault, list[object]]] = {
    "decoding": (while_decoding, []),
    "sampling": (while_sampling, ["--plan", "lean"]),
}


@pytest.mark.fault("memory: out of memory in validation", times=3)
@pytest.mark.parametrize("fault", FAULTS)
def test_training_is_the_same_if_validation_runs_out_of_memory(
    model: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    inject, plan = FAULTS[fault]
    flags = ["--load_tensors", "--max_train_steps", 2, "--lora_dropout", 0.5, *plan, *SHOWN]
    assert train(lora_flags(model, prepared, tmp_path / "with", *flags)) == 0
    outcomes: list[Any] = []
    render = Validator.render

    def lacking(self: Validator, step: int) -> list[Path]:
        before = torch.get_rng_state()
        with monkeypatch.context() as patch:
            inject(patch)
            outcomes.append(render(self, step))
        assert torch.get_rng_state().equal(before)
        return outcomes[-1]

    monkeypatch.setattr(Validator, "render", lacking)
    capsys.readouterr()
    output = tmp_path / "without"
    assert train(lora_flags(model, prepared, output, *flags)) == 0
    said = capsys.readouterr().err
    for step in range(3):
        line = next(line for line in said.splitlines() if f"validation after step {step}: out of memory" in line)
        assert "Tried to allocate 2.00 GiB" in line
        assert f"step-{step:06d}_prompt-0" in line
        assert f"step-{step:06d}_prompt-1" in line
        assert "training continues" in line
        assert "--enable_tiling" in line
    assert outcomes == [[], [], []]
    assert not list((output / "validation").glob("*.mp4"))
    assert equal(weights(output), weights(tmp_path / "with"))
    assert losses(output) == losses(tmp_path / "with")
    held = [
        [line["held_out_loss"] for line in metrics(o) if "held_out_loss" in line] for o in (output, tmp_path / "with")
    ]
    assert held[0] == held[1]
    assert len(held[0]) == 3
    assert json.loads((output / "recipe.json").read_text())["verification"]["max_difference"] == 0
    assert ".mp4)" not in (output / "README.md").read_text()


@pytest.mark.fault("memory: out of memory in the held-out loss and the contact sheet")
def test_a_held_out_loss_that_does_not_fit_is_not_measured(
    model: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draws = iter([*["fits"] * held_out.TIMESTEP_PARTS, "fits", "no", *["fits"] * held_out.TIMESTEP_PARTS])
    draw = held_out.HeldOut.draw

    def lacking(self: Any, *given: Any) -> Any:
        return no_memory() if next(draws) == "no" else draw(self, *given)

    monkeypatch.setattr(held_out.HeldOut, "draw", lacking)
    monkeypatch.setattr(Validator, "decode", no_memory)
    flags = [
        "--load_tensors",
        "--max_train_steps",
        2,
        "--checkpointing_steps",
        1,
        *SHOWN[:2],
        "--num_inference_steps",
        1,
    ]
    assert train(lora_flags(model, prepared, tmp_path, *flags)) == 0
    measured = [line["step"] for line in metrics(tmp_path) if "held_out_loss" in line]
    assert measured == [0, 2]
    said = capsys.readouterr().err
    assert "held-out loss after step 1: out of memory, not measured; training continues" in said
    assert "contact_sheet.png: out of memory, the training clip" in said
    assert next(draws, None) is None


@pytest.mark.fault("memory: out of memory on another rank")
def test_all_ranks_skip_what_does_not_fit_on_one_of_them(
    model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulates another rank, which reports no memory in the sum of losses and sends names of skipped videos."""
    measure = Alone(model, prepared, tmp_path).held_out
    assert measure.losses() is not None
    measure.run.ranks.num_processes = 2

    def other(sums: torch.Tensor) -> None:
        sums[-1] += 1.0

    monkeypatch.setattr(held_out.dist, "all_reduce", other)
    assert measure.losses() is None
    validator = bare(tmp_path, texts=["a", "b"])
    validator.transformer = torch.nn.Linear(1, 1)
    validator.pipeline = SimpleNamespace(vae=torch.nn.Linear(1, 1))
    path = validator.path(3, 1, 0)
    validator.run = run_alone(tmp_path)
    validator.run.ranks.num_processes = 2
    gathered: list[Any] = []

    def gather(items: list[Any]) -> list[Any]:
        gathered.append(items)
        return [*items, (path, "none left")] if len(gathered) == 2 else items

    monkeypatch.setattr(validator.run.ranks, "gather", gather)
    monkeypatch.setattr(Validator, "sample", lambda *_: torch.zeros(1, 1, 3, 8, 8))
    monkeypatch.setattr(validation, "write_video", lambda path, *_: path.touch())
    path.parent.mkdir()
    assert validator.render(3) == [validator.path(3, 0, 0)]
    assert gathered == [[False], [], []]
    assert f"out of memory (none left); training continues without these videos: {path.name}" in capsys.readouterr().err


@pytest.mark.fault("memory: out of memory while the decoder is moved to the device")
def test_a_vae_that_does_not_fit_is_moved_back_completely(tmp_path: Path) -> None:
    moved: list[str] = []

    class Vae(torch.nn.Module):
        def to(self, device: Any) -> Any:
            moved.append(str(device))
            return no_memory() if len(moved) == 1 else self

    validator = bare(tmp_path)
    validator.transformer = torch.nn.Linear(1, 1)
    validator.pipeline = SimpleNamespace(vae=Vae())
    validator.run.ranks.device = torch.device("meta")
    assert validator.render(1) == []
    assert moved == ["meta", "cpu"]
