"""Measures a tiny CogVideoX on clips and captions that it was not trained on.

    python examples/check_tiny_cogvideox.py --model examples/model --work_dir demo

The figures are how well its VAE reconstructs clips, and how well its videos follow captions: a video is right if, among
the clips of all 900 captions, that of its own caption has the smallest squared error. The script prints each figure
with its limit, and its exit status is 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import real_clips
import shapes
import torch
from torch import Tensor
from torch.nn.functional import interpolate

HELD_OUT_REAL = ("rabbit_yawns", "rabbit_rubs_brow", "city_two_towers", "city_bright_roof")
GUIDANCE, SAMPLING_STEPS = 2.0, 20
LIMITS = {"vae_generated_db": 27.0, "vae_real_db": 24.0, "nearest_caption_share": 0.9}
TEXTS = {
    "vae_generated_db": "PSNR of the VAE on held-out shapes, dB",
    "vae_real_db": "PSNR of the VAE on held-out real clips, dB",
    "nearest_caption_share": "share of held-out captions whose sampled video is nearest to their own clip",
}


def real_paths(folder: Path, held_out: bool) -> list[Path]:
    """Returns the paths of the real clips on which the VAE is trained, or of those on which it is measured."""
    return [
        folder / "videos" / f"{clip.name}.mp4" for clip in real_clips.CLIPS if (clip.name in HELD_OUT_REAL) == held_out
    ]


def read_film(path: Path) -> Tensor:
    """Returns all frames of a video, (F, C, H, W), uint8."""
    import av

    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


def windows(film: Tensor) -> Iterator[Tensor]:
    """Yields clips of nine frames at about 8 frames per second, one clip starting every third of a second.

    Each is cropped at its center to the aspect ratio of the model, and resized: (F, C, H, W), float, 0 to 255.
    """
    step = round(real_clips.FPS / shapes.FPS)
    height, width = film.shape[2:]
    rows = min(height, width * shapes.HEIGHT // shapes.WIDTH)
    columns = rows * shapes.WIDTH // shapes.HEIGHT
    top, left = (height - rows) // 2, (width - columns) // 2
    for start in range(0, len(film) - step * (shapes.FRAMES - 1), real_clips.FPS // 3):
        frames = film[start : start + step * (shapes.FRAMES - 1) + 1 : step]
        cut = frames[:, :, top : top + rows, left : left + columns].float()
        yield interpolate(cut, (shapes.HEIGHT, shapes.WIDTH), mode="bilinear", antialias=True)


def drawn_clips(scenes: Sequence[shapes.Scene]) -> Tensor:
    """Returns the clips of scenes, (N, F, C, H, W), uint8."""
    return torch.stack([torch.from_numpy(scene.frames()) for scene in scenes]).permute(0, 1, 4, 2, 3)


@functools.cache
def all_clips() -> Tensor:
    """Returns the clips of all scenes, (N, F, C, H, W), uint8."""
    return drawn_clips(shapes.scenes())


@torch.no_grad()
def decibels(vae: Any, clip_FCHW: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB of a clip (0 to 255) after encoding and decoding."""
    video = clip_FCHW.to(vae.device).float().transpose(0, 1)[None] / 127.5 - 1.0
    rebuilt = vae.decode(vae.encode(video.to(vae.dtype)).latent_dist.mode()).sample.float().clamp(-1, 1)
    return float(-10 * ((rebuilt - video).square().mean() / 4).log10())


def sample(pipeline: Any, captions: Sequence[str], batch: int) -> Tensor:
    """Samples a video for each caption; returns (N, F, C, H, W), float, 0 to 255."""
    videos = []
    for start in range(0, len(captions), batch):
        made = pipeline(
            list(captions[start : start + batch]),
            height=shapes.HEIGHT,
            width=shapes.WIDTH,
            num_frames=shapes.FRAMES,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            generator=torch.Generator().manual_seed(start),
            output_type="pt",
        ).frames
        videos.append(made.float().cpu() * 255)
    return torch.cat(videos)


def nearest(videos: Tensor, clips: Tensor) -> list[int]:
    """Returns, for each video, the index of the clip with the smallest squared error."""
    flat = clips.flatten(1).float()
    squares = flat.square().sum(1)
    return [int((squares - 2 * (flat @ video.flatten())).argmin()) for video in videos]


def measure(model: Path, real: Path, device: torch.device) -> dict[str, float]:
    """Returns the three figures of a pipeline folder. ``real`` is a folder that real_clips.py has written."""
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return measure_pipeline(pipeline, real)


def measure_pipeline(pipeline: Any, real: Path, captions: int | None = None, every: int = 1) -> dict[str, float]:
    """Returns the three figures of a pipeline.

    Args:
        pipeline: The pipeline.
        real: A folder that real_clips.py has written.
        captions: How many held-out captions are sampled; by default all.
        every: The VAE is measured on one of this many clips.
    """
    scenes, held_out = shapes.scenes(), shapes.split()[1]
    chosen = held_out[:: len(held_out) // captions][:captions] if captions else held_out
    found = nearest(sample(pipeline, [scene.caption for scene in chosen], 16), all_clips())
    right = sum(scenes[place] == scene for place, scene in zip(found, chosen, strict=True))
    return measure_vae(pipeline.vae, real, every) | {"nearest_caption_share": round(right / len(chosen), 4)}


def measure_vae(vae: Any, real: Path, every: int = 1) -> dict[str, float]:
    """Returns the two figures of a VAE, which are means over clips."""
    drawn = [decibels(vae, clip) for clip in drawn_clips(shapes.split()[1][::every])]
    cuts = [clip for path in real_paths(real, True) for clip in windows(read_film(path))]
    filmed = [decibels(vae, clip) for clip in cuts[:: -(-every // 8)]]
    means = {"vae_generated_db": sum(drawn) / len(drawn), "vae_real_db": sum(filmed) / len(filmed)}
    return {name: round(value, 2) for name, value in means.items()}


def report(figures: dict[str, float]) -> bool:
    """Prints the figures next to their limits, and returns whether all limits are met."""
    for name, value in figures.items():
        print(f"{TEXTS[name]}: {value:g} (at least {LIMITS[name]:g})")
    return all(value >= LIMITS[name] for name, value in figures.items())


def _parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Measure a tiny CogVideoX on held-out clips and captions.")
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="folder for downloads; the real clips are written to clips/ in it"
    )
    return parser.parse_args()


def main() -> None:
    """Measures a model; the exit status is 1 if it misses a limit."""
    options = _parse()
    real = real_clips.make_clips(options.work_dir / "clips")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raise SystemExit(0 if report(measure(options.model, real, device)) else 1)


if __name__ == "__main__":
    main()
