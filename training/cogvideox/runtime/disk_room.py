"""Predicts the disk space of a run and the time to write a checkpoint, before the first step.

A checkpoint of all weights of 5b takes tens of gigabytes, so a disk that is too small would end a run after hours.
"""

import hashlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cogvideox.config.flags import TrainFlags
from cogvideox.config.options import LoraOptions, SftOptions, TrainOptions
from cogvideox.errors import DiskError, plural
from cogvideox.files import free_disk_bytes, fsync, size_text, temporary_of
from cogvideox.optimizer.adam import adam_of
from cogvideox.optimizer.rule import bytes_before_masters, state_bytes
from cogvideox.optimizer.shard_files import Shard, write_shards
from cogvideox.tensor_files import pieces_of, write_tensors

if TYPE_CHECKING:
    from cogvideox.runtime.run import Run

PROBE_LIMIT = 2**28  # largest size in bytes of a file that is written to measure the speed of the disk
RANDOM_BYTES = 2**24


@dataclass(frozen=True)
class DiskNeeds:
    """Describes what a run will write.

    Attributes:
        checkpoint: The bytes of a checkpoint.
        result: The bytes of the result.
        checkpoints: How many new checkpoints exist at once at most.
        may_shrink: Whether --checkpoint_weights_only would make a checkpoint as small as the result.
    """

    checkpoint: int
    result: int
    checkpoints: int
    may_shrink: bool = False

    @property
    def total(self) -> int:
        """Returns the bytes of everything."""
        return self.checkpoints * self.checkpoint + self.result


def saves_weights_only(options: TrainOptions) -> bool:
    """Returns whether checkpoints have no optimizer state and no master weights."""
    return isinstance(options, SftOptions) and options.full.checkpoint_weights_only


def result_bytes(options: TrainOptions, weights: int, dtype: torch.dtype) -> int:
    """Returns the expected bytes of the weights that users load. PiSSA saves its initial matrices, too.

    The arguments are those of ``checkpoint_bytes``.
    """
    pissa = isinstance(options, LoraOptions) and options.lora.init_lora_weights.startswith("pissa")
    return weights * dtype.itemsize * (2 if pissa else 1)


def checkpoint_bytes(
    options: TrainOptions, weights: int, dtype: torch.dtype, device: torch.device, refers: bool
) -> int:
    """Returns the expected bytes of a checkpoint: weights, their masters, moments and average.

    Args:
        options: The flags.
        weights: The number of trained weights.
        dtype: The compute type, in which weights are saved. In training, sharded weights are in fp32.
        device: The device of training.
        refers: Whether the engine saves the lower bits of masters, as far as weights are their upper bits.
    """
    saved = result_bytes(options, weights, dtype)
    if saves_weights_only(options):
        return saved
    master = 2 if refers and dtype == torch.bfloat16 and adam_of(options.optimizer) else 4
    state = master + state_bytes(options.optimizer, torch.float32, device) + 4 * options.loss.use_ema
    return math.ceil(saved + weights * state)


def copy_bytes(options: TrainOptions, weights: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns the bytes of a copy of what a checkpoint is made from: weights, their state as it is stored, average.

    The arguments are those of ``checkpoint_bytes``.
    """
    if saves_weights_only(options):
        return weights * dtype.itemsize
    average = options.loss.use_ema * (4 + dtype.itemsize)  # in fp32, and rounded as the weights are
    return math.ceil(weights * (dtype.itemsize + state_bytes(options.optimizer, dtype, device) + average))


def bytes_left_out(options: TrainOptions, weights: int, dtype: torch.dtype, device: torch.device) -> float:
    """Returns how many bytes may be left out of a copy so that training waits only until these are written.

    The tensors that are written first are left out. If weights are in fp32, they are their own masters, which are
    written twice: with the state, and for users, in files of another order. Without copies of the first masters,
    training would wait for nearly all that is written.

    The arguments are those of ``checkpoint_bytes``.
    """
    if saves_weights_only(options) or dtype != torch.float32:
        return math.inf
    return weights * bytes_before_masters(options.optimizer, device)


def new_at_once(train: TrainFlags, first: int, total: int, there: int = 0, seconds: float = 0.0) -> int:
    """Returns how many new checkpoints exist at once at most. A new one is complete before the oldest is deleted.

    Args:
        train: The flags that say when checkpoints are saved and how many remain.
        first: Optimizer steps that are done.
        total: Optimizer steps of the complete run.
        there: How many checkpoints exist already.
        seconds: The time of a step; 0 if it is not known.
    """
    if first >= total:
        return 0
    every, limit, minutes = train.checkpointing_steps, train.checkpoints_total_limit, train.save_every_minutes
    saved = total // every - first // every + (total % every > 0)
    if minutes is not None and (limit is not None or minutes == 0):
        saved = total - first  # how many there will be is not known, but no step is saved twice
    elif minutes is not None:
        saved = min(total - first, saved + int((total - first) * seconds / 60 / minutes))
    if limit is None:
        return saved
    return max(1, min(saved, limit + 1 + train.keep_best - there))


def check_disk(folder: Path, needs: DiskNeeds, train: TrainFlags, there: int = 0) -> None:
    """Checks that the disk has room for what a run will write.

    Args:
        folder: The output folder.
        needs: What the run will write.
        train: The flags that say how many checkpoints remain.
        there: How many checkpoints exist already.

    Raises:
        DiskError: It has less room; the message has the nearest fix.
    """
    free = free_disk_bytes(folder)
    if free is None or free >= needs.total:
        return
    checkpoints = f"{plural(needs.checkpoints, 'checkpoint')} of {size_text(needs.checkpoint)}"
    sizes = f"{checkpoints} and {size_text(needs.result)} of result"
    problem = f"{folder}: No space left on device, {size_text(needs.total)} needed ({sizes}), {size_text(free)} free"
    limit = (free + there * needs.checkpoint - needs.result) // needs.checkpoint - 1 - train.keep_best
    ways = ""
    if 1 <= limit < (train.checkpoints_total_limit or limit + 1):
        ways = f"give --checkpoints_total_limit {limit}, or "
    elif needs.may_shrink and (3 + train.keep_best) * needs.result <= free:
        ways = "give --checkpoint_weights_only --checkpoints_total_limit 1, or "
    raise DiskError(problem, f"{ways}free some space and run the same command again")


def seconds_to_write(run: "Run", num_bytes: int, shared: bool = False) -> float:
    """Estimates the seconds to write a checkpoint of ``num_bytes`` bytes. Called on all ranks, which get the same.

    The estimate extrapolates from a file of at most PROBE_LIMIT, which is written and read like those of a checkpoint:
    by the main process, or by all ranks at once, which then compete for the disk.

    Args:
        run: The ranks and the output folder.
        num_bytes: The size of the checkpoint.
        shared: Whether every rank writes its part of each file; see ``Engine.shares_files``.
    """
    size = max(run.world, min(num_bytes, PROBE_LIMIT))
    content = random_bytes(size)
    probe = run.from_main(temporary_of(run.output_dir / "probe"))  # here all ranks wait for each other
    start = time.monotonic()
    try:
        if shared:
            write_shards(probe, {"probe": shard_of(run, content)}, run.is_main, run.gather_or_raise)
        elif run.is_main:
            write_tensors(probe, pieces_of({"probe": content}))
            fsync(probe)
        if run.is_main:  # which verifies each file
            with open(probe, "rb") as file:
                hashlib.file_digest(file, "sha256")
    finally:
        if run.is_main:
            probe.unlink(missing_ok=True)
    return run.from_main((time.monotonic() - start) * num_bytes / size)


def shard_of(run: "Run", content: torch.Tensor) -> Shard:
    """Returns this rank's part of a tensor of bytes that all ranks write."""
    size = len(content)
    first, end = (size * rank // run.world for rank in (run.ranks.process_index, run.ranks.process_index + 1))
    return Shard(content[first:end], content.shape, first)


def random_bytes(size: int) -> torch.Tensor:
    """Returns random bytes, repeated after RANDOM_BYTES. File systems compress less than that at once."""
    some = torch.frombuffer(bytearray(os.urandom(RANDOM_BYTES)), dtype=torch.uint8)
    return some.repeat(-(-size // RANDOM_BYTES))[:size]
