"""Makes HDR and wide-gamut videos for tests, and the reference pictures into which FFmpeg converts them.

The references are made once, by an FFmpeg that has zscale and libvpx. `python tests/shared/hdr.py --write` encodes each
gradient without loss, converts it with CHAIN, and stores the pictures that the reader decodes from the result. It also
stores a VP9 file, because PyAV cannot write one with 10 bits.
"""

import argparse
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

from numbered import RATE, add_stream, pictures, written

from cogvideox.data.media.pixels.decode import probe, read_frames

SAMPLES = Path(__file__).parents[1] / "samples"
VP9 = SAMPLES / "hlg_vp9.webm"  # the numbered pictures; the libvpx of PyAV encodes 8 bits only
CHAIN = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=clip,zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
WHITE = 203  # cd/m2
BT709, BT2020, PQ, HLG, BT2020_10 = (
    1,
    9,
    16,
    18,
    14,
)  # numbers of AVColorPrimaries, AVColorSpace and AVColorTransferCharacteristic
TRANSFERS = {"hlg": HLG, "pq": PQ, "bt2020": BT2020_10}
_TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # ITU-R BT.2087
_LUMA = np.array([0.2627, 0.6780, 0.0593])
X265 = "keyint=12:log-level=none:pools=none:frame-threads=1"


def signal_of(light: np.ndarray, name: str) -> np.ndarray:
    """Returns the signal, 0 to 1, that a file of this kind stores for linear light in units of white."""
    if name == "pq":
        power = np.clip(light * WHITE / 10000, 0, 1) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    if name == "hlg":
        scene = np.clip(light * WHITE / 1000, 0, 1) ** (1 / 1.2)
        bright = 0.17883277 * np.log(np.maximum(12 * scene, 1) - 0.28466892) + 0.55991073
        return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)
    return np.clip(light, 0, 1) ** (1 / 2.4)


def gradient(name: str, height: int = 96, width: int = 128) -> np.ndarray:
    """Returns linear light of bt2020, (H, W, 3): from black to 6 times white, with hues from top to bottom."""
    brightness = np.linspace(0, 1 if name == "bt2020" else 1.8, width)[None, :, None] ** 3
    angle = np.linspace(0, 2 * np.pi, height)[:, None, None] + np.array([0, 2, 4]) * np.pi / 3
    return brightness * (0.8 + 0.2 * np.cos(angle))


def light_of(picture_HWC: np.ndarray) -> np.ndarray:
    """Returns a uint8 SDR picture as linear light of bt2020."""
    return (picture_HWC / 255) ** 2.4 @ _TO_BT2020.T


def frame_of(light_HWC: np.ndarray, name: str, pix_fmt: str, full_range: bool = False) -> av.VideoFrame:
    """Returns linear light of bt2020 as a frame of this kind, without swscale, whose codes are off by 255/256."""
    signal = signal_of(light_HWC, name)
    luma = signal @ _LUMA
    blue, red = ((signal[..., channel] - luma) / (2 - 2 * _LUMA[channel]) for channel in (2, 0))
    scales, zero = ((65535, 65535), 0) if full_range else ((219 << 8, 224 << 8), 16 << 8)
    codes = (zero + scales[0] * luma, 32768 + scales[1] * blue, 32768 + scales[1] * red)
    frame = av.VideoFrame(luma.shape[1], luma.shape[0], "yuv444p16le")
    for plane, values in zip(frame.planes, codes, strict=True):
        lines = np.frombuffer(memoryview(plane), np.uint16).reshape(plane.height, -1)
        lines[:, : plane.width] = np.clip(np.rint(values), 0, 65535)
    frame.color_range = 2 if full_range else 1
    frame.colorspace = BT2020
    return frame.reformat(format=pix_fmt, interpolation="AREA", dst_color_range=frame.color_range, threads=1)


def video(
    name: str,
    container: str = "mp4",
    codec: str = "libx265",
    lights: Sequence[np.ndarray] | None = None,
    *,
    pix_fmt: str = "yuv420p10le",
    full_range: bool = False,
    tagged: bool = True,
    **options: str,
) -> bytes:
    """Returns a file of a kind ("hlg", "pq", "bt2020") with the given linear light, or with the numbered pictures."""
    shown = [light_of(picture) for picture in pictures()] if lights is None else lights
    chosen = {"libx265": {"preset": "ultrafast", "x265-params": X265}, "libsvtav1": {"preset": "12", "g": "12"}}
    chosen["libsvtav1"]["svtav1-params"] = "lp=1"

    def fill(output: Any) -> None:
        stream = add_stream(output, codec, shown[0], pix_fmt, **(chosen.get(codec, {}) | options))
        if tagged:
            context = stream.codec_context
            context.color_trc, context.color_primaries, context.colorspace = TRANSFERS[name], BT2020, BT2020
            context.color_range = 2 if full_range else 1
        for place, light in enumerate(shown):
            frame = frame_of(light, name, pix_fmt, full_range)
            frame.pts, frame.time_base = place, Fraction(1, RATE)
            if not tagged:
                frame.colorspace, frame.color_range = 2, 0
            output.mux(stream.encode(frame))
        output.mux(stream.encode())

    return written(container, fill)


def lossless(name: str) -> bytes:
    """Returns a file with the gradient, encoded without loss."""
    return video(name, "matroska", "ffv1", [gradient(name)])


def tagged_by_container(data: bytes, name: str) -> bytes:
    """Returns an mp4 whose stream has no color tags, but whose sample description has a box with them."""
    colr = b"nclx" + struct.pack(">HHHB", BT2020, TRANSFERS[name], BT2020, 0)
    return with_box(data, b"colr", colr)


def dolby_vision_8_4(data: bytes) -> bytes:
    """Returns an mp4 of HLG that is marked as the base layer of Dolby Vision 8.4, as phones do."""
    profile, level, rpu, base_layer, compatible = 8, 4, 1, 1, 4
    bits = profile << 9 | level << 3 | rpu << 2 | base_layer
    return with_box(data, b"dvvC", struct.pack(">BBHB19x", 1, 0, bits, compatible << 4))


def with_box(data: bytes, kind: bytes, payload: bytes) -> bytes:
    """Adds a box at the end of the sample description of the video in an mp4 whose index is at the end of the file."""
    boxes = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"hev1")
    starts: list[int] = []
    for box in boxes:
        starts.append(data.index(box, starts[-1] if starts else 0) - 4)
    box_size = 8 + len(payload)
    changed = bytearray(data)
    for start in starts:
        (size,) = struct.unpack_from(">I", data, start)
        struct.pack_into(">I", changed, start, size + box_size)
    end = starts[-1] + struct.unpack_from(">I", data, starts[-1])[0]
    return bytes(changed[:end]) + struct.pack(">I", box_size) + kind + payload + bytes(changed[end:])


def reference(name: str) -> Path:
    """Returns the path of the gradient as FFmpeg converts it, at its original size."""
    return SAMPLES / f"{name}_as_sdr.png"


def converted(data: bytes, folder: Path) -> np.ndarray:
    """Returns the first frame as FFmpeg converts it to bt709, uint8 (H, W, 3)."""
    source, target = folder / "source.mkv", folder / "target.mkv"
    source.write_bytes(data)
    tags = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv")
    command = ("ffmpeg", "-y", "-v", "error", "-i", source, "-vf", CHAIN, "-c:v", "ffv1", *tags, target)
    subprocess.run(command, check=True)
    info = probe(target)
    return read_frames(target, info, [0], info.height, info.width)[0]


def main() -> None:
    """Writes the samples."""
    parser = argparse.ArgumentParser(description="Stores what FFmpeg makes of HDR gradients, and a VP9 file.")
    parser.add_argument("--write", action="store_true", required=True, help="needs ffmpeg with zscale and libvpx")
    parser.parse_args()
    vp9 = ("-c:v", "libvpx-vp9", "-profile:v", "2", "-g", "12", "-deadline", "realtime", "-cpu-used", "8", "-crf", "20")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in TRANSFERS:
            Image.fromarray(converted(lossless(kind), folder)).save(reference(kind))
        (folder / "numbers.mkv").write_bytes(video("hlg", "matroska", "ffv1"))
        subprocess.run(("ffmpeg", "-y", "-v", "error", "-i", folder / "numbers.mkv", *vp9, VP9), check=True)


if __name__ == "__main__":
    main()
