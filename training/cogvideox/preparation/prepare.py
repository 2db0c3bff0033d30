"""A folder of clips and captions into the cache: planned, encoded, indexed. Resumable at any point.

samples -> plans (ledger) -> T5 embeddings, T5 freed -> VAE moments -> index. Rank r takes samples r, r+R, ...
For image-to-video the frame that each variant of a clip begins with is encoded too, or an image that the data set
names, cut as the clip is.
Media files are opened in worker processes only, which may be killed; this process only encodes and writes.
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
from cogvideox.data.forms.samples import Sample, check_first_frames, take_listing
from cogvideox.data.media.workers import Killed, Limits, Workers
from cogvideox.errors import UsageError
from cogvideox.files import stamp_of
from cogvideox.model import encode, models
from cogvideox.model.encode import AsyncCopy
from cogvideox.model.t5_stream import CAPTIONS_A_PASS

LEDGER_EVERY = 64  # records written to the ledger at once while planning
CHANGED = "has changed while it was prepared; run the same command again"


Draws = tuple[tuple[object, ...], ...]  # what the noise on each encoding of a first frame is a function of


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
    def of(cls, model: ModelFlags, flags: EncodeFlags, geometry: Geometry, device: torch.device) -> "Encoders":
        """The encoders of a pipeline, in the precision asked for, or in the default one of the device."""
        return cls(
            vae=models.fingerprint(model, "vae"),
            text_encoder=models.text_fingerprint(model),
            vae_dtype=flags.dtype or models.default_dtype(model, "vae", device),
            text_dtype=flags.dtype or models.default_dtype(model, "text_encoder", device),
            tiling=flags.encode_tiling,
            text_length=geometry.max_text_seq_length,
        )

    def video_key(self, content: str, variant: dict[str, Any]) -> str:
        """The key of one variant's moments; ``variant`` as in the ledger."""
        return hash_of(["video", content, variant, self.vae, self.vae_dtype, self.tiling])

    def image_key(self, draws: Draws) -> str:
        """The key of the moments of a first frame; the draws name its file's content and how it is cut."""
        return hash_of(["image", encode.IMAGE_NOISE, draws, self.vae, self.vae_dtype, self.tiling])

    def prompt_key(self, caption: str) -> str:
        """The key of a caption's embedding."""
        return hash_of(["prompt", caption, self.text_encoder, self.text_dtype, self.text_length])


@dataclass(frozen=True)
class Cut:
    """One tensor to be: a variant of a clip in a bucket, or its first frame. Copies of a file share it."""

    bucket: Bucket
    variant: Variant
    path: str
    stamp: list[int]
    records: list[dict[str, Any]]  # of the files that it may be made from
    draws: Draws = ()  # of a first frame

    @property
    def pixels(self) -> int:
        """Pixels of all frames that are encoded."""
        return (len(self.draws) or self.bucket.frames) * self.bucket.height * self.bucket.width

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """That of the tensor."""
        if self.draws:
            return len(self.draws), *geometry.image_shape(self.bucket)
        return geometry.moments_shape(self.bucket)

    def encode(self, vae: Any, frames_FHWC: np.ndarray) -> dict[str, torch.Tensor]:
        """The tensor by its name in the cache, from the decoded frames; a GPU is not waited for."""
        if self.draws:
            return {"image_moments_KCHW": encode.image_moments(vae, frames_FHWC[0], self.draws)}
        return {"moments_CFHW": encode.video_moments(vae, frames_FHWC)}


def list_buckets(data: DataFlags) -> tuple[Bucket, ...]:
    """The buckets that the flags ask for, none longer than --max_num_frames."""
    listed = [Bucket(*numbers) for numbers in resolutions(data)]
    buckets = sorted(set(listed)) or make_buckets(data.frame_buckets, data.height_buckets, data.width_buckets)
    return tuple(bucket for bucket in buckets if bucket.frames <= (data.max_num_frames or bucket.frames))


def clip_recipe(data: DataFlags, geometry: Geometry) -> ClipRecipe:
    """How clips are cut, from the flags and the model's frame rate."""
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
    """One preparation of a data set into a folder.

    ``state`` is a Ranks: rank, number of ranks, device, barrier. ``samples`` are those to train on, then the
    ``num_validation`` ones to measure on; records are in their order. ``image_variants`` is how often each first frame
    is encoded, with noise of its own: 0 without first frames.
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
            check_first_frames(self.samples)

    @cached_property
    def requests(self) -> dict[str, str]:
        """By path: the name of the recipe applied to the file as it was when this preparation began."""
        return {path: self.recipe.request(path) for path in dict.fromkeys(sample.video for sample in self.samples)}

    @cached_property
    def image_requests(self) -> dict[str, str]:
        """The same of the files of first frames, where they are encoded and the data set names them."""
        images = (sample.image for sample in self.samples if sample.image is not None and self.image_variants)
        return {path: image_request(path) for path in dict.fromkeys(images)}

    @cached_property
    def encoders(self) -> Encoders:
        """What clips and captions are encoded with.

        Without --dtype a folder keeps the precision of its tensors, so that nothing is encoded anew where it is
        continued on a device with another default.
        """
        here, elsewhere = self._default_encoders()
        if here == elsewhere or self.cache.has(here.prompt_key("")):  # every preparation encodes the empty caption
            return here
        return elsewhere if self.cache.has(elsewhere.prompt_key("")) else here

    def _default_encoders(self) -> tuple[Encoders, Encoders]:
        """The encoders in the default precision of this device, and in that of the other kind of device."""
        here = Encoders.of(self.model, self.flags, self.geometry, self.state.device)
        other = torch.device("cuda" if self.state.device.type == "cpu" else "cpu")
        vae_dtype, text_dtype = (models.default_dtype(self.model, part, other) for part in ("vae", "text_encoder"))
        return here, here if self.flags.dtype else replace(here, vae_dtype=vae_dtype, text_dtype=text_dtype)

    def precision_note(self) -> str | None:
        """A line on the precision of the VAE where it is not that of the weight files, or not the device's default."""
        here, elsewhere = self._default_encoders()
        used, device = self.encoders.vae_dtype, self.state.device.type
        if self.encoders != here:
            why = f"as the tensors that {self.folder} has, although the default on this device is {here.vae_dtype}"
            return f"encoding in {used}, {why}; --dtype {here.vae_dtype} encodes everything anew"
        if here != elsewhere and device == "cpu":
            stored = elsewhere.vae_dtype
            why = f"not in {stored} as the weights are stored, because many CPUs are much slower at {stored}"
            return f"encoding in {used} on a CPU, {why}; --dtype {stored} changes that"
        return None

    def plan(self) -> list[dict[str, Any]]:
        """The ledger record of every sample, in order; files that have none yet are probed, in workers."""
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
        """A record of every sample, in order, with the size of its clip and the frames that it can give, or the reason
        why it cannot be read. Headers are read, in workers; nothing is written.
        """
        paths = list(self.requests)
        results = self.in_workers(((measure_clip, path, self.recipe) for path in paths), len(paths), "reading headers")
        found = {
            path: self._killed("", path, record) if isinstance(record, Killed) else record
            for path, record in zip(paths, results, strict=True)
        }
        return [found[sample.video] for sample in self.samples]

    def check(self, records: Sequence[dict[str, Any]]) -> None:
        """Raises UnusableClips if no clip is left, or if more are bad than --max_bad_fraction allows."""
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
        """Encodes what is missing, T5 first, and writes the index; returns it and what became of each sample.

        Raises:
            UnusableClips: more clips than --max_bad_fraction could not be decoded.
        """
        encoders = self.encoders
        if self.state.is_main_process and (note := self.precision_note()):
            tqdm.write(note, file=sys.stderr)
        with self._sole_writer():
            self.state.wait_for_everyone()  # main may have waited for another job: all look at the same state
            # Shared out before looking at what is there, because that changes while ranks look.
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
        """The ledger's record of every sample, in order, with that of its image under "image" if it has one."""
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
        """The captions to embed, each once: the empty one first."""
        used = (sample.caption for sample, r in zip(self.samples, records, strict=True) if r["status"] == OK)
        return list(dict.fromkeys(["", *used]))

    def cuts(self, records: Sequence[dict[str, Any]], encoders: Encoders) -> dict[str, Cut]:
        """By key: every tensor of clips that the records ask for."""
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
        """(key, record of the file, frames of it, noises) of a variant of a clip, then of its first frame."""
        frames = Variant.from_record(variant)
        yield encoders.video_key(record["content"], variant), record, frames, ()
        if self.image_variants:
            file = record.get("image", record)
            first = frames.first_frame(None if file is record else file)
            drawn = (self.data.seed, file["content"], hash_of(first.record()))
            draws = tuple((*drawn, number) for number in range(self.image_variants))
            yield encoders.image_key(draws), file, first, draws

    def share(self, items: list[Any]) -> list[Any]:
        """This rank's part of a list."""
        return items[self.state.process_index :: self.state.num_processes]

    def in_workers(self, jobs: Iterable[tuple[Any, ...]], total: int, what: str) -> Iterator[Any]:
        """The jobs' results in order, from worker processes, with a progress bar; Killed in place of a worker's end."""
        if not total:
            return
        with worker_pool(self.data, self.limits) as workers:
            hidden = not self.state.is_main_process
            for result in tqdm(workers.run(jobs), total=total, desc=what, unit="clip", disable=hidden):
                stopping.unit("clip")
                yield result

    def _known(self) -> dict[str, dict[str, Any]]:
        """What the ledger has on the files as they are; not a record that leads to another file than its request."""
        files = {
            request: path for requests in (self.requests, self.image_requests) for path, request in requests.items()
        }
        records = self.ledger.read(files)
        return {name: record for name, record in records.items() if is_record(record) and record["path"] == files[name]}

    def _settled(self, record: dict[str, Any] | None) -> bool:
        """Whether a file need not be looked at again."""
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
        """(key, cut, tensors on their way) of every cut that decodes."""
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
        """Writes down that the files of a cut cannot be used."""
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
        """Raises UsageError if a tensor is not there: another job has set it aside, or given its clip up."""
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
        """A sample's entries in the index: one a bucket, none if its clip cannot be used."""
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
    """The ledger's record of a file; where it has none, the file has changed since its request was made."""
    return known.get(request, {"request": request, "path": path, "status": UNREADABLE, "reason": CHANGED})


def missing_captions(cache: TensorCache, encoders: Encoders, captions: Sequence[str]) -> list[str]:
    """The captions whose embeddings are not in the cache, each once."""
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
    """Embeds captions into the cache, ``batch`` at a time; T5 is loaded only if there are any."""
    if not captions:
        return
    place = models.place_of_t5(model, encoders.text_dtype, state.device, t5_on)
    at_once = batch * (CAPTIONS_A_PASS if place == "host" else 1)
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
    """Each item after the next one was begun, so that the device works while this one is stored."""
    begun: deque[Item] = deque()
    for item in items:
        begun.append(item)
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


@contextmanager
def room_for(flag: str, what: str, fix: str) -> Iterator[None]:
    """Raises UsageError where the device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{flag}: the device has too little free memory {what}; {fix}") from error


def no_room(tiling: bool) -> str:
    """What helps where a clip does not fit."""
    if tiling:
        return "give smaller buckets, or end what else uses it"
    return "give --encode_tiling true (other latents than the model was trained on), or smaller buckets"


def worker_pool(data: DataFlags, limits: Limits) -> Workers:
    """Processes for media files: at least one, because nothing is decoded in this one."""
    return Workers(max(1, data.dataloader_num_workers), limits)


def other_encoders(index: CacheIndex, encoders: Encoders) -> list[str]:
    """What a cache was made with that is not the model's."""
    pairs = {
        "VAE": (index.vae, encoders.vae),
        "text encoder": (index.text_encoder, encoders.text_encoder),
        "text length": (index.text_length, encoders.text_length),
    }
    return [name for name, (then, now) in pairs.items() if then != now]


class UnusableClips(UsageError):
    """Too many clips cannot be used. ``records`` are those of all samples, for the table that says why."""

    def __init__(self, problem: str, records: Sequence[dict[str, Any]]) -> None:
        super().__init__(problem)
        self.records = records


def check_bad(records: Sequence[dict[str, Any]], max_bad_fraction: float) -> None:
    """Raises UnusableClips where more clips are bad than allowed."""
    if count := too_many_bad(records, max_bad_fraction):
        rule = f"--max_bad_fraction {max_bad_fraction:g}: {count} of {len(records)} clips cannot be used"
        fix = f"fix or remove them, see the table (ledger.jsonl has all), or continue without: {allowing(records)}"
        raise UnusableClips(f"{rule}; {fix}", records)


def too_many_bad(records: Sequence[dict[str, Any]], max_bad_fraction: float) -> int:
    """How many clips cannot be used, if that is more than allowed; else 0."""
    bad = sum(record["status"] != OK for record in records)
    return bad if bad > max_bad(max_bad_fraction, len(records)) else 0


def allowing(records: Sequence[dict[str, Any]]) -> str:
    """The flag that allows as many bad clips as there are."""
    bad = sum(record["status"] != OK for record in records)
    return f"--max_bad_fraction {math.ceil(bad / len(records) * 1000) / 1000:g}"
