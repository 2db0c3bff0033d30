"""Which files a data set may name: regular files under the data root or under a folder of --allow_path.

Owns the rules for paths, and the search for files whose names are spelled in another way: with accents composed or
decomposed, with letters of another case, with backslashes. A path is looked at with lstat before anything else, and of
regular files only those are opened that are small enough for a Git LFS pointer, so a pipe or a device in a list cannot
block.
"""

import os
import re
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from shlex import quote

from cogvideox.data.forms.columns import POINTER, Column, Problems, first_names, is_unicode
from cogvideox.files import is_lfs_pointer, lfs_rule

# Two letters at least: C:/clips is a path on Windows, not a URL.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_ABSOLUTE = re.compile(r"(/|[A-Za-z]:[\\/]|\\\\).+")  # of Linux, of Windows, of a share
_PLAIN = re.compile(r"[\w/.-]+")  # nothing in it is special to sed or to a shell
_OUTSIDE = "outside the data root"

Verdict = tuple[str, str] | None  # kind and reason, with the fix, of what is wrong


class PathRules:
    """The rules of one data root; both it and ``allow_paths`` are folders."""

    def __init__(self, root: str, allow_paths: Sequence[str]) -> None:
        # With a separator at the end, /data does not allow /database.
        self._allowed = tuple(os.path.join(os.path.realpath(folder), "") for folder in (root, *allow_paths))
        self._real_parents: dict[str, str] = {}
        self._names: dict[str, dict[str, list[str]]] = {}

    def find(self, column: Column, what: str, problems: Problems) -> list[str | None]:
        """The absolute path of each file of a column, None where it has none; adds the problem of each path.

        what: they should be, video or image.
        """
        found: dict[str, tuple[str, Verdict]] = {}
        for row, path in enumerate(column.values):
            if path is None:
                continue
            if path not in found:
                found[path] = self._find(path, column, row, what)
            if (verdict := found[path][1]) is not None:
                fix = f", or {column.removal}" if not path else ""
                problems.add(verdict[0], f"{column.place(row)}: {verdict[1]}{fix}")
        return [None if path is None else found[path][0] for path in column.values]

    def _find(self, path: str, column: Column, row: int, what: str) -> tuple[str, Verdict]:
        """The file that a path means, in whatever way its name is spelled, and what is wrong with it."""
        full = os.path.join(column.folder, path)
        verdict = self.verdict(path, column.folder, what)
        if verdict is None or verdict[0] not in (_OUTSIDE, f"missing {what}") or os.path.lexists(full):
            return full, verdict
        spelled = self._spelled(column.folder, path)
        if len(spelled) == 1:
            return os.path.join(column.folder, spelled[0]), self.verdict(spelled[0], column.folder, what)
        if spelled:
            rule = (
                f"is spelled as none of these files and means one of them: {first_names(spelled)}; rename all but one"
            )
            return full, ("ambiguous name", f"{path}: {rule}")
        return full, self._foreign(path, column, row) or verdict

    def _foreign(self, path: str, column: Column, row: int) -> Verdict:
        """What is wrong with an absolute path of another machine whose end is that of a file in the folder."""
        parts = path.replace("\\", "/").split("/")
        for count in range(1, len(parts)) if _ABSOLUTE.fullmatch(path) else ():
            if self._spelled(column.folder, "/".join(parts[count:])):
                start = path[: len("/".join(parts[:count])) + 1]
                file = column.place(row).rpartition(":")[0]
                example = f", as with: sed -i 's|{start}||' {quote(file)}" if _PLAIN.fullmatch(start) else ""
                rule = f"is a path of another machine, but {path[len(start) :]} is in {column.folder}"
                return "path of another machine", f"{path}: {rule}; remove {start} from the paths{example}"
        return None

    def _spelled(self, folder: str, path: str) -> list[str]:
        """The paths below a folder that differ from this one in Unicode's normal form, letter case or backslashes.

        Those of the same case go before others. Nothing outside the allowed folders is looked at.
        """
        inside = path.replace("\\", "/").removeprefix(os.path.join(folder, ""))
        parts = [part for part in inside.split("/") if part != "."]
        if not set(parts).isdisjoint(("", "..")):
            return []
        found = [""]
        for name in parts:
            names = ((parent, self._names_in(os.path.join(folder, parent))) for parent in found)
            found = [os.path.join(parent, there) for parent, known in names for there in known.get(fold_name(name), ())]
        wanted = unicodedata.normalize("NFC", "/".join(parts))
        return [there for there in found if unicodedata.normalize("NFC", there) == wanted] or found

    def _names_in(self, folder: str) -> dict[str, list[str]]:
        """The names in a folder by what they are without normal form and case."""
        known = self._names.get(folder)
        if known is None:
            known = self._names[folder] = defaultdict(list)
            for name in _listed(folder) if self.allows(os.path.realpath(folder)) else ():
                known[fold_name(name)].append(name)
        return known

    def verdict(self, path: str, folder: str, what: str) -> Verdict:
        """What is wrong with a path relative to an absolute folder, or None."""
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
        if status is None and _URL.match(path):
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
        """Whether a path without links lies where files may be read."""
        return (real + os.sep).startswith(self._allowed)

    def _resolve(self, full: str) -> tuple[str, os.stat_result | None]:
        """The path with symlinks followed, and the status of what it leads to (None: nothing)."""
        parent, name = os.path.split(full)
        if name in ("", ".", ".."):
            return os.path.realpath(full), _status(full)
        # Resolving every path costs about 20 system calls; one lstat says whether the last part is a link.
        real_parent = self._real_parents.get(parent)
        if real_parent is None:
            real_parent = self._real_parents[parent] = os.path.realpath(parent)
        status = _status(full, follow=False)
        if status is not None and stat.S_ISLNK(status.st_mode):
            return os.path.realpath(full), _status(full)
        return f"{real_parent}{os.sep}{name}", status


def fold_name(name: str) -> str:
    """What names have in common that differ in Unicode's normal form or in letter case only."""
    return name.casefold() if name.isascii() else unicodedata.normalize("NFC", name.casefold())


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
