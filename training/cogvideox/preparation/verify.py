"""Verifies and repairs a cache: finds tensors that are damaged, missing, outdated or made with another model.

``check_flags`` compares the flags with those of the cache. ``find_faults`` compares the cache with its data and changes
nothing. ``repair`` deletes what is faulty, so that the next preparation encodes it again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cogvideox.config.prepared_flags import normalized
from cogvideox.data.cache import CachedSample, CacheError, CacheIndex, open_index
from cogvideox.data.clips import content_change
from cogvideox.data.media.workers import Killed
from cogvideox.data.records import FAILED, KILLED, UNREADABLE, ClipRecord
from cogvideox.errors import UsageError
from cogvideox.preparation.encoding import Encoders, other_encoders
from cogvideox.preparation.prepare import Preparation
from cogvideox.runtime.resume import changes, there_and_now


@dataclass(frozen=True)
class Fault:
    """Describes a fault of a cache, and what must be made again to repair it.

    Attributes:
        text: The line that is printed.
        key: The tensor to encode again, if any.
        record: The ledger record of the file to plan again, if any.
    """

    text: str
    key: str | None = None
    record: ClipRecord | None = None


def check_flags(preparation: Preparation) -> None:
    """Checks that a cache is verified with the flags that it was made with, as far as they are known.

    Otherwise every clip would be reported as outdated, and --repair would encode all of them with the other flags. The
    precision is not compared, because a cache keeps its own.

    Raises:
        UsageError: A flag has another value.
    """
    try:
        there = open_index(preparation.folder).recipe
    except UsageError:  # find_faults reports it
        return
    here = {name: value for name, value in preparation.kept_flags.items() if name in there and name != "dtype"}
    other = {name for name, value in here.items() if normalized(name, value) != normalized(name, there[name])}
    if "train_resolution" in other:
        other.discard("max_num_frames")  # which follows from it
    if other:
        rule = f"{preparation.folder}: was prepared with other flags"
        fix = "give them to --verify and --repair, too; to encode with these, leave --verify and --repair out"
        lines = there_and_now({name: pair for name, pair in changes(there, here).items() if name in other})
        raise UsageError([f"{rule}; {fix}", *(f"  {line}" for line in lines)])


def find_faults(preparation: Preparation, records: Sequence[ClipRecord]) -> list[Fault]:
    """Returns the faults in this rank's share of the cache. It reads every file and changes none."""
    encoders = preparation.encoders
    index, faults = None, []
    try:
        index = open_index(preparation.folder)
    except UsageError:
        faults.append(
            Fault(f"{preparation.folder}: has no index.json that can be read; it was never prepared to the end")
        )
    if index is not None:
        faults += encoder_faults(index, encoders)
        faults += sample_faults(preparation, records, encoders, index)
    if not preparation.ranks.is_main_process:
        faults = []
    return [*faults, *source_faults(preparation, records), *tensor_faults(preparation, records, encoders, index)]


def encoder_faults(index: CacheIndex, encoders: Encoders) -> Iterator[Fault]:
    """Yields a fault for each encoder whose weights or precision are not the model's."""
    names = other_encoders(index, encoders)
    dtypes = {"vae": encoders.vae_dtype, "text_encoder": encoders.text_dtype}
    names += [f"precision of the {part}" for part, dtype in dtypes.items() if index.dtypes[part] != dtype]
    for name in names:
        yield Fault(f"index.json: its tensors were made with another {name}")


def sample_faults(
    preparation: Preparation, records: Sequence[ClipRecord], encoders: Encoders, index: CacheIndex
) -> Iterator[Fault]:
    """Yields a fault for each clip that was added, removed or changed since the cache was made."""
    listed = len(records) - preparation.num_validation
    pairs = list(zip(preparation.samples, records, strict=True))
    for name, part, there in (
        ("", pairs[:listed], index.samples),
        ("validation clip ", pairs[listed:], index.validation),
    ):
        now = {entry.id: entry for sample, r in part for entry in preparation.cached_samples(sample, r, encoders)}
        then = {entry.id: entry for entry in there}
        for id in sorted(now.keys() | then.keys()):
            if change := change_of(now.get(id), then.get(id)):
                yield Fault(f"{name}{id}: {change}")


def change_of(now: CachedSample | None, then: CachedSample | None) -> str | None:
    """Describes how a sample has changed since the cache was made; returns None if it has not."""
    if then is None:
        return "is not in the cache yet"
    if now is None:
        return "is in the cache, but is no longer listed or cannot be used"
    if now.caption != then.caption:
        return "its caption has changed since it was encoded"
    if now.video_keys != then.video_keys:
        return "the clip, or a flag that cuts it, has changed since it was encoded"
    if now.image_keys != then.image_keys:
        return "its first frame, or a flag for it, has changed since it was encoded"
    return None


def source_faults(preparation: Preparation, records: Sequence[ClipRecord]) -> Iterator[Fault]:
    """Yields a fault for each file whose content has changed although its size and time have not."""
    files = [file for record in records if record.usable for file in (record, record.first_frame)]
    used: dict[tuple[str, str], dict[str, ClipRecord]] = {}
    for file in files:  # a long video may have a record for each of its scenes, and is read once
        used.setdefault((file.path, file.content), {})[file.request] = file
    mine = preparation.share(list(used))
    jobs = ((clip, (content_change, *clip)) for clip in mine)
    for clip, change in preparation.in_workers(jobs, len(mine), "checking clips"):
        if change is not None:
            reason = change.reason if isinstance(change, Killed) else change
            yield from (Fault(f"{clip[0]}: {reason}", record=record) for record in used[clip].values())


def tensor_faults(
    preparation: Preparation, records: Sequence[ClipRecord], encoders: Encoders, index: CacheIndex | None
) -> Iterator[Fault]:
    """Yields a fault for each tensor that is missing although indexed, damaged, of the wrong shape, or not finite."""
    geometry, cache = preparation.geometry, preparation.cache
    inputs = preparation.vae_inputs(records, encoders)
    shapes: dict[str, tuple[int, ...]] = {key: clip.shape(geometry) for key, clip in inputs.items()}
    text_shape = (encoders.text_length, geometry.text_embed_dim)
    shapes |= {encoders.prompt_key(text): text_shape for text in preparation.captions(records)}
    indexed = index.keys if index is not None else set()
    for key, shape in preparation.share(list(shapes.items())):
        if not cache.has(key) and key not in indexed:
            continue  # the clip is not in the cache yet, which sample_faults reports
        try:
            for tensor in cache.examine(key).values():
                if tuple(tensor.shape) != shape:
                    yield Fault(f"{cache.path(key)}: has shape {tuple(tensor.shape)}, its bucket needs {shape}", key)
                elif not torch.isfinite(tensor).all():
                    yield Fault(f"{cache.path(key)}: holds numbers that are not finite", key)
        except CacheError as error:
            yield Fault(str(error), key)


def repair(preparation: Preparation, faults: Sequence[Fault], records: Sequence[ClipRecord]) -> None:
    """Deletes damaged tensors and outdated records, so that the next preparation makes them again.

    Files that could not be decoded, or whose decoder was killed, are tried once more.

    Args:
        preparation: The preparation of the cache.
        faults: The faults that all ranks found.
        records: The record of every sample.
    """
    if preparation.ranks.is_main_process:
        for fault in faults:
            if fault.key is not None:
                preparation.cache.remove(fault.key)
        retried = [fault.record for fault in faults if fault.record is not None]
        retried += [record for record in records if record.status in (FAILED, KILLED)]
        preparation.ledger.append(
            ClipRecord(record.request, record.path, UNREADABLE, "to be tried again").to_json() for record in retried
        )
    preparation.ranks.wait_for_everyone()
