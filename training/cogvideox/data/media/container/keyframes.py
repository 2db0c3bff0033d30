"""Reads the headers inside keyframes: whether the size of the pictures changes, and whether decoding can start there.

``KeyframeHeaders`` is the entry point. FFmpeg also marks a frame as a keyframe where h264 refreshes its pictures part
by part (a gradual refresh), so that they are right only some frames later. It does not report that the size of the
pictures changes. Nothing is decoded here: only the bytes of the packets are read.
"""

from collections.abc import Iterator

from av.packet import Packet

_SLICES = {"h264": range(1, 6), "hevc": range(32)}  # types of NAL units that hold picture data
_PARAMETERS = {"h264": (7,), "hevc": (33,)}  # types of sequence parameter sets, which hold the size
# For other codecs, the bytes that precede the size, and how many bytes from there on hold it. If further bytes change,
# a frame is decoded to check its size, which only takes time.
_MARKS = {
    "vp8": (b"\x9d\x01\x2a", 7),
    "vp9": (b"\x49\x83\x42", 9),
    "av1": (b"\x0a", 11),
    "mpeg1video": (b"\0\0\1\xb3", 7),
    "mpeg2video": (b"\0\0\1\xb3", 7),
    "mpeg4": (b"\0\0\1\x20", 16),
    "mjpeg": (b"\xff\xc0", 9),
    "prores": (b"icpf", 16),
}


class KeyframeHeaders:
    """Reads the headers of the keyframes of one stream."""

    def __init__(self, codec: str, extradata: bytes) -> None:
        """Stores how the packets of the stream are divided into units.

        Args:
            codec: FFmpeg's name of the codec.
            extradata: Headers of the codec that the container stores.
        """
        self._codec = codec
        self._length_bytes = _length_bytes(codec, extradata)

    def read(self, packet: Packet) -> tuple[bytes, bool]:
        """Reads the headers of a keyframe.

        Returns:
            The bytes that change whenever the size of the pictures does, b"" if there are none; and whether the
            keyframe begins a gradual refresh, so that only some later frames are right.
        """
        if self._codec in _PARAMETERS:
            units = list(self._units(bytes(packet)))
            size_bytes = b"".join(unit for kind, unit in units if kind in _PARAMETERS[self._codec])
            slices = [unit for kind, unit in units if kind in _SLICES["h264"]] if self._codec == "h264" else []
            return size_bytes, bool(slices) and not _refers_to_nothing(slices[0])
        if self._codec in _MARKS:
            mark, num_bytes = _MARKS[self._codec]
            data = bytes(packet)
            at = data.find(mark)
            return (data[at : at + num_bytes] if at >= 0 else b""), False
        return b"", False

    def _units(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yields the type and the bytes of each unit of a packet, up to the first that holds picture data."""
        for unit in _with_lengths(data, self._length_bytes) if self._length_bytes else _with_start_codes(data):
            kind = unit[0] & 31 if self._codec == "h264" else unit[0] >> 1 & 63
            yield kind, unit
            if kind in _SLICES[self._codec]:
                return


def _length_bytes(codec: str, extradata: bytes) -> int:
    """Returns how many bytes store the length of each unit; 0 if units begin with start codes instead."""
    at = {"h264": 4, "hevc": 21}.get(codec, 0)
    return (extradata[at] & 3) + 1 if at and extradata[:1] == b"\1" and len(extradata) > at else 0


def _with_lengths(data: bytes, length_bytes: int) -> Iterator[bytes]:
    at = 0
    while at + length_bytes < len(data):
        start = at + length_bytes
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


def _refers_to_nothing(unit: bytes) -> bool:
    """Returns whether an h264 slice can be decoded without other pictures."""
    bits = "".join(f"{byte:08b}" for byte in unit[1:13])
    _, at = _number(bits, 0)  # skips the position of the slice in the picture
    return _number(bits, at)[0] % 5 in (2, 4)


def _number(bits: str, at: int) -> tuple[int, int]:
    """Reads an Exp-Golomb number, and returns it with the position after it.

    It is coded as n zeros and then n + 1 bits, of which the first is 1; the number is the value of these bits minus 1.
    """
    num_zeros = max(bits.find("1", at), at) - at
    end = at + 2 * num_zeros + 1
    return int(bits[at + num_zeros : end] or "1", 2) - 1, end
