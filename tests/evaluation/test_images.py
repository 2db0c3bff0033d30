"""images.py and the check of --validation_images: unusable images are reported before any model is loaded."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import run_alone
from PIL import Image
from running import PROMPT, lora_flags, train_image

from cogvideox.checks import check_images
from cogvideox.config import args
from cogvideox.config.options import ImageLoraOptions, LoraOptions
from cogvideox.config.prompts import images_of
from cogvideox.errors import UsageError
from cogvideox.evaluation import images
from cogvideox.evaluation.images import fetch_images


def options_of(*images: object, separator: str = ":::", mode: str = "none") -> Any:
    """Returns the options of a run with one image for each prompt, and a --video_reshape_mode."""
    prompts = separator.join([PROMPT] * len(images))
    flags = ["--validation_prompt", prompts, "--validation_images", separator.join(map(str, images))]
    flags += ["--validation_prompt_separator", separator, "--video_reshape_mode", mode]
    return args.parse(ImageLoraOptions, None, lora_flags(Path("model"), Path("data"), Path("out"), *flags))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((), None),
        (("--validation_prompt", "a", "--validation_images", "http://h/x.png"), None),
        (("--validation_prompt", "a:::b", "--validation_images", "http://h/x.png:::https://h/y.png"), None),
        (("--validation_prompt", "a:::b", "--validation_images", "http://h/x.png"), "1 image for 2 prompts"),
        (("--validation_prompt", "a"), "0 images for 1 prompt"),
        (("--validation_prompt", "a", "--do_validation", "false"), None),
        (("--validation_images", "http://h/x.png"), "1 image for 0 prompts"),
    ],
)
def test_an_image_for_each_prompt(flags: tuple[str, ...], problem: str | None) -> None:
    argv = lora_flags(Path("model"), Path("data"), Path("out"), *flags)
    found = list(check_images(args.parse(ImageLoraOptions, None, argv)))
    assert found == ([f"--validation_images: {problem}; give one for each"] if problem else [])


def test_images_of_a_list(tmp_path: Path, image: Path) -> None:
    """As in the CogVideo guide, two files list prompts and images, one per line; paths are relative to their folder."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes(image.read_bytes())
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "images.txt").write_text(f"\ufeffsub/a.jpg\n\n  {image}\r\nhttps://h/x.png\n", encoding="utf-8")

    def options(name: str, *more: str) -> Any:
        flags = [
            "--validation_dir",
            tmp_path,
            "--validation_prompts",
            "prompts.txt",
            "--validation_images",
            name,
            *more,
        ]
        return args.parse(ImageLoraOptions, None, lora_flags(Path("model"), Path("data"), Path("out"), *flags))

    assert images_of(options("images.txt")) == [str(tmp_path / "sub" / "a.jpg"), str(image), "https://h/x.png"]
    assert list(check_images(options("images.txt"))) == []
    (found,) = check_images(options("none.txt"))
    assert found == "--validation_images none.txt: No such file or directory; give a list in --validation_dir"
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    assert ["is not UTF-8" in line for line in check_images(options("bad.txt"))] == [True]
    assert list(check_images(options("none.txt", "--do_validation", "false"))) == []
    (tmp_path / "prompts.txt").unlink()
    assert list(check_images(options("none.txt"))) == []  # check_prompts reports the missing file


def test_all_files_that_are_not_images_are_listed(tmp_path: Path, image: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "torn.jpg").write_bytes(image.read_bytes()[:-500])
    names = ("text.png", "torn.jpg", "missing.png", "")
    lines = list(check_images(options_of(image, *(tmp_path / name for name in names), "http://h/x.png")))
    assert [line.split(": ")[0] for line in lines] == [f"--validation_images {tmp_path / name}" for name in names]
    assert all(";" in line for line in lines)


def test_images_are_saved_as_viewers_show_them(tmp_path: Path) -> None:
    """They are rotated upright and have no transparency. Any separator works."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "b.png")
    paths = fetch_images(run_alone(tmp_path / "out"), options_of(tmp_path / "a.png", tmp_path / "b.png", separator="|"))
    assert [path.name for path in paths] == ["image-0.png", "image-1.png"]
    assert (np.asarray(Image.open(paths[0])) == np.rot90(pixels, -1)).all()
    assert not np.asarray(Image.open(paths[1])).any()
    assert np.asarray(Image.open(paths[1])).shape == (8, 8, 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["image-0.png", "image-1.png"]


STRETCHED = "is 64x96 and is stretched to 96x64, as clips were in training; crop it to the shape of 96x64"
CROPPED = "is 64x96, and the video is 96x64: only the middle of the image, 64x43, is used"


@pytest.mark.parametrize(
    ("mode", "note", "size"),
    [("none", STRETCHED, (64, 96)), ("center", CROPPED, (64, 43)), ("random", CROPPED, (64, 43))],
)
def test_images_are_fitted_as_clips_are_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, note: str, size: tuple[int, int]
) -> None:
    """Videos are 96x64, so an image of 192x128 keeps its aspect ratio, and one of 64x96 does not."""
    Image.new("RGB", (192, 128)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 96)).save(tmp_path / "b.png")
    options = options_of(tmp_path / "a.png", tmp_path / "b.png", mode=mode)
    same, other = map(Image.open, fetch_images(run_alone(tmp_path / "out"), options))
    assert (same.size, other.size) == ((192, 128), size)
    assert capsys.readouterr().err.splitlines() == [f"--validation_images {tmp_path / 'b.png'}: {note}"]


def test_text_to_video_has_no_images(tmp_path: Path) -> None:
    options = args.parse(LoraOptions, None, lora_flags(Path("model"), Path("data"), tmp_path))
    assert fetch_images(run_alone(tmp_path / "out"), options) == []
    assert list(check_images(options)) == []


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[str]:
    """Starts a web server with an image and a text file; yields its address."""
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "image.jpg").write_bytes(image.read_bytes())
    (folder / "text.html").write_text("not an image")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_an_image_on_a_web_server_is_fetched(tmp_path: Path, server: str, image: Path) -> None:
    (path,) = fetch_images(run_alone(tmp_path / "out"), options_of(f"{server}/image.jpg"))
    assert (np.asarray(Image.open(path)) == np.asarray(Image.open(image))).all()


@pytest.mark.parametrize(("name", "message"), [("text.html", "is not a readable image"), ("no.png", "404")])
def test_an_image_that_cannot_be_fetched_is_reported(tmp_path: Path, server: str, name: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        fetch_images(run_alone(tmp_path / "out"), options_of(f"{server}/{name}"))
    (line,) = error.value.problems
    assert line.startswith(f"--validation_images {server}/{name}: ")
    assert message in line
    assert line.endswith("download it and give its path")
    assert not list((tmp_path / "out").iterdir())


def test_a_server_that_does_not_answer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be fetched"):
        fetch_images(run_alone(tmp_path / "out"), options_of("http://127.0.0.1:9/x.png"))


# -- hostile servers ---------------------------------------------------------------------------------------------------


class HostileHandler(BaseHTTPRequestHandler):
    """Answers by path: /to/URL redirects to URL, /slow sends a byte now and then without end, others 5000 bytes."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        """Answers a request."""
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path.startswith("/slow"):
            with suppress(OSError):
                for letter in itertools.chain(b"HTTP/1.0 200 OK\r\nX: ", itertools.repeat(ord("y"))):
                    self.wfile.write(bytes([letter]))
                    time.sleep(0.1)
        else:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(b"x" * 5000)


@pytest.fixture
def hostile() -> Iterator[str]:
    """Starts a server with HostileHandler; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), HostileHandler) as httpd:
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def refusal(folder: Path, url: str) -> str:
    """Returns the only problem that is reported for a URL."""
    with pytest.raises(UsageError) as error:
        fetch_images(run_alone(folder / "out"), options_of(url))
    (line,) = error.value.problems
    return line


@pytest.mark.fault("security: an image server that sends a byte now and then")
def test_a_server_that_never_finishes_times_out(tmp_path: Path, hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.5)
    line = refusal(tmp_path, f"{hostile}/slow?X-Signature=secret")
    assert line == f"--validation_images {hostile}/slow: cannot be fetched (no complete answer after 0.5 s); {FIX}"


@pytest.mark.fault("security: an image server that redirects to a file or another protocol")
@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1/x.png", "data:image/png;base64,AAAA"])
def test_only_http_is_followed(tmp_path: Path, hostile: str, to: str) -> None:
    line = refusal(tmp_path, f"{hostile}/to/{to}")
    assert "cannot be fetched" in line
    assert to in line
    assert "which is not http or https" in line or "is not allowed" in line


def test_a_redirect_within_the_web_is_followed(tmp_path: Path, hostile: str, server: str, image: Path) -> None:
    (path,) = fetch_images(run_alone(tmp_path / "out"), options_of(f"{hostile}/to/{server}/image.jpg"))
    assert (np.asarray(Image.open(path)) == np.asarray(Image.open(image))).all()


@pytest.mark.fault("security: an image of excessive size")
def test_more_bytes_than_the_limit_are_refused(tmp_path: Path, hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FETCH_BYTES", 2**12)
    assert "cannot be fetched (larger than 0 MiB)" in refusal(tmp_path, f"{hostile}/much")


@pytest.mark.fault("security: a signed URL that cannot be fetched")
@pytest.mark.parametrize("path", ["/to/file:///etc/hostname?X-Signature=secret", "/much?secret", "/no#secret"])
def test_messages_omit_the_signature(tmp_path: Path, hostile: str, path: str) -> None:
    assert "secret" not in refusal(tmp_path, f"{hostile}{path}".replace("http://", "http://me:secret@"))


@pytest.mark.fault("security: a signed URL with a space in it")
@pytest.mark.parametrize("space", [" ", "\t"])
def test_a_url_with_a_space_is_refused_before_it_is_written(space: str) -> None:
    (found,) = check_images(options_of(f"https://me:secret@h/a{space}b?X-Signature=secret"))
    assert found == "--validation_images https://h/a: ends at a space; write %20 instead"


FIX = "download it and give its path"


@pytest.mark.fault("security: a run whose image has a signed URL")
def test_files_of_a_run_omit_the_signature(
    tiny: Callable[[str], Path], image_tensors: Path, tmp_path: Path, server: str
) -> None:
    url = f"{server}/image.jpg?X-Signature=topsecret"
    more = ("--load_tensors", "--validation_prompt", PROMPT, "--validation_images", url, "--report_to", "tensorboard")
    more = (*more, "--max_train_steps", "1", "--num_inference_steps", "1")
    assert train_image(lora_flags(tiny("5b-i2v"), image_tensors, tmp_path / "lora", *more)) == 0
    files = [path for path in (tmp_path / "lora").rglob("*") if path.is_file()]
    assert {"recipe.json", "config.json", "README.md", "metrics.jsonl", "inference.py"} <= {path.name for path in files}
    assert not [path for path in files if b"topsecret" in path.read_bytes()]
    assert f"{server}/image.jpg" in (tmp_path / "lora" / "recipe.json").read_text()
