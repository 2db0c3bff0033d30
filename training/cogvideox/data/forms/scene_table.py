"""Writes the table of scenes: one row for each clip, to which later runs only add.

``clips_of`` reads what the folder has. ``SceneTable`` knows the files that the table has, whoever wrote or edited their
rows, and the files that an earlier run has handled, even if a person deleted their rows. It never changes a row. The
names of the handled files are in a hidden file next to the table.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogvideox.config.flags import FolderFlags
from cogvideox.data.forms.columns import Column, Problems
from cogvideox.data.forms.folders import read_rows
from cogvideox.data.forms.paths import PathRules
from cogvideox.data.forms.table_text import TableText
from cogvideox.data.forms.tables import BESIDE_TABLE, CAPTION_COLUMNS, IMAGE_COLUMNS, VIDEO_COLUMNS, Table
from cogvideox.data.forms.unused import Unused
from cogvideox.data.media.frames import Section
from cogvideox.errors import UsageError
from cogvideox.files import write_atomically

SECONDS_BETWEEN_WRITES = 5.0
VIDEO, IMAGE, START, END, CAPTION = "video", "image", "start", "end", "caption"
_ALIASES = {VIDEO: VIDEO_COLUMNS, IMAGE: IMAGE_COLUMNS, CAPTION: CAPTION_COLUMNS}


@dataclass(frozen=True)
class Clip:
    """A row of the table.

    Attributes:
        video: Absolute path of the file.
        section: The part of it; None for all of it.
        caption: The caption; it may be empty.
        image: Absolute path of the first frame, if the data set names one.
    """

    video: str
    section: Section | None = None
    caption: str = ""
    image: str = ""


def clips_of(data: FolderFlags, unused: Unused | None = None) -> dict[str, list[Clip]]:
    """Reads the clips of a folder, whose captions may be missing.

    Args:
        data: Flags with one data_root.
        unused: Collects files that are not used, although somebody may have meant them to be.

    Returns:
        The clips of each file, by its absolute path.

    Raises:
        UsageError: The folder cannot be read.
    """
    problems = Problems(captions=False)
    columns, files = read_rows(data.data_root[0], data, problems, Unused() if unused is None else unused)
    if problems:
        raise UsageError(problems.lines())
    blank = [""] * len(files)
    captions = columns.captions.texts() if columns.captions is not None else blank
    images = _paths(columns.images) if columns.images is not None else blank
    clips: dict[str, list[Clip]] = {}
    for file, section, caption, image in zip(
        files, columns.sections or [None] * len(files), captions, images, strict=True
    ):
        path = os.path.normpath(file)
        clips.setdefault(path, []).append(Clip(path, section, caption, image))
    return clips


def _paths(column: Column) -> list[str]:
    return [os.path.join(column.folder, path) if path else "" for path in column.texts()]


class SceneTable:
    """A table that grows.

    Attributes:
        known: Absolute paths of the files that have rows or have been handled before.
    """

    def __init__(self, file: Path, root: str, rules: PathRules, has_images: bool) -> None:
        """Opens a table, which need not exist.

        Args:
            file: A CSV or TSV file.
            root: Absolute path of the folder of the clips, to which the paths in the table are relative.
            rules: Find the files that the table names.
            has_images: Whether a new table has a column of first frames.

        Raises:
            UsageError: The table exists and cannot be read, or lacks a column.
        """
        self._file, self._root = file, root
        self._columns = (VIDEO, *((IMAGE,) if has_images else ()), START, END, CAPTION)
        self._handled_file = file.with_name(f".{file.name}.handled")
        self._handled: list[str] = []
        self._waiting: list[Clip] = []
        self._written_at = time.monotonic()
        self.known: set[str] = set()
        if file.exists():
            if self._handled_file.exists():
                self._handled = self._handled_file.read_text(encoding="utf-8").split("\n")[:-1]
            self.known = _files_in(self._read().table, root, rules)
            self.known.update(os.path.normpath(os.path.join(root, name)) for name in self._handled)

    def add(self, video: str, clips: Sequence[Clip]) -> None:
        """Adds all rows of a file, or notes that it was handled and has none. Writes them from time to time."""
        self._handled.append(os.path.relpath(video, self._root))
        self._waiting += clips
        self.known.add(video)
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Writes what has not been written. The table is read again before that, because a person may have edited it.

        Raises:
            UsageError: The table cannot be read any more, or lacks a column.
        """
        self._written_at = time.monotonic()
        if self._waiting:
            text = self._read() if self._file.exists() else TableText.new(self._file, self._columns)
            text.append([self._row(clip, text.table) for clip in self._waiting])
            text.write()
            self._waiting.clear()
        if self._handled:
            write_atomically(self._handled_file, "".join(f"{name}\n" for name in self._handled).encode())

    def _row(self, clip: Clip, table: Table) -> dict[str, str]:
        start, end = clip.section or (None, None)
        texts = {
            VIDEO: clip.video,
            IMAGE: clip.image,
            START: _seconds(start),
            END: _seconds(end),
            CAPTION: clip.caption,
        }
        cells: dict[str, str] = {}
        for key, text in texts.items():
            name = _column_of(table, key)
            if text:
                cells[name] = self._listed(text, name) if key in (VIDEO, IMAGE) else text
        return cells

    def _read(self) -> TableText:
        text = TableText.read(self._file)
        missing = [key for key in self._columns if _column_of(text.table, key) not in text.table.columns]
        if missing:
            rule = f"has no column {' and '.join(missing)}; add it, or name another file with --table"
            raise UsageError(f"{self._file}: {rule}")
        return text

    def _listed(self, path: str, column: str) -> str:
        """Returns a path as it is written into a column; one outside the folder of the clips stays absolute."""
        if column == BESIDE_TABLE:
            return os.path.relpath(path, self._file.absolute().parent).replace(os.sep, "/")
        return os.path.normpath(path).removeprefix(os.path.join(self._root, "")).replace(os.sep, "/")


def _column_of(table: Table, key: str) -> str:
    """Returns the name that a column has in the table, or ``key`` if the table lacks it."""
    return next((name for name in _ALIASES.get(key, ()) if name in table.columns), key)


def _files_in(table: Table, root: str, rules: PathRules) -> set[str]:
    """Returns the absolute paths of the files in a table, whether they exist or not."""
    name = _column_of(table, VIDEO)
    folder = os.path.dirname(os.path.abspath(table.file)) if name == BESIDE_TABLE else root
    values = [str(cells.get(name) or "").strip() for cells in table.rows]
    column = Column(values, table.location, "remove the row", folder)
    return {os.path.normpath(path) for path in rules.find(column, "video", Problems()) if path is not None}


def _seconds(time: float | None) -> str:
    return "" if time is None else f"{time:.3f}"
