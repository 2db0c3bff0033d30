"""Conformance of engines: each of them trains as one process does, and reads the checkpoints of the others.

The runs are those of the scripts, with the environment that ``accelerate launch`` sets. Each has accumulation, an
average of the weights, and two buckets if the model allows them, and is interrupted in the middle. Losses must agree
within 1e-5. An engine that trains all weights is added to ENGINES.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
    free_port,
    launch,
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
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}
ZERO2 = ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO3 = ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
COMPILES = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
STATE_ON_HOST = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
ALL_ON_HOST = STATE_ON_HOST | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
# The tiny weights are so small that ZeRO-3 would keep a copy of all of them, and its buffer is for large ones.
ZERO3_SETTINGS = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1}


class Launch(NamedTuple):
    """How an engine is started, and how many fp32 numbers for each weight a process must have between two steps.

    Attributes:
        ranks: The number of processes.
        environment: What accelerate launch sets.
        complete: The numbers for each weight that every process has, such as 1 for a complete copy of the weights.
        divided: The numbers for each weight that are divided between processes: a master, an average, two moments.
        shards: Between how many processes they are divided.
        flags: Flags of the script that the run of one process does not have.
        divided_tokens: Between how many processes the tokens of a sample are divided.
    """

    ranks: int
    environment: dict[str, str]
    complete: float
    divided: float
    shards: int
    flags: tuple[object, ...] = ()
    divided_tokens: int = 1


ENGINES = {
    "copies": Launch(2, COPIES, 5, 0, 1),  # with a buffer of gradients
    "fsdp": Launch(2, FSDP, 0, 4, 2),
    "fsdp_offload": Launch(2, OFFLOAD, 0, 4, 2),
    "fsdp_uneven": Launch(3, FSDP, 0, 4, 3),
    "hsdp": Launch(4, HSDP, 0, 4, 2),
    "zero2": Launch(2, ZERO2, 1, 4, 2),
    "zero2_offload": Launch(2, ZERO2 | STATE_ON_HOST, 2.25, 5, 2),  # DeepSpeed accumulates complete gradients there
    "zero2_planned": Launch(2, ZERO2 | STATE_ON_HOST, 2.25, 5, 2, ("--keep", "attention")),
    "zero2_compiled": Launch(2, ZERO2 | COMPILES, 1, 4, 2, ("--keep", "attention")),
    "zero2_uneven": Launch(3, ZERO2, 1, 4, 3),
    "zero3": Launch(2, ZERO3, 0, 6, 2),
    "zero3_offload": Launch(2, ZERO3 | ALL_ON_HOST, 0, 6, 2),
    "zero3_uneven": Launch(3, ZERO3, 0, 6, 3),
    "tokens": Launch(2, COPIES, 5, 0, 1, divided_tokens=2),
    "tokens_copies": Launch(4, COPIES, 5, 0, 1, ("--keep", "input"), divided_tokens=2),
    "tokens_fsdp": Launch(2, FSDP, 0, 4, 2, ("--keep", "all"), divided_tokens=2),
    "tokens_hsdp": Launch(4, HSDP, 0, 4, 2, divided_tokens=2),
    "tokens_zero2": Launch(2, ZERO2, 1, 4, 2, ("--keep", "attention"), divided_tokens=2),
}
LORA_ENGINES = {name: ENGINES[name] for name in ("copies", "zero2", "zero2_offload", "tokens", "tokens_copies")} | {
    "tokens_zero2": ENGINES["tokens_zero2"],
    "tokens_lean": Launch(2, COPIES, 5, 0, 1, ("--plan", "lean"), divided_tokens=2),
}
BUCKETS = ("--height_buckets", 64, 96, "--width_buckets", 64, 96)
LOW_BUCKETS = ("--height_buckets", 64, "--width_buckets", 64, 96)  # the positions of the tiny 1.5 models end at 64 rows
STEPS = 4


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

    def command(self, name: str, groups: int, steps: int) -> list[object]:
        """Returns the command that trains to a step. The global batch is the same for any number of ranks.

        Args:
            name: The name of the run.
            groups: How many micro-batches are trained at the same time.
            steps: The step.
        """
        flags = sft_flags(
            self.model, self.clips, self.folder / name, *self.more, *self.buckets, "--max_train_steps", steps
        )
        flags += ["--tensor_cache", str(self.folder / "cache"), "--learning_rate", "1e-3", "--seed", "3"]
        flags += ["--lr_scheduler", "constant", "--use_ema", "--ema_decay", "0.5"]
        return python(self.script, *flags, "--gradient_accumulation_steps", self.batch // groups)

    def start(
        self,
        name: str,
        ranks: int,
        steps: int,
        environment: Mapping[str, str],
        moments: dict[int, Moment] | None = None,
        flags: Sequence[object] = (),
        divided_tokens: int = 1,
    ) -> list[Forked]:
        """Starts the script on each rank. They say in files how many bytes of tensors they have at each checkpoint."""
        command = [*self.command(name, ranks // divided_tokens, steps), *flags]
        command += ["--sequence_parallel", divided_tokens] if divided_tokens > 1 else []
        if environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
            settings = self.folder / "zero3.json"
            settings.write_text(json.dumps({"zero_optimization": ZERO3_SETTINGS}))
            environment = {**environment, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings)}
        census = {"COUNT_BYTES": str(self.folder / f"{name}.bytes")}
        return fork_ranks(ranks, command, moments, **environment, **census) if ranks > 1 else [Forked(command)]

    def train(
        self,
        name: str,
        ranks: int = 1,
        steps: int = STEPS,
        environment: Mapping[str, str] = COPIES,
        flags: Sequence[object] = (),
        divided_tokens: int = 1,
    ) -> str:
        """Runs the script to a step and returns what the first rank prints."""
        started = self.start(name, ranks, steps, environment, None, flags, divided_tokens)
        said, *_ = [finish(rank) for rank in started]
        return said

    def numbers_per_weight(self, name: str, rank: int) -> list[float]:
        """Returns how many fp32 numbers a rank had for each weight of the model, at each checkpoint."""
        weights = sum(tensor.nbytes for tensor in safetensors_of(self.folder / "one" / "transformer").values())
        return [int(line) / weights for line in Path(f"{self.folder / name}.bytes{rank}").read_text().split()]

    def bytes_read(self, name: str, rank: int, checkpoint: str) -> int:
        """Returns how many bytes of a checkpoint a rank has read, to verify it and to load its shards."""
        lines = [line.split(" ", 1) for line in Path(f"{self.folder / name}.bytes{rank}.read").read_text().splitlines()]
        return sum(int(count) for count, path in lines if checkpoint in Path(path).parts)

    def check(self, name: str) -> None:
        """Compares a run with that of one process: losses, masters, moments, averages and exported weights."""
        assert losses(self.folder / name) == pytest.approx(losses(self.folder / "one"), rel=1e-5)
        for file in (STATE_NAME, EMA_NAME):
            own, right = (load_file(self.folder / run / f"checkpoint-{STEPS}" / file) for run in (name, "one"))
            check_close(own, right)
        for part in (".", f"checkpoint-{STEPS}"):
            check_close(*(safetensors_of(self.folder / run / part / "transformer") for run in (name, "one")))


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
        assert f"6 clips in {'2 buckets' if runs.buckets else '1 bucket'}" in runs.train("one")
        return runs

    return made


def cases() -> list[object]:
    """Returns all engines with all kinds. Without the long tests, they cover copies, shards and both tasks."""
    short = {("5b", "copies"), ("5b", "fsdp"), ("5b-i2v", "fsdp_uneven"), ("5b", "zero2_planned"), ("5b-i2v", "zero3")}
    short |= {("5b", "tokens")}
    kinds = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
    # Compiling takes minutes on two cores, so only one kind is compiled.
    pairs = [(kind, engine) for kind in kinds for engine in ENGINES if engine != "zero2_compiled" or kind == "5b"]
    return [pytest.param(*pair, marks=[] if pair in short else pytest.mark.long) for pair in pairs]


@pytest.mark.parametrize(("kind", "engine"), cases())
def test_an_engine_trains_as_one_process_does(runs: Callable[..., Runs], kind: str, engine: str) -> None:
    """The bytes of all tensors show that each process has only its share of the state."""
    ranks, environment, complete, divided, shards, flags, divided_tokens = ENGINES[engine]
    made = runs(kind, 4 if ranks == 4 else 6, False)
    made.train(engine, ranks, STEPS // 2, environment, flags, divided_tokens)
    said = made.train(engine, ranks, STEPS, environment, flags, divided_tokens)
    assert (f"tokens divided between {divided_tokens} processes" in said) == (divided_tokens > 1)
    made.check(engine)
    assert "mismatch" not in said  # accelerate would say so about --gradient_accumulation_steps under DeepSpeed
    if "--keep" in flags:
        assert f"kept for backward: {flags[flags.index('--keep') + 1]} of" in said
    for rank in range(ranks):
        numbers = made.numbers_per_weight(engine, rank)
        assert numbers == pytest.approx([complete + divided / shards] * 2, rel=0.1)


def test_a_run_continues_with_another_engine(runs: Callable[..., Runs]) -> None:
    """Each step is made by another engine, with another number of processes.

    With three processes, some rows of the tiny model are divided unevenly, and one process has no row of others.
    """
    made = runs("5b", 6, False)
    for step, (ranks, environment) in enumerate([(2, ZERO2), (3, FSDP), (1, COPIES), (2, ZERO3)], 1):
        assert ("resuming from" in made.train("other", ranks, step, environment)) == (step > 1)
    made.check("other")


@pytest.mark.parametrize("environment", [FSDP, ZERO2], ids=["fsdp", "zero2"])
def test_only_the_first_rank_reads_all_of_a_sharded_checkpoint(
    runs: Callable[..., Runs], environment: dict[str, str]
) -> None:
    """It verifies all files, and then loads its shards as the other one does."""
    made, name = runs("5b", 6, False), f"resumed {len(environment)}"
    made.train(name, 2, STEPS // 2, environment)
    folder = made.folder / name / f"checkpoint-{STEPS // 2}"
    everything = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shards = sum((folder / file).stat().st_size for file in (STATE_NAME, EMA_NAME)) / 2
    made.train(name, 2, STEPS, environment)
    first, second = (made.bytes_read(name, rank, folder.name) for rank in range(2))
    assert second == pytest.approx(shards, rel=0.1)
    assert first == pytest.approx(everything + shards, rel=0.1)


@pytest.mark.parametrize("environment", [FSDP, pytest.param(ZERO3, marks=pytest.mark.long)], ids=["fsdp", "zero3"])
def test_a_killed_rank_ends_the_others_and_the_run_can_continue(
    runs: Callable[..., Runs], environment: dict[str, str]
) -> None:
    """One of two ranks is killed while both write the second checkpoint; the first checkpoint is complete."""
    made, name = runs("5b", 6, False), f"killed {len(environment)}"
    moment: Moment = (f"open .*checkpoint-4.*{STATE_NAME}", 1)
    first, killed = made.start(name, 2, STEPS, environment, {1: moment})
    assert killed.wait(120) == -9
    assert first.wait(60) != 0
    assert [path.name for path in (made.folder / name).glob("checkpoint-*")] == ["checkpoint-2"]
    assert "resum" in made.train(name, 2, STEPS, environment)
    made.check(name)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["5b", "5b-i2v"])
@pytest.mark.parametrize(
    "engine", ["copies", "zero2", "zero2_offload", "tokens", "tokens_copies", "tokens_lean", "tokens_zero2"]
)
def test_a_lora_trains_on_several_processes_as_on_one(runs: Callable[..., Runs], kind: str, engine: str) -> None:
    ranks, environment, *_, flags, divided_tokens = LORA_ENGINES[engine]
    made = runs(kind, 4 if ranks == 4 else 6, True)
    for steps in (STEPS // 2, STEPS):
        made.train(engine, ranks, steps, environment, flags, divided_tokens)
    assert losses(made.folder / engine) == pytest.approx(losses(made.folder / "one"), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_configurations_of_deepspeed_are_launched(runs: Callable[..., Runs], name: str, tmp_path: Path) -> None:
    """accelerate starts the run, on the CPU and in fp32."""
    made = runs("5b", 6, False)
    launcher = f"-m accelerate.commands.launch --config_file accelerate_configs/{name}.yaml --mixed_precision no"
    started = [sys.executable, *launcher.split(), "--main_process_port", free_port()]
    launch(started, 2, made.command(f"launched {name}", 2, 2), tmp_path / "ranks", ACCELERATE_USE_CPU="true")
    assert losses(made.folder / f"launched {name}") == pytest.approx(losses(made.folder / "one")[:2], rel=1e-5)
