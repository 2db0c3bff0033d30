"""Tests examples/train_tiny_image_to_video.py: the channels that it adds, and all of its stages on a few clips."""

import json
from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
import train_tiny_cogvideox as tiny
import train_tiny_image_to_video as training
from running import ROOT, image_sft_script, in_process, metrics, prepare_script
from safetensors.torch import load_file

from cogvideox.config.options import ImageSftOptions, PrepareOptions

MODEL = ROOT / "examples" / "model"
STAGES = {
    "prepare_dataset.py": (prepare_script, PrepareOptions),
    training.SCRIPT: (image_sft_script, ImageSftOptions),
}


def patches(pipeline: Path) -> torch.Tensor:
    """Returns weights of a patch embedding, (width, channels, rows, columns)."""
    weights = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    return weights["patch_embed.proj.weight"].float()


def test_an_image_has_no_effect_before_training() -> None:
    from diffusers import CogVideoXTransformer3DModel

    narrow = CogVideoXTransformer3DModel.from_pretrained(MODEL / "transformer", torch_dtype=torch.float32).eval()
    wide = training.with_image_channels(narrow).eval()
    video, image = torch.randn(2, 1, 3, 16, 8, 12)
    text, timestep = torch.randn(1, 32, 64), torch.tensor([500])
    tables = [table.float() for table in torch.randn(2, 72, 32)]
    rest = {"encoder_hidden_states": text, "timestep": timestep, "image_rotary_emb": tables, "return_dict": False}
    with torch.no_grad():
        made = narrow(video, **rest)[0]
        assert wide(torch.cat([video, image], dim=2), **rest)[0].equal(made)
        assert not wide(torch.cat([image, video], dim=2), **rest)[0].allclose(made, atol=0.1)


@pytest.mark.long
def test_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(script: str, *flags: object) -> None:
        assert in_process(*STAGES[script], [str(part) for part in flags]) in (0, None)

    monkeypatch.setattr(tiny, "run", run)
    monkeypatch.setattr(tiny, "shown", lambda: shapes.split()[1][:1])
    flags: list[Any] = ["--work_dir", tmp_path, "--clips", 5, "--steps", 2, "--batch", 2, "--workers", 0]
    options = training.build_parser().parse_args([str(flag) for flag in flags])
    training.train(MODEL, options)
    figures = [line["held_out_loss"] for line in metrics(tmp_path / "sft") if "held_out_loss" in line]
    assert len(figures) == 2
    assert f"before {figures[0]:.5f}, after {figures[1]:.5f}" in capsys.readouterr().out
    assert (tmp_path / "shapes" / "train" / "prompts.txt").read_text().splitlines()[-1] in shapes.MOTIONS

    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "CogVideoXImageToVideoPipeline"
    before, after = patches(tmp_path / "base"), patches(tmp_path / "model")
    assert before[:, :16].equal(patches(MODEL))
    assert before[:, 16:].eq(0).all()
    assert after[:, 16:].abs().amax(dim=(0, 2, 3)).gt(1e-4).all()
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for path in (MODEL / part).glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "model" / part / path.name).read_bytes()
    assert training.make_base(tmp_path / "no model", tmp_path / "base") == tmp_path / "base"
