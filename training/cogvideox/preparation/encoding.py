"""Encodes captions with T5 and clips with the VAE, and names the results by keys of the cache.

``Encoders`` computes the keys, which depend on the content and on everything that decides the tensor. A ``VaeInput``
is one tensor that the VAE encodes. ``encode_captions`` embeds captions into a cache.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import torch

from cogvideox import stopping
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import EncodeFlags, ModelFlags
from cogvideox.config.geometry import Geometry
from cogvideox.data.cache import CacheIndex, TensorCache, hash_of
from cogvideox.data.records import ClipRecord, Variant
from cogvideox.errors import UsageError
from cogvideox.model import encode, models
from cogvideox.model.t5_stream import BATCHES_PER_PASS
from cogvideox.progress import ProgressBar
from cogvideox.runtime.ranks import Ranks

Draws = tuple[tuple[object, ...], ...]  # one random-number key for the noise on each encoding of a first frame


@dataclass(frozen=True)
class Encoders:
    """Identifies the encoders of a pipeline and their settings, which are part of every key in the cache.

    Attributes:
        vae: Fingerprint of the weights of the VAE.
        text_encoder: Fingerprint of the weights of T5 and of its tokenizer.
        vae_dtype: Precision of the VAE, for example "bf16".
        text_dtype: Precision of T5.
        tiling: Whether the VAE encodes frames in tiles.
        text_length: Number of tokens of an embedding.
    """

    vae: str
    text_encoder: str
    vae_dtype: str
    text_dtype: str
    tiling: bool
    text_length: int

    @classmethod
    def of(cls, model: ModelFlags, flags: EncodeFlags, geometry: Geometry, device: torch.device) -> "Encoders":
        """Returns the encoders of a pipeline, in the precision of --dtype or the default precision of the device."""
        return cls(
            vae=models.weight_fingerprint(model, "vae"),
            text_encoder=models.text_fingerprint(model),
            vae_dtype=flags.dtype or models.default_dtype(model, "vae", device),
            text_dtype=flags.dtype or models.default_dtype(model, "text_encoder", device),
            tiling=flags.encode_tiling,
            text_length=geometry.max_text_seq_length,
        )

    def video_key(self, content: str, variant: Variant) -> str:
        """Returns the cache key of the moments of one variant of a clip.

        Args:
            content: Hash of the file's content.
            variant: The frames, and how they are resized, cropped and flipped.
        """
        return hash_of(["video", content, variant.to_json(), self.vae, self.vae_dtype, self.tiling])

    def image_key(self, draws: Draws) -> str:
        """Returns the cache key of the moments of a first frame.

        Args:
            draws: Random-number keys, which contain the hash of the file and how the frame is cropped.
        """
        return hash_of(["image", encode.IMAGE_NOISE, draws, self.vae, self.vae_dtype, self.tiling])

    def prompt_key(self, caption: str) -> str:
        """Returns the cache key of a caption's embedding."""
        return hash_of(["prompt", caption, self.text_encoder, self.text_dtype, self.text_length])


def other_encoders(index: CacheIndex, encoders: Encoders) -> list[str]:
    """Names the encoders with which a cache was made and that differ from the model's."""
    pairs = {
        "VAE": (index.vae, encoders.vae),
        "text encoder": (index.text_encoder, encoders.text_encoder),
        "text length": (index.text_length, encoders.text_length),
    }
    return [name for name, (then, now) in pairs.items() if then != now]


@dataclass(frozen=True)
class VaeInput:
    """What the VAE encodes into one tensor: a variant of a clip in a bucket, or its first frame.

    Files with the same content share one tensor.

    Attributes:
        bucket: The size of the tensor's clip.
        variant: The frames to decode and how they are resized and cropped.
        path: The file to decode.
        stamp: Size and time of the file when it was planned; a file with another stamp is not decoded.
        records: The ledger records of all files that the tensor may be made from.
        draws: Random-number keys of the noise on each encoding of a first frame; empty for a clip.
    """

    bucket: Bucket
    variant: Variant
    path: str
    stamp: list[int] | None
    records: list[ClipRecord]
    draws: Draws = ()

    @property
    def pixels(self) -> int:
        """Number of pixels in all frames that are encoded."""
        return (len(self.draws) or self.bucket.frames) * self.bucket.height * self.bucket.width

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Returns the shape of the tensor."""
        if self.draws:
            return len(self.draws), *geometry.image_shape(self.bucket)
        return geometry.moments_shape(self.bucket)

    def encode(self, vae: Any, frames_FHWC: np.ndarray) -> dict[str, torch.Tensor]:
        """Encodes frames, uint8 (F, H, W, 3), without waiting for a GPU; returns the tensor by its cache name."""
        if self.draws:
            return {"image_moments_KCHW": encode.image_moments(vae, frames_FHWC[0], self.draws)}
        return {"moments_CFHW": encode.video_moments(vae, frames_FHWC)}


def missing_captions(cache: TensorCache, encoders: Encoders, captions: Sequence[str]) -> list[str]:
    """Returns the captions whose embeddings are not in the cache, without duplicates."""
    return [text for text in dict.fromkeys(captions) if not cache.has(encoders.prompt_key(text))]


def encode_captions(
    cache: TensorCache,
    model: ModelFlags,
    encoders: Encoders,
    captions: Iterable[str],
    total: int,
    batch: int,
    ranks: Ranks,
    t5_on: str,
) -> None:
    """Embeds captions into the cache. T5 is loaded only if there are captions.

    Args:
        cache: Where the embeddings are written.
        model: The pipeline that T5 belongs to.
        encoders: The precision and the text length.
        captions: The captions to embed. They are taken one batch at a time.
        total: The expected number of captions, for the progress bar.
        batch: Captions per forward pass.
        ranks: The processes of the run: the device, and which process shows the progress bar.
        t5_on: Where the weights of T5 are kept: "device", "host" or "auto".

    Raises:
        UsageError: T5 does not fit on the device, or it overflows in its precision.
    """
    captions = iter(captions)
    first = list(islice(captions, 1))
    if not first:
        return
    captions = chain(first, captions)
    place = models.resolve_t5_on(model, encoders.text_dtype, ranks.device, t5_on)
    at_once = batch * (BATCHES_PER_PASS if place == "host" else 1)
    fix = "give --t5_on host" if place == "device" else "stop other programs that use it"
    room = room_for(f"--t5_on {t5_on}", "for T5", fix)
    with room, models.text_encoder(model, encoders.text_dtype, ranks.device, place, batch) as (tokenizer, encoder):
        hidden = not ranks.is_main_process
        bar = ProgressBar(total=total, desc="encoding captions", unit="caption", disable=hidden)
        while texts := list(islice(captions, at_once)):
            embeds_BLD = encode.prompt_embeds(tokenizer, encoder, texts, encoders.text_length)
            for text, embed in zip(texts, embeds_BLD, strict=True):
                if not torch.isfinite(embed).all():
                    raise UsageError(f"--dtype {encoders.text_dtype}: T5 overflows on {text!r}; give bf16 or fp32")
                cache.write(encoders.prompt_key(text), {"prompt_LD": embed.clone()})
            stopping.unit("caption")
            bar.update(len(texts))
        bar.total = bar.n  # other processes may have taken more or fewer than expected
        bar.close()


Item = TypeVar("Item")


def one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """Yields each item after the next one was started, so that the device computes while this one is stored."""
    begun: deque[Item] = deque()
    for item in items:
        begun.append(item)
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


@contextmanager
def room_for(flag: str, what: str, fix: str) -> Iterator[None]:
    """Converts an out-of-memory error of the device into a UsageError.

    Args:
        flag: The flag and its value that the message names.
        what: The purpose of the memory, such as "for T5".
        fix: What the user can do.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{flag}: the device has too little free memory {what}; {fix}") from error


def fix_for_memory(tiling: bool) -> str:
    """Returns the advice for a clip that does not fit on the device."""
    if tiling:
        return "give smaller buckets, or stop other programs that use it"
    return "give --encode_tiling true (other latents than the model was trained on), or smaller buckets"
