"""Defines the two tasks, text-to-video and image-to-video.

A task decides which inputs the transformer gets and which diffusers pipeline uses the trained model; ``Task`` is their
interface. For each batch, a task returns a predictor. This function takes x_t (the noisy latents) and the timestep,
calls the transformer exactly as the diffusers pipeline does, and returns the predicted velocity. ``losses_of`` computes
the loss of each sample. Suffixes of names give the shape, with the letters that model/diffusion.py defines.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from cogvideox.config.geometry import Geometry
from cogvideox.config.options import TrainOptions, image_flags
from cogvideox.data.dataset import Batch
from cogvideox.model import diffusion
from cogvideox.model.diffusion import NoiseSchedule, Predictor
from cogvideox.model.rope import RotaryTables

# CogVideoX 1.5 image-to-video has a further input, the offset "ofs". Its diffusers pipeline always passes this value.
OFS = 2.0
IMAGE_NAME = "image-{}.png"  # the file name of a validation image in the output directory


class Task(Protocol):
    """Defines the interface of a task.

    Attributes:
        pipeline: The class name of the diffusers pipeline that makes videos with the trained model.
        inference: Code for inference.py that handles inputs other than the prompt. "names" are those of the values that
            need no flag, "and_image" is for a sentence that lists them, "image_flag" declares a flag, "image_check"
            checks its value, and "arguments" are the arguments of the pipeline's call.
        dtype: The type to which the inputs of the transformer are converted.
    """

    pipeline: ClassVar[str]
    inference: ClassVar[dict[str, str]]
    dtype: torch.dtype

    def __init__(self, options: TrainOptions, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        """Creates the inputs that are the same for all batches, on the device and in the compute type of training."""

    @staticmethod
    def recipe(options: TrainOptions, geometry: Geometry, /) -> dict[str, Any]:
        """Returns the settings of this task that change the trained weights; a resumed run must have the same."""

    def predictor(self, transformer: nn.Module, batch: Batch) -> Predictor:
        """Returns the predictor that uses the captions and, if needed, the first frames of a batch on the device."""


class TextToVideo:
    """Trains a model that makes videos from captions: the transformer gets the noisy latents and text embeddings."""

    pipeline: ClassVar[str] = "CogVideoXPipeline"
    inference: ClassVar[dict[str, str]] = {
        "names": '"prompt", "output"',
        "and_image": "",
        "image_flag": "",
        "image_check": "",
        "arguments": "",
    }

    def __init__(self, options: TrainOptions, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        self.rotary = RotaryTables(geometry, device)
        self.dtype = dtype

    @staticmethod
    def recipe(_options: TrainOptions, _geometry: Geometry) -> dict[str, Any]:
        """Returns an empty dict, because this task has no settings."""
        return {}

    def predictor(self, transformer: nn.Module, batch: Batch) -> Predictor:
        """Returns the predictor for the captions of a batch."""
        return velocity_predictor(
            transformer, batch.prompt_BLD.to(self.dtype), self.rotary, lambda x_t_BFCHW: x_t_BFCHW
        )


class ImageToVideo:
    """Trains a model that makes videos from captions and first frames.

    The latent of the first frame is concatenated to the noisy latents along the channels, as in
    CogVideoXImageToVideoPipeline, so the transformer gets (B, F, 2 C, H, W).
    """

    pipeline: ClassVar[str] = "CogVideoXImageToVideoPipeline"
    inference: ClassVar[dict[str, str]] = {
        "names": '"prompt", "image", "output"',
        "and_image": ", image",
        "image_flag": f'parser.add_argument("--image", default=here / "{IMAGE_NAME.format(0)}", help="first frame")\n',
        "image_check": """\
if "://" not in str(args.image) and not Path(args.image).is_file():
    parser.error(f"--image {args.image}: no such file; give a path or URL of the first frame")
""",
        "arguments": "image=image,",
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
        """Returns the settings that change the trained weights; --image_latent_scale is resolved to a number."""
        flags = image_flags(options)
        assert flags is not None
        return {
            "image_scale": image_scale(geometry, flags.image_latent_scale),
            "noised_image_dropout": flags.noised_image_dropout,
            "ignore_learned_positional_embeddings": flags.ignore_learned_positional_embeddings,
        }

    def predictor(self, transformer: nn.Module, batch: Batch) -> Predictor:
        """Returns the predictor for the captions and first frames of a batch."""
        assert batch.image_BCHW is not None
        image_BCHW = batch.image_BCHW * self.scale

        def concatenate_image(x_t_BFCHW: Tensor) -> Tensor:  # (B, F, C, H, W) -> (B, F, 2 C, H, W)
            return torch.cat([x_t_BFCHW, on_first_frame(image_BCHW, x_t_BFCHW.shape[1])], dim=2)

        return velocity_predictor(
            transformer, batch.prompt_BLD.to(self.dtype), self.rotary, concatenate_image, ofs=self.ofs
        )


def losses_of(task: Task, schedule: NoiseSchedule, transformer: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss of each sample of a batch, without the weights of --loss_weighting.

    Args:
        task: The task, which provides the inputs of the transformer.
        schedule: The noise schedule, on the device.
        transformer: The network.
        batch: The samples with their noise and timesteps, on the device.

    Returns:
        The mean squared velocity error of each sample, (B,), fp32.
    """
    predict = task.predictor(transformer, batch)
    return diffusion.loss(schedule, predict, batch.x0_BFCHW, batch.noise_BFCHW, batch.timestep_B)


def velocity_predictor(
    transformer: nn.Module, prompt_BLD: Tensor, rotary: RotaryTables, inputs: Callable[[Tensor], Tensor], **more: object
) -> Predictor:
    """Returns a predictor: a function that calls the transformer as diffusers does and returns the predicted velocity.

    Args:
        transformer: The network.
        prompt_BLD: Embeddings of the captions. The latents are converted to the type of these embeddings.
        rotary: The rotary tables.
        inputs: A function that turns x_t into the latents that the network takes. It may add channels to x_t.
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
        geometry: Has the VAE's scaling factor, and whether the model's pipeline divides image latents by it.
        choice: "mul" returns the scaling factor, "div" returns its inverse, and "none" returns 1. "auto" returns the
            factor that the model's pipeline uses.
    """
    usual = "div" if geometry.invert_scale_latents else "mul"
    factor = geometry.scaling_factor
    return {"mul": factor, "div": 1 / factor, "none": 1.0}[usual if choice == "auto" else choice]


def on_first_frame(image_BCHW: Tensor, frames: int) -> Tensor:
    """Returns latents whose first frame is the image latent and whose other frames are zero.

    CogVideoX 1.5 pads clips at the start, so the first latent frame may be padding. The image is placed there
    nevertheless, because the diffusers pipeline does so.

    Args:
        image_BCHW: The image latents, (B, C, H, W).
        frames: The number of latent frames, F.

    Returns:
        The condition, (B, F, C, H, W).
    """
    condition_BFCHW = image_BCHW.new_zeros(len(image_BCHW), frames, *image_BCHW.shape[1:])
    condition_BFCHW[:, 0] = image_BCHW
    return condition_BFCHW
