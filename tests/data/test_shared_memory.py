"""shared_memory.py and the loader: with a small /dev/shm fewer workers run, no batch is lost, and nothing hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import LORA_SCRIPT, ROOT, Forked, equal, lora_flags, python, weights
from small_shm import NO_PRIVILEGE, mount_small

from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.data import dataset as module
from cogvideox.data import shared_memory
from cogvideox.data.cache import TensorCache, open_index
from cogvideox.data.dataset import LatentDataset, batches_of, build_loader, collate
from cogvideox.data.sampler import BucketBatchSampler, Order, Visit
from cogvideox.data.shared_memory import (
    BATCHES_IN_USE,
    batch_bytes,
    bytes_needed,
    choose_workers,
    free_shared_memory,
    pages,
    workers_with_room,
)
from cogvideox.errors import UsageError

MIB = 2**20


def with_small(size: int, work: Callable[[], Any], seconds: float = 100) -> Any:
    """Returns what ``work`` returns in a process with a small /dev/shm, and fails if it does not end in time."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            mount_small(size)
            answer = {"result": work()}
        except PermissionError as error:
            answer = {"skip": str(error)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(sender, json.dumps(answer).encode())
        os._exit(0)
    os.close(sender)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"hangs: not done after {seconds} s", pytrace=False)
        time.sleep(0.02)
    with open(receiver, "rb") as stream:
        answer = json.loads(stream.read())
    if "skip" in answer:
        pytest.skip(f"mounts need a privilege that is not there: {answer['skip']}")
    assert "error" not in answer, answer["error"]
    return answer["result"]


@pytest.fixture
def data(model: Path, tensors: Path) -> LatentDataset:
    return LatentDataset(TensorCache(tensors), open_index(tensors), read_geometry(ModelFlags(str(model))), 0, 0.0)


def sampler_of(data: LatentDataset, steps: int = 20) -> BucketBatchSampler:
    samples = data.index.samples
    order = Order([sample.id for sample in samples], [sample.bucket for sample in samples], 2, 0)
    return BucketBatchSampler(order, 2, 1, 0, 1, 0, steps)


def test_the_bytes_of_a_batch_are_those_that_are_shared(data: LatentDataset) -> None:
    batch = collate([data[Visit(0, 0)], data[Visit(1, 1)]])
    assert batch_bytes(data.geometry, data.index, 2) == pages(tensor.nbytes for tensor in batch.tensors().values())


def test_the_number_of_workers_that_fit() -> None:
    batch = 11 * MIB  # one clip of 49x480x720
    assert workers_with_room(8, batch, 200 * MIB) == (8, 2)
    assert workers_with_room(8, batch, 140 * MIB) == (8, 1)
    assert workers_with_room(8, batch, 64 * MIB) == (3, 1)
    assert workers_with_room(2, batch, 64 * MIB) == (2, 1)
    assert workers_with_room(1, batch, 64 * MIB) == (1, 2)
    assert workers_with_room(8, batch, 30 * MIB) == (0, 0)
    assert workers_with_room(0, batch, 0) == (0, 0)
    for free in range(0, 300, 7):
        workers, prefetch = workers_with_room(8, batch, free * MIB)
        assert not workers or bytes_needed(workers, prefetch, batch) <= free * MIB


def test_a_line_reports_fewer_workers_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: 64 * MIB)
    workers, prefetch, line = choose_workers(8, 11 * MIB, processes=1)
    assert (workers, prefetch) == (3, 1)
    assert line == (
        "--dataloader_num_workers 8: needs 198.2 MiB of /dev/shm, 64.0 MiB are free; workers: 3 with 1 batch each; "
        "more shared memory (docker run --shm-size 2g) allows all"
    )
    assert choose_workers(8, 11 * MIB, processes=4)[0] == 0
    assert choose_workers(8, MIB, processes=1) == (8, 2, None)
    assert choose_workers(0, 11 * MIB, processes=1) == (0, 0, None)


def test_a_missing_folder_has_no_room_and_one_without_a_limit_has_all(tmp_path: Path) -> None:
    assert free_shared_memory(str(tmp_path / "none")) == 0
    assert free_shared_memory("/proc") == sys.maxsize  # like a tmpfs without a limit, it reports 0 blocks


@pytest.mark.fault("memory: a small /dev/shm")
def test_a_small_shared_memory_trains_the_same_lora(
    model: Path, tensors: Path, reference: Path, tmp_path: Path
) -> None:
    """Eight workers would need three times the shared memory that is free."""
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--dataloader_num_workers", 8)
    process = Forked(python(ROOT / "tests" / "shared" / "small_shm.py", 400_000, LORA_SCRIPT, *flags))
    output, _ = process.communicate()
    if process.returncode == NO_PRIVILEGE:
        pytest.skip(f"mounts need a privilege that is not there: {output}")
    assert process.returncode == 0, output
    assert equal(weights(tmp_path / "lora"), weights(reference))
    assert "--dataloader_num_workers 8: needs " in output


@pytest.mark.fault("memory: a small /dev/shm that fills up while batches are loaded")
@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_a_batch_without_room_is_an_error_and_does_not_hang(data: LatentDataset, strategy: str) -> None:
    """If too many workers are started, both sharing strategies of torch fill /dev/shm."""

    def load() -> str:
        torch.multiprocessing.set_sharing_strategy(strategy)
        try:
            with batches_of(build_loader(data, sampler_of(data), 4, 2, pin=False)) as batches:
                kept.extend(batches)  # so that no batch is freed
        except UsageError as error:
            return str(error)
        return "no error"

    kept: list[Any] = []
    line = with_small(bytes_needed(4, 2, batch_bytes(data.geometry, data.index, 2)), load, seconds=30)
    assert line.startswith("a worker of the loader cannot send a batch (unable to allocate shared memory")
    assert "--dataloader_num_workers 0" in line


@pytest.mark.fault("memory: a batch that a worker of the loader cannot send")
def test_a_batch_that_cannot_be_sent_is_an_error_and_does_not_hang(
    data: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a socket must not have more than 107 characters."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", str(deep))  # type: ignore[attr-defined]
    loader = build_loader(data, sampler_of(data), 1, 1, pin=False)
    with pytest.raises(UsageError) as error, batches_of(loader) as batches:
        next(batches)
    assert str(error.value).startswith("a worker of the loader cannot send a batch (AF_UNIX path too long); run again")


def test_errors_of_the_training_keep_all_lines(data: LatentDataset) -> None:
    with (
        pytest.raises(UsageError, match=r"^first\nsecond$"),
        batches_of(build_loader(data, sampler_of(data), 1, 1, False)),
    ):
        raise UsageError(["first", "second"])


class Silent(LatentDataset):
    """Hangs like a read from a disk that does not answer."""

    def __getitem__(self, visit: Visit) -> Any:
        time.sleep(60)


class Dies(LatentDataset):
    """Ends like a process that the kernel kills for lack of memory."""

    def __getitem__(self, visit: Visit) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def of_kind(kind: Any, data: LatentDataset) -> LatentDataset:
    made: LatentDataset = kind(data.cache, data.index, data.geometry, 0, 0.0)
    return made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOADER_SECONDS", 0.5)
    # This is how long a sleeping worker may take to exit.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)


@pytest.mark.fault("data: a disk that does not answer a worker")
@pytest.mark.usefixtures("impatient")
def test_a_batch_that_does_not_arrive_ends_the_run(data: LatentDataset) -> None:
    loader = build_loader(of_kind(Silent, data), sampler_of(data), 1, 1, pin=False)
    with pytest.raises(UsageError) as error, batches_of(loader) as batches:
        next(batches)
    assert str(error.value).startswith("--dataloader_num_workers 1: no batch came for 0.5 s; ")
    assert "/dev/shm" in str(error.value)


@pytest.mark.fault("memory: a worker of the loader is killed")
@pytest.mark.parametrize("wait", [next, lambda _: time.sleep(60)], ids=["while it is waited for", "at another time"])
def test_a_killed_worker_is_reported_in_one_line(wait: Callable[[Any], object], data: LatentDataset) -> None:
    loader = build_loader(of_kind(Dies, data), sampler_of(data), 1, 1, pin=False)
    with pytest.raises(UsageError, match=r"^--dataloader_num_workers 1: ") as error, batches_of(loader) as batches:
        wait(batches)
    assert "is killed by signal: Killed" in str(error.value) or "exited unexpectedly" in str(error.value)
    assert "\n" not in str(error.value)


def test_batches_that_a_loader_holds_beyond_the_waiting_ones() -> None:
    assert bytes_needed(0, 2, MIB) == BATCHES_IN_USE * MIB
