"""Tests t5_stream.py: T5 with its blocks on the host gives the embeddings of T5 on the device bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor

from cogvideox.memory.streaming import Ring
from cogvideox.model import t5_stream

CPU = torch.device("cpu")
BLOCKS, WIDTH = 5, 32


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def encoder(request: pytest.FixtureRequest) -> Any:
    """Returns a T5 encoder with more blocks than slots."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": BLOCKS, "num_heads": 2}
    config = T5Config(vocab_size=50, feed_forward_proj="gated-gelu", **sizes)
    return T5EncoderModel(config).to(request.param).requires_grad_(False).eval()


@pytest.fixture
def tokens_BL() -> Tensor:
    return torch.randint(0, 50, (7, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pinned_now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the addresses of the buffers that are currently pinned."""
    addresses: list[int] = []

    def pin(buffer: Tensor) -> None:
        assert buffer.any()  # a buffer is filled before it is pinned, which is faster
        addresses.append(address := buffer.untyped_storage().data_ptr())
        finalize(buffer.untyped_storage(), addresses.remove, address)

    monkeypatch.setattr(t5_stream, "pin", pin)
    return addresses


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Returns the numbers of the blocks that were copied, in order."""
    numbers: list[int] = []
    copy = Ring.copy

    def watched(self: Ring, slot: Tensor, host: Tensor) -> None:
        numbers.append(next(number for number, other in self.hosts.items() if other is host))
        copy(self, slot, host)

    monkeypatch.setattr(Ring, "copy", watched)
    return numbers


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_output_is_bit_for_bit_that_of_the_encoder_on_the_device(encoder: Any, tokens_BL: Tensor, rows: int) -> None:
    wanted = torch.cat([encoder(part)[0] for part in tokens_BL.split(rows)])
    with t5_stream.streamed(encoder, CPU, rows):
        assert torch.equal(encoder(tokens_BL)[0], wanted)
        assert torch.equal(encoder(tokens_BL)[0], wanted)
        assert torch.equal(encoder(tokens_BL[2:3])[0], encoder(tokens_BL)[0][2:3]) or rows > 1


def test_a_block_and_the_last_norm_see_no_more_rows_than_asked_for(encoder: Any, tokens_BL: Tensor) -> None:
    seen: list[int] = []
    for module in (*encoder.encoder.block, encoder.encoder.final_layer_norm):
        module.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    with t5_stream.streamed(encoder, CPU, rows=3):
        encoder(tokens_BL)
    assert seen == [3, 3, 1] * (BLOCKS + 1)


def test_each_block_is_copied_once_a_pass_one_ahead(encoder: Any, tokens_BL: Tensor, copied: list[int]) -> None:
    with t5_stream.streamed(encoder, CPU, rows=1):
        encoder(tokens_BL)
        assert copied == [0, 1, 2, 3, 4, 0]
        encoder(tokens_BL)
    assert copied == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_only_two_blocks_are_on_the_device(encoder: Any) -> None:
    with t5_stream.streamed(encoder, CPU, rows=1):
        ring = encoder.encoder.block[0].ring
        assert len(ring.slots) == 2
        assert ring.slots[0].numel() == ring.hosts[0].numel()
    assert ring.slots == []


def test_weights_are_stored_in_the_pinned_buffers(encoder: Any, pinned_now: list[int]) -> None:
    before = deepcopy(encoder.state_dict())
    with t5_stream.streamed(encoder, CPU, rows=1):
        assert len(pinned_now) == BLOCKS
        for address, passing in zip(pinned_now, encoder.encoder.block, strict=True):
            homes = {name: p.untyped_storage().data_ptr() for name, p in passing.block.named_parameters()}
            elsewhere = {name for name, home in homes.items() if home != address}
            assert elsewhere == {name for name in homes if "relative_attention_bias" in name}
        after = {name.replace(".block.layer", ".layer"): p for name, p in encoder.state_dict().items()}
        after = {name.replace("norm.module.", "norm."): p for name, p in after.items()}
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_pinned(encoder: Any, pinned_now: list[int], fails: bool) -> None:
    try:
        with t5_stream.streamed(encoder, CPU, rows=1):
            assert pinned_now
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert pinned_now == []


def test_buffers_are_freed_if_no_more_memory_can_be_pinned(
    encoder: Any, pinned_now: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = t5_stream.pin

    def limited(buffer: Tensor) -> None:
        if len(pinned_now) == 2:
            raise MemoryError("no more")
        pin(buffer)

    monkeypatch.setattr(t5_stream, "pin", limited)
    with pytest.raises(MemoryError, match="no more"), t5_stream.streamed(encoder, CPU, rows=1):
        pass
    assert pinned_now == []
