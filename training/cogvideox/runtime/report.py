"""Writes report.html: what a run did, on one page that a browser opens from disk without a server.

Everything comes from the files in the output folder, so the page of an old or interrupted run can be written again. The
page links to videos and pictures by relative paths, or contains them if it is to be sent to somebody. Validation videos
have a slider over the steps after which they were rendered.

    RunFiles (one output folder) --> sections of HTML and VideoGrid --> report.html (template) --> page
"""

import base64
import json
import math
import mimetypes
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from itertools import compress
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from cogvideox.config.hub import RECIPE_NAME
from cogvideox.errors import plural
from cogvideox.files import REPORT_NAME, write_atomically
from cogvideox.runtime.metrics import MOTION, MetricRecords, by_grid, column, is_finite, read_records

TEMPLATE = Path(__file__).with_suffix(".html")
VIDEO_NAME = re.compile(r"step-(\d{6})_prompt-(\d+)_.*_(\d+)\.mp4")
PICTURES = {"contact_sheet.png": "Before and after, next to the most similar training clip", "curves.png": "Curves"}
MAX_CLIPS = 500  # more captions than this make a page slow


@dataclass(frozen=True)
class RunFiles:
    """Reads the output folder of a run. Files that do not exist yet count as empty.

    Attributes:
        folder: The output folder.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Returns config.json: flags, versions, device, command and plan."""
        return self._json("config.json")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Returns recipe.json, which exists when the result has been exported."""
        return self._json(RECIPE_NAME)

    @cached_property
    def records(self) -> MetricRecords:
        """Returns the lines of metrics.jsonl."""
        return read_records(self.folder / "metrics.jsonl")

    @cached_property
    def steps(self) -> MetricRecords:
        """Returns the lines of metrics.jsonl that describe optimizer steps."""
        return [record for record in self.records if "loss" in record]

    @cached_property
    def held_out(self) -> MetricRecords:
        """Returns the lines with the held-out loss on the newest grid."""
        return (by_grid(self.records) or [[]])[-1]

    @cached_property
    def captions(self) -> dict[str, str]:
        """Returns the captions of the training clips by id."""
        found = self._json("samples.json").get("captions", {})
        return found if isinstance(found, dict) else {}

    @cached_property
    def prompts(self) -> list[str]:
        """Returns the validation prompts."""
        found = self._json("validation/settings.json").get("prompts", [])
        return found if isinstance(found, list) else []

    @cached_property
    def images(self) -> list[str]:
        """Returns the hashes of the images that the videos of the prompts begin with; empty for text-to-video."""
        flags = self._json("validation/settings.json").get("validation", {})
        found = flags.get("images", []) if isinstance(flags, dict) else []
        return found if isinstance(found, list) else []

    @cached_property
    def videos(self) -> dict[tuple[int, int], dict[int, Path]]:
        """Returns the validation videos by step, for each pair (number of the prompt, number of the video)."""
        found: dict[tuple[int, int], dict[int, Path]] = {}
        for path in sorted(self.folder.glob("validation/step-*.mp4")):
            if match := VIDEO_NAME.fullmatch(path.name):
                step, prompt, number = map(int, match.groups())
                found.setdefault((prompt, number), {})[step] = path
        return dict(sorted(found.items()))

    def prompt(self, number: int) -> str:
        """Returns the text of a prompt."""
        return self.prompts[number] if number < len(self.prompts) else f"prompt {number}"

    def image(self, number: int) -> str | None:
        """Returns the hash of a prompt's image, or None if it has none."""
        return self.images[number] if number < len(self.images) else None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


@dataclass
class VideoGrid:
    """Collects the videos of a page: a row for each prompt, in which every cell has videos by step.

    Attributes:
        sources: Makes the addresses of the videos.
        rows: The cells of each row, each with the address of a video by step.
    """

    sources: "Sources"
    rows: list[list[dict[int, str]]] = field(default_factory=list)

    def add(self, title: str, cells: Iterable[tuple[str, Mapping[int, Path]]]) -> str:
        """Adds a row and returns its HTML.

        Args:
            title: The text above the row.
            cells: For each cell its label and its videos by step.
        """
        row, figures = len(self.rows), []
        self.rows.append([])
        for number, (label, videos) in enumerate(cells):
            self.rows[row].append({step: self.sources.of(path) for step, path in videos.items()})
            caption = f"<figcaption>{escape(label)}: <span></span></figcaption>"
            player = "<video controls loop muted autoplay playsinline></video>"
            figures.append(f'<figure id="cell-{row}-{number}">{caption}{player}</figure>')
        return f'<p>{escape(title)}</p><div class="row">{"".join(figures)}</div>'

    @property
    def steps(self) -> list[int]:
        """Returns all steps that have a video."""
        return sorted({step for row in self.rows for cell in row for step in cell})

    def slider(self) -> str:
        """Returns the HTML of the slider."""
        last = max(0, len(self.steps) - 1)
        bar = f'<input type="range" id="step" min="0" max="{last}" value="{last}" aria-label="step">'
        return f'<div class="slider">{bar}<output id="shown"></output></div>'

    def data(self) -> str:
        """Returns the content of the page's script element with the addresses."""
        # In a script element, only "<" could end the element.
        return json.dumps({"steps": self.steps, "rows": self.rows}).replace("<", "\\u003c")


@dataclass(frozen=True)
class Sources:
    """Makes the addresses of files on a page.

    Attributes:
        folder: The folder of the page, to which links are relative.
        embed: Whether the page contains the files instead.
    """

    folder: Path
    embed: bool = False

    def of(self, path: Path) -> str:
        """Returns the address of a file."""
        if not self.embed:
            return quote(Path(os.path.relpath(path.resolve(), self.folder.resolve())).as_posix())
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


# -- parts of a page ---------------------------------------------------------------------------------------------------


def section(title: str, *parts: str) -> str:
    """Returns a section of a page, or nothing if all its parts are empty."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table without the columns that are empty, or nothing if it has no rows."""
    if not rows:
        return ""
    filled = [any(str(row[column]) for row in rows) for column in range(len(head))]
    cells = ["".join(f"<th>{escape(text)}</th>" for text in compress(head, filled))]
    cells += ["".join(f"<td>{escape(str(cell))}</td>" for cell in compress(row, filled)) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in cells)}</table></div>'


def page(title: str, summary: str, sections: Sequence[str], grid: VideoGrid) -> bytes:
    """Returns a complete page.

    Args:
        title: The title, as text.
        summary: The paragraph below the title, as text.
        sections: HTML.
        grid: The videos that the sections show.
    """
    parts = {"title": escape(title), "summary": escape(summary), "sections": "\n".join(sections)}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts, videos=grid.data()).encode()


def moved(text: str, folder: Path, sources: Sources) -> str:
    """Returns a page for another place, which contains its pictures or links to them.

    A page that contains its pictures may be sent away, so it has no links, and no files from outside of its folder,
    which somebody else may have written into the page.

    Args:
        text: A page without videos.
        folder: The folder that it was written into.
        sources: Makes the addresses at the new place.
    """

    inside = folder.resolve()

    def address(match: re.Match[str]) -> str:
        path = folder / unquote(match[2])
        if sources.embed and not (match[1] == "src" and path.is_file() and path.resolve().is_relative_to(inside)):
            return ""
        return f'{match[1]}="{sources.of(path)}"'

    return re.sub(r'\b(src|href)="([^"#]+)"', address, text)


# -- the page of a run -------------------------------------------------------------------------------------------------


def write_report(folder: Path, embed: bool = False, target: Path | None = None) -> Path:
    """Writes the page of a run.

    Args:
        folder: The output folder of the run.
        embed: Whether the page contains its videos and pictures, so that it can be sent alone.
        target: The path of the page; report.html in the folder by default.

    Returns:
        The path of the page.
    """
    target = target or folder / REPORT_NAME
    run, sources = RunFiles(folder), Sources(target.parent, embed)
    grid = VideoGrid(sources)
    rows = [
        grid.add(run.prompt(prompt), (("before training", {0: videos[0]} if 0 in videos else {}), ("trained", videos)))
        for (prompt, _), videos in run.videos.items()
    ]
    sections = [
        section("Validation videos", grid.slider() if rows else "", *rows),
        *(section(title, picture(folder / name, sources)) for name, title in PICTURES.items()),
        section("Held-out loss", held_out_table(run)),
        section("Validation videos in numbers", health_table(run)),
        section("Plan and cost", table(("what", "value"), cost_rows(run))),
        section("Training clips", clips_table(run)),
        section("Command", f"<pre>{escape(run.config.get('command', ''))}</pre>" if "command" in run.config else ""),
        section("Versions", table(("package", "version"), list(run.config.get("versions", {}).items()))),
    ]
    write_atomically(target, page(folder.resolve().name, summary_of(run), sections, grid))
    return target


def picture(path: Path, sources: Sources) -> str:
    """Returns a picture, or nothing if the file does not exist."""
    return f'<img src="{sources.of(path)}" alt="{escape(path.name)}" loading="lazy">' if path.is_file() else ""


def summary_of(run: RunFiles) -> str:
    """Describes a run in one line: its steps, the held-out loss of the result, and whether the result is exported."""
    flags = run.config.get("flags", {})
    done = max((record["step"] for record in run.steps), default=0)
    total = flags.get("max_train_steps")
    parts = [f"{done} of {plural(total, 'optimizer step')}" if total else plural(done, "optimizer step")]
    result = run.recipe.get("step", math.inf)  # with --export_best, an earlier step than the last
    if measured := [record for record in run.held_out if record["step"] <= result]:
        parts.append(f"held-out loss {fixed(measured[-1]['held_out_loss'], 5)}")
    exported = "exported" if result >= done else f"step {result} is exported"
    parts.append(exported if run.recipe else "not exported yet")
    return "; ".join(parts)


def fixed(value: object, digits: int) -> str:
    """Returns a number of metrics.jsonl with that many digits; null stands for one that is infinite or NaN."""
    return f"{value:.{digits}f}" if is_finite(value) else "not finite"


def held_out_table(run: RunFiles) -> str:
    """Returns the measurements of the held-out loss, with standard errors and the loss in each part of the schedule."""
    rows = []
    for record in run.held_out:
        error, parts = record.get("held_out_error"), record.get("held_out_by_timestep") or []
        loss = fixed(record["held_out_loss"], 5) + (f" ± {error:.5f}" if error is not None else "")
        rows.append((record["step"], loss, *(fixed(value, 4) for value in parts)))
    parts = max((len(row) - 2 for row in rows), default=0)
    return table(("step", "loss", *(f"part {n + 1}" for n in range(parts))), rows) + (
        "<p>Part 1 of the noise schedule has the least noise.</p>" if parts else ""
    )


def health_table(run: RunFiles) -> str:
    """Returns brightness, saturation and motion of the validation videos by step, which health.py explains."""
    names = ("validation_brightness", "validation_saturation", MOTION, "validation_motion_ratio")
    measured = [record for record in run.records if MOTION in record]
    head = ("step", "brightness", "saturation", "motion", "motion / that of the training clips")
    return table(head, [(record["step"], *(record.get(name, "") for name in names)) for record in measured])


def cost_rows(run: RunFiles) -> list[tuple[str, str]]:
    """Returns what the run took, by name."""
    rows = [("plan", run.config["plan"])] if "plan" in run.config else []
    (_, seconds), (_, peaks) = column(run.records, "seconds"), column(run.records, "peak_gib")
    if len(seconds):
        rows.append(("seconds a step, median", f"{np.median(seconds):.3f}"))
        rows.append(("hours of all steps", f"{seconds.sum() / 3600:.2f}"))
    if len(peaks):
        rows.append(("peak memory on the GPU", f"{peaks.max():.2f} GiB"))
    rows += [(name, str(run.config[name])) for name in ("device", "ranks", "precision") if name in run.config]
    return rows


def clips_table(run: RunFiles) -> str:
    """Returns the training clips with their captions."""
    rows = list(run.captions.items())
    rest = plural(len(rows) - MAX_CLIPS, "more clip is", "more clips are")
    more = f"<p>{rest} in samples.json.</p>" if len(rows) > MAX_CLIPS else ""
    return table(("clip", "caption"), rows[:MAX_CLIPS]) + more
