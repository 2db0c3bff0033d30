"""dataset.py: a sample of a batch is a function of (seed, visit, id) and of nothing else."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from fakes import flip_byte, poison
from running import LORA_SCRIPT, finish, fork_ranks, lora_flags, losses, metrics, python, train

from cogvideox.config import args
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import LossFlags, ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.data.cache import CachedSample, CacheError, CacheIndex, TensorCache, hash_of, open_index
from cogvideox.data.dataset import (
    Batch,
    LatentDataset,
    build_loader,
    collate,
    pad_front,
    sample_posterior,
    standard_normal,
    timestep_in,
    trained_timesteps,
)
from cogvideox.data.sampler import BucketBatchSampler, Order, Visit
from cogvideox.errors import UsageError
from cogvideox.runtime.bad_clips import BadClips, check_same_clips

Tiny = Callable[[str], Path]
BUCKET = Bucket(9, 64, 96)
NAMES = [f"videos/{k}.mp4" for k in range(5)]
SHAPE = (3, 16, 8, 12)  # latent frames, channels, height, width
VARIANTS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a cache of five clips with two variants each."""
    cache = TensorCache(tmp_path_factory.mktemp("cache"))
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        for variant in range(VARIANTS):
            moments = torch.randn(32, 3, 8, 12, generator=generator)
            cache.write(hash_of([name, variant]), {"moments_CFHW": moments})
        cache.write(hash_of(["prompt", name]), {"prompt_LD": torch.randn(32, 32, generator=generator).bfloat16()})
    cache.write(hash_of(""), {"prompt_LD": torch.zeros(32, 32, dtype=torch.bfloat16)})
    return cache.folder


def index(names: list[str] = NAMES) -> CacheIndex:
    samples = tuple(
        CachedSample(name, name, BUCKET, tuple(hash_of([name, k]) for k in range(VARIANTS)), hash_of(["prompt", name]))
        for name in names
    )
    return CacheIndex(samples, hash_of(""), 8.0, "vae", "t5", {"vae": "fp32", "text_encoder": "bf16"}, 32)


@pytest.fixture
def make(tiny: Tiny, folder: Path) -> Callable[..., LatentDataset]:
    def make(kind: str = "5b", seed: int = 0, dropout: float = 0.0, names: list[str] = NAMES) -> LatentDataset:
        return LatentDataset(
            TensorCache(folder), index(names), read_geometry(ModelFlags(str(tiny(kind)))), seed, dropout
        )

    return make


def same(one: Batch, other: Batch) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return one.ids == other.ids and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_types_and_shapes(make: Callable[..., LatentDataset]) -> None:
    sample = make()[Visit(0, 0)]
    assert (sample.x0_BFCHW.shape, sample.x0_BFCHW.dtype) == (SHAPE, torch.float32)
    assert (sample.noise_BFCHW.shape, sample.noise_BFCHW.dtype) == (SHAPE, torch.float32)
    assert (sample.timestep_B.shape, sample.timestep_B.dtype) == ((), torch.int64)
    assert (sample.prompt_BLD.shape, sample.prompt_BLD.dtype) == ((32, 32), torch.bfloat16)
    assert sample.ids == (NAMES[0],)
    batch = collate([make()[Visit(k, 0)] for k in (3, 1)])
    assert batch.x0_BFCHW.shape == (2, *SHAPE)
    assert batch.timestep_B.shape == (2,)
    assert batch.ids == (NAMES[3], NAMES[1])
    assert torch.equal(batch.x0_BFCHW[1], make()[Visit(1, 0)].x0_BFCHW)
    assert same(batch.to(torch.device("cpu")), batch)


def test_the_same_visit_twice_is_the_same(make: Callable[..., LatentDataset]) -> None:
    before = torch.get_rng_state()
    first = make(dropout=0.5)[Visit(2, 3)]
    torch.rand(10)
    assert same(first, make(dropout=0.5)[Visit(2, 3)])
    torch.set_rng_state(before)
    make()[Visit(2, 3)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("index", "visit", "seed"), [(0, 2, 0), (1, 0, 0), (0, 0, 1)])
def test_another_visit_sample_or_seed_draws_anew(
    make: Callable[..., LatentDataset], index: int, visit: int, seed: int
) -> None:
    # Visits 0 and 2 use the same variant, so the posterior differs by its noise alone.
    one, other = make()[Visit(0, 0)], make(seed=seed)[Visit(index, visit)]
    assert not torch.equal(one.x0_BFCHW, other.x0_BFCHW)
    assert not torch.equal(one.noise_BFCHW, other.noise_BFCHW)
    assert one.timestep_B != other.timestep_B


def test_random_numbers_of_different_purposes_are_independent(make: Callable[..., LatentDataset]) -> None:
    sample = make()[Visit(0, 0)]
    mean, std = moments_of(make(), 0, 0)
    eps_FCHW = (sample.x0_BFCHW / 0.7 - mean) / std
    # Both layouts are compared, because the posterior is drawn with the channels first.
    for eps in (eps_FCHW, eps_FCHW.transpose(0, 1)):
        correlation = torch.corrcoef(torch.stack([eps.flatten(), sample.noise_BFCHW.flatten()]))[0, 1]
        assert abs(correlation) < 0.08  # 4608 numbers: five standard deviations


def test_a_sample_does_not_depend_on_other_samples(make: Callable[..., LatentDataset]) -> None:
    alone = make(names=[NAMES[3]], dropout=0.5)
    together = make(dropout=0.5)
    for visit in range(4):
        assert same(alone[Visit(0, visit)], together[Visit(3, visit)])


def moments_of(dataset: LatentDataset, index: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and standard deviation of the VAE's own distribution, each of shape (F, C, H, W)."""
    moments = dataset.cache.read(hash_of([NAMES[index], variant]))["moments_CFHW"]
    posterior = DiagonalGaussianDistribution(moments[None])
    return posterior.mean[0].transpose(0, 1), posterior.std[0].transpose(0, 1)


@pytest.mark.parametrize(("kind", "scale"), [("5b", 0.7), ("2b", 1.15258426)])
def test_x0_is_a_scaled_draw_from_the_posterior(make: Callable[..., LatentDataset], kind: str, scale: float) -> None:
    dataset = make(kind, seed=5)
    for visit in range(4):
        mean, std = moments_of(dataset, 1, visit % VARIANTS)
        eps = standard_normal((16, 3, 8, 12), 5, visit, NAMES[1], "posterior").transpose(0, 1)
        torch.testing.assert_close(dataset[Visit(1, visit)].x0_BFCHW, (mean + std * eps) * scale)


def test_the_posterior_s_noise_is_standard_normal(make: Callable[..., LatentDataset]) -> None:
    dataset = make()
    draws = []
    for visit in range(0, 20, VARIANTS):
        mean, std = moments_of(dataset, 0, 0)
        draws.append((dataset[Visit(0, visit)].x0_BFCHW / 0.7 - mean) / std)
        draws.append(dataset[Visit(0, visit)].noise_BFCHW)
    numbers = torch.stack(draws)
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 1) < 0.02


def test_log_variances_are_clamped_as_the_vae_does() -> None:
    moments = torch.tensor([1.0, 1.0, 1.0, -100.0, 0.0, 100.0]).view(6, 1, 1, 1)
    noise = torch.full((3, 1, 1, 1), 2.0)
    posterior = DiagonalGaussianDistribution(moments[None])
    torch.testing.assert_close(sample_posterior(moments, noise), (posterior.mean + posterior.std * noise)[0])
    assert sample_posterior(moments.bfloat16(), noise).dtype == torch.float32


def test_one_cache_serves_two_scale_factors(make: Callable[..., LatentDataset]) -> None:
    one, other = make("5b")[Visit(0, 0)], make("2b")[Visit(0, 0)]
    torch.testing.assert_close(one.x0_BFCHW / 0.7, other.x0_BFCHW / 1.15258426)
    assert torch.equal(one.noise_BFCHW, other.noise_BFCHW)


def test_1_5_repeats_the_first_latent_in_front(make: Callable[..., LatentDataset]) -> None:
    plain, padded = make("5b")[Visit(0, 0)], make("1.5-5b")[Visit(0, 0)]
    assert padded.x0_BFCHW.shape == (4, 16, 8, 12)
    assert torch.equal(padded.x0_BFCHW[0], plain.x0_BFCHW[0])
    assert torch.equal(padded.x0_BFCHW[1:], plain.x0_BFCHW)
    assert padded.noise_BFCHW.shape == padded.x0_BFCHW.shape
    assert not torch.equal(padded.noise_BFCHW[0], padded.noise_BFCHW[1])


def test_pad_front() -> None:
    latents = torch.arange(12.0).view(3, 4, 1, 1)
    assert pad_front(latents, 0) is latents
    assert torch.equal(pad_front(latents, 2), torch.cat([latents[:1], latents[:1], latents]))


def test_the_visit_picks_the_variant(make: Callable[..., LatentDataset]) -> None:
    dataset = make()
    read: list[str] = []
    original = dataset.cache.read
    dataset.cache.read = lambda key: (read.append(key), original(key))[1]  # type: ignore[method-assign]
    for visit in range(4):
        dataset[Visit(0, visit)]
    assert read[::2] == [hash_of([NAMES[0], visit % 2]) for visit in range(4)]


@pytest.mark.parametrize(("rate", "least", "most"), [(0.0, 0, 0), (1.0, 400, 400), (0.1, 16, 64), (0.5, 160, 240)])
def test_captions_are_dropped_at_the_given_rate(
    make: Callable[..., LatentDataset], rate: float, least: int, most: int
) -> None:
    """The bounds are four standard deviations of a binomial; the seed fixes the numbers."""
    dataset = make(dropout=rate)
    samples = [dataset[Visit(k % 5, k // 5)] for k in range(400)]
    assert least <= sum(not sample.prompt_BLD.any() for sample in samples) <= most


def test_caption_dropout_changes_nothing_else(make: Callable[..., LatentDataset]) -> None:
    kept, dropped = make(dropout=0.0)[Visit(0, 0)], make(dropout=1.0)[Visit(0, 0)]
    assert torch.equal(kept.prompt_BLD, make().cache.read(hash_of(["prompt", NAMES[0]]))["prompt_LD"])
    assert not dropped.prompt_BLD.any()
    assert torch.equal(kept.x0_BFCHW, dropped.x0_BFCHW)
    assert torch.equal(kept.noise_BFCHW, dropped.noise_BFCHW)
    assert kept.timestep_B == dropped.timestep_B


def test_timesteps_are_uniform(make: Callable[..., LatentDataset]) -> None:
    dataset = make()
    timesteps = torch.stack([dataset[Visit(k % 5, k // 5)].timestep_B for k in range(400)])
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    quarters = torch.bincount(timesteps // 250, minlength=4)
    assert len(quarters) == 4
    assert (quarters > 100 - 4 * 8.7).all()


def test_a_range_of_timesteps(make: Callable[..., LatentDataset]) -> None:
    dataset, all_of_them = make(), make()
    dataset.timesteps = trained_timesteps(LossFlags(min_timestep=300, max_timestep=302), 1000)
    found = Counter(int(dataset[Visit(k % 5, k // 5)].timestep_B) for k in range(60))
    assert sorted(found) == [300, 301, 302]
    assert min(found.values()) > 8
    for k in range(20):  # the same draw is scaled to another range, and nothing else changes
        one, other = dataset[Visit(0, k)], all_of_them[Visit(0, k)]
        assert int(one.timestep_B) == 300 + int(other.timestep_B) * 3 // 1000
        assert torch.equal(one.noise_BFCHW, other.noise_BFCHW)
    assert trained_timesteps(LossFlags(), 1000) == range(1000)
    assert trained_timesteps(LossFlags(min_timestep=999), 1000) == range(999, 1000)


def test_strata_divide_the_range_evenly(make: Callable[..., LatentDataset]) -> None:
    """Each sample of a step gets a timestep from its own part of the range, and can get any timestep in it."""
    dataset = make()
    for step in range(10):
        timesteps = [int(dataset[Visit(k, step, (k, 5))].timestep_B) for k in range(5)]
        assert [timestep // 200 for timestep in timesteps] == [0, 1, 2, 3, 4]
    assert len({int(dataset[Visit(0, step, (0, 5))].timestep_B) for step in range(10)}) > 5
    whole, part = dataset[Visit(1, 1)], dataset[Visit(1, 1, (3, 4))]
    assert int(part.timestep_B) == 750 + int(whole.timestep_B) // 4
    assert torch.equal(whole.x0_BFCHW, part.x0_BFCHW)
    assert torch.equal(whole.noise_BFCHW, part.noise_BFCHW)


@pytest.mark.parametrize("parts", [1, 3, 7, 1000])
def test_the_ends_of_strata(parts: int) -> None:
    timesteps = range(10, 110)
    last = 1 - 2**-53
    assert timestep_in(timesteps, (0, parts), 0.0) == 10
    assert timestep_in(timesteps, (parts - 1, parts), last) == 109
    found = Counter(timestep_in(timesteps, (k, parts), n / 1000) for k in range(parts) for n in range(1000))
    assert sorted(found) == list(timesteps)
    assert max(found.values()) - min(found.values()) <= 2 * parts  # rounding at the ends of the timesteps


def test_a_damaged_tensor_is_an_error(make: Callable[..., LatentDataset], tmp_path: Path) -> None:
    dataset = make()
    dataset.cache = TensorCache(tmp_path)
    with pytest.raises(CacheError, match="prepare again"):
        dataset[Visit(0, 0)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.fault("ranks: another number of loader processes")
def test_the_number_of_workers_has_no_effect(make: Callable[..., LatentDataset], workers: int) -> None:
    def batches(workers: int) -> list[Batch]:
        torch.manual_seed(workers)
        sampler = BucketBatchSampler(Order(NAMES, [BUCKET] * 5, 4, 0), 2, 2, 0, 1, 0, 4)
        return list(build_loader(make(dropout=0.5), sampler, workers, 2, pin=False))

    alone, helped = batches(0), batches(workers)
    assert len(alone) == 8
    assert all(same(one, other) for one, other in zip(alone, helped, strict=True))


def test_listing_the_samples_in_another_order_has_no_effect(make: Callable[..., LatentDataset]) -> None:
    def batches(names: list[str]) -> list[Batch]:
        sampler = BucketBatchSampler(Order(names, [BUCKET] * 5, 2, 0), 2, 1, 0, 1, 0, 5)
        return list(build_loader(make(dropout=0.5, names=names), sampler, 0, 2, pin=False))

    assert all(same(*pair) for pair in zip(batches(NAMES), batches(NAMES[::-1]), strict=True))


# -- first frames ------------------------------------------------------------------------------------------------------

NOISES = 3


@pytest.fixture
def with_images(make: Callable[..., LatentDataset], tmp_path: Path) -> Callable[..., LatentDataset]:
    """Returns a separate cache of the five clips with three encodings of the first frame of each variant."""
    folder = Path(shutil.copytree(make().cache.folder, tmp_path / "images"))
    generator = torch.Generator().manual_seed(1)
    for name in NAMES:
        for variant in range(VARIANTS):
            image = torch.randn(NOISES, 32, 8, 12, generator=generator)
            TensorCache(folder).write(hash_of(["image", name, variant]), {"image_moments_KCHW": image})

    def with_images(kind: str = "5b-i2v", image_dropout: float = 0.0, **more: Any) -> LatentDataset:
        dataset = make(kind, **more)
        dataset.cache, dataset.image_dropout = TensorCache(folder), image_dropout
        samples = tuple(
            replace(s, image_keys=tuple(hash_of(["image", s.id, k]) for k in range(VARIANTS)))
            for s in dataset.index.samples
        )
        dataset.index = replace(dataset.index, samples=samples, image_variants=NOISES)
        return dataset

    return with_images


def image_of(sample: Batch) -> torch.Tensor:
    assert sample.image_BCHW is not None
    return sample.image_BCHW


def test_the_image_is_an_unscaled_draw_from_its_posterior(with_images: Callable[..., LatentDataset]) -> None:
    """The image belongs to the clip variant of the visit, and uses the next noise each time that this one is used."""
    dataset = with_images(seed=5)
    used = set()
    for visit in range(8):
        variant, noise = visit % VARIANTS, visit // VARIANTS % NOISES
        moments = dataset.cache.read(hash_of(["image", NAMES[1], variant]))["image_moments_KCHW"][noise]
        posterior = DiagonalGaussianDistribution(moments[None, :, None])
        eps = standard_normal((16, 8, 12), 5, visit, NAMES[1], "image posterior")
        image = image_of(dataset[Visit(1, visit)])
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, posterior.mean[0, :, 0] + posterior.std[0, :, 0] * eps)
        used.add((variant, noise))
    assert len(used) == VARIANTS * NOISES


def test_images_change_nothing_else(
    make: Callable[..., LatentDataset], with_images: Callable[..., LatentDataset]
) -> None:
    plain, beside = make("5b-i2v", dropout=0.5), with_images(dropout=0.5, image_dropout=0.5)
    for visit in range(4):
        one, other = plain[Visit(2, visit)], beside[Visit(2, visit)]
        assert one.image_BCHW is None
        assert same(one, replace(other, image_BCHW=None))
    assert make().index == with_images().index.without_images()


def test_images_are_dropped_one_by_one(with_images: Callable[..., LatentDataset]) -> None:
    """Images are dropped independently of captions and of other samples; the bound is 4 deviations of a binomial."""
    dataset = with_images(image_dropout=0.3, dropout=0.3)
    samples = [dataset[Visit(k % 5, k // 5)] for k in range(400)]
    images = torch.tensor([not image_of(sample).any() for sample in samples])
    captions = torch.tensor([not sample.prompt_BLD.any() for sample in samples])
    assert abs(images.sum() - 120) < 4 * 9.2
    assert abs((images & captions).sum() - 36) < 4 * 5.8
    in_a_visit = images.view(80, 5).sum(dim=1)
    assert ((in_a_visit > 0) & (in_a_visit < 5)).any()
    kept = with_images()[Visit(0, 0)]
    assert all(image_of(with_images()[Visit(k % 5, k // 5)]).any() for k in range(20))
    dropped = with_images(image_dropout=1.0)[Visit(0, 0)]
    assert image_of(dropped).shape == image_of(kept).shape
    assert same(replace(dropped, image_BCHW=None), replace(kept, image_BCHW=None))


def test_images_are_collated(with_images: Callable[..., LatentDataset]) -> None:
    batch = collate([with_images()[Visit(k, 0)] for k in (3, 1)])
    assert image_of(batch).shape == (2, 16, 8, 12)
    assert torch.equal(image_of(batch)[1], image_of(with_images()[Visit(1, 0)]))
    assert same(batch.to(torch.device("cpu")), batch)


@pytest.mark.parametrize("damage", ["byte", "shape"])
def test_a_clip_with_a_bad_image_is_replaced(with_images: Callable[..., LatentDataset], damage: str) -> None:
    dataset = with_images()
    key = dataset.index.samples[1].image_keys[0]
    if damage == "byte":
        flip_byte(dataset.cache.path(key))
    else:
        dataset.cache.write(key, {"image_moments_KCHW": torch.zeros(NOISES + 1, 32, 8, 12)})
    with pytest.raises(CacheError, match="its checksum is wrong" if damage == "byte" else "is \\(4, 32, 8, 12\\), not"):
        dataset[Visit(1, 0)]
    dataset.replace_bad = True
    batch = dataset[Visit(1, 0)]
    assert (batch.ids[0], [name for name, _ in batch.replaced]) == (NAMES[2], [NAMES[1]])


# -- bad tensors -------------------------------------------------------------------------------------------------------

OTHER = Bucket(5, 64, 96)


@pytest.fixture
def broken(make: Callable[..., LatentDataset], tmp_path: Path) -> Callable[..., LatentDataset]:
    """Returns a function that damages clips and returns a data set that replaces bad clips.

    For example, ``broken(0, 3)`` damages the clips 0 and 3. Its argument ``part`` chooses which of their tensors. Clip
    2 is alone in another bucket.
    """
    dataset = make(dropout=0.5)
    dataset.cache = TensorCache(Path(shutil.copytree(dataset.cache.folder, tmp_path / "cache")))
    samples = list(dataset.index.samples)
    samples[2] = replace(samples[2], bucket=OTHER)
    dataset.index = replace(dataset.index, samples=tuple(samples))
    for variant in range(VARIANTS):
        dataset.cache.write(hash_of([NAMES[2], variant]), {"moments_CFHW": torch.ones(32, 2, 8, 12)})

    def broken(*numbers: int, part: str = "video") -> LatentDataset:
        dataset.replace_bad = True
        for number in numbers:
            sample = dataset.index.samples[number]
            for key in sample.video_keys if part == "video" else [sample.prompt_key]:
                flip_byte(dataset.cache.path(key))
        return dataset

    return broken


def visited(dataset: LatentDataset, index: int, visit: int = 0) -> tuple[str, ...]:
    """Returns the clip that was used and the clips that were bad."""
    batch = dataset[Visit(index, visit)]
    return batch.ids[0], *(name for name, _ in batch.replaced)


@pytest.mark.fault("data: a cached tensor that cannot be read, within --max_bad_fraction")
def test_a_bad_clip_is_replaced_by_the_next_of_its_bucket(broken: Callable[..., LatentDataset]) -> None:
    whole = broken()
    expected = {(k, v): whole[Visit(k, v)] for k in range(5) for v in range(4)}
    dataset = broken(1, 4)
    for visit in range(4):  # both variants, with and without the caption
        for index, taken_by in enumerate([0, 3, 2, 3, 0]):
            batch = dataset[Visit(index, visit)]
            bad = [NAMES[index]] if index != taken_by else []
            assert [name for name, _ in batch.replaced] == bad
            come = replace(batch, replaced=())
            assert come.ids == (NAMES[taken_by],)
            # the replacement is also drawn as itself in the same epoch, and these draws must differ
            assert same(come, expected[taken_by, visit]) == (not bad)
            assert same(replace(dataset[Visit(index, visit)], replaced=()), come)


def test_bad_clips_in_a_row_are_all_named(broken: Callable[..., LatentDataset]) -> None:
    dataset = broken(3, 4)
    assert visited(dataset, 3) == (NAMES[0], NAMES[3], NAMES[4])
    (first, why), (second, _) = dataset[Visit(3, 0)].replaced
    assert (first, second) == (NAMES[3], NAMES[4])
    assert str(dataset.cache.path(hash_of([NAMES[3], 0]))) in why
    batch = collate([dataset[Visit(k, 0)] for k in (0, 3, 4)])
    assert batch.ids == (NAMES[0],) * 3
    assert [name for name, _ in batch.replaced] == [NAMES[3], NAMES[4], NAMES[4]]
    assert batch.to(torch.device("cpu")).replaced == batch.replaced


def test_a_bad_embedding_matters_only_if_the_caption_is_used(broken: Callable[..., LatentDataset]) -> None:
    whole = broken()
    dropped = [not whole[Visit(1, visit)].prompt_BLD.any() for visit in range(8)]
    assert 0 < sum(dropped) < 8
    dataset = broken(1, part="prompt")
    came = [visited(dataset, 1, visit) for visit in range(8)]
    assert came == [(NAMES[1],) if without else (NAMES[3], NAMES[1]) for without in dropped]


def test_the_order_of_samples_has_no_effect_on_the_replacement(broken: Callable[..., LatentDataset]) -> None:
    dataset = broken(1, 3)
    straight = [visited(dataset, k) for k in range(5)]
    dataset.index = replace(dataset.index, samples=dataset.index.samples[::-1])
    assert [visited(dataset, 4 - k) for k in range(5)] == straight


def test_a_bucket_without_a_good_clip_is_an_error(broken: Callable[..., LatentDataset]) -> None:
    dataset = broken(2)
    with pytest.raises(CacheError, match=r"^bucket 5x64x96: none of its 1 clip can be read; .*checksum is wrong"):
        dataset[Visit(2, 0)]
    assert visited(dataset, 1) == (NAMES[1],)


def test_a_bad_empty_caption_is_an_error(broken: Callable[..., LatentDataset]) -> None:
    """It is used for all clips, so replacing a clip would not help."""
    dataset = broken()
    flip_byte(dataset.cache.path(dataset.index.empty_prompt_key))
    with pytest.raises(CacheError, match="checksum is wrong"):
        [dataset[Visit(k, 0)] for k in range(5)]


@pytest.mark.parametrize("shape", [(32, 2, 8, 12), (32, 3, 12, 8), (16, 3, 8, 12), (3, 32, 8, 12), (32, 3, 8)])
@pytest.mark.fault("data: a cached tensor of a wrong type, shape, or value")
def test_moments_of_another_shape_than_the_bucket_s(
    broken: Callable[..., LatentDataset], shape: tuple[int, ...]
) -> None:
    dataset = broken()
    key = hash_of([NAMES[1], 0])
    dataset.cache.write(key, {"moments_CFHW": torch.zeros(shape)})
    assert visited(dataset, 1) == (NAMES[3], NAMES[1])
    dataset.replace_bad = False
    with pytest.raises(CacheError) as error:
        dataset[Visit(1, 0)]
    says = f"{NAMES[1]}: {dataset.cache.path(key)}: its moments_CFHW is {shape}, not (32, 3, 8, 12); prepare_dataset.py"
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("content", [{"prompt_LD": torch.zeros(31, 32)}, {"other": torch.zeros(32, 32)}])
def test_embeddings_of_another_shape_or_name(
    broken: Callable[..., LatentDataset], content: dict[str, torch.Tensor]
) -> None:
    dataset = broken()
    dataset.caption_dropout = 0.0
    dataset.cache.write(hash_of(["prompt", NAMES[1]]), content)
    assert visited(dataset, 1) == (NAMES[3], NAMES[1])


def test_bad_clips_are_counted_and_reported_once_and_limited(capsys: pytest.CaptureFixture[str]) -> None:
    bad = BadClips(0.25, 8)
    assert bad.count([]) == 0
    assert bad.count([("a", "torn")]) == 1
    assert bad.count([("a", "is not there"), ("b", "lost"), ("a", "torn")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "a: cannot be read, another clip replaces it; torn",
        "b: cannot be read, another clip replaces it; lost",
    ]
    with pytest.raises(UsageError) as error:
        bad.count([("c", "torn")])
    *listed, rule = error.value.problems
    assert listed == ["a: torn", "b: lost", "c: torn"]
    assert rule.startswith("--max_bad_fraction 0.25: 3 of 8 clips cannot be read; ")
    with pytest.raises(UsageError) as error:
        BadClips(0.2, 100).count([(str(k), "torn") for k in range(30)])
    assert error.value.problems[19:21] == ("19: torn", "... and 10 more")


@pytest.mark.parametrize("last", ["c", "d"])
def test_ranks_that_divide_a_sample_must_read_the_same_clip(last: str) -> None:
    ranks: Any = SimpleNamespace(gather=lambda own: [("a",), ("a",), *own, (last,)])
    with pytest.raises(UsageError, match="process 3 has read d in place of c") if last == "d" else nullcontext():
        check_same_clips(ranks, 2, ("c",))


@pytest.mark.fault("numbers: NaN or infinity in a cached tensor")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["video", "prompt"])
def test_numbers_that_are_not_finite_are_found_when_they_are_read(
    broken: Callable[..., LatentDataset], part: str, value: float
) -> None:
    dataset = broken()
    dataset.caption_dropout = 0.0
    sample = dataset.index.samples[1]
    path = dataset.cache.path(sample.video_keys[0] if part == "video" else sample.prompt_key)
    poison(path, value)
    dataset.replace_bad = False
    with pytest.raises(CacheError) as error:
        dataset[Visit(1, 0)]
    assert str(error.value).startswith(f"{NAMES[1]}: {path}: its ")
    assert "holds numbers that are not finite; prepare again" in str(error.value)
    assert path.with_suffix(".damaged").is_file()
    dataset.replace_bad = True
    assert visited(dataset, 1) == (NAMES[3], NAMES[1])


@pytest.mark.fault("numbers: NaN latents of one sample within --max_bad_fraction")
@pytest.mark.parametrize(("workers", "damage"), [(0, flip_byte), (1, poison), (0, poison)])
def test_a_run_replaces_bad_clips_and_counts_them(
    model: Path,
    tensors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workers: int,
    damage: Callable[[Path], None],
) -> None:
    cache = Path(shutil.copytree(tensors, tmp_path / "cache"))
    sample = open_index(cache).samples[1]
    damage(TensorCache(cache).path(sample.video_keys[0]))
    flags = lora_flags(model, cache, tmp_path / "lora", "--load_tensors", "--dataloader_num_workers", workers)
    assert train([*flags, "--max_bad_fraction", "0.2"]) == 0
    counts = [line["bad_clips"] for line in metrics(tmp_path / "lora")]
    assert counts == sorted(counts)
    assert counts[-1] == 1
    assert capsys.readouterr().err.count(f"{sample.id}: cannot be read") == 1
    assert all(loss > 0 for loss in losses(tmp_path / "lora"))


def test_bad_clips_of_all_ranks_are_counted(model: Path, tensors: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(tensors, tmp_path / "cache"))
    for sample in open_index(cache).samples[:2]:
        TensorCache(cache).path(sample.video_keys[0]).unlink()
    flags = lora_flags(model, cache, tmp_path / "lora", "--load_tensors", "--max_bad_fraction", 0.4)
    texts = [finish(rank) for rank in fork_ranks(2, python(LORA_SCRIPT, *flags))]
    found = [text.count("cannot be read, another clip replaces it") for text in texts]
    assert min(found) > 0
    assert [line["bad_clips"] for line in metrics(tmp_path / "lora")][-1] == sum(found)


def test_bad_clips_of_all_ranks_together_are_limited(model: Path, tensors: Path, tmp_path: Path) -> None:
    """In the first epoch each of two ranks reads other clips. One bad clip is allowed, and each rank finds one."""
    cache = Path(shutil.copytree(tensors, tmp_path / "cache"))
    samples = open_index(cache).samples
    order = Order([s.id for s in samples], [s.bucket for s in samples], 2, seed=42)
    read = [[samples[order.batch(step)[rank].index].id for step in range(3)] for rank in range(2)]
    names = sorted(sample.id for sample in samples)
    # The next clip replaces a bad one, so it must be good.
    far = {(name, names[(number + more) % 6]) for number, name in enumerate(names) for more in (2, 3, 4)}
    bad = next(pair for pair in product(*read) if pair in far)
    for sample in samples:
        if sample.id in bad:
            TensorCache(cache).path(sample.video_keys[0]).unlink()
    flags = ("--load_tensors", "--max_bad_fraction", 0.17, "--gradient_accumulation_steps", 1, "--max_train_steps", 3)
    ranks = fork_ranks(2, python(LORA_SCRIPT, *lora_flags(model, cache, tmp_path / "lora", *flags)))
    for rank in ranks:
        text = finish(rank, args.USAGE_EXIT)
        assert "--max_bad_fraction 0.17: 2 of 6 clips cannot be read" in text
        assert all(f"{name}: " in text for name in bad)


def test_too_many_bad_clips_end_the_run(model: Path, tensors: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(tensors, tmp_path / "cache"))
    for sample in open_index(cache).samples[:3]:
        TensorCache(cache).path(sample.video_keys[0]).unlink()
    flags = lora_flags(model, cache, tmp_path / "lora", "--load_tensors", "--max_bad_fraction", 0.34)
    with pytest.raises(UsageError) as error:
        train(flags)
    *listed, rule = error.value.problems
    assert len(listed) == 3
    assert all("does not exist; prepare again" in line for line in listed)
    assert rule.startswith("--max_bad_fraction 0.34: 3 of 6 clips cannot be read")
