"""Computes the cos and sin tables of the rotary position embedding, as the CogVideoX pipelines of diffusers do.

A patch at position n of an axis rotates each pair (x0, x1) of channels of queries and keys by an angle n w_j:

    (x0 cos(n w_j) - x1 sin(n w_j), x1 cos(n w_j) + x0 sin(n w_j))        w_j = 10000^(-2 j / channels of the axis)

The channels of a head are divided among time, height and width. CogVideoX 1.0 stretches the grid on which the model was
trained, its base grid, over the clip's shape; CogVideoX 1.5 takes the first rows and columns of its base grid.
``RotaryTables`` computes the tables of a latent shape once and keeps them on the device.
"""

import torch
from torch import Tensor

from cogvideox.config.geometry import Geometry


def centered_region(
    grid_height: int, grid_width: int, base_height: int, base_width: int
) -> tuple[tuple[int, int], ...]:
    """Finds the largest centered region of the base grid that has the aspect ratio of a clip's grid.

    Equals get_resize_crop_region_for_grid of the diffusers pipelines; all sizes are in patches.

    Returns:
        The corners ((top, left), (bottom, right)) of the region.
    """
    if grid_height * base_width > base_height * grid_width:
        height, width = base_height, round(base_height / grid_height * grid_width)
    else:
        height, width = round(base_width / grid_width * grid_height), base_width
    top, left = round((base_height - height) / 2.0), round((base_width - width) / 2.0)
    return (top, left), (top + height, left + width)


class RotaryTables:
    """Returns tables (cos, sin) for a latent shape, each (patches of all frames, channels of a head), fp32.

    Args:
        geometry: The patch sizes, head size and base grid of the model.
        device: The device on which the tables are kept.
    """

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self.geometry = geometry
        self.device = device
        self._tables: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, latent_frames: int, latent_height: int, latent_width: int) -> tuple[Tensor, Tensor] | None:
        """Returns the tables of a latent shape, or None for a model without rotary embeddings.

        ``latent_frames`` includes the frames with which CogVideoX 1.5 pads a clip.
        """
        if not self.geometry.rotary:
            return None
        shape = (latent_frames, latent_height, latent_width)
        if shape not in self._tables:
            self._tables[shape] = self._compute(*shape)
        return self._tables[shape]

    def _compute(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Computes the tables of a latent shape."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed  # takes seconds, so not before the data is read

        geometry = self.geometry
        patch, patch_t = geometry.patch_size, geometry.patch_size_t
        grid = (height // patch, width // patch)  # in patches
        base = (geometry.sample_height // patch, geometry.sample_width // patch)
        sliced = patch_t is not None
        tables: tuple[Tensor, Tensor] = get_3d_rotary_pos_embed(
            embed_dim=geometry.attention_head_dim,
            crops_coords=None if sliced else centered_region(*grid, *base),
            grid_size=grid,
            temporal_size=-(-frames // (patch_t or 1)),  # rounded up
            grid_type="slice" if sliced else "linspace",
            max_size=base if sliced else None,
            device=self.device,
        )
        return tables
