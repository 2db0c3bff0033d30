"""Turns the flags of the data into a ``ClipRecipe``: the settings that decide which pixels of a file are used."""

from cogvideox.config.buckets import Bucket, make_buckets
from cogvideox.config.flags import DataFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.options import resolutions
from cogvideox.data.clips import ClipRecipe


def list_buckets(data: DataFlags) -> tuple[Bucket, ...]:
    """Returns the buckets that the flags ask for, except those longer than --max_num_frames."""
    listed = [Bucket(*numbers) for numbers in resolutions(data)]
    buckets = sorted(set(listed)) or make_buckets(data.frame_buckets, data.height_buckets, data.width_buckets)
    return tuple(bucket for bucket in buckets if bucket.frames <= (data.max_num_frames or bucket.frames))


def clip_recipe(data: DataFlags, geometry: Geometry) -> ClipRecipe:
    """Returns how clips are sampled and cropped, from the flags and the model's frame rate."""
    uniform = data.frame_selection == "uniform"
    return ClipRecipe(
        buckets=list_buckets(data),
        fps=None if uniform else data.fps or float(geometry.default_fps),
        frame_selection=data.frame_selection,
        skip_frames_start=data.skip_frames_start,
        skip_frames_end=data.skip_frames_end,
        reshape_mode=data.video_reshape_mode,
        flip_probability=data.random_flip or 0.0,
        variants=data.num_augmentations or 1,
        seed=data.seed,
        max_upscale=data.max_upscale,
        every_bucket=data.bucket_choice == "every",
        reader=data.video_reader,
    )
