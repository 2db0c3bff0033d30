"""Tests over ten thousand steps that memory, open files and threads do not grow."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from running import lora_flags, losses, train

from cogvideox.optimizer.master_weights import MasterWeights

STEPS, EVERY = 10_000, 1000


class Held(NamedTuple):
    """Counts the resident memory, open files and threads of this process."""

    resident_kib: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        files = len(os.listdir("/proc/self/fd"))
        return cls(int(status["VmRSS"].split()[0]), files, int(status["Threads"]))


@pytest.mark.long
@pytest.mark.fault("memory: 10,000 steps in one process", times=STEPS)
def test_memory_does_not_grow_over_ten_thousand_steps(
    tiny: Callable[[str], Path], tensors: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Held] = []
    step, done = MasterWeights.step, iter(range(1, STEPS + 1))

    def counted(self: MasterWeights, *given: Any, **more: Any) -> Any:
        result = step(self, *given, **more)
        if next(done) % EVERY == 0:
            seen.append(Held.now())
        return result

    monkeypatch.setattr(MasterWeights, "step", counted)
    once = ["--gradient_accumulation_steps", 1, "--max_train_steps", STEPS, "--checkpointing_steps", STEPS]
    few = ["--rank", 1, "--lora_alpha", 1, "--learning_rate", "1e-4"]
    assert train(lora_flags(tiny("5b"), tensors, tmp_path / "lora", "--load_tensors", *once, *few)) == 0
    assert len(losses(tmp_path / "lora")) == STEPS
    first, *later = seen
    assert len(later) == STEPS // EVERY - 1
    assert {(held.files, held.threads) for held in later} == {(first.files, first.threads)}
    assert max(held.resident_kib for held in later) - first.resident_kib < 32 * 1024, seen
