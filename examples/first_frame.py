"""Saves the first frame of a video or scene as a picture of a given size, cropped at the center to its aspect ratio.

The crop is that of clips in training with --video_reshape_mode center. The frame is read as training reads it, so HDR
and rotated videos work.

    python examples/first_frame.py clip.mp4 clip.png --size 64x96
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from cogvideox.data.media.frames import Section
from cogvideox.data.media.pixels.decode import probe, read_frames


def first_frame(video: Path, height: int, width: int, start: float = 0.0) -> Image.Image:
    """Returns the frame of a video that is shown after ``start`` seconds, resized and cropped, in RGB."""
    info = probe(video)
    frame_FHWC = read_frames(video, info, Section(start, None).frames(info)[:1], info.height, info.width)
    return ImageOps.fit(Image.fromarray(frame_FHWC[0]), (width, height))


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description="Save the first frame of a video.")
    parser.add_argument("video", type=Path)
    parser.add_argument("picture", type=Path, help="file to write; its suffix selects the format")
    parser.add_argument("--size", default="480x720", help="HEIGHTxWIDTH in pixels (%(default)s)")
    parser.add_argument("--start", type=float, default=0.0, help="seconds from the start of the video (%(default)s)")
    return parser


def main() -> None:
    """Saves the first frame of the video at the requested size."""
    parser = build_parser()
    options = parser.parse_args()
    if options.picture.exists():
        parser.error(f"{options.picture}: exists and would be replaced; move it away, or give another name")
    height, width = map(int, options.size.split("x"))
    first_frame(options.video, height, width, options.start).save(options.picture)


if __name__ == "__main__":
    main()
