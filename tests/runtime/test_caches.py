"""caches.py: what makes later starts faster is kept in a private folder, and never replaces what a user has set."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import ROOT

from cogvideox import caches
from cogvideox.caches import FOLDERS, SETTLED, SWITCHES, cache_folder, keep_bytecode, remembered, use_caches


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns where the folder of the suite is; nothing is there yet, and no variable is set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in (*FOLDERS, *SWITCHES, "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    monkeypatch.setattr(sys, "pycache_prefix", sys.pycache_prefix)
    return tmp_path / "cache" / "cogvideox"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_tests_leave_the_caches_of_the_user_alone() -> None:
    assert cache_folder() == ROOT / ".cache" / "cogvideox"


def test_the_folder_is_private(cache: Path) -> None:
    assert cache_folder() == cache
    assert mode_of(cache) == 0o700


def test_a_folder_that_others_can_write_to_becomes_private(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert cache_folder() == cache
    assert mode_of(cache) == 0o700


def test_a_folder_of_another_user_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels are executed, so somebody else's must not be loaded."""
    owner = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: owner)
    assert cache_folder() is None
    use_caches()
    assert not FOLDERS.keys() & os.environ.keys()
    files = [cache.parent / "file"]
    files[0].write_text("content")
    assert remembered("kind", files, lambda: "computed") == "computed"


def test_a_folder_that_cannot_be_created_is_not_used(cache: Path) -> None:
    cache.parent.write_text("a file, where the folder would be")
    assert cache_folder() is None
    use_caches()
    assert not FOLDERS.keys() & os.environ.keys()


@pytest.mark.parametrize("value", [None, "", "relative/folder"])
def test_without_a_valid_variable_the_folder_is_in_the_home_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == tmp_path / "home" / ".cache" / "cogvideox"
    assert not (tmp_path / "relative").exists()


def test_libraries_keep_their_kernels_in_the_folder(cache: Path) -> None:
    use_caches()
    assert {name: os.environ[name] for name in FOLDERS} == {name: str(cache / part) for name, part in FOLDERS.items()}
    assert {name: os.environ[name] for name in SWITCHES} == SWITCHES


@pytest.mark.parametrize("name", [*FOLDERS, *SWITCHES])
def test_a_variable_that_is_set_is_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "mine")
    use_caches()
    assert os.environ[name] == "mine"


@pytest.fixture
def without_bytecode(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes Python write no bytecode, as in many containers, with packages that were installed without any."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(caches, "has_bytecode", lambda _: False)
    return cache / "bytecode"


def test_bytecode_is_kept_where_python_would_write_none(without_bytecode: Path) -> None:
    keep_bytecode(without_bytecode)
    assert (sys.dont_write_bytecode, sys.pycache_prefix) == (False, str(without_bytecode))
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ
    assert os.environ["PYTHONPYCACHEPREFIX"] == str(without_bytecode)  # for worker processes


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [(sys, "dont_write_bytecode", False), (sys, "pycache_prefix", "/mine"), (caches, "has_bytecode", lambda _: True)],
)
def test_python_is_left_alone_where_it_keeps_bytecode_itself(
    without_bytecode: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: object
) -> None:
    """It writes bytecode, or into a folder that the user chose, or the packages were installed with it."""
    monkeypatch.setattr(owner, name, value)
    before = sys.dont_write_bytecode, sys.pycache_prefix
    keep_bytecode(without_bytecode)
    assert (sys.dont_write_bytecode, sys.pycache_prefix) == before
    assert "PYTHONPYCACHEPREFIX" not in os.environ


def test_bytecode_is_found_next_to_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = SimpleNamespace(cached=str(tmp_path / "torch.pyc"))
    monkeypatch.setattr(caches.importlib.util, "find_spec", lambda name: spec)
    assert not caches.has_bytecode("torch")
    (tmp_path / "torch.pyc").touch()
    assert caches.has_bytecode("torch")


def test_nothing_else_is_imported() -> None:
    """The variables must be set before torch is imported."""
    code = "import sys, cogvideox.caches; print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    run = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "training")}
    assert subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout == "[]\n"


class Counted:
    """Computes a text from a file, and counts how often it does so."""

    def __init__(self, path: Path) -> None:
        self.path, self.calls = path, 0

    def __call__(self) -> str:
        self.calls += 1
        return self.path.read_text()

    def remembered(self) -> str:
        return remembered("texts", [self.path], self)


@pytest.fixture
def counted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Returns a text that has been remembered. The clock is later than the last change of any file."""
    now = time.time
    monkeypatch.setattr(caches.time, "time", lambda: now() + SETTLED + 1)
    path = tmp_path / "weights"
    path.write_text("old")
    made = Counted(path)
    assert [made.remembered(), made.remembered()] == ["old", "old"]
    assert made.calls == 1
    return made


def grow(path: Path) -> None:
    path.write_text("longer")


def change_in_place(path: Path) -> None:
    """Changes the content, but not the size."""
    time.sleep(0.02)  # file systems have clocks of a few milliseconds
    with open(path, "r+") as file:
        file.write("new")


def change_and_set_the_time_back(path: Path) -> None:
    """Changes the content as tools do that copy files with their times."""
    times = path.stat()
    change_in_place(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    """Puts another file in its place, with the same size and time."""
    times = path.stat()
    new = path.with_name("new")
    new.write_text("new")
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(new, path)


@pytest.mark.parametrize("change", [grow, change_in_place, change_and_set_the_time_back, replace])
def test_a_changed_file_is_read_again(counted: Counted, change: Callable[[Path], None]) -> None:
    change(counted.path)
    assert counted.remembered() == counted.path.read_text() != "old"
    assert counted.calls == 2


def test_a_file_that_has_just_changed_is_not_remembered(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another change within the same tick of the clock would not be noticed."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(counted.path.parent / "cache"))
    counted.path.write_text("new")
    assert [counted.remembered(), counted.remembered()] == ["new", "new"]
    assert counted.calls == 3


def test_a_deleted_cache_is_made_again(counted: Counted, cache: Path) -> None:
    for entry in (cache / "texts").iterdir():
        entry.unlink()
    assert counted.remembered() == "old"
    assert counted.calls == 2


def test_a_full_disk_does_no_harm(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise caches.DiskError("the disk is full", "delete something")

    monkeypatch.setattr(caches, "write_atomically", full)
    grow(counted.path)
    assert counted.remembered() == "longer"
