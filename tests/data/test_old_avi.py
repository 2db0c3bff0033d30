"""mpeg4.py and packets.py: every frame of old AVI files and when it is shown; which of several streams is read."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest
from numbered import COUNT, HEIGHT, RATE, WIDTH, number_in, picture
from odd_files import SIZE, sounds, two_streams
from old_avi import DROPPED, dropped, dropped_by_encoder, packed, repeated

from cogvideox.data.media.pixels.decode import VideoError, probe, read_frames

ALL = list(range(COUNT))
REPEATED = [repeated(number) for number in ALL]
FILES: dict[str, tuple[Callable[[], bytes], list[int]]] = {
    "packed.avi": (packed, ALL),
    "packed.mp4": (lambda: packed("mp4"), ALL),
    "packed_empty.avi": (lambda: packed(repeats="empty"), ALL),
    "dropped.avi": (dropped, REPEATED),
    "dropped_by_encoder.avi": (dropped_by_encoder, REPEATED[: DROPPED[-3]]),
    "n_vops.avi": (lambda: dropped_by_encoder(fill=True), REPEATED),
    "n_vops.mp4": (lambda: dropped_by_encoder("mp4", fill=True), REPEATED),
}


@pytest.mark.parametrize("name", FILES)
def test_each_frame_shows_its_picture_or_the_one_before(tmp_path: Path, name: str) -> None:
    make, numbers = FILES[name]
    path = tmp_path / name
    path.write_bytes(make())
    info = probe(path)
    assert info.times == pytest.approx([position / RATE for position in range(len(numbers))], abs=1e-3)
    assert [number_in(frame) for frame in read_frames(path, info, range(info.num_frames), *SIZE)] == numbers
    assert info.conversions == (("packed b-frames",) if "packed" in name else ())


@pytest.mark.parametrize("name", ["packed.avi", "dropped.avi", "n_vops.mp4"])
def test_single_frames_equal_those_of_a_full_decode(tmp_path: Path, name: str) -> None:
    make, numbers = FILES[name]
    path = tmp_path / name
    path.write_bytes(make())
    info = probe(path)
    assert [number_in(read_frames(path, info, [position], *SIZE)[0]) for position in (35, 22, 6, 0)] == [
        numbers[position] for position in (35, 22, 6, 0)
    ]
    assert [number_in(frame) for frame in read_frames(path, info, [8, 6, 30, 8], *SIZE)] == [
        numbers[position] for position in (8, 6, 30, 8)
    ]


@pytest.mark.parametrize(
    "rate", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(25), Fraction(1), Fraction(65535)]
)
def test_no_picture_counts_as_empty_at_any_rate(tmp_path: Path, rate: Fraction) -> None:
    path = tmp_path / "rate.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=Fraction(rate), options={"bf": "2"})
        stream.height, stream.width = HEIGHT, WIDTH
        for number in range(8):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number))))
        output.mux(stream.encode())
    info = probe(path)
    assert [number_in(frame) for frame in read_frames(path, info, range(8), *SIZE)] == list(range(8))


def test_another_stream_than_the_first_is_named(tmp_path: Path) -> None:
    path, default = tmp_path / "streams.mp4", av.stream.Disposition.default
    for flags, expected in {(default, 0): (), (0, default): ("stream 1",)}.items():
        path.write_bytes(two_streams("matroska", flags=flags))
        assert probe(path).conversions == expected
    path.write_bytes(sounds(cover=True, video=True))
    assert probe(path).conversions == ()


@pytest.mark.parametrize(
    ("make", "reason"),
    [(two_streams, "another of its 2 video streams"), (FILES["n_vops.mp4"][0], "skips frames that were dropped")],
)
def test_decord_refuses_files_that_it_reads_differently(tmp_path: Path, make: Callable[[], bytes], reason: str) -> None:
    pytest.importorskip("decord")
    path = tmp_path / "clip.mp4"
    path.write_bytes(make())
    with pytest.raises(VideoError, match=f"clip.mp4: decord .*{reason}.*; use --video_reader pyav"):
        read_frames(path, probe(path), [0], *SIZE, reader="decord")
