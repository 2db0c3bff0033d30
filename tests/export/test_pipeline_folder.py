"""pipeline_folder.py: stock diffusers loads the folder without other files, and trained weights are stored once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import sft_flags, train_all, train_image_all

from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import PARTS
from cogvideox.errors import DiskError, UsageError
from cogvideox.export import pipeline_folder
from cogvideox.export.pipeline_folder import PIPELINE_NAME, write_pipeline
from cogvideox.export.publish import RECIPE_NAME

SAMPLING = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "output_type": "pt"}


def video(pipe: Any, **more: Any) -> torch.Tensor:
    """Returns the frames that a pipeline samples with a fixed seed."""
    length = pipe.transformer.config.max_text_seq_length
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt="a red square", generator=generator, **SAMPLING | {"max_sequence_length": length} | more).frames


def stock(folder: Path, name: str, **parts: Any) -> Any:
    """Loads a pipeline of diffusers from a folder, with some of its parts replaced."""
    import diffusers

    pipe = getattr(diffusers, name).from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained(folder: Path) -> Any:
    """Loads a transformer from its folder."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel.from_pretrained(folder)


def weights_of(folder: Path) -> Iterator[Path]:
    """Yields the paths of all weights below a folder, in order."""
    yield from sorted(folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def full_run(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains all weights with --save_pipeline. Tests must not change the folder."""
    output = tmp_path_factory.mktemp("full_run") / "run"
    flags = ("--load_tensors", "--max_train_steps", 1, "--save_pipeline")
    assert train_all(sft_flags(model, tensors, output, *flags)) == 0
    return output


def test_stock_diffusers_loads_the_folder_and_samples_the_same(full_run: Path, model: Path) -> None:
    found = video(stock(full_run / PIPELINE_NAME, "CogVideoXPipeline"))
    expected = video(stock(model, "CogVideoXPipeline", transformer=trained(full_run / "transformer")))
    assert (found - expected).abs().max() == 0
    assert (found - video(stock(model, "CogVideoXPipeline"))).abs().max() > 0, "training changed nothing"


def test_an_image_to_video_folder_samples_the_same(
    tiny: Callable[[str], Path], image_tensors: Path, image: Path, tmp_path: Path
) -> None:
    from PIL import Image

    base, name = tiny("5b-i2v"), "CogVideoXImageToVideoPipeline"
    flags = ("--load_tensors", "--max_train_steps", 1, "--save_pipeline")
    assert train_image_all(sft_flags(base, image_tensors, tmp_path / "run", *flags)) == 0
    first = Image.open(image).resize((96, 64))
    found = video(stock(tmp_path / "run" / PIPELINE_NAME, name), image=first)
    expected = video(stock(base, name, transformer=trained(tmp_path / "run" / "transformer")), image=first)
    assert (found - expected).abs().max() == 0
    assert (found - video(stock(base, name), image=first)).abs().max() > 0


def test_weights_are_stored_once_and_configs_are_copies(full_run: Path, model: Path) -> None:
    folder = full_run / PIPELINE_NAME
    for source in weights_of(full_run / "transformer"):
        assert (folder / "transformer" / source.name).samefile(source)
    for part in ("vae", "text_encoder"):
        for source in weights_of(model / part):
            assert (folder / part / source.name).samefile(source)
        assert not (folder / part / "config.json").samefile(model / part / "config.json")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "CogVideoXPipeline"
    assert not list(full_run.rglob("*.tmp"))


def without_links(*_: object) -> None:
    """Fails as os.link does between two file systems."""
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def copy_transformer(full_run: Path, folder: Path) -> Path:
    """Copies the trained transformer into a folder without a pipeline."""
    return Path(shutil.copytree(full_run / "transformer", folder / "transformer"))


def test_without_hard_links_the_trained_weights_are_still_stored_once(
    full_run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = copy_transformer(full_run, tmp_path / "run")
    monkeypatch.setattr(os, "link", without_links)
    folder = write_pipeline(ModelFlags(str(model)), "CogVideoXPipeline", transformer)
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "moved")) / PIPELINE_NAME
    assert all(path.is_symlink() for path in weights_of(moved / "transformer"))
    assert not any(path.is_symlink() for part in PARTS for path in weights_of(moved / part))
    assert folder.name == PIPELINE_NAME
    found = video(stock(moved, "CogVideoXPipeline"))
    assert (found - video(stock(full_run / PIPELINE_NAME, "CogVideoXPipeline"))).abs().max() == 0


def test_without_any_links_the_trained_weights_are_copied(
    full_run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = copy_transformer(full_run, tmp_path / "run")
    monkeypatch.setattr(os, "link", without_links)
    monkeypatch.setattr(os, "symlink", without_links)
    folder = write_pipeline(ModelFlags(str(model)), "CogVideoXPipeline", transformer)
    for source in transformer.iterdir():
        assert (folder / "transformer" / source.name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("size", ["10GB", "40KB"])
def test_a_variant_in_shards_loads_without_being_named(full_run: Path, model: Path, tmp_path: Path, size: str) -> None:
    """The base model also has files without a variant, whose weights differ."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    pipe = stock(model, "CogVideoXPipeline")
    for part in (pipe.text_encoder, pipe.vae):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(0.9)
    pipe.text_encoder.save_pretrained(base / "text_encoder", variant="half", max_shard_size=size)
    pipe.vae.save_pretrained(base / "vae", variant="half", max_shard_size=size)
    transformer = copy_transformer(full_run, tmp_path / "run")
    folder = write_pipeline(ModelFlags(str(base), variant="half"), "CogVideoXPipeline", transformer)
    assert not [path for path in folder.rglob("*") if "half" in path.name]
    assert (len(list(weights_of(folder / "text_encoder"))) > 1) == (size == "40KB")
    pipe.transformer = trained(transformer)
    assert (video(stock(folder, "CogVideoXPipeline")) - video(pipe)).abs().max() == 0


def test_a_pipeline_outlives_the_cache_of_the_hub(full_run: Path, model: Path, tmp_path: Path) -> None:
    """The cache consists of links to blobs. The pipeline still loads after the cache is deleted."""
    snapshot = tmp_path / "cache" / "snapshot"
    for path in (path for path in model.rglob("*") if path.is_file()):
        (snapshot / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
        blob = tmp_path / "cache" / f"blob-{path.relative_to(model)}".replace("/", "-")
        shutil.copyfile(path, tmp_path / "cache" / blob.name)
        (snapshot / path.relative_to(model)).symlink_to(tmp_path / "cache" / blob.name)
    folder = write_pipeline(
        ModelFlags(str(snapshot)), "CogVideoXPipeline", copy_transformer(full_run, tmp_path / "run")
    )
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    shutil.rmtree(tmp_path / "cache")
    stock(folder, "CogVideoXPipeline")


def test_a_failed_write_leaves_no_pipeline_and_the_next_run_writes_one(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    flags = sft_flags(model, tensors, output, "--load_tensors", "--save_pipeline")
    assert train_all([*flags, "--max_train_steps", "1"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_folder, "link_or_copy", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(
            DiskError, match=r"No space left on device, .*; checkpoint-2, the newest checkpoint, is safe"
        ):
            train_all([*flags, "--max_train_steps", "2"])
    assert not (output / f".{PIPELINE_NAME}.tmp").exists()
    assert not (output / PIPELINE_NAME).exists()  # the old pipeline had other weights
    assert not (output / RECIPE_NAME).exists()
    assert train_all([*flags, "--max_train_steps", "2"]) == 0
    for source in weights_of(output / "transformer"):
        assert (output / PIPELINE_NAME / "transformer" / source.name).samefile(source)
    assert not (output / f".{PIPELINE_NAME}.tmp").exists()
    del flags[flags.index("--save_pipeline")]
    assert train_all([*flags, "--max_train_steps", "3"]) == 0
    assert not (output / PIPELINE_NAME).exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [("model_index.json", "has no model_index.json"), ("tokenizer", "--save_pipeline: .* has no tokenizer")],
)
def test_an_incomplete_base_pipeline_ends_the_run_at_its_start(
    model: Path, tensors: Path, tmp_path: Path, missing: str, message: str
) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    shutil.rmtree(base / missing) if (base / missing).is_dir() else (base / missing).unlink()
    with pytest.raises(UsageError, match=message):
        train_all(sft_flags(base, tensors, tmp_path / "run", "--load_tensors", "--save_pipeline"))
    assert not (tmp_path / "run").exists()
