"""Runs a Python script as `python` does, but in a process that is forked from the server of forking.py.

It is for programs that start Python themselves, such as shell scripts. The forked process writes to the standard output
and the standard error of this one, which ends as it does, with its status or by its signal. Signals are not passed on.

    python forked_python.py SERVER SCRIPT FLAGS...    SERVER is the name of the server's socket, without the zero byte
"""

import json
import os
import socket
import sys
import time
from typing import Any


def run(name: str, argv: list[str]) -> int:
    """Runs a script with its arguments in a forked process; returns the exit status, or the negative signal."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{name}")
        lines = connection.makefile("rw")
        lines.readline()

        def ask(request: dict[str, Any]) -> Any:
            lines.write(f"{json.dumps(request)}\n")
            lines.flush()
            return json.loads(lines.readline())

        output, errors = (f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in (1, 2))
        request = {"argv": argv, "env": dict(os.environ), "cwd": os.getcwd(), "killed_at": None, "disk": []}
        pid = ask(request | {"output": output, "errors": errors})
        while (status := ask({"pid": pid})) is None:
            time.sleep(0.02)
    return int(status)


if __name__ == "__main__":
    ended = run(sys.argv[1], sys.argv[2:])
    if ended < 0:
        os.kill(os.getpid(), -ended)
    sys.exit(ended)
