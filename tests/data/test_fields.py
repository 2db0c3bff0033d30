"""The two fields of a picture of interlaced h264 are one frame; test_odd_files.py reads such files."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from fields import GOP, field_coded
from numbered import COUNT, RATE, encode

from cogvideox.data.media.container.fields import FieldPairs
from cogvideox.data.media.container.packets import unpacker
from cogvideox.data.media.container.picture import Picture
from cogvideox.data.media.pixels.decode import probe


def pictures_in(data: bytes) -> Iterator[Picture]:
    with av.open(io.BytesIO(data)) as file:
        unpack = unpacker(file.streams.video[0])
        for packet in file.demux(video=0):
            yield from unpack(packet)


@pytest.mark.parametrize("container", ["mpegts", "mp4"])
def test_every_other_packet_has_a_second_field(container: str) -> None:
    found = [picture.is_second_field for picture in pictures_in(field_coded(container))]
    assert found == [False, True] * COUNT + [False]  # the last packet ends the file


@pytest.mark.parametrize("container", ["mpegts", "mp4"])
def test_the_times_are_those_of_first_fields(tmp_path: Path, container: str) -> None:
    path = tmp_path / "clip"
    path.write_bytes(field_coded(container))
    info = probe(path)
    assert info.times == pytest.approx([number / RATE for number in range(COUNT)], abs=1e-4)
    assert info.packets is not None
    assert [info.packets.pts.index(pts) for pts in info.packets.keyframes] == list(range(0, COUNT, GOP))
    assert info.conversions == ("fields",)


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p", "yuv444p"])  # each has another profile
@pytest.mark.parametrize("parameters", ["interlaced=1", "interlaced=0", "interlaced=1:cqm=jvt:bframes=2", "slices=4"])
def test_frames_are_not_taken_for_fields(container: str, pix_fmt: str, parameters: str) -> None:
    data = encode(container, pix_fmt=pix_fmt, options={"x264-params": f"keyint=12:{parameters}"})
    assert not any(picture.is_second_field for picture in pictures_in(data))


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\1", b"\0\0\1\x67", b"\0\0\1\x67" + bytes(9), b"\0\0\1\x41\xff"])
@pytest.mark.parametrize("start", [b"", b"\0\0\1\x67\x64\0\x1f\xac", b"\0\0\1\x67" + b"\xff" * 99])
@pytest.mark.parametrize("extradata", [b"", b"\1", b"\1\x64\0\x1f\xff\xe1\0\4\x67\x64\0\x1f"])
def test_damaged_headers_raise_nothing(extradata: bytes, start: bytes, data: bytes) -> None:
    pairs = FieldPairs(extradata)
    for packet in (start, data, data):
        assert len(list(pairs(av.Packet(packet)))) == 1
