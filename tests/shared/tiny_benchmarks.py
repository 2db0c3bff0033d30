"""Shrinks the models that benchmarks make, so that tests run the benchmarks on a CPU."""

from __future__ import annotations

import pytest
import random_models

TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "time_embed_dim": 16}
TINY |= {"text_embed_dim": 8, "max_text_seq_length": 6, "sample_height": 8, "sample_width": 12, "sample_frames": 9}
TINY_VAE = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
TINY_VAE |= {"sample_height": 64, "sample_width": 96}


def shrink_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks the models of version 1 and their clips."""
    for kind in ("2b", "5b"):
        monkeypatch.setitem(random_models.TRANSFORMERS, kind, random_models.TRANSFORMERS[kind] | TINY)
    monkeypatch.setattr(random_models, "VAE", random_models.VAE | TINY_VAE)
    monkeypatch.setattr(random_models, "clip_size", lambda kind: (9, 64, 96))
