"""Draws frames of a clip side by side as one small JPEG picture. Worker processes do this, because it decodes."""

import io
from itertools import accumulate

from PIL import Image

from cogvideox.data.clips import StrPath, decode_variant
from cogvideox.data.records import Variant

HEIGHT, GAP = 200, 4  # pixels: height of the frames, and the distance between them
GAP_COLOR = (250, 250, 248)
QUALITY = 88


def draw_strip(path: StrPath, variant: Variant) -> bytes | str:
    """Returns a JPEG picture of the frames of a variant, or a line that says why they could not be read."""
    frames = decode_variant(path, variant)
    if isinstance(frames, str):
        return frames
    width = max(1, round(HEIGHT * frames.shape[2] / frames.shape[1]))
    lefts = list(accumulate([width + GAP] * len(frames), initial=0))
    strip = Image.new("RGB", (lefts.pop() - GAP, HEIGHT), GAP_COLOR)
    for left, frame in zip(lefts, frames, strict=True):
        strip.paste(Image.fromarray(frame).resize((width, HEIGHT), Image.Resampling.LANCZOS), (left, 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
