"""Shared memory for batches: what the loader's workers need of /dev/shm, and how many of them it has room for.

Both sharing strategies of torch put tensors there. Containers often have 64 MiB of it, and a worker that finds no room
while it sends a batch loses the batch without a word, so that training would wait for it for ever.
"""

import os
import sys
from collections.abc import Iterable

from cogvideox.config.buckets import Bucket
from cogvideox.config.geometry import Geometry
from cogvideox.data.cache import CacheIndex

SHM_FOLDER = "/dev/shm"
PAGE_BYTES = 4096  # bytes; each tensor is a file of its own there
PREFETCH = 2  # batches that a worker has ready or at work; 1 where that is all there is room for
BATCHES_IN_USE = 2  # batches that have arrived and are not freed yet: the one that is trained on, and the one before it
WORKER_BYTES = 2**15  # the locks of a worker's queues
USABLE_SHARE = 0.9  # of the free space; NCCL and other programs take some too
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def free_shared_memory(folder: str = SHM_FOLDER) -> int:
    """The space that is left in a folder; 0 where there is no such folder."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize  # a tmpfs without limit says 0


def batch_bytes(geometry: Geometry, index: CacheIndex, batch_size: int) -> int:
    """What the largest batch takes in shared memory: x0 and noise in fp32, prompts as cached, images, timesteps."""
    text = geometry.max_text_seq_length * geometry.text_embed_dim * ITEM_BYTES[index.dtypes["text_encoder"]]

    def of_bucket(bucket: Bucket) -> int:
        frames, channels, height, width = geometry.latent_shape(bucket)
        image = 4 * channels * height * width if index.image_variants else 0
        latents = 4 * frames * channels * height * width
        return pages(batch_size * size for size in (latents, latents, text, image, 8))

    return max(of_bucket(bucket) for bucket in {sample.bucket for sample in index.samples})


def pages(sizes: Iterable[int]) -> int:
    """Bytes of files of these sizes, in whole pages."""
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)


def bytes_needed(workers: int, prefetch: int, batch: int) -> int:
    """What a loader takes in shared memory when all its batches wait."""
    return workers * (prefetch * batch + WORKER_BYTES) + BATCHES_IN_USE * batch


def workers_with_room(asked: int, batch: int, free: int) -> tuple[int, int]:
    """(workers, batches that each has ready): as many workers as there is room for, up to ``asked``; 0: none is."""
    choices = ((workers, prefetch) for workers in range(asked, 0, -1) for prefetch in range(PREFETCH, 0, -1))
    return next((choice for choice in choices if bytes_needed(*choice, batch) <= free), (0, 0))


def choose_workers(asked: int, batch: int, processes: int) -> tuple[int, int, str | None]:
    """``workers_with_room`` in what this machine's ``processes`` have free together, and a line where it is less."""
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
    """A number of bytes, for messages."""
    return f"{number / 2**20:.1f} MiB"
