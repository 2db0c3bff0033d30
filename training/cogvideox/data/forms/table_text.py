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
from cogvideox.data.forms.tables import cells_of_any_size, csv_rows, separator_of
from cogvideox.errors import UsageError
from cogvideox.files import write_atomically

SEPARATORS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}  # by the suffix of the file; JSON lines have none
_MARKS = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}  # byte order marks and what they mean
LINE_END = "\r\n"
_BOM = "\ufeff"  # the byte order mark as a character


@dataclass
class TableText:
    """The text of a table.

    Attributes:
        file: Path of the table.
        encoding: Python's name of the encoding.
        separator: The character between cells; empty for JSON lines.
        lines: All lines of the file without the line feed, but with a carriage return before it and with the mark.
        columns: Names of the columns of a CSV; empty for JSON lines.
        rows: The indices of the lines of each row, and its cells by column.
        replaced: Indices of lines whose row is written on an earlier line now.
    """

    file: Path
    encoding: str
    separator: str
    lines: list[str]
    columns: list[str]
    rows: list[tuple[range, dict[str, Any]]]
    replaced: set[int] = field(default_factory=set)

    @classmethod
    def new(cls, file: Path, columns: Sequence[str]) -> "TableText":
        """Returns a CSV or TSV that has no rows yet and is not written yet."""
        table = cls(file, "utf-8", SEPARATORS[file.suffix.lower()], [""], list(columns), [])
        table.append([{name: name for name in columns}])
        return table

    @classmethod
    def read(cls, file: Path) -> "TableText":
        """Reads a table.

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
        plain = [line.removesuffix("\r") for line in (lines[0].removeprefix(_BOM), *lines[1:])]
        separator = SEPARATORS[file.suffix.lower()]
        table = cls(file, encoding, separator and separator_of(separator, plain), lines, [], [])
        table.rows.extend(table._cells(plain, problems) if separator else _objects(file, plain))
        if problems:
            raise UsageError(problems.lines())
        return table

    def _cells(self, plain: Sequence[str], problems: Problems) -> list[tuple[range, dict[str, Any]]]:
        with cells_of_any_size():
            header, *rows = list(csv_rows(self.separator, str(self.file), plain, problems)) or [(range(0), [])]
        self.columns.extend(name.strip() for name in header[1])
        return [(span, dict(zip(self.columns, cells, strict=False))) for span, cells in rows]

    def replace(self, row: int, column: str, value: str) -> None:
        """Writes a value into a cell."""
        span, cells = self.rows[row]
        cells[column] = value
        end = "\r" if self.lines[span[-1]].endswith("\r") else ""
        mark = _BOM if span.start == 0 and self.lines[0].startswith(_BOM) else ""
        # Further lines of the row are kept until the file is written, so that rows after it keep their indices.
        self.lines[span.start] = f"{mark}{self._written(cells)}{end}"
        self.replaced.update(span[1:])

    def append(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Adds rows at the end. Columns that a row lacks are blank."""
        end = "\r" if self.lines[0].endswith("\r") else ""
        if self.lines[-1] == "":
            self.lines.pop()
        elif end:
            self.lines[-1] += end
        self.lines += [f"{self._written(cells)}{end}" for cells in rows]
        self.lines.append("")

    def _written(self, cells: Mapping[str, Any]) -> str:
        if not self.separator:
            return json.dumps(cells, ensure_ascii=False)
        text = io.StringIO()
        # The writer puts quotes around line breaks only if they are part of its own line end.
        writer = csv.writer(text, delimiter=self.separator, lineterminator=LINE_END)
        writer.writerow(cells.get(name, "") for name in self.columns)
        return text.getvalue().removesuffix(LINE_END)

    def write(self) -> None:
        """Writes the file."""
        text = "\n".join(line for number, line in enumerate(self.lines) if number not in self.replaced)
        write_atomically(self.file, text.encode(self.encoding))


def _objects(file: Path, plain: Sequence[str]) -> list[tuple[range, dict[str, Any]]]:
    try:
        return [(range(n, n + 1), json.loads(line)) for n, line in enumerate(plain) if line.strip()]
    except ValueError as error:
        raise UsageError(f"{file}: is not valid JSON lines ({error}); each line must be one JSON object") from None


def can_be_changed(file: str) -> bool:
    """Returns whether ``TableText`` supports the format of a table, judged by its suffix."""
    return os.path.splitext(file)[1].lower() in SEPARATORS
