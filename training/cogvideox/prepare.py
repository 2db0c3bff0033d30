"""A folder of clips and captions into the cache: planned, reported, encoded, indexed. Resumable at any point.

samples -> plans (ledger) -> table -> T5 embeddings, T5 freed -> VAE moments -> index. Rank r takes samples r, r+R, ...
Decoding runs in worker processes that never import torch; this process only encodes and writes.
"""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogvideox import encode, models
from cogvideox.args import DataFlags, EncodeFlags, ModelFlags
from cogvideox.data.buckets import Bucket, make_buckets
from cogvideox.data.cache import (
    CachedSample,
    CacheIndex,
    Ledger,
    TensorCache,
    hash_of,
    sole_writer,
)
from cogvideox.data.clips import FAILED, OK, UNREADABLE, ClipRecipe, Variant, decode_variant, plan_clip
from cogvideox.data.index import read_samples
from cogvideox.data.transforms import scale, stretch
from cogvideox.errors import UsageError
from cogvideox.files import remove_stale_temporaries
from cogvideox.geometry import Geometry

LEDGER_EVERY = 64  # records written to the ledger at once while planning
RETRY = {"status": UNREADABLE}
SHOWN = 20  # bad clips listed in a message


@dataclass(frozen=True)
class Encoders:
    """What clips and captions are encoded with: part of every key."""

    vae: str
    text_encoder: str
    vae_dtype: str
    text_dtype: str
    tiling: bool
    text_length: int

    @classmethod
    def of(cls, model: ModelFlags, flags: EncodeFlags, geometry: Geometry) -> "Encoders":
        """The encoders of a pipeline, in the precision asked for or stored."""
        return cls(
            vae=models.fingerprint(model, "vae"),
            text_encoder=models.text_fingerprint(model),
            vae_dtype=flags.dtype or models.stored_dtype(model, "vae"),
            text_dtype=flags.dtype or models.stored_dtype(model, "text_encoder"),
            tiling=flags.encode_tiling,
            text_length=geometry.max_text_seq_length,
        )

    def video_key(self, content: str, variant: dict[str, Any]) -> str:
        """The key of one variant's moments; ``variant`` as in the ledger."""
        return hash_of(["video", content, variant, self.vae, self.vae_dtype, self.tiling])

    def prompt_key(self, caption: str) -> str:
        """The key of a caption's embedding."""
        return hash_of(["prompt", caption, self.text_encoder, self.text_dtype, self.text_length])


def clip_recipe(data: DataFlags, geometry: Geometry) -> ClipRecipe:
    """How clips are cut, from the flags and the model's frame rate."""
    frames = [count for count in data.frame_buckets if count <= (data.max_num_frames or count)]
    uniform = data.frame_selection == "uniform"
    return ClipRecipe(
        buckets=make_buckets(frames, data.height_buckets, data.width_buckets),
        fps=None if uniform else data.fps or float(geometry.default_fps),
        frame_selection=data.frame_selection,
        skip_frames_start=data.skip_frames_start,
        skip_frames_end=data.skip_frames_end,
        reshape_mode=data.video_reshape_mode,
        flip_probability=data.random_flip or 0.0,
        variants=data.num_augmentations or 1,
        seed=data.seed,
    )


class Preparation:
    """One preparation of a data set into a folder.

    ``state`` is a Ranks: rank, number of ranks, device, barrier.
    """

    def __init__(
        self, model: ModelFlags, data: DataFlags, flags: EncodeFlags, geometry: Geometry, folder: Path, state: Any
    ) -> None:
        self.model, self.data, self.flags, self.geometry, self.folder = model, data, flags, geometry, folder
        self.state = state
        self.cache = TensorCache(folder)
        self.ledger = Ledger(folder)
        self.recipe = clip_recipe(data, geometry)
        self.samples = read_samples(data)

    def plan(self) -> list[dict[str, Any]]:
        """The ledger record of every sample, in order; files that have none yet are probed, in workers."""
        known = self.ledger.read()
        paths = [sample.video for sample in self.samples]
        mine = self._share(list(dict.fromkeys(paths)))
        todo = [path for path in mine if known.get(self.recipe.request(path), RETRY)["status"] == UNREADABLE]
        jobs = ((plan_clip, path, self.recipe) for path in todo)
        batch: list[dict[str, Any]] = []
        for record in self._in_workers(jobs, len(todo), "reading headers"):
            batch.append(record)
            if len(batch) == LEDGER_EVERY:
                self.ledger.append(batch)
                batch = []
        self.ledger.append(batch)
        self.state.wait_for_everyone()
        return self._records()

    def encode(self, records: Sequence[dict[str, Any]], caption_batch: int = 1) -> CacheIndex:
        """Encodes what is missing, T5 first, and writes the index.

        Raises:
            UsageError: more clips than --max_bad_fraction could not be decoded.
        """
        encoders = Encoders.of(self.model, self.flags, self.geometry)
        with self._sole_writer():
            self.state.wait_for_everyone()  # main may have waited for another job: all look at the same state
            remove_stale_temporaries(self.folder)
            captions = [sample.caption for sample, r in zip(self.samples, records, strict=True) if r["status"] == OK]
            missing_prompts = self._share(missing_captions(self.cache, encoders, ["", *captions]))
            missing_clips = dict(self._share(list(self._missing_clips(records, encoders).items())))
            self.state.wait_for_everyone()  # nobody writes before everybody has looked, else the shares do not fit
            encode_captions(self.cache, self.model, encoders, missing_prompts, caption_batch, self.state)
            self._encode_clips(missing_clips, encoders)
            self.state.wait_for_everyone()
        records = self._records()
        check_bad(records, self.data.max_bad_fraction)
        index = self._index(records, encoders)
        if self.state.is_main_process:
            index.save(self.folder)
        self.state.wait_for_everyone()
        return index

    def report(self, records: Sequence[dict[str, Any]], with_bytes: bool = False) -> str:
        """Clips per bucket and what becomes of them; what inference makes of frame counts that are not as usual."""
        cached = None
        if with_bytes:
            records = self._records()
            cached = cached_bytes(self.cache, Encoders.of(self.model, self.flags, self.geometry))
        return "\n".join([table(records, cached), *self._frame_notes(records)])

    def _frame_notes(self, records: Sequence[dict[str, Any]]) -> Iterator[str]:
        for frames in sorted({record["bucket"]["frames"] for record in records if record["status"] == OK}):
            made = self.geometry.inference_frames(frames)
            if made != frames or frames % self.geometry.temporal_compression == 0:
                latents = self.geometry.latent_frames(frames)
                yield f"{frames} frames are {latents} latent frames, of which inference makes {made} frames"

    def _records(self) -> list[dict[str, Any]]:
        known = self.ledger.read()
        return [known[self.recipe.request(sample.video)] for sample in self.samples]

    @contextmanager
    def _sole_writer(self) -> Iterator[None]:
        if not self.state.is_main_process:
            yield
            return
        with sole_writer(self.folder, tqdm.write):
            yield

    def _share(self, items: list[Any]) -> list[Any]:
        """This rank's part of a list."""
        return items[self.state.process_index :: self.state.num_processes]

    def _missing_clips(
        self, records: Sequence[dict[str, Any]], encoders: Encoders
    ) -> dict[str, tuple[Variant, list[dict[str, Any]]]]:
        """By key: a variant that is not in the cache, and the records of the clips that have it (copies share keys)."""
        missing: dict[str, tuple[Variant, list[dict[str, Any]]]] = {}
        for record in records:
            for variant in record.get("variants", ()):
                key = encoders.video_key(record["content"], variant)
                if not self.cache.has(key):
                    missing.setdefault(key, (Variant.from_record(variant), []))[1].append(record)
        return missing

    def _encode_clips(self, missing: dict[str, tuple[Variant, list[dict[str, Any]]]], encoders: Encoders) -> None:
        if not missing:
            return
        with models.video_encoder(self.model, encoders.vae_dtype, self.state.device, encoders.tiling) as vae:
            jobs = ((decode_variant, Path(record["path"]), variant) for variant, (record, *_) in missing.values())
            results = self._in_workers(jobs, len(missing), "encoding clips")
            for (key, (_, copies)), frames in zip(missing.items(), results, strict=True):
                if isinstance(frames, str):
                    failure = {"status": FAILED, "reason": frames, "variants": []}
                    self.ledger.append({**record, **failure} for record in copies)
                    continue
                moments = encode.video_moments(vae, frames)
                if not torch.isfinite(moments).all():
                    rule = f"--dtype {encoders.vae_dtype}: the VAE overflows on {copies[0]['path']}; give bf16 or fp32"
                    raise UsageError(rule)
                self.cache.write(key, {"moments_CFHW": moments})

    def _index(self, records: Sequence[dict[str, Any]], encoders: Encoders) -> CacheIndex:
        samples = tuple(
            CachedSample(
                id=sample.id,
                caption=sample.caption,
                bucket=Bucket(**record["bucket"]),
                video_keys=tuple(encoders.video_key(record["content"], v) for v in record["variants"]),
                prompt_key=encoders.prompt_key(sample.caption),
            )
            for sample, record in zip(self.samples, records, strict=True)
            if record["status"] == OK
        )
        if not samples:
            raise UsageError(f"--data_root {self.data.data_root}: no clip is left to train on; see the table")
        return CacheIndex(
            samples=samples,
            empty_prompt_key=encoders.prompt_key(""),
            fps=self.recipe.fps or float(self.geometry.default_fps),
            vae=encoders.vae,
            text_encoder=encoders.text_encoder,
            dtypes={"vae": encoders.vae_dtype, "text_encoder": encoders.text_dtype},
            text_length=encoders.text_length,
        )

    def _in_workers(self, jobs: Iterable[tuple[Any, ...]], total: int, what: str) -> Iterator[Any]:
        """The jobs' results in order, from worker processes, with a progress bar."""
        hidden = not self.state.is_main_process or total == 0
        with worker_pool(self.data) as pool:
            results = run_in_order(pool, jobs, ahead=2 * num_workers(self.data))
            yield from tqdm(results, total=total, desc=what, unit="clip", disable=hidden)


def missing_captions(cache: TensorCache, encoders: Encoders, captions: Sequence[str]) -> list[str]:
    """The captions whose embeddings are not in the cache, each once."""
    return [text for text in dict.fromkeys(captions) if not cache.has(encoders.prompt_key(text))]


def encode_captions(
    cache: TensorCache, model: ModelFlags, encoders: Encoders, captions: Sequence[str], batch: int, state: Any
) -> None:
    """Embeds captions into the cache; T5 is loaded only if there are any."""
    if not captions:
        return
    with models.text_encoder(model, encoders.text_dtype, state.device) as (tokenizer, encoder):
        bar = tqdm(total=len(captions), desc="encoding captions", unit="caption", disable=not state.is_main_process)
        for start in range(0, len(captions), batch):
            texts = captions[start : start + batch]
            embeds_BLD = encode.prompt_embeds(tokenizer, encoder, texts, encoders.text_length)
            if not torch.isfinite(embeds_BLD).all():
                raise UsageError(f"--dtype {encoders.text_dtype}: T5 overflows on {texts}; give bf16 or fp32")
            for text, embed in zip(texts, embeds_BLD, strict=True):
                cache.write(encoders.prompt_key(text), {"prompt_LD": embed.clone()})
            bar.update(len(texts))
        bar.close()


def worker_pool(data: DataFlags) -> ProcessPoolExecutor:
    """Processes for media files; spawned, so that they hold neither torch nor the device."""
    return ProcessPoolExecutor(num_workers(data), multiprocessing.get_context("spawn"))


def num_workers(data: DataFlags) -> int:
    """Processes that decode: decoding never runs in this one."""
    return max(1, data.dataloader_num_workers)


def run_in_order(pool: ProcessPoolExecutor, jobs: Iterable[tuple[Any, ...]], ahead: int) -> Iterator[Any]:
    """Results of (function, arguments...) in order, with at most ``ahead`` jobs waiting: decoded clips are large."""
    jobs = iter(jobs)
    queue: list[tuple[Future[Any], tuple[Any, ...]]] = [(pool.submit(*job), job) for job in islice(jobs, ahead)]
    while queue:
        future, job = queue.pop(0)
        try:
            result = future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"a worker process died at or just after {job[1]}; remove that clip and run again"
            ) from None
        queue += [(pool.submit(*job), job) for job in islice(jobs, 1)]
        yield result


def bad_clips(records: Iterable[dict[str, Any]]) -> list[str]:
    """file: reason, of every clip that cannot be used."""
    return [f"{record['path']}: {record['reason']}" for record in records if record["status"] != OK]


def check_bad(records: Sequence[dict[str, Any]], max_bad_fraction: float) -> None:
    """Raises UsageError where more clips are bad than allowed."""
    bad = bad_clips(records)
    if len(bad) <= max_bad_fraction * len(records):
        return
    more = [f"... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    rule = (
        f"--max_bad_fraction {max_bad_fraction:g}: {len(bad)} of {len(records)} clips cannot be used; "
        f"mend or remove them, or allow it with --max_bad_fraction {len(bad) / len(records):.3g}"
    )
    raise UsageError([*bad[:SHOWN], *more, rule])


def table(records: Sequence[dict[str, Any]], cached: Callable[[dict[str, Any]], int] | None = None) -> str:
    """Clips per bucket, what is done to them, what was dropped and why; bytes where ``cached`` tells them."""
    rows = [("bucket", "clips", "variants", "upscaled", "stretched", *(["MiB"] if cached else []))]
    good = [record for record in records if record["status"] == OK]
    for bucket in sorted({Bucket(**record["bucket"]) for record in good}):
        inside = [record for record in good if Bucket(**record["bucket"]) == bucket]
        fits = [Variant.from_record(variant).fit for record in inside for variant in record["variants"]]
        upscaled = sum(record_scale(record) > 1.0 for record in inside)
        stretched = max(record_stretch(record) for record in inside)
        size = [f"{sum(map(cached, inside)) / 2**20:.1f}"] if cached else []
        rows.append((str(bucket), str(len(inside)), str(len(fits)), str(upscaled), f"{stretched - 1:.0%}", *size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    dropped = Counter(record["status"] for record in records if record["status"] != OK)
    lines += [f"{count} {status}" for status, count in dropped.items()]
    lines += [f"  {text}" for text in bad_clips(records)[:SHOWN]]
    return "\n".join(lines)


def record_scale(record: dict[str, Any]) -> float:
    """How far a clip is enlarged; 1 or less: not at all."""
    return scale(Variant.from_record(record["variants"][0]).fit, record["source"]["height"], record["source"]["width"])


def record_stretch(record: dict[str, Any]) -> float:
    """How far a clip's aspect ratio is changed; 1: not at all."""
    return stretch(
        Variant.from_record(record["variants"][0]).fit, record["source"]["height"], record["source"]["width"]
    )


def cached_bytes(cache: TensorCache, encoders: Encoders) -> Callable[[dict[str, Any]], int]:
    """A function that tells the bytes of a record's tensors in the cache."""

    def size(record: dict[str, Any]) -> int:
        keys = (encoders.video_key(record["content"], variant) for variant in record["variants"])
        return sum(cache.path(key).stat().st_size for key in keys if cache.has(key))

    return size
