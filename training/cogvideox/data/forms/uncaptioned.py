"""Finds the clips of a folder that have no caption, and writes captions where the form of the folder has them.

``find_uncaptioned`` returns an ``Uncaptioned`` for each such clip. Its ``store`` writes the caption: ``TextFiles`` into
a text file next to each clip, ``CaptionList`` into prompts.txt, ``CaptionCells`` into a table. A text that somebody
wrote is never changed: before a caption is written, its place is read again and must still be blank.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cogvideox.config.flags import FolderFlags
from cogvideox.data.forms.columns import Columns, Problems, read_lines
from cogvideox.data.forms.folders import read_rows
from cogvideox.data.forms.table_text import TableText, can_be_changed
from cogvideox.data.forms.tables import CAPTION_COLUMNS, TABLE_READERS, is_blank
from cogvideox.data.forms.unused import Unused
from cogvideox.data.media.frames import Section
from cogvideox.errors import UsageError, plural
from cogvideox.files import write_atomically

SECONDS_BETWEEN_WRITES = 5.0  # of a list, which is written as a whole


class Store(Protocol):
    """Writes captions to the disk."""

    def write(self, place: str, row: int, caption: str) -> None:
        """Takes a caption of one line; ``place`` and ``row`` are those of the clip."""

    def flush(self) -> None:
        """Writes all captions that were taken and are not on the disk yet."""


@dataclass(frozen=True)
class Uncaptioned:
    """A clip without a caption.

    Attributes:
        video: Absolute path of the video.
        place: The file that the caption belongs into.
        row: The line of that file, or the row of the table, counted from 0.
        store: What writes the caption.
        section: The part of the video that the clip is; None for all of it.
    """

    video: str
    place: str
    row: int
    store: Store
    section: Section | None = None

    @property
    def name(self) -> str:
        """The path of the video, followed by the section if there is one, for messages."""
        return self.video if self.section is None else f"{self.video} {self.section}"

    def write(self, caption: str) -> None:
        """Writes the caption as one line, now or within SECONDS_BETWEEN_WRITES of other captions."""
        self.store.write(self.place, self.row, " ".join(caption.split()))


class TextFiles:
    """Writes each caption into a file of its own."""

    def write(self, place: str, row: int, caption: str) -> None:
        """Writes the caption, unless the file has a text by now."""
        path = Path(place)
        if not path.exists() or not path.read_bytes().strip():
            write_atomically(path, f"{caption}\n".encode())

    def flush(self) -> None:
        """Does nothing, because each caption is written at once."""


class _WholeFile:
    """Collects captions for a file that is written as a whole, and writes them from time to time."""

    def __init__(self) -> None:
        self._waiting: dict[int, str] = {}
        self._written_at = time.monotonic()

    def write(self, place: str, row: int, caption: str) -> None:
        """Takes a caption, and writes the file from time to time."""
        self._waiting[row] = caption
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Writes the captions that wait."""
        self._written_at = time.monotonic()
        if self._waiting:
            self._save(self._waiting)
            self._waiting.clear()

    def _save(self, captions: dict[int, str]) -> None:
        """Writes captions, by row, where the file is still blank."""
        raise NotImplementedError


class CaptionList(_WholeFile):
    """Writes captions into the blank lines of a list."""

    def __init__(self, file: str, length: int) -> None:
        """Prepares a list.

        Args:
            file: Path of the list, which need not exist.
            length: Number of clips, and thus of lines.
        """
        super().__init__()
        self._file, self._length = file, length

    def _save(self, captions: dict[int, str]) -> None:
        lines = self._lines()
        for row, caption in captions.items():
            lines[row] = lines[row] if lines[row].strip() else caption
        write_atomically(Path(self._file), "".join(f"{line}\n" for line in lines).encode())

    def _lines(self) -> list[str]:
        problems = Problems()
        found = (read_lines(self._file, problems) or []) if os.path.exists(self._file) else []
        while found and not (found[-1] or "").strip():  # as blank lines at the end of a list are not read
            found.pop()
        if problems or len(found) > self._length:
            raise _changed(self._file)
        lines = [line or "" for line in found]
        return lines + [""] * (self._length - len(lines))


class CaptionCells(_WholeFile):
    """Writes captions into the blank cells of a table, and changes nothing else in it."""

    def __init__(self, file: str, column: str) -> None:
        """Reads a table.

        Args:
            file: Path of a CSV, TSV or JSON lines file.
            column: Name of the column of captions.

        Raises:
            UsageError: The table cannot be read.
        """
        super().__init__()
        self._file, self._column = Path(file), column
        self._clips = [self._clip(cells) for cells in TableText.read(self._file).table.rows]

    def _clip(self, cells: dict[str, Any]) -> dict[str, Any]:
        """Returns the cells that say which clip a row is about."""
        return {name: value for name, value in cells.items() if name != self._column}

    def _save(self, captions: dict[int, str]) -> None:
        text = TableText.read(self._file)
        rows = text.table.rows
        for row, caption in captions.items():
            if row >= len(rows) or self._clip(rows[row]) != self._clips[row]:
                raise _changed(str(self._file))
            if is_blank(rows[row].get(self._column)):
                text.replace(row, self._column, caption)
        text.write()


def _changed(file: str) -> UsageError:
    fix = "end every program that writes to it, and run the same command again"
    return UsageError(f"{file}: has changed while captions were written; {fix}")


def find_uncaptioned(data: FolderFlags, unused: Unused) -> tuple[list[Uncaptioned], int]:
    """Returns the clips without captions of all folders, and the number of clips with a caption.

    Args:
        data: The flags of the folders.
        unused: Collects files that are not used, although somebody may have meant them to be.

    Raises:
        UsageError: A folder cannot be read, or captions cannot be written into its table.
    """
    missing: list[Uncaptioned] = []
    found: list[str] = []
    present = 0
    for folder in (*data.data_root, *data.validation_data_root):
        problems = Problems(captions=False)
        clips, count = _in_folder(folder, data, problems, unused)
        missing += clips
        present += count
        found += problems.lines()
    if found:
        raise UsageError(found)
    return missing, present


def _in_folder(folder: str, data: FolderFlags, problems: Problems, unused: Unused) -> tuple[list[Uncaptioned], int]:
    columns, files = read_rows(folder, data, problems, unused)
    if problems:
        return [], 0
    captions = columns.captions.values if columns.captions is not None else [""] * len(files)
    rows = [row for row, caption in enumerate(captions) if not caption]
    if rows and _is_table(columns.caption_file) and (rule := _table_problem(columns)):
        problems.add(
            "table without captions",
            f"{columns.caption_file}: {plural(len(rows), 'row has', 'rows have')} no caption; {rule}",
        )
        return [], 0
    return list(_with_places(columns, files, rows)), len(files) - len(rows)


def _with_places(columns: Columns, files: Sequence[str], rows: Sequence[int]) -> Iterator[Uncaptioned]:
    store: Store = TextFiles()
    if rows and _is_table(columns.caption_file):
        assert columns.captions is not None, "a table without this column is a problem"
        store = CaptionCells(columns.caption_file, columns.captions.name)
    elif columns.caption_file:
        store = CaptionList(columns.caption_file, len(files))
    for row in rows:
        video = files[row]
        place = columns.caption_file
        if not place:
            assert columns.captions is not None, "captions next to clips are a column, even if all are missing"
            blank = columns.captions.location(row)  # a file without text, or the folder if there is none
            place = blank if os.path.isfile(blank) else f"{os.path.splitext(video)[0]}.txt"
        yield Uncaptioned(video, place, row, store, columns.sections[row] if columns.sections is not None else None)


def _is_table(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in TABLE_READERS


def _table_problem(columns: Columns) -> str:
    """Returns why captions cannot be written into a table; empty if they can be."""
    if not can_be_changed(columns.caption_file):
        return "captions are written into CSV, TSV and JSON lines only; convert the table"
    if columns.captions is None:
        return f"add a column with the name {CAPTION_COLUMNS[1]}, or name its column with --caption_column"
    return ""
