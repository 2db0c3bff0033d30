"""Divides the tokens of samples between processes, with numbers of tokens and heads that they do not divide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import finish, fork_ranks, python

from cogvideox.model.attention import GRADIENT_TOLERANCE
from cogvideox.model.sequence import Division, shares

SCRIPT = Path(__file__).parents[1] / "shared" / "divided_tokens.py"


@pytest.mark.parametrize(
    ("ranks", "heads", "more"),
    [
        (2, 3, ()),
        pytest.param(3, 5, (), marks=pytest.mark.long),
        pytest.param(4, 4, (), marks=pytest.mark.long),
        pytest.param(2, 3, ("compile",), marks=pytest.mark.long),
    ],
)
def test_outputs_and_gradients_are_those_of_one_process(
    ranks: int, heads: int, more: tuple[str, ...], tmp_path: Path
) -> None:
    """With a LoRA and with all weights, at every level of --keep, by Stack and by ModuleStack."""
    for process in fork_ranks(ranks, python(SCRIPT, heads, tmp_path, *more)):
        finish(process)
    for rank in range(ranks):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert errors.pop("check")["error"] < 1e-5
        assert errors.pop("faulty check")["error"] > GRADIENT_TOLERANCE
        assert len(errors) == (2 if more else 16)
        for what, found in errors.items():
            assert found["outputs"] < 1e-5, what
            assert found["gradients"] < 1e-4, what


@pytest.mark.parametrize("tokens", [6, 7, 8, 45_104])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_token_belongs_to_one_process(tokens: int, size: int) -> None:
    parts = [range(tokens)[Division("", rank, size, tokens).own] for rank in range(size)]
    assert [token for part in parts for token in part] == list(range(tokens))
    assert [len(part) for part in parts] == shares(tokens, size)
    assert max(map(len, parts)) - min(map(len, parts)) == (tokens % size > 0)
