"""background.py: a checkpoint is copied, and written while training goes on, with all promises of checkpoint.py."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest
import torch
from fakes import FakeEngine, listing, run_alone, saver_of
from running import SFT_SCRIPT, Forked, equal, finish, fork_ranks, losses, python, safetensors_of, sft_flags
from safetensors.torch import load_file
from waiting import eventually

from cogvideox import tensor_files
from cogvideox.config import args
from cogvideox.config.options import SftOptions
from cogvideox.errors import DiskError, NonFiniteError
from cogvideox.memory.buffers import aligned
from cogvideox.optimizer.adam import join, split
from cogvideox.optimizer.ema import Ema
from cogvideox.optimizer.engine import lower_bits
from cogvideox.optimizer.rule import make_masters, rule_of
from cogvideox.runtime import background, checkpoint
from cogvideox.runtime.background import Reserve, Snapshot, Writing
from cogvideox.runtime.best import BestCheckpoint
from cogvideox.runtime.checkpoint import Saver
from cogvideox.runtime.checkpoint_files import checkpoints, damage_of
from cogvideox.runtime.disk_room import bytes_left_out, copy_bytes
from cogvideox.runtime.run import use_cores
from cogvideox.tensor_files import Piece, file_order, pieces_of, size_of

RESERVES = "while training goes on; 1000 bytes of host memory are reserved for copies"
PARTLY = "while training goes on; 750 bytes of host memory are reserved for copies, and training waits for the rest, "
PARTLY += "0 s: a complete copy needs 1000 bytes"
WITHOUT_COPY = "training waits until it is written, and goes on while it is verified: a copy needs "
WAITS = f"{WITHOUT_COPY}1000 bytes of host memory, and 500 bytes are free"


class Slow:
    """A disk on which nothing is written before ``release``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write, self.write = threading.Event(), background.write_tensors
        monkeypatch.setattr(background, "write_tensors", self)

    def __call__(self, *arguments: Any) -> None:
        assert self.may_write.wait(60)
        self.write(*arguments)

    def release(self) -> None:
        self.may_write.set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    disk = Slow(monkeypatch)
    yield disk
    disk.release()


def saver(folder: Path, engine: FakeEngine, **more: Any) -> Saver:
    return saver_of(run_alone(folder), engine, num_bytes=1000, copy_bytes=1000, in_background=True, **more)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_the_state_of_the_saved_step_is_written_while_training_changes_it(tmp_path: Path, slow: Slow) -> None:
    engine = FakeEngine()
    expected = engine.weight.clone()
    saving = saver(tmp_path, engine)
    saving.save(2)
    engine.weight.fill_(9.0)
    saving.check()
    assert names(tmp_path) == []
    assert saving.writing
    slow.release()
    saving.finish()
    assert load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")["weight"].equal(expected)
    assert damage_of(tmp_path / "checkpoint-2") is None
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_check_notices_the_end_and_reports_both_times(
    tmp_path: Path, slow: Slow, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = saver(tmp_path, FakeEngine())
    saving.save(2)
    assert saving.writing
    slow.release()
    saving.writing.thread.join()
    saving.check()
    assert saving.writing is None
    line = "checkpoint-2: training waited 0.0 s while it was copied to host memory, and it was written in 0 s"
    assert line in capsys.readouterr().err


def test_the_thread_leaves_the_cores_to_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    priority = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())  # noqa: E731
    monkeypatch.setattr(background, "write_tensors", lambda *_: seen.append(priority()))
    saving = saver(tmp_path, FakeEngine())
    before = priority()
    saving.save(2)
    saving.close()
    assert seen == [background.NICE] * 2
    assert priority() == before


@pytest.mark.parametrize(("spare", "said"), [(1200, RESERVES), (1000, PARTLY), (500, WAITS)])
def test_what_to_expect_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], spare: int, said: str) -> None:
    saver(tmp_path, FakeEngine()).announce(spare)
    text = capsys.readouterr().err
    assert re.search(r"writes .* GiB and takes \d+ s \(.* a second were measured\)[,;] ", text)
    assert said in text


@pytest.mark.parametrize(
    ("flags", "spare", "said"),
    [
        ((), 120, "90 bytes of host memory are reserved for copies, and training waits for the rest, 15 s: "),
        (("--use_8bit",), 60, WITHOUT_COPY),
        (("--optimizer", "torch.optim.SGD"), 40, WITHOUT_COPY),
    ],
)
def test_masters_in_fp32_are_copied_or_training_waits_for_all(
    flags: tuple[str, ...],
    spare: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both files have them. With exact moments, 30 of 160 bytes, which precede the masters, need not be copied."""
    options = args.parse(SftOptions, None, sft_flags(Path("m"), Path("d"), Path("o"), *flags), ())
    method: Any = SimpleNamespace(parameters=lambda: {"p": torch.nn.Parameter(torch.zeros(10))})
    saving = Saver(run_alone(tmp_path), FakeEngine(), method, {}, 1, 1, in_background=True)
    saving.check_disk(options, 0, 1)
    monkeypatch.setattr(checkpoint, "seconds_to_write", lambda *_: 80.0)
    saving.announce(spare)
    assert said in capsys.readouterr().err


def test_one_checkpoint_is_written_at_a_time_and_the_limit_holds(tmp_path: Path) -> None:
    engine = FakeEngine()
    saving = saver(tmp_path, engine, limit=2)
    for step in (2, 4, 6, 8):
        engine.weight = torch.full((8,), float(step))
        saving.save(step)
        assert len(names(tmp_path)) >= min(2, step // 2 - 1)
    saving.finish()
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-6"]
    for step in (6, 8):
        assert load_file(tmp_path / f"checkpoint-{step}" / "optimizer.safetensors")["weight"].eq(step).all()


def test_all_copies_use_the_memory_that_is_reserved_after_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: Slow
) -> None:
    """Later checks of the free memory do not count, because the run has this memory already."""
    engine, free = FakeEngine(), MagicMock(return_value=2000)
    monkeypatch.setattr(checkpoint, "free_host_bytes", free)
    saving = saver(tmp_path, engine)
    saving.check()
    free.return_value = 0
    assert saving.reserve
    memory = saving.reserve.memory()
    assert memory.nbytes == 1000
    seen = []
    monkeypatch.setattr(background, "fill", lambda target, source: seen.append(target) or target.copy_(source))
    for step in (2, 4):
        slow.may_write.clear()
        engine.weight = torch.full((8,), float(step))
        saving.save(step)
        assert saving.writing
        engine.weight.fill_(-1.0)
        slow.release()
        saving.finish()
    assert [copy.data_ptr() for copy in seen[: len(seen) // 2]] == [copy.data_ptr() for copy in seen[len(seen) // 2 :]]
    assert all(memory.data_ptr() <= copy.data_ptr() < memory.data_ptr() + 1000 for copy in seen)
    for step in (2, 4):
        assert load_file(tmp_path / f"checkpoint-{step}" / "optimizer.safetensors")["weight"].eq(step).all()
    saving.close()
    assert saving.reserve is None


def test_a_reserve_creates_its_pages_and_does_not_write_to_them_later() -> None:
    size, process = 2**28, psutil.Process()
    before = process.memory_info().rss
    reserve = Reserve(size)
    eventually(lambda: process.memory_info().rss - before >= 0.9 * size)
    del reserve
    for _ in range(10):  # ended at different moments
        memory = Reserve(size // 4).memory()
        memory.fill_(7)
        time.sleep(0.01)
        assert memory.eq(7).all()


@pytest.mark.parametrize("free", [555, 1112])
@pytest.mark.parametrize("reserves", [False, True])
def test_without_room_for_a_copy_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, reserves: bool
) -> None:
    monkeypatch.setattr(checkpoint, "free_host_bytes", lambda: free)
    saving = saver(tmp_path, FakeEngine())
    if reserves:
        saving.check()
    saving.save(2)
    assert is_copied(saving) == (free == 1112)
    saving.finish()
    assert names(tmp_path) == ["checkpoint-2"]


def is_copied(saving: Saver) -> bool:
    """Returns whether the checkpoint that a thread works on was copied; otherwise training waited for the disk."""
    assert saving.writing
    return "copied to host memory" in saving.writing.said


def test_with_room_for_a_part_training_waits_until_the_originals_of_the_rest_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state of 32 bytes is written from the tensor of training, and the LoRA of 16 bytes is a copy."""
    monkeypatch.setattr(checkpoint, "free_host_bytes", lambda: 40)
    events: list[str] = []
    write_hashed, wait = tensor_files.write_hashed, Writing.wait_for

    def slow_write(*arguments: Any) -> None:
        time.sleep(0.1)
        write_hashed(*arguments)
        events.append("written")

    def waits(writing: Writing, event: threading.Event) -> None:
        wait(writing, event)
        events.append("goes on")

    monkeypatch.setattr(tensor_files, "write_hashed", slow_write)
    monkeypatch.setattr(Writing, "wait_for", waits)
    engine = FakeEngine()
    saving, expected = saver(tmp_path, engine), engine.weight.clone()
    saving.copy_bytes = 48
    saving.save(2)
    engine.weight.fill_(9.0)
    saving.finish()
    assert events == ["written", "goes on", "written"]
    assert load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")["weight"].equal(expected)
    copied = r"checkpoint-2: training waited \d+\.\d s while 30 bytes of it were copied to host memory"
    assert re.search(copied + r" and the rest was written, and all was written in \d+ s", capsys.readouterr().err)


def test_training_goes_on_if_the_originals_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_host_bytes", lambda: 40)
    monkeypatch.setattr(tensor_files, "write_hashed", fails)
    saving = saver(tmp_path, FakeEngine())
    saving.copy_bytes = 48
    saving.save(2)
    with pytest.raises(DiskError, match="No space left on device"):
        saving.finish()
    assert os.listdir(tmp_path) == []


def test_with_an_average_a_part_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the average is saved it takes the place of the weights, so these tensors change before they are written."""
    monkeypatch.setattr(checkpoint, "free_host_bytes", lambda: 40)
    engine = FakeEngine()
    engine.ema = MagicMock()
    saving = saver(tmp_path, engine)
    saving.copy_bytes = 48
    saving.save(2)
    assert not is_copied(saving)
    saving.finish()


@pytest.mark.parametrize("fails", [False, True])
def test_without_room_training_goes_on_while_the_files_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    may_seal, seal = threading.Event(), checkpoint.seal

    def slow_seal(*arguments: Any) -> None:
        assert may_seal.wait(60)
        if fails:
            raise OSError(errno.EIO, "Input/output error")
        seal(*arguments)

    monkeypatch.setattr(checkpoint, "free_host_bytes", lambda: 0)
    monkeypatch.setattr(checkpoint, "seal", slow_seal)
    engine = FakeEngine()
    saving, expected = saver(tmp_path, engine), engine.weight.clone()
    saving.save(2)
    engine.weight.fill_(9.0)
    saving.check()
    assert names(tmp_path) == []
    may_seal.set()
    if fails:
        with pytest.raises(DiskError, match="Input/output error"):
            saving.finish()
        assert os.listdir(tmp_path) == []
        return
    saving.finish()
    assert load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")["weight"].equal(expected)
    said = r"checkpoint-2: training waited \d+\.\d s while it was written, and it was verified in \d+ s"
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("spare", [555, 1000, 1200])
def test_memory_that_a_larger_bucket_will_need_is_not_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """Buckets come in random order, so more memory may be free after the first step than the plan will leave."""
    monkeypatch.setattr(checkpoint, "free_host_bytes", lambda: 5000)
    saving = saver(tmp_path, FakeEngine())
    saving.announce(spare)
    saving.check()
    assert saving.reserve
    assert saving.reserve.num_bytes == {555: 0, 1000: 750, 1200: 1000}[spare]
    saving.save(2)
    assert is_copied(saving) == (spare > 555)
    saving.close()


def test_if_the_system_refuses_memory_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of the process, such as ulimit -v, is not part of the free memory."""

    def refuses(_: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(background, "host_buffer", refuses)
    saving = saver(tmp_path, FakeEngine())
    saving.check()
    saving.save(2)
    assert not is_copied(saving)
    saving.finish()
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    said = "checkpoint-2: no host memory for a copy ([Errno 12] Cannot allocate memory), so training waits"
    assert said in capsys.readouterr().err


def fails(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["write_tensors", "seal"])
@pytest.mark.parametrize("how", ["finish", "check", "save"])
@pytest.mark.fault("disk: full while a checkpoint is written in the background")
def test_a_full_disk_is_reported_and_the_last_checkpoint_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, how: str
) -> None:
    saving = saver(tmp_path, FakeEngine(), limit=1)
    saving.save(2)
    saving.finish()
    before = listing(tmp_path)
    monkeypatch.setattr(background if function == "write_tensors" else checkpoint, function, fails)
    saving.save(4)
    assert saving.writing
    saving.writing.thread.join()
    act: dict[str, Callable[[], None]] = {"finish": saving.finish, "check": saving.check}
    act["save"] = partial(saving.save, 6)
    with pytest.raises(DiskError, match=r"No space left on device, 1000 bytes needed, .* free; free some space"):
        act[how]()
    assert listing(tmp_path) == before
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert saving.writing is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.fault("numbers: infinity in a tensor that a checkpoint would save in the background")
def test_a_tensor_that_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    engine = FakeEngine()
    saving = saver(tmp_path, engine, limit=1)
    saving.save(2)
    engine.weight[3] = value
    saving.save(4)
    with pytest.raises(NonFiniteError, match=r"^checkpoint-4 is not saved: weight holds .* is .*/checkpoint-2: resume"):
        saving.finish()
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_the_best_checkpoint_is_chosen_when_it_is_complete(tmp_path: Path, slow: Slow) -> None:
    """The held-out loss is measured while the checkpoint is written, and --checkpoints_total_limit 1 must not win."""
    saving = saver(tmp_path, FakeEngine(), limit=1)
    best = BestCheckpoint(saving, wanted=True, grid="g")
    for step, loss in ((2, 1.0), (4, 2.0)):
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(f'{{"step": {step}, "held_out_loss": {loss}, "held_out_grid": "g"}}\n')
        slow.may_write.clear()
        saving.save(step)
        saving.after_writing(partial(best.update, step))
        assert f"checkpoint-{step}" not in names(tmp_path)
        slow.release()
        saving.finish()
        assert saving.kept == 2
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-2"]


def test_after_an_error_of_training_the_checkpoint_is_completed(tmp_path: Path, slow: Slow) -> None:
    saving = saver(tmp_path, FakeEngine())
    saving.save(2)
    threading.Timer(0.2, slow.release).start()
    saving.close()
    assert names(tmp_path) == ["checkpoint-2"]
    saving.close()


def test_a_snapshot_copies_tensors_of_all_sizes_and_shapes(tmp_path: Path) -> None:
    """The large one is copied in several parts."""
    tensors = {"large": torch.arange(3 * background.CHUNK + 5, dtype=torch.int8), "scalar": torch.tensor(3.0)}
    tensors |= {"empty": torch.zeros(0, 2), "transposed": torch.arange(6.0).view(2, 3).T}
    snapshot = Snapshot(shares=True)
    snapshot.add(tmp_path / "a", pieces_of(tensors), {})
    snapshot.add(tmp_path / "b", pieces_of({"bad": torch.tensor([1.0, torch.nan])}), {})
    assert snapshot.files[0][1]["large"].read().data_ptr() != tensors["large"].data_ptr()
    snapshot.write()
    assert snapshot.not_finite == ["bad"]
    assert snapshot.files == []
    loaded = load_file(tmp_path / "a")
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.gpu
@pytest.mark.timed
def test_training_waits_less_than_two_seconds_for_the_state_of_2b(tmp_path: Path) -> None:
    """18.9 GiB on the device, of which a part is copied here, with the number of threads that a run has."""
    tensors = {str(number): torch.randn(background.CHUNK + 1000, device="cuda") for number in range(64)}
    values = {name: tensor.cpu() for name, tensor in tensors.items()}
    num_bytes = sum(aligned(tensor.nbytes) for tensor in tensors.values())
    threads, reserve = torch.get_num_threads(), Reserve(num_bytes)
    eventually(lambda: not reserve._thread.is_alive())
    snapshot = Snapshot(shares=True, memory=reserve.memory())
    use_cores(torch.device("cuda"))
    try:
        started = time.monotonic()
        snapshot.add(tmp_path, pieces_of(tensors), {})
        seconds = time.monotonic() - started
    finally:
        torch.set_num_threads(threads)
    for tensor in tensors.values():
        tensor.zero_()
    ((_, pieces, _),) = snapshot.files
    assert all(pieces[name].read().equal(value) for name, value in values.items())
    assert seconds < 2.0 * num_bytes / (18.9 * 2**30)


def test_parts_are_copied_and_put_together_when_they_are_written(tmp_path: Path) -> None:
    """A master of 4 bytes is copied as a weight and its low bits, and the weight of the next file is this copy."""
    master = torch.randn(8, 300)
    weight, low = split(master)
    put_together = MagicMock(side_effect=join)
    snapshot = Snapshot(shares=True)
    snapshot.add(tmp_path / "state", {"master": Piece(master.shape, master.dtype, (weight, low), put_together)}, {})
    snapshot.add(tmp_path / "weights", pieces_of({"weight": weight, "row": weight[0]}), {})
    (state, weights) = (pieces for _, pieces, _ in snapshot.files)
    assert {weights[name].parts[0].data_ptr() for name in weights} == {state["master"].parts[0].data_ptr()}
    assert not put_together.called
    expected = weight.clone()
    weight.zero_()
    low.zero_()
    snapshot.write()
    assert load_file(tmp_path / "state")["master"].equal(master)
    assert load_file(tmp_path / "weights")["weight"].equal(expected)
    assert load_file(tmp_path / "weights")["row"].equal(expected[0])


def test_weights_that_are_replaced_by_their_average_are_copied_again(tmp_path: Path) -> None:
    weight = torch.ones(4)
    snapshot = Snapshot(shares=False)
    snapshot.add(tmp_path / "state", pieces_of({"master": weight}), {})
    weight.fill_(2.0)
    snapshot.add(tmp_path / "weights", pieces_of({"weight": weight}), {})
    snapshot.write()
    assert [load_file(tmp_path / name).popitem()[1][0].item() for name in ("state", "weights")] == [1.0, 2.0]


def test_a_tensor_at_the_address_of_one_that_is_gone_is_copied(tmp_path: Path) -> None:
    snapshot = Snapshot(shares=True)
    for number in range(100):
        snapshot.add(tmp_path / str(number), pieces_of({"x": torch.full((5,), float(number))}), {})
    snapshot.write()
    assert [load_file(tmp_path / str(number))["x"][0].item() for number in range(100)] == list(range(100))


@pytest.mark.parametrize(("flags", "size"), [((), 12.0), (("--use_8bit",), 6.03), (("--use_ema",), 18.0)])
@pytest.mark.parametrize("shape", [(512, 512), (256, 4096)])
def test_the_size_of_the_copy_is_predicted(flags: tuple[str, ...], size: float, shape: tuple[int, int]) -> None:
    """In bytes of an element in bf16: weight 2, low bits 2, moments 8 or 2; with an average 4 and 2."""
    options = args.parse(SftOptions, None, sft_flags(Path("m"), Path("d"), Path("o"), *flags), ())
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    predicted = copy_bytes(options, parameter.numel(), parameter.dtype, torch.device("cpu"))
    assert predicted / parameter.numel() == pytest.approx(size, abs=0.01)
    masters = make_masters({"p": parameter}, rule_of(options.optimizer), 1.0, dynamic_scale=False)
    snapshot = Snapshot(shares=not options.loss.use_ema)
    snapshot.add(Path("state"), masters.pieces(), {})
    if options.loss.use_ema:
        averages = Ema({"p": parameter}, masters.named_masters(), 0.5).tensors()
        snapshot.add(Path("average"), pieces_of(averages), {})
    snapshot.add(Path("weights"), pieces_of({"p": parameter}), {})
    parts = {t.data_ptr(): t.nbytes for _, pieces, _ in snapshot.files for p in pieces.values() for t in p.parts}
    assert sum(parts.values()) == pytest.approx(predicted, rel=0.01)


PARTIAL = [
    ("float32", ()),
    ("float16", ("--optimizer", "torch.optim.SGD")),
    ("float16", ("--use_8bit",)),
    ("bfloat16", ("--use_8bit",)),
    ("bfloat16", ()),
]


@pytest.mark.parametrize(("dtype", "flags"), PARTIAL)
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_partial_copy_takes_no_more_memory_than_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, flags: tuple[str, ...], share: float
) -> None:
    """The files have the values of the step, although training changes them as soon as it may."""
    options = args.parse(SftOptions, None, sft_flags(Path("m"), Path("d"), Path("o"), *flags), ())
    parameters = {f"p{i}": torch.nn.Parameter(torch.randn(64, 128).to(getattr(torch, dtype))) for i in range(32)}
    one = parameters["p0"]
    masters = make_masters(parameters, rule_of(options.optimizer), 1.0, dynamic_scale=False)
    masters.backward(sum(p.float().square().sum() for p in parameters.values()))
    masters.step(0.1)
    last, first = ({n: p for n, p in parameters.items() if (n > "p2") == late} for late in (True, False))
    files = {"state": lower_bits(masters.pieces()), "weights-1": pieces_of(last), "weights-2": pieces_of(first)}
    expected = {name: {key: piece.read().clone() for key, piece in pieces.items()} for name, pieces in files.items()}
    needed = copy_bytes(options, 32 * one.numel(), one.dtype, torch.device("cpu"))
    room = int(share * needed)
    snapshot = Snapshot(shares=True, left_out=needed - room)
    for name, pieces in files.items():
        snapshot.add(tmp_path / name, pieces, {})
    copied = sum(copy.nbytes for _, copy in snapshot.copies.values())
    assert room - 3 * needed / 32 < copied <= room + 0.01 * needed
    write, waited = background.write_tensors, [0]

    def write_while_training_goes_on(path: Path, pieces: Any, metadata: Any, written: Callable[[], None]) -> str:
        sizes = (size_of(pieces[name]) for name in file_order(pieces))

        def change() -> None:
            waited[0] += 0 if snapshot.only_copies.is_set() else next(sizes)
            written()
            if snapshot.only_copies.is_set():
                for piece in (piece for pieces in files.values() for piece in pieces.values()):
                    for part in piece.parts:
                        part.zero_()

        return write(path, pieces, metadata, change)

    monkeypatch.setattr(background, "write_tensors", write_while_training_goes_on)
    snapshot.write()
    assert needed - room <= bytes_left_out(options, 32 * one.numel(), one.dtype, torch.device("cpu"))
    assert needed - room <= waited[0] < needed - room + 3 * needed / 32
    for name, tensors in expected.items():
        loaded = load_file(tmp_path / name)
        assert all(loaded[key].equal(tensor) for key, tensor in tensors.items())


# -- in complete runs --------------------------------------------------------------------------------------------------

SHORT = ("--load_tensors", "--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
SHORT += ("--gradient_accumulation_steps", 1, "--mixed_precision", "bf16")


def command_of(model: Path, tensors: Path, output: Path) -> list[object]:
    return python(SFT_SCRIPT, *sft_flags(model, tensors, output, *SHORT))


@pytest.fixture(scope="module")
def undisturbed(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    said = finish(Forked(command_of(model, tensors, output)))
    assert "while training goes on; " in said
    assert said.count("while it was copied to host memory, and it was written in") == 3
    return output


def check_same(output: Path, undisturbed: Path) -> None:
    assert losses(output) == losses(undisturbed)
    for part in ("transformer", "checkpoint-3", "checkpoint-3/transformer"):
        assert equal(safetensors_of(output / part), safetensors_of(undisturbed / part)), part
    assert names(output) == ["checkpoint-3"]
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
}


@pytest.mark.slow
@pytest.mark.fault("numbers: weights that are not finite in a run of one process under DeepSpeed")
def test_one_process_under_deepspeed_does_not_save_what_is_not_finite(
    model: Path, tensors: Path, tmp_path: Path
) -> None:
    """DeepSpeed's engine writes its files at once, so it is checked before, and nothing is copied or reserved."""
    output = tmp_path / "out"
    flags = sft_flags(model, tensors, output, *SHORT, "--mixed_precision", "no", "--learning_rate", "1e39")
    (rank,) = fork_ranks(1, python(SFT_SCRIPT, *flags), **ZERO2)
    said = finish(rank, 3)
    assert "checkpoint-1 is not saved: " in said
    assert "of host memory" not in said
    assert names(output) == []


WITH_ROOM = """
import runpy, sys
from cogvideox.runtime.checkpoint import Saver
Saver._room = lambda saver, free: int({share} * saver.copy_bytes)
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "said"),
    [(0.6, "copied to host memory and the rest was written, and all"), (0.0, "training waited")],
    ids=["a part", "none"],
)
def test_checkpoints_are_the_same_with_less_host_memory(
    model: Path, tensors: Path, undisturbed: Path, tmp_path: Path, share: float, said: str
) -> None:
    script, output = tmp_path / "with_room.py", tmp_path / "out"
    script.write_text(WITH_ROOM.format(share=share, script=str(SFT_SCRIPT)))
    text = finish(Forked(python(script, *sft_flags(model, tensors, output, *SHORT))))
    assert text.count(said) == 3
    check_same(output, undisturbed)


FOLDER = r"\S*/\.checkpoint-2\.tmp"
THREAD = rf"(open|os.rename) {FOLDER}"
MOMENTS = [rf"{THREAD}/optimizer", rf"{THREAD}/progress", rf"{THREAD} ", r"os.rename \S*/checkpoint-1 "]
PLACES = [
    rf"write {FOLDER}/optimizer",
    rf"write {FOLDER}/transformer/diff",
    rf"fsync {FOLDER}$",
    rf"os.rename {FOLDER} ",
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
@pytest.mark.parametrize("moment", MOMENTS, ids=["state", "progress", "rename", "rotation"])
@pytest.mark.fault("kills: SIGTERM and SIGKILL while a checkpoint is written in the background")
def test_a_signal_while_the_thread_writes(
    model: Path, tensors: Path, undisturbed: Path, tmp_path: Path, moment: str, number: int, status: int
) -> None:
    output = tmp_path / "out"
    command = command_of(model, tensors, output)
    said = finish(Forked(command, (moment, 1, number)), status)
    newest, *older = names(output)
    assert damage_of(output / newest) is None
    if status == 75:
        done = len(losses(output))
        assert f"stopped and saved after step {done} of 3; the same command continues" in said
        assert (newest, older) == (f"checkpoint-{done}", [])
    finish(Forked(command))
    check_same(output, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=["state", "weights", "fsync", "rename"])
@pytest.mark.fault("disk: full while a run writes a checkpoint in the background")
def test_a_full_disk_ends_the_run_with_one_line(
    model: Path, tensors: Path, undisturbed: Path, tmp_path: Path, place: str
) -> None:
    output = tmp_path / "out"
    command = command_of(model, tensors, output)
    said = finish(Forked(command, disk=[(place, 1, errno.ENOSPC)]), 2)
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"  {output}: No space left on device, ")
    assert f"; {names(output)[0]}, the newest checkpoint, is safe; free some space and run" in said.splitlines()[-1]
    assert all(damage_of(path) is None for path in checkpoints(output))
    finish(Forked(command))
    check_same(output, undisturbed)
