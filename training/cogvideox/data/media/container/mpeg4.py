"""Separates the pictures of MPEG-4 part 2 streams, as Xvid and DivX wrote them into avi files.

``Unpacker`` is the entry point: it turns packets into pictures. A packet in avi has no time, only its position. A
B-frame is decoded after a picture that is shown later. So encoders packed it into the same packet behind that picture,
and stored an empty picture (an N-VOP) at the position where the B-frame would have been:

    stored packets:  [I0] [P3 B1] [B2] [N-VOP]  -->  pictures: I0, P3, B1, B2, each at its own position
"""

import re
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from av.packet import Packet

from cogvideox.data.media.container.bits import Bits
from cogvideox.data.media.container.picture import Picture
from cogvideox.data.media.faults import VideoError

# A start code, followed by the headers of a stream or by a picture.
_START = re.compile(rb"\x00\x00\x01([\x20-\x2f\xb6])")
_PICTURE = b"\xb6"
_I, _B = 0, 2  # coding types of pictures
_HEADER_BYTES = 64  # more than a header can take


class Unpacker:
    """Divides packets that hold several pictures. Those after the first wait for the empty packets that follow."""

    def __init__(self, headers: bytes, in_avi: bool, rate: Fraction) -> None:
        """Reads the headers of a stream.

        Args:
            headers: Headers of the codec that the container stores.
            in_avi: Whether the container is avi, whose timestamps are positions.
            rate: Frames per second of the stream, for a message.
        """
        self._in_avi, self._rate = in_avi, rate
        self._clock_bits = 0  # number of bits that hold the time in the header of a picture
        self._waiting: deque[Picture] = deque()
        self._due = 0  # the position of the next packet
        self._cut(headers)

    def __call__(self, packet: Packet) -> Iterator[Picture]:
        """Yields the pictures of a packet. Raises VideoError if packed pictures have no positions."""
        position = packet.dts if self._in_avi else packet.pts
        # Empty packets of avi have positions as well, but FFmpeg leaves them out, so gaps in the positions are filled.
        # At the end of the file (no position), the pictures that are left follow.
        while self._waiting and (position is None or (self._in_avi and self._due < position)):
            yield self._next(self._due, packet)
        if position is None or not packet.size:
            yield Picture(packet, is_empty=True)
            return
        pictures = self._pictures(packet)
        if self._waiting and pictures[0].is_empty:
            pictures.pop(0)
        elif self._waiting and not pictures[0].is_b:
            # FFmpeg decodes such a file to wrong frames without an error, but not its bare stream.
            steps = f"`ffmpeg -i IN -c copy OUT.m4v`, then `ffmpeg -f m4v -framerate {self._rate} -i OUT.m4v OUT.mp4`"
            raise VideoError(f"has packed B-frames without positions; re-encode its bare stream: {steps}")
        self._waiting.extend(pictures)
        yield self._next(position, packet)

    def _next(self, position: int, packet: Packet) -> Picture:
        """Returns the next waiting picture, which gets the position unless it is the first one of ``packet``."""
        picture = self._waiting.popleft()
        if picture.packet is not packet:
            picture.packet.pts = picture.packet.dts = position
        self._due = position + (picture.packet.duration or 1)
        return picture

    def _pictures(self, packet: Packet) -> list[Picture]:
        data = bytes(packet)
        parts = self._cut(data)
        if len(parts) == 1 and not self._waiting:
            return [self._picture(packet, data)]
        return [self._picture(_copy(packet, part), part, was_packed=number > 0) for number, part in enumerate(parts)]

    def _cut(self, data: bytes) -> list[bytes]:
        """Returns the data of each picture, the first with all headers before it; all data if there is no picture."""
        starts = []
        for found in _START.finditer(data):
            if found[1] == _PICTURE:
                starts.append(found.start())
            else:
                self._clock_bits = _clock_bits(data[found.end() :])
        return [data[start:end] for start, end in pairwise([0, *starts[1:], len(data)])]

    def _picture(self, packet: Packet, data: bytes, was_packed: bool = False) -> Picture:
        at = data.find(b"\x00\x00\x01" + _PICTURE)
        if at < 0:  # DivX wrote one byte for a dropped frame
            return Picture(packet, is_empty=len(data) == 1)
        bits = Bits(data[at + 4 : at + 4 + _HEADER_BYTES])
        coding_type = bits(2)
        while bits(1):  # one bit for each full second
            pass
        bits(1 + self._clock_bits + 1)
        if packet.dts is None:
            packet.is_keyframe = coding_type == _I
        return Picture(packet, coding_type == _B, is_empty=not bits(1), was_packed=was_packed)


def _clock_bits(header: bytes) -> int:
    """Returns how many bits hold the time in the header of each picture.

    Args:
        header: The header of a video object layer, after its start code.
    """
    bits = Bits(header[:_HEADER_BYTES])
    bits(1 + 8)  # random access flag, type of object
    version = 1
    if bits(1):
        version = bits(4)
        bits(3)  # priority
    if bits(4) == 15:  # aspect ratio
        bits(8 + 8)
    if bits(1):  # parameters of the decoder's buffer
        bits(2 + 1)
        if bits(1):
            bits(79)
    if bits(2) == 3 and version != 1:  # shape
        bits(4)
    bits(1)
    return max(1, (bits(16) - 1).bit_length())


def _copy(packet: Packet, data: bytes) -> Packet:
    """Returns a packet with other data, which has no time yet."""
    copy = Packet(data)
    copy.time_base, copy.duration = packet.time_base, packet.duration
    copy.is_corrupt = packet.is_corrupt
    return copy
