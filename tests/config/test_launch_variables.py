"""What launchers and users have put into the environment is checked before torch is imported."""

from __future__ import annotations

import os

import pytest

from cogvideox.config.launch import check_launch
from cogvideox.errors import UsageError

OWN = ("ACCELERATE_", "SLURM_", "NCCL_", "GLOO_", "LOCAL_", "MASTER_", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has an environment of its own, without the variables of a launcher."""
    monkeypatch.setattr(os, "environ", {name: text for name, text in os.environ.items() if not name.startswith(OWN)})


def problems() -> list[str]:
    try:
        check_launch()
    except UsageError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1"}, None),
        ({"LOCAL_RANK": "-1"}, None),  # older trainers mean that there is none
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a number; if another launcher left it"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=: must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: must be from 0 to WORLD_SIZE - 1, and WORLD_SIZE is 2"),
        ({"RANK": "-1"}, "RANK=-1: must be from 0"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: must be from 1 to WORLD_SIZE, which is 1"),
        ({"LOCAL_WORLD_SIZE": "4"}, "run: unset LOCAL_WORLD_SIZE"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "unset LOCAL_RANK LOCAL_WORLD_SIZE"),
    ],
)
def test_numbers_that_contradict_each_other_are_named(given: dict[str, str], said: str | None) -> None:
    os.environ.update(given)
    found = problems()
    assert len(found) == (said is not None)
    assert all(said in problem for problem in found if said)


def test_all_numbers_are_reported_at_once() -> None:
    os.environ.update({"RANK": "x", "LOCAL_RANK": "y"})
    assert [problem.split("=")[0] for problem in problems()] == ["RANK", "LOCAL_RANK"]
