"""Defines the errors that a user can act on, and helpers for their one-line messages.

Every layer raises UsageError or NonFiniteError; config/args.py prints them and exits with status 2 or 3.
"""

import errno
import re
from collections.abc import Iterable, Sequence

MOST_LINES = 20  # most lines of one kind in a message
LONGEST_LINE = 500  # characters
# The groups are: scheme; user and password; host and path; query and fragment. ::: separates two URLs.
_URL_PARTS = re.compile(
    r"\b([A-Za-z][A-Za-z0-9+.-]*://)([^\s/?#]*@)?((?:(?!:::)[^\s?#])*)([?#](?:(?!:::[A-Za-z]+://)\S)*)?"
)


def one_line(text: str) -> str:
    """Returns the text as one printable line of at most LONGEST_LINE characters.

    A longer text loses its middle, because its start names the place and its end the fix.
    """
    if len(text) > 2 * LONGEST_LINE:
        text = text[:LONGEST_LINE] + text[-LONGEST_LINE:]
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    start = LONGEST_LINE * 3 // 5
    return text if len(text) <= LONGEST_LINE else f"{text[:start]} ... {text[start + 5 - LONGEST_LINE :]}"


def public_urls(text: str) -> str:
    """Returns the text with each URL reduced to scheme, host and path; the rest may contain passwords or signatures."""
    return _URL_PARTS.sub(r"\1\3", text) if "://" in text else text


def first_of(lines: Sequence[str]) -> list[str]:
    """Returns the first MOST_LINES lines, followed by a line with the number of the others."""
    more = [f"... and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return [*lines[:MOST_LINES], *more]


def first_names(names: Iterable[str], most: int = 10) -> str:
    """Returns the first names, separated by commas, or "none"."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "none"


def first_line(error: BaseException) -> str:
    """Returns the first line of the message of an error, or its type if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def limit_problem(error: BaseException) -> str | None:
    """Returns which limit of the system an error is about, and what to do; None if it is about something else."""
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return "the limit of open files is reached; raise it, such as with: ulimit -n 4096"
    if str(error) == "can't start new thread" or (number == errno.EAGAIN and type(error) is BlockingIOError):
        fix = "raise it (ulimit -u, or docker run --pids-limit), or end other programs"
        return f"the limit of processes and threads is reached; {fix}"
    return None


def plural(count: int, one: str, many: str = "") -> str:
    """Returns a number with its noun, such as "1 clip is" or "2 clips are"; ``many`` may be left out for an s."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


class UsageError(ValueError):
    """Lists all problems of the flags, the files or the model, which are found before any model is loaded.

    Each problem is one line: the flag or file with its value, the rule, and the nearest fix, such as
    ``--frame_buckets 50: CogVideoX encodes 4k+1 frames; nearest: 49, 53``. Indented lines after it belong to
    it. Queries and passwords of URLs are removed.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        listed = (problems,) if isinstance(problems, str) else problems
        self.problems: tuple[str, ...] = tuple(map(public_urls, listed))
        super().__init__("\n".join(self.problems))


# The fix where a disk has reported no error, but has lost what was written.
DISK_LOSES = "is the disk full, or does it fail? find out and run the same command again"


class DiskError(UsageError):
    """Reports in one line a disk that is full, fails or refuses to be written."""

    def __init__(self, problem: str, fix: str = "", safe: str = "") -> None:
        self.problem, self.fix, self.safe = problem, fix, safe
        super().__init__("; ".join(part for part in (problem, safe, fix) if part))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Pickles the three parts, because the default would pass the complete line as the problem."""
        return type(self), (self.problem, self.fix, self.safe)

    def knowing(self, safe: str) -> "DiskError":
        """Returns the same error with a note of what has not been lost."""
        return DiskError(self.problem, self.fix, self.safe or safe)


class NonFiniteError(ArithmeticError):
    """Reports in one line that training produced NaN or infinity, the last good checkpoint, and the nearest fix.

    All ranks raise it at the same time.
    """


class LostRankError(RuntimeError):
    """Reports in one line that another process of the run has ended, and how to continue the run."""
