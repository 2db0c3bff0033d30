"""--checkpoint_weights_only: checkpoints with weights only, from which a run resumes, and says what it has lost."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import FakeEngine, FakeMethod, run_alone, saver_of
from running import equal, losses, safetensors_of, sft_flags, train_all

from cogvideox.config import args
from cogvideox.config.options import SftOptions
from cogvideox.errors import UsageError
from cogvideox.runtime.checkpoint_files import MANIFEST_NAME, PROGRESS_NAME, checkpoints, damage_of
from cogvideox.runtime.disk_room import checkpoint_bytes
from cogvideox.runtime.resume import state_after_loss

FLAG = "--checkpoint_weights_only"
LOST = "with fresh optimizer state, and with master weights that were rounded to bf16, so the"
BF16 = ("--load_tensors", "--mixed_precision", "bf16", "--max_train_steps", 4)


@pytest.fixture(scope="module")
def complete(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with complete checkpoints."""
    output = tmp_path_factory.mktemp("complete") / "out"
    assert train_all(sft_flags(model, tensors, output, *BF16)) == 0
    return output


@pytest.fixture(scope="module")
def light(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("light") / "out"
    assert train_all(sft_flags(model, tensors, output, *BF16, FLAG)) == 0
    return output


def test_a_checkpoint_has_the_weights_of_a_complete_one_and_nothing_else(complete: Path, light: Path) -> None:
    assert losses(light) == losses(complete)
    for name in ("checkpoint-2", "checkpoint-4"):
        folder = light / name
        assert damage_of(folder) is None
        assert {path.name for path in folder.iterdir()} == {"transformer", PROGRESS_NAME, MANIFEST_NAME}
        assert equal(safetensors_of(folder / "transformer"), safetensors_of(complete / name / "transformer"))
        sizes = [sum(p.stat().st_size for p in f.rglob("*.safetensors")) for f in (folder, complete / name)]
        assert 5.8 < sizes[1] / sizes[0] < 6.2  # 2 bytes a weight, and 2 of the master's lower bits and 8 of moments


def test_weights_without_masters_lose_only_the_state_of_the_optimizer(tmp_path: Path) -> None:
    run = replace(run_alone(tmp_path), precision="bf16")
    assert state_after_loss(run, {"use_stochastic_rounding": False}).startswith(LOST)
    without = "with fresh optimizer state, so the result differs from that of a run without a break"
    assert state_after_loss(run, {"use_stochastic_rounding": True}) == without


def test_a_run_resumes_from_its_weights_and_says_so(
    model: Path, tensors: Path, light: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of samples continues, so the loss of the first step is that of the same weights."""
    flags = sft_flags(model, tensors, tmp_path / "out", *BF16)
    assert train_all([*flags, "--max_train_steps", "2", FLAG]) == 0
    assert f"{FLAG}: a run that is stopped or killed resumes {LOST}" in capsys.readouterr().err
    assert train_all(flags) == 0
    said = capsys.readouterr().err
    assert f"resuming from the weights in {tmp_path / 'out' / 'checkpoint-2'} after step 2, {LOST}" in said
    assert losses(tmp_path / "out")[:3] == losses(light)[:3]
    assert losses(tmp_path / "out")[3] != losses(light)[3]
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.safetensors").exists()


def test_a_checkpoint_is_exported(model: Path, tensors: Path, light: Path, tmp_path: Path) -> None:
    flags = sft_flags(model, tensors, tmp_path / "out", *BF16, FLAG, "--max_train_steps", 2)
    assert train_all([*flags, "--resume_from_checkpoint", str(light / "checkpoint-2")]) == 0
    assert equal(safetensors_of(tmp_path / "out" / "transformer"), safetensors_of(light / "checkpoint-2/transformer"))
    assert checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize(("flag", "needs"), [("--use_ema", ()), ("--export_best", ("--keep_best",))])
def test_what_needs_more_than_weights_is_refused(flag: str, needs: tuple[str, ...]) -> None:
    flags = sft_flags(Path("m"), Path("d"), Path("o"), "--load_tensors", FLAG, flag, *needs)
    with pytest.raises(UsageError, match=re.escape(f"{FLAG}: contradicts {flag}; ") + ".*; leave one of them out"):
        args.parse(SftOptions, None, flags, ())


def test_the_size_is_that_of_the_weights() -> None:
    where = torch.bfloat16, torch.device("cpu")
    for more, size in (((), 120), (("--use_8bit",), 61), (("--use_ema",), 180), ((FLAG,), 20)):
        options = args.parse(SftOptions, None, sft_flags(Path("m"), Path("d"), Path("o"), *more), ())
        assert checkpoint_bytes(options, 10, *where, refers=not options.loss.use_ema) == size
    assert checkpoint_bytes(options, 10, *where, refers=False) == 20


def test_the_size_is_that_of_the_compute_type_also_where_weights_are_sharded_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ShardedWeights replaces the parameters by fp32 shards of the masters."""
    run = replace(run_alone(tmp_path), precision="bf16")
    parameters = {"p": torch.nn.Parameter(torch.zeros(10))}
    monkeypatch.setattr(FakeMethod, "parameters", lambda _: parameters, raising=False)
    for more, size in (((), 140), ((FLAG,), 20)):
        options = args.parse(SftOptions, None, sft_flags(Path("m"), Path("d"), tmp_path, *more), ())
        saver = saver_of(run, FakeEngine())
        saver.check_disk(options, 0, 10)
        assert saver.num_bytes == size


def test_in_the_background_only_weights_are_written_too(tmp_path: Path) -> None:
    saver = saver_of(
        run_alone(tmp_path), FakeEngine(), num_bytes=1000, copy_bytes=1000, in_background=True, weights_only=True
    )
    saver.save(2)
    saver.finish()
    assert {path.name for path in (tmp_path / "checkpoint-2").glob("*.safetensors")} == {"lora.safetensors"}
