"""Finds the clips of a folder that have no caption, and writes captions where the form of the folder has them.

``find_uncaptioned`` returns an ``Uncaptioned`` for each such clip. Its ``store`` writes the caption: ``TextFiles`` into
a text file next to each clip, ``CaptionList`` into prompts.txt. A text that somebody wrote is never changed: before a
caption is written, its place is read again and must still be blank.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cogvideox.config.flags import FolderFlags
from cogvideox.data.forms.columns import Columns, Problems, read_lines
from cogvideox.data.forms.folders import read_rows
from cogvideox.data.forms.tables import TABLE_READERS
from cogvideox.errors import UsageError
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
        row: The line of that file, counted from 0.
        store: What writes the caption.
    """

    video: str
    place: str
    row: int
    store: Store

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


class CaptionList:
    """Writes captions into the blank lines of a list."""

    def __init__(self, file: str, length: int) -> None:
        """Prepares a list.

        Args:
            file: Path of the list, which need not exist.
            length: Number of clips, and thus of lines.
        """
        self._file, self._length = file, length
        self._waiting: dict[int, str] = {}
        self._written_at = time.monotonic()

    def write(self, place: str, row: int, caption: str) -> None:
        """Takes a caption, and writes the list from time to time."""
        self._waiting[row] = caption
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Writes the captions that wait into those of their lines that are still blank."""
        self._written_at = time.monotonic()
        if not self._waiting:
            return
        lines = self._lines()
        for row, caption in self._waiting.items():
            lines[row] = lines[row] if lines[row].strip() else caption
        write_atomically(Path(self._file), "".join(f"{line}\n" for line in lines).encode())
        self._waiting.clear()

    def _lines(self) -> list[str]:
        problems = Problems()
        found = (read_lines(self._file, problems) or []) if os.path.exists(self._file) else []
        while found and found[-1] == "":
            found.pop()
        if problems or len(found) > self._length:
            fix = "end every program that writes to it, and run the same command again"
            raise UsageError(f"{self._file}: has changed while captions were written; {fix}")
        lines = [line or "" for line in found]
        return lines + [""] * (self._length - len(lines))


def find_uncaptioned(data: FolderFlags) -> tuple[list[Uncaptioned], int]:
    """Returns the clips without captions of all folders, and the number of clips with a caption.

    Raises:
        UsageError: A folder cannot be read, or its captions are in a table and some are missing.
    """
    missing: list[Uncaptioned] = []
    found: list[str] = []
    present = 0
    for folder in (*data.data_root, *data.validation_data_root):
        problems = Problems(captions=False)
        clips, count = _in_folder(folder, data, problems)
        missing += clips
        present += count
        found += problems.lines()
    if found:
        raise UsageError(found)
    return missing, present


def _in_folder(folder: str, data: FolderFlags, problems: Problems) -> tuple[list[Uncaptioned], int]:
    columns, files = read_rows(folder, data, problems)
    if problems:
        return [], 0
    captions = columns.captions.values if columns.captions is not None else [""] * len(files)
    rows = [row for row, caption in enumerate(captions) if not caption]
    if rows and os.path.splitext(columns.caption_file)[1].lower() in TABLE_READERS:
        fix = "write them there, or name the clips in videos.txt instead, for which captions go to prompts.txt"
        rule = f"{columns.caption_file}: {len(rows)} of its rows have no caption; captions are not written into tables"
        problems.add("table without captions", f"{rule}; {fix}")
        return [], 0
    return list(_with_places(columns, files, rows)), len(files) - len(rows)


def _with_places(columns: Columns, files: Sequence[str], rows: Sequence[int]) -> Iterator[Uncaptioned]:
    store: Store = CaptionList(columns.caption_file, len(files)) if columns.caption_file else TextFiles()
    for row in rows:
        video = files[row]
        place = columns.caption_file
        if not place:
            assert columns.captions is not None, "captions next to clips are a column, even if all are missing"
            blank = columns.captions.location(row)  # a file without text, or the folder if there is none
            place = blank if os.path.isfile(blank) else f"{os.path.splitext(video)[0]}.txt"
        yield Uncaptioned(video, place, row, store)
