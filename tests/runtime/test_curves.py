"""curves.py: the lines show the numbers of metrics.jsonl, and no number and no name prevents the picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from cogvideox.runtime.curves import NUM_SEGMENTS, curves_figure, draw_curves, running_mean, thinned
from cogvideox.runtime.metrics import read_records

pytestmark = pytest.mark.usefixtures("rendered")

STEP = {"lr": 1e-4, "grad_norm": 0.5, "skipped": 0.0}
LOSS, MEAN = "training loss of each step", "running mean over 10 steps"
HELD_OUT, SKIPPED = "held-out loss", "skipped steps: "


def steps(losses: list[Any], **more: Any) -> list[dict[str, Any]]:
    """Returns a record for each loss, from step 1."""
    return [{"step": step, "loss": loss, **STEP, **more} for step, loss in enumerate(losses, 1)]


BY_TIMESTEP = "held_out_by_timestep"


def held(step: int, loss: float | None, error: float | None) -> dict[str, Any]:
    return {"step": step, "held_out_loss": loss, "held_out_error": error}


def write(path: Path, records: list[dict[str, Any]], end: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return path


def line(axes: Any, label: str) -> tuple[list[float], list[float]]:
    """Returns the numbers of the line whose label starts with the text."""
    (found,) = [line for line in axes.lines if line.get_label().startswith(label)]
    return list(found.get_xdata()), list(found.get_ydata())


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# -- what is read ------------------------------------------------------------------------------------------------------


def test_incomplete_and_invalid_lines_are_ignored(tmp_path: Path) -> None:
    records = steps([1.0, 2.0])
    path = write(tmp_path / "m.jsonl", records, '[1]\n\n3\n{"loss": 1}\n{"step": "a"}\nnull\n{"step": 3, "lo')
    assert read_records(path) == records
    assert read_records(tmp_path / "none.jsonl") == []
    path.write_bytes(b'\xff\xfe{"step": 1}\n{"step": 4, "loss": 0.5}\n')
    assert read_records(path) == [{"step": 4, "loss": 0.5}]


def test_lines_are_the_finite_numbers() -> None:
    records = steps([1.0, None, 3.0, math.nan, math.inf, "x", 2.0])
    records[2]["grad_norm"] = None
    del records[6]["lr"]
    loss_axes, rate_axes, norm_axes = curves_figure(records, "run").axes
    assert line(loss_axes, LOSS) == ([1, 3, 7], [1.0, 3.0, 2.0])
    assert line(loss_axes, MEAN) == ([1, 3, 7], [1.0, 2.0, 2.0])
    assert line(rate_axes, "learning rate") == ([1, 2, 3, 4, 5, 6], [1e-4] * 6)
    assert line(norm_axes, "gradient norm") == ([1, 2, 4, 5, 6, 7], [0.5] * 6)


# -- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "window"), [(1, 10), (9, 10), (10, 10), (11, 10), (500, 50)])
def test_running_mean(number: int, window: int) -> None:
    values = np.random.default_rng(0).random(number)
    expected = [values[max(0, place - window + 1) : place + 1].mean() for place in range(number)]
    assert running_mean(values, window) == pytest.approx(expected)


def test_the_label_has_the_number_of_steps_of_the_mean() -> None:
    losses = list(np.random.default_rng(0).random(500))
    (axes, *_) = curves_figure(steps(losses), "run").axes
    assert labels(axes) == [LOSS, "running mean over 50 steps"]
    shown, means = line(axes, "running mean")
    assert shown[0] == 13  # The mean starts when a quarter of the window is available.
    assert means[-1] == pytest.approx(np.mean(losses[-50:]))


def test_held_out_points_have_their_error_bars() -> None:
    records = [held(0, 0.9, 0.1), *steps([1.0, 0.8]), held(2, 0.7, 0.2), held(3, None, None), held(4, 0.6, None)]
    (axes, *_) = curves_figure(records, "run").axes
    (container,) = axes.containers
    points, caps, (bars,) = container.lines
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([0, 2, 4], [0.9, 0.7, 0.6])
    ends = [segment[:, 1].tolist() for segment in bars.get_segments() if len(segment)]
    assert ends == [pytest.approx([0.8, 1.0]), pytest.approx([0.5, 0.9])]
    assert len(caps) == 2
    assert f"{HELD_OUT} ± standard error" in labels(axes)
    low, high = axes.get_ylim()
    assert low < 0.5 < 1.0 < high


def test_one_held_out_clip_has_no_error_and_a_run_without_has_no_points() -> None:
    (axes, *_) = curves_figure([held(0, 0.9, None)], "run").axes
    assert HELD_OUT in labels(axes)
    (axes, *_) = curves_figure(steps([1.0]), "run").axes
    assert not axes.containers


def test_skipped_steps_are_marked_and_counted() -> None:
    records = steps([1.0, None, 1.0, 2.0])
    records[1]["skipped"] = records[3]["skipped"] = 1.0
    (axes, *_) = curves_figure(records, "run").axes
    marks, heights = line(axes, SKIPPED)
    assert marks == [2, 4]
    assert all(0 < height < 0.1 for height in heights)  # Heights are shares of the panel, whatever its scale.
    assert f"{SKIPPED}2" in labels(axes)
    assert not any(label.startswith(SKIPPED) for label in labels(curves_figure(steps([1.0]), "run").axes[0]))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([1.0, 0.5, 0.2], "linear"),
        ([10.0] * 10 + [0.1] * 90, "log"),
        ([10.0] * 10 + [0.0] + [0.1] * 90, "linear"),
        ([10.0] * 10 + [-0.1] + [0.1] * 90, "linear"),
        ([0.3] * 500 + [20.0] + [0.3] * 500, "linear"),
        ([1.0, 1.0, 1.0], "linear"),
    ],
    ids=["narrow", "wide", "zero", "negative", "one peak", "constant"],
)
def test_the_loss_is_logarithmic_if_its_range_is_large(losses: list[float], scale: str) -> None:
    (axes, *_) = curves_figure(steps(losses), "run").axes
    assert axes.get_yscale() == scale


def test_one_peak_flattens_neither_mean_nor_held_out_loss() -> None:
    records = [*steps([0.3] * 500 + [20.0] + [0.4] * 500), held(1001, 0.9, 0.1)]
    (axes, *_) = curves_figure(records, "run").axes
    low, high = axes.get_ylim()
    assert low < 0.3
    assert 1.0 < high < 1.2
    assert 20.0 in line(axes, LOSS)[1]


def test_a_long_run_is_thinned_and_keeps_its_peaks() -> None:
    losses = np.random.default_rng(0).random(100_000)
    losses[54_321], losses[12_345] = 5.0, -5.0
    records = [*steps(losses.tolist(), skipped=0.0), held(100_000, 0.5, 0.1)]
    figure = curves_figure(records, "run")
    for axes in figure.axes:
        assert all(len(drawn.get_xdata()) <= 2 * NUM_SEGMENTS for drawn in axes.lines)
    shown, values = line(figure.axes[0], LOSS)
    assert {(54_322, 5.0), (12_346, -5.0)} <= set(zip(shown, values, strict=True))
    assert shown == sorted(shown)
    assert all(losses[int(step) - 1] == value for step, value in zip(shown, values, strict=True))


@pytest.mark.parametrize("number", [0, 1, 2 * NUM_SEGMENTS, 2 * NUM_SEGMENTS + 1])
def test_short_lines_are_complete(number: int) -> None:
    values = np.arange(float(number))
    kept = thinned(values, values)
    assert kept[0].tolist() == kept[1].tolist()
    assert len(kept[0]) == min(number, 2 * NUM_SEGMENTS)


def test_the_held_out_loss_by_timestep_is_a_multiple_of_its_first_value() -> None:
    records = [held(0, 0.6, 0.1) | {BY_TIMESTEP: [0.4, 0.8, None]}, *steps([1.0, 0.8])]
    records += [held(1, 0.5, 0.1), held(2, 0.5, 0.1) | {BY_TIMESTEP: [0.2, 1.2, 0.5]}]
    records += [held(3, 0.5, 0.1) | {BY_TIMESTEP: [None, 0.4, 0.25]}]
    _, axes, rate_axes, _ = curves_figure(records, "run").axes
    assert line(axes, "part 1 of 3 (least noise)") == ([0, 2], [1.0, 0.5])
    assert line(axes, "2") == ([0, 2, 3], pytest.approx([1.0, 1.5, 0.5]))
    assert line(axes, "part 3 of 3 (most noise)") == ([2, 3], [1.0, 0.5])
    assert "relative to the first" in axes.get_ylabel()
    assert labels(rate_axes) == ["learning rate", "gradient norm"]
    assert len(curves_figure([held(0, 0.6, 0.1)], "run").axes) == 3


def test_losses_of_two_grids_are_two_lines_and_only_the_newest_is_shown_by_timestep() -> None:
    old = [held(step, 0.9 - step / 10, 0.1) | {BY_TIMESTEP: [0.4, 0.8]} for step in (0, 2)]
    new = [held(step, 0.4, 0.1) | {BY_TIMESTEP: [0.2, 0.3], "held_out_grid": "g"} for step in (2, 4)]
    loss_axes, axes, *_ = curves_figure([old[0], *steps([1.0, 0.8]), old[1], *new], "run").axes
    assert labels(loss_axes)[-2:] == [f"{HELD_OUT} on an earlier grid ± standard error", f"{HELD_OUT} ± standard error"]
    old_line, new_line = (container.lines[0] for container in loss_axes.containers)
    assert list(old_line.get_ydata()) == [0.9, 0.7]
    assert list(new_line.get_xdata()) == [2, 4]
    assert line(axes, "part 1 of 2 (least noise)") == ([2, 4], [1.0, 1.0])
    odd = held(0, 0.9, 0.1) | {"held_out_grid": ["not", "a", "text"]}
    assert len(curves_figure([odd], "run").axes[0].containers) == 1


@pytest.mark.parametrize("values", [[], [None], [0.0, 0.0], [math.inf], ["x"]])
def test_invalid_values_by_timestep_are_ignored(tmp_path: Path, values: list[Any]) -> None:
    records = [held(step, 0.6, 0.1) | {BY_TIMESTEP: values} for step in (0, 2)]
    draw_curves(write(tmp_path / "m.jsonl", records), tmp_path / "a.png", "run")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1200, 1100)


def test_the_label_has_the_weighting_of_the_training_loss() -> None:
    (axes, *_) = curves_figure(steps([1.0]), "run", "min_snr").axes
    assert labels(axes)[0] == f"{LOSS}, weighted by min_snr"


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["my-lora", "a_$b$_{c}^d", "$\\frac{$", "二\U0001f525", "\udc80\x00\n\x1b", "x" * 250],
    ids=["plain", "mathematics", "broken mathematics", "letters", "bytes", "long"],
)
def test_the_picture_and_its_title(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    path = write(tmp_path / "m.jsonl", [held(0, 0.9, 0.1), *steps([1.0, 0.5, 0.7])])
    for picture in ("a.png", "b.png"):
        draw_curves(path, tmp_path / picture, name)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.size) == ("PNG", (1200, 800))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    title = curves_figure(read_records(path), name).get_suptitle()
    assert title.endswith(": 3 steps")
    assert title.startswith(name) or not name.isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "m.jsonl"]
    assert not list(recwarn)


def test_axes_have_names() -> None:
    loss_axes, rate_axes, norm_axes = curves_figure(steps([1.0]), "run").axes
    assert rate_axes.get_xlabel() == "optimizer step"
    assert loss_axes.get_ylabel().startswith("loss")
    assert (rate_axes.get_ylabel(), norm_axes.get_ylabel()) == ("learning rate", "gradient norm")
    assert labels(rate_axes) == ["learning rate", "gradient norm"]


@pytest.mark.parametrize(
    "records",
    [
        [held(0, 0.9, 0.1)],
        [held(0, None, None)],
        steps([None, None], grad_norm=None),
        steps([0.0], grad_norm=0.0),
        steps([3e38, 1e-38, -3e38]),
        steps([1e-300, 1e300]),
        [{"step": 5}],
    ],
    ids=["held out only", "no number", "all skipped", "zeros", "huge", "beyond fp32", "nothing"],
)
def test_unusual_numbers_do_not_prevent_the_picture(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    draw_curves(write(tmp_path / "m.jsonl", records), tmp_path / "a.png", "run")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1200, 800)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo'])
def test_without_numbers_there_is_no_picture(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "m.jsonl").write_text(content)
    draw_curves(tmp_path / "m.jsonl", tmp_path / "a.png", "run")
    assert not (tmp_path / "a.png").exists()


def test_global_settings_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # Importing pyplot would now raise an error.
    before = dict(dict.items(matplotlib.rcParams))  # RcParams.items would import pyplot.
    draw_curves(write(tmp_path / "m.jsonl", steps([1.0, 2.0])), tmp_path / "a.png", "run")
    assert dict(dict.items(matplotlib.rcParams)) == before
    assert (tmp_path / "a.png").exists()
