"""Writes small data sets, and reads them as the scripts do: the samples, their captions, or the problems."""

from pathlib import Path
from typing import Any

import pytest

from cogvideox.config.flags import DataFlags
from cogvideox.data.forms.samples import Sample, read_samples
from cogvideox.errors import UsageError


def write_lists(
    root: Path, captions: str | bytes, videos: str | bytes, files: tuple[str, ...] = ("a.mp4", "b.mp4")
) -> Path:
    """Writes prompts.txt and videos.txt with these contents, and the files; returns the folder."""
    for name, text in (("prompts.txt", captions), ("videos.txt", videos)):
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return touch(root, *files)


def touch(root: Path, *names: str) -> Path:
    """Writes files that are not videos, which is enough for reading lists; returns the folder."""
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not read")
    return root


def read(*roots: Path, **options: Any) -> list[Sample]:
    """Returns the samples of folders.

    Args:
        roots: The folders of --data_root.
        options: Further fields of DataFlags.
    """
    return read_samples(DataFlags(data_root=tuple(map(str, roots)), **options))


def problems(*roots: Path, **options: Any) -> tuple[str, ...]:
    """Returns the problems of folders, and asserts that each is one printable line of at most 500 characters."""
    with pytest.raises(UsageError) as caught:
        read(*roots, **options)
    assert all(problem.isprintable() and len(problem) <= 500 for problem in caught.value.problems)
    return caught.value.problems


def captions(*roots: Path, **options: Any) -> list[str]:
    """Returns the captions of folders."""
    return [sample.caption for sample in read(*roots, **options)]
