"""Runs a full-size training script, with validation and export, on a part of a GPU's memory.

    python benchmarks/small_card.py --kind 5b --gib 6 --work_dir /tmp/small_card --results benchmarks/results
    python benchmarks/small_card.py --kind 2b --gib 8 --rank 0 --work_dir /tmp/small_card --results benchmarks/results

Weights and tensors are random. --vram_budget limits the process to the memory of a card of that size, so that it fails
where it would fail there. The JSON file has the lines that the script printed about its plan, peaks, losses and export.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from every_task import lines_of
from random_models import KINDS, ROOT, clip_size, is_image_to_video, make_pipeline, make_tensors
from record import device_and_versions

from cogvideox.config.buckets import Bucket
from cogvideox.data.media.decode import probe

SAYS = (
    *("attention by", "checked on", "plan:", "measured:", "decoding in tiles", "validation after", "reloaded in"),
    "run by diffusers alone",
)


def command_of(kind: str, work_dir: Path, gib: float, rank: int, steps: int) -> list[str]:
    """Returns the command line of the training script. With rank 0, all weights are trained."""
    script = f"training/cogvideox_text_to_video_{'lora' if rank else 'sft'}.py"
    command = [sys.executable, str(ROOT / script), "--load_tensors", "--plan", "lean", "--vram_budget", str(gib)]
    command += ["--pretrained_model_name_or_path", str(work_dir / kind), "--data_root", str(work_dir / "tensors")]
    command += ["--output_dir", str(work_dir / "run"), "--train_resolution", "x".join(map(str, clip_size(kind)))]
    command += ["--rank", str(rank), "--lora_alpha", str(rank)] if rank else []
    command += ["--mixed_precision", "bf16", "--train_batch_size", "1", "--max_train_steps", str(steps)]
    command += ["--optimizer", "adamw", "--learning_rate", "1e-4", "--dataloader_num_workers", "2"]
    return [*command, "--validation_prompt", "A red square moves to the right.", "--num_inference_steps", "2"]


def size_of(video: Path) -> Bucket:
    """Returns the number of frames and the size of a video."""
    info = probe(video)
    return Bucket(info.num_frames, info.height, info.width)


def main() -> int:
    """Trains under a memory limit and writes the figures of the run.

    Returns:
        The exit status, which is not 0 if the run failed or its videos have the wrong size.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[kind for kind in KINDS if not is_image_to_video(kind)], default="5b")
    parser.add_argument("--gib", type=float, default=6.0)
    parser.add_argument("--rank", type=int, default=128, help="rank of the LoRA; 0: all weights are trained")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    make_pipeline(args.kind, args.work_dir / args.kind)
    make_tensors(args.kind, args.work_dir / args.kind, args.work_dir / "tensors")
    command = command_of(args.kind, args.work_dir, args.gib, args.rank, args.steps)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    output = args.work_dir / "run"
    messages = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines() if line.strip().startswith(SAYS)]
    row: dict[str, Any] = {"kind": args.kind, "gib": args.gib, "rank": args.rank, "status": done.returncode}
    row |= {"whole_run_seconds": round(time.perf_counter() - started, 1), "said": messages, **device_and_versions()}
    row["host_peak_gib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)  # of KiB
    row["steps"] = lines_of(output)
    videos = {path.name: size_of(path) for path in sorted(output.glob("validation/*.mp4"))}
    row["videos"] = {name: str(size) for name, size in videos.items()}
    recipe = output / "recipe.json"
    row["verification"] = json.loads(recipe.read_text())["verification"] if recipe.is_file() else None
    print(json.dumps(row, indent=1))
    if done.returncode or set(videos.values()) != {Bucket(*clip_size(args.kind))}:
        print(done.stderr[-3000:], file=sys.stderr)
        return done.returncode or 1
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"small_card_{args.kind}{'' if args.rank else '_sft'}.json"
    (args.results / name).write_text(json.dumps(row, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
