"""Defines a picture of a packet, which is what packets.py counts and the decoder gets."""

from dataclasses import dataclass

from av.packet import Packet


@dataclass(frozen=True)
class Picture:
    """Holds one picture in a packet for the decoder.

    Attributes:
        packet: The data of the picture and its times.
        is_b: Whether it is a B-frame.
        is_empty: Whether it has no data, so that the picture before it is shown again.
        was_packed: Whether it was stored behind another picture in one packet.
        is_second_field: Whether it only completes the picture before it, which is a first field.
    """

    packet: Packet
    is_b: bool = False
    is_empty: bool = False
    was_packed: bool = False
    is_second_field: bool = False
