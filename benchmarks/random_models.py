"""Makes full-size CogVideoX pipelines with random weights and prepared folders with random tensors, for benchmarks.

The values of weights affect neither time nor memory. The configs are those of the five published checkpoints. T5 has
its real width but only one layer unless more are asked for, because training never runs it.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cogvideox.config.geometry import Geometry

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "examples")]

VERSION_1 = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
}
LARGE = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
VERSION_1_5 = {
    "max_text_seq_length": 224,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
    "patch_size_t": 2,
    "patch_bias": False,
}
IMAGE = {"in_channels": 32}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "2b": VERSION_1 | {"num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False},
    "5b": VERSION_1 | LARGE,
    "5b-i2v": VERSION_1 | LARGE | IMAGE | {"use_learned_positional_embeddings": True},
    "1.5-5b": VERSION_1 | LARGE | VERSION_1_5,
    "1.5-5b-i2v": VERSION_1 | LARGE | VERSION_1_5 | IMAGE | {"ofs_embed_dim": 512},
}
KINDS = tuple(TRANSFORMERS)
VAE = {
    "block_out_channels": (128, 256, 256, 512),
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "latent_channels": 16,
    "layers_per_block": 3,
    "sample_height": 480,
    "sample_width": 720,
    "temporal_compression_ratio": 4,
}
IMAGE_VARIANTS = 2


def is_image_to_video(kind: str) -> bool:
    """Returns whether a kind takes a first frame."""
    return kind.endswith("i2v")


def clip_size(kind: str) -> tuple[int, int, int]:
    """Returns the (frames, height, width) on which the published guides train a kind."""
    return (81, 768, 1360) if kind.startswith("1.5") else (49, 480, 720)


def vae_config(kind: str) -> dict[str, Any]:
    """Returns the config of a kind's VAE."""
    scaled = {"scaling_factor": 1.15258426 if kind == "2b" else 0.7, "invert_scale_latents": kind == "1.5-5b-i2v"}
    return VAE | scaled


def geometry_of_kind(kind: str) -> Geometry:
    """Returns the geometry of a kind at full size."""
    from tiny_cogvideox import make_scheduler

    from cogvideox.config.geometry import geometry_of

    return geometry_of(TRANSFORMERS[kind], vae_config(kind), dict(make_scheduler(kind).config))


def make_transformer(kind: str, device: str = "cuda", dtype: torch.dtype | None = None) -> Any:
    """Returns a random transformer on the device, by default in bf16."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    torch.set_default_dtype(dtype or torch.bfloat16)
    try:
        with torch.device(device):
            return CogVideoXTransformer3DModel(**TRANSFORMERS[kind])
    finally:
        torch.set_default_dtype(torch.float32)


def make_vae(kind: str, device: str = "cuda", dtype: torch.dtype | None = None) -> Any:
    """Returns a random VAE on the device, by default in bf16."""
    import torch
    from diffusers import AutoencoderKLCogVideoX

    with torch.device(device):
        return AutoencoderKLCogVideoX(**vae_config(kind)).to(dtype or torch.bfloat16)


def make_pipeline(kind: str, folder: Path, text_layers: int = 1) -> None:
    """Writes a pipeline folder with random bf16 weights, unless it exists. The published T5 has 24 layers."""
    import diffusers
    import torch
    from tiny_cogvideox import make_scheduler, make_tokenizer
    from transformers import T5Config, T5EncoderModel

    if (folder / "model_index.json").is_file():
        return
    tokenizer = make_tokenizer()
    size = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "feed_forward_proj": "gated-gelu"}
    config = T5Config(**size, num_layers=text_layers, vocab_size=len(tokenizer))
    with torch.device("cuda"):
        text_encoder = T5EncoderModel(config).bfloat16()
    pipeline = diffusers.CogVideoXImageToVideoPipeline if is_image_to_video(kind) else diffusers.CogVideoXPipeline
    parts = (tokenizer, text_encoder, make_vae(kind), make_transformer(kind), make_scheduler(kind))
    pipeline(*parts).save_pretrained(folder)


def key_of(what: str, number: int) -> str:
    """Returns a key for a tensor in the cache, in the form of a hash of its content."""
    return hashlib.sha256(f"{what} {number}".encode()).hexdigest()


def make_tensors(
    kind: str, pipeline: Path, folder: Path, samples: int = 2, size: tuple[int, int, int] | None = None
) -> None:
    """Writes a prepared folder with random moments and embeddings of (frames, height, width), by default clip_size."""
    import torch

    from cogvideox.config.buckets import Bucket
    from cogvideox.config.flags import EncodeFlags, ModelFlags
    from cogvideox.config.geometry import read_geometry
    from cogvideox.data.cache import CachedSample, CacheIndex, TensorCache
    from cogvideox.preparation.encoding import Encoders

    model = ModelFlags(str(pipeline))
    geometry = read_geometry(model)
    encoders = Encoders.of(model, EncodeFlags(), geometry, torch.device("cuda"))
    cache, bucket = TensorCache(folder), Bucket(*(size or clip_size(kind)))
    cached = []
    for i in range(samples):
        images = (key_of("image", i),) if is_image_to_video(kind) else ()
        video, prompt = key_of("video", i), key_of("prompt", i)
        sample = CachedSample(f"{i}.mp4", f"clip {i}", bucket, (video,), prompt, image_keys=images)
        cache.write(sample.video_keys[0], {"moments_CFHW": torch.randn(geometry.moments_shape(bucket)).bfloat16()})
        for key in images:
            moments_KCHW = torch.randn(IMAGE_VARIANTS, *geometry.image_shape(bucket)).bfloat16()
            cache.write(key, {"image_moments_KCHW": moments_KCHW})
        cached.append(sample)
    empty = key_of("prompt", -1)
    for key in [sample.prompt_key for sample in cached] + [empty]:
        shape = (geometry.max_text_seq_length, geometry.text_embed_dim)
        cache.write(key, {"prompt_LD": torch.randn(shape).bfloat16()})
    dtypes = {"vae": "bf16", "text_encoder": "bf16"}
    length = geometry.max_text_seq_length
    fps = float(geometry.default_fps)
    index = CacheIndex(tuple(cached), empty, fps, encoders.vae, encoders.text_encoder, dtypes, length)
    replace(index, image_variants=IMAGE_VARIANTS if is_image_to_video(kind) else 0).save(folder)
