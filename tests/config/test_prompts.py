"""Tests prompts.py: validation prompts come from the command line or from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import options_of
from running import lora_flags, train

from cogvideox.config.flags import ValidationFlags
from cogvideox.config.prompts import check_prompts, prompts_of
from cogvideox.errors import UsageError


def test_prompts_are_split_at_the_separator() -> None:
    flags = ValidationFlags(validation_prompt=" a ::: b:c\n::: :::")
    assert prompts_of(flags) == ["a", "b:c"]
    assert prompts_of(replace(flags, validation_prompt_separator="b")) == ["a :::", ":c\n::: :::"]
    assert prompts_of(replace(flags, validation_prompt=None)) == []


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa red disc:::and more\n\n  a blue square \r\n", encoding="utf-8")
    given = ["--validation_dir", tmp_path, "--validation_prompts", "prompts.txt"]
    options = options_of(Path("x"), *given)
    assert list(check_prompts(options)) == []
    assert prompts_of(options.validation) == ["a red disc:::and more", "a blue square"]
    alone = options_of(Path("x"), "--validation_prompts", tmp_path / "prompts.txt")
    assert prompts_of(alone.validation) == prompts_of(options.validation)
    assert prompts_of(options_of(Path("x"), *given, "--do_validation", "false").validation) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"\n \n", "has no prompt"), (b"\xff\xfe\x00", "is not UTF-8")],
)
def test_problems_of_the_file(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    given = ["--validation_dir", tmp_path, "--validation_prompts", "list.txt"]
    (found,) = check_prompts(options_of(Path("x"), *given))
    assert found == f"--validation_prompts {tmp_path / 'list.txt'}: {reason}; give a text file with one prompt per line"
    assert list(check_prompts(options_of(Path("x"), *given, "--do_validation", "false"))) == []


def test_a_file_is_not_taken_for_a_prompt(tmp_path: Path) -> None:
    """Its name would be the prompt of all videos."""
    file = tmp_path / "my prompts.txt"
    given = options_of(Path("x"), "--validation_prompt", file)
    assert list(check_prompts(given)) == []  # there is no such file
    file.write_text("a red disc\n")
    (found,) = check_prompts(given)
    fix = f"to read its prompts, give --validation_prompts '{file}'"
    assert found == f"--validation_prompt {file}: is a file; {fix}"


def test_a_run_renders_the_prompts_of_a_file(tmp_path: Path, model: Path, tensors: Path) -> None:
    """Without the file, the run ends before anything is loaded."""
    (tmp_path / "prompts.txt").write_text("a red disc\na blue square\n")
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 1)
    flags += ["--do_validation", "true", "--validation_dir", str(tmp_path), "--validation_prompts"]
    with pytest.raises(UsageError, match="--validation_prompts"):
        train([*flags, "none.txt"])
    assert not (tmp_path / "lora").exists()
    assert train([*flags, "prompts.txt"]) == 0
    assert sorted(path.name for path in (tmp_path / "lora" / "validation").glob("step-000001_*")) == [
        "step-000001_prompt-0_a-red-disc_0.mp4",
        "step-000001_prompt-1_a-blue-square_0.mp4",
    ]


@pytest.mark.fault("security: a list of prompts that is a link out of --validation_dir")
def test_a_list_of_prompts_that_leads_out_of_its_folder_needs_allow_path(tmp_path: Path) -> None:
    folder, secret = tmp_path / "validation", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text("a secret\n")
    (folder / "prompts.txt").symlink_to(secret)
    given = ["--validation_dir", folder, "--validation_prompts", "prompts.txt"]
    (found,) = check_prompts(options_of(Path("x"), *given))
    assert found.startswith(f"{folder / 'prompts.txt'}: leads outside --validation_dir, to {secret}; ")
    assert list(check_prompts(options_of(Path("x"), *given, "--allow_path", tmp_path))) == []
    (folder / "prompts.txt").unlink()
    (folder / "own.txt").write_text("mine\n")
    (folder / "prompts.txt").symlink_to("own.txt")
    assert list(check_prompts(options_of(Path("x"), *given))) == []
