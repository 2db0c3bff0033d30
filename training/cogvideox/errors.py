"""The errors that a user can act on. Every layer raises them; the scripts print them, and exit with 2 or 3."""

import re
from collections.abc import Sequence

SHOWN = 20  # lines of one kind in a message
LONGEST_LINE = 500  # characters
# of a URL: scheme, user and password, host and path, query and fragment; ::: separates two
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)([^\s/?#]*@)?((?:(?!:::)[^\s?#])*)([?#](?:(?!:::[A-Za-z]+://)\S)*)?")


def one_line(text: str) -> str:
    """The text on one printable line of at most LONGEST_LINE characters: its start says where, its end the fix."""
    if len(text) > 2 * LONGEST_LINE:
        text = text[:LONGEST_LINE] + text[-LONGEST_LINE:]
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    start = LONGEST_LINE * 3 // 5
    return text if len(text) <= LONGEST_LINE else f"{text[:start]} ... {text[start + 5 - LONGEST_LINE :]}"


def public_urls(text: str) -> str:
    """The text with every URL in it cut down to scheme, host and path: passwords and signatures are in the rest."""
    return _URL.sub(r"\1\3", text) if "://" in text else text


def first_of(lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


def first_line(error: BaseException) -> str:
    """Of what an error says; its type if that is nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class UsageError(ValueError):
    """Everything that is wrong with the flags, the files or the model, found before any model loads.

    Each problem is one line: the flag or file with its value, the rule, and the nearest fix, such as
    ``--frame_buckets 50: CogVideoX encodes 4k+1 frames; nearest: 49, 53``. Of URLs no query and no password is kept.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        listed = (problems,) if isinstance(problems, str) else problems
        self.problems: tuple[str, ...] = tuple(map(public_urls, listed))
        super().__init__("\n".join(self.problems))


class DiskError(UsageError):
    """A disk that is full, fails or refuses to be written. Like all that a user can fix, it is one line."""

    def __init__(self, problem: str, fix: str = "", safe: str = "") -> None:
        self.problem, self.fix, self.safe = problem, fix, safe
        super().__init__("; ".join(part for part in (problem, safe, fix) if part))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """For other processes, which otherwise would get the whole line as the problem."""
        return type(self), (self.problem, self.fix, self.safe)

    def knowing(self, safe: str) -> "DiskError":
        """The same with what has not been lost."""
        return DiskError(self.problem, self.fix, self.safe or safe)


class NonFiniteError(ArithmeticError):
    """Training went to NaN or infinity: what was found, the last good checkpoint, and the nearest fix, on one line.

    It is raised on all ranks at once.
    """
