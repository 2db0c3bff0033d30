"""Decodes latents with the largest tiles for which the device has enough memory.

``Decoder`` replaces ``vae.decode``: it tries complete frames first, then smaller and smaller tiles. Only decoding is
tiled then. The first frame of image-to-video is encoded as a complete image, as the clips were on which the model was
trained. ``default_tile`` is also the tile of --encode_tiling.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cogvideox import stopping

Tile = tuple[int, int]  # height and width, pixels
SMALLEST = 96  # pixels of a side; in smaller tiles, most of the area is overlap
SHRINK = 0.7  # the next smaller tile has at most this share of a tile's side
OVERLAPS_PER_TILE = (6, 5)  # in diffusers, tiles overlap by 1/6 of their height and 1/5 of their width
# The default tile of diffusers for the published models, and the pixels per latent of these models.
PUBLISHED = (240, 360), 8


def decoding_attempts(first: Tile, scale: int, tiled: bool) -> list[Tile | None]:
    """Lists what to try, in this order: complete frames (None) unless ``tiled`` is set, then ``tiles_from``."""
    return ([] if tiled else [None]) + tiles_from(first, scale)


def tiles_from(first: Tile, scale: int) -> list[Tile]:
    """Lists tiles from the first one down to the smallest useful one; all are valid.

    Args:
        first: The height and width of the largest tile, in pixels.
        scale: The pixels per latent.
    """
    tiles = [valid_tile(first, scale)]
    while True:
        height, width = tiles[-1]
        smaller = valid_tile((int(height * SHRINK), int(width * SHRINK)), scale)
        if min(smaller) < SMALLEST:
            return tiles
        tiles.append(smaller)


def valid_tile(largest: Tile, scale: int) -> Tile:
    """Returns the largest valid tile within these sides, in pixels, or the smallest valid tile if none is within them.

    Diffusers assembles a result of the right size only if the overlap of two tiles is an integer number of latents.

    Args:
        largest: The largest height and width, in pixels.
        scale: The pixels per latent.
    """
    height, width = (max(s // (scale * n), 1) * scale * n for s, n in zip(largest, OVERLAPS_PER_TILE, strict=True))
    return height, width


def scale_of(vae: Any) -> int:
    """Returns the pixels per latent of a VAE, per side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def default_tile(vae: Any) -> Tile:
    """Returns the tile that diffusers uses for this VAE, rounded to a valid one."""
    return valid_tile((vae.tile_sample_min_height, vae.tile_sample_min_width), scale_of(vae))


class Decoder:
    """Replaces a VAE's ``decode``. A size that did not fit in memory once is not tried again.

    Args:
        vae: The VAE, whose ``decode`` is replaced.
        say: A function that prints a message, called when smaller tiles become necessary.
        tiled: Whether to use tiles from the beginning.
    """

    def __init__(self, vae: Any, say: Callable[[str], None], tiled: bool = False) -> None:
        self.vae, self.say, self.decode = vae, say, vae.decode
        self.attempts = decoding_attempts(default_tile(vae), scale_of(vae), tiled)
        vae.decode = self
        vae.decoder.register_forward_hook(lambda *_: stopping.unit("decoded tile"))  # of a few frames each

    def __call__(self, *args: object, **kwargs: object) -> object:
        while True:
            torch.cuda.empty_cache()  # sampling has fragmented the memory
            try:
                with tiling(self.vae, self.attempts[0]):
                    return self.decode(*args, **kwargs)
            except torch.OutOfMemoryError:
                if len(self.attempts) == 1:
                    raise
            del self.attempts[0]
            size = "x".join(map(str, self.attempts[0] or ()))
            self.say(f"decoding in tiles of {size}: larger ones do not fit in memory")

    @contextmanager
    def in_tiles(self) -> Iterator[None]:
        """Decodes in tiles within the context, for a video larger than usual.

        Afterwards the sizes to try are those of before: what fits a larger video says nothing about the usual ones.
        """
        before = self.attempts
        self.attempts = [tile for tile in before if tile]
        try:
            yield
        finally:
            self.attempts = before


@contextmanager
def tiling(vae: Any, tile: Tile | None) -> Iterator[None]:
    """Makes the VAE use tiles of this size within the context, or none; afterwards it uses none."""
    if tile:
        vae.enable_tiling(*tile)
    try:
        yield
    finally:
        vae.disable_tiling()
