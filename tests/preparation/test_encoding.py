"""Tests of encoding.py: the keys of the cache, and how encoded tensors are handed over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cogvideox.data.media.transforms import Fit
from cogvideox.data.records import Variant
from cogvideox.model import encode
from cogvideox.preparation.encoding import Encoders, one_behind


def test_keys_change_with_everything_that_determines_the_tensor() -> None:
    base: dict[str, Any] = {
        "vae": "v",
        "text_encoder": "t",
        "vae_dtype": "bf16",
        "text_dtype": "bf16",
        "tiling": False,
        "text_length": 226,
    }
    variant = Variant((0, 1), Fit(8, 8, 0, 0, 8, 8, False), "pyav")

    def keys(content: str = "c", caption: str = "a", variant: Variant = variant, **changes: Any) -> tuple[str, str]:
        encoders = Encoders(**base | changes)
        return encoders.video_key(content, variant), encoders.prompt_key(caption)

    video, prompt = keys()
    assert keys() == (video, prompt)
    for changes in ({"content": "d"}, {"variant": replace(variant, indices=(0, 2))}, {"vae": "w"}):
        assert keys(**changes)[0] != video
        assert keys(**changes)[1] == prompt
    for changes in ({"vae_dtype": "fp32"}, {"tiling": True}, {"variant": replace(variant, conversions=("hlg",))}):
        assert keys(**changes)[0] != video
        assert keys(**changes)[1] == prompt
    for changes in ({"caption": "b"}, {"text_encoder": "u"}, {"text_dtype": "fp32"}, {"text_length": 32}):
        assert keys(**changes)[1] != prompt
        assert keys(**changes)[0] == video


def test_one_behind_loses_nothing_and_keeps_the_order() -> None:
    for number in range(4):
        assert list(one_behind(iter(range(number)))) == list(range(number))


@pytest.mark.parametrize("shape", [(4, 2, 3, 5), (1,)])
def test_async_copies_are_complete_and_contiguous(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    turned = {"a": tensor.movedim(0, -1), "b": tensor}
    arrived = encode.AsyncCopy(turned).wait()
    assert all(torch.equal(arrived[name], turned[name]) and arrived[name].is_contiguous() for name in turned)
