"""The processes of a run: which one this is, its device, barriers for work of unequal length, and ending together."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.config.options import launched_processes
from cogvideox.errors import UsageError, first_of
from cogvideox.files import temporary_of

SHARED_SECONDS = 10.0  # network file systems show new files to other machines some seconds late
PATIENCE = timedelta(days=7)  # of gloo; a run whose ranks make no progress is ended much earlier, see stopping.py
GO, SAVE, STOP = "go", "save", "stop"


def start_processes() -> Any:
    """accelerate's PartialState: this process and those that it was launched with, on GPUs where there are any."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    check_world(state.num_processes)
    return state


def check_world(number: int) -> None:
    """Raises UsageError where accelerate knows another number of processes than were launched."""
    launched = launched_processes()
    if number != launched:
        raise UsageError(
            f"accelerate started {launched} processes that do not know each other (a configuration for GPUs on a "
            "machine without?); for one process: --config_file accelerate_configs/cpu.yaml; "
            f"for {launched} on a CPU: ACCELERATE_USE_CPU=true"
        )


class Ranks:
    """This process among the others.

    Barriers wait for work of unequal length (encoding, sampling, exporting), so they have a group of their own without
    the timeout of the collectives in a training step.
    """

    def __init__(self, state: Any, patience: float = 600) -> None:
        """``state`` is an accelerate PartialState or AcceleratorState.

        After ``patience`` seconds without progress on any rank, while one is in a barrier, all of them end.
        """
        self.process_index: int = state.process_index
        self.num_processes: int = state.num_processes
        self.is_main_process: bool = state.is_main_process
        self.device: torch.device = state.device
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE) if self.num_processes > 1 else None
        self.consensus = Consensus(connect_store() if self.num_processes > 1 else None)
        if self.num_processes > 1:
            stopping.join_ranks(connect_store(), self.process_index, self.num_processes, patience)

    def say(self, *lines: str) -> None:
        """Lines for the user on the standard output, from the main process, beside a progress bar."""
        if self.is_main_process:
            tqdm.write("\n".join(lines))

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, on each of them."""
        if self._patient is None:
            return items
        lists: list[Any] = [None] * self.num_processes
        with stopping.waiting():
            dist.all_gather_object(lists, items, self._patient)
        return [item for part in lists for item in part]

    def wait_for_everyone(self) -> None:
        """Returns when every process has come here."""
        if self._patient is not None:
            with stopping.waiting():
                dist.barrier(self._patient)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that each rank does alone and that can be done again; at its end all ranks wait for each other.

        Raises:
            Stopped: a rank was asked to stop; on every rank, so that none waits for the work of the others.
        """
        stopped = False
        try:
            with stopping.stoppable():
                yield
        except stopping.Stopped:
            stopped = True
        if any(self.gather([stopped])):
            stopping.stop()

    def check_agreement(self, values: dict[str, Any], fix: str) -> None:
        """Compares what each process has, by name, before it can make them differ or wait for each other for ever.

        Raises:
            UsageError: on all of them, with each name whose values are not equal, and ``fix``.
        """
        everyone = self.gather([values])
        problems = [
            f"process {number} has {name} {theirs[name]!r}, process 0 has {everyone[0][name]!r}; {fix}"
            for number, theirs in enumerate(everyone)
            for name in values
            if theirs[name] != everyone[0][name]
        ]
        if problems:
            raise UsageError(first_of(problems))

    def check_shared(self, folder: Path, flag: str) -> None:
        """Looks whether all processes have the same folder, which the main process can write to.

        Raises:
            UsageError: on all of them, where one of them does not see what the main process writes there.
        """
        if self.num_processes == 1:
            return
        written: Path | None = None
        if self.is_main_process:
            written = temporary_of(folder / "shared")
            folder.mkdir(parents=True, exist_ok=True)
            written.touch()
        (name,) = (name for name in self.gather([written and written.name]) if name)
        end = time.monotonic() + SHARED_SECONDS
        while not (seen := (folder / name).exists()) and time.monotonic() < end:
            time.sleep(0.1)
        blind = [str(number) for number, sees in enumerate(self.gather([seen])) if not sees]
        if written is not None:
            written.unlink(missing_ok=True)
        if blind:
            rule = f"process {', '.join(blind)} has another folder of this name than process 0"
            raise UsageError(f"{flag} {folder}: {rule}; give one that all machines share")


class Consensus:
    """What all ranks do with each optimizer step: the first one to come to a decision about it decides for all.

    Ranks wait for each other only where gradients are summed. A rank that was asked to stop must not leave the others
    waiting there, so before a rank sums it writes down in the store that all ranks take this step, unless another rank
    has written before that all stop. This takes a tenth of a millisecond, and no device is waited for.
    """

    def __init__(self, store: Any | None) -> None:
        """``store`` is a TCPStore that all ranks share; None: there is one rank."""
        self.store = store
        self.written = ""  # the value of the store's key, as of the newest step that was decided
        self.step, self.decision = -1, GO

    def may_stop(self, step: int) -> None:
        """Raises Stopped between two units of a step, if this rank was asked to and no other has begun to sum."""
        if stopping.requested():
            self._obey(step, STOP)

    def commit(self, step: int, save: bool) -> bool:
        """Decides that the step is taken; returns whether a checkpoint is saved after it.

        Args:
            step: the number of steps before this one.
            save: whether this rank wants a checkpoint; if another rank decides, it may decide otherwise.

        Raises:
            Stopped: a rank was asked to stop.
        """
        return self._obey(step, STOP if stopping.requested() else SAVE if save else GO) == SAVE

    def _obey(self, step: int, wish: str) -> str:
        if step != self.step:
            self.written = self._write_first(f"{step} {wish}")
            self.step, self.decision = step, self.written.split()[1]
        if self.decision == STOP:
            stopping.stop()
        return self.decision

    def _write_first(self, value: str) -> str:
        """The value of the first rank that has written about this step."""
        if self.store is None:
            return value
        written: bytes = self.store.compare_set("step", self.written, value)
        return written.decode()


def connect_store() -> Any:
    """A connection of its own to the store through which the launched processes found each other."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"cogvideox/{restart}", store)
