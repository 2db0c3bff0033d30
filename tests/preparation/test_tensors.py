"""Tests of tensors.py: a prepared folder is checked against the model and the flags, and damage is repaired."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fakes import edit_json, flip_byte, listing, options_of, poison, run_alone
from running import LORA_SCRIPT, PROMPT, Forked, equal, lora_flags, losses, prepare, python, train, weights
from safetensors.torch import load_file, save_file
from tiny_cogvideox import make_tiny

from cogvideox.checks import check_tensor_cache
from cogvideox.config.flags import TENSOR_FOLDER
from cogvideox.data.cache import CacheError, TensorCache, open_index
from cogvideox.errors import UsageError
from cogvideox.preparation.tensors import check_flags, open_tensors


def refused(flags: list[str]) -> str:
    """Returns the only line of the error with which training is refused."""
    with pytest.raises(UsageError) as error:
        train(flags)
    (line,) = error.value.problems
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--id_token", "OTHER", "--id_token OTHER: the tensors were prepared with TOKEN; "),
        ("--height_buckets", 128, "--height_buckets 128: the tensors were prepared with 64; give this value"),
        ("--width_buckets", 128, "--width_buckets 128: the tensors were prepared with 96; give this value"),
        ("--frame_buckets", 5, "--frame_buckets 5: the tensors were prepared with 9; give this value"),
    ],
)
def test_flags_that_do_not_fit_the_tensors(
    model: Path, tensors: Path, tmp_path: Path, flag: str, value: object, says: str
) -> None:
    before = listing(tensors)
    assert says in refused(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", flag, value))
    assert listing(tensors) == before
    assert not (tmp_path / "lora" / "checkpoint-2").exists()


def test_flags_that_fit(tensors: Path) -> None:
    index = open_index(tensors)
    for more in (
        ["--id_token", "TOKEN"],
        ["--id_token", " TOKEN "],
        [],
        ["--height_buckets", 32, 64, "--id_token", "T"],
    ):
        check_flags(index, options_of(Path("x"), *more).data)
    fresh = dataclasses.replace(
        options_of(Path("x")).data, **dict.fromkeys(("frame_buckets", "height_buckets", "width_buckets"), (1,))
    )
    with pytest.raises(UsageError) as error:
        check_flags(index, dataclasses.replace(fresh, id_token="Z"))
    assert len(error.value.problems) == 4  # all problems are reported at once


@pytest.mark.fault("data: tensors of another model, or made with other flags")
def test_tensors_of_another_model(tensors: Path, tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", "5b", seed=1)
    line = refused(lora_flags(other, tensors, tmp_path / "lora", "--load_tensors"))
    assert str(tensors) in line
    assert "another VAE and text encoder than this model's" in line
    assert "prepare_dataset.py" in line


@pytest.mark.parametrize(
    ("part", "name"), [("vae", "VAE"), ("text_encoder", "text encoder"), ("tokenizer", "text encoder")]
)
@pytest.mark.fault("data: tensors of another model, or made with other flags")
def test_tensors_of_another_part(model: Path, tensors: Path, tmp_path: Path, part: str, name: str) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    if part == "tokenizer":
        edit_json(next((other / part).glob("*_config.json")), another=True)
    else:
        path = next((other / part).glob("*.safetensors"))
        values = load_file(path)
        first = next(n for n, t in values.items() if t.numel() > 1)
        save_file(values | {first: values[first] + 1}, path, {"format": "pt"})
    line = refused(lora_flags(other, tensors, tmp_path / "lora", "--load_tensors"))
    assert f"made with another {name} than this model's" in line


def test_text_to_video_sees_no_first_frames(model: Path, tensors: Path, image_tensors: Path, tmp_path: Path) -> None:
    """First frames in the folder change nothing, so a run that began before they were added can continue."""
    flags = ["--pretrained_model_name_or_path", model, "--load_tensors", "--data_root"]
    with_images, without = (
        open_tensors(run_alone(tmp_path / "out"), options_of(tmp_path / "out", *flags, folder)).index
        for folder in (image_tensors, tensors)
    )
    assert with_images == without
    assert with_images.fingerprint == without.fingerprint


def test_a_folder_of_clips_is_no_prepared_folder(model: Path, clips: Path, tmp_path: Path) -> None:
    line = refused(lora_flags(model, clips, tmp_path / "lora", "--load_tensors"))
    rule = "has no index.json; give the --output_dir of prepare_dataset.py, or leave out --load_tensors"
    assert f"{clips} {rule} and give the folder of the clips" in line


def test_a_preparation_that_has_not_ended_must_be_run_again(model: Path, clips: Path, tmp_path: Path) -> None:
    assert prepare(model, clips, tmp_path / "out", "--dry_run") == 0
    line = refused(lora_flags(model, tmp_path / "out", tmp_path / "lora", "--load_tensors"))
    rule = "the preparation has not ended; run prepare_dataset.py again with the same flags, without --dry_run"
    assert f"{tmp_path / 'out'} has no index.json; {rule}" in line


def test_preparing_before_or_during_the_run_gives_the_same_data(
    model: Path, clips: Path, tensors: Path, tmp_path: Path
) -> None:
    prepared = ["--pretrained_model_name_or_path", model, "--data_root", tensors, "--load_tensors"]
    now = ["--pretrained_model_name_or_path", model, "--data_root", clips, "--tensor_cache", tmp_path / "cache"]
    one = open_tensors(run_alone(tmp_path / "one"), options_of(tmp_path / "one", *prepared))
    two = open_tensors(run_alone(tmp_path / "two"), options_of(tmp_path / "two", *now, "--id_token", "TOKEN"))
    assert one.index == two.index
    assert one.index.fingerprint == two.index.fingerprint
    assert one.encoders == two.encoders
    without = open_tensors(run_alone(tmp_path / "two"), options_of(tmp_path / "two", *now))
    assert without.index.fingerprint != two.index.fingerprint


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    flip_byte(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lose(path: Path) -> None:
    path.unlink()


@pytest.mark.fault("data: a cached tensor is changed, truncated, missing, or contains NaN")
@pytest.mark.parametrize("damage", [flip, lose, *(pytest.param(f, marks=pytest.mark.long) for f in (truncate, poison))])
def test_damage_names_the_file_and_training_from_the_clips_repairs_it(
    model: Path,
    clips: Path,
    tensors: Path,
    reference: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:
    cache = Path(shutil.copytree(tensors, tmp_path / "cache"))
    sample = open_index(cache).samples[0]
    path = cache / "tensors" / sample.video_keys[0][:2] / f"{sample.video_keys[0]}.safetensors"
    content = path.read_bytes()
    damage(path)
    more = ["--validation_prompt", PROMPT]
    with pytest.raises(CacheError) as error:
        train(lora_flags(model, cache, tmp_path / "lora", "--load_tensors", *more))
    assert str(error.value).startswith(f"{sample.id}: {path}: ")
    assert "prepare again" in str(error.value)
    assert (
        train(lora_flags(model, clips, tmp_path / "lora", "--tensor_cache", cache, "--id_token", "TOKEN", *more)) == 0
    )
    assert path.read_bytes() == content
    assert equal(weights(tmp_path / "lora"), weights(reference))


def test_a_damaged_embedding_is_found_too(model: Path, tensors: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(tensors, tmp_path / "cache"))
    for sample in open_index(cache).samples:
        flip_byte(cache / "tensors" / sample.prompt_key[:2] / f"{sample.prompt_key}.safetensors")
    with pytest.raises(CacheError, match=r"\.safetensors: its checksum is wrong; prepare again"):
        train(lora_flags(model, cache, tmp_path / "lora", "--load_tensors", "--caption_dropout", 0))
    assert torch.is_grad_enabled()


def test_damage_found_by_a_worker_ends_the_script_with_one_line(model: Path, tensors: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(tensors, tmp_path / "cache"))
    for path in cache.glob("tensors/*/*.safetensors"):
        flip_byte(path)
    flags = lora_flags(model, cache, tmp_path / "lora", "--load_tensors", "--dataloader_num_workers", 1)
    process = Forked(python(LORA_SCRIPT, *flags))
    try:
        text = process.communicate(timeout=120)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2
    assert "its checksum is wrong; prepare again" in text
    assert "Traceback" not in text


# -- the factory's layout ----------------------------------------------------------------------------------------------


@pytest.fixture
def factory_folder(tensors: Path, tmp_path: Path) -> Path:
    """Writes the prepared folder of the tests in the factory's layout."""
    index, cache, folder = open_index(tensors), TensorCache(tensors), tmp_path / "factory"
    for name in ("video_latents", "prompt_embeds"):
        (folder / name).mkdir(parents=True)
    for sample in index.samples:
        stem = Path(sample.id).stem
        torch.save(cache.read(sample.video_keys[0])["moments_CFHW"], folder / "video_latents" / f"{stem}.pt")
        torch.save(cache.read(sample.prompt_key)["prompt_LD"], folder / "prompt_embeds" / f"{stem}.pt")
    (folder / "prompts.txt").write_text("".join(f"{sample.caption}\n" for sample in index.samples))
    (folder / "videos.txt").write_text("".join(f"{sample.id}\n" for sample in index.samples))
    return folder


def test_a_factory_folder_trains_as_ours_does(model: Path, tensors: Path, factory_folder: Path, tmp_path: Path) -> None:
    assert train(lora_flags(model, tensors, tmp_path / "ours", "--load_tensors")) == 0
    more = ("--load_tensors", "--id_token", "TOKEN", "--tensor_cache", tmp_path / "converted")
    assert train(lora_flags(model, factory_folder, tmp_path / "theirs", *more)) == 0
    assert losses(tmp_path / "ours") == losses(tmp_path / "theirs")
    assert equal(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))
    # The converted folder is an ordinary prepared folder.
    again = lora_flags(model, tmp_path / "converted", tmp_path / "again", "--load_tensors", "--max_train_steps", 2)
    assert train(again) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "ours")[:2]


def test_a_factory_folder_with_a_missing_tensor_ends_before_anything_is_read(
    model: Path, factory_folder: Path, tmp_path: Path
) -> None:
    (factory_folder / "video_latents" / "00003.pt").unlink()
    with pytest.raises(UsageError, match=r"00003\.pt: no such file"):
        train(lora_flags(model, factory_folder, tmp_path / "lora", "--load_tensors"))
    assert not (tmp_path / "lora").exists()


@pytest.mark.fault("flags: a validation schedule for a prepared folder without validation clips")
def test_a_schedule_without_anything_to_validate_is_named(
    model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--pretrained_model_name_or_path", model, "--load_tensors", "--data_root", tensors)
    for flags, said in (((), True), (("--validation_prompt", PROMPT), False), (("--do_validation", "false"), False)):
        run = run_alone(tmp_path / "lora")
        open_tensors(run, options_of(tmp_path / "lora", *more, "--validation_epochs", 10, *flags))
        assert ("--validation_epochs 10: has no effect; there is no " in capsys.readouterr().err) == said


def test_our_own_folder_takes_no_tensor_cache(model: Path, tensors: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tensor_cache: the tensors of this folder are used as they are"):
        train(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--tensor_cache", tmp_path))


@pytest.mark.parametrize("folder", ["clips", "factory_folder"])
def test_data_that_cannot_be_written_needs_a_tensor_cache(
    folder: str, request: pytest.FixtureRequest, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data sets that several users share are often in folders that only their owner can write."""
    data: Path = request.getfixturevalue(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != data)
    flags = lora_flags(model, data, tmp_path / "lora", *(["--load_tensors"] if folder == "factory_folder" else []))
    line = (
        f"--tensor_cache {data / TENSOR_FOLDER}: cannot be written; give a folder in which the tensors can be written"
    )
    assert refused(flags) == line
    assert not list(check_tensor_cache(options_of(tmp_path / "lora", *flags, "--tensor_cache", tmp_path / "cache")))
