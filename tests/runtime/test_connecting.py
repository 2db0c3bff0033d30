"""ranks.py: how processes find each other, what they say if they do not, and what they know about their machine."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from running import LORA_SCRIPT, finish, free_port, lora_flags, python, start

from cogvideox.errors import UsageError
from cogvideox.runtime import ranks as module
from cogvideox.runtime.ranks import agree_on_attempt, check_own_gpus, connecting, connection_url, count_here

LIMIT = timedelta(seconds=20)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Each test has an environment of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "ACCELERATE_", "NCCL_"))}
    monkeypatch.setattr(os, "environ", own)
    return own


# -- what the processes say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: ib0"),
        RuntimeError("[/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 31000ms"),
        dist.DistStoreError("Timed out after 631 seconds"),
        ValueError("environment variable MASTER_PORT expected, but not set"),
    ],
)
def test_an_error_of_the_connection_names_its_variables(error: Exception, environment: dict[str, str]) -> None:
    environment.update({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.1"})
    said = "cannot be connected: .*; the environment has WORLD_SIZE=2, RANK=1, MASTER"
    with pytest.raises(UsageError, match=said), connecting():
        raise error


@pytest.mark.parametrize("text", ["CUDA error: invalid device ordinal", "No CUDA GPUs are available", "closed by peer"])
def test_other_errors_keep_their_traceback(text: str, environment: dict[str, str]) -> None:
    environment.update({"WORLD_SIZE": "2", "RANK": "1"})
    error = RuntimeError(text)
    with pytest.raises(RuntimeError) as caught, connecting():
        raise error
    assert caught.value is error


def test_a_long_wait_is_explained(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.update({"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    monkeypatch.setattr(module, "USUAL_WAIT", 0.01)
    with connecting():
        time.sleep(0.2)
    line = "process 2 still waits for the others of 4 processes, at 10.0.0.1:29500; all of them must be started with"
    assert capsys.readouterr().err.startswith(line)
    monkeypatch.setattr(module, "USUAL_WAIT", 0.1)
    with connecting():
        pass
    environment["WORLD_SIZE"] = "1"
    with connecting():
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


@pytest.mark.long
@pytest.mark.fault("ranks: processes that were started with different numbers")
def test_processes_that_expect_different_numbers_end(model: Path, tensors: Path, tmp_path: Path) -> None:
    """Process 0 connects two processes, and the other one waits for a third that never comes."""
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--nccl_timeout", 1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    ranks = [
        start(python(LORA_SCRIPT, *flags), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(2 + rank), **shared)
        for rank in range(2)
    ]
    said = [finish(rank, 2) for rank in ranks]
    assert all("the processes of this run cannot be connected" in text for text in said)
    assert "process 1 still waits for the others of 3 processes" in said[1]


# -- a launcher that starts processes again ----------------------------------------------------------------------------


def test_the_processes_of_an_attempt_agree_on_its_name() -> None:
    """What killed processes of former attempts have asked is answered, too, but nobody waits for these."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key, value in {"ask/1": "former", "answer/former": "other", "other/joined/1": "", "ask/2": "late"}.items():
        server.set(key, value)
    names: dict[int, str] = {}

    def join(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        names[rank] = agree_on_attempt(store, rank, 3, LIMIT)

    threads = [threading.Thread(target=join, args=[rank]) for rank in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 3
    assert len(set(names.values())) == 1
    assert "other" not in names.values()


def test_process_0_does_not_wait_forever() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistStoreError, match="1 of 3 processes came"):
        agree_on_attempt(server, 0, 3, timedelta(seconds=0.1))


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, f"{module.OF_ATTEMPT}://"),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, None),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, None),
        ({"WORLD_SIZE": "1"}, None),
    ],
)
def test_an_attempt_has_a_name_only_if_its_launcher_may_restart_it(
    given: dict[str, str], url: str | None, environment: dict[str, str]
) -> None:
    environment.update({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2"})
    environment.update(given)
    assert connection_url() == url


# -- the processes of a machine ----------------------------------------------------------------------------------------


def ranks_of(gathered: list[str], rank: int, device: str = "cpu") -> Any:
    """Returns a process of a run whose processes gather these texts."""
    given = {"gather": lambda _: gathered, "process_index": rank, "num_processes": len(gathered)}
    return SimpleNamespace(**given, device=torch.device(device))


@pytest.mark.parametrize(
    ("machines", "rank", "number"),
    [
        ("a", 0, None),  # alone, so there is nothing to count
        ("aa", 1, "2"),
        ("aabbb", 3, "3"),
        ("aaba", 2, "1"),
    ],
)
def test_processes_count_those_of_their_machine(
    machines: str, rank: int, number: str | None, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "machine_id", lambda: machines[rank])
    count_here(ranks_of(list(machines), rank), counted=False)
    assert environment.get("LOCAL_WORLD_SIZE") == number
    environment["LOCAL_WORLD_SIZE"] = "8"
    count_here(ranks_of(list(machines), rank), counted=True)
    assert environment["LOCAL_WORLD_SIZE"] == "8"


@pytest.mark.slow
def test_weights_are_shared_by_processes_that_nobody_has_counted(model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = ("--load_tensors", "--plan", "lean", "--max_train_steps", 1, "--gradient_accumulation_steps", 1)
    command = python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "lora", *flags))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    said = [finish(rank) for rank in [start(command, RANK=str(rank), **shared) for rank in range(2)]]
    assert "streamed weights: one copy in host memory for the 2 processes of this machine" in said[0]


def test_processes_with_the_same_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="u"))
    with pytest.raises(
        UsageError, match="processes 1 and 3 have the same GPU, and each needs one of its own; start at"
    ):
        check_own_gpus(ranks_of(["a 0", "a 1", "b 1", "a 1"], 0, "cuda"))
    check_own_gpus(ranks_of(["a 0", "a 1"], 0, "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    check_own_gpus(ranks_of(["a 0"], 0, "cuda"))
    check_own_gpus(ranks_of(["a 0", "a 0"], 0, "cpu"))
