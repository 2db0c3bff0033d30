"""Changes tables in CSV, TSV or JSON lines, and keeps every line that is not changed as it is, byte for byte.

``TableText`` reads a table, replaces cells or adds rows, and writes the file. Encoding, byte order mark, separator and
line ends stay those of the file. A changed row of a CSV is written anew by the csv module, with the same cells.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox.data.forms.columns import Problems
from cogvideox.data.forms.tables import TABLE_READERS, Table, cells_of_any_size, separator_of
from cogvideox.errors import UsageError
from cogvideox.files import write_atomically

SEPARATORS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}  # by the suffix of the file; JSON lines have none
_MARKS = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}  # byte order marks and what they mean
_MARK = "\ufeff"  # a byte order mark as a character
_LINE_END = "\r\n"


@dataclass
class TableText:
    """The text of a table.

    Attributes:
        file: Path of the table.
        encoding: Python's name of the encoding.
        separator: The character between cells; empty for JSON lines.
        lines: All lines of the file without the line feed, but with a carriage return before it and with the mark.
        table: What the lines contain, as they were read.
        replaced: Indices of lines whose row is written on an earlier line now.
    """

    file: Path
    encoding: str
    separator: str
    lines: list[str]
    table: Table
    replaced: set[int] = field(default_factory=set)

    @classmethod
    def new(cls, file: Path, columns: Sequence[str]) -> "TableText":
        """Returns a CSV or TSV that has no rows yet and is not written yet."""
        text = cls(file, "utf-8", SEPARATORS[file.suffix.lower()], [""], Table(str(file), list(columns), [], []))
        text.append([{name: name for name in columns}])
        return text

    @classmethod
    def read(cls, file: Path) -> "TableText":
        """Reads a table, which may have no rows.

        Raises:
            UsageError: It cannot be read.
        """
        problems = Problems()
        try:
            data = file.read_bytes()
            encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
            lines = data.decode(encoding).split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: cannot be read ({error}); save it as UTF-8") from None
        plain = _plain(lines)
        table = TABLE_READERS[file.suffix.lower()](str(file), plain, problems)
        if table is None or problems:
            raise UsageError(problems.lines())
        separator = SEPARATORS[file.suffix.lower()]
        return cls(file, encoding, separator and separator_of(separator, plain), lines, table)

    def replace(self, row: int, column: str, value: str) -> None:
        """Writes a value into a cell."""
        start = self.table.numbers[row] - 1
        span = self.table.spans[row] if self.table.spans else range(start, start + 1)
        lines = self.lines[span.start : span.stop]
        end = "\r" if lines[-1].endswith("\r") else ""
        mark = _MARK if lines[0].startswith(_MARK) else ""
        # Further lines of the row are kept until the file is written, so that rows after it keep their indices.
        self.lines[span.start] = f"{mark}{self._with(_plain(lines), column, value)}{end}"
        self.replaced.update(span[1:])

    def _with(self, lines: Sequence[str], column: str, value: str) -> str:
        """Returns the text of a row with another value in a cell."""
        if not self.separator:
            return json.dumps(json.loads(lines[0]) | {column: value}, ensure_ascii=False)
        with cells_of_any_size():
            cells = next(csv.reader((f"{line}\n" for line in lines), delimiter=self.separator, strict=True))
        cells[self.table.columns.index(column)] = value
        return self._joined(cells)

    def append(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Adds rows to a CSV or TSV, at its end. Columns that a row lacks are blank."""
        end = "\r" if self.lines[0].endswith("\r") else ""
        if self.lines[-1] == "":
            self.lines.pop()
        elif end:
            self.lines[-1] += end
        self.lines += [f"{self._joined([cells.get(name, '') for name in self.table.columns])}{end}" for cells in rows]
        self.lines.append("")

    def _joined(self, cells: Sequence[Any]) -> str:
        text = io.StringIO()
        # The writer puts quotes around line breaks only if they are part of its own line end.
        csv.writer(text, delimiter=self.separator, lineterminator=_LINE_END).writerow(cells)
        return text.getvalue().removesuffix(_LINE_END)

    def write(self) -> None:
        """Writes the file."""
        text = "\n".join(line for number, line in enumerate(self.lines) if number not in self.replaced)
        write_atomically(self.file, text.encode(self.encoding))


def _plain(lines: Sequence[str]) -> list[str]:
    """Returns lines without carriage returns and without a byte order mark."""
    return [line.removesuffix("\r") for line in (lines[0].removeprefix(_MARK), *lines[1:])]


def can_be_changed(file: str) -> bool:
    """Returns whether ``TableText`` supports the format of a table, judged by its suffix."""
    return os.path.splitext(file)[1].lower() in SEPARATORS
