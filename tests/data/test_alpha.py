"""Transparent videos are composited on black, no hidden color shows, and opaque files keep their pixels bit for bit."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from numbered import VPX, encode, plain, resized, written
from PIL import Image

from cogvideox.data.media.pixels.decode import probe, read_frames

HEIGHT, WIDTH = 64, 96
HIDDEN, COLOR = (250, 20, 240), (200, 100, 50)
VPX_ALPHA = VPX | {"auto-alt-ref": "0", "lag-in-frames": "0", "crf": "4", "b:v": "0"}

# container, encoder, pixel format, options, and how far coding moves a color
WAYS: dict[str, tuple[str, str, str, dict[str, str], int]] = {
    "prores_4444.mov": ("mov", "prores_ks", "yuva444p10le", {"profile": "4444", "qscale": "1"}, 3),
    "vp9.webm": ("webm", "libvpx-vp9", "yuva420p", VPX_ALPHA, 8),
    "vp8.webm": ("webm", "libvpx", "yuva420p", VPX_ALPHA, 8),
    "png.mov": ("mov", "png", "rgba", {}, 1),
    "png_16.mov": ("mov", "png", "rgba64be", {}, 1),
    "qtrle.mov": ("mov", "qtrle", "argb", {}, 1),
    "ffv1.mkv": ("matroska", "ffv1", "bgra", {}, 1),
    "ffv1_yuva.mkv": ("matroska", "ffv1", "yuva420p", {}, 3),
    "ffv1_16.mkv": ("matroska", "ffv1", "rgba64le", {}, 1),
    "ffvhuff.avi": ("avi", "ffvhuff", "yuva420p", {}, 3),
}


def sprite(alpha: int = 128, hidden: Sequence[int] = HIDDEN) -> np.ndarray:
    """Returns RGBA frames: a hidden color on the left, the color at ``alpha`` in the middle, opaque on the right."""
    pixels = np.empty((HEIGHT, WIDTH, 4), np.uint8)
    pixels[:, :32], pixels[:, 32:64], pixels[:, 64:] = (*hidden, 0), (*COLOR, alpha), (*COLOR, 255)
    return pixels


def made(name: str, frames: Sequence[np.ndarray], folder: Path) -> Path:
    container, codec, pix_fmt, options, _ = WAYS[name]
    path = folder / name
    path.write_bytes(encode(container, codec, frames, pix_fmt=pix_fmt, options=options))
    return path


def read(path: Path, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    info = probe(path)
    return read_frames(path, info, range(info.num_frames), height, width).astype(int)


def plain_decode(path: Path, height: int, width: int) -> np.ndarray:
    """Returns the frames scaled in one step and without alpha, as they were read before transparency had a rule."""
    with av.open(str(path)) as container:
        return np.stack([resized(frame, height, width) for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", WAYS)
def test_videos_are_composited_on_black(tmp_path: Path, name: str) -> None:
    path = made(name, [sprite()] * 3, tmp_path)
    assert probe(path).conversions == ("alpha on black",)
    for frame in read(path):
        away = [np.abs(frame[8:-8, x] - color).max() for x, color in seen()]
        assert max(away) <= WAYS[name][-1], away


def seen() -> list[tuple[int, np.ndarray]]:
    """Returns columns in the middle of the three parts, and the color that each shows."""
    return [(16, np.zeros(3)), (48, np.array(COLOR) * 128 / 255), (80, np.array(COLOR))]


@pytest.mark.parametrize("name", ["png.mov", "ffv1.mkv", "qtrle.mov"])
@pytest.mark.parametrize("size", [(16, 24), (40, 57), (64, 96), (150, 200)])
def test_hidden_colors_do_not_reach_the_edges(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Hidden colors under alpha 0 change no pixel, whether the picture shrinks or grows."""
    one, other = (read(made(name, [sprite(hidden=color)], tmp_path), *size) for color in (HIDDEN, (0, 0, 0)))
    assert (one == other).all()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("size", [(30, 40), (64, 96), (100, 160)])
def test_opaque_files_keep_their_pixels(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2, HEIGHT, WIDTH, 4), dtype=np.uint8)
    noise[..., 3] = 255
    path = made(name, list(noise), tmp_path)
    assert (read(path, *size) == plain_decode(path, *size)).all()


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("matroska", "ffv1")])
def test_files_without_alpha_are_not_converted(tmp_path: Path, container: str, codec: str) -> None:
    path = tmp_path / "plain"
    path.write_bytes(plain(container, codec))
    assert probe(path).conversions == ()
    assert (read(path, 30, 40) == plain_decode(path, 30, 40)).all()


def gif(path: Path, frames: Sequence[np.ndarray], **options: int) -> Path:
    first, *rest = [Image.fromarray(pixels) for pixels in frames]
    first.save(path, save_all=True, append_images=rest, duration=100, **options)
    return path


def moving(count: int = 3) -> list[np.ndarray]:
    """Returns a gif with an opaque square that moves to the right; the transparent rest has the hidden color white."""
    frames = np.zeros((count, HEIGHT, WIDTH, 4), np.uint8)
    frames[..., :3] = 255
    for number, pixels in enumerate(frames):
        pixels[16:48, 16 * number : 16 * number + 32] = (*COLOR, 255)
    return list(frames)


@pytest.mark.parametrize("count", [1, 3])
def test_gifs_are_composited_on_black(tmp_path: Path, count: int) -> None:
    path = gif(tmp_path / "a.gif", moving(count), disposal=2)
    assert probe(path).conversions == ("alpha on black",)
    for frame, drawn in zip(read(path), moving(count), strict=True):
        assert (frame == drawn[..., :3].astype(int) * (drawn[..., 3:] // 255)).all()


def test_a_gif_that_becomes_transparent_later_counts_as_transparent(tmp_path: Path) -> None:
    """The first frame covers the picture, and its disposal method clears it for the next frame."""
    opaque = np.dstack([np.full((HEIGHT, WIDTH, 3), 200, np.uint8), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    path = gif(tmp_path / "a.gif", [opaque, *moving(2)], disposal=2)
    data = bytearray(path.read_bytes())
    at = data.index(b"!\xf9\x04")
    assert data[at + 3] == 0x08  # clears, no transparent color
    # An unused color is the transparent one and the background, so that FFmpeg clears to transparency.
    data[11], data[at + 3], data[at + 6] = 255, 0x09, 255
    path.write_bytes(data)
    assert probe(path).conversions == ("alpha on black",)
    assert (read(path)[0] == 200).all()
    assert (read(path)[1][:8] == 0).all()


def test_opaque_gifs_keep_pixels_and_keys(tmp_path: Path) -> None:
    """This includes gifs whose transparent pixels only mean "unchanged", as programs that shrink gifs write them."""
    numbers = np.arange(3)[:, None, None, None] * 40
    frames = (np.indices((HEIGHT, WIDTH)).sum(0)[None, :, :, None] // 40 * 30 + numbers * [1, 0, 0]).astype(np.uint8)
    path = gif(tmp_path / "a.gif", list(frames))
    assert re.search(rb"!\xf9\x04[\x01\x05]", path.read_bytes()), "no frame has transparent pixels"
    assert probe(path).conversions == ()
    assert (read(path, 30, 40) == plain_decode(path, 30, 40)).all()


def test_transparent_palettes_in_videos(tmp_path: Path) -> None:
    """FFmpeg decodes them to pal8, which has no alpha component."""
    few = Image.fromarray(sprite()[..., :3]).quantize(4)
    hidden = few.getpixel((16, 16))
    memory = io.BytesIO()
    few.save(memory, "PNG", transparency=hidden)
    path = tmp_path / "palette.mov"
    path.write_bytes(packed(memory.getvalue()))
    assert probe(path).conversions == ("alpha on black",)
    frame = read(path)[0]
    assert (frame[:, :32] == 0).all()
    assert (np.abs(frame[:, 64:] - COLOR) <= 2).all()


def packed(png: bytes) -> bytes:
    """Returns a mov of one frame that consists of the bytes of a picture file."""

    def fill(output: av.container.OutputContainer) -> None:
        stream = output.add_stream("png", rate=8)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "rgba"
        packet = av.Packet(png)
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, 0, 0, True
        output.mux(packet)

    return written("mov", fill)
