"""Contact sheets: rows of a label and a strip of frames -> one PNG that shows at a glance what was cut or made.

contact_sheet: title and labels are wrapped, frames shrunk to one height a row, everything pasted from top to bottom.
Frames are uint8 RGB (H, W, 3); all lengths are in pixels. The same rows give the same bytes.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cogvideox.files import write_atomically

PAPER, INK, FAINT = (250, 250, 248), (32, 32, 36), (208, 208, 206)
MARGIN, GAP, ROW_GAP = 28, 8, 28
STRIP_HEIGHT = 240  # less where the frames of a row would not fit beside each other
TITLE_SIZE, LABEL_SIZE = 26, 16
MAX_LINES = 3

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
LONGEST_LABEL = 2000  # characters; three lines take fewer


@dataclass(frozen=True)
class Row:
    """A text and the frames under it; the frames may differ in size."""

    label: str
    frames: Sequence[np.ndarray]


@dataclass(frozen=True)
class _Text:
    """Lines that fit the sheet."""

    lines: tuple[str, ...]
    font: Font
    line_height: int

    @property
    def height(self) -> int:
        return len(self.lines) * self.line_height

    def draw(self, pen: ImageDraw.ImageDraw, top: int) -> None:
        for number, line in enumerate(self.lines):
            pen.text((MARGIN, top + number * self.line_height), line, fill=INK, font=self.font)


def contact_sheet(rows: Sequence[Row], path: Path, title: str, width: int = 1200) -> None:
    """Writes a PNG of that width: the title, then for each row its label, at most 3 lines, above its frames.

    Newlines in labels are kept; what the font lacks is shown as a box. Raises ValueError for frames that are not uint8
    (H, W, 3).
    """
    inner = width - 2 * MARGIN
    heading = _text(title, TITLE_SIZE, inner)
    parts = [(_text(row.label, LABEL_SIZE, inner), _strip(row.frames, inner)) for row in rows]
    heights = [text.height + (GAP + strip.height if strip else 0) for text, strip in parts]
    total = 2 * MARGIN + heading.height + sum(ROW_GAP + height for height in heights)
    sheet = Image.new("RGB", (width, total), PAPER)
    pen = ImageDraw.Draw(sheet)
    heading.draw(pen, MARGIN)
    top = MARGIN + heading.height
    for (text, strip), height in zip(parts, heights, strict=True):
        top += ROW_GAP
        text.draw(pen, top)
        if strip:
            sheet.paste(strip, (MARGIN, top + text.height + GAP))
        top += height
    content = io.BytesIO()
    sheet.save(content, "PNG")
    write_atomically(path, content.getvalue())


def _text(text: str, size: int, width: int) -> _Text:
    font = ImageFont.load_default(size)
    lines: list[str] = []
    for line in _wrapped(text, font, width):
        if len(lines) == MAX_LINES:
            lines[-1] = _shortened(lines[-1], font, width)
            break
        lines.append(line)
    return _Text(tuple(lines), font, round(1.35 * size))


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


def _strip(frames: Sequence[np.ndarray], width: int) -> Image.Image | None:
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
