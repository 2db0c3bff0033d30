"""Decides which files a data set may name: regular files under the data root or under a folder of --allow_path.

``PathRules`` is the entry point. Its method ``find`` turns a column of paths into files, and ``problem_with`` checks a
single path. Files are also found where their names are spelled in another way: with accents composed or decomposed, in
another letter case, with backslashes, or without the ending of a clip. For a path that is not found, the message names
the nearest file.

A list may name pipes and devices, which block a program that opens them. So each path is first inspected with lstat,
and only regular files that are small enough to be Git LFS pointers are opened.
"""

import difflib
import os
import re
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from shlex import quote
from urllib.parse import unquote

from cogvideox.config.flags import CAPTION_FILES, IMAGE_FILES, VIDEO_FILES
from cogvideox.data.forms.columns import EXAMPLES, POINTER, Column, Problems, is_unicode
from cogvideox.errors import first_names
from cogvideox.files import is_lfs_pointer, lfs_rule

# At least two letters before the colon, because C:/clips is a path on Windows and not a URL.
_URL_START = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_ABSOLUTE = re.compile(r"(/|[A-Za-z]:[\\/]|\\\\).+")  # of Linux, of Windows, or of a network share
_PLAIN = re.compile(r"[\w/.-]+")  # has no characters that are special to sed or to a shell
_OUTSIDE = "outside the data root"
LIST_FILES = (*CAPTION_FILES, *VIDEO_FILES, *IMAGE_FILES)
MOST_SEARCHED = 100_000  # names below a folder among which the nearest to a missing one is searched
MOST_COMPARED = 5_000  # names that are compared letter by letter
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif",
)  # fmt: skip
MEDIA_SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".gif",
    ".mts", ".m2ts", ".m2t", ".3gp", ".3g2", ".vob", ".qt", ".f4v", ".asf", ".divx",
    *IMAGE_SUFFIXES,
)  # fmt: skip
# Files and folders that file managers and network storage create. They are skipped, as hidden files are.
JUNK = {
    "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "system volume information", "lost+found",
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip

ByName = dict[str, list[str]]  # Maps the folded form of a name (see fold_name) to the files that have it.
PathProblem = tuple[str, str] | None  # None, or the kind of the problem and a line with the reason and the fix


class PathRules:
    """Checks and finds the files of one data root, and caches what it learns about folders."""

    def __init__(self, root: str, allow_paths: Sequence[str]) -> None:
        """Resolves the folders that may be read.

        Args:
            root: Folder of the data set.
            allow_paths: Further folders that files may be in.
        """
        # They end in a separator, because otherwise /data would allow /database.
        self._allowed = tuple(os.path.join(os.path.realpath(folder), "") for folder in (root, *allow_paths))
        self._real_parents: dict[str, str] = {}
        self._names: dict[str, tuple[ByName, ByName]] = {}
        self._below: dict[str, ByName] = {}
        self._num_compared = 0

    def find(self, column: Column, what: str, problems: Problems) -> list[str | None]:
        """Finds the file of each path in a column, and adds a problem for each path that cannot be used.

        Args:
            column: The paths.
            what: What the files should be, "video" or "image".
            problems: Collects what is wrong.

        Returns:
            Absolute paths, with None where the column has None.
        """
        found: dict[str, tuple[str, PathProblem]] = {}
        for row, path in enumerate(column.values):
            if path is None:
                continue
            if path not in found:
                found[path] = self._find(path, column, row, what)
            if (problem := found[path][1]) is not None:
                fix = f", or {column.removal}" if not path else ""
                problems.add(problem[0], f"{column.location(row)}: {problem[1]}{fix}")
        return [None if path is None else found[path][0] for path in column.values]

    def _find(self, path: str, column: Column, row: int, what: str) -> tuple[str, PathProblem]:
        """Returns the file that a path means, also under another spelling, and what is wrong with it."""
        full = os.path.join(column.folder, path)
        problem = self.problem_with(path, column.folder, what)
        missing = f"missing {what}"
        if problem is None or problem[0] not in (_OUTSIDE, missing) or os.path.lexists(full):
            return full, problem
        spelled = self._spelled(column.folder, path)
        if len(spelled) == 1:
            return os.path.join(column.folder, spelled[0]), self.problem_with(spelled[0], column.folder, what)
        if spelled:
            kind, fix = " that are spelled differently", "rename all but one"
            if not _is_complete(path):
                kind, fix = "", "write the ending of one, too"
            return full, ("ambiguous name", f"{path}: matches several files{kind}: {first_names(spelled)}; {fix}")
        problem = self._foreign(path, column, row) or problem
        if problem[0] == missing and (near := self._nearest(column.folder, path)):
            problem = missing, f"{path}: no such file in {column.folder}; nearest: {near}"
        return full, problem

    def _foreign(self, path: str, column: Column, row: int) -> PathProblem:
        """Returns the problem of an absolute path of another machine if its end is the path of a file in the folder."""
        parts = path.replace("\\", "/").split("/")
        for count in range(1, len(parts)) if _ABSOLUTE.fullmatch(path) else ():
            if self._spelled(column.folder, "/".join(parts[count:])):
                start = path[: len("/".join(parts[:count])) + 1]
                file = column.location(row).rpartition(":")[0]
                example = f", for example with: sed -i 's|{start}||' {quote(file)}" if _PLAIN.fullmatch(start) else ""
                rule = f"is a path of another machine, but {column.folder} contains {path[len(start) :]}"
                return "path of another machine", f"{path}: {rule}; remove {start} from the paths{example}"
        return None

    def _spelled(self, folder: str, path: str) -> list[str]:
        """Returns the files below a folder whose paths differ from this one only in spelling.

        The spelling may differ in Unicode's normal form, in letter case, or in backslashes, or lack the ending of a
        clip. If some have the same letter case, only those are returned. Folders that may not be read are not listed.
        """
        inside = path.replace("\\", "/").removeprefix(os.path.join(folder, ""))
        parts = [part for part in inside.split("/") if part != "."]
        if not set(parts).isdisjoint(("", "..")):
            return []
        found = [""]
        for name in parts:
            names = ((parent, self._named(os.path.join(folder, parent), name)) for parent in found)
            found = [os.path.join(parent, there) for parent, known in names for there in known]
        wanted = unicodedata.normalize("NFC", "/".join(parts))
        return [there for there in found if unicodedata.normalize("NFC", there) == wanted] or found

    def _named(self, folder: str, name: str) -> Sequence[str]:
        """Returns the names in a folder that are equal to a name, or else the clips of which it is all but the ending.

        Names are equal if their folded forms are.
        """
        known = self._names.get(folder)
        if known is None:
            names = _listed(folder) if self.allows(os.path.realpath(folder)) else []
            known = self._names[folder] = by_name(names), _by_stem(names)
        return known[0].get(fold_name(name)) or ([] if _is_complete(name) else known[1].get(fold_name(name), []))

    def _nearest(self, folder: str, path: str) -> str:
        """Returns the clip below a folder that is most like a missing path, relative to the folder; empty if none is.

        It has the same name in another folder or with another ending, or else a name with few other letters. The latter
        takes long to find in large folders, so it is only done for the first paths, of which problems are printed.
        """
        if folder not in self._below:
            self._below[folder] = _by_stem(_files_below(folder) if self.allows(os.path.realpath(folder)) else [])
        below, parent = self._below[folder], os.path.dirname(path)
        name = fold_name(unquote(os.path.basename(path.replace("\\", "/"))).strip("\"'"))
        if same := below.get(name) or below.get(os.path.splitext(name)[0]):
            keys = {file: (fold_name(os.path.basename(file)) != name, os.path.dirname(file) != parent) for file in same}
            return min(same, key=keys.__getitem__)
        self._num_compared += 1
        if self._num_compared > EXAMPLES or len(below) > MOST_COMPARED:
            return ""
        near = difflib.get_close_matches(os.path.splitext(name)[0], below, 1, cutoff=0.8)
        return below[near[0]][0] if near else ""

    def problem_with(self, path: str, folder: str, what: str) -> PathProblem:
        """Returns what is wrong with a path, or None.

        Args:
            path: The path as listed.
            folder: Absolute folder that it is relative to.
            what: What the file should be, for messages.
        """
        if not path:
            return f"blank {what}", f"blank path of the {what}; write one"
        if "\0" in path:
            return "NUL in path", f"{path}: holds a NUL byte; save the list as plain UTF-8 text"
        if not is_unicode(path):
            return "not UTF-8", f"{path}: is not UTF-8; rename the file, or write its name in UTF-8"
        try:
            real, status = self._resolve(os.path.join(folder, path))
            pointer = self.allows(real) and _is_pointer(real, status)
        except OSError as error:
            return "unreadable path", f"{path}: cannot be read ({error.strerror}); check the path"
        if not self.allows(real):
            fix = f"move it there or pass --allow_path {quote(os.path.dirname(real))}"
            return _OUTSIDE, f"{path}: leads outside the data root, to {real}; {fix}"
        if status is None and _URL_START.match(path):
            return "URL", f"{path}: is a URL; download the file into {folder} and list its path"
        if status is None:
            return f"missing {what}", f"{path}: no such file in {folder}; paths are relative to that folder"
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file", f"{path}: is a {_file_type(status)}; it must be a file with the {what}"
        if pointer:
            inside = real.startswith(os.path.join(os.path.realpath(folder), ""))
            return POINTER, f"{path}: {lfs_rule(folder if inside else os.path.dirname(real))}"
        return None

    def allows(self, real: str) -> bool:
        """Returns whether a path, in which links are resolved, is in a folder that may be read."""
        return (real + os.sep).startswith(self._allowed)

    def _resolve(self, full: str) -> tuple[str, os.stat_result | None]:
        """Resolves the symlinks of a path, and returns it with the status of its file; None if there is no file."""
        parent, name = os.path.split(full)
        if name in ("", ".", ".."):
            return os.path.realpath(full), _status(full)
        # Resolving a full path takes about 20 system calls, so the folder is resolved only once. A single lstat then
        # says whether the last part is a link.
        real_parent = self._real_parents.get(parent)
        if real_parent is None:
            real_parent = self._real_parents[parent] = os.path.realpath(parent)
        status = _status(full, follow=False)
        if status is not None and stat.S_ISLNK(status.st_mode):
            return os.path.realpath(full), _status(full)
        return f"{real_parent}{os.sep}{name}", status


def fold_name(name: str) -> str:
    """Returns a form of a name that is equal for names which differ only in letter case or Unicode's normal form."""
    return name.casefold() if name.isascii() else unicodedata.normalize("NFC", name.casefold())


def is_image(path: str) -> bool:
    """Returns whether a path ends as those of images do."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def is_listed(name: str) -> bool:
    """Returns whether a name in a folder is neither hidden nor of a file or folder in JUNK."""
    return not name.startswith((".", "~$")) and fold_name(name) not in JUNK


def _is_complete(path: str) -> bool:
    """Returns whether a path ends as those of clips and images do."""
    return os.path.splitext(path)[1].lower() in MEDIA_SUFFIXES


def by_name(paths: Iterable[str]) -> ByName:
    """Returns paths by the folded form of their last part."""
    found = defaultdict(list)
    for path in paths:
        found[fold_name(os.path.basename(path))].append(path)
    return found


def _by_stem(paths: Sequence[str]) -> ByName:
    """Returns the clips and images among some paths by the folded form of their name without its ending."""
    found = defaultdict(list)
    for path in paths:
        if _is_complete(path):
            found[fold_name(os.path.splitext(os.path.basename(path))[0])].append(path)
    return found


def _files_below(folder: str) -> list[str]:
    """Returns the paths of files below a folder, relative to it. Links to folders are not followed."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(filter(is_listed, folders))
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in sorted(filter(is_listed, names))]
        if len(found) > MOST_SEARCHED:
            break
    return found


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _status(path: str, follow: bool = True) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_pointer(path: str, status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISREG(status.st_mode) and is_lfs_pointer(path, status.st_size)


def _file_type(status: os.stat_result) -> str:
    names = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return names.get(stat.S_IFMT(status.st_mode), "device")
