"""Decodes video files and still pictures: a description of a file, the pixels of chosen frames, and mp4 output.

``probe`` returns a ``VideoInfo``, ``read_frames`` the pixels of the frames that are asked for, and ``write_video``
writes an mp4 file. A caller names frames by their index in display order, counting only frames that are shown (edit
lists of mp4 files are respected). Inside, a frame is identified by its timestamp, so that seeking returns the exact
frame or an error, and never a neighbor.

Damaged frames are decoded again from earlier keyframes before they count as an error. Nothing here imports torch, so
that decode workers need little memory. Shape suffixes: F frames, H height, W width, C color channels.
"""

import functools
import itertools
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from cogvideox.data.media.colors.alpha import is_transparent, on_black
from cogvideox.data.media.colors.planes import EXACT_SCALING, plane_array
from cogvideox.data.media.colors.sdr import UNSPECIFIED, ColorTags, SdrConverter
from cogvideox.data.media.container.packets import (
    decode_packet,
    demuxed,
    existing_stamp,
    open_video,
    scan,
    size_change,
    strict_decoder,
    unpacker,
)
from cogvideox.data.media.faults import AGAIN, RE_ENCODE, VideoError, check_size, errors_naming
from cogvideox.data.media.frames import ON_BLACK, PacketIndex, VideoInfo
from cogvideox.data.media.pixels.decord_reader import read_with_decord
from cogvideox.data.media.pixels.pictures import is_picture, probe_picture, read_picture
from cogvideox.files import (
    disk_errors_converted,
    fsync,
    is_lfs_pointer,
    lfs_rule,
    removed_on_failure,
    stamp_of,
    temporary_of,
)

# Once this many undamaged frames were decoded, a later damaged one cannot be caused by frames missing before the start:
# a frame of h264 and hevc refers to at most 16 frames, and at most 16 are decoded before they are shown.
_MAX_REFERENCES = 32

# PyAV raises ValueError for all side data of a frame, and thus for its rotation, if it does not know the type of one of
# them, such as EXIF in motion JPEG or the view of a spatial video. Unknown types count as one that is never read here.
SideDataType._missing_ = classmethod(lambda kinds, _: kinds.SEI_UNREGISTERED)  # type: ignore[method-assign,assignment]


class _NeedsEarlierKeyframe(VideoError):
    """Signals a missing or damaged frame that may decode without error from an earlier keyframe."""


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describes a video or a still picture: times of the frames, size, rotation, codec and colors.

    All packets of a video are read, and its first frame is decoded, because only a decoded frame has the rotation.

    Raises:
        VideoError: The file cannot be used, with the reason and a fix in one line.
        OSError: The file system or the machine refuses, though the file may be fine.
    """
    stamp = existing_stamp(path)
    if stamp[0] == 0:
        raise VideoError(f"{path}: is empty; download it again")
    if is_lfs_pointer(path, stamp[0]):
        raise VideoError(f"{path}: {lfs_rule()}")
    if is_picture(path):
        return probe_picture(path)
    with open_video(path) as (container, stream):
        container_tags = ColorTags.of(stream.codec_context)  # read now, because decoding overwrites them
        index, frame = scan(container, stream, stamp)
        tags = ColorTags.of(frame).filled(container_tags)
        tags.check(stream.codec_context.codec_tag)
        rotation = _rotation(frame)
        height, width = _shown_size(frame, stream, rotation)
        check_size(height, width)
        times = tuple(float((pts - index.pts[0]) * index.time_base) for pts in index.pts)
        codec = stream.codec_context.codec.canonical_name
        transparency = (ON_BLACK,) if is_transparent(path, stream, frame) else ()
        conversions = (*index.conversions, *transparency, *tags.conversions())
        rate, assumed = float(stream.average_rate or 0), tags.lacks_matrix(frame.format)
        return VideoInfo(times, height, width, rotation, codec, rate, index, conversions, tags.matrix, assumed)


def probe_once(path: str | os.PathLike[str]) -> VideoInfo:
    """Returns what ``probe`` returns, without reading the file again if it was the last one and has not changed.

    Scenes of a long video follow each other, so a process reads its packets once for all of them.
    """
    return _probe_once(str(path), tuple(stamp_of(path)))


@functools.lru_cache(maxsize=1)
def _probe_once(path: str, _stamp: tuple[int, ...]) -> VideoInfo:
    return probe(path)


def read_frames(
    path: str | os.PathLike[str],
    info: VideoInfo,
    indices: Sequence[int],
    height: int,
    width: int,
    reader: str = "pyav",
) -> np.ndarray:
    """Returns chosen frames, upright, in RGB, and resized to height x width without keeping the aspect ratio.

    Args:
        path: The file.
        info: What ``probe`` returned for this file.
        indices: The frames in display order, counted from 0; any order, and repeats are allowed.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        reader: "pyav", or "decord" for videos (see decord_reader.py).

    Returns:
        uint8 array of shape (F, height, width, 3) with the frames in the order of the indices.

    Raises:
        VideoError: A frame is damaged or missing, or the file has changed since it was probed.
    """
    if any(not 0 <= index < info.num_frames for index in indices):
        raise VideoError(
            f"{path}: frame indices must be in 0 ... {info.num_frames - 1}, got {min(indices)} ... {max(indices)}"
        )
    if info.packets is None:
        return read_picture(path, info, len(indices), height, width)
    if existing_stamp(path) != info.packets.stamp:
        raise VideoError(f"{path}: has changed since it was probed; start again")
    read = read_with_decord if reader == "decord" else _read_with_pyav
    return read(path, info, indices, height, width)


def write_video(path: str | os.PathLike[str], frames_FHWC: np.ndarray, fps: float, *, crf: int = 18) -> None:
    """Writes frames as h264 in an mp4 file, under a temporary name until it is complete.

    Odd sizes are made even by repeating the last row or column, because yuv420p stores one color for 2 x 2 pixels.

    Args:
        path: The file to write.
        frames_FHWC: RGB frames as uint8 of shape (F, H, W, 3).
        fps: Frames per second.
        crf: Quality of x264; 0 is lossless, and larger numbers give smaller files.

    Raises:
        ValueError: The array has another type or shape, or is empty.
        DiskError: The disk is full, fails, or denies access.
    """
    if frames_FHWC.dtype != np.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[3] != 3 or not frames_FHWC.size:
        raise ValueError(f"frames must be uint8 (F, H, W, 3), got {frames_FHWC.dtype} {frames_FHWC.shape}")
    _, height, width, _ = frames_FHWC.shape
    even_FHWC = np.pad(frames_FHWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    path = Path(path)
    temporary = temporary_of(path)
    with disk_errors_converted(path.parent), removed_on_failure(temporary):
        _encode(temporary, even_FHWC, fps, crf)
        fsync(temporary)
        os.replace(temporary, path)


def _read_with_pyav(
    path: str | os.PathLike[str], info: VideoInfo, indices: Sequence[int], height: int, width: int
) -> np.ndarray:
    assert info.packets is not None
    # For each timestamp to decode, the positions in the result that it fills: a frame may be asked for several times.
    positions: dict[int, list[int]] = {}
    for position, source in enumerate(indices):
        positions.setdefault(info.packets.pictures[source], []).append(position)
    frames_FHWC = np.empty((len(indices), height, width, 3), np.uint8)
    scaler, to_sdr, missing = VideoReformatter(), SdrConverter(info.conversions), set(positions)
    for frame in _frames_at(path, info.packets, sorted(positions)):
        assert frame.pts is not None
        first, *others = positions[frame.pts]
        if frame.colorspace == UNSPECIFIED:
            frame.colorspace = info.matrix
        with errors_naming(path, av.FFmpegError):  # FFmpeg may not know how to convert the pixels
            _write_pixels(scaler, to_sdr, frame, info.rotation, frames_FHWC[first])
        frames_FHWC[others] = frames_FHWC[first]
        missing.discard(frame.pts)
    assert not missing
    return frames_FHWC


def _frames_at(path: str | os.PathLike[str], index: PacketIndex, wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """Yields the frames with the wanted timestamps, which increase.

    If a frame fails, decoding starts again at an earlier keyframe, and frames since the failed one's keyframe are
    yielded a second time. The caller keeps the second one, because the first may be wrong without an error.
    """
    num_done = 0
    try:
        with open_video(path, index.stream, known=index.stores_pts) as (container, stream):
            for frame in _decode(container, stream, index, wanted):
                yield frame
                num_done += 1
        return
    except VideoError:
        keyframe = index.keyframe_before(wanted[num_done])
    left = wanted[bisect_left(wanted, index.keyframes[keyframe]) :]
    yield from _from_earlier_keyframes(path, index, left, max(0, keyframe - 1))


def _from_earlier_keyframes(
    path: str | os.PathLike[str], index: PacketIndex, wanted: Sequence[int], latest: int
) -> Iterator[VideoFrame]:
    """Yields the wanted frames, decoded without seeking from a keyframe, or where that fails from ever earlier ones.

    This covers containers whose seek ends at a later keyframe than asked for, codecs that need the analysis which
    ``known`` skips, and keyframes that need frames before them. A start that is too late fails within a few frames, so
    trying one keyframe after the other costs little, and only as much of a long file is decoded as needed.

    Args:
        path: The file.
        index: The timestamps of the file.
        wanted: Timestamps of the frames, increasing.
        latest: Index in ``index.keyframes`` of the keyframe to try first; the others to try are earlier.
    """
    for start in range(latest, -1, -1):
        try:
            with open_video(path, index.stream) as (container, stream):
                yield from _decode(container, stream, index, wanted, start)
            return
        except _NeedsEarlierKeyframe:
            if start == 0:
                raise


def _decode(
    container: InputContainer, stream: VideoStream, index: PacketIndex, wanted: Sequence[int], start: int | None = None
) -> Iterator[VideoFrame]:
    """Yields the wanted frames of a container that has just been opened.

    Args:
        container: The open file.
        stream: Its video stream.
        index: The timestamps of the file.
        wanted: Timestamps of the frames, increasing.
        start: Index in ``index.keyframes`` of the keyframe from which all frames are decoded. By default each frame is
            decoded from the last keyframe before it, with a seek only where another keyframe comes after the frame
            that was decoded last.
    """
    last = index.keyframes[0]
    decoder = strict_decoder(stream)
    run = _DecodeRun(_frames(container, stream, decoder, last, index.labels))
    for number, pts in enumerate(wanted):
        keyframe = index.keyframe_before(pts) if start is None else start
        if index.keyframes[keyframe] > last:
            if number == 0:
                # Old versions of x264 had bugs that decoders work around, but only the first packet may tell the
                # version. So it is decoded before the first seek.
                run.begin()
            container.seek(index.seek_to[keyframe], stream=stream)
            decoder.flush_buffers()
            run = _DecodeRun(_frames(container, stream, decoder, index.keyframes[keyframe]))
        yield run.frame_at(pts, index)
        last = pts


class _DecodeRun:
    """Decodes frames one after the other from a keyframe, and counts the undamaged ones."""

    def __init__(self, frames: Iterator[VideoFrame]) -> None:
        self._frames = frames
        self._num_undamaged = 0

    def begin(self) -> None:
        """Decodes and drops the first frame, from which the decoder learns about the file."""
        next(self._frames, None)

    def frame_at(self, pts: int, index: PacketIndex) -> VideoFrame:
        """Decodes up to the frame with a timestamp and returns it.

        Raises:
            _NeedsEarlierKeyframe: The frame is damaged or missing, and decoding from an earlier keyframe may help.
            VideoError: It is damaged or missing in the file itself.
        """
        try:
            for frame in self._frames:
                assert frame.pts is not None
                if (frame.height, frame.width) != index.size:
                    raise size_change(frame, index.size, float((frame.pts - index.pts[0]) * index.time_base))
                self._num_undamaged += 1
                if frame.pts == pts:
                    return frame
                if frame.pts > pts:
                    break
            raise VideoError(f"decode failed near frame {bisect_left(index.pts, pts)} of {len(index.pts)}; {AGAIN}")
        except VideoError as error:
            has_all = self._num_undamaged > _MAX_REFERENCES
            raise (VideoError if has_all else _NeedsEarlierKeyframe)(str(error)) from error


def _frames(
    container: InputContainer,
    stream: VideoStream,
    decoder: VideoCodecContext,
    keyframe: int,
    labels: Sequence[int] = (),
) -> Iterator[VideoFrame]:
    """Yields the frames that a container gives from its current position on, in display order.

    Args:
        container: The open file.
        stream: Its video stream.
        decoder: The decoder of the stream.
        keyframe: Presentation time of the keyframe at which decoding starts.
        labels: Presentation times of all pictures from here on, where they differ from those of the packets.
    """
    pictures = itertools.chain.from_iterable(map(unpacker(stream), demuxed(container, stream)))
    for picture, label in itertools.zip_longest(pictures, labels):
        if picture is None:
            return
        if label is not None:
            picture.packet.pts = label
        yield from decode_packet(picture.packet, decoder, keyframe)


def _write_pixels(
    scaler: VideoReformatter, to_sdr: SdrConverter, frame: VideoFrame, rotation: int, out_HWC: np.ndarray
) -> None:
    """Converts a decoded frame to RGB, resizes it, and writes it upright into uint8 (height, width, 3)."""
    height, width = out_HWC.shape[:2] if rotation % 180 == 0 else out_HWC.shape[1::-1]
    frame = on_black(frame)
    # Averaging prevents flicker of fine patterns in a shrunk video, but would show blocks in an enlarged one.
    shrinks = height <= frame.height and width <= frame.width
    method = Interpolation.AREA if shrinks else Interpolation.BICUBIC
    # With the exact flags, swscale takes twice as long for packed RGB (rgb24) as for RGB in planes (gbrp).
    shown = to_sdr(frame, height, width)
    picture = scaler.reformat(shown, width, height, "gbrp", interpolation=method | EXACT_SCALING, threads=1)
    for plane, channel in zip(picture.planes, (1, 2, 0), strict=True):
        out_HWC[..., channel] = np.rot90(plane_array(plane), rotation // 90)


def _rotation(frame: VideoFrame) -> int:
    """Returns by how many degrees counter-clockwise a frame must be turned to be upright: 0, 90, 180 or 270."""
    side_data: Any = frame.side_data
    if "DISPLAYMATRIX" not in side_data:
        return 0
    a, b, _, c, d = struct.unpack_from("=5i", bytes(side_data["DISPLAYMATRIX"]))
    if a * d - b * c < 0:
        raise VideoError(f"is mirrored by its display matrix; {RE_ENCODE}")
    if frame.rotation % 90:
        raise VideoError(f"is rotated by {frame.rotation} degrees; only 90, 180 and 270 are supported; {RE_ENCODE}")
    return frame.rotation % 360


def _shown_size(frame: VideoFrame, stream: VideoStream, rotation: int) -> tuple[int, int]:
    """Returns height and width of the upright picture, in square pixels."""
    width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
    return (width, frame.height) if rotation % 180 else (frame.height, width)


@functools.cache
def _reproducible_options() -> dict[str, object]:
    """Returns the options with which x264 always makes the same file from the same frames.

    Its code for AVX-512 reads uninitialized memory, so it is limited to AVX2.
    """
    features = Path("/proc/cpuinfo")
    return {"x264-params": "asm=avx2"} if features.exists() and "avx512" in features.read_text() else {}


def _encode(path: Path, frames_FHWC: np.ndarray, fps: float, crf: int) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf)} | _reproducible_options()
        # Players guess the color matrix of untagged files from the size of the picture, so all tags are written.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
        context.color_range = av.video.reformatter.ColorRange.MPEG
        for frame_HWC in frames_FHWC:
            picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            coded = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=Interpolation.AREA | EXACT_SCALING
            )
            container.mux(stream.encode(coded))
        container.mux(stream.encode())
