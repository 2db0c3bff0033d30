"""Tests that the mutants of tests/tools/mutants.py apply to the code. `make mutants` runs the mutants themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_one_place_and_still_python(mutant: mutants.Mutant) -> None:
    assert mutants.occurrences(mutant) == 1
    text = (mutants.ROOT / mutant.path).read_text()
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(text.replace(mutant.old, mutant.new)))
    assert mutant.old.strip("\n").count("\n") == 0
    assert (mutants.ROOT / mutants.path_of_test(mutant.tests[0]).partition("::")[0]).is_file()


def test_each_outcome_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a tree of one function and one test, which is unchanged afterwards."""
    library, tests = tmp_path / mutants.LIBRARY, tmp_path / "tests"
    library.mkdir(parents=True)
    tests.mkdir()
    (library / "sums.py").write_text("def total(a, b):\n    return a + b\n")
    (tests / "test_sums.py").write_text(
        f"import sys\nsys.path.insert(0, {str(library)!r})\nfrom sums import total\n"
        "def test_total():\n    assert total(2, 2) == 4\n"
    )

    def outcome_of(old: str, new: str) -> str:
        return mutants.outcome(mutants.Mutant("sums.py", old, new, ("test_sums.py",)), tmp_path)

    assert outcome_of("a + b", "a - b") == "killed"
    assert outcome_of("a + b", "a * b") == "SURVIVED"
    assert outcome_of("a / b", "a - b") == "0 places"
    assert outcome_of("return a + b", "return (") == "pytest ended with 2"
    assert (library / "sums.py").read_text() == "def total(a, b):\n    return a + b\n"


def test_the_tests_of_the_mutants_exist() -> None:
    """With an unknown test, pytest ends before it runs any, so a mutant would not be tested."""
    named = {mutants.path_of_test(test) for mutant in mutants.MUTANTS for test in mutant.tests if "::" in test}
    assert named
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *sorted(named)]
    found = subprocess.run(command, cwd=mutants.ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
