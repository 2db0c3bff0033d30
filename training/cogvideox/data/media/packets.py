"""The container of a video file: open_video() opens it, scan() lists its packets -> PacketIndex and the first frame.

Owns which containers are read, what their timestamps mean, and whether all that a header promises is in the file.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cogvideox.data.media.faults import AGAIN, VideoError, check_size, errors_naming
from cogvideox.data.media.frames import PacketIndex
from cogvideox.data.media.joined import second_file
from cogvideox.data.media.keyframes import KeyframeHeaders
from cogvideox.data.media.mpeg4 import Picture, unpacker

MAX_FRAMES = 200_000

# A text file may be a playlist that names other files of this machine, so the readable formats are listed.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,ivf,h264,hevc,m4v"
# Their headers say how long the file is. What FFmpeg says of mpegts, mpeg and ogg is read off the packets that are
# there: cut off between two packets, they are whole files by every sign.
_HAVE_DURATION = ("matroska", "flv", "asf")
# Their timestamps are counted on from where reading starts: by an index that may miss a frame, or from 0.
_COUNT_FROM_START = ("avi", "gif")
# FFmpeg's own decoders of these make up a picture out of damaged data without an error.
_STRICT_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# The first picture of a clip, or the cover of an audio file, is a video stream too.
_COVER_FLAGS = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails


@contextmanager
def open_video(
    path: str | os.PathLike[str], stream: int | None = None, *, known: bool = False
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream; every error of the libraries inside the block becomes a VideoError.

    stream: its place in the file; the one that is to be shown if not given.
    known: skips the look at the codec that opening a file includes (about a tenth of the time of a clip). Only for
    containers that store display times; without them it would change the timestamps.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS} | ({"skip_frame": "all"} if known else {})
    # Absolute, because a relative name with a colon would be taken for a protocol.
    name = os.path.abspath(path)
    with (
        errors_naming(path, av.FFmpegError, EOFError),
        av.open(name, options=options, metadata_errors="replace") as file,
    ):
        video = _default_stream(file) if stream is None else _stream_at(file, stream)
        yield file, _check_decodable(file, video)


def scan(container: InputContainer, stream: VideoStream, stamp: tuple[int, int]) -> tuple[PacketIndex, VideoFrame]:
    """Reads all packets of a container just opened, and decodes the first frame. Raises VideoError.

    stamp: see size_and_mtime.
    """
    check_size(stream.height, stream.width)
    _check_not_joined(container)
    codec = stream.codec_context
    packets = _PacketLog(KeyframeHeaders(codec.codec.canonical_name, codec.extradata or b""))
    first: VideoFrame | None = None
    unpack, start = unpacker(stream), 0
    for packet in container.demux():
        packets.note_end(packet)
        if packet.stream_index != stream.index:
            continue
        for picture in unpack(packet):
            packets.add(picture, stream)
            if first is None and packets.keyframe is not None:
                first = next(decode_packet(picture.packet, codec, packets.keyframe), None)
            elif first is not None and packets.may_change_size:
                _check_size_stays(picture.packet, stream, packets, first)
        start = packet.pos or start
    if container.format.name == "avi" and packets.entries:
        packets.last_place = packets.entries[-1].dts + _count_trailing_empty(container.name, stream.index, start)
    _check_complete(container, stream, packets)
    if not packets.entries:
        raise VideoError(f"has no frames; {AGAIN}")
    if first is None:
        raise VideoError(f"has no frame that decodes; {AGAIN}")
    return _index(container, stream, packets, (first.height, first.width), stamp), first


def strict_decoder(stream: VideoStream) -> VideoCodecContext:
    """The decoder of a stream that notices damage; it does not pass on what the container says of rotation."""
    usual = stream.codec_context
    name = _STRICT_DECODERS.get(usual.codec.canonical_name)
    if name not in av.codecs_available or (usual.format and usual.format.components[0].bits > 8):
        return usual  # PyAV's libvpx decodes 8 bits only
    decoder = av.CodecContext.create(name, "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.thread_count = 1
    decoder.colorspace, decoder.color_range = usual.colorspace, usual.color_range
    return decoder


def decode_packet(packet: Packet, decoder: VideoCodecContext, keyframe: int) -> Iterator[VideoFrame]:
    """What a decoder gives for a packet; `keyframe` is the timestamp at which decoding could start."""
    if not packet.size and packet.dts is not None:  # a dropped frame, which a decoder takes for the end
        return
    if packet.is_corrupt:
        raise VideoError(f"is damaged: a packet is incomplete; {AGAIN}")
    for frame in _decode_or_raise(packet, decoder):
        # Frames shown before the keyframe but stored after it lack their references, and nobody asks for them.
        if frame.pts is None or frame.pts < keyframe:
            continue
        # Any other damaged frame is a reference of those that follow, so none of them can be trusted.
        if frame.is_corrupt:
            raise VideoError(f"is damaged: the frame at {frame.time:.3f} s does not decode; {AGAIN}")
        yield frame


def size_change(frame: VideoFrame, size: tuple[int, int], seconds: float) -> VideoError:
    """What is said of a frame, shown after so many seconds, that is not as large (height, width) as the first one."""
    sizes = f"its picture at {seconds:.3f} s is {frame.width}x{frame.height}, the first one {size[1]}x{size[0]}"
    return VideoError(f"changes size: {sizes}; cut it there: `ffmpeg -i IN -t {seconds:.3f} OUT.mp4`")


def size_and_mtime(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(size, time of the last change) of a file, which tell whether it is the one that was scanned."""
    with errors_naming(path):
        status = os.stat(path)
    return status.st_size, status.st_mtime_ns


class _Entry(NamedTuple):
    """What is noted of a picture: presentation and decoding time, and what it is."""

    pts: int
    dts: int
    is_key: bool
    is_shown: bool
    is_b: bool
    is_empty: bool


@dataclass
class _PacketLog:
    """What is noted of the packets, in the order of the file.

    entries: of each picture of the video. end: seconds at which the last packet of any stream ends. keyframe:
    presentation time of the first keyframe. are_packed: whether a packet held several pictures. last_place: of the
    last packet of an avi. has_gradual: whether there are keyframes that are not to be started at. may_change_size:
    whether the picture added last may have another size.
    """

    headers: KeyframeHeaders
    entries: list[_Entry] = field(default_factory=list)
    end: float = 0.0
    keyframe: int | None = None
    are_packed: bool = False
    last_place: int = 0
    has_gradual: bool = False
    may_change_size: bool = False
    _size_bytes: bytes = b""
    _latest: int | None = None
    _latest_before_keyframe: int | None = None

    def add(self, picture: Picture, stream: VideoStream) -> None:
        packet = picture.packet
        if not packet.size and packet.dts is None:  # the end
            return
        if packet.pts is None:
            raise VideoError("its packets have no timestamps; re-encode it as h264 in mp4")
        is_gradual = packet.is_keyframe and self.headers.is_gradual(packet)
        is_key = packet.is_keyframe and not is_gradual and not picture.is_empty
        self._check_time(packet.pts, is_key, stream)
        self._note_size(packet)
        dts = packet.pts if packet.dts is None else min(packet.pts, packet.dts)
        self.entries.append(_Entry(packet.pts, dts, is_key, not packet.is_discard, picture.is_b, picture.is_empty))
        self.are_packed |= picture.was_packed
        self.has_gradual |= is_gradual
        if self.keyframe is None and is_key:
            self.keyframe = packet.pts
        if len(self.entries) > MAX_FRAMES:
            raise VideoError(f"has more than {MAX_FRAMES} frames; cut it into clips")

    def _check_time(self, pts: int, is_key: bool, stream: VideoStream) -> None:
        """Raises VideoError for a frame that is shown before frames of another keyframe, stored before its own."""
        if is_key:
            self._latest_before_keyframe = self._latest
        if self._latest_before_keyframe is not None and pts < self._latest_before_keyframe:
            rate = stream.average_rate or Fraction(24)
            again = f"`ffmpeg -i IN -an -vf setpts=N/({rate})/TB OUT.mp4`"
            seconds = float(len(self.entries) / rate)
            raise VideoError(
                f"is several files joined: its timestamps start again after {seconds:.3f} s; "
                f"re-encode it with new ones, {again}, and cut that at {seconds:.3f} s"
            )
        self._latest = pts if self._latest is None else max(self._latest, pts)

    def _note_size(self, packet: Packet) -> None:
        size_bytes = self.headers.size_bytes(packet) if packet.is_keyframe else b""
        is_other = bool(size_bytes) and size_bytes != self._size_bytes
        self.may_change_size = is_other or packet.has_sidedata("new_extradata")
        self._size_bytes = size_bytes or self._size_bytes

    def note_end(self, packet: Packet) -> None:
        if packet.size and packet.pts is not None and packet.time_base:
            self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))


def _candidates(container: InputContainer) -> list[VideoStream]:
    """The video streams that are not covers or thumbnails by what the container says."""
    return [stream for stream in container.streams.video if not stream.disposition & _COVER_FLAGS]


def _default_stream(container: InputContainer) -> VideoStream:
    """The stream that players show: the default one, then the largest, then the first; a lone picture only if alone."""
    streams = _candidates(container)
    if not streams:
        raise VideoError("has no video stream; remove it")
    return max(streams, key=_rank)


def _rank(stream: VideoStream) -> tuple[bool, bool, int]:
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    codec = stream.codec_context  # None without a decoder
    return stream.frames != 1, is_default, codec.height * codec.width if codec else 0


def _stream_at(container: InputContainer, place: int) -> VideoStream:
    return next(stream for stream in container.streams.video if stream.index == place)


def _check_decodable(container: InputContainer, stream: VideoStream) -> VideoStream:
    """A stream that can be decoded."""
    codec = stream.codec_context
    if codec is None:
        raise VideoError("no decoder for its codec; re-encode it as h264")
    if container.format.name in ("avi", "asf") and codec.name in ("h264", "hevc") and codec.has_b_frames:
        name = container.format.name
        raise VideoError(f"its B-frames have no timestamps in {name}; re-encode it: `ffmpeg -i IN OUT.mp4`")
    codec.thread_count = 1  # the workers are the parallel part
    return stream


def _check_not_joined(container: InputContainer) -> None:
    """Raises VideoError for files joined end to end of which FFmpeg reads one, or all as one clip."""
    at = second_file(container.name, container.format.name)
    if at is not None:
        parts = f"`head -c {at} IN > FIRST` and `tail -c +{at + 1} IN > SECOND`"
        raise VideoError(f"is several files joined: the second begins at byte {at}; cut it there: {parts}")


def _check_size_stays(packet: Packet, stream: VideoStream, packets: _PacketLog, first: VideoFrame) -> None:
    """Decodes a packet by itself. Raises VideoError for pictures of another size than the first."""
    decoder, size = stream.codec_context, (first.height, first.width)
    decoder.flush_buffers()
    with suppress(av.FFmpegError):  # damage is told when the frame is wanted
        for frame in [*decoder.decode(packet), *decoder.decode(None)]:
            if (frame.height, frame.width) != size:
                ticks = (packet.pts or 0) - (packets.keyframe or 0)
                raise size_change(frame, size, float(ticks * (stream.time_base or 1)))
    decoder.flush_buffers()


def _decode_or_raise(packet: Packet, decoder: VideoCodecContext) -> list[VideoFrame]:
    """What a decoder gives for a packet; its own complaints become VideoErrors, those of the machine pass."""
    try:
        return decoder.decode(packet)
    except av.FFmpegError as error:
        if isinstance(error, (OSError, MemoryError)):
            raise
        raise VideoError(f"is damaged: a packet does not decode ({error.strerror}); {AGAIN}") from error


def _check_complete(container: InputContainer, stream: VideoStream, packets: _PacketLog) -> None:
    """Raises VideoError if clearly less is there than the header promises."""
    num_there, num_promised = len(packets.entries), stream.frames  # avi and ivf count them
    if "mov" in container.format.name:  # the header of an mp4 lists every frame
        num_promised = sum(entry.size > 0 for entry in stream.index_entries)
    if container.format.name == "avi":
        num_there = 1 + packets.last_place
    if num_there < num_promised:
        raise _truncated(f"{num_there} of {num_promised} frames")
    if container.format.name == "gif" and not _ends_as_gif(container.name):
        raise _truncated(f"only {num_there} frames", copy="")
    if not container.format.name.startswith(_HAVE_DURATION) or not container.duration:
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
    fix = f"if it plays to the end its header is wrong, and `ffmpeg -i IN {copy}OUT.mp4` repairs it"
    return VideoError(f"is truncated: {there} are there; {fix}")


def _index(
    container: InputContainer, stream: VideoStream, packets: _PacketLog, size: tuple[int, int], stamp: tuple[int, int]
) -> PacketIndex:
    # mp4 and mkv store display times and are searched by them; the others by decoding time.
    stores_pts = container.format.name.startswith(("mov", "matroska"))
    entries, is_avi = packets.entries, container.format.name == "avi"
    labels: tuple[int, ...] = ()
    if packets.are_packed or (is_avi and any(entry.is_b for entry in entries)):
        places = [entry.dts for entry in entries] if is_avi else sorted(entry.pts for entry in entries)
        end = packets.last_place + 1 if is_avi else 2 * places[-1] - places[-2]
        labels = _display_times(places, [entry.is_b for entry in entries], end)
        entries = [entry._replace(pts=pts) for entry, pts in zip(entries, labels, strict=True)]
    keyframes = sorted((entry.pts, entry.pts if stores_pts else entry.dts) for entry in entries if entry.is_key)
    # What precedes the first keyframe in display order refers to frames that are not in the file.
    entries = [entry for entry in entries if keyframes and entry.pts >= keyframes[0][0]]
    if not any(entry.is_shown for entry in entries):
        raise VideoError(f"has no frames; {AGAIN}")
    shown, pictures = _frames_shown(entries, range(keyframes[0][0], packets.last_place + 1) if is_avi else ())
    is_counted = labels or container.format.name in _COUNT_FROM_START
    pts, seek_to = zip(*keyframes[: 1 if is_counted else None], strict=True)
    return PacketIndex(
        shown,
        pts,
        seek_to,
        Fraction(stream.time_base or 1),
        stores_pts,
        _is_closed(packets.entries),
        size,
        stamp,
        pictures,
        labels,
        stream.index,
        len(container.streams.video),
        _conversions(container, stream, packets),
    )


def _conversions(container: InputContainer, stream: VideoStream, packets: _PacketLog) -> tuple[str, ...]:
    is_first = stream.index == _candidates(container)[0].index
    chosen = () if is_first else (f"stream {stream.index}",)
    packed = ("packed b-frames",) if packets.are_packed else ()
    return chosen + packed + (("gradual keyframes",) if packets.has_gradual else ())


def _count_trailing_empty(path: str, stream: int, start: int) -> int:
    """How many packets of no bytes follow the last one of an avi, whose data start at this byte of the file."""
    num_empty, at = 0, start - 8
    with open(path, "rb") as file:
        while True:
            file.seek(at)
            name, size = file.read(4), int.from_bytes(file.read(4), "little")
            if not name[:2].isdigit() and name != b"JUNK":
                return num_empty
            num_empty += name[:2] == b"%02d" % stream and not size
            at += 8 + size + size % 2


def _display_times(places: Sequence[int], are_b: Sequence[bool], end: int) -> tuple[int, ...]:
    """Display times of pictures decoded at these times: one that B-frames may refer to is shown when the next comes."""
    labels = []
    for place, is_b in zip(reversed(places), reversed(are_b), strict=True):
        labels.append(place if is_b else end)
        end = end if is_b else place
    return tuple(reversed(labels))


def _frames_shown(entries: Sequence[_Entry], places: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """When something is shown, and the times of the pictures shown then: empty places repeat the picture before."""
    decoded = sorted({entry.pts for entry in entries if not entry.is_empty})
    times = {entry.pts for entry in entries if entry.is_shown}.union(places)
    shown = tuple(sorted(times))
    return shown, tuple(decoded[bisect_right(decoded, pts) - 1] for pts in shown)


def _is_closed(entries: Sequence[_Entry]) -> bool:
    keyframe = entries[0].pts
    for entry in entries:
        keyframe = entry.pts if entry.is_key else keyframe
        if entry.pts < keyframe:
            return False
    return True
