"""A run that is killed before any change it makes to the disk loses no work: the same command continues it."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from running import (
    IMAGE_SFT_SCRIPT,
    LORA_SCRIPT,
    PROMPT,
    Forked,
    equal,
    finish,
    lora_flags,
    losses,
    python,
    safetensors_of,
    sft_flags,
    train,
    train_image_all,
)

SHORT = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--validation_steps", 2)
SHORT += ("--num_inference_steps", 1, "--use_ema", "--gradient_accumulation_steps", 1)
KINDS = {
    "lora": ("5b", LORA_SCRIPT, lora_flags, train),
    "best": ("5b", LORA_SCRIPT, lora_flags, train),
    "image": ("5b-i2v", IMAGE_SFT_SCRIPT, sft_flags, train_image_all),
}


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_has_the_same_result(
    kind: str, tiny: Callable[[str], Path], clips: Path, image: Path, tmp_path: Path
) -> None:
    name, script, flags_of, run = KINDS[kind]
    own = {"image": ["--validation_images", image]}
    own["best"] = ["--keep_best", "--export_best", "--validation_data_root", clips]
    more = [*SHORT, "--validation_prompt", PROMPT, *own.get(kind, [])]

    def flags(folder: Path) -> list[str]:
        return flags_of(tiny(name), clips, folder / "out", "--tensor_cache", folder / "cache", *more)

    uninterrupted = tmp_path / "uninterrupted"
    assert run(flags(uninterrupted)) == 0
    for nth in itertools.count(1):
        folder = tmp_path / str(nth)
        folder.mkdir()
        status = Forked(python(script, *flags(folder)), (f"{folder}/", nth)).wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        finish(Forked(python(script, *flags(folder))))
        assert listing(folder) == listing(uninterrupted), nth
        assert losses(folder / "out") == losses(uninterrupted / "out"), nth
        for part in ("out", "out/transformer"):
            assert equal(safetensors_of(folder / part), safetensors_of(uninterrupted / part)), nth
    assert nth > 100
