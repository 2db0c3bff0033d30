"""The columns start and end of a table, which make clips of parts of a video."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_sets import problems, read, touch
from preparing import complete, data_flags, decode_inline, preparation
from running import prepare

from cogvideox.config.buckets import Bucket
from cogvideox.data import clips
from cogvideox.data.clips import ClipRecipe, decode_variant, measure_clip, plan_clip
from cogvideox.data.media.frames import Section
from cogvideox.data.media.pixels import decode
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.data.media.pixels.stills import Stills, stills_of
from cogvideox.preparation import prepare as prepare_module
from cogvideox.preparation.verify import find_faults

RECIPE = ClipRecipe((Bucket(9, 32, 32),), 8.0, "middle", 0, 0, "none", 0.0, 1, 42)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 48 frames at 8 per second: dark for 3 s, then bright."""
    file = tmp_path_factory.mktemp("scenes") / "long.mp4"
    levels = np.repeat(np.array([30, 220], np.uint8), 24)
    write_video(file, np.broadcast_to(levels[:, None, None, None], (48, 32, 32, 3)).copy(), 8.0)
    return file


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("metadata.csv", "file_name,text,start,end\na.mp4,One,0,3.5\na.mp4,Two,3.5,\nb.mp4,Whole,,\n"),
        ("data.tsv", "video\ttext\tend\tstart\na.mp4\tOne\t3.5\t\na.mp4\tTwo\t\t3.5\nb.mp4\tWhole\t\t\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.mp4", "text": "One", "end": 3.5}\n{"file_name": "a.mp4", "text": "Two", "start": 3.5}\n'
            '{"file_name": "b.mp4", "text": "Whole", "start": null}\n',
        ),
    ],
)
def test_tables_name_sections(name: str, table: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / name).write_text(table)
    samples = read(tmp_path, dataset_file=name)
    assert [sample.section for sample in samples] == [Section(0.0, 3.5), Section(3.5, None), None]
    assert [sample.id for sample in samples] == ["a.mp4", "a.mp4#2", "b.mp4"]


@pytest.mark.parametrize(
    ("start", "end", "rule"),
    [
        ("x", "3", "start x and end 3: must be seconds, such as 12.5"),
        ("3", "3", "start 3 and end 3: start must be at least 0 and less than end"),
        ("-1", "", "start must be at least 0"),
        ("inf", "", "start must be at least 0"),
    ],
)
def test_what_is_not_a_section(start: str, end: str, rule: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text(f"file_name,text,start,end\na.mp4,One,{start},{end}\n")
    (line,) = problems(tmp_path)
    assert line.startswith(f"{tmp_path / 'metadata.csv'}:2: ")
    assert rule in line


@pytest.mark.parametrize("selection", ["head", "middle", "random", "uniform"])
def test_frames_come_from_the_section(selection: str, scenes: Path) -> None:
    recipe = ClipRecipe(RECIPE.buckets, 8.0, selection, 0, 0, "none", 0.0, 2, 42)
    levels = []
    for section in (Section(0.0, 3.0), Section(3.0, 6.0)):
        record = plan_clip(scenes, recipe, section)
        assert record.status == "ok", record.reason
        assert record.available == 24
        for variant in record.cuts[0].variants:
            frames = decode_variant(scenes, variant)
            assert isinstance(frames, np.ndarray)
            levels.append((int(frames.min()) // 100, int(frames.max()) // 100))
    assert levels == [(0, 0), (0, 0), (2, 2), (2, 2)]
    assert measure_clip(scenes, recipe, Section(4.0, None)).available == 16


def test_a_section_has_its_own_key_and_a_whole_file_keeps_its_key(scenes: Path) -> None:
    keys = [RECIPE.request(scenes, section) for section in (None, Section(0.0, 3.0), Section(3.0, None))]
    assert len(set(keys)) == 3
    assert keys[0] == RECIPE.request(scenes)


@pytest.fixture
def read_as(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists how complete files are read: "probe" or "file_hash"."""
    found: list[str] = []
    for module, name in ((decode, "probe"), (clips, "file_hash")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, name=name, real=real: (found.append(name), real(path))[1])
    return found


def test_each_section_has_its_own_random_choices(scenes: Path) -> None:
    """Otherwise all scenes of an hour would be mirrored, or none."""
    recipe = dataclasses.replace(RECIPE, frame_selection="random", flip_probability=0.5, variants=8)
    sections = [Section(0.0, 3.0), Section(3.0, 6.0), Section(3.0, None)]
    variants = [plan_clip(scenes, recipe, section).cuts[0].variants for section in sections]
    flips = [tuple(variant.fit.flip for variant in found) for found in variants]
    starts = [
        tuple(variant.indices[0] - round(8 * section.start) for variant in found)
        for section, found in zip(sections, variants, strict=True)
    ]
    assert len(set(flips)) == len(set(starts)) == 3
    assert variants[0] == plan_clip(scenes, recipe, sections[0]).cuts[0].variants


def test_the_sections_of_a_file_are_planned_after_reading_it_once(
    scenes: Path, tmp_path: Path, read_as: list[str]
) -> None:
    """A video of an hour may have a thousand scenes. A file that has changed is read again."""
    file = shutil.copy(scenes, tmp_path / "a.mp4")
    sections = [Section(0.0, 3.0), Section(3.0, 6.0), Section(1.0, 4.0)]
    found = [plan_clip(file, RECIPE, section).content for section in sections]
    assert read_as == ["probe", "file_hash"]
    with open(file, "ab") as end:
        end.write(b"\0\0\0\x08free")
    assert plan_clip(file, RECIPE, sections[0]).content not in found
    assert read_as == ["probe", "file_hash"] * 2


def test_the_sections_of_a_file_are_captioned_after_reading_it_once(
    scenes: Path, tmp_path: Path, read_as: list[str]
) -> None:
    file = str(shutil.copy(scenes, tmp_path / "a.mp4"))
    stills = [stills_of(file, 2, 32, section) for section in (Section(0.0, 3.0), Section(3.0, 6.0))]
    assert [still.duration for still in stills if isinstance(still, Stills)] == [3.0, 3.0]
    assert read_as == ["probe"]


def test_a_section_that_is_empty_or_short_is_explained(scenes: Path) -> None:
    empty = plan_clip(scenes, RECIPE, Section(7.0, None))
    assert empty.status == "failed"
    assert empty.reason.startswith("no frame is shown from 7 s to the end, and the video lasts 6.00 s")
    short = plan_clip(scenes, RECIPE, Section(5.5, None)), plan_clip(scenes, RECIPE, Section(1.25, 2.0))
    assert short[0].reason.startswith("from 5.5 s to the end: 0.50 s give 4 frames at 8 frames per second, but the")
    assert short[1].reason.startswith("from 1.25 s to 2 s: 0.75 s give 6 frames at 8 frames per second, but the")


def test_sections_are_prepared(scenes: Path, model: Path, tmp_path: Path) -> None:
    """Both sections of one file are encoded, each once, and the second preparation finds them."""
    (tmp_path / "data").mkdir()
    shutil.copy(scenes, tmp_path / "data" / "long.mp4")
    rows = "long.mp4,A dark scene,0,3\nlong.mp4,A bright scene,3,6\n"
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name,text,start,end\n{rows}")
    for _ in range(2):
        assert prepare(model, tmp_path / "data", tmp_path / "out", "--max_upscale", 9) == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    keys = [key for sample in index["samples"] for key in sample["video_keys"]]
    assert [sample["id"] for sample in index["samples"]] == ["long.mp4", "long.mp4#2"]
    assert len(set(keys)) == 2


def test_a_file_is_read_once_for_all_sections_that_are_encoded_or_verified(
    scenes: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_as: list[str]
) -> None:
    decode_inline(monkeypatch, prepare_module)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(scenes, data / "long.mp4")
    (data / "metadata.csv").write_text("file_name,text,start,end\nlong.mp4,Dark,0,3\nlong.mp4,Bright,3,6\n")
    flags = data_flags(data, max_upscale=9.0)
    assert len(complete(model, data, tmp_path / "out", flags=flags).samples) == 2
    assert read_as == ["probe", "file_hash"]
    read_as.clear()
    made = preparation(model, data, tmp_path / "out", flags=flags)
    assert find_faults(made, made.plan()) == []
    assert read_as == ["file_hash"]
    status = os.stat(data / "long.mp4")
    with open(data / "long.mp4", "r+b") as file:
        file.write(b"x")
    os.utime(data / "long.mp4", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = find_faults(made, made.plan())
    assert len({fault.record.request for fault in changed if fault.record}) == len(changed) == 2


@pytest.mark.parametrize(("held_out", "leaks"), [("4.5,", False), ("2.9,6", True), (",", True)])
def test_scenes_of_one_file_are_other_clips_in_notes(
    scenes: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: str, leaks: bool
) -> None:
    rows = {
        "data": "long.mp4,Same words,0,3\nlong.mp4,Same words,3,4.5\n",
        "held": f"long.mp4,Other words,{held_out}\n",
    }
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        shutil.copy(scenes, tmp_path / name / "long.mp4")
        (tmp_path / name / "metadata.csv").write_text(f"file_name,text,start,end\n{row}")
    flags = ("--validation_data_root", tmp_path / "held", "--max_upscale", 9, "--dry_run")
    assert prepare(model, tmp_path / "data", tmp_path / "out", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert '  "Same words": 2 clips: long.mp4, long.mp4#2' in lines
    rule = "--validation_data_root: 1 clip is trained on too, so the loss is not a held-out loss:"
    assert (rule in lines) == leaks


def test_scenes_that_are_not_used_are_named_one_by_one(
    scenes: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(scenes, tmp_path / "data" / "long.mp4")
    rows = "long.mp4,Long,0,3\nlong.mp4,Short,3,3.5\nlong.mp4,Short too,4,4.5\n"
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name,text,start,end\n{rows}")
    flags = ("--max_upscale", 9, "--max_bad_fraction", 0.7)
    assert prepare(model, tmp_path / "data", tmp_path / "out", *flags) == 0
    text = capsys.readouterr().out
    assert "long.mp4: from 3 s to 3.5 s: 0.50 s give 4 frames" in text
    assert "long.mp4: from 4 s to 4.5 s: 0.50 s give 4 frames" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r"<td>(long.mp4[#\d]*)</td>", page) == ["long.mp4#2", "long.mp4#3"]
