"""decord_reader.py: decord returns the frames that PyAV returns, or an error with a fix; it is imported on demand."""

import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from striped import COUNT, HEIGHT, MATRICES, VIDEOS, WIDTH, encode, numbers_in

from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels import decord_reader
from cogvideox.data.media.pixels.decode import probe, read_frames
from cogvideox.data.media.pixels.decord_reader import VERSION, reader_problem

PATTERNS = [range(COUNT), range(0, COUNT, 7), [58, 3, 31, 30, 10, 9], [23, 24], [59], [0, 0, 59, 59, 0]]
REFUSED = {"open_gop.mp4", "open_gop.ts", "intra_refresh.ts", "mpeg4.avi", "hevc.mp4"}  # libx265 writes open GOPs


def installed(**versions: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return version


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"decord": VERSION}, None),
        ({}, f"not installed: pip install decord=={VERSION}, or leave the flag out"),
        ({"decord2": "3.4.0"}, "decord2 is installed"),
        ({"decord": VERSION, "decord2": "3.4.0"}, "wrong frames"),
        ({"decord": "0.5.2"}, "decord 0.5.2 is untested"),
    ],
)
def test_reader_problem(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], said: str | None) -> None:
    monkeypatch.setattr("importlib.metadata.version", installed(**versions))
    problem = reader_problem("decord")
    assert problem is None if said is None else said in (problem or "")
    assert "\n" not in (problem or "")
    assert reader_problem("pyav") is None
    assert reader_problem("opencv") == "must be one of pyav, decord"


def test_decord_is_not_imported_unless_asked_for() -> None:
    script = (
        "import sys; from cogvideox.data.media.pixels import decode, decord_reader; "
        "decord_reader.reader_problem('decord'); assert not {'decord', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(decord_reader.__file__).parents[4])


@pytest.mark.parametrize("name", VIDEOS)
def test_the_right_frames_or_an_error(tmp_path: Path, name: str) -> None:
    pytest.importorskip("decord")
    path = encode(tmp_path / name, **VIDEOS[name])
    info = probe(path)
    for pattern in PATTERNS:
        if name in REFUSED:
            with pytest.raises(VideoError, match=rf"{name}: decord .* use --video_reader pyav"):
                read_frames(path, info, pattern, HEIGHT, WIDTH, reader="decord")
        else:
            assert numbers_in(read_frames(path, info, pattern, HEIGHT, WIDTH, reader="decord")) == list(pattern)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", muxer={"movflags": "faststart"})


@pytest.mark.parametrize("clockwise", MATRICES)
def test_rotated_clips_come_out_upright_and_alike(tmp_path: Path, clip: Path, clockwise: int) -> None:
    pytest.importorskip("decord")
    data = bytearray(clip.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in MATRICES[clockwise])
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "rotated.mp4"
    path.write_bytes(data)
    info = probe(path)
    ours = read_frames(path, info, [5, 44], info.height, info.width)
    theirs = read_frames(path, info, [5, 44], info.height, info.width, reader="decord")
    assert np.abs(ours.astype(int) - theirs).mean() < 1


def test_hidden_frames_are_refused(tmp_path: Path, clip: Path) -> None:
    pytest.importorskip("decord")
    data = bytearray(clip.read_bytes())
    at = data.index(b"elst") + 4
    struct.pack_into(">I", data, at + 8, 1000)  # shows one second of two
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(data)
    info = probe(path)
    assert info.num_frames < COUNT
    with pytest.raises(VideoError, match=r"trimmed\.mp4: decord counts [0-9]+ frames, .* use --video_reader pyav"):
        read_frames(path, info, [0], HEIGHT, WIDTH, reader="decord")


def test_errors_of_decord_become_one_line_that_names_the_file(tmp_path: Path, clip: Path) -> None:
    pytest.importorskip("decord")
    path = tmp_path / "damaged.mp4"
    data = clip.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(VideoError, match=r"damaged\.mp4: ") as caught:
        read_frames(path, probe(path), range(COUNT), HEIGHT, WIDTH, reader="decord")
    assert "\n" not in str(caught.value)
    assert ".cc:" not in str(caught.value)


def test_the_message_of_a_thread_of_decord_is_short(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decord raises it if a thread meets the damage before the main thread does."""
    decord = pytest.importorskip("decord")
    place = "[11:25:27] /github/workspace/src/video/ffmpeg/threaded_decoder.cc:292: "
    check = "Check failed: avcodec_send_packet(dec_ctx_.get(), pkt.get()) >= 0 (-1094995529 vs. 0)"
    text = f"{place}{place}{check} Thread worker: Error sending packet.\n\nStack trace returned 6 entries:"
    monkeypatch.setattr(decord, "VideoReader", Mock(side_effect=decord.DECORDError(text)))
    with pytest.raises(VideoError) as caught:
        read_frames(clip, probe(clip), range(COUNT), HEIGHT, WIDTH, reader="decord")
    assert str(caught.value).startswith(f"{clip}: cannot be read: {check} Thread worker: Error sending packet.; ")
