"""Master weights that Adam trains, with their state on the device or in host memory.

Their groups (adam_groups.py) are updated at once if weights, state and gradients are on the device. The others pass
through the device: the parts outside the blocks before the next forward pass, each block before that pass comes to it.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.memory.streaming import (
    STAGES,
    TRANSFER_SLOTS,
    Event,
    TrainedBlocks,
    TransferPipeline,
    compute_waits_for,
    slot_bytes,
)
from cogvideox.optimizer.adam import Adam
from cogvideox.optimizer.adam_groups import Group, Masters
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.state_tensors import by_parameter
from cogvideox.tensor_files import Piece, pieces_of

STEP = "step"  # the number of steps, by the name that torch's Adam gives it in its state


def gradients_are_sums(passes: int, ranks: int) -> bool:
    """Returns whether gradients on the device are added up in fp32; otherwise they have the type of the weights."""
    return passes > 1 or ranks > 1


class AdamWeights(MasterWeights):
    """Trains parameters through fp32 master weights with Adam.

    Args:
        parameters: See ``MasterWeights``, also for the next two that it has.
        adam: The settings of Adam.
        max_grad_norm: See there.
        dynamic_scale: See there.
        state_on_host: Whether the state of parameters outside ``blocks`` is stored in pinned host memory, and passes
            through the device in ranges at each step. The results are the same bit for bit.
        blocks: The blocks of which all weights are trained, with the places of their weights and state.
        passes: The number of ``backward`` calls before a ``step``; see ``gradients_are_sums``.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        adam: Adam,
        max_grad_norm: float,
        dynamic_scale: bool,
        state_on_host: bool = False,
        blocks: TrainedBlocks | None = None,
        passes: int = 1,
    ) -> None:
        inside = {p for own in blocks.parameters.values() for p in own} if blocks else set()
        outside = {name: p for name, p in parameters.items() if p not in inside}
        super().__init__(parameters, next(iter(outside.values())).device, max_grad_norm, dynamic_scale)
        self.adam, self.blocks = adam, blocks
        self.steps = torch.zeros((), dtype=torch.float64, device=self.device)  # that changed something
        sums = gradients_are_sums(passes, self.numbers.world)
        by_type: dict[torch.dtype, dict[str, Parameter]] = {}
        for name, p in outside.items():
            by_type.setdefault(p.dtype, {})[name] = p
        rest = [Group(own, adam, self.device, state_on_host, sums=sums) for own in by_type.values()]
        self.block_groups = self._groups_of(blocks, sums) if blocks else {}  # by block
        self.groups = [*rest, *self.block_groups.values()]
        on_device = [group for group in self.groups if group.collected is not None]
        self.collect({name: gradient for group in on_device for name, gradient in group.named_gradients().items()})
        owners = {name: group for group in self.groups for name in group.parameters}
        self.owners = {name: owners[name] for name in parameters}
        self.passing = [group for group in self.groups if group.state_on_host or group.collected is None]
        into = blocks.ring.side if blocks and blocks.ring else None
        count = TRANSFER_SLOTS if blocks else STAGES
        self.transfers = TransferPipeline(self.device, into, count) if self.passing else None

    def _groups_of(self, blocks: TrainedBlocks, sums: bool) -> dict[int, Group]:
        """Returns the group of each block."""
        names, groups = {p: name for name, p in self.parameters.items()}, {}
        for block, own in blocks.parameters.items():
            gradients = partial(blocks.gradients.flat, block) if blocks.on_host(block) else None
            named, weights = {names[p]: p for p in own}, blocks.weights[block]
            on_host = block in blocks.state_on_host
            groups[block] = Group(named, self.adam, self.device, on_host, weights, gradients, sums)
        return groups

    # -- the step ------------------------------------------------------------------------------------------------------

    def collected(self) -> list[Tensor]:
        """See ``MasterWeights``."""
        return [group.collected for group in self.groups if group.collected is not None]

    def clear_gradients(self) -> None:
        """See ``MasterWeights``."""
        super().clear_gradients()
        if self.blocks:
            self.blocks.gradients.clear()

    def norms(self) -> dict[str, Tensor]:
        """See ``MasterWeights``."""
        norms = super().norms()
        if self.blocks:
            for block, found in self.blocks.gradients.norms.items():
                norms |= zip(self.block_groups[block].parameters, found, strict=True)
        return norms

    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """See ``MasterWeights``. Updates that pass through the device end while the next forward pass computes."""
        self.steps += 1 - skipped
        scalars = self.adam.scalars(lr, divisor, skipped, self.steps)
        for group in self.groups:
            if group not in self.passing:
                group.update(scalars)
        if self.transfers:
            self._start_transfers(self.transfers, scalars)

    def _start_transfers(self, transfers: TransferPipeline, scalars: Tensor) -> None:
        """Starts the updates that pass through the device, in the order in which the next forward pass needs them.

        The compute stream waits for parameters outside the blocks. Those of blocks are updated while it computes the
        blocks before them.
        """
        if self.blocks:
            self.blocks.gradients.finish_copies()
        firsts = (next(group.transfers(group.weights, scalars)) for group in self.passing)
        transfers.start(slot_bytes(firsts), scalars)
        blocks = set(self.block_groups.values())
        for group in self.passing:
            if group not in blocks:
                compute_waits_for(self._pass(transfers, group, scalars, group.weights, None)[0])
        if self.blocks:
            hosted = {block: group for block, group in self.block_groups.items() if group in self.passing}
            self.blocks.schedule({b: partial(self._pass, transfers, g, scalars) for b, g in hosted.items()})

    @staticmethod
    def _pass(
        transfers: TransferPipeline, group: Group, scalars: Tensor, weights: Tensor, arrived: Event
    ) -> tuple[Event, Event]:
        """Issues the update of a group; see ``streaming.Update``."""
        updated = arrived
        for transfer in group.transfers(weights, scalars):
            updated = transfers.run(transfer, arrived)
        written = updated if weights is group.weights else transfers.copy_out(group.weights, weights, updated)
        return updated, written

    def finish_updates(self) -> None:
        """Issues the updates that no forward pass has needed, and orders later compute after all of them."""
        if self.blocks:
            self.blocks.finish()
        if self.transfers:
            self.transfers.finish()

    def wait(self) -> None:
        """Waits until all transfers have ended, so that masters and parameters can be read and written on the host."""
        self.finish_updates()
        if self.transfers:
            self.transfers.synchronize()

    # -- masters and files ---------------------------------------------------------------------------------------------

    def named_masters(self) -> Mapping[str, Tensor]:
        """See ``MasterWeights``. They may be put together anew at each access."""
        return Masters(self.owners)

    def pieces(self) -> dict[str, Piece]:
        """See ``MasterWeights``."""
        self.wait()
        pieces = pieces_of(self.scale.state())
        for name, group in self.owners.items():
            own = group.pieces(name) | pieces_of({STEP: self.steps.float()})
            pieces |= {f"{key}/{name}": piece for key, piece in own.items()}
        return pieces

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See ``MasterWeights``. The state may be that of any Adam, also with moments of another format."""
        saved = by_parameter(tensors)
        self.wait()
        self.scale.load_state(tensors)
        for name, group in self.owners.items():
            group.load_state(name, saved[name])
            self.steps.copy_(saved[name].get(STEP, torch.zeros(())))
