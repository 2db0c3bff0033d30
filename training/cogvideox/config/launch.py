"""Checks what launchers and users have put into the environment, before torch is imported.

A process learns from variables which part of a run it is. A launcher that has ended, another trainer or a guide may
have left some of them. This module needs only the standard library.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from cogvideox.config.options import (
    TrainOptions,
    asked_for_cpu,
    dynamo_backend,
    launched_processes,
    under_deepspeed,
    under_fsdp,
)
from cogvideox.errors import UsageError
from cogvideox.stopping import ACCELERATE, is_launcher

LEFT_OVER = "if another launcher left it in the environment, run: unset"  # the fix, before the names of variables
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def check_launch() -> None:
    """Raises UsageError if the launcher has numbered processes wrongly or left some out, or the locale lacks UTF-8."""
    problems = list(number_problems())
    if lacks_processes():
        rule = "it was asked for several processes and started one, because its configuration is for one"
        fix = "give --config_file accelerate_configs/uncompiled_2.yaml, and to use CPUs set ACCELERATE_USE_CPU=true"
        problems.append(f"accelerate launch: {rule} (distributed_type: NO); {fix}")
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        rule = f"Python reads flags and the names of files as {encoding}, and they must be UTF-8"
        problems.append(f"the locale: {rule}; set the variable PYTHONUTF8=1")
    if problems:
        raise UsageError(problems)


def number_problems() -> Iterator[str]:
    """Yields contradictions between the numbers by which a launcher tells each process its place."""
    given = {name: os.environ[name] for name in NUMBERS if name in os.environ}
    if odd := [name for name, value in given.items() if not re.fullmatch(r"\s*[+-]?\d+\s*", value)]:
        yield from (f"{name}={given[name]}: must be a number; {LEFT_OVER} {name}" for name in odd)
        return
    numbers = {name: int(value) for name, value in given.items()}
    world, here = numbers.get("WORLD_SIZE", 1), numbers.get("LOCAL_WORLD_SIZE")
    if not 0 <= numbers.get("RANK", 0) < world:
        rule = f"must be from 0 to WORLD_SIZE - 1, and WORLD_SIZE is {world}"
        yield f"RANK={numbers.get('RANK', 0)}: {rule}; {LEFT_OVER} RANK WORLD_SIZE"
    elif here is not None and not 1 <= here <= world:
        rule = f"must be from 1 to WORLD_SIZE, which is {world}"
        yield f"LOCAL_WORLD_SIZE={here}: {rule}; {LEFT_OVER} LOCAL_WORLD_SIZE"
    elif here is not None and numbers.get("LOCAL_RANK", 0) >= here:
        rule = f"must be below LOCAL_WORLD_SIZE, which is {here}"
        yield f"LOCAL_RANK={numbers['LOCAL_RANK']}: {rule}; {LEFT_OVER} LOCAL_RANK LOCAL_WORLD_SIZE"


def lacks_processes() -> bool:
    """Returns whether `accelerate launch` was asked for several processes and started only this one, which it does
    silently if the distributed_type of its configuration is NO.

    It then adds the address of process 0 to the environment and no rank. The address may also have been there before.
    """
    if not {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() or "RANK" in os.environ:
        return False
    try:
        of_launcher = Path("/proc", str(os.getppid()), "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(variable.startswith(b"MASTER_ADDR=") for variable in of_launcher)


def start_problems() -> Iterator[str]:
    """Yields the settings of accelerate that need a launcher, if none has started this process."""
    if launched_processes() > 1 or "LOCAL_RANK" in os.environ:
        return
    wanted = {"ACCELERATE_USE_DEEPSPEED": under_deepspeed(), "ACCELERATE_USE_FSDP": under_fsdp()}
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        rule = "needs processes that a launcher has started, and none has started this one"
        yield f"{name}={os.environ[name]}: {rule}; start it with accelerate launch, or run: unset {name}"


def network_problems() -> Iterator[str]:
    """Yields the variables whose network interfaces this machine lacks, if several processes are to be connected."""
    if launched_processes() == 1:
        return
    here = [name for _, name in socket.if_nameindex()]
    for variable, is_used in (("GLOO_SOCKET_IFNAME", True), ("NCCL_SOCKET_IFNAME", not asked_for_cpu())):
        asked = os.environ.get(variable, "")
        if is_used and asked and not has_interfaces(variable, asked, here):
            rule = f"this machine has no such network interface; it has {', '.join(here)}"
            fix = "set it to the one that connects the machines"
            yield f"{variable}={asked}: {rule}; {fix}, or run: unset {variable}"


def has_interfaces(variable: str, asked: str, here: list[str]) -> bool:
    """Returns whether a library finds the interfaces that its variable asks for among those of this machine.

    gloo needs all names of its list. NCCL needs one interface that begins with a part of its list, or after "=" equals
    one. After "^", it needs one that the list does not have.
    """
    names = [name.partition(":")[0] for name in asked.removeprefix("=").split(",") if name]
    if variable.startswith("GLOO"):
        return set(names) <= set(here)
    if asked.startswith("^") or not names:
        return True
    return any(name in names if asked.startswith("=") else name.startswith(tuple(names)) for name in here)


def launch_remarks(options: TrainOptions) -> Iterator[str]:
    """Yields remarks about what the environment makes of a training run, and the user may not have meant."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    follows = {
        "ACCELERATE_USE_DEEPSPEED": under_deepspeed(),
        "ACCELERATE_USE_FSDP": under_fsdp(),
        "ACCELERATE_DYNAMO_BACKEND": dynamo_backend() != "no",
        "ACCELERATE_MIXED_PRECISION": precision != "no" and options.train.mixed_precision is None,
    }
    names = [name for name, is_followed in follows.items() if is_followed]
    if names and not is_launcher(os.getppid(), ACCELERATE):
        listed = ", ".join(f"{name}={os.environ[name]}" for name in names)
        yield f"accelerate: the environment has {listed}, which this run follows; {LEFT_OVER} {' '.join(names)}"
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "RANK" not in os.environ:
        rule = f"srun has started {tasks} tasks that do not know each other, so each would train by itself"
        yield f"SLURM: {rule}; examples/slurm.sbatch makes them one run"


def adopt_tasks() -> None:
    """Sets the variables of a launcher in a task of SLURM's srun, for a script whose processes need no connection."""
    if "RANK" in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return  # a launcher has started this process, or srun only this one
    for name, of_slurm in (("RANK", "PROCID"), ("WORLD_SIZE", "STEP_NUM_TASKS"), ("LOCAL_RANK", "LOCALID")):
        os.environ[name] = os.environ.get(f"SLURM_{of_slurm}", "0")
    # The number of tasks of each machine, such as "8(x3),4".
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [number for number, times in groups for _ in range(int(times or 1))]
    if len(tasks) > (machine := int(os.environ.get("SLURM_NODEID", "0"))):
        os.environ["LOCAL_WORLD_SIZE"] = tasks[machine]
