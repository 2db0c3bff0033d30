"""Runs a full-size training script, with validation and export, on a part of a GPU's memory.

    python benchmarks/small_card.py --kind 5b --gib 6 --work_dir /tmp/small_card --results benchmarks/results
    python benchmarks/small_card.py --kind 2b --gib 8 --rank 0 --work_dir /tmp/small_card --results benchmarks/results
    python benchmarks/small_card.py --kind 5b --gib 24 --rank 0 --host_gib 64 --steps 5 --kill_after 4 \
        --work_dir /tmp/small_card --results benchmarks/results --flags --use_8bit

Weights and tensors are random. --vram_budget limits the process to the memory of a card of that size, so that it fails
where it would fail there. --host_gib limits host memory with a control group of Linux, which needs the rights of root.
With --kill_after 4 and five steps, checkpoints are written after step 3, and after step 5 by the run that resumed. For
all weights of 5b, each takes more than a minute, and the disk must have room for two. A disk of 64 GB has room for one
and for the weights of the other:

    --first_flags="--checkpointing_steps 4 --max_train_steps 4" --resumed_flags=--checkpoint_weights_only

The JSON file has the lines that the script printed about its plan, peaks, losses and export. It is written only if all
of this has happened: the kill, the resumption from the newest checkpoint, every step, the videos and the verification.

With --host_gib, group_left_gib says how near the run came to its limit: the least host memory that it could still
allocate, read twice a second. Page cache counts as free, because the kernel gives it up when memory is needed.
group_peak_gib includes page cache, so it reaches any limit when large files are read or written.
"""

import argparse
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from every_task import delete_run, lines_of
from random_models import KINDS, ROOT, clip_size, is_image_to_video, make_pipeline, make_tensors
from record import device_and_versions, watched, write_result

from cogvideox.config.buckets import Bucket
from cogvideox.data.media.pixels.decode import probe
from cogvideox.host_memory import left_in
from cogvideox.runtime.checkpoint_files import checkpoints, step_of

SAYS = (
    *("attention by", "checked on", "plan:", "measured:", "decoding in tiles", "validation after", "reloaded in"),
    *("run by diffusers alone", "checkpoint", "resum"),
)
RESUMED = re.compile(r"^resuming from .* after step (\d+)", re.MULTILINE)
MOUNT, GROUP = Path("/sys/fs/cgroup"), "small_card"  # of control groups, and the name of ours
LIMITS = (("memory.max", "memory.peak"), ("memory.limit_in_bytes", "memory.max_usage_in_bytes"))  # of version 2, 1


def command_of(args: argparse.Namespace) -> list[str]:
    """Returns the command line of the training script. With rank 0, all weights are trained."""
    script, work_dir, rank = f"cogvideox_text_to_video_{'lora' if args.rank else 'sft'}.py", args.work_dir, args.rank
    command = [sys.executable, str(ROOT / "training" / script), "--load_tensors", "--vram_budget", str(args.gib)]
    command += ["--pretrained_model_name_or_path", str(work_dir / args.kind), "--data_root", str(work_dir / "tensors")]
    command += ["--output_dir", str(work_dir / "run"), "--train_resolution", "x".join(map(str, clip_size(args.kind)))]
    command += ["--rank", str(rank), "--lora_alpha", str(rank)] if rank else []
    command += ["--mixed_precision", "bf16", "--train_batch_size", "1", "--max_train_steps", str(args.steps)]
    command += ["--optimizer", "adamw", "--learning_rate", "1e-4", "--dataloader_num_workers", "2"]
    if args.kill_after:
        command += ["--checkpointing_steps", str(args.kill_after - 1), "--checkpoints_total_limit", "1"]
    command += ["--validation_prompt", "A red square moves to the right.", "--num_inference_steps", "2"]
    return command + args.flags


def write_existing(path: Path, text: str) -> None:
    """Writes to a file that the kernel provides; raises FileNotFoundError where it does not."""
    with path.open("r+") as file:
        file.write(text)


def control_group(gib: float) -> tuple[Path, Path]:
    """Creates a control group with a limit; returns its folder, and the file with the peak of its memory."""
    for root, (limit, peak) in zip((MOUNT, MOUNT / "memory"), LIMITS, strict=True):
        folder = root / GROUP
        with suppress(OSError):
            write_existing(root / "cgroup.subtree_control", "+memory")  # in version 2, groups have no limits before
        with suppress(OSError):
            folder.rmdir()  # otherwise the peak would be that of an earlier run
        try:
            folder.mkdir(exist_ok=True)
            write_existing(folder / limit, str(int(gib * 2**30)))
        except OSError:
            continue
        return folder, folder / peak
    raise SystemExit(f"--host_gib {gib}: no control group can be made in {MOUNT}; run as root, or leave it out")


def left_bytes(group: Path) -> int:
    """Returns the bytes that the processes of a control group may still allocate. Page cache counts as free."""
    left = left_in(group)
    assert left is not None, f"{group} has no limit"
    return left


def empty_places(work_dir: Path) -> tuple[Path, Path]:
    """Returns the output folder and the log of the run, and deletes those of an earlier run."""
    output, log = work_dir / "run", work_dir / "run.log"
    delete_run(output)
    log.unlink(missing_ok=True)
    return output, log


def start(command: list[str], group: Path | None, log: Path) -> subprocess.Popen[bytes]:
    """Starts the training script in a session of its own, and in the control group if there is one."""
    if group is not None:
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
    with log.open("ab") as file:
        return subprocess.Popen(command, stderr=file, stdout=file, start_new_session=True)


def kill_after(step: int, run: subprocess.Popen[bytes], output: Path) -> int | None:
    """Kills a run when it has made a step and has a complete checkpoint.

    Returns:
        The step of its newest checkpoint; None if the run ended before, by itself or because something else killed it.
    """
    while run.poll() is None:
        if len(lines_of(output)) >= step and checkpoints(output):
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            return step_of(checkpoints(output)[0])
        time.sleep(0.2)
    return None


def size_of(video: Path) -> Bucket:
    """Returns the number of frames and the size of a video."""
    info = probe(video)
    return Bucket(info.num_frames, info.height, info.width)


def resumed_from(said: str) -> int | None:
    """Returns the step from which a run resumed, by what it printed; None if it started at the beginning."""
    found = RESUMED.search(said)
    return int(found[1]) if found else None


def not_done(row: dict[str, Any], steps: int, size: Bucket) -> Iterator[str]:
    """Yields what the script should have done and has not.

    Args:
        row: The figures of the run.
        steps: The number of its optimizer steps.
        size: The number of frames and the size of its videos.
    """
    if row["status"]:
        yield f"the script ended with status {row['status']}"
    if row["resumed_from"] != row["checkpoint_at_kill"]:
        yield f"the run resumed from step {row['resumed_from']}, not from checkpoint-{row['checkpoint_at_kill']}"
    made = [line["step"] for line in row["steps"]]
    if made != list(range(1, steps + 1)):
        yield f"metrics.jsonl has the steps {made}, not 1 to {steps}"
    if row["killed_after"] and not any(line.startswith(f"checkpoint-{steps}: ") for line in row["said"]):
        yield f"checkpoint-{steps} was not written"
    for step in (0, steps):
        sizes = {found for name, found in row["videos"].items() if name.startswith(f"step-{step:06}_")}
        if sizes != {str(size)}:
            yield f"validation after step {step} has made {', '.join(sorted(sizes)) or 'no video'}, not {size}"
    if row["verification"] is None:
        yield "the result was not verified"


def fail(log: Path, *problems: str) -> int:
    """Prints the end of the log and the problems; returns the exit status."""
    print(log.read_text().replace("\r", "\n")[-3000:], *problems, sep="\n", file=sys.stderr)
    return 1


def run_script(args: argparse.Namespace, output: Path, log: Path, group: Path | None) -> tuple[int, int | None]:
    """Runs the training script to its end; if asked for, another run is killed before.

    Returns:
        The exit status, and the step of the newest checkpoint at the kill, or None without a kill.

    Raises:
        RuntimeError: The run that should have been killed had ended before.
    """
    command, checkpoint = command_of(args), None
    if args.kill_after:
        first = start(command + shlex.split(args.first_flags), group, log)
        checkpoint = kill_after(args.kill_after, first, output)
        if checkpoint is None:
            after = f"after step {args.kill_after} and a checkpoint"
            raise RuntimeError(f"the first run was not killed {after}: it had ended with status {first.returncode}")
    return start(command + shlex.split(args.resumed_flags), group, log).wait(), checkpoint


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[kind for kind in KINDS if not is_image_to_video(kind)], default="5b")
    parser.add_argument("--gib", type=float, default=6.0)
    parser.add_argument("--rank", type=int, default=128, help="rank of the LoRA; 0: all weights are trained")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--host_gib", type=float, help="limit of the host memory")
    parser.add_argument(
        "--kill_after",
        type=int,
        default=0,
        help="save a checkpoint before this step, kill the run after it, and resume",
    )
    parser.add_argument("--first_flags", default="", help="flags of the run that is killed, in one word, after --flags")
    parser.add_argument("--resumed_flags", default="", help="flags of the run that is not, in one word, after --flags")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=["--plan", "lean"], help="more flags of the script; last"
    )
    return parser


def main() -> int:
    """Trains under a memory limit and writes the figures of the run.

    Returns:
        The exit status, which is not 0 if a part of the run has failed or has not happened.
    """
    args = build_parser().parse_args()
    make_pipeline(args.kind, args.work_dir / args.kind)
    make_tensors(args.kind, args.work_dir / args.kind, args.work_dir / "tensors")
    group, peak = control_group(args.host_gib) if args.host_gib else (None, None)
    (output, log), started = empty_places(args.work_dir), time.perf_counter()
    try:
        with watched(min, partial(left_bytes, group)) if group else nullcontext() as left:
            status, checkpoint = run_script(args, output, log, group)
    except RuntimeError as error:
        return fail(log, str(error))
    said = log.read_text().replace("\r", "\n")
    messages = [line.strip() for line in said.splitlines() if line.strip().startswith(SAYS)]
    row: dict[str, Any] = {"kind": args.kind, "gib": args.gib, "rank": args.rank, "status": status}
    row |= {"flags": args.flags, "first_flags": args.first_flags, "resumed_flags": args.resumed_flags}
    row |= {"killed_after": args.kill_after, "checkpoint_at_kill": checkpoint, "resumed_from": resumed_from(said)}
    row |= {"host_gib": args.host_gib, "whole_run_seconds": round(time.perf_counter() - started, 1)}
    row |= {"said": messages, **device_and_versions()}
    row["host_peak_gib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)  # of KiB
    row["group_peak_gib"] = round(int(peak.read_text()) / 2**30, 2) if peak and peak.exists() else None
    row["group_left_gib"] = round(left[0] / 2**30, 2) if left else None
    row["steps"] = lines_of(output)
    row["videos"] = {path.name: str(size_of(path)) for path in sorted(output.glob("validation/*.mp4"))}
    recipe = output / "recipe.json"
    row["verification"] = json.loads(recipe.read_text())["verification"] if recipe.is_file() else None
    print(json.dumps(row, indent=1))
    problems = list(not_done(row, args.steps, Bucket(*clip_size(args.kind))))
    if problems:
        return fail(log, *problems)
    limited = f"_host_{args.host_gib:.0f}" if args.host_gib else ""
    name = f"small_card_{args.kind}{'' if args.rank else '_sft'}{limited}{'_killed' if args.kill_after else ''}.json"
    write_result(args.results / name, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
