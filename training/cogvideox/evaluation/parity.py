"""Checks before the first step that training and the diffusers pipeline give the transformer the same inputs.

``check_parity`` lets the stock pipeline take one sampling step with the run's transformer and scheduler, and compares
its call of the transformer with that of training. No network runs: calls of the transformer are recorded on both sides,
and a stand-in replaces the VAE.

These are compared for every bucket:

- the arguments of the call: latents and padding, image latents and their scale, embeddings, timestep, offset and rotary
  tables, all with their types. Clips and images are sampled from the same moments on both sides, by training's code
  and by diffusers' own distribution;
- the latents that the pipeline decodes if the transformer returns its training target: they must be the clip;
- the training loss of a transformer that returns the scheduler's velocity: it must be 0.

All buckets are compared in fp32, and one also in the compute type of the run. Shapes are as in data/dataset.py; P
counts patches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.options import TrainOptions, ignores_positions
from cogvideox.data.dataset import Batch, collate, draw_sample, sample_posterior, standard_normal
from cogvideox.errors import plural
from cogvideox.model import encode, models
from cogvideox.model.diffusion import NoiseSchedule
from cogvideox.model.tasks import ImageToVideo, Task, image_scale, losses_of
from cogvideox.preparation.tensors import Tensors
from cogvideox.runtime.run import Run

# Largest difference between two inputs: absolute for numbers up to 1, relative for larger ones. Rounding in fp32 is far
# below it, and a different formula is far above it.
TOLERANCE = 1e-4
# Arguments of the transformer other than the latents.
CONDITIONS = ("encoder_hidden_states", "timestep", "ofs", "image_rotary_emb")
# Names under which draw_sample draws the noise of each posterior.
PURPOSES = {"clip": "posterior", "image": "image posterior"}
Answer = Callable[[dict[str, Any]], Tensor]  # the arguments of a call of the transformer -> its output


class ParityError(RuntimeError):
    """Reports that training would give the transformer other inputs than inference does."""


def check_parity(run: Run, options: TrainOptions, tensors: Tensors, task: Task, transformer: nn.Module) -> None:
    """Compares training with the pipeline for all buckets of a run.

    Raises:
        ParityError: They differ; the message says in what, and by how much.
    """
    geometry, index = tensors.geometry, tensors.index
    exact = type(task)(options, geometry, run.device, torch.float32)  # in bf16, rounding would hide differences
    schedule = NoiseSchedule.from_config(geometry.schedule).to(run.device)
    pipeline = stock_pipeline(options.model, task.pipeline, transformer)
    check_schedule(schedule, pipeline.scheduler)
    check_posterior()
    buckets = sorted({sample.bucket for sample in (*index.samples, *index.validation)})
    for bucket in buckets:
        check_bucket(exact, pipeline, schedule, geometry, bucket)
        check_loss(exact, pipeline, schedule, geometry, bucket)
        if geometry.learned_positions:
            check_positions(transformer, geometry, bucket, ignores_positions(options))
    check_bucket(task, pipeline, schedule, geometry, buckets[0])
    check_loss(task, pipeline, schedule, geometry, buckets[0])
    run.say(f"checked on {plural(len(buckets), 'bucket')}: the transformer gets the same inputs as in {task.pipeline}")
    if isinstance(task, ImageToVideo) and relative_image_scale(task, geometry) != 1.0:
        usual = image_scale(geometry)
        run.say(f"but image latents are multiplied by {task.scale:.4g}, as asked, and by {usual:.4g} in the pipeline")


# -- the pipeline ------------------------------------------------------------------------------------------------------


class StandInVae:
    """Replaces the VAE. It records what is encoded and decoded, and returns ``image_BCFHW`` for every image."""

    def __init__(self, config: object) -> None:
        self.config = config
        self.image_BCFHW = self.pixels_BCFHW = self.decoded_BCFHW = torch.empty(0)

    def encode(self, pixels_BCFHW: Tensor) -> SimpleNamespace:
        """Records the pixels, and returns a posterior that can only be sampled."""
        self.pixels_BCFHW = pixels_BCFHW
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda _: self.image_BCFHW))

    def decode(self, latents_BCFHW: Tensor) -> SimpleNamespace:
        """Records the latents, and returns a video of one black pixel."""
        self.decoded_BCFHW = latents_BCFHW
        return SimpleNamespace(sample=latents_BCFHW.new_zeros(1, 3, 1, 1, 1))


def stock_pipeline(model: ModelFlags, name: str, transformer: nn.Module) -> Any:
    """Returns the diffusers pipeline of a name around the transformer, without T5 and with a stand-in for the VAE."""
    import diffusers

    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "scheduler": models.load_scheduler(model)}
    vae = diffusers.AutoencoderKLCogVideoX
    with torch.device("meta"):  # builds the config with all defaults, without allocating weights
        config = vae.from_config(vae.load_config(models.part_folder(model, "vae"))).config
    pipeline = getattr(diffusers, name)(**parts, vae=StandInVae(config), transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def recorded_calls(transformer: nn.Module, answer: Answer) -> Iterator[list[dict[str, Any]]]:
    """Replaces the transformer's forward for a block and records its calls.

    Args:
        transformer: The transformer.
        answer: Computes the output of a call from its arguments.

    Yields:
        A list that receives the arguments of each call.
    """
    calls: list[dict[str, Any]] = []

    def forward(**arguments: Any) -> tuple[Tensor]:
        calls.append(arguments)
        return (answer(arguments),)

    transformer.forward = forward
    try:
        with torch.no_grad():
            yield calls
    finally:
        del transformer.forward


# -- one bucket --------------------------------------------------------------------------------------------------------


def check_bucket(task: Task, pipeline: Any, schedule: NoiseSchedule, geometry: Geometry, bucket: Bucket) -> None:
    """Compares how training and the pipeline call the transformer for one bucket.

    Raises:
        ParityError: An argument differs, or a transformer that has learned its target perfectly would not reproduce its
            training clip in the pipeline.
    """
    device = schedule.alphas_cumprod.device
    batch = random_batch(geometry, bucket, len(schedule) - 1).to(device)
    frame_HWC = np.random.default_rng(0).integers(0, 256, (bucket.height, bucket.width, 3), np.uint8)
    pipeline.vae.image_BCFHW = sampled_by_diffusers(bucket, geometry, "image").to(device)
    theirs = pipeline_call(task, pipeline, batch, schedule, bucket, frame_HWC)
    latents, image = split_hidden_states(theirs, geometry)
    with recorded_calls(pipeline.transformer, lambda arguments: arguments["hidden_states"]) as calls:
        task.predictor(pipeline.transformer, batch)(latents, batch.timestep_B)
    own_latents, own_image = split_hidden_states(calls[0], geometry)
    check_equal(f"{bucket}: latents", own_latents, latents)
    if isinstance(task, ImageToVideo):
        check_equal(f"{bucket}: image latents", own_image, image * relative_image_scale(task, geometry))
        pixels = encode.pixels_of(frame_HWC[None], device)
        check_equal(f"{bucket}: pixels of the image", pixels.to(task.dtype), pipeline.vae.pixels_BCFHW[0])
    for name in CONDITIONS:
        check_equal(f"{bucket}: {name}", calls[0].get(name), theirs.get(name))
    clip = sampled_by_diffusers(bucket, geometry, "clip").to(device, task.dtype)
    check_equal(f"{bucket}: latents of the clip that is decoded", clip, pipeline.vae.decoded_BCFHW)


def check_loss(task: Task, pipeline: Any, schedule: NoiseSchedule, geometry: Geometry, bucket: Bucket) -> None:
    """Checks that the training loss is 0 if the transformer returns the scheduler's velocity for the noised clip.

    Raises:
        ParityError: The loss is not 0, or the noised clip or the timestep differs from the scheduler's.
    """
    device, scheduler = schedule.alphas_cumprod.device, pipeline.scheduler
    batches = [random_batch(geometry, bucket, timestep) for timestep in compared_timesteps(schedule)]
    for batch in (batch.to(device) for batch in batches):
        clip = batch.x0_BFCHW, batch.noise_BFCHW, batch.timestep_B
        velocity = scheduler.get_velocity(*clip).to(task.dtype)
        with recorded_calls(pipeline.transformer, lambda _, velocity=velocity: velocity) as calls:  # type: ignore[misc]
            loss_B = losses_of(task, schedule, pipeline.transformer, batch)
        what = f"{bucket}: timestep {batch.timestep_B.item()}"
        check_equal(
            f"{what}: x_t", split_hidden_states(calls[0], geometry)[0], scheduler.add_noise(*clip).to(task.dtype)
        )
        check_equal(f"{what}: timestep", calls[0]["timestep"], batch.timestep_B)
        check_equal(f"{what}: loss of the scheduler's velocity", loss_B.sqrt(), torch.zeros_like(loss_B), task.dtype)


def relative_image_scale(task: ImageToVideo, geometry: Geometry) -> float:
    """Returns the scale of our image latents relative to the pipeline's: 1, unless --image_latent_scale changes it."""
    return 1.0 if task.flags.image_latent_scale == "auto" else task.scale / image_scale(geometry)


def random_moments(bucket: Bucket, geometry: Geometry, name: str) -> Tensor:
    """Returns random moments in the shape of the VAE's: (2C, F, H, W) for a clip, (2C, H, W) for an image."""
    shape = geometry.moments_shape(bucket) if name == "clip" else geometry.image_shape(bucket)
    return standard_normal(shape, "parity", bucket, f"{name} moments")


def random_batch(geometry: Geometry, bucket: Bucket, timestep: int) -> Batch:
    """Returns a batch of one sample, drawn from random moments as training draws samples from the cache."""
    draw = ("parity", bucket)
    prompt = standard_normal((geometry.max_text_seq_length, geometry.text_embed_dim), *draw, "prompt")
    clip, image = (random_moments(bucket, geometry, name) for name in PURPOSES)
    return collate([draw_sample(clip, prompt, timestep, geometry, draw, "parity", image)])


def sampled_by_diffusers(bucket: Bucket, geometry: Geometry, name: str) -> Tensor:
    """Samples unscaled latents of the same clip, (1, C, F, H, W), or image, (1, C, 1, H, W), with diffusers' code."""
    moments = random_moments(bucket, geometry, name)
    channels, *rest = moments.shape
    latents = posterior_by_diffusers(moments, standard_normal((channels // 2, *rest), "parity", bucket, PURPOSES[name]))
    return latents[None] if name == "clip" else latents[None].unsqueeze(2)


def posterior_by_diffusers(moments: Tensor, noise: Tensor) -> Tensor:
    """Samples from moments with diffusers' own distribution: the reference for data.dataset.sample_posterior."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(moments[None])
    return (posterior.mean + posterior.std * noise)[0]


def check_posterior() -> None:
    """Compares our sampling from moments with that of diffusers, for log variances of every size.

    Raises:
        ParityError: The samples differ.
    """
    log_variance = torch.linspace(-40.0, 30.0, 71).view(1, -1)
    moments = torch.cat([standard_normal((1, 71), "parity", "mean"), log_variance])
    noise = standard_normal((1, 71), "parity", "noise")
    ours, theirs = sample_posterior(moments, noise), posterior_by_diffusers(moments, noise)
    check_equal("a sample from the VAE's posterior", ours, theirs)


def pipeline_call(
    task: Task, pipeline: Any, batch: Batch, schedule: NoiseSchedule, bucket: Bucket, frame_HWC: np.ndarray
) -> dict[str, Any]:
    """Runs one sampling step of the pipeline on the batch's velocity; returns the transformer's arguments."""
    from PIL import Image

    more: dict[str, Any] = {}
    if isinstance(task, ImageToVideo):
        more["image"] = Image.fromarray(frame_HWC)
    with recorded_calls(
        pipeline.transformer, lambda arguments: velocity_of(batch, arguments, schedule, bucket)
    ) as calls:
        pipeline(
            prompt_embeds=batch.prompt_BLD.to(task.dtype),
            negative_prompt_embeds=batch.prompt_BLD.to(task.dtype),
            height=bucket.height,
            width=bucket.width,
            num_frames=bucket.frames,
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **more,
        )
    return calls[0]


def velocity_of(batch: Batch, arguments: dict[str, Any], schedule: NoiseSchedule, bucket: Bucket) -> Tensor:
    """Returns what a perfect transformer would predict: the velocity that leads from x_t to the clip of the batch."""
    x0_BFCHW = batch.x0_BFCHW
    x_t_BFCHW = arguments["hidden_states"][:, :, : x0_BFCHW.shape[2]]
    check_shape(f"{bucket}: latents", x0_BFCHW, x_t_BFCHW)
    signal, noise = schedule.signal_and_noise(batch.timestep_B)
    velocity = schedule.velocity(x0_BFCHW, (x_t_BFCHW - signal * x0_BFCHW) / noise, batch.timestep_B)
    return velocity.to(x_t_BFCHW.dtype)


def split_hidden_states(arguments: dict[str, Any], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Splits the hidden states of a call into (latents, image latents), each (B, F, C, H, W)."""
    hidden_BFCHW = arguments["hidden_states"]
    return hidden_BFCHW[:, :, : geometry.latent_channels], hidden_BFCHW[:, :, geometry.latent_channels :]


# -- schedule and positions --------------------------------------------------------------------------------------------


def check_schedule(schedule: NoiseSchedule, scheduler: Any) -> None:
    """Compares our noise schedule with the pipeline's scheduler.

    Raises:
        ParityError: The noised clip, the velocity, or the x0 that the sampler computes from a velocity differs.
    """
    device = schedule.alphas_cumprod.device
    x0, noise = (standard_normal((1, 1, 1, 2, 2), "parity", name).to(device) for name in ("x0", "noise"))
    scheduler.set_timesteps(len(schedule))
    for number in compared_timesteps(schedule):
        timestep = torch.tensor([number], device=device)
        x_t, velocity = schedule.add_noise(x0, noise, timestep), schedule.velocity(x0, noise, timestep)
        check_equal(f"timestep {number}: x_t", x_t, scheduler.add_noise(x0, noise, timestep))
        check_equal(f"timestep {number}: velocity", velocity, scheduler.get_velocity(x0, noise, timestep))
        check_equal(f"timestep {number}: x0 out of the velocity", x0, x0_of(scheduler, velocity, number, x_t))


def compared_timesteps(schedule: NoiseSchedule) -> tuple[int, ...]:
    """Returns the timesteps that are compared: both ends and the middle."""
    return 0, 1, len(schedule) // 2, len(schedule) - 1


def x0_of(scheduler: Any, velocity: Tensor, timestep: int, x_t: Tensor) -> Tensor:
    """Returns the x0 that a scheduler computes from a velocity."""
    import diffusers

    if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
        return scheduler.step(velocity, None, timestep, None, x_t, return_dict=False)[1]
    return scheduler.step(velocity, timestep, x_t).pred_original_sample


@torch.no_grad()
def check_positions(transformer: Any, geometry: Geometry, bucket: Bucket, ignored: bool) -> None:
    """Checks that the transformer adds its learned positions to the patches of a bucket, or nothing if ignored.

    Raises:
        ParityError: It adds something else.
    """
    embed, patch = transformer.patch_embed, geometry.patch_size
    text = torch.zeros(1, geometry.max_text_seq_length, geometry.text_embed_dim).to(transformer.device)
    frames, _, height, width = geometry.latent_shape(bucket)
    video = torch.zeros(1, frames, geometry.in_channels, height, width).to(transformer.device)
    text, video = text.to(transformer.dtype), video.to(transformer.dtype)
    embedded = embed.text_proj(text), embed.proj(video[0, :1, :, :patch, :patch]).view(1, 1, -1)
    patches = frames * (height // patch) * (width // patch)
    expected_BPD = torch.cat([embedded[0], embedded[1].expand(1, patches, -1)], dim=1)
    if not ignored:
        table = embed.pos_embedding.to(transformer.dtype)
        check_shape(f"{bucket}: learned positions", expected_BPD, table)
        expected_BPD = expected_BPD + table
    check_equal(f"{bucket}: positions that are added", embed(text, video), expected_BPD)


# -- comparison --------------------------------------------------------------------------------------------------------


def check_equal(what: str, ours: Any, theirs: Any, rounded_to: torch.dtype | None = None) -> None:
    """Checks that two tensors, tuples of tensors or None are equal up to rounding.

    Args:
        what: Name of the value, for the message.
        ours: The value in training.
        theirs: The value in the pipeline.
        rounded_to: The type to which the numbers were rounded on the way; by default that of the tensors.

    Raises:
        ParityError: They differ in presence, shape, type or value.
    """
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        for own, their in zip(ours, theirs, strict=True):
            check_equal(what, own, their, rounded_to)
        return
    if ours is None and theirs is None:
        return
    if ours is None or theirs is None:
        raise ParityError(difference_text(what, "given on one side only"))
    check_shape(what, ours, theirs)
    if ours.dtype != theirs.dtype:
        raise ParityError(difference_text(what, f"{ours.dtype} in training, {theirs.dtype} in the pipeline"))
    dtype = rounded_to or ours.dtype
    tolerance = max(TOLERANCE, torch.finfo(dtype).eps) if dtype.is_floating_point else TOLERANCE
    difference = (ours.double() - theirs.double()).abs()
    if not (difference / theirs.double().abs().clamp(min=1.0)).max().item() <= tolerance:  # NaN fails
        raise ParityError(difference_text(what, f"{difference.max().item():.3g} apart"))


def check_shape(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Checks that two tensors have the same shape.

    Raises:
        ParityError: The shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ParityError(
            difference_text(what, f"{tuple(ours.shape)} in training, {tuple(theirs.shape)} in the pipeline")
        )


def difference_text(what: str, how: str) -> str:
    """Returns the text of a ParityError."""
    return f"training and the pipeline differ in {what}: {how}; nothing was trained; please report this"
