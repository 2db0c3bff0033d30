"""Renders videos of the validation prompts with the current weights.

``embed_prompts`` embeds the prompts before the first step, so T5 is never loaded during training. ``Validator`` puts
the transformer that is being trained into the stock diffusers pipeline, samples the videos, and splits them over the
ranks. Sampling leaves gradients, modes and random states of training unchanged. The same VAE also decodes training
clips for the contact sheet.
"""

import gc
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogvideox import stopping
from cogvideox.config.options import TrainOptions
from cogvideox.config.prompts import prompts_of
from cogvideox.data.cache import TensorCache
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.data.sampler import Order
from cogvideox.errors import first_line
from cogvideox.files import write_atomically
from cogvideox.model import models
from cogvideox.model.vae_decoder import PUBLISHED, Decoder, Tile, decoding_attempts
from cogvideox.preparation.captions import prompt_notes
from cogvideox.preparation.encoding import encode_captions, missing_captions
from cogvideox.preparation.tensors import Tensors
from cogvideox.progress import ProgressBar
from cogvideox.runtime.metrics import MOTION, keep_records
from cogvideox.runtime.resume import EARLIER, as_written_now
from cogvideox.runtime.run import METRICS_NAME, Run, with_peaks

FOLDER, SETTINGS_NAME = "validation", "settings.json"
# The flags that decide what a video of a prompt shows. Others decide only which videos are made, and when.
DECIDING_FLAGS = (
    *("negative_prompt", "num_inference_steps", "guidance_scale", "use_dynamic_cfg"),
    *("height", "width", "validation_frames", "enable_tiling"),
)


@dataclass(frozen=True)
class Prompts:
    """Holds the validation prompts and their embeddings.

    Attributes:
        texts: The prompts.
        embeds_BLD: The embedding of each prompt, (1, L, D), in the compute type.
        negative_BLD: The embedding of the negative prompt; None without prompts.
        images: The first frame of each prompt, for image-to-video.
    """

    texts: list[str]
    embeds_BLD: list[Tensor]
    negative_BLD: Tensor | None
    images: Sequence[Path] = ()


def embed_prompts(run: Run, options: TrainOptions, tensors: Tensors, images: Sequence[Path]) -> Prompts:
    """Embeds the validation prompts, one at a time as a pipeline does.

    The embeddings are cached in the output folder, so a resumed run does not load T5. T5 is freed before this returns.
    """
    texts = prompts_of(options.validation)
    if not texts:
        return Prompts([], [], None)
    wanted = [*texts, options.validation.negative_prompt]
    cache = TensorCache(run.output_dir / FOLDER)
    if run.is_main:
        missing = missing_captions(cache, tensors.encoders, wanted)
        for line in prompt_notes(models.load_tokenizer(options.model), missing) if missing else []:
            run.say(line)
        encode_captions(
            cache, options.model, tensors.encoders, missing, len(missing), 1, run.ranks, options.encode.t5_on
        )
    run.barrier()
    keys = [tensors.encoders.prompt_key(text) for text in wanted]
    *embeds, negative = (cache.read(key)["prompt_LD"].unsqueeze(0).to(run.dtype) for key in keys)
    return Prompts(texts, embeds, negative, images)


@contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Disables gradients and sets evaluation mode within a block, then restores the mode of each submodule."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def release_memory() -> None:
    """Gives unreferenced memory back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def to_uint8_frames(video_BFCHW: Tensor) -> Tensor:
    """Converts the output of a pipeline to frames for a video file.

    Args:
        video_BFCHW: (1, F, 3, H, W), from 0 to 1.

    Returns:
        (F, H, W, 3), uint8, on the CPU. Values that are not finite become black.
    """
    video_BFCHW = video_BFCHW.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return (video_BFCHW[0].permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu()


def settings_of_all(settings: dict[str, Any], allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the settings of videos that do not belong to one prompt, without the allowed entries of the recipe."""
    validation, recipe = settings.get("validation", {}), settings.get("recipe", {})
    return {
        "validation": {name: value for name, value in validation.items() if name != "images"},
        "recipe": {name: value for name, value in recipe.items() if name not in allowed},
        "total_steps": settings.get("total_steps"),
    }


def settings_of_prompts(settings: dict[str, Any]) -> dict[int, tuple[str, str | None]]:
    """Returns each prompt, and the hash of its image for image-to-video, by the number in the names of its videos."""
    images = settings.get("validation", {}).get("images", [])
    return dict(enumerate(zip_longest(settings.get("prompts", []), images)))


def interrupt_after_step(
    _pipeline: object, _step: int, _timestep: object, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gives a stop signal the chance to end the run after a denoising step. The tensors pass through unchanged."""
    stopping.unit("denoising step")
    return tensors


class Validator:
    """Renders the validation videos of a run, and knows which of them exist. All ranks must call ``render``."""

    def __init__(
        self,
        run: Run,
        options: TrainOptions,
        pipeline_name: str,
        transformer: nn.Module,
        prompts: Prompts,
        tensors: Tensors,
        order: Order,
    ) -> None:
        self.run, self.options, self.flags = run, options, options.validation
        self.transformer, self.prompts, self.order = transformer, prompts, order
        self.fps = self.flags.validation_fps or tensors.index.fps
        self.size_multiple = tensors.geometry.size_multiple
        self.pipeline = self._make_pipeline(pipeline_name) if prompts.texts else None
        self.sampling: dict[str, Any] = {
            "height": self.flags.height,
            "width": self.flags.width,
            "num_frames": self.flags.validation_frames,
            "num_inference_steps": self.flags.num_inference_steps,
            "guidance_scale": self.flags.guidance_scale,
            "use_dynamic_cfg": self.flags.use_dynamic_cfg,
            "max_sequence_length": tensors.geometry.max_text_seq_length,
        }

    def _make_pipeline(self, name: str) -> Any:
        """Returns the stock pipeline with the transformer in training, a VAE on the CPU, and no T5."""
        import diffusers

        vae = models.load_vae(self.options.model, self.run.dtype)
        if self.flags.enable_slicing:
            vae.enable_slicing()
        Decoder(vae, self.run.say, tiled=self.flags.enable_tiling)
        scheduler = models.load_scheduler(self.options.model)
        pipeline = getattr(diffusers, name)(
            tokenizer=None, text_encoder=None, vae=vae, transformer=self.transformer, scheduler=scheduler
        )
        pipeline.progress_bar = partial(
            ProgressBar, desc="validation", unit="step", leave=False, disable=not self.run.is_main
        )
        return pipeline

    @property
    def whole_fps(self) -> int:
        """Returns the frame rate for programs that write whole numbers of frames per second only."""
        return max(1, round(self.fps))

    @property
    def tiles(self) -> list[Tile | None]:
        """Returns the ways of decoding that are left to try: None for complete frames, then tile sizes."""
        if self.pipeline:
            return list(self.pipeline.vae.decode.attempts)
        return decoding_attempts(*PUBLISHED, tiled=self.flags.enable_tiling)

    def set_aside_stale(self, first_step: int, total_steps: int, recipe: Mapping[str, object]) -> None:
        """Moves outdated videos into a folder older-N, so that they are rendered and measured again.

        Args:
            first_step: The step from which the run continues. Later videos are outdated if the number of steps, and
                thus the learning rate schedule, has changed, and if their steps are repeated.
            total_steps: Number of optimizer steps in the run.
            recipe: The settings that decide the result. All videos made with other settings, or with other values of
                ``DECIDING_FLAGS``, are outdated, except for settings in --allow_changed. So are those of another prompt
                or image.
        """
        folder = self.run.output_dir / FOLDER
        images = [hashlib.sha256(image.read_bytes()).hexdigest() for image in self.prompts.images]
        decide = {name: getattr(self.flags, name) for name in DECIDING_FLAGS}
        flags = {**decide, "seed": self.options.data.seed, "fps": self.fps, "images": images}
        current = {"validation": flags, "prompts": self.prompts.texts, "recipe": recipe, "total_steps": total_steps}
        settings = json.loads(json.dumps(current))
        path = folder / SETTINGS_NAME
        if self.run.is_main and self.prompts.texts:
            previous = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            previous["recipe"] = as_written_now(previous.get("recipe", {}), settings["recipe"])
            # Earlier versions wrote all flags of validation.
            previous["validation"] = {n: v for n, v in previous.get("validation", {}).items() if n in flags}
            allowed = (*self.options.train.allow_changed, EARLIER)
            extended = {**previous, "total_steps": total_steps}
            same_recipe = settings_of_all(extended, allowed) == settings_of_all(settings, allowed)
            repeats_none = settings_of_all(previous) == settings_of_all(settings) or first_step == total_steps
            last_good = (math.inf if repeats_none else first_step) if same_recipe else -1
            then, now = settings_of_prompts(previous), settings_of_prompts(settings)
            stale = [
                video
                for video in folder.glob("step-*_prompt-*.mp4")
                if self.step_of(video) > last_good or then.get(self.prompt_of(video)) != now.get(self.prompt_of(video))
            ]
            # Their numbers go first. If the process is killed before the videos are moved, the next run moves them.
            # The first step gets videos of new prompts, too.
            if steps := {self.step_of(video) for video in stale} | ({first_step} if then != now else set()):
                metrics = self.run.output_dir / METRICS_NAME
                keep_records(metrics, lambda record: MOTION not in record or record["step"] not in steps)
            older = folder / f"older-{len(list(folder.glob('older-*')))}"
            for video in stale:
                older.mkdir(exist_ok=True)
                os.rename(video, older / video.name)
            # The settings are written last. If the process is killed before, the next run sees the old settings and
            # moves the remaining videos.
            write_atomically(path, json.dumps(settings, indent=1, ensure_ascii=False).encode())
        self.run.barrier()

    def due(self, step: int) -> bool:
        """Returns whether the flags ask for validation after this optimizer step."""
        if self.flags.validation_steps:
            return step > 0 and step % self.flags.validation_steps == 0
        if self.flags.validation_epochs:
            # A step may begin in one epoch and end in the next, so this tests whether an epoch ended within it.
            every = self.flags.validation_epochs
            return step > 0 and self.order.epoch_of(step) // every > self.order.epoch_of(step - 1) // every
        return False

    def render(self, step: int) -> list[Path]:
        """Renders the missing videos of a step.

        Args:
            step: Number of finished optimizer steps.

        Returns:
            The paths of all videos of the step, except those for which memory did not suffice.
        """
        jobs = [(p, k) for p in range(len(self.prompts.texts)) for k in range(self.flags.num_validation_videos)]
        paths = [self.path(step, p, k) for p, k in jobs]
        share = slice(self.run.ranks.process_index, None, self.run.world)
        todo = [(job, path) for job, path in list(zip(jobs, paths, strict=True))[share] if not path.exists()]
        with self.run.ranks.together():
            skipped, not_finite = self._make(todo) if todo else ([], [])
        skipped = self.run.ranks.gather(skipped)
        if not_finite := self.run.ranks.gather(not_finite):
            self.run.say(f"validation after step {step}: NaN or infinite values in {', '.join(not_finite)}")
        if skipped:
            names = ", ".join(path.name for path, _ in skipped)
            fix = "give smaller --height, --width or --validation_frames, --enable_tiling, or --plan lean"
            self.run.say(
                f"validation after step {step}: out of memory ({skipped[0][1]}); training continues without these "
                f"videos: {names}; to render them, {fix}"
            )
        missing = {path for path, _ in skipped}
        made = [path for path in paths if path not in missing]
        if made:
            self.run.say(with_peaks(f"validation after step {step}: {made[0].parent}/step-{step:06d}_*.mp4"))
        return made

    def _make(self, todo: Sequence[tuple[tuple[int, int], Path]]) -> tuple[list[tuple[Path, str]], list[str]]:
        """Renders this rank's videos until one does not fit into memory.

        Later videos are not tried, because they need as much memory and would take as long to fail.

        Args:
            todo: The missing videos, as pairs ((index of the prompt, number of the video), path).

        Returns:
            Pairs (path, reason) of the videos that were not rendered, and the names of those with NaN or infinite
            values.
        """
        left, not_finite, reason = list(todo), [], ""
        try:
            with evaluation_mode(self.transformer), self._vae_on_device():
                while left:
                    job, path = left[0]
                    if not self._write_sample(path, *job):
                        not_finite.append(path.name)
                    del left[0]
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        if left:
            # Memory is released after the except clause, because the traceback of the error keeps the tensors of the
            # failed call alive.
            release_memory()
        return [(path, reason) for _, path in left], not_finite

    def _write_sample(self, path: Path, prompt: int, number: int) -> bool:
        """Renders one video, whose tensor is freed before the next one; returns whether all its values are finite."""
        video_BFCHW = self.sample(prompt, number)
        write_video(path, to_uint8_frames(video_BFCHW).numpy(), self.fps)
        return bool(torch.isfinite(video_BFCHW).all())

    def path(self, step: int, prompt: int, video: int) -> Path:
        """Returns the path of a video, whose name contains step, index and first words of the prompt, and number."""
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.prompts.texts[prompt]).strip("-")[:40].rstrip("-")
        return self.run.output_dir / FOLDER / f"step-{step:06d}_prompt-{prompt}_{words}_{video}.mp4"

    def sample(self, prompt: int, number: int) -> Tensor:
        """Samples one video with the current weights. The noise depends only on the seed and the number of the video.

        Returns:
            (1, F, 3, H, W), from 0 to 1.
        """
        generator = torch.Generator().manual_seed(self.options.data.seed + number)
        assert self.pipeline is not None
        assert self.prompts.negative_BLD is not None
        video_BFCHW: Tensor = self.pipeline(
            prompt_embeds=self.prompts.embeds_BLD[prompt].to(self.run.device),
            negative_prompt_embeds=self.prompts.negative_BLD.to(self.run.device),
            **self._image(prompt),
            **self.sampling,
            generator=generator,
            output_type="pt",
            callback_on_step_end=interrupt_after_step,
        ).frames
        return video_BFCHW

    def videos(self, prompt: int) -> dict[int, Path]:
        """Returns the paths of the first video of a prompt, by the step after which each was rendered."""
        first = self.path(0, prompt, 0)
        found = first.parent.glob(f"step-*_{first.name.partition('_')[2]}")
        return {self.step_of(path): path for path in found}

    @staticmethod
    def step_of(video: Path) -> int:
        """Returns the step in the name of a video."""
        return int(video.name.split("_")[0].removeprefix("step-"))

    @staticmethod
    def prompt_of(video: Path) -> int:
        """Returns the index of the prompt in the name of a video."""
        return int(video.name.split("_")[1].removeprefix("prompt-"))

    @torch.no_grad()
    def decode(self, moments_CFHW: Tensor) -> np.ndarray:
        """Decodes a training clip from the mean of its posterior.

        A clip that is larger than the validation videos is decoded in tiles, so that it does not need more memory than
        they do.

        Args:
            moments_CFHW: Mean and log variance, (2C, F, H, W), unscaled as in the cache.

        Returns:
            The clip, uint8 (F, H, W, 3).
        """
        assert self.pipeline is not None
        mean_FCHW = moments_CFHW.chunk(2)[0].transpose(0, 1).float()
        latents_BFCHW = (self.pipeline.vae_scaling_factor_image * mean_FCHW).unsqueeze(0)
        pixels = mean_FCHW[0, 0].numel() * self.pipeline.vae_scale_factor_spatial**2
        larger = pixels > self.sampling["height"] * self.sampling["width"]
        with self._vae_on_device(), self.pipeline.vae.decode.in_tiles() if larger else nullcontext():
            video_BCFHW = self.pipeline.decode_latents(latents_BFCHW.to(self.run.device, self.run.dtype))
            return to_uint8_frames(
                self.pipeline.video_processor.postprocess_video(video_BCFHW, output_type="pt")
            ).numpy()

    def _image(self, prompt: int) -> dict[str, Any]:
        """Returns the pipeline's argument for the first frame of a prompt, or no argument for text-to-video."""
        if not self.prompts.images:
            return {}
        from diffusers.utils import load_image

        return {"image": load_image(str(self.prompts.images[prompt]))}

    @contextmanager
    def _vae_on_device(self) -> Iterator[None]:
        """Keeps the VAE on the device only within a block, because training needs the memory."""
        assert self.pipeline is not None
        vae = self.pipeline.vae
        try:
            vae.to(self.run.device)
            yield
        finally:
            vae.to("cpu")
            torch.cuda.empty_cache()
