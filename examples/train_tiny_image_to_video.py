"""Trains a tiny image-to-video CogVideoX from examples/model, on the same shapes with their first frames.

Its transformer takes 16 channels of an image in addition to the 16 of the noisy video. The weights of the patch
embedding for them start at zero, so before the first step the model generates the same videos as the text-to-video
model, whatever the image. Then prepare_dataset.py and cogvideox_image_to_video_sft.py train it. The captions name only
the motion: if they named shape and color too, the model would not need the image and would not learn to use it. Stages
whose results exist are skipped.

    python examples/train_tiny_image_to_video.py --work_dir runs/tiny-i2v

It takes minutes on a GPU. On a CPU, try it with --clips 12 --steps 3 --batch 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
import train_tiny_cogvideox as tiny
from PIL import Image

SCRIPT = "cogvideox_image_to_video_sft.py"


def with_image_channels(transformer: Any) -> Any:
    """Returns a copy of a text-to-video transformer that also takes an image, which has no effect yet."""
    size = transformer.config.in_channels
    wide = type(transformer).from_config(transformer.config, in_channels=2 * size)
    weights = transformer.state_dict()
    patches = weights["patch_embed.proj.weight"]  # (width, channels, rows, columns); the pipeline puts the image last
    weights["patch_embed.proj.weight"] = torch.cat([patches, torch.zeros_like(patches)], dim=1)
    wide.load_state_dict(weights)
    return wide


def make_base(model: Path, folder: Path) -> Path:
    """Makes the image-to-video pipeline before training, in fp32."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    if folder.is_dir():
        return folder
    parts = CogVideoXPipeline.from_pretrained(model, dtype=torch.float32).components
    parts["transformer"] = with_image_channels(parts["transformer"])
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tiny.save_pipeline(CogVideoXImageToVideoPipeline(**parts), temporary)
    temporary.rename(folder)
    return folder


def write_shapes(work: Path, clips: int | None) -> None:
    """Writes the data sets train and held_out.

    If ``clips`` is given, they have this many clips in total, evenly chosen.
    """
    share = (clips or len(shapes.scenes())) / len(shapes.scenes())
    for name, scenes in zip(("train", "held_out"), shapes.split(), strict=True):
        places = np.linspace(0, len(scenes) - 1, max(1, round(len(scenes) * share))).round().astype(int)
        chosen = [scenes[place] for place in places]
        shapes.write_data_set(work / "shapes" / name, chosen, [scene.motion for scene in chosen])


def write_images(folder: Path) -> list[Path]:
    """Writes the first frames of the scenes for which validation videos are made."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(len(tiny.shown()))]
    for path, scene in zip(paths, tiny.shown(), strict=True):
        Image.fromarray(scene.frames()[0]).save(path)
    return paths


def train(model: Path, options: argparse.Namespace) -> None:
    """Makes the base model and the data, trains, and writes the finished pipeline to work_dir/model."""
    work = options.work_dir
    base = make_base(model, work / "base")
    write_shapes(work, options.clips)
    images = ":::".join(map(str, write_images(work / "images")))
    prompts = ":::".join(scene.motion for scene in tiny.shown())
    shown = ["--validation_prompt", prompts, "--validation_images", images]
    trained = tiny.train_transformer(work, base, options, SCRIPT, shown)
    tiny.assemble(base, trained, work / "model")
    lines = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    print(f"held-out loss before {losses[0]:.5f}, after {losses[-1]:.5f}")
    print(f"{work / 'model'}: the image-to-video pipeline")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Train a tiny image-to-video CogVideoX.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/tiny-i2v"), help="clips, tensors, run, model")
    parser.add_argument("--clips", type=int, help="how many of the 900 clips; for a quick trial")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="clips per step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that read clips")
    return parser


if __name__ == "__main__":
    train(tiny.ROOT / "examples" / "model", build_parser().parse_args())
