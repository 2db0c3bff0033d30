"""Measures whether plans, or a smaller state, change the losses of the model in examples/model less than seeds do.

    python benchmarks/seeds.py --tensors demo/tensors --work_dir /tmp/seeds --results benchmarks/results
    python benchmarks/seeds.py --compare moments --steps 600 --tensors demo/tensors --work_dir /tmp/seeds \
        --mixed_precision bf16 --jobs 4

A training script runs with each seed, with the flags of a reference and with those of each variant: a LoRA without a
plan (--plan off) and under each plan, or all weights with exact state and with each smaller one. For the held-out loss
and the mean training loss of the last quarter, the script compares the difference that a variant makes, the largest of
any seed and the mean over the seeds, with the standard deviation over the seeds. --tensors is the prepared folder of
`make demo`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_models import ROOT
from record import device_and_versions, write_result

LORA = ["--rank", "32", "--lora_alpha", "32", "--learning_rate", "2e-3"]
# The settings of examples/full_finetune.sh.
ALL_WEIGHTS = [
    "--learning_rate",
    "3e-4",
    "--lr_scheduler",
    "cosine",
    "--lr_warmup_steps",
    "10",
    "--compile_blocks",
    "no",
]
MOMENTS = {
    "exact": [],
    "8bit": ["--use_8bit"],
    "bf16": ["--use_bf16_moments"],
    "stochastic": ["--use_stochastic_rounding"],
    "stochastic-8bit": ["--use_stochastic_rounding", "--use_8bit"],
}


@dataclass(frozen=True)
class Comparison:
    """Describes runs that differ in few flags.

    Attributes:
        script: The training script.
        flags: The flags that all runs have.
        variants: The flags of each variant by its name; the first is the reference.
    """

    script: str
    flags: list[str]
    variants: dict[str, list[str]]


COMPARISONS = {
    "plans": Comparison(
        "cogvideox_text_to_video_lora.py", LORA, {plan: ["--plan", plan] for plan in ("off", "fast", "lean")}
    ),
    "moments": Comparison("cogvideox_text_to_video_sft.py", ALL_WEIGHTS, MOMENTS),
}
FIGURES = ("held_out", "last_quarter")


def losses(folder: Path) -> dict[str, float]:
    """Returns the last held-out loss of a finished run, and the mean loss of the last quarter of its steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    return {"held_out": held_out[-1], "last_quarter": statistics.mean(steps[-len(steps) // 4 :])}


def train(args: argparse.Namespace, variant: str, seed: int) -> dict[str, float]:
    """Trains one run, which is continued or kept if it exists, and returns its losses."""
    output, comparison = args.work_dir / f"{variant}-{seed}", COMPARISONS[args.compare]
    command = [sys.executable, str(ROOT / "training" / comparison.script), "--load_tensors", "--optimizer", "adamw"]
    command += ["--pretrained_model_name_or_path", str(ROOT / "examples/model"), "--data_root", str(args.tensors)]
    command += ["--output_dir", str(output), "--train_resolution", "9x64x96", "--train_batch_size", "3"]
    command += ["--max_train_steps", str(args.steps), "--seed", str(seed), "--mixed_precision", args.mixed_precision]
    subprocess.run([*command, *comparison.flags, *comparison.variants[variant]], check=True, stderr=subprocess.DEVNULL)
    return losses(output)


def compare(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Returns how much the figures differ between variants, and between seeds.

    Args:
        found: The figures of the runs, by variant, of which the first is the reference; one entry for each seed.
    """
    table: dict[str, Any] = {}
    reference, *variants = found
    for figure in FIGURES:
        of_reference = [run[figure] for run in found[reference]]
        table[figure] = {"mean": statistics.mean(of_reference), "deviation_over_seeds": statistics.stdev(of_reference)}
        for variant in variants:
            pairs = zip(found[variant], of_reference, strict=True)
            differences = [run[figure] - other for run, other in pairs]
            table[figure][f"largest_difference_{variant}"] = max(map(abs, differences))
            table[figure][f"mean_difference_{variant}"] = statistics.mean(differences)
    return table


def main() -> None:
    """Trains with each variant and seed, compares the variants, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", choices=COMPARISONS, default="plans", help="what differs between the runs")
    parser.add_argument("--tensors", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time")
    args = parser.parse_args()
    seeds, variants = range(args.seeds), COMPARISONS[args.compare].variants
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {(variant, seed): pool.submit(train, args, variant, seed) for seed in seeds for variant in variants}
        found = {variant: [runs[variant, seed].result() for seed in seeds] for variant in variants}
    row = {
        "steps": args.steps,
        "precision": args.mixed_precision,
        **device_and_versions(),
        **compare(found),
        "runs": found,
    }
    print(json.dumps({name: row[name] for name in FIGURES}, indent=1))
    if args.results:
        name = "seeds" if args.compare == "plans" else f"seeds_{args.compare}"
        write_result(args.results / f"{name}_{args.mixed_precision}.json", row)


if __name__ == "__main__":
    main()
