"""Runs the T5 encoder on a device that has no room for it, by streaming its blocks from host memory.

Within ``streamed``, the device holds the weights of two blocks at a time: one computes while the next one is copied.

    host memory    block 0   block 1   block 2   ...
                      |         |         |
    device         slot 0    slot 1    slot 0    ...              (a Ring of two slots)
                      |         |         |
    tokens -> embedding -> block 0 -> block 1 -> block 2 -> ... -> final norm

T5-XXL has 9 GiB in bf16, and copying it takes far longer than encoding one caption. Many captions are therefore sent
through a block while its weights are on the device. Within a block they are still computed ``rows`` at a time, because
a different batch size rounds differently: this way, the embeddings are bit for bit those of an encoder that is on the
device. Only the forward pass is supported.

Shapes: B captions, L tokens, D channels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.memory.buffers import Layout, host_buffer, pin
from cogvideox.memory.streaming import Ring

BATCHES_PER_PASS = 32  # batches per copy of the weights; a batch of one caption takes 2 MB between blocks
SLOTS = 2  # one is in use while the other is filled


class PassingBlock(nn.Module):
    """Runs a block with weights from a slot of the ring, and starts the copy of the next block's weights.

    Args:
        block: The block of T5, whose own parameters are not used on the device.
        number: The index of the block.
        names: The names of the streamed parameters, in the order of ``layout``.
        layout: The position of each parameter in a slot.
        ring: The ring of slots.
        rows: The number of captions that are computed at a time.
    """

    def __init__(self, block: nn.Module, number: int, names: list[str], layout: Layout, ring: Ring, rows: int) -> None:
        super().__init__()
        self.block, self.number, self.names, self.layout = block, number, names, layout
        self.ring, self.rows = ring, rows

    def forward(self, hidden_BLD: Tensor, *others: object, **named: object) -> tuple[object, ...]:
        """Runs the block on (B, L, D), ``rows`` captions at a time, and joins the outputs.

        All other inputs and outputs, such as the bias of relative positions, are the same for all captions, because T5
        is called without a mask. Those of the first captions are passed on.
        """
        slot = self.ring.get(self.number)  # the compute stream waits until this block's weights have been copied
        # Fetching before computing lets the copy overlap with this block. After the last block comes the first one, for
        # the next pass.
        self.ring.fetch((self.number + 1) % len(self.ring.hosts))
        weights = dict(zip(self.names, self.layout.views(self.ring.slots[slot]), strict=True))
        outputs = []
        for part in hidden_BLD.split(self.rows):
            arguments = (part, *(x[: len(part)] if isinstance(x, Tensor) else x for x in others))
            outputs.append(torch.func.functional_call(self.block, weights, arguments, named))
        return torch.cat([output[0] for output in outputs]), *outputs[0][1:]


class RowsAtATime(nn.Module):
    """Applies a module to ``rows`` captions at a time, as the blocks are, so that it rounds in the same way."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self.module, self.rows = module, rows

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Applies the module to (B, L, D)."""
        return torch.cat([self.module(part) for part in hidden_BLD.split(self.rows)])


@contextmanager
def streamed(encoder: Any, device: torch.device, rows: int) -> Iterator[None]:
    """Makes a T5EncoderModel run on the device with its blocks in host memory, within the context.

    The encoder cannot be used after the context, because its weights are freed.

    Args:
        encoder: The encoder, on any device.
        device: The device on which it runs.
        rows: The number of captions that are computed at a time.
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
                # The last copy may still read a host buffer, which is freed below, and write to a slot.
                torch.cuda.synchronize(device)
            ring.slots.clear()


@contextmanager
def on_host(blocks: Iterable[nn.Module], names: list[str], layout: Layout) -> Iterator[dict[int, Tensor]]:
    """Moves the named parameters of each block to a pinned buffer; yields the buffers by block number.

    At the end of the context, buffers and parameters are freed.
    """
    hosts: dict[int, Tensor] = {}
    weights = [[block.get_parameter(name) for name in names] for block in blocks]
    try:
        for number, of_block in enumerate(weights):
            hosts[number] = host_buffer(layout.num_bytes)
            for weight, view in zip(of_block, layout.views(hosts[number]), strict=True):
                weight.data = view.copy_(weight)  # frees the original, so that there are never two copies of the model
            pin(hosts[number])
        yield hosts
    finally:
        hosts.clear()
        for weight in chain.from_iterable(weights):
            weight.data = weight.new_empty(0)


def shared_names(blocks: Iterable[nn.Module]) -> list[str]:
    """Returns the parameters that every block has. Only the first block has the table of relative positions."""
    others = [dict(block.named_parameters()) for block in blocks]
    return [name for name in others[-1] if all(name in other for other in others)]
