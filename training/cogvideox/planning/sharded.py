"""Runs the transformer blocks of a CogVideoX whose weights FSDP2 shards over the processes of a run.

The idea: torch's fully_shard leaves each process with some rows of every parameter. Hooks around the forward pass of a
module gather its parameters just before they are needed, and free them afterwards; hooks around its backward pass
gather them again, and sum the gradients into each process's rows. So each block must run in its own module's forward
pass, as one autograd function that takes the module's parameters as inputs:

    block i      hook: gather i     RunBlock: blocks.forward     hook: free i
    meanwhile    gather i + 1, on a stream of its own
    backward     hook: gather i     RunBlock: blocks.backward    hook: sum gradients of i into rows, free i

``ShardedStack`` is the counterpart of ``Stack`` (stack.py). What is saved for the backward pass, where it is stored and
whether blocks are compiled follow the plan. Rows are fp32 and are the master weights; what is gathered has the compute
type. Text and video stay one sequence between blocks. FSDP2 only starts gathering a block where its module is called,
so nothing may use parameters outside of their module's forward and backward pass; ``gathered`` (sharded_weights.py) is
for such work.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from cogvideox.model.blocks import Block
from cogvideox.model.sequence import SequenceGroup
from cogvideox.planning.plan import ExecutionPlan
from cogvideox.planning.stack import ModuleStack

BLOCKS = "transformer_blocks"  # the child of the transformer that is sharded block by block


def sharding_mesh(device: torch.device, shards: int) -> DeviceMesh:
    """Returns the processes of a run: one row of them, or a row for each copy of the model if there are several."""
    world = dist.get_world_size()
    if shards == world:
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("copy", "shard"))


class ShardedStack(ModuleStack):
    """All blocks of a transformer that is trained completely and sharded.

    Args:
        transformer: A CogVideoX of diffusers on the CPU, in the compute type; all its parameters are trained.
        plan: What is saved for the backward pass, where, and whether blocks are compiled.
        device: Where the blocks compute.
        mesh: The processes over which the weights are sharded; of two dimensions, the first has copies.
        offload: Whether rows, gradients and optimizer state are stored on the host.
        group: The processes that divide the tokens of a sample in training.
    """

    def __init__(
        self,
        transformer: Any,
        plan: ExecutionPlan,
        device: torch.device,
        mesh: DeviceMesh,
        offload: bool = False,
        group: SequenceGroup | None = None,
    ) -> None:
        super().__init__(transformer, plan, device, group)
        # FSDP2 warns of in-place operations on the views that blocks return; there are none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        dtype = next(transformer.parameters()).dtype
        # The rotary tables are arguments of a block and must stay fp32.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        where = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": where}
        for name, child in transformer.named_children():
            if name != BLOCKS:
                child.to(device).float()
        for module in self.modules:
            # Block by block, so that no more than one complete fp32 block is on the device. The masters start from the
            # loaded weights, as those of other engines do.
            module.to(device).float()
            fully_shard(module, reshard_after_forward=True, **settings)
        fully_shard(transformer, reshard_after_forward=False, **settings)

    def weights(self, i: int, direction: int, trained: Sequence[Tensor]) -> Block:
        """Returns a block's gathered weights; the hooks of its module have gathered them.

        Args:
            i: The block's number.
            direction: Ignored: FSDP2 decides what it gathers next.
            trained: The gathered parameters.
        """
        # Freed memory has the address of something else by now.
        assert all(p.untyped_storage().size() for p in trained), f"block {i}: the weights are not gathered"
        return super().weights(i, direction, trained)
