"""Tests the tiles that decoding tries, what it remembers, and that videos from tiles have the right size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvideox.model.vae_decoder import PUBLISHED, Decoder, tiles_from

pytestmark = pytest.mark.usefixtures("small")
WHOLE, LARGE, MIDDLE, SMALL = None, (240, 360), (144, 240), (96, 160)


@pytest.fixture
def vae() -> Any:
    """Returns a VAE of few channels with the tile size of the published one."""
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16, 16),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=480,
        sample_width=720,
    )


class Card:
    """Stands in for a decoder that runs out of memory above a number of pixels; records what was tried."""

    def __init__(self, vae: Any, fits: int) -> None:
        self.vae, self.fits = vae, fits
        self.tried: list[tuple[int, int] | None] = []

    def decode(self, latents: Any) -> str:
        tile = (self.vae.tile_sample_min_height, self.vae.tile_sample_min_width) if self.vae.use_tiling else None
        self.tried.append(tile)
        height, width = tile or (480, 720)
        if height * width > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "decoded"


@pytest.mark.parametrize("tile", [WHOLE, LARGE, MIDDLE, SMALL])
def test_the_largest_that_fits_is_taken_and_remembered(vae: Any, tile: tuple[int, int] | None) -> None:
    height, width = tile or (480, 720)
    card, said = Card(vae, height * width), []
    vae.decode = card.decode
    Decoder(vae, said.append)
    ladder = [WHOLE, LARGE, MIDDLE, SMALL]
    tried = ladder[: ladder.index(tile) + 1]
    assert vae.decode(0) == vae.decode(0) == "decoded"
    assert card.tried == [*tried, tile]
    assert said == [f"decoding in tiles of {h}x{w}: larger ones do not fit in memory" for h, w in filter(None, tried)]
    assert not vae.use_tiling  # encoding is not tiled


def test_out_of_memory_if_not_even_the_smallest_tile_fits(vae: Any) -> None:
    card = Card(vae, 100)
    vae.decode = card.decode
    Decoder(vae, print)
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(0)
    assert card.tried == [WHOLE, LARGE, MIDDLE, SMALL]
    assert not vae.use_tiling


def test_tiling_of_a_larger_video_does_not_affect_the_others(vae: Any) -> None:
    card = Card(vae, 144 * 240)
    vae.decode = card.decode
    decoder = Decoder(vae, print)
    with decoder.in_tiles():
        vae.decode(0)
    assert card.tried == [LARGE, MIDDLE]
    card.fits = 480 * 720
    vae.decode(0)
    assert card.tried[2:] == [WHOLE]


def test_complete_frames_are_not_tried_with_tiling(vae: Any) -> None:
    assert Decoder(vae, print, tiled=True).attempts == [LARGE, MIDDLE, SMALL] == tiles_from(*PUBLISHED)


def test_a_tiled_video_has_the_right_size_and_similar_pixels(vae: Any) -> None:
    """Tiles of half of 480x720, which are 240x360, do not work: diffusers assembles 496x760 pixels from them."""
    height, width = 240, 400
    with torch.no_grad():
        latents_BCFHW = torch.randn(1, 16, 1, height // 8, width // 8)
        whole = vae.decode(latents_BCFHW).sample
        decoder = Decoder(vae, print)
        for decoder.attempts in [[LARGE], [MIDDLE], [SMALL]]:
            tiled = vae.decode(latents_BCFHW).sample
            assert tiled.shape == whole.shape == (1, 3, 1, height, width)
            assert 0 < (tiled - whole).abs().mean() < 0.2 * whole.std()


def test_tiles_that_do_not_add_up_are_replaced() -> None:
    """150 pixels are not an integer number of latents. Half of 64x96 is smaller than the smallest valid tile."""
    assert tiles_from((150, 250), 8) == [(144, 240), (96, 160)]
    assert tiles_from((32, 48), 8) == [(48, 40)]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 80), (56, 88)])
def test_a_tiny_vae_decodes_in_tiles_to_the_right_size(vae: Any, height: int, width: int) -> None:
    vae.tile_sample_min_height, vae.tile_sample_min_width = 32, 48
    Decoder(vae, print, tiled=True)
    with torch.no_grad():
        video_BCFHW = vae.decode(torch.randn(1, 16, 1, height // 8, width // 8)).sample
    assert video_BCFHW.shape == (1, 3, 1, height, width)
