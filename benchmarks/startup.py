"""Measures how long a user waits for --help, and for the message about a missing file in a large data set.

    python benchmarks/startup.py [--runs 7] [--rows 500000]

Flags are parsed before torch is imported, so --help of every script should be fast. All files of a data set are checked
before any model is loaded: this is measured with many rows in each form, of which the last one's file is missing.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "training").glob("*.py"))
PREPARE = next(path for path in SCRIPTS if path.stem == "prepare_dataset")
FILES_PER_FOLDER = 1000


def seconds(command: list[object], status: int) -> float:
    """Returns the seconds of one run of a script, including the start of the interpreter."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode != status:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - started


def time_help(runs: int) -> None:
    """Prints how long --help takes in each script."""
    for script in SCRIPTS:
        times = [seconds([script, "--help"], 0) for _ in range(runs)]
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
        for name, write in FORMS.items():
            flags = write(root, pairs)
            command = [PREPARE, "--model_id", root, "--data_root", root, "--output_dir", root / "out", *flags]
            print(f"{rows} rows as {name:12} {seconds(command, 2):.2f} s until the missing file is named")


def main() -> None:
    """Measures --help and the reading of large data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=500_000)
    args = parser.parse_args()
    time_help(args.runs)
    time_rows(args.rows)


if __name__ == "__main__":
    main()
