"""Reads the bits of headers, and the units of which packets of h264, hevc and vvc consist."""

from collections.abc import Iterator


class Bits:
    """Reads numbers, one after the other; after the end of the data there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data)
        self._left = 8 * len(data)

    def __call__(self, count: int) -> int:
        """Returns the number that the next ``count`` bits hold."""
        self._left -= count
        shifted = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return shifted & (1 << count) - 1

    def golomb(self) -> int:
        """Returns the next Exp-Golomb number.

        It is coded as n zeros and then n + 1 bits, of which the first is 1; the number is the value of these bits
        minus 1. At most 32 zeros are read, because damaged data may have more.
        """
        zeros = 0
        while zeros < 32 and not self(1):
            zeros += 1
        return (1 << zeros) - 1 + self(zeros)


def length_bytes(codec: str, extradata: bytes) -> int:
    """Returns how many bytes store the length of each unit of a packet; 0 if units begin with start codes instead.

    Args:
        codec: FFmpeg's name of the codec.
        extradata: Headers of the codec that the container stores.
    """
    if codec == "vvc":  # five bits are set before the length, unless the headers begin with a start code
        return (extradata[0] >> 1 & 3) + 1 if extradata[:1] >= b"\xf8" else 0
    at = {"h264": 4, "hevc": 21}.get(codec, 0)
    return (extradata[at] & 3) + 1 if at and extradata[:1] == b"\1" and len(extradata) > at else 0


def units_of(data: bytes, num_length_bytes: int) -> Iterator[bytes]:
    """Yields the units of a packet; ``num_length_bytes`` is the result of ``length_bytes``."""
    return _with_lengths(data, num_length_bytes) if num_length_bytes else _with_start_codes(data)


def _with_lengths(data: bytes, num_length_bytes: int) -> Iterator[bytes]:
    at = 0
    while at + num_length_bytes < len(data):
        start = at + num_length_bytes
        at = start + int.from_bytes(data[at:start], "big")
        if data[start:at]:
            yield data[start:at]


def _with_start_codes(data: bytes) -> Iterator[bytes]:
    start = data.find(b"\0\0\1") + 3
    while 3 <= start < len(data):
        end = data.find(b"\0\0\1", start)
        unit = data[start : end if end >= 0 else len(data)].rstrip(b"\0")
        if unit:
            yield unit
        start = end + 3
