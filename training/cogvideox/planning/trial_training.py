"""Trains a LoRA for two steps with the training script of a model, in a process of its own, for doctor.py.

The script prepares a generated clip, chooses a plan, trains, writes the result and loads it again with diffusers, as it
does for a user. Everything is written to a temporary folder, which is deleted.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT

import numpy as np
import torch

from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import Geometry, read_geometry
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.errors import UsageError
from cogvideox.runtime.metrics import column, read_records
from cogvideox.runtime.run import PRECISIONS

SCRIPT_FOLDER = Path(__file__).parents[2]
EMBEDDED_MODEL = SCRIPT_FOLDER.parent / "examples" / "model"
PRECISION_OF = {dtype: precision for precision, dtype in PRECISIONS.items()}
SHOWN = ("plan: ", "reloaded in ", "run by diffusers ")  # starts of lines that the page repeats
STEPS = 2
SQUARE = 16  # pixels in a row of one color: noise of single pixels would make a large file
LAST_LINES = 8  # of the output of a script that failed


def try_training(model: ModelFlags, folder: Path, dtype: torch.dtype) -> Iterator[str]:
    """Trains a LoRA for two steps at the size for which a model is made.

    Args:
        model: The model; without a name, the tiny model of the examples.
        folder: The folder in which the temporary folder is made.
        dtype: The type in which the script computes.

    Yields:
        What is going to be trained, then the plan, the comparisons with diffusers, and time and memory of the steps.

    Raises:
        UsageError: The script failed. The message has the last lines that it printed.
    """
    name = model.pretrained_model_name_or_path or str(EMBEDDED_MODEL)
    geometry = read_geometry(model if model.pretrained_model_name_or_path else ModelFlags(name))
    shown = "the model" if model.pretrained_model_name_or_path else "the tiny model of the examples"
    yield f"{STEPS} steps of a LoRA with {shown} at {geometry.own_bucket}; for a full-size model, this takes minutes"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        clips, run = Path(temporary, "clips"), Path(temporary, "run")
        write_clip(clips, geometry.own_bucket, geometry.default_fps)
        given = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
        flags = [part for flag, value in given.items() if value for part in (f"--{flag}", value)]
        command = command_of(geometry, name, clips, run, PRECISION_OF[dtype])
        ended = subprocess.run([*command, *flags], stdout=PIPE, stderr=STDOUT, text=True, errors="replace", check=False)
        lines = [line for line in ended.stdout.splitlines() if line.strip()]
        if ended.returncode:
            last = "; ".join(lines[-LAST_LINES:])
            raise UsageError(f"the training script ended with status {ended.returncode}: {last}")
        yield from (line for line in lines if line.startswith(SHOWN))
        yield described_steps(run)


def write_clip(folder: Path, bucket: Bucket, fps: float) -> None:
    """Writes a clip of colored squares that change from frame to frame, with a caption."""
    folder.mkdir()
    shape = (bucket.frames, -(-bucket.height // SQUARE), -(-bucket.width // SQUARE), 3)
    squares = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    frames = squares.repeat(SQUARE, axis=1).repeat(SQUARE, axis=2)
    write_video(folder / "squares.mp4", frames[:, : bucket.height, : bucket.width], fps)
    (folder / "squares.txt").write_text("Squares change their colors.")


def command_of(geometry: Geometry, model: str, clips: Path, run: Path, precision: str) -> list[str]:
    """Returns the command of a short run of the LoRA script for the task of a model."""
    script = SCRIPT_FOLDER / f"cogvideox_{'image' if geometry.image_to_video else 'text'}_to_video_lora.py"
    flags = {
        "pretrained_model_name_or_path": model,
        "data_root": str(clips),
        "output_dir": str(run),
        "train_resolution": str(geometry.own_bucket),
        "mixed_precision": precision,
        "train_batch_size": "1",
        "max_train_steps": str(STEPS),
    }
    return [sys.executable, str(script), *(part for name, value in flags.items() for part in (f"--{name}", value))]


def described_steps(run: Path) -> str:
    """Returns the seconds and the loss of each step of a run, and the peak of GPU memory if there is one."""
    records = read_records(run / "metrics.jsonl")
    seconds, losses = (" and ".join(f"{value:.2f}" for value in column(records, n)[1]) for n in ("seconds", "loss"))
    _, peaks = column(records, "peak_gib")
    peak = f", {max(peaks):.1f} GiB of GPU memory at the peak" if len(peaks) else ""
    return f"the steps took {seconds} s, with losses of {losses}{peak}"
