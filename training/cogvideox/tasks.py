"""What is generated from what: which inputs the transformer gets, and which pipeline samples from it.

Batch -> predictor(transformer, batch): (x_t, timestep) -> velocity, as the matching diffusers pipeline calls the model.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from cogvideox.data.dataset import Batch
from cogvideox.diffusion import Predictor
from cogvideox.geometry import Geometry
from cogvideox.rope import RotaryTables


class TextToVideo:
    """Captions to videos."""

    pipeline: ClassVar[str] = "CogVideoXPipeline"

    def __init__(self, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> None:
        self.rotary = RotaryTables(geometry, device)
        self.dtype = dtype

    def predictor(self, transformer: Any, batch: Batch) -> Predictor:
        """The network's velocity for this batch's captions, in the compute type."""
        prompt_BLD = batch.prompt_BLD.to(self.dtype)

        def predict(x_t_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
            _, frames, _, height, width = x_t_BFCHW.shape
            return transformer(
                hidden_states=x_t_BFCHW.to(self.dtype),
                encoder_hidden_states=prompt_BLD,
                timestep=timestep_B,
                image_rotary_emb=self.rotary(frames, height, width),
                return_dict=False,
            )[0]

        return predict
