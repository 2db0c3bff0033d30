"""Still pictures against Pillow's own arithmetic: each kind of pixel, each orientation, and what must be refused."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvideox.data import faults
from cogvideox.data.decode import probe, read_frames
from cogvideox.data.faults import VideoError

HEIGHT, WIDTH = 48, 80
ORIENTATION = 0x0112


def slope(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 5, columns * 3, 255 - rows * 2 - columns], -1).astype(np.uint8)


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def read(path: Path, height: int | None = None, width: int | None = None) -> np.ndarray:
    info = probe(path)
    return read_frames(path, info, [0], height or info.height, width or info.width)[0]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff"])
def test_a_picture_is_a_clip_of_one_frame(tmp_path: Path, suffix: str) -> None:
    quality = {"quality": 100} if suffix in ("jpg", "jpeg", "webp") else {}
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(slope()), **quality)
    info = probe(path)
    assert (info.times, info.height, info.width, info.fps) == ((0.0,), HEIGHT, WIDTH, 1.0)
    assert info.codec == {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
    frames = read_frames(path, info, [0, 0, 0], HEIGHT, WIDTH)
    assert frames.shape == (3, HEIGHT, WIDTH, 3)
    error = np.abs(frames.astype(int) - slope()).max()
    assert error <= (12 if quality else 0)


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(slope()))
    other = path.rename(tmp_path / "clip.mp4")
    assert probe(other).codec == "png"
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(VideoError, match=r"b\.png: cannot be read"):
        probe(tmp_path / "b.png")


def on_black(colour: tuple[int, int, int, int]) -> list[float]:
    return [value * colour[3] / 255 for value in colour[:3]]


def deep_png(path: Path) -> Path:
    """16 bits of grey, written by hand: byte order is where readers go wrong."""
    rows = (np.arange(HEIGHT * WIDTH, dtype=np.uint16) * 17).reshape(HEIGHT, WIDTH)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    values = (np.arange(HEIGHT * WIDTH, dtype=np.uint16) * 17).reshape(HEIGHT, WIDTH)
    for path in (deep_png(tmp_path / "deep.png"), saved(tmp_path / "deep.tif", Image.fromarray(values))):
        assert (read(path) == (values >> 8)[..., None]).all()


@pytest.mark.parametrize("colour", [(200, 100, 50, 255), (200, 100, 50, 128), (200, 100, 50, 0)])
def test_transparency_is_laid_on_black(tmp_path: Path, colour: tuple[int, int, int, int]) -> None:
    path = saved(tmp_path / "clear.png", Image.new("RGBA", (WIDTH, HEIGHT), colour))
    assert np.abs(read(path) - np.array(on_black(colour))).max() <= 1


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    few = Image.fromarray(slope() // 128 * 128).quantize(16)
    assert (read(saved(tmp_path / "p.png", few)) == np.asarray(few.convert("RGB"))).all()
    place = np.asarray(few) == 3
    clear = read(saved(tmp_path / "q.png", few, transparency=3))
    assert place.any()
    assert (clear == np.where(place[..., None], 0, np.asarray(few.convert("RGB")))).all()


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)])
def test_cmyk(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (WIDTH, HEIGHT), colour).convert("CMYK")
    for name in ("c.jpg", "c.tif"):
        assert np.abs(read(saved(tmp_path / name, picture)).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(slope()).convert(mode)
    assert (read(saved(tmp_path / "g.png", picture)) == np.asarray(picture.convert("RGB"))).all()


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    if mode == "I;16":
        values = np.repeat(slope()[..., :1], 3, axis=2)
        picture = Image.fromarray(values[..., 0].astype(np.uint16) << 8)
    else:
        values, picture = slope(), Image.fromarray(slope()).convert(mode)
    expected = UPRIGHT[orientation](values)
    path = saved(tmp_path / "turned.png", picture, exif=exif)
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    assert (read(path) == expected).all()


def test_shrinking_averages_and_enlarging_is_smooth(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(read(saved(tmp_path / "s.png", Image.fromarray(stripes)), 16, 16).astype(int) - 128).max() <= 1
    means = slope().reshape(HEIGHT // 4, 4, WIDTH // 4, 4, 3).mean((1, 3))
    path = saved(tmp_path / "a.png", Image.fromarray(slope()))
    assert np.abs(read(path, HEIGHT // 4, WIDTH // 4) - means).max() <= 1
    large = read(path, HEIGHT * 3, WIDTH * 3).astype(int)
    assert np.abs(np.diff(large, axis=1))[6:-6, 6:-6].max() <= 3  # blocks would step by 3 x 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_a_truncated_picture_is_an_error_wherever_it_ends(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    whole = saved(tmp_path / f"whole.{suffix}", Image.fromarray(noise))
    expected, data = read(whole), whole.read_bytes()
    path = tmp_path / f"cut.{suffix}"
    said = []
    cuts = range(4, len(data) - 1, max(1, len(data) // 60))
    for cut in cuts:
        path.write_bytes(data[:cut])
        try:
            assert (read(path) == expected).all()
        except VideoError as error:
            said.append(str(error))
    assert len(said) >= len(cuts) - 1  # the last few bytes of some formats hold no pixels
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in said)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_several_pictures_in_a_file_are_refused(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "green", "blue")]
    path = saved(tmp_path / f"three.{suffix}", pictures[0], save_all=True, append_images=pictures[1:])
    with pytest.raises(VideoError, match=r"three\..* holds 3 pictures.* convert it to mp4 or gif"):
        probe(path)


def test_an_animated_gif_is_a_video(tmp_path: Path) -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in colours]
    path = saved(tmp_path / "a.gif", pictures[0], save_all=True, append_images=pictures[1:], duration=100)
    info = probe(path)
    assert (info.num_frames, info.codec, info.fps) == (3, "gif", pytest.approx(10))
    assert np.abs(read_frames(path, info, range(3), 8, 8)[:, 4, 4].astype(int) - colours).max() <= 1


def large_png(height: int, width: int) -> bytes:
    """A header that promises many pixels."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (10, 16385, "is 16385x10; at most 16384"),
        (16000, 16000, "is 16000x16000; at most 100 million"),
        (20000, 20000, "is 20000x20000; at most 16384"),
    ],
)
def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, height: int, width: int, reason: str) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(large_png(height, width))
    with pytest.raises(VideoError, match=rf"bomb\.png: .*{reason}"):
        probe(path)


def test_32_bits_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "f.tif", Image.fromarray(np.ones((8, 8), np.float32)))
    with pytest.raises(VideoError, match="32 bits"):
        probe(path)


def test_a_picture_that_changed_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(slope()))
    info = probe(path)
    saved(path, Image.fromarray(slope(20, 20)))
    with pytest.raises(VideoError, match="has changed"):
        read_frames(path, info, [0], 8, 8)


def test_no_memory_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(slope()))
    info = probe(path)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(MemoryError):
        read_frames(path, info, [0], 8, 8)


def test_the_limit_is_that_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MAX_SIDE", WIDTH - 1)
    with pytest.raises(VideoError, match="is 80x48; at most 79"):
        probe(saved(tmp_path / "a.png", Image.fromarray(slope())))
