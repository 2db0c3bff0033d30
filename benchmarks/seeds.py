"""Measures whether plans change the losses of the model in examples/model less than seeds do.

    python benchmarks/seeds.py --tensors demo/tensors --work_dir /tmp/seeds --results benchmarks/results

The training script runs with each seed, without a plan (--plan off) and under each plan. For the held-out loss and the
mean training loss of the last quarter, the script compares the largest difference that a plan makes for any seed with
the standard deviation over the seeds. --tensors is the prepared folder of `make demo`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from random_models import ROOT
from record import device_and_versions

REFERENCE = "off"
PLANS = (REFERENCE, "fast", "lean")
FIGURES = ("held_out", "last_quarter")


def losses(folder: Path) -> dict[str, float]:
    """Returns the last held-out loss of a finished run, and the mean loss of the last quarter of its steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    return {"held_out": held_out[-1], "last_quarter": statistics.mean(steps[-len(steps) // 4 :])}


def train(args: argparse.Namespace, plan: str, seed: int) -> dict[str, float]:
    """Trains one run, which is continued or kept if it exists, and returns its losses."""
    output = args.work_dir / f"{plan}-{seed}"
    command = [sys.executable, str(ROOT / "training/cogvideox_text_to_video_lora.py"), "--load_tensors"]
    command += ["--pretrained_model_name_or_path", str(ROOT / "examples/model"), "--data_root", str(args.tensors)]
    command += ["--output_dir", str(output), "--train_resolution", "9x64x96", "--rank", "32", "--lora_alpha", "32"]
    command += ["--train_batch_size", "3", "--max_train_steps", str(args.steps), "--learning_rate", "2e-3"]
    command += ["--optimizer", "adamw", "--seed", str(seed), "--mixed_precision", args.mixed_precision, "--plan", plan]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return losses(output)


def compare_plans(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Returns how much the figures differ between plans, and between seeds.

    Args:
        found: The figures of the runs, by plan; one entry for each seed.
    """
    table: dict[str, Any] = {}
    for figure in FIGURES:
        of_reference = [run[figure] for run in found[REFERENCE]]
        table[figure] = {"mean": statistics.mean(of_reference), "deviation_over_seeds": statistics.stdev(of_reference)}
        for plan in [plan for plan in found if plan != REFERENCE]:
            pairs = zip(found[plan], of_reference, strict=True)
            table[figure][f"largest_difference_{plan}"] = max(abs(run[figure] - other) for run, other in pairs)
    return table


def main() -> None:
    """Trains with each plan and seed, compares the plans, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {plan: [pool.submit(train, args, plan, seed) for seed in range(args.seeds)] for plan in PLANS}
        found = {plan: [run.result() for run in of_plan] for plan, of_plan in runs.items()}
    row = {
        "steps": args.steps,
        "precision": args.mixed_precision,
        **device_and_versions(),
        **compare_plans(found),
        "runs": found,
    }
    print(json.dumps({name: row[name] for name in FIGURES}, indent=1))
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / f"seeds_{args.mixed_precision}.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
