"""Runs all tests that inject a fault and prints a table of their outcomes: `make chaos`.

The mark @pytest.mark.fault("group: what is injected", times=N) of a test names the fault and how often the test injects
it, with one set of its parameters. A test that knows the number only while it runs adds to it with the fixture
``injected``. Tests marked as long run too. Tests that need a GPU do not run here but with `make test-gpu`.

    python tests/tools/chaos.py [--write [--again]] [--workers 2] [pytest's arguments]

The exit status is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
GROUPS = [
    "kills",
    "signals",
    "disk",
    "checkpoints",
    "ranks",
    "data",
    "numbers",
    "memory",
    "export",
    "trackers",
    "security",
    "flags",
]
BEGIN, END = "<!-- the table that make chaos writes -->", "<!-- the end of the table -->"
NEEDS_GPU = "not run: needs a GPU"
FAULT, MORE = "fault", "more faults"  # names of properties in the report of a test
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "transformers")


@dataclass
class Row:
    """A fault, and the outcomes of the tests that inject it."""

    injected: int = 0
    outcomes: list[str] = field(default_factory=list)  # one for each test: passed, failed or skipped
    on_gpu_only: bool = True
    files: set[str] = field(default_factory=set)  # names of the test files

    @property
    def outcome(self) -> str:
        """Returns the outcome of all tests in words, for the table."""
        failed, skipped = self.outcomes.count("failed"), self.outcomes.count("skipped")
        if failed:
            return f"FAILED: {failed} of {len(self.outcomes)} tests"
        if skipped:
            return f"not run: {skipped} of {len(self.outcomes)} tests skipped"
        if self.outcomes:
            return "as promised"
        return NEEDS_GPU if self.on_gpu_only else "NOT RUN"


def faults_of(item: pytest.Item) -> Iterable[tuple[str, int]]:
    """Yields the name and the number of injections of each fault that a test injects."""
    for mark in item.iter_markers("fault"):
        yield mark.args[0], mark.kwargs.get("times", 1)


def rows_of(items: Iterable[pytest.Item]) -> dict[str, Row]:
    """Returns a row for each fault of the tests, before any of them has run."""
    rows: dict[str, Row] = {}
    for item in items:
        for name, _ in faults_of(item):
            row = rows.setdefault(name, Row())
            row.on_gpu_only &= item.get_closest_marker("gpu") is not None
            row.files.add(item.path.name)
    return rows


class Watching:
    """A pytest plugin that collects the faults and the outcomes of their tests."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Collects all faults before pytest deselects the tests that do not run here."""
        self.rows |= rows_of(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test when it ends, or when its set-up fails or skips it."""
        if report.when != "call" and report.passed:
            return
        given: list[Any] = [value for name, value in report.user_properties if name == FAULT]
        more = sum(int(str(value)) for name, value in report.user_properties if name == MORE)
        for fault, times in given:
            self.rows[fault].outcomes.append(report.outcome)
            if report.when == "call":
                self.rows[fault].injected += times + more


def collected() -> dict[str, Row]:
    """Returns all faults that tests inject, without running a test."""
    watching = Watching()
    with redirect_stdout(io.StringIO()):
        status = pytest.main(["--collect-only", "-m", "fault", str(ROOT / "tests")], [watching])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"pytest cannot collect the tests: {status!r}")
    return watching.rows


def ran(workers: int, more: list[str]) -> tuple[int, dict[str, Row]]:
    """Runs the tests. Returns pytest's exit status and the rows."""
    watching = Watching()
    watching.rows = collected()
    parallel = ["-n", str(workers), "--dist", "worksteal"] if workers else []
    arguments = ["-m", "fault and not gpu", *parallel, *more, str(ROOT / "tests")]
    return int(pytest.main(arguments, [watching])), watching.rows


def in_order(rows: Iterable[str]) -> list[str]:
    """Returns the names sorted by group, in the order of GROUPS, and then by their text."""
    return sorted(rows, key=lambda row: (GROUPS.index(row.partition(":")[0]), row))


def table(rows: dict[str, Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = ["| group | fault | injected | outcome | tests |", "|---|---|---:|---|---|"]
    for name in in_order(rows):
        group, _, fault = name.partition(": ")
        row = rows[name]
        lines.append(f"| {group} | {fault} | {row.injected or ''} | {row.outcome} | {' '.join(sorted(row.files))} |")
    return "\n".join(lines)


def rows_in(page: str) -> set[tuple[str, str]]:
    """Returns (fault, file of a test that injects it) for each row of the table in a page."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {(f"{row[0]}: {row[1]}", file) for row in cells[2:] for file in row[-1].split()}


def lines_by_fault(lines: Iterable[str]) -> dict[str, str]:
    """Returns the rows of a table, without its head, by "group: fault"."""
    rows = [line for line in lines if line.startswith("|")][2:]
    return {": ".join(cell.strip() for cell in row.split("|")[1:3]): row for row in rows}


def run_rows(rows: dict[str, Row]) -> dict[str, Row]:
    """Returns the rows of which a test has run."""
    return {name: row for name, row in rows.items() if row.outcomes}


def summary(rows: dict[str, Row], seconds: float) -> str:
    """Returns a summary of the rows, the duration and the versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    total, tests = sum(row.injected for row in rows.values()), sum(len(row.outcomes) for row in rows.values())
    bad = sum(row.outcome.isupper() or row.outcome.startswith("FAILED") for row in rows.values())
    return (
        f"{len(rows)} faults were injected {total} times in {tests} tests. The promise was broken for {bad or 'none'} "
        f"of them. Measured with `make chaos` at commit {commit.strip() or 'unknown'} on {date.today()}, in "
        f"{seconds / 60:.0f} minutes on {len(os.sched_getaffinity(0))} cores, with Python {platform.python_version()}, "
        f"{versions}."
    )


def write(rows: dict[str, Row], seconds: float, again: bool) -> None:
    """Writes the table into the page.

    Args:
        rows: The faults and their outcomes.
        seconds: The duration of the run.
        again: Whether to replace or add only the rows that ran.
    """
    text = PAGE.read_text(encoding="utf-8")
    said, lines = summary(rows, seconds), table(rows)
    if again:
        before = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
        new = table(run_rows(rows)).splitlines()
        merged = lines_by_fault(before) | lines_by_fault(new)
        lines = "\n".join([*new[:2], *(merged[name] for name in in_order(merged))])
        said = "\n".join(line for line in before if not line.startswith("|")).strip()
        rerun = "Some tests ran again later, and their rows replace the earlier ones."
        said += f"\n\n{rerun} {summary(run_rows(rows), seconds)}"
    inner = f"{BEGIN}\n{said}\n\n{lines}\n{END}"
    found, number = re.subn(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: inner, text, flags=re.DOTALL)
    assert number == 1, f"{PAGE} has no place for the table"
    PAGE.write_text(found, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.relative_to(ROOT)}")
    parser.add_argument("--again", action="store_true", help="with --write: replace only the rows that run now")
    parser.add_argument("--workers", type=int, default=2, help="processes that test at the same time; 0: this one")
    given, more = parser.parse_known_args(arguments)
    began = time.monotonic()
    status, rows = ran(given.workers, more)
    seconds = time.monotonic() - began
    print(table(rows))
    print(summary(rows, seconds))
    if given.write:
        write(rows, seconds, given.again)
    not_run = [name for name, row in rows.items() if row.outcome == "NOT RUN"]
    return status or int(bool(not_run and not more))


if __name__ == "__main__":
    sys.exit(main())
