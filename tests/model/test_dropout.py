"""Tests --lora_dropout in complete runs: its masks do not depend on validation in between, resuming, or the plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import split
from fakes import edit_json
from running import PROMPT, WEIGHTS, equal, lora_flags, losses, train, weights

from cogvideox import loop
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.errors import UsageError
from cogvideox.evaluation.validation import evaluation_mode
from cogvideox.model.tasks import losses_of

PLANS: dict[str, tuple[object, ...]] = {
    "off, averaged": ("--use_ema",),
    "lean": ("--plan", "lean"),
    "fast": ("--plan", "fast"),
}
LOOKS = ("--validation_prompt", PROMPT, "--validation_steps", 1, "--num_inference_steps", 1)
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def prepared(tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns prepared data of four clips for training and one held out; tests must not change it."""
    return split(tensors, tmp_path_factory.mktemp("held") / "out", 5, train=slice(4))


@pytest.fixture(scope="module")
def unseen(tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns prepared data of the same four clips and none held out; tests must not change it."""
    return split(tensors, tmp_path_factory.mktemp("unseen") / "out", train=slice(4))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    """Returns run(data, name, flags): trains four steps with a checkpoint at every second one, returns the folder."""

    def run_it(data: Path, name: str, *more: object) -> Path:
        flags = lora_flags(model, data, tmp_path / name, "--load_tensors", "--max_train_steps", 4, *more)
        assert train([*flags, "--gradient_accumulation_steps", "1"]) == 0
        return tmp_path / name

    return run_it


@pytest.mark.parametrize("plan", PLANS)
def test_dropout_masks_do_not_depend_on_evaluation_or_resuming(
    prepared: Path, unseen: Path, run: Run, plan: str
) -> None:
    flags = ("--lora_dropout", 0.9, *PLANS[plan])
    looks = LOOKS if "--use_ema" in flags else ()
    alone = run(unseen, "alone", *flags)
    looked = run(prepared, "looked", *flags, *looks)
    assert losses(looked) == losses(alone)
    assert equal(weights(looked), weights(alone))
    shutil.rmtree(looked / "checkpoint-4")
    (looked / "recipe.json").unlink()
    (looked / WEIGHTS).unlink()
    run(prepared, "looked", *flags, *looks)
    assert equal(weights(looked), weights(alone))


def test_dropout_differs_from_none(prepared: Path, run: Run) -> None:
    assert losses(run(prepared, "dropped", "--lora_dropout", 0.9)) != losses(run(prepared, "whole"))


def test_evaluation_puts_back_the_mode_of_every_module() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout(0.5))).eval()
    module[1][0].train()
    before = [part.training for part in module.modules()]
    with evaluation_mode(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == before == [False, False, False, True]


def test_the_whole_model_trains(prepared: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded model is in evaluation mode; a part that stayed in it would train without dropout."""
    modes: list[set[bool]] = []

    def watched(task: Any, schedule: Any, transformer: Any, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            modes.append({part.training for part in transformer.modules()})
        return losses_of(task, schedule, transformer, batch)

    monkeypatch.setattr(loop, "losses_of", watched)
    run(prepared, "run", "--max_train_steps", 2)
    assert modes == [{True}, {True}]


def test_a_model_with_dropout_of_its_own_is_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    edit_json(folder / "transformer" / "config.json", dropout=0.1)
    with pytest.raises(UsageError, match=r"a dropout of 0\.1, .*; set \"dropout\" to 0 in transformer/config\.json"):
        read_geometry(ModelFlags(str(folder)))
