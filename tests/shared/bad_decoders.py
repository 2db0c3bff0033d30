"""Imitates decoders that misbehave in a worker process. The functions take any arguments and never return."""

import itertools
import os
import signal
import time

TOO_MUCH = 8 << 30  # bytes; at this size eat_memory stops itself, to protect the machine


def hang(*_: object) -> None:
    """Sleeps forever, like a decoder that waits for a frame that never comes."""
    while True:
        time.sleep(3600)


def spin(*_: object) -> None:
    """Computes forever."""
    for _number in itertools.count():
        pass


def crash(*_: object) -> None:
    """Ends its process with a segmentation fault, like a decoder that a damaged file crashes."""
    os.kill(os.getpid(), signal.SIGSEGV)
    hang()


def eat_memory(*_: object) -> None:
    """Allocates and writes memory without end, like a decoder that trusts an absurd header."""
    blocks = []
    for _taken in range(0, TOO_MUCH, 64 << 20):
        blocks.append(b"\1" * (64 << 20))
    raise AssertionError(f"nothing stopped it at {TOO_MUCH >> 30} GiB")
