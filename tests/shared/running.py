"""Runs the scripts for tests: in this process, which is fast, or in separate processes, as a user does."""

import functools
import gc
import itertools
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Union

import cogvideox_image_to_video_lora as image_lora_script
import cogvideox_image_to_video_sft as image_sft_script
import cogvideox_text_to_video_lora as lora_script
import cogvideox_text_to_video_sft as sft_script
import prepare_dataset as prepare_script
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from waiting import eventually

from cogvideox.config import args
from cogvideox.config.options import ImageLoraOptions, ImageSftOptions, LoraOptions, PrepareOptions, SftOptions

ROOT = Path(__file__).resolve().parents[2]
LORA_SCRIPT = ROOT / "training" / "cogvideox_text_to_video_lora.py"
SFT_SCRIPT = ROOT / "training" / "cogvideox_text_to_video_sft.py"
IMAGE_LORA_SCRIPT = ROOT / "training" / "cogvideox_image_to_video_lora.py"
IMAGE_SFT_SCRIPT = ROOT / "training" / "cogvideox_image_to_video_sft.py"
PREPARE_SCRIPT = ROOT / "training" / "prepare_dataset.py"
SIZE = ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "9", "--max_num_frames", "9"]
PROMPT = "TOKEN a red square moves"
WEIGHTS = "pytorch_lora_weights.safetensors"


def lora_flags(model: Path, data: Path, output: Path, *more: object) -> list[str]:
    """Returns the flags of a small LoRA run. Later flags override earlier ones."""
    return sft_flags(model, data, output, "--rank", 4, "--lora_alpha", 8, *more)


def sft_flags(model: Path, data: Path, output: Path, *more: object) -> list[str]:
    """Returns the flags of a small run that trains all weights. Later flags override earlier ones."""
    flags = ["--pretrained_model_name_or_path", model, "--data_root", data, "--output_dir", output, *SIZE]
    flags += [
        "--train_batch_size",
        "1",
        "--gradient_accumulation_steps",
        "2",
        "--max_train_steps",
        "6",
    ]
    flags += [
        "--checkpointing_steps",
        "2",
        "--optimizer",
        "adamw",
        "--learning_rate",
        "1e-2",
        "--num_inference_steps",
        "2",
    ]
    return [str(flag) for flag in (*flags, *more)]


def in_process(script: Any, options_type: type, flags: Sequence[str]) -> int:
    """Runs a script's main in this process, and removes its accelerate state and its locks."""
    try:
        return script.main(args.parse(options_type, None, list(flags), script.CHECKS))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()


def train(flags: Sequence[str]) -> int:
    """Runs the LoRA script in this process."""
    return in_process(lora_script, LoraOptions, flags)


def train_all(flags: Sequence[str]) -> int:
    """Runs the script that trains all weights in this process."""
    return in_process(sft_script, SftOptions, flags)


def train_image(flags: Sequence[str]) -> int:
    """Runs the image-to-video LoRA script in this process."""
    return in_process(image_lora_script, ImageLoraOptions, flags)


def train_image_all(flags: Sequence[str]) -> int:
    """Runs the image-to-video script that trains all weights in this process."""
    return in_process(image_sft_script, ImageSftOptions, flags)


def prepare(model: Path, data: Path, output: Path, *more: object) -> int:
    """Runs prepare_dataset.py in this process."""
    flags = ["--model_id", model, "--data_root", data, "--output_dir", output, *SIZE, *more]
    return in_process(prepare_script, PrepareOptions, [str(flag) for flag in flags])


def environment(**more: str) -> dict[str, str]:
    """Returns the environment for a script, without the variables of a launcher."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_") and k not in ("WORLD_SIZE", "RANK")}
    return clean | more


def start(command: Sequence[object], **more: str) -> "subprocess.Popen[str]":
    """Starts a command in a new session."""
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment(**more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


Moment = tuple[str, int] | tuple[str, int, int]  # the arguments of forking.signal_at


class Forked:
    """Runs a script in a process that is forked from forking.py. It has the methods of a Popen."""

    def __init__(
        self,
        command: Sequence[object],
        killed_at: Moment | None = None,
        disk: Sequence[tuple[str, int, int]] = (),
        **more: str,
    ) -> None:
        """Starts the process.

        Args:
            command: The command line, as for Popen; it begins with the Python interpreter.
            killed_at: When the process gets a signal, as for forking.signal_at. The speed of the machine has no effect.
            disk: When the disk fails, as for disk_faults.refuse.
            more: Additional environment variables.
        """
        self.output = Path(outputs().name) / str(next(NUMBERS))
        request: dict[str, Any] = {"argv": [str(part) for part in command[1:]], "env": environment(**more)}
        request |= {"killed_at": killed_at, "disk": [list(fault) for fault in disk]}
        self.pid: int = ask_server(request | {"cwd": str(ROOT), "output": str(self.output)})
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit status, which is negative for a signal, or None while the process runs."""
        if self.returncode is None:
            self.returncode = ask_server({"pid": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return status

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Returns the output of the process when it has ended."""
        self.wait(timeout)
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


Process = Union["subprocess.Popen[str]", Forked]


NUMBERS = itertools.count()


@functools.cache
def outputs() -> "tempfile.TemporaryDirectory[str]":
    """Returns the folder for the output of forked scripts, which is removed at the end of this process."""
    return tempfile.TemporaryDirectory(prefix="forked-")


def server_name() -> str:
    """Returns the name of the socket of the server of this test session, without the zero byte at its start."""
    return f"forking-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"


@functools.cache
def server() -> Any:
    """Returns a connection to forking.py.

    All processes of a test session share one server: the first that needs it starts it, and it ends with the last.
    """
    name = f"\0{server_name()}"  # not a file, but a name in Linux
    started = None
    while started is None or started.poll() is None:
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(name)
            except OSError:
                pass  # another process has started it
            else:
                listener.listen()
                command = [sys.executable, str(Path(__file__).with_name("forking.py")), str(listener.fileno())]
                given = [listener.fileno()]
                started = subprocess.Popen(command, env=environment(), pass_fds=given, stdin=subprocess.DEVNULL)
        ours = socket.socket(socket.AF_UNIX)
        with suppress(OSError):  # a server that has just ended, or one that does not listen yet
            ours.connect(name)
            lines = ours.makefile("rw")
            if lines.readline():
                return lines
        time.sleep(0.05)
    raise RuntimeError(f"forking.py has ended with status {started.returncode}")


def ask_server(request: dict[str, Any]) -> Any:
    server().write(f"{json.dumps(request)}\n")
    server().flush()
    return json.loads(server().readline())


def free_port() -> str:
    """Returns a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks_environment(rank: int, number: int, port: str) -> dict[str, str]:
    """Returns the environment variables that a launcher sets for one of its processes on a CPU."""
    shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    return shared | {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank)}


def fork_ranks(
    number: int, command: Sequence[object], moments: Mapping[int, Moment] | None = None, **more: str
) -> list[Forked]:
    """Starts a command on several ranks, as a launcher does. ``moments`` says when a rank gets a signal.

    Further arguments are environment variables; they replace those of the launcher.
    """
    port, at = free_port(), moments or {}
    given = (ranks_environment(rank, number, port) | more for rank in range(number))
    return [Forked(command, at.get(rank), (), **environ) for rank, environ in enumerate(given)]


def launch(launcher: Sequence[object], number: int, command: Sequence[object], folder: Path, **more: str) -> list[str]:
    """Runs a command with a launcher and returns the output of each process; all of them must succeed."""
    return launch_machines([launcher], number, command, folder, **more)


def launch_machines(
    launchers: Sequence[Sequence[object]], number: int, command: Sequence[object], folder: Path, **more: str
) -> list[str]:
    """Runs a command with the launchers of several machines, and returns the output of each of ``number`` processes.

    The launchers themselves start stand-ins (launched.py). Each process is forked with the arguments and the
    environment that its stand-in got, and the stand-in exits with the status of the process. All must succeed.
    """
    folder.mkdir()
    stand_in = [Path(__file__).with_name("launched.py"), folder, *command[1:]]
    machines = [start([*launcher, *stand_in], **more) for launcher in launchers]
    paths = [folder / f"{rank}.json" for rank in range(number)]

    def have_started() -> bool:
        assert all(machine.poll() is None for machine in machines), [machine.communicate()[0] for machine in machines]
        return all(path.exists() for path in paths)

    eventually(have_started, within=300)
    given = [json.loads(path.read_text()) for path in paths]
    ranks = [Forked([command[0], *argv], **environ) for argv, environ in given]
    texts = [rank.communicate()[0] for rank in ranks]
    for path, rank in zip(paths, ranks, strict=True):
        path.with_suffix(".tmp").write_text(str(rank.wait() % 256))
        path.with_suffix(".tmp").rename(path.with_suffix(".status"))
    for machine in machines:
        machine.communicate(timeout=300)
        assert machine.returncode == 0, texts
    return texts


def finish(process: Process, status: int = 0) -> str:
    """Waits for the end of a process, checks its exit status, and returns its output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output[-4000:]
    return output


def python(script: Path, *flags: object) -> list[object]:
    """Returns the command that runs a script with this Python."""
    return [sys.executable, script, *flags]


def losses(output: Path) -> list[float]:
    """Returns the loss of every optimizer step."""
    return [line["loss"] for line in metrics(output) if "loss" in line]


def metrics(output: Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, Any]:
    """Returns the exported LoRA."""
    return load_file(output / WEIGHTS)


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Returns whether two sets of tensors are equal, bit for bit."""
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def safetensors_of(folder: Path) -> dict[str, Any]:
    """Returns all tensors of a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def frames_of(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> torch.Tensor:
    """Runs inference.py and returns the frames that it gives to the video writer."""
    caught: list[torch.Tensor] = []
    monkeypatch.setattr("diffusers.utils.export_utils.encode_video", lambda frames, **_: caught.append(frames))
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")
    return caught[0]
