"""sheets.py: every frame is in its place with its shape and colors, and no text crosses the margins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideox.runtime.sheets import (
    INK,
    MARGIN,
    PANEL_GAP,
    PAPER,
    STRIP_HEIGHT,
    Panel,
    SheetRow,
    contact_sheet,
    pick_evenly,
)

COLORS = [(255, 0, 0), (0, 200, 0), (0, 0, 255), (200, 0, 200)]


def plain(color: tuple[int, int, int], height: int = 60, width: int = 90) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def single(label: str, frames: list[np.ndarray]) -> SheetRow:
    """Returns a row with one panel that has no texts."""
    return SheetRow(label, [Panel("", frames)])


def sheet(path: Path, rows: list[SheetRow], title: str = "Title", width: int = 1200) -> np.ndarray:
    contact_sheet(rows, path, title, width)
    with Image.open(path) as image:
        assert (image.format, image.mode, image.width) == ("PNG", "RGB", width)
        return np.asarray(image)


def box(pixels: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of the only rectangle of a color."""
    rows, columns = np.nonzero((pixels == color).all(axis=2))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert len(rows) == height * width
    return int(rows.min()), int(columns.min()), int(height), int(width)


def ink(pixels: np.ndarray) -> np.ndarray:
    """Returns the indices of the pixel rows that have text."""
    return np.nonzero((pixels.max(axis=2) < max(INK) + 60).any(axis=1))[0]


def margins_are_empty(pixels: np.ndarray) -> bool:
    frame = np.ones(pixels.shape[:2], bool)
    frame[MARGIN - 1 : 1 - MARGIN, MARGIN - 1 : 1 - MARGIN] = False
    return bool((pixels[frame] == PAPER).all())


def test_frames_are_in_order_with_their_shapes(tmp_path: Path) -> None:
    first = single("first", [plain(COLORS[0]), plain(COLORS[1], 50, 30)])
    pixels = sheet(tmp_path / "sheet.png", [first, single("second", [plain(COLORS[2], 480, 720), plain(COLORS[3])])])
    boxes = [box(pixels, color) for color in COLORS]
    assert [(height, width) for _, _, height, width in boxes] == [(240, 360), (240, 144), (240, 360), (240, 360)]
    assert boxes[0][0] == boxes[1][0] < boxes[2][0] == boxes[3][0]
    assert boxes[0][1] == boxes[2][1]
    assert boxes[0][1] + 360 < boxes[1][1] == boxes[3][1]
    assert boxes[0][0] + 240 < boxes[2][0]
    assert margins_are_empty(pixels)


def test_the_picture_is_not_turned_or_mirrored(tmp_path: Path) -> None:
    frame = np.concatenate([plain(COLORS[0]), plain(COLORS[1])], axis=1)
    frame = np.concatenate([frame, np.concatenate([plain(COLORS[2]), plain(COLORS[3])], axis=1)])
    pixels = sheet(tmp_path / "sheet.png", [single("", [frame])])
    rows, columns = np.nonzero((pixels != PAPER).any(axis=2) & (np.arange(len(pixels)) > 80)[:, None])
    middle, center = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
    found = [tuple(pixels[middle + y, center + x]) for y in (-50, 50) for x in (-50, 50)]
    assert found == COLORS


def test_a_row_that_is_too_wide_is_made_lower(tmp_path: Path) -> None:
    pixels = sheet(tmp_path / "sheet.png", [single("wide", [plain(color, 40, 160) for color in COLORS])], width=600)
    boxes = [box(pixels, color) for color in COLORS]
    assert len({height for _, _, height, _ in boxes}) == 1
    assert boxes[0][2] < STRIP_HEIGHT
    assert all(abs(width - 4 * height) <= 4 for _, _, height, width in boxes)
    assert boxes[-1][1] + boxes[-1][3] > 0.97 * (600 - MARGIN)
    assert margins_are_empty(pixels)


def test_text_is_dark_and_above_its_frames(tmp_path: Path) -> None:
    pixels = sheet(
        tmp_path / "sheet.png", [single("A label", [plain(COLORS[0])]), single("Another", [plain(COLORS[1])])]
    )
    tops = [box(pixels, color)[0] for color in COLORS[:2]]
    rows = ink(pixels)
    title_label, other = rows[rows < tops[0]], rows[(rows > tops[0] + STRIP_HEIGHT) & (rows < tops[1])]
    assert len(other) == other[-1] - other[0] + 1 >= 12  # The letters are not cut off.
    assert (np.diff(title_label) > 5).sum() == 1  # There is a gap between the title and the label.
    assert rows.max() < tops[1]


@pytest.mark.parametrize(
    "label",
    [
        "one word after another " * 100,
        "x" * 3000,
        "first\nsecond\nthird\nfourth\nfifth",
        "two cats \U0001f431 \u4e24\u53ea\u732b \u05d0\u05d1 e\u0301 " * 60,
        "a name that is no text: \udc80\udcff, \x00, \x1b[31m and a tab\t" * 30,
        "\u4e24\u53ea\u732b" * 500,
    ],
    ids=["words", "letters", "lines", "scripts", "bytes", "no spaces"],
)
def test_a_long_label_takes_three_lines_and_stays_inside(tmp_path: Path, label: str) -> None:
    pixels = sheet(tmp_path / "sheet.png", [single(label, [plain(COLORS[0])])])
    three = sheet(tmp_path / "three.png", [single("1\n2\n3", [plain(COLORS[0])])])
    assert pixels.shape == three.shape
    assert margins_are_empty(pixels)


def test_dots_replace_text_that_is_left_out(tmp_path: Path) -> None:
    def bytes_of(label: str) -> bytes:
        sheet(tmp_path / "sheet.png", [single(label, [])])
        return (tmp_path / "sheet.png").read_bytes()

    assert bytes_of("a\nb\nc\nd") == bytes_of("a\nb\nc ...") != bytes_of("a\nb\nc")
    assert bytes_of("a\x00b\x1bc\udc80") == bytes_of("a b c")
    assert bytes_of("  a\t b \n\n c ") == bytes_of("a b\nc")
    assert bytes_of("cafe\u0301") == bytes_of("caf\u00e9")  # as a Mac writes names


@pytest.mark.parametrize("label", ["", "\n", "\u200b", "\U0001f431", "\u0301"])
def test_unusual_labels_are_drawn(tmp_path: Path, label: str) -> None:
    assert box(sheet(tmp_path / "sheet.png", [single(label, [plain(COLORS[0])])], title=label), COLORS[0])[2] == 240


# -- panels ------------------------------------------------------------------------------------------------------------


def test_panels_are_side_by_side_with_equal_widths(tmp_path: Path) -> None:
    panels = [Panel(f"panel {k}", [plain(color)]) for k, color in enumerate(COLORS[:3])]
    pixels = sheet(tmp_path / "sheet.png", [SheetRow("a row", panels)])
    boxes = [box(pixels, color) for color in COLORS[:3]]
    room = (1200 - 2 * MARGIN - 2 * PANEL_GAP) // 3
    assert [left for _, left, _, _ in boxes] == [MARGIN + 1 + k * (room + PANEL_GAP) for k in range(3)]
    assert len({(top, height, width) for top, _, height, width in boxes}) == 1
    for _, left, _, width in boxes:
        assert left + width <= left + room
        rows = ink(pixels[100 : boxes[0][0], left - 1 : left + room])
        assert len(rows) > 8  # Each panel has its label above it.
    assert margins_are_empty(pixels)


def test_stacked_frames_are_below_each_other(tmp_path: Path) -> None:
    panels = [Panel("", [plain(c) for c in COLORS[:2]], stacked=True), Panel("", [plain(c) for c in COLORS[2:]])]
    boxes = [box(sheet(tmp_path / "sheet.png", [SheetRow("", panels)]), color) for color in COLORS]
    assert boxes[0][1:] == boxes[1][1:]
    assert boxes[0][0] + STRIP_HEIGHT < boxes[1][0]
    assert boxes[2][0] == boxes[3][0] == boxes[0][0]
    assert boxes[2][1] < boxes[3][1]
    assert boxes[2][2] < boxes[0][2]  # Side by side they have to be smaller.


def test_a_panel_without_frames_keeps_its_place(tmp_path: Path) -> None:
    panels = [Panel(str(k), [plain(color)]) for k, color in enumerate(COLORS[:3])]
    complete = sheet(tmp_path / "complete.png", [SheetRow("", panels)])
    some = sheet(tmp_path / "some.png", [SheetRow("", [Panel("0", [], "there is none"), *panels[1:]])])
    assert [box(some, color) for color in COLORS[1:3]] == [box(complete, color) for color in COLORS[1:3]]
    assert not (some == COLORS[0]).all(axis=2).any()
    noted = SheetRow("", [Panel("0", [], ""), *panels[1:]])
    assert (sheet(tmp_path / "noted.png", [noted]) != some).any()
    assert len(sheet(tmp_path / "none.png", [SheetRow("", [Panel("", []), Panel("", [])])])) < 200


@pytest.mark.parametrize("text", ["one word after another " * 100, "x" * 3000])
def test_texts_stay_in_their_panel(tmp_path: Path, text: str) -> None:
    room = (1200 - 2 * MARGIN - PANEL_GAP) // 2
    for stacked in (True, False):
        panels = [Panel(text, [plain(COLORS[k])], text, stacked) for k in range(2)]
        pixels = sheet(tmp_path / "sheet.png", [SheetRow("", panels)])
        assert (pixels[100:, MARGIN + room : MARGIN + room + PANEL_GAP] == PAPER).all()
        top, _, height, _ = box(pixels, COLORS[0])
        assert box(pixels, COLORS[1])[0] == top
        under = ink(pixels[top + height + 2 :])
        lines = 1 + int((np.diff(under) > 1).sum())
        assert 3 <= lines <= 6  # These are three lines, and dots of letters may count as lines.
        assert margins_are_empty(pixels)


def test_a_label_is_broken_where_its_panel_ends(tmp_path: Path) -> None:
    long = "a label that has room for itself on one line of the sheet, and no room on one of its half"
    tops = {}
    for label in (long, "two\nlines", "one"):
        pixels = sheet(tmp_path / "sheet.png", [SheetRow("", [Panel(label, [plain(COLORS[k])]) for k in range(2)])])
        tops[label] = box(pixels, COLORS[0])[0]
    assert tops[long] == tops["two\nlines"] > tops["one"]


def test_a_caption_is_smaller_than_a_label(tmp_path: Path) -> None:
    pixels = sheet(tmp_path / "sheet.png", [SheetRow("", [Panel("HHH", [plain(COLORS[0])], "HHH")])], title="")
    top, _, height, _ = box(pixels, COLORS[0])
    rows = ink(pixels)
    assert 0 < (rows > top + height).sum() < (rows < top).sum()


def test_pick_evenly() -> None:
    assert pick_evenly(range(10), 4) == (0, 3, 6, 9)
    assert pick_evenly(range(3), 4) == (0, 1, 2)
    assert pick_evenly(range(10), 1) == (0,)
    assert pick_evenly((), 4) == ()


# -- files -------------------------------------------------------------------------------------------------------------


def test_sixteen_rows_and_rows_without_frames(tmp_path: Path) -> None:
    colors = [(10 * k, 255 - 10 * k, 100) for k in range(16)]
    pixels = sheet(
        tmp_path / "sheet.png", [single(f"clip {k}", [plain(color)]) for k, color in enumerate(colors)], width=420
    )
    tops = [box(pixels, color)[0] for color in colors]
    assert len(set(np.diff(tops))) == 1
    assert tops[-1] + STRIP_HEIGHT + 1 + MARGIN == len(pixels)
    assert len(sheet(tmp_path / "none.png", [single("no frames", [])])) > len(sheet(tmp_path / "empty.png", [])) > 0


def test_equal_rows_give_equal_bytes_and_one_file(tmp_path: Path) -> None:
    rows = [single("label", [plain(COLORS[0]), plain(COLORS[1], 64, 32)])]
    contact_sheet(rows, tmp_path / "new" / "a.png", "Title")
    contact_sheet(rows, tmp_path / "new" / "b.png", "Title")
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "new" / "b.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3)])
def test_other_arrays_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for frame in (np.zeros(shape, np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
            contact_sheet([single("", [frame])], tmp_path / "sheet.png", "Title")
    assert not list(tmp_path.iterdir())


def test_a_label_of_ten_megabytes(tmp_path: Path) -> None:
    contact_sheet([single("word " * 2_000_000, [np.zeros((8, 8, 3), np.uint8)])], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 0
