"""What a training script trains on: a prepared folder, or one that is prepared now."""

from dataclasses import dataclass, replace
from pathlib import Path

from cogvideox.args import DataFlags, LoraOptions
from cogvideox.data.cache import CacheIndex, TensorCache, open_index
from cogvideox.errors import UsageError
from cogvideox.geometry import Geometry, read_geometry
from cogvideox.prepare import Encoders, Preparation, check_bad
from cogvideox.run import Run


@dataclass(frozen=True)
class Tensors:
    """The cached data set of a run, the model's numbers, and what made the tensors."""

    geometry: Geometry
    cache: TensorCache
    index: CacheIndex
    encoders: Encoders


def open_tensors(run: Run, options: LoraOptions) -> Tensors:
    """Opens --data_root as a prepared folder, or prepares it into --tensor_cache first.

    Raises:
        UsageError: the folder was made with other encoders than the model's, or too many clips are bad.
    """
    geometry = read_geometry(options.model)
    encoders = Encoders.of(options.model, options.encode, geometry)
    if options.loader.load_tensors:
        folder = Path(options.data.data_root[0])
        index = open_index(folder)
        encoders = replace(encoders, vae_dtype=index.dtypes["vae"], text_dtype=index.dtypes["text_encoder"])
        check_index(index, encoders, folder)
        check_flags(index, options.data)
    else:
        folder = Path(str(options.loader.tensor_cache))
        index = prepare_here(run, options, geometry, folder)
    run.say(f"{len(index.samples)} clips in {folder}")
    return Tensors(geometry, TensorCache(folder), index, encoders)


def prepare_here(run: Run, options: LoraOptions, geometry: Geometry, folder: Path) -> CacheIndex:
    """What prepare_dataset.py does, before training."""
    preparation = Preparation(options.model, options.data, options.encode, geometry, folder, run.ranks)
    records = preparation.plan()
    run.say(preparation.report(records))
    check_bad(records, options.data.max_bad_fraction)
    return preparation.encode(records)


def check_index(index: CacheIndex, encoders: Encoders, folder: Path) -> None:
    """Raises UsageError where the tensors were made with another VAE, T5 or text length."""
    pairs = {
        "VAE": (index.vae, encoders.vae),
        "text encoder": (index.text_encoder, encoders.text_encoder),
        "text length": (index.text_length, encoders.text_length),
    }
    wrong = [name for name, (then, now) in pairs.items() if then != now]
    if wrong:
        raise UsageError(
            f"--data_root {folder}: its tensors were made with another {' and '.join(wrong)} than this model's; "
            "run prepare_dataset.py with this model and another --output_dir"
        )


def check_flags(index: CacheIndex, data: DataFlags) -> None:
    """Raises UsageError where flags ask for what the prepared tensors are not."""
    problems = []
    token = (data.id_token or "").strip()
    if any(not sample.caption.startswith(token) for sample in index.samples):
        problems.append(f"--id_token {token}: the captions were prepared without it; prepare_dataset.py takes the flag")
    for name, of in (("frame_buckets", "frames"), ("height_buckets", "height"), ("width_buckets", "width")):
        given = getattr(data, name)
        there = sorted({getattr(sample.bucket, of) for sample in index.samples})
        if given != getattr(DataFlags, name) and not set(there) <= set(given):
            problems.append(f"--{name} {' '.join(map(str, given))}: the tensors were prepared with {there}; give those")
    if problems:
        raise UsageError(problems)
