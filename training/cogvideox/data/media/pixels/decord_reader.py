"""Reads videos with the decord library, as an alternative to PyAV.

``reader_problem`` says whether decord can be used, and ``read_with_decord`` reads frames. decord is imported only if it
is used. It returns wrong frames of some files without an error, so such files are refused:

    edit lists that hide frames     it counts the hidden frames, and repeats the last frame at the end
    open GOPs, avi, mpegts          it seeks to wrong frames
    several video streams           it may choose another stream than PyAV does
"""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cogvideox.config.options import SampleOptions, reads_clips
from cogvideox.data.media.faults import VideoError, errors_naming
from cogvideox.data.media.frames import VideoInfo
from cogvideox.errors import plural

if TYPE_CHECKING:
    import numpy as np

READERS = ("pyav", "decord")
VERSION = "0.6.0"
_OTHER = "use --video_reader pyav"


def check_reader(options: SampleOptions) -> Iterator[str]:
    """Yields the problems of --video_reader, for args.parse."""
    problem = reader_problem(options.data.video_reader) if reads_clips(options) else None
    if problem:
        yield f"--video_reader {options.data.video_reader}: {problem}"


def reader_problem(name: str) -> str | None:
    """Returns why a reader of videos cannot be used, in one line with the fix; None if it can."""
    if name == "pyav":
        return None
    if name == "decord2":
        return "returns wrong frames without an error; use pyav, or decord 0.6"
    if name not in READERS:
        return f"must be one of {', '.join(READERS)}"
    if _installed_version("decord2"):
        return (
            "decord2 is installed instead of decord and returns wrong frames without an error: "
            f"pip uninstall decord2 and pip install decord=={VERSION}, or leave the flag out"
        )
    found = _installed_version("decord")
    if found is None:
        return f"decord is not installed: pip install decord=={VERSION}, or leave the flag out"
    if found != VERSION:
        return f"decord {found} is untested: pip install decord=={VERSION}, or leave the flag out"
    return None


def read_with_decord(
    path: str | os.PathLike[str], info: VideoInfo, indices: Sequence[int], height: int, width: int
) -> "np.ndarray":
    """Returns chosen frames, as ``decode.read_frames`` does.

    Raises:
        VideoError: The file is damaged, or decord would not return the frames that ``probe`` found.
    """
    import decord

    assert info.packets is not None
    with errors_naming(path, decord.DECORDError, RuntimeError):
        if info.conversions:
            raise VideoError(f"decord does not do what its frames need ({', '.join(info.conversions)}); {_OTHER}")
        if not (info.packets.stores_pts and info.packets.is_closed):
            raise VideoError(f"decord returns wrong frames of avi and mpegts files and of open GOPs; {_OTHER}")
        if info.packets.num_streams > 1:
            raise VideoError(f"decord may choose another of its {info.packets.num_streams} video streams; {_OTHER}")
        if info.packets.pictures != info.packets.pts:
            raise VideoError(f"decord skips frames that were dropped; {_OTHER}")
        video = decord.VideoReader(os.path.abspath(path), width=width, height=height, num_threads=1)
        if len(video) != info.num_frames:
            shown = plural(info.num_frames, "is", "are")
            raise VideoError(f"decord counts {plural(len(video), 'frame')}, but {shown} shown; {_OTHER}")
        frames_FHWC: np.ndarray = video.get_batch(list(indices)).asnumpy()
        return frames_FHWC


def _installed_version(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    from importlib.metadata import PackageNotFoundError, version  # imported here because it is slow

    try:
        return version(package)
    except PackageNotFoundError:
        return None
