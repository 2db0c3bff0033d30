"""Encodes a folder of clips and captions into the tensor cache. It can be interrupted and resumed at any point.

``Preparation`` does this in four stages:

    samples -> plan (one ledger record per file) -> T5 embeddings of captions -> VAE moments of clips -> index.json

Any number of processes may do this in one folder at a time. Each claims what it works on (data/claims.py), and sees in
the folder what the others have done. Nothing is sent between them, so each may end and start again by itself. Every
process publishes the index when all tensors of its samples exist; ``prepare_and_report`` in report.py lists the samples
again if another process has published a different one.

For image-to-video, the first frame of every variant of a clip is encoded too. If the data set names an image for the
clip, that image replaces the first frame and is cropped like the clip. Media files are opened only in worker processes,
which can be killed when a decoder hangs or crashes. This process encodes and writes.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import DataFlags, EncodeFlags, ModelFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.options import local_processes
from cogvideox.config.prepared_flags import kept_values
from cogvideox.data.cache import HEALTH_NAME, CachedSample, CacheIndex, Ledger, NewRecords, TensorCache, hash_of
from cogvideox.data.claims import Claims
from cogvideox.data.clips import decode_measured, image_refusal, image_request, measure_clip, plan_clip, plan_image
from cogvideox.data.forms.samples import Sample, check_no_missing_images, take_listing
from cogvideox.data.media.frames import Section
from cogvideox.data.media.workers import Job, Killed, Limits, Workers, usual_number
from cogvideox.data.recipe import clip_recipe
from cogvideox.data.records import FAILED, KILLED, UNREADABLE, ClipRecord, Variant
from cogvideox.errors import UsageError
from cogvideox.files import remove_stale_temporaries, stamp_of
from cogvideox.model import models
from cogvideox.model.encode import AsyncCopy
from cogvideox.preparation.encoding import (
    Encoders,
    VaeInput,
    encode_captions,
    fix_for_memory,
    one_behind,
    room_for,
)
from cogvideox.preparation.unusable import UnusableClips, check_bad
from cogvideox.progress import ProgressBar
from cogvideox.runtime.ranks import Ranks

LEDGER_EVERY = 64  # records per write to the ledger while planning
T = TypeVar("T")
CHANGED = "has changed while it was prepared; run the same command again"


class Preparation:
    """Prepares one data set into one folder: ``plan``, then ``check``, then ``encode``, then ``publish``.

    Attributes:
        ranks: The processes of the launch. They need not be connected, and other launches may do the same work.
        samples: The samples to train on, followed by ``num_validation`` samples to measure the loss on. Every list of
            records is in this order.
        image_variants: How often each first frame is encoded, each time with different noise; 0 without first frames.
        unused: Files that are not used, although somebody may have meant them to be.
    """

    def __init__(
        self,
        model: ModelFlags,
        data: DataFlags,
        flags: EncodeFlags,
        geometry: Geometry,
        folder: Path,
        ranks: Ranks,
        image_variants: int = 0,
        need_captions: bool = True,
    ) -> None:
        """Lists the samples of the data set; no media file is opened.

        Args:
            model: Which pipeline encodes.
            data: The flags of the data.
            flags: The flags of encoding.
            geometry: The geometry of the model.
            folder: Where tensors, ledger and index are written.
            ranks: The processes of the run.
            image_variants: How often each first frame is encoded; 0 for text-to-video.
            need_captions: Whether a clip without a caption is an error.
        """
        self.model, self.data, self.flags, self.geometry, self.folder = model, data, flags, geometry, folder
        self.ranks, self.image_variants = ranks, image_variants
        self.cache = TensorCache(folder)
        self.ledger, self.health = Ledger(folder), Ledger(folder, HEALTH_NAME, "tensor")
        self.recipe = clip_recipe(data, geometry)
        self.limits = Limits(data.decode_timeout, int(data.decode_memory * 2**30))
        listing = take_listing(data, folder, need_captions)
        self.index_before = listing.index
        self._kept_workers: Workers | None = None
        self.samples: list[Sample] = listing.samples + listing.validation
        self.num_validation = len(listing.validation)
        self.unused = listing.unused
        if image_variants:
            check_no_missing_images(self.samples)

    def again(self) -> "Preparation":
        """Returns a preparation of the clips that the data set has now, with the same settings."""
        where = self.folder, self.ranks, self.image_variants
        return Preparation(self.model, self.data, self.flags, self.geometry, *where)

    @cached_property
    def requests(self) -> dict[tuple[str, Section | None], str]:
        """The ledger key of each clip, by path and section: a hash of both, the recipe, and the file stamp."""
        return {clip: self.recipe.request(*clip) for clip in dict.fromkeys(sample.clip for sample in self.samples)}

    @cached_property
    def image_requests(self) -> dict[str, str]:
        """The ledger key of each image that is listed as a first frame, by path; empty without first frames."""
        images = (sample.image for sample in self.samples if sample.image is not None and self.image_variants)
        return {path: image_request(path) for path in dict.fromkeys(images)}

    @cached_property
    def encoders(self) -> Encoders:
        """The encoders of clips and captions, with their precision.

        Without --dtype, a folder keeps the precision of its tensors. Otherwise a preparation that continues on a device
        with another default precision would encode everything again.
        """
        here, elsewhere = self._default_encoders()
        if here == elsewhere or self.cache.has(here.prompt_key("")):  # every preparation encodes the empty caption
            return here
        return elsewhere if self.cache.has(elsewhere.prompt_key("")) else here

    def _default_encoders(self) -> tuple[Encoders, Encoders]:
        """Returns the encoders in the default precision of this device, and of the other kind, CPU or GPU."""
        here = Encoders.of(self.model, self.flags, self.geometry, self.ranks.device)
        other = torch.device("cuda" if self.ranks.device.type == "cpu" else "cpu")
        vae_dtype, text_dtype = (models.default_dtype(self.model, part, other) for part in ("vae", "text_encoder"))
        return here, here if self.flags.dtype else replace(here, vae_dtype=vae_dtype, text_dtype=text_dtype)

    def precision_note(self) -> str | None:
        """Describes the VAE's precision if it differs from the weight files or the device's default, else None."""
        here, elsewhere = self._default_encoders()
        used, device = self.encoders.vae_dtype, self.ranks.device.type
        if self.encoders != here:
            why = f"like the tensors in {self.folder}, although the default on this device is {here.vae_dtype}"
            return f"encoding in {used}, {why}; --dtype {here.vae_dtype} encodes everything anew"
        if here != elsewhere and device == "cpu":
            stored = elsewhere.vae_dtype
            why = f"not in {stored} as the weights are stored, because many CPUs are much slower at {stored}"
            return f"encoding in {used} on a CPU, {why}; --dtype {stored} changes that"
        return None

    def plan(self) -> list[ClipRecord]:
        """Returns the ledger record of every sample, in order. Worker processes probe the files without a record."""
        new = NewRecords(self.ledger)
        known, claims = self._known(), self._claims(new.has)
        jobs: dict[str, Job] = {}
        for (path, section), request in self.requests.items():
            jobs[request] = plan_clip, path, self.recipe, section
        jobs |= {request: (plan_image, path) for path, request in self.image_requests.items()}
        left = {request: job for request, job in jobs.items() if not self._settled(known.get(request))}
        while left:
            self._plan(left, claims)
            with claims:
                claims.wait(left, self.ranks.patience)
            left = {request: job for request, job in left.items() if not new.has(request)}
        return self._records()

    def _plan(self, jobs: dict[str, Job], claims: Claims) -> None:
        """Writes the records of the files that no other process reads; ``jobs`` has the jobs of workers by request."""
        batch: list[ClipRecord] = []
        with claims:
            taken = ((request, jobs[request]) for request in claims.take(jobs))
            for request, record in self.in_workers(taken, self._expected(len(jobs)), "reading headers"):
                path = jobs[request][1]
                batch.append(self._killed(request, path, record) if isinstance(record, Killed) else record)
                if len(batch) == LEDGER_EVERY:
                    self._write(batch)
                    batch = []
            self._write(batch)

    def measure(self) -> list[ClipRecord]:
        """Returns the size and the number of usable frames of every clip, or why it cannot be read, in order.

        Only headers are read, in worker processes; nothing is written.
        """
        jobs = (((path, section), (measure_clip, path, self.recipe, section)) for path, section in self.requests)
        found = {
            clip: self._killed("", clip[0], record) if isinstance(record, Killed) else record
            for clip, record in self.in_workers(jobs, len(self.requests), "reading headers")
        }
        return [found[sample.clip] for sample in self.samples]

    def check(self, records: Sequence[ClipRecord]) -> None:
        """Checks that enough clips are usable.

        Raises:
            UnusableClips: No clip is usable, or more clips are unusable than --max_bad_fraction allows.
        """
        listed = len(records) - self.num_validation
        parts = [("--data_root", self.data.data_root, "train", records[:listed])]
        if self.num_validation:
            parts.append(("--validation_data_root", self.data.validation_data_root, "measure", records[listed:]))
        for flag, roots, verb, part in parts:
            if not any(record.usable for record in part):
                raise UnusableClips(f"{flag} {' '.join(roots)}: no clip is left to {verb} on; see the table", records)
        check_bad(records, self.data.max_bad_fraction)

    def encode(self, records: Sequence[ClipRecord], caption_batch: int = 1) -> tuple[CacheIndex, list[ClipRecord]]:
        """Encodes what is missing, captions first.

        Args:
            records: The record of every sample, from ``plan``.
            caption_batch: Captions per forward pass of T5.

        Returns:
            The index, and the final record of every sample.

        Raises:
            UnusableClips: More clips than --max_bad_fraction allows could not be decoded.
        """
        encoders = self.encoders
        if self.ranks.is_main_process:
            remove_stale_temporaries(self.folder)
            if note := self.precision_note():
                tqdm.write(note, file=sys.stderr)
        claims = self._claims(self.cache.has)
        while True:
            with claims:
                self._encode_captions(records, encoders, claims, caption_batch)
                self._encode_clips(self.vae_inputs(records, encoders), encoders, claims)
            # Another process may have found that a clip does not decode, or may have ended before its work was done.
            records = self._records()
            self.check(records)
            index = self.index_of(records, encoders)
            missing = [key for key in index.keys if not self.cache.has(key)]
            if not missing:
                return index, list(records)
            with claims:
                claims.wait(missing, self.ranks.patience)

    def publish(self, index: CacheIndex) -> bool:
        """Writes the index, unless another one was published since the clips were listed; returns whether it is there.

        The lock of ``publishing`` is held.
        """
        return index.publish(self.folder, self.index_before)

    def _records(self) -> list[ClipRecord]:
        """Returns the ledger record of every sample, in order, with the record of its image, if any, in ``image``."""
        known = self._known()
        return [self._record(sample, known) for sample in self.samples]

    def _record(self, sample: Sample, known: dict[str, ClipRecord]) -> ClipRecord:
        """Returns the record of a sample's clip, or the record of its image if that is what cannot be used."""
        record = recorded(known, self.requests[sample.clip], sample.video)
        if not record.usable or sample.image not in self.image_requests:
            return record
        image = recorded(known, self.image_requests[sample.image], sample.image)
        if image.usable and (reason := image_refusal(record.probed, image.probed)):
            return replace(image, status=FAILED, reason=reason)
        return replace(record, image=image) if image.usable else image

    def captions(self, records: Sequence[ClipRecord]) -> list[str]:
        """Returns the captions to embed without duplicates. The empty one is first."""
        used = (sample.caption for sample, r in zip(self.samples, records, strict=True) if r.usable)
        return list(dict.fromkeys(["", *used]))

    def vae_inputs(self, records: Sequence[ClipRecord], encoders: Encoders) -> dict[str, VaeInput]:
        """Returns what the VAE encodes for the records, clips and first frames, by the cache key of the tensor."""
        found: dict[str, VaeInput] = {}
        used = {(r.request, r.first_frame.request): r for r in records if r.usable}
        for record in used.values():
            for cut in record.cuts:
                for variant in cut.variants:
                    for key, new in self.tensors_of(record, cut.bucket, variant, encoders).items():
                        if key in found:
                            found[key].records.extend(new.records)
                        else:
                            found[key] = new
        return found

    def tensors_of(
        self, record: ClipRecord, bucket: Bucket, variant: Variant, encoders: Encoders
    ) -> dict[str, VaeInput]:
        """Returns what the VAE encodes for a variant of a clip, by cache key: the clip, then its first frame if any."""
        clip = VaeInput(bucket, variant, record.path, record.stamp, [record])
        found = {encoders.video_key(record.content, variant): clip}
        if self.image_variants:
            file = record.first_frame
            first = variant.first_frame(None if record.image is None else record.image.probed)
            drawn = (self.data.seed, file.content, hash_of(first.to_json()))
            draws = tuple((*drawn, number) for number in range(self.image_variants))
            found[encoders.image_key(draws)] = VaeInput(bucket, first, file.path, file.stamp, [file], draws)
        return found

    def share(self, items: list[T]) -> list[T]:
        """Returns this rank's share of a list."""
        return items[self.ranks.process_index :: self.ranks.num_processes]

    @contextmanager
    def workers_kept(self) -> Iterator[Workers]:
        """Lets the stages in this context share their worker processes. Otherwise, each stage starts its own."""
        if self._kept_workers is not None:
            yield self._kept_workers
            return
        with worker_pool(self.data, self.limits) as workers:
            self._kept_workers = workers
            try:
                yield workers
            finally:
                self._kept_workers = None

    def in_workers(self, jobs: Iterable[tuple[T, Job]], total: int, what: str) -> Iterator[tuple[T, Any]]:
        """Runs jobs in worker processes, with a progress bar.

        Args:
            jobs: Jobs, each with a key. They are asked for when a worker is free.
            total: Number of jobs.
            what: Label of the progress bar.

        Yields:
            Each key with its result, in the order of the jobs; Killed for a job whose worker was killed or crashed.
        """
        if not total:
            return
        with self.workers_kept() as workers:
            hidden = not self.ranks.is_main_process
            with ProgressBar(total=total, desc=what, unit="clip", disable=hidden) as bar:
                for keyed in workers.run_keyed(jobs):
                    stopping.unit("clip")
                    yield keyed
                    bar.update()
                bar.total = bar.n  # other processes may have taken more or fewer than expected

    def _expected(self, number: int) -> int:
        """Returns how many of a number of items this process will probably take."""
        return -(-number // self.ranks.num_processes)

    def _claims(self, is_done: Callable[[str], bool]) -> Claims:
        """Returns the claims with which this process takes its part of the work."""
        return Claims(self.folder, is_done, self.ranks.process_index, self.ranks.num_processes)

    def _known(self) -> dict[str, ClipRecord]:
        """Returns the ledger's valid records of the files as they are now, without records that name another path."""
        files = {request: path for (path, _), request in self.requests.items()}
        files |= {request: path for path, request in self.image_requests.items()}
        lines = self.ledger.read(files)
        records = {name: ClipRecord.from_json(line) for name, line in lines.items()}
        return {name: record for name, record in records.items() if record and record.path == files[name]}

    def _write(self, records: Iterable[ClipRecord]) -> None:
        """Appends records to the ledger."""
        self.ledger.append(record.to_json() for record in records)

    def _settled(self, record: ClipRecord | None) -> bool:
        """Returns whether a file need not be probed again."""
        if record is None or record.status == UNREADABLE:
            return False
        return record.status != KILLED or record.limits == self._limits()

    def _limits(self) -> list[float]:
        """Returns the limits of a worker as the ledger records them: seconds, and bytes of memory."""
        return [self.limits.seconds, self.limits.memory]

    def _killed(self, request: str, path: str, killed: Killed) -> ClipRecord:
        """Returns the record of a file whose worker was killed. A cause outside of the file is tried again."""
        status = UNREADABLE if killed.transient else KILLED
        return ClipRecord(request, path, status, killed.reason, self._limits())

    def _encode_captions(self, records: Sequence[ClipRecord], encoders: Encoders, claims: Claims, batch: int) -> None:
        """Embeds the captions that no other process embeds."""
        texts = {encoders.prompt_key(text): text for text in self.captions(records)}
        taken = (texts[key] for key in claims.take(texts))
        expected = self._expected(sum(not self.cache.has(key) for key in texts))
        encode_captions(self.cache, self.model, encoders, taken, expected, batch, self.ranks, self.flags.t5_on)

    def _encode_clips(self, clips: dict[str, VaeInput], encoders: Encoders, claims: Claims) -> None:
        """Encodes the clips and first frames that no other process encodes. Each is written during the next one.

        Raises:
            UsageError: The VAE overflows in its precision, or a clip does not fit on the device.
        """
        todo = {key: clip for key, clip in clips.items() if not self.cache.has(key)}
        keys = claims.take(todo)
        first = next(keys, None)
        if first is None:
            return
        keys = chain([first], keys)
        with models.video_encoder(self.model, encoders.vae_dtype, self.ranks.device, encoders.tiling) as vae:
            for key, clip, arriving in one_behind(self._start_encoding(keys, todo, vae, encoders.tiling)):
                tensors = arriving.wait()
                if not all(torch.isfinite(moments).all() for moments in tensors.values()):
                    rule = f"--dtype {encoders.vae_dtype}: the VAE overflows on {clip.path}; give bf16 or fp32"
                    raise UsageError(rule)
                self.cache.write(key, tensors)

    def _start_encoding(
        self, keys: Iterator[str], clips: dict[str, VaeInput], vae: Any, tiling: bool
    ) -> Iterator[tuple[str, VaeInput, AsyncCopy]]:
        """Decodes clips in workers and starts to encode them; yields (key, clip, copy in progress) if they decode."""
        taken = ((key, clips[key]) for key in keys)
        jobs = (((key, clip), (decode_measured, clip.path, clip.variant, clip.stamp)) for key, clip in taken)
        for (key, clip), decoded in self.in_workers(jobs, self._expected(len(clips)), "encoding clips"):
            if isinstance(decoded, (str, Killed)):
                self._give_up(clip, decoded)
                continue
            measured, frames = decoded
            if not clip.draws:
                self.health.append([{"tensor": key} | measured])
            with room_for(f"--encode_tiling {tiling}".lower(), f"to encode {clip.bucket}", fix_for_memory(tiling)):
                arriving = AsyncCopy(clip.encode(vae, frames))
            yield key, clip, arriving

    def _give_up(self, clip: VaeInput, reason: str | Killed) -> None:
        """Records in the ledger that the files of a clip that did not decode cannot be used."""
        limits: list[float] | None = None
        if isinstance(reason, Killed):
            status, reason, limits = UNREADABLE if reason.transient else KILLED, reason.reason, self._limits()
        elif any(stamp_of(record.path) != record.stamp for record in clip.records):
            status, reason = UNREADABLE, CHANGED
        else:
            status = FAILED
        self._write(replace(r, status=status, reason=reason, limits=limits, cuts=()) for r in clip.records)

    def index_of(self, records: Sequence[ClipRecord], encoders: Encoders) -> CacheIndex:
        """Returns the index of the usable samples, with the flags that they were prepared with."""
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
            recipe=self.kept_flags,
        )

    @property
    def kept_flags(self) -> dict[str, Any]:
        """The flags for index.json that decide the tensors."""
        recipe = self.recipe
        effective = {"random_flip": recipe.flip_probability, "num_augmentations": recipe.variants}
        if self.image_variants:
            effective["num_image_noise_variants"] = self.image_variants
        return kept_values(self.data, self.flags, fps=recipe.fps, **effective)

    def cached_samples(self, sample: Sample, record: ClipRecord, encoders: Encoders) -> Iterator[CachedSample]:
        """Yields a sample's entries in the index: one per bucket, none if its clip cannot be used."""
        for cut in record.cuts:
            keys = [list(self.tensors_of(record, cut.bucket, variant, encoders)) for variant in cut.variants]
            yield CachedSample(
                id=sample.id if len(record.cuts) == 1 else f"{sample.id}@{cut.bucket}",
                caption=sample.caption,
                bucket=cut.bucket,
                video_keys=tuple(video for video, *_ in keys),
                prompt_key=encoders.prompt_key(sample.caption),
                image_keys=tuple(image for _, *images in keys for image in images),
            )


def recorded(known: dict[str, ClipRecord], request: str, path: str) -> ClipRecord:
    """Returns the ledger record of a file. A file without one has changed since the preparation began."""
    return known.get(request, ClipRecord(request, path, UNREADABLE, CHANGED))


def num_decoders(data: DataFlags, limits: Limits) -> int:
    """Returns how many worker processes decode: at least one, because this process never does.

    One alone may take longer to decode a clip than a GPU takes to encode it.
    """
    return data.dataloader_num_workers or usual_number(limits, local_processes())


def worker_pool(data: DataFlags, limits: Limits) -> Workers:
    """Returns worker processes for media files."""
    return Workers(num_decoders(data, limits), limits)
