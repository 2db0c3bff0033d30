"""How the transformer's blocks are executed: recomputed in the backward pass or not, compiled or not."""

from dataclasses import dataclass
from typing import Any

import torch

MAX_GRAPHS = 256


@dataclass(frozen=True)
class ExecutionPlan:
    """One way to run the blocks, chosen before the first step and printed."""

    recompute: bool  # a block's activations are computed again in the backward pass
    compiled: bool  # each block by torch.compile, one graph for all

    def apply(self, transformer: Any) -> None:
        """Sets the transformer up; adapters must be attached already."""
        if self.recompute:
            transformer.enable_gradient_checkpointing()
        if self.compiled:
            # beyond the limit torch runs blocks eagerly without a word; each bucket is a graph, and so is validation
            torch._dynamo.config.recompile_limit = MAX_GRAPHS
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            for block in transformer.transformer_blocks:
                block.compile(dynamic=False)

    def __str__(self) -> str:
        blocks = "compiled" if self.compiled else "eager"
        return f"blocks {blocks}, activations {'recomputed' if self.recompute else 'kept'}"
