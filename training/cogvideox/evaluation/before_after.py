"""The run's contact sheet: each validation prompt before training, now, and a clip of what it should come to look like.

Videos of the validation folder, and the latents of the training clip with the nearest caption -> contact_sheet.png.
Videos are read back from their files, so a resumed run shows what the whole run made.
"""

import re
from collections.abc import Sequence
from functools import cached_property, partial, reduce
from pathlib import Path

import numpy as np
import torch

from cogvideox.data.cache import CachedSample, CacheError
from cogvideox.data.dataset import read_moments
from cogvideox.data.media.decode import probe, read_frames
from cogvideox.data.media.faults import VideoError
from cogvideox.evaluation.validation import Validator
from cogvideox.preparation.tensors import Tensors
from cogvideox.runtime.run import Run
from cogvideox.runtime.sheets import Panel, Row, contact_sheet, spread

SHEET_NAME = "contact_sheet.png"
MAX_PROMPTS = 8
WIDE_FRAMES, HIGH_FRAMES = 2, 3  # of a video


class BeforeAfter:
    """Draws the sheet of a run, on the main process; ``clips`` holds the panels of training clips, decoded once."""

    def __init__(self, run: Run, tensors: Tensors, validator: Validator) -> None:
        self.run, self.tensors, self.validator = run, tensors, validator
        self.prompts = validator.prompts.texts[:MAX_PROMPTS]
        self.clips: dict[str, Panel] = {}

    @cached_property
    def nearest(self) -> list[CachedSample]:
        """The training clip of each prompt."""
        return nearest_samples(self.prompts, self.tensors.index.samples)

    def draw(self, step: int) -> None:
        """The sheet as of a step; a run without validation prompts has none."""
        rows = [Row(prompt, self._panels(place, step)) for place, prompt in enumerate(self.prompts)]
        number = len(self.validator.prompts.texts)
        some = f", {MAX_PROMPTS} of {number} prompts" if number > MAX_PROMPTS else ""
        title = f"{self.run.output_dir.resolve().name}: before and after training{some}"
        if rows:
            contact_sheet(rows, self.run.output_dir / SHEET_NAME, title)

    def _panels(self, place: int, step: int) -> list[Panel]:
        """Before, after, and the training clip, for the prompt in this place."""
        videos, sample = self.validator.videos(place), self.nearest[place]
        newest = max((made for made in videos if made <= step), default=0)
        if sample.id not in self.clips:
            self.clips[sample.id] = self._clip_panel(sample)
        before = video_panel("BEFORE: step 0", videos.get(0))
        after = video_panel(f"AFTER: step {newest}", videos[newest]) if newest else video_panel("AFTER", None)
        return [before, after, self.clips[sample.id]]

    def _clip_panel(self, sample: CachedSample) -> Panel:
        label = "TRAINING CLIP, as the VAE sees it"
        try:
            moments = read_moments(self.tensors.cache, sample, 0, self.tensors.geometry)
        except CacheError:  # what it means for training is not this picture's to say
            return Panel(label, [], f"{sample.id} cannot be read")
        try:
            video_FHWC = self.validator.decode(moments)
        except torch.OutOfMemoryError:
            self.run.say(f"{SHEET_NAME}: out of memory, the training clip {sample.id} is left out and training goes on")
            return Panel(label, [], f"{sample.id} does not fit into the memory")
        return frames_panel(label, video_FHWC[shown(*video_FHWC.shape[:3])], sample.caption)


def nearest_samples(prompts: Sequence[str], samples: Sequence[CachedSample]) -> list[CachedSample]:
    """For each prompt the sample whose caption shares most of its words; among equals the one with the first id.

    Words that all captions have, as the id token, count for nothing.
    """
    common = reduce(set.intersection, (words_of(sample.caption) for sample in samples))

    def distance(wanted: set[str], sample: CachedSample) -> tuple[float, str]:
        found = words_of(sample.caption) - common
        return -len(wanted & found) / max(1, len(wanted | found)), sample.id

    return [min(samples, key=partial(distance, words_of(prompt) - common)) for prompt in prompts]


def words_of(text: str) -> set[str]:
    """The words of a text, in small letters."""
    return set(re.findall(r"\w+", text.lower()))


def video_panel(label: str, path: Path | None) -> Panel:
    """Some frames of a video file, or why there are none."""
    if path is None:
        return Panel(label, [], "no video in the validation folder")
    try:
        info = probe(path)
        indices = shown(info.num_frames, info.height, info.width)
        return frames_panel(label, read_frames(path, info, indices, info.height, info.width))
    except VideoError:
        return Panel(label, [], f"{path.name} cannot be read")


def shown(num_frames: int, height: int, width: int) -> list[int]:
    """The frames of a video that a panel has room for, from the first to the last."""
    return list(spread(range(num_frames), WIDE_FRAMES if width >= height else HIGH_FRAMES))


def frames_panel(label: str, frames_FHWC: np.ndarray, caption: str = "") -> Panel:
    """Wide frames under each other and high ones beside each other, so that they fill the panel."""
    _, height, width, _ = frames_FHWC.shape
    return Panel(label, list(frames_FHWC), caption, stacked=width >= height)
