"""Measures the loss on clips that are never trained on, over a fixed grid of clips, timesteps and noise.

The schedule is split into TIMESTEP_PARTS equal parts, and each clip gets one timestep from every part. Timestep and
noise are a function of (seed, clip, part), so only the weights change between measurements. Each value of the grid is
one forward pass of one sample, so neither the batch size nor the number of ranks changes the result. Clips are read
from the cache, and ``HeldOut.measure`` appends a line to metrics.jsonl with these entries:

- "held_out_grid" is a fingerprint of everything that decides the loss except the weights. Only losses with the same
  fingerprint can be compared.
- "held_out_loss" is the mean over clips, and "held_out_error" its standard error.
- "held_out_by_timestep" is the mean loss in each part of the schedule. Of T timesteps, part k covers
  k T / TIMESTEP_PARTS <= t < (k + 1) T / TIMESTEP_PARTS; part 0 has the least noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvideox import stopping
from cogvideox.data.cache import CachedSample, hash_of
from cogvideox.data.dataset import Batch, collate, draw_sample, read_image, read_moments, read_prompt, timestep_in
from cogvideox.errors import plural
from cogvideox.evaluation.validation import evaluation_mode, release_memory
from cogvideox.preparation.tensors import Tensors
from cogvideox.rng import uniform
from cogvideox.runtime.metrics import BY_TIMESTEP, GRID, of_grid, read_records
from cogvideox.runtime.run import METRICS_NAME, Run, write_metrics

FINGERPRINT_DIGITS = 16
TIMESTEP_PARTS = 8
LossFunction = Callable[[Batch], Tensor]  # a batch on the device -> the loss of each sample, (B,)


class HeldOut:
    """Measures the loss on the validation clips of the index, if there are any. All ranks must call ``measure``.

    Args:
        run: The processes and the output folder.
        tensors: The prepared data with the validation clips.
        seed: Seed of timesteps and noise.
        transformer: The network.
        losses_of: Computes the squared error of the velocity of each sample, without training's loss weights.

    Raises:
        CacheError: A validation clip's tensor is damaged. Unlike training clips, validation clips are never replaced,
            because losses on different clips cannot be compared.
    """

    def __init__(self, run: Run, tensors: Tensors, seed: int, transformer: nn.Module, losses_of: LossFunction) -> None:
        self.run, self.seed, self.transformer, self.losses_of = run, seed, transformer, losses_of
        self.cache, self.geometry = tensors.cache, tensors.geometry
        self.samples, self.image_variants = tensors.index.validation, tensors.index.image_variants
        for sample in self.samples:
            self._read(sample)  # finds damaged tensors now rather than at the first measurement
        self.grid = self._fingerprint()

    def __bool__(self) -> bool:
        """Returns whether there are validation clips."""
        return bool(self.samples)

    def measure(self, step: int) -> None:
        """Measures the loss after a step and appends it to metrics.jsonl, unless it is there already."""
        if not self.samples or self._measured(step):
            return
        names = [sample.clip for sample in self.samples]
        losses = self.losses()
        if losses is None:
            fix = "give --plan lean, or smaller clips in --validation_data_root"
            self.run.say(f"held-out loss after step {step}: out of memory, not measured; training continues; {fix}")
            return
        mean, error = mean_and_error(losses, names)
        if self.run.is_main:
            record = {"step": step, "held_out_loss": mean, "held_out_error": error, GRID: self.grid}
            write_metrics(self.run, record | {BY_TIMESTEP: average_by_clip(losses, names).mean(dim=0).tolist()})
        number = len(set(names))
        clips = ("" if number == 1 else f"+- {error:.5f}, ") + plural(number, "clip")
        self.run.say(f"held-out loss after step {step}: {mean:.5f} ({clips})")

    def losses(self) -> Tensor | None:
        """Computes the loss of every sample in every part of the schedule.

        Returns:
            (samples, TIMESTEP_PARTS), float64, equal on all ranks. None on all ranks if memory does not suffice on one,
            because a mean over fewer values would not be comparable.
        """
        run = self.run
        sums = torch.zeros(len(self.samples) * TIMESTEP_PARTS + 1, dtype=torch.float64, device=run.device)
        with run.ranks.together():  # slow ranks may take longer than the timeout of all_reduce
            try:
                self._fill(sums)
            except torch.OutOfMemoryError:
                sums[-1] = 1.0
        if run.world > 1:
            dist.all_reduce(sums)  # exact: each value comes from one rank and is zero on the others
        if sums[-1] > 0:
            release_memory()
            return None
        return sums[:-1].view(-1, TIMESTEP_PARTS).cpu()

    def _fill(self, sums: Tensor) -> None:
        """Computes this rank's share of the losses, each at its index."""
        run = self.run
        with evaluation_mode(self.transformer):
            for number in range(run.ranks.process_index, len(sums) - 1, run.world):
                clip, part = divmod(number, TIMESTEP_PARTS)
                sums[number] = self.losses_of(self.draw(self.samples[clip], part).to(run.device))[0].double()
                stopping.unit("held-out loss")

    def draw(self, sample: CachedSample, part: int) -> Batch:
        """Returns a batch of one clip with its timestep and noise for one part of the schedule, always the same."""
        draw = (self.seed, "held_out", sample.id, part)
        total = int(self.geometry.schedule["num_train_timesteps"])
        timestep = timestep_in(range(total), (part, TIMESTEP_PARTS), uniform(*draw, "timestep"))
        moments, prompt, image = self._read(sample, part)
        return collate([draw_sample(moments, prompt, timestep, self.geometry, draw, sample.id, image)])

    def _read(self, sample: CachedSample, part: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Reads moments, prompt and first frame of a clip; the variant of the first frame depends on the part."""
        moments = read_moments(self.cache, sample, 0, self.geometry)
        visit = part * len(sample.image_keys)  # a multiple selects the first clip variant
        image = read_image(self.cache, sample, visit, self.image_variants, self.geometry)
        return moments, read_prompt(self.cache, sample.prompt_key, self.geometry), image

    def _fingerprint(self) -> str:
        """Returns a hash of everything that decides the loss except the weights.

        It covers the clips and their tensors, the seed, the grid and the geometry, but not the order of the clips.
        """
        clips = sorted([s.id, s.clip, s.video_keys[:1], s.prompt_key, *s.image_keys[:1]] for s in self.samples)
        decides = {"seed": self.seed, "places": TIMESTEP_PARTS, "clips": clips, "image_variants": self.image_variants}
        return hash_of(decides | {"geometry": asdict(self.geometry)})[:FINGERPRINT_DIGITS]

    def _measured(self, step: int) -> bool:
        """Returns whether metrics.jsonl has the loss of a step on this grid; the main process reads it for all."""
        records = read_records(self.run.output_dir / METRICS_NAME) if self.run.is_main else []
        there = any(record["step"] == step and "held_out_loss" in record for record in of_grid(records, self.grid))
        return bool(self.run.from_main(there))


def mean_and_error(losses: Tensor, clips: Sequence[str]) -> tuple[float, float]:
    """Returns the mean loss and the standard error of the clips' means, which is NaN for a single clip.

    Args:
        losses: (samples, TIMESTEP_PARTS).
        clips: The clip of each sample.
    """
    means = average_by_clip(losses, clips).mean(dim=1)
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return means.mean().item(), error


def average_by_clip(losses: Tensor, clips: Sequence[str]) -> Tensor:
    """Averages over the samples of each clip, which has one sample per bucket that it is used in.

    Args:
        losses: (samples, TIMESTEP_PARTS).
        clips: The clip of each sample.

    Returns:
        (clips, TIMESTEP_PARTS).
    """
    of_clip: dict[str, list[Tensor]] = {}
    for clip, row in zip(clips, losses, strict=True):
        of_clip.setdefault(clip, []).append(row)
    return torch.stack([torch.stack(rows).mean(dim=0) for rows in of_clip.values()])
