"""Makes one line of the library wrong at a time, and checks that the tests named here fail.

Each change is called a mutant, and it is killed if one of its tests fails. The changes are made in a copy of the tree,
never in the working tree. First, all tests must pass without a mutant. The script fails if a mutant survives, or if its
old text does not occur exactly once.

    python tests/tools/mutants.py [--jobs 2] [WORD]    all of them, or those with WORD in their file or their change
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "training/cogvideox"
LEFT_OUT = (".git", ".venv", "__pycache__", "runs", "demo", ".cache", ".mypy_cache", ".ruff_cache")


class Mutant(NamedTuple):
    """A change of one line of a file of the library, and the tests of which at least one must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest; test files without their folder

    @property
    def path(self) -> str:
        return f"{LIBRARY}/{self.file}"

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old.strip()} -> {self.new.strip() or '(nothing)'}"


PLANS = "test_stack.py::test_every_plan_is_the_transformer_of_diffusers[1.5-5b-i2v-make_with_lora]"
STREAMS = "test_stack.py::test_every_stream_waits_for_what_it_touches"
MUTANTS = (
    # the block
    Mutant("model/blocks.py", "(sin * sign)", "(sin * -sign)", (PLANS,)),
    Mutant("model/blocks.py", "torch.where(is_text, t, v)", "torch.where(is_text, v, t)", (PLANS,)),
    Mutant("model/blocks.py", "    dh = dy + dh\n", "", (PLANS,)),
    Mutant("model/blocks.py", "linears_backward([gate2 * dy], g", "linears_backward([dy], g", (PLANS,)),
    # the loss and the adapters
    Mutant(
        "model/diffusion.py", "noise_BFCHW - noise * x0_BFCHW", "noise_BFCHW + noise * x0_BFCHW", ("test_diffusion.py",)
    ),
    Mutant("model/diffusion.py", "(1.0 - shift) * abar", "(1.0 + shift) * abar", ("test_diffusion.py",)),
    Mutant(
        "model/diffusion.py", "torch.minimum(abar, gamma * noise)", "torch.minimum(abar, gamma)", ("test_diffusion.py",)
    ),
    Mutant("data/dataset.py", "(0.5 * log_variance", "(1.0 * log_variance", ("test_dataset.py", "-k", "posterior")),
    Mutant("model/rope.py", "round((base_height - height) / 2.0)", "0", ("test_rope.py",)),
    Mutant("model/lora.py", "/ (1.0 - self.p)", "* (1.0 - self.p)", ("test_methods.py", "-k", "dropout_is_a_function")),
    Mutant("model/lora.py", "dim=1, sign=-1.0", "dim=1, sign=1.0", ("test_methods.py", "-k", "pissa_starts")),
    Mutant("model/sequence.py", " * ctx.division.size, None", ", None", ("test_sequence.py", "-k", "one_process")),
    # the optimizer step
    Mutant(
        "optimizer/master_weights.py",
        "total.div_(self.numbers.world)",
        "pass",
        ("test_step.py", "-k", "ranks_with_the"),
    ),
    Mutant(
        "optimizer/step.py",
        "self.largest.amax(dim=1)",
        "self.largest[:, 0]",
        ("test_sharded_weights.py", "-k", "all_ranks"),
    ),
    Mutant("optimizer/step.py", ".clamp(min=1.0)", ".clamp(max=1.0)", ("test_step.py", "-k", "fp32_equals_torch")),
    Mutant("optimizer/step.py", "skipped > 0, 0.5,", "skipped > 0, 1.0,", ("test_step.py", "-k", "scale_halves")),
    Mutant(
        "optimizer/adam.py",
        "keeps = skipped > 0",
        "keeps = skipped > 1",
        ("test_step.py", "-k", "not_finite_changes"),
    ),
    Mutant(
        "optimizer/ema.py", "(1.0 - skipped).to", "torch.ones_like(skipped).to", ("test_ema.py", "-k", "skipped_step")
    ),
    Mutant("runtime/skipped.py", "elif scale <= 1:", "else:", ("test_skipped.py", "-k", "lowers_the_loss_scale")),
    Mutant("finite.py", "(torch.aminmax(tensor))", "(torch.aminmax(tensor)[:1])", ("test_skipped.py", "-k", "which")),
    # streams
    Mutant("memory/streaming.py", "with self.back.after_compute():", "with self.back.after():", (STREAMS,)),
    Mutant(
        "memory/streaming.py",
        "self.free, self.number, self.kept_alive = [compute_event(self.device)]",
        "self.free, self.number, self.kept_alive = [None]",
        (STREAMS,),
    ),
    Mutant("memory/streaming.py", "with self.out.after(worked):", "with self.out.after():", (STREAMS,)),
    Mutant("memory/streaming.py", "slot_of.popitem(last=False)", "slot_of.popitem(last=True)", ("test_streaming.py",)),
    # the order of samples
    Mutant("data/sampler.py", "(micro * self.world + self.rank)", "(self.rank + micro)", ("test_sampler.py",)),
    Mutant("data/sampler.py", "p // size)[p % size]", "0)[p % size]", ("test_sampler.py",)),
    # what several processes prepare
    Mutant("data/cache.py", "stamp_of(path) != before", "False", ("test_added_clips.py", "-k", "whichever_process")),
    # checkpoints
    Mutant(
        "runtime/checkpoint_files.py",
        'or file_hash(path) != entry["sha256"]',
        "",
        ("test_checkpoint.py", "-k", "damage_is_found"),
    ),
    Mutant(
        "runtime/checkpoint.py",
        "(rest[limit:] if limit",
        "(rest[:limit] if limit",
        ("test_checkpoint.py", "-k", "which"),
    ),
    Mutant(
        "model/lora.py",
        "tensor * scale if is_lora_b",
        "tensor if is_lora_b",
        ("test_scale.py", "-k", "without_its_metadata"),
    ),
    # evaluation and checks
    Mutant(
        "evaluation/held_out.py",
        "part * len(sample.image_keys)",
        "part",
        ("test_held_out.py", "-k", "several_variants"),
    ),
    Mutant(
        "evaluation/held_out.py",
        "range(run.ranks.process_index,",
        "range(0,",
        ("test_held_out.py", "-k", "shares_add_up"),
    ),
    Mutant(
        "evaluation/validation.py",
        "part.training = training",
        "part.training = True",
        ("test_dropout.py", "-k", "puts_back"),
    ),
    Mutant(
        "planning/block_check.py", "sorted({0, len(blocks) - 1})", "[0]", ("test_block_check.py", "-k", "last_block")
    ),
    Mutant("evaluation/validation.py", "seed + number)", "seed)", ("test_validation.py", "-k", "seed_of_a_video")),
    Mutant("evaluation/parity.py", ".item() <= tolerance:", ".item() <= 1e4:", ("test_parity.py", "-k", "difference")),
    Mutant(
        "export/publish.py", "MAX_EFFECT_ERROR * effect", "effect", ("test_publish.py", "-k", "scale_is_not_faithful")
    ),
)


def occurrences(mutant: Mutant, root: Path = ROOT) -> int:
    """Returns how often the old text occurs in its file. It must be once."""
    return (root / mutant.path).read_text().count(mutant.old)


def copy_of_the_tree(folder: Path) -> Path:
    """Copies everything that tests need to a folder."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True))


def path_of_test(test: str, root: Path = ROOT) -> str:
    """Returns the path below `root` of a test that is named without its folder: tests/FOLDER/test_x.py::test_y."""
    name, *rest = test.split("::")
    (path,) = (root / "tests").rglob(name)
    return "::".join([str(path.relative_to(root)), *rest])


def run_tests(root: Path, tests: Sequence[str]) -> int:
    """Returns pytest's exit status: 0 if all tests passed, 1 if one failed."""
    paths = [path_of_test(part, root) if part.startswith("test_") and ".py" in part else part for part in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", *paths]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = clean | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True).returncode


def outcome(mutant: Mutant, root: Path) -> str:
    """Returns the outcome of the tests under a mutant. The copy of the tree is restored afterwards."""
    if occurrences(mutant, root) != 1:
        return f"{occurrences(mutant, root)} places"
    original = (root / mutant.path).read_text()
    (root / mutant.path).write_text(original.replace(mutant.old, mutant.new))
    try:
        status = run_tests(root, mutant.tests)
    finally:
        (root / mutant.path).write_text(original)
    return {0: "SURVIVED", 1: "killed"}.get(status, f"pytest ended with {status}")


def run_all(mutants: Sequence[Mutant], jobs: int) -> int:
    """Prints a line for each mutant. Returns how many survived, plus how many groups of tests fail without a mutant."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copies.put(copy_of_the_tree(Path(folder) / str(number)))

        def timed(mutant: Mutant) -> bool:
            copy, began = copies.get(), time.monotonic()
            said = outcome(mutant, copy)
            copies.put(copy)
            seconds = time.monotonic() - began
            print(f"{said:10} {seconds:5.0f} s  {mutant.name}\n{'':20}by {' '.join(mutant.tests)}", flush=True)
            return said == "killed"

        def passes(tests: tuple[str, ...]) -> bool:
            copy = copies.get()
            status = run_tests(copy, tests)
            copies.put(copy)
            if status:
                print(f"without a mutant, pytest {' '.join(tests)} ends with {status}", flush=True)
            return status == 0

        with ThreadPoolExecutor(jobs) as pool:
            sound = list(pool.map(passes, dict.fromkeys(mutant.tests for mutant in mutants)))
            killed = list(pool.map(timed, mutants))
    print(f"{sum(killed)} of {len(killed)} mutants were killed")
    return killed.count(False) + sound.count(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only mutants with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    given = parser.parse_args()
    return min(1, run_all([mutant for mutant in MUTANTS if given.word in mutant.name], given.jobs))


if __name__ == "__main__":
    sys.exit(main())
