"""Drives a headless Chromium over its debugging pipe, for tests of pages. It needs no library.

Messages are JSON objects that end with a zero byte (Chrome DevTools Protocol). Chromium reads them from its file
descriptor 3 and writes answers to descriptor 4.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--autoplay-policy=no-user-gesture-required"]
DEADLINE = 60.0  # seconds


def find_browser() -> str | None:
    """Returns the path of an installed browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser with one page.

    Args:
        program: Path of Chromium.
        profile: An empty folder for its files.
    """

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self.requests = os.pipe()
        self.answers, from_browser = os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "--window-size=1200,1600"]
        shell = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *command]
        self.process = subprocess.Popen(shell, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
        for end in (to_browser, from_browser):
            os.close(end)
        self.numbers, self.buffer, self.session = itertools.count(1), b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        for end in (self.requests, self.answers):
            os.close(end)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.answers, 2**16)
            assert part, "the browser has ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path) -> None:
        """Opens a file and waits until it is loaded."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait_for(f"document.readyState === 'complete' && location.href === {page.resolve().as_uri()!r}")

    def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Waits until a JavaScript expression is true."""
        deadline = time.monotonic() + DEADLINE
        while not self.value(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def click(self, selector: str, across: float = 0.5) -> None:
        """Clicks on an element, at a share of its width."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x = self.value(f"{box}.left + {across} * {box}.width")
        y = self.value(f"{box}.top + {box}.height / 2")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
