"""Tests runs of several machines, which are launchers next to each other on this one: on the CPU, with a tiny model."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import (
    LORA_SCRIPT,
    Forked,
    finish,
    fork_ranks,
    free_port,
    launch_machines,
    lora_flags,
    losses,
    python,
    ranks_environment,
    start,
)

STEPS = 40


@pytest.fixture(scope="module")
def command(tiny: Callable[[str], Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list]:
    """command(output) is what each process runs: it trains a LoRA, and saves every second step."""
    cache = tmp_path_factory.mktemp("cache")

    def made(output: Path) -> list:
        flags = lora_flags(tiny("5b"), clips, output, "--tensor_cache", cache, "--max_train_steps", STEPS)
        return python(LORA_SCRIPT, *flags, "--gradient_accumulation_steps", 1)

    return made


@pytest.fixture(scope="module")
def right(command: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two processes of one machine."""
    output = tmp_path_factory.mktemp("one") / "lora"
    for rank in fork_ranks(2, command(output)):
        finish(rank)
    return losses(output)


def test_a_request_to_stop_reaches_a_rank_whose_machine_counts_other_restarts(
    command: Callable[..., list], tmp_path: Path
) -> None:
    """torchrun counts on each machine only the failures of that machine's processes."""
    port = free_port()
    given = [ranks_environment(rank, 2, port) | {"TORCHELASTIC_RESTART_COUNT": str(rank)} for rank in range(2)]
    moment = ("^unit micro-batch", 3, signal.SIGUSR1)
    ranks = [Forked(command(tmp_path / "lora"), moment if rank else None, **given[rank]) for rank in range(2)]
    said = [finish(rank, 75) for rank in ranks]
    assert "stopped and saved after step" in said[0]


def test_two_machines_train_as_one_does(command: Callable[..., list], right: list[float], tmp_path: Path) -> None:
    where = f"--num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {free_port()}"
    launcher = f"-m accelerate.commands.launch --config_file accelerate_configs/uncompiled_2.yaml {where}"
    launchers = [[sys.executable, *launcher.split(), "--machine_rank", machine] for machine in range(2)]
    folder = tmp_path / "ranks"
    launch_machines(launchers, 2, command(tmp_path / "lora"), folder, ACCELERATE_USE_CPU="true")
    assert [json.loads((folder / f"{rank}.json").read_text())[1]["GROUP_RANK"] for rank in range(2)] == ["0", "1"]
    assert losses(tmp_path / "lora") == right


def worker_of(launcher: int) -> int:
    """Returns the only process that a launcher has started."""
    (worker,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(worker)


@pytest.mark.long
@pytest.mark.parametrize("machine", [0, 1])
def test_torchrun_restarts_a_killed_worker_and_the_run_resumes(
    machine: int, command: Callable[..., list], right: list[float], tmp_path: Path
) -> None:
    output = tmp_path / "lora"
    where = f"--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{free_port()} --rdzv_id run"
    launcher = [sys.executable, *f"-m torch.distributed.run {where} --max_restarts 1".split()]
    more = {"ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    machines = [start([*launcher, *command(output)[1:]], **more) for _ in range(2)]
    try:
        end = time.monotonic() + 300
        while not (output / "checkpoint-4").exists():
            assert time.monotonic() < end
            assert [one.poll() for one in machines] == [None, None]
            time.sleep(0.02)
        os.kill(worker_of(machines[machine].pid), signal.SIGKILL)
        said = "".join(finish(one) for one in machines)
    finally:
        for one in machines:
            one.kill()  # the worker of a launcher that is gone stops by itself
    assert "resuming from" in said
    assert losses(output) == right
