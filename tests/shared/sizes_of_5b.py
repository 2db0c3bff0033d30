"""Defines the sizes of runs of CogVideoX-5b with clips of 49x480x720, for which tests predict memory and time."""

from __future__ import annotations

from dataclasses import replace

from cogvideox.planning.plan import Sizes

LORA = Sizes(  # rank 128
    blocks=42,
    block_bytes=252 * 2**20,
    rest_bytes=80 * 2**20,
    trained=132_120_576,
    item_bytes=2,
    samples=1,
    tokens=17776,
    width=3072,
    heads=48,
)
SFT = replace(LORA, trained=19_000_000, rest_bytes=0, block_trained=LORA.block_bytes // 2)
