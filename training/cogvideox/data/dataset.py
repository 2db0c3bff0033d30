"""Cached tensors -> batches. Everything random about a sample is drawn here, on the CPU, from (seed, visit, id).

Visit -> moments of this visit's variant -> x0 (posterior sampled, scaled, padded), noise, timestep, prompt -> Batch.
With first frames in the index also the image of that variant (posterior sampled, unscaled; zeros where it is dropped).
A sample whose tensors are bad is an error, or makes room for the next one of its bucket, which the batch then says.
Shapes: B samples, F latent frames (padding included), C channels, H and W latents, L text tokens, D text channels; K
encodings of one image.
"""

import multiprocessing
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cogvideox.config.flags import LossFlags
from cogvideox.config.geometry import Geometry
from cogvideox.data.cache import CachedSample, CacheError, CacheIndex, TensorCache
from cogvideox.data.media.workers import end_with_parent, ignore_stop_signals
from cogvideox.data.sampler import BucketBatchSampler, Visit
from cogvideox.errors import UsageError, first_line
from cogvideox.finite import not_finite
from cogvideox.rng import key_of, uniform

LOADER_SECONDS = 300  # after which a batch that has not come never will
FEWER_WORKERS = "run again with --dataloader_num_workers 0, or with a larger /dev/shm (docker run --shm-size 2g)"


@dataclass(frozen=True)
class Batch:
    """One micro-batch, or one sample of it without the leading dimension."""

    x0_BFCHW: Tensor  # fp32, scaled
    noise_BFCHW: Tensor  # fp32
    timestep_B: Tensor  # int64
    prompt_BLD: Tensor  # as cached
    ids: tuple[str, ...]
    replaced: tuple[tuple[str, str], ...] = ()  # id of each sample that could not be read, and what is wrong with it
    image_BCHW: Tensor | None = None  # fp32, unscaled; None for text-to-video

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def samples(self) -> list[tuple[str, int]]:
        """Id and timestep of each sample. Waits for the device if the batch is there."""
        return list(zip(self.ids, self.timestep_B.tolist(), strict=True))

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return replace(self, **{n: t.to(device, non_blocking=True) for n, t in self.tensors().items()})

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; the DataLoader calls it."""
        return replace(self, **{n: t.pin_memory() for n, t in self.tensors().items()})


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples of one bucket, stacked."""
    names = samples[0].tensors()
    stacked = {name: torch.stack([sample.tensors()[name] for sample in samples]) for name in names}
    return Batch(
        ids=tuple(id for sample in samples for id in sample.ids),
        replaced=tuple(bad for sample in samples for bad in sample.replaced),
        **stacked,
    )


def normal(shape: tuple[int, ...], *draw: object) -> Tensor:
    """Standard normal numbers, fp32, drawn on the CPU so that they do not depend on the device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(key_of(*draw)))


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """A draw from the VAE's posterior, fp32, unscaled. ``moments`` holds mean and log variance: (2C, F, H, W) of a
    clip, (2C, H, W) of an image; ``noise`` has C channels.
    """
    mean, log_variance = moments.float().chunk(2)
    # the bounds of AutoencoderKLCogVideoX's DiagonalGaussianDistribution
    return mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise


def pad_front(latents_FCHW: Tensor, frames: int) -> Tensor:
    """The first latent frame repeated in front, as the pipelines of 1.5 drop it after sampling."""
    return torch.cat([latents_FCHW[:1].expand(frames, -1, -1, -1), latents_FCHW]) if frames else latents_FCHW


def read_moments(cache: TensorCache, sample: CachedSample, variant: int, geometry: Geometry) -> Tensor:
    """The moments of one of a sample's variants, counted in a circle: (2C, F, H, W), without padding.

    Raises:
        CacheError: the file is missing or damaged, holds numbers that are not finite, or does not have the shape of
            the sample's bucket.
    """
    shape = geometry.moments_shape(sample.bucket)
    return _read(cache, sample.video_keys[variant % len(sample.video_keys)], "moments_CFHW", shape)


def read_image(
    cache: TensorCache, sample: CachedSample, visit: int, variants: int, geometry: Geometry
) -> Tensor | None:
    """The moments of a sample's first frame, (2C, H, W), from the clip variant of this visit; of its ``variants`` with
    other noise, the next one each time that this clip variant comes. None if there are none.

    Raises CacheError as ``read_moments`` does.
    """
    if not sample.image_keys:
        return None
    times, variant = divmod(visit, len(sample.image_keys))
    shape = (variants, *geometry.image_shape(sample.bucket))
    return _read(cache, sample.image_keys[variant], "image_moments_KCHW", shape)[times % variants]


def read_prompt(cache: TensorCache, key: str, geometry: Geometry) -> Tensor:
    """A caption's embedding, (L, D); raises CacheError as ``read_moments`` does."""
    return _read(cache, key, "prompt_LD", (geometry.max_text_seq_length, geometry.text_embed_dim))


def _read(cache: TensorCache, key: str, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = cache.read(key).get(name)
    found = None if tensor is None else tuple(tensor.shape)
    if tensor is None or found != shape:
        raise CacheError(f"{cache.path(key)}: its {name} is {found}, not {shape}; prepare_dataset.py --repair mends it")
    if not_finite({name: tensor}):  # preparing refuses to write such a file, whatever wrote this one
        raise cache.set_aside(key, f"{cache.path(key)}: its {name} holds numbers that are not finite")
    return tensor


def timesteps_of(flags: LossFlags, total: int) -> range:
    """The timesteps that are trained, of all of the scheduler's."""
    return range(total)[flags.min_timestep : total if flags.max_timestep is None else flags.max_timestep + 1]


def timestep_in(timesteps: range, stratum: tuple[int, int], number: float) -> int:
    """The timestep that a number in [0, 1) picks from the k-th of n equal parts of the range."""
    part, parts = stratum
    place = int((part + number) / parts * len(timesteps))
    return timesteps[min(place, len(timesteps) - 1)]  # the sum may round up to the next whole number


def draw_sample(
    moments_CFHW: Tensor,
    prompt_LD: Tensor,
    timestep: int,
    geometry: Geometry,
    draw: tuple[object, ...],
    sample_id: str,
    image_moments_CHW: Tensor | None = None,
) -> Batch:
    """One sample out of its tensors, without the leading dimension; ``draw`` is what its random numbers follow from."""
    channels, *rest = moments_CFHW.shape
    latents = sample_posterior(moments_CFHW, normal((channels // 2, *rest), *draw, "posterior"))
    x0 = latents.mul_(geometry.scaling_factor).transpose(0, 1).contiguous()
    x0 = pad_front(x0, geometry.padding_frames(len(x0)))
    image = None
    if image_moments_CHW is not None:
        image = sample_posterior(image_moments_CHW, normal((channels // 2, *rest[1:]), *draw, "image posterior"))
    return Batch(
        x0_BFCHW=x0,
        noise_BFCHW=normal(tuple(x0.shape), *draw, "noise"),
        timestep_B=torch.tensor(timestep),
        prompt_BLD=prompt_LD,
        ids=(sample_id,),
        image_BCHW=image,
    )


class LatentDataset(Dataset[Batch]):
    """Samples by Visit. Reading checks checksums and shapes.

    A sample that cannot be read raises CacheError, or, with ``replace_bad``, makes room for the next one of its bucket,
    in the order of the ids and in a circle. What comes in its place is drawn as in a visit of its own, so all ranks
    keep their shapes, and nothing depends on when or where the fault was found. Timesteps are drawn from ``timesteps``,
    or from all of the scheduler's.
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
            draw: tuple[object, ...] = (self.seed, visit.visit, sample.id)
            if replaced:  # a visit of its own: this clip comes by itself, too
                draw = (*draw, "instead of", replaced[0][0])
            dropped = uniform(*draw, "caption") < self.caption_dropout
            try:
                moments = read_moments(self.cache, sample, visit.visit, self.geometry)
                image = read_image(self.cache, sample, visit.visit, self.index.image_variants, self.geometry)
                prompt = None if dropped else read_prompt(self.cache, sample.prompt_key, self.geometry)
            except CacheError as error:
                if not self.replace_bad:
                    raise CacheError(f"{sample.id}: {error}") from None
                replaced.append((sample.id, str(error)))
                continue
            if prompt is None:  # a fault here is no sample's own
                prompt = read_prompt(self.cache, self.index.empty_prompt_key, self.geometry)
            timestep = timestep_in(self.timesteps, visit.stratum, uniform(*draw, "timestep"))
            made = draw_sample(moments, prompt, timestep, self.geometry, draw, sample.id, image)
            if made.image_BCHW is not None and uniform(*draw, "image") < self.image_dropout:
                made = replace(made, image_BCHW=torch.zeros_like(made.image_BCHW))
            return replace(made, replaced=tuple(replaced))
        bucket = self.index.samples[visit.index].bucket
        raise CacheError(f"bucket {bucket}: not one of its {len(replaced)} clips can be read; {replaced[0][1]}")

    def _candidates(self, index: int) -> Iterator[CachedSample]:
        """The sample, then all others of its bucket."""
        first = self.index.samples[index]
        yield first
        others = [s for s in self.index.samples if s.bucket == first.bucket and s.id != first.id]
        yield from sorted(others, key=lambda sample: (sample.id < first.id, sample.id))


def begin_worker(_worker: int) -> None:
    """A signal to the whole group asks the training process for a checkpoint, and it needs its workers until then. They
    end with it, however it ends.
    """
    ignore_stop_signals()
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)


def collate_shared(samples: Sequence[Batch]) -> Batch:
    """``collate`` in a worker, into shared memory at once: where there is no room for it, that is said here.

    Left to the thread that sends the batch, the error would be printed, the batch lost, and training would wait for it.
    """
    batch = collate(samples)
    try:
        for tensor in batch.tensors().values():
            tensor.share_memory_()
    except RuntimeError as error:
        raise UsageError(f"/dev/shm: has no room for a batch ({first_line(error)}); {FEWER_WORKERS}") from None
    return batch


def build_loader(
    dataset: LatentDataset, sampler: BucketBatchSampler, workers: int, prefetch: int, pin: bool
) -> DataLoader[Batch]:
    """A DataLoader over the rank's micro-batches, in order; each of the workers has ``prefetch`` of them ready."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        timeout=LOADER_SECONDS if workers else 0,
        collate_fn=collate_shared if workers else collate,
        pin_memory=pin,
        persistent_workers=False,
        worker_init_fn=begin_worker,
    )


def batches_of(loader: DataLoader[Batch]) -> Generator[Batch, None, None]:
    """The batches of a loader; closing it ends the workers, which do not listen to signals.

    Raises:
        UsageError: what a worker raised, or that one ended or no batch came.
    """
    batches = iter(loader)
    try:
        yield from batches
    except UsageError as error:  # a worker's error arrives with its traceback in the text
        kind, line = type(error), str(error).strip().splitlines()[-1]
        raise kind(line.removeprefix(f"{kind.__module__}.{kind.__name__}: ")) from None
    except RuntimeError as error:
        line = first_line(error)
        if line.startswith("DataLoader timed out"):
            rule = f"no batch came for {LOADER_SECONDS} s; the disk does not answer, or /dev/shm is full"
            raise UsageError(f"--dataloader_num_workers {loader.num_workers}: {rule}; {FEWER_WORKERS}") from None
        if line.startswith("DataLoader worker (pid"):
            rule = f"{line}; a lack of memory, or of /dev/shm, ends workers like that"
            raise UsageError(f"--dataloader_num_workers {loader.num_workers}: {rule}; {FEWER_WORKERS}") from None
        raise
    finally:
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()
