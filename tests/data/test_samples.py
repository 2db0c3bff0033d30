"""samples.py: lists, and what all forms share: captions, paths, ids, repeats, several folders.

test_folders.py tests the other forms.
"""

from __future__ import annotations

import os
import socket
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_sets import captions, problems, read, touch, write_lists

from cogvideox.config.flags import DataFlags, LoaderFlags
from cogvideox.config.options import TrainOptions
from cogvideox.data.forms import samples
from cogvideox.data.forms.samples import Sample, check_data_roots, read_samples, read_validation, take_listing


def test_rows_become_samples(tmp_path: Path) -> None:
    write_lists(tmp_path, "one\ntwo\n", "a.mp4\nsub/b.mp4\n", ("a.mp4", "sub/b.mp4"))
    assert read(tmp_path) == [
        Sample("a.mp4", "one", str(tmp_path / "a.mp4")),
        Sample("sub/b.mp4", "two", str(tmp_path / "sub/b.mp4")),
    ]


def test_prompt_txt_is_found_and_prompts_txt_wins(tmp_path: Path) -> None:
    write_lists(tmp_path, "one", "a.mp4")
    (tmp_path / "prompt.txt").write_text("other")
    assert captions(tmp_path) == ["one"]
    (tmp_path / "prompts.txt").unlink()
    assert captions(tmp_path) == ["other"]


def test_named_lists_and_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lists(tmp_path, "one", "a.mp4")
    (tmp_path / "prompts.txt").rename(tmp_path / "c.txt")
    (tmp_path / "videos.txt").rename(tmp_path / "v.txt")
    monkeypatch.chdir(tmp_path.parent)
    names = {"caption_column": "c.txt", "video_column": "v.txt"}
    assert read(Path(tmp_path.name), **names) == [Sample("a.mp4", "one", str(tmp_path / "a.mp4"))]


@pytest.mark.fault("data: duplicate rows")
def test_repeated_paths_get_their_own_ids(tmp_path: Path) -> None:
    write_lists(tmp_path, "1\n2\n3\n4\n5", "a.mp4#2\na.mp4\n./a.mp4\na.mp4\na.mp4#2", ("a.mp4", "a.mp4#2"))
    assert [sample.id for sample in read(tmp_path)] == ["a.mp4#2", "a.mp4", "a.mp4#3", "a.mp4#4", "a.mp4#2#2"]


def test_id_token_is_put_in_front_once(tmp_path: Path) -> None:
    write_lists(tmp_path, "DOG runs\nDOGS run\na DOG\nDOG, asleep", "a.mp4\n" * 4)
    expected = ["DOG runs", "DOG DOGS run", "DOG a DOG", "DOG, asleep"]
    assert captions(tmp_path, id_token=" DOG ") == expected
    assert captions(tmp_path, id_token="  ") == ["DOG runs", "DOGS run", "a DOG", "DOG, asleep"]


@pytest.mark.fault("data: byte order marks, line ends and separators in lists")
def test_encodings_and_separators(tmp_path: Path) -> None:
    odd = ["first", "caf\u00e9 \U0001f436", "a\u2028b\x0bc\x0cd\x85e", "$(touch x) `y` \"q\" 'p'; rm"]
    text = "\ufeff" + "\r\n".join(odd) + "\r\n\r\n \n"
    write_lists(tmp_path, text, "\ufeffa.mp4\r\n" + "b.mp4\r\n" * 3 + "\n\n")
    assert captions(tmp_path) == odd
    assert read(tmp_path)[0].id == "a.mp4"


def test_a_very_long_caption_is_kept(tmp_path: Path) -> None:
    write_lists(tmp_path, "x" * 10_000_000, "a.mp4")
    assert len(captions(tmp_path)[0]) == 10_000_000


@pytest.mark.fault("data: bytes that are not UTF-8")
def test_bytes_that_are_not_utf8_name_the_line(tmp_path: Path) -> None:
    write_lists(tmp_path, b"one\ncaf\xe9\n", "a.mp4\nb.mp4")
    assert problems(tmp_path) == (f"{tmp_path}/prompts.txt:2: is not UTF-8 (byte 4 is 0xe9); save the file as UTF-8",)


def test_missing_root_is_the_only_problem(tmp_path: Path) -> None:
    assert problems(tmp_path / "no") == (
        f"--data_root {tmp_path / 'no'}: no such folder; give the folder of the clips and captions",
    )
    (tmp_path / "file").touch()
    assert "not a folder" in problems(tmp_path / "file")[0]


def test_missing_lists_name_flag_and_files(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").touch()
    found = problems(tmp_path, video_column="clips.txt")
    assert len(found) == 2
    assert "prompts.txt or prompt.txt (--caption_column)" in found[0]
    assert "--video_column clips.txt" in found[1]
    assert all("there are: metadata.csv" in problem for problem in found)


def test_a_pipe_as_list_is_not_opened(tmp_path: Path) -> None:
    write_lists(tmp_path, "one", "a.mp4")
    (tmp_path / "prompts.txt").unlink()
    os.mkfifo(tmp_path / "prompts.txt")
    assert "no such file" in problems(tmp_path)[0]


@pytest.mark.fault("data: empty lists")
def test_empty_lists(tmp_path: Path) -> None:
    write_lists(tmp_path, "\n\n", "")
    assert [problem.split(": ")[1] for problem in problems(tmp_path)] == [
        "is empty; it needs one line for each clip"
    ] * 2


@pytest.mark.parametrize(
    ("texts", "longer", "line", "counts"),
    [(("1\n2\n3", "a.mp4"), "prompts", 2, "3 lines"), (("1", "a.mp4\nb.mp4"), "videos", 2, "2 lines")],
)
@pytest.mark.fault("data: more captions than clips, or fewer")
def test_unequal_counts_name_both_and_the_first_surplus_line(
    tmp_path: Path, texts: tuple[str, str], longer: str, line: int, counts: str
) -> None:
    (found,) = problems(write_lists(tmp_path, *texts))
    assert found.startswith(f"{tmp_path}/{longer}.txt:{line}:")
    assert counts in found
    assert "has 1" in found


def test_all_problems_come_together(tmp_path: Path) -> None:
    write_lists(tmp_path, "one\n\nthree\nfour", "a.mp4\nb.mp4\nno.mp4\n\nb.mp4")
    found = problems(tmp_path)
    assert [problem.split(": ")[0].rsplit("/", 1)[1] for problem in found] == [
        "videos.txt:5",
        "prompts.txt:2",
        "videos.txt:3",
        "videos.txt:4",
    ]


def test_many_problems_of_a_kind_are_cut_short(tmp_path: Path) -> None:
    write_lists(tmp_path, "x\n" * 26, "".join(f"no{k}.mp4\n" for k in range(25)) + "https://x.org/a.mp4")
    found = problems(tmp_path)
    assert len(found) == 2
    file = tmp_path / "videos.txt"
    locations = f"{file}:1: no0.mp4, {file}:2: no1.mp4, {file}:3: no2.mp4 and 22 more (25 in all)"
    assert found[0] == f"{locations}: no such file in {tmp_path}; paths are relative to that folder"
    assert "is a URL" in found[1]


@pytest.mark.parametrize("path", ["https://x.org/a.mp4", "file:///etc/passwd", "file:/etc/passwd", "s3://b/a.mp4"])
@pytest.mark.fault("security: URLs in lists of clips")
def test_urls_are_refused(tmp_path: Path, path: str) -> None:
    assert "is a URL; download" in problems(write_lists(tmp_path, "x", path))[0]


def test_colons_in_names_are_fine(tmp_path: Path) -> None:
    assert read(write_lists(tmp_path, "x", "12:30.mp4", ("12:30.mp4",)))[0].id == "12:30.mp4"


@pytest.mark.fault("security: devices, pipes and folders in lists of clips")
def test_what_is_not_a_regular_file_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.mp4")
    Path("folder.mp4").mkdir()
    Path("sub").mkdir()
    Path("link.mp4").symlink_to("pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.mp4")
        names = ("pipe.mp4", "folder.mp4", "link.mp4", "s.mp4", ".", "sub/..")
        found = [problems(write_lists(tmp_path, "x", name, ())) for name in names]
    assert [problem.split("is a ")[1].split(";")[0] for (problem,) in found] == [
        "pipe", "folder", "pipe", "socket", "folder", "folder"
    ]  # fmt: skip
    assert "is a device" in problems(write_lists(tmp_path, "x", "/dev/null", ()), allow_path=("/dev",))[0]


def test_paths_out_of_the_root_need_allow_path(tmp_path: Path) -> None:
    root, other = tmp_path / "data", tmp_path / "database"
    root.mkdir()
    other.mkdir()
    (other / "o.mp4").touch()
    (root / "link.mp4").symlink_to(other / "o.mp4")
    (root / "folder").symlink_to(other)
    (root / "dangling.mp4").symlink_to(other / "no.mp4")
    listed = ["../database/o.mp4", str(other / "o.mp4"), "link.mp4", "folder/o.mp4", "/etc/passwd", "dangling.mp4"]
    write_lists(root, "x\n" * 6, "\n".join(listed))
    found = problems(root)
    assert len(found) == 4
    assert all("leads outside the data root" in problem for problem in found[:3])
    assert found[3] == "... and 3 more (6 in all): outside the data root"
    assert found[0].endswith(f"pass --allow_path {other}")
    write_lists(root, "x\n" * 4, "\n".join(listed[:4]))
    samples = read(root, allow_path=(str(other),))
    assert [sample.id for sample in samples][2:] == ["link.mp4", "folder/o.mp4"]
    assert all(os.path.isfile(sample.video) and os.path.isabs(sample.video) for sample in samples)


@pytest.mark.fault("security: a list, or a table, that is a link out of the data root")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prompts.txt", {}),
        ("videos.txt", {}),
        ("images.txt", {}),
        ("other.txt", {"caption_column": "other.txt"}),
        ("metadata.csv", {}),
        ("sub/table.csv", {"dataset_file": "sub/table.csv"}),
    ],
)
def test_lists_that_lead_out_of_the_root_need_allow_path(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Somebody else's folder must not choose which file of this machine becomes captions."""
    root, other = tmp_path / "data", tmp_path / "private"
    other.mkdir()
    if name.endswith(".txt"):
        write_lists(touch(root), "one\ntwo\n", "a.mp4\nb.mp4\n")
        (root / "images.txt").write_text("a.mp4\nb.mp4\n")
    touch(root, "a.mp4", "b.mp4", name)
    (root / name).unlink()
    text = "file_name,text\na.mp4,one\n" if name.endswith(".csv") else "a.mp4\nb.mp4\n"
    (other / "secret").write_text(text)
    (root / name).symlink_to(other / "secret")
    (found,) = problems(root, **options)
    assert f"{name}: leads outside the data root, to {other / 'secret'}" in found
    assert found.endswith(f"pass --allow_path {other}")
    if name != "sub/table.csv":  # its paths are relative to its folder
        assert read(root, allow_path=(str(other),), **options)


def test_a_list_elsewhere_that_the_user_names_is_read(tmp_path: Path) -> None:
    root = write_lists(touch(tmp_path / "data"), "one\ntwo\n", "a.mp4\nb.mp4\n")
    (tmp_path / "mine.txt").write_text("three\nfour\n")
    assert captions(root, caption_column="../mine.txt") == captions(root, caption_column=str(tmp_path / "mine.txt"))


def test_absolute_paths_and_links_inside_the_root_are_fine(tmp_path: Path) -> None:
    root = write_lists(
        tmp_path, "x\n" * 4, f"{tmp_path}/a.mp4\nsub/../a.mp4\nlink.mp4\n./b.mp4", ("a.mp4", "b.mp4", "sub/c")
    )
    (root / "link.mp4").symlink_to("b.mp4")
    assert [sample.id for sample in read(root)] == ["a.mp4", "a.mp4#2", "link.mp4", "b.mp4"]


def test_a_root_that_is_a_link_counts_as_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write_lists(tmp_path / "real", "x", "a.mp4")
    (tmp_path / "link").symlink_to("real")
    assert read(tmp_path / "link") == [Sample("a.mp4", "x", str(tmp_path / "link" / "a.mp4"))]


def test_dot_dot_after_a_link_is_resolved_as_the_system_does(tmp_path: Path) -> None:
    root = write_lists(tmp_path, "x", "link/../c.mp4", ("c.mp4", "sub/c.mp4", "sub/deep/d"))
    (root / "link").symlink_to("sub/deep")
    assert Path(read(root)[0].video).resolve() == root / "sub/c.mp4"


def test_odd_paths(tmp_path: Path) -> None:
    write_lists(tmp_path, "1\n2\n3", f"a\0.mp4\n{'x' * 5000}\na.mp4/b.mp4")
    found = problems(tmp_path)
    assert "NUL" in found[0]
    assert "cannot be read" in found[1]
    assert len(found[1]) < 600
    assert "no such file" in found[2]


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (found,) = problems(write_lists(tmp_path, "x", "\x1b[2J\u202e.mp4"))
    assert "\\x1b[2J\\u202e.mp4: no such file" in found


def test_captions_that_are_not_valid_text_are_refused(tmp_path: Path) -> None:
    (found,) = problems(write_lists(tmp_path, b"o\0n\0e\0", "a.mp4"))
    assert found == f"{tmp_path}/prompts.txt:1: holds a NUL byte; save the file as plain UTF-8 text"


@pytest.mark.fault("data: file names in any script, and with shell characters")
def test_paths_of_any_script(tmp_path: Path) -> None:
    names = ("caf\u00e9.mp4", "\u72ac/\U0001f436.mp4", "$(touch x);`y`.mp4", "a b'c\"d.mp4", "-rf.mp4", "a.v1.mp4")
    write_lists(tmp_path, "x\n" * 6, "\n".join(names), names)
    assert [sample.id for sample in read(tmp_path)] == list(names)


def test_a_third_list_has_the_images(tmp_path: Path) -> None:
    write_lists(tmp_path, "1\n2", "a.mp4\nb.mp4", ("a.mp4", "b.mp4", "a.png", "sub/b.png"))
    assert [sample.image for sample in read(tmp_path)] == [None, None]
    (tmp_path / "images.txt").write_text("a.png\nsub/b.png\n")
    for options in ({}, {"image_column": "images.txt"}, {"caption_column": "prompts.txt"}):
        assert [sample.image for sample in read(tmp_path, **options)] == [
            str(tmp_path / "a.png"),
            str(tmp_path / "sub/b.png"),
        ]
    assert read(tmp_path, video_column="videos.txt")[0].image is None


def test_images_have_the_rules_of_videos(tmp_path: Path) -> None:
    root = write_lists(tmp_path, "1\n2\n3\n4\n5\n6", "a.mp4\n" * 6, ("a.mp4", "sub/b.png"))
    (root / "first.txt").write_text("no.png\nsub\n/etc/passwd\nhttps://x.org/a.png\n\nsub/b.png\nsub/b.png")
    found = problems(root, image_column="first.txt")
    assert [problem.removeprefix(f"{root}/first.txt:").split("; ")[0] for problem in found] == [
        f"7: first line without a caption (7 lines, but {root}/prompts.txt has 6)",
        f"1: no.png: no such file in {root}",
        "2: sub: is a folder",
        "3: /etc/passwd: leads outside the data root, to /etc/passwd",
        "4: https://x.org/a.png: is a URL",
    ]
    (root / "first.txt").write_text("sub/b.png")
    assert "prompts.txt:2: first line without an image" in problems(root, image_column="first.txt")[0]


def test_a_repeat_is_the_rows_listed_again(tmp_path: Path) -> None:
    once = write_lists(tmp_path, "1\n2\n3", "a.mp4\nb.mp4\na.mp4")
    repeated = read(once, repeats=(3,))
    write_lists(tmp_path, "1\n2\n3\n" * 3, "a.mp4\nb.mp4\na.mp4\n" * 3)
    assert repeated == read(once)
    assert [sample.id for sample in repeated[:5]] == ["a.mp4", "b.mp4", "a.mp4#2", "a.mp4#3", "b.mp4#2"]


def folders(tmp_path: Path, *names: str) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
        write_lists(tmp_path / name, f"of {name}\nalso of {name}", "a.mp4\nb.mp4")
    return [tmp_path / name for name in names]


def test_folders_come_in_order_with_their_own_repeats(tmp_path: Path) -> None:
    one, two = folders(tmp_path, "two", "one")
    samples = read(one, two, repeats=(1, 2))
    assert [(sample.id, Path(sample.video)) for sample in samples] == [
        ("a.mp4", one / "a.mp4"),
        ("b.mp4", one / "b.mp4"),
        ("a.mp4#2", two / "a.mp4"),
        ("b.mp4#2", two / "b.mp4"),
        ("a.mp4#3", two / "a.mp4"),
        ("b.mp4#3", two / "b.mp4"),
    ]
    assert [sample.caption for sample in samples[1:3]] == ["also of two", "of one"]
    assert read(one, two, repeats=(2,))[:4] == read(one, repeats=(2,))


def test_a_folder_does_not_open_another(tmp_path: Path) -> None:
    one, two = folders(tmp_path, "one", "two")
    (two / "videos.txt").write_text("a.mp4\n../one/a.mp4")
    assert "leads outside the data root" in problems(one, two)[0]


def test_problems_of_all_folders_come_together(tmp_path: Path) -> None:
    one, two, three = folders(tmp_path, "one", "two", "three")
    (one / "prompts.txt").write_text("x\n")
    (three / "videos.txt").write_text("".join(f"no{k}.mp4\n" for k in range(25)))
    (three / "prompts.txt").write_text("x\n" * 25)
    found = problems(one, two, three, tmp_path / "four")
    assert len(found) == 1 + 1 + 1
    assert "videos.txt:2: first line without a caption" in found[0]
    assert found[-1] == f"--data_root {tmp_path}/four: no such folder; give the folder of the clips and captions"


def test_validation_folders_are_read_apart(tmp_path: Path) -> None:
    train, held_out = folders(tmp_path, "train", "held_out")
    data = DataFlags(data_root=(str(train),), repeats=(3,), id_token="DOG", validation_data_root=(str(held_out),))
    assert [sample.caption for sample in read_validation(data)] == ["DOG of held_out", "DOG also of held_out"]
    assert [sample.id for sample in read_validation(data)] == ["a.mp4", "b.mp4"]
    assert {Path(sample.video).parent for sample in read_samples(data)} == {train}
    assert read_validation(DataFlags(data_root=(str(train),))) == []


def test_the_check_lists_training_and_validation(tmp_path: Path) -> None:
    one, two = folders(tmp_path, "one", "two")
    roots = (str(one), str(two))
    (one / "a.mp4").unlink()
    (two / "b.mp4").unlink()
    # A wrong number of repeats is reported by the flags' own checks, which run as well.
    data = DataFlags(data_root=roots, validation_data_root=(str(tmp_path / "no"),), repeats=(1, 2, 3))
    found = list(check_data_roots(SimpleNamespace(data=data, loader=LoaderFlags())))
    assert [problem.split(": ")[0] for problem in found] == [
        f"{one}/videos.txt:1", f"{two}/videos.txt:2", f"--validation_data_root {tmp_path}/no",
    ]  # fmt: skip


def test_the_check_leaves_a_prepared_folder_to_others(tmp_path: Path) -> None:
    def found(load_tensors: bool) -> list[str]:
        flags = {"data": DataFlags(data_root=(str(tmp_path),)), "loader": LoaderFlags(load_tensors=load_tensors)}
        return list(check_data_roots(TrainOptions(**dict.fromkeys(names) | flags)))

    names = [field.name for field in fields(TrainOptions)]
    assert found(load_tensors=True) == []
    assert "has none of: prompts.txt" in found(load_tensors=False)[0]


def test_the_folders_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run whose flags were checked takes the clips that the check read, once; no other run gets them."""
    write_lists(tmp_path, "a red square\n", "a.mp4\n")
    real, roots = samples._read_folder, list[str]()

    def counted(flag: str, folder: str, *rest: Any) -> Any:
        roots.append(folder)
        return real(flag, folder, *rest)

    monkeypatch.setattr(samples, "_read_folder", counted)
    data, equal = (DataFlags(data_root=(str(tmp_path),), validation_data_root=(str(tmp_path),)) for _ in range(2))
    assert list(check_data_roots(SimpleNamespace(data=data, loader=LoaderFlags()))) == []
    assert data == equal
    listing = take_listing(data, tmp_path)
    assert len(roots) == 2
    assert (listing.samples, listing.validation) == (read_samples(equal), read_validation(equal))
    (tmp_path / "prompts.txt").write_text("a blue disc\n")
    assert take_listing(data, tmp_path).samples[0].caption == "a blue disc"
    assert take_listing(equal, tmp_path).samples[0].caption == "a blue disc"


@pytest.mark.parametrize("checked", [True, False])
def test_files_of_unsupported_formats_are_listed_for_all_folders(tmp_path: Path, checked: bool) -> None:
    for root in (tmp_path / "train", tmp_path / "held_out"):
        root.mkdir()
        for name in ("a.mp4", "a.txt", "b.rm"):
            (root / name).write_text("x")
    data = DataFlags((str(tmp_path / "train"),), validation_data_root=(str(tmp_path / "held_out"),))
    assert not checked or list(check_data_roots(SimpleNamespace(data=data, loader=LoaderFlags()))) == []
    unused = take_listing(data, tmp_path).unused
    assert sorted(unused.unsupported) == [str(tmp_path / folder / "b.rm") for folder in ("held_out", "train")]


@pytest.mark.fault("data: a table with hundreds of thousands of rows")
def test_many_rows(tmp_path: Path) -> None:
    write_lists(tmp_path, "".join(f"caption {k}\n" for k in range(100_000)), "a.mp4\n" * 100_000)
    samples = read(tmp_path)
    assert len(samples) == 100_000
    assert samples[-1] == Sample("a.mp4#100000", "caption 99999", str(tmp_path / "a.mp4"))
