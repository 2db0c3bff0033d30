"""Reads the headers of keyframes: whether the size of pictures changes, and which pictures can be decoded from there.

``KeyframeHeaders`` is the entry point. FFmpeg also marks a frame as a keyframe where h264 refreshes its pictures part
by part (a gradual refresh), so that they are right only some frames later. It does not report that the size of the
pictures changes. Nothing is decoded here: only the bytes of the packets are read.
"""

from collections.abc import Iterator

from av.packet import Packet

from cogvideox.data.media.container.bits import Bits, length_bytes, units_of

_SLICES = {"h264": range(1, 6), "hevc": range(32), "vvc": range(12)}  # types of NAL units that hold picture data
_PARAMETERS = {"h264": (7,), "hevc": (33,), "vvc": (15,)}  # types of sequence parameter sets, which hold the size
# Types of keyframes after which pictures are stored that are shown before them, and refer to nothing before them.
_LEADERS = {"hevc": (19,), "vvc": (7,)}
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
        self._length_bytes = length_bytes(codec, extradata)

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

    def leads(self, packet: Packet) -> bool:
        """Returns whether pictures that are stored after a keyframe and shown before it can be decoded from it."""
        leaders = _LEADERS.get(self._codec)
        return leaders is not None and any(kind in leaders for kind, _ in self._units(bytes(packet)))

    def _units(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yields the type and the bytes of each unit of a packet, up to the first that holds picture data."""
        for unit in units_of(data, self._length_bytes):
            kind = {"h264": unit[0] & 31, "hevc": unit[0] >> 1 & 63, "vvc": int.from_bytes(unit[1:2]) >> 3}[self._codec]
            yield kind, unit
            if kind in _SLICES[self._codec]:
                return


def _refers_to_nothing(unit: bytes) -> bool:
    """Returns whether an h264 slice can be decoded without other pictures."""
    bits = Bits(unit[1:13])
    bits.golomb()  # the position of the slice in the picture
    return bits.golomb() % 5 in (2, 4)
