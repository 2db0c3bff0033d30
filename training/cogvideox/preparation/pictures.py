"""Draws pictures of the clips of a data set as they are trained on: a strip for a clip, a contact sheet for a bucket.

The name of a picture contains the hash of what it shows, so only what has changed is drawn again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from cogvideox.config.buckets import Bucket
from cogvideox.data.cache import STRIPS_FOLDER, hash_of
from cogvideox.data.forms.folders import PREVIEW_FOLDER
from cogvideox.data.records import Variant
from cogvideox.data.strips import draw_strip
from cogvideox.data.used import Used
from cogvideox.errors import plural
from cogvideox.files import write_atomically
from cogvideox.preparation.prepare import Preparation
from cogvideox.runtime.sheets import Panel, SheetRow, contact_sheet, pick_evenly

SHEET_CLIPS, SHEET_FRAMES = 8, 4  # clips, and frames per clip, in the contact sheet of one bucket
SHEETS_CLIPS = 64  # clips in all contact sheets together, if there are many buckets


@dataclass(frozen=True)
class Pictures:
    """Draws the pictures of a preparation into its folder."""

    preparation: Preparation

    @property
    def folder(self) -> Path:
        """Folder of the pictures."""
        return self.preparation.folder / PREVIEW_FOLDER

    def strip(self, clip: Used) -> Path:
        """Returns the path of the strip of a clip; the file exists if it was drawn."""
        sample = self.preparation.samples[clip.place]
        name = hash_of([self.preparation.requests[sample.clip], shown(clip).to_json()])[:16]
        return self.folder / STRIPS_FOLDER / f"{name}.jpg"

    def draw_strips(self, clips: Iterable[Used]) -> None:
        """Draws the strips of some clips, and removes those of all other clips. Clips that do not decode have none."""
        wanted = {self.strip(clip): clip for clip in clips}
        for old in set((self.folder / STRIPS_FOLDER).glob("*.jpg")) - set(wanted):
            old.unlink(missing_ok=True)
        todo = {path: clip for path, clip in wanted.items() if not path.is_file()}
        videos = {path: self.preparation.samples[clip.place].video for path, clip in todo.items()}
        jobs = ((path, (draw_strip, videos[path], shown(clip))) for path, clip in todo.items())
        for path, picture in self.preparation.in_workers(jobs, len(todo), "drawing"):
            if isinstance(picture, bytes):  # else encoding will say what is wrong with it
                write_atomically(path, picture)

    def draw_sheets(self, picks: Mapping[Bucket, Sequence[Used]]) -> dict[Bucket, Path]:
        """Draws a contact sheet of the picked clips of each bucket from their strips; returns the sheets that exist."""
        sheets = {bucket: self.folder / f"{bucket}-{self._digest(some)}.png" for bucket, some in picks.items()}
        for bucket, path in sheets.items():
            for old in set(self.folder.glob(f"{bucket}-????????.png")) - {path}:
                old.unlink(missing_ok=True)
            rows = [] if path.is_file() else self._rows(picks[bucket])
            if rows:
                contact_sheet(
                    rows, path, f"{bucket}: first to last frame of {plural(len(rows), 'clip')}, as trained on"
                )
        return {bucket: path for bucket, path in sheets.items() if path.is_file()}

    def _rows(self, clips: Sequence[Used]) -> list[SheetRow]:
        """Returns the rows of a contact sheet: the clips that have a strip, each with its caption."""
        rows = []
        for clip in clips:
            sample, strip = self.preparation.samples[clip.place], self.strip(clip)
            if strip.is_file():
                rows.append(SheetRow(f"{sample.id}: {sample.caption}", [Panel("", [np.asarray(Image.open(strip))])]))
        return rows

    def _digest(self, clips: Sequence[Used]) -> str:
        """Returns a short hash of what a contact sheet shows."""
        samples = ((self.preparation.samples[clip.place], clip) for clip in clips)
        return hash_of([[sample.id, sample.caption, self.strip(clip).stem] for sample, clip in samples])[:8]


def sheet_picks(used: Mapping[Bucket, Sequence[Used]]) -> dict[Bucket, tuple[Used, ...]]:
    """Returns the clips on the contact sheet of each bucket."""
    number = max(1, min(SHEET_CLIPS, SHEETS_CLIPS // max(1, len(used))))
    return {bucket: pick_evenly(clips, number) for bucket, clips in used.items()}


def shown(clip: Used) -> Variant:
    """Returns the variant with only the frames that are shown, evenly spread from the first to the last."""
    return replace(clip.variant, indices=pick_evenly(clip.variant.indices, SHEET_FRAMES))
