"""The probes that measure the rates of a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogvideox.planning import probes


def test_a_probe_runs_for_the_intended_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(probes.time, "perf_counter", lambda: now[0])
    for each, calls in ((0.01, 20), (3.0, 1)):
        durations = iter([5.0, *[each] * 100])  # the first call compiles
        made: list[float] = []

        def run(durations: Any = durations, made: list[float] = made) -> None:
            made.append(next(durations))
            now[0] += made[-1]

        assert probes.seconds_per_call(run) == pytest.approx(each)
        assert len(made) == 2 + calls


def test_probes_in_turns_count_only_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card gets slower in the middle of ten turns of one product and two calls of attention."""
    now, turns = [0.0], [0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, other: Event) -> float:
            return 1000 * (other.at - self.at)

    def take(seconds: float) -> None:
        now[0] += seconds * (2 if turns[0] > 2 + 5 else 1)

    def product() -> None:
        turns[0] += 1
        take(0.02)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(probes.time, "perf_counter", lambda: now[0])
    found = probes.seconds_in_turns((product, 1), (lambda: take(0.04), 2))
    assert found == pytest.approx([0.04, 0.08])
    assert turns[0] == 2 + 10  # 0.1 s each, for a second, after the first call and one that is timed
