"""Stores encoded clips and captions on disk: content-addressed, verified by checksum, and safe against kills.

    tensors/ab/abcd....safetensors   the moments of one clip variant, or those of its first frame with several noises,
                                     or the embedding of one caption; the header holds a SHA-256 of the tensors
    ledger.jsonl                     one record for each source file and recipe: its plan, or why it failed
    health.jsonl                     one record for each clip variant: brightness, motion, look of its frames
    .claims                          which process works on what now (see claims.py)
    .index                           whose lock a process has while it writes the index and the report
    index.json                       the samples of the last preparation, which --load_tensors reads

``TensorCache`` reads and writes the tensors, ``Ledger`` the records. ``CacheIndex`` is the index, and ``open_index``
reads it. The key of a tensor is the hash of everything that determines it. So a file is never overwritten with other
content, and two jobs may share a folder. Moments are stored unscaled, so keys do not depend on scaling factors.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox import stopping
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import TENSOR_INDEX
from cogvideox.data.forms.folders import LEDGER_NAME, PREVIEW_FOLDER
from cogvideox.errors import UsageError
from cogvideox.files import (
    LOCK_NAME,
    PAGE_MARK,
    REPORT_NAME,
    disk_errors_converted,
    foreign_problem,
    has_mark,
    remove_stale_temporaries,
    stamp_of,
    write_atomically,
)
from cogvideox.locks import held

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FORMAT, OLD_FORMATS = 4, (3,)  # format 3 does not have the recipe
INDEX_LOCK = ".index"
_KEY_FIELDS = ("video_keys", "image_keys")  # fields of CachedSample that hold several keys
_KEY_PATTERN = re.compile("[0-9a-f]{64}")
HEALTH_NAME = "health.jsonl"  # what was measured of each clip when it was decoded
STRIPS_FOLDER = "strips"  # in PREVIEW_FOLDER
# The files by which a prepared folder is recognized, each with bytes near its start, and all that are replaced there.
_MARKS = {TENSOR_INDEX: b'"samples"', LEDGER_NAME: b'"request"', REPORT_NAME: PAGE_MARK}
_REPLACED = (*_MARKS, HEALTH_NAME, f"{PREVIEW_FOLDER}/{STRIPS_FOLDER}")


class CacheError(UsageError):
    """Reports a tensor file that is missing, damaged, or not the one that was written."""


def hash_of(values: object) -> str:
    """Returns the SHA-256 of a value that JSON can represent, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def is_key(value: object) -> bool:
    """Returns whether a value has the form of a key, 64 hexadecimal digits.

    An index may come from somebody else and hold anything, for example a path that leads out of the folder.
    """
    return isinstance(value, str) and _KEY_PATTERN.fullmatch(value) is not None


def foreign_files(flag: str, folder: Path) -> Iterator[str]:
    """Yields, as messages, the files that a preparation would replace, unless the folder was prepared before.

    Args:
        flag: The flag that names the folder.
        folder: The folder, which need not exist.
    """
    is_own = any(has_mark(folder / name, mark) for name, mark in _MARKS.items())
    yield from filter(None, (foreign_problem(flag, folder / name, is_own) for name in _REPLACED))


class TensorCache:
    """Reads and writes tensors by their keys, in files below one folder."""

    def __init__(self, folder: Path) -> None:
        """Stores the folder, which does not have to exist yet."""
        self.folder = folder

    def path(self, key: str) -> Path:
        """Returns the path of the file for a key, whether it exists or not. It is always inside the folder.

        Raises:
            CacheError: The value does not have the form of a key.
        """
        if not is_key(key):
            raise CacheError(f"{self.folder}: {key!r} is not the key of a tensor; it must be 64 hexadecimal digits")
        return self.folder / "tensors" / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Returns whether the file for a key exists; only ``read`` checks its content."""
        return self.path(key).is_file()

    def write(self, key: str, tensors: "dict[str, Tensor]") -> int:
        """Stores CPU tensors under a key, and returns how many bytes were written."""
        from safetensors.torch import save

        # Metadata is one entry, because safetensors writes several in random order, and equal tensors must give equal
        # files.
        content = save(tensors, metadata={"written": json.dumps({"key": key, "sha256": checksum(tensors)})})
        write_atomically(self.path(key), content)
        return len(content)

    def read(self, key: str) -> "dict[str, Tensor]":
        """Returns the tensors of a key by name.

        A damaged file is renamed, so that the next preparation encodes it anew.

        Raises:
            CacheError: The file is missing, incomplete, or changed, or it belongs to another key.
        """
        try:
            return self.examine(key)
        except CacheError as error:
            raise self.set_aside(key, str(error)) from None

    def set_aside(self, key: str, problem: str) -> CacheError:
        """Renames the unusable file of a key, so that the next preparation encodes it anew.

        Returns:
            The error for the caller to raise, with the problem and the fix.
        """
        path = self.path(key)
        with suppress(OSError):
            os.replace(path, path.with_suffix(".damaged"))
        return CacheError(f"{problem}; prepare again, which encodes it anew")

    def examine(self, key: str) -> "dict[str, Tensor]":
        """Returns the tensors of a key as ``read`` does, but leaves a damaged file in its place."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise CacheError(f"{path}: does not exist") from None
        except OSError as error:  # the content may be fine
            raise UsageError(f"{path}: cannot be read ({error.strerror}); fix that and run again") from None
        try:
            tensors = load(content)
            written = json.loads(header_of(content)["__metadata__"]["written"])
            written_key, written_sum = written["key"], written["sha256"]
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise CacheError(f"{path}: is incomplete") from None
        if written_key != key:
            raise CacheError(f"{path}: holds the tensors of another key")
        if written_sum != checksum(tensors):
            raise CacheError(f"{path}: its checksum is wrong")
        return tensors

    def remove(self, key: str) -> None:
        """Deletes the tensors of a key, so that they count as missing and are encoded anew."""
        self.path(key).unlink(missing_ok=True)


def header_of(content: bytes) -> dict[str, Any]:
    """Returns the header of a safetensors file from its bytes.

    The library reads metadata only with ``safe_open``, which maps the file into memory. If the disk then fails, or
    another program truncates the file, reading a tensor kills the process with SIGBUS. Bytes that were read before give
    an error in one line, and they are the same bytes that the checksum is computed from.
    """
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def checksum(tensors: "dict[str, Tensor]") -> str:
    """Returns the SHA-256 over the names, shapes, types and bytes of tensors."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Ledger:
    """Reads and appends records, one JSON object in a line. One field of a record is its name.

    For source files this is ``request``, a hash of the path, size and time of the file and of the recipe. When the file
    or the recipe changes, the request does too, and the old record is no longer found.
    """

    def __init__(self, folder: Path, file: str = LEDGER_NAME, name: str = "request") -> None:
        """Stores the path of the file, which does not have to exist yet, and the field that names a record."""
        self.path, self.name = folder / file, name

    def read(self, names: Container[str] | None = None) -> dict[str, dict[str, Any]]:
        """Returns the newest record of each name. An incomplete line, left by a kill, is skipped.

        Args:
            names: The names to look for; None for all.
        """
        return dict(self.named(self._lines(), names))

    def named(
        self, lines: Iterable[bytes], names: Container[str] | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the name and the record of each line that holds a record, of these names or of all."""
        for line in lines:
            try:
                record = json.loads(line)
                name = record[self.name]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(name, str) and (names is None or name in names):
                yield name, record

    def append(self, records: Iterable[Mapping[str, object]]) -> None:
        """Appends records. Other processes may append at the same time."""
        text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        if not text:
            return
        with disk_errors_converted(self.path.parent, len(text)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with held(self.path), stopping.disk_work():
                self._append(text)

    def _append(self, text: str) -> None:
        with open(self.path, "ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # A kill may have left half a line; the new record must not be joined to it.
                torn = file.read(1) != b"\n"
                text = "\n" + text if torn else text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> Iterator[bytes]:
        if self.path.is_file():
            with open(self.path, "rb") as file:
                yield from file


class NewRecords:
    """Tells of which names a ledger has got a record, from any process, since this object was created."""

    def __init__(self, ledger: Ledger) -> None:
        """Remembers where the ledger ends now."""
        self.ledger, self.position = ledger, self._size(ledger.path)
        self.names: set[str] = set()

    def has(self, name: str) -> bool:
        """Returns whether a record of this name was added."""
        if name not in self.names and self._size(self.ledger.path) > self.position:
            with open(self.ledger.path, "rb") as file:
                file.seek(self.position)
                added = file.read()
            complete = added[: added.rfind(b"\n") + 1]  # another process may be writing the last line
            self.position += len(complete)
            self.names.update(name for name, _ in self.ledger.named(complete.splitlines()))
        return name in self.names

    @staticmethod
    def _size(path: Path) -> int:
        return path.stat().st_size if path.exists() else 0


@contextmanager
def sole_writer(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock with which only one job at a time converts tensors into a folder.

    A second job waits, and then finds its work done.

    Args:
        folder: The folder of the cache, which is created.
        say: Prints a line; it is called in a wait that is longer than a moment.
    """
    with disk_errors_converted(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK_NAME, lambda holder: say(f"{folder}: another job is preparing it ({holder}); waiting")):
        remove_stale_temporaries(folder)
        yield


@contextmanager
def publishing(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock with which only one process at a time writes the index, and what is shown of it.

    Args:
        folder: The folder of the cache, which exists.
        say: Prints a line; it is called in a wait that is longer than a moment.
    """

    def wait(holder: str) -> None:
        say(f"{folder}: another process is writing the index or the report ({holder}); waiting")

    with disk_errors_converted(folder), held(folder / INDEX_LOCK, wait):
        yield


@dataclass(frozen=True)
class CachedSample:
    """Names a sample and its tensors in the cache.

    Attributes:
        id: The id of the clip, with the bucket behind an @ where the clip is in several buckets.
        caption: The caption, with the id token in front.
        bucket: The shape of the clip: frames, height and width.
        video_keys: Keys of the moments of the clip, one for each variant.
        prompt_key: Key of the embedding of the caption.
        image_keys: Keys of the moments of the first frames, one for each variant; empty where they were not encoded.
    """

    id: str
    caption: str
    bucket: Bucket
    video_keys: tuple[str, ...]
    prompt_key: str
    image_keys: tuple[str, ...] = ()

    @property
    def clip(self) -> str:
        """Id of the clip, which samples of the same clip in other buckets share."""
        return self.id.removesuffix(f"@{self.bucket}")


@dataclass(frozen=True)
class CacheIndex:
    """Lists the samples of one preparation, and what they were encoded with.

    Attributes:
        samples: The samples that are trained on.
        empty_prompt_key: Key of the embedding of the empty caption.
        fps: Frame rate at which clips were sampled.
        vae: Fingerprint of the weights of the VAE.
        text_encoder: Fingerprint of the weights of the text encoder.
        dtypes: Precision of each encoder, by its name.
        text_length: Number of tokens of each embedding.
        validation: Samples that are measured and never trained on.
        image_variants: How many encodings of each first frame there are, each with its own noise.
        recipe: Flags of the preparation (see config/prepared_flags.py); empty if they are not known.
    """

    samples: tuple[CachedSample, ...]
    empty_prompt_key: str
    fps: float
    vae: str
    text_encoder: str
    dtypes: dict[str, str]
    text_length: int
    validation: tuple[CachedSample, ...] = ()
    image_variants: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes index.json into a folder that no other process prepares."""
        write_atomically(folder / TENSOR_INDEX, self._content())

    def publish(self, folder: Path, before: list[int]) -> bool:
        """Writes index.json into a folder, unless another process has replaced it. The lock of ``publishing`` is held.

        Args:
            folder: The folder of the cache.
            before: Size and time of the index before the samples were listed; [] if there was none.

        Returns:
            Whether the folder has this index now. Otherwise its samples must be listed again, because it has another
            one, which may have samples that were added since.
        """
        path, content = folder / TENSOR_INDEX, self._content()
        if path.is_file() and path.read_bytes() == content:
            return True
        if stamp_of(path) != before:
            return False
        write_atomically(path, content)
        return True

    def _content(self) -> bytes:
        """Returns the content of index.json."""
        return json.dumps({"format": INDEX_FORMAT} | asdict(self), indent=1, ensure_ascii=False).encode()

    @property
    def keys(self) -> set[str]:
        """Keys of all tensors that the index refers to."""
        entries = (*self.samples, *self.validation)
        return {key for e in entries for key in (*e.video_keys, *e.image_keys, e.prompt_key)} | {self.empty_prompt_key}

    @property
    def fingerprint(self) -> str:
        """Hash that changes when any tensor of any training sample does."""
        rows = [[s.id, s.video_keys, s.prompt_key, *s.image_keys] for s in self.samples]
        return hash_of([*rows, self.empty_prompt_key])

    @property
    def digests(self) -> dict[str, str]:
        """Short hash of the tensors of each training sample, by the sample's id."""
        return {s.id: hash_of([s.video_keys, s.prompt_key, *s.image_keys])[:12] for s in self.samples}

    def without_images(self) -> "CacheIndex":
        """Returns the index without first frames, for text-to-video."""
        samples, validation = (
            tuple(replace(sample, image_keys=()) for sample in part) for part in (self.samples, self.validation)
        )
        recipe = {name: value for name, value in self.recipe.items() if name != "num_image_noise_variants"}
        return replace(self, samples=samples, validation=validation, image_variants=0, recipe=recipe)


def open_index(folder: Path) -> CacheIndex:
    """Reads the index of a prepared folder.

    Raises:
        UsageError: The folder was not prepared, or by another version, or its index was changed or damaged.
    """
    path = folder / TENSOR_INDEX
    if not path.is_file():
        fix = (
            "give the --output_dir of prepare_dataset.py, or leave out --load_tensors and give the folder of the clips"
        )
        if Ledger(folder).path.is_file():
            fix = "the preparation has not ended; run prepare_dataset.py again with the same flags, without --dry_run"
        raise UsageError(f"--load_tensors: {folder} has no index.json; {fix}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not valid JSON ({error}); run prepare_dataset.py again") from None
    if not isinstance(values, dict) or values.pop("format", None) not in (INDEX_FORMAT, *OLD_FORMATS):
        rule = "was written by another version; run prepare_dataset.py again, which keeps all tensors"
        raise UsageError(f"{path}: {rule}")
    try:
        for name in ("samples", "validation"):
            values[name] = tuple(
                CachedSample(**s | {"bucket": Bucket(**s["bucket"])} | {keys: tuple(s[keys]) for keys in _KEY_FIELDS})
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
