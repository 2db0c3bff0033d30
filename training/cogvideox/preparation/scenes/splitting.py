"""Finds the cuts of videos with PySceneDetect, and writes the scenes between them into a table.

``SceneSplitter`` is the entry point. Worker processes decode small frames with the reader of data/media/, so the times
of cuts are those by which a preparation later selects frames. PySceneDetect compares the frames in this process:

    files --probe--> parts of a file --decode--> frames, in order --PySceneDetect--> cuts --> scenes --> rows

A part begins at a keyframe, so that no frame is decoded twice, and has its own time limit, so that videos may be long.
"""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox import stopping
from cogvideox.config.flags import SceneFlags
from cogvideox.config.options import SceneOptions
from cogvideox.data.clips import bad_line
from cogvideox.data.forms.paths import PathRules
from cogvideox.data.forms.scene_table import Clip, SceneTable, clips_of
from cogvideox.data.media.frames import Section, VideoInfo
from cogvideox.data.media.pixels.stills import info_of, small_frames
from cogvideox.data.media.workers import Job, Killed, Limits, Workers, usual_number
from cogvideox.errors import one_line, plural
from cogvideox.preparation.scenes.cut_sheet import draw_cuts
from cogvideox.progress import ProgressBar

FRAME_SIZE = 256  # pixels of the longer side of the frames that are compared, as PySceneDetect itself chooses
PART_FRAMES = 256  # a part of a file has at least this many frames, unless the file ends
MOST_PART_FRAMES = 512  # which bounds the memory of a part where keyframes are rare
TIME_SLACK = 1e-3  # seconds; times of frames are rounded to milliseconds in some containers
THRESHOLDS = {"adaptive": 3.0, "content": 27.0}  # the defaults of PySceneDetect


class CutDetector:
    """Finds cuts between frames that arrive one after the other."""

    def __init__(self, flags: SceneFlags) -> None:
        """Creates the detector that the flags choose."""
        from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

        threshold = flags.cut_threshold or THRESHOLDS[flags.detector]
        # PySceneDetect would count its shortest scene in frames; here short scenes are left out afterwards, by time.
        kinds = {"adaptive": AdaptiveDetector, "content": ContentDetector}
        self._detector: Any = kinds[flags.detector](threshold, min_scene_len=0)
        self._timecode = FrameTimecode
        self._number = 0
        self.cuts: list[int] = []  # indices of the first frames after cuts

    def see(self, frames_FHWC: np.ndarray) -> None:
        """Takes the next frames, uint8 RGB of shape (F, H, W, 3)."""
        for frame_HWC in frames_FHWC:
            # With a rate of 1, PySceneDetect's times are the indices of the frames.
            time = self._timecode(self._number, fps=1.0)
            found = self._detector.process_frame(time, np.ascontiguousarray(frame_HWC[..., ::-1]))
            self.cuts += [cut.frame_num for cut in found]
            self._number += 1


@dataclass
class Search:
    """The search for the cuts of a file.

    Attributes:
        path: The file.
        info: Describes it; None if it cannot be opened.
        detector: Has the cuts.
        problem: Why the search failed; empty if it did not.
    """

    path: str
    info: VideoInfo | None
    detector: CutDetector
    problem: str = ""


def find_cuts(paths: Sequence[str], flags: SceneFlags, limits: Limits) -> Iterator[Search]:
    """Yields the finished search of each file, in the order of the files.

    Args:
        paths: The files.
        flags: Choose the detector.
        limits: Time and memory that decoding one part of a file may use.
    """
    with Workers(usual_number(limits), limits) as workers:
        for (search, is_last), frames in workers.run_keyed(_jobs(paths, flags, workers)):
            if isinstance(frames, np.ndarray) and not search.problem:
                search.detector.see(frames)
            elif not search.problem:
                reason = frames.reason if isinstance(frames, Killed) else frames
                search.problem = reason.removeprefix(f"{search.path}: ")
            stopping.unit("part of a video")
            if is_last:
                yield search


def _jobs(paths: Sequence[str], flags: SceneFlags, workers: Workers) -> Iterator[tuple[tuple[Search, bool], Job]]:
    """Yields, for each part of a file, the search, whether the part is the last one, and the job that decodes it."""
    for path, info in zip(paths, workers.run((info_of, path) for path in paths), strict=True):
        detector = CutDetector(flags)
        if not isinstance(info, VideoInfo):
            reason = info.reason if isinstance(info, Killed) else info
            yield (Search(path, None, detector), True), (str, reason)
            continue
        search = Search(path, info, detector)
        for frames in parts_of(info):
            yield (search, frames.stop == info.num_frames), (small_frames, path, info, frames, FRAME_SIZE)


def parts_of(info: VideoInfo) -> Iterator[range]:
    """Yields the frames of a video in parts, which begin at keyframes as far as possible."""
    keyframes = set(info.packets.keyframes) if info.packets is not None else set()
    start = 0
    for index in range(info.num_frames):
        at_keyframe = info.packets is not None and info.packets.pts[index] in keyframes
        if index - start >= MOST_PART_FRAMES or (index - start >= PART_FRAMES and at_keyframe):
            yield range(start, index)
            start = index
    yield range(start, info.num_frames)


def scenes_of(info: VideoInfo, cuts: Sequence[int], longest: float | None) -> list[range]:
    """Returns the frames of each scene of a video.

    Args:
        info: Describes the video.
        cuts: Indices of the first frames after cuts, increasing.
        longest: Seconds above which a scene is divided into equal parts; None for no limit.
    """
    bounds = [0, *cuts, info.num_frames]
    return [part for first, end in pairwise(bounds) for part in _divided(info, range(first, end), longest)]


def _divided(info: VideoInfo, scene: range, longest: float | None) -> Iterator[range]:
    seconds = info.seconds_of(scene)
    number = max(1, ceil((seconds - TIME_SLACK) / longest)) if longest is not None else 1
    starts = (info.times[scene.start] + seconds * k / number - TIME_SLACK for k in range(1, number))
    bounds = [scene.start, *(bisect_left(info.times, time) for time in starts), scene.stop]
    yield from (range(first, end) for first, end in pairwise(bounds) if first < end)


class SceneSplitter:
    """Writes the table of scenes and the picture of its cuts."""

    def __init__(self, options: SceneOptions) -> None:
        """Takes the flags."""
        assert options.scenes.table is not None, "it has been derived"
        data = options.data
        self._flags, self._data = options.scenes, data
        self._root = os.path.abspath(data.data_root[0])
        self._file = Path(options.scenes.table)
        self._limits = Limits(data.decode_timeout, int(data.decode_memory * 2**30))
        self._counts: Counter[str] = Counter()

    def run(self, clips: Mapping[str, Sequence[Clip]]) -> None:
        """Writes the rows of files that the table does not have. What is finished is written, also if interrupted.

        A file that cannot be opened gets no row, and is tried again in the next run.

        Args:
            clips: The rows of the data set by file.

        Raises:
            UsageError: The table cannot be read.
        """
        has_images = any(clip.image for rows in clips.values() for clip in rows)
        table = SceneTable(self._file, self._root, PathRules(self._root, self._data.allow_path), has_images)
        new = {path: rows for path, rows in clips.items() if path not in table.known}
        self._counts["clips"] = sum(map(len, clips.values()))
        self._counts["new"] = sum(map(len, new.values()))
        searches = find_cuts([path for path in new if any(map(_may_be_cut, new[path]))], self._flags, self._limits)
        try:
            with stopping.stoppable():
                for path, rows in ProgressBar(new.items(), desc="searching for cuts", unit="clip", leave=False):
                    search = next(searches) if any(map(_may_be_cut, rows)) else None
                    if search is not None and search.info is None:
                        print(bad_line(path, f"is left out, because it {search.problem}"))
                        self._counts["unreadable"] += 1
                        continue
                    table.add(path, [scene for row in rows for scene in self._scenes(row, search)])
        finally:
            table.flush()
        self._draw()

    def _scenes(self, clip: Clip, search: Search | None) -> list[Clip]:
        """Returns the rows of a clip: itself, or its scenes."""
        if search is None or not _may_be_cut(clip):
            return [clip]
        info, flags = search.info, self._flags
        assert info is not None, "files that cannot be opened are left out"
        if search.problem:
            rule = (
                f"stays one clip, because its frames cannot be read; delete its row to leave it out: {search.problem}"
            )
            print(bad_line(clip.video, rule))
            return [clip]
        scenes = scenes_of(info, search.detector.cuts, flags.max_scene_seconds)
        if len(scenes) == 1:
            return [clip]
        kept = [scene for scene in scenes if info.seconds_of(scene) > flags.min_scene_seconds - TIME_SLACK]
        if not kept:
            rule = f"all of its {len(scenes)} scenes are shorter than --min_scene_seconds {flags.min_scene_seconds:g}"
            print(bad_line(clip.video, f"stays one clip, because {rule}; delete its row to leave it out"))
            return [clip]
        repeats = flags.scene_captions == "repeat"
        self._counts.update(cut=1, scenes=len(kept), short=len(scenes) - len(kept))
        self._counts["captions"] += bool(clip.caption) and not repeats
        short = f", without {len(scenes) - len(kept)} that are too short" if len(scenes) > len(kept) else ""
        print(one_line(f"{clip.video}: {plural(len(kept), 'scene')}{short}"))
        return [Clip(clip.video, _section(info, scene), clip.caption if repeats else "") for scene in kept]

    def _draw(self) -> None:
        file = str(self._file.absolute())
        data = replace(self._data, dataset_file=file, caption_column=None, video_column=None, image_column=None)
        for sheet in draw_cuts(self._file, clips_of(data), self._root, self._limits):
            print(f"picture of the cuts: {sheet}")

    def report(self) -> list[str]:
        """Returns the lines at the end."""
        counts, flags = self._counts, self._flags
        lines = []
        if counts["captions"]:
            lines.append(
                f"{plural(counts['captions'], 'caption describes', 'captions describe')} more than one scene, so these "
                "scenes have none: write them, or use caption_dataset.py, or start again with --scene_captions repeat"
            )
        if counts["unreadable"]:
            files = plural(counts["unreadable"], "file")
            fix = "repair or remove, and give the same command again"
            lines.append(f"{files} left out that cannot be opened as videos; {fix}")
        if counts["short"]:
            are = "scene is" if counts["short"] == 1 else "scenes are"
            rule = f"left out, because of --min_scene_seconds {flags.min_scene_seconds:g}"
            lines.append(f"{counts['short']} {are} {rule}")
        return [*lines, f"{plural(counts['clips'], 'clip')}{self._result()}; table: {flags.table}"]

    def _result(self) -> str:
        """Returns what follows the number of clips in the last line."""
        counts = self._counts
        if counts["new"] == counts["unreadable"]:
            return ": nothing new (to search them again, delete the table)"
        old = counts["clips"] - counts["new"]
        unchanged = "was handled before and is unchanged", "were handled before and are unchanged"
        before = f", of which {plural(old, *unchanged)}" if old else ""
        if not counts["cut"]:
            return f"{before}: none was cut"
        were = "was" if counts["cut"] == 1 else "were"
        return f"{before}: {counts['cut']} {were} cut into {plural(counts['scenes'], 'scene')}"


def _may_be_cut(clip: Clip) -> bool:
    """Returns whether a clip is a whole file. A first frame of its own belongs to the beginning of the whole file."""
    return clip.section is None and not clip.image


def _section(info: VideoInfo, scene: range) -> Section:
    return Section(info.times[scene.start], None if scene.stop == info.num_frames else info.times[scene.stop])
