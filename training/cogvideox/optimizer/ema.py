"""An exponential moving average (EMA) of the fp32 master weights, used for validation and export.

    d_n = min(decay, (1 + n) / (10 + n)), d_0 = 0        n: steps so far that changed the weights
    average <- d_n average + (1 - d_n) master

TensorFlow's and diffusers' EMA warm up in the same way: the average covers about the last ninth of the steps so far,
until it reaches the length that --ema_decay sets. n is counted on the device, so the host need not know whether a step
was skipped. If the masters are stored on the host, so are the averages; then each update waits for the device, because
the weight 1 - d_n is computed there. An average of weights without masters is where the weights are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from cogvideox.optimizer.adam_groups import Masters
from cogvideox.optimizer.state_tensors import for_file

STEPS_NAME = "steps"  # the name of the step counter among the saved tensors
AVERAGE = "average"  # the names of the other saved tensors are AVERAGE/PARAMETER


class Ema:
    """Keeps the average of each master weight, on the device of the master.

    Args:
        parameters: The parameters of the model by name, in its type, or this process's elements of them.
        masters: The fp32 masters by the same names; an fp32 parameter may be its own master.
        decay: The largest decay, --ema_decay.
    """

    def __init__(self, parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.masters, self.decay = parameters, masters, decay
        self.averages = {name: master.detach().clone() for name, master in masters.items()}
        # fp32 counts exactly up to 16 million.
        self.steps = torch.zeros((), device=next(iter(parameters.values())).device)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Moves the averages toward the masters; called after each optimizer step.

        Args:
            skipped: Scalar on the device, 1 if the step changed no weight; then the averages do not change either.
        """
        decay = ((1.0 + self.steps) / (10.0 + self.steps)).clamp(max=self.decay)
        changed = (1.0 - skipped).to(self.steps.device)
        share = torch.where(self.steps > 0, 1.0 - decay, 1.0) * changed
        for name, average in self.averages.items():
            average.lerp_(self.masters[name], share.to(average.device))
        self.steps += changed

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages, rounded to its type, into the model; restores the trained weights exactly on exit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange(back=True)

    @torch.no_grad()
    def _exchange(self, back: bool = False) -> None:
        """Copies averages into the model, or masters if ``back``. A parameter that its master needs is swapped."""
        for name, parameter in self.parameters.items():
            master, average = self.masters[name], self.averages[name]
            if isinstance(self.masters, Masters):
                self.masters.swap(name, average)
            elif master is parameter:
                trained = parameter.clone()
                parameter.copy_(average)
                average.copy_(trained)
            else:
                parameter.copy_(master if back else average)

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """Returns the tensors that a resumed run needs, on the CPU.

        Args:
            copy: See ``master_weights.for_file``.
        """
        return for_file(self.tensors(), copy)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of ``state`` on their own devices, without a copy."""
        return {STEPS_NAME: self.steps, **{f"{AVERAGE}/{name}": average for name, average in self.averages.items()}}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``state`` returned."""
        self.steps.copy_(tensors[STEPS_NAME])
        for name, average in self.averages.items():
            average.copy_(tensors[f"{AVERAGE}/{name}"])
