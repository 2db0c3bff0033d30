"""Makes three steps in fp16 on each rank, with copies and with shards of a small model.

At the second step, the gradients of the last rank overflow.

    python fp16_ranks.py COPIES FOLDER    writes FOLDER/RANK.json: the numbers of the steps, of copies and of shards
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Linear, Module, Sequential

from cogvideox.config.flags import OptimizerFlags
from cogvideox.config.optimizers import make_optimizer
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.rule import make_masters
from cogvideox.optimizer.sharded_weights import ShardedWeights
from cogvideox.planning.sharded import sharding_mesh

MAKE = partial(make_optimizer, OptimizerFlags(optimizer="adamw"))
STEPS, OVERFLOWS = 3, 1
CPU = torch.device("cpu")


def model_of() -> Sequential:
    torch.manual_seed(0)
    return Sequential(Linear(4, 6), Linear(6, 3)).half()


def sharded(copies: int) -> Sequential:
    """Returns the model after fully_shard, as planning/sharded.py calls it."""
    model = model_of().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    mesh = sharding_mesh(CPU, dist.get_world_size() // copies)
    fully_shard(model[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def inputs(step: int) -> Tensor:
    """Returns this rank's inputs of a step, (5, 4)."""
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def loss_of(model: Module, step: int) -> Tensor:
    """Returns this rank's loss, with gradients that overflow at one step of the last rank."""
    overflows = step == OVERFLOWS and dist.get_rank() == dist.get_world_size() - 1
    loss: Tensor = model(inputs(step).half()).float().square().mean()
    return loss * (1e4 if overflows else 1.0)


def train(model: Module, weights: MasterWeights | ShardedWeights) -> list[list[float]]:
    """Returns loss, norm, whether the step was skipped, and the loss scale of each step."""
    numbers = []
    for step in range(STEPS):
        weights.backward(loss_of(model, step))
        numbers.append(weights.step(0.01).values[:4].tolist())
    return numbers


if __name__ == "__main__":
    dist.init_process_group("gloo")
    one, other = model_of(), sharded(int(sys.argv[1]))
    copies = train(one, make_masters(dict(one.named_parameters()), MAKE, 1.0, True))
    shards = train(other, ShardedWeights(other, MAKE, 1.0, True, CPU))
    Path(sys.argv[2], f"{dist.get_rank()}.json").write_text(json.dumps([copies, shards]))
    dist.destroy_process_group()
