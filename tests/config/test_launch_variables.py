"""What launchers and users have put into the environment is checked before torch is imported."""

from __future__ import annotations

import os

import pytest
from running import ROOT

from cogvideox.config import args, launch
from cogvideox.config.launch import adopt_tasks, check_launch, launch_remarks, network_problems, start_problems
from cogvideox.config.options import LoraOptions, local_processes
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


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth0"}, None),
        ({"GLOO_SOCKET_IFNAME": "eth0,ib0,"}, None),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "GLOO_SOCKET_IFNAME=eth: this machine has no such network interface; it"),
        ({"GLOO_SOCKET_IFNAME": "eth0,eth1"}, "GLOO_SOCKET_IFNAME=eth0,eth1"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, None),  # a prefix
        ({"NCCL_SOCKET_IFNAME": "ens,ib"}, None),
        ({"NCCL_SOCKET_IFNAME": "eth0:29500"}, None),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, None),  # all others
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, None),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME==eth"),
        ({"NCCL_SOCKET_IFNAME": "ens"}, "it has lo, eth0, ib0; set it to the one that connects the machines"),
        ({"NCCL_SOCKET_IFNAME": "ens", "ACCELERATE_USE_CPU": "true"}, None),  # without NCCL
        ({"NCCL_SOCKET_IFNAME": "ens", "WORLD_SIZE": "1"}, None),
        ({"NCCL_SOCKET_IFNAME": ""}, None),
    ],
)
def test_a_network_interface_that_is_not_there_is_named(
    given: dict[str, str], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.socket, "if_nameindex", lambda: list(enumerate(["lo", "eth0", "ib0"])))
    os.environ.update({"WORLD_SIZE": "2"} | given)
    found = list(network_problems())
    assert len(found) == (named is not None)
    assert all(named in problem for problem in found if named)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_a_setting_that_needs_a_launcher_is_refused_without_one(name: str) -> None:
    os.environ[f"ACCELERATE_USE_{name}"] = "True"
    (problem,) = start_problems()
    assert problem.startswith(f"ACCELERATE_USE_{name}=True: needs processes that a launcher has started")
    assert problem.endswith(f"start it with accelerate launch, or run: unset ACCELERATE_USE_{name}")
    os.environ["LOCAL_RANK"] = "0"
    assert list(start_problems()) == []


def options(*flags: str) -> LoraOptions:
    required = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o"]
    return args.parse(LoraOptions, None, [*required, *flags])


def test_settings_that_are_followed_without_accelerate_are_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be left over. Under accelerate launch, they are those of its configuration."""
    assert list(launch_remarks(options())) == []
    os.environ.update({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false"})
    (line,) = launch_remarks(options())
    assert "the environment has ACCELERATE_MIXED_PRECISION=bf16, which this run follows" in line
    assert line.endswith("run: unset ACCELERATE_MIXED_PRECISION")
    assert list(launch_remarks(options("--mixed_precision", "fp16"))) == []
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    (line,) = launch_remarks(options("--mixed_precision", "fp16"))
    assert line.endswith("run: unset ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setattr(launch, "is_launcher", lambda pid, among: "accelerate" in among)
    assert list(launch_remarks(options())) == []


def test_tasks_of_srun_that_do_not_know_each_other_are_remarked() -> None:
    os.environ.update({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"})
    (line,) = launch_remarks(options())
    assert line.startswith("SLURM: srun has started 8 tasks that do not know each other")
    assert (ROOT / "examples" / "slurm.sbatch").exists()
    assert "examples/slurm.sbatch" in line
    os.environ["RANK"] = "3"
    assert list(launch_remarks(options())) == []


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}, ("5", "8", "1", 4)),
        ({"SLURM_STEP_TASKS_PER_NODE": "6,2", "SLURM_NODEID": "0"}, ("5", "8", "1", 6)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)", "SLURM_NODEID": "4"}, ("5", "8", "1", 1)),
        ({}, ("5", "8", "1", 8)),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ("0", "2", "0", 2)),
        ({"SLURM_STEP_NUM_TASKS": "1"}, (None, None, None, 1)),
    ],
)
def test_tasks_of_srun_get_the_numbers_of_a_launcher(given: dict[str, str], numbers: tuple[object, ...]) -> None:
    os.environ.update({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"} | given)
    adopt_tasks()
    assert (*map(os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK")), local_processes()) == numbers
