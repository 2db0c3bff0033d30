"""Draws contact sheets: one PNG with rows of labeled panels of frames, such as clips before and after cropping.

``contact_sheet`` builds a sheet from small pictures. Texts are wrapped to the available width, the frames of a panel
are shrunk to one height, the panels of a row are placed side by side, and the rows are placed below each other. Frames
are uint8 RGB arrays of shape (H, W, 3); all lengths are in pixels. The same rows always give the same bytes.
"""

import io
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from cogvideox.files import write_atomically

PAPER, INK, FRAME_EDGE = (250, 250, 248), (32, 32, 36), (208, 208, 206)
MARGIN, GAP, ROW_GAP, PANEL_GAP = 28, 8, 28, 20
STRIP_HEIGHT = 240  # height of a frame, unless the frames of its panel are too wide for that
TITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 26, 16, 13
MAX_LINES = 3
_COMMENT = "Comment"  # keyword of a text in PNG files
LONGEST_LABEL = 2000  # characters; more never fit into MAX_LINES

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
MaybeImage = Image.Image | None  # None if there is nothing to show
T = TypeVar("T")


@dataclass(frozen=True)
class Panel:
    """Describes frames that are shown together.

    Attributes:
        label: The text above the frames.
        frames: Arrays of shape (H, W, 3), which may differ in size.
        caption: The text below the frames, in small type.
        stacked: Whether the frames are placed below each other instead of side by side.
    """

    label: str
    frames: Sequence[np.ndarray]
    caption: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class SheetRow:
    """Describes a row of a sheet: a text, and below it panels of equal width."""

    label: str
    panels: Sequence[Panel]


def pick_evenly(items: Sequence[T], number: int) -> tuple[T, ...]:
    """Returns at most ``number`` of the items, evenly spaced from the first to the last."""
    if len(items) <= number:
        return tuple(items)
    last = max(1, number - 1)
    return tuple(items[(len(items) - 1) * i // last] for i in range(number))


def contact_sheet(rows: Sequence[SheetRow], path: Path, title: str, width: int = 1200, comment: str = "") -> None:
    """Writes a sheet as PNG: the title, then for each row its label above its panels.

    A text has at most MAX_LINES lines. Its line breaks are kept. Letters that the font lacks are shown as a box.

    Args:
        rows: The rows from top to bottom.
        path: The file to write.
        title: The text at the top.
        width: The width of the sheet; its height follows from the content.
        comment: A text that is stored in the file and not shown; ``comment_of`` returns it.

    Raises:
        ValueError: A frame is not a uint8 array of shape (H, W, 3).
    """
    inner = width - 2 * MARGIN
    content = _stack([_text_block(title, TITLE_SIZE, inner), *(_row(row, inner) for row in rows)], ROW_GAP, inner)
    sheet = ImageOps.expand(content or Image.new("RGB", (inner, 0)), MARGIN, PAPER)
    file = io.BytesIO()
    texts = PngImagePlugin.PngInfo()
    if comment:
        texts.add_text(_COMMENT, comment)
    sheet.save(file, "PNG", pnginfo=texts)
    write_atomically(path, file.getvalue())


def comment_of(path: Path) -> str | None:
    """Returns the comment of a sheet, or None if there is no such file or if it is not a sheet with a comment."""
    try:
        with Image.open(path) as sheet:
            return sheet.info.get(_COMMENT)
    except OSError:
        return None


def _row(row: SheetRow, width: int) -> MaybeImage:
    panel_width = (width - PANEL_GAP * (len(row.panels) - 1)) // max(1, len(row.panels))
    panels = [
        (number * (panel_width + PANEL_GAP), _panel(panel, panel_width)) for number, panel in enumerate(row.panels)
    ]
    return _stack([_text_block(row.label, LABEL_SIZE, width), _side_by_side(panels, width)], GAP, width)


def _panel(panel: Panel, width: int) -> MaybeImage:
    strips = [[frame] for frame in panel.frames] if panel.stacked else [panel.frames]
    label, caption = _text_block(panel.label, LABEL_SIZE, width), _text_block(panel.caption, CAPTION_SIZE, width)
    return _stack([label, *(_strip(strip, width) for strip in strips), caption], GAP, width)


def _stack(pictures: Sequence[MaybeImage], gap: int, width: int) -> MaybeImage:
    """Returns one picture with the pictures below each other, without those that are None."""
    shown = [picture for picture in pictures if picture]
    if not shown:
        return None
    *tops, bottom = accumulate((picture.height + gap for picture in shown), initial=0)
    column = Image.new("RGB", (width, bottom - gap), PAPER)
    for top, picture in zip(tops, shown, strict=True):
        column.paste(picture, (0, top))
    return column


def _side_by_side(pictures: Sequence[tuple[int, MaybeImage]], width: int) -> MaybeImage:
    """Returns one picture with each picture at its left edge, without those that are None."""
    shown = [(left, picture) for left, picture in pictures if picture]
    if not shown:
        return None
    line = Image.new("RGB", (width, max(picture.height for _, picture in shown)), PAPER)
    for left, picture in shown:
        line.paste(picture, (left, 0))
    return line


def _text_block(text: str, size: int, width: int) -> MaybeImage:
    """Returns a picture of the text in at most MAX_LINES lines, or None if the text is empty."""
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
    """Yields lines of at most ``width`` pixels. Only a word that does not fit into one line is broken."""
    # Names of files from a Mac have their accents apart, and the font has no such characters.
    for paragraph in unicodedata.normalize("NFC", text[:LONGEST_LABEL]).splitlines():
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
    """Returns how many of the first letters fit."""
    return bisect_right(range(1, len(text) + 1), width, key=lambda number: math.ceil(font.getlength(text[:number])))


def _shortened(line: str, font: Font, width: int) -> str:
    """Returns the line with three dots at its end, and without as many words or letters as the dots need."""
    while line and font.getlength(f"{line} ...") > width:
        line = line.rpartition(" ")[0] or line[:-1]
    return f"{line.rstrip()} ..."


def _strip(frames: Sequence[np.ndarray], width: int) -> MaybeImage:
    """Returns a picture of the frames side by side at one height, each with a thin edge; None if there are none."""
    if not frames:
        return None
    for frame in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise ValueError(f"a frame must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
    available = width - (len(frames) - 1) * GAP - 2 * len(frames)
    ratios = [frame.shape[1] / frame.shape[0] for frame in frames]
    height = max(1, min(STRIP_HEIGHT, int(available / sum(ratios))))
    sizes = [(max(1, int(height * ratio)), height) for ratio in ratios]
    resized = [Image.fromarray(f).resize(s, Image.Resampling.LANCZOS) for f, s in zip(frames, sizes, strict=True)]
    pictures = [ImageOps.expand(picture, 1, FRAME_EDGE) for picture in resized]
    lefts = accumulate((picture.width + GAP for picture in pictures[:-1]), initial=0)
    return _side_by_side(list(zip(lefts, pictures, strict=True)), width)
