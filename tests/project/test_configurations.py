"""Tests that `accelerate launch` starts runs with each configuration: on the CPU, with gloo and a tiny model.

test_zero.py launches those of DeepSpeed.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import SFT_SCRIPT, Forked, finish, fork_ranks, free_port, launch, losses, metrics, python, sft_flags

NUMBERS = {"uncompiled_1": 1, "compiled_1": 1, "uncompiled_2": 2, "fsdp2": 2, "fsdp2_offload": 2, "hsdp": 4}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
DEEPSPEED_HAS_FP16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()  # otherwise DeepSpeed refuses fp16 on this CPU
SHARDS = {"fsdp2": 2, "fsdp2_offload": 2, "hsdp": 2}
GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def command(tiny: Callable[[str], Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list]:
    """command(output, ranks) trains two steps with the same global batch on any number of ranks."""
    cache = tmp_path_factory.mktemp("cache")

    def made(output: Path, ranks: int) -> list:
        flags = sft_flags(tiny("5b"), clips, output, "--tensor_cache", cache, "--max_train_steps", 2)
        return python(SFT_SCRIPT, *flags, "--gradient_accumulation_steps", GLOBAL_BATCH // ranks)

    return made


@pytest.fixture(scope="module")
def right(command: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run without a launcher."""
    output = tmp_path_factory.mktemp("one") / "sft"
    finish(Forked(command(output, 1)))
    return losses(output)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "hsdp" else pytest.mark.long) for name in NUMBERS]
)
def test_a_configuration_is_launched(
    name: str, command: Callable[..., list], right: list[float], tmp_path: Path
) -> None:
    ranks = NUMBERS[name]
    launcher = f"-m accelerate.commands.launch --config_file accelerate_configs/{name}.yaml"
    started = [sys.executable, *launcher.split(), *(["--main_process_port", free_port()] if ranks > 1 else ["--cpu"])]
    said = launch(started, ranks, command(tmp_path / "sft", ranks), tmp_path / "ranks", ACCELERATE_USE_CPU="true")[0]
    assert losses(tmp_path / "sft") == pytest.approx(right, rel=1e-5)
    assert ("sharded over" in said) == (name in SHARDS)
    assert name not in SHARDS or f"sharded over {SHARDS[name]} processes" in said


@pytest.mark.long
def test_shards_train_in_fp16_as_one_process_does(tiny: Callable[[str], Path], clips: Path, tmp_path: Path) -> None:
    """The guide trains 2b in fp16. Losses differ by the order in which fp16 gradients are summed."""
    zero = {f"zero{stage}": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage} for stage in ("2", "3")}
    for name, environment in ({"one": {}, "fsdp": FSDP} | (zero if DEEPSPEED_HAS_FP16 else {})).items():
        flags = sft_flags(tiny("2b"), clips, tmp_path / name, "--tensor_cache", tmp_path / "cache")
        flags += ["--mixed_precision", "fp16", "--learning_rate", "1e-3", "--lr_scheduler", "constant"]
        command = python(SFT_SCRIPT, *flags, "--gradient_accumulation_steps", GLOBAL_BATCH // (2 if environment else 1))
        for process in fork_ranks(2, command, **environment) if environment else [Forked(command)]:
            finish(process)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        assert {line["loss_scale"] for line in metrics(tmp_path / name) if "loss" in line} == {2.0**16}
