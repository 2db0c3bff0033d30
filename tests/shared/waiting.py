"""Waits for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(is_true: Callable[[], bool], within: float = 120) -> None:
    """Waits until a condition is true, and fails if that takes more than ``within`` seconds."""
    end = time.monotonic() + within
    while not is_true():
        assert time.monotonic() < end, f"not true within {within} s"
        time.sleep(0.02)
