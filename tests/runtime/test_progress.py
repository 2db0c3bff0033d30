"""progress.py: bars on a terminal, and few plain lines in a log."""

from __future__ import annotations

import sys

import pytest

from cogvideox import progress
from cogvideox.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The first entry is the time now."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(initial=2, total=102, desc="training", unit="step")
    for step in range(100):
        clock[0] += 1
        bar.set_postfix({"loss": f"0.{step}"}, refresh=False)
        bar.update()
        ProgressBar.write("a message", file=sys.stdout)
    bar.close()
    bar.close()
    out, err = capsys.readouterr()
    assert out == "a message\n" * 100
    assert err.splitlines() == [
        "training: 32 of 102 steps in 00:30, 01:10 left, loss=0.29",
        "training: 62 of 102 steps in 01:00, 00:40 left, loss=0.59",
        "training: 92 of 102 steps in 01:30, 00:10 left, loss=0.89",
        "training: 102 of 102 steps in 01:40, loss=0.99",
    ]


def test_iterating_counts(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(ProgressBar(iter("abc"), total=3, desc="drawing", unit="clip")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "drawing: 3 of 3 clips in 00:00\n"


def test_some_bars_leave_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({"leave": False}, {"disable": True}):
        with ProgressBar(total=2, desc="validation", unit="step", **options) as bar:  # type: ignore[arg-type]
            bar.update(2)
    with ProgressBar(total=2, desc="nothing was done", unit="step"):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(ProgressBar("abc", desc="drawing", unit="clip", disable=False)) == ["a", "b", "c"]
    ProgressBar(total=1, desc="hidden", unit="clip", disable=True).update()
    written = capsys.readouterr().err
    assert "100%|" in written
    assert "hidden" not in written
