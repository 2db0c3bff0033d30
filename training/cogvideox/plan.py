"""How the transformer's blocks are executed: recomputed in the backward pass or not, compiled or not."""

from dataclasses import dataclass
from typing import Any

import torch

DEVICE, HOST = "device", "host"
MAX_GRAPHS = 256


def allow_graphs() -> None:
    """Lets torch compile a graph for each bucket and for sampling, and fail where it would go on eagerly."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


@dataclass(frozen=True)
class ModulePlan:
    """The blocks as diffusers runs them: the reference, and what any method can be trained with."""

    recompute: bool  # a block's activations are computed again in the backward pass
    compiled: bool  # each block by torch.compile, one graph for all

    def apply(self, transformer: Any) -> None:
        """Sets the transformer up; adapters must be attached already."""
        if self.recompute:
            transformer.enable_gradient_checkpointing()
        if self.compiled:
            allow_graphs()
            for block in transformer.transformer_blocks:
                block.compile(dynamic=False)

    def __str__(self) -> str:
        blocks = "compiled" if self.compiled else "eager"
        return f"blocks {blocks}, activations {'recomputed' if self.recompute else 'kept'}"


@dataclass(frozen=True)
class BlockPlan:
    """One block: where its frozen weights lie, what forward keeps for backward (blocks.KEPT), and where."""

    weights: str = DEVICE
    keep: str = "input"
    kept: str = DEVICE


@dataclass(frozen=True)
class ExecutionPlan:
    """One way to run the blocks, chosen before the first step and printed."""

    blocks: tuple[BlockPlan, ...]
    compiled: bool
    attention: str  # attention.BACKENDS, or cpu
