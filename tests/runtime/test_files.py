"""files.py: files are complete or absent, errors of disks become one line, and temporary files are removed."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cogvideox import files
from cogvideox.config import geometry, lora_file
from cogvideox.errors import DiskError
from cogvideox.files import (
    ABANDONED_AFTER,
    LOCK_NAME,
    check_room,
    disk_errors_converted,
    fsync,
    machine_name,
    remove_stale_temporaries,
    remove_temporaries,
    write_atomically,
)


def failing_fsync(monkeypatch: pytest.MonkeyPatch, number: int, folders: bool) -> None:
    """Makes fsync of folders, or of files, fail with an error number."""
    real = os.fsync

    def fails(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}") == folders:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fails)
    files.warn_once.cache_clear()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.fault("disk: a folder that cannot be fsynced")
def test_a_folder_that_cannot_be_fsynced_is_reported_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    failing_fsync(monkeypatch, number, folders=True)
    for _ in range(3):
        fsync(tmp_path)
        fsync(tmp_path / "file")
    assert capsys.readouterr().err.count("cannot fsync a folder") == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("folders", [False, True])
@pytest.mark.fault("disk: fsync fails")
def test_an_fsync_that_fails_raises(
    number: int, folders: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    failing_fsync(monkeypatch, number, folders)
    with pytest.raises(OSError, match=os.strerror(number)):
        fsync(tmp_path if folders else tmp_path / "file")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
def test_a_file_must_be_fsynced(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    failing_fsync(monkeypatch, number, folders=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        fsync(tmp_path / "file")


# -- errors of disks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("function", ["fsync", "replace", "write"])
@pytest.mark.fault("disk: a write fails")
def test_a_write_that_fails_leaves_the_old_content_and_no_temporary(
    number: int, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*(("builtins.open", fails) if function == "write" else (f"os.{function}", fails)))
    with pytest.raises(DiskError) as caught:
        write_atomically(path, b"x" * 5000)
    monkeypatch.undo()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{tmp_path}: {os.strerror(number)}")
    assert ("4.9 KiB needed" in text) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


class SafetensorError(Exception):
    """Has the name of safetensors' error, which is not an OSError."""


class FFmpegError(Exception):
    """Imitates FFmpeg's error, which has an error number but is not an OSError."""

    errno = errno.ENOSPC


def torch_error() -> RuntimeError:
    return RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (SafetensorError('I/O error: Input/output error (os error 5) at path "/x"'), "Input/output error"),
        (FFmpegError("No space"), "No space left on device"),
        (torch_error(), "Input/output error"),
    ],
    ids=["safetensors full", "safetensors broken", "FFmpeg", "PyTorch"],
)
def test_errors_of_libraries_about_a_disk_are_reported_too(error: Exception, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=reason), disk_errors_converted(tmp_path):
        raise error


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shape"), OSError(errno.EBADF, "bad"), OSError("text")])
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as passed, disk_errors_converted(tmp_path):
        raise error
    assert passed.value is error


def test_missing_space_is_reported_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_disk_bytes", lambda folder: 3 * 2**29)
    check_room(tmp_path, 3 * 2**29)
    with pytest.raises(DiskError, match=r": No space left on device, 2\.0 GiB needed, 1\.5 GiB free; free some space"):
        check_room(tmp_path, 2**31)


@pytest.mark.parametrize("refused", ["there", "there/closed/x"])
def test_what_cannot_be_read_is_to_be_made_readable(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there" / "closed").mkdir(parents=True)
    closed = {"there": tmp_path / "there", "there/closed/x": tmp_path / "there" / "closed"}[refused]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    for path, fix in ((tmp_path / refused, "make it readable"), (tmp_path / "new", "make it writable")):
        with pytest.raises(DiskError, match=f"^{path}: Permission denied; {fix} and run the same command again$"):
            raise files.disk_error(path, errno.EACCES, None)


@pytest.mark.parametrize("read", [lora_file.read_header, lambda path: list(geometry.damaged_files([Path(path)]))])
def test_weights_that_cannot_be_opened_are_not_said_to_be_missing(
    read: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(DiskError, match=f"^{path}: Permission denied; "), disk_errors_converted(Path("the disk")):
        read(str(path))


def test_a_file_that_is_too_large_does_not_need_more_space(tmp_path: Path) -> None:
    line = f"{tmp_path}: File too large; raise the limit of the size of a file (ulimit -f), or use a file system that "
    assert str(files.disk_error(tmp_path, errno.EFBIG, 2**40)).startswith(line)


def test_a_pickled_error_has_the_same_line() -> None:
    error = DiskError("/x: full", "free some space").knowing("checkpoint-2 is safe")
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error) == "/x: full; checkpoint-2 is safe; free some space"
    assert str(copied.knowing("more")) == str(error)


def test_free_space_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert files.free_disk_bytes(tmp_path / "not" / "there" / "yet")


# -- temporaries -------------------------------------------------------------------------------------------------------


def temporary(folder: Path, name: str, host: str, pid: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.{host}.{pid}.tmp"
    path.touch()
    return path


def test_the_process_that_has_the_lock_removes_all_temporary_files(tmp_path: Path) -> None:
    here = machine_name()
    nested = tmp_path / "cache" / "tensors"
    gone = [temporary(tmp_path / "a", "x.json", host, pid) for host in (here, "node-7", "a.b.c") for pid in (1, 99999)]
    kept = [temporary(nested, "x", "node-7", 1), tmp_path / "x.tmp", tmp_path / ".x.tmp", tmp_path / "a" / "x"]
    for path in (*kept[1:], tmp_path / LOCK_NAME, nested.parent / LOCK_NAME):  # Another job may have the inner lock.
        path.touch()
    remove_temporaries(tmp_path)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)


def test_only_stale_files_are_removed_if_others_may_write(tmp_path: Path) -> None:
    here, now = machine_name(), (tmp_path / "now")
    now.touch()
    old, new = (temporary(tmp_path, name, "node-7", 1) for name in ("old", "new"))
    dead, alive = temporary(tmp_path, "x", here, 2**22 + 1), temporary(tmp_path, "x", here, os.getpid())
    then = now.stat().st_mtime - ABANDONED_AFTER - 5
    os.utime(old, (then, then))
    remove_stale_temporaries(tmp_path)
    assert {path for path in (old, new, dead, alive) if path.exists()} == {new, alive}
