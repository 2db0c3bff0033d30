"""Every kind of CogVideoX with every method: trained, resumed, validated, exported, used in stock diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running import (
    PROMPT,
    equal,
    frames_of,
    lora_flags,
    losses,
    safetensors_of,
    sft_flags,
    train,
    train_all,
    train_image,
    train_image_all,
)

from cogvideox.checkpoint import checkpoints

Tiny = Callable[[str], Path]
KINDS = ["2b", "1.5-5b", "5b-i2v", "1.5-5b-i2v"]  # 5b is in test_scripts.py
IGNORE = "--ignore_learned_positional_embeddings"
IMAGE_FLAGS = {
    "5b-i2v": ("--noised_image_dropout", 0.5, "--height", 64, "--width", 96),
    "1.5-5b-i2v": (),
    "5b-i2v without positions": (IGNORE, "--validation_frames", 5),
}
pytestmark = pytest.mark.usefixtures("small")


def flags_of(tiny: Tiny, kind: str, method: str, tensors: Path, image: Path, output: Path) -> list[str]:
    flags = lora_flags if method == "lora" else sft_flags
    more = ["--load_tensors", "--validation_prompt", PROMPT, "--gradient_accumulation_steps", 1, "--max_train_steps", 3]
    more += ["--learning_rate", 1e-2 if method == "lora" else 1e-3, "--height", 32, "--width", 48]
    if kind in IMAGE_FLAGS:
        more += ["--validation_images", image, *IMAGE_FLAGS[kind]]
    return flags(tiny(kind.split()[0]), tensors, output, *more)


def script_of(kind: str, method: str) -> Callable[[list[str]], int]:
    scripts: dict[str, Callable[[list[str]], int]] = {"lora": train, "sft": train_all}
    if kind in IMAGE_FLAGS:
        scripts = {"lora": train_image, "sft": train_image_all}
    return scripts[method]


def result_of(output: Path) -> dict[str, Any]:
    return safetensors_of(output) | safetensors_of(output / "transformer")


@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("kind", [*KINDS, "5b-i2v without positions"])
def test_trains_resumes_and_gives_the_validated_video(
    tiny: Tiny,
    image_tensors: Path,
    image: Path,
    tmp_path: Path,
    validated: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    method: str,
) -> None:
    output, run = tmp_path / "run", script_of(kind, method)
    flags = flags_of(tiny, kind, method, image_tensors, image, output)
    assert run(flags) == 0
    whole, whole_losses = result_of(output), losses(output)
    assert all(0.1 < loss < 10 for loss in whole_losses)
    assert not [name for name, tensor in whole.items() if not tensor.any() and "lora_B" in name]
    assert json.loads((output / "recipe.json").read_text())["verification"]["max_difference"] == 0

    stock = frames_of(output / "inference.py", monkeypatch).numpy()
    assert (stock == validated["step-000003"]).all()
    assert (stock != validated["step-000000"]).any()
    if kind in IMAGE_FLAGS and method == "lora":  # another image gives another video
        Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
        other = frames_of(output / "inference.py", monkeypatch, PROMPT, tmp_path / "red.png").numpy()
        assert other.shape == stock.shape
        assert (other != stock).any()

    for path in checkpoints(output)[:-1]:
        shutil.rmtree(path)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2"]
    (output / "recipe.json").unlink()
    assert run(flags) == 0
    assert equal(result_of(output), whole)
    assert losses(output) == whole_losses
