"""Finds captions that T5 cuts off, cannot read, or cannot tell apart, for the report of a preparation.

``caption_notes`` and ``shared_notes`` return lines. Tokenizing takes longest, so only captions are tokenized that are
long enough to be cut or contain an unknown character. Each distinct character of the data set is looked up once, so
nothing is assumed about a tokenizer's alphabet; T5's lacks some ASCII characters, such as braces.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cogvideox.data.cache import hash_of
from cogvideox.data.forms.samples import Sample
from cogvideox.errors import first_of, one_line, plural

BATCH = 4096  # captions per call of the tokenizer
NAMED = 3  # clips that a line for the console names
LONGEST_EXCERPT = 40  # characters of a caption in a note


@dataclass(frozen=True)
class Tokens:
    """Describes the tokens of one caption.

    Attributes:
        count: Number of all tokens, including the end token and those after the limit of T5.
        unknown: Whether a token is unknown.
        digest: Hash of the tokens that T5 reads, which is equal for captions with equal embeddings.
    """

    count: int
    unknown: bool
    digest: str


def caption_notes(tokenizer: Any, clips: Sequence[tuple[Sample, str]], length: int) -> list[str]:
    """Returns lines about captions with unknown or too many tokens, and about those that T5 cannot tell apart.

    Args:
        tokenizer: The tokenizer of T5.
        clips: Samples, each with the hash of the content of its file.
        length: Number of tokens that T5 reads.
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
    """Returns the ids of the clips with each caption; only the first of identical clips counts."""
    found: dict[str, list[str]] = {}
    seen = set()
    for sample, content in clips:
        clip = (sample.caption, content, sample.section)
        if sample.caption and clip not in seen:
            found.setdefault(sample.caption, []).append(sample.id)
        seen.add(clip)
    return found


def unknown_characters(tokenizer: Any, captions: Iterable[str]) -> set[str]:
    """Returns the characters that alone become the unknown token; a combination of them may still be known."""
    characters = sorted(set().union(*captions))
    if not characters:
        return set()
    ids = tokenizer(characters, add_special_tokens=False).input_ids
    return {char for char, found in zip(characters, ids, strict=True) if tokenizer.unk_token_id in found}


def tokens_of(tokenizer: Any, captions: Sequence[str], length: int) -> Iterator[Tokens]:
    """Yields the tokens of each caption."""
    for start in range(0, len(captions), BATCH):
        batch = list(captions[start : start + BATCH])
        for ids in tokenizer(batch, truncation=False, verbose=False).input_ids:
            seen = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
            yield Tokens(len(ids), tokenizer.unk_token_id in ids, hash_of(seen))


def unknown_notes(tokens: dict[str, Tokens], clips_of: dict[str, list[str]], unknown: set[str]) -> list[str]:
    """Returns lines about captions with characters that T5 does not know, the least readable first."""
    # Adjacent unknown characters become one token, so a share of tokens would be small for a whole sentence.
    lost = {text: [char for char in text if char in unknown] for text, made in tokens.items() if made.unknown}
    if not lost:
        return []
    sizes = {text: len("".join(text.split())) for text in lost}
    total = sum(map(len, lost.values())) / sum(sizes.values())
    rule = f"{plural(len(lost), 'caption has', 'captions have')} characters that T5 does not know"
    least_readable_first = sorted(lost, key=lambda text: -len(lost[text]) / sizes[text])
    lines = [f"{clips_of[text][0]}: {lost_text(text, lost[text])}" for text in least_readable_first]
    return [f"{rule} ({total:.0%} of their characters); write them in English:", *indented(lines)]


def lost_text(text: str, lost: Sequence[str]) -> str:
    """Returns how many characters of a text are unknown, and which they are."""
    size = len("".join(text.split()))
    rule = f"{len(lost)} of {plural(size, 'character is', 'characters are')} unknown"
    return f"{rule}: {excerpt(' '.join(dict.fromkeys(lost)))}"


def prompt_notes(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Returns a line for each prompt with characters that T5 does not know."""
    unknown = unknown_characters(tokenizer, prompts)
    lost = {text: [char for char in text if char in unknown] for text in prompts}
    return [
        f"the prompt {quoted(text)}: {lost_text(text, characters)}; write it in English"
        for text, characters in lost.items()
        if characters and tokenizer.unk_token_id in tokenizer(text).input_ids
    ]


def confused_notes(tokens: dict[str, Tokens], clips_of: dict[str, list[str]]) -> list[str]:
    """Returns lines about captions that differ but have the same tokens."""
    groups: dict[str, list[str]] = defaultdict(list)
    for text, made in tokens.items():
        groups[made.digest].append(text)
    confused = [texts for texts in groups.values() if len(texts) > 1]
    if not confused:
        return []
    number = sum(map(len, confused))
    lines = [shortened([f"{clips_of[text][0]} {quoted(text)}" for text in texts]) for texts in confused]
    return [
        f"{number} captions are written differently, but T5 reads the same tokens of those on one line, so that they "
        "have one embedding:",
        *indented(lines),
    ]


def cut_notes(tokens: dict[str, Tokens], clips_of: dict[str, list[str]], length: int) -> list[str]:
    """Returns lines about captions of which T5 reads only the first ``length`` tokens, the longest first."""
    cut = sorted((-made.count, clips_of[text][0]) for text, made in tokens.items() if made.count > length)
    if not cut:
        return []
    rule = f"{plural(len(cut), 'caption is', 'captions are')} cut after {length} tokens, which is all that T5 reads"
    return [f"{rule}; put what matters most first:", *indented([f"{name}: {-count} tokens" for count, name in cut])]


def shared_notes(clips: Sequence[tuple[Sample, str]]) -> list[str]:
    """Returns lines about captions that different clips share; ``clips`` is as in caption_notes."""
    clips_of = clips_by_caption(clips)
    shared = Counter({text: len(ids) for text, ids in clips_of.items() if len(ids) > 1}).most_common()
    if not shared:
        return []
    number = sum(count for _, count in shared)
    rule = f"{number} clips share {plural(len(shared), 'caption')} with another clip"
    lines = [f"{quoted(text)}: {count} clips: {shortened(clips_of[text])}" for text, count in shared]
    return [f"{rule}; if the clips differ in what they show, say so in their captions:", *indented(lines)]


def shortened(listed: Sequence[str], separator: str = ", ") -> str:
    """Returns the first NAMED names, and how many more there are."""
    more = [f"and {len(listed) - NAMED} more"] if len(listed) > NAMED else []
    return separator.join([*listed[:NAMED], *more])


def excerpt(text: str) -> str:
    """Returns the start of a text on one line."""
    text = one_line(text)
    return text if len(text) <= LONGEST_EXCERPT else f"{text[: LONGEST_EXCERPT - 3]}..."


def quoted(text: str) -> str:
    """Returns the start of a caption in quotation marks."""
    return f'"{excerpt(text)}"'


def indented(lines: Sequence[str]) -> list[str]:
    """Returns the first of many texts, each as one printable line, indented as details of the line above."""
    return [f"  {one_line(line)}" for line in first_of(lines)]
