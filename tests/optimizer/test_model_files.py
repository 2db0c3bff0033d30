"""model_files.py: from_pretrained reads what each process writes of a sharded transformer. Here one process has all.

tests/project/test_engines.py has several processes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from running import sft_flags
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cogvideox.config import args
from cogvideox.config.optimizers import make_optimizer
from cogvideox.config.options import SftOptions
from cogvideox.model import transformer_files
from cogvideox.model.methods import FullFinetune
from cogvideox.model.models import load_transformer
from cogvideox.optimizer.ema import Ema
from cogvideox.optimizer.engine import ShardedEngine
from cogvideox.optimizer.shard_files import own_or_raise
from cogvideox.optimizer.sharded_weights import ShardedWeights

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize(("kind", "largest", "files"), [("5b", 5 * 10**9, 1), ("5b-i2v", 2 * 10**5, 3), ("2b", 1, 60)])
@pytest.mark.parametrize("averaged", [False, True])
def test_stock_diffusers_reads_sharded_weights_that_nobody_gathers(
    kind: str,
    largest: int,
    files: int,
    averaged: bool,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = args.parse(SftOptions, None, sft_flags(tiny(kind), tmp_path, tmp_path), ())
    transformer = load_transformer(options.model, torch.bfloat16)
    method = FullFinetune(transformer, options)
    buffers = {name: buffer.clone() for name, buffer in transformer.named_buffers()}
    fully_shard(transformer.float(), mesh=init_device_mesh("cpu", (1,)))
    weights = ShardedWeights(transformer, partial(make_optimizer, options.optimizer), 1.0, False, torch.device("cpu"))
    ema = Ema(weights.parameters, weights.named_masters(), 0.5) if averaged else None
    with torch.no_grad():
        for number, master in enumerate(weights.named_masters().values()):
            master.copy_(torch.randn(master.shape, generator=torch.Generator().manual_seed(number)))
    monkeypatch.setattr(transformer_files, "LARGEST_FILE", largest)
    monkeypatch.setattr(ShardedWeights, "gathered", None)
    ShardedEngine(transformer, weights, True, own_or_raise, torch.bfloat16, ema).save_weights(method, tmp_path)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) >= files
    read = method.new_transformer(None, tmp_path)
    expected = ema.averages if ema else weights.named_masters()
    assert {name for name, _ in read.named_parameters()} == expected.keys()
    for name, parameter in read.named_parameters():
        assert parameter.equal(expected[name].bfloat16()), name
    for name, buffer in read.named_buffers():
        assert buffer.equal(buffers[name].to(buffer.dtype)), name
    for name, value in transformer.config.items():
        assert name.startswith("_") or read.config[name] == value, name
