"""Draws the cuts of a table of scenes: the last frame before and the first frame after each cut, with its time.

``draw_cuts`` is the entry point. The pictures are drawn from the rows of the table, so they also show what a person has
edited.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cogvideox import stopping
from cogvideox.data.forms.scene_table import Clip
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import Section, VideoInfo
from cogvideox.data.media.stills import info_of, small_frames
from cogvideox.data.media.workers import Limits, Workers
from cogvideox.progress import ProgressBar
from cogvideox.runtime.sheets import Panel, SheetRow, contact_sheet

FRAME_SIZE = 320  # pixels of the longer side of a frame
CUTS_PER_ROW = 3
CUTS_PER_SHEET = 120

Cut = tuple[str, Panel]  # the name of the file, and the frames around the cut


def sheet_path(table: Path, number: int = 1) -> Path:
    """Returns the path of a sheet next to its table; sheets are counted from 1."""
    return table.with_name(f"{table.stem}-cuts{f'-{number}' if number > 1 else ''}.png")


def is_current(table: Path) -> bool:
    """Returns whether the sheets were drawn after the last change of the table."""
    sheet = sheet_path(table)
    return sheet.exists() and sheet.stat().st_mtime_ns >= table.stat().st_mtime_ns


def draw_cuts(table: Path, clips: Mapping[str, Sequence[Clip]], root: str, limits: Limits) -> list[Path]:
    """Draws the cuts of all files into one or more sheets, and deletes older sheets of the table.

    Args:
        table: The table, next to which the sheets are written.
        clips: The rows of the table by file.
        root: Absolute folder of the clips, without which files are named.
        limits: Time and memory that decoding one pair of frames may use.

    Returns:
        The sheets; none if there is no cut.
    """
    sheets: list[Path] = []
    waiting: list[Cut] = []

    def draw() -> None:
        sheets.append(sheet_path(table, len(sheets) + 1))
        contact_sheet(_rows(waiting), sheets[-1], f"{table.name}: last frame before and first frame after each cut")
        waiting.clear()

    with stopping.stoppable():
        for path, pictured in _cuts(clips, limits):
            waiting.append((path.removeprefix(root).lstrip("/"), pictured))
            if len(waiting) == CUTS_PER_SHEET:
                draw()
    if waiting:
        draw()
    number = len(sheets) + 1
    while (old := sheet_path(table, number)).exists():
        old.unlink()
        number += 1
    return sheets


def _cuts(clips: Mapping[str, Sequence[Clip]], limits: Limits) -> Iterator[Cut]:
    """Yields each cut that lies within its file and can be decoded."""
    sections = {path: [row.section for row in rows if row.section is not None] for path, rows in clips.items()}
    cut = [(path, listed) for path, listed in sections.items() if listed]
    bar = ProgressBar(cut, desc="drawing cuts", unit="clip", leave=False)
    with Workers(1, limits) as workers:
        for path, listed in bar:
            (info,) = workers.run([(info_of, path)])
            if not isinstance(info, VideoInfo):
                continue
            firsts = _first_frames(info, listed)
            jobs = ((small_frames, path, info, (first - 1, first), FRAME_SIZE) for first in firsts)
            for first, frames in zip(firsts, workers.run(jobs), strict=True):
                stopping.unit("picture of a cut")
                if isinstance(frames, np.ndarray):
                    yield path, Panel(f"{info.times[first]:.3f} s", list(frames))


def _first_frames(info: VideoInfo, sections: Sequence[Section]) -> list[int]:
    """Returns the indices of the frames at which sections begin, or which follow the last frame of one."""
    times = {section.start for section in sections} | {s.end for s in sections if s.end is not None}
    firsts = []
    for time in sorted(times):
        try:
            firsts.append(Section(time, None).frames(info).start)
        except VideoError:  # a person wrote a time after the end of the video
            break
    return [first for first in firsts if first > 0]


def _rows(cuts: Sequence[Cut]) -> list[SheetRow]:
    rows: list[tuple[str, list[Panel]]] = []
    for name, panel in cuts:
        if not rows or rows[-1][0] != name or len(rows[-1][1]) == CUTS_PER_ROW:
            rows.append((name, []))
        rows[-1][1].append(panel)
    # Rows that are not full get empty panels, so that all frames have the same size.
    return [SheetRow(name, [*row, *[Panel("", [])] * (CUTS_PER_ROW - len(row))]) for name, row in rows]
