"""Conformance of engines: each of them trains as one process does, and reads the checkpoints of the others.

The runs are those of the scripts, with the environment that ``accelerate launch`` sets. Each has accumulation, an
average of the weights, and two buckets if the model allows them. Losses must agree within 1e-5. An engine that trains
all weights is added to ENGINES.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from running import (
    IMAGE_LORA_SCRIPT,
    IMAGE_SFT_SCRIPT,
    LORA_SCRIPT,
    SFT_SCRIPT,
    Forked,
    Moment,
    finish,
    fork_ranks,
    losses,
    python,
    safetensors_of,
    sft_flags,
)
from safetensors.torch import load_file

from cogvideox.optimizer.engine import EMA_NAME, STATE_NAME

COPIES: dict[str, str] = {}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
OFFLOAD = FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}
HSDP = FSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
ENGINES = {"copies": (2, COPIES), "fsdp": (2, FSDP), "offload": (2, OFFLOAD), "uneven": (3, FSDP), "hsdp": (4, HSDP)}
SHARDS = {"copies": 1, "fsdp": 2, "offload": 2, "uneven": 3, "hsdp": 2}
BUCKETS = ("--height_buckets", 64, 96, "--width_buckets", 64, 96)
LOW_BUCKETS = ("--height_buckets", 64, "--width_buckets", 64, 96)  # the positions of the tiny 1.5 models end at 64 rows
STEPS = 4
Train = Callable[..., str]


class Runs:
    """Trains one tiny model on one data set, always with the same global batch.

    Args:
        kind: The kind of the tiny model.
        batch: The global batch; the number of processes of each run divides it.
        lora: Whether a LoRA is trained instead of all weights.
    """

    def __init__(self, kind: str, model: Path, clips: Path, folder: Path, batch: int, lora: bool = False) -> None:
        scripts = (LORA_SCRIPT, IMAGE_LORA_SCRIPT) if lora else (SFT_SCRIPT, IMAGE_SFT_SCRIPT)
        self.script = scripts[kind.endswith("i2v")]
        self.more = ("--rank", 4, "--lora_alpha", 8) if lora else ()
        own: dict[str, tuple[object, ...]] = {"5b-i2v": ()}  # its learned positions are for one resolution
        own |= dict.fromkeys(("1.5-5b", "1.5-5b-i2v"), LOW_BUCKETS)
        self.buckets = own.get(kind, BUCKETS)
        self.model, self.clips, self.folder, self.batch = model, clips, folder, batch

    def start(
        self, name: str, ranks: int, steps: int, environment: Mapping[str, str], moments: dict[int, Moment] | None
    ) -> list[Forked]:
        """Starts the script on each rank."""
        flags = sft_flags(
            self.model, self.clips, self.folder / name, *self.more, *self.buckets, "--max_train_steps", steps
        )
        flags += ["--tensor_cache", str(self.folder / "cache"), "--learning_rate", "1e-3", "--seed", "3"]
        flags += ["--lr_scheduler", "constant", "--use_ema", "--ema_decay", "0.5"]
        command = python(self.script, *flags, "--gradient_accumulation_steps", self.batch // ranks)
        return fork_ranks(ranks, command, moments, **environment) if ranks > 1 else [Forked(command)]

    def train(self, name: str, ranks: int = 1, steps: int = STEPS, environment: Mapping[str, str] = COPIES) -> str:
        """Runs the script to a step and returns what the first rank prints."""
        said, *_ = [finish(rank) for rank in self.start(name, ranks, steps, environment, None)]
        return said

    def check(self, name: str) -> None:
        """Compares a run with that of one process: losses, masters, moments, averages and exported weights."""
        assert losses(self.folder / name) == pytest.approx(losses(self.folder / "one"), rel=1e-5)
        for file in (STATE_NAME, EMA_NAME):
            own, right = (load_file(self.folder / run / f"checkpoint-{STEPS}" / file) for run in (name, "one"))
            check_close(own, right)
        exports = [safetensors_of(self.folder / run / "transformer") for run in (name, "one")]
        check_close(*exports)


def check_close(own: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compares tensors of two runs. Adam divides by gradients, so their rounding has more effect than on losses."""
    assert own.keys() == right.keys()
    for key, tensor in right.items():
        torch.testing.assert_close(own[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[[str], Path], clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, bool], Runs]:
    """runs(kind, batch, lora) are the runs of that kind, which share a cache of tensors and the run of one process."""

    @functools.cache
    def made(kind: str, batch: int, lora: bool) -> Runs:
        runs = Runs(kind, tiny(kind), clips, tmp_path_factory.mktemp("runs"), batch, lora)
        assert f"6 clips in {2 if runs.buckets else 1} buckets" in runs.train("one")
        return runs

    return made


def cases() -> list[object]:
    """Returns all engines with all kinds. Without the long tests, they cover copies, shards and both tasks."""
    short = {("5b", "copies"), ("5b", "fsdp"), ("5b-i2v", "fsdp")}
    kinds = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
    pairs = [(kind, engine) for kind in kinds for engine in ENGINES]
    return [pytest.param(*pair, marks=[] if pair in short else pytest.mark.long) for pair in pairs]


@pytest.mark.parametrize(("kind", "engine"), cases())
def test_an_engine_trains_as_one_process_does(runs: Callable[..., Runs], kind: str, engine: str) -> None:
    ranks, environment = ENGINES[engine]
    made = runs(kind, 4 if ranks == 4 else 6, False)
    said = made.train(engine, ranks, environment=environment)
    assert ("sharded over" in said) == (SHARDS[engine] > 1)
    assert SHARDS[engine] == 1 or f"sharded over {SHARDS[engine]} processes" in said
    made.check(engine)


def test_a_run_continues_with_another_number_of_processes(runs: Callable[..., Runs]) -> None:
    """Two steps are sharded over two processes, one step is made in one process, the last is sharded over three.

    With three processes, some rows of the tiny model are divided unevenly, and one process has no row of others.
    """
    made = runs("5b", 6, False)
    made.train("other", 2, 2, FSDP)
    made.train("other", 1, 3)
    said = made.train("other", 3, STEPS, FSDP)
    assert "sharded over 3 processes" in said
    made.check("other")


def test_a_killed_rank_ends_the_others_and_the_run_can_continue(runs: Callable[..., Runs]) -> None:
    """One of two ranks is killed while both write the second checkpoint; the first checkpoint is complete."""
    made = runs("5b", 6, False)
    moment: Moment = (f"open .*checkpoint-4.*{STATE_NAME}", 1)
    first, killed = made.start("killed", 2, STEPS, FSDP, {1: moment})
    assert killed.wait(120) == -9
    assert first.wait(60) != 0
    assert [path.name for path in (made.folder / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    assert "resum" in made.train("killed", 2, STEPS, FSDP)
    made.check("killed")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["5b", "5b-i2v"])
def test_a_lora_trains_on_two_processes_as_on_one(runs: Callable[..., Runs], kind: str) -> None:
    made = runs(kind, 6, True)
    made.train("copies", 2)
    assert losses(made.folder / "copies") == pytest.approx(losses(made.folder / "one"), rel=1e-5)
