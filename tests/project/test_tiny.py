"""Tests examples/tiny_cogvideox.py: diffusers' pipelines run its models, and the same seed gives the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cogvideox
import torch
from real_clips import CLIPS
from safetensors import safe_open
from tiny_cogvideox import CAPTIONS, KINDS, STYLES, TEXT_LENGTH, make_tiny

SCRIPT = tiny_cogvideox.__file__
Tiny = Callable[[str], Path]


def load(folder: Path, kind: str) -> Any:
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    pipeline = (CogVideoXImageToVideoPipeline if kind.endswith("i2v") else CogVideoXPipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture() -> Any:
    from PIL import Image

    return Image.fromarray(np.linspace(0, 255, 64 * 96 * 3).reshape(64, 96, 3).astype(np.uint8))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_runs(tiny: Tiny, kind: str) -> None:
    condition = {"image": picture()} if kind.endswith("i2v") else {}
    video = load(tiny(kind), kind)(
        prompt="A red square moves slowly to the right.",
        num_frames=9,
        height=64,
        width=96,
        num_inference_steps=2,
        max_sequence_length=TEXT_LENGTH,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **condition,
    ).frames[0]
    assert video.shape == (9, 64, 96, 3)
    assert np.isfinite(video).all()
    assert video.std() > 0.01


def test_vae_compresses_8_in_space_and_4_in_time(tiny: Tiny) -> None:
    vae = load(tiny("5b"), "5b").vae
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 9, 64, 96)).latent_dist.mode()
        assert latents.shape == (1, 16, 3, 8, 12)
        assert vae.decode(latents).sample.shape == (1, 3, 9, 64, 96)


def test_configs_are_those_of_the_published_layouts(tiny: Tiny) -> None:
    def read(kind: str, part: str) -> dict[str, Any]:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return json.loads((tiny(kind) / part / name).read_text())

    transformers = {kind: read(kind, "transformer") for kind in KINDS}
    assert [transformers[kind]["in_channels"] for kind in KINDS] == [16, 16, 32, 16, 32]
    assert [transformers[kind]["patch_size_t"] for kind in KINDS] == [None, None, None, 2, 2]
    assert [transformers[kind]["ofs_embed_dim"] for kind in KINDS] == [None, None, None, None, 64]
    assert [transformers[kind]["use_rotary_positional_embeddings"] for kind in KINDS] == [False, True, True, True, True]
    assert [read(kind, "vae")["scaling_factor"] for kind in KINDS] == [1.15258426, 0.7, 0.7, 0.7, 0.7]
    assert [read(kind, "vae")["invert_scale_latents"] for kind in KINDS] == [False, False, False, False, True]
    assert [read(kind, "scheduler")["snr_shift_scale"] for kind in KINDS] == [3.0, 1.0, 1.0, 1.0, 1.0]


def test_learned_positions_are_saved_and_not_the_sinusoidal_ones(tiny: Tiny) -> None:
    patch_embed = load(tiny("5b-i2v"), "5b-i2v").transformer.patch_embed
    sinusoidal = patch_embed._get_positional_embeddings(8, 12, 9)
    assert (patch_embed.pos_embedding - sinusoidal)[:, TEXT_LENGTH:].std() > 0.05


@pytest.mark.parametrize("kind", ["2b", "5b-i2v"])
def test_same_seed_same_bytes(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    before = torch.get_rng_state()
    again, other = make_tiny(tmp_path / "again", kind), make_tiny(tmp_path / "other", kind, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert files(again) == files(tiny(kind))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert files(other)[weights] != files(again)[weights]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


@pytest.mark.parametrize(("dtype", "name"), [(None, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_all_weights_have_the_dtype(tmp_path: Path, dtype: torch.dtype | None, name: str) -> None:
    folder = make_tiny(tmp_path / "tiny", "5b-i2v", dtype=dtype)
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {name}  # noqa: SIM118


def test_existing_folder_is_kept_or_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "tiny")
    changed = (folder / "model_index.json").stat().st_mtime_ns
    assert make_tiny(folder) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == changed
    with pytest.raises(FileExistsError, match="not empty"):
        make_tiny(folder, seed=1)


def test_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of 2b, 5b"):
        make_tiny(tmp_path / "tiny", "9b")


def test_tokenizer_round_trip(tiny: Tiny) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("5b") / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert {f"<extra_id_{index}>" for index in range(100)} <= set(tokenizer.get_vocab())
    for text in (*(f"{STYLES[0]} {caption}" for caption in CAPTIONS), "Unseen words: zebra, quixotic (2026)!"):
        ids = tokenizer(text).input_ids
        assert ids[-1] == 1
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_captions_of_the_demo_fit_in_the_text_length(tiny: Tiny) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("5b") / "tokenizer")
    lengths = {clip.name: len(tokenizer(f"{STYLES[0]} {clip.caption}").input_ids) for clip in CLIPS}
    assert max(lengths.values()) <= TEXT_LENGTH, lengths


def test_command_line_parses_before_it_imports_torch() -> None:
    code = f"import sys, runpy; sys.argv = ['x', '--help']; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    assert 'torch' not in sys.modules, 'torch'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--kind" in done.stdout
