"""Raises torch.compile's limit on graphs, and turns its silent fallback to eager execution into an error.

By default torch allows eight graphs per function. A run may need more: each tensor shape and each choice of saved
activations has a graph, and sampling has others. ``allowing_graphs`` wraps a compiled function so that the raised limit
applies in every thread that calls it.
"""

import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

MAX_GRAPHS = 256
P = ParamSpec("P")
R = TypeVar("R")


def allow_graphs() -> None:
    """Raises the limit of this thread to MAX_GRAPHS graphs per function, and makes exceeding it an error."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def allowing_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Returns a compiled function that calls ``allow_graphs`` before its first call in each thread.

    Each thread has its own settings since torch 2.12, and backward passes on a GPU run in a thread of autograd. Without
    the call in that thread, torch's default limit would end the run at the ninth graph.
    """
    thread = threading.local()

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        if not hasattr(thread, "ready"):
            allow_graphs()
            thread.ready = True
        return function(*arguments, **named)

    return call


def compiled_graphs() -> tuple[int, int]:
    """Returns (number of graphs that this process has compiled or loaded, how many of them came from the cache)."""
    if "torch._dynamo" not in sys.modules:
        return 0, 0
    counters = torch._dynamo.utils.counters
    loaded = max(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])
    return counters["stats"]["unique_graphs"], loaded
