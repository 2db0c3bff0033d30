"""The processes of a run: which one this is, its device, and a barrier that waits as long as it takes."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=7)  # the launcher ends the others when one dies, so waiting long costs nothing


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

    def wait_for_everyone(self) -> None:
        """Returns when every process has come here."""
        if self._patient is not None:
            dist.barrier(self._patient)
