"""Tests that all weights are trained by DeepSpeed as by one process, with each of its configurations."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    IMAGE_SFT_SCRIPT,
    SFT_SCRIPT,
    Forked,
    finish,
    fork_ranks,
    free_port,
    launch,
    losses,
    python,
    sft_flags,
)
from safetensors.torch import load_file

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}
ZERO2 = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO3 = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
OFFLOADS_OPTIMIZER = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
OFFLOADS_PARAMETERS = OFFLOADS_OPTIMIZER | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
BUCKETS = ["--height_buckets", "32", "64", "--width_buckets", "96"]
STEPS = 4
GLOBAL_BATCH = 4


class Runs:
    """Trains all weights of one tiny model on one data set.

    Args:
        kind: Of the tiny model.
        more: Flags of every run.
    """

    def __init__(self, kind: str, model: Path, clips: Path, folder: Path, *more: object) -> None:
        self.script = IMAGE_SFT_SCRIPT if kind.endswith("i2v") else SFT_SCRIPT
        self.model, self.clips, self.folder, self.more = model, clips, folder, more

    def command(self, name: str, ranks: int, steps: int) -> list[object]:
        """Returns the command that trains to a step. The global batch is the same for any number of ranks."""
        flags = sft_flags(self.model, self.clips, self.folder / name, *self.more, "--max_train_steps", steps)
        flags += ["--tensor_cache", str(self.folder / "cache"), "--learning_rate", "1e-3", "--seed", "3"]
        flags += ["--lr_scheduler", "constant", "--train_batch_size", "1"]
        return python(self.script, *flags, "--gradient_accumulation_steps", GLOBAL_BATCH // ranks)

    def train(self, name: str, ranks: int = 1, steps: int = STEPS, **environment: str) -> str:
        """Runs the script to a step; returns what the first rank prints."""
        command = self.command(name, ranks, steps)
        if ranks == 1:
            return finish(Forked(command))
        said, *_ = [finish(rank) for rank in fork_ranks(ranks, command, **environment)]
        return said

    def losses(self, name: str) -> list[float]:
        return losses(self.folder / name)


@pytest.fixture(scope="module")
def runs(tiny: Callable[[str], Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs("5b", tiny("5b"), clips, tmp_path_factory.mktemp("runs"))
    made.train("one")
    return made


def elements_of_rank(checkpoint: Path, rank: int) -> tuple[int, int]:
    """Returns (elements of masters and moments, elements of weights) in the files of a rank of DeepSpeed."""

    def count(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() if value.ndim else 0  # the number of steps has no dimension
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return sum(map(count, values))

    [state] = checkpoint.rglob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    [model] = [*checkpoint.rglob(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")] or checkpoint.rglob("mp_rank_*.pt")
    return count(torch.load(state, weights_only=False)), count(torch.load(model, weights_only=False)["module"])


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a result, in which a run has already compared the outputs of stock diffusers."""
    assert (folder / "recipe.json").is_file()
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        pytest.param("zero2", ZERO2, marks=pytest.mark.slow),
        ("zero2_offload", ZERO2 | OFFLOADS_OPTIMIZER),
        ("zero3", ZERO3),
        pytest.param("zero3_offload", ZERO3 | OFFLOADS_PARAMETERS, marks=pytest.mark.slow),
    ],
)
def test_deepspeed_has_the_losses_of_one_process(runs: Runs, name: str, environment: dict[str, str]) -> None:
    """A run is interrupted in the middle. Each rank has half of the state, and with ZeRO-3 none has all weights."""
    runs.train(name, 2, steps=2, **environment)
    runs.train(name, 2, **environment)
    assert runs.losses(name) == pytest.approx(runs.losses("one"), rel=1e-5)
    result, right = exported(runs.folder / name), exported(runs.folder / "one")
    torch.testing.assert_close(result, right, rtol=1e-3, atol=1e-5)
    elements = sum(tensor.numel() for tensor in right.values())
    complete = 0 if name.startswith("zero3") else elements
    for rank in range(2):
        state, weights = elements_of_rank(runs.folder / name / f"checkpoint-{STEPS}", rank)
        assert (2 * state, weights) == (3 * elements, complete)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_configurations_of_deepspeed_are_launched(runs: Runs, name: str, tmp_path: Path) -> None:
    """accelerate starts the run, on the CPU and in fp32."""
    launcher = f"-m accelerate.commands.launch --config_file accelerate_configs/{name}.yaml --mixed_precision no"
    started = [sys.executable, *launcher.split(), "--main_process_port", free_port()]
    launch(started, 2, runs.command(f"launched {name}", 2, 2), tmp_path / "ranks", ACCELERATE_USE_CPU="true")
    assert runs.losses(f"launched {name}") == pytest.approx(runs.losses("one")[:2], rel=1e-5)


@pytest.mark.slow
def test_the_other_rank_of_zero_3_ends_when_one_is_killed(runs: Runs) -> None:
    """Afterwards one process is refused, because DeepSpeed's files are those of two, and two continue the run."""
    command = runs.command("killed", 2, STEPS)
    other, killed = fork_ranks(2, command, {1: ("^unit micro-batch", 5)}, **ZERO3)
    assert killed.wait(120) == -signal.SIGKILL
    assert other.wait(120) != 0
    said = finish(Forked(runs.command("killed", 1, STEPS)), 2)
    assert "engine: DeepSpeed ZeRO-3 x 2 there, local now" in said
    runs.train("killed", 2, **ZERO3)
    assert runs.losses("killed") == pytest.approx(runs.losses("one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "kind"), [(ZERO2 | OFFLOADS_OPTIMIZER, "2b"), (ZERO3, "5b-i2v")])
def test_deepspeed_trains_all_kinds(
    environment: dict[str, str], kind: str, tiny: Callable[[str], Path], clips: Path, tmp_path: Path
) -> None:
    """With two buckets, recomputed blocks, and first frames."""
    more = ["--ignore_learned_positional_embeddings"] if kind.endswith("i2v") else []
    runs = Runs(kind, tiny(kind), clips, tmp_path, *BUCKETS, "--gradient_checkpointing", *more)
    runs.train("one")
    runs.train("two", 2, **environment)
    assert runs.losses("two") == pytest.approx(runs.losses("one"), rel=1e-5)


def test_zero_2_runs_under_a_plan(runs: Runs) -> None:
    """Blocks run as the plan says, also while validation gathers nothing, and the losses are those of one process."""
    planned = Runs("5b", runs.model, runs.clips, runs.folder, "--keep", "attention")
    said = planned.train("planned", 2, **ZERO2)
    assert "kept for backward: attention of" in said
    assert "optimizer state sharded by DeepSpeed" in said
    assert runs.losses("planned") == pytest.approx(runs.losses("one"), rel=1e-5)
    torch.testing.assert_close(exported(runs.folder / "planned"), exported(runs.folder / "one"), rtol=1e-3, atol=1e-5)
