"""Starts the trackers of --report_to, and sends them validation videos and pictures.

Numbers reach a tracker through accelerate, as ``write_metrics`` in run.py sends them. accelerate has no common call
for videos, so ``log_media`` speaks to each tracker in its own way. TensorBoard cannot play mp4 files, but it shows
images in the format in which they are logged, and browsers play animated GIFs.
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cogvideox.config.args import config_dict
from cogvideox.config.options import TrainOptions, tracker_names
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels.decode import probe, read_frames
from cogvideox.data.media.pixels.stills import small_size
from cogvideox.errors import UsageError, first_line
from cogvideox.runtime.run import Run

WANDB_SECONDS = 20.0  # how long wandb may try to reach its server; its own default is 90
# The longest side of an animation, in pixels. TensorBoard keeps up to ten images of each name in memory, and a GIF of
# 49 frames has several megabytes even at this size.
ANIMATION_SIDE = 384


def start_trackers(run: Run, options: TrainOptions) -> None:
    """Starts the trackers of --report_to, before anything is loaded that would have to wait for them.

    Raises:
        UsageError: A tracker cannot start: no network, a wrong key, a folder that cannot be written.
    """
    problem = run.from_main(tracker_problem(run, options) if run.is_main else None)
    if problem:
        run.disconnect()
        raise UsageError(problem)


def tracker_problem(run: Run, options: TrainOptions) -> str | None:
    """Starts the trackers on the main process; returns the problem if that fails."""
    names = tracker_names(options.train.report_to)
    if not names:
        return None
    config = {name: str(value) for name, value in config_dict(options).items()}
    name = run.output_dir.resolve().name
    wandb: dict[str, Any] = {"dir": str(run.output_dir), "name": name}
    if "wandb" in names and "WANDB_INIT_TIMEOUT" not in os.environ:
        from wandb import Settings

        wandb["settings"] = Settings(init_timeout=WANDB_SECONDS)
    arguments = {"wandb": wandb, "trackio": {"name": name}}
    try:
        run.accelerator.init_trackers(options.train.tracker_name or "cogvideox", config, arguments)
    except Exception as error:  # Each tracker raises different errors.
        run.accelerator.trackers.clear()  # Ending a tracker that did not start would fail.
        fix = "set WANDB_MODE=offline and upload later with `wandb sync`, " if "wandb" in names else ""
        return f"--report_to {' '.join(names)}: cannot start: {first_line(error)}; {fix}or leave the flag out"
    return None


def log_media(run: Run, step: int, videos: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Sends videos and pictures to the trackers of the run. Called on the main process.

    Args:
        run: The run.
        step: Number of finished optimizer steps.
        videos: The validation videos of the step, mp4 files named step-NNNNNN_ and what they show.
        pictures: PNG files. Those that do not exist are left out.
    """
    drawn = [picture for picture in pictures if picture.is_file()]
    if not videos and not drawn:
        return
    for tracker in run.accelerator.trackers:
        SENDERS[tracker.name](tracker, step, videos, drawn)


def send_to_wandb(tracker: Any, step: int, videos: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Sends videos and pictures to Weights & Biases, which stores copies of the files."""
    import wandb

    values: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in pictures}
    if videos:
        values["validation"] = [wandb.Video(str(path), caption=path.stem) for path in videos]
    # wandb drops what belongs to an earlier step than the newest. The videos of the best checkpoint may.
    tracker.log(values, step=max(step, tracker.tracker.step))


def send_to_trackio(tracker: Any, step: int, videos: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Sends videos and pictures to trackio, which stores copies of the files."""
    import trackio

    values: dict[str, Any] = {path.stem: trackio.Image(path) for path in pictures}
    values |= {video_tag(path): trackio.Video(path, caption=path.stem) for path in videos}
    tracker.log(values, step=step)


def send_to_tensorboard(tracker: Any, step: int, videos: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Writes pictures, and videos as animations, to TensorBoard's file.

    The file is written without the functions of SummaryWriter, because ``add_image`` compresses a picture again, and
    ``add_video`` needs moviepy.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    images = {path.stem: path.read_bytes() for path in pictures}
    for path in videos:
        try:
            images[video_tag(path)] = animation(path)
        except VideoError:
            continue  # The contact sheet says that the video cannot be read.
    values = []
    for tag, content in images.items():
        width, height = Image.open(io.BytesIO(content)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        values.append(Summary.Value(tag=tag, image=image))
    tracker.writer.file_writer.add_summary(Summary(value=values), step)
    tracker.writer.flush()


SENDERS: dict[str, Callable[[Any, int, Sequence[Path], Sequence[Path]], None]] = {
    "wandb": send_to_wandb,
    "trackio": send_to_trackio,
    "tensorboard": send_to_tensorboard,
}


def video_tag(path: Path) -> str:
    """Returns the name under which a tracker collects a video of all steps: the file's name without the step."""
    return f"validation/{path.stem.partition('_')[2]}"


def animation(path: Path) -> bytes:
    """Returns a video as an animated GIF that repeats forever, reduced to ANIMATION_SIDE.

    Raises:
        VideoError: The file cannot be read.
    """
    info = probe(path)
    frames_FHWC = read_frames(path, info, range(info.num_frames), *small_size(info, ANIMATION_SIDE))
    # Pillow's default method gives nearly the same colors, and takes 20 times as long.
    first, *others = (Image.fromarray(frame).quantize(256, Image.Quantize.FASTOCTREE) for frame in frames_FHWC)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=1000 / info.fps, loop=0)
    return file.getvalue()
