"""Computes how much shared memory the loader's workers need for batches, and how many workers fit.

``choose_workers`` is the entry point. Both sharing strategies of PyTorch store tensors in /dev/shm, which containers
often limit to 64 MiB. If a worker finds no room while it sends a batch, PyTorch drops the batch, and training would
wait for it without end. So the number of workers is reduced in advance.
"""

import os
import sys
from collections.abc import Iterable

from cogvideox.config.buckets import Bucket
from cogvideox.config.geometry import Geometry
from cogvideox.data.cache import CacheIndex

SHM_FOLDER = "/dev/shm"
PAGE_BYTES = 4096  # each tensor is a separate file there, whose size is a multiple of this
PREFETCH = 2  # batches that a worker prepares in advance; 1 where there is no room for 2
BATCHES_IN_USE = 2  # the batch that is trained on, and the one before it, which may not be freed yet
WORKER_BYTES = 2**15  # for the locks of a worker's queues
USABLE_SHARE = 0.9  # part of the free space that is used; the rest is for NCCL and other programs
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def free_shared_memory(folder: str = SHM_FOLDER) -> int:
    """Returns the free bytes of a folder's file system, or 0 if the folder does not exist."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize  # 0 blocks: a tmpfs without a limit


def batch_bytes(geometry: Geometry, index: CacheIndex, batch_size: int) -> int:
    """Returns the bytes that the largest batch takes in shared memory.

    A batch holds x0 and noise in fp32, embeddings in the precision of the cache, images in fp32, and timesteps.

    Args:
        geometry: Shapes of the model's inputs.
        index: The samples, whose largest bucket counts.
        batch_size: Samples in one batch.
    """
    text = geometry.max_text_seq_length * geometry.text_embed_dim * ITEM_BYTES[index.dtypes["text_encoder"]]

    def of_bucket(bucket: Bucket) -> int:
        frames, channels, height, width = geometry.latent_shape(bucket)
        image = 4 * channels * height * width if index.image_variants else 0
        latents = 4 * frames * channels * height * width
        return pages(batch_size * size for size in (latents, latents, text, image, 8))

    return max(of_bucket(bucket) for bucket in {sample.bucket for sample in index.samples})


def pages(sizes: Iterable[int]) -> int:
    """Returns the bytes that files of these sizes take, each rounded up to a multiple of the page size."""
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)


def bytes_needed(workers: int, prefetch: int, batch: int) -> int:
    """Returns the bytes that a loader takes in shared memory when all of its batches wait to be used.

    Args:
        workers: Number of workers.
        prefetch: Batches that each worker prepares in advance.
        batch: Bytes of one batch.
    """
    return workers * (prefetch * batch + WORKER_BYTES) + BATCHES_IN_USE * batch


def workers_with_room(asked: int, batch: int, free: int) -> tuple[int, int]:
    """Returns the number of workers that fit, up to ``asked``, and how many batches each prepares in advance.

    Args:
        asked: Number of workers that the user asked for.
        batch: Bytes of one batch.
        free: Free bytes of shared memory.

    Returns:
        (workers, batches), or (0, 0) if not even one worker fits.
    """
    choices = ((workers, prefetch) for workers in range(asked, 0, -1) for prefetch in range(PREFETCH, 0, -1))
    return next((choice for choice in choices if bytes_needed(*choice, batch) <= free), (0, 0))


def choose_workers(asked: int, batch: int, processes: int) -> tuple[int, int, str | None]:
    """Chooses the number of workers for the shared memory that is free, divided among the processes of this machine.

    Args:
        asked: Number of workers of --dataloader_num_workers.
        batch: Bytes of one batch.
        processes: Training processes on this machine, which share the memory.

    Returns:
        Workers, batches that each prepares in advance, and a line for the user if that is less than asked for.
    """
    free = int(free_shared_memory() * USABLE_SHARE) // processes
    workers, prefetch = workers_with_room(asked, batch, free)
    if (workers, prefetch) == (asked, PREFETCH) or not asked:
        return workers, prefetch, None
    need = bytes_needed(asked, PREFETCH, batch) * processes
    chosen = f"{workers} with {prefetch} batch each" if workers else "none: batches are read between the steps"
    fix = "more shared memory (docker run --shm-size 2g) allows all"
    needed, left = mebibytes(need), mebibytes(free_shared_memory())
    shortage = f"--dataloader_num_workers {asked}: needs {needed} of {SHM_FOLDER}, {left} are free"
    return workers, prefetch, f"{shortage}; workers: {chosen}; {fix}"


def mebibytes(number: int) -> str:
    """Formats a number of bytes in MiB, for messages."""
    return f"{number / 2**20:.1f} MiB"
