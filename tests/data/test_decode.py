"""decode.py: exact frames for any pattern of indices, errors in one line, and mp4 output."""

import errno
import itertools
import os
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from striped import COUNT, HEIGHT, MATRICES, OPEN_GOP, RATE, VIDEOS, WIDTH, encode, numbers_in, read_numbers, sequential

from cogvideox.data.media import faults
from cogvideox.data.media.container import packets
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.frames import frame_indices
from cogvideox.data.media.pixels import decode
from cogvideox.data.media.pixels.decode import probe, read_frames, write_video
from cogvideox.errors import DiskError


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", muxer={"movflags": "faststart"})


def test_probe_reads_what_is_shown(clip):
    info = probe(clip)
    assert (info.num_frames, info.height, info.width) == (COUNT, HEIGHT, WIDTH)
    assert (info.rotation, info.codec, info.header_rate) == (0, "h264", RATE)
    assert info.fps == pytest.approx(RATE)
    assert info.duration == pytest.approx(COUNT / RATE)
    assert info.times == pytest.approx([number / RATE for number in range(COUNT)])


PATTERNS = [
    range(COUNT),
    range(0, COUNT, 7),
    range(COUNT - 1, -1, -5),
    [0, 0, 59, 59, 0],
    [11, 12, 13],
    [12],
    [23, 24],
    [59],
    [58, 3, 31, 30, 10, 9],
]


@pytest.mark.parametrize("name", VIDEOS)
def test_every_pattern_gives_the_right_frames(tmp_path, name):
    path = encode(tmp_path / name, **VIDEOS[name])
    assert sequential(path) == list(range(COUNT))
    info = probe(path)
    assert info.num_frames == COUNT
    for pattern in PATTERNS:
        assert read_numbers(path, pattern, info) == list(pattern)
    for index in range(0, COUNT, 3):
        assert read_numbers(path, [index], info) == [index]


def test_seeking_gives_the_same_pixels_as_decoding_everything(clip):
    info = probe(clip)
    whole = read_frames(clip, info, range(COUNT), HEIGHT, WIDTH)
    for index in (12, 13, 35, 36, 59):
        assert (read_frames(clip, info, [index], HEIGHT, WIDTH)[0] == whole[index]).all()


def test_a_jump_decodes_no_more_than_it_needs(clip, monkeypatch):
    taken = []
    frames = decode._frames
    monkeypatch.setattr(decode, "_frames", lambda *args: (taken.append(frame) or frame for frame in frames(*args)))
    assert read_numbers(clip, [0, 1, 50], probe(clip)) == [0, 1, 50]
    # Frames 0 and 1 are decoded first, then the keyframe 48 and the frames up to 50.
    assert len(taken) <= 2 + 4
    taken.clear()
    assert read_numbers(clip, range(COUNT), probe(clip)) == list(range(COUNT))
    assert len(taken) == COUNT


def test_a_seek_that_ends_too_late_is_repeated_from_an_earlier_keyframe(clip):
    info = probe(clip)
    assert info.packets is not None
    last = info.packets.keyframes[-1]
    late = replace(info, packets=replace(info.packets, seek_to=(last,) * len(info.packets.keyframes)))
    assert read_numbers(clip, [0, 13, 27, 59], late) == [0, 13, 27, 59]


def test_a_stream_that_begins_inside_a_gop_starts_at_its_first_keyframe(tmp_path):
    whole = encode(tmp_path / "whole.ts", options={"x264-params": OPEN_GOP})
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    second = [position for position, packet in enumerate(packets) if packet.is_keyframe][1]
    assert any(
        packet.pts < packets[second].pts for packet in packets[second:]
    )  # these frames refer to frames that are cut off
    start = probe(whole).num_frames - sum(packet.pts >= packets[second].pts for packet in packets)
    data = whole.read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(
        data[: 3 * 188] + data[packets[second].pos :]
    )  # the tables of the transport stream, then everything from the keyframe on
    info = probe(path)
    assert read_numbers(path, range(info.num_frames), info) == list(range(start, COUNT))


@pytest.mark.fault("data: a variable frame rate")
def test_variable_rate(tmp_path):
    pts = list(itertools.accumulate(itertools.islice(itertools.cycle([1, 1, 4, 2]), COUNT), initial=0))[:COUNT]
    path = encode(tmp_path / "vfr.mp4", pts=pts)
    info = probe(path)
    assert info.times == pytest.approx([time / RATE for time in pts])
    assert read_numbers(path, range(COUNT), info) == list(range(COUNT))
    chosen = frame_indices(info.times, 10, 7.5, "head")
    for position, index in enumerate(chosen):
        distance = abs(pts[index] - 4 * position)
        assert distance == min(abs(time - 4 * position) for time in pts)


@pytest.mark.parametrize("clockwise", MATRICES)
@pytest.mark.fault("data: rotated videos")
def test_rotation_metadata_is_applied(tmp_path, clip, clockwise):
    data = bytearray(clip.read_bytes())
    a, b, c, d = (value << 16 for value in MATRICES[clockwise])
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "rotated.mp4"
    path.write_bytes(data)
    info = probe(path)
    plain = read_frames(clip, probe(clip), [5, 44], HEIGHT, WIDTH)
    expected = np.rot90(plain, -clockwise // 90, axes=(1, 2))
    assert (info.rotation, info.height, info.width) == (360 - clockwise, *expected.shape[1:3])
    assert (read_frames(path, info, [5, 44], info.height, info.width) == expected).all()


@pytest.mark.parametrize(("matrix", "reason"), [((0, True), "mirrored"), ((45,), "rotated by 45 degrees")])
def test_other_display_matrices_are_refused(tmp_path, matrix, reason):
    with pytest.raises(VideoError, match=reason):
        probe(encode(tmp_path / "odd.mp4", 5, rotation=matrix))


def test_pixels_that_are_not_square_count_as_shown(tmp_path):
    info = probe(encode(tmp_path / "wide.mp4", 5, aspect=Fraction(4, 3)))
    assert (info.height, info.width) == (HEIGHT, 128)


def test_an_edit_list_hides_frames(tmp_path, clip):
    data = bytearray(clip.read_bytes())
    at = data.index(b"elst") + 4
    movie_clock, media_clock = (
        struct.unpack_from(">I", data, data.index(box) + 4 + 12)[0] for box in (b"mvhd", b"mdhd")
    )
    start = struct.unpack_from(">i", data, at + 12)[0] + 7 * media_clock // RATE
    struct.pack_into(">Ii", data, at + 8, 40 * movie_clock // RATE, start)
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(data)
    info = probe(path)
    assert info.num_frames == 40
    assert (info.times[0], info.duration) == (0, pytest.approx(40 / RATE))
    assert read_numbers(path, range(40), info) == list(range(7, 47))
    assert read_numbers(path, [39, 20, 0], info) == [46, 27, 7]


def bad_file(tmp_path: Path, clip: Path, kind: str) -> Path:
    path, data = tmp_path / f"{kind}.mp4", clip.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: int(len(data) * 0.7)])
    elif kind == "truncated_index_last":
        whole = encode(tmp_path / "index_last.mp4").read_bytes()
        path.write_bytes(whole[: int(len(whole) * 0.6)])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a video\n" * 100)
    elif kind == "playlist":
        path.write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
        (tmp_path / clip.name).write_bytes(data)
    elif kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44100, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 44100
            container.mux([*stream.encode(frame), *stream.encode()])
    elif kind == "no_frames":
        with av.open(str(path), "w") as container:
            container.add_stream("libx264", rate=RATE, options={}).pix_fmt = "yuv420p"
            container.start_encoding()
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "is truncated: it holds [0-9]+ of 60 frames"),
        ("truncated_index_last", "cannot be read: "),
        ("empty", "is empty; "),
        ("text", "cannot be read: "),
        ("playlist", "cannot be read: "),
        ("audio", "has no video stream"),
        ("no_frames", "has no (frames|video stream)"),
        ("missing", "No such file"),
    ],
)
@pytest.mark.fault("data: media files that cannot be used")
def test_bad_files_say_why_in_one_line(tmp_path, clip, kind, reason):
    path = bad_file(tmp_path, clip, kind)
    with pytest.raises(VideoError, match=reason) as caught:
        probe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_bytes", [1, 64])
@pytest.mark.fault("data: media files with damage in the middle")
def test_damage_in_the_middle_is_an_error_for_the_frames_after_it(tmp_path, clip, num_bytes):
    data = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        victim = [packet for packet in container.demux(video=0) if packet.is_keyframe][2]
    assert victim.pts * victim.time_base * RATE == 24
    at = victim.pos + victim.size // 2
    data[at : at + num_bytes] = bytes(byte ^ 0x5A for byte in data[at : at + num_bytes])
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    info = probe(path)
    assert info.num_frames == COUNT
    assert read_numbers(path, [3, 12, 50], info) == [3, 12, 50]
    for index in (24, 30):
        with pytest.raises(VideoError, match=r"damaged\.mp4: (is damaged|decode failed|cannot be read)"):
            read_frames(path, info, [3, index], HEIGHT, WIDTH)


def test_a_frame_that_the_decoder_does_not_return_is_an_error(clip, monkeypatch):
    monkeypatch.setattr(decode, "_frames", lambda *args, original=decode._frames: itertools.islice(original(*args), 10))
    with pytest.raises(VideoError, match=r"clip\.mp4: decode failed near frame 11 of 60"):
        read_frames(clip, probe(clip), [3, 11], HEIGHT, WIDTH)


@pytest.mark.fault("data: a media file that changes while it is prepared")
def test_a_file_that_changed_since_the_probe_is_an_error(tmp_path, clip):
    shorter = encode(tmp_path / "clip.mp4", 20)
    with pytest.raises(VideoError, match=r"clip\.mp4: has changed since it was probed"):
        read_frames(shorter, probe(clip), [0], HEIGHT, WIDTH)


@pytest.mark.parametrize("indices", [[60], [-1, 3]])
def test_indices_out_of_range(clip, indices):
    with pytest.raises(VideoError, match=r"0 \.\.\. 59"):
        read_frames(clip, probe(clip), indices, HEIGHT, WIDTH)


@pytest.mark.fault("data: headers of enormous videos")
def test_limits(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(packets, "MAX_FRAMES", COUNT - 1)
    with pytest.raises(VideoError, match="more than 59 frames; cut it into parts: `ffmpeg -i IN -c copy "):
        probe(clip)
    monkeypatch.setattr(packets, "MAX_FRAMES", COUNT)
    monkeypatch.setattr(faults, "MAX_SIDE", WIDTH - 1)
    with pytest.raises(VideoError, match="is 96x64; at most 95"):
        probe(clip)
    monkeypatch.setattr(faults, "MAX_SIDE", WIDTH)
    with pytest.raises(VideoError, match="is 128x64; at most 96"):
        probe(encode(tmp_path / "wide.mp4", 5, aspect=Fraction(4, 3)))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (64, 96), (128, 192), (48, 128), (33, 51)])
def test_resize(clip, height, width):
    frames = read_frames(clip, probe(clip), [7, 41], height, width)
    assert (frames.shape, frames.dtype) == ((2, height, width, 3), np.uint8)
    assert numbers_in(frames) == [7, 41]


def test_frames_are_shrunk_as_they_are_decoded(tmp_path):
    path = tmp_path / "large.mp4"
    write_video(path, np.zeros((24, 512, 768, 3), np.uint8), 8)
    info = probe(path)
    tracemalloc.start()
    try:
        frames = read_frames(path, info, range(24), 32, 48)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert frames.shape == (24, 32, 48, 3)
    assert peak < 2 * 512 * 768 * 3  # less than 24 frames at full size or in fp32 would take


def test_shrinking_averages(tmp_path):
    stripes = np.zeros((3, 128, 128, 3), np.uint8)
    stripes[:, :, ::2] = 255
    write_video(tmp_path / "stripes.mp4", stripes, 8, crf=1)
    frames = read_frames(tmp_path / "stripes.mp4", probe(tmp_path / "stripes.mp4"), range(3), 32, 32)
    assert np.abs(frames[:, 2:-2, 2:-2].astype(int) - 128).max() < 12


def area(count: int, size: int) -> np.ndarray:
    """Returns an array (size, count) with the share of each of ``count`` pixels that one of ``size`` pixels covers."""
    edges = np.linspace(0, count, size + 1)
    overlap = np.minimum(edges[1:, None], np.arange(count) + 1) - np.maximum(edges[:-1, None], np.arange(count))
    return np.clip(overlap, 0, None) * size / count


def test_shrinking_is_area_averaging_to_within_rounding(real_clips):
    path = real_clips / "videos" / "rabbit_stands.mp4"
    info, height, width = probe(path), 250, 401
    small = read_frames(path, info, [0, 20], height, width)
    full = read_frames(path, info, [0, 20], info.height, info.width).astype(float)
    expected = np.stack(
        [
            area(info.height, height) @ full_HW @ area(info.width, width).T
            for full_HW in full.transpose(0, 3, 1, 2).reshape(-1, info.height, info.width)
        ]
    )
    error = np.abs(small.transpose(0, 3, 1, 2).reshape(expected.shape) - expected)
    assert error.mean() < 0.5
    assert np.quantile(error, 0.999) < 6


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]


def test_written_videos_read_back(tmp_path):
    frames = np.stack([np.full((33, 51, 3), color, np.uint8) for color in COLORS])
    write_video(tmp_path / "out.mp4", frames, 8.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    info = probe(tmp_path / "out.mp4")
    assert (info.num_frames, info.height, info.width) == (6, 34, 52)
    assert info.fps == pytest.approx(8)
    back = read_frames(tmp_path / "out.mp4", info, range(6), 34, 52)
    assert np.abs(back.astype(int) - np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")).max() <= 3


@pytest.mark.parametrize(("matrix", "tag"), [("ITU709", 1), ("ITU601", 6)])
@pytest.mark.parametrize(("sampling", "full"), [("MPEG", 1), ("JPEG", 2)])
def test_colors_follow_the_tags_of_the_file(tmp_path, matrix, tag, sampling, full):
    path = tmp_path / "colors.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, full
        for color in COLORS:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), color, np.uint8))
            options = {"dst_colorspace": matrix, "dst_color_range": sampling}
            container.mux(stream.encode(frame.reformat(format="yuv420p", **options)))
        container.mux(stream.encode())
    back = read_frames(path, probe(path), range(6), 32, 32)
    assert np.abs(back[:, 16, 16].astype(int) - COLORS).max() <= 4


def test_the_same_frames_make_the_same_file(tmp_path):
    """The file does not depend on what is in the memory that the encoder gets."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :96]
    waves = [np.stack([127 + 100 * np.sin(x / 9 + f + y / (7 + c)) for c in range(3)], -1) for f in range(9)]
    files = set()
    for _ in range(12):
        used = [rng.integers(0, 255, rng.integers(1000, 400_000), dtype=np.uint8) for _ in range(50)]
        del used
        write_video(tmp_path / "out.mp4", np.stack(waves).astype(np.uint8), 8.0)
        files.add((tmp_path / "out.mp4").read_bytes())
    assert len(files) == 1


@pytest.mark.fault("disk: a video cannot be written")
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def fill_the_disk(path: Path, *_):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(decode, "_encode", fill_the_disk)
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="no space"):
        write_video(target, np.zeros((2, 16, 16, 3), np.uint8), 8.0)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.mp4", b"old")]


@pytest.mark.fault("disk: a video that cannot be fsynced")
def test_a_video_gets_its_name_after_it_was_synced_to_disk(tmp_path, monkeypatch):
    seen, real = [], os.fsync

    def seen_fsync(handle: int) -> None:
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), os.listdir(tmp_path)))
        real(handle)

    frames, target = np.zeros((2, 16, 16, 3), np.uint8), tmp_path / "out.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", seen_fsync)
        write_video(target, frames, 8.0)
    ((name, there),) = seen
    assert there == [name]
    assert name.startswith(".out.mp4.")
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(DiskError, match="Input/output error"):
        write_video(target, frames, 8.0)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.mp4", b"old")]


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 16, 16, 3)), np.zeros((2, 3, 16, 16), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_only_uint8_rgb_is_written(tmp_path, frames):
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "out.mp4", frames, 8.0)


def test_workers_do_not_import_torch():
    modules = ("data.media.pixels.decode", "data.media.transforms", "config.buckets", "data.forms.samples")
    imports = "".join(f"import cogvideox.{name}; " for name in modules)
    script = f"{imports}import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(decode.__file__).parents[4])


def test_errors_of_the_machine_differ_from_errors_of_the_file(tmp_path, clip, monkeypatch):
    path = tmp_path / "clip.mkv"
    path.write_bytes(encode(tmp_path / "whole.mkv").read_bytes()[:300])  # FFmpeg reports an input/output error for it
    with pytest.raises(VideoError, match=r"clip\.mkv: cannot be read"):
        probe(path)
    monkeypatch.setattr(faults, "_is_readable", lambda path: False)
    with pytest.raises(OSError, match=r"clip\.mkv: Input/output error"):
        probe(path)


def test_a_lack_of_memory_stays_a_memory_error(clip, monkeypatch):
    def fail(*_):
        raise MemoryError

    info = probe(clip)
    monkeypatch.setattr(decode, "_write_pixels", fail)
    with pytest.raises(MemoryError):
        read_frames(clip, info, [0], HEIGHT, WIDTH)
