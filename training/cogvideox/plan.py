"""How the transformer's blocks are executed: recomputed in the backward pass or not, compiled or not."""

from dataclasses import dataclass
from typing import Any


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
            for block in transformer.transformer_blocks:
                block.compile(dynamic=False)

    def __str__(self) -> str:
        blocks = "compiled" if self.compiled else "eager"
        return f"blocks {blocks}, activations {'recomputed' if self.recompute else 'kept'}"
