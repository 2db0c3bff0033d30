"""Reads the container of a video file: which frames it holds, when each is shown, and where decoding can start.

``open_video`` opens a file, ``scan`` reads all of its packets into a ``PacketIndex`` and decodes the first frame, and
``decode_packet`` decodes a packet and raises an error for damage. A packet is one compressed frame as the container
stores it. It has a decoding time (dts) and a presentation time (pts, when the frame is shown), both in units of the
stream's ``time_base`` seconds. Only keyframes can be decoded without the frames before them.

This module decides which container formats are read, derives timestamps that a format does not store, and refuses files
that are cut off or joined. It relies on PyAV; decode.py turns frames into pixels.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cogvideox.data.media.container.fields import FieldPairs
from cogvideox.data.media.container.joined import second_file
from cogvideox.data.media.container.keyframes import KeyframeHeaders
from cogvideox.data.media.container.mpeg4 import Unpacker
from cogvideox.data.media.container.picture import Picture
from cogvideox.data.media.faults import AGAIN, RE_ENCODE, VideoError, check_size, errors_naming
from cogvideox.data.media.frames import PacketIndex
from cogvideox.errors import plural

MAX_FRAMES = 200_000

# FFmpeg would also read playlists, which are text files that name other files of this machine. So formats are listed.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,ivf,h264,hevc,m4v"
# The headers of these formats store the duration. For mpegts, mpeg and ogg, FFmpeg derives a duration from the packets
# that it finds, so such a file that was cut off between two packets cannot be recognized.
_HAVE_DURATION = ("matroska", "flv", "asf")
# After a seek, FFmpeg counts the timestamps of these formats from where it starts to read: from an index that may lack
# a frame (avi), or from 0 (gif). So they are always read from the start.
_COUNT_FROM_START = ("avi", "gif")
# FFmpeg's own decoders of these codecs invent a picture from damaged data without an error; libvpx reports the damage.
_STRICT_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Containers also store thumbnails of clips and covers of audio files as video streams.
_COVER_FLAGS = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
# Arguments of av.open to read files whose metadata are not UTF-8. From version 19 on, PyAV always does so.
ANY_METADATA: dict[str, Any] = (
    {"metadata_errors": "surrogateescape"} if hasattr(InputContainer, "metadata_errors") else {}
)


@contextmanager
def open_video(
    path: str | os.PathLike[str], stream: int | None = None, *, known: bool = False
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a video file and yields the container and its video stream.

    Args:
        path: The file.
        stream: Index of the stream in the file. By default it is the one that players show.
        known: Skips FFmpeg's analysis of the codec, which takes about a tenth of the time of a clip. It may only be set
            for containers that store display times; in others it would change the timestamps.

    Raises:
        VideoError: The file cannot be read. Every error of the libraries inside the block becomes this error, too.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS} | ({"skip_frame": "all"} if known else {})
    # FFmpeg would take a relative name with a colon for a protocol, so the path is made absolute.
    name = os.path.abspath(path)
    with (
        errors_naming(path, av.FFmpegError, EOFError),
        av.open(name, options=options, **ANY_METADATA) as file,
    ):
        video = _default_stream(file) if stream is None else _stream_at(file, stream)
        yield file, _check_decodable(file, video)


def scan(container: InputContainer, stream: VideoStream, stamp: tuple[int, int]) -> tuple[PacketIndex, VideoFrame]:
    """Reads all packets of a container that has just been opened, and decodes the first frame.

    Args:
        container: The open file, of which nothing has been read.
        stream: The video stream that is used.
        stamp: What ``existing_stamp`` returned before the file was opened.

    Returns:
        The timestamps of the video, and its first frame.

    Raises:
        VideoError: The file is damaged, cut off, joined from several files, or changes the size of its pictures.
    """
    check_size(stream.height, stream.width)
    _check_not_joined(container)
    codec = stream.codec_context
    packets = _PacketLog(KeyframeHeaders(codec.codec.canonical_name, codec.extradata or b""))
    first: VideoFrame | None = None
    unpack, start = unpacker(stream), 0
    for packet in demuxed(container):
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
        packets.last_dts = packets.entries[-1].dts + _count_trailing_empty(container.name, stream.index, start)
    _check_complete(container, stream, packets)
    if not packets.entries:
        raise VideoError(f"has no frames; {AGAIN}")
    if first is None:
        raise VideoError(f"has no frame that decodes; {AGAIN}")
    return _index(container, stream, packets, (first.height, first.width), stamp), first


def demuxed(container: InputContainer, *streams: VideoStream) -> Iterator[Packet]:
    """Yields the packets of some streams, by default of all, and at the end of the file an empty one for each stream.

    Streams of mpeg, mpegts and flv may begin late, such as subtitles. If there is one that PyAV did not find when it
    opened the file, PyAV may raise IndexError after all these packets.
    """
    with suppress(IndexError):
        yield from container.demux(*streams)


def unpacker(stream: VideoStream) -> Callable[[Packet], Iterator[Picture]]:
    """Returns a function that yields the pictures of each packet of a stream.

    It must be called with all packets in their order, including the empty one at the end.
    """
    codec = stream.codec_context
    if codec.name == "mpeg4":
        in_avi = stream.container.format.name == "avi"
        return Unpacker(codec.extradata or b"", in_avi, Fraction(stream.average_rate or 24))
    return FieldPairs(codec.extradata or b"") if codec.name == "h264" else _one_picture


def _one_picture(packet: Packet) -> Iterator[Picture]:
    yield Picture(packet, is_empty=not packet.size)


def strict_decoder(stream: VideoStream) -> VideoCodecContext:
    """Returns a decoder for a stream that reports damage. Its frames may lack the rotation tag."""
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
    """Decodes a packet and yields the frames that come out, which may belong to earlier packets.

    Args:
        packet: The packet. An empty packet without a decoding time flushes the decoder.
        decoder: The decoder, which keeps the frames that later ones refer to.
        keyframe: Presentation time of the keyframe at which decoding started.

    Raises:
        VideoError: The packet or one of the frames is damaged.
    """
    # An empty packet with a time is a dropped frame. A decoder would take it for the end of the stream.
    if not packet.size and packet.dts is not None:
        return
    if packet.is_corrupt:
        raise VideoError(f"is damaged: a packet is incomplete; {AGAIN}")
    for frame in _decode_or_raise(packet, decoder):
        # Frames that are shown before the keyframe but stored after it lack the frames that they refer to. No caller
        # needs them: they are decoded from an earlier keyframe, or are not among the shown frames.
        if frame.pts is None or frame.pts < keyframe:
            continue
        # Later frames may refer to any other damaged frame, so none of them can be trusted.
        if frame.is_corrupt:
            raise VideoError(f"is damaged: the frame at {frame.time:.3f} s does not decode; {AGAIN}")
        yield frame


def size_change(frame: VideoFrame, size: tuple[int, int], seconds: float) -> VideoError:
    """Returns the error for a frame whose size differs from that of the first frame.

    Args:
        frame: The frame with the other size.
        size: Height and width of the first frame, in pixels.
        seconds: When the frame is shown, counted from the first one.
    """
    first = f"but the first one is {size[1]}x{size[0]}"
    sizes = f"its picture at {seconds:.3f} s is {frame.width}x{frame.height}, {first}"
    return VideoError(f"changes size: {sizes}; cut it there: `ffmpeg -i IN -t {seconds:.3f} OUT.mp4`")


def existing_stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns the stamp of a file that must exist: its size in bytes and its modification time in nanoseconds.

    A changed stamp shows that the file was replaced. ``files.stamp_of`` returns the same for files that may be missing.

    Raises:
        VideoError: There is no such file.
        OSError: The file system or the machine refuses access.
    """
    with errors_naming(path):
        status = os.stat(path)
    return status.st_size, status.st_mtime_ns


class _Entry(NamedTuple):
    """Describes one picture of the video by its times, in units of the stream's time base, and its kind."""

    pts: int
    dts: int
    is_key: bool
    is_shown: bool
    is_b: bool
    is_empty: bool


@dataclass
class _PacketLog:
    """Collects what the packets of a file say, in the order of the file.

    Attributes:
        headers: Reads the bytes of keyframes.
        entries: One entry for each picture of the video.
        end: Seconds at which the last packet of any stream ends.
        keyframe: Presentation time of the first keyframe; None until it is found.
        start: Presentation time of the first picture that can be decoded: that of the first keyframe, or earlier, if
            pictures that are stored after it are shown before it and refer to nothing before it.
        are_packed: Whether a packet held several pictures.
        last_dts: Decoding time of the last packet of an avi file, which may be empty; 0 for other formats.
        has_gradual: Whether there are keyframes at which decoding must not start (see ``KeyframeHeaders``).
        num_second_fields: Packets that only complete the picture before them, which have no entry.
        may_change_size: Whether the picture that was added last may have another size than those before it.
    """

    headers: KeyframeHeaders
    entries: list[_Entry] = field(default_factory=list)
    end: float = 0.0
    keyframe: int | None = None
    start: int = 0
    are_packed: bool = False
    last_dts: int = 0
    has_gradual: bool = False
    num_second_fields: int = 0
    may_change_size: bool = False
    _leads: bool = False
    _size_bytes: bytes = b""
    _latest: int | None = None
    _latest_before_keyframe: int | None = None

    def add(self, picture: Picture, stream: VideoStream) -> None:
        """Adds a picture. Raises VideoError for timestamps that are missing or start again, and for too many frames."""
        packet = picture.packet
        if not packet.size and packet.dts is None:  # the end of the file
            return
        if picture.is_second_field:
            self.num_second_fields += 1
            self.may_change_size = False
            return
        if packet.pts is None:
            raise VideoError("its packets have no timestamps; re-encode it as h264 in mp4")
        size_bytes, is_gradual = self.headers.read(packet) if packet.is_keyframe else (b"", False)
        is_key = packet.is_keyframe and not is_gradual and not picture.is_empty
        self._check_time(packet.pts, is_key, stream)
        self._note_size(packet, size_bytes)
        dts = packet.pts if packet.dts is None else min(packet.pts, packet.dts)
        self.entries.append(_Entry(packet.pts, dts, is_key, not packet.is_discard, picture.is_b, picture.is_empty))
        self.are_packed |= picture.was_packed
        self.has_gradual |= is_gradual
        if self.keyframe is None and is_key:
            self.keyframe = self.start = packet.pts
            self._leads = self.headers.leads(packet)
        elif is_key:
            self._leads = False
        elif self._leads:
            self.start = min(self.start, packet.pts)
        if len(self.entries) > MAX_FRAMES:
            parts = "`ffmpeg -i IN -c copy -f segment -segment_time 1800 -reset_timestamps 1 OUT%02d.mkv`"
            raise VideoError(f"has more than {MAX_FRAMES} frames; cut it into parts: {parts}")

    def _check_time(self, pts: int, is_key: bool, stream: VideoStream) -> None:
        """Raises VideoError where timestamps start again, as they do in files that were joined end to end.

        A frame may be shown before frames that are stored before it, but not before frames of an earlier keyframe.
        """
        if is_key:
            self._latest_before_keyframe = self._latest
        if self._latest_before_keyframe is not None and pts < self._latest_before_keyframe:
            rate = Fraction(stream.average_rate or 24)
            again = f"`ffmpeg -i IN -an -vf 'setpts=N/({rate})/TB' OUT.mp4`"
            seconds = float(len(self.entries) / rate)
            raise VideoError(
                f"consists of several joined files: its timestamps start again after {seconds:.3f} s; "
                f"re-encode it with new timestamps, {again}, and cut the result at {seconds:.3f} s"
            )
        self._latest = pts if self._latest is None else max(self._latest, pts)

    def _note_size(self, packet: Packet, size_bytes: bytes) -> None:
        """Compares the headers of a keyframe with those of the one before it."""
        is_other = bool(size_bytes) and size_bytes != self._size_bytes
        self.may_change_size = is_other or packet.has_sidedata("new_extradata")
        self._size_bytes = size_bytes or self._size_bytes

    def note_end(self, packet: Packet) -> None:
        """Updates the end of the file from a packet of any stream."""
        if packet.size and packet.pts is not None and packet.time_base:
            self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))


def _candidates(container: InputContainer) -> list[VideoStream]:
    """Returns the video streams that the container does not mark as covers or thumbnails."""
    return [stream for stream in container.streams.video if not stream.disposition & _COVER_FLAGS]


def _default_stream(container: InputContainer) -> VideoStream:
    """Returns the stream that players show: the default one, else the largest, else the first.

    A stream of a single picture is only chosen if there is no other.
    """
    streams = _candidates(container)
    if not streams:
        raise VideoError("has no video stream; remove it")
    return max(streams, key=_rank)


def _rank(stream: VideoStream) -> tuple[bool, bool, int]:
    """Returns a sort key; the stream with the largest one is shown."""
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    codec = stream.codec_context  # None if FFmpeg has no decoder for it
    return stream.frames != 1, is_default, codec.height * codec.width if codec else 0


def _stream_at(container: InputContainer, index: int) -> VideoStream:
    """Returns the video stream with an index among all streams of the file."""
    return next(stream for stream in container.streams.video if stream.index == index)


def _check_decodable(container: InputContainer, stream: VideoStream) -> VideoStream:
    """Returns a stream for decoding. Raises VideoError without a decoder, and for B-frames without timestamps."""
    codec = stream.codec_context
    if codec is None:
        raise VideoError("has a codec for which there is no decoder; re-encode it as h264")
    if container.format.name in ("avi", "asf") and codec.name in ("h264", "hevc") and codec.has_b_frames:
        name = container.format.name
        raise VideoError(f"its B-frames have no timestamps in {name}; {RE_ENCODE}")
    codec.thread_count = 1  # files are decoded in parallel by several worker processes already
    return stream


def _check_not_joined(container: InputContainer) -> None:
    """Raises VideoError for files that were joined end to end.

    FFmpeg would read only the first of them, or all of them as one clip.
    """
    at = second_file(container.name, container.format.name)
    if at is not None:
        parts = f"`head -c {at} IN > FIRST` and `tail -c +{at + 1} IN > SECOND`"
        raise VideoError(f"consists of several joined files: the second begins at byte {at}; cut it there: {parts}")


def _check_size_stays(packet: Packet, stream: VideoStream, packets: _PacketLog, first: VideoFrame) -> None:
    """Decodes a keyframe on its own. Raises VideoError if its size differs from that of the first frame."""
    decoder, size = stream.codec_context, (first.height, first.width)
    decoder.flush_buffers()
    with suppress(av.FFmpegError):  # damage is only an error once the frame is needed
        for frame in [*decoder.decode(packet), *decoder.decode(None)]:
            if (frame.height, frame.width) != size:
                ticks = (packet.pts or 0) - (packets.keyframe or 0)
                raise size_change(frame, size, float(ticks * (stream.time_base or 1)))
    decoder.flush_buffers()


def _decode_or_raise(packet: Packet, decoder: VideoCodecContext) -> list[VideoFrame]:
    """Decodes a packet. Raises VideoError for damaged data; errors of the operating system pass unchanged."""
    try:
        return decoder.decode(packet)
    except av.FFmpegError as error:
        if isinstance(error, (OSError, MemoryError)):
            raise
        raise VideoError(f"is damaged: a packet does not decode ({error.strerror}); {AGAIN}") from error


def _check_complete(container: InputContainer, stream: VideoStream, packets: _PacketLog) -> None:
    """Raises VideoError if the file holds clearly less than its header says, because it was cut off."""
    num_found = len(packets.entries) + packets.num_second_fields
    num_promised = stream.frames  # the headers of avi and ivf count the frames
    if "mov" in container.format.name:  # the header of an mp4 lists every frame
        num_promised = sum(entry.size > 0 for entry in stream.index_entries)
    if container.format.name == "avi":
        num_found = 1 + packets.last_dts
    if num_found < num_promised:
        raise _truncated(f"{num_found} of {plural(num_promised, 'frame')}")
    if container.format.name == "gif" and not _ends_as_gif(container.name):
        raise _truncated(f"only {plural(num_found, 'frame')}", copy="")
    if not container.format.name.startswith(_HAVE_DURATION) or not container.duration:
        return
    # Any stream may be the longest, so packets.end counts all of them. The tolerance is two frames, or 0.1 s, because
    # timestamps are rounded and few containers say how long the last packet lasts.
    promised = container.duration / av.time_base
    if packets.end + max(0.1, 2 * packets.end / max(1, num_found)) < promised:
        raise _truncated(f"{packets.end:.2f} of {promised:.2f} s")


def _ends_as_gif(path: str) -> bool:
    """Returns whether a gif ends with its end mark.

    Without it the file was cut off, which decoders hide: they fill in the rest of the picture.
    """
    with open(path, "rb") as file:
        file.seek(-min(1024, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read().rstrip(b"\0").endswith(b"\0;")


def _truncated(rest: str, copy: str = "-c copy ") -> VideoError:
    """Returns the error for a file that was cut off.

    Args:
        rest: How much of the file is left.
        copy: Options of the ffmpeg command that repairs the header.
    """
    fix = f"if it plays to the end, its header is wrong, and `ffmpeg -i IN {copy}OUT.mp4` repairs it"
    return VideoError(f"is truncated: it holds {rest}; {fix}")


def _index(
    container: InputContainer, stream: VideoStream, packets: _PacketLog, size: tuple[int, int], stamp: tuple[int, int]
) -> PacketIndex:
    """Returns the timestamps of the frames that are shown, and of the keyframes.

    Raises:
        VideoError: No frame can be shown.
    """
    # mp4 and mkv store display times and are searched by them. All other formats are searched by decoding time.
    stores_pts = container.format.name.startswith(("mov", "matroska"))
    entries, is_avi = packets.entries, container.format.name == "avi"
    labels: tuple[int, ...] = ()
    if packets.are_packed or (is_avi and any(entry.is_b for entry in entries)):
        # Such pictures have no display times, so those are derived from the order in which they are decoded.
        decode_times = [entry.dts for entry in entries] if is_avi else sorted(entry.pts for entry in entries)
        end = packets.last_dts + 1 if is_avi else 2 * decode_times[-1] - decode_times[-2]
        labels = _display_times(decode_times, [entry.is_b for entry in entries], end)
        entries = [entry._replace(pts=pts) for entry, pts in zip(entries, labels, strict=True)]
    keyframes = sorted((entry.pts, entry.pts if stores_pts else entry.dts) for entry in entries if entry.is_key)
    if packets.start != packets.keyframe and keyframes:
        keyframes[0] = packets.start, keyframes[0][1]
    # Frames that are shown earlier refer to frames that are not in the file.
    entries = [entry for entry in entries if keyframes and entry.pts >= keyframes[0][0]]
    if not any(entry.is_shown for entry in entries):
        raise VideoError(f"has no frames; {AGAIN}")
    shown, pictures = _frames_shown(entries, range(keyframes[0][0], packets.last_dts + 1) if is_avi else ())
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
        _packet_conversions(container, stream, packets),
    )


def _packet_conversions(container: InputContainer, stream: VideoStream, packets: _PacketLog) -> tuple[str, ...]:
    """Returns the names of what is done to the packets of this file that a plain reader does not do."""
    is_first = stream.index == _candidates(container)[0].index
    chosen = () if is_first else (f"stream {stream.index}",)
    packed = ("packed b-frames",) if packets.are_packed else ()
    fields = ("fields",) if packets.num_second_fields else ()
    return chosen + packed + fields + (("gradual keyframes",) if packets.has_gradual else ())


def _count_trailing_empty(path: str, stream: int, start: int) -> int:
    """Counts the empty packets at the end of an avi file, which repeat its last frame and which FFmpeg leaves out.

    Args:
        path: The file.
        stream: Index of the video stream.
        start: Offset in bytes of the data of the last packet that FFmpeg returns.
    """
    num_empty, at = 0, start - 8
    with open(path, "rb") as file:
        while True:
            file.seek(at)
            name, size = file.read(4), int.from_bytes(file.read(4), "little")
            if not name[:2].isdigit() and name != b"JUNK":
                return num_empty
            num_empty += name[:2] == b"%02d" % stream and not size
            at += 8 + size + size % 2


def _display_times(decode_times: Sequence[int], are_b: Sequence[bool], end: int) -> tuple[int, ...]:
    """Derives the display times of pictures from the times at which they are decoded.

    A B-frame is shown as soon as it is decoded. Any other picture is shown when the next such picture is decoded,
    because B-frames that are shown before it may refer to it.

    Args:
        decode_times: Decoding times, increasing.
        are_b: Whether each picture is a B-frame.
        end: Display time of the last picture that is not a B-frame.
    """
    labels = []
    for decode_time, is_b in zip(reversed(decode_times), reversed(are_b), strict=True):
        labels.append(decode_time if is_b else end)
        end = end if is_b else decode_time
    return tuple(reversed(labels))


def _frames_shown(entries: Sequence[_Entry], more_times: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the times at which frames are shown, and for each the time of the picture that is shown then.

    The two differ where a frame was dropped: then the picture before it is shown again.

    Args:
        entries: The pictures of the video.
        more_times: Further times at which a frame is shown, even if no picture is stored for them.
    """
    decoded = sorted({entry.pts for entry in entries if not entry.is_empty})
    times = {entry.pts for entry in entries if entry.is_shown}.union(more_times)
    shown = tuple(sorted(times))
    return shown, tuple(decoded[bisect_right(decoded, pts) - 1] for pts in shown)


def _is_closed(entries: Sequence[_Entry]) -> bool:
    """Returns whether no frame is stored after a keyframe and shown before it."""
    keyframe = entries[0].pts
    for entry in entries:
        keyframe = entry.pts if entry.is_key else keyframe
        if entry.pts < keyframe:
            return False
    return True
