"""unused.py: captions, clips and tables that somebody may have meant to be used, and that are not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from data_sets import problems, touch, write_lists

from cogvideox.config.flags import DataFlags
from cogvideox.data.forms import unused as unused_module
from cogvideox.data.forms.samples import read_samples
from cogvideox.data.forms.unused import Unused
from cogvideox.preparation.unusable import unused_notes


def unused_of(root: Path, **options: Any) -> Unused:
    """Returns what a folder has and does not use; captions may be missing."""
    unused = Unused()
    read_samples(DataFlags(data_root=(str(root),), **options), unused, need_captions=False)
    return unused


def with_texts(root: Path, **texts: str) -> Path:
    """Writes clips with a text file next to each: name="..." makes name.mp4 and name.txt."""
    for name, text in texts.items():
        (touch(root, f"{name}.mp4") / f"{name}.txt").write_text(text)
    return root


def test_text_files_that_a_table_takes_the_place_of_are_named(tmp_path: Path) -> None:
    with_texts(tmp_path, new="a caption that was written later", same="two\n lines", blank=" ", unlisted="x")
    touch(tmp_path, "none.mp4", "alone.txt", ".hidden.mp4", ".hidden.txt", "sub/new.mp4")
    file = tmp_path / "clips.csv"
    file.write_text("video,text\nnew.mp4,old\nsame.mp4,two lines\nblank.mp4,b\nnone.mp4,n\nsub/new.mp4,s\n")
    unused = unused_of(tmp_path, dataset_file="clips.csv")
    assert unused.captions == {str(file): [str(tmp_path / "new.txt")]}
    assert unused.clips == {str(file): [str(tmp_path / "unlisted.mp4")]}
    assert unused_notes(unused) == [
        f"1 text file next to a clip says something else than {file}, which is read instead; copy what is new into it, "
        "or remove the text files:",
        f"  {tmp_path}/new.txt",
        f"1 clip with a caption next to it is not in {file}, and thus not used; add a row or line for each:",
        f"  {tmp_path}/unlisted.mp4",
    ]


def test_lists_take_the_place_of_text_files_too(tmp_path: Path) -> None:
    with_texts(tmp_path, a="x", b="y", prompts="z")
    write_lists(tmp_path, "x\nold\n", "a.mp4\nb\n", ())
    unused = unused_of(tmp_path)
    assert unused.captions == {str(tmp_path / "prompts.txt"): [str(tmp_path / "b.txt")]}
    assert unused.clips == {}


def test_a_blank_row_says_that_a_text_file_has_its_caption(tmp_path: Path) -> None:
    with_texts(tmp_path, a="x", b="")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,\nb.mp4,\n")
    first, second = (problem.split("; caption_dataset.py")[0] for problem in problems(tmp_path))
    assert first == (
        f"{tmp_path}/metadata.csv:2: blank caption; copy it from the text file next to the clip, which is not read "
        "because this file has the captions"
    )
    assert second == f"{tmp_path}/metadata.csv:3: blank caption; write one, or remove the row"
    assert list(unused_of(tmp_path).captions.values()) == [[str(tmp_path / "a.txt")]]


def test_a_blank_scene_does_not_get_the_text_of_all_scenes(tmp_path: Path) -> None:
    with_texts(tmp_path, a="x")
    (tmp_path / "metadata.csv").write_text("file_name,text,start,end\na.mp4,,0,1\na.mp4,,,\n")
    scene, complete = (problem.split("; caption_dataset.py")[0] for problem in problems(tmp_path))
    assert scene == f"{tmp_path}/metadata.csv:2: blank caption; write one, or remove the row"
    assert "; copy it from the text file" in complete


@pytest.mark.parametrize(
    ("first", "second", "is_named"),
    [
        ("of the clip", "of the clip", False),
        ("old", "old", True),  # the caption was repeated for each scene, and has changed since
        ("", "", False),  # a caption of the whole clip describes none of its scenes
        ("one scene", "another", False),
    ],
)
def test_scenes_have_captions_of_their_own(tmp_path: Path, first: str, second: str, is_named: bool) -> None:
    with_texts(tmp_path, a="of the clip")
    rows = f"a.mp4,0,2,{first}\na.mp4,2,,{second}\n"
    (tmp_path / "scenes.csv").write_text(f"video,start,end,caption\n{rows}")
    assert bool(unused_of(tmp_path, dataset_file="scenes.csv").captions) == is_named


def test_a_table_that_is_not_read_is_named(tmp_path: Path) -> None:
    touch(with_texts(tmp_path, a="x"), "clips.csv", "sub/other.csv", "notes.md")
    unused = unused_of(tmp_path)
    assert unused.tables == [str(tmp_path / "clips.csv")]
    assert unused_notes(unused) == [
        "1 table is not read, because captions are next to the clips; to use one, name it with --dataset_file:",
        f"  {tmp_path}/clips.csv",
    ]
    touch(tmp_path, "ledger.jsonl")  # the folder is also the output of a preparation, whose tables are not about clips
    assert unused_of(tmp_path).tables == []


def test_the_search_does_not_leave_the_folder_or_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unused_module, "MOST_COMPARED", 3)
    with_texts(tmp_path, **{f"c{k}": "text" for k in range(5)})
    touch(tmp_path, "a_pipe.mp4", "b_link.mp4")
    os.mkfifo(tmp_path / "a_pipe.txt")
    (tmp_path / "b_link.txt").symlink_to("/etc/passwd")
    listed = ["a_pipe", "b_link", *(f"c{k}" for k in range(5))]
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name}.mp4,x\n" for name in listed))
    (texts,) = unused_of(tmp_path).captions.values()
    assert [Path(text).name for text in texts] == ["c0.txt", "c1.txt", "c2.txt"]
