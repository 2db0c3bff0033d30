"""Tests what a process says when it loses its connection to another process of the run, under each engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from running import SFT_SCRIPT, Forked, finish, fork_ranks, python, sft_flags
from torch.distributed import DistNetworkError

from cogvideox import stopping
from cogvideox.errors import LostRankError
from cogvideox.runtime.ranks import lost_ranks_reported

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}
ENGINES: dict[str, dict[str, str]] = {"copies": {}, "fsdp": FSDP}
ENGINES |= {f"zero{stage}": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage} for stage in ("2", "3")}


ENDED = "because one of them, or the launcher, has ended; see its messages"
LOST = f"lost its connection to the others during step 7, {ENDED}"
LATE = "waited too long for the others during step 7; if they are only slow, raise --nccl_timeout"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("engine", "lost", "micro_batches", "hint"),
    [
        ("fsdp", 1, 6, "the same command continues from checkpoint-2 (--resume_from_checkpoint latest)"),
        ("copies", 1, 6, "the same command continues from checkpoint-2 (--resume_from_checkpoint latest)"),
        pytest.param("fsdp", 0, 1, "no checkpoint was saved; the same command starts again", marks=pytest.mark.long),
        pytest.param("zero2", 1, 6, "the same command continues from checkpoint-2", marks=pytest.mark.long),
        pytest.param("zero3", 0, 6, "the same command continues from checkpoint-2", marks=pytest.mark.long),
    ],
)
def test_a_process_that_lost_another_says_so_in_one_line(
    tiny: Callable[[str], Path],
    clips: Path,
    cache: Path,
    tmp_path: Path,
    engine: str,
    lost: int,
    micro_batches: int,
    hint: str,
) -> None:
    """A process is killed in the first or third optimizer step, of two micro-batches each."""
    flags = sft_flags(tiny("5b"), clips, tmp_path / "sft", "--tensor_cache", cache, "--max_train_steps", 4)
    exit_file = tmp_path / "status"
    more = ENGINES[engine] | {"COGVIDEOX_EXIT_FILE": str(exit_file)}
    ranks: list[Forked] = fork_ranks(
        2, python(SFT_SCRIPT, *flags), {lost: ("^unit micro-batch", micro_batches)}, **more
    )
    assert ranks[lost].wait(120) == -9
    said = finish(ranks[1 - lost], 1)
    place = f"process {1 - lost} lost its connection to the others during step {(micro_batches + 1) // 2}"
    assert f"cogvideox_text_to_video_sft.py: {place}, {ENDED}; {hint}" in said
    assert "Traceback" not in said
    assert exit_file.read_text() == "1"


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), LOST),
        (DistNetworkError("another text of a later version"), LOST),
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29098.", LOST),
        ("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:39080: Connection reset by peer.", LOST),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.27.5", LOST),
        ("[unbound_buffer.cc:81] Timed out waiting 630000ms for recv operation to complete", LATE),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)", LATE),
        ("NCCL error: unhandled cuda error", None),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_which_errors_mean_that_another_process_has_ended(
    error: str | DistNetworkError, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(stopping._state, "phase", "the start")  # restored at the end
    with pytest.raises(RuntimeError) as caught, lost_ranks_reported(lambda: "hint"), stopping.phase("step 7"):
        raise RuntimeError(error) if isinstance(error, str) else error
    assert isinstance(caught.value, LostRankError) is (problem is not None)
    assert str(caught.value) == (f"process 3 {problem}; hint" if problem else error)


@pytest.mark.fault("disk: the file for the exit status cannot be written")
@pytest.mark.parametrize(
    ("path", "reason"), [("missing/status", "No such file or directory"), ("/dev/full", "No space left on device")]
)
def test_a_status_that_cannot_be_written_is_still_that_of_the_process(
    path: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setenv("COGVIDEOX_EXIT_FILE", str(tmp_path / path))
    monkeypatch.setattr(stopping, "end_process", ended.append)
    monkeypatch.setattr(stopping._state, "status", None)  # restored at the end
    stopping.leave(0)
    assert ended == [0]
    assert capsys.readouterr().err == f"COGVIDEOX_EXIT_FILE {tmp_path / path}: cannot be written ({reason})\n"


def test_the_status_of_the_process_that_knows_the_cause_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COGVIDEOX_EXIT_FILE", str(tmp_path / "status"))
    monkeypatch.setattr(stopping, "end_process", lambda status: None)
    monkeypatch.setattr(stopping._state, "status", None)  # restored at the end
    for status, is_cause, written in ((1, False, "1"), (2, True, "2"), (1, False, "2")):
        stopping.leave(status, is_cause)
        assert (tmp_path / "status").read_text() == written
