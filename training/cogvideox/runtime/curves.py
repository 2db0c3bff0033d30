"""Draws curves.png from metrics.jsonl: loss, held-out loss, learning rate and gradient norm by optimizer step.

If the held-out loss was measured by timestep, a panel in the middle shows its change in each part of the noise
schedule. Numbers that are not finite are left out. However long the run is, a line has at most a few thousand points,
which include its peaks. Only matplotlib's objects are used, not pyplot, because pyplot changes global settings.
"""

import io
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvideox.errors import plural
from cogvideox.files import write_atomically
from cogvideox.runtime.metrics import BY_TIMESTEP, MetricRecords, by_grid, column, read_records

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_NAME = "curves.png"
WIDTH, HEIGHT, PANEL_HEIGHT = 12.0, 8.0, 3.0  # inches
DPI = 100  # dots per inch
NUM_SEGMENTS = 2000  # segments of a line, each drawn by its lowest and highest point; more than WIDTH has pixels
MIN_WINDOW, MAX_WINDOW = 10, 1000  # steps of the running mean, which covers a tenth of the run in between
SHOWN_PERCENTILES = (1.0, 99.0)  # percentiles of the training losses that the axis must show
AXIS_MARGIN = 0.05  # share of an axis that is left free above and below
LOG_RATIO = 20.0  # An axis is logarithmic if its highest value exceeds this many times the median.
LOSS_COLOR, HELD_OUT_COLOR, EARLIER_GRID_COLOR, SKIPPED_COLOR = "tab:blue", "tab:orange", "tab:gray", "tab:red"
RATE_COLOR, NORM_COLOR = "tab:green", "tab:purple"
COLOR_MAP_END = 0.92  # where the used part of the color map ends; the rest is too light on white


def draw_curves(metrics: Path, picture: Path, name: str, weighting: str = "none") -> None:
    """Draws the curves of a run and replaces the picture. Writes nothing until metrics exist.

    Args:
        metrics: Path of metrics.jsonl.
        picture: Path of the PNG file to write.
        name: The name of the run, for the title.
        weighting: The loss weighting by timestep, for the legend. The held-out loss is never weighted.
    """
    records = read_records(metrics)
    if records:
        write_atomically(picture, png(curves_figure(records, name, weighting)))


def png(figure: "Figure") -> bytes:
    """Returns the figure as the content of a PNG file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib warns of letters that the font lacks.
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns for each value the mean of the last ``window`` values up to it; of fewer at the start."""
    start = values[: window - 1]
    means = np.cumsum(start) / np.arange(1, len(start) + 1)
    if len(values) < window:
        return means
    return np.concatenate([means, np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)])


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduces a line to the lowest and the highest point of each of NUM_SEGMENTS segments, in order."""
    if len(values) <= 2 * NUM_SEGMENTS:
        return steps, values
    bounds = np.linspace(0, len(values), NUM_SEGMENTS + 1).astype(int)
    segments = list(pairwise(bounds))
    lowest = [start + int(values[start:end].argmin()) for start, end in segments]
    highest = [start + int(values[start:end].argmax()) for start, end in segments]
    kept = np.unique(lowest + highest)
    return steps[kept], values[kept]


def curves_figure(records: MetricRecords, name: str, weighting: str = "none") -> "Figure":
    """Returns the figure: loss at the top, learning rate and gradient norm in a smaller panel at the bottom."""
    from matplotlib.figure import Figure

    newest = by_grid(records)[-1:]
    measured = [record for grid in newest for record in grid if isinstance(record.get(BY_TIMESTEP), list)]
    size = (WIDTH, HEIGHT + PANEL_HEIGHT * bool(measured))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    printable = "".join(letter if letter.isprintable() else " " for letter in name)
    last = max((record["step"] for record in records), default=0)
    figure.suptitle(f"{printable}: {plural(last, 'step')}", fontsize=14, parse_math=False)
    ratios = (3, 1.5, 1) if measured else (3, 1)
    loss_axes, *middle, rate_axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    draw_loss(loss_axes, records, weighting)
    for axes in middle:
        draw_by_timestep(axes, measured)
    draw_rate_and_norm(rate_axes, records)
    rate_axes.set_xlabel("optimizer step")
    return figure


def draw_loss(axes: "Axes", records: MetricRecords, weighting: str) -> None:
    """Draws the loss of each step, its running mean, the held-out loss, and marks for skipped steps.

    The limits of the axis include all of the mean and of the held-out loss, but may exclude extreme single steps.
    """
    steps, losses = column(records, "loss")
    window = min(MAX_WINDOW, max(MIN_WINDOW, len(losses) // 100 * 10))
    weighted = "" if weighting == "none" else f", weighted by {weighting}"
    label = f"training loss of each step{weighted}"
    axes.plot(*thinned(steps, losses), color=LOSS_COLOR, alpha=0.3, linewidth=0.8, label=label)
    means = running_mean(losses, window)
    first = min(window, len(losses)) // 4  # Means of fewer steps than this are too noisy to show.
    label = f"running mean over {window} steps"
    axes.plot(*thinned(steps[first:], means[first:]), color=LOSS_COLOR, linewidth=2, label=label)
    measured = draw_held_out(axes, records)
    draw_skipped(axes, records)
    if len(losses):
        usual = np.percentile(losses, SHOWN_PERCENTILES)
        set_limits(axes, losses, np.concatenate([usual, means[first:], measured]))
    axes.set_ylabel("loss: mean squared error of the velocity")
    add_legend(axes, *axes.get_legend_handles_labels())


def draw_by_timestep(axes: "Axes", measured: MetricRecords) -> None:
    """Draws a line per part of the noise schedule: the held-out loss there, relative to its first measurement.

    The losses themselves could not share an axis, because they differ by large factors between the parts.

    Args:
        axes: The axes to draw on.
        measured: The records that have held-out losses by timestep.
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
        color = colormaps["viridis"](part / max(1, parts - 1) * COLOR_MAP_END)
        axes.plot(steps, losses / losses[0], color=color, marker=".", linewidth=1.5, label=label)
    axes.axhline(1.0, color="black", alpha=0.3, linewidth=0.8)
    axes.set_ylabel("held-out loss by timestep,\nrelative to the first")
    handles, labels = axes.get_legend_handles_labels()
    add_legend(axes, handles, labels, columns=parts)


def draw_held_out(axes: "Axes", records: MetricRecords) -> np.ndarray:
    """Draws the held-out loss, one line per grid on which it was measured.

    The lines are not connected, because losses on different clips differ whatever the model has learned.

    Returns:
        Values that the axis must show.
    """
    *earlier, newest = by_grid(records) or [[]]
    shown = [draw_grid(axes, grid, EARLIER_GRID_COLOR, "held-out loss on an earlier grid") for grid in earlier]
    return np.concatenate([*shown, draw_grid(axes, newest, HELD_OUT_COLOR, "held-out loss")])


def draw_grid(axes: "Axes", records: MetricRecords, color: str, label: str) -> np.ndarray:
    """Draws the held-out losses of one grid with their standard error, which is missing if the grid has one clip.

    Returns:
        Values that the axis must show: the ends of the error bars.
    """
    steps, losses = column(records, "held_out_loss")
    found = dict(zip(*column(records, "held_out_error"), strict=True))
    errors = np.array([found.get(step, math.nan) for step in steps])
    if len(losses):
        label += " ± standard error" if found else ""
        axes.errorbar(steps, losses, errors, color=color, marker="o", markersize=5, capsize=4, label=label)
    return np.concatenate([losses - np.nan_to_num(errors), losses + np.nan_to_num(errors)])


def draw_skipped(axes: "Axes", records: MetricRecords) -> None:
    """Draws a mark at the lower edge for each step that changed no weight because its gradients were not finite."""
    steps, _ = column([record for record in records if record.get("skipped")], "step")
    marks: dict[str, Any] = {"marker": "|", "markersize": 14, "linestyle": "none"}
    marks |= {"transform": axes.get_xaxis_transform(), "color": SKIPPED_COLOR, "label": f"skipped steps: {len(steps)}"}
    if len(steps):
        axes.plot(steps, np.full(len(steps), 0.02), **marks)


def draw_rate_and_norm(axes: "Axes", records: MetricRecords) -> None:
    """Draws the learning rate with the left axis and the gradient norm with the right axis."""
    steps, norms = column(records, "grad_norm")
    right = axes.twinx()
    (norm,) = right.plot(*thinned(steps, norms), color=NORM_COLOR, alpha=0.6, linewidth=0.8, label="gradient norm")
    right.set_ylabel("gradient norm", color=NORM_COLOR)
    set_limits(right, norms, norms)
    (rate,) = axes.plot(*thinned(*column(records, "lr")), color=RATE_COLOR, linewidth=2, label="learning rate")
    axes.set_ylabel("learning rate", color=RATE_COLOR)
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.set_zorder(right.get_zorder() + 1)  # The noisy norm must not hide the rate.
    axes.patch.set_visible(False)
    add_legend(axes, [rate, norm], [str(rate.get_label()), str(norm.get_label())])


def set_limits(axes: "Axes", values: np.ndarray, shown: np.ndarray) -> None:
    """Sets the range and the scale of the vertical axis.

    The scale is logarithmic if all values are positive and a few high ones would flatten the others.

    Args:
        axes: The axes to change.
        values: All values of the line.
        shown: Values that the axis must show.
    """
    if not len(values):
        return
    low, high = shown.min(), shown.max()
    if values.min() > 0 and high > LOG_RATIO * np.median(values):
        axes.set_yscale("log")
    elif high > low:
        axes.set_ylim(low - AXIS_MARGIN * (high - low), high + AXIS_MARGIN * (high - low))


def add_legend(axes: "Axes", handles: "Sequence[Artist]", labels: list[str], columns: int = 4) -> None:
    """Adds grid lines, and the legend above the panel, where it hides no line."""
    axes.grid(alpha=0.3)
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False)
