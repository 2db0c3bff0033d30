"""startup.py: the phases of a start add up, and one line says how long they took and what came from the cache."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import startup as benchmark

from cogvideox.config import args
from cogvideox.config.options import LoraOptions
from cogvideox.runtime import startup
from cogvideox.runtime.startup import Startup


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The first entry is the time now, in seconds after the start of the process."""
    now = [0.0]
    made = Startup()
    began = made._began
    monkeypatch.setattr(startup.time, "time", lambda: began + now[0])
    return now


def test_the_clock_begins_with_the_process() -> None:
    made = Startup()
    made.done("imports")
    assert 0 < made.seconds["imports"] < time.time()
    assert "imports" in made.line()


def test_each_phase_lasts_from_the_end_of_the_one_before(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "compiled_graphs", lambda: (0, 0))
    made = Startup()
    for name, now in (("imports", 2.0), ("data", 5.0), ("imports", 5.5), ("first step", 9.0)):
        clock[0] = now
        made.done(name)
    assert made.seconds == pytest.approx({"imports": 2.5, "data": 3.0, "first step": 3.5})
    assert made.line() == "first step finished after 9.0 s: imports 2.5, data 3.0, first step 3.5"


@pytest.mark.parametrize("folder", ["/somewhere/inductor", None])
def test_the_line_says_how_many_graphs_came_from_which_cache(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    monkeypatch.setattr(startup, "compiled_graphs", lambda: (4, 3))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if folder:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    end = f"3 of 4 compiled graphs from the cache in {folder or 'torch'}"
    assert end in Startup().line()


def test_the_benchmark_reads_the_line(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """It also measures how long a script takes to end after its last line, which may follow a progress bar."""
    monkeypatch.setattr(startup, "compiled_graphs", lambda: (4, 3))
    made = Startup()
    for name, now in (("imports and processes", 2.0), ("first step", 9.0)):
        clock[0] = now
        made.done(name)
    code = f"import time; print('step 1', end='\\r'); print({made.line()!r}); print('finished:'); time.sleep(0.5)"
    start = benchmark.measure_start([sys.executable, "-c", code], dict(os.environ))
    assert start.phases == {"imports and processes": 2.0, "first step": 7.0}
    assert (start.first_step, start.graphs) == (9.0, "3 of 4")
    assert 0.5 <= start.exit < 5
    with pytest.raises(RuntimeError, match="no plan"):
        benchmark.measure_start([sys.executable, "-c", "print('no plan')"], dict(os.environ))


def test_the_benchmark_starts_the_script_with_flags_that_it_accepts(tmp_path: Path) -> None:
    (tmp_path / "tiny-tensors").mkdir()
    command = benchmark.training_command("tiny", tmp_path, ["--plan", "lean", "--output_dir", "out"])
    options = args.parse(LoraOptions, None, command[2:], ())
    assert (options.train.max_train_steps, options.plan.plan) == (2, "lean")


def test_the_benchmark_prints_each_start_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny-tensors").mkdir()
    starts = iter([benchmark.Start({"first step": 9.0}, 9.5, "3 of 4", 0.5)])
    monkeypatch.setattr(benchmark, "measure_start", lambda *_: next(starts))
    with pytest.raises(StopIteration):  # The second start is cut off.
        benchmark.time_training("tiny", tmp_path, ["--plan", "lean"])
    assert 'cold: {"phases": {"first step": 9.0}, "first_step": 9.5' in capsys.readouterr().out
