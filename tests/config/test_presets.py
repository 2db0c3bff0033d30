"""Tests --preset: its values, what takes precedence over them, and that documentation and presets agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cogvideox.config import args
from cogvideox.config.options import ImageLoraOptions, LoraOptions, SftOptions
from cogvideox.config.presets import PRESETS, SHARED
from cogvideox.errors import UsageError

REQUIRED = ["--pretrained_model_name_or_path", "m", "--data_root", "d"]
TRAINING_PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def parsed(*more: str, options_type: Any = LoraOptions) -> tuple[Any, dict[str, str]]:
    """Returns the options of a command line and the origin of each value."""
    return args.read_flags(options_type, [*REQUIRED, *more], None)


@pytest.mark.parametrize("options_type", [LoraOptions, ImageLoraOptions])
def test_a_preset_sets_its_flags(options_type: Any) -> None:
    options, sources = parsed("--preset", "Motion", options_type=options_type)
    assert options.preset.preset == "motion"
    assert (options.lora.rank, options.lora.lora_alpha) == (128, 64.0)
    assert (options.optimizer.learning_rate, options.optimizer.optimizer) == (1e-4, "adamw")
    assert (options.train.num_train_epochs, options.train.train_batch_size) == (60, 1)
    changed = {name for name, source in sources.items() if source == "preset"}
    assert changed == {*SHARED, *PRESETS["motion"]}


@pytest.mark.parametrize("name", [*SHARED, *PRESETS["style"]])
def test_a_given_flag_takes_precedence(name: str) -> None:
    other = {"lr_scheduler": "linear", "optimizer": "adam"}.get(name, "7")
    options, sources = parsed("--preset", "style", f"--{name}", other)
    assert f"{name:31} given" in args.config_text(options, sources)
    assert not re.search(rf"^{name} .* preset ", args.config_text(options, sources), re.MULTILINE)
    assert str(args.config_dict(options)[name]) in (other, f"{other}.0")


def test_an_alias_takes_precedence() -> None:
    options, sources = parsed("--preset", "style", "--batch_size", "3")
    assert options.train.train_batch_size == 3
    assert sources["train_batch_size"] == "given as --batch_size"


def test_alpha_follows_a_given_rank() -> None:
    assert parsed("--preset", "motion", "--rank", "32")[0].lora.lora_alpha == 16.0
    assert parsed("--preset", "motion", "--rank", "32", "--lora_alpha", "8")[0].lora.lora_alpha == 8.0


@pytest.mark.parametrize("rank", ["many", "0", ""])
def test_a_bad_rank_is_reported(rank: str) -> None:
    with pytest.raises(UsageError, match="--rank"):
        parsed("--preset", "style", "--rank", *rank.split())


def test_nothing_changes_without_a_preset() -> None:
    _, sources = parsed()
    assert "preset" not in sources.values()


def test_an_unknown_preset_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"--preset styl: must be one of style, subject, motion; nearest: style"):
        parsed("--preset", "styl")


def test_a_script_that_trains_all_weights_refuses_presets() -> None:
    with pytest.raises(UsageError, match="its values are for a LoRA"):
        parsed("--preset", "style", options_type=SftOptions)


def test_the_documentation_has_the_values() -> None:
    """Each column of the table in docs/training.md is one preset."""
    section = TRAINING_PAGE.read_text().split("## Presets")[1].split("\n## ")[0]
    header, *rows = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    names = [name.strip("` ") for name in header.split(" | ")][1:]
    assert names == list(PRESETS)
    table = {cells[0].strip("`-"): cells[1:] for cells in (row.split(" | ") for row in rows)}
    assert table == {flag: [(SHARED | PRESETS[name])[flag] for name in names] for flag in table}
    assert table.keys() == {*SHARED, *PRESETS["style"]}
