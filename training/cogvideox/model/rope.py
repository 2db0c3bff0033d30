"""Rotary tables as the CogVideoX pipelines make them, cached by shape on the device.

1.0 stretches the base grid of the model over the clip's shape; 1.5 takes the first rows and columns of its base grid.
"""

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from cogvideox.config.geometry import Geometry


def centered_region(
    grid_height: int, grid_width: int, base_height: int, base_width: int
) -> tuple[tuple[int, int], ...]:
    """((top, left), (bottom, right)) of the largest region of the base grid with the aspect ratio of the grid."""
    if grid_height * base_width > base_height * grid_width:
        height, width = base_height, round(base_height / grid_height * grid_width)
    else:
        height, width = round(base_width / grid_width * grid_height), base_width
    top, left = round((base_height - height) / 2.0), round((base_width - width) / 2.0)
    return (top, left), (top + height, left + width)


class RotaryTables:
    """Tables (cos, sin), each (F * H * W patches, head dim), fp32."""

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self.geometry = geometry
        self.device = device
        self._tables: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, latent_frames: int, latent_height: int, latent_width: int) -> tuple[Tensor, Tensor] | None:
        """The tables of one latent shape (padding included); None for a model without rotary embeddings."""
        if not self.geometry.rotary:
            return None
        shape = (latent_frames, latent_height, latent_width)
        if shape not in self._tables:
            self._tables[shape] = self._compute(*shape)
        return self._tables[shape]

    def _compute(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        geometry = self.geometry
        patch, patch_t = geometry.patch_size, geometry.patch_size_t
        grid = (height // patch, width // patch)
        base = (geometry.sample_height // patch, geometry.sample_width // patch)
        sliced = patch_t is not None
        return get_3d_rotary_pos_embed(
            embed_dim=geometry.attention_head_dim,
            crops_coords=None if sliced else centered_region(*grid, *base),
            grid_size=grid,
            temporal_size=-(-frames // (patch_t or 1)),
            grid_type="slice" if sliced else "linspace",
            max_size=base if sliced else None,
            device=self.device,
        )
