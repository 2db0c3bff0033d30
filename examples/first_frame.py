"""Saves the first frame of a video as a picture of a given size, cropped at the center to its aspect ratio.

Image-to-video pipelines stretch a picture to the size of the video. Training with --video_reshape_mode center crops
clips instead, so pictures for validation must be cropped in the same way.

    python examples/first_frame.py clip.mp4 clip.png --size 64x96
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
from PIL import Image, ImageOps


def first_frame(video: Path, height: int, width: int) -> Image.Image:
    """Returns the first frame of a video, resized and cropped, in RGB."""
    with av.open(str(video)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    return ImageOps.fit(Image.fromarray(frame), (width, height))


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description="Save the first frame of a video.")
    parser.add_argument("video", type=Path)
    parser.add_argument("picture", type=Path, help="file to write; its suffix selects the format")
    parser.add_argument("--size", default="480x720", help="HEIGHTxWIDTH in pixels (%(default)s)")
    return parser


def main() -> None:
    """Saves the first frame of the video at the requested size."""
    options = build_parser().parse_args()
    height, width = map(int, options.size.split("x"))
    first_frame(options.video, height, width).save(options.picture)


if __name__ == "__main__":
    main()
