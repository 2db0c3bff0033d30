"""Checks docs/defects.md: each of the 45 defects names tests that exist, or says why there is none."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import pytest
from running import ROOT

TEXT = (ROOT / "docs" / "defects.md").read_text()
NUMBERS = list(range(1, 46))
NAME = re.compile(r"`(tests/(?:\w+/)*test_\w+\.py)::((?:\w+::)?test_\w+)(\[[^\]`]+\])?`")
REASON = re.compile(r"No test: \w.{20,}\.")


def rows(text: str) -> list[list[str]]:
    """Returns the cells of each row of the table, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@functools.cache
def names_in(path: str) -> dict[str, bool]:
    """Returns the tests of a file by their pytest names, and whether each is parametrized."""
    tree = ast.parse((ROOT / path).read_text())
    classes = [(f"{node.name}::", node.body) for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        prefix + node.name: any("parametrize" in ast.unparse(mark) for mark in node.decorator_list)
        for prefix, body in [("", tree.body), *classes]
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def problems(text: str) -> Iterator[str]:
    """Yields the errors of the table."""
    table = rows(text)
    if [cells[0] for cells in table] != list(map(str, NUMBERS)):
        yield f"the numbers are not {NUMBERS[0]} to {NUMBERS[-1]}, each once"
    for cells in table:
        if len(cells) != 4 or not all(cells):
            yield f"{cells[0]}: has not four cells"
        elif not NAME.fullmatch(cells[3].split(", ")[0]):
            if not REASON.fullmatch(cells[3]):
                yield f"{cells[0]}: names no test and no reason"
        else:
            yield from (f"{cells[0]}: {fault}" for name in cells[3].split(", ") if (fault := fault_of(name)))


def fault_of(name: str) -> str | None:
    """Returns why a name is not the name of a test, or None if it is one."""
    found = NAME.fullmatch(name)
    if not found:
        return f"{name} is no name of a test"
    path, test, parameters = found.groups()
    if not (ROOT / path).is_file():
        return f"{path} is not there"
    if test not in names_in(path):
        return f"{path} has no {test}"
    return f"{test} has no parameters" if parameters and not names_in(path)[test] else None


def test_every_defect_has_tests_that_exist_or_a_reason() -> None:
    assert list(problems(TEXT)) == []


def test_nearly_all_have_tests() -> None:
    assert len(rows(TEXT)) == len(NUMBERS)
    assert sum("::" in cells[3] for cells in rows(TEXT)) >= 40


ROW = "| 7 | what | here | {} |"


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("`tests/model/test_defects.py::test_nearly_all_have_tests`", None),
        (
            "`tests/config/test_args.py::test_switches[given0-False]`, "
            "`tests/model/test_defects.py::test_nearly_all_have_tests`",
            None,
        ),
        ("No test: this suite has no such thing to break.", None),
        ("", "7: has not four cells"),
        ("No test: later.", "7: names no test and no reason"),
        ("see the tests", "7: names no test and no reason"),
        ("`tests/test_nothing.py::test_switches`", "7: tests/test_nothing.py is not there"),
        ("`tests/config/test_args.py::test_swiches`", "7: tests/config/test_args.py has no test_swiches"),
        (
            "`tests/config/test_args.py::Flags::test_switches`",
            "7: tests/config/test_args.py has no Flags::test_switches",
        ),
        (
            "`tests/model/test_defects.py::test_nearly_all_have_tests[1]`",
            "7: test_nearly_all_have_tests has no parameters",
        ),
        ("`tests/config/test_args.py::test_switches`, and more", "7: and more is no name of a test"),
    ],
)
def test_errors_in_a_row_are_reported(cell: str, fault: str | None) -> None:
    lines = TEXT.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("| 7 |"))
    lines[place] = ROW.format(cell)
    assert list(problems("\n".join(lines))) == ([fault] if fault else [])


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: [*lines, lines[-1]]])
def test_a_missing_or_repeated_number_is_reported(change) -> None:
    assert "the numbers are not 1 to 45, each once" in list(problems("\n".join(change(TEXT.splitlines()))))
