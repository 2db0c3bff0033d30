import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import fuzz_media
import numpy as np
import pytest
from fuzz_media import BASES, MUTATIONS, Judge, Mutant, mutants, read, wrong_frames
from numbered import sequential, shown


@pytest.mark.fault("data: media files damaged at random", times=4 * len(BASES))
def test_damaged_files_give_right_frames_or_one_line(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    assert fuzz_media.fuzz_media(len(BASES) * 4, 7, tmp_path, counts) == []
    assert counts.total() == len(BASES) * 4
    assert counts["frames as they were"]
    assert any(kind.startswith("line: ") for kind in counts)


def test_every_base_meets_every_mutation(tmp_path: Path) -> None:
    made = {(mutant.base, mutant.mutation) for mutant in mutants(len(BASES) * len(MUTATIONS), 0, tmp_path)}
    assert len(made) == len(BASES) * len(MUTATIONS)


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    first, again, other = ([mutant.path.read_bytes() for mutant in mutants(30, seed, tmp_path)] for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    ("sent", "kind", "problem"),
    [
        (signal.SIGSEGV, "reader crashes", "the reader ends its process by SIGSEGV"),
        (signal.SIGSTOP, "reader hangs", "the reader takes more than 0.5 s"),
    ],
)
@pytest.mark.fault("data: a decoder that hangs, crashes or reports wrong values")
def test_a_decoder_that_misbehaves_is_seen_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int, kind: str, problem: str
) -> None:
    judge = Judge()
    mutant = next(mutants(1, 0, tmp_path))
    try:
        before = judge(mutant)
        assert judge.process is not None
        assert judge.process.pid is not None
        os.kill(judge.process.pid, sent)
        with monkeypatch.context() as patch:
            patch.setattr(fuzz_media, "SECONDS", 0.5)
            assert judge(mutant) == (kind, problem)
        assert judge(mutant) == before
    finally:
        judge.close()


def test_undamaged_files_give_their_frames(tmp_path: Path) -> None:
    judge = Judge()
    try:
        for name, make in BASES.items():
            path = tmp_path / name
            path.write_bytes(make())
            assert judge(Mutant(path, name, "none")) == ("frames as they were", "")
    finally:
        judge.close()


def test_frames_that_a_decoder_leaves_unwritten_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = Mutant(tmp_path / "a.mp4", "h264.mp4", "none")
    mutant.path.write_bytes(BASES[mutant.base]())
    _, _, outcome = read(mutant)
    assert outcome is not None
    assert outcome.frames_FHWC is not None
    time = shown(mutant.path)[outcome.indices[0]]

    def with_an_unwritten_row(*args: Any, new_memory: bool, **kwargs: Any) -> list[tuple[int | None, np.ndarray]]:
        decoded = sequential(*args, new_memory=new_memory, **kwargs)
        for pts, frame_HWC in decoded:
            if pts == time:
                frame_HWC[0] = 0 if new_memory else 100
        return decoded

    monkeypatch.setattr(fuzz_media, "sequential", with_an_unwritten_row)
    outcome.frames_FHWC[:2] = 50
    assert wrong_frames(mutant, outcome) == [outcome.indices[1]]
