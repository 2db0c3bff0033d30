"""disk_room.py: what a run will write is predicted and compared with the free disk space before the first step."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import run_alone
from running import WEIGHTS, finish, fork_ranks, lora_flags, python, train
from safetensors.torch import load_file

from cogvideox import loop
from cogvideox.config import args
from cogvideox.config.flags import TrainFlags
from cogvideox.config.options import LoraOptions
from cogvideox.errors import DiskError
from cogvideox.optimizer.engine import STATE_NAME
from cogvideox.runtime import disk_room
from cogvideox.runtime.disk_room import (
    DiskNeeds,
    check_disk,
    checkpoint_bytes,
    new_at_once,
    result_bytes,
    seconds_to_write,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("first", "total", "every", "limit", "best", "there", "expected"),
    [
        (0, 1000, 500, None, False, 0, 2),
        (0, 1001, 500, None, False, 0, 3),  # the last step is saved too
        (0, 10, 500, None, False, 0, 1),
        (500, 1000, 500, None, False, 1, 1),
        (1000, 1000, 500, None, False, 2, 0),
        (0, 5000, 500, 1, False, 0, 2),  # a new one is complete before the oldest is deleted
        (0, 5000, 500, 2, True, 0, 4),  # and the best one is kept in addition
        (0, 1000, 500, 5, True, 0, 2),
        (500, 5000, 500, 2, False, 2, 1),
        (500, 5000, 500, 2, False, 9, 1),
    ],
)
def test_how_many_checkpoints_a_run_adds(
    first: int, total: int, every: int, limit: int | None, best: bool, there: int, expected: int
) -> None:
    train = TrainFlags(checkpointing_steps=every, checkpoints_total_limit=limit, keep_best=best)
    assert new_at_once(train, first, total, there) == expected


@pytest.mark.parametrize(("total", "limit", "expected"), [(1000, 2, 3), (2, 2, 2), (1000, None, 1)])
def test_checkpoints_by_the_clock_fill_the_limit(total: int, limit: int | None, expected: int) -> None:
    """Without a limit, their number is only known with the time of a step."""
    train = TrainFlags(checkpointing_steps=5000, save_every_minutes=30, checkpoints_total_limit=limit)
    assert new_at_once(train, 0, total) == expected


@pytest.mark.parametrize(
    ("minutes", "first", "seconds", "expected"),
    [(30, 0, 3.6, 3), (30, 500, 3.6, 2), (1, 0, 3600, 1000), (0, 0, 0, 1000), (None, 0, 3.6, 1)],
)
def test_checkpoints_by_the_clock_follow_from_the_time_of_a_step(
    minutes: float | None, first: int, seconds: float, expected: int
) -> None:
    """A thousand steps of 3.6 seconds take an hour."""
    train = TrainFlags(checkpointing_steps=5000, save_every_minutes=minutes)
    assert new_at_once(train, first, 1000, seconds=seconds) == expected


def test_checkpoints_by_the_clock_are_counted_before_the_first_step(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are as many as the predicted time of a step says. On a CPU, no time is predicted."""
    make_plan: Any = loop.make_plan
    monkeypatch.setattr(loop, "make_plan", lambda *given: replace(make_plan(*given), mean_seconds=60.0))
    monkeypatch.setattr(disk_room, "free_disk_bytes", lambda folder: 300_000)
    flags = ("--load_tensors", "--plan", "lean", "--checkpointing_steps", 500, "--max_train_steps", 100)
    with pytest.raises(DiskError, match=r"\(51 checkpoints of .*; give --checkpoints_total_limit [1-9], or"):
        train(lora_flags(model, tensors, tmp_path / "lora", *flags, "--save_every_minutes", 2))
    assert not (tmp_path / "lora" / "metrics.jsonl").exists()


def refusal(
    monkeypatch: pytest.MonkeyPatch, free: float, there: int = 0, may_shrink: bool = False, **flags: object
) -> str:
    """Returns the message for a run of ten checkpoints of 10 GiB, or an empty text if it fits."""
    train = TrainFlags(checkpointing_steps=1, **flags)  # type: ignore[arg-type]
    monkeypatch.setattr(disk_room, "free_disk_bytes", lambda folder: int(free * GIB))
    needs = DiskNeeds(10 * GIB, 2 * GIB, new_at_once(train, there, 10, there), may_shrink)
    try:
        check_disk(Path("out"), needs, train, there)
    except DiskError as error:
        return str(error)
    return ""


def test_a_limit_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(monkeypatch, 42)
    sizes = "102.0 GiB needed (10 checkpoints of 10.0 GiB and 2.0 GiB of result), 42.0 GiB free"
    assert text == (
        f"out: No space left on device, {sizes}; give --checkpoints_total_limit 3, or free some space and run the same "
        "command again"
    )
    assert "(1 checkpoint of 10.0 GiB and 2.0 GiB of result)" in refusal(monkeypatch, 11, there=9)
    assert refusal(monkeypatch, 42, checkpoints_total_limit=3) == ""
    assert "give --checkpoints_total_limit 2, or" in refusal(monkeypatch, 42, keep_best=True)
    assert refusal(monkeypatch, 42, keep_best=True, checkpoints_total_limit=2) == ""
    assert refusal(monkeypatch, 102) == ""


def test_checkpoints_that_exist_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give --checkpoints_total_limit 3, or" in refusal(monkeypatch, 22, there=2)
    assert refusal(monkeypatch, 22, there=2, checkpoints_total_limit=3) == ""


def test_without_a_limit_that_fits_only_space_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (None, 1):
        assert refusal(monkeypatch, 21, checkpoints_total_limit=limit).endswith(
            "GiB free; free some space and run the same command again"
        )


def test_checkpoints_of_weights_only_are_named_if_no_limit_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    named = "give --checkpoint_weights_only --checkpoints_total_limit 1, or free some space"
    assert named in refusal(monkeypatch, 6, may_shrink=True)  # the last one, a new one, and the result
    assert named not in refusal(monkeypatch, 5.9, may_shrink=True)
    assert named not in refusal(monkeypatch, 7.9, may_shrink=True, keep_best=True)
    assert "give --checkpoints_total_limit 1, or" in refusal(monkeypatch, 22, may_shrink=True)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_sizes_of_a_lora_are_those_of_its_files(init: str, model: Path, tensors: Path, tmp_path: Path) -> None:
    """PiSSA saves its initial matrices, too."""
    flags = lora_flags(model, tensors, tmp_path, "--load_tensors", "--max_train_steps", 1, "--init_lora_weights", init)
    assert train(flags) == 0
    options = args.parse(LoraOptions, None, flags, ())
    files = [*tmp_path.glob("checkpoint-1/*.safetensors"), tmp_path / WEIGHTS]
    *of_checkpoint, result = (sum(t.nbytes for t in load_file(path).values()) for path in files)
    masters = load_file(tmp_path / "checkpoint-1" / STATE_NAME)
    number = sum(tensor.numel() for name, tensor in masters.items() if name.startswith("master/"))
    assert result == result_bytes(options, number, torch.float32)
    predicted = checkpoint_bytes(options, number, torch.float32, torch.device("cpu"), refers=False)
    assert sum(of_checkpoint) == pytest.approx(predicted, rel=0.01)


def test_the_rate_of_the_disk_is_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0])
    monkeypatch.setattr(disk_room.time, "monotonic", lambda: next(times))
    assert seconds_to_write(run_alone(tmp_path), 4 * disk_room.PROBE_LIMIT) == 8.0
    assert list(tmp_path.iterdir()) == []


def test_the_rate_of_the_disk_does_not_include_what_is_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fast disk, random numbers took two thirds of the time."""
    now, make = [0.0], os.urandom

    def slow(size: int) -> bytes:
        now[0] += 100.0
        return make(size)

    monkeypatch.setattr(os, "urandom", slow)
    monkeypatch.setattr(disk_room.time, "monotonic", lambda: now[0])
    assert seconds_to_write(run_alone(tmp_path), 4 * disk_room.PROBE_LIMIT) == 0.0
    assert now[0] > 0


def test_the_measured_file_cannot_be_compressed() -> None:
    content = disk_room.random_bytes(3 * 2**20)
    assert len(zlib.compress(bytes(content.numpy()), 1)) > 0.99 * len(content)
    assert disk_room.random_bytes(disk_room.RANDOM_BYTES + 5).shape == (disk_room.RANDOM_BYTES + 5,)
    assert disk_room.random_bytes(0).shape == (0,)


def test_the_announced_seconds_are_those_of_ranks_that_share_a_disk(tmp_path: Path) -> None:
    """Two ranks write their parts of each file to a disk that serves one at a time; the first then reads all twice."""
    script = Path(__file__).parents[1] / "shared" / "announced_save.py"
    texts = [finish(rank) for rank in fork_ranks(2, python(script, tmp_path))]
    announced, taken = json.loads((tmp_path / "seconds.json").read_text())
    assert taken > 1
    assert announced == pytest.approx(taken, rel=0.2)
    assert not list(tmp_path.glob(".probe*"))
    assert [text.count("a second were measured), during which training waits") for text in texts] == [1, 0]
