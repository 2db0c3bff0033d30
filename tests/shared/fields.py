"""Makes interlaced h264 in which each field is coded by itself, as camcorders and broadcasters do; x264 cannot.

``field_coded`` returns a file with the numbered pictures. Their pixels are stored without compression (I_PCM), so only
the headers of ITU-T H.264, 7.3, are written here.
"""

from fractions import Fraction
from typing import Any

import av
import numpy as np
from numbered import COUNT, HEIGHT, RATE, WIDTH, add_stream, picture, written

GOP = 12  # frames from one keyframe to the next
_I_PCM, _I_PCM_IN_P = 25, 30  # types of macroblocks
_I, _P = 7, 5  # types of slices
_PARAMETERS, _KEY, _OTHER = (7, 8), 5, 1  # types of units


class _Writer:
    """Writes the bits of a unit."""

    def __init__(self) -> None:
        self.bits: list[int] = []

    def put(self, count: int, value: int) -> "_Writer":
        self.bits += [value >> place & 1 for place in reversed(range(count))]
        return self

    def golomb(self, *values: int) -> "_Writer":
        for value in values:
            self.put((value + 1).bit_length() - 1, 0).put((value + 1).bit_length(), value + 1)
        return self

    def align(self) -> "_Writer":
        return self.put(-len(self.bits) % 8, 0)

    def unit(self, kind: int) -> bytes:
        """Returns the unit with its start code; a byte 3 prevents start codes inside of it."""
        data = np.packbits(np.array(self.put(1, 1).align().bits, np.uint8)).tobytes()
        safe = bytearray()
        for byte in data:
            if safe[-2:] == b"\0\0" and byte <= 3:
                safe.append(3)
            safe.append(byte)
        return b"\0\0\0\1" + bytes([3 << 5 | kind]) + bytes(safe)


def _parameters() -> bytes:
    sequence = _Writer().put(8, 77).put(8, 0).put(8, 30).golomb(0, 0, 0, 4, 1).put(1, 0)
    sequence.golomb(WIDTH // 16 - 1, HEIGHT // 32 - 1).put(2, 0).put(2, 0b10)  # may have fields
    sequence.put(1, 1).put(4, 0).put(1, 1).put(32, 1).put(32, 2 * RATE).put(1, 1).put(4, 0)  # two fields a frame
    pictures = _Writer().golomb(0, 0).put(2, 0b01).golomb(0, 0, 0).put(3, 0).golomb(0, 0, 0).put(3, 0)
    return sequence.unit(_PARAMETERS[0]) + pictures.unit(_PARAMETERS[1])


def _field(planes: list[np.ndarray], number: int, is_lower: int) -> bytes:
    """Returns one field of a frame; ``number`` counts the frames since the keyframe."""
    is_key = number == 0 and not is_lower
    slice_ = _Writer().golomb(0, _I if is_key else _P, 0).put(4, number).put(1, 1).put(1, is_lower)
    if is_key:
        slice_.golomb(0)
    slice_.put(8, 2 * number + is_lower).put(2, 0)  # the last two: no more references, or pictures that are kept
    slice_.put(0 if is_key else 1, 0).golomb(0)
    for row in range(HEIGHT // 32):
        for column in range(WIDTH // 16):
            slice_.golomb(*((_I_PCM,) if is_key else (0, _I_PCM_IN_P))).align()
            for plane, size in zip(planes, (16, 8, 8), strict=True):
                lines = plane[is_lower::2][row * size : (row + 1) * size, column * size : (column + 1) * size]
                slice_.bits += np.unpackbits(np.ascontiguousarray(lines)).tolist()
    return slice_.unit(_KEY if is_key else _OTHER)


def _fields(number: int) -> list[bytes]:
    """Returns both fields of a picture, the first one with the parameters if it is a keyframe."""
    codes = av.VideoFrame.from_ndarray(picture(number)).reformat(format="yuv420p").to_ndarray()
    chroma = codes[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
    first, second = (_field([codes[:HEIGHT], *chroma], number % GOP, is_lower) for is_lower in (0, 1))
    return [first if number % GOP else _parameters() + first, second]


def field_coded(container: str, packets: int = 2) -> bytes:
    """Returns a file whose pictures have two fields each, which are in one packet or in two."""

    def fill(output: Any) -> None:
        stream = add_stream(output, "libx264", picture(0))
        for number in range(COUNT):
            fields = _fields(number)
            for place, data in enumerate(fields if packets == 2 else [b"".join(fields)]):
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.duration = stream, Fraction(1, 2 * RATE), 3 - packets
                packet.pts = packet.dts = 2 * number + place
                packet.is_keyframe = number % GOP == 0 and place == 0
                output.mux(packet)

    return written(container, fill)
