"""Turns cached tensors into training batches. Everything random about a sample is drawn here, on the CPU.

A ``Visit`` names a sample and how often it was drawn before. ``LatentDataset`` reads its tensors and makes a ``Batch``:

    Visit --> moments of one clip variant --> x0 (sampled from the VAE's posterior, scaled, padded in front)
          --> moments of its first frame  --> image (sampled, unscaled; zeros where it is dropped), image-to-video only
          --> embedding of the caption, or of the empty caption where it is dropped
          --> noise and timestep

All random numbers follow from (seed, visit, id of the sample), so they do not depend on the number of GPUs or workers,
or on where a run was resumed. ``build_loader`` runs this in worker processes, and ``batches_of`` turns their failures
into errors of one line.

Shapes: B samples, F latent frames (padding included), C channels, H and W latent height and width, L text tokens,
D text channels, K encodings of one image.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from cogvideox.config.flags import LossFlags
from cogvideox.config.geometry import Geometry
from cogvideox.data.cache import CachedSample, CacheError, CacheIndex, TensorCache
from cogvideox.data.media.workers import end_with_parent, ignore_stop_signals
from cogvideox.data.sampler import BucketBatchSampler, Visit
from cogvideox.errors import UsageError, first_line, plural
from cogvideox.finite import not_finite
from cogvideox.rng import key_of, uniform

LOADER_SECONDS = 300  # how long to wait for a batch before the run ends with an error
FEWER_WORKERS = "run again with --dataloader_num_workers 0, or with a larger /dev/shm (docker run --shm-size 2g)"


@dataclass(frozen=True)
class Batch:
    """Holds the tensors of one micro-batch, or of one sample without the leading dimension."""

    x0_BFCHW: Tensor  # fp32, scaled
    noise_BFCHW: Tensor  # fp32
    timestep_B: Tensor  # int64
    prompt_BLD: Tensor  # as cached
    ids: tuple[str, ...]
    replaced: tuple[tuple[str, str], ...] = ()  # id of each sample that could not be read, and what is wrong with it
    image_BCHW: Tensor | None = None  # fp32, unscaled; None for text-to-video

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by field name, without those that are None."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def samples(self) -> list[tuple[str, int]]:
        """Returns the id and the timestep of each sample. This synchronizes with the device that holds the batch."""
        return list(zip(self.ids, self.timestep_B.tolist(), strict=True))

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device. Copies from page-locked memory are asynchronous."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()}
        return Batch(ids=self.ids, replaced=self.replaced, **moved)

    def pin_memory(self) -> "Batch":
        """Returns the batch in page-locked memory; the DataLoader calls this."""
        pinned = {name: tensor.pin_memory() for name, tensor in self.tensors().items()}
        return Batch(ids=self.ids, replaced=self.replaced, **pinned)


def collate(samples: Sequence[Batch]) -> Batch:
    """Stacks samples of one bucket into a batch."""
    names = samples[0].tensors()
    stacked = {name: torch.stack([sample.tensors()[name] for sample in samples]) for name in names}
    return Batch(
        ids=tuple(id for sample in samples for id in sample.ids),
        replaced=tuple(bad for sample in samples for bad in sample.replaced),
        **stacked,
    )


def standard_normal(shape: tuple[int, ...], *draw: object) -> Tensor:
    """Returns standard normal numbers in fp32, drawn on the CPU so that they do not depend on the device.

    Args:
        shape: Shape of the tensor.
        draw: Values that the numbers follow from, such as the seed and the id of the sample.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(key_of(*draw)))


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Samples latents from the posterior of the VAE: mean + standard deviation * noise, in fp32 and unscaled.

    Args:
        moments: Mean and log variance, of shape (2C, F, H, W) for a clip or (2C, H, W) for an image.
        noise: Standard normal numbers with C channels.
    """
    mean, log_variance = moments.float().chunk(2)
    # The bounds are those of the DiagonalGaussianDistribution of AutoencoderKLCogVideoX.
    return mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise


def pad_front(latents_FCHW: Tensor, frames: int) -> Tensor:
    """Repeats the first latent frame in front, ``frames`` times, as CogVideoX 1.5 needs it.

    Its pipelines add such frames before sampling, so that time divides into patches, and drop them afterwards.
    """
    return torch.cat([latents_FCHW[:1].expand(frames, -1, -1, -1), latents_FCHW]) if frames else latents_FCHW


def read_moments(cache: TensorCache, sample: CachedSample, variant: int, geometry: Geometry) -> Tensor:
    """Reads the moments of one variant of a sample.

    Args:
        cache: Where the tensors are stored.
        sample: The sample.
        variant: Number of the variant; after the last one, counting starts again at the first.
        geometry: Gives the shape that the bucket must have.

    Returns:
        Moments of shape (2C, F, H, W), without padding.

    Raises:
        CacheError: The file is missing or damaged, holds numbers that are not finite, or does not have the shape of
            the sample's bucket.
    """
    shape = geometry.moments_shape(sample.bucket)
    return _read_tensor(cache, sample.video_keys[variant % len(sample.video_keys)], "moments_CFHW", shape)


def read_image(
    cache: TensorCache, sample: CachedSample, visit: int, variants: int, geometry: Geometry
) -> Tensor | None:
    """Reads the moments of the first frame of the clip variant that a visit uses.

    Args:
        cache: Where the tensors are stored.
        sample: The sample.
        visit: How often the sample was drawn before. It selects the clip variant as in ``read_moments``, and then one
            of the encodings of its first frame, the next one each time that the clip variant is used.
        variants: How many encodings of each first frame are cached, each with its own noise.
        geometry: Gives the shape that the bucket must have.

    Returns:
        Moments of shape (2C, H, W), or None if first frames are not cached.

    Raises:
        CacheError: As for ``read_moments``.
    """
    if not sample.image_keys:
        return None
    times, variant = divmod(visit, len(sample.image_keys))
    shape = (variants, *geometry.image_shape(sample.bucket))
    return _read_tensor(cache, sample.image_keys[variant], "image_moments_KCHW", shape)[times % variants]


def read_prompt(cache: TensorCache, key: str, geometry: Geometry) -> Tensor:
    """Reads the embedding of a caption, of shape (L, D). Raises CacheError as ``read_moments`` does."""
    return _read_tensor(cache, key, "prompt_LD", (geometry.max_text_seq_length, geometry.text_embed_dim))


def _read_tensor(cache: TensorCache, key: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Reads one tensor of a file, and checks its shape and that its numbers are finite."""
    tensor = cache.read(key).get(name)
    found = None if tensor is None else tuple(tensor.shape)
    if tensor is None or found != shape:
        raise CacheError(f"{cache.path(key)}: its {name} is {found}, not {shape}; prepare_dataset.py --repair fixes it")
    # The preparation never writes numbers that are not finite, so another program wrote this file.
    if not_finite({name: tensor}):
        raise cache.set_aside(key, f"{cache.path(key)}: its {name} holds numbers that are not finite")
    return tensor


def trained_timesteps(flags: LossFlags, total: int) -> range:
    """Returns the timesteps that are trained: all ``total`` of the scheduler, or those that flags restrict it to."""
    return range(total)[flags.min_timestep : total if flags.max_timestep is None else flags.max_timestep + 1]


def timestep_in(timesteps: range, stratum: tuple[int, int], number: float) -> int:
    """Picks a timestep from one of several equal parts of a range.

    Args:
        timesteps: The range.
        stratum: (k, n), which selects the k-th of n equal parts of the range; (0, 1) selects all of it.
        number: Random number in [0, 1) that selects the timestep within the part.
    """
    part, parts = stratum
    position = int((part + number) / parts * len(timesteps))
    return timesteps[min(position, len(timesteps) - 1)]  # rounding may give the position after the last


def draw_sample(
    moments_CFHW: Tensor,
    prompt_LD: Tensor,
    timestep: int,
    geometry: Geometry,
    draw: tuple[object, ...],
    sample_id: str,
    image_moments_CHW: Tensor | None = None,
) -> Batch:
    """Makes one sample, without the leading dimension, from its cached tensors.

    Args:
        moments_CFHW: Moments of the clip; C counts the means and the log variances.
        prompt_LD: Embedding of the caption.
        timestep: The timestep to train.
        geometry: Gives the scaling factor of latents and the number of padding frames.
        draw: Values that all random numbers of the sample follow from.
        sample_id: Names the sample in logs.
        image_moments_CHW: Moments of the first frame, for image-to-video.
    """
    channels, *rest = moments_CFHW.shape
    latents = sample_posterior(moments_CFHW, standard_normal((channels // 2, *rest), *draw, "posterior"))
    x0 = latents.mul_(geometry.scaling_factor).transpose(0, 1).contiguous()
    x0 = pad_front(x0, geometry.padding_frames(len(x0)))
    image = None
    if image_moments_CHW is not None:
        image_noise = standard_normal((channels // 2, *rest[1:]), *draw, "image posterior")
        image = sample_posterior(image_moments_CHW, image_noise)
    return Batch(
        x0_BFCHW=x0,
        noise_BFCHW=standard_normal(tuple(x0.shape), *draw, "noise"),
        timestep_B=torch.tensor(timestep),
        prompt_BLD=prompt_LD,
        ids=(sample_id,),
        image_BCHW=image,
    )


class LatentDataset(Dataset[Batch]):
    """Makes samples on request, by ``Visit``; reading checks checksums and shapes.

    A sample that cannot be read raises CacheError. With ``replace_bad`` the next sample of its bucket, in the order of
    the ids, replaces it, and the batch names the bad one. The replacement gets its own random numbers, which follow
    from the id of the bad sample. So all ranks keep their shapes, and the batch does not depend on when or where the
    fault was found.
    """

    def __init__(
        self,
        cache: TensorCache,
        index: CacheIndex,
        geometry: Geometry,
        seed: int,
        caption_dropout: float,
        replace_bad: bool = False,
        timesteps: range | None = None,
        image_dropout: float = 0.0,
    ) -> None:
        """Stores the settings; files are opened only when a sample is read.

        Args:
            cache: Where the tensors are stored.
            index: The samples.
            geometry: Shapes and scaling factors of the model.
            seed: Seed of the run.
            caption_dropout: Probability that the empty caption replaces a sample's own.
            replace_bad: Whether another sample replaces one that cannot be read.
            timesteps: Timesteps that are trained; by default all of the scheduler.
            image_dropout: Probability that zeros replace the first frame.
        """
        self.cache = cache
        self.index = index
        self.geometry = geometry
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.replace_bad = replace_bad
        self.image_dropout = image_dropout
        self.timesteps = timesteps or range(int(geometry.schedule["num_train_timesteps"]))

    def __getitem__(self, visit: Visit) -> Batch:
        replaced: list[tuple[str, str]] = []
        for sample in self._candidates(visit.index):
            draw: tuple[object, ...] = (self.seed, visit.times, sample.id)
            # The replacement is also drawn as itself, so it must not use the same random numbers twice.
            if replaced:
                draw = (*draw, "instead of", replaced[0][0])
            dropped = uniform(*draw, "caption") < self.caption_dropout
            try:
                moments = read_moments(self.cache, sample, visit.times, self.geometry)
                image = read_image(self.cache, sample, visit.times, self.index.image_variants, self.geometry)
                prompt = None if dropped else read_prompt(self.cache, sample.prompt_key, self.geometry)
            except CacheError as error:
                if not self.replace_bad:
                    raise CacheError(f"{sample.id}: {error}") from None
                replaced.append((sample.id, str(error)))
                continue
            # The empty caption belongs to no sample, so a fault in it is an error and replaces nothing.
            if prompt is None:
                prompt = read_prompt(self.cache, self.index.empty_prompt_key, self.geometry)
            timestep = timestep_in(self.timesteps, visit.stratum, uniform(*draw, "timestep"))
            made = draw_sample(moments, prompt, timestep, self.geometry, draw, sample.id, image)
            if made.image_BCHW is not None and uniform(*draw, "image") < self.image_dropout:
                made = replace(made, image_BCHW=torch.zeros_like(made.image_BCHW))
            return replace(made, replaced=tuple(replaced))
        bucket = self.index.samples[visit.index].bucket
        raise CacheError(f"bucket {bucket}: none of its {plural(len(replaced), 'clip')} can be read; {replaced[0][1]}")

    def _candidates(self, index: int) -> Iterator[CachedSample]:
        """Yields the sample and then all others of its bucket, in the order of the ids, starting after its own."""
        first = self.index.samples[index]
        yield first
        others = [s for s in self.index.samples if s.bucket == first.bucket and s.id != first.id]
        yield from sorted(others, key=lambda sample: (sample.id < first.id, sample.id))


def begin_worker(_worker: int) -> None:
    """Prepares a worker process of the loader.

    A stop signal to the process group asks the training process for a checkpoint, and until that is written it needs
    its workers. So workers ignore such signals, and the kernel kills them when the training process ends.
    """
    ignore_stop_signals()
    Queue._on_queue_feeder_error = send_error  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)


def send_error(queue: "Queue[Any]", error: Exception, item: tuple[int, object]) -> None:
    """Sends an error in place of a batch that a worker process could not send.

    The worker shares the memory of a batch in the thread that sends it. Python would print the error there and drop the
    batch, and training would wait for it without end.

    Args:
        queue: The queue to the training process.
        error: The error, such as a full /dev/shm, or a limit of open files, threads or the path of a socket.
        item: The number of the batch, and the batch.
    """
    problem = UsageError(f"a worker of the loader cannot send a batch ({first_line(error)}); {FEWER_WORKERS}")
    queue.put((item[0], ExceptionWrapper((UsageError, problem, error.__traceback__))))


def build_loader(
    dataset: LatentDataset, sampler: BucketBatchSampler, workers: int, prefetch: int, pin: bool
) -> DataLoader[Batch]:
    """Returns a DataLoader over the micro-batches of a rank, in order.

    Args:
        dataset: Makes the samples.
        sampler: Chooses the samples of each micro-batch.
        workers: Number of worker processes; with 0 the training process reads.
        prefetch: How many batches each worker prepares in advance.
        pin: Whether batches are copied to page-locked memory.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        timeout=LOADER_SECONDS if workers else 0,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=False,
        worker_init_fn=begin_worker,
    )


@contextmanager
def batches_of(loader: DataLoader[Batch]) -> Iterator[Iterator[Batch]]:
    """Provides the batches of a loader, and ends its worker processes, which ignore stop signals, after the block.

    PyTorch raises the error of a worker that has died wherever the main thread is at that time.

    Raises:
        UsageError: A worker raised it, a worker process died, or no batch arrived within LOADER_SECONDS.
    """
    batches = iter(loader)
    try:
        yield batches
    except UsageError as error:
        if not str(error).startswith("Caught "):  # a worker's error arrives with its traceback in the text
            raise
        kind, line = type(error), str(error).strip().splitlines()[-1]
        raise kind(line.removeprefix(f"{kind.__module__}.{kind.__name__}: ")) from None
    except RuntimeError as error:
        line = first_line(error)
        if line.startswith("DataLoader timed out"):
            rule = f"no batch came for {LOADER_SECONDS} s; the disk does not answer, or /dev/shm is full"
        elif line.startswith("DataLoader worker (pid"):
            rule = f"{line}; a lack of memory, /dev/shm or threads (ulimit -u) ends workers like that"
        else:
            raise
        raise UsageError(f"--dataloader_num_workers {loader.num_workers}: {rule}; {FEWER_WORKERS}") from None
    finally:
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()
