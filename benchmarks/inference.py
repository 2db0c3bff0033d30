"""Measures how long the exported inference.py takes with the memory of several cards.

    python benchmarks/inference.py --model 5b --work_dir /tmp/inference --results benchmarks/results
    python benchmarks/inference.py --model tiny --gib 8 --steps 2

A LoRA is trained for two steps on random weights and exported. Its inference.py then makes a video for each card, in a
process of its own, while this process allocates the rest of the GPU's memory. The table has the seconds of the
pipeline's call (prompt, sampling and decoding) and of the whole command with imports and loading, and the peak of the
memory that torch reserved. Without a GPU, all memory of the host is used, which only tests this script. That a video
does not fit into the memory of a card is a result. After any other error, no results are written.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_models import KINDS, is_image_to_video, make_pipeline
from record import device_and_versions, write_result
from startup import TINY, training_command

CALL = "pipeline"  # the word with which the child process begins its line of figures
NO_MEMORY = "out of memory"  # in the message of torch
TEXT_LAYERS = 24  # as many as the T5 of CogVideoX has


def export_lora(model: str, folder: Path) -> Path:
    """Trains a LoRA for two steps, unless that has been done, and returns its inference.py."""
    script = folder / f"{model}-lora" / "inference.py"
    if not script.is_file():
        if model != TINY:
            make_pipeline(model, folder / model, TEXT_LAYERS)
        command = training_command(model, folder, ["--compile_blocks", "no"])
        subprocess.run([*command, "--output_dir", str(script.parent)], check=True)
    return script


def run_script(script: str, arguments: list[str]) -> None:
    """Runs inference.py in this process, and prints the seconds of the pipeline's call and the peak of the memory."""
    import diffusers
    import torch

    def timed(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = call(*args, **kwargs)
            peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
            print(CALL, f"{time.perf_counter() - start:.2f}", f"{peak:.2f}", flush=True)
            return output

        return wrapper

    for pipeline in (diffusers.CogVideoXPipeline, diffusers.CogVideoXImageToVideoPipeline):
        pipeline.__call__ = timed(pipeline.__call__)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def allocate_all_but(gib: float) -> Any:
    """Returns a tensor that leaves this much of the GPU's memory to other processes, or None without a GPU.

    Raises:
        SystemExit: Less memory is free.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    rest = torch.cuda.mem_get_info()[0] - int(gib * 2**30)
    if rest < 0:
        raise SystemExit(f"--gib {gib:g}: the GPU has only {gib + rest / 2**30:.1f} GiB free; give less")
    return torch.empty(rest, dtype=torch.uint8, device="cuda")


def measure(script: Path, gib: float, arguments: list[str]) -> dict[str, Any]:
    """Returns the figures of one video, or the last line of the error if it could not be made."""
    taken = allocate_all_but(gib)
    command = [sys.executable, __file__, "--run", str(script), *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    whole = time.perf_counter() - start
    del taken
    release()
    if done.returncode:
        return {"gib": gib, "error": done.stderr.strip().splitlines()[-1]}
    line = next(line for line in done.stdout.splitlines() if line.startswith(f"{CALL} "))
    seconds, peak = map(float, line.split()[1:])
    return {"gib": gib, "seconds": seconds, "whole_seconds": round(whole, 2), "peak_gib": peak}


def write_rows(path: Path, model: str, steps: int, rows: list[dict[str, Any]]) -> None:
    """Writes the rows, and keeps those of other cards that the file already has for the same device and steps."""
    row = {"model": model, "steps": steps, **device_and_versions()}
    before = json.loads(path.read_text()) if path.is_file() else {}
    if all(before.get(name) == row[name] for name in ("device", "steps", "commit")):
        measured = {old["gib"] for old in rows}
        rows = rows + [old for old in before["rows"] if old["gib"] not in measured]
    write_result(path, row | {"rows": sorted(rows, key=lambda row: -row["gib"])})


def release() -> None:
    """Returns this process's unused memory to the GPU."""
    import torch

    torch.cuda.empty_cache()


def row_of(figures: dict[str, Any]) -> str:
    """Returns a line of the table."""
    if "error" in figures:
        return f"{figures['gib']:6g}  {figures['error']}"
    return "{gib:6g} {seconds:10.1f} {whole_seconds:14.1f} {peak_gib:9.2f}".format(**figures)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = [kind for kind in KINDS if not is_image_to_video(kind)]
    parser.add_argument("--model", choices=(TINY, *kinds), default="5b", help="full-size ones are random; need a GPU")
    parser.add_argument("--gib", type=float, nargs="+", default=[79, 23.5, 11.5, 7.5], help="free memory of each card")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--work_dir", type=Path, help="where the model and the LoRA are kept; by default nowhere")
    parser.add_argument("--results", type=Path, help="folder for a JSON file")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # in a child process
    return parser


def main() -> int:
    """Makes a video with the memory of each card, prints the table, and returns the exit status."""
    args = build_parser().parse_args()
    if args.run:
        run_script(args.run[0], args.run[1:])
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        script = export_lora(args.model, folder)
        arguments = ["--steps", str(args.steps)]
        if args.model == TINY:
            arguments += ["--frames", "9", "--height", "64", "--width", "96"]
        print(f"{'GiB':>6} {'seconds':>10} {'whole command':>14} {'peak GiB':>9}", flush=True)
        rows = []
        for gib in args.gib:
            rows.append(measure(script, gib, [*arguments, "--output", str(Path(temporary) / f"{gib:g}.mp4")]))
            print(row_of(rows[-1]), flush=True)
    if not all(NO_MEMORY in row.get("error", NO_MEMORY) for row in rows):
        return 1
    if args.results:
        write_rows(args.results / f"inference_{args.model}.json", args.model, args.steps, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
