"""Starts a training run: processes and device, the output folder and its lock, and metrics.jsonl.

``start_run`` returns the ``Run`` that all other parts of training use. ``Metrics`` writes one line of metrics.jsonl per
optimizer step. It reads the numbers of a step from the device one step late, so that logging never makes it wait.
"""

import functools
import json
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.config.args import config_dict
from cogvideox.config.flags import TrainFlags
from cogvideox.config.hub import open_repository
from cogvideox.config.options import (
    TrainOptions,
    asked_for_cpu,
    dynamo_backend,
    launched_processes,
    local_processes,
    precision_of,
    tracker_names,
    under_deepspeed,
)
from cogvideox.errors import UsageError, public_urls
from cogvideox.files import LOCK_NAME, disk_errors_converted, remove_temporaries, write_atomically
from cogvideox.locks import STALE, HeldError, Lock, take_later
from cogvideox.optimizer.shard_files import Outcome, raise_errors
from cogvideox.optimizer.step import LOSS_SCALE, RankNumbers, StepResult
from cogvideox.progress import ProgressBar
from cogvideox.runtime.metrics import keep_records
from cogvideox.runtime.ranks import (
    WATCHER_SECONDS,
    Ranks,
    check_own_gpus,
    check_world,
    connecting,
    connection_url,
    count_here,
)
from cogvideox.runtime.startup import Startup

if TYPE_CHECKING:
    from accelerate import Accelerator

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
RUN_CONFIG_NAME, METRICS_NAME = "config.json", "metrics.jsonl"
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "av")  # their versions are recorded

T = TypeVar("T")


@dataclass
class Run:
    """Holds the state of a run that all parts of training use: accelerator, ranks, output folder and precision.

    Attributes:
        accelerator: The accelerate.Accelerator.
        ranks: The connection of this process to the others.
        output_dir: The output folder.
        precision: "no", "fp16" or "bf16".
        compiled: Whether accelerate's configuration asks for torch.compile.
        startup: Measures the phases before the first step.
        repository: The repository on the hub that receives the result; None on ranks other than the main process.
        id: What tells this run from others, on the main process. All runs in one output folder have the same.
    """

    accelerator: "Accelerator"
    ranks: Ranks
    output_dir: Path
    precision: str
    compiled: bool
    startup: Startup = field(default_factory=Startup)
    repository: str | None = None
    id: str = field(default_factory=lambda: uuid4().hex)
    _lock: Lock | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Returns the device on which the transformer runs."""
        return self.ranks.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the compute type of the network."""
        return PRECISIONS[self.precision]

    @property
    def is_main(self) -> bool:
        """Returns whether this rank writes and prints."""
        return self.ranks.is_main_process

    @property
    def world(self) -> int:
        """Returns the number of ranks."""
        return self.ranks.num_processes

    def say(self, text: str) -> None:
        """Prints one line on stderr, from the main process only, without breaking the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def barrier(self) -> None:
        """Waits for the other ranks."""
        self.ranks.wait_for_everyone()

    def gather_or_raise(self, outcome: Outcome[T]) -> list[T]:
        """Returns the outcomes of all ranks. If some are errors, every rank raises the first of them."""
        return raise_errors(self.ranks.gather([outcome]))

    def from_main(self, value: T) -> T:
        """Returns the value of the main process on every rank."""
        return self.ranks.from_main(value)

    def disconnect(self) -> None:
        """Ends the trackers and the connection of the ranks, once no rank uses the store of the main process."""
        stopping.part_from_ranks()
        self.barrier()
        self.accelerator.end_training()


def memory_peaks() -> tuple[float, float] | None:
    """Returns the peaks of the memory that tensors used and that torch reserved, in GiB; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30


def with_peaks(line: str) -> str:
    """Returns a line for the user with the memory peaks appended, if there is a GPU."""
    peaks = memory_peaks()
    return line + ", peak {:.2f} GiB, reserved {:.2f} GiB".format(*peaks) if peaks else line


def start_run(options: TrainOptions) -> Run:
    """Connects the ranks, locks the output folder, writes config.json and creates the repository on the hub.

    Raises:
        UsageError: The folder belongs to something else, the launcher's configuration does not fit the machine, or the
            hub refuses.
    """
    use_growing_segments()
    counted = "LOCAL_WORLD_SIZE" in os.environ  # on a CPU, accelerate sets it to 1 if the launcher has not
    accelerator = make_accelerator(options)
    output_dir = Path(options.train.output_dir)
    compiled = dynamo_backend() != "no"
    ranks = Ranks(accelerator.state, options.train.nccl_timeout, sequence_parallel=options.plan.sequence_parallel)
    count_here(ranks, counted)
    check_own_gpus(ranks)
    use_cores(ranks.device)
    run = Run(accelerator, ranks, output_dir, precision_of(options.train.mixed_precision), compiled)
    if run.device.type == "cpu" and NVIDIA_DRIVER.exists():
        run.say(f"no GPU is used, although this machine has a driver for one: {reason_for_cpu()}")
    torch.backends.cuda.matmul.allow_tf32 = options.train.allow_tf32
    torch.backends.cudnn.allow_tf32 = options.train.allow_tf32  # torch enables it by default
    problem = (lock_output_folder(run, options) or open_run_repository(run, options)) if run.is_main else None
    problem = run.from_main(problem)
    if problem:
        run.disconnect()
        raise UsageError(problem)
    run.ranks.check_shared(output_dir, "--output_dir")
    return run


def reason_for_cpu() -> str:
    """Returns why a run that found no GPU, or was told to use none, is on the CPU."""
    if asked_for_cpu():
        return f"ACCELERATE_USE_CPU={os.environ['ACCELERATE_USE_CPU']}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"torch {torch.__version__} sees none" + ("" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}")


def use_growing_segments() -> None:
    """Lets torch's allocator extend its segments, so that buckets of several sizes leave no unused gaps on the GPU."""
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def use_cores(device: torch.device) -> None:
    """Lets torch use this process's share of the cores of a machine with GPUs, if a launcher has left it one thread.

    ``accelerate launch`` and ``torchrun`` do that. The copy of a checkpoint, for which training waits, the creation of
    host memory, and optimizers on the host would then take several times as long. Without a GPU, the number of threads
    is part of the result, because sums depend on it.
    """
    if device.type == "cuda" and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes()))


def make_accelerator(options: TrainOptions) -> "Accelerator":
    """Creates accelerate's Accelerator.

    Except under DeepSpeed, it is used for processes, device and trackers only. Precision, compilation and gradients are
    handled by this project.

    Raises:
        UsageError: The launcher's configuration does not fit the machine.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import ProjectConfiguration

    world = launched_processes()
    deepspeed = under_deepspeed()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # ``accelerate launch`` sets it.
    if launched and not asked_for_cpu() and not torch.cuda.is_available():
        # Where accelerate starts the script without torchrun, it overwrites the variable.
        overwrites = "ACCELERATE_USE_CPU" in os.environ
        fix = "add --cpu before the script" if overwrites else "set the variable ACCELERATE_USE_CPU=true"
        rule = "its configuration is for GPUs and torch sees none"
        raise UsageError(f"accelerate launch: {rule}; fix the driver or the torch build, or to train on the CPU {fix}")
    on_cpu = asked_for_cpu() or not torch.cuda.is_available()
    # With it, accelerate divides the processes itself, and refuses a CPU and copies without a dp_shard_size.
    os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)
    handlers = []
    if world > 1 or deepspeed:
        timeout = timedelta(seconds=options.train.nccl_timeout + WATCHER_SECONDS)
        backend = "gloo" if on_cpu else "nccl"
        handlers.append(InitProcessGroupKwargs(backend, connection_url(), timeout))
    if deepspeed and on_cpu:
        import deepspeed as library

        os.environ.pop("ACCELERATE_USE_CPU", None)  # With it, or with cpu=True, accelerate drops DeepSpeed silently.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # Otherwise g++ compiles it for a minute.
    project = ProjectConfiguration(
        options.train.output_dir, str(Path(options.train.output_dir, options.train.logging_dir))
    )
    with connecting():
        accelerator = Accelerator(
            mixed_precision=precision_of(options.train.mixed_precision) if deepspeed else "no",
            # DeepSpeed accumulates by itself; accelerate only compares the two numbers, and warns if they differ.
            gradient_accumulation_steps=options.train.gradient_accumulation_steps,
            dynamo_backend="no",
            cpu=on_cpu and not deepspeed,
            log_with=tracker_names(options.train.report_to) or None,
            project_config=project,
            kwargs_handlers=handlers,
        )
    plugin = accelerator.state.deepspeed_plugin
    if deepspeed and plugin is None:
        raise UsageError("accelerate launch: its configuration asks for DeepSpeed, and accelerate did not start it")
    if plugin is not None:
        plugin.dschf = None  # With it, transformers divides also T5 between the processes under ZeRO-3.
        check_type_of_deepspeed(precision_of(options.train.mixed_precision))
        # DeepSpeed uses functions of torch.distributed that torch 2.13 warns about, in every process.
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    check_world(accelerator.num_processes)
    return accelerator


def check_type_of_deepspeed(precision: str) -> None:
    """Raises UsageError if DeepSpeed does not train in this precision on this device; later it would do so itself."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    is_supported = {"bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported(), "no": True}
    if not is_supported[precision]:
        others = " or ".join(name for name, supported in is_supported.items() if supported)
        rule = f"DeepSpeed does not support it on this device; give {others}, or launch without DeepSpeed"
        raise UsageError(f"--mixed_precision {precision}: {rule}")


def lock_output_folder(run: Run, options: TrainOptions) -> str | None:
    """Creates and locks the output folder and writes config.json; returns the problem if that fails."""
    folder, train = run.output_dir, options.train

    def say(holder: str) -> None:
        run.say(f"{folder}: another run is using it ({holder}); waiting {STALE:.0f} s, in case its machine is lost")

    try:
        if problem := content_problem(train):
            return problem
        folder.mkdir(parents=True, exist_ok=True)
        # The process holds it until it ends; its workers do not hold it.
        run._lock = take_later(folder / LOCK_NAME, say, only_if_lost=True)
    except HeldError as error:
        fix = "wait for it, end it with `kill`, which saves a checkpoint, or give another folder"
        return f"--output_dir {folder}: another run is using it ({error.strerror}); {fix}"
    except OSError as error:
        return f"--output_dir {folder}: {error.strerror}; give a folder that can be written"
    with disk_errors_converted(folder), stopping.disk_work():
        remove_temporaries(folder)
    if not (folder / RUN_CONFIG_NAME).exists():
        write_config(run, options)
    run.id = read_run_config(folder).get("run", run.id)
    return None


def content_problem(train: TrainFlags) -> str | None:
    """Returns why a run cannot continue or begin with the content of its output folder, or None if it can."""
    folder, ignored = Path(train.output_dir), (".*.tmp", f"{LOCK_NAME}*")
    files = folder.iterdir() if folder.is_dir() else ()
    there = sorted(path.name for path in files if not any(map(path.match, ignored)))
    if there and there != [train.logging_dir] and not has_run_config(folder):
        return (
            f"--output_dir {folder}: is not empty and not a run of this trainer ({there[0]}, ...); give another folder"
        )
    if there and train.no_resume:
        return f"--no_resume: {folder} is not empty; give an empty --output_dir, or delete it"
    return None


def has_run_config(folder: Path) -> bool:
    """Returns whether a folder has the config.json of a run. The folder of a model has another file of this name."""
    return (folder / RUN_CONFIG_NAME).exists() and "flags" in read_run_config(folder)


def read_run_config(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json. A damaged one counts as that of a run, which writes it again."""
    try:
        config = json.loads((folder / RUN_CONFIG_NAME).read_bytes())
    except ValueError:
        return {"flags": {}}
    return config if isinstance(config, dict) else {}


def open_run_repository(run: Run, options: TrainOptions) -> str | None:
    """Creates or finds the repository on the hub if the flags ask for one; returns the problem if that fails."""
    try:
        run.repository = open_repository(options, run.id, run.say)
    except UsageError as error:
        return str(error)
    return None


def command_line() -> str:
    """Returns the command of this script, without queries and passwords of URLs."""
    return shlex.join(map(public_urls, sys.argv))


def write_config(run: Run, options: TrainOptions, plan: str = "") -> None:
    """Writes config.json: id, flags, precision, number of ranks, versions, command, and the plan once it is known."""
    config = {
        "run": run.id,
        "flags": config_dict(options),
        "precision": run.precision,
        "ranks": run.world,
        **environment(),
    }
    config |= {"command": command_line()} | ({"plan": plan} if plan else {})
    write_atomically(run.output_dir / RUN_CONFIG_NAME, json.dumps(config, indent=1, ensure_ascii=False).encode())


def environment() -> dict[str, Any]:
    """Returns versions and device, for config.json and benchmark results."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"versions": dict(versions()), "python": platform.python_version(), "device": device}


@functools.cache  # To find a version, importlib parses all metadata of the package, which is slow.
def versions() -> dict[str, str]:
    """Returns the versions of those RECORDED_PACKAGES that are installed."""
    found = {}
    for name in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class TimeMark:
    """Marks a moment in the work of a CUDA device, or in the time of the host for any other device."""

    def __init__(self, device: torch.device) -> None:
        self.time = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()

    def reached(self) -> None:
        """Waits until the device has reached this mark."""
        if self.event is not None:
            self.event.synchronize()

    def seconds_since(self, earlier: "TimeMark") -> float:
        """Returns the seconds between two marks that the device has reached."""
        if self.event is None or earlier.event is None:
            return self.time - earlier.time
        return earlier.event.elapsed_time(self.event) / 1000.0


TrainedSample = tuple[str, int]  # id and timestep
StepCallback = Callable[[int, dict[str, float], list[TrainedSample]], None]


@dataclass
class Pending:
    """Holds a step whose numbers are still being copied from the device.

    Attributes:
        step: The number of the step, counted from 1.
        lr: The learning rate of the step.
        samples: The samples of this process in the step.
        values: StepResult.values on the CPU, valid once ``end`` is reached.
        start: The end of the step before.
        end: The end of the step.
    """

    step: int
    lr: float
    samples: list[TrainedSample]
    values: torch.Tensor
    start: TimeMark
    end: TimeMark


class Metrics:
    """Writes the numbers of each optimizer step to metrics.jsonl, the trackers and the progress bar.

    Args:
        run: The run.
        first_step: The number of steps that are done. Lines of later steps are removed from metrics.jsonl, because
            these steps are repeated, unless the run only exports an earlier checkpoint.
        total_steps: The length of the run.
        on_step: Called for each step whose numbers have arrived, with the step, the values of StepResult by name, and
            the samples of this process.

    Attributes:
        bad_clips: How many clips this process has failed to read since the start.
        samples: The samples of this process since the last step.
    """

    def __init__(self, run: Run, first_step: int, total_steps: int, on_step: StepCallback | None = None) -> None:
        self.run, self.on_step = run, on_step
        self.path = run.output_dir / METRICS_NAME
        self.pending: Pending | None = None
        self.last: dict[str, float] = {}  # numbers of the newest step whose numbers have arrived
        self.seconds = 0.0  # duration of that step
        self.mark = TimeMark(run.device)  # the end of the step before
        self.loading_seconds = 0.0
        self.bad_clips = 0
        self.samples: list[TrainedSample] = []
        self.bar = ProgressBar(
            initial=first_step,
            total=total_steps,
            desc="training",
            unit="step",
            disable=not run.is_main,
            dynamic_ncols=True,
        )
        self.forget_peaks()
        if run.is_main:
            last = first_step if first_step < total_steps else math.inf  # later steps will be repeated
            keep_records(self.path, lambda record: last > 0 and record["step"] <= last)

    def forget_peaks(self) -> None:
        """Resets the memory peaks, so that they do not include encoding and checks before training."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def of_rank(self) -> RankNumbers:
        """Returns the numbers of this rank for the step whose gradients have been computed."""
        return RankNumbers(self.bad_clips, self.loading_seconds, *(memory_peaks() or (0.0, 0.0)))

    def push(self, step: int, lr: float, result: StepResult) -> None:
        """Queues the numbers of a step, and writes those of the step before, which have arrived by now."""
        values = result.values.to("cpu", non_blocking=True)
        end = TimeMark(self.run.device)
        self.flush()
        self.pending = Pending(step, lr, self.samples, values, self.mark, end)
        self.mark, self.loading_seconds, self.samples = end, 0.0, []

    def flush(self) -> None:
        """Writes the queued step, if there is one, after waiting for its numbers."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        pending.end.reached()
        self.last = dict(zip(StepResult.NAMES, pending.values.tolist(), strict=True))
        self.seconds = pending.end.seconds_since(pending.start)
        record = {"step": pending.step, "lr": pending.lr, **self.last, "seconds": round(self.seconds, 5)}
        record |= {"loading_seconds": round(record["loading_seconds"], 5), "bad_clips": int(record["bad_clips"])}
        if self.run.precision != "fp16":
            del record[LOSS_SCALE]  # It is always 1.
        for name in ("peak_gib", "reserved_gib"):
            record[name] = round(record[name], 3)
            if not torch.cuda.is_available():
                del record[name]
        if self.run.is_main:
            self._write(record)
        if self.on_step:
            self.on_step(pending.step, self.last, pending.samples)

    def _write(self, record: dict[str, float]) -> None:
        write_metrics(self.run, record)
        shown = {"loss": f"{record['loss']:.4f}", "lr": f"{record['lr']:.2e}", "s/step": f"{record['seconds']:.2f}"}
        if "peak_gib" in record:
            shown["GiB"] = f"{record['peak_gib']:.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(int(record["step"]) - self.bar.n)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Counts the time inside the context as waiting for data."""
        start = time.perf_counter()
        yield
        self.loading_seconds += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the context from the seconds per step."""
        self.flush()
        yield
        self.mark = TimeMark(self.run.device)

    def close(self) -> None:
        """Writes the last step and closes the progress bar."""
        self.flush()
        self.bar.close()


def write_metrics(run: Run, record: dict[str, Any]) -> None:
    """Appends a line to metrics.jsonl and sends the same numbers to the trackers. Called on the main process.

    Args:
        run: The run.
        record: Values by name, with the step under "step". A number that is not finite is written as null. Trackers
            receive each list as separate numbers name/0, name/1, ..., and no strings.
    """
    lists = {name: value for name, value in record.items() if isinstance(value, list)}
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    numbers = {name: value for name, value in record.items() if name not in (*lists, *texts)}
    line: dict[str, Any] = {name: finite(value) for name, value in numbers.items()} | texts
    line |= {name: [finite(value) for value in values] for name, values in lists.items()}
    metrics = run.output_dir / METRICS_NAME
    with disk_errors_converted(run.output_dir), stopping.disk_work(), open(metrics, "a") as file:
        file.write(json.dumps(line) + "\n")
    numbers |= {f"{name}/{index}": value for name, values in lists.items() for index, value in enumerate(values)}
    run.accelerator.log({n: v for n, v in numbers.items() if n != "step"}, step=int(record["step"]))


def finite(value: float) -> float | None:
    """Returns the number, or None if it is infinite or NaN, which JSON cannot represent."""
    return value if math.isfinite(value) else None
