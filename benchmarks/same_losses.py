"""Checks that the working tree trains exactly as another commit does: losses and exported weights are equal to the bit.

    python benchmarks/same_losses.py --base COMMIT
    python benchmarks/same_losses.py --base COMMIT --seed_here 7    (must find differences)

The commit is checked out into a temporary git worktree. Both trees then train the tiny random models of
examples/tiny_cogvideox.py on the CPU, with the same command lines: a LoRA for text-to-video, all weights for
text-to-video, and a LoRA for image-to-video. Each tree encodes the clips itself, so preparation is compared as well.
Each process has one thread, which keeps the order of sums fixed. The script prints a line for each run, and its exit
status is 1 if anything differs. It takes about two minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from random_models import ROOT
from safetensors.torch import load_file

NUM_CLIPS = 4


@dataclass(frozen=True)
class Run:
    """Describes a training run that both trees make.

    Attributes:
        name: Its name in the printed table and in the output folder.
        script: The training script in training/.
        kind: The model, as examples/tiny_cogvideox.py names it.
        flags: Flags that only this run has.
    """

    name: str
    script: str
    kind: str
    flags: tuple[str, ...]


LORA = ("--rank", "4", "--lora_alpha", "8", "--learning_rate", "1e-2")
RUNS = (
    Run("text-to-video LoRA", "cogvideox_text_to_video_lora.py", "5b", LORA),
    Run("text-to-video, all weights", "cogvideox_text_to_video_sft.py", "5b", ("--learning_rate", "1e-3")),
    Run("image-to-video LoRA", "cogvideox_image_to_video_lora.py", "5b-i2v", LORA),
)


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Checks a commit out into a new git worktree, which is removed after the block."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def make_inputs(folder: Path) -> None:
    """Writes the models and the clips that both trees read. The examples of the working tree generate them."""
    import shapes
    from tiny_cogvideox import make_tiny

    for kind in {run.kind for run in RUNS}:
        make_tiny(folder / kind, kind)
    shapes.write_data_set(folder / "clips", shapes.scenes()[:: len(shapes.scenes()) // NUM_CLIPS][:NUM_CLIPS])


def train(tree: Path, run: Run, inputs: Path, output: Path, steps: int, seed: int) -> None:
    """Runs a training script of a tree in a new process.

    Raises:
        RuntimeError: The script fails; the message is the end of its output.
    """
    command = [sys.executable, tree / "training" / run.script, *run.flags, "--seed", seed]
    command += ["--pretrained_model_name_or_path", inputs / run.kind, "--data_root", inputs / "clips"]
    command += ["--tensor_cache", output.parent / f"tensors-{run.kind}", "--output_dir", output]
    command += ["--train_resolution", "9x64x96", "--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    command += ["--max_train_steps", steps, "--optimizer", "adamw", "--caption_dropout", "0.3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{run.name} in {tree}: exit status {done.returncode}\n{done.stderr[-3000:]}")


def losses(output: Path) -> list[float]:
    """Returns the loss of every optimizer step. JSON keeps floats exactly."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def exported(output: Path) -> dict[str, torch.Tensor]:
    """Returns the exported tensors by name: a LoRA's file, or the files of a transformer."""
    files = sorted((*output.glob("*.safetensors"), *output.glob("transformer/*.safetensors")))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def equal_to_the_bit(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Returns whether two sets of tensors have the same names, types, shapes and bits. Equal bits of NaN are equal."""

    def described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
        """Returns type, shape and bytes of each tensor, which are equal only if all bits are."""
        return {
            name: (tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for name, tensor in tensors.items()
        }

    return described(first) == described(second)


def report(run: Run, base: Path, here: Path, steps: int) -> bool:
    """Prints how the outputs of a run compare; returns whether they are equal and complete."""
    old_losses, new_losses = losses(base), losses(here)
    old_tensors, new_tensors = exported(base), exported(here)
    same_losses = old_losses == new_losses and len(new_losses) == steps
    same_tensors = bool(new_tensors) and equal_to_the_bit(old_tensors, new_tensors)
    verdicts = [
        f"{len(new_losses)} steps, last loss {new_losses[-1]:.6f}",
        f"losses {'equal' if same_losses else 'DIFFER'}",
        f"{len(new_tensors)} exported tensors {'equal' if same_tensors else 'DIFFER'}",
    ]
    print(f"{run.name:27} {'; '.join(verdicts)}", flush=True)
    return same_losses and same_tensors


def compare_trees(base: Path, folder: Path, steps: int, seed: int, seed_here: int) -> bool:
    """Trains all runs in both trees, two processes at a time; returns whether all runs are equal."""
    same = []
    with ThreadPoolExecutor(2) as pool:
        for run in RUNS:
            base_output, output = (folder / name / run.name.replace(" ", "-") for name in ("base", "here"))
            jobs = [
                pool.submit(train, base, run, folder, base_output, steps, seed),
                pool.submit(train, ROOT, run, folder, output, steps, seed_here),
            ]
            for job in jobs:
                job.result()
            same.append(report(run, base_output, output, steps))
    return all(same)


def main() -> int:
    """Compares the working tree with a commit; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per run (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the runs (%(default)s)")
    parser.add_argument("--seed_here", type=int, help="another seed for the working tree, to see the comparison fail")
    args = parser.parse_args()
    seed_here = args.seed if args.seed_here is None else args.seed_here
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        with worktree(args.base, folder / "tree") as base:
            same = compare_trees(base, folder, args.steps, args.seed, seed_here)
    print(f"the working tree trains {'exactly as' if same else 'UNLIKE'} {args.base}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
