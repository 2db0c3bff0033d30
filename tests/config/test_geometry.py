"""Tests geometry.py: every number comes from the configs and agrees with the pipeline that reads the same configs."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from cogvideox.config import args
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import (
    SCHEDULER_DEFAULTS,
    TRANSFORMER_DEFAULTS,
    VAE_DEFAULTS,
    Geometry,
    check_model,
    check_preparation,
    read_geometry,
)
from cogvideox.config.options import (
    ImageLoraOptions,
    ImageSftOptions,
    LoraOptions,
    PrepareOptions,
    SftOptions,
    derive,
    derive_video_size,
)
from cogvideox.errors import UsageError
from cogvideox.model.diffusion import NoiseSchedule
from cogvideox.model.models import load_weights

Tiny = Callable[[str], Path]
KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
PARTS = ("transformer", "vae", "scheduler")


def geometry(folder: Path) -> Geometry:
    return read_geometry(ModelFlags(str(folder)))


@pytest.fixture
def configs(tiny: Tiny, tmp_path: Path) -> Path:
    """Returns a folder with the three config files of a model, without its weights."""
    for part in PARTS:
        (tmp_path / part).mkdir()
        for path in (tiny("5b") / part).glob("*.json"):
            shutil.copy(path, tmp_path / part)
    return tmp_path


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_the_configs(tiny: Tiny, kind: str) -> None:
    found = geometry(tiny(kind))
    transformer = json.loads((tiny(kind) / "transformer/config.json").read_text())
    vae = json.loads((tiny(kind) / "vae/config.json").read_text())
    for name in ("in_channels", "patch_size", "patch_size_t", "sample_height", "sample_width", "max_text_seq_length"):
        assert getattr(found, name) == transformer[name]
    assert found.rotary is (kind != "2b")
    assert found.image_to_video is kind.endswith("i2v")
    assert found.learned_positions is (kind == "5b-i2v")
    assert found.ofs is found.invert_scale_latents is (kind == "1.5-5b-i2v")
    assert found.text_embed_dim == transformer["text_embed_dim"]
    assert found.scaling_factor == vae["scaling_factor"]
    assert found.latent_channels == vae["latent_channels"]
    assert found.default_fps == (16 if kind.startswith("1.5") else 8)
    assert found.schedule == json.loads((tiny(kind) / "scheduler/scheduler_config.json").read_text())


def test_compressions_are_the_pipeline_s(tiny: Tiny) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny("5b") / "vae")
    pipeline = CogVideoXPipeline(None, None, vae, None, None)
    found = geometry(tiny("5b"))
    assert found.spatial_compression == pipeline.vae_scale_factor_spatial == 8
    assert found.temporal_compression == pipeline.vae_scale_factor_temporal == 4
    assert found.scaling_factor == pipeline.vae_scaling_factor_image
    assert found.size_multiple == 16


def test_other_configs_give_other_numbers(configs: Path) -> None:
    edit(configs, "vae/config.json", block_out_channels=[8, 8, 8], temporal_compression_ratio=8, scaling_factor=2.0)
    edit(configs, "transformer/config.json", patch_size=4, max_text_seq_length=99)
    found = geometry(configs)
    assert (found.spatial_compression, found.temporal_compression, found.size_multiple) == (4, 8, 16)
    assert (found.scaling_factor, found.max_text_seq_length) == (2.0, 99)


@pytest.mark.parametrize("frames", [1, 4, 5, 8, 9, 12, 13])
def test_latent_shape_is_what_the_vae_makes(tiny: Tiny, frames: int) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny("5b") / "vae")
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, frames, 32, 48)).latent_dist.mode()
    channels, count, height, width = latents.shape[1:]
    assert geometry(tiny("5b")).latent_shape(Bucket(frames, 32, 48)) == (count, channels, height, width)
    assert geometry(tiny("1.5-5b")).latent_shape(Bucket(frames, 32, 48))[0] == count + count % 2


def test_padding_frames(tiny: Tiny) -> None:
    assert [geometry(tiny("5b")).padding_frames(n) for n in (1, 2, 13)] == [0, 0, 0]
    assert [geometry(tiny("1.5-5b")).padding_frames(n) for n in (1, 2, 13, 14, 21, 22)] == [1, 0, 1, 0, 1, 0]


def test_reading_needs_no_weights(configs: Path, tiny: Tiny) -> None:
    assert geometry(configs) == geometry(tiny("5b"))


# -- checks ------------------------------------------------------------------------------------------------------------


BASE_SIZE = ("--height_buckets", "64", "--width_buckets", "96")
NINE = ("--frame_buckets", "9", "--max_num_frames", "9")


def found_problems(folder: Path, *given: str, options_type: Any = LoraOptions) -> list[str]:
    argv = ["--pretrained_model_name_or_path", str(folder), "--data_root", "d", *given]
    options, sources = args.read_flags(options_type, argv, None)
    options = derive_video_size(derive(options, sources), sources)
    return list((check_preparation if options_type is PrepareOptions else check_model)(options))


def test_a_good_command_has_no_problem(tiny: Tiny) -> None:
    for kind in ("2b", "5b", "1.5-5b"):
        assert found_problems(tiny(kind), *BASE_SIZE) == []
        assert (
            found_problems(tiny(kind), *BASE_SIZE, "--max_sequence_length", "32", "--frame_buckets", "16", "49") == []
        )
    for kind in ("5b", "5b-i2v"):
        assert found_problems(tiny(kind), "--output_dir", "o", options_type=PrepareOptions) == []
    for kind in ("5b-i2v", "1.5-5b-i2v"):
        assert found_problems(tiny(kind), *BASE_SIZE, *NINE, options_type=ImageLoraOptions) == []


def test_all_sizes_are_checked_together(tiny: Tiny) -> None:
    found = found_problems(
        tiny("5b"),
        *("--frame_buckets", "50", "9", "--height_buckets", "490", "480", "--width_buckets", "720", "8"),
        *("--height", "100", "--width", "64", "--validation_frames", "7", "--max_sequence_length", "226"),
    )
    assert found == [
        "--frame_buckets 50: CogVideoX encodes 4k+1 frames; nearest: 49, 53",
        "--height_buckets 490: must be a multiple of 16; nearest: 480, 496",
        "--width_buckets 8: must be a multiple of 16; nearest: 16",
        "--height 100: must be a multiple of 16; nearest: 96, 112",
        "--validation_frames 7: CogVideoX encodes 4k+1 frames; nearest: 5, 9",
        "--max_sequence_length 226: the config of the transformer has 32, and another length changes every embedding; "
        "leave the flag out",
    ]


@pytest.mark.parametrize("kind", ["5b-i2v", "1.5-5b-i2v"])
def test_image_to_video_models_are_refused(tiny: Tiny, kind: str) -> None:
    for options_type, method in ((LoraOptions, "lora"), (SftOptions, "sft")):
        (found,) = found_problems(tiny(kind), *BASE_SIZE, options_type=options_type)
        assert "takes 32 channels, so it is an image-to-video model; text-to-video takes 16" in found
        assert found.endswith(f"use cogvideox_image_to_video_{method}.py")


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
def test_text_to_video_models_are_refused(tiny: Tiny, kind: str) -> None:
    for options_type, method in ((ImageLoraOptions, "lora"), (ImageSftOptions, "sft")):
        (found,) = found_problems(tiny(kind), *BASE_SIZE, options_type=options_type)
        assert "takes 16 channels, so it is a text-to-video model; image-to-video takes 32" in found
        assert found.endswith(f"use cogvideox_text_to_video_{method}.py")


@pytest.mark.parametrize("options_type", [LoraOptions, ImageLoraOptions])
def test_other_channels_are_refused(configs: Path, options_type: Any) -> None:
    edit(configs, "transformer/config.json", in_channels=48)
    (found,) = found_problems(configs, *BASE_SIZE, options_type=options_type)
    assert "takes 48 channels" in found
    assert found.endswith("no script of this suite trains such a model")


# -- learned positions -------------------------------------------------------------------------------------------------


IGNORE = "--ignore_learned_positional_embeddings"


def test_learned_positions_are_for_one_size(tiny: Tiny) -> None:
    found = found_problems(
        tiny("5b-i2v"),
        *("--frame_buckets", "9", "13", "12", "--height_buckets", "64", "48", "80", "--width_buckets", "96"),
        *("--height", "64", "--width", "48", "--validation_frames", "5"),
        options_type=ImageLoraOptions,
    )
    rule = f"this model's learned positions are for 9x64x96 only; nearest: {{}}, or {IGNORE}"
    assert found == [  # The VAE makes as many latent frames of 12 frames as of 9.
        f"--frame_buckets 13: {rule.format(9)}",
        f"--height_buckets 48 80: {rule.format(64)}",
        f"--width 48: {rule.format(96)}",
        f"--validation_frames 5: {rule.format(9)}",
    ]


def test_learned_positions_may_be_ignored_where_there_are_any(tiny: Tiny) -> None:
    other = ("--frame_buckets", "13", "--height_buckets", "48", "--width_buckets", "96", IGNORE)
    assert found_problems(tiny("5b-i2v"), *other, options_type=ImageLoraOptions) == []
    (found,) = found_problems(tiny("1.5-5b-i2v"), *BASE_SIZE, IGNORE, options_type=ImageLoraOptions)
    assert found == f"{IGNORE}: this model has no such embeddings; leave the flag out"


def test_buckets_of_prepared_tensors_are_not_those_of_the_flags(tiny: Tiny) -> None:
    found = found_problems(tiny("5b-i2v"), "--load_tensors", options_type=ImageLoraOptions)
    assert [line.split(":")[0] for line in found] == ["--height 480", "--width 720", "--validation_frames 49"]


def test_published_positions_are_for_49x480x720(tiny: Tiny) -> None:
    real = replace(geometry(tiny("5b-i2v")), sample_height=60, sample_width=90, sample_frames=49)
    assert real.own_bucket == Bucket(49, 480, 720)
    assert real.has_positions(Bucket(49, 480, 720))
    assert not any(map(real.has_positions, (Bucket(49, 720, 480), Bucket(25, 480, 720), Bucket(1, 480, 720))))


def test_another_transformer_is_refused(configs: Path) -> None:
    edit(configs, "transformer/config.json", _class_name="WanTransformer3DModel")
    with pytest.raises(UsageError, match="is a WanTransformer3DModel; give a CogVideoX pipeline"):
        geometry(configs)


@pytest.mark.parametrize("name", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_broken_folders(configs: Path, name: str) -> None:
    (configs / name).write_text("{")
    with pytest.raises(UsageError, match=f"{name}: is not valid JSON"):
        geometry(configs)
    (configs / name).unlink()
    with pytest.raises(UsageError, match=f"has no {name}; give the folder of a complete pipeline"):
        geometry(configs)


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-owner/no-such-model", "a b/c", "x/y/z"])
def test_a_model_that_does_not_exist(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--pretrained_model_name_or_path {name}: no such folder"):
        read_geometry(ModelFlags(name, cache_dir=str(tmp_path)))


def test_the_download_that_is_advised_is_of_the_same_revision_into_the_same_cache(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_geometry(ModelFlags("no-such-owner/no-such-model", revision="v2", cache_dir=str(tmp_path)))
    fix = f"hf download no-such-owner/no-such-model --revision v2 --cache-dir {tmp_path}"
    assert str(error.value).endswith(f"; run where there is a network: {fix}")


def test_a_derived_size_is_not_reported_again(tiny: Tiny) -> None:
    assert len(found_problems(tiny("5b"), "--height_buckets", "490")) == 1


def test_sizes_beyond_the_grid_of_1_5_are_refused(tiny: Tiny) -> None:
    assert found_problems(tiny("1.5-5b"), "--height_buckets", "64", "128", "--width_buckets", "96", "--height", "64")


def test_the_guide_s_name_of_another_model_is_refused(tiny: Tiny) -> None:
    assert found_problems(tiny("5b"), *BASE_SIZE, "--model_name", "cogvideox-t2v") == []
    (found,) = found_problems(tiny("5b"), *BASE_SIZE, "--model_name", "cogvideox1.5-t2v")
    assert found == "--model_name cogvideox1.5-t2v: by its config the model is 1.0; leave the flag out"
    (found,) = found_problems(tiny("1.5-5b"), *BASE_SIZE, "--model_name", "cogvideox-t2v")
    assert found.endswith("by its config the model is 1.5; leave the flag out")


def test_timesteps_beyond_the_scheduler_s_are_refused(tiny: Tiny) -> None:
    found = found_problems(tiny("5b"), "--min_timestep", "1000", "--max_timestep", "2000")
    assert found == [
        "--min_timestep 1000: the last timestep of the scheduler is 999; nearest: --min_timestep 999",
        "--max_timestep 2000: the last timestep of the scheduler is 999; nearest: --max_timestep 999",
    ]
    assert not found_problems(tiny("5b"), "--min_timestep", "999", "--max_timestep", "999")


# -- configs without an entry, or with another value -------------------------------------------------------------------


CLASSES = {
    CogVideoXTransformer3DModel: TRANSFORMER_DEFAULTS,
    AutoencoderKLCogVideoX: VAE_DEFAULTS,
    CogVideoXDDIMScheduler: SCHEDULER_DEFAULTS,
    CogVideoXDPMScheduler: SCHEDULER_DEFAULTS,
}


@pytest.mark.parametrize("of", CLASSES)
def test_missing_config_entries_have_the_defaults_of_the_class(of: Any) -> None:
    theirs = {name: item.default for name, item in inspect.signature(of.__init__).parameters.items()}
    assert CLASSES[of].items() <= theirs.items()
    assert CLASSES[of] != SCHEDULER_DEFAULTS or len(CLASSES[of]) == len(theirs) - 1  # all except self


@pytest.mark.fault("data: a scheduler_config.json without one of its entries")
@pytest.mark.parametrize(
    "name", ["snr_shift_scale", "beta_start", "beta_end", "num_train_timesteps", "rescale_betas_zero_snr"]
)
def test_a_schedule_without_an_entry_is_diffusers(configs: Path, name: str) -> None:
    path = configs / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))
    theirs = CogVideoXDPMScheduler.from_pretrained(path.parent).alphas_cumprod
    assert torch.equal(NoiseSchedule.from_config(geometry(configs).schedule).alphas_cumprod, theirs.float())


def test_a_transformer_without_an_entry_is_diffusers(configs: Path) -> None:
    path = configs / "transformer" / "config.json"
    values = json.loads(path.read_text())
    for name in TRANSFORMER_DEFAULTS:
        path.write_text(json.dumps({entry: value for entry, value in values.items() if entry != name}))
        complete = CogVideoXTransformer3DModel.load_config(path.parent)
        with torch.device("meta"):
            config = CogVideoXTransformer3DModel.from_config(complete).config if name != "attention_head_dim" else {}
        assert config.get(name, TRANSFORMER_DEFAULTS[name]) == TRANSFORMER_DEFAULTS[name]
        geometry(configs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta_schedule", "linear"),
        ("prediction_type", "epsilon"),
        ("trained_betas", [0.1]),
        pytest.param(
            "_class_name",
            "DiffusionPipeline",
            marks=pytest.mark.fault("security: a scheduler config that names an arbitrary class of diffusers"),
        ),
        pytest.param(
            "_class_name", "os.system", marks=pytest.mark.fault("security: a scheduler config that names a function")
        ),
        pytest.param("_class_name", None, marks=pytest.mark.fault("security: a scheduler config without a class")),
    ],
)
def test_other_schedules_are_refused(configs: Path, name: str, value: Any) -> None:
    edit(configs, "scheduler/scheduler_config.json", **{name: value})
    with pytest.raises(UsageError, match=f"scheduler_config.json: {name} is ") as error:
        geometry(configs)
    assert len(error.value.problems) == 1


@pytest.mark.fault("data: a scheduler_config.json without its prediction type")
def test_a_schedule_that_would_predict_noise_is_refused(configs: Path) -> None:
    path = configs / "scheduler" / "scheduler_config.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name != "prediction_type"}
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="prediction_type is epsilon; CogVideoX has v_prediction"):
        geometry(configs)


@pytest.mark.fault("data: a config.json that is JSON but not an object")
def test_a_config_that_is_a_list_is_one_line(configs: Path) -> None:
    (configs / "vae" / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="is not one JSON object"):
        geometry(configs)


@pytest.mark.fault("security: a model whose weights are pickles")
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_in_pickles_only_are_refused_and_not_opened(tiny: Tiny, tmp_path: Path, part: str) -> None:
    """The pickle would create a file when it is unpickled, and the test finds no such file."""
    model, canary = Path(shutil.copytree(tiny("5b"), tmp_path / "model")), tmp_path / "canary"
    for path in (model / part).glob("*.safetensors"):
        path.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (model / part / name).write_bytes(pickle.dumps(Runs(canary)))
    (found,) = found_problems(model, *BASE_SIZE)
    assert found.startswith(f"{model / part}: its weights are only in {name}; ")
    assert "save_pretrained(FOLDER) writes safetensors" in found
    with pytest.raises(UsageError, match=f"{part} has no such safetensors file"):
        load_weights(None, ModelFlags(str(model)), part, torch.float32)
    assert not canary.exists()


class Runs:
    """An object that touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_unpickling_would_touch_the_canary(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Runs(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()
