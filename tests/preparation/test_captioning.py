"""caption_dataset.py with a stand-in server: what it asks, where captions go, what it never changes, and its errors."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import caption_dataset
import numpy as np
import pytest
from caption_server import CaptionServer, pictures, says, serving, texts
from data_sets import captions as captions_of
from hub_stand_in import in_hub_cache
from huggingface_hub.errors import HTTPError
from preparing import decode_inline

from cogvideox import stopping
from cogvideox.config.args import parse
from cogvideox.config.options import CaptionOptions
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.errors import UsageError
from cogvideox.preparation.captioning import missing_captions, vision_server


@pytest.fixture
def server() -> Iterator[CaptionServer]:
    with serving(CaptionServer()) as started:
        yield started


@pytest.fixture
def processes() -> None:
    """For tests that decode in worker processes."""


@pytest.fixture(autouse=True)
def inline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes in this process, because a worker takes a third of a second to start."""
    if "processes" not in request.fixturenames:
        decode_inline(monkeypatch, missing_captions)


@pytest.fixture
def folder(clips: Path, tmp_path: Path) -> Path:
    """Three clips without captions: a.mp4, b.mp4, sub/c.mp4."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.mp4", "b.mp4", "sub/c.mp4")):
        shutil.copy(clips / "videos" / f"0000{number}.mp4", tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def caption(model: Path, server: CaptionServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """caption(folder, *flags) runs the script without pauses, and returns the exit status."""
    monkeypatch.setattr(vision_server, "FIRST_PAUSE", 0.0)

    def run(root: Path, *flags: object, endpoint: str = "") -> int:
        given = ["--model_id", model, "--data_root", root, "--endpoint", endpoint or server.url, *flags]
        options = parse(CaptionOptions, None, list(map(str, given)), caption_dataset.CHECKS)
        return caption_dataset.main(options)

    return run


def problems_of(call: Callable[..., int], *given: Any, **named: Any) -> str:
    with pytest.raises(UsageError) as caught:
        call(*given, **named)
    return "\n".join(caught.value.problems)


@pytest.mark.usefixtures("processes")
def test_captions_go_next_to_the_clips_and_can_be_trained_on(
    folder: Path, caption: Callable[..., int], server: CaptionServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_text("A person wrote this.\n")
    (folder / "b.txt").write_text(" \n")  # blank, so nobody's text
    assert caption(folder, "--caption_frames", 3, "--caption_size", 40) == 0
    assert captions_of(folder) == ["A person wrote this.", "Pictures: 3.", "Pictures: 3."]
    assert (folder / "a.txt").read_text() == "A person wrote this.\n"
    assert (folder / "sub" / "c.txt").read_text() == "Pictures: 3.\n"
    assert [max(picture.size) for picture in pictures(server.requests[0])] == [40, 40, 40]
    assert server.requests[0]["model"] == "tiny-vl"
    printed = capsys.readouterr().out
    assert "tokens: Pictures: 3." in printed
    assert "2 captions written; 1 was there and is unchanged" in printed
    assert caption(folder) == 0
    assert "all 3 clips have a caption; nothing to do" in capsys.readouterr().out
    assert len(server.requests) == 2


def test_frames_are_spread_over_the_time_of_the_clip(
    folder: Path, caption: Callable[..., int], server: CaptionServer
) -> None:
    """The first and the last picture are those of the clip, and each is announced with its time."""
    from cogvideox.data.media.pixels.decode import probe

    assert caption(folder, "--caption_frames", 3, "--max_captions", 1, "--caption_prompt", "{file} in {folder}") == 0
    times = probe(folder / "a.mp4").times
    *frames, instruction = texts(server.requests[0])
    assert frames[0] == "Frame at 0.0 s:"
    assert frames[-1] == f"Frame at {times[-1]:.1f} s:"
    assert instruction == "a in data"
    assert len(server.requests) == 1


@pytest.mark.parametrize("written", [None, "First.\n\n\n", "First.\n\n\n\n\n", "\n\nThird.\n", "First.\n\n\n \n"])
def test_a_list_keeps_its_lines_and_gets_the_missing_ones(
    written: str | None, folder: Path, caption: Callable[..., int]
) -> None:
    (folder / "videos.txt").write_text("a.mp4\nb.mp4\nsub/c.mp4\n")
    if written is not None:
        (folder / "prompts.txt").write_text(written)
    assert caption(folder, "--caption_frames", 2) == 0
    before = ((written or "").split("\n") + [""] * 3)[:3]
    assert captions_of(folder) == [line or "Pictures: 2." for line in before]


def test_a_list_that_lacks_a_line_is_not_filled(folder: Path, caption: Callable[..., int]) -> None:
    """The missing line may be any of them, so a caption could go to the wrong clip."""
    (folder / "videos.txt").write_text("a.mp4\nb.mp4\nsub/c.mp4\n")
    (folder / "prompts.txt").write_text("First.\nSecond.\n")
    assert "first line without a caption" in problems_of(caption, folder)
    assert (folder / "prompts.txt").read_text() == "First.\nSecond.\n"


@pytest.mark.usefixtures("processes")
def test_an_interrupted_list_is_continued(
    folder: Path, caption: Callable[..., int], server: CaptionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "videos.txt").write_text("a.mp4\nb.mp4\nsub/c.mp4\n")

    def stop(name: str) -> None:
        raise stopping.Stopped

    with monkeypatch.context() as patched:
        patched.setattr(stopping, "unit", stop)
        with pytest.raises(stopping.Stopped):
            caption(folder, "--concurrency", 1)
    assert (folder / "prompts.txt").read_text() == "Pictures: 8.\n\n\n"
    server.answer = lambda number, body: says("Later.")
    assert caption(folder) == 0
    assert captions_of(folder) == ["Pictures: 8.", "Later.", "Later."]


@pytest.mark.parametrize("form", ["pairs", "list"])
def test_a_text_written_meanwhile_is_kept(
    form: str, folder: Path, caption: Callable[..., int], server: CaptionServer
) -> None:
    if form == "list":
        (folder / "videos.txt").write_text("a.mp4\nb.mp4\nsub/c.mp4\n")

    def write_too(number: int, body: dict[str, Any]) -> Any:
        file = folder / ("prompts.txt" if form == "list" else "a.txt")
        file.write_text("A person was faster.\n")
        return says("From the model.")

    server.answer = write_too
    assert caption(folder, "--concurrency", 1) == 0
    assert captions_of(folder) == ["A person was faster.", "From the model.", "From the model."]


SAID = '"Red, then blue; a ""cube""."'  # a caption as a cell of a CSV


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        (
            "metadata.csv",
            'file_name , text,note\na.mp4,,"x"\n\nb.mp4,"Here,\non two lines.",y\n"sub/c.mp4",NaN,\n',
            f'file_name , text,note\na.mp4,{SAID},x\n\nb.mp4,"Here,\non two lines.",y\nsub/c.mp4,{SAID},\n',
        ),
        (
            "metadata.csv",  # with two columns without names
            "file_name,text,,,note\na.mp4,,1,2,\nb.mp4,Here.,3,4,\n",
            f"file_name,text,,,note\na.mp4,{SAID},1,2,\nb.mp4,Here.,3,4,\n",
        ),
        (
            "metadata.csv",  # as Excel writes it in some countries, with a row on two lines
            '\ufefffile_name;note;text\r\na.mp4;"one\r\ntwo"; \r\nb.mp4;;"Here; too."\r\nsub/c.mp4;;',
            f'\ufefffile_name;note;text\r\na.mp4;"one\ntwo";{SAID}\r\nb.mp4;;"Here; too."\r\nsub/c.mp4;;{SAID}',
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.mp4", "n": 1.50}\n\n{"file_name":"b.mp4","text":"H\\u00e9re"}\n'
            '{"file_name": "sub/c.mp4", "text": null, "x": "é", "y": NaN}\n',
            '{"file_name": "a.mp4", "n": 1.5, "text": "Red, then blue; a \\"cube\\"."}\n\n'
            '{"file_name":"b.mp4","text":"H\\u00e9re"}\n'
            '{"file_name": "sub/c.mp4", "text": "Red, then blue; a \\"cube\\".", "x": "é", "y": NaN}\n',
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_blank_cells_of_tables_are_filled_and_nothing_else_is_changed(
    encoding: str, name: str, before: str, after: str, folder: Path, caption: Callable[..., int], server: CaptionServer
) -> None:
    mark = "" if encoding == "utf-8" else "\ufeff"
    coding = "utf-8" if encoding == "utf-8" else "utf-16-be"
    (folder / name).write_bytes((mark + before.removeprefix(mark)).encode(coding))
    server.answer = lambda number, body: says('Red, then blue; a "cube".')
    assert caption(folder) == 0
    assert (folder / name).read_bytes().decode(coding) == mark + after.removeprefix(mark)
    asked = len(server.requests)
    assert asked == after.count("cube")
    assert caption(folder) == 0
    assert len(server.requests) == asked


def test_a_cell_written_meanwhile_is_kept(folder: Path, caption: Callable[..., int], server: CaptionServer) -> None:
    table = folder / "metadata.csv"
    table.write_text("file_name,text\na.mp4,\nb.mp4,\n")

    def write_too(number: int, body: dict[str, Any]) -> Any:
        table.write_text("file_name,text\na.mp4,A person was faster.\nb.mp4,\n")
        return says("From the model.")

    server.answer = write_too
    assert caption(folder, "--concurrency", 1) == 0
    assert table.read_text() == "file_name,text\na.mp4,A person was faster.\nb.mp4,From the model.\n"


@pytest.mark.parametrize("rows", ["b.mp4,\na.mp4,\n", "a.mp4,\n", "sub/c.mp4,\na.mp4,\nb.mp4,\n"])
def test_rows_that_move_meanwhile_get_no_captions(
    rows: str, folder: Path, caption: Callable[..., int], server: CaptionServer
) -> None:
    table = folder / "metadata.csv"
    table.write_text("file_name,text\na.mp4,\nb.mp4,\n")

    def move(number: int, body: dict[str, Any]) -> Any:
        table.write_text(f"file_name,text\n{rows}")
        return says("From the model.")

    server.answer = move
    assert "metadata.csv: has changed while captions were written" in problems_of(caption, folder)
    assert table.read_text() == f"file_name,text\n{rows}"


def test_sections_are_captioned_from_their_own_frames(
    folder: Path, caption: Callable[..., int], server: CaptionServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clip is dark for 3 s, then bright; a table outside the folder names both parts."""
    levels = np.repeat(np.array([30, 220], np.uint8), 24)
    write_video(folder / "a.mp4", np.broadcast_to(levels[:, None, None, None], (48, 32, 32, 3)).copy(), 8.0)
    table = tmp_path / "scenes.csv"
    table.write_text("video,start,end,caption\na.mp4,0.000,3.000,\na.mp4,3.000,,\n")
    server.answer = lambda number, body: says(
        " ".join(str(pixel.getpixel((9, 9))[0] // 100) for pixel in pictures(body))
    )
    flags = ("--dataset_file", table, "--caption_frames", 3, "--caption_prompt", "{seconds}", "--concurrency", 1)
    assert caption(folder, *flags) == 0
    assert table.read_text() == "video,start,end,caption\na.mp4,0.000,3.000,0 0 0\na.mp4,3.000,,2 2 2\n"
    assert texts(server.requests[1]) == ["Frame at 0.0 s:", "Frame at 1.4 s:", "Frame at 2.9 s:", "3.0"]
    assert f"{folder / 'a.mp4'} from 3 s to the end: " in capsys.readouterr().out


def test_tables_that_cannot_be_filled_are_explained(folder: Path, caption: Callable[..., int]) -> None:
    (folder / "list.json").write_text('[{"file_name": "a.mp4", "text": ""}]')
    rule = "1 row has no caption; captions are written into CSV, TSV and JSON lines only; convert the table"
    assert rule in problems_of(caption, folder, "--dataset_file", "list.json")
    (folder / "metadata.csv").write_text("file_name,note\na.mp4,\n")
    rule = "1 row has no caption; add a column with the name caption, or name its column with --caption_column"
    assert rule in problems_of(caption, folder)


@pytest.mark.usefixtures("processes")
def test_at_most_that_many_requests_run_at_a_time(
    clips: Path, tmp_path: Path, caption: Callable[..., int], server: CaptionServer
) -> None:
    root = Path(shutil.copytree(clips / "videos", tmp_path / "data"))
    together = threading.Barrier(2, timeout=20)

    def wait(number: int, body: dict[str, Any]) -> Any:
        if number < 2:
            together.wait()  # passes only if two requests run at the same time
        time.sleep(0.05)
        return says("Done.")

    server.answer = wait
    assert caption(root, "--concurrency", 2) == 0
    assert (server.most, len(server.requests)) == (2, 6)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(
    status: int, folder: Path, caption: Callable[..., int], server: CaptionServer
) -> None:
    server.answer = lambda number, body: (status, {"error": {"message": "busy"}}) if number < 2 else says("Fine.")
    assert caption(folder, "--request_attempts", 3, "--concurrency", 1) == 0
    assert len(server.requests) == 5


def test_attempts_are_limited(folder: Path, caption: Callable[..., int], server: CaptionServer) -> None:
    server.answer = lambda number, body: says("Fine.") if number == 0 else (503, {"error": {"message": "no memory"}})
    found = problems_of(caption, folder, "--request_attempts", 2, "--concurrency", 1)
    assert "status 503: no memory; tried 2 times; captions so far are written" in found
    assert len(server.requests) == 3
    assert (folder / "a.txt").read_text() == "Fine.\n"


def test_pauses_double_up_to_a_limit(server: CaptionServer) -> None:
    from cogvideox.config.flags import CaptionFlags

    pauses: list[float] = []
    asked = vision_server.VisionServer(CaptionFlags(server.url, request_attempts=8), pauses.append)
    server.answer = lambda number, body: (503, "busy")
    with pytest.raises(UsageError, match="busy"):
        asked.describe([(missing_captions.Stills((), (), 1.0), "Describe.")])
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_one_refused_clip_does_not_end_the_others(
    folder: Path, caption: Callable[..., int], server: CaptionServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda number, body: (400, {"message": "unsafe"}) if number == 0 else says("Fine.")
    assert caption(folder, "--concurrency", 1) == 1
    assert captions_of(folder / "sub") == ["Fine."]
    assert not (folder / "a.txt").exists()
    assert (
        f"{folder / 'a.mp4'}: --endpoint {server.url}/chat/completions: status 400: unsafe" in capsys.readouterr().out
    )


def test_clips_refused_one_after_the_other_end_the_script(
    clips: Path, tmp_path: Path, caption: Callable[..., int], server: CaptionServer
) -> None:
    root = Path(shutil.copytree(clips / "videos", tmp_path / "data"))
    server.answer = lambda number, body: (400, {"error": {"message": "At most 1 image(s) may be provided"}})
    found = problems_of(caption, root, "--concurrency", 1)
    assert "3 clips in a row got no caption" in found
    assert "At most 1 image(s) may be provided" in found
    assert len(server.requests) <= 4


def test_files_that_may_be_captions_are_listed(
    folder: Path, caption: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.caption").write_text("a caption")
    assert caption(folder) == 0
    assert (
        f"1 .caption; convert clips to mp4, and save captions as .txt and tables as CSV:\n  {folder / 'a.caption'}"
        in (capsys.readouterr().out)
    )


@pytest.mark.usefixtures("processes")
def test_a_damaged_clip_is_named(folder: Path, caption: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.mp4").write_bytes(b"")
    assert caption(folder) == 1
    assert f"1 clip has no caption:\n{folder / 'b.mp4'}: is empty; download it again" in capsys.readouterr().out
    assert (folder / "sub" / "c.txt").exists()


@pytest.mark.usefixtures("processes")
def test_damaged_clips_in_a_row_do_not_end_the_script(
    clips: Path, tmp_path: Path, caption: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(clips / "videos", tmp_path / "data"))
    for number in range(missing_captions.MOST_REFUSED):
        (root / f"-{number}.mp4").write_bytes(b"")  # before all others
    assert caption(root) == 1
    assert f"{missing_captions.MOST_REFUSED} clips have no caption:\n" in capsys.readouterr().out
    assert len(list(root.glob("*.txt"))) == len(list(root.glob("*.mp4"))) - missing_captions.MOST_REFUSED


@pytest.mark.parametrize(
    ("text", "reason", "found"),
    [
        ("<think>Hm. A cat?</think>\n A cat\n  sits. ", "stop", "A cat sits.\n"),
        ("Hm. A cat?\n</think>\n\nA cat sits.", "stop", "A cat sits.\n"),
        ("A cat sits. It is 3.5 m tall. Then it", "length", "A cat sits. It is 3.5 m tall.\n"),
        ("A cat that", "length", "no complete sentence; raise --caption_tokens"),
        ("<think>Is it a cat. Or", "length", "no complete sentence; raise --caption_tokens"),
        ("", "stop", "the answer is empty"),
    ],
)
def test_what_becomes_of_an_answer(
    text: str,
    reason: str,
    found: str,
    folder: Path,
    caption: Callable[..., int],
    server: CaptionServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = lambda number, body: says(text, reason)
    caption(folder, "--max_captions", 1)
    file = folder / "a.txt"
    if file.exists():
        assert file.read_text() == found
    else:
        assert found in capsys.readouterr().out


def test_long_captions_are_counted(
    folder: Path, caption: Callable[..., int], server: CaptionServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda number, body: says("word " * (400 if number == 0 else 4))
    assert caption(folder, "--concurrency", 1) == 0
    assert "1 caption has more than the " in capsys.readouterr().out


# -- in this process ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random vision-language model. Read only."""
    from tiny_vision import make_tiny_vision

    return make_tiny_vision(tmp_path_factory.mktemp("vision"))


def local(model: Path, root: Path, *flags: object) -> int:
    """Runs the script without a server."""
    given = ["--model_id", model, "--data_root", root, *flags]
    options = parse(CaptionOptions, None, list(map(str, given)), caption_dataset.CHECKS)
    return caption_dataset.main(options)


def test_a_model_runs_in_this_process(model: Path, vision: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the random model says is what transformers gives for the same pictures and words, computed here again."""
    from cogvideox.preparation.captioning import vision_local

    answers: list[dict[str, Any]] = []

    def keep(answer: dict[str, Any]) -> str:
        answers.append(answer)
        return "A sentence."

    monkeypatch.setattr(vision_local, "caption_in", keep)
    flags = ("--caption_model", vision, "--caption_tokens", 16, "--caption_frames", 2, "--caption_prompt", "Describe.")
    assert local(model, folder, *flags, "--max_captions", 1) == 0
    assert expected_answer(vision, folder / "a.mp4") != expected_answer(vision, folder / "b.mp4")
    (choice,) = answers[0]["choices"]
    assert choice == {"message": {"content": expected_answer(vision, folder / "a.mp4")}, "finish_reason": "length"}
    assert (folder / "a.txt").read_text() == "A sentence.\n"


def test_a_model_of_the_hub_is_stored_in_the_folder_of_the_flag(
    model: Path, vision: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is in a cache as the hub's client makes it, where only --cache_dir leads to."""
    import huggingface_hub.constants

    from cogvideox.preparation.captioning import vision_local

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(vision_local, "caption_in", lambda answer: "A sentence.")
    in_hub_cache(tmp_path / "cache", "vision", vision)
    flags = ("--caption_model", "me/vision", "--caption_tokens", 16, "--caption_frames", 1, "--max_captions", 1)
    assert local(model, folder, *flags, "--cache_dir", tmp_path / "cache") == 0
    assert len(list(folder.rglob("*.txt"))) == 1


def test_a_batch_says_what_its_clips_say_alone(
    model: Path, vision: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are parts of the instructions, and one clip is a picture, so all rows have other lengths."""
    from PIL import Image

    from cogvideox.preparation.captioning import vision_local

    (folder / "b.mp4").rename(folder / "a-clip-with-a-long-name.mp4")
    Image.new("RGB", (40, 30), "teal").save(folder / "picture.png")
    monkeypatch.setattr(vision_local, "caption_in", lambda answer: answer["choices"][0]["message"]["content"])
    sizes: list[int] = []
    generate = vision_local.LocalVisionModel._generate

    def counted(self: Any, requests: Any) -> Any:
        sizes.append(len(requests))
        return generate(self, requests)

    monkeypatch.setattr(vision_local.LocalVisionModel, "_generate", counted)
    flags = (
        "--caption_model",
        vision,
        "--caption_tokens",
        16,
        "--caption_frames",
        2,
        "--caption_prompt",
        "Is it {file}?",
    )
    found = []
    for number in (1, 3):
        local(model, folder, *flags, "--concurrency", number)
        found.append({path.stem: path.read_text() for path in folder.rglob("*.txt")})
        for path in folder.rglob("*.txt"):
            path.unlink()
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 4
    assert sizes == [1, 1, 1, 1, 3, 1]


@pytest.mark.usefixtures("processes")
def test_a_damaged_clip_leaves_the_others_of_its_batch(
    model: Path, vision: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogvideox.preparation.captioning import vision_local

    (folder / "b.mp4").write_bytes(b"")
    monkeypatch.setattr(vision_local, "caption_in", lambda answer: "A sentence.")
    assert local(model, folder, "--caption_model", vision, "--caption_tokens", 16, "--caption_frames", 1) == 1
    assert sorted(path.name for path in folder.rglob("*.txt")) == ["a.txt", "c.txt"]


@pytest.mark.parametrize(
    ("tokens", "found"), [([5, 6, 1, 0], ("5 6", True)), ([5, 0, 6], ("5 0 6", False)), ([2, 1], ("", True))]
)
def test_an_answer_ends_before_the_padding(tokens: list[int], found: tuple[str, bool]) -> None:
    from types import SimpleNamespace

    from cogvideox.config.flags import CaptionFlags
    from cogvideox.preparation.captioning.vision_local import LocalVisionModel

    run = LocalVisionModel(CaptionFlags())
    run._model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[1, 2]))
    run._processor = SimpleNamespace(decode=lambda row, skip_special_tokens: " ".join(map(str, row)))
    assert run._text(tokens) == found


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (3, "3 clips at the same time; lower --concurrency, to 1 for example"),
        (1, "a clip; lower --caption_frames or --caption_size, or choose a smaller --caption_model"),
    ],
)
def test_too_little_memory_for_a_batch(
    number: int, fix: str, model: Path, vision: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fails)
    found = problems_of(local, model, folder, "--caption_model", vision, "--concurrency", number)
    assert found == f"--caption_model: the GPU has no room for {fix}"


def test_too_little_memory_for_the_model(
    model: Path, vision: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlavaForConditionalGeneration, "to", fails)
    found = problems_of(local, model, folder, "--caption_model", vision)
    assert found == (
        f"--caption_model {vision}: does not fit on the GPU; choose a smaller one, or a server with --endpoint"
    )


def expected_answer(vision: Path, clip: Path) -> str:
    """Returns what the tiny model says about two frames of a clip, from the pixels and the text of its template."""
    import io

    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from cogvideox.data.media.pixels.stills import stills_of

    stills = stills_of(str(clip), 2, 512)
    assert isinstance(stills, missing_captions.Stills)
    images = [Image.open(io.BytesIO(jpeg)) for jpeg in stills.jpegs]
    text = "".join(f"Frame at {seconds:.1f} s:<image>" for seconds in stills.times) + "Describe.ASSISTANT:"
    processor = LlavaProcessor.from_pretrained(vision)
    inputs = processor(images=images, text=text, return_tensors="pt")
    with torch.no_grad():
        tokens = LlavaForConditionalGeneration.from_pretrained(vision).generate(
            **inputs, max_new_tokens=16, do_sample=False
        )
    return str(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_vision_model_whose_download_breaks_off(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    def fail(*_: object, **__: object) -> None:
        raise HTTPError("timed out")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    found = problems_of(local, model, folder, "--caption_model", "me/x")
    assert found.startswith("--caption_model me/x: cannot be loaded (timed out); ")


def test_a_folder_without_a_vision_model(model: Path, folder: Path) -> None:
    found = problems_of(local, model, folder, "--caption_model", model)
    assert found.startswith(f"--caption_model {model}: cannot be loaded (")
    assert found.endswith("of a vision-language model, such as Qwen/Qwen2.5-VL-3B-Instruct")


def test_a_model_must_be_named(model: Path, folder: Path) -> None:
    assert "3 of 3 clips have no caption, the first is" in problems_of(local, model, folder)
    assert f"that one into {folder / 'a.txt'}" in problems_of(local, model, folder)


# -- the server --------------------------------------------------------------------------------------------------------


def test_nobody_listens(folder: Path, caption: Callable[..., int]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        found = problems_of(caption, folder, endpoint=url)
    assert found.startswith(f"--endpoint {url}: Connection refused; start a server, for example with: vllm serve")


def test_a_proxy_is_not_used_for_this_machine_and_otherwise_named(
    folder: Path, caption: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{held.getsockname()[1]}")
        assert caption(folder) == 0
        (folder / "a.txt").unlink()
        found = problems_of(caption, folder, endpoint="http://node-7:8000/v1")
    assert found.startswith("--endpoint http://node-7:8000/v1: Connection refused; start a server, ")
    assert found.endswith("; the environment sets a proxy, which no_proxy=node-7 avoids")


def test_a_server_that_does_not_answer(folder: Path, caption: Callable[..., int], server: CaptionServer) -> None:
    server.answer = lambda number, body: (time.sleep(1.5), says("Late."))[1]
    found = problems_of(caption, folder, "--request_timeout", 1, "--request_attempts", 1, "--max_captions", 1)
    assert "timed out; raise --request_timeout or lower --concurrency; tried 1 time;" in found


def test_a_wrong_path(folder: Path, caption: Callable[..., int], server: CaptionServer) -> None:
    url = server.url.removesuffix("/v1")
    found = problems_of(caption, folder, endpoint=url)
    assert found == f"--endpoint {url}/models: status 404: Not Found; the URL of most servers ends in /v1"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "file:///etc/passwd", "http://host/v1?key=1"])
def test_what_is_not_a_server(url: str, folder: Path, caption: Callable[..., int]) -> None:
    assert "is not the URL of a server; give one such as" in problems_of(caption, folder, endpoint=url)


def test_a_model_is_chosen_by_name(folder: Path, caption: Callable[..., int], server: CaptionServer) -> None:
    server.models = ("big-vl", "small-vl")
    assert "the server has big-vl, small-vl; choose a model with --caption_model" in problems_of(caption, folder)
    found = problems_of(caption, folder, "--caption_model", "smal-vl")
    assert f"--caption_model smal-vl: the server at {server.url} lacks it; nearest: --caption_model small-vl" == found
    assert caption(folder, "--caption_model", "small-vl") == 0
    assert {request["model"] for request in server.requests} == {"small-vl"}


def test_the_key_of_the_environment_is_sent(
    folder: Path, caption: Callable[..., int], server: CaptionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert caption(folder, "--max_captions", 1) == 0
    assert server.keys == ["Bearer secret", "Bearer secret"]


def test_a_refused_key_ends_the_script(folder: Path, caption: Callable[..., int], server: CaptionServer) -> None:
    server.answer = lambda number, body: (401, {"error": {"message": "Incorrect API key"}})
    found = problems_of(caption, folder)
    assert "status 401: Incorrect API key; check --endpoint, --caption_model and OPENAI_API_KEY" in found
    assert not [name for name in os.listdir(folder) if name.endswith(".txt")]
