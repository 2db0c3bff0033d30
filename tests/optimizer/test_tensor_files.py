"""tensor_files.py: files that safetensors and diffusers read, written with at most one tensor in memory twice."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from running import equal, safetensors_of, sft_flags
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideox.config import args
from cogvideox.config.options import SftOptions
from cogvideox.files import file_hash
from cogvideox.model import transformer_files
from cogvideox.model.methods import FullFinetune
from cogvideox.model.models import load_transformer
from cogvideox.optimizer.engine import LocalEngine
from cogvideox.tensor_files import DTYPES, Piece, pieces_of, write_tensors


def test_safetensors_reads_every_type_and_shape(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(-3, 3).to(dtype).view(2, 3) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 4), "odd": torch.ones(3, dtype=torch.uint8)}
    tensors["transposed"] = torch.arange(6.0).view(2, 3).T
    known = write_tensors(tmp_path / "a.safetensors", pieces_of(tensors), {"note": "b"})
    assert known == file_hash(tmp_path / "a.safetensors")
    assert equal(load_file(tmp_path / "a.safetensors"), tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "b"}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "b.safetensors", {"note": "b"})
    assert equal(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


class Counted:
    """Makes pieces that know how many of their tensors exist at a time."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Any]] = []
        self.alive: list[int] = []

    def __call__(self) -> Tensor:
        memory = np.full(4, float(len(self.made)), np.float32)
        self.made.append(weakref.ref(memory))
        self.alive.append(sum(reference() is not None for reference in self.made))
        return torch.from_numpy(memory)  # holds the array for as long as its storage is used

    def pieces(self) -> dict[str, Piece]:
        return dict.fromkeys("cab", Piece(torch.Size([4]), torch.float32, (), self))


def test_each_piece_is_read_once_and_dropped_before_the_next(tmp_path: Path) -> None:
    """A joined fp32 master must exist for one parameter at a time only."""
    counted = Counted()
    write_tensors(tmp_path / "a.safetensors", counted.pieces())
    assert counted.alive == [1, 1, 1]
    assert load_file(tmp_path / "a.safetensors")["b"].tolist() == [1.0] * 4


def test_pieces_are_checked_for_nan_one_after_another() -> None:
    counted = Counted()
    engine: Any = LocalEngine(torch.nn.Linear(1, 1), MagicMock(pieces=counted.pieces, parameters={}), writes=True)
    assert engine.not_finite() == []
    assert max(counted.alive) <= 2  # the last one exists until the next one has been read
    assert len(counted.alive) == 3


@pytest.mark.parametrize(("kind", "largest", "files"), [("5b", 5 * 10**9, 1), ("5b-i2v", 2 * 10**5, 3)])
def test_a_saved_transformer_is_the_one_that_diffusers_saves(
    kind: str,
    largest: int,
    files: int,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = args.parse(SftOptions, None, sft_flags(tiny(kind), tmp_path, tmp_path), ())
    transformer = load_transformer(options.model, torch.bfloat16)
    monkeypatch.setattr(transformer_files, "LARGEST_FILE", largest)
    assert FullFinetune(transformer, options).save(tmp_path / "ours") == {}
    transformer.save_pretrained(tmp_path / "theirs", max_shard_size=largest)
    ours, theirs = tmp_path / "ours" / "transformer", tmp_path / "theirs"
    assert equal(safetensors_of(ours), safetensors_of(theirs))
    assert len(list(ours.glob("*.safetensors"))) >= files
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0] == configs[1]


def test_a_tensor_that_was_written_can_still_be_resized(tmp_path: Path) -> None:
    """FSDP2 frees gathered weights by resizing their memory."""
    weight = torch.arange(6.0)
    write_tensors(tmp_path / "one.safetensors", pieces_of({"weight": weight, "empty": torch.zeros(0)}))
    assert load_file(tmp_path / "one.safetensors")["weight"].equal(torch.arange(6.0))
    weight.untyped_storage().resize_(0)
