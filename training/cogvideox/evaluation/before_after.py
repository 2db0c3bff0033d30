"""Draws contact_sheet.png, which shows what training changed in the validation videos.

Each validation prompt has a row: its video before training, its newest video, and a training clip.

``BeforeAfter.draw`` reads the videos from the validation folder, so a resumed run also shows videos from before the
interruption. The training clip is the one with the most similar caption, decoded by the VAE from its cached latents.
"""

import re
from collections.abc import Sequence
from functools import cached_property, partial, reduce
from pathlib import Path

import numpy as np
import torch

from cogvideox.data.cache import CachedSample, CacheError
from cogvideox.data.dataset import read_moments
from cogvideox.data.health import Health, health_of, mean_health
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels.decode import probe, read_frames
from cogvideox.evaluation.validation import Validator
from cogvideox.preparation.tensors import Tensors
from cogvideox.runtime.run import Run
from cogvideox.runtime.sheets import Panel, SheetRow, contact_sheet, pick_evenly

SHEET_NAME = "contact_sheet.png"
MAX_PROMPTS = 8
LANDSCAPE_FRAMES, PORTRAIT_FRAMES = 2, 3  # frames per video in landscape and portrait format


class BeforeAfter:
    """Draws the contact sheet of a run on the main process. Training clips are decoded once and kept in ``clips``."""

    def __init__(self, run: Run, tensors: Tensors, validator: Validator) -> None:
        self.run, self.tensors, self.validator = run, tensors, validator
        self.prompts = validator.prompts.texts[:MAX_PROMPTS]
        self.clips: dict[str, Panel] = {}
        self.clip_health: dict[str, Health] = {}

    @cached_property
    def nearest(self) -> list[CachedSample]:
        """Returns the training clip of each prompt."""
        return nearest_samples(self.prompts, self.tensors.index.samples)

    def draw(self, step: int) -> None:
        """Draws the sheet with the videos up to a step; does nothing without validation prompts."""
        rows = [SheetRow(prompt, self._panels(prompt_index, step)) for prompt_index, prompt in enumerate(self.prompts)]
        number = len(self.validator.prompts.texts)
        some = f", {MAX_PROMPTS} of {number} prompts" if number > MAX_PROMPTS else ""
        title = f"{self.run.output_dir.resolve().name}: before and after training{some}"
        if rows:
            contact_sheet(rows, self.run.output_dir / SHEET_NAME, title)

    def health_of_clips(self) -> Health | None:
        """Returns the means over the training clips on the sheet, or None if none could be decoded."""
        return mean_health(list(self.clip_health.values())) if self.clip_health else None

    def _panels(self, prompt_index: int, step: int) -> list[Panel]:
        """Returns the three panels of a prompt: before training, after it, and the training clip."""
        videos, sample = self.validator.videos(prompt_index), self.nearest[prompt_index]
        newest = max((made for made in videos if made <= step), default=0)
        if sample.id not in self.clips:
            self.clips[sample.id] = self._clip_panel(sample)
        before = video_panel("BEFORE: step 0", videos.get(0))
        after = video_panel(f"AFTER: step {newest}", videos[newest]) if newest else video_panel("AFTER", None)
        return [before, after, self.clips[sample.id]]

    def _clip_panel(self, sample: CachedSample) -> Panel:
        """Returns a panel with some decoded frames of a training clip, or with the reason why there are none."""
        label = "TRAINING CLIP, as the VAE sees it"
        try:
            moments = read_moments(self.tensors.cache, sample, 0, self.tensors.geometry)
        except CacheError:  # the training loop reports damaged tensors; the sheet only leaves them out
            return Panel(label, [], f"{sample.id} cannot be read")
        try:
            video_FHWC = self.validator.decode(moments)
        except torch.OutOfMemoryError:
            self.run.say(f"{SHEET_NAME}: out of memory, the training clip {sample.id} is left out; training continues")
            return Panel(label, [], f"{sample.id} does not fit into the memory")
        self.clip_health[sample.id] = health_of(video_FHWC)
        return frames_panel(label, video_FHWC[shown_frames(*video_FHWC.shape[:3])], sample.caption)


def nearest_samples(prompts: Sequence[str], samples: Sequence[CachedSample]) -> list[CachedSample]:
    """Returns, for each prompt, the sample whose caption is most similar; the first id wins a tie.

    Similarity is the number of shared words divided by the number of words in either text.

    Words that all captions contain, such as those of --id_token, are ignored.
    """
    common = reduce(set.intersection, (words_of(sample.caption) for sample in samples))

    def distance(wanted: set[str], sample: CachedSample) -> tuple[float, str]:
        found = words_of(sample.caption) - common
        return -len(wanted & found) / max(1, len(wanted | found)), sample.id

    return [min(samples, key=partial(distance, words_of(prompt) - common)) for prompt in prompts]


def words_of(text: str) -> set[str]:
    """Returns the words of a text in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def video_panel(label: str, path: Path | None) -> Panel:
    """Returns a panel with some frames of a video file, or with the reason why there are none."""
    if path is None:
        return Panel(label, [], "no video in the validation folder")
    try:
        info = probe(path)
        indices = shown_frames(info.num_frames, info.height, info.width)
        return frames_panel(label, read_frames(path, info, indices, info.height, info.width))
    except VideoError:
        return Panel(label, [], f"{path.name} cannot be read")


def shown_frames(num_frames: int, height: int, width: int) -> list[int]:
    """Returns the indices of the frames that a panel shows, evenly spread from the first to the last."""
    return list(pick_evenly(range(num_frames), LANDSCAPE_FRAMES if width >= height else PORTRAIT_FRAMES))


def frames_panel(label: str, frames_FHWC: np.ndarray, caption: str = "") -> Panel:
    """Returns a panel of frames: landscape frames in a column, portrait frames in a row, so that they fill it."""
    _, height, width, _ = frames_FHWC.shape
    return Panel(label, list(frames_FHWC), caption, stacked=width >= height)
