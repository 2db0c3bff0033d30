"""Reads from a prepared folder the flags that it was made with, for --load_tensors.

``as_prepared`` replaces the defaults of the training script with the values in index.json, so that config.json,
recipe.json, trackers and the model card describe the tensors. A flag that was given must agree with them. Folders of
older versions and of the CogVideoX factory do not record all flags; a given flag that they do not record is refused.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox.config.flags import CAPTION_FILES, IMAGE_FILES, TENSOR_INDEX, VIDEO_FILES, DataFlags, EncodeFlags
from cogvideox.config.options import Options, TrainOptions, fields_of, resolution
from cogvideox.errors import UsageError

INDEX_FORMATS = (3, 4)  # versions of index.json; version 3 has no recipe
MOMENTS = "video_latents"  # a subfolder with this name shows that the CogVideoX factory prepared a folder
BUCKETS = ("train_resolution", "frame_buckets", "height_buckets", "width_buckets", "max_num_frames")
LISTS = {"caption_column": CAPTION_FILES, "video_column": VIDEO_FILES, "image_column": IMAGE_FILES}
CLIPS = (
    *("bucket_choice", "max_upscale", "fps", "frame_selection", "skip_frames_start", "skip_frames_end"),
    *("video_reshape_mode", "random_flip", "num_augmentations", "video_reader"),
)
# The flags that a preparation fixes. --seed is not among them, because training has another seed.
PREPARED = (
    *("dataset_file", *LISTS, "repeats", "id_token", *BUCKETS, *CLIPS),
    *("dtype", "encode_tiling", "num_image_noise_variants"),
)
SEEN = ("id_token", *BUCKETS)  # compared with the samples themselves if a folder does not record them
# Flags that are not recorded in a folder of the factory, so that the training script decides them.
FACTORY_TAKES = ("dataset_file", *LISTS, "repeats", *SEEN, "fps", "dtype")

# The type of args.read_value, which converts the strings of a flag to its value.
Read = Callable[["dataclasses.Field[Any]", Any, list[str]], Any]


@dataclass(frozen=True)
class Prepared:
    """What is known about a preparation.

    Attributes:
        values: The recorded values, by flag.
        buckets: The (frames, height, width) of the samples.
        chosen: The flags that the training script decides nevertheless.
    """

    values: dict[str, Any]
    buckets: set[tuple[int, int, int]] = field(default_factory=set)
    chosen: tuple[str, ...] = ()


def is_factory_layout(folder: Path) -> bool:
    """Returns whether a folder, or one of its subfolders, was prepared by the CogVideoX factory."""
    return not (folder / TENSOR_INDEX).is_file() and any(
        path.is_dir() for pattern in (MOMENTS, f"*/{MOMENTS}") for path in folder.glob(pattern)
    )


def kept_values(data: DataFlags, encode: EncodeFlags, **effective: object) -> dict[str, Any]:
    """Returns the values of a preparation for index.json, by flag.

    Args:
        data: The flags of the data.
        encode: The flags of encoding.
        **effective: Values that replace those of the flags, because the preparation used them instead.
    """
    flags = dataclasses.asdict(data) | dataclasses.asdict(encode) | effective
    kept = {name: flags[name] for name in (*PREPARED, "seed") if name in flags}
    values: dict[str, Any] = json.loads(json.dumps(kept))
    return values


def as_prepared(options: Options, sources: dict[str, str], read: Read) -> tuple[Options, list[str]]:
    """Returns the options with prepared values in place of defaults, and all problems of given flags.

    Nothing changes without --load_tensors, nor for a folder that cannot be read, which other checks report.

    Args:
        options: The options of a script.
        sources: Where each value comes from, by flag. The origin of each replaced value becomes "prepared".
        read: The function args.read_value.
    """
    if not isinstance(options, TrainOptions) or not options.loader.load_tensors:
        return options, []
    try:
        prepared = read_prepared(Path(options.data.data_root[0]), options, read)
    except UsageError as error:
        return options, list(error.problems)
    if prepared is None:
        return options, []
    problems: list[str] = []
    groups: dict[str, dict[str, Any]] = {}
    for group, item, _ in fields_of(type(options)):
        if item.name not in PREPARED or item.name in prepared.chosen:
            continue
        if sources[item.name].startswith("given"):
            problems += prepared_conflicts(item.name, getattr(getattr(options, group), item.name), prepared)
        else:
            groups.setdefault(group, {})[item.name] = prepared.values.get(item.name)
            sources[item.name] = "prepared"
    changed = {group: dataclasses.replace(getattr(options, group), **values) for group, values in groups.items()}
    return dataclasses.replace(options, **changed), problems


def read_prepared(folder: Path, options: TrainOptions, read: Read) -> Prepared | None:
    """Returns what a folder records about its preparation, or None if nothing can be read.

    Raises:
        UsageError: A recorded value is not valid for its flag.
    """
    if is_factory_layout(folder):
        return Prepared({"num_augmentations": 1, "num_image_noise_variants": 1}, chosen=FACTORY_TAKES)
    try:
        index = json.loads((folder / TENSOR_INDEX).read_text(encoding="utf-8"))
        if index["format"] not in INDEX_FORMATS:
            return None
        samples = [sample["bucket"] for sample in (*index["samples"], *index["validation"])]
        buckets = {(bucket["frames"], bucket["height"], bucket["width"]) for bucket in samples}
        values = dict(index.get("recipe") or {"fps": index["fps"]})
        dtypes = set(index["dtypes"].values())
        values |= {"num_image_noise_variants": index["image_variants"] or None}
        values |= {"dtype": dtypes.pop()} if len(dtypes) == 1 else {"dtype": None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not values.keys() & set(BUCKETS):
        values["train_resolution"] = ["{}x{}x{}".format(*bucket) for bucket in sorted(buckets)]
        values |= {name: getattr(DataFlags, name) for name in BUCKETS[1:]}
    return Prepared(dict(parsed_values(folder, values, options, read)), buckets)


def parsed_values(folder: Path, values: dict[str, Any], options: TrainOptions, read: Read) -> Iterator[tuple[str, Any]]:
    """Yields (flag, value) of recorded values.

    The values are parsed like those of a command line, because somebody else may have written them.

    Raises:
        UsageError: A value is not valid for its flag.
    """
    for _, item, annotation in fields_of(type(options)):
        if item.name not in values or item.name not in PREPARED:
            continue
        value = values[item.name]
        if value in (None, [], ()):
            yield item.name, None if value is None else ()
            continue
        texts = [str(one) for one in (value if isinstance(value, list | tuple) else [value])]
        try:
            yield item.name, read(item, annotation, texts)
        except UsageError as error:
            raise UsageError(f"{folder / TENSOR_INDEX}: {error}; run prepare_dataset.py again") from None


def prepared_conflicts(name: str, given: object, prepared: Prepared) -> Iterator[str]:
    """Yields a problem if a given flag differs from what was prepared."""
    values = prepared.values
    if name in BUCKETS:
        seen = seen_buckets(name, prepared.buckets)
        if normalized(name, given) not in (normalized(name, seen), normalized(name, values.get(name))):
            fix = "give this value, or leave the flag out"
            yield f"--{name} {value_text(given)}: the tensors were prepared with {value_text(seen)}; {fix}"
    elif name not in values and name not in SEEN:
        fix = "leave the flag out, or prepare the clips with it, which encodes nothing again if the value was the same"
        yield f"--{name} {value_text(given)}: the prepared folder does not record this flag; {fix}"
    elif name in values and normalized(name, given) != normalized(name, values[name]):
        then = "without it" if values[name] in (None, ()) else f"with {value_text(values[name])}"
        fix = "leave the flag out, or run prepare_dataset.py with it and another --output_dir"
        yield f"--{name} {value_text(given)}: the tensors were prepared {then}; {fix}"


def seen_buckets(name: str, buckets: set[tuple[int, int, int]]) -> object:
    """Returns the value of a flag for buckets that describes exactly the buckets of the samples."""
    if name == "train_resolution":
        return tuple("{}x{}x{}".format(*bucket) for bucket in sorted(buckets))
    if name == "max_num_frames":
        return max((frames for frames, _, _ in buckets), default=0)
    place = ("frame_buckets", "height_buckets", "width_buckets").index(name)
    return tuple(sorted({bucket[place] for bucket in buckets}))


def normalized(name: str, value: Any) -> object:
    """Returns a value in a normal form, in which values of the same meaning are equal."""
    if name in LISTS:
        return None if value in LISTS[name] else value
    if name == "id_token":
        return (value or "").strip()
    if name == "random_flip":
        return value or 0.0
    if name == "train_resolution":
        return {resolution(text) for text in value or ()}
    return set(value or ()) if name in BUCKETS and name != "max_num_frames" else value


def value_text(value: object) -> str:
    """Returns a value as it is typed on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
