"""Tests health.py: numbers that describe validation videos, and what a run says when one is odd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import PROMPT, lora_flags, train

from cogvideox.data.health import Health
from cogvideox.evaluation.health import numbers_of, oddities
from cogvideox.evaluation.validation import Validator
from cogvideox.runtime.metrics import column, read_records
from cogvideox.runtime.report import RunFiles
from cogvideox.runtime.run import METRICS_NAME

CLIPS = Health(0.5, 0.3, 0.02)
LEVEL = 1 / 255


@pytest.mark.parametrize(
    ("video", "clips", "odd"),
    [
        (CLIPS, CLIPS, []),
        (Health(0.01, 0.0, 0.02), None, ["black"]),
        (Health(0.99, 0.0, 0.02), None, ["white"]),
        (Health(0.5, 0.3, 0.1 * LEVEL), CLIPS, ["static"]),
        (Health(0.5, 0.3, 0.0), CLIPS._replace(motion=0.0), []),  # the clips are pictures
        (Health(0.5, 0.3, 0.2), CLIPS, ["moves 10 times as much as the training clips"]),
        (Health(0.5, 0.3, 0.004), CLIPS, ["moves 0.2 times as much as the training clips"]),
        (Health(0.9, 0.01, 0.02), CLIPS, ["brightness +0.40 against the training clips", "saturation -0.29 against"]),
    ],
)
def test_odd_videos_are_named(video: Health, clips: Health | None, odd: list[str]) -> None:
    found = list(oddities(video, clips))
    assert len(found) == len(odd)
    assert all(text.startswith(start) for text, start in zip(found, odd, strict=True))


def test_motion_is_relative_to_the_clips() -> None:
    assert numbers_of([Health(0.5, 0.25, 0.03)], CLIPS)["validation_motion_ratio"] == pytest.approx(1.5)
    assert "validation_motion_ratio" not in numbers_of([CLIPS], None)


def test_a_run_measures_its_videos_once(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The video of step 0 is half bright, and that of step 2 has NaN. The second start changes nothing."""
    values = iter([0.5, float("nan")])
    monkeypatch.setattr(Validator, "sample", lambda *_: torch.full((1, 9, 3, 64, 96), next(values)))
    flags = lora_flags(
        model, tensors, tmp_path, "--load_tensors", "--max_train_steps", 2, "--validation_prompt", PROMPT
    )
    for _ in range(2):
        assert train(flags) == 0
        steps, brightness = column(read_records(tmp_path / METRICS_NAME), "validation_brightness")
        assert steps.tolist() == [0, 2]
        assert brightness == pytest.approx([0.5, 0.0], abs=0.02)
    said = capsys.readouterr().err
    assert said.count("validation after step 2: NaN or infinite values in step-000002_prompt-0") == 1
    assert "validation after step 2: step-000002" in said
    assert ": black, " in said
    assert "<th>brightness</th>" in (tmp_path / "report.html").read_text()
    assert len(RunFiles(tmp_path).steps) == 2


def test_videos_are_measured_again_if_prompts_are_changed_or_added(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of a prompt's videos go with them, also those of step 0, which is not rendered again.

    If a prompt is added, the numbers of the step become the means over all prompts.
    """
    values = iter([0.25, 0.5, 0.75, 0.25])
    monkeypatch.setattr(Validator, "sample", lambda *_: torch.full((1, 9, 3, 64, 96), next(values)))
    flags = lora_flags(model, tensors, tmp_path, "--load_tensors", "--max_train_steps", 2, "--validation_prompt")
    prompts = {PROMPT: {0: 0.25, 2: 0.5}, "another prompt": {2: 0.75}, "another prompt:::a third": {2: 0.5}}
    for prompt, wanted in prompts.items():
        assert train([*flags, prompt]) == 0
        records = read_records(tmp_path / METRICS_NAME)
        brightness = dict(zip(*column(records, "validation_brightness"), strict=True))
        assert brightness == pytest.approx(wanted, abs=0.02)
        assert column(records, "loss")[0].tolist() == [1, 2]
