"""The world that the embedded CogVideoX knows: one shape, its colour, its motion, the wall behind it.

Owns the words, how a scene is drawn, and which scenes are held out. A caption decides its clip, so what a model made of
a caption can be compared with the clip of every caption. Frames are uint8 RGB (F, H, W, 3).

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
COLOURS = {
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
HELD_OUT_EVERY = 7  # one scene of seven, spread over all words


@dataclass(frozen=True)
class Scene:
    """One clip of the world."""

    colour: str
    shape: str
    motion: str
    wall: str

    @property
    def caption(self) -> str:
        """What is seen."""
        return f"A {self.colour} {self.shape} {self.motion} in front of a {self.wall} wall."

    def frames(self) -> np.ndarray:
        """The clip, (FRAMES, HEIGHT, WIDTH, 3)."""
        return np.stack([self._frame(index / (FRAMES - 1)) for index in range(FRAMES)])

    def _frame(self, time: float) -> np.ndarray:
        """The picture at a time from 0 to 1."""
        across, down, radius = _place(self.motion, time)
        rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
        cover = np.clip(0.5 - _distance(self.shape, (columns - across) / radius, (rows - down) / radius) * radius, 0, 1)
        wall, colour = _wall(self.wall, rows, columns), np.array(COLOURS[self.colour], float)
        return (wall + cover[..., None] * (colour - wall)).round().astype(np.uint8)


def scenes() -> list[Scene]:
    """All scenes."""
    return [Scene(*words) for words in product(COLOURS, SHAPES, MOTIONS, WALLS)]


def split() -> tuple[list[Scene], list[Scene]]:
    """(scenes to train on, scenes held out): every word is in both, no combination of four is."""
    parts: tuple[list[Scene], list[Scene]] = ([], [])
    words = (tuple(COLOURS), SHAPES, MOTIONS, WALLS)
    for scene in scenes():
        chosen = (scene.colour, scene.shape, scene.motion, scene.wall)
        places = [among.index(word) for among, word in zip(words, chosen, strict=True)]
        spread = sum(weight * place for weight, place in zip((1, 2, 3, 5), places, strict=True))
        parts[spread % HELD_OUT_EVERY == 0].append(scene)
    return parts


def write_data_set(folder: Path, chosen: Sequence[Scene], captions: Sequence[str] = ()) -> Path:
    """Writes scenes, with their own captions or others, as the training scripts take it: videos/ and two lists."""
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
    """(centre across, centre down, radius) in pixels."""
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
    """How far points lie outside a shape of radius 1 about the origin; negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(ax, ay) - 0.88
    if shape == "disc":
        return np.hypot(x, y) - 1.0
    if shape == "triangle":  # its base is down
        return np.maximum(0.894 * ax - 0.447 * y - 0.447, y - 0.9)
    if shape == "cross":
        return np.minimum(np.maximum(ax - 1.0, ay - 0.3), np.maximum(ay - 1.0, ax - 0.3))
    return np.abs(np.hypot(x, y) - 0.75) - 0.25


def _wall(wall: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The picture behind the shape, float (H, W, 3)."""
    plain = {"grey": (112, 116, 120), "black": (14, 14, 18), "sandy": (190, 164, 116)}
    if wall in plain:
        return np.broadcast_to(np.array(plain[wall], float), (*rows.shape, 3))
    odd = columns // 12 % 2 if wall == "striped" else (columns // 16 + rows // 16) % 2
    light, dark = np.array((92, 120, 112.0)), np.array((40, 56, 64.0))
    return np.where(odd[..., None] > 0, light, dark)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the clips of moving shapes.")
    parser.add_argument("--output_dir", type=Path, required=True, help="for the data sets train and held_out")
    return parser.parse_args()


def main() -> None:
    folder = _parse().output_dir
    for name, chosen in zip(("train", "held_out"), split(), strict=True):
        write_data_set(folder / name, chosen)
        print(f"{folder / name}: {len(chosen)} clips of {FRAMES} frames of {HEIGHT}x{WIDTH}")


if __name__ == "__main__":
    main()
