"""Records environment and memory of a measurement, and writes its result, and tables of results into pages."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from random_models import ROOT

from cogvideox.files import write_atomically


def device_and_versions() -> dict[str, Any]:
    """Returns device, versions, commit and command, for the JSON of a result."""
    from cogvideox.runtime.run import environment

    return environment() | {"commit": current_commit(), "command": " ".join(sys.argv)}


def current_commit() -> str:
    """Returns the commit of this project's files: COMMIT, which is set where they were copied without git's history."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("COMMIT") or git.stdout.strip()


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON, and creates its folder. A program that is killed leaves no incomplete file."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


@contextmanager
def watched(choose: Callable[[int, int], int], read: Callable[[], int]) -> Iterator[list[int]]:
    """Reads a number twice a second while the context lasts.

    Args:
        choose: Returns one of two numbers: min or max.
        read: Returns the current number.

    Yields:
        A list, whose only item becomes the least or the largest number.
    """
    found, ended = [read()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            found[0] = choose(found[0], read())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def between(text: str, script: str) -> tuple[str, str, str]:
    """Splits a text into the part before the table of a script, the table, and the part after it.

    Raises:
        ValueError: The text lacks one of the lines that mark the table.
    """
    begin, end = (f"<!-- {script} --table: {edge} -->\n" for edge in ("begin", "end"))
    for mark in (begin, end):
        if mark not in text:
            raise ValueError(f"has no line {mark.strip()}")
    before, _, rest = text.partition(begin)
    inside, _, after = rest.partition(end)
    return before + begin, inside, end + after


def put_into(page: Path, script: str, table: str) -> None:
    """Replaces the table of a script in a page."""
    before, _, after = between(page.read_text(), script)
    page.write_text(before + table + after)
