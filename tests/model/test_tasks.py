"""Tests tasks.py: image latents are put on the first latent frame, scaled as in the pipeline or by the flag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import lora_flags

from cogvideox.config import args
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.config.options import ImageLoraOptions, derive
from cogvideox.data.dataset import Batch
from cogvideox.model.tasks import ImageToVideo, TextToVideo, image_scale, on_first_frame

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "choice", "factor"),
    [
        ("5b-i2v", "auto", 0.7),
        ("1.5-5b-i2v", "auto", 1 / 0.7),
        ("5b-i2v", "div", 1 / 0.7),
        ("1.5-5b-i2v", "mul", 0.7),
        ("1.5-5b-i2v", "none", 1.0),
    ],
)
def test_image_scale(tiny: Tiny, kind: str, choice: str, factor: float) -> None:
    assert image_scale(read_geometry(ModelFlags(str(tiny(kind)))), choice) == factor
    assert task(tiny, kind, "--image_latent_scale", choice).scale == factor


def test_the_image_is_on_the_first_latent_frame() -> None:
    image = torch.randn(2, 16, 4, 6)
    condition = on_first_frame(image, 3)
    assert condition.shape == (2, 3, 16, 4, 6)
    assert condition[:, 0].equal(image)
    assert not condition[:, 1:].any()


def image_options(tiny: Tiny, kind: str, *flags: object) -> ImageLoraOptions:
    argv = lora_flags(tiny(kind), Path("data"), Path("out"), *flags)
    options: ImageLoraOptions = derive(*args.read_flags(ImageLoraOptions, argv, None))
    return options


def task(tiny: Tiny, kind: str, *flags: object, dtype: torch.dtype = torch.float32) -> ImageToVideo:
    options = image_options(tiny, kind, *flags)
    return ImageToVideo(options, read_geometry(options.model), CPU, dtype)


def batch_of(frames: int) -> Batch:
    x0 = torch.randn(2, frames, 16, 8, 12)
    timesteps, prompts = torch.tensor([3, 900]), torch.randn(2, 32, 32)
    return Batch(x0, x0, timesteps, prompts, ("a", "b"), image_BCHW=torch.randn(2, 16, 8, 12))


@pytest.mark.parametrize(("kind", "frames", "scale"), [("5b-i2v", 3, 0.7), ("1.5-5b-i2v", 4, 1 / 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_gets_x_t_and_image_in_the_compute_type(
    tiny: Tiny, kind: str, frames: int, scale: float, dtype: torch.dtype
) -> None:
    calls: list[dict[str, Any]] = []
    batch = batch_of(frames)

    def transformer(**arguments: Any) -> tuple[torch.Tensor]:
        calls.append(arguments)
        return (arguments["hidden_states"],)

    task(tiny, kind, dtype=dtype).predictor(transformer, batch)(batch.x0_BFCHW, batch.timestep_B)
    (call,) = calls
    assert batch.image_BCHW is not None
    assert call["hidden_states"].dtype == call["encoder_hidden_states"].dtype == dtype
    assert call["hidden_states"][:, :, :16].equal(batch.x0_BFCHW.to(dtype))
    assert call["hidden_states"][:, 0, 16:].equal((batch.image_BCHW * scale).to(dtype))
    assert not call["hidden_states"][:, 1:, 16:].any()
    ofs = call["ofs"]
    assert (None if ofs is None else ofs.tolist()) == ([2.0] if kind == "1.5-5b-i2v" else None)


def test_what_decides_the_result_is_in_the_recipe(tiny: Tiny) -> None:
    geometry = read_geometry(ModelFlags(str(tiny("5b-i2v"))))
    recipes = [
        ImageToVideo.recipe(image_options(tiny, "5b-i2v", *flags), geometry)
        for flags in (
            (),
            ("--image_latent_scale", "none"),
            ("--noised_image_dropout", 0.5),
            ("--ignore_learned_positional_embeddings",),
            ("--image_latent_scale", "mul"),  # the resolved value of auto
            ("--validation_images", "a.png"),
        )
    ]
    assert recipes[0] == recipes[4] == recipes[5]
    assert all(recipes[i] != recipes[j] for i in range(4) for j in range(i))
    assert TextToVideo.recipe(None, None) == {}  # type: ignore[arg-type]
