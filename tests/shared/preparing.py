"""Creates preparations with small buckets for tests, and replaces worker processes where they are not tested."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cogvideox.config.flags import DataFlags, EncodeFlags, ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.data.cache import CacheIndex
from cogvideox.data.media.workers import Job, Workers
from cogvideox.preparation.prepare import Preparation
from cogvideox.runtime.ranks import alone


class InlineWorkers(Workers):
    """Runs jobs in this process, in place of worker processes that take half a second each to start."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> InlineWorkers:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def run(self, jobs: Iterable[Job]) -> Iterator[Any]:
        for function, *arguments in jobs:
            yield function(*arguments)


def decode_inline(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Lets modules that start worker processes decode in this process."""
    for module in modules:
        monkeypatch.setattr(module, "Workers", lambda number, limits: InlineWorkers())


def data_flags(root: Path, **changes: Any) -> DataFlags:
    given: dict[str, Any] = {"height_buckets": (32,), "width_buckets": (48,), "frame_buckets": (5,)}
    return DataFlags((str(root),), **given | {"max_num_frames": 49} | changes)


def preparation(
    model: Path,
    root: Path,
    output: Path,
    ranks: Any = None,
    encode_flags: EncodeFlags | None = None,
    image_variants: int = 0,
    flags: DataFlags | None = None,
    **changes: Any,
) -> Preparation:
    model_flags, given = ModelFlags(str(model)), flags or data_flags(root, **changes)
    where = read_geometry(model_flags), output, ranks or alone()
    return Preparation(model_flags, given, encode_flags or EncodeFlags(), *where, image_variants)


def complete(*arguments: Any, caption_batch: int = 4, **changes: Any) -> CacheIndex:
    made = preparation(*arguments, **changes)
    with made.workers_kept():
        records = made.plan()
        made.check(records)
        index, _ = made.encode(records, caption_batch)
    assert made.publish(index)
    return index


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
