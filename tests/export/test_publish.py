"""publish.py: a result is published only if the reloaded weights compute what was trained."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import in_hub_cache
from running import PROMPT, WEIGHTS, lora_flags, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideox.config.flags import ModelFlags
from cogvideox.config.lora_file import FOLDED_EXACTLY, FOLDED_ROUNDED
from cogvideox.export import card, publish
from cogvideox.export.card import CARD_NAME
from cogvideox.export.publish import (
    INFERENCE_NAME,
    MIN_COSINE,
    RECIPE_NAME,
    command_of,
    compare_outputs,
    preserves_effect,
)
from cogvideox.model.tasks import IMAGE_NAME, ImageToVideo, Task, TextToVideo

# -- compared ----------------------------------------------------------------------------------------------------------


def test_a_wrong_scale_is_not_faithful() -> None:
    """Doubling a small effect leaves the cosine near 1, so the check compares the effect itself."""
    base = torch.linspace(-1.0, 1.0, 101)
    effect = 1e-3 * torch.linspace(-1.0, 1.0, 101).square()
    assert compare_outputs(base + effect, base + 2 * effect)[1] > MIN_COSINE
    assert not preserves_effect(base, base + effect, base + 2 * effect)
    assert not preserves_effect(base, base + effect, base)
    assert not preserves_effect(base, base + effect, torch.full_like(base, torch.nan))
    assert preserves_effect(base, base + effect, base + effect)
    assert preserves_effect(base, base, base)


def test_compare() -> None:
    one = torch.tensor([[3.0, 4.0]])
    assert compare_outputs(one, one) == (0.0, pytest.approx(1.0))
    assert compare_outputs(one, -one) == (8.0, pytest.approx(-1.0))
    assert compare_outputs(one, torch.tensor([[4.0, -3.0]])) == (7.0, pytest.approx(0.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_never_pass(bad: float) -> None:
    one = torch.tensor([1.0, bad])
    for first, second in ((one, one), (one, torch.ones(2)), (torch.ones(2), one)):
        assert not compare_outputs(first, second)[1] >= MIN_COSINE


def not_finite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publish, "compute_output", lambda *_: torch.full((4,), float("nan")))


def after_writing(change: Callable[[Path], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Returns a fault that changes the weights between writing and reloading."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        write = publish.write_weights

        def written(method: Any, folder: Path) -> dict[str, Any]:
            about = write(method, folder)
            change(folder / WEIGHTS)
            return about

        patch.setattr(publish, "write_weights", written)

    return fault


def rewrite(path: Path, keep_metadata: bool, factor: float) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * factor}, path, metadata if keep_metadata else {"format": "pt"})


def without_one(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "blocks.1" not in name}, path, metadata)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FAULTS = {
    "NaN": not_finite,
    "a tensor changed": after_writing(lambda path: rewrite(path, True, 1.001)),
    "a block missing": after_writing(without_one),
    "no scale": after_writing(lambda path: rewrite(path, False, 1.0)),
    "torn": after_writing(torn),
}


@pytest.mark.filterwarnings("ignore:.*inconsistency was discovered")
@pytest.mark.parametrize(("fault", "plan"), [*((fault, "auto") for fault in FAULTS), ("a block missing", "lean")])
@pytest.mark.fault("export: weights that differ after they are reloaded")
def test_weights_that_reload_differently_are_not_published(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, plan: str
) -> None:
    output = tmp_path / "lora"
    scale = ["--lora_alpha", 6]  # a scale of 1.5, which the metadata record
    flags = lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 2, "--plan", plan, *scale)
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        expected = {
            "torn": "incomplete|deserializing|file",
            "NaN": f"{WEIGHTS}: the trained weights give NaN or infinite numbers, because training has diverged",
        }.get(fault, f"{WEIGHTS}: reloaded, it gives another output")
        with pytest.raises(Exception, match=expected):
            train(flags)
    assert not (output / RECIPE_NAME).exists()
    assert not (output / INFERENCE_NAME).exists()
    assert train(flags) == 0  # The checkpoint is complete, so only the result is written again.
    assert json.loads((output / RECIPE_NAME).read_text())["verification"]["max_difference"] == 0


@pytest.mark.filterwarnings("ignore:.*inconsistency was discovered")
@pytest.mark.parametrize(
    "variant", ["bf16", "fp16", "bf16 --use_dora", "bf16 --init_lora_weights pissa", "bf16 --plan lean"]
)
def test_a_scale_that_is_folded_with_rounding_is_published_in_16_bits(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Rounding changes the output by more than a hundredth of what little training has changed."""
    scale = ("--lora_alpha", 3, "--fold_lora_scale", "--mixed_precision", *variant.split())
    flags = lora_flags(model, tensors, tmp_path, "--load_tensors", "--max_train_steps", 2, *scale)
    with monkeypatch.context() as patch:
        after_writing(lambda path: rewrite(path, True, 1.1))(patch)
        with pytest.raises(RuntimeError, match=f"{WEIGHTS}: reloaded, it gives another output"):
            train(flags)
    assert train(flags) == 0
    recipe = json.loads((tmp_path / RECIPE_NAME).read_text())
    assert recipe["lora_scale_folded"] == FOLDED_ROUNDED
    assert 0 < recipe["verification"]["max_difference"] < 0.05


def test_a_lora_that_is_tiny_in_fp16_is_published(model: Path, tensors: Path, tmp_path: Path) -> None:
    """Products of matrices below 6e-5 lose bits in fp16, so they differ if a scale of 32 is multiplied in before."""
    rate = ("--lora_alpha", 128, "--learning_rate", 1e-5, "--mixed_precision", "fp16")
    assert train(lora_flags(model, tensors, tmp_path, "--load_tensors", "--max_train_steps", 2, *rate)) == 0
    recipe = json.loads((tmp_path / RECIPE_NAME).read_text())
    assert recipe["lora_scale_folded"] == FOLDED_EXACTLY
    assert 0 < recipe["verification"]["max_difference"] < 0.01


def test_rewritten_equal_weights_are_published(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In contrast to the test above, the same tensors and metadata pass if they are only rewritten."""
    after_writing(lambda path: rewrite(path, True, 1.0))(monkeypatch)
    assert train(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 1)) == 0


# -- in which order ----------------------------------------------------------------------------------------------------


def test_the_recipe_comes_last(model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, there = tmp_path / "lora", {}
    write = publish.write_atomically

    def watched(path: Path, content: bytes) -> None:
        there[path.name] = {
            name for name in (WEIGHTS, INFERENCE_NAME, CARD_NAME, RECIPE_NAME) if (output / name).exists()
        }
        write(path, content)

    monkeypatch.setattr(publish, "write_atomically", watched)
    monkeypatch.setattr(card, "write_atomically", watched)
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1)) == 0
    written = [WEIGHTS, INFERENCE_NAME, CARD_NAME, RECIPE_NAME]
    assert list(there) == written[1:]
    assert there == {name: set(written[:place]) for place, name in enumerate(written) if place}
    assert not list(output.rglob("*.tmp"))


def test_an_extended_run_is_unfinished_until_its_export(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe.json next to weights that it does not describe would mark an unfinished folder as finished."""
    output = tmp_path / "lora"
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1)) == 0
    after_writing(lambda path: rewrite(path, True, 2.0))(monkeypatch)
    with pytest.raises(RuntimeError, match="another output"):
        train(lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 2))
    assert not (output / RECIPE_NAME).exists()


def test_the_command_reads_the_base_model_from_the_folder_of_the_run(
    model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise it would download the model again, or fail without a network."""
    cache, output = tmp_path / "a cache", tmp_path / "lora"
    in_hub_cache(cache, "model", model)
    hub = ("--pretrained_model_name_or_path", "me/model", "--cache_dir", cache)
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1, *hub)) == 0
    (command,) = re.findall("to use it: (.+)", capsys.readouterr().err)
    assert shlex.split(command) == [f"HF_HUB_CACHE={cache}", "python", str(output / INFERENCE_NAME)]


@pytest.mark.parametrize(
    ("task", "images", "flags"),
    [
        (TextToVideo, [], []),
        (ImageToVideo, [], ["--image", "first_frame.png"]),
        (ImageToVideo, [IMAGE_NAME.format(0)], []),
    ],
)
def test_the_command_names_a_first_frame_if_the_run_had_none(
    tmp_path: Path, task: type[Task], images: list[str], flags: list[str]
) -> None:
    for name in images:
        (tmp_path / name).touch()
    command = command_of(ModelFlags(str(tmp_path)), task, tmp_path / INFERENCE_NAME)
    assert shlex.split(command) == ["python", str(tmp_path / INFERENCE_NAME), *flags]


def test_the_recipe_says_how_it_was_made(reference: Path) -> None:
    made = json.loads((reference / RECIPE_NAME).read_text())
    assert made["step"] == 6
    assert made["method"] == "Lora"
    assert made["flags"]["validation_prompt"] == PROMPT
    assert made["verification"]["max_difference"] == 0
