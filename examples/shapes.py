"""Draws the clips that the CogVideoX in examples/model has learned: a colored shape that moves in front of a wall.

The module defines the words of the captions, how a scene is drawn, and which scenes are held out from training. Each
caption has exactly one clip, so a video that a model makes for a caption can be compared with the clips of all
captions. Frames are uint8 RGB (F, H, W, 3).

    python examples/shapes.py --output_dir demo/shapes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from real_clips import write_video

FRAMES, HEIGHT, WIDTH, FPS = 9, 64, 96, 8
COLORS = {
    "red": (216, 44, 40),
    "green": (44, 172, 72),
    "blue": (48, 84, 224),
    "yellow": (236, 208, 56),
    "white": (240, 240, 240),
    "purple": (152, 60, 184),
}
SHAPES = ("square", "disc", "triangle", "cross", "ring")
MOTIONS = ("slides to the right", "slides to the left", "rises", "falls", "grows", "shrinks")
WALLS = ("grey", "black", "sandy", "striped", "checked")
HELD_OUT_EVERY = 7  # one scene of seven is held out, with all words among the held-out scenes


@dataclass(frozen=True)
class Scene:
    """Describes one clip by its four words."""

    color: str
    shape: str
    motion: str
    wall: str

    @property
    def caption(self) -> str:
        """Returns the caption, a sentence with the four words."""
        return f"A {self.color} {self.shape} {self.motion} in front of a {self.wall} wall."

    def frames(self) -> np.ndarray:
        """Returns the clip, (FRAMES, HEIGHT, WIDTH, 3), uint8."""
        return np.stack([self._frame(index / (FRAMES - 1)) for index in range(FRAMES)])

    def _frame(self, time: float) -> np.ndarray:
        """Returns the frame at a time from 0 to 1, (HEIGHT, WIDTH, 3), uint8."""
        across, down, radius = _place(self.motion, time)
        rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
        cover = np.clip(0.5 - _distance(self.shape, (columns - across) / radius, (rows - down) / radius) * radius, 0, 1)
        wall, color = _wall(self.wall, rows, columns), np.array(COLORS[self.color], float)
        return (wall + cover[..., None] * (color - wall)).round().astype(np.uint8)


def scenes() -> list[Scene]:
    """Returns all combinations of the words."""
    return [Scene(*words) for words in product(COLORS, SHAPES, MOTIONS, WALLS)]


def split() -> tuple[list[Scene], list[Scene]]:
    """Returns (scenes to train on, held-out scenes). Both contain every word, but no scene is in both."""
    parts: tuple[list[Scene], list[Scene]] = ([], [])
    words = (tuple(COLORS), SHAPES, MOTIONS, WALLS)
    for scene in scenes():
        chosen = (scene.color, scene.shape, scene.motion, scene.wall)
        places = [among.index(word) for among, word in zip(words, chosen, strict=True)]
        spread = sum(weight * place for weight, place in zip((1, 2, 3, 5), places, strict=True))
        parts[spread % HELD_OUT_EVERY == 0].append(scene)
    return parts


def write_data_set(folder: Path, chosen: Sequence[Scene], captions: Sequence[str] = ()) -> Path:
    """Writes a data set of scenes in the form that the training scripts read: videos/, videos.txt and prompts.txt.

    Args:
        folder: The folder to write.
        chosen: The scenes.
        captions: Captions of the scenes, if they differ from ``Scene.caption``.

    Returns:
        The folder.
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    own = [scene.caption for scene in chosen]
    names = [f"videos/{number:04d}.mp4" for number in range(len(chosen))]
    for name, scene in zip(names, chosen, strict=True):
        if not (folder / name).is_file():
            write_video(folder / name, scene.frames(), FPS)
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions or own))
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def _place(motion: str, time: float) -> tuple[float, float, float]:
    """Returns (x of the center, y of the center, radius) of the shape, in pixels, at a time from 0 to 1."""
    low, high = 18.0, WIDTH - 18.0
    top, bottom = 17.0, HEIGHT - 17.0
    middle = (WIDTH / 2, HEIGHT / 2)
    return {
        "slides to the right": (low + (high - low) * time, middle[1], 14.0),
        "slides to the left": (high - (high - low) * time, middle[1], 14.0),
        "rises": (middle[0], bottom - (bottom - top) * time, 14.0),
        "falls": (middle[0], top + (bottom - top) * time, 14.0),
        "grows": (*middle, 7.0 + 20.0 * time),
        "shrinks": (*middle, 27.0 - 20.0 * time),
    }[motion]


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the distance of points from the edge of a shape of radius 1 at the origin; it is negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(ax, ay) - 0.88
    if shape == "disc":
        return np.hypot(x, y) - 1.0
    if shape == "triangle":  # its base is at the bottom
        return np.maximum(0.894 * ax - 0.447 * y - 0.447, y - 0.9)
    if shape == "cross":
        return np.minimum(np.maximum(ax - 1.0, ay - 0.3), np.maximum(ay - 1.0, ax - 0.3))
    return np.abs(np.hypot(x, y) - 0.75) - 0.25


def _wall(wall: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns the picture behind the shape, (H, W, 3), float."""
    plain = {"grey": (112, 116, 120), "black": (14, 14, 18), "sandy": (190, 164, 116)}
    if wall in plain:
        return np.broadcast_to(np.array(plain[wall], float), (*rows.shape, 3))
    odd = columns // 12 % 2 if wall == "striped" else (columns // 16 + rows // 16) % 2
    light, dark = np.array((92, 120, 112.0)), np.array((40, 56, 64.0))
    return np.where(odd[..., None] > 0, light, dark)


def _parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Write the clips of moving shapes.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the data sets train and held_out")
    return parser.parse_args()


def main() -> None:
    """Writes the data sets train and held_out."""
    folder = _parse().output_dir
    for name, chosen in zip(("train", "held_out"), split(), strict=True):
        write_data_set(folder / name, chosen)
        print(f"{folder / name}: {len(chosen)} clips of {FRAMES} frames of {HEIGHT}x{WIDTH}")


if __name__ == "__main__":
    main()
