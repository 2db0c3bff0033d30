"""Connects the processes (ranks) of a run, and lets all of them end at the same optimizer step.

``Ranks`` has the barriers and checks between processes, ``Consensus`` decides for each optimizer step whether all ranks
take it. Both rely on the store through which torch.distributed connects the processes, and on stopping.py for signals.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.config.launch import LEFT_OVER
from cogvideox.config.options import asked_for_cpu, launched_processes
from cogvideox.errors import LostRankError, UsageError, first_line, first_of
from cogvideox.files import machine_id, temporary_of
from cogvideox.model.sequence import make_sequence_group

if TYPE_CHECKING:
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

SHARED_SECONDS = 10.0  # Network file systems show new files to other machines some seconds late.
PATIENCE = timedelta(days=7)  # gloo's timeout; stopping.py ends a run without progress much earlier
# The collective operations of a step may take this many seconds longer than --nccl_timeout, because their errors name
# neither the rank nor the phase. So stopping.py, whose message does, ends the run first.
WATCHER_SECONDS = 30
USUAL_WAIT = 30.0  # seconds in which processes that are started together import torch and connect, even on slow disks
GO, SAVE, STOP = "go", "save", "stop"
# How gloo, NCCL and the store of torch.distributed say that another process has ended.
LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|remote process exited|failed to recv|recvVector failed", re.IGNORECASE
)
# How gloo and NCCL say that another process is too slow.
TIMED_OUT = re.compile("[Tt]imed out waiting|collective operation timeout")
# How torch.distributed and accelerate say that a launcher has not told them where the other processes are, and gloo,
# whose errors have no class of their own, that it cannot reach them.
NOT_CONNECTED = re.compile("MASTER_ADDR|environment variable [A-Z_]+ expected|gloo|enforce fail", re.IGNORECASE)
# Variables from which torch.distributed and accelerate conclude that there are several processes, and where they are.
LAUNCH_VARIABLES = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
)

OF_ATTEMPT = "cogvideox-attempt"  # the scheme of a URL with which torch.distributed calls ``connect_attempt``

T = TypeVar("T")


def start_processes() -> "PartialState":
    """Returns accelerate's PartialState of this process, connected to the others, on a GPU if the machine has one."""
    from accelerate import PartialState

    with connecting():
        state = PartialState(cpu=not torch.cuda.is_available(), init_method=connection_url())
    check_world(state.num_processes)
    return state


@contextmanager
def connecting() -> Iterator[None]:
    """Converts errors of accelerate and torch.distributed, while they connect the processes, into UsageError.

    If that takes longer than usual, a line says for whom this process waits.
    """
    given = {name: os.environ[name] for name in LAUNCH_VARIABLES if name in os.environ}
    try:
        with reporting_a_wait():
            yield
    except (ValueError, RuntimeError) as error:
        is_other = not isinstance(error, dist.DistError) and not NOT_CONNECTED.search(str(error))
        if not given or is_other or LOST.search(str(error)) or stopping.stops_now():
            raise
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(
            f"the processes of this run cannot be connected: {first_line(error)}; the environment has {listed}; "
            "start all processes at the same time, with the address of process 0 in MASTER_ADDR and a free port of it "
            f"in MASTER_PORT; {LEFT_OVER} {' '.join(given)}"
        ) from error


@contextmanager
def reporting_a_wait() -> Iterator[None]:
    """Prints a line if this process is not connected to the others within USUAL_WAIT seconds."""
    number = launched_processes()
    if number == 1:
        yield
        return
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    rule = f"still waits for the others of {number} processes, at {where}"
    line = f"process {os.environ.get('RANK', '?')} {rule}; all of them must be started with this number and address"
    report = threading.Timer(USUAL_WAIT, print, [line], {"file": sys.stderr, "flush": True})
    report.daemon = True
    report.start()
    try:
        yield
    finally:
        report.cancel()


def connection_url() -> str | None:
    """Returns the init_method of torch.distributed with which the processes find each other; None for the usual one.

    A launcher that may restart processes keeps its store, which still has the addresses of the former processes. The
    new ones would try to reach these (pytorch#135712), so they need names of their own in it.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return f"{OF_ATTEMPT}://" if shared and restarts and launched_processes() > 1 else None


def connect_attempt(url: str, timeout: timedelta = PATIENCE, **_: object) -> Iterator[tuple[dist.Store, int, int]]:
    """Yields the part of the launcher's store that only the processes of this attempt use, the rank and their number.

    Args:
        url: The URL of ``connection_url``.
        timeout: How long to wait for the other processes.
    """
    rank, number = int(os.environ["RANK"]), launched_processes()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore("cogvideox", dist.TCPStore(address, port, is_master=False, timeout=timeout))
    yield dist.PrefixStore(agree_on_attempt(store, rank, number, timeout), store), rank, number


def agree_on_attempt(store: dist.Store, rank: int, number: int, timeout: timedelta) -> str:
    """Returns a name for this attempt of the launcher, which rank 0 chooses and tells the others.

    Each of them asks under a name of its own, so that it never reads the answer to a process of a former attempt.

    Args:
        store: The store of the launcher, with what former attempts wrote.
        rank: The rank of this process.
        number: The number of processes.
        timeout: How long to wait for the other processes.
    """
    own = uuid4().hex
    if rank > 0:
        store.set(f"ask/{rank}", own)
        attempt = store.get(f"answer/{own}").decode()
        store.set(f"{attempt}/joined/{rank}", "")
        return attempt
    end = time.monotonic() + timeout.total_seconds()
    while missing := [other for other in range(1, number) if not store.check([f"{own}/joined/{other}"])]:
        for other in missing:
            if store.check([f"ask/{other}"]):  # by this attempt, or still by a former one
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", own)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"{number - len(missing)} of {number} processes came")
        time.sleep(0.02)
    return own


dist.register_rendezvous_handler(OF_ATTEMPT, connect_attempt)


def alone(device: str = "cpu") -> "Ranks":
    """Returns a process that works by itself on a device, even if a launcher has started others."""
    state: Any = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, device=torch.device(device))
    return Ranks(state)


def unconnected(patience: float) -> "Ranks":
    """Returns this process of a launch without a connection to the others, so that each may end and start by itself.

    Args:
        patience: Seconds in which other processes must make progress while this one waits for them.
    """
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    number = launched_processes()
    device = torch.device("cpu")
    if torch.cuda.is_available() and not asked_for_cpu():
        device = torch.device("cuda", local % torch.cuda.device_count())  # SLURM may show a task its own GPU only
        torch.cuda.set_device(device)
    state: Any = SimpleNamespace(
        process_index=rank % number, num_processes=number, is_main_process=rank == 0, device=device
    )
    return Ranks(state, patience, connected=False)


def check_world(number: int) -> None:
    """Raises UsageError if accelerate connected a different number of processes than were launched."""
    launched = launched_processes()
    if number != launched:
        raise UsageError(
            f"accelerate started {launched} processes that do not know each other (a configuration for GPUs on a "
            "machine without?); for one process: --config_file accelerate_configs/cpu.yaml; "
            f"for {launched} on a CPU: ACCELERATE_USE_CPU=true"
        )


class Ranks:
    """Represents this process and its connections to the other processes of the run.

    Everything here may wait for work whose length differs between ranks (encoding, sampling, exporting). It uses a
    separate gloo group, because the timeout of the collectives in a training step would end it.

    Attributes:
        sequence: The ranks that divide the tokens of this rank's samples; None if it has all tokens.
        data_index: The number of this rank's micro-batch among those that are trained at the same time.
        data_number: How many micro-batches are trained at the same time.
    """

    def __init__(
        self,
        state: "PartialState | AcceleratorState",
        patience: float = 600,
        connected: bool = True,
        sequence_parallel: int = 1,
    ) -> None:
        """Connects the ranks.

        Args:
            state: What accelerate knows about this process.
            patience: Seconds without progress of any rank, while one is in a barrier, after which all ranks end.
            connected: Whether accelerate has connected the processes; without it, nothing here waits for another rank.
            sequence_parallel: The number of ranks that train on the same samples, each on a part of their tokens.
        """
        self.process_index: int = state.process_index
        self.num_processes: int = state.num_processes
        self.is_main_process: bool = state.is_main_process
        self.device: torch.device = state.device
        self.patience = patience
        limit, connected = timedelta(seconds=patience + WATCHER_SECONDS), connected and self.num_processes > 1
        with connecting():
            self.sequence = make_sequence_group(sequence_parallel, limit)
            self._patient = dist.new_group(backend="gloo", timeout=limit) if connected else None
            attempt = self.from_main(uuid4().hex)
        self.data_index, self.data_number = (n // sequence_parallel for n in (self.process_index, self.num_processes))
        self.consensus = Consensus(connect_store(attempt) if connected else None)
        if connected:
            stopping.join_ranks(connect_store(attempt), self.process_index, self.num_processes, patience)
            # From here on, stopping.py ends a wait for a process that does not come.
            dist.distributed_c10d._set_pg_timeout(PATIENCE, self._patient)

    def print(self, *lines: str) -> None:
        """Prints lines on the standard output, from the main process only, without breaking a progress bar."""
        if self.is_main_process:
            tqdm.write("\n".join(lines))

    def gather(self, items: list[T]) -> list[T]:
        """Returns the items of all processes, in the order of ranks, on every rank."""
        if self._patient is None:
            return items
        lists: list[list[T]] = [[] for _ in range(self.num_processes)]
        with stopping.waiting():
            dist.all_gather_object(lists, items, self._patient)
        return [item for part in lists for item in part]

    def from_main(self, value: T) -> T:
        """Returns the value of the main process on every rank, which may take long to find it."""
        values = [value]
        if self._patient is not None:
            with stopping.waiting():
                dist.broadcast_object_list(values, src=0, group=self._patient)
        return values[0]

    def wait_for_everyone(self) -> None:
        """Waits until every process has called this."""
        if self._patient is not None:
            with stopping.waiting():
                dist.barrier(self._patient)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wraps repeatable work that each rank does alone; on exit all ranks wait for each other.

        Raises:
            Stopped: A rank was asked to stop. Every rank raises it, so that none waits for the work of the others.
        """
        stopped = False
        try:
            with stopping.stoppable():
                yield
        except stopping.Stopped:
            stopped = True
        if any(self.gather([stopped])):
            stopping.stop()

    def check_agreement(self, values: Mapping[str, object], fix: str) -> None:
        """Checks that all processes have the same values, before a difference can make them diverge or deadlock.

        Args:
            values: Values of this process by name. One that only other processes have counts as None.
            fix: The fix that the error message gives.

        Raises:
            UsageError: Values differ. Every rank raises it, with each name whose values differ.
        """
        everyone = self.gather([values])
        names = dict.fromkeys(name for theirs in everyone for name in theirs)
        problems = [
            f"process {number} has {name} {theirs.get(name)!r}, process 0 has {everyone[0].get(name)!r}; {fix}"
            for number, theirs in enumerate(everyone)
            for name in names
            if theirs.get(name) != everyone[0].get(name)
        ]
        if problems:
            raise UsageError(first_of(problems))

    def check_shared(self, folder: Path, flag: str) -> None:
        """Checks that all processes see the same folder, with a file that the main process writes there.

        Args:
            folder: The folder.
            flag: The flag that gave it, for the error message.

        Raises:
            UsageError: A process does not see that file. Every rank raises it.
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


def count_here(ranks: Ranks, counted: bool) -> None:
    """Sets LOCAL_WORLD_SIZE to the number of processes on this machine, if the launcher has not.

    Args:
        ranks: The connected processes; all of them call this.
        counted: Whether the launcher of this process has set it.
    """
    machines = ranks.gather([machine_id()])
    if ranks.num_processes > 1 and not counted:
        os.environ["LOCAL_WORLD_SIZE"] = str(machines.count(machine_id()))


def check_own_gpus(ranks: Ranks) -> None:
    """Raises UsageError on every rank if two of them have the same GPU, which NCCL would refuse in the first step.

    Each process may see only its own GPU, as number 0, so the GPUs are compared by their UUIDs.
    """
    if ranks.num_processes == 1 or ranks.device.type != "cuda":
        return
    gpus = ranks.gather([f"{machine_id()} {torch.cuda.get_device_properties(ranks.device).uuid}"])
    for number, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < number:
            rule = f"processes {first} and {number} have the same GPU, and each needs one of its own"
            raise UsageError(f"{rule}; start at most as many processes on each machine as it has GPUs")


@contextmanager
def lost_ranks_reported(hint: Callable[[], str]) -> Iterator[None]:
    """Converts the error of a collective operation that another process has left or delayed into a LostRankError.

    Args:
        hint: Returns how the run is continued, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        rank, phase = os.environ.get("RANK", "0"), stopping.current_phase()
        # The class of errors of the connection to the store, which may be in the launcher of the first machine.
        if isinstance(error, dist.DistNetworkError) or LOST.search(str(error)):
            ended = "because one of them, or the launcher, has ended; see its messages"
            problem = f"lost its connection to the others during {phase}, {ended}"
        elif TIMED_OUT.search(str(error)):
            problem = f"waited too long for the others during {phase}; if they are only slow, raise --nccl_timeout"
        else:
            raise
        raise LostRankError(f"process {rank} {problem}; {hint()}") from error


class Consensus:
    """Decides for each optimizer step whether all ranks take it; the first rank that decides does so for all.

        rank 0   micro-batches   commit: writes "7 go"              all-reduce   step 7
        rank 1   micro-batches   signal   commit: reads "7 go"      all-reduce   step 7   commit: writes "8 stop"

    Ranks wait for each other only where gradients are summed. A rank that was asked to stop must not leave the others
    waiting in that all-reduce. So before a rank sums, it writes to the store that all ranks take this step, unless
    another rank has already written that all stop. The write is a compare-and-set, so one rank wins. It takes a tenth
    of a millisecond and does not wait for a device. A rank that is asked to stop in a step that all take writes that
    none takes the next one.
    """

    def __init__(self, store: dist.Store | None) -> None:
        """Creates the decisions of a run.

        Args:
            store: A store that all ranks share; None if there is only one rank.
        """
        self.store = store
        self.written = ""  # value of the store's key for the newest step that was decided
        self.step, self.decision = -1, GO

    def may_stop(self, step: int) -> None:
        """Raises Stopped if this rank was asked to stop, unless a rank has committed the step already."""
        if stopping.requested():
            self._obey(step, STOP)

    def commit(self, step: int, save: bool) -> bool:
        """Decides that all ranks take the step, and returns whether they save a checkpoint after it.

        Args:
            step: The number of steps before this one.
            save: Whether this rank wants a checkpoint; if another rank decides first, its choice is used.

        Raises:
            Stopped: A rank was asked to stop before any rank took this step.
        """
        return self._obey(step, STOP if stopping.requested() else SAVE if save else GO) == SAVE

    def _obey(self, step: int, wish: str) -> str:
        if step != self.step:
            self.written = self._write_first(f"{step} {wish}")
            self.step, self.decision = step, self.written.split()[1]
        elif stopping.requested():
            # All ranks take this step. None can decide about the next one before this rank's gradients are summed, so
            # this is in time, while at the start of the next step another rank may always be faster.
            self._write_first(f"{step + 1} {STOP}")
        if self.decision == STOP:
            stopping.stop()
        return self.decision

    def _write_first(self, value: str) -> str:
        """Returns the value of the first rank that wrote about this step, which may be this one."""
        if self.store is None:
            return value
        written: bytes = self.store.compare_set("step", self.written, value)
        return written.decode()


def connect_store(attempt: str) -> dist.Store:
    """Opens a separate connection to the store through which the launched processes found each other.

    Args:
        attempt: A name that only the processes of this start have. A launcher that restarts processes may keep the
            store with what the former ones wrote. TORCHELASTIC_RESTART_COUNT of torchrun would not do, because each
            machine counts only the failures of its own processes.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"cogvideox/{attempt}", store)
