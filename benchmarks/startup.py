"""Measures how long a user waits for --help, for the message about a missing file, and for the first training step.

    python benchmarks/startup.py [--parts help files training] [--runs 7] [--rows 500000]
    python benchmarks/startup.py --parts training --model 5b --results benchmarks/results --flags --plan lean

Flags are parsed before torch is imported, so --help of every script should be fast. All files of a data set are checked
before any model is loaded: this is measured with many rows in each form, of which the last one's file is missing.
Then a LoRA is trained twice with one cache folder, which is empty at first. The table has the seconds of each phase
until the first step has finished, as the training script prints them, and those from its last line to its end.
"""

import argparse
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from random_models import KINDS, ROOT, clip_size, is_image_to_video, make_pipeline, make_tensors
from record import device_and_versions, write_result

SCRIPTS = sorted((ROOT / "training").glob("*.py"))
PREPARE = next(path for path in SCRIPTS if path.stem == "prepare_dataset")
FILES_PER_FOLDER = 1000
TINY = "tiny"  # the model in examples/model
TINY_SIZE = (9, 64, 96)
STARTED = re.compile(r"first step finished after (?P<total>[\d.]+) s: (?P<phases>[^;]*)(?:; (?P<graphs>\d+ of \d+) )?")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "PYTHONPYCACHEPREFIX")


def seconds(command: list[object], status: int = 0, error: str = "") -> float:
    """Returns the seconds of one run of a script, including the start of the interpreter.

    Raises:
        RuntimeError: The script ended with another status, or did not print the error.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode != status or error not in done.stderr:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - started


def time_help(runs: int) -> None:
    """Prints how long --help takes in each script."""
    for script in SCRIPTS:
        times = [seconds([script, "--help"]) for _ in range(runs)]
        print(f"{script.name:36} median {statistics.median(times):.3f} s, worst {max(times):.3f} s of {runs}")


def make_files(root: Path, rows: int) -> list[tuple[str, str]]:
    """Writes empty files; returns (path, caption) of each row, of which the last one's file is missing."""
    pairs = [
        (f"{k // FILES_PER_FOLDER:04d}/{k:07d}.mp4", f"clip number {k}, with a caption of some words")
        for k in range(rows)
    ]
    for path, _ in pairs[:-1]:
        target = root / path
        if path.endswith("000.mp4"):
            target.parent.mkdir()
        target.touch()
    return pairs


def write_lists(root: Path, pairs: list[tuple[str, str]]) -> list[str]:
    """Writes videos.txt and prompts.txt; returns the flags that select them, of which there are none."""
    (root / "videos.txt").write_text("".join(f"{path}\n" for path, _ in pairs))
    (root / "prompts.txt").write_text("".join(f"{caption}\n" for _, caption in pairs))
    return []


def write_csv(root: Path, pairs: list[tuple[str, str]]) -> list[str]:
    """Writes a CSV file with a header; returns the flags that select it."""
    with open(root / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("video", "caption"), *pairs])
    return ["--dataset_file", "rows.csv"]


def write_jsonl(root: Path, pairs: list[tuple[str, str]]) -> list[str]:
    """Writes a file of JSON lines; returns the flags that select it."""
    (root / "rows.jsonl").write_text("".join(json.dumps({"video": p, "caption": c}) + "\n" for p, c in pairs))
    return ["--dataset_file", "rows.jsonl"]


FORMS: dict[str, Callable[[Path, list[tuple[str, str]]], list[str]]] = {
    "lists": write_lists,
    "CSV": write_csv,
    "JSON lines": write_jsonl,
}


def time_rows(rows: int) -> None:
    """Prints how long each form of a data set takes to be read until its missing file is reported."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pairs = make_files(root, rows)
        missing = f"{pairs[-1][0]}: no such file"
        for name, write in FORMS.items():
            flags = write(root, pairs)
            command = [PREPARE, "--model_id", root, "--data_root", root, "--output_dir", root / "out", *flags]
            print(f"{rows} rows as {name:12} {seconds(command, 2, missing):.2f} s until the missing file is named")


class Start(NamedTuple):
    """Holds the times of a training run, in seconds."""

    phases: dict[str, float]  # of each phase until the first step has finished
    first_step: float  # from the start of the process until then
    graphs: str  # how many compiled graphs came from the cache, "2 of 2"; empty if none was compiled
    exit: float  # from the last line that the script prints to its end

    def rows(self) -> dict[str, str]:
        """Returns all of this as text by title."""
        figures = self.phases | {"first step finished after": self.first_step, "exit": self.exit}
        return {name: f"{value:.1f}" for name, value in figures.items()} | {"graphs from the cache": self.graphs or "-"}


def measure_start(command: Sequence[str], environment: dict[str, str]) -> Start:
    """Runs a training script to its end, and returns the times that it printed and the time of its exit.

    Raises:
        RuntimeError: The script failed, or did not print its phases.
    """
    environment = environment | {"PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    said, last = [], 0.0
    for line in process.stdout:
        said.append(line.strip())
        if said[-1]:
            last = time.perf_counter()
    process.wait()
    ended = time.perf_counter()
    found = [match for match in map(STARTED.match, said) if match]
    if process.returncode or not found:
        raise RuntimeError("\n".join(said[-30:]))
    phases = dict(part.rsplit(" ", 1) for part in found[0]["phases"].split(", "))
    seconds = {name: float(value) for name, value in phases.items()}
    return Start(seconds, float(found[0]["total"]), found[0]["graphs"] or "", ended - last)


def training_command(model: str, folder: Path, flags: Sequence[str]) -> list[str]:
    """Makes a model and its data unless they exist, and returns the command that trains a LoRA for two steps."""
    tiny = model == TINY
    pipeline, tensors = (ROOT / "examples" / "model" if tiny else folder / model), folder / f"{model}-tensors"
    size = TINY_SIZE if tiny else clip_size(model)
    if not tiny:
        make_pipeline(model, pipeline)
    if not tensors.is_dir():
        make_tensors(model, pipeline, tensors, size=size)
    task = "image_to_video" if is_image_to_video(model) else "text_to_video"
    command = [sys.executable, str(ROOT / f"training/cogvideox_{task}_lora.py"), "--load_tensors"]
    command += ["--pretrained_model_name_or_path", str(pipeline), "--data_root", str(tensors)]
    command += ["--train_resolution", "x".join(map(str, size)), "--rank", "16", "--lora_alpha", "16"]
    command += ["--train_batch_size", "1", "--max_train_steps", "2", "--optimizer", "adamw"]
    # A CPU compiles only if it is asked to, and then with a plan.
    return [*command, *([] if tiny else ["--mixed_precision", "bf16"]), *(flags or ["--compile_blocks", "yes"])]


def time_training(model: str, folder: Path, flags: Sequence[str]) -> dict[str, Start]:
    """Trains without and with a cache of compiled kernels, prints both starts, and returns them by name."""
    command, starts = training_command(model, folder, flags), {}
    environment = {name: value for name, value in os.environ.items() if name not in CACHES}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for name in ("cold", "warm"):
        output = folder / f"{model}-run"
        shutil.rmtree(output, ignore_errors=True)
        starts[name] = measure_start([*command, "--output_dir", str(output)], environment)
        # A program that is ended before the table is complete has printed what it measured.
        print(f"{name}: {json.dumps(starts[name]._asdict())}", flush=True)
    cold, warm = (start.rows() for start in starts.values())
    print(f"{f'seconds of a start, {model}':36} {'cold':>8} {'warm':>8}")
    for title in cold:
        print(f"{title:36} {cold[title]:>8} {warm.get(title, '-'):>8}")
    return starts


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("help", "files", "training")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--runs", type=int, default=7, help="how often each --help is measured")
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the data sets")
    parser.add_argument("--model", choices=(TINY, *KINDS), default=TINY, help="full-size ones are random; need a GPU")
    parser.add_argument("--work_dir", type=Path, help="where a model, its data and runs are kept; by default nowhere")
    parser.add_argument("--results", type=Path, help="folder for a JSON file with the phases")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of the training script; last")
    return parser


def main() -> None:
    """Measures the parts that --parts names."""
    args = build_parser().parse_args()
    if "help" in args.parts:
        time_help(args.runs)
    if "files" in args.parts:
        time_rows(args.rows)
    if "training" in args.parts:
        with tempfile.TemporaryDirectory() as temporary:
            starts = time_training(args.model, args.work_dir or Path(temporary), args.flags)
        if args.results:
            row = {"model": args.model, **{name: start._asdict() for name, start in starts.items()}}
            write_result(args.results / f"startup_{args.model}.json", row | device_and_versions())


if __name__ == "__main__":
    main()
