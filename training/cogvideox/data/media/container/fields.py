"""Recognizes second fields of interlaced h264, which camcorders and broadcasters store in packets of their own.

A field has every other line of a picture. Such a video codes some pictures as one frame, and others as two fields. The
decoder puts two fields together, and their picture is shown at the time of the first field. ``FieldPairs`` turns
packets into pictures.
Only headers are read, as ITU-T H.264 defines them in 7.3.
"""

from collections.abc import Iterator
from typing import NamedTuple

from av.packet import Packet

from cogvideox.data.media.container.bits import Bits, length_bytes, units_of
from cogvideox.data.media.container.picture import Picture

_SLICES, _SEQUENCE = (1, 2, 5), 7  # types of units: the beginnings of slices, and the parameters of the sequence
_WITH_CHROMA_FORMAT = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}  # profiles
_HEADER_BYTES = 24  # more than the start of a slice's header can take


class _Sequence(NamedTuple):
    """What the parameters of a sequence say about the headers of its slices."""

    may_have_fields: bool
    number_bits: int  # of the number of the frame
    has_planes: bool  # whether each color is coded by itself


class FieldPairs:
    """Turns packets of h264 into pictures. It must be called with all packets in their order."""

    def __init__(self, extradata: bytes) -> None:
        """Reads the headers that the container stores."""
        self._length_bytes = length_bytes("h264", extradata)
        self._sequence: _Sequence | None = None
        self._first: tuple[int, int] | None = None  # a first field: number of its frame, and 1 for the lower lines
        for unit in _stored_units(extradata):
            self._note_sequence(unit)

    def __call__(self, packet: Packet) -> Iterator[Picture]:
        """Yields the picture of a packet."""
        yield Picture(packet, is_empty=not packet.size, is_second_field=self._completes(packet))

    def _completes(self, packet: Packet) -> bool:
        """Returns whether a packet only has the second field of the picture whose first field came before it."""
        first, self._first = self._first, None
        fields = self._fields_in(packet)
        if len(fields) != 1:  # the packet has a frame, or both fields
            return False
        number, is_lower = fields[0]
        if first == (number, 1 - is_lower):
            return True
        self._first = fields[0]
        return False

    def _fields_in(self, packet: Packet) -> list[tuple[int, int]]:
        """Returns the fields that a packet has: the number of the frame, and 1 for the lower lines or 0."""
        fields: list[tuple[int, int]] = []
        if self._sequence and not (self._sequence.may_have_fields or packet.is_keyframe):
            return fields  # parameters only change at keyframes
        for unit in units_of(bytes(packet), self._length_bytes):
            self._note_sequence(unit)
            if unit[0] & 31 not in _SLICES:
                continue
            field = _field_of(unit, self._sequence) if self._sequence else None
            if field is None:
                break
            if field not in fields:
                fields.append(field)
        return fields

    def _note_sequence(self, unit: bytes) -> None:
        if unit[0] & 31 == _SEQUENCE:
            self._sequence = _sequence_of(unit)


def _stored_units(extradata: bytes) -> Iterator[bytes]:
    """Yields the first units in the headers that a container stores: the parameters of the sequence."""
    if extradata[:1] != b"\1":
        yield from units_of(extradata, 0)
        return
    # Five bytes, the number of parameter sets in five bits, then each one after its length in two bytes.
    for _, unit in zip(range(extradata[5] & 31 if len(extradata) > 5 else 0), units_of(extradata[6:], 2), strict=False):
        yield unit


def _header_bits(unit: bytes) -> Bits:
    """Returns the bits after the type of a unit, without the bytes that only prevent start codes."""
    return Bits(unit[1:].replace(b"\0\0\3", b"\0\0"))


def _field_of(unit: bytes, sequence: _Sequence) -> tuple[int, int] | None:
    """Returns which field a slice belongs to, or None if it belongs to a frame."""
    bits = _header_bits(unit[: 1 + _HEADER_BYTES])
    for _ in range(3):  # position in the picture, type, parameters of the picture
        bits.golomb()
    if sequence.has_planes:
        bits(2)
    number = bits(sequence.number_bits)
    return (number, bits(1)) if sequence.may_have_fields and bits(1) else None


def _sequence_of(unit: bytes) -> _Sequence:
    """Reads the parameters of a sequence, up to whether it may have fields."""
    bits = _header_bits(unit)
    profile = bits(8)
    bits(8 + 8)  # constraints, level
    bits.golomb()  # its id
    has_planes = False
    if profile in _WITH_CHROMA_FORMAT:
        chroma_format = bits.golomb()
        has_planes = chroma_format == 3 and bool(bits(1))
        bits.golomb(), bits.golomb()  # bits of luma and chroma
        bits(1)
        if bits(1):
            _skip_scaling_lists(bits, 12 if chroma_format == 3 else 8)
    number_bits = 4 + min(12, bits.golomb())
    _skip_order(bits)
    bits.golomb()  # reference frames
    bits(1)
    bits.golomb(), bits.golomb()  # width and height
    return _Sequence(not bits(1), number_bits, has_planes)


def _skip_scaling_lists(bits: Bits, number: int) -> None:
    for place in range(number):
        last = following = 8
        for _ in range(16 if place < 6 else 64) if bits(1) else ():
            if following:
                following = (last + _signed(bits)) % 256
            last = following or last


def _skip_order(bits: Bits) -> None:
    """Skips how the order in which pictures are shown is coded."""
    kind = bits.golomb()
    if kind == 0:
        bits.golomb()
    elif kind == 1:
        bits(1)
        bits.golomb(), bits.golomb()
        for _ in range(min(255, bits.golomb())):
            bits.golomb()


def _signed(bits: Bits) -> int:
    number = bits.golomb()
    return (number + 1) // 2 if number % 2 else -(number // 2)
