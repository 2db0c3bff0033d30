"""The container of a video file: reading() opens it, scan() lists its packets -> PacketIndex and the first frame.

Owns which containers are read, what their timestamps mean, and whether all that a header promises is in the file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cogvideox.data.faults import AGAIN, VideoError, check_size, naming
from cogvideox.data.frames import PacketIndex

MAX_FRAMES = 200_000

# A text file may be a playlist that names other files of this machine, so the readable formats are listed.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,ivf,h264,hevc,m4v"
# Their headers say how long the file is. What FFmpeg says of mpegts, mpeg and ogg is read off the packets that are
# there: cut off between two packets, they are whole files by every sign.
_PROMISING = ("matroska", "flv", "asf")
# Their timestamps are counted on from where reading starts: by an index that may miss a frame, or from 0.
_COUNTED = ("avi", "gif")
# FFmpeg's own decoders of these make up a picture out of damaged data without an error.
_STRICT = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@contextmanager
def reading(path: str | os.PathLike[str], *, known: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream; every error of the libraries inside the block becomes a VideoError.

    known: skips the look at the codec that opening a file includes (about a tenth of the time of a clip). Only for
    containers that store display times; without them it would change the timestamps.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS} | ({"skip_frame": "all"} if known else {})
    # Absolute, because a relative name with a colon would be taken for a protocol.
    name = os.path.abspath(path)
    with naming(path, av.FFmpegError, EOFError), av.open(name, options=options, metadata_errors="replace") as container:
        yield container, _video_stream(container)


def scan(container: InputContainer, stream: VideoStream, stamp: tuple[int, int]) -> tuple[PacketIndex, VideoFrame]:
    """Reads all packets of a container just opened, and decodes the first frame. Raises VideoError.

    stamp: see stamp_of.
    """
    check_size(stream.height, stream.width)
    packets = _Packets()
    first: VideoFrame | None = None
    for packet in container.demux():
        packets.note_end(packet)
        if packet.stream_index != stream.index:
            continue
        packets.add(packet)
        if first is None and packets.keyframe is not None:
            first = next(decoded(packet, stream.codec_context, packets.keyframe), None)
    _check_whole(container, stream, packets)
    index = _index(container, stream, packets, stamp)
    if first is None:
        raise VideoError(f"has no frame that decodes; {AGAIN}")
    return index, first


def strict_decoder(stream: VideoStream) -> VideoCodecContext:
    """The decoder of a stream that notices damage; it does not pass on what the container says of rotation."""
    usual = stream.codec_context
    name = _STRICT.get(usual.codec.canonical_name)
    if name not in av.codecs_available:
        return usual
    decoder = av.CodecContext.create(name, "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.thread_count = 1
    decoder.colorspace, decoder.color_range = usual.colorspace, usual.color_range
    return decoder


def decoded(packet: Packet, decoder: VideoCodecContext, keyframe: int) -> Iterator[VideoFrame]:
    """What a decoder gives for a packet; `keyframe` is the timestamp at which decoding could start."""
    if packet.is_corrupt:
        raise VideoError(f"is damaged: a packet is incomplete; {AGAIN}")
    for frame in decoder.decode(packet):
        # Frames shown before the keyframe but stored after it lack their references, and nobody asks for them.
        if frame.pts is None or frame.pts < keyframe:
            continue
        # Any other damaged frame is a reference of those that follow, so none of them can be trusted.
        if frame.is_corrupt:
            raise VideoError(f"is damaged: the frame at {frame.time:.3f} s does not decode; {AGAIN}")
        yield frame


def stamp_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(size, time of the last change) of a file, which tell whether it is the one that was scanned."""
    with naming(path):
        status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@dataclass
class _Packets:
    """What is noted of the packets, in the order of the file.

    entries: (presentation time, decoding time, is a keyframe, is shown) of each video packet. end: seconds at which
    the last packet of any stream ends. keyframe: presentation time of the first keyframe. num_empty: dropped frames.
    """

    entries: list[tuple[int, int, bool, bool]] = field(default_factory=list)
    end: float = 0.0
    keyframe: int | None = None
    num_empty: int = 0

    def add(self, packet: Packet) -> None:
        if not packet.size:  # a dropped frame in avi, or the end, which has no time
            self.num_empty += packet.dts is not None
            return
        if packet.pts is None:
            raise VideoError("its packets have no timestamps; re-encode it as h264 in mp4")
        dts = packet.pts if packet.dts is None else min(packet.pts, packet.dts)
        self.entries.append((packet.pts, dts, packet.is_keyframe, not packet.is_discard))
        if self.keyframe is None and packet.is_keyframe:
            self.keyframe = packet.pts
        if len(self.entries) > MAX_FRAMES:
            raise VideoError(f"has more than {MAX_FRAMES} frames; cut it into clips")

    def note_end(self, packet: Packet) -> None:
        if packet.size and packet.pts is not None and packet.time_base:
            self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))


def _video_stream(container: InputContainer) -> VideoStream:
    # The cover picture of an audio file is a video stream too.
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise VideoError("has no video stream; remove it")
    stream = streams[0]
    codec = stream.codec_context
    if codec is None:
        raise VideoError("no decoder for its codec; re-encode it as h264")
    if container.format.name in ("avi", "asf") and codec.name in ("h264", "hevc") and codec.has_b_frames:
        name = container.format.name
        raise VideoError(f"its B-frames have no timestamps in {name}; re-encode it: `ffmpeg -i IN OUT.mp4`")
    codec.thread_count = 1  # the workers are the parallel part
    return stream


def _check_whole(container: InputContainer, stream: VideoStream, packets: _Packets) -> None:
    """Raises VideoError if clearly less is there than the header promises."""
    num_there = len(packets.entries) + packets.num_empty
    # The header of an mp4 lists every frame; avi and ivf count them.
    num_promised = len(stream.index_entries) if "mov" in container.format.name else stream.frames
    if num_there < num_promised:
        raise _truncated(f"{num_there} of {num_promised} frames")
    if container.format.name == "gif" and not _ends_as_gif(container.name):
        raise _truncated(f"only {num_there} frames", copy="")
    if not container.format.name.startswith(_PROMISING) or not container.duration:
        return
    # Any stream may be the longest, so all of them are measured; timestamps are rounded, and few say how long the
    # last packet lasts.
    promised = container.duration / av.time_base
    if packets.end + max(0.1, 2 * packets.end / max(1, num_there)) < promised:
        raise _truncated(f"{packets.end:.2f} of {promised:.2f} s")


def _ends_as_gif(path: str) -> bool:
    """Whether the end mark is there, behind the end of a block; decoders fill up a picture that was cut off."""
    with open(path, "rb") as file:
        file.seek(-min(1024, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read().rstrip(b"\0").endswith(b"\0;")


def _truncated(there: str, copy: str = "-c copy ") -> VideoError:
    mend = f"if it plays to the end its header is wrong, and `ffmpeg -i IN {copy}OUT.mp4` mends it"
    return VideoError(f"is truncated: {there} are there; {mend}")


def _index(container: InputContainer, stream: VideoStream, packets: _Packets, stamp: tuple[int, int]) -> PacketIndex:
    # mp4 and mkv store display times and are searched by them; the others by decoding time.
    stores_pts = container.format.name.startswith(("mov", "matroska"))
    keyframes = sorted((pts, pts if stores_pts else dts) for pts, dts, is_key, _ in packets.entries if is_key)
    # What precedes the first keyframe in display order refers to frames that are not in the file.
    shown = {pts for pts, _, _, is_shown in packets.entries if keyframes and is_shown and pts >= keyframes[0][0]}
    if not shown:
        raise VideoError(f"has no frames; {AGAIN}")
    pts, seek_to = zip(*keyframes[: 1 if container.format.name in _COUNTED else None], strict=True)
    time_base, is_closed = Fraction(stream.time_base or 1), _is_closed(packets.entries)
    return PacketIndex(tuple(sorted(shown)), pts, seek_to, time_base, stores_pts, is_closed, stamp)


def _is_closed(entries: list[tuple[int, int, bool, bool]]) -> bool:
    keyframe = entries[0][0]
    for pts, _, is_key, _ in entries:
        keyframe = pts if is_key else keyframe
        if pts < keyframe:
            return False
    return True
