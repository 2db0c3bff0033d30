"""Finds captions that a program has read in another encoding than that in which they were written.

Such a text is valid UTF-8, so nothing else notices it, and T5 gets letters that nobody meant. ``misread_notes`` returns
lines for the report of a preparation. Only patterns are reported that real texts hardly ever have.
"""

import re
import unicodedata

from cogvideox.errors import plural
from cogvideox.preparation.captions import indented, quoted

CONTEXT = 12  # characters before the place that a note shows
REPLACEMENT = "\ufffd"  # programs write it for bytes that they cannot read
# UTF-8 of two to four bytes, whose bytes were read as letters of Windows-1252 or Latin-1. Sequences that could also be
# letters and punctuation of a European language count only if two follow each other.
_TWICE = re.compile(
    rb"[\xc2\xc3][\x80-\xbf]|\xe2[\x80-\xbf]{2}|\xf0\x9f[\x80-\xbf]{2}"
    rb"|(?:[\xc4-\xdf][\x80-\xbf]){2,}|(?:[\xe3-\xef][\x80-\xbf]{2}){2,}"
)
_CONTROLS = re.compile("[\x80-\x9f]")  # Windows-1252 has punctuation in place of these controls of Latin-1
# Those that UTF-8 codes as two bytes, by the first word of the names of their letters in Unicode.
ALPHABETS = {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "SYRIAC", "THAANA", "NKO", "unassigned"}
_RUN = re.compile("[\x80-\u07ff]{2,}")


def misread_notes(clips_of: dict[str, list[str]]) -> list[str]:
    """Returns lines about captions that look misread, with what they may mean.

    Args:
        clips_of: The ids of the clips with each caption.
    """
    meant = {text: meaning(text) for text in clips_of if not text.isascii() or "\x1b" in text}
    lines = [
        f"{clips_of[text][0]}: {around(text, other)} "
        + (f"may mean {around(other, text)}" if other != text else "has lost characters")
        for text, other in meant.items()
        if other is not None
    ]
    if not lines:
        return []
    look = plural(len(lines), "caption looks", "captions look")
    return [f"{look} as if read in another encoding than written; save the text again, as UTF-8:", *indented(lines)]


def meaning(text: str) -> str | None:
    """Returns what a misread text may mean, the text itself if characters are lost, or None if it looks right."""
    if REPLACEMENT in text:
        return text
    if "\x1b" in text:  # the escape character switches between alphabets
        return decoded(text.encode(), "iso2022_jp")
    if (repaired := read_once(text)) != text:
        return repaired
    if _CONTROLS.search(text):
        return _CONTROLS.sub(lambda match: windows_character(match[0]), text)
    return east_asian(text)


def read_once(text: str) -> str:
    """Returns a text in which UTF-8 that was read as Windows-1252 is read as UTF-8."""
    data = b"".join(map(windows_byte, text))
    parts, end = [], 0
    for match in _TWICE.finditer(data):
        if (part := decoded(match[0], "utf-8")) is not None:
            parts += [text[end : match.start()], part]
            end = match.end()
    return "".join(parts) + text[end:]


def windows_byte(character: str) -> bytes:
    """Returns the byte of a character in Windows-1252, or else in Latin-1; 0 if it is in neither."""
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1", "ignore") or b"\0"


def windows_character(control: str) -> str:
    """Returns what Windows-1252 has in place of a control character of Latin-1, or else the character itself."""
    return decoded(control.encode("latin-1"), "cp1252") or control


def east_asian(text: str) -> str | None:
    """Returns a text of GBK whose bytes happen to be valid UTF-8; None if it is not like that.

    The bytes of short texts may be letters of two bytes in UTF-8. Those are from several alphabets within one word, as
    in no real text.
    """
    is_mixed = any(len(alphabets(run)) > 1 for run in _RUN.findall(text))
    return decoded(text.encode(), "gbk") if is_mixed and max(text) <= "\u07ff" else None


def alphabets(text: str) -> set[str]:
    """Returns the alphabets of the letters of a text, and "unassigned" if it has characters that do not exist."""
    return {unicodedata.name(char, "unassigned").split()[0] for char in text} & ALPHABETS


def decoded(data: bytes, encoding: str) -> str | None:
    """Returns the text of some bytes, or None if they are not valid in this encoding."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def around(text: str, other: str) -> str:
    """Returns the part of a text from shortly before the first difference from another, in quotation marks."""
    same = next((at for at, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), text.find(REPLACEMENT))
    start = max(0, same - CONTEXT)
    return quoted(("..." if start else "") + text[start:])
