"""Tests what a folder holds if clips are added or removed while one process prepares it and another one starts."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from preparing import complete, preparation, tensor_files
from running import PREPARE_SCRIPT, SIZE, Forked, finish, python
from waiting import eventually

from cogvideox.config.flags import LoaderFlags
from cogvideox.data.cache import open_index
from cogvideox.data.forms.samples import check_data_roots
from cogvideox.preparation.prepare import Preparation
from cogvideox.preparation.report import prepare_and_report

Tiny = Callable[[str], Path]
ADDED = "A clip that was added"


@pytest.fixture
def data(clips: Path, tmp_path: Path) -> Path:
    """Returns a copy of the six clips, which a test may change."""
    return Path(shutil.copytree(clips, tmp_path / "data"))


def add_clip(data: Path) -> None:
    """Adds a seventh clip to a data set, with content that no other clip has."""
    content = (data / "videos/00000.mp4").read_bytes()
    (data / "videos/00006.mp4").write_bytes(content + (8).to_bytes(4, "big") + b"free")  # an empty box
    for name, line in (("videos.txt", "videos/00006.mp4"), ("prompts.txt", ADDED)):
        with open(data / name, "a") as lines:
            lines.write(f"{line}\n")


def remove_clip(data: Path) -> None:
    """Removes the last clip from the lists of a data set."""
    for name in ("videos.txt", "prompts.txt"):
        lines = (data / name).read_text().splitlines()
        (data / name).write_text("\n".join(lines[:-1]))


def prepared(made: Preparation) -> str:
    """Prepares a data set as the scripts do; returns what is printed."""
    said: list[str] = []
    index = prepare_and_report(made, said.append, 4)
    assert open_index(made.folder).samples == index.samples
    return "\n".join(said)


def before_publishing(made: Preparation, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Calls ``act`` when a preparation has encoded everything, before it publishes the index."""
    encode = made.encode

    def encode_then_act(*arguments: object) -> object:
        encoded = encode(*arguments)
        act()
        return encoded

    monkeypatch.setattr(made, "encode", encode_then_act)


def check_like_a_fresh_one(folder: Path, tiny: Tiny, data: Path, clips: int) -> None:
    """Checks that a folder shows the clips that the data set has now, in its index, its page and its pictures."""
    index = complete(tiny("5b"), data, folder / "fresh")
    assert (folder / "index.json").read_bytes() == (folder / "fresh/index.json").read_bytes()
    assert len(index.samples) == clips
    page = (folder / "report.html").read_text()
    assert f"{clips} of {clips} clips are used" in page
    assert (ADDED in page) == (clips == 7)
    assert "no picture" not in page
    assert len(list((folder / "preview/strips").iterdir())) == clips
    assert len(list((folder / "preview").glob("*.png"))) == 1


@pytest.mark.parametrize("last", ["older", "newer"])
@pytest.mark.fault("ranks: two jobs prepare the same folder")
def test_clips_that_are_added_are_published_whichever_process_ends_last(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None, last: str
) -> None:
    folder = tmp_path / "out"
    older = preparation(tiny("5b"), data, folder)
    add_clip(data)
    newer = preparation(tiny("5b"), data, folder)
    ends_last, ends_first = (older, newer) if last == "older" else (newer, older)
    said: list[str] = []
    before_publishing(ends_last, monkeypatch, lambda: said.append(prepared(ends_first)))
    late = prepared(ends_last)
    assert "7 of 7 clips are used" in late
    assert "other flags" not in late
    assert f"{len(ends_first.samples)} of {len(ends_first.samples)} clips are used" in said[0]
    assert len((folder / "health.jsonl").read_text().splitlines()) == 7  # each clip was encoded once
    check_like_a_fresh_one(folder, tiny, data, 7)


@pytest.mark.fault("ranks: two jobs prepare the same folder")
def test_clips_that_were_removed_stay_away(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    older = preparation(tiny("5b"), data, tmp_path / "out")
    remove_clip(data)
    before_publishing(older, monkeypatch, lambda: prepared(preparation(tiny("5b"), data, tmp_path / "out")))
    assert "5 of 5 clips are used" in prepared(older)
    check_like_a_fresh_one(tmp_path / "out", tiny, data, 5)


def test_processes_with_other_flags_are_told(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    """Both end well, but only the index of the last one remains."""
    last = preparation(tiny("5b"), data, tmp_path / "out", id_token="TOKEN")
    first = preparation(tiny("5b"), data, tmp_path / "out")
    before_publishing(last, monkeypatch, lambda: prepared(first))
    rule = "another process has meanwhile prepared it with other flags, and this one replaces its index"
    assert f"out: {rule}: --id_token None there, TOKEN here; give all processes the same flags" in prepared(last)
    assert open_index(tmp_path / "out").samples[0].caption.startswith("TOKEN")


def test_the_age_of_a_list_counts_from_the_check_of_the_flags(
    tiny: Tiny, data: Path, tmp_path: Path, threads: None
) -> None:
    """The check lists the clips before torch is imported. Another process may publish before this one begins."""
    flags = preparation(tiny("5b"), data, tmp_path / "out").data
    loader = LoaderFlags(tensor_cache=str(tmp_path / "out"))
    assert list(check_data_roots(SimpleNamespace(data=flags, loader=loader))) == []
    add_clip(data)
    prepared(preparation(tiny("5b"), data, tmp_path / "out"))
    older = preparation(tiny("5b"), data, tmp_path / "out", flags=flags)
    assert len(older.samples) == 6
    assert "7 of 7 clips are used" in prepared(older)


def test_all_ranks_of_a_run_list_again_if_one_of_them_was_late(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    """The others must train on the same clips, so a rank that has published its index lists again, too."""
    made = preparation(tiny("5b"), data, tmp_path / "out")
    asked: list[list[bool]] = []

    def gather(items: list[bool]) -> list[bool]:
        asked.append(items)
        if len(asked) == 1:
            add_clip(data)
            return [*items, False]
        return [*items, True]

    monkeypatch.setattr(made.ranks, "gather", gather)
    said = prepared(made)
    assert asked == [[True], [True]]
    assert "7 of 7 clips are used" in said
    assert "6 of 6 clips are used" not in said


def test_a_list_that_has_become_invalid_replaces_nothing(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    older = preparation(tiny("5b"), data, tmp_path / "out")
    add_clip(data)

    def publish_and_break() -> None:
        prepared(preparation(tiny("5b"), data, tmp_path / "out"))
        (data / "prompts.txt").write_text("only one caption\n")

    before_publishing(older, monkeypatch, publish_and_break)
    with pytest.raises(Exception, match=r"prompts\.txt"):
        prepared(older)
    assert len(open_index(tmp_path / "out").samples) == 7


# -- real processes ----------------------------------------------------------------------------------------------------


def command(tiny: Tiny, data: Path, folder: Path) -> list[object]:
    flags = ["--data_root", data, "--output_dir", folder / "out", *SIZE, "--dataloader_num_workers", 1]
    return python(PREPARE_SCRIPT, "--model_id", tiny("5b"), *flags)


@pytest.mark.fault("ranks: two jobs prepare the same folder")
def test_a_process_that_publishes_late_keeps_what_another_one_has_published(
    tiny: Tiny, data: Path, tmp_path: Path, suspended: Callable[[Forked], Forked]
) -> None:
    older = suspended(Forked(command(tiny, data, tmp_path), (r"open .*/\.index", 1, signal.SIGSTOP)))
    add_clip(data)
    assert f"7 samples in {tmp_path / 'out'}" in finish(Forked(command(tiny, data, tmp_path)))
    before = (tmp_path / "out/index.json").read_bytes()
    older.send_signal(signal.SIGCONT)
    assert f"7 samples in {tmp_path / 'out'}" in finish(older)
    assert (tmp_path / "out/index.json").read_bytes() == before
    assert ADDED in (tmp_path / "out/report.html").read_text()


@pytest.mark.fault("ranks: two jobs prepare the same folder")
def test_no_process_writes_a_report_while_another_one_does(
    tiny: Tiny, data: Path, tmp_path: Path, suspended: Callable[[Forked], Forked]
) -> None:
    older = suspended(Forked(command(tiny, data, tmp_path), (r"open .*/\.report\.html", 1, signal.SIGSTOP)))
    assert len(open_index(tmp_path / "out").samples) == 6
    add_clip(data)
    newer = Forked(command(tiny, data, tmp_path))
    eventually(lambda: len(tensor_files(tmp_path / "out")) == 7 + 8)
    time.sleep(1)
    assert newer.poll() is None
    older.send_signal(signal.SIGCONT)
    assert "6 samples in" in finish(older)
    said = finish(newer)
    assert f"{tmp_path / 'out'}: another process is writing the index or the report (process {older.pid} on " in said
    assert "7 samples in" in said
    assert ADDED in (tmp_path / "out/report.html").read_text()
