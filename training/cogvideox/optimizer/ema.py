"""An exponential moving average of the fp32 masters, which takes their place in the model to be looked at and exported.

    d_n = min(decay, (1 + n) / (10 + n)), d_0 = 0        n: steps that changed the weights so far
    average <- d_n average + (1 - d_n) master

This warm-up is that of TensorFlow's and of diffusers' EMA: an average over about the last ninth of the steps so far,
until it is as long as --ema_decay says. n is counted on the device, so that a skipped step needs no word from there.
Where the masters live on the host, so do the averages, and the share is fetched from the device: each update waits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.optimizer.master_weights import for_file

COUNT = "steps"  # in the names of tensors, beside the parameters


class Ema:
    """The average of ``masters``, each on its master's device; ``parameters`` are what the model runs, by name too."""

    def __init__(self, parameters: dict[str, Parameter], masters: dict[str, Tensor], decay: float) -> None:
        self.parameters, self.masters, self.decay = parameters, masters, decay
        self.averages = {name: master.detach().clone() for name, master in masters.items()}
        self.steps = torch.zeros((), device=next(iter(parameters.values())).device)  # exact in fp32 up to 16 million

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """After an optimizer step; ``skipped`` is 1 on the device where it changed nothing, and then nor does this."""
        decay = ((1.0 + self.steps) / (10.0 + self.steps)).clamp(max=self.decay)
        share = torch.where(self.steps > 0, 1.0 - decay, 1.0) * (1.0 - skipped)
        for name, average in self.averages.items():
            average.lerp_(self.masters[name], share.to(average.device))
        self.steps += 1.0 - skipped

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages, rounded to its type; afterwards the trained weights again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange(back=True)

    @torch.no_grad()
    def _exchange(self, back: bool = False) -> None:
        """Puts averages, or masters, into the model. A master that is the parameter itself changes places instead."""
        for name, parameter in self.parameters.items():
            master, average = self.masters[name], self.averages[name]
            if master is parameter:
                held = parameter.clone()
                parameter.copy_(average)
                average.copy_(held)
            else:
                parameter.copy_(master if back else average)

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """All that a resumed run needs, on the CPU; ``copy`` as in masters.for_file."""
        return for_file(self.tensors(), copy)

    def tensors(self) -> dict[str, Tensor]:
        """The same where they lie: nothing is copied."""
        return {COUNT: self.steps, **{f"average/{name}": average for name, average in self.averages.items()}}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what ``state`` returned."""
        self.steps.copy_(tensors[COUNT])
        for name, average in self.averages.items():
            average.copy_(tensors[f"average/{name}"])
