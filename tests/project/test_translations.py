"""Tests that README.zh.md and README.ja.md say what README.md says: code, links, figures and structure are equal.

Sentences cannot be compared, so this finds what a change of README.md leaves out of date: a command, a link, a name in
backticks, a figure, or a heading, list item, table row or paragraph that was added or removed.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
from running import ROOT

LANGUAGES = ("README.zh.md", "README.ja.md")
SECTION = re.compile(r"^## ", re.MULTILINE)
CODE_BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
TARGET = re.compile(r"\]\(([^)\s]+)\)")


def sections(name: str) -> list[str]:
    """Returns the text before the first heading of the second level, and that of each of these headings."""
    return SECTION.split((ROOT / name).read_text())


def prose(section: str) -> str:
    """Returns a section without code blocks, names in backticks and the targets of links."""
    return TARGET.sub("]", re.sub(r"`[^`]+`", "", CODE_BLOCK.sub("", section)))


def targets(section: str) -> list[str]:
    """Returns where the links and images of a section lead to, without those to README.md in a language."""
    found = TARGET.findall(CODE_BLOCK.sub("", section))
    return [to for to in found if not re.fullmatch(r"README(\.\w+)?\.md", to)]


def spans(section: str) -> list[str]:
    """Returns the names in backticks, sorted, because languages order the words of a sentence differently."""
    return sorted(re.findall(r"`([^`]+)`", CODE_BLOCK.sub("", section)))


def figures(section: str) -> list[str]:
    """Returns the numbers of the prose in their order."""
    return re.findall(r"\d+(?:\.\d+)*", prose(section))


def structure(section: str) -> list[int]:
    """Returns the numbers of list items, rows of tables, headings, and marks of bold text."""
    return [len(re.findall(mark, prose(section), re.MULTILINE)) for mark in (r"^- ", r"^\|", r"^#+ ", r"\*\*")]


@pytest.mark.parametrize("language", LANGUAGES)
def test_sections_and_code_are_equal(language: str) -> None:
    ours, theirs = sections("README.md"), sections(language)
    assert len(ours) == len(theirs)
    assert [CODE_BLOCK.findall(text) for text in theirs] == [CODE_BLOCK.findall(text) for text in ours]


@pytest.mark.parametrize("part", [targets, spans, figures, structure])
@pytest.mark.parametrize("language", LANGUAGES)
def test_parts_of_each_section_are_equal(language: str, part: Callable[[str], list[Any]]) -> None:
    for ours, theirs in zip(sections("README.md"), sections(language), strict=True):
        assert part(theirs) == part(ours)


def test_each_language_links_to_the_others() -> None:
    names = {"README.md", *LANGUAGES}
    for name in names:
        assert names - {name} <= set(TARGET.findall(sections(name)[0]))
