"""Decoding what fits: whole frames, or in tiles, the largest that the device has room for.

Only decoding is tiled. The image that a video begins with is encoded whole, as the clips were that trained the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cogvideox import stopping

Tile = tuple[int, int]  # height and width, pixels
SMALLEST = 96  # pixels; below, seams are most of a tile
NEXT = 0.7  # of a tile's side, that of the next smaller one at most
OVERLAPS = (1 / 6, 1 / 5)  # of height and width, diffusers'
PUBLISHED = (240, 360), 8  # diffusers' tile for the published models, and pixels of one of their latents


def ways_to_decode(first: Tile, scale: int, tiled: bool) -> list[Tile | None]:
    """Whole frames (None) unless ``tiled``, then ``tiles_from``."""
    return ([] if tiled else [None]) + tiles_from(first, scale)


def tiles_from(first: Tile, scale: int) -> list[Tile]:
    """Tiles from the first one down; ``scale``: pixels of a latent."""
    tiles = []
    height, width = (side_within(side, overlap, scale) for side, overlap in zip(first, OVERLAPS, strict=True))
    while min(height, width) >= SMALLEST:
        tiles.append((height, width))
        height, width = (side_within(int(s * NEXT), o, scale) for s, o in zip(tiles[-1], OVERLAPS, strict=True))
    return tiles or [first]


def side_within(pixels: int, overlap: float, scale: int) -> int:
    """The longest side of a tile up to so many pixels; 0 if there is none.

    Diffusers makes a video of the right size only of tiles whose part that does not overlap is whole latents.
    """
    for latents in range(pixels // scale, 0, -1):
        side = latents * scale
        if side - int(side * overlap) == int(latents * (1 - overlap)) * scale:
            return side
    return 0


class Decoder:
    """In place of a VAE's ``decode``; what did not fit once is not tried again.

    Args:
        vae: whose decoding it takes over.
        say: is told when smaller tiles have to be taken.
        tiled: never whole frames.
    """

    def __init__(self, vae: Any, say: Callable[[str], None], tiled: bool = False) -> None:
        self.vae, self.say, self.decode = vae, say, vae.decode
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        first = vae.tile_sample_min_height, vae.tile_sample_min_width
        self.left = ways_to_decode(first, scale, tiled)
        vae.decode = self
        vae.decoder.register_forward_hook(lambda *_: stopping.unit("decoded tile"))  # of some frames

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            torch.cuda.empty_cache()  # sampling has left gaps
            try:
                with tiling(self.vae, self.left[0]):
                    return self.decode(*args, **kwargs)
            except torch.OutOfMemoryError:
                if len(self.left) == 1:
                    raise
            del self.left[0]
            size = "x".join(map(str, self.left[0] or ()))
            self.say(f"decoding in tiles of {size}: more does not fit")

    @contextmanager
    def in_tiles(self) -> Iterator[None]:
        """For something larger, which says nothing about what else fits."""
        before = self.left
        self.left = [tile for tile in before if tile]
        try:
            yield
        finally:
            self.left = before


@contextmanager
def tiling(vae: Any, tile: Tile | None) -> Iterator[None]:
    """Tiles of this size, or none, and afterwards none."""
    if tile:
        vae.enable_tiling(*tile)
    try:
        yield
    finally:
        vae.disable_tiling()
