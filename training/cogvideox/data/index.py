"""The list of what there is to train on: prompts.txt + videos.txt -> list[Sample], with all errors of the lists.

Owns the reading of the two lists and the rules for paths. Captions and paths flow through; no video is opened, and a
path is looked at with lstat before anything else, so a pipe or a device in the list cannot block.
"""

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox.data.cache import open_index
from cogvideox.errors import UsageError

CAPTION_FILES = ("prompts.txt", "prompt.txt")
VIDEO_FILES = ("videos.txt",)
PROBLEMS_SHOWN = 20  # of one kind

# Two letters at least: C:/clips is a path on Windows, not a URL.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True)
class Sample:
    """One training clip.

    id: the path as listed, relative to the data root in posix form; "#2", "#3" is added for later rows of that path.
    caption: with the id token in front. video: absolute path, symlinks not followed.
    """

    id: str
    caption: str
    video: Path


def read_index(
    data_root: Path,
    caption_file: str | None = None,
    video_file: str | None = None,
    id_token: str | None = None,
    allow_paths: Sequence[Path] = (),
) -> list[Sample]:
    """The samples of a folder: line n of the caption file describes the clip on line n of the video file.

    The names are relative to data_root; None means prompts.txt (else prompt.txt) and videos.txt. The lists are UTF-8,
    with or without a byte order mark; a line ends at a newline only, so captions may hold any other separator.
    Raises one UsageError that lists everything that is wrong with the folder, the lists and the paths.
    """
    root = os.path.abspath(data_root)
    if not os.path.isdir(root):
        kind = "not a folder" if os.path.lexists(root) else "no such folder"
        raise UsageError(f"--data_root {data_root}: {kind}; it must hold prompts.txt and videos.txt")
    problems = _Problems()
    captions = _read_list(root, caption_file, CAPTION_FILES, "--caption_column", problems)
    videos = _read_list(root, video_file, VIDEO_FILES, "--video_column", problems)
    if captions is not None:
        _check_captions(captions, problems)
    paths = _PathRules(root, allow_paths).check_all(videos, problems) if videos is not None else []
    if captions is not None and videos is not None:
        _check_counts(captions, videos, problems)
    problems.raise_if_any()
    assert captions is not None
    return _make_samples(root, captions.lines, paths, id_token)


class _Problems:
    """What was found so far, by kind: one line each, no more than PROBLEMS_SHOWN of a kind."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, kind: str, line: str) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= PROBLEMS_SHOWN:
            self._lines[kind].append(line)

    def raise_if_any(self) -> None:
        for kind, count in self._counts.items():
            if count > PROBLEMS_SHOWN:
                self._lines[kind].append(f"... and {count - PROBLEMS_SHOWN} more: {kind}")
        if self._lines:
            raise UsageError([line for lines in self._lines.values() for line in lines])


@dataclass(frozen=True)
class _List:
    """A list file: its path as shown in errors and its stripped lines; "" where a line could not be decoded."""

    file: str
    lines: list[str]
    undecodable: frozenset[int]  # line numbers, from 1


def _read_list(root: str, name: str | None, defaults: tuple[str, ...], flag: str, problems: _Problems) -> _List | None:
    names = (name,) if name is not None else defaults
    files = [file for file in (os.path.join(root, name) for name in names) if os.path.isfile(file)]
    if not files:
        listed = f"{flag} {name}" if name is not None else f"{' or '.join(defaults)} ({flag})"
        problems.add("list file missing", f"{listed}: no such file in {root}; there are: {_text_files(root)}")
        return None
    try:
        data = Path(files[0]).read_bytes()
    except OSError as error:
        problems.add("list file unreadable", f"{files[0]}: cannot be read ({error.strerror}); check its permissions")
        return None
    result = _decode_lines(files[0], data, problems)
    if not result.lines:
        problems.add("list file empty", f"{files[0]}: is empty; it needs one line for each clip")
    return result


def _text_files(root: str) -> str:
    """What a user may have meant: the names of the files that are not videos or hidden, at most ten."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
    texts = [name for name in names if name.endswith((".txt", ".csv", ".json", ".jsonl"))] or names
    return ", ".join(texts[:10]) + (", ..." if len(texts) > 10 else "") if texts else "no files"


def _decode_lines(file: str, data: bytes, problems: _Problems) -> _List:
    data = data.removeprefix(b"\xef\xbb\xbf")
    undecodable: set[int] = set()
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        lines = []
        for number, raw in enumerate(data.split(b"\n"), start=1):
            try:
                lines.append(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                lines.append("")
                undecodable.add(number)
                where = f"byte {error.start + 1} is 0x{raw[error.start]:02x}"
                problems.add("not UTF-8", f"{file}:{number}: is not UTF-8 ({where}); save the file as UTF-8")
    lines = [line.strip() for line in lines]
    while lines and not lines[-1] and len(lines) not in undecodable:
        lines.pop()
    return _List(file, lines, frozenset(undecodable))


def _check_captions(captions: _List, problems: _Problems) -> None:
    for number, caption in enumerate(captions.lines, start=1):
        if not caption and number not in captions.undecodable:
            fix = "write a caption, or remove the line here and in the list of videos"
            problems.add("blank caption", f"{captions.file}:{number}: blank caption; {fix}")


def _check_counts(captions: _List, videos: _List, problems: _Problems) -> None:
    if len(captions.lines) == len(videos.lines):
        return
    longer, shorter = (captions, videos) if len(captions.lines) > len(videos.lines) else (videos, captions)
    counts = f"{len(longer.lines)} lines, but {shorter.file} has {len(shorter.lines)}"
    number = len(shorter.lines) + 1
    missing = "path" if longer is captions else "caption"
    fix = f"add its {missing} there or remove it here"
    problems.add("unequal line counts", f"{longer.file}:{number}: first line without a {missing} ({counts}); {fix}")


class _PathRules:
    """Which listed paths may be read: regular files under the data root or under a folder of --allow_path."""

    def __init__(self, root: str, allow_paths: Sequence[Path]) -> None:
        self.root = root
        # With a separator at the end, /data does not allow /database.
        self.allowed = tuple(os.path.join(os.path.realpath(folder), "") for folder in (Path(root), *allow_paths))
        self.real_parents: dict[str, str] = {}
        self.verdicts: dict[str, tuple[str, str] | None] = {}

    def check_all(self, videos: _List, problems: _Problems) -> list[str]:
        """The listed paths, with the problem of each one added under its line number."""
        for number, path in enumerate(videos.lines, start=1):
            if number in videos.undecodable:
                continue
            if path not in self.verdicts:
                self.verdicts[path] = self.problem(path)
            if (verdict := self.verdicts[path]) is not None:
                kind, reason = verdict
                problems.add(kind, f"{videos.file}:{number}: {reason}")
        return videos.lines

    def problem(self, path: str) -> tuple[str, str] | None:
        """(kind, reason with fix) of one listed path, or None."""
        if not path:
            return "blank path", "blank path; write one, or remove the line here and in the list of captions"
        if "\0" in path:
            return "NUL in path", f"{path!r}: holds a NUL byte; save the list as plain UTF-8 text"
        if _URL.match(path):
            return "URL", f"{path}: is a URL; download the file into {self.root} and list its path"
        full = os.path.join(self.root, path)
        try:
            real, mode = self._look(full)
        except OSError as error:
            return "unreadable path", f"{_short(path)}: cannot be read ({error.strerror}); check the path"
        if not os.path.join(real, "").startswith(self.allowed):
            return "outside the data root", (
                f"{path}: leads outside the data root, to {real}; "
                f"move it there or pass --allow_path {os.path.dirname(real)}"
            )
        if mode is None:
            return "missing video", f"{path}: no such file in {self.root}; paths are relative to the data root"
        if not stat.S_ISREG(mode):
            return "not a regular file", f"{path}: is a {_file_type(mode)}; list the path of a video file"
        return None

    def _look(self, full: str) -> tuple[str, int | None]:
        """The path with symlinks followed, and the mode of what it leads to (None: nothing); nothing is opened."""
        parent, name = os.path.split(full)
        if name in ("", ".", ".."):
            return os.path.realpath(full), _mode(full)
        # Resolving every path costs about 20 system calls; one lstat says whether the last part is a link.
        real_parent = self.real_parents.get(parent)
        if real_parent is None:
            real_parent = self.real_parents[parent] = os.path.realpath(parent)
        mode = _mode(full, follow=False)
        if mode is not None and stat.S_ISLNK(mode):
            return os.path.realpath(full), _mode(full)
        return os.path.join(real_parent, name), mode


def _mode(path: str, follow: bool = True) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _file_type(mode: int) -> str:
    names = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return names.get(stat.S_IFMT(mode), "device")


def _short(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:200]}... ({len(path)} characters)"


def _make_samples(root: str, captions: list[str], paths: list[str], id_token: str | None) -> list[Sample]:
    token = (id_token or "").strip()
    rows: dict[str, int] = {}
    samples = []
    for caption, path in zip(captions, paths, strict=True):
        full = os.path.join(root, path)
        sample_id = _unique_id(_relative(root, os.path.normpath(full)), rows)
        # Not the normal form: "link/../a.mp4" is beside what the link leads to.
        samples.append(Sample(sample_id, _with_token(token, caption), Path(full)))
    return samples


def _relative(root: str, full: str) -> str:
    """The path below the root in posix form; an allowed path elsewhere keeps its absolute form."""
    return full.removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def _unique_id(name: str, rows: dict[str, int]) -> str:
    """The name, or name#2 and so on where it is taken; `rows` counts the uses of each id and is updated."""
    number = rows.get(name, 0) + 1
    while number > 1 and f"{name}#{number}" in rows:  # a file may itself be called "a.mp4#2"
        number += 1
    rows[name] = number
    sample_id = name if number == 1 else f"{name}#{number}"
    rows.setdefault(sample_id, 1)
    return sample_id


def _with_token(token: str, caption: str) -> str:
    # "DOG" is already in front of "DOG, running", but not of "DOGS running".
    present = caption.startswith(token) and not caption[len(token) : len(token) + 1].isalnum()
    return caption if not token or present else f"{token} {caption}"


def read_samples(data: Any) -> list[Sample]:
    """The rows that DataFlags name; raises UsageError with all problems of the data set's files."""
    folders = [Path(folder) for folder in data.allow_path]
    return read_index(Path(data.data_root[0]), data.caption_column, data.video_column, data.id_token, folders)


def check_data(options: Any) -> Iterator[str]:
    """Problems of --data_root, for args.parse."""
    loader = getattr(options, "loader", None)
    if loader is not None and loader.load_tensors:
        open_index(Path(options.data.data_root[0]))
    else:
        read_samples(options.data)
    yield from ()
