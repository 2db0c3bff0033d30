"""The errors that a user can cause. Owns nothing; every layer raises them, the scripts print them and exit 2."""

from collections.abc import Sequence


def one_line(text: str) -> str:
    """The text with line breaks and other characters that cannot be shown written as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class UsageError(ValueError):
    """Everything that is wrong with the flags, the files or the model, found before any model loads.

    Each problem is one line: the flag or file with its value, the rule, and the nearest fix, such as
    ``--frame_buckets 50: CogVideoX encodes 4k+1 frames; nearest: 49, 53``.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))
