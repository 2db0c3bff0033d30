"""Complete scripts in separate processes on disks that are full, fail, or lack some functions."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_faults import INJECTED, NO_LOCKS
from running import (
    LORA_SCRIPT,
    PREPARE_SCRIPT,
    PROMPT,
    SIZE,
    Forked,
    equal,
    finish,
    lora_flags,
    losses,
    python,
    train,
    weights,
)
from safetensors.torch import load_file

from cogvideox.data.cache import TensorCache, open_index
from cogvideox.errors import DiskError
from cogvideox.runtime.checkpoint_files import checkpoints, damage_of


@pytest.mark.fault("disk: no POSIX locks, and folders that cannot be fsynced", times=2)
def test_a_file_system_without_locks_and_folder_fsync_works(
    model: Path, clips: Path, tensors: Path, reference: Path, tmp_path: Path
) -> None:
    """Such are CIFS, 9p, some FUSE file systems, and Lustre without locks. Each lack is reported once."""
    output, prepared = tmp_path / "out", tmp_path / "prepared"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT)
    no_fsync = (r"fsync \S*/(out|\.checkpoint-\d+\.tmp)$", 0, errno.EINVAL)
    run = Forked(python(LORA_SCRIPT, *flags), disk=[NO_LOCKS, no_fsync])
    prepare = ["--model_id", model, "--data_root", clips, "--output_dir", prepared, "--id_token", "TOKEN", *SIZE]
    job = Forked(python(PREPARE_SCRIPT, *prepare), disk=[NO_LOCKS])
    said = finish(run)
    assert [said.count(text) for text in ("cannot fsync a folder", "has no locks")] == [1, 1]
    assert losses(output) == losses(reference)
    assert equal(weights(output), weights(reference))
    assert finish(job).count("has no locks") == 1
    assert open_index(prepared).samples == open_index(tensors).samples
    assert not [*tmp_path.rglob("*.owner*"), *tmp_path.rglob("*.now")]


# -- disks that are full or fail ---------------------------------------------------------------------------------------

SHORT = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--use_ema")
SHORT += ("--num_inference_steps", 1, "--gradient_accumulation_steps", 1)
FULL, BROKEN = errno.ENOSPC, errno.EIO
# Each entry is the expression of disk_faults.refuse, its how manieth match fails, with which error, and what is safe.
FAULTS = [
    (r"write \S*/\.config\.json", 1, FULL, "there is no checkpoint yet"),
    (r"write \S*/\.step-000000\S*\.tmp$", 1, FULL, "there is no checkpoint yet"),
    (r"write \S*/metrics\.jsonl$", 3, FULL, "checkpoint-1, the newest checkpoint, is safe"),
    (r"write \S*/optimizer\.safetensors$", 1, FULL, "checkpoint-1, the newest checkpoint, is safe"),
    (r"write \S*/ema\.safetensors$", 1, BROKEN, "checkpoint-1, the newest checkpoint, is safe"),
    (r"write \S*/progress\.json$", 1, errno.EDQUOT, "checkpoint-1, the newest checkpoint, is safe"),
    (r"fsync \S*/\.checkpoint-2\.tmp/optimizer\S*$", 1, BROKEN, "checkpoint-1, the newest checkpoint, is safe"),
    (r"os.rename \S*/\.checkpoint-3\.tmp ", 1, errno.EROFS, "checkpoint-2, the newest checkpoint, is safe"),
    (r"fsync \S*/\.step-000003\S*\.tmp$", 1, BROKEN, "checkpoint-3, the newest checkpoint, is safe"),
    (r"write \S*/\.curves\.png\S*\.tmp$", 1, FULL, "checkpoint-3, the newest checkpoint, is safe"),
    (r"write \S*/\.weights\.tmp/", 1, FULL, "checkpoint-3, the newest checkpoint, is safe"),
    (r"write \S*/\.recipe\.json", 1, errno.EACCES, "checkpoint-3, the newest checkpoint, is safe"),
]


def check_line(said: str, folder: Path, number: int, safe: str) -> None:
    """Asserts that the output ends with one problem in one line: the folder, the reason, and what is safe."""
    lines = said.splitlines()
    assert "Traceback" not in said
    assert lines[-2].endswith(": 1 problem")
    assert f"{folder}" in lines[-1]
    assert f": {os.strerror(number)}" in lines[-1]
    assert safe in lines[-1]
    assert "run the same command again" in lines[-1]
    assert (" free" in lines[-1].split("; ")[0]) == (number in (errno.ENOSPC, errno.EDQUOT))


def check_complete(folder: Path) -> None:
    """Asserts that every file with a final name is complete, and that no temporary file remains."""
    assert all(damage_of(path) is None for path in checkpoints(folder))
    for path in folder.rglob("*.safetensors"):
        load_file(path)
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def undisturbed(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert train(short_flags(model, tensors, output)) == 0
    return output


def short_flags(model: Path, tensors: Path, output: Path) -> list[str]:
    return lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT, *SHORT)


@pytest.mark.long
@pytest.mark.fault("disk: a full or failing disk while training", times=len(FAULTS))
def test_a_run_ends_with_one_line_and_resumes(model: Path, tensors: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Each fault occurs in a run that continues from where the previous fault ended it."""
    output = tmp_path / "out"
    command = python(LORA_SCRIPT, *short_flags(model, tensors, output))
    for moment, nth, number, safe in FAULTS:
        check_line(finish(Forked(command, disk=[(moment, nth, number)]), 2), output, number, safe)
        check_complete(output)
    finish(Forked(command))
    assert losses(output) == losses(undisturbed)
    assert equal(weights(output), weights(undisturbed))


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_first_step(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr("cogvideox.runtime.disk_room.free_disk_bytes", lambda folder: 1000)
    with pytest.raises(
        DiskError,
        match=r"/out: No space left on device, \d+\.\d KiB needed \(\d c.* of result\), 1000 bytes free; there",
    ):
        train(lora_flags(model, tensors, output, "--load_tensors"))
    assert losses(output) == [] if (output / "metrics.jsonl").exists() else True


CHANGES = r"^(open|write|fsync|os\.rename|os\.mkdir) \S*"
PREPARE_FAULTS = [
    (r"write \S*/ledger\.jsonl$", 1, errno.ENOSPC),
    (r"write \S*\.safetensors\S*\.tmp$", 3, errno.ENOSPC),
    (r"fsync \S*\.safetensors\S*\.tmp$", 3, errno.EIO),
    (r"os.rename \S*\.safetensors\S*\.tmp ", 3, errno.EROFS),
    (r"write \S*/\.index\.json", 1, errno.EDQUOT),
    (r"write \S*\.png\S*\.tmp$", 1, errno.ENOSPC),
]


def prepare_command(model: Path, clips: Path, output: Path) -> list[object]:
    flags = ["--model_id", model, "--data_root", clips, "--output_dir", output, "--id_token", "TOKEN", *SIZE]
    return python(PREPARE_SCRIPT, *flags)


def same_tensors(first: Path, second: Path) -> None:
    assert open_index(first) == open_index(second)
    caches = TensorCache(first), TensorCache(second)
    for key in open_index(first).keys:
        assert equal(*(cache.read(key) for cache in caches))


@pytest.mark.slow
@pytest.mark.fault("disk: a full or failing disk while preparing", times=len(PREPARE_FAULTS))
def test_preparation_ends_with_one_line_and_continues(model: Path, clips: Path, tensors: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = prepare_command(model, clips, output)
    for moment, nth, number in PREPARE_FAULTS:
        said = finish(Forked(command, disk=[(moment, nth, number)]), 2)
        check_line(said, output, number, "the tensors encoded so far are safe")
        check_complete(output)
    finish(Forked(command))
    same_tensors(output, tensors)


# -- every moment ------------------------------------------------------------------------------------------------------


def sweep(
    command_of: Callable[[Path], list[object]], check: Callable[[Path], None], folder: Path, number: int, first: int
) -> int:
    """Lets every second change of the disk fail with an error number, and returns how many changes there were.

    Args:
        command_of: Returns the command for an output folder.
        check: Checks the output folder of a finished command.
        folder: Where the output folders are made.
        number: The error number.
        first: The first change that fails, counted from 1.
    """
    for nth in itertools.count(first, 2):
        output = folder / str(nth) / "out"
        output.parent.mkdir()
        command = command_of(output)
        process = Forked(command, disk=[(f"{CHANGES}/{nth}/out", nth, number)])
        said, _ = process.communicate()
        if INJECTED not in said:  # The command finished before this change.
            assert process.returncode == 0
            return nth
        assert process.returncode in (0, 2), (nth, said[-3000:])
        assert "Traceback" not in said, (nth, said[-3000:])
        check_complete(output)
        if process.returncode:
            finish(Forked(command))
        check(output)
    raise AssertionError


ERRORS = [(errno.ENOSPC, 1), (errno.EIO, 2)]


@pytest.mark.long
@pytest.mark.parametrize(("number", "first"), ERRORS, ids=["full", "broken"])
@pytest.mark.fault("disk: a failure at every moment of a LoRA run", times=100)
def test_every_moment_of_training(
    number: int,
    first: int,
    model: Path,
    tensors: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    def check(output: Path) -> None:
        assert losses(output) == losses(undisturbed)
        assert equal(weights(output), weights(undisturbed))

    flags = lambda output: python(LORA_SCRIPT, *short_flags(model, tensors, output))  # noqa: E731
    assert sweep(flags, check, tmp_path, number, first) > 100


@pytest.mark.long
@pytest.mark.parametrize(("number", "first"), ERRORS, ids=["full", "broken"])
@pytest.mark.fault("disk: a failure at every moment of the preparation", times=30)
def test_every_moment_of_preparation(
    number: int, first: int, model: Path, clips: Path, tensors: Path, tmp_path: Path
) -> None:
    command = lambda output: prepare_command(model, clips, output)  # noqa: E731
    assert sweep(command, lambda output: same_tensors(output, tensors), tmp_path, number, first) > 30


# -- small file systems ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Returns a function that makes a file system of a size in bytes, or changes its size. Only root may mount it."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted: list[Any] = []

    def resized(size: int) -> Path:
        how = ["-o", f"remount,size={size}"] if mounted else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        if subprocess.run(["mount", *how, str(folder)], check=False, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(size)
        return folder

    yield resized
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.fault("disk: a small file system while training")
def test_a_run_on_a_small_disk_resumes_when_there_is_space(
    share: float,
    model: Path,
    tensors: Path,
    undisturbed: Path,
    small_disk: Callable[[int], Path],
) -> None:
    output = small_disk(int(share * size_of(undisturbed))) / "out"
    command = python(LORA_SCRIPT, *short_flags(model, tensors, output))
    check_line(finish(Forked(command), 2), output, errno.ENOSPC, "checkpoint")
    check_complete(output)
    small_disk(2**28)
    finish(Forked(command))
    assert losses(output) == losses(undisturbed)
    assert equal(weights(output), weights(undisturbed))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5])
@pytest.mark.fault("disk: a small file system while preparing")
def test_preparation_on_a_small_disk_continues_when_there_is_space(
    share: float, model: Path, clips: Path, tensors: Path, small_disk: Callable[[int], Path]
) -> None:
    output = small_disk(int(share * size_of(tensors))) / "out"
    command = prepare_command(model, clips, output)
    check_line(finish(Forked(command), 2), output, errno.ENOSPC, "the tensors encoded so far are safe")
    check_complete(output)
    small_disk(2**28)
    finish(Forked(command))
    same_tensors(output, tensors)
