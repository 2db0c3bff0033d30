"""pictures.py and icc.py: each kind of pixel, each orientation and color profile, and what must be refused."""

import io
import re
import shlex
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from cogvideox.data.media import faults
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels.decode import probe, read_frames

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


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "avif"])
def test_a_picture_is_a_clip_of_one_frame(tmp_path: Path, suffix: str) -> None:
    quality = {"quality": 100} if suffix in ("jpg", "jpeg", "webp", "avif") else {}
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


def on_black(color: tuple[int, int, int, int]) -> list[float]:
    return [value * color[3] / 255 for value in color[:3]]


def deep_png(path: Path, values: np.ndarray, clear: tuple[int, ...] = ()) -> Path:
    """Writes a PNG file with 16 bits per channel without a library, because libraries may mix up the byte order.

    Args:
        path: The file.
        values: Pixels of shape (H, W, C).
        clear: The transparent color.
    """
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, kind, 0, 0, 0)
    key = [(b"tRNS", struct.pack(f">{len(clear)}H", *clear))] if clear else []
    chunks = [(b"IHDR", header), *key, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    values = (np.arange(HEIGHT * WIDTH, dtype=np.uint16) * 17).reshape(HEIGHT, WIDTH)
    for path in (
        deep_png(tmp_path / "deep.png", values[..., None]),
        saved(tmp_path / "deep.tif", Image.fromarray(values)),
    ):
        assert (read(path) == (values >> 8)[..., None]).all()


@pytest.mark.parametrize("color", [(200, 100, 50, 255), (200, 100, 50, 128), (200, 100, 50, 0)])
def test_transparency_is_composited_on_black(tmp_path: Path, color: tuple[int, int, int, int]) -> None:
    path = saved(tmp_path / "clear.png", Image.new("RGBA", (WIDTH, HEIGHT), color))
    assert np.abs(read(path) - np.array(on_black(color))).max() <= 1


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    few = Image.fromarray(slope() // 128 * 128).quantize(16)
    assert (read(saved(tmp_path / "p.png", few)) == np.asarray(few.convert("RGB"))).all()
    is_clear = np.asarray(few) == 3
    clear = read(saved(tmp_path / "q.png", few, transparency=3))
    assert is_clear.any()
    assert (clear == np.where(is_clear[..., None], 0, np.asarray(few.convert("RGB")))).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_color_of_16_bits(tmp_path: Path, channels: int) -> None:
    """Pillow compares the lower bits of the transparent color with the upper bits of the pixels."""
    values = np.full((HEIGHT, WIDTH, channels), 50_000, np.uint16)
    values[:, :40] = 1000 + 300 * np.arange(channels)
    path = deep_png(tmp_path / "deep.png", values, tuple(values[0, 0].tolist()))
    assert probe(path).conversions == ("alpha on black",)
    assert (read(path) == np.where(np.arange(WIDTH)[:, None] < 40, 0, 50_000 >> 8)).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_of_16_bits(tmp_path: Path, channels: int) -> None:
    values = np.full((HEIGHT, WIDTH, channels), 50_000, np.uint16)
    values[..., -1] = np.linspace(0, 65535, WIDTH)
    path = deep_png(tmp_path / "deep.png", values)
    expected = (50_000 >> 8) * (values[..., -1:] >> 8) / 255
    assert np.abs(read(path) - expected).max() <= 1
    assert probe(path).conversions == ()


@pytest.mark.parametrize("suffix", ["png", "webp", "avif", "tif"])
def test_hidden_colors_do_not_reach_the_edges(tmp_path: Path, suffix: str) -> None:
    """Hidden colors under alpha 0 change no visible pixel, whether the picture shrinks or grows."""
    lossless: dict[str, Any] = {"webp": {"lossless": True, "exact": True}, "avif": {"quality": 100}}.get(suffix, {})
    frames = []
    for hidden in (0, 255):
        pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
        pixels[:, :37] = (hidden, hidden, hidden, 0)
        frames.append(saved(tmp_path / f"{hidden}.{suffix}", Image.fromarray(pixels), **lossless))
    for size in ((HEIGHT, WIDTH), (20, 30), (100, 170)):
        one, other = (read(path, *size).astype(int) for path in frames)
        assert np.abs(one - other).max() <= (12 if suffix == "avif" else 0)  # neighboring pixels of avif share chroma
        assert (one[:, : size[1] * 30 // WIDTH] == 0).all()


@pytest.mark.parametrize("premultiplied", [False, True])
def test_premultiplied_avif(tmp_path: Path, premultiplied: bool) -> None:
    picture = Image.new("RGBA", (WIDTH, HEIGHT), (100, 50, 20, 128))
    path = saved(tmp_path / "a.avif", picture, quality=100, alpha_premultiplied=premultiplied)
    assert np.abs(read(path).astype(int) - (50, 25, 10)).max() <= 2


def test_premultiplied_tiff(tmp_path: Path) -> None:
    """The file says that its colors are multiplied by alpha already (ExtraSamples 1), or that they are not (2)."""
    path = saved(tmp_path / "a.tif", Image.new("RGBA", (WIDTH, HEIGHT), (100, 50, 20, 128)))
    data, extra_samples = path.read_bytes(), struct.pack("<HHI", 338, 3, 1)
    at = data.index(extra_samples) + len(extra_samples)
    for extra, expected in {1: (100, 50, 20), 2: (50, 25, 10)}.items():
        path.write_bytes(data[:at] + struct.pack("<H", extra) + data[at + 2 :])
        assert np.abs(read(path).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)])
def test_cmyk(tmp_path: Path, color: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (WIDTH, HEIGHT), color).convert("CMYK")
    for name in ("c.jpg", "c.tif"):
        assert np.abs(read(saved(tmp_path / name, picture)).astype(int) - color).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray(tmp_path: Path, mode: str) -> None:
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


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["jpg", "tif", "lzw.tif", "webp", "avif"])
def test_orientation_is_applied_in_every_format(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    compressed: dict[str, Any] = {"lzw.tif": {"compression": "tiff_lzw"}, "tif": {}}.get(suffix, {"quality": 100})
    path = saved(tmp_path / f"turned.{suffix}", Image.fromarray(slope()), exif=exif, **compressed)
    expected = UPRIGHT[orientation](slope())
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    assert np.abs(read(path).astype(int) - expected).max() <= (0 if suffix.endswith("tif") else 12)


def test_shrinking_averages_and_enlarging_is_smooth(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(read(saved(tmp_path / "s.png", Image.fromarray(stripes)), 16, 16).astype(int) - 128).max() <= 1
    means = slope().reshape(HEIGHT // 4, 4, WIDTH // 4, 4, 3).mean((1, 3))
    path = saved(tmp_path / "a.png", Image.fromarray(slope()))
    assert np.abs(read(path, HEIGHT // 4, WIDTH // 4) - means).max() <= 1
    large = read(path, HEIGHT * 3, WIDTH * 3).astype(int)
    assert np.abs(np.diff(large, axis=1))[6:-6, 6:-6].max() <= 3  # blocks would step by 3 * 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "avif"])
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
    assert len(said) >= len(cuts) - 1  # the last bytes of some formats are not needed for the pixels
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in said)


@pytest.mark.parametrize(
    ("suffix", "fix"),
    [
        ("png", "convert it: `ffmpeg -i IN -c:v ffv1 OUT.mkv`"),
        ("avif", 'convert it: `python -c "from PIL import Image; '),
        ("webp", 'convert it: `python -c "from PIL import Image; '),
        ("tif", "save each one as a separate file"),
    ],
)
def test_several_pictures_in_a_file_are_refused(tmp_path: Path, suffix: str, fix: str) -> None:
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "green", "blue")]
    path = saved(tmp_path / f"three.{suffix}", pictures[0], save_all=True, append_images=pictures[1:])
    with pytest.raises(VideoError, match=rf"three\..* holds 3 pictures.*; {re.escape(fix)}"):
        probe(path)


@pytest.mark.parametrize("suffix", ["png", "webp", "avif"])
def test_the_commands_for_animated_pictures_work(tmp_path: Path, suffix: str) -> None:
    """They keep the colors, the times and the transparency. The step of ffmpeg is done by its libraries."""
    opaque = [Image.new("RGBA", (WIDTH, HEIGHT), color) for color in ("red", "green", "blue")]
    pictures = [picture.copy() for picture in opaque]
    for picture in pictures:
        picture.paste((255, 255, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    more = {"append_images": pictures[1:], "duration": 50, **({} if suffix == "png" else {"quality": 100})}
    path = saved(tmp_path / f"a.{suffix}", pictures[0], save_all=True, **more)
    with pytest.raises(VideoError) as caught:
        probe(path)
    *by_pillow, to_video = str(caught.value).split("`")[1::2]
    for command in by_pillow:
        words = command.removeprefix("python").replace("IN'", f"{path}'").replace("OUT", str(tmp_path / "OUT"))
        subprocess.run(shlex.split(sys.executable + words), check=True)
    _, _, source, *codec, target = shlex.split(to_video)
    assert (source, codec) == ("OUT.png" if by_pillow else "IN", ["-c:v", "ffv1"])
    with av.open(str(tmp_path / source if by_pillow else path)) as given, av.open(str(tmp_path / target), "w") as made:
        stream = made.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "bgra"
        for frame in given.decode(video=0):
            made.mux(stream.encode(frame))
        made.mux(stream.encode())
    info = probe(tmp_path / target)
    assert (info.num_frames, info.fps) == (3, pytest.approx(20))
    frames = read_frames(tmp_path / target, info, range(3), HEIGHT, WIDTH)
    for frame, picture in zip(frames, opaque, strict=True):
        assert np.abs(frame[:, : WIDTH // 2 - 1] - np.asarray(picture, int)[:, : WIDTH // 2 - 1, :3]).max() <= 2
        assert frame[:, WIDTH // 2 + 1 :].max() <= 2


def test_the_first_picture_of_an_mpo_is_read(tmp_path: Path) -> None:
    """Cameras and phones store previews, other views and HDR gain maps after the photograph."""
    gain_map = Image.new("RGB", (WIDTH // 2, HEIGHT // 2), "white")
    options: dict[str, Any] = {"quality": 100, "append_images": [gain_map]}
    path = saved(tmp_path / "a.jpg", Image.fromarray(slope()), format="MPO", save_all=True, **options)
    assert probe(path).codec == "mpo"
    assert np.abs(read(path).astype(int) - slope()).max() <= 12


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"hevc\0\0\0\0msf1hevc"])
def test_heic_is_refused_with_a_fix(tmp_path: Path, brands: bytes) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(99))
    with pytest.raises(VideoError, match=r"is a HEIC picture, .*; convert it: `magick IN OUT.jpg`"):
        probe(path)


# Display P3 and sRGB relative to the white of profiles: the columns are red, green and blue.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def profile(primaries: np.ndarray, space: bytes = b"RGB ") -> bytes:
    """Returns an ICC profile with these primaries and the transfer curve of sRGB."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    tags |= {
        name + b"XYZ": b"XYZ " + bytes(4) + fixed(*xyz)
        for name, xyz in zip((b"r", b"g", b"b"), primaries.T, strict=True)
    }
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    start = 132 + 12 * len(tags)
    offsets = np.cumsum([start, *(len(tag) for tag in tags.values())]).tolist()
    table = struct.pack(">I", len(tags))
    for at, (name, tag) in zip(offsets, tags.items(), strict=False):
        table += struct.pack(">4sII", name, at, len(tag))
    header = struct.pack(">I4xI4s4s4s12x4s", offsets[-1], 0x04000000, b"mntr", space, b"XYZ ", b"acsp")
    header = header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + table + b"".join(tags.values())


def to_srgb(pixels: np.ndarray) -> np.ndarray:
    """Converts Display P3 to sRGB in linear light; colors outside the gamut are clipped."""
    values = pixels / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ (np.linalg.inv(SRGB) @ P3).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
def test_display_p3_becomes_srgb(tmp_path: Path, suffix: str) -> None:
    lossy = {"quality": 100} if suffix in ("jpg", "webp", "avif") else {}
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(slope()), icc_profile=profile(P3), **lossy)
    assert probe(path).conversions == (("avif", "icc") if suffix == "avif" else ("icc",))
    expected = to_srgb(slope().astype(float))
    assert np.abs(expected - slope()).max() > 15
    error = np.abs(read(path) - expected)
    assert error.max() <= (40 if lossy else 2)
    assert error.mean() <= (4 if lossy else 1)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_profiles_of_transparent_pictures_and_palettes(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (WIDTH, HEIGHT), (60, 200, 90, 128)).convert(mode)
    path = saved(tmp_path / "a.png", picture, icc_profile=profile(P3))
    expected = to_srgb(np.array((60.0, 200.0, 90.0))) * 128 / 255
    assert np.abs(read(path) - expected).max() <= 3


@pytest.mark.parametrize(
    "content",
    [profile(SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"junk", profile(P3)[:150]],
    ids=["srgb", "srgb_of_lcms", "junk", "cut_off"],
)
def test_profiles_that_change_nothing(tmp_path: Path, content: bytes) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(slope()), icc_profile=content)
    assert probe(path).conversions == ()
    assert (read(path) == slope()).all()


def test_an_animated_gif_is_a_video(tmp_path: Path) -> None:
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in colors]
    path = saved(tmp_path / "a.gif", pictures[0], save_all=True, append_images=pictures[1:], duration=100)
    info = probe(path)
    assert (info.num_frames, info.codec, info.fps) == (3, "gif", pytest.approx(10))
    assert np.abs(read_frames(path, info, range(3), 8, 8)[:, 4, 4].astype(int) - colors).max() <= 1


def large_png(height: int, width: int) -> bytes:
    """Returns a PNG file whose header declares this size."""
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


def test_a_lack_of_memory_stays_a_memory_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(slope()))
    info = probe(path)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(MemoryError):
        read_frames(path, info, [0], 8, 8)


def test_the_size_limit_equals_that_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MAX_SIDE", WIDTH - 1)
    with pytest.raises(VideoError, match="is 80x48; at most 79"):
        probe(saved(tmp_path / "a.png", Image.fromarray(slope())))
