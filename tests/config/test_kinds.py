"""Trains, resumes, validates and exports every kind of CogVideoX with every method, and loads it in stock diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import edit_json
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

from cogvideox.errors import UsageError
from cogvideox.evaluation.parity import ParityError
from cogvideox.model import tasks
from cogvideox.runtime.checkpoint_files import checkpoints

Tiny = Callable[[str], Path]
KINDS = ["2b", "1.5-5b", "5b-i2v", "1.5-5b-i2v"]  # test_scripts.py trains 5b.
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
@pytest.mark.fault("export: stock diffusers reloads the result, compared pixel by pixel")
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
    uninterrupted, uninterrupted_losses = result_of(output), losses(output)
    assert all(0.1 < loss < 10 for loss in uninterrupted_losses)
    assert not [name for name, tensor in uninterrupted.items() if not tensor.any() and "lora_B" in name]
    assert json.loads((output / "recipe.json").read_text())["verification"]["max_difference"] == 0

    for name in ("inference.py", "README.md"):  # When all weights are trained, they are saved without the positions.
        assert ("ignore_learned_positions(pipe" in (output / name).read_text()) == (
            kind.endswith("ns") and method == "lora"
        )

    stock = frames_of(output / "inference.py", monkeypatch).numpy()
    assert (stock == validated["step-000003"]).all()
    assert (stock != validated["step-000000"]).any()
    if kind in IMAGE_FLAGS and method == "lora":  # Another image gives another video.
        Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
        other = frames_of(output / "inference.py", monkeypatch, PROMPT, tmp_path / "red.png").numpy()
        assert other.shape == stock.shape
        assert (other != stock).any()

    for path in checkpoints(output)[:-1]:
        shutil.rmtree(path)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2"]
    (output / "recipe.json").unlink()
    assert run(flags) == 0
    assert equal(result_of(output), uninterrupted)
    assert losses(output) == uninterrupted_losses


def refused(run: Callable[[list[str]], int], flags: list[str]) -> str:
    """Returns the only line of the error."""
    with pytest.raises(UsageError) as error:
        run(flags)
    (line,) = error.value.problems
    return line


def test_first_frames_prepared_while_training_are_the_same_as_before(
    tiny: Tiny, clips: Path, image_tensors: Path, tmp_path: Path, threads: None
) -> None:
    more = ("--id_token", "TOKEN", "--max_train_steps", 2, "--num_image_noise_variants", 2)
    before = lora_flags(tiny("5b-i2v"), image_tensors, tmp_path / "before", "--load_tensors", *more)
    now = lora_flags(tiny("5b-i2v"), clips, tmp_path / "now", "--tensor_cache", tmp_path / "cache", *more)
    assert train_image(before) == train_image(now) == 0
    assert losses(tmp_path / "before") == losses(tmp_path / "now")


def test_images_matter(tiny: Tiny, image_tensors: Path, tmp_path: Path) -> None:
    for name, rate in (("none", 0), ("all", 1)):
        more = ("--load_tensors", "--noised_image_dropout", rate, "--max_train_steps", 1)
        assert train_image(lora_flags(tiny("5b-i2v"), image_tensors, tmp_path / name, *more)) == 0
    assert losses(tmp_path / "none") != losses(tmp_path / "all")


def test_a_folder_without_first_frames_says_which_flag_to_prepare_with(
    tiny: Tiny, tensors: Path, tmp_path: Path
) -> None:
    line = refused(train_image, lora_flags(tiny("5b-i2v"), tensors, tmp_path / "lora", "--load_tensors"))
    assert line == f"--load_tensors: {tensors} holds no image latents; prepare it with --save_image_latents"


def test_prepared_tensors_of_another_number_of_noises(tiny: Tiny, image_tensors: Path, tmp_path: Path) -> None:
    more = ("--load_tensors", "--num_image_noise_variants", 3)
    line = refused(train_image, lora_flags(tiny("5b-i2v"), image_tensors, tmp_path / "lora", *more))
    assert line.startswith("--num_image_noise_variants 3: the tensors were prepared with 2; ")


def test_prepared_buckets_without_learned_positions(tiny: Tiny, image_tensors: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("5b-i2v"), tmp_path / "model"))
    edit_json(model / "transformer" / "config.json", sample_frames=17)
    more = ("--load_tensors", "--validation_frames", 17)
    line = refused(train_image, lora_flags(model, image_tensors, tmp_path / "lora", *more))
    rule = "this model's learned positions are for 17x64x96 only, but the folder has 9x64x96"
    assert line == f"--load_tensors: {rule}; prepare that bucket, or give {IGNORE}"


def test_a_run_with_other_inputs_than_diffusers_does_not_start(
    tiny: Tiny, image_tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "OFS", 1.0)
    with pytest.raises(ParityError, match=r"9x64x96: ofs: 1 apart; nothing was trained"):
        train_image(lora_flags(tiny("1.5-5b-i2v"), image_tensors, tmp_path / "lora", "--load_tensors"))
    assert not list((tmp_path / "lora").glob("checkpoint-*"))
