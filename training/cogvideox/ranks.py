"""The processes of a run: which one this is, its device, and a barrier that waits as long as it takes."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from cogvideox.errors import UsageError, first_of
from cogvideox.files import temporary_of
from cogvideox.options import launched_processes

SHARED_SECONDS = 10.0  # network file systems show new files to other machines some seconds late
PATIENCE = timedelta(days=7)  # the launcher ends the others when one dies, so waiting long costs nothing


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

    def __init__(self, state: Any) -> None:
        """``state`` is an accelerate PartialState or AcceleratorState."""
        self.process_index: int = state.process_index
        self.num_processes: int = state.num_processes
        self.is_main_process: bool = state.is_main_process
        self.device: torch.device = state.device
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE) if self.num_processes > 1 else None

    def say(self, *lines: str) -> None:
        """Lines for the user on the standard output, from the main process, beside a progress bar."""
        if self.is_main_process:
            tqdm.write("\n".join(lines))

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, on each of them."""
        if self._patient is None:
            return items
        lists: list[Any] = [None] * self.num_processes
        dist.all_gather_object(lists, items, self._patient)
        return [item for part in lists for item in part]

    def wait_for_everyone(self) -> None:
        """Returns when every process has come here."""
        if self._patient is not None:
            dist.barrier(self._patient)

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
