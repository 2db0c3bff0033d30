"""Tests report.py and scripts/compare_runs.py: pages of runs, opened in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import compare_runs
import numpy as np
import pytest
from browser import Browser, find_browser

from cogvideox.data.media.pixels.decode import write_video
from cogvideox.runtime.report import RunFiles, write_report

PROMPT = 'TOKEN a "red" <b>fox</b> & a hare </script>'
STEPS = (0, 2, 4)
SHOWN = "document.getElementById('shown').textContent"
needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium: apt-get install chromium")


def make_run(folder: Path, rate: float = 1e-4) -> Path:
    """Writes the files of a run of four steps with two prompts; the second has no video of step 2."""
    (folder / "validation").mkdir(parents=True)
    flags = {"learning_rate": rate, "max_train_steps": 4, "output_dir": str(folder)}
    config = {"flags": flags, "versions": {"torch": "2"}, "command": "train.py --x", "plan": "42 blocks", "ranks": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "samples.json").write_text(json.dumps({"samples": {}, "captions": {"a.mp4": "caption <i>one</i>"}}))
    (folder / "validation" / "settings.json").write_text(json.dumps({"prompts": [PROMPT, "second"]}))
    lines = [{"step": step, "loss": 1 / (step + 1), "lr": rate, "seconds": 1800.0} for step in range(1, 5)]
    held_out = {"held_out_error": 0.25, "held_out_grid": "a", "held_out_by_timestep": [0.5, 0.75]}
    lines += [{"step": step, "held_out_loss": 1 - step / 8} | held_out for step in STEPS]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in STEPS:
        for prompt in range(2):
            if (step, prompt) != (2, 1):
                path = folder / "validation" / f"step-{step:06d}_prompt-{prompt}_a b#{prompt}_0.mp4"
                write_video(path, np.full((5, 32, 48, 3), 40 * step + 20, np.uint8), 8.0)
    (folder / "curves.png").write_bytes(b"png")
    return folder


def addresses(page: str) -> set[str]:
    """Returns the addresses of all videos and pictures of a page."""
    data = json.loads(page.partition('id="videos">')[2].partition("</script>")[0])
    videos = {address for row in data["rows"] for cell in row for address in cell.values()}
    return videos | set(re.findall(r'<img src="([^"]*)"', page))


def test_links_of_a_report_are_files_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run")
    page = write_report(run).read_text()
    found = {unquote(address) for address in addresses(page)}
    videos = {f"validation/{path.name}" for path in RunFiles(run).folder.glob("validation/*.mp4")}
    assert found == videos | {"curves.png"}
    elsewhere = write_report(run, target=tmp_path / "page.html").read_text()
    assert {unquote(address) for address in addresses(elsewhere)} == {f"a run/{name}" for name in found}
    assert all(address.startswith("data:") for address in addresses(write_report(run, embed=True).read_text()))


def test_a_report_says_what_the_run_did(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = write_report(run).read_text()
    for text in ("4 of 4 optimizer steps; held-out loss 0.50000; not exported yet", "0.50000 ± 0.25000", "2.00"):
        assert text in page
    assert "<i>one</i>" not in page
    assert "caption &lt;i&gt;one&lt;/i&gt;" in page
    (run / "recipe.json").write_text('{"step": 4}')
    assert "; exported<" in write_report(run).read_text()
    (run / "recipe.json").write_text('{"step": 2}')  # of --export_best
    assert "4 of 4 optimizer steps; held-out loss 0.75000; step 2 is exported<" in write_report(run).read_text()


def test_a_report_of_one_step_has_no_plural(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert "1 optimizer step; " in write_report(tmp_path).read_text()


def test_a_report_of_an_empty_folder_is_a_page(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    assert "0 optimizer steps" in page
    assert "<h2>" not in page


def test_a_comparison_lists_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "sweep" / f"{rate:g}", rate) for rate in (1e-4, 1e-3)]
    target = tmp_path / "compare.html"
    assert compare_runs.main([*map(str, runs), "--output", str(target)]) == 0
    page = target.read_text()
    assert "<th>learning_rate</th>" in page
    assert "<th>max_train_steps</th>" not in page
    assert "0.50000 at step 4" in page
    assert page.count("<figure") == 4
    assert compare_runs.names_of([Path("a/x/run"), Path("a/y/run")]) == ["x/run", "y/run"]


def test_a_comparison_has_no_panel_or_column_for_what_no_run_measured(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, rate) for name, rate in (("a", 1e-4), ("b", 1e-3))]
    assert len(compare_runs.curves(list(map(RunFiles, runs)), ["a", "b"]).axes) == 2
    for run in runs:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(line for line in lines if "held_out" not in line))
    assert len(compare_runs.curves(list(map(RunFiles, runs)), ["a", "b"]).axes) == 1
    target = tmp_path / "compare.html"
    assert compare_runs.main([*map(str, runs), "--output", str(target)]) == 0
    heads = re.findall("<th>(.*?)</th>", target.read_text())
    assert heads == ["run", "steps", "loss, last tenth", "seconds a step", "learning_rate"]


def test_a_held_out_loss_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    """metrics.jsonl has null for NaN, which the loss is of weights that have diverged."""
    run = make_run(tmp_path / "run")
    diverged = {"held_out_loss": None, "held_out_error": None, "held_out_grid": "a"}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, **diverged, "held_out_by_timestep": [0.5, None]}) + "\n")
    page = write_report(run).read_text()
    assert "held-out loss not finite; " in page
    assert "<td>6</td><td>not finite</td><td>0.5000</td><td>not finite</td>" in page
    target = tmp_path / "compare.html"
    assert compare_runs.main([str(run), str(make_run(tmp_path / "other")), "--output", str(target)]) == 0
    assert target.read_text().count("<td>0.50000 at step 4</td>") == 2


def test_a_comparison_tells_held_out_losses_of_other_clips_apart(tmp_path: Path) -> None:
    """The second run measures the loss on other clips than the first and the third; the fourth measures none."""
    runs = [make_run(tmp_path / name) for name in "abcd"]
    target = tmp_path / "compare.html"
    assert compare_runs.main([*map(str, runs), "--output", str(target)]) == 0
    assert "held-out grid" not in target.read_text()
    for run, grid in ((runs[1], '"held_out_grid": "b"'), (runs[3], '"no_grid": "a"')):
        lines = (run / "metrics.jsonl").read_text().replace('"held_out_grid": "a"', grid)
        lines = lines.replace("held_out_loss", "other_loss") if run == runs[3] else lines
        (run / "metrics.jsonl").write_text(lines)
    assert compare_runs.main([*map(str, runs), "--output", str(target)]) == 0
    page = target.read_text()
    assert "<th>best held-out loss</th><th>held-out grid</th>" in page
    assert re.findall(r"<td>0.50000 at step 4</td><td>(\d)</td>", page) == ["1", "2", "1"]
    assert compare_runs.OTHER_GRIDS in page
    training = compare_runs.curves(list(map(RunFiles, runs)), list("abcd")).axes[0]
    shown = [text.get_text() for text in training.get_legend().get_texts()]
    assert shown == ["a, held-out grid 1", "b, held-out grid 2", "c, held-out grid 1", "d"]


def test_a_comparison_shows_each_image_of_a_prompt(tmp_path: Path) -> None:
    """Both runs begin videos of one prompt with two images, in different order."""
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run, images in zip(runs, (["cat", "dog"], ["dog", "cat"]), strict=True):
        settings = {"prompts": [PROMPT, PROMPT], "validation": {"images": images}}
        (run / "validation" / "settings.json").write_text(json.dumps(settings))
    target = tmp_path / "compare.html"
    assert compare_runs.main([*map(str, runs), "--output", str(target)]) == 0
    data = json.loads(target.read_text().partition('id="videos">')[2].partition("</script>")[0])
    shown = [[unquote(cell["4"]).partition("_")[2][:8] for cell in row] for row in data["rows"]]
    assert shown == [["prompt-0", "prompt-1"], ["prompt-1", "prompt-0"]]


def test_the_legend_has_every_name(tmp_path: Path) -> None:
    """Matplotlib leaves out labels that start with an underscore, and reads formulas between dollars."""
    names = ["_first", "$second\\b$", "third_"]
    figure = compare_runs.curves([RunFiles(make_run(tmp_path / name)) for name in names], names)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names
    assert compare_runs.png(figure)


def test_flags_are_shown_as_they_are_typed() -> None:
    values = (["49x480x720", "1x480x720"], None, 0.5, "a prompt")
    assert [*map(compare_runs.as_typed, values)] == ["49x480x720 1x480x720", "", "0.5", "a prompt"]


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_runs.main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "has no config.json; give output folders of runs" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@needs_browser
def test_the_slider_shows_the_videos_of_a_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with Browser(find_browser() or "", tmp_path / "profile") as browser:
        browser.open(write_report(run))
        assert browser.value(SHOWN) == "step 4"
        trained = "document.querySelector('#cell-{}-1 video')"
        browser.wait_for(f"{trained.format(0)}.videoWidth === 48")  # the browser has decoded the file
        browser.click("#step", 0.02)
        browser.wait_for(f"{SHOWN} === 'step 0'")
        assert "step-000000" in browser.value(f"{trained.format(0)}.src")
        browser.click("#step")
        browser.wait_for(f"{SHOWN} === 'step 2'")
        assert "step-000002" in browser.value(f"{trained.format(0)}.src")
        assert "step-000000" in browser.value(f"{trained.format(1)}.src")  # the newest that is not newer
        assert browser.value("document.querySelector('#cell-1-1 span').textContent") == "step 0"
        assert browser.value("document.querySelector('section p').textContent") == PROMPT


@needs_browser
def test_a_page_with_its_videos_needs_no_other_file(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    target = tmp_path / "elsewhere" / "compare.html"
    target.parent.mkdir()
    assert compare_runs.main([*map(str, runs), "--output", str(target), "--embed"]) == 0
    for run in runs:
        run.rename(tmp_path / f"moved {run.name}")
    with Browser(find_browser() or "", tmp_path / "profile") as browser:
        browser.open(target)
        browser.wait_for("[...document.querySelectorAll('video')].every((v) => v.videoWidth === 48)")
        assert browser.value("document.querySelectorAll('video').length") == 4
