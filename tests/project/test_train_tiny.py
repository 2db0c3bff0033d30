"""Tests examples/train_tiny_cogvideox.py: the footage for the VAE, its training loop, and the finished pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import check_tiny_cogvideox as check
import pytest
import shapes
import torch
import train_tiny_cogvideox as training
from safetensors.torch import load_file


def film(frames: int = 20, height: int = 130, width: int = 200) -> torch.Tensor:
    return torch.randint(256, (frames, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


def drawn() -> torch.Tensor:
    return check.drawn_clips(shapes.scenes()[::200])


def test_a_pyramid_ends_with_a_complete_frame() -> None:
    sizes = [tuple(scaled.shape[2:]) for scaled in training.pyramid(film())]
    assert sizes[0][0] == 64
    assert all(height >= 64 and width >= 96 for height, width in sizes)
    assert len(sizes) == 3
    assert len(list(training.pyramid(film(height=64, width=96)))) == 1


def test_footage_is_half_shapes_and_a_function_of_the_seed() -> None:
    one, again, other = (training.Footage(drawn(), [film()], seed).batch(6) for seed in (0, 0, 1))
    assert one.shape == (6, 3, 9, 64, 96)
    assert -1 <= one.min() < one.max() <= 1
    assert one.equal(again)
    assert not one.equal(other)
    known = [clip.float().transpose(0, 1) / 127.5 - 1 for clip in drawn()]
    assert [any(clip.equal(scene) for scene in known) for clip in one] == [True] * 3 + [False] * 3


def test_a_film_of_nine_frames_is_long_enough() -> None:
    assert training.Footage(drawn(), [film(frames=9)], 0).batch(4).shape == (4, 3, 9, 64, 96)


class SmallPictures(training.Footage):
    """Makes pictures with a quarter of the height and width, because convolutions are slow on a CPU."""

    def batch(self, size: int) -> torch.Tensor:
        return super().batch(size)[..., ::4, ::4].contiguous()


def test_the_vae_learns(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    vae = training.make_vae((8, 8, 8, 8))
    training.train_vae(vae, SmallPictures(drawn()[:1], [film()], 0), 12, 2, 1e-2)
    figures = [float(line.split(": ")[1].split(" dB")[0]) for line in capsys.readouterr().out.splitlines()]
    assert figures[-1] > figures[0] + 0.5


def test_the_scale_makes_latents_of_unit_size() -> None:
    torch.manual_seed(0)
    vae = training.make_vae((8, 8, 8, 8)).eval()
    clips = check.drawn_clips(shapes.scenes()[::100])
    with torch.no_grad():
        latents = vae.encode(clips[::8].float().transpose(1, 2) / 127.5 - 1.0).latent_dist.mean
    assert training.latent_scale(vae, clips) * latents.std().item() == pytest.approx(1.0, rel=1e-3)


def test_the_finished_pipeline_is_fp16_and_names_no_folder(tmp_path: Path) -> None:
    pipeline = training.build(0, 1.25, training.make_vae((8, 8, 8, 8)))
    training.save_pipeline(pipeline, tmp_path / "base")
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.fill_(0.5)
    pipeline.transformer.save_pretrained(tmp_path / "sft" / "transformer")
    training.assemble(tmp_path / "base", tmp_path / "sft", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert weights["proj_out.weight"].eq(0.5).all()
    assert json.loads((tmp_path / "model" / "vae" / "config.json").read_text())["scaling_factor"] == 1.25
    texts = [path.read_text() for path in (tmp_path / "model").rglob("*.json")]
    assert not [text for text in texts if str(tmp_path) in text]


def test_the_vocabulary_has_every_word() -> None:
    tokenizer = training.build(0, 1.0, training.make_vae((8, 8, 8, 8))).tokenizer
    texts = [scene.caption for scene in shapes.scenes()[::90]] + ["BUNNY A grey rabbit stands in a meadow."]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= training.TEXT_LENGTH
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_card_says_the_figures(tmp_path: Path) -> None:
    figures = {"vae_generated_db": 31.5, "vae_real_db": 24.5, "nearest_caption_share": 0.95}
    facts = {"command": "python x", "device": "a CPU", "torch": "2", "vae_steps": 3, "steps": 4, "batch": 5}
    training.write_card(tmp_path, figures, facts)
    text = (tmp_path / "README.md").read_text()
    for part in ("| 31.5 | 27 |", "| 24.5 | 24 |", "| 0.95 | 0.9 |", "`python x`", "772 clips", "(4 steps of 5 clips)"):
        assert part in text
