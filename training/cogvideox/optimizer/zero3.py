"""Gathers the weights that DeepSpeed's ZeRO-3 divides between the processes, for work that each process does alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Parameter


@contextmanager
def complete_weights(engine: Any) -> Iterator[None]:
    """Gives each process a complete copy of all weights while the context lasts.

    Inside, processes may run any number of forward passes of the module, each on its own. A copy that is changed there
    is lost.

    Args:
        engine: What deepspeed.initialize returned for ZeRO-3.
    """
    from deepspeed.runtime.zero import GatheredParameters

    offload = engine.optimizer.parameter_offload
    # DeepSpeed's hooks would free the weights after the first forward pass, and wait for all processes before it.
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
            yield
    finally:
        offload.setup_zero_stage3_hooks()


def num_elements(parameter: Parameter) -> int:
    """Returns the number of elements of a complete parameter, of which ZeRO-3 leaves an empty tensor in the model."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
