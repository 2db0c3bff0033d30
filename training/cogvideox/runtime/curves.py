"""The run's curves: metrics.jsonl -> curves.png with loss, held-out loss, learning rate and gradient norm.

Where the held-out loss was measured by timestep, a panel between shows what became of it in each part of the schedule.

Drawn with matplotlib's objects alone, so that nothing of the process changes. Numbers that are not finite are passed
over. However long the run is, a line has a few thousand points, its peaks among them.
"""

import io
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox.files import write_atomically
from cogvideox.runtime.metrics import BY_TIMESTEP, Records, by_grid, column, read_records

CURVES_NAME = "curves.png"
WIDTH, HEIGHT, PANEL_HEIGHT, DPI = 12.0, 8.0, 3.0, 100  # in inches; dots an inch
STRETCHES = 2000  # of a line, each drawn by its lowest and highest point; more than the picture has columns
MIN_WINDOW, MAX_WINDOW = 10, 1000  # steps of the running mean; a tenth of all in between
USUAL = (1.0, 99.0)  # percentiles of the steps' losses that the axis has room for
MARGIN = 0.05  # of an axis, above and below
LOG_RANGE = 20.0  # an axis whose highest value is this many times the median is logarithmic
LOSS, HELD_OUT, RATE, NORM, SKIPPED = "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red"
OTHER_GRID = "tab:gray"
DARKEST_FIRST = 0.92  # of the colour map, whose end is too light on white


def draw_curves(metrics: Path, picture: Path, name: str, weighting: str = "none") -> None:
    """Draws the picture of the run of that name anew. Where there are no numbers yet, there is none.

    ``weighting`` is that of the training loss; the held-out loss has none.
    """
    records = read_records(metrics)
    figure = curves_figure(
        records, name, weighting
    )  # without any, too: a matplotlib that is missing shows at the first look
    if records:
        write_atomically(picture, png(figure))


def png(figure: Any) -> bytes:
    """The figure as the content of a PNG file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and those before it, ``window`` in all, fewer at the start."""
    start = values[: window - 1]
    means = np.cumsum(start) / np.arange(1, len(start) + 1)
    if len(values) < window:
        return means
    return np.concatenate([means, np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)])


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The line with the lowest and the highest point of each of STRETCHES parts, in order."""
    if len(values) <= 2 * STRETCHES:
        return steps, values
    bounds = np.linspace(0, len(values), STRETCHES + 1).astype(int)
    parts = list(pairwise(bounds))
    lowest = [start + int(values[start:end].argmin()) for start, end in parts]
    highest = [start + int(values[start:end].argmax()) for start, end in parts]
    kept = np.unique(lowest + highest)
    return steps[kept], values[kept]


def curves_figure(records: Records, name: str, weighting: str = "none") -> Any:
    """The matplotlib Figure: loss above, learning rate and gradient norm in a smaller panel at the bottom."""
    from matplotlib.figure import Figure

    newest = by_grid(records)[-1:]
    measured = [record for grid in newest for record in grid if isinstance(record.get(BY_TIMESTEP), list)]
    size = (WIDTH, HEIGHT + PANEL_HEIGHT * bool(measured))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    printable = "".join(letter if letter.isprintable() else " " for letter in name)
    last = max((record["step"] for record in records), default=0)
    figure.suptitle(f"{printable}: {last} steps", fontsize=14, parse_math=False)
    ratios = (3, 1.5, 1) if measured else (3, 1)
    loss_axes, *middle, rate_axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    draw_loss(loss_axes, records, weighting)
    for axes in middle:
        draw_by_timestep(axes, measured)
    draw_rate_and_norm(rate_axes, records)
    rate_axes.set_xlabel("optimizer step")
    return figure


def draw_loss(axes: Any, records: Records, weighting: str) -> None:
    """Loss of each step, its running mean, the held-out loss, and which steps changed no weight.

    The axis has room for nearly all steps, and for all of the mean and of the held-out loss: these are to be read.
    """
    steps, losses = column(records, "loss")
    window = min(MAX_WINDOW, max(MIN_WINDOW, len(losses) // 100 * 10))
    weighted = "" if weighting == "none" else f", weighted by {weighting}"
    label = f"training loss of each step{weighted}"
    axes.plot(*thinned(steps, losses), color=LOSS, alpha=0.3, linewidth=0.8, label=label)
    means = running_mean(losses, window)
    full = min(window, len(losses)) // 4  # before, there are too few to say anything
    label = f"running mean over {window} steps"
    axes.plot(*thinned(steps[full:], means[full:]), color=LOSS, linewidth=2, label=label)
    measured = draw_held_out(axes, records)
    draw_skipped(axes, records)
    if len(losses):
        usual = np.percentile(losses, USUAL)
        scale(axes, losses, np.concatenate([usual, means[full:], measured]))
    axes.set_ylabel("loss: mean squared error of the velocity")
    finish(axes, *axes.get_legend_handles_labels())


def draw_by_timestep(axes: Any, measured: Records) -> None:
    """The held-out loss in each part of the schedule, as a multiple of its first measurement: one line a part.

    The losses themselves lie far apart: the network sees little of a clip at one end, and nearly all at the other.
    """
    from matplotlib import colormaps

    parts = min(len(record[BY_TIMESTEP]) for record in measured)
    for part in range(parts):
        rows = [{"step": record["step"], "loss": record[BY_TIMESTEP][part]} for record in measured]
        steps, losses = column(rows, "loss")
        if not len(losses) or losses[0] <= 0:
            continue
        ends = {0: " (least noise)", parts - 1: " (most noise)"}
        label = f"part {part + 1} of {parts}{ends[part]}" if part in ends else f"{part + 1}"
        colour = colormaps["viridis"](part / max(1, parts - 1) * DARKEST_FIRST)
        axes.plot(steps, losses / losses[0], color=colour, marker=".", linewidth=1.5, label=label)
    axes.axhline(1.0, color="black", alpha=0.3, linewidth=0.8)
    axes.set_ylabel("held-out loss by timestep,\nrelative to the first")
    handles, labels = axes.get_legend_handles_labels()
    finish(axes, handles, labels, columns=parts)


def draw_held_out(axes: Any, records: Records) -> np.ndarray:
    """The held-out loss, one line for each grid that it was measured on; returns what they span.

    No line leads from one grid to another, as other clips have other losses whatever was learned.
    """
    *older, newest = by_grid(records) or [[]]
    spans = [draw_grid(axes, grid, OTHER_GRID, "held-out loss on an earlier grid") for grid in older]
    return np.concatenate([*spans, draw_grid(axes, newest, HELD_OUT, "held-out loss")])


def draw_grid(axes: Any, records: Records, colour: str, label: str) -> np.ndarray:
    """The losses of one grid with their standard error, which a single clip has none of; returns what they span."""
    steps, losses = column(records, "held_out_loss")
    found = dict(zip(*column(records, "held_out_error"), strict=True))
    errors = np.array([found.get(step, math.nan) for step in steps])
    if len(losses):
        label += " ± standard error" if found else ""
        axes.errorbar(steps, losses, errors, color=colour, marker="o", markersize=5, capsize=4, label=label)
    return np.concatenate([losses - np.nan_to_num(errors), losses + np.nan_to_num(errors)])


def draw_skipped(axes: Any, records: Records) -> None:
    """Marks on the lower edge where a step changed no weight, as its gradients were not finite."""
    steps, _ = column([record for record in records if record.get("skipped")], "step")
    marks = {"marker": "|", "markersize": 14, "linestyle": "none", "transform": axes.get_xaxis_transform()}
    if len(steps):
        axes.plot(steps, np.full(len(steps), 0.02), color=SKIPPED, label=f"skipped steps: {len(steps)}", **marks)


def draw_rate_and_norm(axes: Any, records: Records) -> None:
    """Learning rate on the left axis, gradient norm on the right one."""
    steps, norms = column(records, "grad_norm")
    right = axes.twinx()
    (norm,) = right.plot(*thinned(steps, norms), color=NORM, alpha=0.6, linewidth=0.8, label="gradient norm")
    right.set_ylabel("gradient norm", color=NORM)
    scale(right, norms, norms)
    (rate,) = axes.plot(*thinned(*column(records, "lr")), color=RATE, linewidth=2, label="learning rate")
    axes.set_ylabel("learning rate", color=RATE)
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.set_zorder(right.get_zorder() + 1)  # the smooth line on top
    axes.patch.set_visible(False)
    finish(axes, [rate, norm], [rate.get_label(), norm.get_label()])


def scale(axes: Any, values: np.ndarray, shown: np.ndarray) -> None:
    """Room for what is to be shown; logarithmic where all values are positive and few would flatten the others."""
    if not len(values):
        return
    low, high = shown.min(), shown.max()
    if values.min() > 0 and high > LOG_RANGE * np.median(values):
        axes.set_yscale("log")
    elif high > low:
        axes.set_ylim(low - MARGIN * (high - low), high + MARGIN * (high - low))


def finish(axes: Any, handles: list[Any], labels: list[str], columns: int = 4) -> None:
    """A grid, and the legend above the panel, where it hides nothing."""
    axes.grid(alpha=0.3)
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False)
