"""Makes two steps on each rank, with copies and with shards of a small model, and counts the collective operations.

Each rank has other numbers of bad clips, seconds and memory.

    python rank_numbers.py FOLDER    writes FOLDER/RANK.json: of copies and of shards, for each step, what the rank had,
                                     the result, and the number of all-reduces
"""

import json
import sys
from pathlib import Path
from typing import Any

import fp16_ranks
import torch.distributed as dist
from fp16_ranks import CPU, MAKE
from torch.nn import Module

from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.rule import make_masters
from cogvideox.optimizer.sharded_weights import ShardedWeights
from cogvideox.optimizer.step import RankNumbers, StepResult


def own_numbers(step: int) -> RankNumbers:
    """Returns numbers of this rank; rank 1 has the larger seconds, and rank 0 the larger peaks."""
    rank = dist.get_rank()
    return RankNumbers(3 + rank + step, 0.25 + rank, 20.5 - rank, 24.0 - 2 * rank)


def train(model: Module, weights: MasterWeights | ShardedWeights) -> list[tuple[list[float], dict[str, float], int]]:
    """Returns what ``main`` writes of the steps of a model."""
    found = []
    for step in range(2):
        loss = model(fp16_ranks.inputs(step).half()).float().square().mean()
        weights.backward(loss)
        calls.clear()
        result = weights.step(0.01, own_numbers(step))
        own = [loss.item(), *own_numbers(step)]
        found.append((own, dict(zip(StepResult.NAMES, result.values.tolist(), strict=True)), len(calls)))
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    real, calls = dist.all_reduce, list[int]()

    def counted(*arguments: Any, **named: Any) -> None:
        calls.append(1)
        real(*arguments, **named)

    dist.all_reduce = counted
    one, other = fp16_ranks.model_of(), fp16_ranks.sharded(1)
    copies = train(one, make_masters(dict(one.named_parameters()), MAKE, 1.0, False))
    shards = train(other, ShardedWeights(other, MAKE, 1.0, False, CPU))
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps([copies, shards]))
    dist.destroy_process_group()
