"""What T5 does not read of the captions, or cannot tell apart: notes for the table that a preparation prints.

Captions of the clips that are used -> lines. Few captions are tokenized, because that takes longest: those that are
long enough to be cut, and those with a character that is unknown. Each distinct character of the data set is looked up
once, so nothing is assumed about a tokenizer's alphabet (that of T5 lacks some ASCII characters too, such as braces).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cogvideox.data.cache import hash_of
from cogvideox.data.forms.samples import Sample
from cogvideox.errors import first_of, one_line

BATCH = 4096  # captions tokenized at once
NAMED = 3  # clips that are named of those that share a caption
LONGEST_EXCERPT = 40  # characters of a caption in a note


@dataclass(frozen=True)
class Tokens:
    """What the tokenizer makes of one caption."""

    count: int  # however many T5 reads, the one for the end included
    unknown: int
    digest: str  # of those that T5 reads: equal for captions with one embedding


def caption_notes(tokenizer: Any, clips: Sequence[tuple[Sample, str]], length: int) -> list[str]:
    """Lines about captions with unknown or too many tokens, and about those that only T5 takes to be the same.

    ``clips`` are samples, each with the hash of its clip's content; ``length`` is how many tokens T5 reads.
    """
    clips_of = clips_by_caption(clips)
    unknown = unknown_characters(tokenizer, clips_of)
    # A token has at least one character, and one is for the end, so short captions are never cut.
    suspects = [text for text in clips_of if len(text) + 1 > length or not unknown.isdisjoint(text)]
    tokens = dict(zip(suspects, tokens_of(tokenizer, suspects, length), strict=True))
    return [
        *unknown_notes(tokens, clips_of, unknown),
        *confused_notes(tokens, clips_of),
        *cut_notes(tokens, clips_of, length),
    ]


def clips_by_caption(clips: Iterable[tuple[Sample, str]]) -> dict[str, list[str]]:
    """The ids of the different clips that have each caption; of repeats and copies of a clip only the first."""
    first = {(sample.caption, content): sample.id for sample, content in reversed(list(clips)) if sample.caption}
    found: dict[str, list[str]] = {}
    for (caption, _), sample_id in reversed(first.items()):
        found.setdefault(caption, []).append(sample_id)
    return found


def unknown_characters(tokenizer: Any, captions: Iterable[str]) -> set[str]:
    """The characters that become the unknown token where each stands alone; in combination one may be known."""
    characters = sorted(set().union(*captions))
    if not characters:
        return set()
    ids = tokenizer(characters, add_special_tokens=False).input_ids
    return {char for char, found in zip(characters, ids, strict=True) if tokenizer.unk_token_id in found}


def tokens_of(tokenizer: Any, captions: Sequence[str], length: int) -> Iterator[Tokens]:
    """The tokens of each caption."""
    for start in range(0, len(captions), BATCH):
        batch = list(captions[start : start + BATCH])
        for ids in tokenizer(batch, truncation=False, verbose=False).input_ids:
            seen = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
            yield Tokens(len(ids), ids.count(tokenizer.unk_token_id), hash_of(seen))


def unknown_notes(tokens: dict[str, Tokens], clips_of: dict[str, list[str]], unknown: set[str]) -> list[str]:
    """Captions with characters that T5 does not know, the least readable first."""
    found = {text: made for text, made in tokens.items() if made.unknown}
    if not found:
        return []
    shares = {text: made.unknown / (made.count - 1) for text, made in found.items()}  # one is for the end
    total = sum(made.unknown for made in found.values()) / sum(made.count - 1 for made in found.values())
    rule = f"{plural(len(found), 'caption has', 'captions have')} characters that T5 does not know"
    lines = [
        f"{clips_of[text][0]}: {found[text].unknown} of {found[text].count - 1} tokens are unknown: "
        f"{excerpt(' '.join(dict.fromkeys(char for char in text if char in unknown)))}"
        for text in sorted(found, key=lambda text: -shares[text])
    ]
    return [f"{rule} ({total:.0%} of their tokens are unknown); write them in English:", *indented(lines)]


def confused_notes(tokens: dict[str, Tokens], clips_of: dict[str, list[str]]) -> list[str]:
    """Captions that differ, but of which T5 reads the same tokens."""
    groups: dict[str, list[str]] = defaultdict(list)
    for text, made in tokens.items():
        groups[made.digest].append(text)
    confused = [texts for texts in groups.values() if len(texts) > 1]
    if not confused:
        return []
    number = sum(map(len, confused))
    lines = [names([f"{clips_of[text][0]} {quoted(text)}" for text in texts]) for texts in confused]
    return [
        f"{number} captions are written differently, but T5 reads the same tokens of those on one line, so that they "
        "have one embedding:",
        *indented(lines),
    ]


def cut_notes(tokens: dict[str, Tokens], clips_of: dict[str, list[str]], length: int) -> list[str]:
    """Captions of which T5 reads the first ``length`` tokens only, the longest first."""
    cut = sorted((-made.count, clips_of[text][0]) for text, made in tokens.items() if made.count > length)
    if not cut:
        return []
    rule = f"{plural(len(cut), 'caption is', 'captions are')} cut after {length} tokens, which is all that T5 reads"
    return [f"{rule}; put what matters most first:", *indented([f"{name}: {-count} tokens" for count, name in cut])]


def shared_notes(clips: Sequence[tuple[Sample, str]]) -> list[str]:
    """Captions that different clips share; ``clips`` as for caption_notes."""
    clips_of = clips_by_caption(clips)
    shared = Counter({text: len(ids) for text, ids in clips_of.items() if len(ids) > 1}).most_common()
    if not shared:
        return []
    number = sum(count for _, count in shared)
    rule = f"{number} clips share {plural(len(shared), 'caption', 'captions')} with another clip"
    lines = [f"{quoted(text)}: {count} clips: {names(clips_of[text])}" for text, count in shared]
    return [f"{rule}; if the clips differ in what they show, say so in their captions:", *indented(lines)]


def plural(count: int, one: str, many: str) -> str:
    """A number with what it counts."""
    return f"{count} {one if count == 1 else many}"


def names(listed: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = [f"and {len(listed) - NAMED} more"] if len(listed) > NAMED else []
    return ", ".join([*listed[:NAMED], *more])


def excerpt(text: str) -> str:
    """The start of a text on one line."""
    text = one_line(text)
    return text if len(text) <= LONGEST_EXCERPT else f"{text[: LONGEST_EXCERPT - 3]}..."


def quoted(text: str) -> str:
    """The start of a caption between quotation marks."""
    return f'"{excerpt(text)}"'


def indented(lines: Sequence[str]) -> list[str]:
    """The first of many lines, as details of the one before."""
    return [f"  {line}" for line in first_of(lines)]
