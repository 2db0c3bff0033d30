"""Divides work among all processes that share a folder, of any number of launches on any number of machines.

Each piece of work has a key, a hash of all that it is made from, and whether it is done can be seen in the folder. A
process claims a key before it begins. The claim ends when the piece is done, or when the process ends, also if it is
killed. So no piece is done twice, none is lost with a process, and processes may start and end at any time.

A claim is a POSIX lock on one byte of the file ``.claims``, at an offset that is computed from the key; the file stays
empty. On a file system without POSIX locks, a lock file takes its place (locks.py).
"""

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from cogvideox import stopping
from cogvideox.errors import LostRankError, plural
from cogvideox.files import disk_errors_converted
from cogvideox.locks import NO_LOCKS, TAKEN, Lock, take_file, warn_of_lock_files

CLAIMS_NAME = ".claims"
DIGITS = 15  # hexadecimal digits of a key that give its offset: 60 bits, because an offset is a signed 64-bit number
PAUSE = 0.2  # seconds between two looks at the work of other processes


class Claims:
    """Claims keys for this process. It is a context manager; on leaving it, all claims end.

    The process must not open the file of the claims in another way, because closing it would end the claims.
    """

    def __init__(self, folder: Path, is_done: Callable[[str], bool], shard: int = 0, shards: int = 1) -> None:
        """Stores what divides the work; no file is opened yet.

        Args:
            folder: The folder that the processes share; it is created.
            is_done: Returns whether the piece of work of a key is done, by any process.
            shard: The number of the shard that this process begins with, so that processes rarely meet.
            shards: The number of shards. The hash decides which keys a shard has.
        """
        self.folder, self.is_done, self.shard, self.shards = folder, is_done, shard, shards
        self._held: dict[str, Lock] = {}
        self._file = -1

    def __enter__(self) -> "Claims":
        """Opens the file of the claims."""
        with disk_errors_converted(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.folder / CLAIMS_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends all claims of this process."""
        for key in list(self._held):
            self._release(key)
        os.close(self._file)

    def take(self, keys: Collection[str]) -> Iterator[str]:
        """Claims and yields each key that is neither done nor claimed by another process.

        The keys of this process's shard are first; those of the other shards follow, so that a process which has
        finished its shard helps the others, and takes over the work of one that has ended.
        """
        for key in sorted(keys, key=lambda key: (offset_of(key) - self.shard) % self.shards):
            if not self.is_done(key) and self._claim(key):
                self._release_done()  # this key too, if its process ended between the test and the claim
                if key in self._held:
                    yield key

    def wait(self, keys: Collection[str], patience: float) -> None:
        """Waits until all keys are done or one of them can be claimed, because its process has ended or given it up.

        Args:
            keys: The keys that other processes may have claimed.
            patience: Seconds in which at least one of them must be done.

        Raises:
            LostRankError: None was done in this time.
        """
        left, changed = len(keys), time.monotonic()
        while keys := [key for key in keys if not self.is_done(key)]:
            if any(self._is_free(key) for key in keys):
                return
            if len(keys) < left:
                left, changed = len(keys), time.monotonic()
                stopping.unit("wait for other processes")
            elif time.monotonic() - changed > patience:
                parts = plural(left, "part")
                rule = f"another process has claimed {parts} of the work and has finished none for {patience:g} s"
                fix = "end it, and the same command continues; or allow more with --nccl_timeout"
                raise LostRankError(f"{self.folder}: {rule}; {fix}")
            time.sleep(PAUSE)

    def _is_free(self, key: str) -> bool:
        """Returns whether no other process has claimed a key."""
        if not self._claim(key):
            return False
        self._release(key)
        return True

    def _claim(self, key: str) -> bool:
        """Claims a key for this process; returns False if another process has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset_of(key))
        except OSError as error:
            if error.errno in TAKEN:
                return False
            if error.errno not in NO_LOCKS:
                raise
            warn_of_lock_files(self.folder, error)
            with suppress(BlockingIOError):
                self._held[key] = take_file(self.folder / f".{key}.owner")
            return key in self._held
        self._held[key] = Lock(lambda: fcntl.lockf(self._file, fcntl.LOCK_UN, 1, offset_of(key)))
        return True

    def _release(self, key: str) -> None:
        self._held.pop(key).release()

    def _release_done(self) -> None:
        """Ends the claims whose work is done."""
        for key in [key for key in self._held if self.is_done(key)]:
            self._release(key)


def offset_of(key: str) -> int:
    """Returns the offset of a key's byte in the file of the claims."""
    return int(key[:DIGITS], 16)
