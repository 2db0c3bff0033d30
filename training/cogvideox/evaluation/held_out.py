"""The loss on clips that are never trained on, over a fixed grid of clips, timesteps and noise.

Every draw is a function of (seed, clip, place in the grid), so that only the weights change from one measurement to the
next. One forward pass a place, and the losses are gathered whole, so neither the batch size nor the number of ranks has
an effect. Clips are read from the cache; lines go to metrics.jsonl.
A line's "held_out_grid" is the fingerprint of all that decides the number but the weights: only lines of one grid are
compared. Its "held_out_by_timestep" has the mean loss in each of PLACES equal parts of the schedule of T timesteps: the
k-th number, from 0, is of timesteps k T / PLACES up to, not with, (k + 1) T / PLACES. The first has the least noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox import stopping
from cogvideox.data.cache import CachedSample, hash_of
from cogvideox.data.dataset import Batch, collate, draw_sample, read_image, read_moments, read_prompt, timestep_in
from cogvideox.evaluation.validation import evaluation, release_memory
from cogvideox.preparation.tensors import Tensors
from cogvideox.rng import uniform
from cogvideox.runtime.curves import BY_TIMESTEP, GRID, of_grid, read_records
from cogvideox.runtime.run import METRICS_NAME, Run, write_metrics

FINGERPRINT_DIGITS = 16
PLACES = 8  # timesteps of each clip, one from each eighth of the schedule
LossOf = Callable[[Batch], Tensor]  # a batch on the device -> the loss of each sample, (B,)


class HeldOut:
    """Measures the loss on the index's validation clips, if it has any. ``measure`` is called on all ranks.

    ``losses_of`` is the velocity's squared error on ``transformer``, whatever weights it is trained with.

    Raises:
        CacheError: a tensor of theirs is bad; the clips that a loss is compared on are not replaced.
    """

    def __init__(self, run: Run, tensors: Tensors, seed: int, transformer: Any, losses_of: LossOf) -> None:
        self.run, self.seed, self.transformer, self.losses_of = run, seed, transformer, losses_of
        self.cache, self.geometry = tensors.cache, tensors.geometry
        self.samples, self.image_variants = tensors.index.validation, tensors.index.image_variants
        for sample in self.samples:  # now, not at the first measurement after a resume
            self._read(sample)
        self.grid = self._fingerprint()

    def __bool__(self) -> bool:
        return bool(self.samples)

    def measure(self, step: int) -> None:
        """Measures the weights as they are after a step, unless metrics.jsonl has that already, and writes it there."""
        if not self.samples or self._measured(step):
            return
        names = [sample.clip for sample in self.samples]
        losses = self.losses()
        if losses is None:
            fix = "give --plan lean, or smaller clips in --validation_data_root"
            self.run.say(f"held-out loss after step {step}: out of memory, not measured; training goes on; {fix}")
            return
        mean, error = mean_and_error(losses, names)
        if self.run.is_main:
            record = {"step": step, "held_out_loss": mean, "held_out_error": error, GRID: self.grid}
            write_metrics(self.run, record | {BY_TIMESTEP: by_clip(losses, names).mean(dim=0).tolist()})
        number = len(set(names))
        clips = "1 clip" if number == 1 else f"+- {error:.5f}, {number} clips"
        self.run.say(f"held-out loss after step {step}: {mean:.5f} ({clips})")

    def losses(self) -> Tensor | None:
        """The loss of every clip at every place, (clips, PLACES), float64, the same on all ranks.

        None on all where one's memory does not suffice: a mean over other places would be another measure.
        """
        run = self.run
        sums = torch.zeros(len(self.samples) * PLACES + 1, dtype=torch.float64, device=run.device)
        with run.ranks.together():  # which waits longer than the sum does
            try:
                self._fill(sums)
            except torch.OutOfMemoryError:
                sums[-1] = 1.0
        if run.world > 1:
            dist.all_reduce(sums)  # each value is one rank's and zero elsewhere: the sum is exact
        if sums[-1] > 0:
            release_memory()
            return None
        return sums[:-1].view(-1, PLACES).cpu()

    def _fill(self, sums: Tensor) -> None:
        """This rank's share of the losses, each in its place."""
        run = self.run
        with evaluation(self.transformer):
            for number in range(run.ranks.process_index, len(sums) - 1, run.world):
                clip, place = divmod(number, PLACES)
                sums[number] = self.losses_of(self.draw(self.samples[clip], place).to(run.device))[0].double()
                stopping.unit("held-out loss")

    def draw(self, sample: CachedSample, place: int) -> Batch:
        """A clip at one place of the grid, as a batch of one: its timestep and noise are always the same."""
        draw = (self.seed, "held_out", sample.id, place)
        total = int(self.geometry.schedule["num_train_timesteps"])
        timestep = timestep_in(range(total), (place, PLACES), uniform(*draw, "timestep"))
        moments, prompt, image = self._read(sample, place)
        return collate([draw_sample(moments, prompt, timestep, self.geometry, draw, sample.id, image)])

    def _read(self, sample: CachedSample, place: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Moments and prompt, and those of the first frame, with another noise for each place."""
        moments = read_moments(self.cache, sample, 0, self.geometry)
        visit = place * len(sample.image_keys)  # of the first clip variant
        image = read_image(self.cache, sample, visit, self.image_variants, self.geometry)
        return moments, read_prompt(self.cache, sample.prompt_key, self.geometry), image

    def _fingerprint(self) -> str:
        """A hash of the clips with their tensors, the places, the draws, and what makes latents and noise of them.

        The order of the clips, and their names beyond their ids, have no effect on a loss.
        """
        clips = sorted([s.id, s.clip, s.video_keys[:1], s.prompt_key, *s.image_keys[:1]] for s in self.samples)
        decides = {"seed": self.seed, "places": PLACES, "clips": clips, "image_variants": self.image_variants}
        return hash_of(decides | {"geometry": asdict(self.geometry)})[:FINGERPRINT_DIGITS]

    def _measured(self, step: int) -> bool:
        """Whether metrics.jsonl has the line of a step on this grid; the main process looks for all."""
        records = read_records(self.run.output_dir / METRICS_NAME) if self.run.is_main else []
        there = any(record["step"] == step and "held_out_loss" in record for record in of_grid(records, self.grid))
        return bool(self.run.from_main(there))


def mean_and_error(losses: Tensor, clips: Sequence[str]) -> tuple[float, float]:
    """Mean of (samples, places) losses, and the standard error of the clips' means; NaN where there is one clip."""
    means = by_clip(losses, clips).mean(dim=1)
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return means.mean().item(), error


def by_clip(losses: Tensor, clips: Sequence[str]) -> Tensor:
    """(samples, places) losses as (clips, places). ``clips`` names the clip of each sample: one that is in several
    buckets counts once.
    """
    of_clip: dict[str, list[Tensor]] = {}
    for clip, row in zip(clips, losses, strict=True):
        of_clip.setdefault(clip, []).append(row)
    return torch.stack([torch.stack(rows).mean(dim=0) for rows in of_clip.values()])
