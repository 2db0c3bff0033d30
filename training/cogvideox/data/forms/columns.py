"""Holds columns of text and the problems found in them: one value for each row, and where that row is in its file.

Lists, tables and captions next to their clips all become a ``Column``, so that each rule for captions and paths is
written once. ``Problems`` collects everything that is wrong and groups it for the user. ``read_lines`` decodes text
files into lines.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogvideox.errors import one_line
from cogvideox.files import LFS_POINTER, lfs_rule

POINTER = "Git LFS pointer"  # a kind of problem
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
EXAMPLES = 3  # how many problems of one kind are printed in full
NO_CAPTION, NO_CAPTIONS = "no caption", "no captions at all"  # kinds of problems
WITHOUT_CAPTIONS = "prepare_dataset.py --dry_run and --suggest_buckets work without captions"


@dataclass(frozen=True)
class Column:
    """Holds one stripped value for each row.

    Attributes:
        values: The values; None where the value is already among the problems.
        location: Returns where the value of a row, counted from 0, is written, as "file:line".
        removal: How the user removes a row, for messages.
        folder: Absolute path of the folder that the column's paths are relative to.
    """

    values: Sequence[str | None]
    location: Callable[[int], str]
    removal: str
    folder: str

    def texts(self) -> list[str]:
        """Returns the values of a column without problems."""
        return [value for value in self.values if value is not None]


@dataclass(frozen=True)
class Columns:
    """Holds the columns of a data set, which have the same length if there are no problems.

    Attributes:
        captions: The captions; None if they could not be read, which is then among the problems.
        videos: Paths of the videos; None as for captions.
        images: Paths of the first frames; None if the data set names none.
        skipped: Paths of files that may be clips but have an unsupported format.
    """

    captions: Column | None = None
    videos: Column | None = None
    images: Column | None = None
    skipped: Sequence[str] = ()


class Problems:
    """Collects problems by kind, as printable lines, and shortens kinds with many problems."""

    def __init__(self, captions: bool = True) -> None:
        """Creates an empty collection.

        Args:
            captions: Whether a missing caption is a problem.
        """
        self.captions = captions
        self._lines: dict[str, list[str]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)
        self._rules: dict[str, list[str]] = {}  # by kind: what all lines so far end with, after a colon

    def add(self, kind: str, line: str) -> None:
        """Adds a problem of a kind. Control characters are escaped, and a long line is cut in its middle."""
        if not self.captions and kind in (NO_CAPTION, NO_CAPTIONS):
            return
        line = one_line(line)
        self._counts[kind] += 1
        common = self._rules.setdefault(kind, _rules(line))
        if common and not line.endswith(f": {common[0]}"):
            self._rules[kind] = [rule for rule in common if line.endswith(f": {rule}")]
        if self._counts[kind] <= EXAMPLES:
            self._lines[kind].append(line)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def lines(self) -> list[str]:
        """Returns the lines to print: all problems of a kind, or the first EXAMPLES of them and their number."""
        found = []
        for kind, count in self._counts.items():
            rule = next(iter(self._rules[kind]), None)
            found += _grouped(kind, self._lines[kind], count, rule)
        return found


def _grouped(kind: str, examples: list[str], count: int, rule: str | None) -> list[str]:
    """Returns examples of a kind with the total number, in one line if all lines end with the same rule."""
    if count <= len(examples):
        return examples
    if rule is None:
        return [*examples, f"... and {count - len(examples)} more ({count} in all): {kind}"]
    locations = [line.removesuffix(f": {rule}") for line in examples]
    start = f"{locations[0].partition(': ')[0]}: "
    if all(location.startswith(start) for location in locations):
        locations = [locations[0], *(location.removeprefix(start) for location in locations[1:])]
    return [one_line(f"{', '.join(locations)} and {count - len(examples)} more ({count} in all): {rule}")]


def _rules(line: str) -> list[str]:
    """Returns the parts of a line that may be its rule: everything after each of its colons, the longest first."""
    parts = line.split(": ")
    return [": ".join(parts[start:]) for start in range(1, len(parts))]


def first_names(names: Iterable[str]) -> str:
    """Returns the first ten names, separated by commas, or "none"."""
    names = list(names)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"


def is_unicode(text: str) -> bool:
    """Returns whether a text can be written as UTF-8, which half a surrogate pair cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(file: str, problems: Problems) -> list[str | None] | None:
    r"""Reads the lines of a UTF-8 file, or of a UTF-16 file with a byte order mark.

    A line ends at \n or \r\n only, so captions may contain any other separator.

    Returns:
        The lines, with None for a line that is not valid; or None if the file cannot be read. The reasons are among
        the problems.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        problems.add("unreadable file", f"{file}: cannot be read ({error.strerror}); check its permissions")
        return None
    if data.startswith(LFS_POINTER):
        problems.add(POINTER, f"{file}: {lfs_rule(os.path.dirname(file))}")
        return None
    if data.startswith(_UTF16_MARKS):  # as Notepad and PowerShell write
        return _utf16_lines(file, data, problems)
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return [line.removesuffix("\r") for line in data.decode().split("\n")]
    except UnicodeDecodeError:
        rows = enumerate(data.split(b"\n"), start=1)
        return [_decode_line(f"{file}:{number}", raw, problems) for number, raw in rows]


def _utf16_lines(file: str, data: bytes, problems: Problems) -> list[str | None] | None:
    try:
        return [line.removesuffix("\r") for line in data.decode("utf-16").split("\n")]
    except UnicodeDecodeError as error:
        rule = f"begins as UTF-16 does, but is not valid UTF-16 (byte {error.start + 1}); save the file as UTF-8"
        problems.add("not UTF-16", f"{file}: {rule}")
        return None


def _decode_line(location: str, raw: bytes, problems: Problems) -> str | None:
    try:
        return raw.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} is 0x{raw[error.start]:02x}"
        problems.add("not UTF-8", f"{location}: is not UTF-8 ({where}); save the file as UTF-8")
        return None
