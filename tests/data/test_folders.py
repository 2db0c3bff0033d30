"""folders.py and tables.py: tables, captions next to clips, and the choice of a form. test_samples.py tests lists."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_sets import captions, problems, read, touch, write_lists
from fuzz_index import fuzz_indexes

from cogvideox.config.flags import DataFlags, ModelFlags
from cogvideox.config.geometry import weight_problems
from cogvideox.data.forms.columns import WITHOUT_CAPTIONS
from cogvideox.data.forms.samples import Sample, check_no_missing_images, read_samples, read_validation
from cogvideox.data.forms.unused import Unused
from cogvideox.errors import UsageError
from cogvideox.preparation.unusable import unused_notes

ODD = (
    "a, b",
    'a "quoted" one',
    "two\nlines",
    "tab\there",
    "caf\u00e9 \U0001f436",
    "$(x) `y`; 'z' \\",
    "1.50",
    "\u2028",
)
SUFFIXES = ("csv", "tsv", "jsonl", "json")


def write_table(file: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Writes a table with the libraries of its format."""
    if file.suffix in (".csv", ".tsv"):
        with open(file, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter="," if file.suffix == ".csv" else "\t").writerows([names, *rows])
        return file
    objects = [dict(zip(names, row, strict=True)) for row in rows]
    lines = "\n".join(json.dumps(cells) for cells in objects)
    file.write_text(json.dumps(objects, indent=1) if file.suffix == ".json" else lines, encoding="utf-8")
    return file


def table(tmp_path: Path, text: str | bytes, suffix: str = "csv") -> dict[str, Any]:
    """Writes a table with the text, next to clips a.mp4 and b.mp4, and returns its flag."""
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / f"t.{suffix}").write_bytes(text.encode() if isinstance(text, str) else text)
    return {"dataset_file": f"t.{suffix}"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_keeps_captions_with_their_clips(tmp_path: Path, suffix: str) -> None:
    names = [f"clips/{k}.mp4" for k in range(len(ODD))]
    touch(tmp_path, *names)
    write_table(tmp_path / f"t.{suffix}", ["n", "video", "text"], [[0, *row] for row in zip(names, ODD, strict=True)])
    expected = [Sample(name, odd.strip(), str(tmp_path / name)) for name, odd in zip(names[:-1], ODD, strict=False)]
    assert (
        problems(tmp_path, dataset_file=f"t.{suffix}")[0]
        .split(": ")[-1]
        .startswith("blank caption; write one, or remove the row; ")
    )
    rows = [[0, *row] for row in zip(names[:-1], ODD, strict=False)]
    write_table(tmp_path / f"t.{suffix}", ["n", "video", "text"], rows)
    assert read(tmp_path, dataset_file=f"t.{suffix}") == expected


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.fault("data: byte order marks, line ends and separators in lists")
def test_line_ends_and_byte_order_marks(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    file = write_table(tmp_path / f"t.{suffix}", ["video", "text"], [["a.mp4", "one"], ["b.mp4", "two\nlines"]])
    text = file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\r\n")
    assert captions(tmp_path, dataset_file=file.name) == ["one", "two\nlines"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_very_long_caption(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "a.mp4")
    usual = csv.field_size_limit(1000)
    write_table(tmp_path / f"t.{suffix}", ["video", "text"], [["a.mp4", "x" * 10_000_000]])
    assert len(captions(tmp_path, dataset_file=f"t.{suffix}")[0]) == 10_000_000
    assert csv.field_size_limit(usual) == 1000


def test_columns_are_found_by_their_usual_names(tmp_path: Path) -> None:
    found = {}
    for caption in ("prompt", "caption", "text"):
        for video in ("path", "video_path", "file_name", "video"):
            found[caption] = caption
            flags = table(tmp_path, f"{video},{','.join(found)}\na.mp4,{','.join(found.values())}\n")
            assert captions(tmp_path, **flags) == [caption]


def test_columns_given_by_flags(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    flags = table(tmp_path, "text,long,video,clip,image,first\nx,y,no.mp4,a.mp4,no.png,a.png\n")
    names = {"caption_column": "long", "video_column": "clip", "image_column": "first"}
    assert read(tmp_path, **flags, **names) == [Sample("a.mp4", "y", str(tmp_path / "a.mp4"), str(tmp_path / "a.png"))]


def test_missing_columns_name_those_there_and_the_nearest(tmp_path: Path) -> None:
    flags = table(tmp_path, "id,Caption,vids\n1,x,a.mp4\n")
    assert problems(tmp_path, **flags, image_column="imag") == (
        f"{tmp_path}/t.csv: has no column text or caption or prompt; there are: id, Caption, vids; "
        f"nearest: --dataset_file t.csv --caption_column Caption; {WITHOUT_CAPTIONS}",
        f"{tmp_path}/t.csv: has no column video or file_name or video_path or path; there are: id, Caption, vids; "
        "nearest: --dataset_file t.csv --video_column vids",
        f"--image_column imag: no such column in {tmp_path}/t.csv; there are: id, Caption, vids; "
        "name one with --image_column",
    )
    assert "nearest: --video_column vids" in problems(tmp_path, **flags, video_column="vid")[-1]


def test_flags_that_name_columns_of_a_table_that_was_found_are_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "my clips"
    touch(folder, "a.mp4", "sub dir/metadata.csv")
    (folder / "sub dir/metadata.csv").write_text("File_Name,Caption\na.mp4,x\n")
    caption, video = (problem.split("nearest: ")[1].split(";")[0] for problem in problems(folder))
    assert video == "--dataset_file 'sub dir/metadata.csv' --video_column File_Name"
    words = dict(zip(*[iter(shlex.split(f"{caption} {video}"))] * 2, strict=True))
    assert captions(folder, **{flag.removeprefix("--"): value for flag, value in words.items()}) == ["x"]


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_line_that_tells_excel_the_separator_is_refused_by_name(tmp_path: Path, sign: str) -> None:
    flags = table(tmp_path, f"sep={sign}\r\nvideo{sign}text\r\na.mp4{sign}x\r\n")
    assert problems(tmp_path, **flags) == (
        f"{tmp_path}/t.csv: begins with sep=, a line for Excel only; delete this line",
    )


def test_an_image_column_is_used_if_it_holds_images(tmp_path: Path) -> None:
    flags = table(tmp_path, '{"text": "x", "video": "a.mp4", "image": "b.mp4"}', "jsonl")
    assert read(tmp_path, **flags)[0].image == str(tmp_path / "b.mp4")
    table(tmp_path, '{"text": "x", "video": "a.mp4", "image": "b.mp4"}\n{"text": "y", "video": "b.mp4"}', "jsonl")
    one, two = samples = read(tmp_path, **flags)
    assert [one.image, two.image] == [str(tmp_path / "b.mp4"), None]
    with pytest.raises(UsageError, match=r"t.jsonl:2: blank path of the image; write one, or leave the images"):
        check_no_missing_images(samples)
    table(tmp_path, '{"text": "x", "video": "a.mp4", "image": null}\n{"text": "y", "video": "b.mp4"}', "jsonl")
    samples = read(tmp_path, **flags)
    assert [sample.image for sample in samples] == [None, None]
    check_no_missing_images(samples)
    with pytest.raises(UsageError, match=r"t.jsonl:1: blank path of the image.*\n.*t.jsonl:2"):
        check_no_missing_images(read(tmp_path, **flags, image_column="image"))


def test_problems_name_the_line_on_which_a_row_starts(tmp_path: Path) -> None:
    rows = ['"two\nlines",a.mp4', "", ",a.mp4", 'x,"\nno.mp4"', "x", "x,a.mp4,z", "nan,a.mp4", "x,", "x,b.mp4"]
    found = problems(tmp_path, **table(tmp_path, "text,video\n" + "\n".join(rows)))
    found = [problem.removeprefix(f"{tmp_path}/t.csv:") for problem in found]
    assert found[:2] == [
        "8: has 1 cell, but 2 columns; add the missing cells, which may be blank",
        "9: has 3 cells, but 2 columns; put quotes around cells with a separator",
    ]
    assert [problem.split("; ")[0] for problem in found[2:]] == [
        "5: blank caption",
        "10: blank caption",
        f"6: no.mp4: no such file in {tmp_path}",
        "11: blank path of the video",
    ]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("csv", 'text,video\n,\nx,a.mp4\n,,,\n\n , \n"",""\nnan,\ny,b.mp4\n,\n'),
        ("tsv", "\t\ntext\tvideo\nx\ta.mp4\n\t\ny\tb.mp4\n\t\t\t\n"),
        ("jsonl", '{"text": "x", "video": "a.mp4"}\n{"text": null, "video": " "}\n{}\n{"text": "y", "video": "b.mp4"}'),
    ],
    ids=["csv", "tsv", "jsonl"],
)
def test_blank_rows_are_skipped(tmp_path: Path, suffix: str, text: str) -> None:
    assert captions(tmp_path, **table(tmp_path, text, suffix)) == ["x", "y"]


@pytest.mark.fault("data: a quotation mark in a table that is never closed")
def test_a_quote_that_is_never_closed_hides_no_rows(tmp_path: Path) -> None:
    found = problems(tmp_path, **table(tmp_path, 'text,video\nx,a.mp4\n"y,b.mp4\nz,a.mp4\n'))
    assert found[0].startswith(f"{tmp_path}/t.csv:3: malformed row (unexpected end of data)")
    found = problems(tmp_path, **table(tmp_path, 'text,video\n"y" z,a.mp4\nx,a.mp4\n"y"z,a.mp4\n'))
    assert [problem.split(": ")[0] for problem in found] == [f"{tmp_path}/t.csv:2", f"{tmp_path}/t.csv:4"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "is empty; it needs a row with the names"),
        ("\n \n", "is empty; it needs a row with the names"),
        ("text,video\n", "has no rows; it needs one for each clip"),
        ("text,video,text\nx,a.mp4,y\n", "has two columns text; rename one"),
        ("text,video\rx,a.mp4\r", "malformed row (new-line character seen in unquoted field"),
    ],
)
def test_csv_without_rows_or_with_a_bad_header(tmp_path: Path, text: str, rule: str) -> None:
    assert rule in problems(tmp_path, **table(tmp_path, text))[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.fault("data: bytes that are not UTF-8")
def test_bytes_that_are_not_utf8_name_every_line(tmp_path: Path, suffix: str) -> None:
    found = problems(tmp_path, **table(tmp_path, b'text,video\n"\xe9,a.mp4\nx,b.mp4\ny,\xff\n', suffix))
    marks = [problem for problem in found if "save the file as UTF-8" in problem]
    assert [mark.split(": ")[0] for mark in marks] == [f"{tmp_path}/t.{suffix}:2", f"{tmp_path}/t.{suffix}:4"]


def test_bad_json_lines(tmp_path: Path) -> None:
    good = '{"text": "x", "video": "a.mp4"}'
    values = ['["x"]', "true", '{"text": true, "video": ["a"]}', '{"text": null, "video": {}}', "[" * 100_000]
    found = problems(tmp_path, **table(tmp_path, "\n".join([good, "", good[:-1], *values]), "jsonl"))
    assert [problem.removeprefix(f"{tmp_path}/t.jsonl:").split("; ")[0] for problem in found] == [
        "3: is not valid JSON (Expecting ',' delimiter, column 31)",
        "8: is not valid JSON (nested too deep)",
        "4: is not an object",
        "5: is not an object",
        "6: text is true or false",
        "6: video is a list",
        "7: video is an object",
        "7: blank caption",
    ]


def test_bad_json_lists(tmp_path: Path) -> None:
    row = '{"text": "x", "video": "a.mp4"}'
    flags = table(tmp_path, f"[{row},\n 3, {row.replace('a.mp4', 'no.mp4')}]", "json")
    assert [problem.split("; ")[0] for problem in problems(tmp_path, **flags)] == [
        f"{tmp_path}/t.json: element 2: is not an object",
        f"{tmp_path}/t.json: element 3: no.mp4: no such file in {tmp_path}",
    ]
    rules = {row + "\n" + row: "json:2: is not valid JSON (Extra data", row: "is not a list", "[]": "has no rows"}
    for text, rule in rules.items():
        assert rule in problems(tmp_path, **table(tmp_path, text, "json"))[0]


def test_numbers_are_captions_as_written_and_nan_is_none(tmp_path: Path) -> None:
    texts = ("1.50", "7", "1e3", "1" * 5000, "Infinity")
    lines = [f'{{"text": {text}, "video": "a.mp4"}}' for text in texts]
    assert captions(tmp_path, **table(tmp_path, "\n".join(lines), "jsonl")) == list(texts)
    blanks = ("NaN", "null", '""', '" \\n"', '"None"', '"nan"')
    lines = [f'{{"text": {text}, "video": "a.mp4"}}' for text in blanks]
    found = problems(tmp_path, **table(tmp_path, "\n".join(lines), "jsonl"))
    file = tmp_path / "t.jsonl"
    assert len(found) == 1
    assert found[0].startswith(f"{file}:1, {file}:2, {file}:3 and 3 more ({len(blanks)} in all): blank caption; ")


def test_half_a_character_and_nul_in_json(tmp_path: Path) -> None:
    text = r"""{"text": "\ud83d", "video": "a.mp4"}
{"text": "x", "video": "\ud83d.mp4"}
{"text": "\u0000", "video": "a\u0000.mp4"}
{"text": "x", "video": "\ud83d/a.mp4"}
{"text": "x", "video": "a\u0000/a.mp4"}
{"text": "\ud83d\udc36", "video": "a.mp4"}"""
    found = problems(tmp_path, **table(tmp_path, text, "jsonl"))
    assert [problem.removeprefix(f"{tmp_path}/t.jsonl:").split("; ")[0] for problem in found] == [
        "1: holds half of a surrogate pair",
        "3: holds a NUL byte",
        "2: \\ud83d.mp4: is not UTF-8",
        "4: \\ud83d/a.mp4: is not UTF-8",
        "3: a\\x00.mp4: holds a NUL byte",
        "5: a\\x00/a.mp4: holds a NUL byte",
    ]


@pytest.mark.fault("security: paths and links out of the data root")
def test_paths_of_tables_have_the_rules_of_lists(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    touch(tmp_path, "sub/c")
    (tmp_path / "out.mp4").symlink_to("/etc/passwd")
    paths = ("https://x.org/a.mp4", "/dev/null", "../a.mp4", "pipe.mp4", "sub", "out.mp4", "no.mp4")
    found = problems(tmp_path, **table(tmp_path, "text,path\n" + "".join(f"x,{path}\n" for path in paths)))
    assert len(found) == len(paths)
    assert [sample.id for sample in read(tmp_path, **table(tmp_path, f"text,path\nx,{tmp_path}/a.mp4\ny,a.mp4\n"))] == [
        "a.mp4",
        "a.mp4#2",
    ]


def test_file_name_is_relative_to_the_table(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.mp4", "a.mp4")
    for column, name in (("file_name", "train/a.mp4"), ("video", "a.mp4")):
        write_table(tmp_path / "train" / "metadata.csv", ["text", column], [["x", "a.mp4"]])
        assert read(tmp_path, dataset_file="train/metadata.csv") == [Sample(name, "x", str(tmp_path / name))]


def test_a_table_elsewhere_serves_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    table(one, "text,video\nof one,a.mp4\n")
    table(two, "text,video\nof two,a.mp4\n")
    table(tmp_path, "text,video\nof both,a.mp4\n")
    monkeypatch.chdir(tmp_path)
    assert captions(one, dataset_file="t.csv") == ["of one"]
    assert captions(one, two, dataset_file="t.csv") == ["of one", "of two"]
    (two / "t.csv").unlink()
    assert captions(two, dataset_file="t.csv") == captions(two, dataset_file=str(tmp_path / "t.csv")) == ["of both"]
    assert captions(one, dataset_file="one/t.csv") == ["of one"]
    (found,) = problems(one, two, dataset_file="t.csv")
    assert found.startswith(f"--dataset_file t.csv: no such file in {two}; of several folders each needs its own")
    data = DataFlags(data_root=(str(one),), validation_data_root=(str(two),), dataset_file="one/t.csv")
    with pytest.raises(UsageError, match="each needs its own"):
        read_validation(data)


def test_a_missing_table_and_an_unknown_format(tmp_path: Path) -> None:
    flags = table(tmp_path, "x", "parquet")
    assert "must end in .csv or .tsv or .jsonl or .json" in problems(tmp_path, **flags)[0]
    table(tmp_path, "x", "csv")
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("no.csv", "pipe.csv", "."):
        found = problems(tmp_path, dataset_file=name)
        assert found == (f"--dataset_file {name}: no such file in {tmp_path}; there are: t.csv",)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_is_found(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "a.mp4", "a.txt")
    write_table(tmp_path / name, ["file_name", "text"], [["a.mp4", "from the table"]])
    assert captions(tmp_path) == ["from the table"]


def test_two_data_sets_need_a_flag(tmp_path: Path) -> None:
    write_lists(tmp_path, "of the lists", "a.mp4")
    (tmp_path / "images.txt").write_text("b.mp4")
    for name in ("metadata.csv", "metadata.jsonl"):
        write_table(tmp_path / name, ["file_name", "text"], [["a.mp4", f"of {name}"]])
    assert problems(tmp_path) == (
        f"{tmp_path}: metadata.csv and metadata.jsonl and prompts.txt with videos.txt are two data sets; choose with "
        "--dataset_file metadata.csv or --dataset_file metadata.jsonl or --caption_column prompts.txt",
    )
    assert captions(tmp_path, dataset_file="metadata.jsonl") == ["of metadata.jsonl"]
    assert read(tmp_path, caption_column="prompts.txt") == [
        Sample("a.mp4", "of the lists", str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"))
    ]
    (tmp_path / "prompts.txt").unlink()
    (tmp_path / "metadata.csv").unlink()
    assert captions(tmp_path) == ["of metadata.jsonl"]


def test_a_column_of_a_table_without_the_table(tmp_path: Path) -> None:
    write_table(touch(tmp_path, "a.mp4") / "metadata.csv", ["file_name", "long"], [["a.mp4", "x"]])
    assert problems(tmp_path, caption_column="long")[0].endswith("for a column of a table give --dataset_file too")
    assert captions(tmp_path, dataset_file="metadata.csv", caption_column="long") == ["x"]


def pairs(root: Path, **texts: str) -> Path:
    """Creates files: name_mp4="..." makes name.mp4 and name.txt, and __ means a slash."""
    for name, text in texts.items():
        stem, _, suffix = name.replace("__", "/").rpartition("_")
        touch(root, f"{stem}.{suffix}")
        (root / f"{stem}.txt").write_bytes(text.encode())
    return root


def test_captions_next_to_clips(tmp_path: Path) -> None:
    pairs(tmp_path, b_mp4="b", sub__deep__a_MOV=" two\r\nlines\n", a_png="an image", B_gif="\ufeffB")
    pairs(tmp_path, _hidden_mp4="x").joinpath("_hidden.mp4").rename(tmp_path / ".hidden.mp4")
    (tmp_path / "_hidden.txt").unlink()
    touch(tmp_path, "a.v1.mp4", "a.v2.mp4", "README.md", ".git/x.txt", "cogvideox_tensors/x.mp4", "c.mp4/notes.md")
    (tmp_path / "a.v1.txt").write_text("v1")
    (tmp_path / "a.v2.txt").write_text("v2")
    assert [(sample.id, sample.caption) for sample in read(tmp_path)] == [
        ("B.gif", "B"),
        ("a.png", "an image"),
        ("a.v1.mp4", "v1"),
        ("a.v2.mp4", "v2"),
        ("b.mp4", "b"),
        ("sub/deep/a.MOV", "two\nlines"),
    ]


def test_lists_take_precedence_over_captions_next_to_clips(tmp_path: Path) -> None:
    pairs(tmp_path, a_mp4="of the pair", b_mp4="not listed")
    write_lists(tmp_path, "of the list", "a.mp4")
    assert captions(tmp_path) == ["of the list"]


def test_incomplete_pairs_are_reported_with_a_fix(tmp_path: Path) -> None:
    pairs(tmp_path, both_mp4="x", empty_mp4=" \n", bad_mp4="x")
    touch(tmp_path, "both.png", "sub/alone.mp4", "sub/alone.mp4.txt", "notes.txt", "turn.insv", "turn.txt")
    (tmp_path / "bad.txt").write_bytes(b"x\ncaf\xe9")
    found = [problem.removesuffix(f"; {WITHOUT_CAPTIONS}") for problem in problems(tmp_path)]
    assert sorted(problem.removeprefix(str(tmp_path)) for problem in found) == [
        "/bad.txt:2: is not UTF-8 (byte 4 is 0xe9); save the file as UTF-8",
        "/empty.txt: blank caption; write one, or remove the clip",
        ": both.mp4 and both.png: are clips of one name; rename all but one",
        ": notes.txt: is a caption without a clip; add the clip, or rename it to end in something else",
        ": sub/alone.mp4.txt: is a caption without a clip; leave the suffix of the clip out of its name, as in "
        "clip.mp4 and clip.txt",
        ": sub/alone.mp4: has no caption; write it next to the clip, into a file of the same name that ends in .txt",
        ": turn.insv: has a caption, but its format is not supported; convert it to mp4, or an image to png",
    ]


def test_captions_in_another_folder_than_their_clips_are_named(tmp_path: Path) -> None:
    """Clips in videos/ have their captions in labels/; no other folder is guessed."""
    touch(tmp_path, *(f"videos/{k}.mp4" for k in range(5)), "videos/twice.mp4", "more/twice.mp4")
    touch(tmp_path, *(f"captions/{k}.txt" for k in range(5)), "captions/twice.txt", "captions/other.txt")
    found = [problem.removesuffix(f"; {WITHOUT_CAPTIONS}") for problem in problems(tmp_path)]
    first = "videos/0.mp4, videos/1.mp4, videos/2.mp4 and 2 more (5 in all)"
    write = "write it next to the clip, into a file of the same name that ends in .txt"
    alone = "is a caption without a clip; add the clip, or rename it to end in something else"
    assert found == [
        f"{tmp_path}: captions/other.txt: {alone}",
        f"{tmp_path}: captions/twice.txt: {alone}",
        f"{tmp_path}: more/twice.mp4: has no caption; {write}",
        f"{tmp_path}: videos/twice.mp4: has no caption; {write}",
        f"{tmp_path}: {first}: has no caption; move it next to the clip, from captions/",
    ]


def test_pictures_in_a_folder_with_a_caption_are_the_frames_of_a_clip(tmp_path: Path) -> None:
    touch(tmp_path, *(f"my clip/{k:04d}.PNG" for k in range(30)), "photos/a.png", "photos/b.mp4")
    for name in ("my clip", "photos", "photos/a", "photos/b"):
        (tmp_path / f"{name}.txt").write_text("x")
    images = "'my clip/*.PNG' 'my clip.mp4'"
    command = f"`ffmpeg -framerate 24 -pattern_type glob -i {images}`"
    assert problems(tmp_path) == (
        f"{tmp_path}: my clip.txt: is a caption without a clip; make a clip of the pictures in my clip/, {command}, "
        "and move them out of the data set",
        f"{tmp_path}: photos.txt: is a caption without a clip; add the clip, or rename it to end in something else",
    )


def test_many_clips_without_captions_are_one_line(tmp_path: Path) -> None:
    touch(tmp_path, *(f"IMG_{k:04d}.MOV" for k in range(30)))
    (found,) = problems(tmp_path)
    clips = "IMG_0000.MOV, IMG_0001.MOV, IMG_0002.MOV and 27 more (30 in all)"
    assert found.startswith(f"{tmp_path}: {clips}: has no caption; write it next to the clip, into a file of the same ")
    assert found.endswith(f"; {WITHOUT_CAPTIONS}")


def test_files_that_may_be_the_missing_captions_are_named_by_their_ending(tmp_path: Path) -> None:
    touch(tmp_path, *(f"IMG_{k:04d}{suffix}" for k in range(30) for suffix in (".MOV", ".Caption")))
    (found,) = problems(tmp_path)
    assert (
        "has no caption; write it next to the clip, into a file of the same name that ends in .txt, not in .Caption; "
        in found
    )


@pytest.mark.parametrize("form", ["pairs", "list", "blank lines", "table", "blank cells"])
def test_captions_may_be_missing_in_every_form_where_none_are_needed(tmp_path: Path, form: str) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    files = {
        "pairs": {"a.txt": "one", "b.txt": " "},
        "list": {"videos.txt": "a.mp4\nb.mp4"},
        "blank lines": {"videos.txt": "a.mp4\nb.mp4", "prompts.txt": "\none"},
        "table": {"metadata.csv": "file_name\na.mp4\nb.mp4"},
        "blank cells": {"metadata.csv": "file_name,text\na.mp4,\nb.mp4,two"},
    }
    for name, text in files[form].items():
        (tmp_path / name).write_text(text)
    data = DataFlags((str(tmp_path),), id_token="TOKEN")
    samples = read_samples(data, need_captions=False)
    assert [sample.id for sample in samples] == ["a.mp4", "b.mp4"]
    assert "" in [sample.caption for sample in samples]
    (found,) = problems(tmp_path)
    assert found.endswith(WITHOUT_CAPTIONS)


@pytest.mark.fault("security: paths and links out of the data root")
def test_pipes_are_not_opened_and_links_out_are_not_followed(tmp_path: Path) -> None:
    root = pairs(tmp_path / "data", a_mp4="x")
    touch(root, "pipe.mp4", "out.mp4")
    os.mkfifo(root / "pipe.txt")
    (root / "out.txt").symlink_to("/etc/passwd")
    pairs(tmp_path / "other", o_mp4="other")
    (root / "link").symlink_to(tmp_path / "other")
    assert [problem.removeprefix(f"{root}: ").split(";")[0] for problem in problems(root)] == [
        f"link: leads outside the data root, to {tmp_path}/other",
        "out.txt: leads outside the data root, to /etc/passwd",
        "pipe.txt: is a pipe",
    ]
    for name in ("pipe.mp4", "pipe.txt", "out.mp4", "out.txt"):
        (root / name).unlink()
    assert [sample.id for sample in read(root, allow_path=(str(tmp_path / "other"),))] == ["a.mp4", "link/o.mp4"]


def test_folders_linked_inside_the_root_count_once(tmp_path: Path) -> None:
    pairs(tmp_path, z__a_mp4="x")
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "zz").symlink_to("z")
    (tmp_path / "z" / "up").symlink_to("..")
    (tmp_path / "loop").symlink_to("loop")
    assert [sample.id for sample in read(tmp_path)] == ["z/a.mp4"]


def test_names_that_are_not_utf8_or_look_like_urls(tmp_path: Path) -> None:
    pairs(tmp_path / "http:", a_mp4="x")
    assert [sample.id for sample in read(tmp_path)] == ["http:/a.mp4"]
    for name in (b"caf\xe9.mp4", b"caf\xe9.txt"):
        (tmp_path / os.fsdecode(name)).write_text("x")
    assert all("caf\\udce9" in problem and "is not UTF-8; rename" in problem for problem in problems(tmp_path))


def test_a_folder_without_a_data_set(tmp_path: Path) -> None:
    touch(tmp_path, "train.json", "x.parquet")
    assert problems(tmp_path) == (
        f"{tmp_path}: has none of: prompts.txt or prompt.txt with videos.txt, metadata.csv, metadata.jsonl, "
        "clip.mp4 with clip.txt; there are: train.json",
    )


def test_folders_of_different_forms(tmp_path: Path) -> None:
    one, two = pairs(tmp_path / "one", a_mp4="a pair"), touch(tmp_path / "two", "a.mp4")
    write_table(two / "metadata.jsonl", ["video", "prompt"], [["a.mp4", "a table"]])
    assert [(sample.id, sample.caption) for sample in read(one, two)] == [("a.mp4", "a pair"), ("a.mp4#2", "a table")]


@pytest.mark.fault("data: lists damaged at random", times=60)
def test_damaged_data_sets_end_in_samples_or_problems(tmp_path: Path) -> None:
    assert fuzz_indexes(60, 0, tmp_path) == []


def test_folders_that_this_suite_wrote_are_not_searched(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.txt", "prepared/preview/b.png", "run/validation/c.mp4", "preview/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("prepared/ledger.jsonl", "run/config.json", "run/metrics.jsonl", "ledger.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [sample.id for sample in read(tmp_path)] == ["a.mp4"]
    (tmp_path / "run/metrics.jsonl").unlink()  # without this file it is an ordinary folder
    with pytest.raises(UsageError, match="has no caption"):
        read(tmp_path)


def test_a_prepared_folder_says_which_flag_it_needs(tmp_path: Path) -> None:
    """It alone is named, because tables in such a folder are about tensors."""
    touch(tmp_path, "ledger.jsonl", "health.jsonl", "index.json", "preview/a.png", "tensors/b.safetensors")
    rule = "is a folder that was prepared here; to train on it add --load_tensors"
    assert list(problems(tmp_path)) == [f"{tmp_path}: {rule}"]


# -- fixes can be given to a shell -------------------------------------------------------------------------------------

HARD = "it's $HOME; a `b`"  # a name full of characters that are special to a shell


def flags_told(text: str) -> list[str]:
    """Returns the flags at the end of a fix, split into words as a shell splits them."""
    return shlex.split(re.split(r"pass |choose with |nearest: ", text)[-1])


def test_fixes_with_names_of_the_user_can_be_given_to_a_shell(tmp_path: Path) -> None:
    other, root = tmp_path / f"{HARD} outside", tmp_path / HARD
    touch(other, "o.mp4")
    touch(root, "a.mp4")
    (root / "link").symlink_to(other)
    write_lists(root, "x\n", "link/o.mp4", ())
    assert flags_told(problems(root)[0]) == ["--allow_path", str(other)]
    for name in ("prompts.txt", "videos.txt"):
        (root / name).unlink()
    assert flags_told(problems(root)[0]) == ["--allow_path", str(other)]
    (root / "t.csv").write_text(f"{HARD},video\nx,a.mp4\n")
    (told, *_) = problems(root, dataset_file="t.csv", caption_column=f"{HARD}c")
    assert flags_told(told) == ["--caption_column", HARD]


# -- folders as other systems and programs leave them ------------------------------------------------------------------

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 120\n"


def test_composed_and_decomposed_names_are_one(tmp_path: Path) -> None:
    """macOS decomposes accents in names, Linux and Windows do not."""
    touch(tmp_path / "pairs", f"{DECOMPOSED}.mp4", f"{DECOMPOSED}/{COMPOSED}.MOV")
    (tmp_path / "pairs" / f"{COMPOSED}.txt").write_text("one")
    (tmp_path / "pairs" / DECOMPOSED / f"{DECOMPOSED}.TXT").write_text("two")
    assert [(sample.id, sample.caption) for sample in read(tmp_path / "pairs")] == [
        (f"{DECOMPOSED}.mp4", "one"),
        (f"{DECOMPOSED}/{COMPOSED}.MOV", "two"),
    ]
    for form in ("lists", "table"):
        root = touch(tmp_path / form, f"{DECOMPOSED}/{DECOMPOSED}.mp4")
        if form == "lists":
            write_lists(root, "one", f"{COMPOSED}/{COMPOSED}.mp4", ())
        else:
            write_table(root / "metadata.csv", ["file_name", "text"], [[f"{COMPOSED}/{COMPOSED}.mp4", "one"]])
        expected = Sample(f"{COMPOSED}/{COMPOSED}.mp4", "one", str(root / DECOMPOSED / f"{DECOMPOSED}.mp4"))
        assert read(root) == [expected]


def test_names_that_differ_only_in_the_coding_of_accents_are_refused(tmp_path: Path) -> None:
    names = (f"{COMPOSED}.mp4", f"{DECOMPOSED}.mp4")
    touch(tmp_path, *names)
    (tmp_path / f"{COMPOSED}.txt").write_text("one")
    (found,) = problems(tmp_path)
    assert r"cafe\u0301.mp4 and caf\xe9.mp4: differ only in how their accents are coded" in found
    angstrom = ("\u212b.mp4", "A\u030a.mp4")  # neither is in NFC, and the list has a third spelling
    write_lists(tmp_path, "x", "\u00c5.mp4", angstrom)
    (found,) = problems(tmp_path)
    assert "matches several files" in found
    assert found.endswith("rename all but one")
    write_lists(tmp_path, "x\ny\n", "\n".join(names), ())  # listed exactly as the files are named
    assert [Path(sample.video).name for sample in read(tmp_path)] == list(names)


def test_letter_case_and_backslashes_of_other_systems(tmp_path: Path) -> None:
    touch(tmp_path, "Clips/IMG_1.MOV", "Clips/img_2.mp4", "Clips/same.mp4", "clips/SAME.mp4")
    flags = table(tmp_path, "video;text\n.\\clips\\img_1.mov;one\nCLIPS/IMG_2.MP4;two\nClips\\same.mp4;three\n")
    assert [(sample.id, Path(sample.video)) for sample in read(tmp_path, **flags)] == [
        ("clips/img_1.mov", tmp_path / "Clips/IMG_1.MOV"),
        ("CLIPS/IMG_2.MP4", tmp_path / "Clips/img_2.mp4"),
        ("Clips/same.mp4", tmp_path / "Clips/same.mp4"),
    ]
    flags = table(tmp_path, "video,text\nCLIPS/Same.mp4,one\n")
    assert "spelled differently: Clips/same.mp4, clips/SAME.mp4; rename" in problems(tmp_path, **flags)[0]
    pairs(tmp_path / "pairs", B_gif="B", b_mp4="b")
    (touch(tmp_path / "pairs", "DSC1.MP4") / "dsc1.txt").write_text("dsc")
    assert captions(tmp_path / "pairs") == ["B", "dsc", "b"]


def test_a_path_may_leave_out_the_ending_of_its_clip(tmp_path: Path) -> None:
    """As in tables of data sets that identify their clips by ids."""
    touch(tmp_path, "clips/a.v1.MP4", "clips/a.v1.txt", "clips/a.v2.webm", "f.mov")
    touch(tmp_path, "c.mp4", "c.webm", "d.mp4.mkv", "e/x")
    rows = {"clips/a.v1": "clips/a.v1.MP4", "CLIPS\\A.v2": "clips/a.v2.webm", "f": "f.mov"}
    flags = table(tmp_path, "video,text\n" + "".join(f"{path},x\n" for path in rows))
    assert [sample.video for sample in read(tmp_path, **flags)] == [str(tmp_path / name) for name in rows.values()]
    assert [sample.id for sample in read(tmp_path, **flags)] == ["clips/a.v1", "CLIPS/A.v2", "f"]
    flags = table(tmp_path, "video,text\nc,x\nd.mp4,x\nclips/a,x\ne,x\n")
    assert [problem.split(": ", 1)[1] for problem in problems(tmp_path, **flags)] == [
        "c: matches several files: c.mp4, c.webm; write the ending of one, too",
        f"d.mp4: no such file in {tmp_path}; nearest: d.mp4.mkv",
        f"clips/a: no such file in {tmp_path}; nearest: a.mp4",
        "e: is a folder; it must be a file with the video",
    ]


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("rabbit.mp4", "videos/rabbit.mp4"),  # in another folder
        ("clips/rabbit.mp4", "videos/rabbit.mp4"),
        ("videos/rabbit.webm", "videos/rabbit.mp4"),  # with another ending
        ("videos/twice.mkv", "videos/twice.mp4"),
        ("more/twice.mkv", "more/twice.mov"),
        ("videos/rabit.mp4", "videos/rabbit.mp4"),  # with other letters
        ("videos/clip_1.mp4", "videos/clip_01.mp4"),
        ("'clip_01.mp4'", "videos/clip_01.mp4"),
        ("my%20clip.mp4", "videos/my clip.mp4"),
    ],
)
def test_a_path_that_is_not_found_names_the_nearest_file(tmp_path: Path, path: str, nearest: str) -> None:
    touch(tmp_path, *(f"videos/{name}" for name in ("rabbit.mp4", "clip_01.mp4", "my clip.mp4", "twice.mp4")))
    touch(tmp_path, "more/twice.mov", "videos/rabbit.txt", ".hidden/rabbit.mp4", "@eaDir/rabbit.mp4")
    assert (
        f"{path}: no such file in {tmp_path}; nearest: {nearest}"
        in problems(tmp_path, **table(tmp_path, f'video,text\n"{path}",x\n'))[0]
    )


def test_a_path_like_no_other_names_the_folder(tmp_path: Path) -> None:
    touch(tmp_path, "videos/rabbit.mp4")
    (found,) = problems(tmp_path, **table(tmp_path, "video,text\nlighthouse.mp4,x\n"))
    assert found.endswith(f"lighthouse.mp4: no such file in {tmp_path}; paths are relative to that folder")


def test_a_search_for_spellings_does_not_leave_the_folder(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "a.mp4")
    touch(tmp_path / "other", "Secret.mp4")
    (root / "link").symlink_to(tmp_path / "other")
    for path in ("../other/secret.mp4", "LINK/secret.mp4", str(tmp_path / "other/secret.mp4"), "link/secret.mp4"):
        found = problems(root, **table(root, f"video,text\n{path},x\n"))
        assert "Secret" not in str(found)


@pytest.mark.parametrize("start", ["/home/other/data/", "C:\\Users\\other\\", "//nas/share/", "/home/it's/"])
def test_paths_of_another_machine_say_what_to_remove(tmp_path: Path, start: str) -> None:
    flags = table(touch(tmp_path, "clips/1.mp4"), f"video,text\n{start}clips/1.mp4,x\n{start}clips/2.mp4,x\n")
    found, missing = problems(tmp_path, **flags)
    rule = (
        f"{tmp_path}/t.csv:2: {start}clips/1.mp4: is a path of another machine, but {tmp_path} contains clips/1.mp4; "
    )
    assert found.startswith(f"{rule}remove {start} from the paths".replace("\\\\", "\\"))
    assert ("sed -i" in found) == (start in ("/home/other/data/", "//nas/share/"))
    assert "another machine" not in missing
    if "sed -i" in found:
        subprocess.run(shlex.split(found.split("for example with: ")[1]), check=True)
        assert "t.csv:3: clips/2.mp4: no such file" in problems(tmp_path, **flags)[0]


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_a_csv_with_another_separator(tmp_path: Path, sign: str) -> None:
    text = f'video{sign}text\na.mp4{sign}"one{sign} two, three"\nb.mp4{sign}four\n'
    assert captions(tmp_path, **table(tmp_path, text)) == [f"one{sign} two, three", "four"]
    assert "2: has 3 cells, but 2 columns" in problems(tmp_path, **table(tmp_path, f"video,text\na,b{sign}c,d\n"))[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_texts_of_windows_in_utf16(tmp_path: Path, encoding: str, suffix: str) -> None:
    """PowerShell's > and Notepad's "Unicode" write a byte order mark in front."""
    text = {
        "csv": 'video,text\r\na.mp4,"caf\u00e9\r\n\U0001f436"\r\n',
        "jsonl": '{"video": "a.mp4", "text": "caf\u00e9\\n\U0001f436"}\r\n',
        "txt": "caf\u00e9\r\n\U0001f436\r\n",
    }[suffix]
    data = ("\ufeff" * (encoding != "utf-16") + text).encode(encoding)
    flags = table(tmp_path, data, suffix)
    if suffix == "txt":
        (tmp_path / "t.txt").rename(tmp_path / "a.txt")
        (tmp_path / "b.mp4").unlink()
        flags = {}
    assert captions(tmp_path, **flags) == ["caf\u00e9\n\U0001f436"]
    ((tmp_path / "a.txt") if suffix == "txt" else tmp_path / f"t.{suffix}").write_bytes(data[:-1])
    assert "is not valid UTF-16" in problems(tmp_path, **flags)[0]


@pytest.mark.parametrize("suffix", [".mts", ".M2TS", ".3gp", ".3g2", ".vob", ".HEIC", ".heif", ".avif"])
def test_clips_of_cameras_and_phones_are_found(tmp_path: Path, suffix: str) -> None:
    (touch(tmp_path, f"a{suffix}") / "a.txt").write_text("x")
    assert [sample.id for sample in read(tmp_path)] == [f"a{suffix}"]


def test_files_of_unknown_formats_are_reported(tmp_path: Path) -> None:
    pairs(tmp_path, a_mp4="x")
    touch(tmp_path, "sub/b.insv", "c.R3D", "d.r3d", "a.srt", "a.json", "notes.md", "clips.zip", ".e.braw", "Makefile")
    touch(tmp_path, "data.xlsx", "~$data.xlsx", "e.caption")
    unused = Unused()
    assert len(read_samples(DataFlags(data_root=(str(tmp_path),)), unused)) == 1
    names = ["c.R3D", "clips.zip", "d.r3d", "data.xlsx", "e.caption", "sub/b.insv"]
    assert unused.unsupported == [str(tmp_path / name) for name in names]
    note, *examples = unused_notes(unused)
    rule = "files skipped because their format is not supported: 2 .r3d, 1 .zip, 1 .xlsx, 1 .caption, 1 .insv"
    assert note == f"{rule}; convert clips to mp4, and save captions as .txt and tables as CSV:"
    assert [line.strip() for line in examples] == unused.unsupported
    assert unused_notes(Unused()) == []


def test_files_of_other_programs_are_skipped(tmp_path: Path) -> None:
    pairs(tmp_path, a_mp4="x", readme_mp4="a clip")
    junk = ("@eaDir/a.mp4/thumb.jpg", ".AppleDouble/a.mp4", "._a.mp4", "__MACOSX/._a.mp4", "Thumbs.db", "desktop.ini")
    more = (
        ".DS_Store",
        "#recycle/b.mp4",
        "$RECYCLE.BIN/c.mp4",
        "sub/System Volume Information/d.mp4",
        "@Recycle/e.mp4",
    )
    texts = ("README.txt", "sub/ReadMe.TXT", "LICENSE.txt", "license-2.0.txt", "README.md", "Credits.txt")
    touch(tmp_path, *junk, *more, *texts)
    (tmp_path / "README.txt").unlink()
    assert captions(tmp_path) == ["x", "a clip"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_one_table_below_the_root_is_read(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "train/a.mp4", "README.txt", "dataset_info.json")
    write_table(tmp_path / "train" / name, ["file_name", "text"], [["a.mp4", "x"]])
    assert read(tmp_path) == read(tmp_path, dataset_file=f"train/{name}")
    touch(tmp_path, "test/b.mp4")
    write_table(tmp_path / "test" / name, ["file_name", "text"], [["b.mp4", "y"]])
    assert flags_told(problems(tmp_path)[0]) == [
        "--dataset_file", f"test/{name}", "or", "--dataset_file", f"train/{name}"
    ]  # fmt: skip
    pairs(tmp_path, c_mp4="a pair")
    assert "train/a.mp4: has no caption" in str(problems(tmp_path))


def test_files_that_may_name_the_clips_are_listed_with_their_flags(tmp_path: Path) -> None:
    write_lists(touch(tmp_path, "my set/c.mp4") / "my set", "one\n", "c.mp4\n", ())
    told = f"{tmp_path}: has no captions next to its clips, but my set/prompts.txt with videos.txt; give "
    assert problems(tmp_path) == (f"{told}--data_root '{tmp_path}/my set'",)
    table(tmp_path, "video,text\na.mp4,x\n")
    assert " or ".join(["--dataset_file t.csv", f"--data_root '{tmp_path}/my set'"]) in problems(tmp_path)[0]


def test_the_folders_of_cogvideo_s_own_trainer(tmp_path: Path) -> None:
    touch(tmp_path, "x/videos/1.mp4", "x/videos/sub/2.MP4", "x/labels/sub/2.txt", "README.txt")
    (tmp_path / "x/labels/1.txt").write_text("one")
    (tmp_path / "x/labels/sub/2.txt").write_text("two")
    assert [(sample.id, sample.caption) for sample in read(tmp_path)] == [
        ("x/videos/1.mp4", "one"),
        ("x/videos/sub/2.MP4", "two"),
    ]
    (tmp_path / "x/videos/1.txt").write_text("nearer")
    assert "x/labels/1.txt: is a caption without a clip" in problems(tmp_path)[0]


# -- Git LFS -----------------------------------------------------------------------------------------------------------


def test_pointers_of_git_lfs_are_one_group_of_lines(tmp_path: Path) -> None:
    root = tmp_path / HARD
    for number in range(250):
        touch(root, f"{number}.mp4")
        for suffix in ("mp4", "txt"):
            (root / f"{number}.{suffix}").write_text(LFS)
    found = problems(root)
    assert len(found) == 1
    assert "497 more (500 in all): is a Git LFS pointer, not the file itself; run: git -C" in found[0]
    assert shlex.split(found[0].split("; run: ")[1]) == ["git", "-C", str(root), "lfs", "pull"]


@pytest.mark.parametrize("name", ["prompts.txt", "videos.txt", "images.txt", "t.csv", "t.json", "a.mp4", "first.png"])
def test_a_pointer_of_git_lfs_is_recognized_anywhere(tmp_path: Path, name: str) -> None:
    flags = {}
    if name.startswith("t."):
        write_table(touch(tmp_path, "a.mp4") / name, ["video", "text"], [["a.mp4", "x"]])
        flags = {"dataset_file": name}
    else:
        write_lists(tmp_path, "x", "a.mp4", ("a.mp4", "first.png"))
        (tmp_path / "images.txt").write_text("first.png\n")
    read(tmp_path, **flags)
    (tmp_path / name).write_text(LFS)
    found = problems(tmp_path, **flags)
    assert len([line for line in found if "is a Git LFS pointer" in line]) == len(found) == 1


def test_a_file_that_is_like_a_pointer_is_read(tmp_path: Path) -> None:
    (pairs(tmp_path, a_mp4=f"A text about {LFS}") / "a.mp4").write_bytes(LFS.encode() + bytes(2000))
    assert captions(tmp_path) == [f"A text about {LFS}".strip()]


def test_weights_that_are_damaged_or_missing(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "vae", tmp_path / "vae")
    flags = ModelFlags(str(tmp_path))
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": weights.name}}))
    assert list(weight_problems(flags, ("vae",))) == []
    index.write_text(json.dumps({"weight_map": {"a": weights.name, "b": "part-2.safetensors"}}))
    assert list(weight_problems(flags, ("vae",))) == [
        f"{tmp_path}/vae: part-2.safetensors of 2 files missing; download the model again"
    ]
    index.write_text("{")
    assert list(weight_problems(flags, ("vae",))) == [f"{index}: is damaged; download this file again"]
    index.unlink()
    for content in (weights.read_bytes()[:-100], b"damaged", b"damaged a little more", b""):
        weights.write_bytes(content)
        (found,) = weight_problems(flags, ("vae",))
        assert found.startswith(f"{weights}: is damaged or incomplete (")
        assert found.endswith("; download this file again")


def test_weights_that_are_pointers_of_git_lfs(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "vae", tmp_path / "vae")
    flags = ModelFlags(str(tmp_path))
    assert list(weight_problems(flags, ("vae",))) == []
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    weights.write_text(LFS)
    (found,) = weight_problems(flags, ("vae",))
    assert found == f"{weights}: is a Git LFS pointer, not the file itself; run: git -C {tmp_path}/vae lfs pull"
