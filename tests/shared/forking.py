"""Runs scripts in separate processes that are forked from a server which has already imported torch.

A script that is started in the usual way spends six seconds on imports. Tests that need a separate process, but do not
test its start, use ``Forked`` in running.py, which asks this server for a process. Kills, signals, exit statuses,
environment variables and ranks behave as in any other process.

    python forking.py SOCKET    accepts connections on that file descriptor; requests and answers are lines of JSON
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import runpy
import select
import signal
import socket
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TextIO

import census
import disk_faults
import quick_pictures

# The modules that the scripts import when they run. None of them starts a thread, which a fork would lose.
IMPORTED: tuple[str, ...] = ("cogvideox.loop", "cogvideox.preparation.prepare", "cogvideox.evaluation.before_after")
IMPORTED += ("peft", "matplotlib.figure")
IMPORTED += ("diffusers.pipelines.cogvideo.pipeline_cogvideox", "transformers.models.t5.modeling_t5")
IMPORTED += ("transformers.models.t5.tokenization_t5", "diffusers.schedulers.scheduling_ddim_cogvideox")
IMPORTED += ("matplotlib.backends.backend_agg", "cogvideox.checks", "cogvideox.preparation.verify")
# Where there is a GPU, DeepSpeed may start CUDA when it is imported, and CUDA does not work after a fork.
WITHOUT_GPU = ("deepspeed",)


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Answers the requests of all connected test processes until the last of them has ended.

    Returns:
        In a forked process, the request of that process.
    """
    lines_of: dict[socket.socket, TextIO] = {}
    with ExitStack() as opened:  # a forked process closes every connection, too
        opened.enter_context(listener)
        had_one = False
        while lines_of or not had_one:
            for connection in select.select([listener, *lines_of], [], [])[0]:
                if connection is listener:
                    client = opened.enter_context(listener.accept()[0])
                    lines_of[client] = opened.enter_context(client.makefile("rw"))
                    had_one = True
                    say(lines_of[client], "ready")
                    continue
                request = read_request(lines_of[connection])
                if request is None:
                    del lines_of[connection]
                elif "pid" in request:
                    pid, status = os.waitpid(request["pid"], os.WNOHANG)
                    say(lines_of[connection], os.waitstatus_to_exitcode(status) if pid else None)
                elif child := os.fork():
                    say(lines_of[connection], child)
                else:
                    return request
    return None


def read_request(lines: TextIO) -> dict[str, Any] | None:
    """Returns the next request of a test process, or None if that has ended."""
    try:
        line = lines.readline()
    except OSError:
        return None
    return json.loads(line) if line else None


def say(lines: TextIO, answer: Any) -> None:
    """Sends an answer, unless the test process has ended."""
    with suppress(OSError):
        lines.write(f"{json.dumps(answer)}\n")
        lines.flush()


def become(request: dict[str, Any]) -> None:
    """Gives this process the session, folder, environment, output and arguments that subprocess.Popen would give it."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    importlib.reload(sys.modules["huggingface_hub.constants"])  # its values are read from the environment
    for descriptor, path in ((1, request["output"]), (2, request.get("errors", request["output"]))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    if request["killed_at"]:
        signal_at(*request["killed_at"])
    for fault in request["disk"]:
        disk_faults.refuse(*fault)
    if "COUNT_BYTES" in os.environ:
        census.report_at_saves(Path(os.environ["COUNT_BYTES"] + os.environ["RANK"]))
        census.report_reads(Path(os.environ["COUNT_BYTES"] + os.environ["RANK"] + ".read"))


def signal_at(moment: str, nth: int, number: int = signal.SIGKILL) -> None:
    """Sends this process a signal at the nth event that matches ``moment``.

    An event is either something that the process is about to do to the disk ("os.rename FROM TO -1 -1",
    "os.mkdir PATH MODE -1", "open PATH w FLAGS", "read PATH r FLAGS"), or the end of a unit of work of stopping.unit
    ("unit NAME").

    Args:
        moment: A regular expression.
        nth: The number of the matching event, from 1.
        number: The signal.
    """
    left = nth

    def look(event: str, *arguments: Any) -> None:
        nonlocal left
        left -= re.search(moment, " ".join((event, *map(str, arguments)))) is not None
        if left == 0:
            left = -1
            os.kill(os.getpid(), number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            look("open" if writes else "read", *arguments)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            look(event, *arguments)

    def unit(name: str) -> None:
        look("unit", name)
        done(name)

    done, stopping.unit = stopping.unit, unit
    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2] / "training")
    for name in (*IMPORTED, *(WITHOUT_GPU if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else ())):
        importlib.import_module(name)
    # transformers compiles a thousand regular expressions for the first model that a process loads.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("t5")
    # Processes of torch's loader look for their parent now and then. Tests see that the scripts end theirs before that.
    loader: Any = importlib.import_module("torch.utils.data._utils.worker")
    loader.MP_STATUS_CHECK_INTERVAL = 3600.0
    stopping: Any = importlib.import_module("cogvideox.stopping")
    quick_pictures.compress_lightly()
    quick_pictures.leave_curves_blank()
    gc.freeze()  # imported objects are never freed, and collecting garbage among them would copy their memory pages
    wanted = serve(socket.socket(fileno=int(sys.argv[1])))
    if wanted is not None:
        become(wanted)
        runpy.run_path(sys.argv[0], run_name="__main__")
