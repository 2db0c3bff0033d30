"""Wrong settings, data, processes or trackers end a run before any model is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import edit_json
from running import (
    LORA_SCRIPT,
    PROMPT,
    Forked,
    finish,
    fork_ranks,
    free_port,
    lora_flags,
    losses,
    metrics,
    python,
    ranks_environment,
    sft_flags,
    train,
    train_all,
)

from cogvideox.config.conflicts import check_trackers
from cogvideox.config.options import tracker_names
from cogvideox.errors import UsageError
from cogvideox.model import models
from cogvideox.runtime.checkpoint_files import PROGRESS_NAME
from cogvideox.runtime.resume import DATA, SAMPLES_NAME, setting

CHANGED = ("learning_rate", "samples_per_step", DATA)
VALIDATED = ("--load_tensors", "--validation_prompt", PROMPT)


@pytest.fixture
def again(reference: Path, tmp_path: Path) -> Path:
    """Returns a copy of the folder of a run that ended at step 6."""
    return Path(shutil.copytree(reference, tmp_path / "again"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading any network an error."""

    def loads(*_: Any, **__: Any) -> Iterator[None]:
        raise AssertionError("a model was loaded")

    for name in ("text_encoder", "load_vae", "video_encoder", "load_transformer"):
        monkeypatch.setattr(models, name, loads)


def refused(flags: list[str], run: Callable[[list[str]], int] = train) -> str:
    with pytest.raises(UsageError) as error:
        run(flags)
    return str(error.value)


def prepared_without_last(tensors: Path, folder: Path) -> tuple[Path, str]:
    """Copies a prepared folder without its last sample, and returns the copy and the id of that sample."""
    copy = Path(shutil.copytree(tensors, folder))
    samples = json.loads((copy / "index.json").read_text())["samples"]
    edit_json(copy / "index.json", samples=samples[:-1])
    return copy, samples[-1]["id"]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("flags: a setting that differs from the checkpoint's", times=4)
@pytest.mark.usefixtures("no_model")
def test_changed_settings_are_refused_before_any_model_loads(model: Path, tensors: Path, again: Path) -> None:
    flags = lora_flags(model, tensors, again, *VALIDATED, "--max_train_steps", 8)
    text = refused([*flags, "--learning_rate", "2e-2"])
    assert "  --learning_rate: 0.01 there, 0.02 now" in text
    assert (
        f"add --allow_changed learning_rate, or start a new run with another --output_dir (--lora_path {again}" in text
    )
    text = refused([*flags, "--rank", "8"])
    assert "  --rank: 4 there, 8 now" in text
    assert "give them again, or start a new run with another --output_dir\n" in text  # --lora_path keeps the rank
    assert "  --mixed_precision: no there, bf16 now" in refused([*flags, "--mixed_precision", "bf16"])
    rule = "  --train_batch_size x --gradient_accumulation_steps x processes: 2 there, 4 now"
    assert rule in refused([*flags, "--gradient_accumulation_steps", "4"])
    assert "checkpoint-9: the folder does not exist" in refused([*flags, "--resume_from_checkpoint", "checkpoint-9"])
    assert f"{again}: manifest.json is missing; in" in refused([*flags, "--resume_from_checkpoint", str(again)])
    assert "is at step 6 already" in refused([*flags, "--max_train_steps", "3"])


def test_weights_of_another_script_are_not_offered(model: Path, tensors: Path, again: Path, tmp_path: Path) -> None:
    rule = "was made with other settings; give them again, or start a new run with another --output_dir\n"
    assert rule in refused(sft_flags(model, tensors, again, "--load_tensors"), train_all)
    flags = sft_flags(model, tensors, tmp_path / "all", "--load_tensors", "--max_train_steps", 1)
    assert train_all(flags) == 0
    assert rule in refused(lora_flags(model, tensors, tmp_path / "all", "--load_tensors"))


def test_every_setting_is_named_by_what_a_user_gives(reference: Path) -> None:
    recipe = json.loads((reference / "checkpoint-6" / PROGRESS_NAME).read_text())["recipe"]
    names = [setting(name) for name in recipe if name != DATA]
    assert [name for name in names if not name.startswith(("--", "the script"))] == []
    assert len(set(names)) == len(names)


def test_an_allowed_change_keeps_the_step_and_the_videos(model: Path, tensors: Path, again: Path) -> None:
    flags = lora_flags(model, tensors, again, *VALIDATED, "--max_train_steps", 7)
    videos = {path.name for path in (again / "validation").glob("step-00000[06]*.mp4")}
    before = losses(again)
    assert train([*flags, "--learning_rate", "2e-2", "--allow_changed", "learning_rate"]) == 0
    assert [line["lr"] for line in metrics(again) if "lr" in line] == [0.01] * 6 + [0.02]
    assert losses(again)[:6] == before
    assert videos <= {path.name for path in (again / "validation").iterdir()}
    assert "--learning_rate: 0.02 there, 0.01 now" in refused(flags)  # The new checkpoint has the new value.


def test_all_allowed_changes_are_named_together(model: Path, tensors: Path, again: Path) -> None:
    """A second --allow_changed replaces the first, so a message that names only one of two would not help."""
    flags = lora_flags(model, tensors, again, *VALIDATED, "--max_train_steps", 8, "--learning_rate", "2e-2")
    text = refused([*flags, "--caption_dropout", "0.5", "--allow_changed", "learning_rate"])
    assert "add --allow_changed learning_rate caption_dropout, or start" in text
    assert "--learning_rate:" not in text


def test_a_change_of_a_finished_run_has_no_effect_and_the_card_does_not_claim_it(
    model: Path, tensors: Path, again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer, _ = prepared_without_last(tensors, tmp_path / "fewer")
    changed = ("--learning_rate", "2e-2", "--gradient_accumulation_steps", 1)
    before, data = json.loads((again / "recipe.json").read_text()), (again / SAMPLES_NAME).read_bytes()
    flags = lora_flags(model, fewer, again, *VALIDATED, *changed)
    assert train([*flags, "--allow_changed", "learning_rate", "samples_per_step", "data"]) == 0
    rule = f"has no effect; {again / 'checkpoint-6'} has all 6 steps; give a larger --max_train_steps"
    assert f"--allow_changed samples_per_step learning_rate data: {rule}\n" in capsys.readouterr().err
    after = json.loads((again / "recipe.json").read_text())
    assert {name: after[name] for name in CHANGED} == {name: before[name] for name in CHANGED}
    assert "6, of 2 samples each; learning rate 0.01, constant, adamw." in (again / "README.md").read_text()
    assert (again / SAMPLES_NAME).read_bytes() == data
    assert train(lora_flags(model, tensors, again, *VALIDATED, "--max_train_steps", 7)) == 0


def test_the_card_names_the_settings_of_all_steps(
    model: Path, tensors: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*lora_flags(model, tensors, again, *VALIDATED), "--allow_changed", "learning_rate", "samples_per_step"]
    assert train([*flags, "--max_train_steps", "7", "--learning_rate", "2e-2"]) == 0
    first = {"until": 6, "learning_rate": 0.01}
    assert json.loads((again / "recipe.json").read_text())["earlier"] == [first]
    assert {path.parent.name for path in again.glob("validation/**/step-000000*.mp4")} == {"validation"}
    later = [*flags, "--learning_rate", "2e-2", "--gradient_accumulation_steps", "1"]
    assert train([*later, "--max_train_steps", "8"]) == 0
    second = {"until": 7, "samples_per_step": 2}
    for _ in range(2):  # The second time, all steps are done.
        assert json.loads((again / "recipe.json").read_text())["earlier"] == [first, second]
        card = (again / "README.md").read_text()
        assert "8, of 1 sample each; learning rate 0.02, constant, adamw." in card
        batch = "--train_batch_size x --gradient_accumulation_steps x processes"
        assert f"- Settings up to step 6: --learning_rate: 0.01.\n- Settings up to step 7: {batch}: 2.\n" in card
        assert train([*later, "--max_train_steps", "8"]) == 0
    assert "has no effect" not in capsys.readouterr().err
    assert train([*flags, "--max_train_steps", "2", "--resume_from_checkpoint", "checkpoint-2"]) == 0
    assert "earlier" not in json.loads((again / "recipe.json").read_text())


def test_the_flag_that_makes_a_run_too_short_is_named(model: Path, tensors: Path, again: Path) -> None:
    flags = lora_flags(model, tensors, again, *VALIDATED)
    at = flags.index("--max_train_steps")
    text = refused([*flags[:at], *flags[at + 2 :], "--num_train_epochs", "1"])
    assert f"--num_train_epochs 1, which are 3 steps: {again} is at step 6 already; give more" in text


def test_a_finished_run_is_evaluated_once(
    model: Path, tensors: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(lora_flags(model, tensors, again, *VALIDATED)) == 0
    assert capsys.readouterr().err.count("validation after step 6") == 1


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("data: clips that differ from the checkpoint's", times=3)
@pytest.mark.usefixtures("no_model")
def test_changed_data_are_named_clip_by_clip(model: Path, tensors: Path, again: Path, tmp_path: Path) -> None:
    fewer, name = prepared_without_last(tensors, tmp_path / "fewer")
    flags = lora_flags(model, fewer, again, "--load_tensors", "--max_train_steps", 8)
    text = refused(flags)
    assert f"1 clip removed ({name}); give the same data, or add --allow_changed data, or" in text
    samples = json.loads((fewer / "index.json").read_text())["samples"]
    renamed = [sample | {"id": f"new-{number}"} if number < 2 else sample for number, sample in enumerate(samples)]
    renamed[2] = renamed[2] | {"prompt_key": renamed[3]["prompt_key"]}
    edit_json(fewer / "index.json", samples=renamed)
    text = refused(flags)
    assert "2 clips added (new-0, new-1), 3 clips removed (" in text
    assert f"1 clip changed ({samples[2]['id']})" in text
    assert "prepared with other flags" not in text
    flags_then = json.loads((tensors / "index.json").read_text())["recipe"]
    other = {"id_token": None, "train_resolution": ["9x64x96", "1x64x96"], "video_reshape_mode": "center"}
    edit_json(fewer / "index.json", recipe=flags_then | other)
    rule, *changed = refused(flags).splitlines()
    assert f"1 clip changed ({samples[2]['id']}); they were prepared with other flags; give the same data, or" in rule
    assert changed == [
        "  --id_token: TOKEN there, not set now",
        "  --train_resolution: not set there, 9x64x96 1x64x96 now",
        "  --video_reshape_mode: none there, center now",
    ]
    (again / SAMPLES_NAME).unlink()
    assert "was trained on other data: clips or captions differ; give" in refused(flags)


@pytest.mark.usefixtures("no_model")
def test_a_dry_run_compares_settings_and_data_with_the_checkpoint(
    model: Path, tensors: Path, again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*VALIDATED, "--max_train_steps", 8, "--dry_run", "--gpu", "h100")
    flags = lora_flags(model, tensors, again, *more)
    assert train(flags) == 0
    text = capsys.readouterr().out
    assert "steps: 8 of 2 samples; 6 are done, in checkpoint-6\n" in text
    assert "not checked" not in text
    assert "  --rank: 4 there, 8 now" in refused([*flags, "--rank", "8"])
    fewer, name = prepared_without_last(tensors, tmp_path / "fewer")
    assert f"1 clip removed ({name})" in refused(lora_flags(model, fewer, again, *more))
    assert train(lora_flags(model, fewer, again, *more, "--allow_changed", "data")) == 0


@pytest.mark.usefixtures("no_model")
def test_a_dry_run_compares_clips_that_are_not_prepared_with_the_checkpoint(
    model: Path, clips: Path, tensors: Path, again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(clips, tmp_path / "clips"))
    cache = shutil.copytree(tensors, tmp_path / "cache")
    more = ("--id_token", "TOKEN", *VALIDATED[1:], "--tensor_cache", cache, "--max_train_steps", 8)
    more += ("--dry_run", "--gpu", "h100")
    flags = lora_flags(model, data, again, *more)
    assert train(flags) == 0
    assert "not checked" not in capsys.readouterr().out
    lines = (data / "prompts.txt").read_text().splitlines()
    (data / "prompts.txt").write_text("\n".join(["another caption", *lines[1:]]))
    assert "was trained on other data: 1 clip changed" in refused(flags)
    shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    shutil.copytree(model / "vae", tmp_path / "model" / "vae", ignore=shutil.ignore_patterns("*.safetensors"))
    assert train(lora_flags(tmp_path / "model", data, again, *more)) == 0
    line = f"not checked: whether checkpoint-6 was made with these clips; {tmp_path / 'model'} has no vae here"
    assert line in capsys.readouterr().out.splitlines()


def test_allowed_other_data_are_used(model: Path, tensors: Path, again: Path, tmp_path: Path) -> None:
    fewer, _ = prepared_without_last(tensors, tmp_path / "fewer")
    flags = lora_flags(model, fewer, again, "--load_tensors", "--max_train_steps", 7, "--allow_changed", "data")
    assert train(flags) == 0
    assert train(flags[:-2]) == 0  # The checkpoint now has the new data.


# -- processes ---------------------------------------------------------------------------------------------------------


def two_ranks(*commands: list[str]) -> list[str]:
    """Starts two processes with different flags, which end with status 2, and returns what each printed."""
    port = free_port()
    ranks = [
        Forked(python(LORA_SCRIPT, *flags), **ranks_environment(number, len(commands), port))
        for number, flags in enumerate(commands)
    ]
    return [finish(rank, status=2) for rank in ranks]


@pytest.mark.fault("ranks: a process with other data")
def test_processes_with_different_data_are_refused(model: Path, tensors: Path, tmp_path: Path) -> None:
    fewer, _ = prepared_without_last(tensors, tmp_path / "fewer")
    commands = [lora_flags(model, data, tmp_path / "out", "--load_tensors") for data in (tensors, fewer)]
    for text in two_ranks(*commands):
        assert "process 1 has the training data" in text
        assert "--data_root" in text


@pytest.mark.fault("ranks: a process with other settings")
def test_processes_with_different_settings_are_refused(model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = lora_flags(model, tensors, tmp_path / "out", "--load_tensors")
    for text in two_ranks(flags, [*flags, "--learning_rate", "5e-3"]):
        assert "process 1 has --learning_rate 0.005, process 0 has 0.01" in text


@pytest.mark.parametrize(("first", "second"), [(None, "int8"), ("int8", None)])
@pytest.mark.fault("ranks: a process with other settings")
def test_a_setting_that_only_one_process_has_is_named(
    model: Path, tensors: Path, tmp_path: Path, first: str | None, second: str | None
) -> None:
    flags = lora_flags(model, tensors, tmp_path / "out", "--load_tensors")
    commands = [[*flags, *(["--base_precision", value] if value else [])] for value in (first, second)]
    for text in two_ranks(*commands):
        assert f"process 1 has --base_precision {second!r}, process 0 has {first!r}; give all processes" in text


@pytest.mark.fault("ranks: a process with other settings")
def test_processes_with_another_number_of_steps_or_passes_are_refused(
    model: Path, tensors: Path, tmp_path: Path
) -> None:
    """With the first two, a process would wait for ever; with the last one, other samples would be trained."""
    flags = lora_flags(model, tensors, tmp_path / "out", "--load_tensors")
    others = {"max_train_steps": (6, 7), "checkpointing_steps": (2, 3), "gradient_accumulation_steps": (2, 1)}
    more = [word for name, (_, value) in others.items() for word in (f"--{name}", str(value))]
    for text in two_ranks(flags, [*flags, *more, "--train_batch_size", "2"]):
        for name, (first, second) in others.items():
            assert f"process 1 has --{name} {second}, process 0 has {first}; give all processes" in text


@pytest.mark.fault("ranks: a process with other settings")
def test_processes_with_different_settings_are_refused_when_a_run_is_resumed(
    model: Path, tensors: Path, again: Path
) -> None:
    """One of them has the settings of the checkpoint. It must not wait for the other."""
    flags = lora_flags(model, tensors, again, *VALIDATED, "--max_train_steps", 8, "--gradient_accumulation_steps", 1)
    for text in two_ranks(flags, [*flags, "--learning_rate", "5e-3"]):
        assert "process 1 has --learning_rate 0.005, process 0 has 0.01" in text


@pytest.mark.long
@pytest.mark.fault("ranks: output folders that are not shared")
def test_processes_with_different_folders_are_refused(model: Path, tensors: Path, tmp_path: Path) -> None:
    commands = [lora_flags(model, tensors, tmp_path / name / "out", "--load_tensors") for name in ("a", "b")]
    for text in two_ranks(*commands):
        assert "process 1 has another folder of this name than process 0; give one that all machines share" in text


def test_processes_that_agree_train(model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = lora_flags(model, tensors, tmp_path / "out", "--load_tensors", "--max_train_steps", 1)
    for rank in fork_ranks(2, python(LORA_SCRIPT, *flags)):
        finish(rank)


# -- trackers ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("trackers: wandb cannot be reached, or rejects the key")
@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("error", ["Timed out while retrying: Post", "API key must have 40+ characters"])
def test_a_tracker_that_cannot_start_ends_the_run_in_one_line(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    def init(**_: Any) -> None:
        from wandb.errors import CommError

        raise CommError(f"{error}\nmore lines")

    monkeypatch.setattr("wandb.init", init)
    text = refused(lora_flags(model, tensors, tmp_path / "out", "--load_tensors", "--report_to", "wandb"))
    assert text.startswith(f"--report_to wandb: cannot start: {error}; set WANDB_MODE=offline")
    assert "\n" not in text


@pytest.mark.fault("trackers: WANDB_DISABLED and WANDB_MODE=dryrun", times=2)
def test_wandb_variables(model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("exit", "excepthook"):  # wandb replaces them for the rest of the process.
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    options: Any = type("", (), {"train": type("", (), {"report_to": "wandb"})})
    assert "not logged in" in "".join(check_trackers(options))
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert list(check_trackers(options)) == []
    flags = lora_flags(model, tensors, tmp_path / "out", "--load_tensors", "--max_train_steps", 1)
    assert train([*flags, "--report_to", "wandb"]) == 0
    assert list((tmp_path / "out").glob("wandb/offline-run-*/*.wandb"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert list(check_trackers(options)) == []
    assert tracker_names("all") == ["tensorboard"]
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("wandb was started"))
    assert train([*flags, "--report_to", "wandb"]) == 0
