"""Tests doctor.py: the page of a healthy machine, failing checks, what the page must not contain, and model files."""

from __future__ import annotations

import json
import pwd
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import doctor as script
import pytest
import torch
from block_faults import BLOCK_FAULTS, plant

from cogvideox.config.args import parse
from cogvideox.config.flags import ModelFlags
from cogvideox.config.options import DoctorOptions
from cogvideox.errors import UsageError
from cogvideox.planning import doctor, trial_training

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(autouse=True)
def small_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_BYTES", 2**20)
    monkeypatch.setattr(doctor, "DISK_PIECE", 2**18)


def options_of(*given: object) -> DoctorOptions:
    return parse(DoctorOptions, None, list(map(str, given)), ())


def copied(tiny: Tiny, folder: Path, kind: str = "5b") -> Path:
    """Returns a copy of a tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny(kind), folder / "model"))


def problem_of(model: Path) -> str:
    """Returns the message with which the check of a model fails."""
    with pytest.raises(UsageError) as caught:
        list(doctor.check_model(ModelFlags(str(model))))
    return str(caught.value)


def test_the_page_of_a_cpu(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("5b")
    assert script.main(options_of("--model_id", model, "--output_dir", tmp_path)) == 0
    page = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in page
    assert "block          streamed from the host: computes the same as diffusers, cosine at least" in page
    assert "model          text-to-video, 16 input channels" in page
    assert page.endswith("everything that was checked is usable\n")
    names = {line[:14].strip() for line in page.splitlines()}  # libraries may print other lines
    assert set(doctor.checks_of(options_of("--model_id", model))) <= names
    for private in (tmp_path, model, Path.home()):
        assert str(private) not in page
    assert not list(tmp_path.iterdir())


@pytest.fixture
def forking(forking_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training script is forked, because a started one spends seconds on imports."""
    monkeypatch.setattr(sys, "executable", str(forking_python))


@pytest.mark.usefixtures("forking")
def test_training_is_tried_with_the_script(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model needs the image-to-video script, so its choice is tested too."""
    model = tiny("5b-i2v")
    assert script.main(options_of("--model_id", model, "--output_dir", tmp_path, "--try_training")) == 0
    page = capsys.readouterr().out
    lines = [line.removeprefix("training       ") for line in page.splitlines() if line.startswith("training ")]
    assert lines[0].startswith("2 steps of a LoRA with the model at ")
    assert lines[1].startswith("plan: ")
    assert lines[2].startswith("reloaded in CogVideoXImageToVideoPipeline: max |difference| 0, ")
    assert lines[-1].startswith("the steps took ")
    assert lines[-1].count(" and ") == 2
    assert str(tmp_path) not in page
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("forking")
def test_what_ended_training_is_shown(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied(tiny, tmp_path)
    (file,) = (model / "text_encoder").glob("*.safetensors")
    file.write_bytes(b"damaged")
    out = tmp_path / "out"
    out.mkdir()
    assert script.main(options_of("--model_id", model, "--output_dir", out, "--try_training")) == 1
    (failed,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("training       FAILED: "))
    assert "the training script ended with status 2: " in failed
    assert "text_encoder" in failed
    assert str(tmp_path) not in failed
    assert not list(out.iterdir())


def test_without_a_model_the_embedded_one_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "plan: a\nsomething else\n")

    monkeypatch.setattr(subprocess, "run", record)
    page = list(trial_training.try_training(options_of().model, tmp_path, torch.bfloat16))
    assert "the tiny model of the examples at 9x64x96" in page[0]
    assert page[1] == "plan: a"
    (words,) = commands
    assert Path(words[1]).name == "cogvideox_text_to_video_lora.py"
    assert words[words.index("--mixed_precision") + 1] == "bf16"
    assert words[words.index("--pretrained_model_name_or_path") + 1] == str(trial_training.EMBEDDED_MODEL)


def test_a_failing_check_takes_one_line_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Iterator[str]:
        raise OSError("no\nmemory")
        yield

    checks: dict[str, doctor.Check] = {"first": fails, "limits": doctor.describe_limits}
    monkeypatch.setattr(doctor, "checks_of", lambda _: checks)
    assert script.main(options_of()) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "first          FAILED: OSError: no; memory"
    assert lines[1].startswith("limits         open files ")
    assert lines[2:] == ["1 of these checks failed"]


@pytest.mark.parametrize(("limit", "shown"), [(2**23, "8.0 MiB"), (resource.RLIM_INFINITY, "unlimited")])
def test_the_limit_of_locked_memory_has_a_unit(limit: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert f"locked memory {shown}" in next(doctor.describe_limits())


def test_paths_and_tokens_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "secret-of-another-form"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "m").mkdir()
    assert doctor.Redaction(options_of())(f"{tmp_path}/x") == f"FOLDER/{tmp_path.name}/x"
    redacted = doctor.Redaction(options_of("--model_id", tmp_path / "m", "--output_dir", tmp_path))
    text = f"{tmp_path}/m/vae: and {tmp_path}/x, {TOKEN}, {secret}, /srv/people/jane/lib.so, https://u:p@h.org/a?k=1"
    shown = redacted(text)
    assert shown == "MODEL/vae: and FOLDER/x, <hidden>, <hidden>, .../lib.so, https://h.org/a".replace(
        "<hidden>", doctor.HIDDEN
    )


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}[0])
    assert doctor.Redaction(options_of())("~/x") == "~/x"


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_a_wrong_block_fails(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, fault)
    with pytest.raises(RuntimeError, match=r"a block on the device, .*: training and diffusers differ"):
        list(doctor.check_block(CPU))


def test_a_folder_that_does_not_exist_is_on_the_disk_of_its_parent(tmp_path: Path) -> None:
    (line,) = doctor.checks_of(options_of("--output_dir", tmp_path / "runs" / "first"))["disk"]()
    assert "GiB free in --output_dir" in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_BYTES", 2**60)
    with pytest.raises(UsageError, match="GiB are free; give another --output_dir"):
        list(doctor.measure_disk(tmp_path))


def test_a_missing_shard_is_named(tiny: Tiny, tmp_path: Path) -> None:
    model = copied(tiny, tmp_path)
    (file,) = (model / "transformer").glob("*.safetensors")
    index = {"weight_map": {"a": file.name, "b": "part-2.safetensors"}}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    assert problem_of(model) == f"{file.parent}: part-2.safetensors of 2 files missing; download the model again"


def test_a_truncated_file_is_named(tiny: Tiny, tmp_path: Path) -> None:
    model = copied(tiny, tmp_path)
    (file,) = (model / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert problem_of(model).startswith(f"{file}: is damaged or incomplete (")
    assert problem_of(model).endswith("; download this file again")


def test_a_folder_without_a_model_fails(tmp_path: Path) -> None:
    assert "has no transformer/config.json" in problem_of(tmp_path)
