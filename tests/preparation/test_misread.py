"""misread.py: captions that were read in another encoding than written."""

from __future__ import annotations

import pytest

from cogvideox.preparation.misread import meaning, misread_notes

APOSTROPHE, ACCENT = "it\u2019s", "caf\u00e9"
CHINESE, JAPANESE, RUSSIAN = "\u4e00\u53ea\u72d7", "\u72ac\u304c\u8d70\u308b", "\u0441\u043e\u0431\u0430\u043a\u0430"
SHORT = "\u7ea6\u4e3a"  # two characters whose bytes in GBK are valid UTF-8


@pytest.mark.parametrize(
    ("text", "encoding", "read_as"),
    [
        (f"{APOSTROPHE} a {ACCENT}", "utf-8", "cp1252"),
        (f"{APOSTROPHE} a {ACCENT}", "utf-8", "latin-1"),
        ("20 \u00b0C", "utf-8", "cp1252"),
        (CHINESE, "utf-8", "latin-1"),
        (RUSSIAN, "utf-8", "latin-1"),
        ("a dog \U0001f600", "utf-8", "cp1252"),
        (APOSTROPHE, "cp1252", "latin-1"),
        (JAPANESE, "iso2022_jp", "utf-8"),
        (SHORT, "gbk", "utf-8"),
    ],
)
def test_a_misread_text_is_read_as_it_was_written(text: str, encoding: str, read_as: str) -> None:
    misread = text.encode(encoding).decode(read_as)
    assert misread != text
    assert meaning(misread) == text


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        ACCENT,
        APOSTROPHE,
        CHINESE,
        JAPANESE,
        RUSSIAN,
        "\u00abCAF\u00c9\u00bb",  # capitals before quotation marks
        "chant\u00e9\u2026\u201d",
        "beaut\u00e9\u2026\u00a0\u00bb",
        "20 \u00b0C, 5\u20ac, \u00bd \u00d7 \u00bc, \u00b5\u03a9",
        f"{ACCENT} {RUSSIAN}",  # two alphabets, but not in one word
        "\u043e\u0431\u02bc\u0454\u043a\u0442",  # an apostrophe that counts as a letter
        "ti\u00ea\u0301ng Vi\u00ea\u0323t",  # decomposed accents
        "\u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
        "a dog \U0001f600",
    ],
)
def test_real_texts_look_right(text: str) -> None:
    assert meaning(text) is None


def test_notes_name_the_clip_and_show_the_place() -> None:
    long = f"A long caption that ends with the word {ACCENT} and goes on"
    misread = long.encode().decode("cp1252")
    clips_of = {misread: ["a.mp4", "b.mp4"], "caf\ufffd": ["c.mp4"], "fine": ["d.mp4"], ACCENT: ["e.mp4"]}
    assert misread_notes(clips_of) == [
        "2 captions look as if read in another encoding than written; save the text again, as UTF-8:",
        '  a.mp4: "...the word caf\u00c3\u00a9 and goes on" may mean "...the word caf\u00e9 and goes on"',
        '  c.mp4: "caf\ufffd" has lost characters',
    ]
    assert misread_notes({"fine": ["d.mp4"]}) == []
