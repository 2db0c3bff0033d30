"""Tests that processes of any launch prepare one folder together, with real processes that are killed and suspended."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from preparing import tensor_files
from running import PREPARE_SCRIPT, SIZE, Forked, Moment, finish, fork_ranks, python, start
from waiting import eventually

from cogvideox.config.launch import adopt_tasks
from cogvideox.data.cache import Ledger, NewRecords
from cogvideox.data.claims import CLAIMS_NAME, Claims, offset_of
from cogvideox.errors import LostRankError
from cogvideox.runtime.ranks import unconnected

NUM_CLIPS, NUM_CAPTIONS = 6, 7  # the empty caption is embedded, too
KEYS = [f"{number:015x}" + 49 * "0" for number in range(8)]
FEW = ("--dataloader_num_workers", "1")  # then a process claims few clips ahead
Suspended = Callable[[Forked], Forked]
WRITE = r"open .*\.safetensors"  # a process is about to write a tensor, whose key it has claimed


@pytest.fixture(scope="module")
def command(tiny: Callable[[str], Path], clips: Path) -> list[object]:
    """The command that prepares six clips; the output folder is to be added."""
    return python(PREPARE_SCRIPT, "--model_id", tiny("5b"), "--data_root", clips, *SIZE, *FEW, "--output_dir")


@pytest.fixture(scope="module")
def alone(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one process has prepared."""
    folder = tmp_path_factory.mktemp("alone")
    finish(Forked([*command, folder]))
    return folder


def rank_of(number: int, rank: int, command: list[object], moment: Moment | None = None) -> Forked:
    """Starts one process of a launch by itself, with the environment that the launcher gives it."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)}
    return Forked(command, moment, ACCELERATE_USE_CPU="true", **environment)


def check_equal(folder: Path, alone: Path, encoded_again: int = 0) -> None:
    """Checks that a folder is like that of one process, bit for bit, and how many clips were encoded twice."""
    assert tensor_files(folder) == tensor_files(alone)
    assert len(tensor_files(folder)) == NUM_CLIPS + NUM_CAPTIONS
    assert (folder / "index.json").read_bytes() == (alone / "index.json").read_bytes()
    records, measured = ((folder / name).read_text().splitlines() for name in ("ledger.jsonl", "health.jsonl"))
    assert (len(records), len(measured)) == (NUM_CLIPS, NUM_CLIPS + encoded_again)
    assert sorted(map(str, folder.iterdir())) == sorted(str(folder / path.name) for path in alone.iterdir())


# -- whole preparations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.fault("ranks: several processes prepare the same folder")
def test_several_ranks_make_the_same_files_as_one(
    command: list[object], alone: Path, tmp_path: Path, number: int
) -> None:
    texts = [finish(rank) for rank in fork_ranks(number, [*command, tmp_path / "out"])]
    check_equal(tmp_path / "out", alone)
    assert [f"6 samples in {tmp_path / 'out'}" in text for text in texts] == [True] + [False] * (number - 1)


@pytest.mark.fault("ranks: two jobs prepare the same folder")
def test_two_launches_divide_the_work_and_wait_for_each_other(
    command: list[object], alone: Path, tmp_path: Path, suspended: Suspended
) -> None:
    folder = tmp_path / "out"
    first = suspended(Forked([*command, folder], (WRITE, 9, signal.SIGSTOP)))
    before = len(tensor_files(folder))
    second = Forked([*command, folder])
    # The first launch has claimed the clip that it is about to write, and those that its worker decodes.
    eventually(lambda: len(tensor_files(folder)) > before)
    time.sleep(1)
    assert second.poll() is None
    assert not (folder / "index.json").exists()
    first.send_signal(signal.SIGCONT)
    for process in (first, second):
        assert f"6 samples in {folder}" in finish(process)
    check_equal(folder, alone)


@pytest.mark.fault("kills: an interruption of the preparation")
def test_a_rank_takes_over_the_work_of_one_that_is_killed_and_that_one_can_be_restarted_alone(
    command: list[object], alone: Path, tmp_path: Path, suspended: Suspended
) -> None:
    folder = tmp_path / "out"
    killed = suspended(rank_of(2, 1, [*command, folder], (WRITE, 9, signal.SIGSTOP)))
    before = len(tensor_files(folder))
    other = rank_of(2, 0, [*command, folder])
    eventually(lambda: len(tensor_files(folder)) > before)
    time.sleep(1)
    assert other.poll() is None  # it waits for what the first one has claimed
    killed.send_signal(signal.SIGKILL)
    finish(other)
    check_equal(folder, alone, encoded_again=len(health(folder)) - NUM_CLIPS)
    measured = health(folder)
    assert NUM_CLIPS < len(measured) <= NUM_CLIPS + 2  # a clip is measured before the previous one is written
    finish(rank_of(2, 1, [*command, folder]))
    assert health(folder) == measured


def health(folder: Path) -> list[str]:
    """Returns a line for each clip that was encoded."""
    return (folder / "health.jsonl").read_text().splitlines()


@pytest.mark.fault("kills: an interruption of the preparation", times=2)
def test_another_number_of_ranks_continues(command: list[object], alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for rank in (1, 0):
        assert rank_of(2, rank, [*command, folder], (WRITE, 4)).wait() == -signal.SIGKILL
    assert not (folder / "index.json").exists()
    before = tensor_files(folder)
    assert len(before) == 6
    for process in fork_ranks(3, [*command, folder]):
        finish(process)
    check_equal(folder, alone)
    assert before.items() <= tensor_files(folder).items()


@pytest.mark.fault("ranks: one of two is suspended while clips are prepared")
def test_a_rank_that_waits_in_vain_names_the_folder_and_the_flag(
    command: list[object], alone: Path, tmp_path: Path, suspended: Suspended
) -> None:
    folder = tmp_path / "out"
    silent = suspended(rank_of(2, 1, [*command, folder], (WRITE, 1, signal.SIGSTOP)))
    text = finish(rank_of(2, 0, [*command, folder, "--nccl_timeout", 1]), 1)
    rule = f"{folder}: another process has claimed 1 part of the work and has finished none for 1 s"
    assert f"prepare_dataset.py: {rule}; end it, and the same command continues" in text
    assert "Traceback" not in text
    silent.send_signal(signal.SIGKILL)
    silent.wait()
    finish(rank_of(2, 0, [*command, folder]))
    check_equal(folder, alone)


# -- claims ------------------------------------------------------------------------------------------------------------


def test_a_rank_begins_with_the_keys_of_its_shard(tmp_path: Path) -> None:
    """The hash of a key alone decides its shard, so the other keys do not change it."""
    for shard in range(3):
        with Claims(tmp_path, lambda key: False, shard, 3) as claims:
            taken = [offset_of(key) for key in claims.take(KEYS)]
        assert taken == [number for step in range(3) for number in range(8) if number % 3 == (shard + step) % 3]
    assert (tmp_path / CLAIMS_NAME).stat().st_size == 0


def test_what_is_done_is_not_claimed_and_claims_end_with_the_work(tmp_path: Path) -> None:
    done = {KEYS[0], KEYS[2]}
    with Claims(tmp_path, done.__contains__) as claims:
        for key in claims.take(KEYS):
            assert len(claims._held) <= 2
            if key != KEYS[1]:
                done.add(key)
        assert list(claims._held) == [KEYS[1], KEYS[7]]
    assert done == {*KEYS} - {KEYS[1]}


def test_a_key_that_is_done_between_the_test_and_the_claim_is_left_out(tmp_path: Path) -> None:
    looks: list[str] = []

    def is_done(key: str) -> bool:
        looks.append(key)
        return looks.count(KEYS[1]) == 2

    with Claims(tmp_path, is_done) as claims:
        assert list(claims.take(KEYS[1:2])) == []


def test_a_wait_ends_when_nothing_is_done_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Claims, "_claim", lambda self, key: False)
    monkeypatch.setattr("cogvideox.data.claims.PAUSE", 0.01)
    asked: list[str] = []

    def is_done(key: str) -> bool:
        asked.append(key)
        return key != KEYS[-1] and len(asked) > 50

    with Claims(tmp_path, is_done) as claims, pytest.raises(LostRankError, match=r"claimed 1 part .* none for 0.2 s"):
        claims.wait(KEYS, 0.2)


def test_new_records_are_those_that_any_process_adds(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append([{"request": "old"}])
    new = NewRecords(ledger)
    assert not new.has("old")
    ledger.append([{"request": "a"}])
    with open(ledger.path, "a") as file:
        file.write(json.dumps({"request": "b"})[:-3])  # another process is writing it
    assert new.has("a")
    assert not new.has("b")
    with open(ledger.path, "a") as file:
        file.write(json.dumps({"request": "b"})[-3:] + "\n")
    assert new.has("b")
    assert new.names == {"a", "b"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, True)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, (2, 4, False)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0"}, (0, 8, True)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, False)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, True)),  # a batch script, which srun did not start
    ],
)
def test_launchers_and_srun_give_each_process_its_place(
    environment: dict[str, str], place: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # adopt_tasks changes it
    os.environ.update(environment)
    adopt_tasks()
    ranks = unconnected(600)
    assert (ranks.process_index, ranks.num_processes, ranks.is_main_process) == place
    assert ranks.gather(["own"]) == ["own"]


@pytest.mark.slow
def test_only_the_first_task_of_srun_prints_remarks(model: Path, clips: Path, tmp_path: Path) -> None:
    flags = ("--model_id", model, "--data_root", clips, "--output_dir", tmp_path / "out", *SIZE, "--revision", "main")
    command = python(PREPARE_SCRIPT, *flags)
    tasks = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_STEP_NUM_TASKS": "2"} for task in range(2)]
    said = [finish(process) for process in [start(command, **task) for task in tasks]]
    assert [text.count("--revision: has no effect; the model is a folder") for text in said] == [1, 0]
    refused = finish(start([*command, "--verify"], **tasks[1]), 2)
    assert "--verify: its processes must be connected, which srun does not do; start one task" in refused
