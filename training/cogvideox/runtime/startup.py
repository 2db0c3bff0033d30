"""Measures what a run does until its first optimizer step has finished, phase by phase."""

import os
import time

import psutil

from cogvideox.errors import plural
from cogvideox.memory.graphs import compiled_graphs


class Startup:
    """A clock that began when this process was started. Each phase lasts from the end of the one before it."""

    def __init__(self) -> None:
        self._began = self._ended = psutil.Process().create_time()
        self.seconds: dict[str, float] = {}

    def done(self, phase: str) -> None:
        """Ends a phase. A phase that has ended before gets longer."""
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._ended
        self._ended = now

    def line(self) -> str:
        """Describes all phases up to now, and how many compiled graphs did not have to be compiled again."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        graphs, loaded = compiled_graphs()
        where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torch's temporary folder")
        cache = f"; {loaded} of {plural(graphs, 'compiled graph')} from the cache in {where}" if graphs else ""
        return f"first step finished after {self._ended - self._began:.1f} s: {phases}{cache}"
