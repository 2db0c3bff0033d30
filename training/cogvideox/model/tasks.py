"""Defines the tasks, text to video and image to video: the transformer's inputs and the diffusers pipeline.

``Task`` lists what the training loop needs of a task. A task makes a predictor of a batch, (x_t, timestep) -> velocity,
which calls the transformer exactly as the matching diffusers pipeline does. ``losses_of`` is the loss of each sample.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cogvideox.config.geometry import Geometry
from cogvideox.config.options import TrainOptions, image_flags
from cogvideox.data.dataset import Batch
from cogvideox.model import diffusion
from cogvideox.model.diffusion import NoiseSchedule, Predictor
from cogvideox.model.rope import RotaryTables

OFS = 2.0  # the offset that CogVideoX 1.5 image-to-video was trained with
IMAGE_NAME = "image-{}.png"  # a validation image, which is saved next to the result


class Task(Protocol):
    """Defines the interface of a task.

    Attributes:
        pipeline: The class name of the diffusers pipeline that samples from the result.
        inference: The parts of inference.py that pass inputs other than the prompt: "usage", "defaults", "names" and
            "arguments".
        dtype: The compute type, in which the transformer gets its inputs.
    """

    pipeline: ClassVar[str]
    inference: ClassVar[dict[str, str]]
    dtype: torch.dtype

    def __init__(self, options: TrainOptions, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        """Prepares what every batch needs, on the device and in the compute type of training."""

    @staticmethod
    def recipe(options: TrainOptions, geometry: Geometry, /) -> dict[str, Any]:
        """Returns the settings of this task that decide the result; they are compared when a run is resumed."""

    def predictor(self, transformer: Any, batch: Batch) -> Predictor:
        """Returns the function (x_t, timestep) -> velocity for the conditions of a batch on the device."""


class TextToVideo:
    """Generates videos from captions. The transformer gets the noisy latents and the caption's embedding."""

    pipeline: ClassVar[str] = "CogVideoXPipeline"
    inference: ClassVar[dict[str, str]] = dict.fromkeys(("usage", "defaults", "names", "arguments"), "")

    def __init__(self, options: TrainOptions, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        self.rotary = RotaryTables(geometry, device)
        self.dtype = dtype

    @staticmethod
    def recipe(_options: TrainOptions, _geometry: Geometry) -> dict[str, Any]:
        """Returns the flags of this task that decide the result: there are none."""
        return {}

    def predictor(self, transformer: Any, batch: Batch) -> Predictor:
        """Returns the function that predicts the velocity for the captions of a batch."""
        return velocity_predictor(
            transformer, batch.prompt_BLD.to(self.dtype), self.rotary, lambda x_t_BFCHW: x_t_BFCHW
        )


class ImageToVideo:
    """Generates videos from captions and first frames.

    The latent of the first frame is concatenated to the noisy latents along the channels, as in
    CogVideoXImageToVideoPipeline, so the transformer gets (B, F, 2 C, H, W).
    """

    pipeline: ClassVar[str] = "CogVideoXImageToVideoPipeline"
    inference: ClassVar[dict[str, str]] = {
        "usage": " [IMAGE]",
        "defaults": f' here / "{IMAGE_NAME.format(0)}",',
        "names": " image,",
        "arguments": "\n    image=diffusers.utils.load_image(str(image)),",
    }

    def __init__(self, options: TrainOptions, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        flags = image_flags(options)
        assert flags is not None
        self.rotary = RotaryTables(geometry, device)
        self.dtype = dtype
        self.ofs = torch.full((1,), OFS, device=device, dtype=dtype) if geometry.ofs else None
        self.scale = image_scale(geometry, flags.image_latent_scale)
        self.flags = flags

    @staticmethod
    def recipe(options: TrainOptions, geometry: Geometry) -> dict[str, Any]:
        """Returns the flags of this task that decide the result, with automatic values resolved."""
        flags = image_flags(options)
        assert flags is not None
        return {
            "image_scale": image_scale(geometry, flags.image_latent_scale),
            "noised_image_dropout": flags.noised_image_dropout,
            "ignore_learned_positional_embeddings": flags.ignore_learned_positional_embeddings,
        }

    def predictor(self, transformer: Any, batch: Batch) -> Predictor:
        """Returns the function that predicts the velocity for the captions and first frames of a batch."""
        assert batch.image_BCHW is not None
        image_BCHW = batch.image_BCHW * self.scale

        def concatenate_image(x_t_BFCHW: Tensor) -> Tensor:  # (B, F, C, H, W) -> (B, F, 2 C, H, W)
            return torch.cat([x_t_BFCHW, on_first_frame(image_BCHW, x_t_BFCHW.shape[1])], dim=2)

        return velocity_predictor(
            transformer, batch.prompt_BLD.to(self.dtype), self.rotary, concatenate_image, ofs=self.ofs
        )


def losses_of(task: Task, schedule: NoiseSchedule, transformer: Any, batch: Batch) -> Tensor:
    """Returns the loss of each sample of a batch, without the weights of --loss_weighting.

    Args:
        task: The task, which decides on the inputs of the transformer.
        schedule: The noise schedule, on the device.
        transformer: The network.
        batch: The samples with their noise and timesteps, on the device.

    Returns:
        The mean squared velocity error of each sample, (B,), fp32.
    """
    predict = task.predictor(transformer, batch)
    return diffusion.loss(schedule, predict, batch.x0_BFCHW, batch.noise_BFCHW, batch.timestep_B)


def velocity_predictor(
    transformer: Any, prompt_BLD: Tensor, rotary: RotaryTables, inputs: Callable[[Tensor], Tensor], **more: Any
) -> Predictor:
    """Returns the function that predicts the velocity by calling the transformer as the pipelines of diffusers do.

    Args:
        transformer: The network.
        prompt_BLD: Embeddings of the captions; their type is the type in which the network computes.
        rotary: The rotary tables.
        inputs: A function from x_t to the latents that the network takes, which may have more channels.
        more: Further arguments of the transformer.
    """

    def predict(x_t_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
        _, frames, _, height, width = x_t_BFCHW.shape
        return transformer(
            hidden_states=inputs(x_t_BFCHW).to(prompt_BLD.dtype),
            encoder_hidden_states=prompt_BLD,
            timestep=timestep_B,
            image_rotary_emb=rotary(frames, height, width),
            return_dict=False,
            **more,
        )[0]

    return predict


def image_scale(geometry: Geometry, choice: str = "auto") -> float:
    """Returns the factor by which latents of first frames are multiplied.

    Args:
        geometry: The VAE's scaling factor, and how the model's pipeline applies it.
        choice: "mul", "div" or "none" for the scaling factor, its inverse or 1; "auto" for the pipeline's choice.
    """
    usual = "div" if geometry.invert_scale_latents else "mul"
    factor = geometry.scaling_factor
    return {"mul": factor, "div": 1 / factor, "none": 1.0}[usual if choice == "auto" else choice]


def on_first_frame(image_BCHW: Tensor, frames: int) -> Tensor:
    """Puts an image latent on the first latent frame, and zeros on the others.

    In CogVideoX 1.5 the first latent frame may be one of those that pad the clip; its pipeline does the same.

    Args:
        image_BCHW: The image latents, (B, C, H, W).
        frames: The number of latent frames, F.

    Returns:
        The condition, (B, F, C, H, W).
    """
    condition_BFCHW = image_BCHW.new_zeros(len(image_BCHW), frames, *image_BCHW.shape[1:])
    condition_BFCHW[:, 0] = image_BCHW
    return condition_BFCHW
