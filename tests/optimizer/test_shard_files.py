"""shard_files.py: processes that each write their shards make an ordinary safetensors file, which any number reads."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideox import tensor_files
from cogvideox.errors import DiskError
from cogvideox.optimizer import shard_files
from cogvideox.optimizer.shard_files import Shard, raise_errors, read_shards, write_shards
from cogvideox.tensor_files import content_of

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


def tensors_of(dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns a matrix, a vector with fewer rows than some numbers of processes, a convolution, and scalars."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"master/matrix": (7, 3), "master/bias": (2,), "master/patch": (4, 2, 2, 2), "average/matrix": (7, 3)}
    made = {name: torch.randn(shape, generator=generator).mul(9).to(dtype) for name, shape in shapes.items()}
    return made | {"scale": torch.tensor(65536.0), "good_steps": torch.tensor(3.0), "all/step": torch.tensor(12)}


def shares(tensors: dict[str, Tensor], world: int, by_rows: bool = True) -> list[dict[str, Shard]]:
    """Returns the shards of each process, divided as torch.chunk divides, which leaves some processes without any.

    Args:
        tensors: The complete tensors.
        world: The number of processes.
        by_rows: Whether shards consist of complete rows, as those of FSDP2, or of any elements, as those of ZeRO.
    """
    found: list[dict[str, Shard]] = [{} for _ in range(world)]
    for name, tensor in tensors.items():
        if not tensor.shape:
            for rank in range(world):
                found[rank][name] = Shard(tensor, tensor.shape, writes=rank == 0)
            continue
        units = tensor if by_rows else tensor.flatten()
        length = -(-len(units) // world)
        for rank in range(world):
            first = min(rank * length, len(units))
            found[rank][name] = Shard(units[first : first + length], tensor.shape, first * units[0].numel())
    return found


def write(path: Path, parts: list[dict[str, Shard]]) -> str:
    """Writes a file from one thread for each process, and returns its hash, which all have."""
    barrier, lock = threading.Barrier(len(parts), timeout=20), threading.Lock()
    gathered: list[dict[int, Any]] = [{} for _ in range(3)]
    hashes: set[str] = set()
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        rounds = iter(gathered)

        def gather_or_raise(outcome: Any) -> list[Any]:
            found = next(rounds)
            with lock:
                found[rank] = outcome
            barrier.wait()
            return raise_errors([found[number] for number in range(len(parts))])

        try:
            hashes.add(write_shards(path, parts[rank], rank == 0, gather_or_raise))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) in (0, len(parts))  # all processes end alike
    if errors:
        raise errors[0]
    (found,) = hashes
    return found


def check_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("world", "by_rows"), [(1, True), (3, True), (3, False)])
def test_the_file_has_the_content_of_one_that_safetensors_writes(
    tmp_path: Path, dtype: torch.dtype, world: int, by_rows: bool
) -> None:
    tensors = tensors_of(dtype)
    save_file(tensors, tmp_path / "right.safetensors", {"format": "pt"})
    found = write(tmp_path / "rows.safetensors", shares(tensors, world, by_rows))
    assert found == hashlib.sha256((tmp_path / "rows.safetensors").read_bytes()).hexdigest()
    check_equal(load_file(tmp_path / "rows.safetensors"), load_file(tmp_path / "right.safetensors"))
    sizes = [(tmp_path / name).stat().st_size for name in ("rows.safetensors", "right.safetensors")]
    assert abs(sizes[0] - sizes[1]) < tensor_files.LENGTH_BYTES + 16  # the headers may order or pad entries differently


def test_a_tensor_larger_than_one_write_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    pwrite: Callable[..., int] = shard_files.os.pwrite

    def short(handle: int, content: memoryview, offset: int) -> int:
        """Writes less than it is given, as Linux may."""
        written.append(pwrite(handle, content[:7], offset))
        return written[-1]

    monkeypatch.setattr(shard_files, "LARGEST_WRITE", 10)
    monkeypatch.setattr(shard_files.os, "pwrite", short)
    tensors = tensors_of(torch.float32)
    write(tmp_path / "rows.safetensors", shares(tensors, 2))
    check_equal(load_file(tmp_path / "rows.safetensors"), tensors)
    assert max(written) == 7
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())


def test_a_long_range_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "READ_BYTES", 10)
    path = tmp_path / "rows.safetensors"
    assert write(path, shares(tensors_of(torch.float32), 2)) == hashlib.sha256(path.read_bytes()).hexdigest()


def failing_disk(monkeypatch: pytest.MonkeyPatch, shard: Shard, fails: Callable[..., None]) -> None:
    """Replaces the write of a shard, which has other values than all other shards."""
    mine, write_at = bytes(content_of(shard.local)), shard_files.write_at

    def write(handle: int, content: memoryview, offset: int) -> None:
        (fails if content == mine else write_at)(handle, content, offset)

    monkeypatch.setattr(shard_files, "write_at", write)


@pytest.mark.parametrize("failing", [0, 2])
def test_every_process_raises_the_error_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parts = shares(tensors_of(torch.float32), 3)
    failing_disk(monkeypatch, parts[failing]["master/matrix"], full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "rows.safetensors", parts)


@pytest.mark.parametrize("losing", [0, 2])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("kept", [0, 5], ids=["all", "the end"])
@pytest.mark.fault("disk: it loses what one of several ranks has written")
def test_every_process_raises_if_a_write_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losing: int, by_rows: bool, kept: int
) -> None:
    parts = shares(tensors_of(torch.float32), 3, by_rows)
    part = parts[losing]["master/matrix"]
    failing_disk(monkeypatch, part, lambda handle, content, offset: os.pwrite(handle, content[:kept], offset))
    with pytest.raises(DiskError, match=r"rows.safetensors: is not what was written; is the disk full"):
        write(tmp_path / "rows.safetensors", parts)


def test_every_process_ends_if_the_file_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "rows.safetensors", shares(tensors_of(torch.float32), 2))


def test_rows_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).mT
    write(tmp_path / "rows.safetensors", shares({"a": tensor}, 2))
    assert load_file(tmp_path / "rows.safetensors")["a"].equal(tensor.contiguous())


def test_of_several_processes_with_equal_rows_only_one_writes(tmp_path: Path) -> None:
    """With copies of the shards, a process whose rows another one writes leaves the file alone."""
    tensors = {"a": torch.ones(4, 2)}
    silent = {"a": Shard(torch.zeros(2, 2), torch.Size((4, 2)), 4, writes=False)}
    write(tmp_path / "rows.safetensors", [*shares(tensors, 2), silent])
    assert load_file(tmp_path / "rows.safetensors")["a"].equal(tensors["a"])


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_number_of_processes_reads_its_shards(tmp_path: Path, world: int, by_rows: bool) -> None:
    """With 5 processes, some have nothing of the shorter tensors."""
    tensors = tensors_of(torch.float32)
    save_file(tensors, tmp_path / "state.safetensors")
    for part in shares(tensors, world, by_rows):
        check_equal(dict(read_shards(tmp_path / "state.safetensors", part)), {name: part[name].local for name in part})


def test_a_tensor_that_nobody_describes_is_read_completely(tmp_path: Path) -> None:
    tensors = tensors_of(torch.float32)
    save_file(tensors, tmp_path / "state.safetensors")
    check_equal(dict(read_shards(tmp_path / "state.safetensors", {})), tensors)


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    path.write_bytes(b"x" * 10_000)
    write(path, shares({"a": torch.ones(2, 2)}, 2))
    check_equal(load_file(path), {"a": torch.ones(2, 2)})


def test_data_is_aligned_to_the_size_of_its_numbers() -> None:
    """A vector of 3 bytes must not shift the numbers of 8 bytes that follow."""
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(1)}
    head, starts = tensor_files.header(shares(tensors, 1)[0])
    assert len(head) % tensor_files.LENGTH_BYTES == 0
    for name, tensor in tensors.items():
        assert (len(head) + starts[name]) % tensor.element_size() == 0
