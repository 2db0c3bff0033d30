"""Measures training on one or several GPUs of one machine, by running the training scripts as a user does.

    python benchmarks/scale.py --work_dir /tmp/scale --results benchmarks/results [--arms NAME ...] [--seconds 580]
    python benchmarks/scale.py --table docs/benchmarks.md

Each arm launches a script with a configuration of accelerate_configs/ and random full-size weights, takes some steps,
and ends all of its processes without a checkpoint. Arms are sorted by importance. Those that already have a result,
that need more GPUs than there are, or that do not fit in the time left are skipped, so the program can be started again
until all are done. The share of communication of --sequence_parallel is that of a step which the exchanges take alone,
by the rate that the script measures before it chooses a plan. Arms named "stock" train with a plain loop of diffusers
and accelerate instead. Where FlashAttention 4 is not installed, the names of results end in "cudnn".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from every_task import delete_run, lines_of
from random_models import ROOT, clip_size, is_image_to_video, make_pipeline, make_tensors
from record import device_and_versions, put_into, watched, write_result

PREFIX = "scale_"
SAMPLES = 8  # at least the number of processes, so that each has a sample of its own in every step
WARM_UP = 3  # steps before the measured ones
SAID = ("attention by", "plan:", "first step finished", "streamed weights:", "measured:")
MOST_SECONDS = 280.0  # of one arm
HEAD = (
    "model",
    "trained",
    "GPUs",
    "device",
    "launched with",
    "attention",
    "a step",
    "samples/s",
    "GiB a GPU",
    "host GiB",
    "guide",
)


@dataclass(frozen=True)
class Arm:
    """Describes a measurement: what is trained, on how many GPUs, and how."""

    kind: str
    method: str  # lora (rank 128) or sft
    gpus: int
    config: str  # a file of accelerate_configs/, without .yaml; with "stock " before it, a plain loop is launched
    flags: tuple[str, ...] = ()
    steps: int = 8
    precision: str = "bf16"
    guide: str = ""  # what the published guides say about this row

    @property
    def groups(self) -> int:
        """Returns how many samples are trained at the same time."""
        parallel = dict(zip(self.flags, self.flags[1:], strict=False)).get("--sequence_parallel", "1")
        return self.gpus // int(parallel)

    @property
    def name(self) -> str:
        """Returns the name of the arm, which is part of a file name."""
        values = [flag.removeprefix("--") for flag in self.flags if not flag.startswith("--gradient_checkpointing")]
        parts = [self.kind, self.method, str(self.gpus), self.config.replace(" ", "-"), *values]
        return "_".join(parts + ([self.precision] if self.precision != "bf16" else []))


CHECKPOINTING = ("--gradient_checkpointing",)
ARMS = (
    Arm("5b", "sft", 4, "fsdp2"),
    Arm("5b", "sft", 4, "zero2", guide="8 GPUs: 42 GB"),
    Arm("5b", "sft", 4, "stock zero2", steps=6, guide="8 GPUs: 42 GB"),
    Arm("5b", "lora", 4, "uncompiled_2", ("--plan", "lean")),
    Arm("5b", "lora", 1, "uncompiled_1", ("--plan", "lean")),
    Arm("5b", "lora", 4, "uncompiled_2", ("--plan", "fast")),
    Arm("5b", "lora", 1, "uncompiled_1", ("--plan", "fast")),
    Arm("5b", "sft", 4, "fsdp2", ("--vram_budget", "40")),
    Arm("2b", "sft", 4, "uncompiled_2"),
    Arm("2b", "sft", 4, "fsdp2"),
    Arm("2b", "sft", 4, "zero3_offload", CHECKPOINTING, 5, guide="8 GPUs: 14 GB"),
    Arm("5b", "sft", 4, "zero3_offload", CHECKPOINTING, 5, guide="8 GPUs: 28 GB"),
    Arm("2b", "sft", 4, "zero2", precision="fp16", guide="8 GPUs: 17 GB"),
    Arm("2b", "sft", 4, "fsdp2", precision="fp16"),
    Arm("2b", "sft", 4, "zero3", CHECKPOINTING, 6, precision="fp16", guide="8 GPUs: 19 GB"),
    Arm("5b", "sft", 4, "zero3", CHECKPOINTING, 6, guide="8 GPUs: 43 GB"),
    Arm("2b", "sft", 1, "zero2_offload", CHECKPOINTING, 5, precision="fp16", guide="17 GB"),
    Arm("5b", "sft", 1, "zero2_offload", CHECKPOINTING, 4, guide="42 GB"),
    Arm("5b", "sft", 4, "hsdp", ("--keep", "attention")),
    Arm("5b", "sft", 4, "fsdp2_offload", steps=5),
    Arm("5b", "sft", 2, "fsdp2"),
    Arm("2b", "sft", 2, "uncompiled_2", guide="2 GPUs: 33.9 GiB"),
    Arm("2b", "sft", 2, "fsdp2"),
    Arm("2b", "sft", 4, "stock zero2", steps=6),
    Arm("2b", "sft", 1, "uncompiled_1"),
    Arm("5b", "sft", 1, "uncompiled_1", steps=6),
    Arm("5b", "lora", 2, "uncompiled_2", ("--plan", "lean")),
    Arm("5b", "lora", 2, "uncompiled_2", ("--plan", "fast")),
    Arm("2b", "sft", 2, "zero2", precision="fp16"),
    Arm("2b", "sft", 2, "fsdp2", precision="fp16"),
    Arm("2b", "sft", 2, "zero3", CHECKPOINTING, 6, precision="fp16"),
    Arm("2b", "sft", 2, "zero3_offload", CHECKPOINTING, 5),
    Arm("5b", "sft", 2, "zero2"),
    Arm("5b", "sft", 2, "fsdp2_offload", steps=5),
    Arm("5b", "sft", 2, "zero3_offload", CHECKPOINTING, 5),
    Arm("1.5-5b", "sft", 4, "fsdp2", CHECKPOINTING, 5, guide="8 GPUs, ZeRO-3: 55 GB"),
    Arm("1.5-5b", "sft", 4, "zero2", CHECKPOINTING, 5, guide="8 GPUs: 55 GB"),
    Arm("1.5-5b", "sft", 4, "zero3_offload", CHECKPOINTING, 4, guide="8 GPUs: 40 GB"),
    Arm("1.5-5b", "sft", 1, "zero2_offload", CHECKPOINTING, 4, guide="56 GB"),
    Arm("5b-i2v", "lora", 1, "uncompiled_1", ("--plan", "fast")),
    Arm("5b-i2v", "lora", 1, "uncompiled_1", ("--plan", "lean")),
    Arm("1.5-5b", "lora", 2, "uncompiled_2", ("--sequence_parallel", "2")),
    Arm("1.5-5b", "lora", 1, "uncompiled_1", steps=6),
    Arm("1.5-5b", "lora", 4, "uncompiled_2", ("--sequence_parallel", "4")),
)


def has_flash() -> bool:
    """Returns whether FlashAttention 4 is installed, which every plan then uses."""
    return importlib.util.find_spec("cutlass") is not None and importlib.util.find_spec("flash_attn.cute") is not None


def result_of(arm: Arm, results: Path, flash: bool) -> Path:
    """Returns the path of an arm's result. A plan is measured with FlashAttention 4 and without it."""
    planned = "stock" not in arm.config and "zero3" not in arm.config
    return results / f"{PREFIX}{arm.name}{'_cudnn' if planned and not flash else ''}.json"


# -- commands ----------------------------------------------------------------------------------------------------------


def launcher_of(arm: Arm, port: int) -> list[str]:
    """Returns the start of the command: plain Python for one process without a library that shards."""
    if arm.config == "uncompiled_1":
        return [sys.executable]
    file = ROOT / "accelerate_configs" / f"{arm.config.removeprefix('stock ')}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    launcher += ["--num_processes", str(arm.gpus), "--main_process_port", str(port)]
    return launcher


def command_of(arm: Arm, work_dir: Path, output: Path, port: int) -> list[str]:
    """Returns the command line of an arm."""
    if arm.config.startswith("stock "):
        worker = [str(Path(__file__).resolve()), "--stock_worker", arm.kind, "--steps", str(arm.steps)]
        return [*launcher_of(arm, port), *worker, "--work_dir", str(output)]
    task = "image_to_video" if is_image_to_video(arm.kind) else "text_to_video"
    command = [*launcher_of(arm, port), str(ROOT / f"training/cogvideox_{task}_{arm.method}.py"), "--load_tensors"]
    command += ["--pretrained_model_name_or_path", str(work_dir / arm.kind), "--output_dir", str(output)]
    command += ["--data_root", str(work_dir / f"{arm.kind}-tensors"), "--mixed_precision", arm.precision]
    command += ["--train_resolution", "x".join(map(str, clip_size(arm.kind))), "--train_batch_size", "1"]
    command += ["--rank", "128", "--lora_alpha", "128"] if arm.method == "lora" else []
    command += ["--optimizer", "adamw", "--learning_rate", "1e-5", "--max_train_steps", "1000"]
    return [*command, "--checkpointing_steps", "1000", "--dataloader_num_workers", "1", *arm.flags]


def shown(command: Sequence[str]) -> str:
    """Returns a command as it is typed in the root of the repository."""
    return " ".join(["python", *command[1:]]).replace(f"{ROOT}/", "")


# -- one arm -----------------------------------------------------------------------------------------------------------


def available_bytes() -> int:
    """Returns the host memory that processes may still allocate, in bytes."""
    return int(psutil.virtual_memory().available)


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kills a launcher and every process that it started, and waits until they are gone."""
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    family += [child for parent in list(family) for child in parent.children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    process.wait()


def measure(arm: Arm, work_dir: Path, port: int) -> dict[str, Any]:
    """Runs an arm until it has taken its steps; returns the figures, or the end of what it printed."""
    output, log = work_dir / "runs" / arm.name, work_dir / "logs" / f"{arm.name}.log"
    delete_run(output)
    for folder in (output, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    command, started = command_of(arm, work_dir, output, port), time.perf_counter()
    free = available_bytes()
    with watched(min, available_bytes) as least, open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        while process.poll() is None and len(lines_of(output)) < arm.steps:
            if time.perf_counter() - started > MOST_SECONDS:
                break
            time.sleep(0.2)
        end_all(process)
    text, lines = log.read_text(errors="replace").replace("\r", "\n"), lines_of(output)
    row: dict[str, Any] = {"arm": asdict(arm), "launched": shown(command), "steps": len(lines)}
    row |= {"said": [line.strip() for line in text.splitlines() if line.strip().startswith(SAID)]}
    row |= predicted(" ".join(row["said"])) | {
        "host_gib": round((free - least[0]) / 2**30, 1),
        "arm_seconds": round(time.perf_counter() - started, 1),
    }
    if len(lines) < arm.steps:
        return row | {"failed": f"{text[-3000:]}\n{len(lines)} of {arm.steps} steps in {row['arm_seconds']} s"}
    seconds = [line["seconds"] for line in lines]
    row |= {"seconds_per_step": round(statistics.median(seconds[WARM_UP:]), 4), "seconds": seconds}
    row |= {name: max(line[name] for line in lines) for name in ("peak_gib", "reserved_gib") if name in lines[0]}
    row["communication"] = communication_share(row)
    return row | {"losses": [line["loss"] for line in lines]}


def predicted(said: str) -> dict[str, Any]:
    """Returns what the plan predicted, from the lines of a run; nothing if it has no plan."""
    text = r"predicted: peak ([\d.]+) GiB.*?, ([\d.]+) s a step(?:, ([\d.]+) s of it communication)?"
    found = re.search(text, said)
    if found is None:
        return {}
    names = ("peak_gib", "seconds_per_step", "communication_seconds")
    return {"predicted": {name: float(n) for name, n in zip(names, found.groups(), strict=True) if n is not None}}


def communication_share(row: dict[str, Any]) -> str:
    """Returns the share of a step in which processes exchange tensors, as text; empty if they do not."""
    seconds = row.get("predicted", {}).get("communication_seconds")
    return f"{seconds / row['seconds_per_step']:.1%} communication" if seconds else ""


def run_arms(arms: Sequence[Arm], work_dir: Path, results: Path, seconds: float) -> bool:
    """Measures the arms that have no result yet; returns whether all of those that were started succeeded."""
    import torch

    began, succeeded = time.perf_counter(), True
    for number, arm in enumerate(arms):
        path = result_of(arm, results, has_flash())
        left = seconds - (time.perf_counter() - began)
        if path.is_file() or arm.gpus > torch.cuda.device_count() or left < 40:
            continue
        make_pipeline(arm.kind, work_dir / arm.kind)
        if not (work_dir / f"{arm.kind}-tensors").is_dir():
            make_tensors(arm.kind, work_dir / arm.kind, work_dir / f"{arm.kind}-tensors", SAMPLES)
        torch.cuda.empty_cache()
        row = measure(arm, work_dir, 29500 + number) | device_and_versions()
        failed = "failed" in row
        write_result(path.with_suffix(".failed" if failed else ".json"), row)
        figures = (
            "seconds_per_step",
            "communication",
            "peak_gib",
            "reserved_gib",
            "host_gib",
            "arm_seconds",
            "said",
            "failed",
        )
        print(json.dumps({arm.name: {name: row[name] for name in figures if name in row}}), flush=True)
        succeeded = succeeded and not failed
    return succeeded


# -- the stock arm -----------------------------------------------------------------------------------------------------


def stock_worker(kind: str, steps: int, output: Path) -> None:
    """Trains all weights with the plain loop of arms.py on each process, and writes the lines of the first process."""
    import torch
    from arms import Work, stock

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    figures = stock(Work(kind, 0, 1, torch.device("cuda", rank)), steps)
    peaks = {"peak_gib": figures["peak_gib"]["allocated"], "reserved_gib": figures["peak_gib"]["reserved"]}
    pairs = zip(figures["losses"], figures["seconds"], strict=True)
    lines = [json.dumps({"loss": loss, "seconds": seconds} | peaks) + "\n" for loss, seconds in pairs]
    if rank == 0:
        (output / "metrics.jsonl").write_text("".join(lines))


# -- the table ---------------------------------------------------------------------------------------------------------


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the cells of a measured arm, in the order of HEAD."""
    arm, said = row["arm"], " ".join(row["said"])
    trained = "LoRA, rank 128" if arm["method"] == "lora" else "all weights"
    config = "plain Python" if arm["config"] == "uncompiled_1" else arm["config"]
    how = f"{config} {' '.join(arm['flags'])}".strip() + (", fp16" if arm["precision"] == "fp16" else "")
    attention = said.partition("attention by ")[2].partition(":")[0]
    seconds = row["seconds_per_step"]
    peak = f"{row['peak_gib']:.1f} ({row['reserved_gib']:.1f})"
    rate = f"{Arm(**arm).groups / seconds:.3f}"
    shares = ", ".join(filter(None, [f"{seconds:.2f} s", row.get("communication")]))
    return (
        arm["kind"],
        trained,
        str(arm["gpus"]),
        row["device"].removeprefix("NVIDIA ").partition(" ")[0],
        how,
        attention,
        shares,
        rate,
        peak,
        f"{row['host_gib']:.0f}",
        arm["guide"],
    )


def table(results: Path) -> str:
    """Returns the Markdown table of all results, in the order of ARMS, with their devices, versions and commits."""
    paths = {result_of(arm, results, flash): None for arm in ARMS for flash in (True, False)}
    rows = [json.loads(path.read_text()) for path in paths if path.is_file()]
    order = sorted(rows, key=lambda row: (row["arm"]["kind"], row["arm"]["method"], row["arm"]["gpus"]))
    lines = [HEAD, ("---",) * len(HEAD), *map(cells_of, order)]
    sources = sorted({f"{row['device']}, torch {row['versions']['torch']}, commit {row['commit'][:7]}" for row in rows})
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\nMeasured on {'; '.join(sources)}.\n" if rows else ""


def main() -> int:
    """Measures arms, or writes the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/scale"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=1e9, help="no arm is started when less than 40 s are left")
    parser.add_argument("--table", type=Path, metavar="PAGE", help="only write the table of all results into this page")
    parser.add_argument("--stock_worker", metavar="KIND", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stock_worker:
        stock_worker(args.stock_worker, args.steps, args.work_dir)
        return 0
    if args.table:
        put_into(args.table, "scale.py", table(args.results))
        return 0
    arms = [arm for arm in ARMS if not args.arms or arm.name in args.arms]
    return 0 if run_arms(arms, args.work_dir, args.results, args.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
