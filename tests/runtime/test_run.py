"""run.py: a folder has one run at a time, and metrics.jsonl has complete lines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import options_of, run_alone
from launching import launched_environment
from running import LORA_SCRIPT, ROOT, Forked, lora_flags, python, train

from cogvideox.errors import UsageError
from cogvideox.files import machine_name
from cogvideox.optimizer.step import StepResult
from cogvideox.runtime import run as run_module
from cogvideox.runtime.ranks import Ranks
from cogvideox.runtime.run import (
    LOCK_NAME,
    METRICS_NAME,
    RUN_CONFIG_NAME,
    Metrics,
    check_type_of_deepspeed,
    lock_output_folder,
    make_accelerator,
    reason_for_cpu,
    start_run,
    write_config,
)


def take(output: Path, *flags: object) -> str | None:
    """Returns the problem of a run in this folder, if any, and releases the lock of the folder."""
    run = run_alone(output)
    problem = lock_output_folder(run, options_of(output, *flags))
    if run._lock:
        run._lock.release()
    return problem


@pytest.mark.parametrize("plugin", [None, SimpleNamespace(zero_stage=2)], ids=["alone", "DeepSpeed"])
@pytest.mark.parametrize("precision", list(run_module.PRECISIONS))
def test_the_compute_type_is_the_precision_s_whoever_makes_the_steps(
    tmp_path: Path, precision: str, plugin: Any
) -> None:
    run = run_alone(tmp_path)
    run.accelerator.state.deepspeed_plugin, run.precision = plugin, precision
    assert run.dtype is {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


@pytest.mark.parametrize(
    ("name", "fix", "more", "variable"),
    [
        ("uncompiled_1", "add --cpu before the script", ["--cpu"], {}),
        ("uncompiled_2", "set the variable ACCELERATE_USE_CPU=true", [], {"ACCELERATE_USE_CPU": "true"}),
        ("zero2", "set the variable ACCELERATE_USE_CPU=true", [], {"ACCELERATE_USE_CPU": "true"}),
    ],
)
def test_a_configuration_for_gpus_names_what_trains_on_the_cpu(
    name: str, fix: str, more: list[str], variable: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate overwrites the variable where it starts one process."""
    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    for key, value in launched_environment(path).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match=f"torch sees none; .* to train on the CPU {fix}$"):
        make_accelerator(options_of(tmp_path))
    for key, value in variable.items():
        monkeypatch.setenv(key, value)
    assert launched_environment(path, *more)["ACCELERATE_USE_CPU"].lower() == "true"


def test_a_run_on_a_cpu_says_why_it_uses_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so only where there is a driver for a GPU."""
    driver = tmp_path / "version"
    monkeypatch.setattr("cogvideox.runtime.run.NVIDIA_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    start_run(options_of(tmp_path / "without")).disconnect()
    assert "no GPU is used" not in capsys.readouterr().err
    driver.touch()
    start_run(options_of(tmp_path / "with")).disconnect()
    line = f"no GPU is used, although this machine has a driver for one: torch {torch.__version__} sees none\n"
    assert line in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert reason_for_cpu().endswith(" sees none with CUDA_VISIBLE_DEVICES=7")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert reason_for_cpu() == "ACCELERATE_USE_CPU=true"


def test_a_precision_that_deepspeed_does_not_support_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such are fp16 on most CPUs and on some old GPUs. DeepSpeed would raise an error after the model is loaded."""
    device = SimpleNamespace(is_bf16_supported=lambda: True, is_fp16_supported=lambda: None)
    library = SimpleNamespace(get_accelerator=lambda: device)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(accelerator=library))
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", library)
    for precision in ("no", "bf16"):
        check_type_of_deepspeed(precision)
    with pytest.raises(UsageError, match="fp16: DeepSpeed does not support it on this device; give bf16 or no"):
        check_type_of_deepspeed("fp16")


def test_a_process_has_the_device_that_it_has_on_its_own_machine() -> None:
    """Process 9 of several machines may be number 1 on its own machine."""
    device = torch.device("cuda:1")
    state = SimpleNamespace(process_index=9, num_processes=1, is_main_process=False, device=device)
    assert Ranks(state).device == device
    texts = {path: path.read_text() for path in LORA_SCRIPT.parent.rglob("*.py")}
    assert [path.name for path, text in texts.items() if "cuda:" in text] == []


@pytest.mark.parametrize(
    ("device", "launcher", "chosen"), [("cuda", 1, [3]), ("cuda", 4, []), ("cpu", 1, [])], ids=["GPU", "user", "CPU"]
)
def test_a_process_with_a_gpu_uses_its_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, launcher: int, chosen: list[int]
) -> None:
    """accelerate launch and torchrun give it one thread, unless the user asks for more."""
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: launcher)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run_module.use_cores(torch.device(device))
    assert threads == chosen


def in_a_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Runs ``work(pipe)`` in a forked process, and returns the process id and the end of the pipe to read from."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(write)
        finally:
            os._exit(99)
    os.close(write)
    return child, read


def status_of(child: int) -> int:
    """Returns the exit status of a forked process as a shell reports it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("ranks: a second run in the same folder")
def test_a_folder_has_one_run_even_if_a_worker_outlives_it(tmp_path: Path) -> None:
    """A second run is refused; after kill -9 the folder is free, though a DataLoader worker has the lock file open."""
    assert take(tmp_path) is None

    def hold(pipe: int) -> None:
        run = run_alone(tmp_path)
        problem = lock_output_folder(run, options_of(tmp_path))
        worker = os.fork()  # The worker inherits the open lock file.
        if worker:
            os.write(pipe, f"{worker} {problem}".encode())
        while True:
            signal.pause()

    child, read = in_a_child(hold)
    worker = 0
    try:
        worker, problem = (f(x) for f, x in zip((int, str), os.read(read, 999).decode().split(" ", 1), strict=True))
        assert problem == "None"
        refusal = take(tmp_path)
        assert refusal is not None
        assert f"another run is using it (process {child} on {socket.gethostname()}); wait for it, end it" in refusal
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
        assert any(os.path.samefile(f"/proc/{worker}/fd/{fd}", tmp_path / LOCK_NAME) for fd in open_files(worker))
        assert take(tmp_path) is None
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if worker:
            os.kill(worker, signal.SIGKILL)
        os.close(read)


def open_files(pid: int) -> Iterator[str]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if os.path.exists(f"/proc/{pid}/fd/{fd}"):
            yield fd


@pytest.fixture
def gone() -> int:
    """Returns the id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def temporary(folder: Path, name: str, pid: int, host: str | None = None) -> Path:
    path = folder / f".{name}.{host or machine_name()}.{pid}.tmp"
    path.write_text("{")
    return path


@pytest.mark.fault("kills: leftover files of a run that was killed at its start, on this host or another")
def test_a_folder_of_a_run_that_was_killed_at_its_start_is_used(tmp_path: Path, gone: int) -> None:
    (tmp_path / LOCK_NAME).touch()
    stale = temporary(tmp_path, RUN_CONFIG_NAME, gone)
    assert take(tmp_path) is None
    assert not stale.exists()
    assert sorted(os.listdir(tmp_path)) == [LOCK_NAME, RUN_CONFIG_NAME]


def test_a_folder_of_a_run_that_was_killed_on_another_host_is_used(tmp_path: Path, gone: int) -> None:
    """A container has a new host name at every start."""
    stale = temporary(tmp_path, RUN_CONFIG_NAME, gone, host="node-7")
    assert take(tmp_path) is None
    assert not stale.exists()


def test_temporaries_of_every_process_are_removed_and_nothing_else(tmp_path: Path, gone: int) -> None:
    """Only the process that has the lock writes to the folder."""
    assert take(tmp_path) is None
    (tmp_path / "validation" / "tensors").mkdir(parents=True)
    stale = [temporary(folder, "metrics.jsonl", gone) for folder in (tmp_path, tmp_path / "validation" / "tensors")]
    stale += [temporary(tmp_path, "a", os.getpid()), temporary(tmp_path, "a", gone, host="node-7")]
    (tmp_path / "x.tmp").touch()
    assert take(tmp_path) is None
    assert not any(path.exists() for path in stale)
    assert (tmp_path / "x.tmp").exists()


def test_temporaries_in_a_foreign_folder_are_left_alone(tmp_path: Path, gone: int) -> None:
    (tmp_path / "thesis.txt").touch()
    kept = temporary(tmp_path, "thesis.txt", gone)
    assert take(tmp_path) is not None
    assert kept.exists()


@pytest.mark.parametrize("name", ["thesis.txt", "checkpoint-2", "metrics.jsonl", ".hidden"])
@pytest.mark.fault("flags: an output folder with foreign files")
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("do not touch")
    refusal = take(tmp_path)
    assert refusal is not None
    assert f"is not empty and not a run of this trainer ({name}" in refusal
    assert (tmp_path / name).read_text() == "do not touch"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("content", "is_refused"), [('{"_class_name": "A"}', True), ("[]", True), ('{"fla', False)])
@pytest.mark.fault("flags: an output folder with foreign files")
def test_the_folder_of_a_model_is_refused(tmp_path: Path, content: str, is_refused: bool) -> None:
    """It has a config.json, too. That of a run may be damaged."""
    (tmp_path / RUN_CONFIG_NAME).write_text(content)
    assert (take(tmp_path) is not None) == is_refused
    assert (tmp_path / RUN_CONFIG_NAME).read_text() == content


def test_a_folder_with_tracker_files_only_is_used(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert take(tmp_path) is None
    assert "is not empty" in str(take(tmp_path, "--no_resume"))


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x" / LOCK_NAME).mkdir(parents=True)
    assert "give a folder that can be written" in str(take(tmp_path / "x"))


def test_a_refused_resume_changes_nothing(model: Path, tensors: Path, reference: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(reference, tmp_path / "lora"))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    flags = lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 8)
    for more in (["--learning_rate", "0.5"], ["--max_train_steps", "1"], ["--resume_from_checkpoint", "checkpoint-9"]):
        with pytest.raises(UsageError):
            train([*flags, *more])
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert train(flags) == 0
    assert json.loads((output / RUN_CONFIG_NAME).read_text())["flags"]["max_train_steps"] == 8


# -- metrics -----------------------------------------------------------------------------------------------------------


def result(loss: float = 1.0, skipped: float = 0.0) -> StepResult:
    return StepResult(torch.tensor([loss, 0.5, skipped, 1.0, 0.0, 0.0, 0.0, 0.0]))


def metrics_of(output: Path, first: int = 0, logged: list[Any] | None = None) -> Metrics:
    return Metrics(run_alone(output, logged), first, 100)


def strict_lines(output: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl. NaN and Infinity raise an error, because they are not valid JSON."""

    def refuse(text: str) -> None:
        raise ValueError(text)

    return [json.loads(line, parse_constant=refuse) for line in (output / METRICS_NAME).read_text().splitlines()]


def test_metrics_continue_at_the_resumed_step(tmp_path: Path) -> None:
    complete = [json.dumps({"step": step, "loss": step / 10}) for step in range(1, 7)]
    torn = ['{"step": 3, "lo', "", "null", "[3]", '{"loss": 1}', '{"step": "3"}']
    (tmp_path / METRICS_NAME).write_text("\n".join([*complete[:3], *torn, *complete[3:], '{"step": 7']))
    metrics = metrics_of(tmp_path, first=4)
    assert (tmp_path / METRICS_NAME).read_text() == "".join(f"{line}\n" for line in complete[:4])
    metrics.push(5, 0.1, result(9.0))
    metrics.close()
    assert [(line["step"], line["loss"]) for line in strict_lines(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
        (5, 9.0),
    ]


def test_a_run_that_exports_an_earlier_checkpoint_keeps_later_metrics(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_text('{"step": 2}\n{"step": 4}\n{"step": 6')
    Metrics(run_alone(tmp_path), 2, 2).close()
    assert (tmp_path / METRICS_NAME).read_text() == '{"step": 2}\n{"step": 4}\n'


def test_metrics_of_an_earlier_start_are_removed_if_nothing_was_saved(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_text('{"step": 1}\n{"step": 2}\n')
    metrics_of(tmp_path).close()
    assert (tmp_path / METRICS_NAME).read_text() == ""


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path)
    for step, loss in enumerate([float("nan"), float("inf"), float("-inf"), 1.5], start=1):
        metrics.push(step, 0.1, result(loss))
    metrics.close()
    assert [line["loss"] for line in strict_lines(tmp_path)] == [None, None, None, 1.5]


def test_every_step_is_written_once_and_one_step_late(tmp_path: Path) -> None:
    logged: list[Any] = []
    metrics = metrics_of(tmp_path, logged=logged)
    for step in (1, 2, 3):
        metrics.push(step, step / 10, result(float(step)))
        assert len(logged) == step - 1
    metrics.flush()
    metrics.close()
    assert [(step, values["loss"], values["lr"]) for step, values in logged] == [
        (1, 1.0, 0.1),
        (2, 2.0, 0.2),
        (3, 3.0, 0.3),
    ]
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3]


def test_the_numbers_of_a_rank_are_those_of_its_step(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path)
    with metrics.loading():
        time.sleep(0.02)
    metrics.bad_clips = 2
    first = metrics.of_rank()
    assert (first.bad_clips, first.peak_gib) == (2, 0.0)
    assert first.loading_seconds >= 0.02
    metrics.push(1, 0.1, StepResult(torch.tensor([1.0, 0.5, 0.0, 1.0, *first])))
    assert metrics.of_rank() == (2, 0.0, 0.0, 0.0)
    metrics.close()
    (line,) = strict_lines(tmp_path)
    assert line["bad_clips"] == 2
    assert isinstance(line["bad_clips"], int)
    assert line["loading_seconds"] == round(first.loading_seconds, 5)
    assert "peak_gib" not in line  # there is no GPU


@pytest.mark.parametrize(("precision", "written"), [("fp16", True), ("bf16", False)])
def test_the_loss_scale_is_written_with_fp16_only(tmp_path: Path, precision: str, written: bool) -> None:
    run = run_alone(tmp_path)
    run.precision = precision
    metrics = Metrics(run, 0, 100)
    metrics.push(1, 0.1, result())
    metrics.close()
    assert ("loss_scale" in strict_lines(tmp_path)[0]) == written


def test_the_callback_receives_each_step_whose_numbers_have_arrived(tmp_path: Path) -> None:
    seen: list[Any] = []
    metrics = Metrics(run_alone(tmp_path), 0, 100, lambda *arrived: seen.append(arrived))
    metrics.samples += [("a", 7)]
    metrics.push(1, 0.1, result(skipped=1.0))
    assert not seen
    metrics.samples += [("b", 8)]
    metrics.push(2, 0.1, result())
    metrics.close()
    assert [(step, numbers["skipped"], samples) for step, numbers, samples in seen] == [
        (1, 1.0, [("a", 7)]),
        (2, 0.0, [("b", 8)]),
    ]


# -- several processes -------------------------------------------------------------------------------------------------


def test_a_problem_of_the_main_process_ends_all_ranks(model: Path, tensors: Path, tmp_path: Path) -> None:
    """Only the main process inspects the folder, which is foreign, but both end with status 2 without waiting.

    The status is read from the exit file, because gloo's threads sometimes abort a process that is already ending.
    """
    output = tmp_path / "foreign"
    output.mkdir()
    (output / "thesis.txt").write_text("do not touch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    command = python(LORA_SCRIPT, *lora_flags(model, tensors, output, "--load_tensors"))
    exits = [tmp_path / f"exit-{r}" for r in range(2)]
    own = [{"RANK": str(r), "LOCAL_RANK": str(r), "COGVIDEOX_EXIT_FILE": str(exits[r])} for r in range(2)]
    ranks = [Forked(command, **shared, **mine) for mine in own]
    try:
        texts = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
    assert [path.read_text() for path in exits] == ["2", "2"], texts
    assert all(rank.returncode in (2, -signal.SIGABRT) for rank in ranks)
    assert all("thesis.txt" in text for text in texts)
    assert os.listdir(output) == ["thesis.txt"]


def test_the_command_is_recorded_without_queries_of_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--data_root", "https://user:secret@host/clips?key=secret", "a b"])
    write_config(run_alone(tmp_path), options_of(tmp_path), "the plan")
    config = json.loads((tmp_path / RUN_CONFIG_NAME).read_text())
    assert config["command"] == "train.py --data_root https://host/clips 'a b'"
    assert config["plan"] == "the plan"
