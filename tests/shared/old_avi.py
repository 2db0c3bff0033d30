"""Writes AVI files as old programs did: packed B-frames, empty dropped frames, N-VOPs that repeat a picture."""

import io
import re
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
from numbered import COUNT, RATE, encode, pictures, plain, written

B_FRAMES = {"g": "12", "bf": "2", "sc_threshold": "0"}
DROPPED = (5, 6, 7, 8, 21, 22, 23, 33, 34, 35)  # numbers of pictures in a clip; the first is never dropped


def repeated(place: int) -> int:
    """Returns the number of the picture that is shown at a place if the pictures at DROPPED repeat the one before."""
    return max(set(range(place + 1)) - set(DROPPED))


def dropped() -> bytes:
    """Returns an AVI file in which the packets at the places DROPPED are empty."""
    data = bytearray(plain("avi", "mjpeg"))
    index = data.index(b"idx1") + 8
    for place, (at, size) in enumerate(_chunks(data)):
        if place in DROPPED:
            data[at : at + 16] = struct.pack("<4sI4sI", data[at : at + 4], 0, b"JUNK", size + size % 2 - 8)
            struct.pack_into("<I", data, index + 16 * place + 12, 0)
    return bytes(data)


def dropped_by_encoder(container: str = "avi", *, fill: bool = False) -> bytes:
    """Returns MPEG-4 part 2 whose encoder got no pictures at DROPPED. With `fill`, N-VOPs fill these places."""
    kept = [place for place in range(COUNT) if place not in DROPPED]
    coded = encode(container, "mpeg4", pictures(kept), pts=kept)
    parts = dict(zip(kept, _packets(coded), strict=True))
    last = COUNT if fill else 1 + max(kept)
    parts |= {place: n_vop(place) for place in DROPPED if fill}
    return _file(container, coded, {place: parts[place] for place in range(last) if place in parts})


def packed(container: str = "avi", *, repeats: str = "n-vop") -> bytes:
    """Returns MPEG-4 part 2 with packed B-frames; `repeats` (n-vop, empty, none) fills the places that they leave."""
    coded = encode("avi", "mpeg4", options=B_FRAMES)
    parts: list[bytes] = []
    for reference, *others in _groups(_packets(coded)):
        parts += [reference + b"".join(others[:1]), *others[1:]] + [b""] * (len(others) > 0)
    if repeats == "none":
        parts = [part for part in parts if part]
    fill = {place: part or n_vop(place) for place, part in enumerate(parts) if part or repeats == "n-vop"}
    # Decoders recognize packed B-frames by the "p" at the end of this mark, whose length must stay as it was.
    mark = re.compile(rb"Lavc\d+\.\d+\.\d+")
    return mark.sub(lambda match: b"DivX503b1393"[: len(match[0]) - 1] + b"p", _file(container, coded, fill))


def n_vop(place: int) -> bytes:
    """Returns a picture that is not coded: a P-frame's header at RATE pictures per second, and stuffing bits."""
    bits = f"0101{place % RATE:05b}1001111"
    return b"\x00\x00\x01\xb6" + int(bits.ljust(16, "1"), 2).to_bytes(2)


def _chunks(data: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Returns where the chunk of each packet begins, and its size."""
    at, end = data.index(b"movi") + 4, data.index(b"idx1")
    while at < end:
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"00dc":
            yield at, size
        at += 8 + size + size % 2


def _packets(data: bytes) -> list[bytes]:
    with av.open(io.BytesIO(data), "r") as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def _groups(packets: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Yields each picture to which others refer, with the B-frames after it."""
    group: list[bytes] = []
    for packet in packets:
        is_b = packet[packet.index(b"\x00\x00\x01\xb6") + 4] >> 6 == 2
        if group and not is_b:
            yield group
            group = []
        group.append(packet)
    yield group


def _file(container: str, like: bytes, parts: dict[int, bytes]) -> bytes:
    """Returns a file with these packets at these places. In an AVI file, empty packets fill the places between them."""

    def fill(output: Any) -> None:
        with av.open(io.BytesIO(like), "r") as source:
            stream = output.add_stream_from_template(source.streams.video[0])
        for place, part in parts.items():
            packet = av.Packet(part)
            packet.pts = packet.dts = place
            packet.duration, packet.time_base, packet.stream = 1, Fraction(1, RATE), stream
            packet.is_keyframe = place == 0
            output.mux(packet)

    return written(container, fill)
