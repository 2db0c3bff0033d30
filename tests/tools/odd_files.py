"""Makes unusual and damaged media files, and defines for each what reading it must return.

A ``Case`` makes a file at a path and says which numbered pictures reading must return, upright and in order, or what
the error line must say. ``SECTIONS`` holds all cases. `python tests/tools/odd_files.py --write` writes the table
docs/odd_files.md from them, and tests/data/test_odd_files.py checks the cases and the table.
"""

import argparse
import functools
import io
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("training", "tests/shared")]

from fields import field_coded
from hdr import VP9, dolby_vision_8_4, tagged_by_container, video
from numbered import (
    COUNT,
    HEIGHT,
    RATE,
    VPX,
    WIDTH,
    X264,
    X265,
    add_stream,
    encode,
    number_in,
    picture,
    pictures,
    plain,
    remux,
    silence,
    written,
)
from old_avi import B_FRAMES, dropped, dropped_by_encoder, packed, repeated

from cogvideox.config.buckets import Bucket
from cogvideox.data.clips import ClipRecipe, bad_line, decode_variant, plan_clip
from cogvideox.data.records import FAILED, OK

TABLE = Path(__file__).parents[2] / "docs" / "odd_files.md"
# They show the numbered pictures. They are stored, because no wheel has an encoder for Theora or VVC.
THEORA = Path(__file__).parents[1] / "samples" / "theora.ogv"
VVC = Path(__file__).parents[1] / "samples" / "vvc.mp4"
SIZE = (48, 64)  # of the clips: height, width
CLIP_FRAMES, CLIP_RATE = 9, 8
MIDDLE = tuple(range(4, 29, 3))  # 9 frames at 8 fps from the middle of 36 frames at 24 fps
REPEATED = tuple(repeated(number) for number in MIDDLE)
BEFORE = "decoded from the keyframe that is stored before them"
REPEATS = "dropped frames repeat the frame before them"
ONE_START = "decoded from the only keyframe that refers to no other frame"

RAISES = "raises"  # the status of an outcome that is always wrong: reading raised an error

MakeFile = Callable[[Path], object]
MakeBytes = Callable[[], bytes]


@dataclass(frozen=True)
class Case:
    """Describes one file and the expected result of reading it.

    Attributes:
        name: Name of the file.
        make: Makes the file at a path.
        numbers: Numbers of the pictures that must be returned; empty if an error line is expected.
        line: Regular expression that the error line must match.
        num_frames: Frames of the bucket with which the file is planned.
        gray: Whether the pictures are gray.
        note: Remark about the result, for the table.
        stream: Which video stream of the file must be read.
    """

    name: str
    make: MakeFile
    numbers: tuple[int, ...] = MIDDLE
    line: str = ""
    num_frames: int = CLIP_FRAMES
    gray: bool = False
    note: str = ""
    stream: int = 0


@dataclass(frozen=True)
class Outcome:
    """Holds the result of reading a file.

    Attributes:
        frames_FHWC: The frames, as uint8; None if they could not be read.
        indices: Indices of the frames among the frames of the file that are shown.
        line: The error line; empty if frames were read.
        status: Status of the file in the ledger, or RAISES.
    """

    frames_FHWC: np.ndarray | None = None
    indices: tuple[int, ...] = ()
    line: str = ""
    status: str = OK


def outcome_of(path: Path, num_frames: int = CLIP_FRAMES) -> Outcome:
    """Plans and decodes a file as a preparation does. An error line is the one that a preparation prints."""
    buckets = (Bucket(num_frames, *SIZE),)
    record = plan_clip(path, ClipRecipe(buckets, CLIP_RATE, "middle", 0, 0, "none", 0.0, 1, 0))
    if not record.usable:
        return Outcome(line=bad_line(str(path), record.reason), status=record.status)
    variant = record.cuts[0].variants[0]
    frames = decode_variant(path, variant)
    if isinstance(frames, str):
        return Outcome(line=bad_line(str(path), frames), status=FAILED)
    return Outcome(frames, variant.indices)


def good(name: str, make: MakeBytes, numbers: Sequence[int] = MIDDLE, **rest: Any) -> Case:
    """Returns a case for a file from which pictures with these numbers must be read."""
    return Case(name, lambda path: path.write_bytes(make()), tuple(numbers), **rest)


def bad(name: str, make: MakeBytes, line: str, **rest: Any) -> Case:
    """Returns a case for a file that must be refused with a matching line."""
    return Case(name, lambda path: path.write_bytes(make()), (), line, **rest)


def edited(edit: Callable[..., bytes], make: MakeBytes, *rest: float) -> MakeBytes:
    """Returns a function that makes a file and edits its bytes."""
    return lambda: edit(make(), *rest)


# Containers, codecs, streams


def coded_cases() -> Iterator[Case]:
    """Yields containers, codecs and ways of coding. The right frames must be read from all but one of them."""
    for name, container, codec in [
        ("h264.mp4", "mp4", "libx264"),
        ("h264.mov", "mov", "libx264"),
        ("h264.mkv", "matroska", "libx264"),
        ("h264.flv", "flv", "libx264"),
        ("h264.ts", "mpegts", "libx264"),
        ("hevc.mp4", "mp4", "libx265"),
        ("av1.mp4", "mp4", "libsvtav1"),
        ("av1.webm", "webm", "libsvtav1"),
        ("vp9.webm", "webm", "libvpx-vp9"),
        ("vp9.ivf", "ivf", "libvpx-vp9"),
        ("vp8.webm", "webm", "libvpx"),
        ("mpeg4_part_2.avi", "avi", "mpeg4"),
        ("mpeg2.ts", "mpegts", "mpeg2video"),
        ("mpeg2.mpg", "mpeg", "mpeg2video"),
        ("motion_jpeg.avi", "avi", "mjpeg"),
        ("wmv2.wmv", "asf", "wmv2"),
        ("camcorder.mts", "mpegts", "libx264"),
        ("phone.3gp", "3gp", "libx264"),
        ("phone.3g2", "3g2", "mpeg4"),
        ("dvd.vob", "vob", "mpeg2video"),
        ("prores.mov", "mov", "prores_ks"),
        ("ffv1.mkv", "matroska", "ffv1"),
        ("animated.gif", "gif", "gif"),
    ]:
        yield good(name, functools.partial(plain, container, codec))
    yield good("theora.ogv", THEORA.read_bytes)
    yield good("vvc.mp4", VVC.read_bytes)
    yield good("camcorder.m2ts", functools.partial(encode, "mpegts", muxer={"mpegts_m2ts_mode": "1"}))
    open_gop = {"x264-params": "open-gop=1:keyint=10:min-keyint=1:bframes=3:b-adapt=0:b-pyramid=normal:scenecut=0"}
    no_b = {"g": "6", "bf": "0", "sc_threshold": "0"}
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "fragments.mp4": (("mp4",), {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
        "open_gop_b_frames.mp4": (("mp4",), {"options": open_gop}),
        "open_gop_b_frames.ts": (("mpegts",), {"options": open_gop}),
        "interlaced.mp4": (("mp4",), {"options": X264 | {"x264-params": "interlaced=1"}}),
        "yuv444.mp4": (("mp4",), {"pix_fmt": "yuv444p"}),
        "yuv422_10_bit.mp4": (("mp4",), {"pix_fmt": "yuv422p10le"}),
        "full_range.mp4": (("mp4",), {"full_range": True}),
        "rgb.mkv": (("matroska", "libx264rgb"), {"pix_fmt": "rgb24"}),
        "hevc_10_bit.mp4": (("mp4", "libx265"), {"pix_fmt": "yuv420p10le", "options": X265}),
        "with_sound.mp4": (("mp4",), {"sound": True}),
        "odd_size_97x63.mp4": (("mp4",), {"frames": pictures(height=63, width=97), "pix_fmt": "yuv444p"}),
        "odd_size_97x63.gif": (("gif", "gif"), {"frames": pictures(height=63, width=97), "pix_fmt": "rgb8"}),
        "wide_pixels.mp4": (("mp4",), {"aspect": Fraction(4, 3)}),
    }
    for name, (what, how) in ways.items():
        yield good(name, functools.partial(encode, *what, **how))
    yield good("gray.mp4", functools.partial(encode, "mp4", pix_fmt="gray"), gray=True)
    yield from field_cases()
    yield from stream_cases()
    yield from old_cases()
    yield good("video_with_cover.mp4", lambda: sounds(cover=True, video=True))
    for container, suffix in {"mp4": "mp4", "matroska": "mkv", "mpegts": "ts"}.items():
        make = functools.partial(headless, container, no_b)
        yield good(f"no_keyframe_first.{suffix}", make, range(7, 32, 3), note="starting at the first keyframe")
    for container, suffix in {"matroska": "mkv", "mpegts": "ts"}.items():
        make = functools.partial(led, container)
        yield good(f"pictures_before_the_first_keyframe.{suffix}", make, range(10, 35, 3), note=BEFORE)
    for container, suffix in {"mp4": "mp4", "matroska": "mkv", "mpegts": "ts", "flv": "flv"}.items():
        edits: dict[str, Callable[..., bytes]]
        edits = {"gradual_refresh": bytes, "recovery_point_too_early": recovered_too_early}
        for name, edit in edits.items():
            make = functools.partial(encode, container, options=REFRESHED)
            yield good(f"{name}.{suffix}", edited(edit, make), note=ONE_START)
    line = "(timestamps|out of order)"
    yield bad("h264_b_frames.wmv", functools.partial(plain, "asf"), line)


# Pictures are refreshed column by column, so that all keyframes but the first refer to earlier frames.
REFRESHED = {"x264-params": "intra-refresh=1:keyint=12:bframes=2:ref=3:scenecut=0"}


def led(container: str) -> bytes:
    """Returns hevc that begins with a keyframe and two pictures that are shown before it, numbers 10 and 11."""
    options = f"{X265['x265-params']}:min-keyint=12:radl=2:open-gop=0:bframes=3:scenecut=0:b-adapt=0"
    return remux(encode(container, "libx265", options=X265 | {"x265-params": options}), container, skip=10)


def recovered_too_early(data: bytes) -> bytes:
    """Changes recovery points of h264 so that they promise correct frames at once instead of some frames later."""
    new = re.sub(rb"(?s)(\x06\x06\x02)(.)(?=.\x80)", lambda match: match[1] + bytes([match[2][0] | 0x80]), data)
    assert new != data
    return new


def field_cases() -> Iterator[Case]:
    """Yields interlaced videos that are coded field by field; both fields of a picture must be read as one frame."""
    for container, suffix in {"mpegts": "mts", "matroska": "mkv", "mp4": "mp4"}.items():
        yield good(f"fields.{suffix}", functools.partial(field_coded, container))
        yield good(f"fields_in_one_packet.{suffix}", functools.partial(field_coded, container, packets=1))


def stream_cases() -> Iterator[Case]:
    """Yields files with several video streams: the default, else the largest, else the first must be read."""
    second: dict[str, Any] = {"numbers": range(104, 129, 3), "stream": 1}
    small, large = (HEIGHT // 2, WIDTH // 2), (2 * HEIGHT, 2 * WIDTH)
    default = av.stream.Disposition.default
    yield good("two_video_streams.mp4", two_streams, note="the first stream")
    make = functools.partial(two_streams, second=large, flags=(default, default))
    yield good("second_is_larger.mp4", make, note="the second stream", **second)
    make = functools.partial(two_streams, "matroska", second=small, flags=(0, default))
    yield good("second_is_default.mkv", make, note="the second stream", **second)
    make = functools.partial(two_streams, "matroska", second=large, flags=(default, 0))
    yield good("second_is_not_default.mkv", make, note="the first stream")
    make = functools.partial(two_streams, "mov", first=large, count=1, flags=(default, default))
    yield good("thumbnail_first.mov", make, note="the second stream", **second)


def two_streams(
    container: str = "mp4",
    first: tuple[int, int] = (HEIGHT, WIDTH),
    second: tuple[int, int] = (HEIGHT, WIDTH),
    count: int = COUNT,
    flags: tuple[int, int] | None = None,
) -> bytes:
    """Returns a file with two video streams.

    Args:
        container: Format of the file.
        first: Height and width of the first stream, which shows the numbers 0 ... ``count`` - 1.
        second: Height and width of the second stream, which shows the numbers 100 ... 100 + COUNT - 1.
        count: Number of frames of the first stream.
        flags: Dispositions of the streams.
    """

    def fill(output: Any) -> None:
        streams = [add_stream(output, "libx264", picture(0, *size), **X264) for size in (first, second)]
        for stream, flag in zip(streams, flags or (), strict=False):
            stream.disposition = flag
        for number in range(COUNT):
            for stream, shown, size in zip(streams, (number, 100 + number), (first, second), strict=True):
                if shown >= 100 or number < count:
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(shown, *size))))
        for stream in streams:
            output.mux(stream.encode())

    return written(container, fill)


def old_cases() -> Iterator[Case]:
    """Yields MPEG-4 part 2 as Xvid and DivX wrote it, and dropped frames, which repeat the frame before them."""
    for container, suffix in {"avi": "avi", "mp4": "mp4", "matroska": "mkv"}.items():
        yield good(f"packed_b_frames.{suffix}", functools.partial(packed, container))
        make = functools.partial(dropped_by_encoder, container, fill=True)
        yield good(f"n_vops.{suffix}", make, REPEATED, note=REPEATS)
    yield bad("packed_b_frames_without_positions.avi", lambda: packed(repeats="none"), "B-frames without positions")
    yield good("b_frames.avi", lambda: encode("avi", "mpeg4", options=B_FRAMES))
    yield good("empty_packets.avi", dropped, REPEATED, note=REPEATS)


def sounds(cover: bool = False, video: bool = False) -> bytes:
    """Returns an mp4 with sound, and optionally a cover picture as the first stream and a video."""

    def fill(output: Any) -> None:
        shown = [pictures()[1:2]] * cover + [pictures()] * video
        streams = [add_stream(output, "mjpeg", picture(1), "yuvj420p")] if cover else []
        streams += [add_stream(output, "libx264", picture(0), **X264)] if video else []
        sound = output.add_stream("aac", rate=44100, layout="mono")
        if cover:
            streams[0].disposition = av.stream.Disposition.attached_pic
        for stream, numbered in zip(streams, shown, strict=True):
            for pixels in numbered:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            output.mux(stream.encode())
        output.mux(silence(sound))

    return written("mp4", fill)


def motion_jpeg_with_exif() -> bytes:
    """Returns an avi in which each frame is a JPEG picture whose EXIF data rotate it."""
    jpegs = [still_turned(6, "JPEG", number) for number in range(COUNT)]

    def fill(output: Any) -> None:
        with Image.open(io.BytesIO(jpegs[0])) as first:
            stream = add_stream(output, "mjpeg", np.asarray(first), "yuvj420p")
        for number, jpeg in enumerate(jpegs):
            packet = av.Packet(jpeg)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, RATE), True
            packet.pts = packet.dts = number
            output.mux(packet)

    return written("avi", fill)


def headless(container: str, options: dict[str, str]) -> bytes:
    """Returns a clip without its first three packets, one of which is the keyframe."""
    return remux(encode("matroska", options=options), container, skip=3)


# Timestamps, lengths and rotation

# Display matrices: the x and y axes of the picture as shown. Phones write the first three for clockwise rotations.
MATRICES = {
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirror": (-1, 0, 0, 1),
    "45": (1, 1, -1, 1),
}
TICKS = [8 * (number // 4) + (0, 1, 2, 6)[number % 4] for number in range(COUNT)]  # of 1/24 s


def timed_cases() -> Iterator[Case]:
    """Yields files with unusual timestamps, lengths and display matrices."""
    # The frames nearest to ticks 22, 25, 28 ... 46; if two are equally near, the earlier one.
    variable = (11, 13, 14, 15, 18, 19, 20, 22, 23)
    yield good("variable_rate.mp4", lambda: encode("mp4", pts=TICKS), variable)
    yield good("variable_rate.mpg", lambda: encode("mpeg", "mpeg2video", grainy(), options=NO_B, pts=TICKS), variable)
    yield good("trimmed_by_edit_list.mp4", lambda: trimmed(7, 28), range(7, 32, 3))
    yield bad("trimmed_too_short.mp4", lambda: trimmed(7, 9), "0.38 s give 3 frames .* has 9")
    yield bad("shorter_than_bucket.mp4", lambda: plain_of(10), "0.42 s give 4 frames .* has 9")
    yield bad("one_frame.mp4", lambda: plain_of(1), "give 1 frame? .* has 9")
    yield good("one_frame_in_bucket_of_1.mp4", lambda: plain_of(1), (0,), num_frames=1)
    for turn in ("90", "180", "270"):
        yield good(f"rotated_by_{turn}.mp4", functools.partial(turned, turn), note="upright")
    yield good("rotated_by_exif.avi", motion_jpeg_with_exif, note="upright")
    yield bad("mirrored.mp4", lambda: turned("mirror"), "mirrored")
    yield bad("rotated_by_45.mp4", lambda: turned("45"), "rotated by -?45 degrees")
    yield bad("rate_90000.avi", lambda: avi_rate(1, 90000), "give 1 frame")
    yield good("rate_0.avi", lambda: avi_rate(1, 0))
    yield good("rate_without_scale.avi", lambda: avi_rate(0, 24))
    yield good("frame_every_1000_s.mp4", lambda: slow(1000), (17,) * 9, note="the same picture nine times")
    yield good("no_rate_in_header.mkv", lambda: without_rate(plain("matroska")))
    yield good("header_says_weeks.mp4", long_header)
    yield bad("no_timestamps.h264", lambda: plain("h264"), "no timestamps")


NO_B = {"g": "12", "bf": "0", "qmin": "2", "qmax": "2"}


def grainy() -> list[np.ndarray]:
    """Returns pictures that take more than the 2 KB of a packet of mpeg, which has one timestamp."""
    noise = np.random.default_rng(0).integers(-24, 24, (COUNT, 2 * HEIGHT, 2 * WIDTH, 1))
    clean = pictures(height=2 * HEIGHT, width=2 * WIDTH)
    return [np.clip(pixels + grain, 0, 255).astype(np.uint8) for pixels, grain in zip(clean, noise, strict=True)]


def plain_of(count: int) -> bytes:
    """Returns an mp4 of the first pictures."""
    return encode("mp4", frames=pictures(range(count)))


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """Returns data in which the bytes from offset ``at`` on are replaced by ``new``."""
    return data[:at] + new + data[at + len(new) :]


def turned(turn: str) -> bytes:
    """Returns pictures that are stored rotated to the left, with a display matrix that rotates them back."""
    quarters = {"90": 1, "180": 2, "270": 3}.get(turn, 0)
    data = encode("mp4", frames=[np.ascontiguousarray(np.rot90(pixels, quarters)) for pixels in pictures()])
    a, b, c, d = (value << 16 for value in MATRICES[turn])
    return patched(data, data.index(b"tkhd") + 44, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


def trimmed(hidden: int, shown: int) -> bytes:
    """Returns an mp4 as trimming without encoding writes it: an edit list hides frames at the start and the end."""
    data = plain()
    at = data.index(b"elst") + 4
    movie, media = (struct.unpack_from(">I", data, data.index(box) + 16)[0] for box in (b"mvhd", b"mdhd"))
    start = struct.unpack_from(">i", data, at + 12)[0] + hidden * media // RATE
    return patched(data, at + 8, struct.pack(">Ii", shown * movie // RATE, start))


def avi_rate(scale: int, rate: int) -> bytes:
    """Returns an avi whose header says rate / scale frames per second; avi stores no other times."""
    data = plain("avi", "mpeg4")
    return patched(data, data.index(b"strh") + 28, struct.pack("<II", scale, rate))


def slow(seconds: int) -> bytes:
    """Returns an mp4 that shows each frame for this many seconds."""
    data = encode("mp4", options={"g": "12", "bf": "0"}).replace(b"edts", b"skip")
    clock = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    return patched(data, data.index(b"stts") + 16, struct.pack(">I", clock * seconds))


def without_rate(data: bytes) -> bytes:
    """Replaces the default duration of frames in a Matroska file by a void element of the same length."""
    return patched(data, data.index(b"\x23\xe3\x83\x84"), b"\xec\x86" + bytes(6))


def long_header() -> bytes:
    """Returns an mp4 whose headers say that it lasts for weeks; its index of frames is right."""
    data = plain()
    for box, at in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        data = patched(data, data.index(box) + at, struct.pack(">I", 0x7FFFFFFF))
    return data


# Transparency


def transparent_cases() -> Iterator[Case]:
    """Yields videos with transparent parts, whose hidden colors would show other numbers."""
    ways: dict[str, tuple[str, str, str, dict[str, str]]] = {
        "prores_4444.mov": ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        "vp9_transparent.webm": ("webm", "libvpx-vp9", "yuva420p", VPX_ALPHA),
        "vp8_transparent.webm": ("webm", "libvpx", "yuva420p", VPX_ALPHA),
        "png_transparent.mov": ("mov", "png", "rgba", {}),
        "qtrle_transparent.mov": ("mov", "qtrle", "argb", {}),
        "ffv1_transparent.mkv": ("matroska", "ffv1", "bgra", {}),
    }
    for name, (container, codec, pix_fmt, options) in ways.items():
        how = {"pix_fmt": pix_fmt, "options": options}
        make = functools.partial(transparent, container, codec, **how)
        yield good(name, make, note=ON_BLACK)
    opaque = functools.partial(encode, "webm", "libvpx-vp9", pix_fmt="yuva420p", options=VPX_ALPHA)
    yield good("vp9_opaque_alpha.webm", opaque)
    at_25_fps = (3, 6, 9, 12, 15, 19, 22, 25, 28)
    yield good("transparent.gif", lambda: moving("GIF", with_alpha, disposal=2), at_25_fps, note=ON_BLACK)


ON_BLACK = "transparent parts are black"
VPX_ALPHA = VPX | {"auto-alt-ref": "0", "lag-in-frames": "0"}


def transparent(container: str, codec: str, **how: Any) -> bytes:
    """Returns a clip in which the light fields of the two high bits are transparent, so that they must look dark."""
    return encode(container, codec, [with_alpha(number) for number in range(COUNT)], **how)


# Joined files, and pictures that change size

JOINED = "consists of several joined files: "


def several_cases() -> Iterator[Case]:
    """Yields files that were joined end to end, and files whose pictures change size."""
    for suffix, base in {
        "mp4": ("mp4", "libx264"),
        "mov": ("mov", "prores_ks"),
        "flv": ("flv", "libx264"),
        "avi": ("avi", "mpeg4"),
        "wmv": ("asf", "wmv2"),
        "gif": ("gif", "gif"),
    }.items():
        make = functools.partial(plain, *base)
        line = f"{JOINED}the second begins at byte {len(make())}; "
        yield bad(f"joined.{suffix}", edited(twice, make), line)
    fragments = functools.partial(encode, "mp4", muxer={"movflags": "frag_keyframe+empty_moov"})
    yield bad("joined_fragments.mp4", edited(twice, fragments), JOINED)
    for suffix, base in {
        "mkv": ("matroska", "libx264"),
        "webm": ("webm", "libvpx-vp9"),
        "ts": ("mpegts", "libx264"),
        "mpg": ("mpeg", "mpeg2video"),
        "ogv": ("ogg", "libvpx"),
    }.items():
        line = f"{JOINED}its timestamps start again after 1.5.. s; .*`ffmpeg -i IN .*`"
        yield bad(f"joined.{suffix}", edited(twice, functools.partial(plain, *base)), line)
    yield bad(
        "joined_without_keyframe.ts", lambda: plain("mpegts") + headless("mpegts", {"g": "99", "bf": "0"}), JOINED
    )
    for name, container, codec in [
        ("h264.mp4", "mp4", "libx264"),
        ("h264.mkv", "matroska", "libx264"),
        ("h264.ts", "mpegts", "libx264"),
        ("h264.flv", "flv", "libx264"),
        ("hevc.mp4", "mp4", "libx265"),
        ("hevc.ts", "mpegts", "libx265"),
        ("vp8.webm", "webm", "libvpx"),
        ("vp9.webm", "webm", "libvpx-vp9"),
        ("mpeg2.mpg", "mpeg", "mpeg2video"),
        ("av1.mkv", "matroska", "libsvtav1"),
        ("motion_jpeg.avi", "avi", "mjpeg"),
        ("mpeg4.avi", "avi", "mpeg4"),
        ("prores.mov", "mov", "prores_ks"),
    ]:
        make = functools.partial(resized, container, codec)
        line = r"changes size: its picture at 0\.750 s is 64x96, but the first one is 96x64; cut it there: `ffmpeg"
        yield bad(f"size_changes_{name}", make, line)


def twice(data: bytes) -> bytes:
    """Joins a file with itself, as `cat` does."""
    return data + data


def resized(container: str, codec: str) -> bytes:
    """Returns a stream whose picture is 96x64 for 18 frames and 64x96 after that."""
    # In mpegts, packets begin with the parameters that mp4 and matroska store once for the whole stream.
    own = "mpegts" if codec in ("libx264", "libx265") else container
    pix_fmt = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
    parts = [
        encode(own, codec, pictures(range(18)), pix_fmt=pix_fmt),
        encode(own, codec, pictures(range(18, COUNT), height=WIDTH, width=HEIGHT), pix_fmt=pix_fmt),
    ]

    def fill(output: Any) -> None:
        stream = None
        for part_number, part_data in enumerate(parts):
            with av.open(io.BytesIO(part_data), "r") as source:
                stream = stream or output.add_stream_from_template(source.streams.video[0], opaque=True)
                for packet in [packet for packet in source.demux(video=0) if packet.size]:
                    later = round(part_number * Fraction(18, RATE) / packet.time_base)
                    assert packet.pts is not None
                    assert packet.dts is not None
                    packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                    output.mux(packet)

    return written(container, fill)


# Colors

COLORS = "Colors"
YCGCO = X264 | {"x264-params": "colormatrix=YCgCo"}


def color_cases() -> Iterator[Case]:
    """Yields HDR and wide-gamut videos. They are converted to SDR, so the pixels are not those of a plain decode."""
    hdr = "HDR, converted to SDR"
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "hlg_hevc.mp4": ("hlg", {}),
        "pq_hevc.mkv": ("pq", {"container": "matroska"}),
        "pq_hevc.ts": ("pq", {"container": "mpegts"}),
        "hlg_hevc_12_bit.mp4": ("hlg", {"pix_fmt": "yuv420p12le"}),
        "hlg_full_range.mp4": ("hlg", {"full_range": True}),
        "hlg_av1.webm": ("hlg", {"container": "webm", "codec": "libsvtav1"}),
        "pq_av1.mp4": ("pq", {"codec": "libsvtav1"}),
        "hlg_prores.mov": ("hlg", {"container": "mov", "codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
        "hlg_prores_4444.mov": ("hlg", {"container": "mov", "codec": "prores_ks", "pix_fmt": "yuv444p10le"}),
        "pq_ffv1.mkv": ("pq", {"container": "matroska", "codec": "ffv1"}),
    }
    for name, (kind, how) in ways.items():
        yield good(name, functools.partial(video, kind, **how), note=hdr)
    yield good("hlg_vp9.webm", VP9.read_bytes, note=hdr)
    yield good("hlg_dolby_vision_8_4.mov", lambda: dolby_vision_8_4(video("hlg")), note=hdr)
    yield good("hlg_by_container_only.mp4", lambda: tagged_by_container(video("hlg", tagged=False), "hlg"), note=hdr)
    yield good("bt2020_sdr.mp4", lambda: video("bt2020"), note="converted to bt709")
    yield bad("dolby_vision_5.mp4", lambda: video("pq", tagged=False).replace(b"hev1", b"dvhe"), "Dolby Vision")
    yield bad("screen_in_ycgco.mp4", lambda: encode("mp4", options=YCGCO, pix_fmt="yuv444p"), "color matrix YCgCo, ")


# Damaged files, and files that are not videos

BROKEN = "is damaged|is truncated|cannot be read"
BASES = {
    "mp4": ("mp4", "libx264"),
    "mkv": ("matroska", "libx264"),
    "webm": ("webm", "libvpx-vp9"),
    "avi": ("avi", "mpeg4"),
    "flv": ("flv", "libx264"),
    "ts": ("mpegts", "libx264"),
    "gif": ("gif", "gif"),
}


def damaged_cases() -> Iterator[Case]:
    """Yields files that were cut off or overwritten, or whose headers are absurd."""
    yield bad("truncated_index_first.mp4", lambda: part(plain(), 0.9), "is truncated: .* of 36")
    yield bad("truncated_index_last.mp4", lambda: part(encode("mp4"), 0.6), BROKEN)
    for suffix, base in list(BASES.items())[1:]:
        make = functools.partial(plain, *base)
        yield bad(f"half_of_it.{suffix}", edited(part, make, 0.5), f"give . frames|{BROKEN}")
        if suffix == "ts":  # the format does not store how many frames there are
            note = "the middle of what is left"
            yield good(f"most_of_it.{suffix}", edited(part, make, 0.9), range(2, 29, 3), note=note)
        else:
            yield bad(f"most_of_it.{suffix}", edited(part, make, 0.9), BROKEN)
    for suffix in ("mp4", "mkv", "ts", "avi", "webm"):
        make = functools.partial(plain, *BASES[suffix])
        yield bad(f"overwritten.{suffix}", edited(overwritten, make), BROKEN)
    yield good("container_says_20000x20000.mp4", lambda: sized(20000), note="the size that the codec stores is used")
    wide = np.zeros((16, 16400, 3), np.uint8)
    yield bad("picture_of_16400x16.mkv", lambda: encode("matroska", "ffv1", [wide]), "16400x16; at most 16384 ")
    yield bad("codec_says_16000x16000.avi", lambda: jpeg_size(plain("avi", "mjpeg"), 16000, 16000), BROKEN)
    yield bad("codec_says_8000x8000.webm", lambda: vp8_size(8000), BROKEN)
    yield good("index_misses_a_frame.avi", index_with_a_gap)
    yield good("title_is_not_utf8.mkv", lambda: titled().replace(b"title in utf", b"t\xeftl\xe9 in utf"))
    yield good("index_of_4_gib.mp4", lambda: patched(plain(), plain().index(b"moov") - 4, b"\xff\xff\xff\x00"))
    many = patched(plain(), plain().index(b"stsz") + 12, b"\x7f\xff\xff\xff")
    yield bad("index_of_2_billion_frames.mp4", lambda: many, BROKEN)
    unknown = plain("matroska").replace(b"/ISO/AVC", b"/ISO/ZZZ")
    yield bad("unknown_codec.mkv", lambda: unknown, "no decoder")


def part(data: bytes, share: float) -> bytes:
    """Returns the first part of a file."""
    return data[: int(len(data) * share)]


def overwritten(data: bytes, frame: int = 12, num_bytes: int = 64) -> bytes:
    """Changes bytes in the middle of the packet of a frame, by default of a keyframe."""
    with av.open(io.BytesIO(data), "r") as container:
        victim = [packet for packet in container.demux(video=0) if packet.size][frame]
    assert victim.pos is not None
    at = victim.pos + victim.size // 2
    return patched(data, at, bytes(byte ^ 0x5A for byte in data[at : at + num_bytes]))


def sized(side: int) -> bytes:
    """Returns an mp4 whose sample description says that the picture has this many pixels per side."""
    data = plain()
    return patched(data, data.index(b"avc1", data.index(b"stsd")) + 28, struct.pack(">HH", side, side))


def jpeg_size(data: bytes, height: int, width: int) -> bytes:
    """Changes the size in the headers of JPEG pictures, which may be in an avi."""
    size = struct.pack(">HH", height, width)
    return re.sub(rb"(?s)(\xff\xc0\x00\x11\x08)....", lambda match: match[1] + size, data)


def vp8_size(side: int) -> bytes:
    """Returns a VP8 video whose keyframes say that they have this many pixels per side."""
    size = struct.pack("<HH", side, side)
    return re.sub(rb"(?s)(\x9d\x01\x2a)....", lambda match: match[1] + size, plain("webm", "libvpx"))


def index_with_a_gap() -> bytes:
    """Returns an avi whose index, at the end of the file, has an entry that does not belong to its stream."""
    data = plain("avi", "mpeg4")
    return patched(data, data.index(b"idx1") + 8 + 16 * 13, b"junk")


def titled() -> bytes:
    """Returns a Matroska file with a title."""

    def fill(output: Any) -> None:
        output.metadata["title"] = "title in utf"
        stream = add_stream(output, "libx264", picture(0), **X264)
        for pixels in pictures():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        output.mux(stream.encode())

    return written("matroska", fill)


def foreign_cases() -> Iterator[Case]:
    """Yields files that are not videos but have the name of one."""
    line = "(cannot be read|is empty|is not|no video)"
    yield bad("zero_bytes.mp4", lambda: b"", line)
    yield bad("text.mp4", lambda: b"not a video\n" * 100, line)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 120\n"
    yield bad("git_lfs_pointer.mp4", lambda: pointer, "Git LFS pointer.* lfs pull$")
    yield bad("web_page.mp4", lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20, line)
    for name, text in {
        "playlist_m3u8.mp4": "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
        "playlist_concat.mp4": "ffconcat version 1.0\nfile other.mp4\n",
        "session_sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    }.items():
        yield Case(name, functools.partial(write_next_to_clip, text), (), line)
    yield bad("sound_only.mp4", sounds, "has no video stream")
    yield bad("sound_with_cover.m4a", lambda: sounds(cover=True), "has no video stream")
    yield bad("zero_frames.mp4", lambda: plain_header(), "has no (frames|video stream)")
    yield Case("folder.mp4", lambda path: path.mkdir(), (), "[Ii]s a (directory|folder)")


def write_next_to_clip(text: str, path: Path) -> None:
    """Writes a text file and, next to it, a good clip that the text names."""
    (path.parent / "other.mp4").write_bytes(plain())
    path.write_text(text)


def plain_header() -> bytes:
    """Returns an mp4 that declares a video stream and has no packets."""

    def fill(output: Any) -> None:
        add_stream(output, "libx264", picture(0))
        output.start_encoding()

    return written("mp4", fill)


def named_cases() -> Iterator[Case]:
    """Yields good files whose names are special to a shell, to a decoder or in a list."""
    for name in [
        "with space.mp4",
        "colon: a.mp4",
        "concat:h264.mp4",
        "quotes'\".mp4",
        "unicode_\u00e9\u4e2d\U0001f3ac.mp4",
        "new\nline.mp4",
        "percent%03d.mp4",
        "-dash.mp4",
        "$(shell)`;.mp4",
        "no_suffix",
        "mp4_named.txt",
        "mp4_named.gif",
        "mp4_named.png",
    ]:
        yield good(name, plain)
    yield bad("text_in_new\nline.mp4", lambda: b"not a video\n", "cannot be read")
    yield Case("link.mp4", functools.partial(link, "other.mp4"))
    yield Case("link_to_nothing.mp4", functools.partial(link, "nothing.mp4"), (), "[Nn]o such file")


def link(target: str, path: Path) -> None:
    """Makes a symbolic link, and next to it a good clip."""
    (path.parent / "other.mp4").write_bytes(plain())
    path.symlink_to(target)


# Still images


def still_cases() -> Iterator[Case]:
    """Yields still images, from which one upright frame must be read, or which must be refused."""
    stills: dict[str, MakeBytes] = {
        "still.png": lambda: still("PNG"),
        "still.jpg": lambda: still("JPEG", quality=95),
        "still.webp": lambda: still("WEBP", lossless=True),
        "progressive.jpg": lambda: still("JPEG", quality=95, progressive=True),
        "odd_size_97x63.jpg": lambda: still("JPEG", picture(5, 63, 97), quality=95),
        "palette.png": lambda: still("PNG", mode="P"),
        "16_bit.png": png_16_bit,
        "cmyk.jpg": lambda: still("JPEG", mode="CMYK", quality=95),
        "jpg_named.png": lambda: still("JPEG", quality=95),
        "still.avif": lambda: still("AVIF", quality=95),
        "photo_with_gain_map.jpg": lambda: with_another("MPO", quality=95),
    }
    for name, make in stills.items():
        yield good(name, make, (5,), num_frames=1)
    yield good("gray.png", lambda: still("PNG", mode="L"), (5,), num_frames=1, gray=True)
    yield good("alpha.png", lambda: still("PNG", with_alpha()), (5,), num_frames=1, note=ON_BLACK)
    for suffix, kind in {"jpg": "JPEG", "tif": "TIFF", "avif": "AVIF"}.items():
        for orientation in TURNS:
            make = functools.partial(still_turned, orientation, kind)
            yield good(f"exif_orientation_{orientation}.{suffix}", make, (5,), num_frames=1, note="upright")
    yield bad("image_for_9_frames.png", lambda: still("PNG"), "(still|image|give 1 frame)")
    for suffix, kind in {"jpg": "JPEG", "png": "PNG"}.items():
        make = functools.partial(still, kind)
        yield bad(f"truncated.{suffix}", edited(part, make, 0.6), BROKEN, num_frames=1)
    yield bad("header_says_20000x20000.png", lambda: png_size(still("PNG"), 20000), "20000x20000", num_frames=1)
    huge = jpeg_size(still("JPEG"), 20000, 20000)
    yield bad("header_says_20000x20000.jpg", lambda: huge, "20000x20000", num_frames=1)
    yield bad("text.png", lambda: b"not a picture\n" * 9, "cannot be read", num_frames=1)
    for kind in ("WEBP", "PNG", "AVIF"):
        yield bad(f"moving.{kind.lower()}", functools.partial(moving, kind), "holds 36 pictures", num_frames=1)
    yield bad("two_pages.tif", lambda: with_another("TIFF"), "holds 2 pictures", num_frames=1)
    brands = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    yield bad("photo.heic", lambda: brands + bytes(99), "is a HEIC picture", num_frames=1)


def with_another(kind: str, **options: Any) -> bytes:
    """Returns an image file with picture 5 and a smaller second picture."""
    return still(kind, save_all=True, append_images=[Image.new("RGB", (48, 32))], **options)


# How a picture is stored for each EXIF orientation.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.swapaxes(pixels, 0, 1),
    6: np.rot90,
    7: lambda pixels: np.rot90(np.swapaxes(pixels, 0, 1), 2),
    8: lambda pixels: np.rot90(pixels, 3),
}


def still(kind: str, pixels: np.ndarray | None = None, mode: str = "", **options: Any) -> bytes:
    """Returns picture 5, or the given pixels, as an image file of this kind."""
    image = Image.fromarray(picture(5) if pixels is None else pixels)
    memory = io.BytesIO()
    (image.convert(mode) if mode else image).save(memory, kind, **options)
    return memory.getvalue()


def still_turned(orientation: int, kind: str, number: int = 5) -> bytes:
    """Returns an image file that is stored rotated or mirrored, with an EXIF orientation as cameras write it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {} if kind == "TIFF" else {"quality": 95}
    return still(kind, np.ascontiguousarray(TURNS[orientation](picture(number))), exif=exif, **options)


def with_alpha(number: int = 5) -> np.ndarray:
    """Returns the picture of number + 64 + 128, in which the light fields of the two high bits are transparent."""
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[HEIGHT * 2 // 3 :, WIDTH // 2 :] = 0
    return np.dstack([picture(number + 64 + 128), alpha])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk of a PNG file, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_size(data: bytes, side: int) -> bytes:
    """Changes the size in the header of a PNG file."""
    return patched(data, 8, png_chunk(b"IHDR", struct.pack(">II", side, side) + data[24:29]))


def png_16_bit() -> bytes:
    """Returns picture 5 as a PNG file with 16 bits per channel."""
    rows = b"".join(b"\0" + row.tobytes() for row in picture(5).astype(">u2") * 257)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def moving(kind: str, draw: Callable[[int], np.ndarray] = picture, **options: Any) -> bytes:
    """Returns an animated image file with all pictures, at 25 frames per second."""
    first, *rest = [Image.fromarray(draw(number)) for number in range(COUNT)]
    memory = io.BytesIO()
    first.save(memory, kind, save_all=True, append_images=rest, duration=40, **options)
    return memory.getvalue()


# The table

SECTIONS: dict[str, tuple[Case, ...]] = {
    "Containers and codecs": tuple(coded_cases()),
    "Timestamps, lengths and rotation": tuple(timed_cases()),
    "Transparency": tuple(transparent_cases()),
    "Joined files, and pictures that change size": tuple(several_cases()),
    COLORS: tuple(color_cases()),
    "Truncated and damaged files": tuple(damaged_cases()),
    "Files that are not videos": tuple(foreign_cases()),
    "Names": tuple(named_cases()),
    "Still images": tuple(still_cases()),
}
CASES = [case for cases in SECTIONS.values() for case in cases]

INTRODUCTION = f"""# Unusual and damaged files

This page shows what the preparation does with each kind of file: which frames it reads, or the error that it reports.
`python tests/tools/odd_files.py --write` generates the page, and `tests/data/test_odd_files.py` checks it.

The test makes each file, and plans and decodes it as a preparation does with `--frame_buckets {CLIP_FRAMES}` (1 for
still images), `--fps {CLIP_RATE}` and `--frame_selection middle`. Undamaged videos have {COUNT} frames at {RATE} frames
per second, and each frame shows its number, starting with 0. So the right result is 9 frames from the middle: 4, 7, 10
and so on up to 28.

- "frames 4, 7, ..." lists the numbers on the frames that were read. The frames are upright, and their pixels equal
  those of a plain decode from start to end, except where colors or transparency are converted.
- Any other result is the error line that the preparation prints after the name of the file.
- Files with the same result share a row. If error lines differ only in numbers, the row shows the line of its first
  file.
"""


def described(case: Case, path: Path, outcome: Outcome) -> str:
    """Describes an outcome for the table."""
    if outcome.frames_FHWC is None:
        return outcome.line.removeprefix(bad_line(str(path), "")).replace(f"{path.parent}/", "")
    numbers = [str(number_in(frame, gray=case.gray)) for frame in outcome.frames_FHWC]
    note = f" ({case.note})" if case.note else ""
    return f"frames {', '.join(numbers)}{note}" if len(numbers) > 1 else f"the frame{note}"


def cell(text: str) -> str:
    """Escapes a text for a table in Markdown."""
    return "".join(f"\\{sign}" if sign in "|`*_<[\\" else sign for sign in text.replace("\n", "\\n"))


def make_and_read(case: Case, folder: Path) -> tuple[Path, Outcome]:
    """Makes the file of a case in a new subfolder, and returns its path and the outcome of reading it."""
    path = Path(tempfile.mkdtemp(dir=folder)) / case.name
    case.make(path)
    try:
        return path, outcome_of(path, case.num_frames)
    except Exception as error:  # the other files must still be read; the tests reject this status
        return path, Outcome(line=f"raises {type(error).__name__}: {error}", status=RAISES)


def table(folder: Path, read: Callable[[Case, Path], tuple[Path, Outcome]] = make_and_read) -> str:
    """Returns the text of docs/odd_files.md, with a heading and a table for each section.

    Args:
        folder: Folder in which the files are made.
        read: Makes and reads the file of a case; returns its path and the outcome.
    """
    parts = [INTRODUCTION]
    for title, cases in SECTIONS.items():
        rows = grouped([(case.name, described(case, *read(case, folder))) for case in cases])
        lines = [f"| {cell(', '.join(names))} | {cell(outcome)} |" for names, outcome in rows]
        parts.append("\n".join([f"## {title}", "", "| files | result |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


def grouped(rows: Sequence[tuple[str, str]]) -> Iterator[tuple[list[str], str]]:
    """Yields (names of files, outcome) for each kind of outcome, in the order of the first files."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, outcome in rows:
        kind = outcome if outcome.startswith("frames") else re.sub(r"\d+", "N", outcome)
        groups.setdefault(kind, []).append((name, outcome))
    for members in groups.values():
        yield [name for name, _ in members], members[0][1]


def main() -> None:
    """Prints the page, or writes it with --write."""
    parser = argparse.ArgumentParser(description="Generates the page about unusual and damaged files.")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead of printing it")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        text = table(Path(folder))
    if write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
