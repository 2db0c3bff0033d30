"""Tests runs with sharded weights whose flags or numbers of processes are unusual: each is as with one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import SFT_SCRIPT, Forked, finish, fork_ranks, losses, metrics, python, safetensors_of, sft_flags

pytestmark = pytest.mark.long

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
OFFLOAD = {"FSDP_OFFLOAD_PARAMS": "true"}
COPIES = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}
BUCKETS = ("--height_buckets", 64, 96, "--width_buckets", 64, 96)
EMA = ("--use_ema", "--ema_decay", 0.5)
STEPS = ("--max_train_steps", 2)
# processes, environment, global batch, --train_batch_size, flags; CLIPS stands for the folder of the clips
CASES: dict[str, tuple[int, dict[str, str], int, int, tuple[object, ...]]] = {
    "several samples in uneven shards": (3, {}, 12, 2, (*BUCKETS, "--max_grad_norm", 0, *STEPS)),
    "uneven shards of copies": (6, COPIES, 6, 1, (*EMA, *STEPS)),
    "copies on the host": (4, COPIES | OFFLOAD, 4, 1, (*EMA, "--max_grad_norm", 0.01, *STEPS)),
    "more processes than steps": (3, {}, 3, 1, ("--max_train_steps", 1)),
    "more processes than clips": (8, {}, 8, 1, STEPS),
    "epochs with an incomplete last batch": (2, {}, 4, 1, (*BUCKETS, "--num_train_epochs", 2)),
    "adam on the host": (2, OFFLOAD, 4, 2, ("--optimizer", "adam", "--weight_decay", 0.01, *EMA, *STEPS)),
    "the best checkpoint": (3, {}, 3, 1, ("--validation_data_root", "CLIPS", "--keep_best", "--export_best", *STEPS)),
    "two prompts for three processes": (3, {}, 3, 1, ("--validation_prompt", "a:::b", "--validation_steps", 1, *STEPS)),
    "everything saved on the host": (2, {}, 4, 1, ("--keep", "all", "--kept_on", "host", *STEPS)),
}
Train = Callable[..., Path]


@pytest.fixture
def train(tiny: Callable[[str], Path], clips: Path, tmp_path: Path) -> Train:
    """train(name, ranks, environment, batch, samples, flags) runs the script and returns its output folder."""

    def trained(
        name: str, ranks: int, environment: dict[str, str], batch: int, samples: int, more: tuple[object, ...]
    ) -> Path:
        flags = sft_flags(tiny("5b"), clips, tmp_path / name, "--tensor_cache", tmp_path / "cache")
        if "--num_train_epochs" in more:
            start = flags.index("--max_train_steps")
            del flags[start : start + 2]
        flags += ["--learning_rate", "1e-3", "--lr_scheduler", "constant", "--train_batch_size", str(samples)]
        flags += [str(clips if flag == "CLIPS" else flag) for flag in more]
        command = python(SFT_SCRIPT, *flags, "--gradient_accumulation_steps", batch // ranks // samples)
        for process in fork_ranks(ranks, command, **environment) if ranks > 1 else [Forked(command)]:
            finish(process)
        return tmp_path / name

    return trained


def check_equal(own: Path, right: Path) -> None:
    """Compares losses, gradient norms, held-out losses and exported weights."""
    assert losses(own) == pytest.approx(losses(right), rel=1e-5)
    for name in ("grad_norm", "held_out_loss"):
        found, expected = ([line[name] for line in metrics(output) if name in line] for output in (own, right))
        assert found == pytest.approx(expected, rel=1e-4)
    weights, expected_weights = (safetensors_of(output / "transformer") for output in (own, right))
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_unusual_runs_are_those_of_one_process(case: str, train: Train) -> None:
    ranks, environment, batch, samples, flags = CASES[case]
    right = train("one", 1, {}, batch, samples, flags)
    check_equal(train("sharded", ranks, FSDP | environment, batch, samples, flags), right)


def test_a_run_continues_with_other_flags_on_shards(train: Train) -> None:
    """One process makes two steps. Then clipping and the length change, on one process and on sharded copies."""
    more = ("--max_train_steps", 4, "--max_grad_norm", 0.05, "--allow_changed", "max_grad_norm", *EMA)
    for name in ("one", "sharded"):
        train(name, 1, {}, 4, 1, (*EMA, "--max_train_steps", 2))
    right = train("one", 1, {}, 4, 1, more)
    check_equal(train("sharded", 4, FSDP | COPIES | OFFLOAD, 4, 1, more), right)
