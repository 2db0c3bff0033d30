"""parity.py: training feeds five kinds of models as their pipelines do, and the check finds each difference."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import run_alone
from running import lora_flags

from cogvideox.config import args
from cogvideox.config.buckets import Bucket
from cogvideox.config.geometry import read_geometry
from cogvideox.config.options import ImageLoraOptions, LoraOptions, derive, ignores_positions
from cogvideox.data import dataset
from cogvideox.evaluation import parity
from cogvideox.evaluation.parity import ParityError, check_parity
from cogvideox.model import models, rope, tasks
from cogvideox.model.tasks import ImageToVideo, TextToVideo

Tiny = Callable[[str], Path]
OWN = Bucket(9, 64, 96)
# Other shapes, with odd numbers of latent frames, which 1.5 pads, and even ones; with 4k frames, and with one frame.
OTHERS = (Bucket(1, 64, 96), Bucket(5, 32, 48), Bucket(13, 64, 32), Bucket(12, 48, 48), Bucket(17, 32, 96))
LARGER = (Bucket(9, 128, 192), Bucket(9, 96, 64))
IGNORE = "--ignore_learned_positional_embeddings"


def check(
    tiny: Tiny, kind: str, *buckets: Bucket, flags: tuple[object, ...] = (), printed: list[str] | None = None
) -> None:
    """Checks a run on these buckets.

    Args:
        tiny: Creates the model of a kind.
        kind: The kind of model.
        buckets: Buckets of the samples.
        flags: More flags of the run.
        printed: Receives the lines that the run prints.
    """
    images = kind.endswith("i2v")
    options_type = ImageLoraOptions if images else LoraOptions
    argv = lora_flags(tiny(kind), Path("data"), Path("out"), *flags)
    options, sources = args.read_flags(options_type, argv, None)
    options = derive(options, sources)
    geometry = read_geometry(options.model)
    samples = tuple(SimpleNamespace(bucket=bucket) for bucket in buckets)
    tensors: Any = SimpleNamespace(geometry=geometry, index=SimpleNamespace(samples=samples, validation=()))
    run = run_alone(Path("/tmp"))
    run.say = (printed if printed is not None else []).append  # type: ignore[method-assign]
    transformer = models.load_transformer(options.model, torch.bfloat16, ignores_positions(options))
    task = (ImageToVideo if images else TextToVideo)(options, geometry, run.device, torch.bfloat16)
    check_parity(run, options, tensors, task, transformer)
    assert "forward" not in vars(transformer)


@pytest.mark.parametrize("kind", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_training_feeds_every_kind_as_its_pipeline_does(tiny: Tiny, kind: str) -> None:
    printed: list[str] = []
    if kind == "5b-i2v":
        check(tiny, kind, OWN, printed=printed)
        check(tiny, kind, OWN, *OTHERS, *LARGER, flags=(IGNORE,), printed=printed)
    else:
        check(tiny, kind, OWN, *OTHERS, *(() if kind.startswith("1.5") else LARGER), printed=printed)
    assert printed[-1].startswith(f"checked on {6 if kind.startswith('1.5') else 8} buckets")


def test_the_user_may_choose_another_scale_of_image_latents(tiny: Tiny) -> None:
    for kind, choice, scale in (("1.5-5b-i2v", "mul", 1 / 0.7), ("5b-i2v", "none", 0.7)):
        printed: list[str] = []
        check(tiny, kind, OWN, flags=("--image_latent_scale", choice), printed=printed)
        assert f"by {scale:.4g} in the pipeline" in printed[-1]
    printed = []
    check(tiny, "5b-i2v", OWN, flags=("--image_latent_scale", "mul"), printed=printed)
    assert len(printed) == 1


def wrong(owner: Any, name: str, value: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Returns a fault that replaces a function. ``value`` receives the correct function, then the arguments."""
    right = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *a, **k: value(right, *a, **k))


def at_the_end(_: Any, latents_FCHW: torch.Tensor, frames: int) -> torch.Tensor:
    """Pads latents at the end instead of the front."""
    return torch.cat([latents_FCHW, latents_FCHW[-1:].expand(frames, -1, -1, -1)])


def called_with(**changes: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Returns a fault that changes arguments with which training calls the transformer, by name."""

    def predictor(right: Any, transformer: Any, *rest: Any, **more: Any) -> Any:
        def changed(**arguments: Any) -> Any:
            return transformer(**arguments | {name: change(arguments[name]) for name, change in changes.items()})

        return right(changed, *rest, **more)

    return wrong(tasks, "velocity_predictor", predictor)


def second_frame(right: Any, image_BCHW: torch.Tensor, frames: int) -> torch.Tensor:
    """Puts the image on the second frame instead of the first."""
    return right(image_BCHW, frames).roll(1, dims=1)


def unscaled(right: Any, moments: Any, prompt: Any, timestep: int, geometry: Any, *rest: Any) -> Any:
    """Draws a sample whose latents are not scaled."""
    return right(moments, prompt, timestep, replace(geometry, scaling_factor=1.0), *rest)


# A fault in training, by name: how it is made, the kind of model, the bucket, and the message of the check.
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, Bucket, str]] = {
    "latents unscaled": (
        wrong(parity, "draw_sample", unscaled),
        "5b",
        OWN,
        "9x64x96: latents of the clip that is decoded",
    ),
    "no padding": (wrong(dataset, "pad_front", lambda _, x, n: x), "1.5-5b", OWN, "9x64x96: latents: (1, 3, "),
    "padding at the end": (wrong(dataset, "pad_front", at_the_end), "1.5-5b", OWN, "clip that is decoded"),
    "image latents multiplied": (
        wrong(tasks, "image_scale", lambda right, g, choice="auto": right(replace(g, invert_scale_latents=False))),
        "1.5-5b-i2v",
        OWN,
        "9x64x96: image latents",
    ),
    "image on the first frame after the padding": (
        wrong(tasks, "on_first_frame", second_frame),
        "1.5-5b-i2v",
        OWN,
        "9x64x96: image latents",
    ),
    "image on every frame": (
        wrong(tasks, "on_first_frame", lambda right, x, n: right(x, n)[:, :1].expand(-1, n, -1, -1, -1)),
        "5b-i2v",
        OWN,
        "9x64x96: image latents",
    ),
    "pixels from 0 to 1": (
        wrong(parity.encode, "pixels_of", lambda right, *a: right(*a) / 2 + 0.5),
        "5b-i2v",
        OWN,
        "pixels of the image",
    ),
    "no ofs": (called_with(ofs=lambda _: None), "1.5-5b-i2v", OWN, "ofs: given on one side only"),
    "another ofs": (called_with(ofs=lambda ofs: ofs / 2), "1.5-5b-i2v", OWN, "ofs: 1 apart"),
    "another timestep": (called_with(timestep=lambda t: t - 1), "5b", OWN, "timestep: 1 apart"),
    "a shorter prompt": (called_with(encoder_hidden_states=lambda x: x[:, :-1]), "2b", OWN, "(1, 31, 32) in training"),
    "no rotary table": (called_with(image_rotary_emb=lambda _: None), "5b", OWN, "rotary_emb: given on one side only"),
    "the first rows of the base grid": (
        wrong(rope, "centered_region", lambda _, h, w, *base: ((0, 0), (h, w))),
        "5b",
        LARGER[1],
        "9x96x64: image_rotary",
    ),
    "time as in 1.0": (
        wrong(rope.RotaryTables, "_compute", lambda right, self, f, h, w: right(self, 2 * f, h, w)),
        "1.5-5b",
        OWN,
        "image_rotary_emb: (96, 32) in training, (48, 32) in the pipeline",
    ),
    "velocity of the other sign": (
        wrong(parity.NoiseSchedule, "velocity", lambda right, *a: -right(*a)),
        "5b",
        OWN,
        "timestep 0: velocity",
    ),
    "another signal to noise ratio": (
        wrong(parity.NoiseSchedule, "from_config", lambda right, config: right(config | {"snr_shift_scale": 1.0})),
        "2b",
        OWN,
        "timestep 0: x_t",
    ),
    "learned positions for another number of frames": (
        wrong(parity, "ignores_positions", lambda *_: False),
        "5b-i2v",
        OTHERS[1],
        "learned positions: ",
    ),
    "learned positions that are not ignored": (
        wrong(parity, "ignores_positions", lambda *_: True),
        "5b-i2v",
        OWN,
        "positions that are added",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.fault("numbers: transformer inputs in training that differ from inference")
def test_each_difference_is_found(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    change, kind, bucket, message = FAULTS[fault]
    check(tiny, kind, OWN if kind == "5b-i2v" else bucket)
    change(monkeypatch)
    with pytest.raises(ParityError, match=re.escape(message)):
        check(tiny, kind, bucket)
