"""Measures whether validation videos look healthy: brightness, saturation and motion, against training clips.

A LoRA that was trained too long or too fast often shows in these numbers before it shows in the loss: videos stop
moving, turn black, or drift in color. data/health.py has the numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from cogvideox.data.health import STATIC, Health, blanks, health_of, mean_health
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels.decode import probe, read_frames
from cogvideox.runtime.metrics import MOTION, read_records
from cogvideox.runtime.run import METRICS_NAME, Run, write_metrics

DRIFT = 0.25  # difference of brightness or saturation to the clips that is named
MOTION_RATIO = 4.0  # a video that moves this many times more or less than the clips is named


def oddities(video: Health, clips: Health | None) -> Iterator[str]:
    """Yields what is odd about a video.

    Args:
        video: The validation video.
        clips: The means over training clips, or None if no clip could be decoded.
    """
    yield from blanks(video)
    if clips is None:
        return
    if video.motion < STATIC <= clips.motion:
        yield "static"
    elif clips.motion >= STATIC and not 1 / MOTION_RATIO < video.motion / clips.motion < MOTION_RATIO:
        yield f"moves {video.motion / clips.motion:.2g} times as much as the training clips"
    for name in ("brightness", "saturation"):
        difference = getattr(video, name) - getattr(clips, name)
        if abs(difference) > DRIFT:
            yield f"{name} {difference:+.2f} against the training clips"


def report_health(run: Run, step: int, videos: Sequence[Path], clips: Health | None) -> None:
    """Writes the means over the videos of a step to metrics.jsonl, and prints what is odd about a video.

    Called on the main process. Does nothing if the numbers of the step are there already.
    """
    records = read_records(run.output_dir / METRICS_NAME)
    if not videos or any(record["step"] == step and MOTION in record for record in records):
        return
    found = {}
    for path in videos:
        with suppress(VideoError):  # the contact sheet says which video cannot be read
            found[path] = health_of(read_video(path))
    for path, health in found.items():
        if odd := ", ".join(oddities(health, clips)):
            run.say(f"validation after step {step}: {path.name}: {odd}")
    if found:
        write_metrics(run, {"step": step} | numbers_of(list(found.values()), clips))


def read_video(path: Path) -> np.ndarray:
    """Returns all frames of a video file, (F, H, W, 3), uint8.

    Raises:
        VideoError: The file cannot be read.
    """
    info = probe(path)
    return read_frames(path, info, range(info.num_frames), info.height, info.width)


def numbers_of(videos: Sequence[Health], clips: Health | None) -> dict[str, float]:
    """Returns the means over videos by their names in metrics.jsonl, and the motion relative to that of the clips."""
    mean = mean_health(videos)
    record = {f"validation_{name}": round(value, 5) for name, value in mean._asdict().items()}
    if clips is not None and clips.motion >= STATIC:
        record["validation_motion_ratio"] = round(mean.motion / clips.motion, 4)
    return record
