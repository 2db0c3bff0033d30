"""Compares runs on one page, such as those of a sweep: settings, losses, costs and validation videos side by side.

    python scripts/compare_runs.py runs/rank-64 runs/rank-128 --output runs/compare.html
    python scripts/compare_runs.py runs/rank-64 --output rank-64.html --embed
    python scripts/compare_runs.py my-tensors --output data.html --embed

A browser opens the page from disk without a server. It links to the videos of the runs, or with --embed contains them,
so that it can be sent to somebody. With one run, the page is the report of that run; with a folder that
prepare_dataset.py wrote, it is the report about the data set.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))

from cogvideox.files import PAGE_MARK, REPORT_NAME, foreign_problem, has_mark, write_atomically
from cogvideox.runtime.curves import MIN_WINDOW, png, running_mean, thinned
from cogvideox.runtime.metrics import column, grid_of, is_finite
from cogvideox.runtime.report import (
    RunFiles,
    Sources,
    VideoGrid,
    moved,
    page,
    section,
    table,
    write_report,
)

LAST_SHARE = 10  # the loss that is shown is the mean of the last tenth of the steps
GRID_HEAD = "held-out grid"  # the head of the column, and a word of the legend
OTHER_GRIDS = "Held-out losses can be compared only if their held-out grid, that is clips and --seed, is the same."
WHERE = ("output_dir", "tracker_name", "logging_dir")  # flags that differ between any two runs


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs, or one prepared folder")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page to write (compare.html)")
    parser.add_argument("--embed", action="store_true", help="put videos and pictures into the page")
    return parser


def names_of(folders: Sequence[Path]) -> list[str]:
    """Returns a short name for each folder: as many of its last parts as are needed to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for count in range(1, longest):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def different_flags(runs: Sequence[RunFiles]) -> list[str]:
    """Returns the flags that do not have the same value in all runs."""
    flags = [run.config.get("flags", {}) for run in runs]
    every = dict.fromkeys(name for values in flags for name in values)
    return [name for name in every if name not in WHERE and any(v.get(name) != flags[0].get(name) for v in flags)]


def grid_numbers(runs: Sequence[RunFiles]) -> list[str]:
    """Returns the number of each run's held-out grid, counted from 1; empty texts if no two grids differ.

    A grid consists of clips, timesteps and noises. Losses that were measured on different grids cannot be compared.
    """
    grids = [grid_of(run.held_out[-1]) if run.held_out else "" for run in runs]
    different = [grid for grid in dict.fromkeys(grids) if grid != ""]
    return [str(different.index(grid) + 1) if grid != "" and len(different) > 1 else "" for grid in grids]


def rows_of(runs: Sequence[RunFiles], names: Sequence[str], flags: Sequence[str]) -> list[tuple[object, ...]]:
    """Returns a row of the table for each run: name, steps, losses, costs and different flags."""
    rows = []
    for run, name, grid in zip(runs, names, grid_numbers(runs), strict=True):
        steps, losses = column(run.records, "loss")
        last = f"{losses[-max(1, len(losses) // LAST_SHARE) :].mean():.5f}" if len(losses) else ""
        measured, values = column(run.held_out, "held_out_loss")
        best = f"{values.min():.5f} at step {int(measured[values.argmin()])}" if len(values) else ""
        _, seconds = column(run.records, "seconds")
        median = f"{np.median(seconds):.3f}" if len(seconds) else ""
        typed = [as_typed(run.config.get("flags", {}).get(flag)) for flag in flags]
        rows.append((name, int(steps[-1]) if len(steps) else 0, last, best, grid, median, *typed))
    return rows


def as_typed(value: object) -> str:
    """Returns the value of a flag as it is typed; empty if it was not given."""
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def curves(runs: Sequence[RunFiles], names: Sequence[str]) -> Any:
    """Returns a figure with the running mean of each run's loss, and its held-out loss with the standard error.

    If no run has measured a held-out loss, there is no panel for it.
    """
    from matplotlib.figure import Figure

    panels = 2 if any(run.held_out for run in runs) else 1
    figure = Figure(figsize=(12, 4 * panels), layout="constrained", facecolor="white")
    training, *measuring = figure.subplots(panels, 1, sharex=True, squeeze=False).flat
    labels = [f"{name}, {GRID_HEAD} {n}" if n else name for name, n in zip(names, grid_numbers(runs), strict=True)]
    for run in runs:
        steps, losses = column(run.records, "loss")
        means = running_mean(losses, max(MIN_WINDOW, len(losses) // LAST_SHARE))
        training.plot(*thinned(steps, means))
        for axes in measuring:
            measured, values = column(run.held_out, "held_out_loss")
            errors = [
                record.get("held_out_error") or 0.0 for record in run.held_out if is_finite(record["held_out_loss"])
            ]
            axes.errorbar(measured, values, errors or None, marker="o", capsize=4)
            axes.set_ylabel("held-out loss ± standard error")
    training.set_ylabel("training loss, running mean")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("optimizer step")
    # The labels are given here, because a label of a line is left out if it starts with an underscore.
    for text in training.legend(training.lines, labels).get_texts():
        text.set_parse_math(False)
    return figure


def compare(folders: Sequence[Path], target: Path, embed: bool) -> None:
    """Writes the page that compares several runs."""
    runs, names = [RunFiles(folder) for folder in folders], names_of(folders)
    grid, flags = VideoGrid(Sources(target.parent, embed)), different_flags(runs)
    shown = dict.fromkeys((run.prompt(prompt), run.image(prompt), n) for run in runs for prompt, n in run.videos)
    rows = [
        grid.add(text, [(name, videos_of(run, text, image, n)) for run, name in zip(runs, names, strict=True)])
        for text, image, n in shown
    ]
    picture = base64.b64encode(png(curves(runs, names))).decode()
    head = ("run", "steps", "loss, last tenth", "best held-out loss", GRID_HEAD, "seconds a step", *flags)
    sections = [
        section("Runs", table(head, rows_of(runs, names, flags))),
        section("Curves", f'<img src="data:image/png;base64,{picture}" alt="losses of all runs">'),
        section("Validation videos", grid.slider() if rows else "", *rows),
    ]
    summary = "Flags that are equal in all runs are left out." + (f" {OTHER_GRIDS}" if any(grid_numbers(runs)) else "")
    write_atomically(target, page(f"{len(runs)} runs", summary, sections, grid))


def videos_of(run: RunFiles, prompt: str, image: str | None, number: int) -> dict[int, Path]:
    """Returns the videos of a prompt and image by step; runs may have their prompts in different order."""
    wanted = (prompt, image, number)
    found = (videos for (index, n), videos in run.videos.items() if (run.prompt(index), run.image(index), n) == wanted)
    return next(found, {})


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit status."""
    args = build_parser().parse_args(argv)
    first, *others = args.runs
    if problem := foreign_problem("--output", args.output, has_mark(args.output, PAGE_MARK)):
        print(problem, file=sys.stderr)
        return 2
    missing = [folder for folder in args.runs if not (folder / "config.json").is_file()]
    if missing == [first] and not others and (first / REPORT_NAME).is_file():
        text = moved((first / REPORT_NAME).read_text("utf-8"), first, Sources(args.output.parent, args.embed))
        write_atomically(args.output, text.encode())
    elif missing:
        rule = f"has no config.json; give output folders of runs, or one prepared folder with {REPORT_NAME}"
        print(f"{', '.join(map(str, missing))}: {rule}", file=sys.stderr)
        return 2
    elif not others:
        write_report(first, args.embed, args.output)
    else:
        compare(args.runs, args.output, args.embed)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
