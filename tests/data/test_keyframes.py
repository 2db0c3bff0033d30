"""keyframes.py: keyframes after which frames do not decode correctly, and changes of size that only decoding shows."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered import differ, encode, number_in, pictures, sequential
from odd_files import SIZE, resized

from cogvideox.data.media.container import packets
from cogvideox.data.media.container.keyframes import KeyframeHeaders
from cogvideox.data.media.faults import AGAIN, VideoError
from cogvideox.data.media.pixels import decode

COUNT, GOP = 96, 12
CORRUPT = VideoError(f"is damaged: a frame does not decode; {AGAIN}")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an mp4 of COUNT numbered pictures with a keyframe every GOP frames."""
    path = tmp_path_factory.mktemp("keyframes") / "clip.mp4"
    path.write_bytes(encode("mp4", frames=pictures(range(COUNT))))
    return path


@functools.cache
def plainly(path: Path) -> list[np.ndarray]:
    return [pixels for _, pixels in sequential(path, *SIZE)]


def with_corruption(monkeypatch: pytest.MonkeyPatch, is_corrupt: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Makes the decoder report corrupt frames.

    Returns:
        A list that collects (frame, keyframe at which decoding started) of each intact frame.
    """
    whole: list[tuple[int, int]] = []
    real = decode._frames

    def frames(container: Any, stream: Any, decoder: Any, keyframe: int, *labels: Any) -> Iterator[Any]:
        begun = round(keyframe * stream.time_base * 24)
        for frame in real(container, stream, decoder, keyframe, *labels):
            number = round(frame.time * 24)
            if is_corrupt(number, begun):
                raise CORRUPT
            whole.append((number, begun))
            yield frame

    monkeypatch.setattr(decode, "_frames", frames)
    return whole


@pytest.mark.parametrize("good", [0, 24, 48])
def test_a_frame_that_is_corrupt_after_a_seek_is_decoded_from_an_earlier_keyframe(
    clip: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    """This happens where keyframes refer to frames before them; all is right from one of the earlier keyframes on."""
    whole = with_corruption(monkeypatch, lambda number, begun: begun > good)
    wanted = range(62, 80, 3)
    frames = decode.read_frames(clip, decode.probe(clip), wanted, *SIZE)
    assert [number_in(frame) for frame in frames] == list(wanted)
    assert not any(differ(frame, plainly(clip)[number]) for number, frame in zip(wanted, frames, strict=True))
    assert [number for number, begun in whole if begun == good][-1] == wanted[-1]
    # Each start that failed decoded one frame, and the good start decoded only what it needs.
    assert len(whole) <= (60 - good) // GOP + 2 + wanted[-1] + 1 - good


def test_frames_that_were_right_at_first_stay_right(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_corruption(monkeypatch, lambda number, begun: begun == 36)
    wanted = [3, 30, 38, 47, 48, 90, 3]
    frames = decode.read_frames(clip, decode.probe(clip), wanted, *SIZE)
    assert [number_in(frame) for frame in frames] == wanted


def test_damage_is_found_without_decoding_a_long_file_from_the_start(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = with_corruption(monkeypatch, lambda number, begun: number == 90)
    with pytest.raises(VideoError, match=r"clip\.mp4: is damaged: a frame does not decode"):
        decode.read_frames(clip, decode.probe(clip), [85, 91], *SIZE)
    # More undamaged frames came before it than any frame refers to, so an earlier start would change nothing.
    assert min(begun for number, begun in whole if number) == 48


def test_damage_near_the_start_is_found_by_decoding_from_the_start(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = with_corruption(monkeypatch, lambda number, begun: number == 20)
    with pytest.raises(VideoError, match=r"clip\.mp4: is damaged: a frame does not decode"):
        decode.read_frames(clip, decode.probe(clip), [18, 21], *SIZE)
    assert whole[-1] == (19, 0)


def test_the_decoder_gets_the_first_packet_before_a_seek(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first packet says which version of x264 wrote a file, and decoders work around bugs of old versions."""
    taught: set[int] = set()
    real = packets.decode_packet

    def decoded(packet: Any, decoder: Any, keyframe: int) -> Iterator[Any]:
        taught.update([id(decoder)] if packet.pts == 0 else [])
        if id(decoder) not in taught:
            raise CORRUPT
        return real(packet, decoder, keyframe)

    monkeypatch.setattr(decode, "decode_packet", decoded)
    whole = with_corruption(monkeypatch, lambda number, begun: False)
    assert number_in(decode.read_frames(clip, decode.probe(clip), [62], *SIZE)[0]) == 62
    assert [number for number, _ in whole] == [0, 60, 61, 62]


@pytest.mark.parametrize(("container", "codec"), [("webm", "libvpx-vp9"), ("avi", "mjpeg"), ("mpegts", "libx264")])
def test_a_change_of_size_that_headers_do_not_show_is_found_while_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, codec: str
) -> None:
    monkeypatch.setattr(KeyframeHeaders, "read", lambda self, packet: (b"", False))
    path = tmp_path / "clip"
    path.write_bytes(resized(container, codec))
    info = decode.probe(path)
    assert [number_in(frame) for frame in decode.read_frames(path, info, range(18), *SIZE)] == list(range(18))
    with pytest.raises(
        VideoError, match=r"clip: changes size: its picture at 0\.750 s is 64x96, but the first one is 96x64"
    ):
        decode.read_frames(path, info, [3, 20, 30], *SIZE)


def test_keyframes_are_decoded_for_their_size_only_if_headers_change(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(packets, "_check_size_stays", lambda *args: looked.append(args))
    for container, codec in [("mp4", "libx264"), ("mpegts", "libx264"), ("webm", "libvpx"), ("mpeg", "mpeg2video")]:
        path = clip.with_name("same_size")
        path.write_bytes(encode(container, codec))
        decode.probe(path)
    assert not looked


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0\0", b"\0\0\1", b"\0\0\1\x41", bytes(64), b"\xff" * 64])
@pytest.mark.parametrize("extradata", [b"", b"\1\x64\0\x1f\xff", b"\1", b"\xff"])
@pytest.mark.parametrize("codec", ["h264", "hevc", "vvc", "vp9", "mpeg4"])
def test_headers_of_damaged_packets_raise_nothing(codec: str, extradata: bytes, data: bytes) -> None:
    headers, packet = KeyframeHeaders(codec, extradata), av.Packet(data)
    headers.read(packet)
    headers.leads(packet)
