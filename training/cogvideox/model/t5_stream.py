"""T5 with its blocks in host memory: two at a time pass through the device, the next arriving while one computes.

caption tokens -> embedding (device) -> block 0, 1, ... (each copied into a slot of a Ring) -> last norm (device)

T5-XXL is 9 GiB in bf16 and copying takes far longer than embedding one caption, so many captions go through a block
while it is there. They are computed ``rows`` at a time all the same, because another batch rounds differently: the
embeddings are bit for bit those of the encoder on the device. Forward only.

Shapes: B captions, L tokens, D channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.memory.streaming import Layout, Ring, pinned

CAPTIONS_A_PASS = 32  # batches that share one copy of the weights; a batch of one holds 2 MB between blocks
SLOTS = 2  # one computes, one arrives


class PassingBlock(nn.Module):
    """A block whose weights arrive when it is called; those of the next one are sent for."""

    def __init__(self, block: nn.Module, number: int, names: list[str], layout: Layout, ring: Ring, rows: int) -> None:
        super().__init__()
        self.block, self.number, self.names, self.layout = block, number, names, layout
        self.ring, self.rows = ring, rows

    def forward(self, hidden_BLD: Tensor, *others: Any, **named: Any) -> tuple[Any, ...]:
        """As the block. What it takes and returns beside the hidden states is equal for all captions: no mask is."""
        slot = self.ring.get(self.number)
        self.ring.fetch((self.number + 1) % len(self.ring.hosts))  # after the last: the first, for the next pass
        weights = dict(zip(self.names, self.layout.views(self.ring.slots[slot]), strict=True))
        outputs = []
        for part in hidden_BLD.split(self.rows):
            arguments = (part, *(x[: len(part)] if isinstance(x, Tensor) else x for x in others))
            outputs.append(torch.func.functional_call(self.block, weights, arguments, named))
        return torch.cat([output[0] for output in outputs]), *outputs[0][1:]


class RowsAtATime(nn.Module):
    """A module applied to as many captions at once as the blocks are."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self.module, self.rows = module, rows

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """As the module."""
        return torch.cat([self.module(part) for part in hidden_BLD.split(self.rows)])


@contextmanager
def streamed(encoder: Any, device: torch.device, rows: int) -> Iterator[None]:
    """A T5EncoderModel, wherever it is, runs on the device with its blocks on the host, until the block ends; the
    encoder is of no use afterwards.
    """
    stack = encoder.encoder
    names = shared_names(stack.block)
    layout = Layout([stack.block[0].get_parameter(name) for name in names])
    with on_host(stack.block, names, layout) as hosts:
        streamed_ids = {id(block.get_parameter(name)) for block in stack.block for name in names}
        for tensor in (*encoder.parameters(), *encoder.buffers()):
            if id(tensor) not in streamed_ids:
                tensor.data = tensor.to(device)
        ring = Ring(hosts, device, SLOTS)
        for number, block in enumerate(stack.block):
            stack.block[number] = PassingBlock(block, number, names, layout, ring, rows)
        stack.final_layer_norm = RowsAtATime(stack.final_layer_norm, rows)
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the last copy, which nobody waited for
            ring.slots.clear()


@contextmanager
def on_host(blocks: Any, names: list[str], layout: Layout) -> Iterator[dict[int, Tensor]]:
    """The named parameters of each block in a pinned buffer by its number; freed with the last of them."""
    hosts: dict[int, Tensor] = {}
    weights = [[block.get_parameter(name) for name in names] for block in blocks]
    try:
        for number, of_block in enumerate(weights):
            hosts[number] = pinned(layout.num_bytes)
            for weight, view in zip(of_block, layout.views(hosts[number]), strict=True):
                weight.data = view.copy_(weight)  # its own memory is free now: never twice the model
        yield hosts
    finally:
        hosts.clear()
        for weight in chain.from_iterable(weights):
            weight.data = weight.new_empty(0)


def shared_names(blocks: Any) -> list[str]:
    """The parameters that every block has: the table of relative positions is in the first alone."""
    others = [dict(block.named_parameters()) for block in blocks]
    return [name for name in others[-1] if all(name in other for other in others)]
