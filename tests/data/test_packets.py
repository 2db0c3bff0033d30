"""packets.py: files that hold less than their headers say, and frame rates that containers round or store wrongly."""

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
from PIL import Image
from striped import COUNT, HEIGHT, RATE, WIDTH, encode, picture, read_numbers

from cogvideox.data.media.container.packets import demuxed
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels.decode import probe, read_frames

VP9 = {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}}
PROMISING: dict[str, dict[str, Any]] = {
    "a.mkv": {},
    "b.webm": VP9,
    "c.flv": {"options": {"g": "12"}},
    "d.avi": {"codec": "mpeg4"},
    "e.ivf": VP9,
    "f.mp4": {"muxer": {"movflags": "faststart"}},
}


@pytest.mark.parametrize("name", PROMISING)
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_truncated_file_is_an_error_and_not_a_shorter_clip(tmp_path: Path, name: str, share: float) -> None:
    whole = encode(tmp_path / name, **PROMISING[name])
    info = probe(whole)
    assert info.fps == pytest.approx(RATE, rel=1e-3)
    assert read_numbers(whole, range(COUNT), info) == list(range(COUNT))
    path = tmp_path / f"cut_{name}"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    with pytest.raises(VideoError, match=rf"cut_{name}: is truncated: it holds .* of ") as caught:
        probe(path)
    assert "\n" not in str(caught.value)


def with_sound(path: Path, seconds: float) -> Path:
    """Writes a file with COUNT frames and ``seconds`` of silence."""
    with av.open(str(encode(path.with_name(f"mute_{path.name}")))) as source, av.open(str(path), "w") as container:
        video = container.add_stream_from_template(source.streams.video[0])
        audio = container.add_stream("aac", rate=48000, layout="mono")
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = video
                container.mux(packet)
        for position in range(int(seconds * 48000 / 1024)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 48000, position * 1024
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov"])
@pytest.mark.parametrize("seconds", [0.5, 9])
def test_sound_of_another_length_does_not_count_as_truncation(tmp_path: Path, name: str, seconds: float) -> None:
    path = with_sound(tmp_path / name, seconds)
    info = probe(path)
    assert read_numbers(path, range(COUNT), info) == list(range(COUNT))


@pytest.mark.parametrize("seconds", [0.001, 1e12])
def test_an_absurd_duration_is_right_frames_or_a_line_with_the_fix(tmp_path: Path, seconds: float) -> None:
    path = encode(tmp_path / "a.mkv")
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # the element Duration: eight bytes, in milliseconds
    assert struct.unpack_from(">d", data, at)[0] == 1000 * COUNT / RATE
    struct.pack_into(">d", data, at, seconds * 1000)
    path.write_bytes(data)
    if seconds < 1:
        assert read_numbers(path, range(COUNT)) == list(range(COUNT))
    else:
        with pytest.raises(VideoError, match=r"a\.mkv: is truncated: .*ffmpeg -i IN -c copy OUT\.mp4"):
            probe(path)


@pytest.mark.parametrize("rate", [0, 1, 2**31])
def test_the_rate_of_an_mkv_follows_its_timestamps_and_not_its_header(tmp_path: Path, rate: int) -> None:
    path = encode(tmp_path / "a.mkv")
    data = bytearray(path.read_bytes())
    at = data.index(b"\x23\xe3\x83\x84") + 4  # the element DefaultDuration: four bytes, in nanoseconds
    struct.pack_into(">I", data, at, rate)
    path.write_bytes(data)
    info = probe(path)
    assert info.fps == pytest.approx(RATE, rel=1e-3)
    assert read_numbers(path, range(COUNT), info) == list(range(COUNT))


def test_b_frames_in_avi_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"b\.avi: its B-frames have no timestamps in avi; .*ffmpeg -i IN OUT\.mp4"):
        probe(encode(tmp_path / "b.avi"))
    without = encode(tmp_path / "p.avi", options={"g": "12", "bf": "0"})
    assert read_numbers(without, range(COUNT)) == list(range(COUNT))


@pytest.mark.parametrize("share", [0.4, 0.9, 0.999])
def test_a_truncated_gif_lacks_its_end_mark(tmp_path: Path, share: float) -> None:
    path, cut = tmp_path / "a.gif", tmp_path / "cut.gif"
    pictures = [Image.fromarray(picture(number)) for number in range(COUNT)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    assert read_numbers(path, range(COUNT)) == list(range(COUNT))
    assert read_numbers(path, [50, 3]) == [50, 3]
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(VideoError, match=r"cut\.gif: is truncated"):
        probe(cut)


def test_an_avi_index_with_a_gap_is_not_used(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", codec="mpeg4")
    data = bytearray(path.read_bytes())
    at = data.index(b"idx1") + 8 + 16 * 13
    data[at : at + 4] = b"junk"
    path.write_bytes(data)
    for index in (5, 30, 50, 59):
        assert read_numbers(path, [index]) == [index]


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_damaged_vp8_and_vp9_are_errors(tmp_path: Path, codec: str) -> None:
    path = encode(tmp_path / "a.webm", codec=codec, options=VP9["options"])
    with av.open(str(path)) as container:
        victim = [packet for packet in container.demux(video=0) if packet.size and packet.is_keyframe][2]
    assert victim.pos is not None
    data, at = bytearray(path.read_bytes()), victim.pos + victim.size // 2
    data[at : at + 64] = bytes(byte ^ 0x5A for byte in data[at : at + 64])
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"a\.webm: "):
        read_frames(path, probe(path), range(COUNT), HEIGHT, WIDTH)


def test_a_stream_that_begins_late_does_not_make_a_file_unreadable() -> None:
    def demux(*_: object) -> Iterator[str]:
        yield from ("a packet", "the end of its stream")
        raise IndexError("list index out of range")  # as PyAV does for the end of a stream that it did not find

    assert list(demuxed(cast(Any, SimpleNamespace(demux=demux)))) == ["a packet", "the end of its stream"]


def test_sound_in_the_middle_of_a_dvd_recording(tmp_path: Path) -> None:
    """FFmpeg looks for streams in the first 5 MB and at the end; it finds this one while packets are read."""
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "a.vob"), "w", format="vob") as output:
        video = output.add_stream("mpeg2video", rate=RATE, options={"g": "12", "qmin": "1", "qmax": "2"})
        video.height, video.width, video.pix_fmt, video.bit_rate = 240, 320, "yuv420p", 20_000_000
        audio = output.add_stream("mp2", rate=48000, layout="stereo")
        for number in range(200):  # of 92 KB each
            output.mux(video.encode(av.VideoFrame.from_ndarray(rng.integers(0, 256, (240, 320, 3), np.uint8))))
            if 100 <= number < 130:
                sound = av.AudioFrame.from_ndarray(np.zeros((1, 2304), np.int16), "s16", "stereo")
                sound.sample_rate, sound.time_base, sound.pts = 48000, Fraction(1, 48000), number * 48000 // RATE
                output.mux(audio.encode(sound))
        output.mux([*video.encode(), *audio.encode()])
    info = probe(tmp_path / "a.vob")
    assert info.num_frames == 200
    assert read_frames(tmp_path / "a.vob", info, [0, 80], 24, 32).shape == (2, 24, 32, 3)
