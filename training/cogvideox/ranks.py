"""The processes of a run: which one this is, its device, and a barrier that waits as long as it takes."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from cogvideox.errors import UsageError
from cogvideox.options import launched_processes

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
