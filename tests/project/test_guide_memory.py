"""Tests benchmarks/guide_memory.py on tiny models and a CPU: rows, flags, measurements, and the table."""

import json
import math
import mmap
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import arms
import guide_memory
import pytest
import torch
from guide_memory import ARMS, BUDGET, LEAN, ROWS
from random_models import ROOT
from record import put_into
from tiny_benchmarks import shrink_models

from cogvideox.host_memory import free_host_bytes
from cogvideox.memory import buffers
from cogvideox.planning import execution

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shrinks all models."""
    shrink_models(monkeypatch)
    guide_memory.base_of.cache_clear()
    yield
    guide_memory.base_of.cache_clear()


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the processes in this process, and returns the rows of each."""
    calls: list[list[str]] = []

    def spawn(arguments: Sequence[str]) -> None:
        calls.append(list(arguments[2 : arguments.index("--results")]))
        guide_memory.main(arguments)

    monkeypatch.setattr(guide_memory, "spawn", spawn)
    return calls


def test_rows_are_those_of_the_guides() -> None:
    factory = [row for row in ROWS if row.card is None]
    assert (len(factory), len(ROWS), len({row.name for row in ROWS})) == (57, 64, 64)
    counts = {optimizer: [row.optimizer for row in factory].count(optimizer) for optimizer in guide_memory.OPTIMIZERS}
    assert counts == {"adamw": 19, "8bit": 19, "offload": 19}
    assert {row.rank for row in factory} == {0, 16, 64, 256}
    assert all(len(row.peaks) == 4 for row in factory)
    assert (ROWS[0].kind, ROWS[0].rank) == ("5b", 16)
    assert {row.precision for row in ROWS if row.card is not None and row.kind == "2b"} == {"fp16"}


def test_flags_keep_training_within_the_memory_of_the_guide() -> None:
    rows = {row.name: row for row in ROWS}
    assert rows["5b-r16-adamw"].flags(BUDGET) == ("--vram_budget", "20.342")  # 0.6 GiB of it are CUDA's own
    assert rows["5b-sft-adamw"].flags(BUDGET) == ("--vram_budget", "80.000")  # out of memory on a card of 80 GB
    assert rows["2b-sft-offload-fp16-17gb"].flags(BUDGET) == (
        *("--vram_budget", "17.000"),
        *("--optimizer_state_on", "host"),
    )
    assert rows["5b-sft-8bit"].flags(LEAN) == ("--plan", "lean", "--use_8bit")
    assert rows["5b-r16-adamw"].flags(LEAN) == ("--plan", "lean")


@pytest.mark.parametrize("arm", ARMS.values(), ids=lambda arm: arm.name)
def test_flags_are_valid(arm: guide_memory.Arm) -> None:
    row = arm.row
    options = arms.Work(row.kind, row.rank, row.batch, CPU, row.precision).options(row.flags(arm.plan))
    assert options.train.mixed_precision == row.precision


def test_every_row_is_measured_once_and_the_most_important_first() -> None:
    names = list(ARMS)
    assert {arm.row for arm in ARMS.values() if arm.plan == BUDGET} == set(ROWS)
    assert names[0] == "5b-r16-adamw-budget"
    assert max(names.index(f"{row.name}-budget") for row in ROWS) < names.index("5b-r16-adamw-lean")
    assert names.index("2b-r16-adamw-kept-budget") < names.index("5b-r16-b4-adamw-budget")


@pytest.mark.long
@pytest.mark.usefixtures("tiny")
def test_rows_from_end_to_end(tmp_path: Path, spawned: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    names = ["5b-r16-adamw-budget", "5b-sft-adamw-budget", "2b-sft-adamw-fp16-36gb-budget", "5b-r16-adamw-lean"]
    arguments = ["--rows", *names, "--device", "cpu", "--results", str(tmp_path)]
    assert guide_memory.main(arguments) == 0
    assert spawned == [names[:2], names[2:3], names[3:]]
    results = {name: json.loads((tmp_path / f"memory_{name}.json").read_text()) for name in names}
    for result in results.values():
        assert result["peaks_gib"] == [None] * 4  # a CPU has none
        assert len(result["seconds"]) == guide_memory.STEPS
        assert result["test"]["sampling_steps"] == result["validation"]["sampling_steps"] == 2
        assert result["versions"]["torch"]
    assert "2 streamed from the host" in results["5b-r16-adamw-lean"]["execution"]
    assert "2 on the device" in results["5b-r16-adamw-budget"]["execution"]
    assert results["2b-sft-adamw-fp16-36gb-budget"]["loss_scale"] > 1
    assert guide_memory.main(arguments) == 0
    assert len(spawned) == 3  # all rows have a result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"missing": []}


@pytest.mark.usefixtures("tiny")
def test_rows_that_fail_or_have_no_time_are_missing(
    tmp_path: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["5b-r16-adamw-budget", "5b-r16-offload-budget"]
    arguments = ["--rows", *names, "--device", "cpu", "--results", str(tmp_path)]
    assert guide_memory.main([*arguments, "--seconds", "1"]) == 1
    assert spawned == []
    measure = guide_memory.measure

    def failing(arm: guide_memory.Arm, device: torch.device) -> dict[str, Any]:
        if arm.row.optimizer == "adamw":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(arm, device)

    monkeypatch.setattr(guide_memory, "measure", failing)
    assert guide_memory.main(arguments) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"missing": names[:1]}
    assert [path.name for path in tmp_path.iterdir()] == [f"memory_{names[1]}.json"]


@pytest.mark.usefixtures("tiny")
def test_transformers_share_the_memory_of_one() -> None:
    work = guide_memory.SharedWork("5b", 16, 1, CPU)
    first, second = work.make_transformer(), work.make_transformer()
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(one is not other and one.data_ptr() == other.data_ptr() for one, other in pairs)
    first.requires_grad_(True)
    assert not any(p.requires_grad for p in second.parameters())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("plan", [BUDGET, LEAN])
@pytest.mark.parametrize("row", ["5b-r16-adamw", "5b-sft-adamw"])
def test_the_test_has_no_state_of_training(row: str, plan: str) -> None:
    """The last column must count neither moments nor gradients."""
    arm = ARMS[f"{row}-{plan}"]
    training = arms.Training(guide_memory.SharedWork("5b", arm.row.rank, 1, CPU), arm.row.flags(plan))
    training.measure(2)
    masters: Any = training.engine.masters  # type: ignore[attr-defined]
    group = masters.groups[-1]
    state = [weakref.ref(masters), weakref.ref(group), weakref.ref(group.arrays["exp_avg"])]
    del masters, group
    training.end()
    assert [found() for found in state] == [None] * 3
    assert arms.sample(training.work, training.transformer)["sampling_seconds"] > 0


def result_of(name: str, **changes: Any) -> dict[str, Any]:
    """Returns a result as a measurement would write it."""
    result = {"arm": name, "seconds_per_step": 2.0, "peaks_gib": [11.0, 18.25, 18.0, 15.0]}
    return result | {"device": "NVIDIA H100", "versions": {"torch": "2.11.0"}, "commit": "0123456789"} | changes


def test_table(tmp_path: Path) -> None:
    assert guide_memory.table(tmp_path) == ""
    for name in ("5b-sft-adamw-budget", "5b-sft-adamw-lean", "2b-r128-adamw-fp16-16gb-budget"):
        (tmp_path / f"memory_{name}.json").write_text(json.dumps(result_of(name)))
    lines = guide_memory.table(tmp_path).splitlines()
    ours = "2.00 s | 11.0, 18.2, 18.0, 15.0"
    assert lines[2:4] == [
        f"| 5b, bf16 | all weights, 1 | adamw | checkpointed | 30.1, OOM, OOM, OOM | {ours} | {ours} |",
        f"| 2b, fp16 | 128, 1 | adamw |  | a card of 16 GB | {ours} |  |  |",
    ]
    assert {line.count("|") for line in lines[:4]} == {len(guide_memory.HEAD) + 1}
    assert lines[-1] == "Measured on NVIDIA H100, torch 2.11.0, commit 0123456."


def test_the_table_in_the_docs_is_that_of_the_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    page.write_text(text)
    put_into(page, guide_memory.SCRIPT, guide_memory.table(ROOT / "benchmarks" / "results"))
    assert page.read_text() == text
    (tmp_path / "memory_x.json").write_text(json.dumps(result_of("5b-r16-adamw-lean", seconds_per_step=123.0)))
    assert guide_memory.main(["--table", str(page), "--results", str(tmp_path)]) == 0
    assert "| 123.00 s |" in page.read_text()


def test_estimates_are_finite() -> None:
    assert all(math.isfinite(row.seconds) and row.seconds < 300 for row in ROWS)


def test_host_memory_of_a_row_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mappings = guide_memory.ReusedMappings()
    monkeypatch.setattr(buffers, "mmap", mappings)
    first, other = buffers.host_buffer(10_000).fill_(7), buffers.host_buffer(10_000)
    address = first.data_ptr()
    assert other.data_ptr() != address
    others = list(mappings._mappings)  # only tensors count, whatever else refers to the memory
    del first
    mappings.next_row()
    again, larger = buffers.host_buffer(9_500), buffers.host_buffer(20_000)
    assert again.data_ptr() == address
    assert again.shape == (9_500,)
    assert not again.any()
    assert larger.data_ptr() not in (address, other.data_ptr())
    mappings.next_row()
    del other, others
    mappings.next_row()
    assert not mappings._mappings


def test_reused_memory_takes_the_advice_of_buffers() -> None:
    """Buffers ignore advice that is unknown, so they would not notice memory that takes none."""
    memory = guide_memory.ReusedMappings().mmap(-1, 10_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)


def test_memory_of_earlier_rows_counts_as_free_and_yields_to_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a row would have another plan than in a process of its own, or both would be allocated at once."""
    free = guide_memory.SPARE + 50_000
    monkeypatch.setattr(guide_memory, "free_host_bytes", lambda: free)
    mappings = guide_memory.ReusedMappings()

    def allocate(size: int) -> dict[str, Any]:
        return {"free": execution.free_host_bytes(), "buffer": buffers.host_buffer(size)}

    def sizes() -> list[int]:
        return [len(mapping) for mapping in mappings._mappings]

    used = mappings.lent(allocate, 10_000)
    assert mappings.lent(allocate, 20_000)["free"] == free
    assert mappings.lent(allocate, 50_000)["free"] == free + 20_000
    assert sizes() == [10_000, 20_000, 50_000]
    assert mappings.lent(allocate, 60_000)["free"] == free + 70_000
    assert sizes() == [10_000, 60_000]
    assert not used["buffer"].any()
    assert execution.free_host_bytes is free_host_bytes
