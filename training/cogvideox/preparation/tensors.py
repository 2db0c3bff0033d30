"""Opens the data that a training script trains on.

``open_tensors`` opens a folder that prepare_dataset.py or CogVideoX-Factory has prepared, or prepares one first.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from cogvideox.config.buckets import Bucket
from cogvideox.config.conflicts import idle_schedule
from cogvideox.config.flags import TENSOR_FOLDER, DataFlags
from cogvideox.config.geometry import Geometry, read_geometry
from cogvideox.config.options import (
    TrainOptions,
    held_out_flags,
    ignores_positions,
    image_flags,
    noise_variants,
    resolutions,
    tensor_folder,
)
from cogvideox.config.prepared_flags import is_factory_layout
from cogvideox.data.cache import CacheIndex, TensorCache, open_index
from cogvideox.errors import UsageError, plural
from cogvideox.preparation.encoding import Encoders, encode_captions, missing_captions, other_encoders
from cogvideox.preparation.factory import open_factory
from cogvideox.preparation.prepare import Preparation
from cogvideox.preparation.report import prepare_and_report
from cogvideox.runtime.run import Run


@dataclass(frozen=True)
class Tensors:
    """Holds the cached data set of a run, the geometry of its model and the encoders that made the tensors."""

    geometry: Geometry
    cache: TensorCache
    index: CacheIndex
    encoders: Encoders


def open_tensors(run: Run, options: TrainOptions) -> Tensors:
    """Opens --data_root as a prepared folder, or prepares it into --tensor_cache first.

    Raises:
        UsageError: The folder was made with other encoders than the model's, or too many clips are bad.
    """
    geometry = read_geometry(options.model)
    encoders = Encoders.of(options.model, options.encode, geometry, run.ranks.device)
    root = Path(options.data.data_root[0])
    if not options.loader.load_tensors:
        folder = tensor_folder(options)
        run.ranks.check_shared(folder, "--tensor_cache")
        index = prepare_here(run, options, geometry, folder)
    elif is_factory_layout(root):
        folder = Path(options.loader.tensor_cache or root / TENSOR_FOLDER)
        run.ranks.check_shared(folder, "--tensor_cache")
        index = convert_here(run, options, geometry, encoders, folder)
    else:
        folder, index = root, open_index(root)
        check_index(index, encoders, folder)
    encoders = replace(encoders, vae_dtype=index.dtypes["vae"], text_dtype=index.dtypes["text_encoder"])
    if options.loader.load_tensors:
        check_suitable(index, geometry, options)
    index = index if image_flags(options) is not None else index.without_images()
    run.say(f"{plural(len(index.samples), 'clip')} in {folder}")
    if options.loader.load_tensors:
        for line in idle_schedule(options.validation, bool(index.validation)):
            run.say(line)
    return Tensors(geometry, TensorCache(folder), index, encoders)


def convert_here(run: Run, options: TrainOptions, geometry: Geometry, encoders: Encoders, folder: Path) -> CacheIndex:
    """Returns the index of a folder that CogVideoX-Factory prepared; its tensors are converted once."""
    cache, data = TensorCache(folder), options.data

    def embed_empty() -> None:
        if options.loader.caption_dropout:
            missing = missing_captions(cache, encoders, [""])
            encode_captions(cache, options.model, encoders, missing, len(missing), 1, run.ranks, options.encode.t5_on)

    images = image_flags(options) is not None
    root = Path(data.data_root[0])
    return open_factory(root, data, geometry, cache, encoders, embed_empty, run.ranks, run.say, images)


def prepare_here(run: Run, options: TrainOptions, geometry: Geometry, folder: Path) -> CacheIndex:
    """Prepares the data as prepare_dataset.py does; returns the index, which all ranks have."""
    image_variants = noise_variants(options)
    preparation = Preparation(options.model, options.data, options.encode, geometry, folder, run.ranks, image_variants)
    return prepare_and_report(preparation, run.say)


def check_suitable(index: CacheIndex, geometry: Geometry, options: TrainOptions) -> None:
    """Checks that a prepared folder has what the flags and the model need.

    Raises:
        UsageError: The flags describe other samples, there are no held-out clips although a flag needs them, or the
            model has no positions for a bucket.
    """
    check_flags(index, options.data)
    if (given := held_out_flags(options)) and not index.validation:
        rule = "there are no clips to measure the loss on; prepare with --validation_data_root"
        raise UsageError([f"{flag}: {rule}" for flag in given])
    check_bucket_positions(index, geometry, options)


def check_bucket_positions(index: CacheIndex, geometry: Geometry, options: TrainOptions) -> None:
    """Raises UsageError if a model has learned positions that do not fit a bucket of the index."""
    others = sorted({str(sample.bucket) for sample in index.samples if not geometry.has_positions(sample.bucket)})
    if others and not ignores_positions(options):
        rule = f"this model's learned positions are for {geometry.own_bucket} only"
        rule += f", but the folder has {' '.join(others)}"
        fix = "prepare that bucket, or give --ignore_learned_positional_embeddings"
        raise UsageError(f"--load_tensors: {rule}; {fix}")


def check_index(index: CacheIndex, encoders: Encoders, folder: Path) -> None:
    """Checks that the tensors were made with this model's encoders.

    Raises:
        UsageError: They were made with another VAE, T5 or text length.
    """
    wrong = other_encoders(index, encoders)
    if wrong:
        raise UsageError(
            f"--data_root {folder}: its tensors were made with another {' and '.join(wrong)} than this model's; "
            "run prepare_dataset.py with this model and another --output_dir"
        )


def check_flags(index: CacheIndex, data: DataFlags) -> None:
    """Checks the flags against the samples of a folder that does not record its flags.

    Raises:
        UsageError: The id token or the buckets differ from the flags.
    """
    problems, fix = [], "give this value, or leave the flag out"
    token = (data.id_token or "").strip()
    if any(not sample.caption.startswith(token) for sample in index.samples):
        problems.append(f"--id_token {token}: the captions were prepared without it; prepare_dataset.py takes the flag")
    there = sorted({sample.bucket for sample in index.samples})
    given = [Bucket(*numbers) for numbers in resolutions(data)]
    if given and not set(there) <= set(given):
        names = " ".join(map(str, there))
        shown = " ".join(data.train_resolution)
        problems.append(f"--train_resolution {shown}: the tensors were prepared with {names}; {fix}")
    for name, of in (("frame_buckets", "frames"), ("height_buckets", "height"), ("width_buckets", "width")):
        values = sorted({getattr(bucket, of) for bucket in there})
        listed = getattr(data, name)
        if listed != getattr(DataFlags, name) and not set(values) <= set(listed):
            shown, seen = " ".join(map(str, listed)), " ".join(map(str, values))
            problems.append(f"--{name} {shown}: the tensors were prepared with {seen}; {fix}")
    if problems:
        raise UsageError(problems)
