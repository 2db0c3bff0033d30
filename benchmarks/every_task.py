"""Runs every training script on every full-size CogVideoX that it applies to, for a few steps, with random weights.

    python benchmarks/every_task.py --work_dir /tmp/every_task --results benchmarks/results --methods lora sft

Each kind is trained with a LoRA and with all weights, with batch size 1, bf16, gradient checkpointing and the clip size
of the published guides. A run is ended after its steps, because the last checkpoint of a full fine-tune takes over 30
GB. The kinds named by --complete run to their end, with checkpoint, export and verification by stock diffusers. The
results are written to one JSON file, and rows with results are not run again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from random_models import KINDS, ROOT, clip_size, is_image_to_video, make_pipeline, make_tensors
from record import device_and_versions, write_result

METHODS: dict[str, list[str]] = {
    "lora": ["--rank", "128", "--lora_alpha", "128", "--optimizer", "adamw"],
    "sft": ["--optimizer", "adamw", "--use_8bit"],
}


def command_of(kind: str, method: str, work_dir: Path, steps: int) -> list[str]:
    """Returns the command line of the training script."""
    task = "image_to_video" if is_image_to_video(kind) else "text_to_video"
    frames, height, width = clip_size(kind)
    command = [sys.executable, str(ROOT / f"training/cogvideox_{task}_{method}.py")]
    command += ["--pretrained_model_name_or_path", str(work_dir / kind), "--load_tensors"]
    command += ["--data_root", str(work_dir / f"{kind}-tensors"), "--output_dir", str(work_dir / f"{kind}-{method}")]
    command += ["--train_resolution", f"{frames}x{height}x{width}", "--mixed_precision", "bf16"]
    command += ["--plan", "off", "--gradient_checkpointing", "--train_batch_size", "1", "--max_train_steps", str(steps)]
    return [*command, "--dataloader_num_workers", "1", "--learning_rate", "1e-4", *METHODS[method]]


def lines_of(output: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of metrics.jsonl that describe optimizer steps."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [line for line in lines if "loss" in line]


def delete_run(output: Path) -> None:
    """Deletes the output folder of an earlier run, whose steps would count for the next one."""
    if output.exists():
        shutil.rmtree(output)


def run(command: list[str], output: Path, steps: int, complete: bool) -> dict[str, Any]:
    """Runs a command to its end, or until it has taken its steps; returns the row."""
    delete_run(output)
    started = time.perf_counter()
    log = output.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and (complete or len(lines_of(output)) < steps):
            time.sleep(0.2)
    status = process.poll()
    process.kill()
    process.wait()
    lines = lines_of(output)
    row: dict[str, Any] = {"steps": len(lines), "losses": [line["loss"] for line in lines]}
    row |= {"whole_run_seconds": round(time.perf_counter() - started, 1), "command": " ".join(command)}
    if lines:
        row |= {"peak_gib": lines[-1].get("peak_gib"), "seconds": [line["seconds"] for line in lines]}
    recipe = output / "recipe.json"
    row["verification"] = json.loads(recipe.read_text())["verification"] if recipe.is_file() else None
    if len(lines) < steps or (complete and (status or row["verification"] is None)):
        row["failed"] = log.read_text()[-2000:]
    return row


def main() -> None:
    """Trains each kind of model with each method; writes the results after every run, and resumes from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"{kind}-{method}" for kind in KINDS for method in METHODS]
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--complete", nargs="*", default=[], choices=names, metavar="KIND-METHOD")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    path = args.results / "every_task.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    for kind in args.kinds:
        make_pipeline(kind, args.work_dir / kind)
        make_tensors(kind, args.work_dir / kind, args.work_dir / f"{kind}-tensors")
        for method in args.methods:
            name = f"{kind}-{method}"
            if name in table and "failed" not in table[name]:
                continue
            command = command_of(kind, method, args.work_dir, args.steps)
            row = run(command, args.work_dir / name, args.steps, name in args.complete)
            table[name] = row | device_and_versions()
            write_result(path, table)
            print(json.dumps({name: {key: value for key, value in row.items() if key != "command"}}), flush=True)
    if any("failed" in row for row in table.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
