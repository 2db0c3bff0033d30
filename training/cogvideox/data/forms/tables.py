"""Reads tables of clips, in CSV, TSV, JSON lines or as a JSON list of objects, into columns.

``read_table`` is the entry point; ``TABLE_READERS`` maps the suffix of a file to its reader. A table is read strictly:
a row that does not fit its header, a quote that is never closed, or a value that is not text is reported with its
location, and nothing is guessed.
"""

import csv
import difflib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from shlex import quote
from typing import Any

from cogvideox.data.forms.columns import (
    NO_CAPTIONS,
    WITHOUT_CAPTIONS,
    Column,
    Columns,
    Problems,
    read_lines,
)
from cogvideox.data.media.frames import Section
from cogvideox.errors import first_names, plural

CAPTION_COLUMNS = ("text", "caption", "prompt")
VIDEO_COLUMNS = ("video", "file_name", "video_path", "path")
IMAGE_COLUMNS = ("image",)
SECTION_COLUMNS = ("start", "end")
# Hugging Face's name for the column of files. Its paths are relative to the table and not to the data root.
BESIDE_TABLE = "file_name"
_NO_TEXT = ("nan", "none", "null")  # what other programs write for a missing text

Lines = Sequence[str | None]
Names = tuple[str | None, str | None, str | None]  # --caption_column, --video_column, --image_column


@dataclass(frozen=True)
class Table:
    """Holds the rows of a table.

    Attributes:
        file: Path of the table.
        columns: Names of the columns.
        rows: The cells of each row by column name.
        numbers: The line of each row, or its position in a JSON list, counted from 1.
        joint: What separates the file and the number in messages.
        spans: The indices of the lines of each row, counted from 0, if a row may have several; else empty.
    """

    file: str
    columns: list[str]
    rows: list[dict[str, Any]]
    numbers: Sequence[int]
    joint: str = ":"
    spans: Sequence[range] = ()

    def location(self, row: int) -> str:
        """Returns where a row, counted from 0, is written, as "file:line"."""
        return f"{self.file}{self.joint}{self.numbers[row]}"


def read_table(file: str, root: str, names: Names, problems: Problems) -> Columns:
    """Reads the columns of captions, videos and images of a table.

    Args:
        file: Path of the table.
        root: Absolute folder that the paths in the table are relative to.
        names: The names of the three columns that flags give; None for the default names.
        problems: Collects what is wrong.
    """
    table = _open_table(file, problems)
    if table is None:
        return Columns()
    has_images = names[2] is not None or any(name in table.columns for name in IMAGE_COLUMNS)
    return Columns(
        _read_column(table, root, "--caption_column", names[0], CAPTION_COLUMNS, problems),
        _read_column(table, root, "--video_column", names[1], VIDEO_COLUMNS, problems),
        _read_column(table, root, "--image_column", names[2], IMAGE_COLUMNS, problems) if has_images else None,
        sections=_read_sections(table, problems),
        caption_file=file,
    )


def _open_table(file: str, problems: Problems) -> Table | None:
    suffix = os.path.splitext(file)[1].lower()
    if suffix not in TABLE_READERS:
        rule = f"is not a table; it must end in {' or '.join(TABLE_READERS)}"
        problems.add("unknown table", f"--dataset_file {file}: {rule}")
        return None
    lines = read_lines(file, problems)
    table = TABLE_READERS[suffix](file, lines, problems) if lines is not None else None
    if table is not None and not table.rows:
        if not problems:
            problems.add("empty table", f"{file}: has no rows; it needs one for each clip")
        return None
    return table


def _read_column(
    table: Table, root: str, flag: str, given: str | None, defaults: Sequence[str], problems: Problems
) -> Column | None:
    """Reads the column that the flag names, or else the first of the default names that the table has."""
    wanted = defaults if given is None else (given,)
    name = next((name for name in wanted if name in table.columns), None)
    if name is None:
        _add_missing_column(table, root, flag, given, wanted, problems)
        return None
    values = [cells.get(name) for cells in table.rows]
    texts = [_cell_text(value, row, name, table, problems) for row, value in enumerate(values)]
    folder = os.path.dirname(table.file) if name == BESIDE_TABLE else root
    return Column(texts, table.location, "remove the row", folder, name)


def _read_sections(table: Table, problems: Problems) -> list[Section | None] | None:
    """Reads the columns start and end; None for a row in which both are blank. Without these columns returns None."""
    if not set(SECTION_COLUMNS) & set(table.columns):
        return None
    sections: list[Section | None] = []
    for row, cells in enumerate(table.rows):
        texts = [_cell_text(cells.get(name), row, name, table, problems) or "" for name in SECTION_COLUMNS]
        section = _section(*texts)
        if isinstance(section, str):
            problems.add("no section", f"{table.location(row)}: {section}")
        sections.append(None if isinstance(section, str) else section)
    return sections


def _section(start: str, end: str) -> Section | str | None:
    """Returns the section that two cells describe, or what is wrong with them."""
    if not (start or end):
        return None
    try:
        section = Section(float(start or 0), float(end) if end else None)
    except ValueError:
        return f"start {start} and end {end}: must be seconds, such as 12.5"
    last = math.inf if section.end is None else section.end
    if not 0 <= section.start < last or section.start == math.inf or section.end == math.inf:
        return f"start {start} and end {end}: start must be at least 0 and less than end"
    return section


def _add_missing_column(
    table: Table, root: str, flag: str, given: str | None, wanted: Sequence[str], problems: Problems
) -> None:
    near = [match for name in wanted for match in difflib.get_close_matches(name, table.columns, 1)]
    # Without --dataset_file, the flag would name a list. Whoever named a column has given it already.
    flags = flag if given is not None else f"--dataset_file {quote(os.path.relpath(table.file, root))} {flag}"
    fix = f"nearest: {flags} {quote(near[0])}" if near else f"name one with {flags}"
    rule = f"{table.file}: has no column {' or '.join(wanted)}"
    if given is not None:
        rule = f"{flag} {given}: no such column in {table.file}"
    line = f"{rule}; there are: {first_names(table.columns)}; {fix}"
    if given is None and wanted is CAPTION_COLUMNS:
        problems.add(NO_CAPTIONS, f"{line}; {WITHOUT_CAPTIONS}")
    else:
        problems.add("missing column", line)


def _cell_text(value: object, row: int, name: str, table: Table, problems: Problems) -> str | None:
    """Returns the stripped text of a cell, "" for a missing one, or None for a value of another type."""
    if is_blank(value):
        return ""
    if isinstance(value, str):
        return value.strip()
    kind = {bool: "true or false", dict: "an object", list: "a list"}[type(value)]
    problems.add("no text", f"{table.location(row)}: {name} is {kind}; it must be text")
    return None


def is_blank(value: object) -> bool:
    """Returns whether a cell has no text. It is None if its key is missing, or if its value is null or NaN."""
    if isinstance(value, str):
        text = value.strip()
        return not text or (len(text) < 5 and text.lower() in _NO_TEXT)
    return value is None


def _read_csv(delimiter: str, file: str, lines: Lines, problems: Problems) -> Table | None:
    # A row may extend over several lines, so with an invalid line the others cannot be trusted.
    if None in lines:
        return None
    with cells_of_any_size():
        found = _csv_rows(separator_of(delimiter, lines), file, lines, problems)
        columns = [name.strip() for name in next(found, (range(0), []))[1]]
        if not _is_header(columns, file, problems):
            return None
        rows: list[dict[str, Any]] = []
        spans: list[range] = []
        for span, cells in found:
            if len(cells) == len(columns):
                rows.append(dict(zip(columns, cells, strict=True)))
                spans.append(span)
                continue
            rule = f"has {plural(len(cells), 'cell')}, but {plural(len(columns), 'column')}"
            many = len(cells) > len(columns)
            fix = "put quotes around cells with a separator" if many else "add the missing cells, which may be blank"
            problems.add("wrong number of cells", f"{file}:{span.start + 1}: {rule}; {fix}")
    return Table(file, columns, rows, [span.start + 1 for span in spans], spans=spans)


def separator_of(usual: str, lines: Lines) -> str:
    """Returns the character that separates cells, which Excel chooses differently in some countries.

    If the header does not contain the usual one, the first of semicolon, tab, bar and comma that it contains is taken.
    """
    header = next((line for line in lines if line and line.strip()), "")
    return next((sign for sign in (usual, *";\t|,") if sign in header), usual)


def _csv_rows(delimiter: str, file: str, lines: Lines, problems: Problems) -> Iterator[tuple[range, list[str]]]:
    """Yields the rows that are not blank, each as the indices of its lines, counted from 0, and its cells.

    Spreadsheets write blank rows as separators only, and not always as many as the header has.
    """
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "put quotes around cells with quotes or line breaks, and double the quotes in them"
            problems.add("malformed row", f"{file}:{start + 1}: malformed row ({error}); {fix}")
            continue
        if not all(map(is_blank, cells)):
            yield range(start, reader.line_num), cells


@contextmanager
def cells_of_any_size() -> Iterator[None]:
    limit = csv.field_size_limit(2**31 - 1)  # a C long, which has 32 bits on some systems
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _is_header(columns: list[str], file: str, problems: Problems) -> bool:
    twice = [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]
    has_separator_line = columns[:1] == ["sep="]
    if not columns:
        problems.add("empty table", f"{file}: is empty; it needs a row with the names of the columns")
    elif has_separator_line:
        problems.add("separator line", f"{file}: begins with sep=, a line for Excel only; delete this line")
    elif twice:
        problems.add("column twice", f"{file}: has two columns {first_names(twice)}; rename one")
    return bool(columns) and not (has_separator_line or twice)


# Numbers are read as the text that is written, because 1.50 may be a caption.
_JSON = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=lambda name: None if name == "NaN" else name)


def _read_jsonl(file: str, lines: Lines, problems: Problems) -> Table:
    numbers: list[int] = []
    values: list[object] = []
    for number, line in enumerate(lines, start=1):
        if line is None or not line.strip():
            continue
        try:
            values.append(_JSON.decode(line))
            numbers.append(number)
        except (ValueError, RecursionError) as error:
            fix = "each line must be one JSON object"
            problems.add("no JSON", f"{file}:{number}: is not valid JSON ({_json_error(error)}); {fix}")
    return _objects(file, values, numbers, ":", problems)


def _read_json(file: str, lines: Lines, problems: Problems) -> Table | None:
    if None in lines:
        return None
    fix = "it must be one list of objects; JSON lines end in .jsonl"
    try:
        values = _JSON.decode("\n".join(line for line in lines if line is not None))
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        problems.add("no JSON", f"{file}{line}: is not valid JSON ({_json_error(error)}); {fix}")
        return None
    if not isinstance(values, list):
        problems.add("no list", f"{file}: is not a list; {fix}")
        return None
    return _objects(file, values, range(1, len(values) + 1), ": element ", problems)


def _json_error(error: Exception) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"


def _objects(file: str, values: list[object], numbers: Sequence[int], joint: str, problems: Problems) -> Table:
    """Returns the table of the objects that are not blank, and reports other values. Its columns are all their keys."""
    table = Table(file, [], [], kept := [], joint)
    for number, value in zip(numbers, values, strict=True):
        if isinstance(value, dict) and all(map(is_blank, value.values())):
            continue
        if isinstance(value, dict):
            table.rows.append(value)
            kept.append(number)
        else:
            rule = "is not an object; write an object with one key per column"
            problems.add("no object", f"{file}{joint}{number}: {rule}")
    table.columns.extend(dict.fromkeys(name for cells in table.rows for name in cells))
    return table


TABLE_READERS: dict[str, Callable[[str, Lines, Problems], Table | None]] = {
    ".csv": partial(_read_csv, ","),
    ".tsv": partial(_read_csv, "\t"),
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}
