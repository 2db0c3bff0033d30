"""Encodes a folder of clips and captions into the tensor cache. It can be interrupted and resumed at any point.

``Preparation`` does this in four stages; of R ranks, rank r takes items r, r + R, ... in each stage:

    samples -> plan (one ledger record per file) -> T5 embeddings of captions -> VAE moments of clips -> index.json

For image-to-video, the first frame of every variant of a clip is encoded too. If the data set names an image for the
clip, that image replaces the first frame and is cropped like the clip. Media files are opened only in worker processes,
which can be killed when a decoder hangs or crashes. This process encodes and writes.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.config.flags import DataFlags, EncodeFlags, ModelFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.prepared_flags import kept_values
from cogvideox.data.cache import CachedSample, CacheIndex, Ledger, TensorCache, hash_of, sole_writer
from cogvideox.data.clips import decode_measured, image_refusal, image_request, measure_clip, plan_clip, plan_image
from cogvideox.data.forms.samples import Sample, check_no_missing_images, take_listing
from cogvideox.data.media.frames import Section
from cogvideox.data.media.workers import Killed, Limits, Workers
from cogvideox.data.recipe import clip_recipe
from cogvideox.data.records import FAILED, KILLED, UNREADABLE, ClipRecord, Variant
from cogvideox.errors import UsageError
from cogvideox.files import stamp_of
from cogvideox.model import models
from cogvideox.model.encode import AsyncCopy
from cogvideox.preparation.encoding import (
    Draws,
    Encoders,
    VaeInput,
    encode_captions,
    fix_for_memory,
    missing_captions,
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
    """Prepares one data set into one folder: ``plan``, then ``check``, then ``encode``.

    Attributes:
        ranks: The processes of the run; each prepares its share.
        samples: The samples to train on, followed by ``num_validation`` samples to measure the loss on. Every list of
            records is in this order.
        image_variants: How often each first frame is encoded, each time with different noise; 0 without first frames.
        skipped: Paths of files that may be clips but have an unsupported format.
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
        self.ledger, self.health = Ledger(folder), Ledger(folder, "health.jsonl", "tensor")
        self.recipe = clip_recipe(data, geometry)
        self.limits = Limits(data.decode_timeout, int(data.decode_memory * 2**30))
        listing = take_listing(data, need_captions)
        self.samples: list[Sample] = listing.samples + listing.validation
        self.num_validation = len(listing.validation)
        self.skipped = listing.skipped
        if image_variants:
            check_no_missing_images(self.samples)

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
        known = self._known()
        files: list[tuple[str, str, tuple[object, ...]]] = []
        for (path, section), request in self.requests.items():
            files.append((request, path, (plan_clip, path, self.recipe, section)))
        files += [(request, path, (plan_image, path)) for path, request in self.image_requests.items()]
        todo = [file for file in self.share(files) if not self._settled(known.get(file[0]))]
        results = self.in_workers((job for _, _, job in todo), len(todo), "reading headers")
        batch: list[ClipRecord] = []
        for (request, path, _), record in zip(todo, results, strict=True):
            batch.append(self._killed(request, path, record) if isinstance(record, Killed) else record)
            if len(batch) == LEDGER_EVERY:
                self._write(batch)
                batch = []
        self._write(batch)
        self.ranks.wait_for_everyone()
        return self._records()

    def measure(self) -> list[ClipRecord]:
        """Returns the size and the number of usable frames of every clip, or why it cannot be read, in order.

        Only headers are read, in worker processes; nothing is written.
        """
        clips = list(self.requests)
        jobs = ((measure_clip, path, self.recipe, section) for path, section in clips)
        results = self.in_workers(jobs, len(clips), "reading headers")
        found = {
            clip: self._killed("", clip[0], record) if isinstance(record, Killed) else record
            for clip, record in zip(clips, results, strict=True)
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
        if self.ranks.is_main_process and (note := self.precision_note()):
            tqdm.write(note, file=sys.stderr)
        with self._sole_writer():
            # The main rank may have waited for another job, which has added tensors: no rank looks before it.
            self.ranks.wait_for_everyone()
            # The work is split before each rank looks for existing tensors. In the other order the ranks would split
            # different lists, because some add tensors while others look, and some items would belong to no rank.
            prompts = missing_captions(self.cache, encoders, self.share(self.captions(records)))
            encode_captions(self.cache, self.model, encoders, prompts, caption_batch, self.ranks, self.flags.t5_on)
            clips = self.share(list(self.vae_inputs(records, encoders).items()))
            self._encode_clips({key: clip for key, clip in clips if not self.cache.has(key)}, encoders)
            self.ranks.wait_for_everyone()
            final = self._records()
            self.check(final)
            index = self._index(final, encoders)
            if self.ranks.is_main_process:
                self._check_complete(index)
                index.save(self.folder)
        self.ranks.wait_for_everyone()
        return index, final

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
                    for key, file, frames, draws in self.tensors_of(record, variant, encoders):
                        new = VaeInput(cut.bucket, frames, file.path, file.stamp, [], draws)
                        found.setdefault(key, new).records.append(file)
        return found

    def tensors_of(
        self, record: ClipRecord, variant: Variant, encoders: Encoders
    ) -> Iterator[tuple[str, ClipRecord, Variant, Draws]]:
        """Yields what describes the tensor of a clip's variant, then the tensor of its first frame.

        Yields:
            (cache key, ledger record of the file, frames to decode, random-number keys of the noise).
        """
        yield encoders.video_key(record.content, variant), record, variant, ()
        if self.image_variants:
            file = record.first_frame
            first = variant.first_frame(None if record.image is None else record.image.probed)
            drawn = (self.data.seed, file.content, hash_of(first.to_json()))
            draws = tuple((*drawn, number) for number in range(self.image_variants))
            yield encoders.image_key(draws), file, first, draws

    def share(self, items: list[T]) -> list[T]:
        """Returns this rank's share of a list."""
        return items[self.ranks.process_index :: self.ranks.num_processes]

    def in_workers(self, jobs: Iterable[tuple[object, ...]], total: int, what: str) -> Iterator[Any]:
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
            hidden = not self.ranks.is_main_process
            for result in ProgressBar(workers.run(jobs), total=total, desc=what, unit="clip", disable=hidden):
                stopping.unit("clip")
                yield result

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

    @contextmanager
    def _sole_writer(self) -> Iterator[None]:
        """Holds the lock of the folder on the main rank, so that no other job encodes into it."""
        if not self.ranks.is_main_process:
            yield
            return
        with sole_writer(self.folder, tqdm.write):
            yield

    def _encode_clips(self, missing: dict[str, VaeInput], encoders: Encoders) -> None:
        """Encodes clips and first frames into the cache. Each is written while the next one is encoded.

        Raises:
            UsageError: The VAE overflows in its precision, or a clip does not fit on the device.
        """
        if not missing:
            return
        with models.video_encoder(self.model, encoders.vae_dtype, self.ranks.device, encoders.tiling) as vae:
            for key, clip, arriving in one_behind(self._start_encoding(missing, vae, encoders.tiling)):
                tensors = arriving.wait()
                if not all(torch.isfinite(moments).all() for moments in tensors.values()):
                    rule = f"--dtype {encoders.vae_dtype}: the VAE overflows on {clip.path}; give bf16 or fp32"
                    raise UsageError(rule)
                self.cache.write(key, tensors)

    def _start_encoding(
        self, missing: dict[str, VaeInput], vae: Any, tiling: bool
    ) -> Iterator[tuple[str, VaeInput, AsyncCopy]]:
        """Decodes clips in workers and starts to encode them; yields (key, clip, copy in progress) if they decode."""
        jobs = ((decode_measured, clip.path, clip.variant, clip.stamp) for clip in missing.values())
        results = self.in_workers(jobs, len(missing), "encoding clips")
        for (key, clip), decoded in zip(missing.items(), results, strict=True):
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

    def _check_complete(self, index: CacheIndex) -> None:
        """Checks that every tensor of the index exists.

        Raises:
            UsageError: A tensor is missing, because another job has moved it away or has given up its clip.
        """
        missing = sum(not self.cache.has(key) for key in index.keys)
        if missing:
            raise UsageError(
                f"{self.folder}: {missing} tensors were removed during the preparation; run the same command again"
            )

    def _index(self, records: Sequence[ClipRecord], encoders: Encoders) -> CacheIndex:
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
            recipe=kept_values(
                self.data,
                self.flags,
                fps=self.recipe.fps,
                random_flip=self.recipe.flip_probability,
                num_augmentations=self.recipe.variants,
            ),
        )

    def cached_samples(self, sample: Sample, record: ClipRecord, encoders: Encoders) -> Iterator[CachedSample]:
        """Yields a sample's entries in the index: one per bucket, none if its clip cannot be used."""
        for cut in record.cuts:
            tensors = [list(self.tensors_of(record, variant, encoders)) for variant in cut.variants]
            yield CachedSample(
                id=sample.id if len(record.cuts) == 1 else f"{sample.id}@{cut.bucket}",
                caption=sample.caption,
                bucket=cut.bucket,
                video_keys=tuple(of_clip[0][0] for of_clip in tensors),
                prompt_key=encoders.prompt_key(sample.caption),
                image_keys=tuple(key for of_clip in tensors for key, *_ in of_clip[1:]),
            )


def recorded(known: dict[str, ClipRecord], request: str, path: str) -> ClipRecord:
    """Returns the ledger record of a file. A file without one has changed since the preparation began."""
    return known.get(request, ClipRecord(request, path, UNREADABLE, CHANGED))


def worker_pool(data: DataFlags, limits: Limits) -> Workers:
    """Returns worker processes for media files: at least one, because this process never decodes."""
    return Workers(max(1, data.dataloader_num_workers), limits)
