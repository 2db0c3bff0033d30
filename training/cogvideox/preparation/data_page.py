"""Writes report.html of a prepared folder: its clips with frames, captions and numbers, on one page like that of a run.

``DataPage`` compares the clips with each other. Odd ones come first on the page, and the console names some of them.
Numbers come from health.jsonl, which is written while clips are encoded, so a dry run has none. Of a large data set,
some clips are shown that are spread evenly over it, in addition to the odd ones.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path

from cogvideox.config.buckets import Bucket
from cogvideox.data.forms.samples import Sample
from cogvideox.data.health import LOOK_BITS, Health, alike, clip_oddities, usual_health
from cogvideox.data.records import ClipRecord
from cogvideox.data.used import BUCKET_COLUMNS, Records, Used
from cogvideox.errors import UsageError, one_line, plural
from cogvideox.files import REPORT_NAME, write_atomically
from cogvideox.preparation.captions import shortened
from cogvideox.preparation.causes import WORDS, causes_by_status
from cogvideox.preparation.pictures import Pictures, sheet_picks
from cogvideox.preparation.prepare import Preparation
from cogvideox.runtime.metrics import is_finite
from cogvideox.runtime.report import Sources, VideoGrid, page, picture, section, table
from cogvideox.runtime.run import command_line
from cogvideox.runtime.sheets import pick_evenly

LOOK = re.compile(f"[0-9a-f]{{{LOOK_BITS // 4}}}")
MAX_CLIPS = 200  # clips that the page shows, and again as many odd ones; each has a picture
MAX_DROPPED = 500  # clips that are listed for one kind of cause
PLOT_WIDTH, PLOT_HEIGHT, PLOT_EDGE = 760, 320, 60  # pixels of the plot, and of its left and lower edges
DECADES = 3  # the axis of motion begins at 10 ** -DECADES
PLOT_NOTE = (
    "<p>Motion is the mean change of a pixel from frame to frame. 1 is white, or a change from black to white. Each "
    "point is a clip, and links to it.</p>"
)
UNMEASURED = (
    "{} without brightness and motion, because these are measured when a clip is encoded. To measure clips that an "
    "older version encoded, prepare them into another folder."
)


@dataclass(frozen=True)
class Card:
    """Describes a clip in a bucket.

    Attributes:
        sample: The clip and its caption.
        bucket: The bucket.
        clip: How the clip is cut.
        held_out: Whether the clip is not trained on.
        health: Its brightness, saturation and motion, if they were measured.
        look: What it looks like (see ``look_of``), if that was measured.
        odd: What is odd about the clip.
    """

    sample: Sample
    bucket: Bucket
    clip: Used
    held_out: bool
    health: Health | None = None
    look: str = ""
    odd: list[str] = field(default_factory=list)


class DataPage:
    """The page about a data set."""

    def __init__(self, preparation: Preparation, records: Records, used: Mapping[Bucket, Sequence[Used]]) -> None:
        """Stores what the page shows.

        Args:
            preparation: The preparation.
            records: The record of every sample.
            used: The usable clips by bucket.
        """
        self.preparation, self.records, self.used = preparation, records, used
        self.pictures, self.sources = Pictures(preparation), Sources(preparation.folder)

    @cached_property
    def cards(self) -> list[Card]:
        """Returns all usable clips, in the order of the data set, each with what is odd about it; no repeats."""
        measured, trained = self._measured(), len(self.records) - self.preparation.num_validation
        pairs = sorted(
            ((clip, bucket) for bucket, clips in self.used.items() for clip in clips), key=lambda pair: pair[0].place
        )
        found: dict[tuple[object, ...], Card] = {}
        for clip, bucket in pairs:
            sample = self.preparation.samples[clip.place]
            card = Card(sample, bucket, clip, clip.place >= trained, *measured.get((clip.place, bucket), ()))
            found.setdefault((sample.clip, sample.caption, bucket), card)
        cards = list(found.values())
        find_odd(cards)
        return cards

    @cached_property
    def odd(self) -> list[Card]:
        """Returns the odd clips."""
        return [card for card in self.cards if card.odd]

    @cached_property
    def shown(self) -> list[Card]:
        """Returns the clips on the page: the first odd ones, then others that are evenly spread."""
        return [*self.odd[:MAX_CLIPS], *pick_evenly([card for card in self.cards if not card.odd], MAX_CLIPS)]

    def odd_lines(self) -> list[str]:
        """Returns a line for the console about odd clips, or none."""
        found = {card.sample.id: f"{card.sample.id}: {', '.join(card.odd)}" for card in self.odd}
        named = one_line(shortened(list(found.values()), separator="; "))
        return [f"{plural(len(found), 'clip looks', 'clips look')} odd: {named}"] if found else []

    def draw(self) -> dict[Bucket, Path]:
        """Draws the pictures of the page; returns the contact sheet of each bucket."""
        picks = sheet_picks(self.used)
        self.pictures.draw_strips([*(clip for some in picks.values() for clip in some), *(c.clip for c in self.shown)])
        return self.pictures.draw_sheets(picks)

    def write(
        self, rows: Sequence[Sequence[str]], sheets: Mapping[Bucket, Path], notes: Sequence[str], costs: Sequence[str]
    ) -> Path:
        """Writes the page.

        Args:
            rows: The rows of the table of buckets.
            sheets: The contact sheet of each bucket.
            notes: Lines about the data set; details of a line follow it and are indented.
            costs: Lines about what encoding will cost.

        Returns:
            The path of the page.
        """
        numbered = list(enumerate(self.shown))
        odd, usual = (numbered[: len(self.odd[:MAX_CLIPS])], numbered[len(self.odd[:MAX_CLIPS]) :])
        rest = len(self.cards) - len(numbered)
        hidden = plural(rest, "more clip is", "more clips are")
        more = f"<p>{hidden} not shown. Those that are shown are evenly spread.</p>" if rest else ""
        sections = [
            section("Clips that look odd", *(self._card(*item) for item in odd)),
            section("Clips that are not used", *self._dropped()),
            section("Notes", note_list(notes)),
            section("Buckets", table(BUCKET_COLUMNS, rows), *map(self._sheet, sheets, sheets.values())),
            section("Brightness and motion", self._plot(numbered), self._unmeasured()),
            section("Clips", TOOLS if usual else "", more, clip_list(self._card(*item) for item in usual)),
            section("Size and cost", table(("what", "value"), self._sizes(rows)), note_list(costs)),
            section("Command", f"<pre>{escape(command_line())}</pre>"),
        ]
        target = self.preparation.folder / REPORT_NAME
        title = f"{self.preparation.folder.resolve().name}: data set"
        write_atomically(target, page(title, self._summary(), sections, VideoGrid(self.sources)))
        return target

    def _measured(self) -> dict[tuple[int, Bucket], tuple[Health, str]]:
        """Returns the numbers and the look of each clip that was measured, by its place and bucket."""
        try:
            encoders = self.preparation.encoders
        except UsageError:  # the weights are not there, as a dry run allows, and the key of a tensor depends on them
            return {}
        clips = [(clip, bucket) for bucket, clips in self.used.items() for clip in clips]
        keys = {(c.place, bucket): encoders.video_key(self.records[c.place].content, c.variant) for c, bucket in clips}
        lines = self.preparation.health.read(set(keys.values()))
        found = {}
        for name, key in keys.items():
            line = lines.get(key, {})
            values = [line.get(number, math.nan) for number in Health._fields]
            look = line.get("look")
            if all(map(is_finite, values)):
                found[name] = Health(*values), look if isinstance(look, str) and LOOK.fullmatch(look) else ""
        return found

    def _summary(self) -> str:
        """Describes the data set in one line."""
        good = sum(record.usable for record in self.records)
        parts = [f"{good} of {plural(len(self.records), 'clip is', 'clips are')} used"]
        parts[0] += f" in {plural(len(self.used), 'bucket')}"
        if self.preparation.num_validation:
            parts.append(f"{self.preparation.num_validation} held out to measure the loss")
        if self.odd:
            parts.append(plural(len(self.odd), "clip looks odd", "clips look odd"))
        return "; ".join(parts)

    def _card(self, number: int, card: Card) -> str:
        """Returns the HTML of a clip: frames that link to the file, id, what is odd, caption, and numbers."""
        strip = picture(self.pictures.strip(card.clip), self.sources) or "no picture: it does not decode"
        data, numbers = "", ""
        if card.health:
            data = "".join(f' data-{name}="{value:.5f}"' for name, value in card.health._asdict().items())
            numbers = "".join(f" · {name} {value:.3f}" for name, value in card.health._asdict().items())
        source = card.clip.source
        length = f"{source.frames} frames, {source.fps:g} per second" if source.frames > 1 else "picture"
        facts = f"{card.bucket} from {source.width}x{source.height}, {length}, {source.codec}"
        odd = "".join(f'<span class="odd">{escape(text)}</span>' for text in card.odd)
        held_out = '<span class="tag">held out</span>' if card.held_out else ""
        caption = escape(card.sample.caption) or "<i>no caption</i>"
        return (
            f'<article id="clip-{number}"{data}><a href="{self.sources.of(Path(card.sample.video))}">{strip}</a>'
            f"<div><h3>{escape(card.sample.id)}</h3>{odd}{held_out}<p>{caption}</p>"
            f"<small>{escape(facts + numbers)}</small></div></article>"
        )

    def _sheet(self, bucket: Bucket, path: Path) -> str:
        """Returns a contact sheet that can be opened."""
        return f"<details><summary>Clips of {bucket}</summary>{picture(path, self.sources)}</details>"

    def _dropped(self) -> Iterator[str]:
        """Yields the clips that are not used, by kind of cause, with what helps."""
        pairs = zip(reversed(self.preparation.samples), reversed(self.records), strict=True)
        # An image that cannot be used is named itself. Scenes have one path, but a record each.
        names = {record.request: sample.id if record.path == sample.video else record.path for sample, record in pairs}
        for status, causes in causes_by_status(self.records).items():
            fixes = (cause.fix(self.preparation.data, self.preparation.geometry) for cause in causes)
            rows = [dropped_row(record, names[record.request]) for cause in causes for record in cause.records]
            yield f"<h3>{len(rows)} {WORDS[status]}</h3>"
            yield from (f"<p>{escape(fix)}</p>" for fix in fixes if fix is not None)
            yield table(("clip", "file", "reason"), rows[:MAX_DROPPED])
            if len(rows) > MAX_DROPPED:
                more = plural(len(rows) - MAX_DROPPED, "more clip is", "more clips are")
                yield f"<p>{more} in ledger.jsonl.</p>"

    def _unmeasured(self) -> str:
        """Says how many clips have no numbers, and why."""
        number = sum(card.health is None for card in self.cards)
        return f"<p>{UNMEASURED.format(plural(number, 'clip is', 'clips are'))}</p>" if number else ""

    def _sizes(self, rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
        """Returns numbers of clips, and the size of their tensors."""
        held_out = self.preparation.num_validation
        good = [record.usable for record in self.records]
        trained = good[: len(good) - held_out]
        sizes = [("clips to train on", str(sum(trained)))]
        sizes += [("clips to measure the loss on", str(sum(good) - sum(trained)))] if held_out else []
        return [*sizes, ("tensors of the clips", f"{sum(float(row[-1]) for row in rows):.1f} MiB")]

    def _plot(self, numbered: Sequence[tuple[int, Card]]) -> str:
        """Returns a plot of brightness and motion, in which every clip is a point that links to it."""
        points = [
            point(number, card.health, f"{card.sample.id}: {', '.join(card.odd) or 'usual'}", bool(card.odd))
            for number, card in numbered
            if card.health and card.bucket.frames > 1
        ]
        return plot(points) if points else ""


# -- what is odd -------------------------------------------------------------------------------------------------------


def find_odd(cards: Sequence[Card]) -> None:
    """Notes on each card what is odd about the clip: its numbers, or that another clip has or shows the same."""
    measured = [card.health for card in cards if card.health]
    moving = [card.health for card in cards if card.health and card.bucket.frames > 1]
    usual, usual_motion = usual_health(measured), usual_health(moving)
    if usual:
        usual = usual._replace(motion=usual_motion.motion if usual_motion else 0.0)
    first: dict[tuple[Bucket, frozenset[str]], Sample] = {}
    for card in cards:
        if card.health:
            card.odd.extend(clip_oddities(card.health, card.bucket.frames, usual))
        original = first.setdefault((card.bucket, card.clip.tensors), card.sample)
        if original.clip != card.sample.clip:
            card.odd.append(f"the same frames as {original.id}")
    for bucket in {card.bucket for card in cards}:
        find_alike([card for card in cards if card.bucket == bucket and card.look])


def find_alike(cards: Sequence[Card]) -> None:
    """Notes on each card of a bucket which earlier clip looks like the clip, unless they have the same frames."""
    for index, earlier in alike([card.look for card in cards]).items():
        card, other = cards[index], cards[earlier]
        if card.clip.tensors != other.clip.tensors:
            card.odd.append(f"looks like {other.sample.id}")


# -- parts of the page -------------------------------------------------------------------------------------------------

TOOLS = (
    '<p class="tools"><input id="filter" type="search" placeholder="words of a name or caption" aria-label="filter">'
    '<select id="sort" aria-label="order"><option value="">as listed</option>'
    '<option value="motion 1">least motion first</option><option value="motion -1">most motion first</option>'
    '<option value="brightness 1">darkest first</option><option value="brightness -1">brightest first</option>'
    '</select><output id="found"></output></p>'
)


def clip_list(cards: Iterable[str]) -> str:
    """Returns the list of clips that can be filtered and sorted, or nothing if it is empty."""
    items = "".join(cards)
    return f'<div id="clips">{items}</div>' if items else ""


def dropped_row(record: ClipRecord, name: str) -> tuple[str, str, str]:
    """Returns the row of a clip that is not used: its name, its size, and the reason."""
    source = record.source
    size = ""
    if source:
        size = f"{source.width}x{source.height}, {plural(source.frames, 'frame')}, {source.fps:g} per second"
    reason = one_line(record.reason.removeprefix(f"{record.path}: "))
    return name, size, reason


def note_list(lines: Sequence[str]) -> str:
    """Returns a list of notes, in which indented lines are details of the line above; nothing without notes."""
    items: list[tuple[str, list[str]]] = []
    for line in "\n".join(lines).splitlines():
        if line.startswith("  ") and items:
            items[-1][1].append(line.strip())
        else:
            items.append((line, []))
    return unordered(f"{escape(text)}{unordered(map(escape, details))}" for text, details in items)


def unordered(items: Iterable[str]) -> str:
    """Returns a list of HTML items, or nothing if there are none."""
    inner = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul>{inner}</ul>" if inner else ""


def point(number: int, health: Health, title: str, odd: bool) -> str:
    """Returns a point of the plot, which links to the clip of that number."""
    x, y = across(health.brightness), down(health.motion)
    kind = ' class="odd"' if odd else ""
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"{kind}><title>{escape(title)}</title></circle>'
    return f'<a href="#clip-{number}">{circle}</a>'


def across(brightness: float) -> float:
    """Returns where a brightness is on the plot, in pixels from the left."""
    return PLOT_EDGE + brightness * (PLOT_WIDTH - PLOT_EDGE - 10)


def down(motion: float) -> float:
    """Returns where a motion is on the plot, in pixels from the top; the scale is logarithmic."""
    share = 1 + math.log10(max(motion, 10**-DECADES)) / DECADES
    return 10 + (1 - share) * (PLOT_HEIGHT - PLOT_EDGE - 10)


def plot(points: Sequence[str]) -> str:
    """Returns the plot with its axes."""
    bottom, right = PLOT_HEIGHT - PLOT_EDGE, PLOT_WIDTH - 10
    lines, labels = [], []
    for power in range(-DECADES, 1):
        y = down(10.0**power)
        lines.append(f"M{PLOT_EDGE} {y:.1f}H{right}")
        labels.append(f'<text x="{PLOT_EDGE - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for tenth in range(0, 11, 2):
        x = across(tenth / 10)
        lines.append(f"M{x:.1f} 10V{bottom}")
        labels.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tenth / 10:g}</text>')
    labels.append(f'<text x="{(PLOT_EDGE + right) / 2}" y="{bottom + 40}" text-anchor="middle">brightness</text>')
    labels.append(f'<text transform="translate(14 {bottom / 2}) rotate(-90)" text-anchor="middle">motion</text>')
    size = f'viewBox="0 0 {PLOT_WIDTH} {PLOT_HEIGHT}" width="{PLOT_WIDTH}"'
    return f'<svg {size} role="img"><path d="{"".join(lines)}"/>{"".join(labels)}{"".join(points)}</svg>{PLOT_NOTE}'
