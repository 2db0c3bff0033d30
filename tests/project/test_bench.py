"""Tests benchmarks/bench.py on a tiny model and a CPU: every arm, one process per size, and finished rows are kept."""

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import arms
import bench
import bench_table
import pytest
import random_models
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import CogVideoXPipeline  # noqa: F401  The log of its first import keeps the frames of its callers.
from tiny_benchmarks import shrink_models

CPU = ["--device", "cpu", "--results"]
FIGURES = ("seconds_per_step", "first_step_seconds", "losses", "seconds", "peak_gib", "ratio", "mfu", "limit_ratio")
LEAN = arms.PLAN_FLAGS["lean"]
ALL = ["5b-r128-stock", "5b-r128-fast", "5b-r128-24gb", "5b-r128-lean"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shrinks the models of version 1, and runs the processes of bench.py in this process."""
    shrink_models(monkeypatch)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the processes of bench.py in this process, and returns the rows of each."""
    calls: list[list[str]] = []

    def spawn(arguments: Sequence[str]) -> None:
        calls.append(list(arguments[1 : arguments.index("--results")]))
        bench.main(arguments)

    monkeypatch.setattr(bench, "spawn", spawn)
    return calls


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in bench_table.read_rows(folder)}


@pytest.mark.long
def test_rows_from_end_to_end(tmp_path: Path, spawned: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--rows", *ALL, *CPU, str(tmp_path)]) == 0
    assert spawned == [ALL]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["row"] for line in lines[:-1]] == ALL
    assert lines[-1] == {"missing": []}
    results = results_in(tmp_path)
    assert list(results) == ALL
    stock = results["5b-r128-stock"]
    for row in results.values():
        assert set(FIGURES) <= set(row)
        assert len(row["losses"]) == len(row["seconds"])
        assert all(0 < loss < 1e5 for loss in row["losses"])  # the stock loss has the weight 1 / (1 - abar)
    for name in ALL[1:]:
        row = results[name]
        assert row["ratio"] == pytest.approx(stock["seconds_per_step"] / row["seconds_per_step"], rel=1e-3)
        assert row["stock"] == {key: stock[key] for key in row["stock"]}
    assert results["5b-r128-lean"]["plan"] == "lean"
    assert "2 streamed from the host; kept for backward: attention of 2" in results["5b-r128-lean"]["execution"]
    assert "2 blocks eager, 2 on the device" in results["5b-r128-fast"]["execution"]
    assert results["5b-r128-lean"]["predicted"]["peak_gib"] > 0
    assert results["5b-r128-lean"]["validation"]["sampling_seconds"] > 0
    assert "validation" not in results["5b-r128-fast"]


def test_all_weights(tmp_path: Path, spawned: list[list[str]]) -> None:
    rows = ["5b-sft-stock", "5b-sft-lean"]
    assert bench.main(["--rows", *rows, *CPU, str(tmp_path)]) == 0
    results = results_in(tmp_path)
    assert list(results) == rows
    assert "2 streamed from the host" in results["5b-sft-lean"]["execution"]
    assert results["5b-sft-lean"]["ratio"] > 0
    assert results["5b-sft-lean"]["useful_flops"] > 0
    assert "| 5b, 9x64x96 | all weights, 1 | stock |" in bench_table.table(list(results.values()))


@pytest.mark.parametrize("row", ["2b-sft-lean-fp16", "5b-r128-lean-fp16"])
def test_fp16_scales_the_loss(
    row: str, tmp_path: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate has no fp16 on a CPU, so the stock arm is replaced by one that does not fit into memory."""
    monkeypatch.setattr(bench, "stock_arm", lambda *_: {"failed": arms.NO_MEMORY})
    assert bench.main(["--rows", row, *CPU, str(tmp_path)]) == 0
    result = results_in(tmp_path)[row]
    assert result["precision"] == "fp16"
    assert result["loss_scale"] * 2 ** result["skipped_steps"] == 2.0**16
    assert all(0 < loss < 1e5 for loss in result["losses"])
    assert "| lean, fp16, cpu |" in bench_table.table([result])


def test_losses_that_are_not_finite_are_a_failure(
    tmp_path: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "losses_of", lambda *_: torch.full((1,), torch.inf, requires_grad=True))
    assert bench.main(["--rows", "5b-sft-auto", *CPU, str(tmp_path)]) == 1
    assert results_in(tmp_path) == {}


def test_eight_bit_moments(tmp_path: Path, spawned: list[list[str]]) -> None:
    assert bench.main(["--rows", "5b-sft-auto-8bit", *CPU, str(tmp_path)]) == 0
    assert "--use_8bit" in arms.PLAN_FLAGS["auto-8bit"]
    assert results_in(tmp_path)["5b-sft-auto-8bit"]["ratio"] > 0


def test_rows_that_do_not_fit_in_the_time_left_are_not_run(tmp_path: Path, spawned: list[list[str]]) -> None:
    rows = ["5b-r16-stock", "5b-r16-lean"]
    needed = bench.ROW_SECONDS["5b"]
    assert bench.main(["--rows", *rows, "--seconds", str(needed - 1), *CPU, str(tmp_path)]) == 1
    assert spawned == []
    assert bench.main(["--row", *rows, "--seconds", str(needed - 1), *CPU, str(tmp_path)]) == 0
    assert results_in(tmp_path) == {}
    assert bench.main(["--rows", *rows, "--seconds", str(needed + 100), *CPU, str(tmp_path)]) == 0
    assert list(results_in(tmp_path)) == rows


def test_rows_with_slow_copies_say_so(
    tmp_path: Path, spawned: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--copy_rate", "12", "--seconds", "0", *CPU, str(tmp_path)]) == 1
    rows = json.loads(capsys.readouterr().out)["missing"]
    assert {"5b-sft-lean-copies12", "5b-sft-24gb-8bit-copies12", "2b-r128-24gb-copies12"} < set(rows)
    assert all(row.endswith("-copies12") for row in rows)
    assert bench.main(["--rows", "5b-sft-lean-copies12", *CPU, str(tmp_path)]) == 0
    result = results_in(tmp_path)["5b-sft-lean-copies12"]
    assert (result["copy_rate"], result["ratio"]) == (12, None)
    assert "stock" not in result
    assert "| lean, copies at 12 GB/s, cpu |" in bench_table.table([result])


def test_a_step_is_traced(tmp_path: Path, spawned: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "5b-r128-lean-fp16", *CPU, str(tmp_path)]
    assert bench.main(arguments) == 0
    assert bench.main([*arguments, "--trace"]) == 0  # the result has no trace, so the row is run again
    assert bench.main([*arguments, "--trace"]) == 0
    assert len(spawned) == 2
    assert results_in(tmp_path)["5b-r128-lean-fp16"]["trace"]["compute_gaps"] == []  # a CPU has no streams
    capsys.readouterr()
    assert bench.main(["--traces", *CPU, str(tmp_path)]) == 0
    assert "| 5b-r128-lean-fp16 |" in capsys.readouterr().out


def test_finished_rows_are_not_run_again(tmp_path: Path, spawned: list[list[str]]) -> None:
    rows = ["5b-r16-stock", "5b-r16-lean"]
    assert bench.main(["--rows", *rows, *CPU, str(tmp_path)]) == 0
    stock = bench.path_of(tmp_path, "5b-r16-stock").read_bytes()
    bench.path_of(tmp_path, "5b-r16-lean").unlink()
    assert bench.main(["--rows", *rows, *CPU, str(tmp_path)]) == 0
    assert spawned == [rows, rows[1:]]
    assert bench.path_of(tmp_path, "5b-r16-stock").read_bytes() == stock
    lean = results_in(tmp_path)["5b-r16-lean"]
    own = lean["stock"]["seconds_per_step"]  # the stock row of the second process, not that of the file
    assert lean["ratio"] == pytest.approx(own / lean["seconds_per_step"], rel=1e-3)
    assert bench.main(["--rows", *rows, *CPU, str(tmp_path)]) == 0
    assert len(spawned) == 2


def test_a_failed_row_does_not_prevent_the_others(
    tmp_path: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choose = arms.choose_plan

    def failing(transformer: Any, options: Any, *more: Any) -> Any:
        if options.plan.plan == "fast":
            raise RuntimeError("no such kernel")
        return choose(transformer, options, *more)

    monkeypatch.setattr(arms, "choose_plan", failing)
    rows = ["5b-r128-fast", "5b-r128-24gb", "5b-r16-lean"]
    assert bench.main(["--rows", *rows, *CPU, str(tmp_path)]) == 1
    assert spawned == [rows[:2], rows[2:]]
    assert set(results_in(tmp_path)) == set(rows[1:])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"missing": ["5b-r128-fast"]}


def test_figures_are_shown_where_validation_fails(
    tmp_path: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(random_models, "make_vae")
    assert bench.main(["--rows", "5b-r128-lean", *CPU, str(tmp_path)]) == 1
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert line["seconds_per_step"] > 0
    assert "make_vae" in line["validation"]["failed"]
    assert results_in(tmp_path) == {}


def test_without_a_gpu_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["--all", "--results", str(tmp_path)])


def test_a_stock_arm_that_does_not_fit_is_a_result(
    tmp_path: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "stock", full)
    assert bench.main(["--rows", "5b-r16-stock", "5b-r16-lean", *CPU, str(tmp_path)]) == 0
    results = results_in(tmp_path)
    assert results["5b-r16-stock"]["failed"] == arms.NO_MEMORY
    assert results["5b-r16-lean"]["ratio"] is None
    assert "| stock | out of memory |" in bench_table.table(list(results.values()))


def test_a_row_needs_the_stock_arm(tmp_path: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no such optimizer")

    monkeypatch.setattr(bench, "stock", failing)
    assert bench.main(["--rows", "5b-r16-stock", "5b-r16-lean", *CPU, str(tmp_path)]) == 1
    assert results_in(tmp_path) == {}


FULL, BROKEN = {"failed": arms.NO_MEMORY}, {"failed": "no such kernel"}


@pytest.mark.parametrize(
    ("plan", "arm", "stock", "is_measured"),
    [
        ("lean", {}, None, True),
        ("lean", {}, FULL, True),
        ("lean", {}, BROKEN, False),
        ("lean", FULL, {}, False),
        ("lean", {"kernels_ms": FULL}, {}, False),
        ("lean", {"trace": BROKEN}, {}, False),
        ("stock", FULL, FULL, True),
        ("stock-offload", {}, BROKEN, True),
        ("stock-offload", BROKEN, {}, False),
    ],
)
def test_every_part_of_a_row_is_measured(
    plan: str, arm: dict[str, Any], stock: dict[str, Any] | None, is_measured: bool
) -> None:
    assert bench.is_measured(plan, arm, stock) == is_measured


@pytest.mark.parametrize("rank", [16, 0])
def test_our_arm_trains(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls when the batch stays the same."""
    work = arms.Work("5b", rank, 2, torch.device("cpu"))
    batch = work.random_batch()
    monkeypatch.setattr(arms.Work, "random_batch", lambda self: batch)
    monkeypatch.setattr(arms, "learning_rate", lambda *_: 1e-2)
    losses = arms.ours(work, LEAN, 12)["losses"]
    assert losses[-1] < 0.9 * losses[0]


def test_both_arms_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model, latents, noise and timestep give the same first loss, except for rounding."""
    work = arms.Work("5b", 16, 1, torch.device("cpu"))
    make, normal = arms.Work.make_transformer, torch.randn

    def seeded(self: arms.Work) -> Any:
        torch.manual_seed(0)
        return make(self)

    def random(self: arms.Work, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return normal(1, *shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype or self.dtype)

    monkeypatch.setattr(arms.Work, "make_transformer", seeded)
    monkeypatch.setattr(arms.Work, "random", random)
    monkeypatch.setattr(arms.Work, "random_timestep", lambda self: torch.tensor([700]))
    monkeypatch.setattr(
        torch, "randn_like", torch.clone
    )  # the noise has the shape of the latents, which random() returns
    first = [arms.stock(work, 2)["losses"][0], arms.ours(work, arms.PLAN_FLAGS["fast"], 2)["losses"][0]]
    assert first[0] == pytest.approx(first[1], rel=0.02)


def test_tokens_and_flops_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = {}
    assert round(bench_table.useful_flops(17776, 3072, 42, 1, trains_all=True) / 1e12) == 997
    for kind, batch in (("2b", 1), ("5b", 1), ("5b", 4), ("1.5-5b", 1)):
        work = arms.Work(kind, 128, batch, torch.device("cpu"))
        flops = bench_table.useful_flops(work.tokens, work.width, work.config["num_layers"], batch)
        found[kind, batch] = (work.tokens, round(flops / 1e12))
    assert found == {("2b", 1): (17776, 313), ("5b", 1): (17776, 827), ("5b", 4): (17776, 3310)} | {
        ("1.5-5b", 1): (45104, 4008)
    }


def row_of(**changes: Any) -> dict[str, Any]:
    """Returns a row as a measurement would write it."""
    row = {"row": "5b-r256-lean", "kind": "5b", "rank": 256, "batch": 1, "plan": "lean", "clip": "49x480x720"}
    row |= {"precision": "bf16", "predicted": {"seconds_per_step": 1.9}}
    row |= {"device": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.11.0"}, "commit": "abc", "useful_flops": 989e12}
    row |= {"seconds_per_step": 2.0, "ratio": 1.96, "peak_gib": {"allocated": 4.21, "reserved": 5.0}}
    row |= changes
    return row | bench_table.speed_figures(row)


def test_table() -> None:
    peaks = {"sampling_peak_gib": {"allocated": 3.0, "reserved": 9.0}}
    peaks["decoding_peak_gib"] = {"allocated": 5.5, "reserved": 6.0}
    rows = [row_of(validation=peaks, host_gib=23.9), row_of(row="other", batch=4, device="NVIDIA H200")]
    lines = bench_table.table(rows).splitlines()
    assert lines[2] == (
        "| 5b, 49x480x720 | 256, 1 | lean | 2.00 s (1.90) | 1.96x | 4.2 (5.0) | 5.5 (6.0) | 24 | 50% | 92% "
        "| 22.1 (31.9) |"
    )
    assert "| 368% | 47.3 (47.3) |" in lines[3]  # the limit is the time of one sample
    assert {line.count("|") for line in lines[:4]} == {len(bench_table.HEAD) + 1}
    assert "NVIDIA H100 80GB HBM3, torch 2.11.0, commit abc: 5b-r256-lean; NVIDIA H200" in lines[-1]
    assert "NVIDIA H200, torch 2.11.0, commit abc: other" in lines[-1]
    assert bench_table.table([]) == ""


def test_a_device_without_known_figures_has_no_utilization() -> None:
    row = row_of(device="Some CPU")
    assert (row["mfu"], row["limit_ratio"]) == (None, None)
    assert "| 4.2 (5.0) |  |  |  |  |" in bench_table.table([row])


def test_table_is_put_into_a_file_between_its_marks(tmp_path: Path) -> None:
    text = "before\n<!-- bench.py --table: begin -->\nold\n<!-- bench.py --table: end -->\nafter\n"
    page = tmp_path / "benchmarks.md"
    page.write_text(text)
    (tmp_path / "bench_x.json").write_text(json.dumps(row_of()))
    assert bench.main(["--table", str(page), "--results", str(tmp_path)]) == 0
    assert page.read_text() == text.replace("old\n", bench_table.table([row_of()]))
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="has no line"):
        bench.main(["--table", str(page), "--results", str(tmp_path)])


def test_every_row_has_a_limit_and_a_plan() -> None:
    for process in bench.PROCESSES:
        assert set(process.plans) <= set(bench_table.PLANS)
        assert set(bench_table.LIMITS[process.kind]) == set(bench_table.PLANS)
        assert (process.plans[0] == "stock") == (process.stock_steps > 0)
    assert len(bench.ROWS) == sum(len(process.plans) for process in bench.PROCESSES)
    assert set(bench_table.PLANS) == {*bench_table.STOCK, *arms.PLAN_FLAGS}


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Refers to every transformer that arms make."""
    made: list[weakref.ref[Any]] = []
    make = arms.Work.make_transformer

    def watched(self: arms.Work) -> Any:
        transformer = make(self)
        made.append(weakref.ref(transformer))
        return transformer

    monkeypatch.setattr(arms.Work, "make_transformer", watched)
    return made


@pytest.mark.parametrize(
    "arm", [lambda work: arms.stock(work, 2), lambda work: arms.ours(work, LEAN, 2, validates=True)]
)
def test_an_arm_frees_all_of_its_memory(arm: Callable[[arms.Work], Any], transformers: list[weakref.ref[Any]]) -> None:
    work = arms.Work("5b", 16, 1, torch.device("cpu"))
    arm(work)
    arms.make_room(work.device)
    assert [found() for found in transformers] == [None]


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_optimizer_keeps_by_hooks_is_freed(
    fails: bool, transformers: list[weakref.ref[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchao's optimizer on the host registers a hook of each weight that refers to all weights."""

    def keeping(parameters: list[torch.Tensor], offloads: bool) -> torch.optim.Optimizer:
        assert offloads
        model = transformers[0]()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda _: model and None)
        return torch.optim.SGD(parameters, 0.0)

    class Failing(arms.Meter):
        def step_ended(self, loss: torch.Tensor) -> None:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(arms, "stock_optimizer", keeping)
    if fails:
        monkeypatch.setattr(arms, "Meter", Failing)
    work = arms.Work("5b", 0, 1, torch.device("cpu"))
    assert ("failed" in arms.attempt(arms.stock, work, 2, True)) is fails
    arms.make_room(work.device)
    assert [found() for found in transformers] == [None]


def test_peaks_need_the_memory_of_the_arm_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * arms.GIB)
    freed = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: freed.append("pinned"), raising=False)
    with pytest.raises(RuntimeError, match=r"3\.00 GiB of the previous arm"):
        arms.make_room(torch.device("cuda"))
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")  # as in older versions
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: freed.append("pinned before"), raising=False)
    arms.free_pinned_memory()
    assert freed == ["pinned", "pinned before"]
