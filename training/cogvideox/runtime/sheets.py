"""Contact sheets: rows of labelled panels of frames -> one PNG that shows at a glance what was cut or made.

contact_sheet: texts are wrapped to the room they have, the frames of a panel shrunk to one height, the panels of a row
set beside each other, everything pasted from top to bottom. Frames are uint8 RGB (H, W, 3); all lengths are in pixels.
The same rows give the same bytes.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cogvideox.files import write_atomically

PAPER, INK, FAINT = (250, 250, 248), (32, 32, 36), (208, 208, 206)
MARGIN, GAP, ROW_GAP, PANEL_GAP = 28, 8, 28, 20
STRIP_HEIGHT = 240  # of a frame; less where the frames of a panel would not fit beside each other
TITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 26, 16, 13
MAX_LINES = 3

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Part = Image.Image | None  # None: there is nothing to show
LONGEST_LABEL = 2000  # characters; three lines take fewer


@dataclass(frozen=True)
class Panel:
    """Frames beside or under each other, which may differ in size, below a label and above a caption in small type."""

    label: str
    frames: Sequence[np.ndarray]
    caption: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """A text and the panels under it, which get the same width."""

    label: str
    panels: Sequence[Panel]


def spread(items: Sequence[Any], number: int) -> tuple[Any, ...]:
    """At most ``number`` of the items, from the first to the last."""
    if len(items) <= number:
        return tuple(items)
    last = max(1, number - 1)
    return tuple(items[(len(items) - 1) * i // last] for i in range(number))


def contact_sheet(rows: Sequence[Row], path: Path, title: str, width: int = 1200) -> None:
    """Writes a PNG of that width: the title, then for each row its label above its panels.

    A text has at most 3 lines. Its newlines are kept; what the font lacks is shown as a box. Raises ValueError for
    frames that are not uint8 (H, W, 3).
    """
    inner = width - 2 * MARGIN
    parts = [_text(title, TITLE_SIZE, inner), *(_row(row, inner) for row in rows)]
    content = _below(parts, ROW_GAP, inner)
    sheet = Image.new("RGB", (width, 2 * MARGIN + (content.height if content else 0)), PAPER)
    if content:
        sheet.paste(content, (MARGIN, MARGIN))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_atomically(path, file.getvalue())


def _row(row: Row, width: int) -> Part:
    room = (width - PANEL_GAP * (len(row.panels) - 1)) // max(1, len(row.panels))
    panels = [_panel(panel, room) for panel in row.panels]
    return _below([_text(row.label, LABEL_SIZE, width), _beside(panels, room + PANEL_GAP, width)], GAP, width)


def _panel(panel: Panel, width: int) -> Part:
    strips = [[frame] for frame in panel.frames] if panel.stacked else [panel.frames]
    label, caption = _text(panel.label, LABEL_SIZE, width), _text(panel.caption, CAPTION_SIZE, width)
    return _below([label, *(_strip(strip, width) for strip in strips), caption], GAP, width)


def _below(parts: Sequence[Part], gap: int, width: int) -> Part:
    """The parts under each other, as one."""
    shown = [part for part in parts if part]
    if not shown:
        return None
    column = Image.new("RGB", (width, sum(part.height for part in shown) + gap * (len(shown) - 1)), PAPER)
    top = 0
    for part in shown:
        column.paste(part, (0, top))
        top += part.height + gap
    return column


def _beside(parts: Sequence[Part], step: int, width: int) -> Part:
    """The parts beside each other, as one; each starts ``step`` after the one before, whether that is there or not."""
    if not any(parts):
        return None
    line = Image.new("RGB", (width, max(part.height for part in parts if part)), PAPER)
    for number, part in enumerate(parts):
        if part:
            line.paste(part, (number * step, 0))
    return line


def _text(text: str, size: int, width: int) -> Part:
    """The text in as many lines as it takes, at most MAX_LINES."""
    font = ImageFont.load_default(size)
    lines: list[str] = []
    for line in _wrapped(text, font, width):
        if len(lines) == MAX_LINES:
            lines[-1] = _shortened(lines[-1], font, width)
            break
        lines.append(line)
    line_height = round(1.35 * size)
    picture = Image.new("RGB", (width, line_height * len(lines)), PAPER)
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        pen.text((0, number * line_height), line, fill=INK, font=font)
    return picture if lines else None


def _wrapped(text: str, font: Font, width: int) -> Iterator[str]:
    """Lines no wider than `width`, broken between words, and inside a word only if it fills a line by itself."""
    for paragraph in text[:LONGEST_LABEL].splitlines():
        line = ""
        for word in "".join(letter if letter.isprintable() else " " for letter in paragraph).split():
            rest = f"{line} {word}".strip()
            if line and font.getlength(rest) > width:
                yield line
                rest = word
            while font.getlength(rest) > width:
                fits = max(1, _num_fitting(rest, font, width))
                yield rest[:fits]
                rest = rest[fits:]
            line = rest
        if line:
            yield line


def _num_fitting(text: str, font: Font, width: int) -> int:
    """How many of the first letters fit."""
    length = 0
    while length < len(text) and font.getlength(text[: length + 1]) <= width:
        length += 1
    return length


def _shortened(line: str, font: Font, width: int) -> str:
    """The line with dots at its end, which stand for what is left out."""
    while line and font.getlength(f"{line} ...") > width:
        line = line.rpartition(" ")[0] or line[:-1]
    return f"{line.rstrip()} ..."


def _strip(frames: Sequence[np.ndarray], width: int) -> Part:
    """The frames beside each other at one height, each with a thin edge; None if there are none."""
    if not frames:
        return None
    for frame in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise ValueError(f"a frame must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
    room = width - (len(frames) - 1) * GAP - 2 * len(frames)
    ratios = [frame.shape[1] / frame.shape[0] for frame in frames]
    height = max(1, min(STRIP_HEIGHT, int(room / sum(ratios))))
    strip = Image.new("RGB", (width, height + 2), PAPER)
    left = 0
    for frame, ratio in zip(frames, ratios, strict=True):
        size = (max(1, int(height * ratio)), height)
        strip.paste(FAINT, (left, 0, left + size[0] + 2, height + 2))
        strip.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), (left + 1, 1))
        left += size[0] + 2 + GAP
    return strip
