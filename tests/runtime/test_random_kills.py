"""No work is lost at 200 random kills: the same command goes on, and ends as a run that nobody touched.

Half of the kills come at a random file that the process opens or renames, or unit of work that it has done, which is
the same moment on any machine; the others after a random share of the time that a whole run takes: in the middle of
anything.
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

KILLS = 5  # a test
MOMENTS = 240  # files that are opened, names that change and units of work: about as many as a whole run has
SHORT = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--validation_steps", 2)
SHORT += ("--num_inference_steps", 1, "--gradient_accumulation_steps", 1, "--validation_prompt", PROMPT)
LORA, SFT = (LORA_SCRIPT, lora_flags), (SFT_SCRIPT, sft_flags)
# what is killed: script and flags, the model, more flags, processes, tests
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
    """A kind of run, in folders of its own."""

    def __init__(self, kind: str, model: Path, clips: Path, image: Path, folder: Path) -> None:
        (self.script, self.flags_of), _, self.more, self.ranks, _ = KINDS[kind]
        self.model, self.clips, self.folder = model, clips, folder
        self.images = ["--validation_images", image] if kind == "image-to-video" else []

    def command(self, folder: Path) -> list[object]:
        """The command of a run in a folder, always the same."""
        flags = [*SHORT, *self.more, *self.images, "--tensor_cache", folder / "cache"]
        return python(self.script, *self.flags_of(self.model, self.clips, folder / "out", *flags))

    def run(self, folder: Path, killed_at: tuple[str, int] | None = None, after: float | None = None) -> bool:
        """Runs the command for a folder, as often as somebody wishes; returns whether it came to its end.

        Args:
            killed_at: of the first process, which writes; see forking.signal_at.
            after: seconds after which it is killed.
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
    def whole(self) -> tuple[Path, float]:
        """The folder of a run that nobody touched, and the seconds that it took."""
        began = time.monotonic()
        assert self.run(self.folder / "whole")
        return self.folder / "whole", time.monotonic() - began

    def compare(self, folder: Path) -> None:
        """Raises AssertionError where a folder has other files, losses or weights."""
        whole, _ = self.whole
        assert listing(folder) == listing(whole)
        assert losses(folder / "out") == losses(whole / "out")
        for part in ("out", "out/transformer"):
            assert equal(safetensors_of(folder / part), safetensors_of(whole / part))


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
def test_killed_at_random_it_ends_the_same(
    kind: str, number: int, kinds: Callable[[str], Killed], tmp_path: Path
) -> None:
    killed, draw = kinds(kind), random.Random(f"{kind} {number}")
    _, seconds = killed.whole
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        if kills % 2:
            ended = killed.run(folder, after=draw.uniform(0.05, seconds))
        else:
            ended = killed.run(folder, killed_at=(f"{folder}/|^unit ", draw.randint(1, MOMENTS)))
        if ended:  # before the moment came: it was near its end
            killed.compare(folder)
            runs += 1
        else:
            kills += 1
    if not ended:
        assert killed.run(folder)
        killed.compare(folder)


@pytest.mark.long
@pytest.mark.fault("ranks: one of two is killed while both train")
@pytest.mark.parametrize("unit", [7, 12])
def test_what_is_left_of_a_group_ends_by_itself(unit: int, kinds: Callable[[str], Killed], tmp_path: Path) -> None:
    """It does not wait for ever for gradients that never come, and the same command goes on."""
    killed = kinds("two processes")
    left, dead = fork_ranks(2, killed.command(tmp_path), {1: ("^unit ", unit)})
    assert dead.wait() == -signal.SIGKILL
    assert left.wait(120) != 0
    assert killed.run(tmp_path)
    killed.compare(tmp_path)


def test_two_hundred_kills_are_planned() -> None:
    assert len(CHUNKS) * KILLS == 200
