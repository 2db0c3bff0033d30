"""Raises torch.compile's limit on graphs, and turns its silent fallback to eager execution into an error.

A run needs a graph for each tensor shape, for each set of saved activations and for sampling, which is more than torch
allows by default. ``allowing_graphs`` wraps a compiled function so that the limit holds in every thread that calls it.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

MAX_GRAPHS = 256


def allow_graphs() -> None:
    """Lets torch compile up to MAX_GRAPHS graphs per function in this thread, and raise an error beyond that."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def allowing_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled function that calls ``allow_graphs`` before its first call in each thread.

    Since torch 2.12 the settings belong to a thread, and on a GPU backward passes run in a thread of autograd, where
    torch's default limit would end the run at the ninth graph.
    """
    thread = threading.local()

    def call(*arguments: Any, **named: Any) -> Any:
        if not hasattr(thread, "ready"):
            allow_graphs()
            thread.ready = True
        return function(*arguments, **named)

    return call
