"""Tests data_page.py: the page about a data set, also opened in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import compare_runs
import numpy as np
import pytest
from browser import Browser, find_browser
from PIL import Image
from preparing import InlineWorkers, preparation

from cogvideox.data.media.pixels.decode import write_video
from cogvideox.preparation import data_page, prepare, report
from cogvideox.preparation.data_page import note_list

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("threads", "small")
needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium: apt-get install chromium")
CAPTION = 'A "black" <b>frame</b> & nothing else </script>'


@pytest.fixture(scope="module")
def data(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns six moving shapes, a black clip, one that does not move, a copy, and one that is too short."""
    folder = Path(shutil.copytree(clips, tmp_path_factory.mktemp("page") / "my data"))
    rng = np.random.default_rng(0)
    write_video(folder / "black.mp4", np.zeros((20, 64, 96, 3), np.uint8), 8)
    write_video(folder / "static.mp4", rng.integers(0, 256, (1, 64, 96, 3), np.uint8).repeat(20, 0), 8)
    write_video(folder / "short.mp4", np.zeros((3, 64, 96, 3), np.uint8), 8)
    shutil.copy(folder / "videos/00000.mp4", folder / "copy #1.mp4")
    names = ["black.mp4", "static.mp4", "short.mp4", "copy #1.mp4"]
    for file, more in (("videos.txt", names), ("prompts.txt", [CAPTION, "A still.", "Short.", "A copy."])):
        with open(folder / file, "a") as lines:
            lines.write("".join(f"{line}\n" for line in more))
    return folder


def described(model: Path, data: Path, output: Path, encode: bool, **changes: Any) -> list[str]:
    """Prepares a data set, or only plans it; returns the lines of the report."""
    made = preparation(model, data, output, **{"max_bad_fraction": 0.5} | changes)
    records = made.plan()
    if encode:
        _, records = made.encode(records)
    return report.describe(made, records).splitlines()


@pytest.fixture(scope="module")
def prepared(tiny: Tiny, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Returns the prepared data set and the lines of its report. Tests must not change the folder."""
    folder = tmp_path_factory.mktemp("page") / "tensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "worker_pool", lambda data, limits: InlineWorkers())
        return folder, described(tiny("5b"), data, folder, encode=True, id_token="X")


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def cards(page: str) -> dict[str, str]:
    """Returns the HTML of each clip by its name."""
    found = re.findall("<article.*?</article>", page, re.DOTALL)
    return {unescape(re.findall("<h3>(.*?)</h3>", card)[0]): card for card in found}


def test_odd_clips_are_first_and_named_on_the_console(prepared: tuple[Path, list[str]]) -> None:
    folder, lines = prepared
    page = (folder / "report.html").read_text()
    odd = {name: re.findall('class="odd">(.*?)<', card) for name, card in cards(page).items()}
    assert list(odd.items())[:4] == [
        ("videos/00004.mp4", ["without color, unlike most clips"]),  # its shape is white on gray
        ("black.mp4", ["black"]),
        ("static.mp4", ["static"]),
        ("copy #1.mp4", ["the same frames as videos/00000.mp4"]),
    ]
    assert list(odd.values())[4:] == [[]] * 5
    gray = "videos/00004.mp4: without color, unlike most clips"
    assert f"4 clips look odd: {gray}; black.mp4: black; static.mp4: static; and 1 more" in lines
    assert lines[-1] == f"report: {folder / 'report.html'}"


def test_the_page_says_what_was_prepared(prepared: tuple[Path, list[str]]) -> None:
    page = (prepared[0] / "report.html").read_text()
    assert "<p>9 of 10 clips are used in 1 bucket; 4 clips look odd</p>" in page
    assert headings(page) == [
        *("Clips that look odd", "Clips that are not used", "Notes", "Buckets", "Brightness and motion", "Clips"),
        *("Size and cost", "Command"),
    ]
    assert "<td>short.mp4</td><td>96x64, 3 frames, 8 per second</td><td>0.38 s give 3 frames at 8" in page
    assert "&lt;b&gt;frame&lt;/b&gt; &amp; nothing else &lt;/script&gt;" in cards(page)["black.mp4"]
    assert re.search(r"· brightness 0\.0\d\d · saturation 0\.\d+ · motion 0\.000", cards(page)["black.mp4"])
    assert page.count("<circle") == 9


def test_a_copy_of_another_size_and_quality_looks_like_its_clip(tiny: Tiny, tmp_path: Path) -> None:
    """The third clip shows something else, and the last two have the same plain frame."""
    small = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    for name, frame, size in (("a", small[0], 24), ("b", small[0], 16), ("c", small[1], 24)):
        large = np.asarray(Image.fromarray(frame).resize((6 * size, 4 * size), Image.Resampling.BICUBIC))
        write_video(tmp_path / f"{name}.mp4", np.stack([np.roll(large, k * size // 8, 1) for k in range(20)]), 8)
    for name, size in (("d", 24), ("e", 16)):
        write_video(tmp_path / f"{name}.mp4", np.full((20, 4 * size, 6 * size, 3), 99, np.uint8), 8)
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text(f"Clip {name}.")
    described(tiny("5b"), tmp_path, tmp_path / "out", encode=True)
    odd = {
        name: re.findall('class="odd">(.*?)<', card)
        for name, card in cards((tmp_path / "out/report.html").read_text()).items()
    }
    assert [odd[f"{name}.mp4"] for name in "abc"] == [[], ["looks like a.mp4"], []]
    assert [odd[f"{name}.mp4"][0] for name in "de"] == ["static", "static"]
    assert not any("looks" in text for name in "de" for text in odd[f"{name}.mp4"])


def test_links_of_the_page_lead_to_files(prepared: tuple[Path, list[str]], data: Path) -> None:
    folder = prepared[0]
    page = (folder / "report.html").read_text()
    found = re.findall(r'(src|href)="([^"#]+)"', page)
    assert len(found) == 2 * 9 + 1  # strips, clips, and the contact sheet
    paths = {(folder / unquote(address)).resolve() for _, address in found}
    assert all(path.is_file() for path in paths)
    assert data / "copy #1.mp4" in paths


def test_a_dry_run_shows_clips_without_numbers(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    lines = described(tiny("5b"), data, tmp_path, encode=False)
    page = (tmp_path / "report.html").read_text()
    assert len(cards(page)) == page.count("<img src") - 1 == 9
    assert "<circle" not in page
    assert "9 clips are without brightness and motion, because" in page
    assert any(line.startswith("1 clip looks odd: copy #1.mp4: the same frames as") for line in lines)


def test_a_folder_of_an_older_version_has_no_numbers(
    tiny: Tiny, data: Path, prepared: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(prepared[0], tmp_path / "old"))
    lines = (folder / "health.jsonl").read_text().splitlines()
    (folder / "health.jsonl").write_text(json.dumps(json.loads(lines[0]) | {"motion": float("nan")}) + "\n[1\n")
    described(tiny("5b"), data, folder, encode=True, id_token="X")
    assert "9 clips are without brightness and motion" in (folder / "report.html").read_text()
    (folder / "health.jsonl").unlink()
    described(tiny("5b"), data, folder, encode=True, id_token="X")
    assert "9 clips are without brightness and motion" in (folder / "report.html").read_text()


def test_a_large_data_set_shows_some_clips_and_the_odd_ones(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_page, "MAX_CLIPS", 2)
    described(tiny("5b"), data, tmp_path, encode=False)
    page = (tmp_path / "report.html").read_text()
    assert list(cards(page)) == ["copy #1.mp4", "videos/00000.mp4", "static.mp4"]
    assert "6 more clips are not shown." in page


def test_repeats_of_a_clip_are_one_clip(tiny: Tiny, clips: Path, tmp_path: Path) -> None:
    described(tiny("5b"), clips, tmp_path, encode=False, repeats=(3,), validation_data_root=(str(clips),))
    page = (tmp_path / "report.html").read_text()
    assert len(cards(page)) == 6
    assert "held out to measure the loss" in page


def test_strips_of_clips_that_are_gone_are_removed(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    described(tiny("5b"), data, tmp_path, encode=False)
    strips = set((tmp_path / "preview/strips").iterdir())
    described(tiny("5b"), data, tmp_path, encode=False, frame_buckets=(9,))
    assert len(strips) == 9
    assert not strips & set((tmp_path / "preview/strips").iterdir())


def test_details_of_notes_are_nested() -> None:
    assert note_list(["one <", "  detail", "two"]) == "<ul><li>one &lt;<ul><li>detail</li></ul></li><li>two</li></ul>"
    assert note_list([]) == ""


def test_a_page_of_another_program_is_not_replaced(
    prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "mine.html"
    page.write_text("<html>mine</html>")
    assert compare_runs.main([str(prepared[0]), "--output", str(page)]) == 2
    assert f"{page}: was not written by this script and would be replaced" in capsys.readouterr().err
    assert page.read_text() == "<html>mine</html>"
    page.unlink()
    for _ in range(2):
        assert compare_runs.main([str(prepared[0]), "--output", str(page)]) == 0


def test_a_page_to_send_contains_its_pictures(
    prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(prepared[0], tmp_path / "tensors"))
    (tmp_path / "secret.txt").write_text("secret")
    page = folder / "report.html"
    page.write_text(page.read_text().replace("<h2>", '<img src="../secret.txt"><h2>', 1))
    for name, embed in (("linked.html", []), ("sent.html", ["--embed"])):
        assert compare_runs.main([str(folder), "--output", str(tmp_path / name), *embed]) == 0
    linked, sent = ((tmp_path / name).read_text() for name in ("linked.html", "sent.html"))
    assert 'src="tensors/preview/strips/' in linked
    assert sent.count('src="data:image/jpeg;base64,') == 9
    assert len(re.findall('(?:src|href)="(?!data:|#)', sent)) == 0
    assert "c2VjcmV0" not in sent
    page.unlink()
    assert compare_runs.main([str(folder), "--output", str(tmp_path / "no.html")]) == 2
    assert "or one prepared folder with report.html" in capsys.readouterr().err


@needs_browser
def test_clips_are_filtered_sorted_and_found_from_the_plot(prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    shown = "[...document.querySelectorAll('#clips article')].filter((card) => card.offsetHeight)"
    with Browser(find_browser() or "", tmp_path / "profile") as browser:
        browser.open(prepared[0] / "report.html")
        assert browser.value("document.getElementById('found').textContent") == "5 clips"
        for words, number in (("square", 2), ("SQUARE red", 1), ("nothing has this", 0), ("", 5)):
            browser.value(f"document.getElementById('filter').value = {words!r}")
            browser.value("document.getElementById('filter').dispatchEvent(new Event('input'))")
            assert browser.value(f"{shown}.length") == number
        browser.value("document.getElementById('sort').value = 'motion -1'")
        browser.value("document.getElementById('sort').dispatchEvent(new Event('change'))")
        motion = browser.value(f"{shown}.map((card) => Number(card.dataset.motion))")
        assert motion == sorted(motion, reverse=True)
        assert motion[0] > motion[-1]
        assert browser.value("document.querySelectorAll('article p')[1].textContent") == f"X {CAPTION}"
        browser.value("document.querySelector('svg').scrollIntoView()")
        browser.click("circle.odd")
        browser.wait_for("location.hash === '#clip-0'")
        assert browser.value("document.querySelector('article:target h3').textContent") == "videos/00004.mp4"
        browser.value("document.querySelector('summary').scrollIntoView()")
        browser.click("summary", 0.01)
        browser.wait_for("document.querySelector('details img').naturalWidth === 1200")
        browser.value("window.scrollTo(0, 0)")
        browser.wait_for("document.querySelector('article img').naturalWidth > 1000")
