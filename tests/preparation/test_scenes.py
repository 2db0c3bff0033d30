"""split_scenes.py: where it cuts, what it writes into the table, and what it never changes."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import split_scenes
from data_sets import problems, read
from PIL import Image
from preparing import decode_inline
from running import prepare

from cogvideox.config.args import parse
from cogvideox.config.options import SceneOptions
from cogvideox.data.forms import scene_table
from cogvideox.data.media.pixels.decode import probe, read_frames, write_video
from cogvideox.errors import UsageError
from cogvideox.preparation.scenes import cut_sheet, splitting

RATE = 10.0


def shots(*lengths: int) -> np.ndarray:
    """Returns frames (F, 48, 64, 3) of shots with these numbers of frames: each has its own noise, which drifts."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (len(lengths), 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    frames = [np.roll(picture, k // 4, 1) for picture, n in zip(pictures, lengths, strict=True) for k in range(n)]
    return np.stack(frames)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """long.mp4 with shots of 2 s, 0.5 s, 3 s and a caption, short.mp4 of one shot with a caption, and photo.png."""
    root = tmp_path / "clips"
    (root / "sub").mkdir(parents=True)
    write_video(root / "long.mp4", shots(20, 5, 30), RATE)
    write_video(root / "sub" / "short.mp4", shots(25), RATE)
    Image.fromarray(shots(1)[0]).save(root / "photo.png")
    (root / "long.txt").write_text("Several shots.\n")
    (root / "sub" / "short.txt").write_text("A short clip\non two lines.\n")
    return root


@pytest.fixture
def processes() -> None:
    """For tests that decode in worker processes."""


@pytest.fixture(autouse=True)
def inline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes in this process: each worker takes a third of a second to start, and a run starts four."""
    if "processes" not in request.fixturenames:
        decode_inline(monkeypatch, splitting, cut_sheet)


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, str]]]:
    """split(*flags) runs the script on the folder ``clips`` and returns the rows of clips-scenes.csv."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: object, table: str = "clips-scenes.csv") -> list[dict[str, str]]:
        options = parse(SceneOptions, None, ["--data_root", "clips", *map(str, flags)], split_scenes.CHECKS)
        assert split_scenes.main(options) == 0
        with open(tmp_path / table, newline="") as file:
            return list(csv.DictReader(file))

    return run


def sections(rows: Sequence[dict[str, str]], video: str) -> list[tuple[str, str]]:
    return [(row["start"], row["end"]) for row in rows if row["video"] == video]


@pytest.mark.usefixtures("processes")
def test_scenes_are_rows_and_other_clips_keep_their_captions(
    folder: Path, split: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = split()
    assert [row["video"] for row in rows] == ["long.mp4", "long.mp4", "photo.png", "sub/short.mp4"]
    assert sections(rows, "long.mp4") == [("0.000", "2.000"), ("2.500", "")]
    assert sections(rows, "sub/short.mp4") == sections(rows, "photo.png") == [("", "")]
    assert [row["caption"] for row in rows] == ["", "", "", "A short clip\non two lines."]
    printed = capsys.readouterr().out
    assert f"{folder / 'long.mp4'}: 2 scenes, without 1 that are too short" in printed
    assert "1 caption describes more than one scene, so these scenes have none" in printed
    assert printed.endswith("3 clips: 1 was cut into 2 scenes; table: clips-scenes.csv\n")
    assert all("blank caption" in line for line in problems(folder, dataset_file="clips-scenes.csv"))
    Image.open(tmp_path / "clips-scenes-cuts.png").verify()


@pytest.mark.parametrize("name", ["clips-scenes-cuts.png", "clips-scenes-cuts-2.png"])
@pytest.mark.fault("flags: files of other programs that a script would replace")
def test_a_picture_of_another_program_is_not_replaced(
    folder: Path, split: Callable[..., list[dict[str, str]]], tmp_path: Path, name: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UsageError, match=f"{name}: was not written by this script and would be replaced; .* --table"):
        split()
    assert (tmp_path / name).read_bytes() == before


def test_no_section_contains_a_cut(folder: Path, split: Callable[..., list[dict[str, str]]]) -> None:
    """The first and the last frame of a section, as a preparation counts them, are those at the cuts."""
    shown = shots(20, 5, 30)
    split("--scene_captions", "repeat", "--min_scene_seconds", 0)
    (folder / "photo.png").unlink()
    Path("clips-scenes.csv").write_text(Path("clips-scenes.csv").read_text().replace("photo.png,,,\n", ""))
    samples = [s for s in read(folder, dataset_file="clips-scenes.csv") if s.video.endswith("long.mp4")]
    info = probe(folder / "long.mp4")
    inside = [sample.section.frames(info) for sample in samples if sample.section is not None]
    assert inside == [range(20), range(20, 25), range(25, 55)]
    assert {sample.caption for sample in samples} == {"Several shots."}
    frames = read_frames(folder / "long.mp4", info, [part[-1] for part in inside], 48, 64)
    assert np.abs(frames.astype(int) - shown[[19, 24, 54]].astype(int)).mean() < 12


def test_times_of_variable_frame_rates_are_those_of_the_frames(
    tmp_path: Path, split: Callable[..., list[dict[str, str]]]
) -> None:
    (tmp_path / "clips").mkdir()
    durations = [100, 300] * 10 + [50] * 30
    pictures = [Image.fromarray(frame) for frame in shots(20, 30)]
    pictures[0].save(tmp_path / "clips/a.gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    assert sections(split(), "a.gif") == [("0.000", "4.000"), ("4.000", "")]


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_videos_of_many_parts_are_cut_as_if_they_had_one(
    detector: str, folder: Path, split: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splitting, "PART_FRAMES", 7)
    monkeypatch.setattr(splitting, "MOST_PART_FRAMES", 9)
    parts = list(splitting.parts_of(probe(folder / "long.mp4")))
    assert [k for part in parts for k in part] == list(range(55))
    assert len(parts) >= 6
    rows = split("--detector", detector, "--min_scene_seconds", 0)
    assert sections(rows, "long.mp4") == [("0.000", "2.000"), ("2.000", "2.500"), ("2.500", "")]


def test_parts_begin_at_keyframes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "PART_FRAMES", 3)
    info = probe(folder / "long.mp4")
    assert info.packets is not None
    for part in splitting.parts_of(info):
        assert info.packets.pts[part.start] in info.packets.keyframes


def test_long_scenes_are_divided(folder: Path, split: Callable[..., list[dict[str, str]]]) -> None:
    rows = split("--max_scene_seconds", 2)
    assert sections(rows, "long.mp4") == [("0.000", "2.000"), ("2.500", "4.000"), ("4.000", "")]
    assert sections(rows, "sub/short.mp4") == [("0.000", "1.300"), ("1.300", "")]


def test_a_clip_of_short_scenes_stays_one_clip(
    folder: Path, split: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = split("--min_scene_seconds", 4)
    assert sections(rows, "long.mp4") == [("", "")]
    assert rows[0]["caption"] == "Several shots."
    rule = "stays one clip, because all of its 3 scenes are shorter than --min_scene_seconds 4; delete its row"
    assert f"{folder / 'long.mp4'}: {rule}" in capsys.readouterr().out


def test_one_clip_that_was_handled_before_is_named_in_the_singular(
    folder: Path, split: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photo.png").unlink()
    shutil.move(folder / "sub", folder.parent)
    split()
    shutil.move(folder.parent / "sub", folder)
    split()
    last = "2 clips, of which 1 was handled before and is unchanged: none was cut; table: clips-scenes.csv"
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_rows_are_never_changed_and_deleted_ones_stay_deleted(
    folder: Path, split: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    split()
    table = tmp_path / "clips-scenes.csv"
    edited = "\ufeffvideo;start;end;note;caption\r\nlong.mp4;0,5;1.900;keep;Mine\r\n"  # as Excel writes it
    table.write_bytes(edited.replace("0,5", "0.500").encode())
    shutil.copy(folder / "long.mp4", folder / "new; one.mp4")
    capsys.readouterr()
    split()
    added = '"new; one.mp4";0.000;2.000;;\r\n"new; one.mp4";2.500;;;\r\n'
    assert table.read_bytes() == (edited.replace("0,5", "0.500") + added).encode()
    last = "4 clips, of which 3 were handled before and are unchanged: 1 was cut into 2 scenes; table: clips-scenes.csv"
    assert capsys.readouterr().out.splitlines()[-1] == last
    before = table.read_bytes()
    split()
    assert table.read_bytes() == before
    nothing = "4 clips: nothing new (to search them again, delete the table); table: clips-scenes.csv\n"
    assert capsys.readouterr().out == nothing


def test_a_table_edited_meanwhile_keeps_the_edit(
    folder: Path, split: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scene_table, "SECONDS_BETWEEN_WRITES", 0.0)
    original = splitting.find_cuts

    def find(*given: object) -> object:
        for search in original(*given):
            if search.path.endswith("short.mp4"):
                (tmp_path / "clips-scenes.csv").write_text("caption,video,start,end\nMine,long.mp4,1,2\n")
            yield search

    monkeypatch.setattr(splitting, "find_cuts", find)
    split()
    edited = 'caption,video,start,end\nMine,long.mp4,1,2\n"A short clip\non two lines.",sub/short.mp4,,\n'
    assert (tmp_path / "clips-scenes.csv").read_text() == edited


def test_a_table_that_lacks_a_column_is_not_changed(
    folder: Path,
    split: Callable[..., list[dict[str, str]]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "clips-scenes.csv").write_text("video,caption\nphoto.png,\n")
    with pytest.raises(
        UsageError, match=r"clips-scenes.csv: has no column start and end; add it, or name another file"
    ):
        split()
    assert (tmp_path / "clips-scenes.csv").read_text() == "video,caption\nphoto.png,\n"
    assert capsys.readouterr().out == ""  # nothing was searched


@pytest.mark.usefixtures("processes")
def test_an_interrupted_run_continues(
    folder: Path, split: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = split(table="clips-scenes.csv")
    for file in tmp_path.glob("*clips-scenes*"):
        file.unlink()
    searched: list[str] = []

    def find(paths: Sequence[str], *rest: object) -> object:
        for search in original(paths, *rest):
            searched.append(Path(search.path).name)
            yield search
            if len(searched) == 2:
                raise KeyboardInterrupt

    original = splitting.find_cuts
    monkeypatch.setattr(splitting, "find_cuts", find)
    with pytest.raises(KeyboardInterrupt):
        split()
    monkeypatch.setattr(splitting, "find_cuts", original)
    assert split() == wanted
    assert searched == ["long.mp4", "photo.png"]


@pytest.mark.usefixtures("processes")
def test_a_file_that_cannot_be_read_stays_one_clip(
    folder: Path, split: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = bytearray((folder / "long.mp4").read_bytes())
    start = len(damaged) * 9 // 10
    damaged[start:] = bytes(len(damaged) - start)  # the last frames
    (folder / "a.mp4").write_bytes(damaged)
    rows = split()
    assert sections(rows, "a.mp4") == [("", "")]
    assert len(rows) == 5
    printed = capsys.readouterr().out
    assert (
        f"{folder / 'a.mp4'}: stays one clip, because its frames cannot be read; delete its row to leave it out: "
        in printed
    )


def test_a_file_that_cannot_be_opened_is_left_out_until_it_is_repaired(
    folder: Path, split: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.mp4").write_bytes(bytes(3000))
    others = [row for row in split() if row["video"] != "a.mp4"]
    assert split() == others
    printed = capsys.readouterr().out
    assert printed.count(f"{folder / 'a.mp4'}: is left out, because it cannot be read: Invalid data") == 2
    assert "1 file left out that cannot be opened as videos; repair or remove" in printed
    (folder / "a.mp4").write_bytes((folder / "long.mp4").read_bytes())
    rows = split()
    assert sections(rows, "a.mp4") == sections(rows, "long.mp4")


def test_files_of_unsupported_formats_are_listed(
    folder: Path, split: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The table does not have them, so a later preparation cannot list them."""
    (folder / "camera.mxf").write_bytes(b"x")
    split()
    fix = "convert clips to mp4, and save captions as .txt and tables as CSV"
    assert f"1 .mxf; {fix}:\n  {folder / 'camera.mxf'}\n" in capsys.readouterr().out


def test_sections_and_clips_with_a_first_frame_are_not_cut(
    folder: Path, split: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = "file_name,text,start,end,image\nlong.mp4,One,1,4,\nlong.mp4,Three,,,\nsub/short.mp4,Two,,,photo.png\n"
    (folder / "mine.csv").write_text(table)
    write_video(folder / "sub" / "short.mp4", shots(12, 13), RATE)
    monkeypatch.setattr(scene_table, "SECONDS_BETWEEN_WRITES", 0.0)
    split("--dataset_file", "mine.csv", "--scene_captions", "repeat", "--table", "t.tsv", table="t.tsv")
    assert (tmp_path / "t.tsv").read_text().splitlines() == [
        "video\timage\tstart\tend\tcaption",
        "long.mp4\t\t1.000\t4.000\tOne",
        "long.mp4\t\t0.000\t2.000\tThree",
        "long.mp4\t\t2.500\t\tThree",
        "sub/short.mp4\tphoto.png\t\t\tTwo",
    ]


@pytest.mark.usefixtures("threads")
def test_scenes_are_prepared(
    folder: Path, split: Callable[..., list[dict[str, str]]], model: Path, tmp_path: Path
) -> None:
    (folder / "photo.png").unlink()
    split("--scene_captions", "repeat")
    table = tmp_path / "clips-scenes.csv"
    flags = ("--dataset_file", table, "--max_upscale", 9, "--video_reshape_mode", "center")
    assert prepare(model, folder, tmp_path / "out", *flags) == 0


def test_the_picture_is_drawn_again_only_after_a_change(
    folder: Path, split: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cut_sheet, "CUTS_PER_SHEET", 1)
    split()  # two boundaries: the short scene between them was left out
    sheets = [tmp_path / "clips-scenes-cuts.png", tmp_path / "clips-scenes-cuts-2.png"]
    assert all(sheet.exists() for sheet in sheets)
    drawn = sheets[0].stat().st_mtime_ns
    table = tmp_path / "clips-scenes.csv"
    table.write_text(table.read_text().replace("2.500,,", "2.500,,A caption."))
    shutil.copy(folder / "long.mp4", folder / "more.mp4")
    split()
    assert sheets[0].stat().st_mtime_ns == drawn
    assert (tmp_path / "clips-scenes-cuts-4.png").exists()
    table.write_text("video,start,end,caption\nlong.mp4,2.5,,\n")
    split()
    assert sheets[0].stat().st_mtime_ns > drawn
    assert len(list(tmp_path.glob("*.png"))) == 1
    pictures = np.asarray(Image.open(sheets[0]))
    seen = len(pictures)
    table.write_text("video,start,end,caption\nlong.mp4,2.5,,\nlong.mp4,99,,\n")  # after the end of the video
    split()
    assert len(np.asarray(Image.open(sheets[0]))) == seen


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (("--table", "clips/scenes.csv"), "--table clips/scenes.csv: is inside data_root"),
        (("--table", "scenes.json"), "--table scenes.json: must end in .csv or .tsv; nearest: --table scenes.csv"),
        (("--data_root", "clips", "more"), "split one folder at a time"),
        (("--validation_data_root", "more"), "split one folder at a time"),
        (("--max_scene_seconds", "1.5"), "must be at least twice --min_scene_seconds 1, so that no part is too short"),
        (("--table", "t.csv", "--dataset_file", "t.csv"), "--table t.csv: is --dataset_file, the data set itself"),
    ],
)
def test_contradictions(flags: Sequence[str], rule: str, split: Callable[..., list[dict[str, str]]]) -> None:
    with pytest.raises(UsageError) as caught:
        split(*flags)
    assert rule in "\n".join(caught.value.problems)


@pytest.mark.parametrize(("root", "table"), [("a/b/", "a/b-scenes.csv"), ("b", "b-scenes.csv")])
def test_the_table_is_next_to_the_folder_by_default(root: str, table: str) -> None:
    assert parse(SceneOptions, None, ["--data_root", root]).scenes.table == table


def test_the_table_of_the_working_directory_is_next_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert parse(SceneOptions, None, ["--data_root", "."]).scenes.table == str(tmp_path / "here-scenes.csv")


@pytest.mark.usefixtures("processes")
def test_cuts_of_real_films_are_found_and_no_others(
    real_clips: Path, split: Callable[..., list[dict[str, str]]], tmp_path: Path
) -> None:
    """The clips have no cuts; three of them one after the other have two."""
    shutil.copytree(real_clips / "videos", tmp_path / "clips")
    names = ("rabbit_yawns", "city_four_towers", "city_two_towers")
    infos = [(path, probe(path)) for path in (real_clips / "videos" / f"{name}.mp4" for name in names)]
    films = [read_frames(path, info, range(info.num_frames), 144, 256) for path, info in infos]
    write_video(tmp_path / "clips" / "joined.mp4", np.concatenate(films), 25.0)
    ends = [sum(map(len, films[:2])) / 25, len(films[0]) / 25]
    expected = [("0.000", f"{ends[1]:.3f}"), (f"{ends[1]:.3f}", f"{ends[0]:.3f}"), (f"{ends[0]:.3f}", "")]
    rows = split()
    assert [(row["video"], (row["start"], row["end"])) for row in rows if row["start"]] == [
        ("joined.mp4", section) for section in expected
    ]
    assert len(rows) == len(list((tmp_path / "clips").iterdir())) + 2
