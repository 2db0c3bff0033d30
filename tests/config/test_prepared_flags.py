"""Tests prepared_flags.py: --load_tensors records the flags of the preparation and refuses flags that differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import lora_flags, prepare, train

from cogvideox.config import args
from cogvideox.config.flags import DataFlags, EncodeFlags, FirstFrameFlags
from cogvideox.config.options import ImageLoraOptions, LoraOptions, fields_of
from cogvideox.config.prepared_flags import CLIPS, PREPARED, is_factory_layout
from cogvideox.data.cache import TensorCache, open_index
from cogvideox.errors import UsageError

UNUSUAL = {
    "--fps": 10,
    "--frame_selection": "head",
    "--skip_frames_start": 1,
    "--skip_frames_end": 2,
    "--video_reshape_mode": "center",
    "--random_flip": 0.25,
    "--num_augmentations": 3,
    "--max_upscale": 2,
    "--seed": 7,
    "--dtype": "fp32",
    "--id_token": "TOKEN",
    "--repeats": 2,
}


def words(flags: dict[str, Any]) -> list[str]:
    return [str(word) for pair in flags.items() for word in pair]


@pytest.fixture(scope="module")
def unusual(model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder that was prepared with flags other than the defaults of training. Tests must not change it."""
    folder = tmp_path_factory.mktemp("unusual") / "tensors"
    assert prepare(model, clips, folder, *words(UNUSUAL)) == 0
    return folder


def parse(folder: Path, *more: object, options_type: Any = LoraOptions) -> Any:
    base = ["--pretrained_model_name_or_path", "m", "--data_root", folder, "--load_tensors", *more]
    return args.parse(options_type, None, [str(word) for word in base])


def problems(folder: Path, *more: object, options_type: Any = LoraOptions) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        parse(folder, *more, options_type=options_type)
    return caught.value.problems


def test_flags_that_are_not_given_have_the_prepared_values(unusual: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = args.config_dict(parse(unusual))
    for name, value in UNUSUAL.items():
        expected = (value,) if name == "--repeats" else value
        assert flags[name.removeprefix("--")] == (42 if name == "--seed" else expected)
    with pytest.raises(SystemExit):
        parse(unusual, "--print_config")
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["fps"] == ["prepared", "10.0"]
    assert lines["height_buckets"] == ["prepared", "64"]
    assert lines["seed"] == ["default", "42"]
    assert open_index(unusual).recipe["seed"] == 7


def test_given_flags_that_agree_are_accepted(unusual: Path) -> None:
    size = ("--height_buckets", 64, "--width_buckets", 96, "--frame_buckets", 9, "--max_num_frames", 9)
    lists = ("--caption_column", "prompts.txt", "--video_column", "videos.txt")
    options = parse(unusual, *words(UNUSUAL), *size, *lists, "--encode_tiling", "false", "--video_reader", "pyav")
    assert options.data.seed == 7
    assert parse(unusual, "--train_resolution", "9x64x96").data.fps == 10


def test_validation_videos_have_the_size_of_the_prepared_clips(unusual: Path, tmp_path: Path) -> None:
    """Without flags for buckets, they follow from the folder: by single lists of sizes here, by buckets below."""
    validation = parse(unusual).validation
    assert (validation.validation_frames, validation.height, validation.width) == (9, 64, 96)
    assert parse(unusual, "--height", 32).validation.height == 32
    recipe = {"train_resolution": ["1x96x64", "17x96x64"]}  # as somebody else may write it
    index = json.loads((unusual / "index.json").read_text()) | {"recipe": recipe}
    (tmp_path / "index.json").write_text(json.dumps(index))
    validation = parse(tmp_path).validation
    assert (validation.validation_frames, validation.height, validation.width) == (17, 96, 64)


DIFFERENT = {
    "--fps": (16, "--fps 16: the tensors were prepared with 10; "),
    "--frame_selection": ("middle", "--frame_selection middle: the tensors were prepared with head; "),
    "--skip_frames_start": (0, "--skip_frames_start 0: the tensors were prepared with 1; "),
    "--skip_frames_end": (0, "--skip_frames_end 0: the tensors were prepared with 2; "),
    "--video_reshape_mode": ("none", "--video_reshape_mode none: the tensors were prepared with center; "),
    "--random_flip": (0.5, "--random_flip 0.5: the tensors were prepared with 0.25; "),
    "--num_augmentations": (1, "--num_augmentations 1: the tensors were prepared with 3; "),
    "--max_upscale": (1.5, "--max_upscale 1.5: the tensors were prepared with 2; "),
    "--dtype": ("bf16", "--dtype bf16: the tensors were prepared with fp32; "),
    "--id_token": ("OTHER", "--id_token OTHER: the tensors were prepared with TOKEN; "),
    "--repeats": (3, "--repeats 3: the tensors were prepared with 2; "),
    "--encode_tiling": ("true", "--encode_tiling true: the tensors were prepared with false; "),
    "--dataset_file": ("t.csv", "--dataset_file t.csv: the tensors were prepared without it; "),
    "--caption_column": ("c.txt", "--caption_column c.txt: the tensors were prepared without it; "),
    "--height_buckets": ("32 64", "--height_buckets 32 64: the tensors were prepared with 64; give this value"),
    "--width_buckets": (128, "--width_buckets 128: the tensors were prepared with 96; give this value"),
    "--frame_buckets": (5, "--frame_buckets 5: the tensors were prepared with 9; give this value"),
    "--max_num_frames": (49, "--max_num_frames 49: the tensors were prepared with 9; give this value"),
}


@pytest.mark.fault("flags: a flag of the preparation that the prepared folder contradicts", times=len(DIFFERENT))
def test_given_flags_that_differ_are_refused_all_at_once(unusual: Path) -> None:
    given = [word for name, (value, _) in DIFFERENT.items() for word in (name, *str(value).split())]
    found = sorted(problems(unusual, *given))
    assert len(found) == len(DIFFERENT)
    for line, says in zip(found, sorted(says for _, says in DIFFERENT.values()), strict=True):
        assert line.startswith(says)
    for name, (value, says) in DIFFERENT.items():
        (line,) = problems(unusual, name, *str(value).split())
        assert line.startswith(says)


def test_the_number_of_first_frames_is_the_folder_s(image_tensors: Path) -> None:
    assert parse(image_tensors, options_type=ImageLoraOptions).first_frames.num_image_noise_variants == 2
    (line,) = problems(image_tensors, "--num_image_noise_variants", 8, options_type=ImageLoraOptions)
    assert line.startswith("--num_image_noise_variants 8: the tensors were prepared with 2; ")


def test_the_files_of_a_run_say_what_the_tensors_are(model: Path, unusual: Path, tmp_path: Path) -> None:
    flags = lora_flags(model, unusual, tmp_path / "lora", "--load_tensors", "--max_train_steps", 1, "--seed", 3)
    assert train(flags) == 0
    recipe = json.loads((tmp_path / "lora" / "recipe.json").read_text())
    config = json.loads((tmp_path / "lora" / "config.json").read_text())
    assert recipe["flags"] == config["flags"]
    for name in ("fps", "frame_selection", "random_flip", "num_augmentations", "id_token", "max_upscale"):
        assert config["flags"][name] == UNUSUAL[f"--{name}"]
    assert (config["flags"]["seed"], recipe["prepared"]["seed"]) == (3, 7)
    assert "Begin prompts with TOKEN" in (tmp_path / "lora" / "README.md").read_text()


def test_every_flag_of_clips_and_tensors_is_kept_or_named() -> None:
    """Whoever adds a flag must decide whether it changes tensors."""
    free = {"data_root", "validation_data_root", "allow_path", "max_bad_fraction", "decode_timeout", "decode_memory"}
    free |= {"dataset_name", "dataset_config_name", "seed", "dataloader_num_workers", "t5_on", "max_sequence_length"}
    own = (DataFlags, EncodeFlags, FirstFrameFlags)
    names = {name for of in own for name in of.__dataclass_fields__}
    assert names == set(PREPARED) | free
    assert set(PREPARED) <= {item.name for _, item, _ in fields_of(ImageLoraOptions)}


# -- folders that do not record every flag -----------------------------------------------------------------------------


@pytest.fixture
def older(tensors: Path, tmp_path: Path) -> Path:
    """Returns a folder as an older version wrote it."""
    folder = Path(shutil.copytree(tensors, tmp_path / "older"))
    values = json.loads((folder / "index.json").read_text()) | {"format": 3}
    del values["recipe"]
    (folder / "index.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def factory(tensors: Path, tmp_path: Path) -> Path:
    """Returns a folder with the layout of the CogVideoX factory and one clip."""
    index, cache, folder = open_index(tensors), TensorCache(tensors), tmp_path / "factory"
    sample = index.samples[0]
    for name, key in (("video_latents", sample.video_keys[0]), ("prompt_embeds", sample.prompt_key)):
        (folder / name).mkdir(parents=True)
        (tensor,) = cache.read(key).values()
        torch.save(tensor, folder / name / "00000.pt")
    (folder / "prompts.txt").write_text(f"{sample.caption}\n")
    (folder / "videos.txt").write_text("videos/00000.mp4\n")
    return folder


UNKNOWN = {
    "frame_selection": "middle",
    "skip_frames_start": 0,
    "skip_frames_end": 0,
    "video_reshape_mode": "none",
    "random_flip": 0.5,
    "max_upscale": 1.5,
    "bucket_choice": "nearest",
    "video_reader": "pyav",
    "encode_tiling": "true",
}


@pytest.mark.fault("flags: a flag of the preparation that the prepared folder does not record", times=len(UNKNOWN))
@pytest.mark.parametrize("kind", ["older", "factory"])
def test_given_flags_that_a_folder_does_not_record_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    found = problems(folder, *words({f"--{name}": value for name, value in UNKNOWN.items()}))
    assert len(found) == len(UNKNOWN)
    assert all("the prepared folder does not record this flag; leave the flag out" in line for line in found)
    flags = args.config_dict(parse(folder))
    # They do not have the defaults of the training script.
    assert [flags[name] for name in UNKNOWN] == [None] * len(UNKNOWN)


def test_an_older_folder_trains_and_says_what_it_can(model: Path, older: Path, tmp_path: Path) -> None:
    flags = args.config_dict(parse(older))
    assert (flags["fps"], flags["train_resolution"], flags["dtype"]) == (8.0, ("9x64x96",), "fp32")
    assert train(lora_flags(model, older, tmp_path / "lora", "--load_tensors", "--max_train_steps", 1)) == 0
    (line,) = problems(older, "--fps", 16)
    assert line.startswith("--fps 16: the tensors were prepared with 8; ")


def test_a_factory_s_folder_takes_what_its_files_do_not_have(factory: Path) -> None:
    assert is_factory_layout(factory)
    given = ("--caption_column", "prompts.txt", "--video_column", "videos.txt", "--id_token", "TOKEN", "--fps", 16)
    assert parse(factory, *given, "--repeats", 2).data.fps == 16
    (line,) = problems(factory, "--num_augmentations", 2)
    assert line.startswith("--num_augmentations 2: the tensors were prepared with 1; ")


@pytest.mark.fault("security: a foreign index.json whose recipe has values that no flag allows")
@pytest.mark.parametrize(
    ("name", "value"),
    [("fps", "rm -rf"), ("frame_selection", {"a": 1}), ("num_augmentations", [1, 2]), ("repeats", [[]])],
)
def test_a_recipe_that_somebody_else_wrote_is_read_as_flags_are(
    tensors: Path, tmp_path: Path, name: str, value: Any
) -> None:
    values = json.loads((tensors / "index.json").read_text())
    values["recipe"][name] = value
    (tmp_path / "index.json").write_text(json.dumps(values))
    (line,) = problems(tmp_path)
    assert line.startswith(f"{tmp_path / 'index.json'}: --{name}")
    assert line.endswith("run prepare_dataset.py again")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 4}', '{"format": 9}', '{"format": 4, "samples": 3}'])
def test_an_unreadable_index_is_left_to_other_checks(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    assert parse(tmp_path).data.frame_selection == "middle"
    with pytest.raises(UsageError):
        open_index(tmp_path)


def test_the_clip_recipe_s_flags_are_all_compared(clip_flags: Callable[[], set[str]]) -> None:
    assert clip_flags() <= {*CLIPS, "seed"}


@pytest.fixture
def clip_flags() -> Callable[[], set[str]]:
    """Returns the settings that decide the pixels of a clip, by the names of their flags."""
    from cogvideox.data.clips import ClipRecipe

    named = {"reshape_mode": "video_reshape_mode", "flip_probability": "random_flip", "variants": "num_augmentations"}
    named |= {"every_bucket": "bucket_choice", "reader": "video_reader"}
    return lambda: {named.get(name, name) for name in ClipRecipe.__dataclass_fields__ if name != "buckets"}
