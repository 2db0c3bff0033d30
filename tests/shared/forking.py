"""Runs scripts in processes of their own that need not import torch again: each is forked from one that has.

A started script spends six seconds on imports. Where it is not the start that is tested but what a process of its own
does or suffers, `fork` in running.py gets one from here; kills, signals, exit statuses, environment variables and
ranks are as in any other process.

    python forking.py SOCKET    reads requests, a line of JSON each, from that file descriptor, and answers with a line
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import disk_faults

# What the scripts import once they run. Nothing here starts a thread, which a fork would lose.
IMPORTED = ("cogvideox.loop", "cogvideox.preparation.prepare", "cogvideox.evaluation.before_after")
IMPORTED += ("peft", "matplotlib.figure")
IMPORTED += ("diffusers.pipelines.cogvideo.pipeline_cogvideox", "transformers.models.t5.modeling_t5")


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answers until the connection ends; in a process that is forked, returns the request for it."""
    with connection, connection.makefile("rw") as lines:
        for line in lines:
            request = json.loads(line)
            if "pid" in request:
                pid, status = os.waitpid(request["pid"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                answer = os.fork()
                if answer == 0:
                    return request
            lines.write(f"{json.dumps(answer)}\n")
            lines.flush()
    return None


def become(request: dict[str, Any]) -> None:
    """Makes this process what subprocess.Popen would have made: session, folder, environment, output, arguments."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    importlib.reload(sys.modules["huggingface_hub.constants"])  # made from the environment
    log = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    if request["killed_at"]:
        signal_at(*request["killed_at"])
    for fault in request["disk"]:
        disk_faults.refuse(*fault)


def signal_at(moment: str, nth: int, number: int = signal.SIGKILL) -> None:
    """This process gets a signal the nth time that ``moment``, a regular expression, is found in what it is about to do
    to the disk: "os.rename FROM TO -1 -1", "os.mkdir PATH MODE -1", "open PATH w FLAGS", "read PATH r FLAGS"; or has
    just done: "unit NAME", of stopping.unit.
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
    for name in IMPORTED:
        importlib.import_module(name)
    stopping = importlib.import_module("cogvideox.stopping")
    gc.freeze()  # what is imported stays; looking through it would copy its pages, too
    wanted = serve(socket.socket(fileno=int(sys.argv[1])))
    if wanted is not None:
        become(wanted)
        runpy.run_path(sys.argv[0], run_name="__main__")
