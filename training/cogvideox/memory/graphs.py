"""Compiled functions that may have many graphs, for sizes, levels of keeping or sampling; never eager in silence."""

import threading
from collections.abc import Callable
from typing import Any

import torch

MAX_GRAPHS = 256


def allow_graphs() -> None:
    """Lets torch compile many graphs, and fail where it would go on eagerly."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def allowing_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function, before whose first call in each thread ``allow_graphs`` is called there.

    Since torch 2.12 each thread has settings of its own, and on a GPU backward passes run in a thread of autograd's,
    where the ninth graph would be the end of the run.
    """
    thread = threading.local()

    def call(*arguments: Any, **named: Any) -> Any:
        if not hasattr(thread, "ready"):
            allow_graphs()
            thread.ready = True
        return function(*arguments, **named)

    return call
