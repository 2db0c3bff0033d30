import os
import socket
from pathlib import Path

import pytest

from cogvideox.data.index import Sample, read_index
from cogvideox.errors import UsageError


def write(root: Path, captions: str | bytes, videos: str | bytes, files: tuple[str, ...] = ("a.mp4", "b.mp4")) -> Path:
    for name, text in (("prompts.txt", captions), ("videos.txt", videos)):
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not read")
    return root


def problems(root: Path, **options) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        read_index(root, **options)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def captions(root: Path, **options) -> list[str]:
    return [sample.caption for sample in read_index(root, **options)]


def test_rows_become_samples(tmp_path):
    write(tmp_path, "one\ntwo\n", "a.mp4\nsub/b.mp4\n", ("a.mp4", "sub/b.mp4"))
    assert read_index(tmp_path) == [
        Sample("a.mp4", "one", tmp_path / "a.mp4"),
        Sample("sub/b.mp4", "two", tmp_path / "sub/b.mp4"),
    ]


def test_prompt_txt_is_found_and_prompts_txt_wins(tmp_path):
    write(tmp_path, "one", "a.mp4")
    (tmp_path / "prompt.txt").write_text("other")
    assert captions(tmp_path) == ["one"]
    (tmp_path / "prompts.txt").unlink()
    assert captions(tmp_path) == ["other"]


def test_named_lists_and_a_relative_root(tmp_path, monkeypatch):
    write(tmp_path, "one", "a.mp4")
    (tmp_path / "prompts.txt").rename(tmp_path / "c.txt")
    (tmp_path / "videos.txt").rename(tmp_path / "v.txt")
    monkeypatch.chdir(tmp_path.parent)
    assert read_index(Path(tmp_path.name), "c.txt", "v.txt") == [Sample("a.mp4", "one", tmp_path / "a.mp4")]


def test_repeated_paths_get_their_own_ids(tmp_path):
    write(tmp_path, "1\n2\n3\n4\n5", "a.mp4#2\na.mp4\n./a.mp4\na.mp4\na.mp4#2", ("a.mp4", "a.mp4#2"))
    assert [sample.id for sample in read_index(tmp_path)] == ["a.mp4#2", "a.mp4", "a.mp4#3", "a.mp4#4", "a.mp4#2#2"]


def test_id_token_is_put_in_front_once(tmp_path):
    write(tmp_path, "DOG runs\nDOGS run\na DOG\nDOG, asleep", "a.mp4\n" * 4)
    expected = ["DOG runs", "DOG DOGS run", "DOG a DOG", "DOG, asleep"]
    assert captions(tmp_path, id_token=" DOG ") == expected
    assert captions(tmp_path, id_token="  ") == ["DOG runs", "DOGS run", "a DOG", "DOG, asleep"]


def test_encodings_and_separators(tmp_path):
    odd = ["first", "caf\u00e9 \U0001f436", "a\u2028b\x0bc\x0cd\x85e", "$(touch x) `y` \"q\" 'p'; rm"]
    text = "\ufeff" + "\r\n".join(odd) + "\r\n\r\n \n"
    write(tmp_path, text, "\ufeffa.mp4\r\n" + "b.mp4\r\n" * 3 + "\n\n")
    assert captions(tmp_path) == odd
    assert read_index(tmp_path)[0].id == "a.mp4"


def test_a_very_long_caption_is_kept(tmp_path):
    write(tmp_path, "x" * 10_000_000, "a.mp4")
    assert len(captions(tmp_path)[0]) == 10_000_000


def test_bytes_that_are_not_utf8_name_the_line(tmp_path):
    write(tmp_path, b"one\ncaf\xe9\n", "a.mp4\nb.mp4")
    assert problems(tmp_path) == (f"{tmp_path}/prompts.txt:2: is not UTF-8 (byte 4 is 0xe9); save the file as UTF-8",)


def test_missing_root_is_the_only_problem(tmp_path):
    assert problems(tmp_path / "no") == (
        f"--data_root {tmp_path / 'no'}: no such folder; it must hold prompts.txt and videos.txt",
    )
    (tmp_path / "file").touch()
    assert "not a folder" in problems(tmp_path / "file")[0]


def test_missing_lists_name_flag_and_files(tmp_path):
    (tmp_path / "metadata.csv").touch()
    found = problems(tmp_path, video_file="clips.txt")
    assert len(found) == 2
    assert "prompts.txt or prompt.txt (--caption_column)" in found[0]
    assert "--video_column clips.txt" in found[1]
    assert all("there are: metadata.csv" in problem for problem in found)


def test_a_pipe_as_list_is_not_opened(tmp_path):
    write(tmp_path, "one", "a.mp4")
    (tmp_path / "prompts.txt").unlink()
    os.mkfifo(tmp_path / "prompts.txt")
    assert "no such file" in problems(tmp_path)[0]


def test_empty_lists(tmp_path):
    write(tmp_path, "\n\n", "")
    assert [problem.split(": ")[1] for problem in problems(tmp_path)] == [
        "is empty; it needs one line for each clip"
    ] * 2


@pytest.mark.parametrize(
    ("texts", "longer", "line", "counts"),
    [(("1\n2\n3", "a.mp4"), "prompts", 2, "3 lines"), (("1", "a.mp4\nb.mp4"), "videos", 2, "2 lines")],
)
def test_unequal_counts_name_both_and_the_first_surplus_line(tmp_path, texts, longer, line, counts):
    (found,) = problems(write(tmp_path, *texts))
    assert found.startswith(f"{tmp_path}/{longer}.txt:{line}:")
    assert counts in found
    assert "has 1" in found


def test_all_problems_come_together(tmp_path):
    write(tmp_path, "one\n\nthree\nfour", "a.mp4\nb.mp4\nno.mp4\n\nb.mp4")
    found = problems(tmp_path)
    assert [problem.split(": ")[0].rsplit("/", 1)[1] for problem in found] == [
        "prompts.txt:2",
        "videos.txt:3",
        "videos.txt:4",
        "videos.txt:5",
    ]


def test_many_problems_of_a_kind_are_cut_short(tmp_path):
    write(tmp_path, "x\n" * 26, "".join(f"no{k}.mp4\n" for k in range(25)) + "https://x.org/a.mp4")
    found = problems(tmp_path)
    assert len(found) == 22
    assert found[20] == "... and 5 more: missing video"
    assert "is a URL" in found[21]


@pytest.mark.parametrize("path", ["https://x.org/a.mp4", "file:///etc/passwd", "file:/etc/passwd", "s3://b/a.mp4"])
def test_urls_are_refused(tmp_path, path):
    assert "is a URL; download" in problems(write(tmp_path, "x", path))[0]


def test_colons_in_names_are_fine(tmp_path):
    assert read_index(write(tmp_path, "x", "12:30.mp4", ("12:30.mp4",)))[0].id == "12:30.mp4"


def test_what_is_not_a_regular_file_is_refused_unopened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.mp4")
    Path("folder.mp4").mkdir()
    Path("sub").mkdir()
    Path("link.mp4").symlink_to("pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.mp4")
        write(tmp_path, "x\n" * 6, "pipe.mp4\nfolder.mp4\nlink.mp4\ns.mp4\n.\nsub/..", ())
        found = problems(tmp_path)
    assert [problem.split("is a ")[1].split(";")[0] for problem in found] == [
        "pipe", "folder", "pipe", "socket", "folder", "folder"
    ]  # fmt: skip
    assert "is a device" in problems(write(tmp_path, "x", "/dev/null", ()), allow_paths=[Path("/dev")])[0]


def test_paths_out_of_the_root_need_allow_path(tmp_path):
    root, other = tmp_path / "data", tmp_path / "database"
    root.mkdir()
    other.mkdir()
    (other / "o.mp4").touch()
    (root / "link.mp4").symlink_to(other / "o.mp4")
    (root / "folder").symlink_to(other)
    (root / "dangling.mp4").symlink_to(other / "no.mp4")
    listed = ["../database/o.mp4", str(other / "o.mp4"), "link.mp4", "folder/o.mp4", "/etc/passwd", "dangling.mp4"]
    write(root, "x\n" * 6, "\n".join(listed))
    found = problems(root)
    assert len(found) == 6
    assert all("leads outside the data root" in problem for problem in found)
    assert found[0].endswith(f"pass --allow_path {other}")
    write(root, "x\n" * 4, "\n".join(listed[:4]))
    samples = read_index(root, allow_paths=[other])
    assert [sample.id for sample in samples][2:] == ["link.mp4", "folder/o.mp4"]
    assert all(sample.video.is_file() and sample.video.is_absolute() for sample in samples)


def test_absolute_paths_and_links_inside_the_root_are_fine(tmp_path):
    root = write(tmp_path, "x\n" * 4, f"{tmp_path}/a.mp4\nsub/../a.mp4\nlink.mp4\n./b.mp4", ("a.mp4", "b.mp4", "sub/c"))
    (root / "link.mp4").symlink_to("b.mp4")
    assert [sample.id for sample in read_index(root)] == ["a.mp4", "a.mp4#2", "link.mp4", "b.mp4"]


def test_a_root_that_is_a_link_counts_as_what_it_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    write(tmp_path / "real", "x", "a.mp4")
    (tmp_path / "link").symlink_to("real")
    assert read_index(tmp_path / "link") == [Sample("a.mp4", "x", tmp_path / "link" / "a.mp4")]


def test_dot_dot_after_a_link_means_what_the_system_means(tmp_path):
    root = write(tmp_path, "x", "link/../c.mp4", ("c.mp4", "sub/c.mp4", "sub/deep/d"))
    (root / "link").symlink_to("sub/deep")
    assert read_index(root)[0].video.resolve() == root / "sub/c.mp4"


def test_odd_paths(tmp_path):
    write(tmp_path, "1\n2\n3", f"a\0.mp4\n{'x' * 5000}\na.mp4/b.mp4")
    found = problems(tmp_path)
    assert "NUL" in found[0]
    assert "cannot be read" in found[1]
    assert len(found[1]) < 600
    assert "no such file" in found[2]


def test_many_rows(tmp_path):
    write(tmp_path, "".join(f"caption {k}\n" for k in range(100_000)), "a.mp4\n" * 100_000)
    samples = read_index(tmp_path)
    assert len(samples) == 100_000
    assert samples[-1] == Sample("a.mp4#100000", "caption 99999", tmp_path / "a.mp4")
