"""The optimizer that the flags select: as a rule for master weights, and how large its state is."""

from functools import partial

import torch
from torch.nn import Parameter

from cogvideox.config.flags import OptimizerFlags
from cogvideox.config.optimizers import make_optimizer
from cogvideox.memory.streaming import TrainedBlocks
from cogvideox.optimizer.adam import EXAMPLE, MASTER, Adam, adam_of
from cogvideox.optimizer.adam_weights import AdamWeights
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.resident_weights import MakeOptimizer, ResidentWeights, example_state, measured_state_bytes
from cogvideox.tensor_files import file_order

Rule = Adam | MakeOptimizer  # the settings of Adam, or a function that makes another optimizer for fp32 masters


def rule_of(flags: OptimizerFlags) -> Rule:
    """Returns the optimizer that the flags select."""
    return adam_of(flags) or partial(make_optimizer, flags)


def make_masters(
    parameters: dict[str, Parameter],
    rule: Rule,
    max_grad_norm: float,
    dynamic_scale: bool,
    state_on_host: bool = False,
    blocks: TrainedBlocks | None = None,
    passes: int = 1,
) -> MasterWeights:
    """Returns the master weights of parameters; see ``AdamWeights`` for the arguments.

    The last three are only for Adam: weights and state of any other optimizer are on the device, and its gradients are
    always added up in fp32.
    """
    if isinstance(rule, Adam):
        return AdamWeights(parameters, rule, max_grad_norm, dynamic_scale, state_on_host, blocks, passes)
    return ResidentWeights(parameters, rule, max_grad_norm, dynamic_scale)


def state_bytes(flags: OptimizerFlags, dtype: torch.dtype, device: torch.device) -> float:
    """Returns the bytes of master and optimizer state per trained weight, beside the weight itself.

    Args:
        flags: The flags of the optimizer.
        dtype: The type of the weights.
        device: Where a step of an optimizer other than Adam is made, to measure its state.
    """
    rule = rule_of(flags)
    if isinstance(rule, Adam):
        return rule.state_bytes(dtype)
    return measured_state_bytes(rule, device) + (4 if dtype != torch.float32 else 0)


def bytes_before_masters(flags: OptimizerFlags, device: torch.device) -> float:
    """Returns the bytes of state per trained fp32 weight that a file has before the masters."""
    rule = rule_of(flags)
    state = rule.example_state(torch.float32) if isinstance(rule, Adam) else example_state(rule, device)
    order = file_order(state | {MASTER: torch.empty(EXAMPLE, device="meta")})
    return sum(state[name].nbytes for name in order[: order.index(MASTER)]) / EXAMPLE
