"""Every engine trains the same: a tiny run by one process, by two, and sharded, interrupted in the middle.

The runs are those of the scripts, with the environment that ``accelerate launch`` sets. Losses must agree within 1e-5.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import (
    IMAGE_SFT_SCRIPT,
    SFT_SCRIPT,
    Forked,
    finish,
    fork_ranks,
    losses,
    python,
    sft_flags,
)
from safetensors import safe_open

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = FSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
OFFLOAD = FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}
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

    def train(self, name: str, ranks: int = 1, steps: int = STEPS, **environment: str) -> str:
        """Runs the script to a step; returns what the first rank prints. The global batch is always the same."""
        flags = sft_flags(self.model, self.clips, self.folder / name, *self.more, "--max_train_steps", steps)
        flags += ["--tensor_cache", str(self.folder / "cache"), "--learning_rate", "1e-3", "--seed", "3"]
        flags += ["--lr_scheduler", "constant", "--train_batch_size", "1"]
        command = python(self.script, *flags, "--gradient_accumulation_steps", GLOBAL_BATCH // ranks)
        if ranks == 1:
            return finish(Forked(command))
        said, *_ = [finish(rank) for rank in fork_ranks(ranks, command, **environment)]
        return said

    def losses(self, name: str) -> list[float]:
        return losses(self.folder / name)

    def state(self, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
        """Returns masters and moments of a checkpoint."""
        path = self.folder / name / f"checkpoint-{step}" / "optimizer.safetensors"
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module", params=["5b"])
def runs(
    request: pytest.FixtureRequest, tiny: Callable[[str], Path], clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    made = Runs(request.param, tiny(request.param), clips, tmp_path_factory.mktemp("runs"))
    made.train("one")
    return made


@pytest.mark.parametrize(("name", "ranks", "environment"), [("fsdp", 2, FSDP), ("offload", 2, OFFLOAD)])
def test_sharded_runs_have_the_losses_of_one_process(
    runs: Runs, name: str, ranks: int, environment: dict[str, str]
) -> None:
    said = runs.train(name, ranks, **environment)
    assert f"sharded over {ranks} processes" in said
    assert runs.losses(name) == pytest.approx(runs.losses("one"), rel=1e-5)
    state, right = runs.state(name), runs.state("one")
    assert state.keys() == right.keys()
    for key, tensor in right.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_continues_with_another_number_of_processes(runs: Runs) -> None:
    """Two steps are sharded over two processes, one step is made in one process, the last is sharded over four."""
    runs.train("other", 2, steps=2, **FSDP)
    runs.train("other", 1, steps=3)
    runs.train("other", 4, steps=STEPS, **FSDP)
    assert runs.losses("other") == pytest.approx(runs.losses("one"), rel=1e-5)
    own, right = runs.state("other"), runs.state("one")
    for key, tensor in right.items():
        torch.testing.assert_close(own[key], tensor, rtol=1e-3, atol=1e-5)


def test_copies_of_sharded_weights_agree(runs: Runs) -> None:
    """Two copies of the weights, each sharded over two of four processes (HSDP)."""
    runs.train("hsdp", 4, **HSDP)
    assert runs.losses("hsdp") == pytest.approx(runs.losses("one"), rel=1e-5)
