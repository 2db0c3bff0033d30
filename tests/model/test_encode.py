"""Compares encode.py with the prompt encoding of the diffusers pipeline and with the posterior of the VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from diffusers.video_processor import VideoProcessor

from cogvideox.model.encode import IMAGE_NOISE, image_moments, prompt_embeds, video_moments

Tiny = Callable[[str], Path]
CAPTIONS = ["A red square moves slowly to the right.", "", "word " * 200]
LENGTH = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Uses one thread: the tiny models are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline(tiny: Tiny) -> Any:
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(tiny("5b") / "tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(tiny("5b") / "text_encoder").eval()
    return CogVideoXPipeline(tokenizer, text_encoder, None, None, None)


@pytest.fixture
def vae(tiny: Tiny) -> Iterator[Any]:
    return AutoencoderKLCogVideoX.from_pretrained(tiny("5b") / "vae").eval()


@pytest.fixture(scope="module")
def frames_FHWC() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)


# -- captions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [CAPTIONS[:1], CAPTIONS[1:2], CAPTIONS])
@pytest.mark.parametrize("length", [LENGTH, 17])
def test_embeds_are_the_pipeline_s(pipeline: Any, captions: list[str], length: int) -> None:
    ours = prompt_embeds(pipeline.tokenizer, pipeline.text_encoder, captions, length)
    with torch.no_grad():
        theirs = pipeline._get_t5_prompt_embeds(captions, max_sequence_length=length, device=torch.device("cpu"))
    assert ours.shape == (len(captions), length, 32)
    assert torch.equal(ours, theirs)
    assert not ours.requires_grad


def test_embeds_of_bf16_weights_are_the_pipeline_s(tiny: Tiny, pipeline: Any) -> None:
    from transformers import T5EncoderModel

    encoder = T5EncoderModel.from_pretrained(tiny("5b") / "text_encoder", dtype=torch.bfloat16).eval()
    half = CogVideoXPipeline(pipeline.tokenizer, encoder, None, None, None)
    ours = prompt_embeds(pipeline.tokenizer, encoder, CAPTIONS, LENGTH)
    with torch.no_grad():
        theirs = half._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=LENGTH, device=torch.device("cpu"))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_another_length_gives_other_embeddings(pipeline: Any) -> None:
    """T5 attends to the padding, which is why the length must be that of the model."""
    short, long = (prompt_embeds(pipeline.tokenizer, pipeline.text_encoder, CAPTIONS[:1], n) for n in (24, 32))
    assert (short[0, :4] - long[0, :4]).abs().max() > 1e-4


def test_different_captions_have_different_embeddings(pipeline: Any) -> None:
    embeds = prompt_embeds(pipeline.tokenizer, pipeline.text_encoder, CAPTIONS, LENGTH)
    assert not torch.equal(embeds[0], embeds[1])


# -- clips -------------------------------------------------------------------------------------------------------------


def reference(vae: Any, video_BCFHW: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(video_BCFHW.to(vae.dtype)).latent_dist.parameters[0]


def in_range(frames_FHWC: np.ndarray) -> torch.Tensor:
    """Returns the clip in [-1, 1], fp32, (B, C, F, H, W)."""
    return (torch.from_numpy(frames_FHWC).float() / 127.5 - 1.0).permute(3, 0, 1, 2)[None]


def test_moments_are_the_vae_s(vae: Any, frames_FHWC: np.ndarray) -> None:
    ours = video_moments(vae, frames_FHWC)
    assert ours.shape == (32, 2, 4, 6)
    assert torch.equal(ours, reference(vae, in_range(frames_FHWC)))
    assert not ours.requires_grad


def test_pixels_are_those_of_the_pipeline_s_video_processor(vae: Any, frames_FHWC: np.ndarray) -> None:
    theirs = VideoProcessor(vae_scale_factor=8).preprocess_video(list(frames_FHWC.astype(np.float32) / 255.0))
    torch.testing.assert_close(video_moments(vae, frames_FHWC), reference(vae, theirs), rtol=1e-4, atol=1e-5)


def test_moments_are_unscaled_and_not_a_sample(vae: Any, frames_FHWC: np.ndarray) -> None:
    first = video_moments(vae, frames_FHWC)
    vae.register_to_config(scaling_factor=123.0)
    torch.manual_seed(1)
    assert torch.equal(video_moments(vae, frames_FHWC), first)


def test_frames_height_width_and_color_keep_their_places(vae: Any, frames_FHWC: np.ndarray) -> None:
    plain = video_moments(vae, frames_FHWC)
    for changed in (frames_FHWC[::-1], frames_FHWC[:, ::-1], frames_FHWC[:, :, ::-1], frames_FHWC[..., ::-1]):
        assert not torch.allclose(video_moments(vae, np.ascontiguousarray(changed)), plain, atol=1e-3)
    assert video_moments(vae, np.ascontiguousarray(frames_FHWC.swapaxes(1, 2))).shape == (32, 2, 6, 4)


def test_tiles_are_used_where_the_vae_has_them_on(vae: Any) -> None:
    frames_FHWC = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    plain = video_moments(vae, frames_FHWC)
    # Tiles that start every 40 and 32 pixels start at integer latents, as in the published VAE; the tiny VAE's default
    # tiles do not.
    vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=40)
    tiled = video_moments(vae, frames_FHWC)
    assert tiled.shape == plain.shape
    assert not torch.equal(tiled, plain)
    assert torch.equal(tiled, reference(vae, in_range(frames_FHWC)))


def test_bf16_weights_give_bf16_moments(vae: Any, frames_FHWC: np.ndarray) -> None:
    exact = video_moments(vae, frames_FHWC)
    moments = video_moments(vae.to(torch.bfloat16), frames_FHWC)
    assert moments.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(moments.float().flatten(), exact.flatten(), dim=0) > 0.99


def test_pixels_are_rounded_to_the_vae_s_type_once(vae: Any, frames_FHWC: np.ndarray) -> None:
    vae.to(torch.bfloat16)
    assert torch.equal(video_moments(vae, frames_FHWC), reference(vae, in_range(frames_FHWC)))


# -- first frames ------------------------------------------------------------------------------------------------------


class Seen:
    """Stands in for a VAE: records its inputs, and returns each input twice as mean and log variance."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []

    def encode(self, video_BCFHW: torch.Tensor) -> Any:
        self.images.append(video_BCFHW[0, :, 0])
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.cat([video_BCFHW] * 2, dim=1)))


def noise_on(frame_HWC: np.ndarray, number: int) -> torch.Tensor:
    """Returns the noise that one draw adds to the pixels, (3, H, W)."""
    seen = Seen()
    image_moments(seen, frame_HWC, [("seed", "content", number)])
    return seen.images[0] - in_range(frame_HWC[None])[0, :, 0]


def test_a_first_frame_s_moments_are_the_vae_s_of_the_noisy_frame(vae: Any, frames_FHWC: np.ndarray) -> None:
    moments = image_moments(vae, frames_FHWC[0], [("a", 0), ("a", 1), ("b", 0)])
    assert moments.shape == (3, 32, 4, 6)
    seen = Seen()
    image_moments(seen, frames_FHWC[0], [("a", 0), ("a", 1), ("b", 0)])
    for made, image_CHW in zip(moments, seen.images, strict=True):
        assert torch.equal(made, reference(vae, image_CHW[None, :, None])[:, 0])
    assert not torch.equal(moments[0], moments[1])
    clean = video_moments(vae, frames_FHWC[:1])[:, 0]
    assert torch.nn.functional.cosine_similarity(moments.flatten(1), clean.flatten(), dim=1).min() > 0.9


def test_the_noise_follows_from_its_draw_alone(vae: Any, frames_FHWC: np.ndarray) -> None:
    draws = [("a", number) for number in range(3)]
    three = image_moments(vae, frames_FHWC[0], draws)
    torch.manual_seed(1)
    assert torch.equal(image_moments(vae, frames_FHWC[0], draws), three)
    assert torch.equal(image_moments(vae, frames_FHWC[0], draws[1:2])[0], three[1])


def test_the_noise_is_as_strong_as_the_model_was_trained_with(frames_FHWC: np.ndarray) -> None:
    """Each encoding draws sigma = exp(N(-3, 0.5)), and adds white noise of this deviation to the pixels."""
    noises = torch.stack([noise_on(frames_FHWC[0], number) for number in range(400)])
    sigmas = noises.flatten(1).std(dim=1)
    assert IMAGE_NOISE == (-3.0, 0.5)
    assert abs(sigmas.log().mean() + 3.0) < 4 * 0.5 / 20
    assert abs(sigmas.log().std() - 0.5) < 4 * 0.5 / 28
    white = noises / sigmas.view(-1, 1, 1, 1)
    assert abs(white.mean()) < 0.005
    assert abs((white[..., 1:] * white[..., :-1]).mean()) < 0.005
