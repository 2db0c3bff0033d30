"""Tests tests/tools/chaos.py: its table shows what ran, and docs/faults.md has a row for each fault of a test."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest
from conftest import FAULTS
from running import ROOT

EXAMPLE = """
import pytest

@pytest.mark.fault("kills: a kill", times=3)
@pytest.mark.parametrize("number", range(2))
def test_kill(number):
    pass

@pytest.mark.fault("disk: full", times=0)
def test_disk(injected):
    injected(4)
    injected(1)

@pytest.mark.fault("ranks: one dies")
@pytest.mark.fault("kills: a kill", times=2)
def test_ranks():
    assert {fine}

@pytest.mark.gpu
@pytest.mark.fault("memory: on a device")
def test_gpu():
    raise AssertionError
"""


def table_of(folder: Path, fine: bool) -> tuple[int, str]:
    """Runs chaos.py on a few tests in a separate process. Returns its exit status and the page that it writes."""
    import subprocess
    import sys

    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_example.py").write_text(EXAMPLE.replace("{fine}", str(fine)))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name in ("tools/chaos.py", "shared/quick_pictures.py", "conftest.py"):  # conftest imports the other two
        (folder / "tests" / name).parent.mkdir(exist_ok=True)
        (folder / "tests" / name).write_text((ROOT / "tests" / name).read_text())
    (folder / "docs").mkdir()
    (folder / "docs" / "faults.md").write_text((ROOT / "docs" / "faults.md").read_text())
    command = [sys.executable, folder / "tests" / "tools" / "chaos.py", "--write", "--workers", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "| group | fault |" in done.stdout, done.stdout + done.stderr
    return done.returncode, (folder / "docs" / "faults.md").read_text()


def test_the_table_is_what_ran(tmp_path: Path) -> None:
    status, page = table_of(tmp_path / "fine", True)
    assert status == 0
    rows = [line for line in page.splitlines() if line.startswith("| ") and "test_example.py" in line]
    assert rows == [
        "| kills | a kill | 8 | as promised | test_example.py |",
        "| disk | full | 5 | as promised | test_example.py |",
        "| ranks | one dies | 1 | as promised | test_example.py |",
        "| memory | on a device |  | not run: needs a GPU | test_example.py |",
    ]
    assert "4 faults were injected 14 times in 5 tests. The promise was broken for none of them." in page
    status, page = table_of(tmp_path / "bad", False)
    assert status == 1
    assert "| kills | a kill | 8 | FAILED: 1 of 3 tests | test_example.py |" in page
    assert "The promise was broken for 2 of them" in page


def test_the_page_has_the_faults_of_the_tests(request: pytest.FixtureRequest) -> None:
    """Compares the rows of all test files that are collected completely; `chaos.py --write` writes the rows."""
    parts = {Path(argument.partition("::")[0]).name for argument in request.config.args if "::" in argument}
    complete = {item.path.name for item in request.session.items} - parts
    rows = request.config.stash[FAULTS]
    injected = {(name, file) for name, row in rows.items() for file in row.files if file in complete}
    written = {(name, file) for name, file in chaos.rows_in(chaos.PAGE.read_text()) if file in complete}
    assert written == injected
    assert {name.partition(":")[0] for name in rows} <= set(chaos.GROUPS)
