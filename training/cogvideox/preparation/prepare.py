"""Encodes a folder of clips and captions into the tensor cache. It can be interrupted and resumed at any point.

``Preparation`` does it in four stages; rank r of R takes items r, r + R, ... of each:

    samples -> plan (one ledger record per file) -> T5 embeddings of captions -> VAE moments of clips -> index.json

For image-to-video, the first frame of every variant of a clip is encoded too. If the data set names an image for the
clip, that image takes its place and is cropped as the clip is. Media files are opened in worker processes only, which
can be killed when a decoder hangs or crashes; this process encodes and writes.
"""

import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.config.buckets import Bucket, make_buckets
from cogvideox.config.flags import DataFlags, EncodeFlags, ModelFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.options import resolutions
from cogvideox.config.prepared_flags import kept_values
from cogvideox.data.cache import CachedSample, CacheIndex, Ledger, TensorCache, hash_of, sole_writer
from cogvideox.data.clips import (
    FAILED,
    KILLED,
    OK,
    UNREADABLE,
    ClipRecipe,
    Variant,
    decode_variant,
    image_refusal,
    image_request,
    is_record,
    max_bad,
    measure_clip,
    plan_clip,
    plan_image,
)
from cogvideox.data.forms.samples import Sample, check_no_missing_images, take_listing
from cogvideox.data.media.workers import Killed, Limits, Workers
from cogvideox.errors import UsageError
from cogvideox.files import stamp_of
from cogvideox.model import encode, models
from cogvideox.model.encode import AsyncCopy
from cogvideox.model.t5_stream import BATCHES_PER_PASS

LEDGER_EVERY = 64  # records per write to the ledger while planning
CHANGED = "has changed while it was prepared; run the same command again"


Draws = tuple[tuple[object, ...], ...]  # one random-number key for the noise on each encoding of a first frame


@dataclass(frozen=True)
class Encoders:
    """The encoders of a pipeline and their settings. They are part of every key in the cache."""

    vae: str
    text_encoder: str
    vae_dtype: str
    text_dtype: str
    tiling: bool
    text_length: int

    @classmethod
    def of(cls, model: ModelFlags, flags: EncodeFlags, geometry: Geometry, device: torch.device) -> "Encoders":
        """Returns the encoders of a pipeline, in the precision of --dtype or the default precision of the device."""
        return cls(
            vae=models.weight_fingerprint(model, "vae"),
            text_encoder=models.text_fingerprint(model),
            vae_dtype=flags.dtype or models.default_dtype(model, "vae", device),
            text_dtype=flags.dtype or models.default_dtype(model, "text_encoder", device),
            tiling=flags.encode_tiling,
            text_length=geometry.max_text_seq_length,
        )

    def video_key(self, content: str, variant: dict[str, Any]) -> str:
        """Returns the cache key of the moments of one variant of a clip.

        Args:
            content: Hash of the file's content.
            variant: The variant's record in the ledger.
        """
        return hash_of(["video", content, variant, self.vae, self.vae_dtype, self.tiling])

    def image_key(self, draws: Draws) -> str:
        """Returns the cache key of the moments of a first frame.

        Args:
            draws: Random-number keys, which contain the hash of the file and how the frame is cropped.
        """
        return hash_of(["image", encode.IMAGE_NOISE, draws, self.vae, self.vae_dtype, self.tiling])

    def prompt_key(self, caption: str) -> str:
        """Returns the cache key of a caption's embedding."""
        return hash_of(["prompt", caption, self.text_encoder, self.text_dtype, self.text_length])


@dataclass(frozen=True)
class Cut:
    """One tensor to encode: a variant of a clip in a bucket, or its first frame. Identical files share one tensor.

    Attributes:
        bucket: The size of the tensor's clip.
        variant: The frames to decode and how they are resized and cropped.
        path: The file to decode.
        stamp: Size and time of the file when it was planned; a file with another stamp is not decoded.
        records: The ledger records of all files that the tensor may be made from.
        draws: Random-number keys of the noise on each encoding of a first frame; empty for a clip.
    """

    bucket: Bucket
    variant: Variant
    path: str
    stamp: list[int]
    records: list[dict[str, Any]]
    draws: Draws = ()

    @property
    def pixels(self) -> int:
        """Returns the number of pixels in all frames that are encoded."""
        return (len(self.draws) or self.bucket.frames) * self.bucket.height * self.bucket.width

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Returns the shape of the tensor."""
        if self.draws:
            return len(self.draws), *geometry.image_shape(self.bucket)
        return geometry.moments_shape(self.bucket)

    def encode(self, vae: Any, frames_FHWC: np.ndarray) -> dict[str, torch.Tensor]:
        """Encodes frames, uint8 (F, H, W, 3), without waiting for a GPU; returns the tensor by its cache name."""
        if self.draws:
            return {"image_moments_KCHW": encode.image_moments(vae, frames_FHWC[0], self.draws)}
        return {"moments_CFHW": encode.video_moments(vae, frames_FHWC)}


def list_buckets(data: DataFlags) -> tuple[Bucket, ...]:
    """Returns the buckets that the flags ask for, except those longer than --max_num_frames."""
    listed = [Bucket(*numbers) for numbers in resolutions(data)]
    buckets = sorted(set(listed)) or make_buckets(data.frame_buckets, data.height_buckets, data.width_buckets)
    return tuple(bucket for bucket in buckets if bucket.frames <= (data.max_num_frames or bucket.frames))


def clip_recipe(data: DataFlags, geometry: Geometry) -> ClipRecipe:
    """Returns how clips are sampled and cropped, from the flags and the model's frame rate."""
    uniform = data.frame_selection == "uniform"
    return ClipRecipe(
        buckets=list_buckets(data),
        fps=None if uniform else data.fps or float(geometry.default_fps),
        frame_selection=data.frame_selection,
        skip_frames_start=data.skip_frames_start,
        skip_frames_end=data.skip_frames_end,
        reshape_mode=data.video_reshape_mode,
        flip_probability=data.random_flip or 0.0,
        variants=data.num_augmentations or 1,
        seed=data.seed,
        max_upscale=data.max_upscale,
        every_bucket=data.bucket_choice == "every",
        reader=data.video_reader,
    )


class Preparation:
    """Prepares one data set into one folder: ``plan``, then ``check``, then ``encode``.

    Attributes:
        state: A Ranks: the rank of this process, the number of ranks, the device and barriers.
        samples: The samples to train on, followed by ``num_validation`` samples to measure the loss on. Every list of
            records is in this order.
        image_variants: How often each first frame is encoded, each time with different noise; 0 without first frames.
    """

    def __init__(
        self,
        model: ModelFlags,
        data: DataFlags,
        flags: EncodeFlags,
        geometry: Geometry,
        folder: Path,
        state: Any,
        image_variants: int = 0,
        need_captions: bool = True,
    ) -> None:
        self.model, self.data, self.flags, self.geometry, self.folder = model, data, flags, geometry, folder
        self.state, self.image_variants = state, image_variants
        self.cache = TensorCache(folder)
        self.ledger = Ledger(folder)
        self.recipe = clip_recipe(data, geometry)
        self.limits = Limits(data.decode_timeout, int(data.decode_memory * 2**30))
        listing = take_listing(data, need_captions)
        self.samples: list[Sample] = listing.samples + listing.validation
        self.num_validation = len(listing.validation)
        self.skipped = listing.skipped
        if image_variants:
            check_no_missing_images(self.samples)

    @cached_property
    def requests(self) -> dict[str, str]:
        """Returns, by path, the ledger's name of each clip: a hash of its stamp at the start and of the clip recipe."""
        return {path: self.recipe.request(path) for path in dict.fromkeys(sample.video for sample in self.samples)}

    @cached_property
    def image_requests(self) -> dict[str, str]:
        """Returns the same for each image that the data set names as a first frame, if first frames are encoded."""
        images = (sample.image for sample in self.samples if sample.image is not None and self.image_variants)
        return {path: image_request(path) for path in dict.fromkeys(images)}

    @cached_property
    def encoders(self) -> Encoders:
        """Returns what clips and captions are encoded with.

        Without --dtype, a folder keeps the precision of its tensors. Otherwise continuing it on a device with another
        default precision would encode everything again.
        """
        here, elsewhere = self._default_encoders()
        if here == elsewhere or self.cache.has(here.prompt_key("")):  # every preparation encodes the empty caption
            return here
        return elsewhere if self.cache.has(elsewhere.prompt_key("")) else here

    def _default_encoders(self) -> tuple[Encoders, Encoders]:
        """Returns the encoders in the default precision of this device, and in that of the other kind of device."""
        here = Encoders.of(self.model, self.flags, self.geometry, self.state.device)
        other = torch.device("cuda" if self.state.device.type == "cpu" else "cpu")
        vae_dtype, text_dtype = (models.default_dtype(self.model, part, other) for part in ("vae", "text_encoder"))
        return here, here if self.flags.dtype else replace(here, vae_dtype=vae_dtype, text_dtype=text_dtype)

    def precision_note(self) -> str | None:
        """Describes the VAE's precision if it differs from the weight files or the device's default, else None."""
        here, elsewhere = self._default_encoders()
        used, device = self.encoders.vae_dtype, self.state.device.type
        if self.encoders != here:
            why = f"like the tensors in {self.folder}, although the default on this device is {here.vae_dtype}"
            return f"encoding in {used}, {why}; --dtype {here.vae_dtype} encodes everything anew"
        if here != elsewhere and device == "cpu":
            stored = elsewhere.vae_dtype
            why = f"not in {stored} as the weights are stored, because many CPUs are much slower at {stored}"
            return f"encoding in {used} on a CPU, {why}; --dtype {stored} changes that"
        return None

    def plan(self) -> list[dict[str, Any]]:
        """Returns the ledger record of every sample, in order. Worker processes probe the files without a record."""
        known = self._known()
        files: list[tuple[str, str, tuple[Any, ...]]] = []
        files += [(request, path, (plan_clip, path, self.recipe)) for path, request in self.requests.items()]
        files += [(request, path, (plan_image, path)) for path, request in self.image_requests.items()]
        todo = [file for file in self.share(files) if not self._settled(known.get(file[0]))]
        results = self.in_workers((job for _, _, job in todo), len(todo), "reading headers")
        batch: list[dict[str, Any]] = []
        for (request, path, _), record in zip(todo, results, strict=True):
            batch.append(self._killed(request, path, record) if isinstance(record, Killed) else record)
            if len(batch) == LEDGER_EVERY:
                self.ledger.append(batch)
                batch = []
        self.ledger.append(batch)
        self.state.wait_for_everyone()
        return self._records()

    def measure(self) -> list[dict[str, Any]]:
        """Returns the size and the number of usable frames of every clip, or why it cannot be read, in order.

        Only headers are read, in worker processes; nothing is written.
        """
        paths = list(self.requests)
        results = self.in_workers(((measure_clip, path, self.recipe) for path in paths), len(paths), "reading headers")
        found = {
            path: self._killed("", path, record) if isinstance(record, Killed) else record
            for path, record in zip(paths, results, strict=True)
        }
        return [found[sample.video] for sample in self.samples]

    def check(self, records: Sequence[dict[str, Any]]) -> None:
        """Checks that enough clips are usable.

        Raises:
            UnusableClips: No clip is usable, or more clips are unusable than --max_bad_fraction allows.
        """
        listed = len(records) - self.num_validation
        parts = [("--data_root", self.data.data_root, "train", records[:listed])]
        if self.num_validation:
            parts.append(("--validation_data_root", self.data.validation_data_root, "measure", records[listed:]))
        for flag, roots, verb, part in parts:
            if not any(record["status"] == OK for record in part):
                raise UnusableClips(f"{flag} {' '.join(roots)}: no clip is left to {verb} on; see the table", records)
        check_bad(records, self.data.max_bad_fraction)

    def encode(
        self, records: Sequence[dict[str, Any]], caption_batch: int = 1
    ) -> tuple[CacheIndex, list[dict[str, Any]]]:
        """Encodes what is missing, captions first, and writes the index.

        Args:
            records: The record of every sample, from ``plan``.
            caption_batch: Captions per forward pass of T5.

        Returns:
            The index, and the final record of every sample.

        Raises:
            UnusableClips: More clips than --max_bad_fraction allows could not be decoded.
        """
        encoders = self.encoders
        if self.state.is_main_process and (note := self.precision_note()):
            tqdm.write(note, file=sys.stderr)
        with self._sole_writer():
            # The main rank may have waited for another job, which has added tensors: no rank looks before it.
            self.state.wait_for_everyone()
            # The work is split before each rank looks for existing tensors. In the other order the ranks would split
            # different lists, because some add tensors while others look, and some items would belong to no rank.
            prompts = missing_captions(self.cache, encoders, self.share(self.captions(records)))
            encode_captions(self.cache, self.model, encoders, prompts, caption_batch, self.state, self.flags.t5_on)
            cuts = self.share(list(self.cuts(records, encoders).items()))
            self._encode_cuts({key: cut for key, cut in cuts if not self.cache.has(key)}, encoders)
            self.state.wait_for_everyone()
            final = self._records()
            self.check(final)
            index = self._index(final, encoders)
            if self.state.is_main_process:
                self._check_complete(index)
                index.save(self.folder)
        self.state.wait_for_everyone()
        return index, final

    def _records(self) -> list[dict[str, Any]]:
        """Returns the ledger record of every sample, in order; the record of its image, if any, is under "image"."""
        known = self._known()
        return [self._record(sample, known) for sample in self.samples]

    def _record(self, sample: Sample, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
        record = recorded(known, self.requests[sample.video], sample.video)
        if record["status"] != OK or sample.image not in self.image_requests:
            return record
        image = recorded(known, self.image_requests[sample.image], sample.image)
        if image["status"] == OK and (reason := image_refusal(record, image)):
            image = image | {"status": FAILED, "reason": reason}
        return record | {"image": image} if image["status"] == OK else image

    def captions(self, records: Sequence[dict[str, Any]]) -> list[str]:
        """Returns the captions to embed without duplicates. The empty one is first."""
        used = (sample.caption for sample, r in zip(self.samples, records, strict=True) if r["status"] == OK)
        return list(dict.fromkeys(["", *used]))

    def cuts(self, records: Sequence[dict[str, Any]], encoders: Encoders) -> dict[str, Cut]:
        """Returns every tensor of clips and first frames that the records need, by cache key."""
        found: dict[str, Cut] = {}
        used = {(r["request"], r.get("image", r)["request"]): r for r in records if r["status"] == OK}
        for record in used.values():
            for cut in record["cuts"]:
                for variant in cut["variants"]:
                    for key, file, frames, draws in self.tensors_of(record, variant, encoders):
                        new = Cut(Bucket(**cut["bucket"]), frames, file["path"], file["stamp"], [], draws)
                        found.setdefault(key, new).records.append(file)
        return found

    def tensors_of(
        self, record: dict[str, Any], variant: dict[str, Any], encoders: Encoders
    ) -> Iterator[tuple[str, dict[str, Any], Variant, Draws]]:
        """Yields what describes the tensor of a clip's variant, then the tensor of its first frame.

        Yields:
            (cache key, ledger record of the file, frames to decode, random-number keys of the noise).
        """
        frames = Variant.from_record(variant)
        yield encoders.video_key(record["content"], variant), record, frames, ()
        if self.image_variants:
            file = record.get("image", record)
            first = frames.first_frame(None if file is record else file)
            drawn = (self.data.seed, file["content"], hash_of(first.record()))
            draws = tuple((*drawn, number) for number in range(self.image_variants))
            yield encoders.image_key(draws), file, first, draws

    def share(self, items: list[Any]) -> list[Any]:
        """Returns this rank's share of a list."""
        return items[self.state.process_index :: self.state.num_processes]

    def in_workers(self, jobs: Iterable[tuple[Any, ...]], total: int, what: str) -> Iterator[Any]:
        """Runs jobs in worker processes, with a progress bar.

        Args:
            jobs: Tuples (function, arguments...).
            total: Number of jobs.
            what: Label of the progress bar.

        Yields:
            The results in the order of the jobs; Killed for a job whose worker was killed or crashed.
        """
        if not total:
            return
        with worker_pool(self.data, self.limits) as workers:
            hidden = not self.state.is_main_process
            for result in tqdm(workers.run(jobs), total=total, desc=what, unit="clip", disable=hidden):
                stopping.unit("clip")
                yield result

    def _known(self) -> dict[str, dict[str, Any]]:
        """Returns the ledger's valid records of the files as they are now, without records that name another path."""
        files = {
            request: path for requests in (self.requests, self.image_requests) for path, request in requests.items()
        }
        records = self.ledger.read(files)
        return {name: record for name, record in records.items() if is_record(record) and record["path"] == files[name]}

    def _settled(self, record: dict[str, Any] | None) -> bool:
        """Returns whether a file need not be probed again."""
        if record is None or record["status"] == UNREADABLE:
            return False
        return record["status"] != KILLED or record.get("limits") == self._limits()

    def _limits(self) -> list[float]:
        return [self.limits.seconds, self.limits.memory]

    def _killed(self, request: str, path: str, killed: Killed) -> dict[str, Any]:
        status = UNREADABLE if killed.transient else KILLED
        reason = {"status": status, "reason": killed.reason, "limits": self._limits()}
        return {"request": request, "path": path, **reason}

    @contextmanager
    def _sole_writer(self) -> Iterator[None]:
        if not self.state.is_main_process:
            yield
            return
        with sole_writer(self.folder, tqdm.write):
            yield

    def _encode_cuts(self, missing: dict[str, Cut], encoders: Encoders) -> None:
        if not missing:
            return
        with models.video_encoder(self.model, encoders.vae_dtype, self.state.device, encoders.tiling) as vae:
            for key, cut, arriving in one_behind(self._start_cuts(missing, vae, encoders.tiling)):
                tensors = arriving.wait()
                if not all(torch.isfinite(moments).all() for moments in tensors.values()):
                    rule = f"--dtype {encoders.vae_dtype}: the VAE overflows on {cut.path}; give bf16 or fp32"
                    raise UsageError(rule)
                self.cache.write(key, tensors)

    def _start_cuts(self, missing: dict[str, Cut], vae: Any, tiling: bool) -> Iterator[tuple[str, Cut, AsyncCopy]]:
        """Decodes cuts in workers and starts to encode them; yields (key, cut, copy in progress) if they decode."""
        jobs = ((decode_variant, cut.path, cut.variant, cut.stamp) for cut in missing.values())
        results = self.in_workers(jobs, len(missing), "encoding clips")
        for (key, cut), frames in zip(missing.items(), results, strict=True):
            if isinstance(frames, (str, Killed)):
                self._give_up(cut, frames)
                continue
            with room_for(f"--encode_tiling {tiling}".lower(), f"to encode {cut.bucket}", no_room(tiling)):
                arriving = AsyncCopy(cut.encode(vae, frames))
            yield key, cut, arriving

    def _give_up(self, cut: Cut, reason: str | Killed) -> None:
        """Records in the ledger that the files of a cut cannot be used."""
        changed = any(stamp_of(record["path"]) != record["stamp"] for record in cut.records)
        for record in cut.records:
            if isinstance(reason, Killed):
                end = self._killed(record["request"], record["path"], reason)
            elif changed:
                end = {"status": UNREADABLE, "reason": CHANGED}
            else:
                end = {"status": FAILED, "reason": reason}
            self.ledger.append([{name: value for name, value in record.items() if name != "cuts"} | end])

    def _check_complete(self, index: CacheIndex) -> None:
        """Checks that every tensor of the index exists.

        Raises:
            UsageError: A tensor is missing, because another job has moved it away or has given up its clip.
        """
        missing = sum(not self.cache.has(key) for key in index.keys)
        if missing:
            raise UsageError(f"{self.folder}: {missing} tensors went missing meanwhile; run the same command again")

    def _index(self, records: Sequence[dict[str, Any]], encoders: Encoders) -> CacheIndex:
        listed = len(self.samples) - self.num_validation
        pairs = list(zip(self.samples, records, strict=True))
        samples, validation = (
            tuple(entry for sample, record in part for entry in self.cached_samples(sample, record, encoders))
            for part in (pairs[:listed], pairs[listed:])
        )
        return CacheIndex(
            samples=samples,
            empty_prompt_key=encoders.prompt_key(""),
            fps=self.recipe.fps or float(self.geometry.default_fps),
            vae=encoders.vae,
            text_encoder=encoders.text_encoder,
            dtypes={"vae": encoders.vae_dtype, "text_encoder": encoders.text_dtype},
            text_length=encoders.text_length,
            validation=validation,
            image_variants=self.image_variants,
            recipe=kept_values(
                self.data,
                self.flags,
                fps=self.recipe.fps,
                random_flip=self.recipe.flip_probability,
                num_augmentations=self.recipe.variants,
            ),
        )

    def cached_samples(self, sample: Sample, record: dict[str, Any], encoders: Encoders) -> Iterator[CachedSample]:
        """Yields a sample's entries in the index: one per bucket, none if its clip cannot be used."""
        cuts = record["cuts"] if record["status"] == OK else []
        for cut in cuts:
            bucket = Bucket(**cut["bucket"])
            tensors = [list(self.tensors_of(record, variant, encoders)) for variant in cut["variants"]]
            yield CachedSample(
                id=sample.id if len(cuts) == 1 else f"{sample.id}@{bucket}",
                caption=sample.caption,
                bucket=bucket,
                video_keys=tuple(of_clip[0][0] for of_clip in tensors),
                prompt_key=encoders.prompt_key(sample.caption),
                image_keys=tuple(key for of_clip in tensors for key, *_ in of_clip[1:]),
            )


def recorded(known: dict[str, dict[str, Any]], request: str, path: str) -> dict[str, Any]:
    """Returns the ledger record of a file. A file without one has changed since the preparation began."""
    return known.get(request, {"request": request, "path": path, "status": UNREADABLE, "reason": CHANGED})


def missing_captions(cache: TensorCache, encoders: Encoders, captions: Sequence[str]) -> list[str]:
    """Returns the captions whose embeddings are not in the cache, without duplicates."""
    return [text for text in dict.fromkeys(captions) if not cache.has(encoders.prompt_key(text))]


def encode_captions(
    cache: TensorCache,
    model: ModelFlags,
    encoders: Encoders,
    captions: Sequence[str],
    batch: int,
    state: Any,
    t5_on: str = "auto",
) -> None:
    """Embeds captions into the cache. T5 is loaded only if there are captions.

    Args:
        cache: Where the embeddings are written.
        model: The pipeline that T5 belongs to.
        encoders: The precision and the text length.
        captions: The captions to embed.
        batch: Captions per forward pass.
        state: A Ranks: the device, and which process shows the progress bar.
        t5_on: Where the weights of T5 are kept: "device", "host" or "auto".

    Raises:
        UsageError: T5 does not fit on the device, or it overflows in its precision.
    """
    if not captions:
        return
    place = models.resolve_t5_on(model, encoders.text_dtype, state.device, t5_on)
    at_once = batch * (BATCHES_PER_PASS if place == "host" else 1)
    fix = "give --t5_on host" if place == "device" else "end what else uses it"
    room = room_for(f"--t5_on {t5_on}", "for T5", fix)
    with room, models.text_encoder(model, encoders.text_dtype, state.device, place, batch) as (tokenizer, encoder):
        bar = tqdm(total=len(captions), desc="encoding captions", unit="caption", disable=not state.is_main_process)
        for start in range(0, len(captions), at_once):
            texts = captions[start : start + at_once]
            embeds_BLD = encode.prompt_embeds(tokenizer, encoder, texts, encoders.text_length)
            for text, embed in zip(texts, embeds_BLD, strict=True):
                if not torch.isfinite(embed).all():
                    raise UsageError(f"--dtype {encoders.text_dtype}: T5 overflows on {text!r}; give bf16 or fp32")
                cache.write(encoders.prompt_key(text), {"prompt_LD": embed.clone()})
            stopping.unit("caption")
            bar.update(len(texts))
        bar.close()


Item = TypeVar("Item")


def one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """Yields each item after the next one was started, so that the device computes while this one is stored."""
    begun: deque[Item] = deque()
    for item in items:
        begun.append(item)
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


@contextmanager
def room_for(flag: str, what: str, fix: str) -> Iterator[None]:
    """Turns an out-of-memory error of the device into a UsageError that names a flag and a fix."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{flag}: the device has too little free memory {what}; {fix}") from error


def no_room(tiling: bool) -> str:
    """Returns what helps if a clip does not fit on the device."""
    if tiling:
        return "give smaller buckets, or end what else uses it"
    return "give --encode_tiling true (other latents than the model was trained on), or smaller buckets"


def worker_pool(data: DataFlags, limits: Limits) -> Workers:
    """Returns worker processes for media files: at least one, because this process never decodes."""
    return Workers(max(1, data.dataloader_num_workers), limits)


def other_encoders(index: CacheIndex, encoders: Encoders) -> list[str]:
    """Names the encoders with which a cache was made and that differ from the model's."""
    pairs = {
        "VAE": (index.vae, encoders.vae),
        "text encoder": (index.text_encoder, encoders.text_encoder),
        "text length": (index.text_length, encoders.text_length),
    }
    return [name for name, (then, now) in pairs.items() if then != now]


class UnusableClips(UsageError):
    """Too many clips cannot be used. ``records`` has the record of every sample, for the table of causes."""

    def __init__(self, problem: str, records: Sequence[dict[str, Any]]) -> None:
        super().__init__(problem)
        self.records = records


def check_bad(records: Sequence[dict[str, Any]], max_bad_fraction: float) -> None:
    """Checks the number of bad clips.

    Raises:
        UnusableClips: More clips are bad than ``max_bad_fraction`` allows.
    """
    if count := too_many_bad(records, max_bad_fraction):
        rule = f"--max_bad_fraction {max_bad_fraction:g}: {count} of {len(records)} clips cannot be used"
        fix = f"fix or remove them, see the table (ledger.jsonl has all), or continue without: {allowing(records)}"
        raise UnusableClips(f"{rule}; {fix}", records)


def too_many_bad(records: Sequence[dict[str, Any]], max_bad_fraction: float) -> int:
    """Returns how many clips cannot be used if that is more than allowed, else 0."""
    bad = sum(record["status"] != OK for record in records)
    return bad if bad > max_bad(max_bad_fraction, len(records)) else 0


def allowing(records: Sequence[dict[str, Any]]) -> str:
    """Returns the flag that allows as many bad clips as there are."""
    bad = sum(record["status"] != OK for record in records)
    return f"--max_bad_fraction {math.ceil(bad / len(records) * 1000) / 1000:g}"
