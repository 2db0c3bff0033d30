"""A process in a real control group with a memory limit: it measures what is free, and is never killed for memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import in_group
import pytest
from running import ROOT, SFT_SCRIPT, environment, sft_flags

from cogvideox import host_memory

MIB = 2**20
BEGIN = f"""
import sys
sys.path[:0] = [{str(ROOT / "training")!r}, {str(ROOT / "tests" / "shared")!r}]
from pathlib import Path
from cogvideox.host_memory import free_host_bytes
"""


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """Returns the folder of a new control group inside that of this process, without a limit."""
    found = next((folder for folder in host_memory.groups() if folder.is_dir()), None)
    if found is None:
        pytest.skip("there are no control groups for memory")
    folder = found / f"test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no control group can be created here")
    if not limit_of(folder).exists():
        folder.rmdir()
        pytest.skip("the new control group cannot limit memory")
    yield folder
    with suppress(OSError):
        (folder / "memory.force_empty").write_text("0")
    folder.rmdir()


def limit_of(group: Path) -> Path:
    """Returns the file with the limit of a group, of either version."""
    return next((group / name for name in ("memory.limit_in_bytes",) if (group / name).exists()), group / "memory.max")


def run_in(group: Path, python: Path | str, command: list[object]) -> subprocess.CompletedProcess[str]:
    """Runs a script in a control group, in a process that ``python`` starts or forks."""
    words = [str(word) for word in (python, in_group.__file__, group, *command)]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False, timeout=300)


def run_code(group: Path, python: Path | str, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Writes code to a script in a folder, and runs it in a control group."""
    (folder / "code.py").write_text(BEGIN + textwrap.dedent(code))
    return run_in(group, python, [folder / "code.py"])


def test_pages_of_a_mapped_file_are_not_counted_but_those_of_a_copy_are(group: Path, tmp_path: Path) -> None:
    """Weights that are loaded from a file of their type are mapped; the system can drop these pages."""
    limit_of(group).write_text(str(600 * MIB))
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        file.write(os.urandom(MIB) * 200)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the group reads them itself
    done = run_code(
        group,
        sys.executable,
        tmp_path,
        f"""
        import mmap
        before = free_host_bytes()
        with open({str(path)!r}, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        touched = sum(mapped[::4096])
        after = free_host_bytes()
        copy = bytearray(mapped)
        print(before, before - after, after - free_host_bytes())
        """,
    )
    assert done.returncode == 0, done.stderr
    before, mapped, copied = (int(number) / MIB for number in done.stdout.split())
    assert 500 < before <= 600
    assert mapped < 20
    assert 180 < copied < 220


CHECKPOINT = """
    import torch
    from fakes import FakeEngine, run_alone, saver_of
    from cogvideox.host_memory import left_in
    from cogvideox.runtime import checkpoint
    from cogvideox.runtime.checkpoint_files import damage_of

    checkpoint.COPY_SHARE = {share}
    engine, out = FakeEngine(), Path({out!r})
    engine.weight = torch.ones(300 * 2**18)  # 300 MiB
    saver = saver_of(run_alone(out), engine, copy_bytes=engine.weight.nbytes, in_background=True)
    saver.save(1)  # imports everything
    saver.finish()
    used = 2**40 - left_in(Path({limit!r}).parent)
    Path({limit!r}).write_text(str(used + int({room} * engine.weight.nbytes)))
    saver.save(2)
    print("background" if "copied" in saver.writing.said else "waited")
    saver.finish()
    assert damage_of(out / "checkpoint-2") is None
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "share", "status", "said"),
    [(1.5, 0.9, 0, "background"), (0.4, 0.9, 0, "waited"), (0.4, 99.0, -signal.SIGKILL, "")],
    ids=["room for a copy", "no room", "a copy in spite of that"],
)
@pytest.mark.fault("memory: a control group without room for a copy of a checkpoint")
def test_a_checkpoint_fits_into_the_limit(
    group: Path, forking_python: Path, tmp_path: Path, room: float, share: float, status: int, said: str
) -> None:
    """The last case shows that the limit kills a process that copies a checkpoint without room."""
    limit_of(group).write_text(str(2**40))
    code = CHECKPOINT.format(share=share, out=str(tmp_path / "out"), limit=str(limit_of(group)), room=room)
    done = run_code(group, forking_python, tmp_path, code)
    assert done.returncode == status, done.stderr
    assert done.stdout.split() == [said] * bool(said)


@pytest.mark.slow
def test_the_script_prints_what_the_group_leaves_before_it_places_anything(
    group: Path, model: Path, tensors: Path, tmp_path: Path
) -> None:
    limit_of(group).write_text(str(4 * 2**30))
    flags = sft_flags(model, tensors, tmp_path / "out", "--load_tensors", "--plan", "lean", "--max_train_steps", 2)
    done = run_in(group, sys.executable, [SFT_SCRIPT, *flags])
    assert done.returncode == 0, done.stderr
    line = (
        r"host memory: [\d.]+ GiB will be pinned; [\d.]+ GiB more than now will be used at most, of ([\d.]+) GiB that"
    )
    found = re.search(line, done.stderr)
    assert found, done.stderr
    assert 1.0 < float(found[1]) < 4.0
    assert done.stderr.index(found[0]) < done.stderr.index("plan: ")
