"""Stand-ins for a decoder that misbehaves, to run in a worker process. They take any arguments and never return."""

import itertools
import os
import signal
import time

TOO_MUCH = 8 << 30  # bytes; where nothing stopped it, it stops itself, for the machine's sake


def hang(*_: object) -> None:
    """Sleeps for ever, as a decoder that waits for a frame that never comes."""
    while True:
        time.sleep(3600)


def spin(*_: object) -> None:
    """Computes for ever."""
    for _number in itertools.count():
        pass


def crash(*_: object) -> None:
    """Ends its process by a segmentation fault, as a decoder that a damaged file leads astray."""
    os.kill(os.getpid(), signal.SIGSEGV)
    hang()


def eat_memory(*_: object) -> None:
    """Takes memory without end and writes to it, as a decoder that believes an absurd header."""
    blocks = []
    for _taken in range(0, TOO_MUCH, 64 << 20):
        blocks.append(b"\1" * (64 << 20))
    raise AssertionError(f"nothing stopped it at {TOO_MUCH >> 30} GiB")
