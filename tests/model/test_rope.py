"""Compares rope.py with the tables of the matching diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import Geometry, read_geometry
from cogvideox.model.rope import RotaryTables, centered_region

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
# The base of the tiny models is 64x96: smaller, equal, portrait, square, wider and (1.0 only) larger.
SIZES_1_5 = [(64, 96), (32, 48), (64, 32), (48, 48), (16, 96), (64, 16)]
SIZES_1_0 = [*SIZES_1_5, (96, 64), (128, 192), (80, 272), (480, 720), (720, 480)]


def tables(geometry: Geometry) -> RotaryTables:
    return RotaryTables(geometry, CPU)


def pipeline(folder: Path) -> Any:
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    scheduler = vae = text_encoder = tokenizer = None
    return CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


@pytest.mark.parametrize(("kind", "sizes"), [("5b", SIZES_1_0), ("1.5-5b", SIZES_1_5)])
@pytest.mark.parametrize("frames", [1, 2, 4, 13])
def test_tables_are_the_pipeline_s(tiny: Tiny, kind: str, sizes: list[tuple[int, int]], frames: int) -> None:
    rotary, reference = tables(read_geometry(ModelFlags(str(tiny(kind))))), pipeline(tiny(kind))
    seen = set()
    for height, width in sizes:
        ours = rotary(frames, height // 8, width // 8)
        theirs = reference._prepare_rotary_positional_embeddings(height, width, frames, CPU)
        assert ours is not None
        for own, their in zip(ours, theirs, strict=True):
            assert own.dtype == torch.float32
            assert own.shape == their.shape
            assert (own - their).abs().max() == 0
        seen.add(ours[0].numpy().tobytes())
    assert len(seen) == len(sizes)


def test_published_sizes_of_5b(tiny: Tiny) -> None:
    """Uses the base size of 480x720 and the head dimension of the published model."""
    geometry = read_geometry(ModelFlags(str(tiny("5b"))))
    real = Geometry(**vars(geometry) | {"sample_height": 60, "sample_width": 90, "attention_head_dim": 64})
    reference = pipeline(tiny("5b"))
    reference.transformer.register_to_config(sample_height=60, sample_width=90, attention_head_dim=64)
    for height, width in [(480, 720), (720, 480), (512, 512), (256, 384), (768, 1360)]:
        ours = tables(real)(13, height // 8, width // 8)
        theirs = reference._prepare_rotary_positional_embeddings(height, width, 13, CPU)
        assert ours is not None
        assert all(torch.equal(own, their) for own, their in zip(ours, theirs, strict=True))


def test_region_is_the_pipeline_s() -> None:
    for height in range(1, 40):
        for width in range(1, 40):
            assert centered_region(height, width, 30, 45) == get_resize_crop_region_for_grid((height, width), 45, 30)


def test_a_shape_is_computed_once(tiny: Tiny) -> None:
    rotary = tables(read_geometry(ModelFlags(str(tiny("5b")))))
    first, other = rotary(3, 8, 12), rotary(3, 12, 8)
    again = rotary(3, 8, 12)
    assert again is first
    assert first is not None
    assert again[0] is first[0]
    assert again[1] is first[1]
    assert other is not first


def test_models_without_rotary_embeddings_get_none(tiny: Tiny) -> None:
    assert tables(read_geometry(ModelFlags(str(tiny("2b")))))(3, 8, 12) is None
