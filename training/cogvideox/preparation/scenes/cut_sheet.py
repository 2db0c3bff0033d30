"""Draws the cuts of a table of scenes: the last frame before and the first frame after each cut, with its time.

``draw_cuts`` is the entry point. The pictures are drawn from the rows of the table, so they also show what a person has
edited.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from cogvideox import stopping
from cogvideox.data.cache import hash_of, is_key
from cogvideox.data.forms.scene_table import Clip
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import Section, VideoInfo
from cogvideox.data.media.pixels.stills import info_of, small_frames
from cogvideox.data.media.workers import Job, Limits, Workers, usual_number
from cogvideox.files import foreign_problem, stamp_of
from cogvideox.progress import ProgressBar
from cogvideox.runtime.sheets import Panel, SheetRow, comment_of, contact_sheet

FRAME_SIZE = 320  # pixels of the longer side of a frame
CUTS_PER_ROW = 3
CUTS_PER_SHEET = 120

Cut = tuple[str, float]  # the path of a file, and the time at which a scene begins or ends


def sheet_path(table: Path, number: int) -> Path:
    """Returns the path of a sheet next to its table; sheets are counted from 1."""
    return table.with_name(f"{table.stem}-cuts{f'-{number}' if number > 1 else ''}.png")


def foreign_sheets(table: Path) -> Iterator[str]:
    """Yields the pictures next to a table that ``draw_cuts`` may replace or delete, and that it has not drawn."""
    name = re.compile(rf"{re.escape(table.stem)}-cuts(-\d+)?\.png")
    found = sorted(path for path in table.parent.glob("*.png") if name.fullmatch(path.name))
    yield from filter(None, (foreign_problem("--table", path, is_key(comment_of(path))) for path in found))


def draw_cuts(table: Path, clips: Mapping[str, Sequence[Clip]], root: str, limits: Limits) -> list[Path]:
    """Draws the cuts of all files into one or more sheets, and deletes sheets that the table does not need any more.

    A sheet that shows these cuts already is not drawn again.

    Args:
        table: The table, next to which the sheets are written.
        clips: The rows of the table by file.
        root: Absolute folder of the clips, without which files are named.
        limits: Time and memory that decoding one pair of frames may use.

    Returns:
        The sheets that were drawn.
    """
    cuts = [(path, time) for path, rows in clips.items() for time in _times(rows)]
    sheets, drawn = [cuts[k : k + CUTS_PER_SHEET] for k in range(0, len(cuts), CUTS_PER_SHEET)], []
    for number, shown in enumerate(sheets, start=1):
        path = sheet_path(table, number)
        digest = hash_of([[file, stamp_of(file), time] for file, time in shown])
        if comment_of(path) == digest:
            continue
        panels = [(file.removeprefix(os.path.join(root, "")), panel) for file, panel in _panels(shown, limits)]
        title = f"{table.name}: last frame before and first frame after each cut"
        contact_sheet(_rows(panels), path, title, comment=digest)
        drawn.append(path)
    number = len(sheets) + 1
    while (old := sheet_path(table, number)).exists():
        old.unlink()
        number += 1
    return drawn


def _times(rows: Sequence[Clip]) -> list[float]:
    """Returns the times at which sections of a file begin or end, without the start of the file."""
    sections = [row.section for row in rows if row.section is not None]
    return sorted({time for section in sections for time in section if time})


def _panels(cuts: Sequence[Cut], limits: Limits) -> Iterator[tuple[str, Panel]]:
    """Yields the path and the frames of each cut that lies within its file and can be decoded."""
    files = {path: [time for file, time in cuts if file == path] for path, _ in cuts}
    with Workers(usual_number(limits), limits) as workers, stopping.stoppable():

        def jobs() -> Iterator[tuple[Cut, Job]]:
            infos = workers.run((info_of, path) for path in files)
            for (path, times), info in zip(files.items(), infos, strict=True):
                for first in _first_frames(info, times) if isinstance(info, VideoInfo) else ():
                    yield (path, info.times[first]), (small_frames, path, info, (first - 1, first), FRAME_SIZE)

        drawn = workers.run_keyed(jobs())
        for (path, time), frames in ProgressBar(drawn, desc="drawing cuts", unit="cut", total=len(cuts), leave=False):
            stopping.unit("picture of a cut")
            if isinstance(frames, np.ndarray):
                yield path, Panel(f"{time:.3f} s", list(frames))


def _first_frames(info: VideoInfo, times: Sequence[float]) -> list[int]:
    """Returns the indices of the first frames at or after some times, without those before which there is none."""
    firsts = []
    for time in times:
        with suppress(VideoError):  # a person may write a time after the end of the video
            firsts.append(Section(time, None).frames(info).start)
    return [first for first in firsts if first > 0]


def _rows(panels: Sequence[tuple[str, Panel]]) -> list[SheetRow]:
    rows: list[tuple[str, list[Panel]]] = []
    for name, panel in panels:
        if not rows or rows[-1][0] != name or len(rows[-1][1]) == CUTS_PER_ROW:
            rows.append((name, []))
        rows[-1][1].append(panel)
    # Rows that are not full get empty panels, so that all frames have the same size.
    return [SheetRow(name, [*row, *[Panel("", [])] * (CUTS_PER_ROW - len(row))]) for name, row in rows]
