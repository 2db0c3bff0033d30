"""Tests of captions.py, with a tokenizer that lacks some characters, as T5's does."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from cogvideox.data.forms.samples import Sample
from cogvideox.preparation.captions import caption_notes, prompt_notes, shared_notes, unknown_characters

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Makes a T5 tokenizer with a small vocabulary of Latin letters and some signs."""
    from tiny_cogvideox import make_tokenizer

    return make_tokenizer()


class Counting:
    """Tokenizes, and records the texts that it gets."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts = tokenizer, list[str]()
        self.unk_token_id = tokenizer.unk_token_id

    def __call__(self, texts: list[str], **named: Any) -> Any:
        self.texts += texts
        return self.tokenizer(texts, **named)


def notes(tokenizer: Any, captions: Iterable[str], contents: Iterable[str] | None = None) -> list[str]:
    """Returns all notes on captions; the clips differ unless the hashes of their contents are given."""
    samples = [Sample(f"{number}.mp4", caption, f"/{number}.mp4") for number, caption in enumerate(captions)]
    hashes = list(contents) if contents is not None else [sample.id for sample in samples]
    clips = list(zip(samples, hashes, strict=True))
    return [*caption_notes(tokenizer, clips, LENGTH), *shared_notes(clips)]


def test_captions_that_t5_reads_have_no_notes(tokenizer: Any) -> None:
    assert notes(tokenizer, ["A red square.", "A blue disc."]) == []
    assert notes(tokenizer, ["", ""]) == []  # missing captions are reported elsewhere


def test_unknown_characters_are_listed_with_their_share(tokenizer: Any) -> None:
    lines = notes(tokenizer, ["A red square.", "A red square 猫", "\u4e00\u53ea\u732b", "A red square \N{DOG FACE}."])
    assert lines[0].startswith("3 captions have characters that T5 does not know (")
    assert "write them in English" in lines[0]
    assert lines[0].endswith("(19% of their characters); write them in English:")
    assert lines[1] == "  2.mp4: 3 of 3 characters are unknown: \u4e00 \u53ea \u732b"  # although they are one token
    assert {line.split(":")[0] for line in lines[2:4]} == {"  1.mp4", "  3.mp4"}
    assert not any("0.mp4" in line for line in lines)


def test_names_of_clips_do_not_reach_the_terminal_as_they_are(tokenizer: Any) -> None:
    """A name may hold a line break, or codes that a terminal executes."""
    clips = [(Sample(f"a\nb\x1b[2J{k}.mp4", text, "/x"), str(k)) for k, text in enumerate(["\u732b", "\u72d7 " * 99])]
    lines = [*caption_notes(tokenizer, clips, LENGTH), *shared_notes([(clips[0][0], "1"), clips[0]])]
    assert len(lines) >= 6
    assert all(line.isprintable() for line in lines)
    assert sum("a\\nb\\x1b[2J" in line for line in lines) >= 4


def test_prompts_that_t5_does_not_read_are_named(tokenizer: Any) -> None:
    assert prompt_notes(tokenizer, ["A red square.", ""]) == []
    (line,) = prompt_notes(tokenizer, ["A red square.", "A \u4e00\u53ea \u732b"])
    assert line == (
        'the prompt "A \u4e00\u53ea \u732b": 3 of 4 characters are unknown: \u4e00 \u53ea \u732b; write it in English'
    )


def test_ascii_is_not_assumed_to_be_known(tokenizer: Any) -> None:
    lines = notes(tokenizer, ["A {red} square.", "A red square."])
    assert lines[0].startswith("1 caption has characters")
    assert lines[1].endswith("2 of 13 characters are unknown: { }")


def test_a_character_that_is_known_in_combination_is_not_listed(tokenizer: Any) -> None:
    """A full-width A is normalized to A. A combining accent is unknown, alone and after an e."""
    assert notes(tokenizer, ["\N{FULLWIDTH LATIN CAPITAL LETTER A} red square."]) == []
    assert len(notes(tokenizer, ["A re\N{COMBINING ACUTE ACCENT}d square."])) == 2


def test_texts_with_the_same_tokens_are_named_together(tokenizer: Any) -> None:
    cats, dogs = "一只猫", "两只狗"
    lines = notes(tokenizer, [cats, "A red square.", dogs])
    (at,) = (number for number, line in enumerate(lines) if "written differently" in line)
    assert lines[at].startswith("2 captions are written differently, but T5 reads the same tokens")
    assert lines[at + 1] == f'  0.mp4 "{cats}", 2.mp4 "{dogs}"'
    start = "a red square " * 20
    assert any("written differently" in line for line in notes(tokenizer, [f"{start} falls", f"{start} rises"]))


@pytest.mark.parametrize("count", [LENGTH - 1, LENGTH, LENGTH + 1])
def test_only_captions_beyond_the_last_token_are_cut(tokenizer: Any, count: int) -> None:
    text = " ".join(["red"] * (count - 1))
    while len(tokenizer(text).input_ids) < count:
        text += " red"
    while len(tokenizer(text).input_ids) > count:
        text = text[:-1]
    assert any("is cut after 32 tokens" in line for line in notes(tokenizer, [text])) == (count > LENGTH)


def test_different_clips_with_one_caption_are_listed_but_not_repeats(tokenizer: Any) -> None:
    captions = ["A red square.", "A blue disc.", "A red square.", "A red square."]
    lines = notes(tokenizer, captions)
    assert lines[0].startswith("3 clips share 1 caption with another clip")
    assert lines[1] == '  "A red square.": 3 clips: 0.mp4, 2.mp4, 3.mp4'
    assert notes(tokenizer, captions, contents=["a", "b", "a", "a"]) == []


def test_many_notes_of_a_kind_are_cut_short(tokenizer: Any) -> None:
    lines = notes(tokenizer, [f"猫 {number}" for number in range(50)])
    assert lines[0].startswith("50 captions")
    assert lines[21] == "  ... and 30 more"


def test_few_captions_are_tokenized(tokenizer: Any) -> None:
    """Each character is tokenized once, and so is each caption that may have a problem; no other caption is."""
    counting = Counting(tokenizer)
    captions = [f"A red square {number}." for number in range(2000)]
    assert len(notes(counting, [*captions, "A red square 猫"])) == 2
    assert len(counting.texts) == len(set().union(*captions)) + 1 + 1


def test_every_caption_with_an_unknown_token_has_an_unknown_character(tokenizer: Any) -> None:
    """Captions that are skipped have no unknown token, as tokenizing all of them shows."""
    draw = random.Random(0)
    alphabet = "abcdeé猫한\u1112\u1161\u0301\u0327 \u00a0\u200bſﬁ①{}~\t\N{DOG FACE}\N{VARIATION SELECTOR-16}"
    captions = ["".join(draw.choices(alphabet, k=draw.randint(1, 6))) for _ in range(3000)]
    unknown = unknown_characters(tokenizer, captions)
    missed = [
        text
        for text, ids in zip(captions, tokenizer(captions).input_ids, strict=True)
        if tokenizer.unk_token_id in ids and unknown.isdisjoint(text)
    ]
    assert missed == []
