"""Finds files of a data set that are not used, although somebody may have meant them to be.

``Unused`` collects them while folders are read, and preparation/unusable.py describes them. A list or a table takes the
place of the text files next to clips. So a caption that is later written into such a file has no effect, and neither
has a clip that is added to the folder with its caption.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cogvideox.data.forms.columns import Columns, Problems, read_lines
from cogvideox.data.forms.paths import LIST_FILES, MEDIA_SUFFIXES, PathRules, fold_name, is_listed

MOST_COMPARED = 1000  # text files of a folder, because opening a file takes long in network storage


@dataclass
class Unused:
    """Holds paths of files that are not used.

    Attributes:
        unsupported: Files that may be clips, captions or tables, but have an unsupported format.
        captions: Text files next to clips that say something else than the list or table, by the path of that file.
        clips: Clips with a text file next to them that the list or table does not name, by the path of that file.
        tables: Tables that are not read, because captions are next to the clips.
    """

    unsupported: list[str] = field(default_factory=list)
    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    clips: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tables: list[str] = field(default_factory=list)

    def add(self, columns: Columns, files: Sequence[str | None], rules: PathRules) -> None:
        """Adds what a folder without problems has and does not use.

        Args:
            columns: The rows of the folder.
            files: The path of the video of each row.
            rules: Decide which files may be read.
        """
        self.unsupported += columns.skipped
        self.tables += columns.unread_tables
        if not columns.caption_file:
            return
        rows: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row, file in enumerate(files):
            if file is not None:
                rows[os.path.split(file)].append(row)
        num_compared = 0
        for folder in sorted({folder for folder, _ in rows}):
            for clips, text in _pairs_in(folder, rules):
                listed = [row for clip in clips for row in rows.get((folder, clip), ())]
                if not listed:
                    self.clips[columns.caption_file] += [os.path.join(folder, clip) for clip in clips]
                elif num_compared < MOST_COMPARED and rules.problem_with(text, folder, "caption") is None:
                    num_compared += 1
                    if _says_something_else(os.path.join(folder, text), listed, columns):
                        self.captions[columns.caption_file].append(os.path.join(folder, text))


def _pairs_in(folder: str, rules: PathRules) -> list[tuple[list[str], str]]:
    """Returns each text file of a folder that has the name of clips, after these clips."""
    clips: dict[str, list[str]] = defaultdict(list)
    texts: dict[str, str] = {}
    try:
        names = sorted(filter(is_listed, os.listdir(folder))) if rules.allows(os.path.realpath(folder)) else []
    except OSError:
        names = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in MEDIA_SUFFIXES:
            clips[fold_name(stem)].append(name)
        elif suffix.lower() == ".txt" and name not in LIST_FILES:
            texts[fold_name(stem)] = name
    return [(clips[stem], text) for stem, text in texts.items() if stem in clips]


def _says_something_else(text: str, rows: Sequence[int], columns: Columns) -> bool:
    """Returns whether a text file has another caption than the rows of its clip.

    Rows whose captions differ from each other were written one by one, such as those of scenes, and so were rows of
    sections that have no caption yet. The text, which is about the whole clip, is not expected there.
    """
    values = columns.captions.values if columns.captions is not None else ()
    captions = {" ".join((values[row] or "").split()) if row < len(values) else "" for row in rows}
    are_sections = columns.sections is not None and any(columns.sections[row] is not None for row in rows)
    if len(captions) > 1 or (are_sections and captions == {""}):
        return False
    lines = read_lines(text, Problems())
    caption = " ".join(" ".join(line or "" for line in lines or ()).split())
    return bool(caption) and caption not in captions
