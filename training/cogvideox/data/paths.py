"""Which files a data set may name: regular files under the data root or under a folder of --allow_path.

Owns the rules for paths. A path is looked at with lstat before anything else and nothing is opened, so a pipe or a
device in a list cannot block.
"""

import os
import re
import stat
from collections.abc import Sequence
from shlex import quote

from cogvideox.data.columns import Column, Problems, is_unicode

# Two letters at least: C:/clips is a path on Windows, not a URL.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

Verdict = tuple[str, str] | None  # kind and reason, with the fix, of what is wrong


class PathRules:
    """The rules of one data root; both it and ``allow_paths`` are folders."""

    def __init__(self, root: str, allow_paths: Sequence[str]) -> None:
        # With a separator at the end, /data does not allow /database.
        self._allowed = tuple(os.path.join(os.path.realpath(folder), "") for folder in (root, *allow_paths))
        self._real_parents: dict[str, str] = {}

    def check(self, column: Column, what: str, problems: Problems) -> None:
        """Adds the problem of each path of a column; ``what`` they should be: video or image."""
        verdicts: dict[str, Verdict] = {}
        for row, path in enumerate(column.values):
            if path is None:
                continue
            if path not in verdicts:
                verdicts[path] = self.verdict(path, column.folder, what)
            if (verdict := verdicts[path]) is not None:
                fix = f", or {column.removal}" if not path else ""
                problems.add(verdict[0], f"{column.place(row)}: {verdict[1]}{fix}")

    def verdict(self, path: str, folder: str, what: str) -> Verdict:
        """What is wrong with a path relative to an absolute folder, or None."""
        if not path:
            return f"blank {what}", f"blank path of the {what}; write one"
        if "\0" in path:
            return "NUL in path", f"{path}: holds a NUL byte; save the list as plain UTF-8 text"
        if not is_unicode(path):
            return "not UTF-8", f"{path}: is not UTF-8; rename the file, or write its name in UTF-8"
        try:
            real, mode = self._look(os.path.join(folder, path))
        except OSError as error:
            return "unreadable path", f"{path}: cannot be read ({error.strerror}); check the path"
        if not self.allows(real):
            fix = f"move it there or pass --allow_path {quote(os.path.dirname(real))}"
            return "outside the data root", f"{path}: leads outside the data root, to {real}; {fix}"
        if mode is None and _URL.match(path):
            return "URL", f"{path}: is a URL; download the file into {folder} and list its path"
        if mode is None:
            return f"missing {what}", f"{path}: no such file in {folder}; paths are relative to that folder"
        if not stat.S_ISREG(mode):
            return "not a regular file", f"{path}: is a {_file_type(mode)}; it must be a file with the {what}"
        return None

    def allows(self, real: str) -> bool:
        """Whether a path without links lies where files may be read."""
        return (real + os.sep).startswith(self._allowed)

    def _look(self, full: str) -> tuple[str, int | None]:
        """The path with symlinks followed, and the mode of what it leads to (None: nothing)."""
        parent, name = os.path.split(full)
        if name in ("", ".", ".."):
            return os.path.realpath(full), _mode(full)
        # Resolving every path costs about 20 system calls; one lstat says whether the last part is a link.
        real_parent = self._real_parents.get(parent)
        if real_parent is None:
            real_parent = self._real_parents[parent] = os.path.realpath(parent)
        mode = _mode(full, follow=False)
        if mode is not None and stat.S_ISLNK(mode):
            return os.path.realpath(full), _mode(full)
        return f"{real_parent}{os.sep}{name}", mode


def _mode(path: str, follow: bool = True) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _file_type(mode: int) -> str:
    names = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return names.get(stat.S_IFMT(mode), "device")
