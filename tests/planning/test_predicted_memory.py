"""Compares, on a GPU, the peak of memory that a plan predicts with the peak of training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from random_models import make_pipeline, make_tensors
from running import LORA_SCRIPT, finish, metrics, python, start

from cogvideox.data.cache import TensorCache, open_index


@pytest.mark.parametrize("kind", ["2b", "5b-i2v"])
def test_random_tensors_are_a_prepared_folder(kind: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    make_tensors(kind, tiny(kind), tmp_path)
    index, cache = open_index(tmp_path), TensorCache(tmp_path)
    keys = {key for sample in index.samples for key in (*sample.video_keys, *sample.image_keys, sample.prompt_key)}
    assert all(cache.read(key) for key in (*keys, index.empty_prompt_key))
    assert len(keys) == len(index.samples) * (3 if kind == "5b-i2v" else 2)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns folders of CogVideoX-2b with random weights and of two samples of random tensors."""
    folder = tmp_path_factory.mktemp("2b")
    make_pipeline("2b", folder / "model")
    make_tensors("2b", folder / "model", folder / "tensors")
    return folder / "model", folder / "tensors"


@pytest.mark.gpu
@pytest.mark.timed
@pytest.mark.long
@pytest.mark.fault("memory: the peak that a plan predicts, compared with the peak on a GPU")
@pytest.mark.parametrize("plan", ["lean", "balanced", "fast"])
def test_the_peak_is_the_predicted_one(plan: str, full_size: tuple[Path, Path], tmp_path: Path) -> None:
    model, tensors = full_size
    flags = [
        "--pretrained_model_name_or_path",
        model,
        "--data_root",
        tensors,
        "--load_tensors",
        "--output_dir",
        tmp_path,
    ]
    flags += ["--mixed_precision", "bf16", "--plan", plan, "--rank", 128, "--lora_alpha", 128, "--max_train_steps", 4]
    text = finish(start(python(LORA_SCRIPT, *flags, "--learning_rate", "1e-4", "--optimizer", "adamw")))
    found = re.search(r"predicted: peak ([\d.]+) GiB", text)
    assert found, text
    peak = max(line["peak_gib"] for line in metrics(tmp_path) if "peak_gib" in line)
    assert float(found[1]) == pytest.approx(peak, rel=0.05)
