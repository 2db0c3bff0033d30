"""The cache of encoded clips and captions: content-addressed, checked, safe against a kill at any moment.

    tensors/ab/abcd....safetensors   one clip variant's moments, the moments of its first frame with several noises, or
                                     one caption's embedding; SHA-256 in its header
    ledger.jsonl                     what became of each source file under a recipe: its plan, or why it failed
    index.json                       the samples of the last preparation, which is what --load_tensors reads

A key is the hash of all that determines the tensor, so nothing is ever overwritten with something else, and two jobs
may share a folder. Scale factors are not in the keys: moments are stored unscaled.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from cogvideox.config.buckets import Bucket
from cogvideox.errors import UsageError
from cogvideox.files import LOCK_NAME, disk_errors_told, remove_stale_temporaries, remove_temporaries, write_atomically
from cogvideox.locks import held

INDEX_FORMAT, OLD_FORMATS = 4, (3,)  # the older one does not have the recipe
KEYS = ("video_keys", "image_keys")  # fields of CachedSample
KEY = re.compile("[0-9a-f]{64}")


class CacheError(UsageError):
    """A tensor file that is missing or is not what was written."""


def hash_of(values: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def is_key(value: Any) -> bool:
    """Whether a value may be a key: 64 hexadecimal digits. An index that somebody else made may hold anything."""
    return isinstance(value, str) and KEY.fullmatch(value) is not None


class TensorCache:
    """Tensors by key under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the tensors of a key lie, or would: inside the folder, so nothing outside it is read or renamed.

        Raises:
            CacheError: the key is no key.
        """
        if not is_key(key):
            raise CacheError(f"{self.folder}: {key!r} is not the key of a tensor; it must be 64 hexadecimal digits")
        return self.folder / "tensors" / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the tensors are there; ``read`` checks that they are right."""
        return self.path(key).is_file()

    def write(self, key: str, tensors: dict[str, Any]) -> int:
        """Stores CPU tensors under a key; returns the bytes written."""
        from safetensors.torch import save

        # One entry, because safetensors writes several in any order, and equal tensors shall be equal files.
        content = save(tensors, metadata={"written": json.dumps({"key": key, "sha256": checksum(tensors)})})
        write_atomically(self.path(key), content)
        return len(content)

    def read(self, key: str) -> dict[str, Any]:
        """The tensors of a key. A file that is not what was written is set aside, so that preparing again mends it.

        Raises:
            CacheError: the file is missing, torn, a byte of it has changed, or it belongs to another key.
        """
        try:
            return self.examine(key)
        except CacheError as error:
            raise self.set_aside(key, str(error)) from None

    def set_aside(self, key: str, problem: str) -> CacheError:
        """Renames the file of a key that can be of no use, so that preparing again encodes it anew; what to raise."""
        path = self.path(key)
        with suppress(OSError):
            os.replace(path, path.with_suffix(".damaged"))
        return CacheError(f"{problem}; prepare again, it is encoded anew")

    def examine(self, key: str) -> dict[str, Any]:
        """As ``read``, but changes nothing."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise CacheError(f"{path}: is not there") from None
        except OSError as error:  # not the file's fault
            raise UsageError(f"{path}: cannot be read ({error.strerror}); fix that and run again") from None
        try:
            tensors = load(content)
            written = json.loads(header_of(content)["__metadata__"]["written"])
            written_key, written_sum = written["key"], written["sha256"]
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise CacheError(f"{path}: is torn") from None
        if written_key != key:
            raise CacheError(f"{path}: holds the tensors of another key")
        if written_sum != checksum(tensors):
            raise CacheError(f"{path}: its checksum is wrong")
        return tensors

    def remove(self, key: str) -> None:
        """Deletes the tensors of a key, so that they count as missing."""
        self.path(key).unlink(missing_ok=True)


def header_of(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def checksum(tensors: dict[str, Any]) -> str:
    """SHA-256 over names, shapes, types and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Ledger:
    """What became of each source file, by request: the hash of its path, size, time and the recipe."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.jsonl"

    def read(self, requests: Container[str] | None = None) -> dict[str, dict[str, Any]]:
        """The newest record of each of the requests (None: of all). A line torn by a kill is skipped."""
        records = {}
        for line in self._lines():
            try:
                record = json.loads(line)
                if requests is None or record["request"] in requests:
                    records[record["request"]] = record
            except (ValueError, KeyError, TypeError):
                continue
        return records

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Adds records; safe beside other processes that do the same."""
        text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        if not text:
            return
        with disk_errors_told(self.path.parent, len(text)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with held(self.path):
                self._append(text)

    def _append(self, text: str) -> None:
        with open(self.path, "ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
                text = "\n" + text if torn else text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> Iterator[bytes]:
        if self.path.is_file():
            with open(self.path, "rb") as file:
                yield from file


@contextmanager
def sole_writer(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lets one job at a time encode into a folder: a second one waits, and then finds most of its work done."""
    with disk_errors_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK_NAME, lambda: say(f"{folder}: another job is preparing it; waiting")):
        remove_stale_temporaries(folder)
        remove_temporaries(folder / "tensors")  # which only the holder of this lock writes, whose ranks wait for it
        yield


@dataclass(frozen=True)
class CachedSample:
    """A sample whose tensors are in the cache."""

    id: str
    caption: str
    bucket: Bucket
    video_keys: tuple[str, ...]  # one a variant
    prompt_key: str
    image_keys: tuple[str, ...] = ()  # one a variant, for image-to-video; none if first frames were not encoded

    @property
    def clip(self) -> str:
        """Names the clip, which may be in several buckets."""
        return self.id.removesuffix(f"@{self.bucket}")


@dataclass(frozen=True)
class CacheIndex:
    """The samples of one preparation, and what they were encoded with."""

    samples: tuple[CachedSample, ...]
    empty_prompt_key: str
    fps: float
    vae: str  # fingerprint of the weights
    text_encoder: str
    dtypes: dict[str, str]
    text_length: int
    validation: tuple[CachedSample, ...] = ()  # never trained on
    image_variants: int = 0  # encodings of each first frame, each with noise of its own
    recipe: dict[str, Any] = field(default_factory=dict)  # flags of the preparation: prepared.py; empty: unknown

    def save(self, folder: Path) -> None:
        """Writes index.json."""
        content = json.dumps({"format": INDEX_FORMAT} | asdict(self), indent=1, ensure_ascii=False)
        write_atomically(folder / "index.json", content.encode())

    @property
    def keys(self) -> set[str]:
        """Those of all tensors that it names."""
        entries = (*self.samples, *self.validation)
        return {key for e in entries for key in (*e.video_keys, *e.image_keys, e.prompt_key)} | {self.empty_prompt_key}

    @property
    def fingerprint(self) -> str:
        """Changes when any tensor of any sample that is trained on does."""
        rows = [[s.id, s.video_keys, s.prompt_key, *s.image_keys] for s in self.samples]
        return hash_of([*rows, self.empty_prompt_key])

    @property
    def digests(self) -> dict[str, str]:
        """A short hash of the tensors of each sample that is trained on, by the sample's id."""
        return {s.id: hash_of([s.video_keys, s.prompt_key, *s.image_keys])[:12] for s in self.samples}

    def without_images(self) -> "CacheIndex":
        """What text-to-video trains on."""
        samples, validation = (
            tuple(replace(sample, image_keys=()) for sample in part) for part in (self.samples, self.validation)
        )
        return replace(self, samples=samples, validation=validation, image_variants=0)


def open_index(folder: Path) -> CacheIndex:
    """The index of a prepared folder.

    Raises:
        UsageError: the folder is not prepared, or by another version, or its index is not as it was written.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise UsageError(
            f"--load_tensors: {folder} has no index.json; run prepare_dataset.py --output_dir {quote(str(folder))}, "
            "or leave out --load_tensors and give the folder of the clips"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is no JSON ({error}); run prepare_dataset.py again") from None
    if not isinstance(values, dict) or values.pop("format", None) not in (INDEX_FORMAT, *OLD_FORMATS):
        rule = "was written by another version; run prepare_dataset.py again, which encodes nothing that is there"
        raise UsageError(f"{path}: {rule}")
    try:
        for name in ("samples", "validation"):
            values[name] = tuple(
                CachedSample(**s | {"bucket": Bucket(**s["bucket"])} | {keys: tuple(s[keys]) for keys in KEYS})
                for s in values[name]
            )
        index = CacheIndex(**values)
        bad = sorted(repr(key) for key in index.keys if not is_key(key))
    except (KeyError, TypeError):
        raise UsageError(f"{path}: is damaged; run prepare_dataset.py again") from None
    if bad:
        rule = f"{bad[0]} is not the key of a tensor, so it was changed"
        raise UsageError(f"{path}: {rule}; run prepare_dataset.py again")
    return index
