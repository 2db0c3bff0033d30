"""Shows progress: a bar of tqdm on a terminal, and a plain line now and then in a log.

Without a terminal, a bar would write a line for each of its changes, and again after each message.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two lines of a log


class ProgressBar(tqdm):
    """Shows how much of the work is done.

    In a log, a line follows after every SECONDS and at the end, which is left out with ``leave=False``.
    """

    def __init__(self, iterable: Any = None, *, disable: bool = False, **options: Any) -> None:
        """Begins with the arguments of tqdm; ``disable`` shows nothing at all."""
        self.is_log = not disable and not sys.stderr.isatty()
        self.options = options
        self.began = self.said = time.monotonic()
        super().__init__(iterable, disable=disable or self.is_log, **options)
        self.said_number = self.n

    def __iter__(self) -> Iterator[Any]:
        if not self.is_log:
            yield from super().__iter__()
            return
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n: float | None = 1) -> bool | None:
        """Adds to the number that is done."""
        if not self.is_log:
            return super().update(n)
        self.n += n or 0
        if time.monotonic() - self.said >= SECONDS:
            self._say()
        return None

    def close(self) -> None:
        """Ends the bar, or writes the last line of the log."""
        if self.is_log and self.options.get("leave", True) and self.n != self.said_number:
            self._say()
        super().close()

    def _say(self) -> None:
        """Writes a line, such as "training: 40 of 600 steps, 1:20 (2.0 s a step), loss=0.1234"."""
        self.said, self.said_number = time.monotonic(), self.n
        passed = self.said - self.began
        done = self.n - self.options.get("initial", 0)
        total = "" if self.total is None else f" of {self.total}"
        parts = [f"{self.options['desc']}: {self.n}{total} {self.options['unit']}s in {self.format_interval(passed)}"]
        if self.total is not None and done and self.n < self.total:
            parts.append(f"{self.format_interval(passed / done * (self.total - self.n))} left")
        parts += [self.postfix] if getattr(self, "postfix", None) else []
        print(", ".join(parts), file=sys.stderr, flush=True)
