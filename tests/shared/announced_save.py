"""Saves a sharded checkpoint from several ranks to a slow disk, and announces how long that takes.

The disk serves one process at a time, as the ranks of a host share one, and reads as slowly as it writes.

    python announced_save.py FOLDER    writes FOLDER/seconds.json: the seconds that were announced, and those of a save
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Linear

from cogvideox import tensor_files
from cogvideox.config.flags import OptimizerFlags
from cogvideox.config.optimizers import make_optimizer
from cogvideox.optimizer import shard_files
from cogvideox.optimizer.engine import ShardedEngine
from cogvideox.optimizer.sharded_weights import ShardedWeights
from cogvideox.runtime import checkpoint
from cogvideox.runtime.checkpoint import Saver
from cogvideox.runtime.ranks import Ranks
from cogvideox.runtime.run import Run

RATE = 4e6  # bytes a second
SIZE = 384  # rows and columns of the weight
CPU = torch.device("cpu")


def slowly(work: Callable[..., Any], bytes_of: Callable[..., int], folder: Path) -> Callable[..., Any]:
    """Returns a function that does some work as on a slow disk."""

    def wrapped(*arguments: Any) -> Any:
        with open(folder / "disk", "w") as disk:
            fcntl.flock(disk, fcntl.LOCK_EX)
            time.sleep(bytes_of(*arguments) / RATE)
        return work(*arguments)

    return wrapped


def use_slow_disk(folder: Path) -> None:
    """Makes this process write and read slowly."""
    shard_files.write_at = slowly(shard_files.write_at, lambda _, content, __: len(content), folder)
    shard_files.hash_if_written = slowly(shard_files.hash_if_written, lambda path, _: path.stat().st_size, folder)
    tensor_files.write_hashed = slowly(tensor_files.write_hashed, lambda _, content, __: len(content), folder)
    hashlib.file_digest = slowly(hashlib.file_digest, lambda file, _: os.fstat(file.fileno()).st_size, folder)


def run_of_ranks(output: Path) -> Run:
    """Returns a run of the ranks that torch has connected, with this output folder."""
    rank, number = dist.get_rank(), dist.get_world_size()
    state = SimpleNamespace(process_index=rank, num_processes=number, is_main_process=rank == 0, device=CPU)
    return Run(SimpleNamespace(), Ranks(state), output, "no", compiled=False)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    use_slow_disk(folder)
    run = run_of_ranks(folder)
    model = Linear(SIZE, SIZE)
    fully_shard(model, mesh=init_device_mesh("cpu", (run.world,)))
    make = partial(make_optimizer, OptimizerFlags(optimizer="adamw"))
    weights = ShardedWeights(model, make, 0.0, False, CPU)
    engine = ShardedEngine(model, weights, run.is_main, run.gather_or_raise, torch.float32)
    nothing: Any = SimpleNamespace(save=lambda folder, write: None)
    saver = Saver(run, engine, nothing, {"seed": 1}, every=2, limit=None)
    start = time.monotonic()
    saver.save(2)
    seconds = time.monotonic() - start
    saver.num_bytes = sum(path.stat().st_size for path in (folder / "checkpoint-2").iterdir())
    found, estimate = list[float](), checkpoint.seconds_to_write

    def noted(run: Run, num_bytes: int, shared: bool = False) -> float:
        found.append(estimate(run, num_bytes, shared))
        return found[0]

    checkpoint.seconds_to_write = noted
    saver.announce(0)
    if run.is_main:
        (folder / "seconds.json").write_text(json.dumps([found[0], seconds]))
    run.barrier()
    dist.destroy_process_group()
