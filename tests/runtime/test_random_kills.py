"""After 200 random kills no work is lost: the same command continues, with the result of an uninterrupted run.

Half of the kills come when the process opens or renames a random file or ends a random unit of work, which is the same
moment on any machine. The others come after a random share of the time of a complete run, in the middle of anything.
"""

from __future__ import annotations

import functools
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import (
    IMAGE_LORA_SCRIPT,
    LORA_SCRIPT,
    PROMPT,
    SFT_SCRIPT,
    equal,
    finish,
    fork_ranks,
    lora_flags,
    losses,
    python,
    safetensors_of,
    sft_flags,
)

KILLS = 5  # kills per test
MOMENTS = 240  # about as many opened files, renames and units of work as a complete run has
SHORT = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--validation_steps", 2)
SHORT += ("--num_inference_steps", 1, "--gradient_accumulation_steps", 1, "--validation_prompt", PROMPT)
LORA, SFT = (LORA_SCRIPT, lora_flags), (SFT_SCRIPT, sft_flags)
# What is killed: script and flags, model, more flags, number of processes, number of tests.
KINDS: dict[str, tuple[Any, str, tuple[object, ...], int, int]] = {
    "a LoRA": (LORA, "5b", ("--use_ema",), 1, 8),
    "all weights": (SFT, "5b", ("--use_ema",), 1, 7),
    "all weights with --plan lean": (SFT, "5b", ("--plan", "lean"), 1, 7),
    "image-to-video": ((IMAGE_LORA_SCRIPT, lora_flags), "5b-i2v", ("--num_image_noise_variants", 2), 1, 6),
    "two processes": (LORA, "5b", (), 2, 6),
    "dropout": (LORA, "5b", ("--lora_dropout", 0.5, "--gradient_checkpointing"), 1, 6),
}
CHUNKS = [
    pytest.param(kind, number, marks=pytest.mark.fault(f"kills: SIGKILL at random moments, {kind}", times=KILLS))
    for kind, (*_, chunks) in KINDS.items()
    for number in range(chunks)
]


class Killed:
    """Starts, kills and compares runs of one kind."""

    def __init__(self, kind: str, model: Path, clips: Path, image: Path, folder: Path) -> None:
        (self.script, self.flags_of), _, self.more, self.ranks, _ = KINDS[kind]
        self.model, self.clips, self.folder = model, clips, folder
        self.images = ["--validation_images", image] if kind == "image-to-video" else []

    def command(self, folder: Path) -> list[object]:
        """Returns the command of a run in a folder, which is always the same."""
        flags = [*SHORT, *self.more, *self.images, "--tensor_cache", folder / "cache"]
        return python(self.script, *self.flags_of(self.model, self.clips, folder / "out", *flags))

    def run(self, folder: Path, killed_at: tuple[str, int] | None = None, after: float | None = None) -> bool:
        """Runs the command for a folder once, and returns whether it finished.

        Args:
            folder: The folder, which may have an unfinished run.
            killed_at: The moment at which the first process, which writes, is killed; see forking.signal_at.
            after: Seconds after which the first process is killed.
        """
        first, *others = ranks = fork_ranks(self.ranks, self.command(folder), {0: killed_at} if killed_at else None)
        try:
            first.wait(after or 300)
        except subprocess.TimeoutExpired:
            assert after is not None
            first.send_signal(signal.SIGKILL)
        if first.wait() == -signal.SIGKILL:
            for other in others:
                if other.poll() is None:
                    other.send_signal(signal.SIGKILL)
                other.wait()
            return False
        for rank in ranks:
            finish(rank)
        return True

    @functools.cached_property
    def uninterrupted(self) -> tuple[Path, float]:
        """Returns the folder of an uninterrupted run, and the seconds that it took."""
        began = time.monotonic()
        assert self.run(self.folder / "uninterrupted")
        return self.folder / "uninterrupted", time.monotonic() - began

    def compare(self, folder: Path) -> None:
        """Asserts that a folder has the files, losses and weights of the uninterrupted run."""
        expected, _ = self.uninterrupted
        assert listing(folder) == listing(expected)
        assert losses(folder / "out") == losses(expected / "out")
        for part in ("out", "out/transformer"):
            assert equal(safetensors_of(folder / part), safetensors_of(expected / part))


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def kinds(
    tiny: Callable[[str], Path], clips: Path, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Killed]:
    @functools.cache
    def make(kind: str) -> Killed:
        return Killed(kind, tiny(KINDS[kind][1]), clips, image, tmp_path_factory.mktemp("killed"))

    return make


@pytest.mark.long
@pytest.mark.parametrize(("kind", "number"), CHUNKS)
def test_a_run_that_is_killed_at_random_has_the_same_result(
    kind: str, number: int, kinds: Callable[[str], Killed], tmp_path: Path
) -> None:
    killed, draw = kinds(kind), random.Random(f"{kind} {number}")
    _, seconds = killed.uninterrupted
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        if kills % 2:
            ended = killed.run(folder, after=draw.uniform(0.05, seconds))
        else:
            ended = killed.run(folder, killed_at=(f"{folder}/|^unit ", draw.randint(1, MOMENTS)))
        if ended:  # The run finished before the moment of the kill.
            killed.compare(folder)
            runs += 1
        else:
            kills += 1
    if not ended:
        assert killed.run(folder)
        killed.compare(folder)


@pytest.mark.long
@pytest.mark.fault("ranks: one of two is killed while both train")
@pytest.mark.parametrize("batch", [1, 3])
def test_the_other_rank_ends_when_one_is_killed(batch: int, kinds: Callable[[str], Killed], tmp_path: Path) -> None:
    """It does not wait forever for gradients, and the same command continues the run."""
    killed = kinds("two processes")
    other, killed_rank = fork_ranks(2, killed.command(tmp_path), {1: ("^unit micro-batch", batch)})
    assert killed_rank.wait() == -signal.SIGKILL
    assert other.wait(120) != 0
    assert killed.run(tmp_path)
    killed.compare(tmp_path)


def test_two_hundred_kills_are_planned() -> None:
    assert len(CHUNKS) * KILLS == 200
