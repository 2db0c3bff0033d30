"""Defines columns, into which every form of data set is read, and collects the problems of a data set.

A ``Column`` holds one text (a caption or a path) for each row, and knows in which line of which file it is written.
Lists, tables and captions next to their clips are all read into columns, so that each rule for captions and paths is
written once. ``Problems`` collects the problems of a data set and groups them by kind for printing. ``read_lines``
reads a text file.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogvideox.data.media.frames import Section
from cogvideox.errors import one_line
from cogvideox.files import LFS_POINTER, lfs_rule

POINTER = "Git LFS pointer"  # a kind of problem, see Problems.add
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
EXAMPLES = 3  # how many problems of one kind are printed in full
# Kinds of problems about missing captions.
NO_CAPTION, NO_CAPTIONS, CAPTION_ELSEWHERE = "no caption", "no captions at all", "caption in another folder"
# The end of messages about missing captions.
WITHOUT_CAPTIONS = (
    "caption_dataset.py writes missing captions; prepare_dataset.py --dry_run and --suggest_buckets work without"
)


@dataclass(frozen=True)
class Column:
    """Holds one text for each row, without spaces around it.

    Attributes:
        values: The texts. None replaces a text that cannot be used; its problem has already been reported.
        location: A function from the index of a row to the place where its text is written. Messages begin with that
            place, such as "captions.csv:7".
        removal: An instruction for removing a row, such as "remove the row", which messages suggest as a fix.
        folder: Absolute path of the folder that the column's paths are relative to.
        name: Its name in a table; empty elsewhere.
    """

    values: Sequence[str | None]
    location: Callable[[int], str]
    removal: str
    folder: str
    name: str = ""

    def texts(self) -> list[str]:
        """Returns all values as texts. The column must have no problems, since values that are None are left out."""
        return [value for value in self.values if value is not None]


@dataclass(frozen=True)
class Columns:
    """Holds the columns of a data set. If their lengths differ, a problem has been reported.

    Attributes:
        captions: The captions. None if they could not be read; the reason has then been reported as a problem.
        videos: Paths of the videos. None if they could not be read; the reason has then been reported as a problem.
        images: Paths of the first frames. None if the data set names no first frames.
        skipped: Paths of files that may be clips but have an unsupported format.
        unread_tables: Paths of tables that are not read, because captions are next to the clips.
        sections: The part of its file that each clip is; None if each clip is a whole file.
        caption_file: The list or table that has all captions, or would have them. Empty if each caption is in a text
            file next to its clip; then the location of a caption is that text file, or a folder if there is none.
    """

    captions: Column | None = None
    videos: Column | None = None
    images: Column | None = None
    skipped: Sequence[str] = ()
    unread_tables: Sequence[str] = ()
    sections: Sequence[Section | None] | None = None
    caption_file: str = ""


class Problems:
    """Collects problems of a data set. If a kind of problem is frequent, only examples of it are printed."""

    def __init__(self, captions: bool = True) -> None:
        """Creates an empty collection.

        Args:
            captions: Whether a missing caption is a problem.
        """
        self.captions = captions
        self._lines: dict[str, list[str]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)
        self._rules: dict[str, list[str]] = {}  # Maps a kind to the rules with which all its lines end.

    def add(self, kind: str, line: str) -> None:
        """Adds a problem. Control characters are escaped, and the middle of a long line is left out.

        Args:
            kind: A short name, such as "no caption". Problems of one kind are counted and shortened together.
            line: The message. It begins with a location and ends with a rule (what is wrong and how to fix it), and
                ": " separates them.
        """
        if not self.captions and kind in (NO_CAPTION, NO_CAPTIONS, CAPTION_ELSEWHERE):
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
        """Returns the lines to print. A kind with more than EXAMPLES problems has that many examples and a count."""
        found = []
        for kind, count in self._counts.items():
            rule = next(iter(self._rules[kind]), None)
            found += _grouped(kind, self._lines[kind], count, rule)
        return found


def _grouped(kind: str, examples: list[str], count: int, rule: str | None) -> list[str]:
    """Returns the lines for one kind: examples and the count. If all its lines share a rule, this is a single line."""
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
    """Returns the parts of a message that may be its rule: the text after its first ": ", after its second etc."""
    parts = line.split(": ")
    return [": ".join(parts[start:]) for start in range(1, len(parts))]


def is_unicode(text: str) -> bool:
    """Returns whether a text can be written as UTF-8. A text with one half of a surrogate pair cannot be."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(file: str, problems: Problems) -> list[str | None] | None:
    r"""Reads the lines of a UTF-8 file, or of a UTF-16 file with a byte order mark.

    Lines end at \n or \r\n. Other separators of Unicode are part of a line, since captions may contain them.

    Returns:
        The lines, with None for each line that is not valid. If the file cannot be read, None. The reasons are added
        to ``problems``.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        problems.add("unreadable file", f"{file}: cannot be read ({error.strerror}); check its permissions")
        return None
    if data.startswith(LFS_POINTER):
        problems.add(POINTER, f"{file}: {lfs_rule(os.path.dirname(file))}")
        return None
    if data.startswith(_UTF16_MARKS):  # Notepad and PowerShell write such files.
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
        rule = f"has the byte order mark of UTF-16, but is not valid UTF-16 (byte {error.start + 1}); save it as UTF-8"
        problems.add("not UTF-16", f"{file}: {rule}")
        return None


def _decode_line(location: str, raw: bytes, problems: Problems) -> str | None:
    try:
        return raw.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} is 0x{raw[error.start]:02x}"
        problems.add("not UTF-8", f"{location}: is not UTF-8 ({where}); save the file as UTF-8")
        return None
