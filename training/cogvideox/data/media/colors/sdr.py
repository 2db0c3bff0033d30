"""Converts HDR and wide-gamut video to SDR with the colors of bt709.

``ColorTags`` determines what a file needs, and ``SdrConverter`` converts a frame. The steps are those of
`zscale=t=linear:npl=203,zscale=p=bt709,tonemap=clip,zscale=t=bt709` in FFmpeg: to linear light, in which 203 cd/m2 are
1.0; to the primaries of bt709; clipped above 1.0; to the transfer function of bt709. Nothing here imports torch.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

from cogvideox.data.media.colors.planes import EXACT_SCALING, plane_array
from cogvideox.data.media.faults import VideoError

WHITE = 203.0  # cd/m2 of HDR that become white; ITU-R BT.2408 gives this level for graphics and paper
HDR: dict[int, str] = {ColorTrc.ARIB_STD_B67: "hlg", ColorTrc.SMPTE2084: "pq"}
_GAMUTS: dict[int, str] = {
    ColorPrimaries.BT709: "bt709",
    ColorPrimaries.BT2020: "bt2020",
    ColorPrimaries.SMPTE432: "p3",
}
# CIE (x, y) of red, green and blue; white is D65 in all of them.
_CHROMATICITIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "p3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)
_LUMA = (0.2627, 0.6780, 0.0593)  # weights of bt2020, by which overly bright colors are faded toward white
_FADED_ABOVE = 2.0  # luma, in units of white
_CODES = 4096  # codes of 12 bits: HDR has 10 bits, and averages need more
_STRIP = 64  # rows that are converted at a time, so that intermediate results stay in the cache of the CPU
_OVERSAMPLING = 2
_ICTCP = (14, 15)  # color spaces of Dolby, as AVColorSpace counts
# Color spaces that swscale does not convert, as AVColorSpace counts.
_NOT_CONVERTED = {
    8: "YCgCo",
    10: "bt2020_cl",
    11: "SMPTE 2085",
    12: "chroma-derived-nc",
    13: "chroma-derived-c",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
UNSPECIFIED = 2  # the value of each color tag that means that it is not known
CONTAINER_MATRIX = "matrix of the container"  # a conversion that is needed where only the container has this tag


def is_wide_sdr(conversions: Sequence[str]) -> bool:
    """Returns whether conversions of ``ColorTags`` belong to an SDR video with a larger gamut than bt709."""
    return "bt2020" in conversions or ("p3" in conversions and not set(HDR.values()) & set(conversions))


@dataclass(frozen=True)
class ColorTags:
    """Holds the color tags of a stream or its container, as numbers of FFmpeg's enumerations.

    Attributes:
        transfer: Transfer function (AVColorTransferCharacteristic).
        primaries: Gamut (AVColorPrimaries).
        matrix: How YUV becomes RGB (AVColorSpace).
        from_container: Whether only the container has the matrix.
    """

    transfer: int
    primaries: int
    matrix: int
    from_container: bool = False

    @classmethod
    def of(cls, source: VideoFrame | VideoCodecContext) -> "ColorTags":
        """Returns the tags of a decoded frame, or those of the container from a decoder that has not decoded yet."""
        return cls(source.color_trc, source.color_primaries, source.colorspace)

    def filled(self, container: "ColorTags") -> "ColorTags":
        """Returns these tags, with unknown ones taken from the container.

        If the matrix is still unknown, HDR and bt2020 get the matrix of bt2020.
        """
        transfer, primaries, matrix = (
            theirs if ours == UNSPECIFIED else ours
            for ours, theirs in (
                (self.transfer, container.transfer),
                (self.primaries, container.primaries),
                (self.matrix, container.matrix),
            )
        )
        from_container = matrix != self.matrix
        if matrix == UNSPECIFIED and (transfer in HDR or primaries == ColorPrimaries.BT2020):
            matrix = Colorspace.BT2020
        return ColorTags(transfer, primaries, matrix, from_container)

    def conversions(self) -> tuple[str, ...]:
        """Returns the names of the conversions that a video with these tags needs, for ``SdrConverter``.

        They are "hlg" or "pq" for HDR, which has the gamut of bt2020 unless "bt709" or "p3" follows; "bt2020" or "p3"
        for SDR; and CONTAINER_MATRIX.
        """
        hdr = HDR.get(self.transfer)
        usual = "bt2020" if hdr else "bt709"
        gamut = _GAMUTS.get(self.primaries, usual)
        names = (hdr, None if gamut == usual else gamut, CONTAINER_MATRIX if self.from_container else None)
        return tuple(name for name in names if name)

    def lacks_matrix(self, pixels: VideoFormat) -> bool:
        """Returns whether pixels of this format need a matrix that is not known."""
        return self.matrix == UNSPECIFIED and len(pixels.components) >= 3 and not pixels.is_rgb

    def check(self, codec_tag: str) -> None:
        """Raises VideoError for colors that only Dolby can decode, or that swscale does not convert."""
        is_dolby = codec_tag in ("dvh1", "dvhe") and self.transfer == UNSPECIFIED
        if is_dolby or self.matrix in _ICTCP:
            fix = "convert it to HLG or SDR with a program that knows Dolby Vision"
            raise VideoError(f"has Dolby Vision colors (profile 5, ICtCp), which are not supported; {fix}")
        if name := _NOT_CONVERTED.get(self.matrix):
            fix = "re-encode it: `ffmpeg -i IN -vf zscale=matrix=709 OUT.mp4`"
            raise VideoError(f"has the color matrix {name}, which is not supported; {fix}")


class SdrConverter:
    """Converts the frames of one video to SDR, as full-range 8-bit RGB in planes ("gbrp")."""

    def __init__(self, conversions: Sequence[str]) -> None:
        """Prepares the conversion that the names from ``ColorTags.conversions`` ask for."""
        self._transfer = next((name for name in HDR.values() if name in conversions), None)
        gamut = next((name for name in _CHROMATICITIES if name in conversions), None)
        self._is_needed = bool(self._transfer or gamut)
        self._scaler = VideoReformatter()
        self._matrix = _to_bt709(gamut or "bt2020")

    def __call__(self, frame: VideoFrame, height: int, width: int) -> VideoFrame:
        """Returns the frame in SDR, or unchanged if it needs no conversion.

        Light should be clipped before pixels are averaged, because a glint that is averaged first brightens its
        neighbors. But converting each pixel of a 4K picture is slow. So the frame is first shrunk to twice its final
        size.

        Args:
            frame: A decoded frame.
            height: Height in pixels to which the caller will resize the result.
            width: Width in pixels, likewise.
        """
        if not self._is_needed:
            return frame
        size = min(frame.width, _OVERSAMPLING * width), min(frame.height, _OVERSAMPLING * height)
        method = Interpolation.AREA | EXACT_SCALING
        coded = self._scaler.reformat(frame, *size, "gbrp12le", interpolation=method, threads=1)
        light = _light_of_codes(self._transfer, _last_code(frame))
        shown = VideoFrame(*size, "gbrp")
        codes = [plane_array(plane, np.uint16) for plane in coded.planes]
        pixels = [plane_array(plane) for plane in shown.planes]
        for top in range(0, size[1], _STRIP):
            rows = slice(top, top + _STRIP)
            green, blue, red = (light[plane[rows]] for plane in codes)
            red, green, blue = _clipped(_multiplied(self._matrix, red, green, blue))
            for plane, channel in zip(pixels, (green, blue, red), strict=True):
                plane[rows] = _SHOWN[(np.sqrt(channel) * np.float32(_CODES - 1) + np.float32(0.5)).astype(np.uint16)]
        return shown


def _last_code(frame: VideoFrame) -> int:
    """Returns the 12-bit code that swscale gives to the full signal of a frame.

    swscale appends zero bits to codes with fewer bits, so the full signal of 8 bits, 255, becomes 4080 and not 4095.
    """
    is_full = frame.color_range == ColorRange.JPEG or frame.format.is_rgb
    bits = min(12, frame.format.components[0].bits) if is_full else 8
    return ((1 << bits) - 1) << (12 - bits)


@functools.cache
def _light_of_codes(transfer: str | None, last: int) -> np.ndarray:
    """Returns linear light, in units of white, for each 12-bit code; ``last`` is the code of the full signal."""
    to_light = {"pq": _pq_light, "hlg": _hlg_light, None: _sdr_light}[transfer]
    return to_light(np.minimum(np.arange(_CODES) / last, 1.0)).astype(np.float32)


def _pq_light(signal: np.ndarray) -> np.ndarray:
    """Converts a PQ signal by SMPTE ST 2084, in which 0 ... 1 is light of 0 ... 10000 cd/m2."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * (10000 / WHITE)


def _hlg_light(signal: np.ndarray) -> np.ndarray:
    """Converts an HLG signal by ITU-R BT.2100: to the light of the scene, then to that of a display of 1000 cd/m2.

    The gamma of such a display is 1.2. It is applied to each channel, as zimg does, and not to their luminance.
    """
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return scene**1.2 * (1000 / WHITE)


def _sdr_light(signal: np.ndarray) -> np.ndarray:
    """Converts an SDR signal by ITU-R BT.1886, the curve of displays, whatever the curve of the camera was."""
    return signal**2.4


# The 8-bit value of each 12-bit root of linear light.
_SHOWN = np.rint(255 * (np.arange(_CODES) / (_CODES - 1)) ** (2 / 2.4)).astype(np.uint8)


def _to_bt709(gamut: str) -> np.ndarray:
    """Returns the float32 matrix (3, 3) from linear RGB of a gamut to linear RGB of bt709."""
    return (np.linalg.inv(_to_xyz("bt709")) @ _to_xyz(gamut)).astype(np.float32)


def _to_xyz(gamut: str) -> np.ndarray:
    """Returns the matrix (3, 3) from linear RGB of a gamut to CIE XYZ."""
    columns = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in _CHROMATICITIES[gamut]]).T
    x, y = _D65
    return columns * np.linalg.solve(columns, [x / y, 1.0, (1 - x - y) / y])


def _multiplied(matrix: np.ndarray, *channels: np.ndarray) -> list[np.ndarray]:
    # matmul rounds its sums differently on different CPUs, so the sums are written out.
    red, green, blue = channels
    return [row[0] * red + row[1] * green + row[2] * blue for row in matrix]


def _clipped(channels: list[np.ndarray]) -> list[np.ndarray]:
    """Limits colors to 0 ... 1 as FFmpeg's tonemap=clip does: they keep their hue, but fade to white far above it."""
    weights = np.array([_LUMA], np.float32)
    (luma,) = _multiplied(weights, *channels)
    if luma.max() > _FADED_ABOVE:
        fade = np.maximum(luma - np.float32(_FADED_ABOVE), 0) / np.maximum(luma, np.float32(1e-6))
        channels = [channel + (luma - channel) * fade for channel in channels]
    brightest = np.maximum(np.maximum(channels[0], channels[1]), channels[2])
    scale = 1 / np.maximum(brightest, np.float32(1))
    return [np.clip(channel * scale, 0, 1) for channel in channels]
