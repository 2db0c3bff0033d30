"""Converts folders that CogVideoX-Factory ("the factory") prepared into the tensor cache, for --load_tensors.

``open_factory`` converts each folder once. Its layout is:

    prompts.txt, videos.txt    line n of each is one clip (or a table); videos/NAME.mp4 may be missing
    video_latents/NAME.pt      next to videos/: the VAE's posterior, unscaled: mean and log variance, (2C, F, H, W)
    prompt_embeds/NAME.pt      T5's embedding of the caption with its id token, (L, D)
    image_latents/NAME.pt      the posterior of the first frame without noise, (2C, 1, H, W), for image-to-video

Each .pt file is read as plain data: pickles that ask for anything else are refused, and no code in them runs. The key
of a tensor is the hash of its file. The ledger maps path, size and time to the key, so a second start reads no .pt.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import TENSOR_INDEX, DataFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.options import TrainOptions, frame_counts, image_flags
from cogvideox.config.prepared_flags import MOMENTS, is_factory_layout
from cogvideox.data.cache import (
    CachedSample,
    CacheIndex,
    Ledger,
    TensorCache,
    hash_of,
    is_key,
    open_index,
    publishing,
    sole_writer,
)
from cogvideox.data.forms.columns import Columns, Problems, is_unicode
from cogvideox.data.forms.folders import read_columns
from cogvideox.data.forms.paths import PathRules
from cogvideox.data.forms.samples import unique_id
from cogvideox.errors import UsageError
from cogvideox.files import stamp_of

if TYPE_CHECKING:
    import torch

    from cogvideox.preparation.encoding import Encoders
    from cogvideox.runtime.ranks import Ranks

EMBEDS, IMAGES = "prompt_embeds", "image_latents"  # the folders next to MOMENTS
NAMES = {MOMENTS: "moments_CFHW", EMBEDS: "prompt_LD", IMAGES: "image_moments_KCHW"}  # the tensors in the cache


@dataclass(frozen=True)
class Row:
    """Describes one clip of the lists.

    Attributes:
        id: Name of the clip in the index.
        caption: The caption, with its id token in front.
        moments: File of the VAE's posterior of the clip.
        embeds: File of T5's embedding of the caption.
        image: File of the posterior of the first frame; None except for image-to-video.
    """

    id: str
    caption: str
    moments: Path
    embeds: Path
    image: Path | None = None

    def files(self) -> tuple[tuple[str, Path], ...]:
        """Returns (name of the folder, path) of each tensor."""
        images = () if self.image is None else ((IMAGES, self.image),)
        return (MOMENTS, self.moments), (EMBEDS, self.embeds), *images


def check_tensors(options: TrainOptions) -> Iterator[str]:
    """Yields the problems of the folder that is given with --load_tensors, without reading tensors."""
    folder = Path(options.data.data_root[0])
    if options.loader.load_tensors and is_factory_layout(folder):
        if len(options.data.repeats) > 1:
            yield f"--repeats {' '.join(map(str, options.data.repeats))}: there is one folder; give one number"
        try:
            read_tensor_rows(folder, options.data, image_flags(options) is not None)
        except UsageError as error:
            yield from error.problems
    elif options.loader.load_tensors:
        if options.loader.tensor_cache:
            yield "--tensor_cache: the tensors of this folder are used as they are; leave it out"
        if not open_index(folder).image_variants and image_flags(options) is not None:
            yield f"--load_tensors: {folder} holds no image latents; prepare it with --save_image_latents"


def open_factory(
    folder: Path,
    data: DataFlags,
    geometry: Geometry,
    cache: TensorCache,
    encoders: "Encoders",
    embed_empty: Callable[[], None],
    ranks: "Ranks",
    say: Callable[[str], None],
    images: bool,
) -> CacheIndex:
    """Converts a factory's folder into a cache and returns its index. The main process converts, the others wait.

    Args:
        folder: The folder that the factory prepared.
        data: The flags of the data.
        geometry: The geometry of the model.
        cache: Where the tensors are written.
        encoders: The encoders of the model; a .pt file does not record what made it.
        embed_empty: Writes the embedding of the empty caption into the cache, if it is needed.
        ranks: The processes of the run.
        say: Prints a line on the main process.
        images: Whether to convert first frames as well.

    Raises:
        UsageError: Lists or files are wrong; the message has all problems.
    """
    say(f"{folder}: whether its .pt files were made with this VAE and T5 cannot be checked")
    if images:
        say(
            f"{folder}: its first frames are without the noise that models are trained with; prepare_dataset.py adds it"
        )
    published = False
    while not published:  # another run may have listed more files than this one, and may be done earlier
        before = stamp_of(cache.folder / TENSOR_INDEX)
        rows = read_tensor_rows(folder, data, images)
        if ranks.is_main_process:
            with sole_writer(cache.folder, say):
                convert(rows, geometry, cache)
                embed_empty()
        ranks.wait_for_everyone()
        index = CacheIndex(
            samples=cached_samples(rows, geometry, cache, data),
            empty_prompt_key=encoders.prompt_key(""),
            fps=data.fps or float(geometry.default_fps),
            vae=encoders.vae,
            text_encoder=encoders.text_encoder,
            dtypes={"vae": encoders.vae_dtype, "text_encoder": encoders.text_dtype},
            text_length=encoders.text_length,
            image_variants=int(images),
        )
        if ranks.is_main_process:
            with publishing(cache.folder, say):  # from now on --data_root can name the cache instead of the folder
                published = index.publish(cache.folder, before)
        published = ranks.from_main(published)
    return index


# -- the lists ---------------------------------------------------------------------------------------------------------


def read_tensor_rows(folder: Path, data: DataFlags, images: bool = False) -> list[Row]:
    """Returns the clips of the lists with their files, repeated as --repeats says.

    Raises:
        UsageError: Lists or paths are wrong; the message has all problems.
    """
    problems = Problems()
    root = os.path.abspath(folder)
    rules = PathRules(root, data.allow_path)
    columns = read_columns(root, data, rules, problems)
    rows = list(_rows(root, columns, rules, problems, images)) if not problems else []
    if problems:
        raise UsageError(problems.lines())
    uses: dict[str, int] = {}
    repeated = [row for _ in range(data.repeats[0]) for row in rows]
    return [replace(row, id=unique_id(row.id, uses)) for row in repeated]


def _rows(root: str, columns: Columns, rules: PathRules, problems: Problems, images: bool) -> Iterator[Row]:
    """Yields the row of each clip, with ids that may repeat, and adds the problems of the rows to ``problems``."""
    captions, videos = columns.captions, columns.videos
    assert captions is not None
    assert videos is not None
    owners: dict[Path, str] = {}
    for number, (caption, path) in enumerate(zip(captions.texts(), videos.texts(), strict=True)):
        video = os.path.normpath(os.path.join(videos.folder, path))
        row = Row(os.path.relpath(video, root).replace(os.sep, "/"), caption, *_files_of(video, images))
        if not is_unicode(caption):
            rule = "is not Unicode text; write the characters themselves"
            problems.add("not UTF-8", f"{captions.location(number)}: {rule}")
        if owners.setdefault(row.moments, video) != video:
            full = os.path.splitext(os.path.basename(video))[0]
            fix = f"give the tensors the full name of the clip, {full}.pt, or rename the clip and its tensors"
            both = f"{owners[row.moments]} and {video} would share {row.moments}"
            problems.add("two clips, one file", f"{videos.location(number)}: {both}; {fix}")
        for _, file in row.files():
            if (problem := rules.problem_with(os.path.relpath(file, root), root, "tensor")) is not None:
                problems.add(problem[0], f"{videos.location(number)}: {problem[1]}")
        yield row


def _files_of(video: str, images: bool) -> tuple[Path, ...]:
    """Returns the tensor files of a clip. The factory cuts names at the first dot; a file with the full name wins."""
    folder, name = os.path.split(video)
    parent = Path(os.path.dirname(folder))
    full, cut = os.path.splitext(name)[0], name.split(".")[0]
    stem = full if os.path.lexists(parent / MOMENTS / f"{full}.pt") else cut
    kinds = (MOMENTS, EMBEDS, IMAGES) if images else (MOMENTS, EMBEDS)
    return tuple(parent / kind / f"{stem}.pt" for kind in kinds)


# -- the tensors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvertedFile:
    """Records that the tensor of a .pt file was written into the cache; one line of the ledger.

    Attributes:
        request: Hash of the path, size and time of the file; the name of the record in the ledger.
        path: The file.
        key: Key of the tensor in the cache.
        shape: Shape of the tensor in the file.
    """

    request: str
    path: str
    key: str
    shape: tuple[int, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ConvertedFile":
        """Restores a record from its line in the ledger."""
        return cls(values["request"], values["path"], values["key"], tuple(values["shape"]))


def convert(rows: Sequence[Row], geometry: Geometry, cache: TensorCache) -> None:
    """Writes all tensors that are not in the cache yet. Good files stay converted even if others are bad.

    Raises:
        UsageError: Some files are bad; the message has all problems.
    """
    from cogvideox.progress import ProgressBar  # needs a package, and the checks that use this module are run without

    ledger, problems = Ledger(cache.folder), Problems()
    known = ledger.read()
    files = list(dict.fromkeys(file for row in rows for file in row.files()))
    todo = sum(_record(known, path, cache) is None for _, path in files)
    with ProgressBar(total=todo, desc="converting tensors", unit="file", disable=not todo) as bar:
        for kind, path in files:
            record = _record(known, path, cache)
            try:
                if record is None:
                    record = _convert_file(kind, path, cache)
                    ledger.append([asdict(record)])
                    bar.update()
                _check_shape(kind, path, record.shape, geometry)
            except UsageError as error:
                problems.add(kind, str(error))
    if problems:
        raise UsageError(problems.lines())


def cached_samples(
    rows: Sequence[Row], geometry: Geometry, cache: TensorCache, data: DataFlags
) -> tuple[CachedSample, ...]:
    """Returns the converted rows as entries of the index."""
    known = Ledger(cache.folder).read()
    samples = []
    for row in rows:
        moments, embeds, *images = (ConvertedFile.from_json(known[_request(path)]) for _, path in row.files())
        sizes = {record.shape[2:] for record in (moments, *images)}
        if len(sizes) > 1:
            raise UsageError(f"{row.image}: has another size than {row.moments.name} of its clip; encode both again")
        bucket = bucket_of(moments.shape, geometry, data)
        image_keys = tuple(image.key for image in images)
        samples.append(CachedSample(row.id, row.caption, bucket, (moments.key,), embeds.key, image_keys))
    return tuple(samples)


def bucket_of(shape: tuple[int, ...], geometry: Geometry, data: DataFlags) -> Bucket:
    """Returns the bucket of moments of a shape (2C, F, H, W).

    Several frame counts have F latent frames. A count in the flags wins; otherwise it is the factory's usual one.
    """
    _, latents, height, width = shape
    compression = geometry.temporal_compression
    usual = (latents - 1) * compression + 1 if latents % 2 else latents * compression
    frames = next((count for count in frame_counts(data) if geometry.latent_frames(count) == latents), usual)
    return Bucket(frames, height * geometry.spatial_compression, width * geometry.spatial_compression)


def _request(path: Path) -> str:
    """Returns the ledger key of the current state of a file, without reading its content."""
    return hash_of(["factory", str(path), *stamp_of(path)])


def _record(known: dict[str, dict[str, Any]], path: Path, cache: TensorCache) -> ConvertedFile | None:
    """Returns the ledger record of a file in its current state, or None if its tensor is not in the cache."""
    values = known.get(_request(path))
    if values is None or not is_key(values.get("key")) or not cache.has(values["key"]):
        return None
    return ConvertedFile.from_json(values)


def _convert_file(kind: str, path: Path, cache: TensorCache) -> ConvertedFile:
    """Writes the tensor of a file into the cache and returns the ledger record of the file."""
    request = _request(path)  # taken before reading, so that a change in the meantime is noticed next time
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    tensor = read_tensor(path, content)
    kinds = [IMAGES] if kind == IMAGES else []  # the same bytes are stored in another shape
    key = hash_of(["factory", *kinds, hashlib.sha256(content).hexdigest()])
    if not cache.has(key):
        stored = tensor.transpose(0, 1).contiguous() if kind == IMAGES else tensor  # one encoding of the image
        cache.write(key, {NAMES[kind]: stored})
    return ConvertedFile(request, str(path), key, tuple(tensor.shape))


def read_tensor(path: Path, content: bytes) -> "torch.Tensor":
    """Returns the tensor in the content of a .pt file, with finite floats, on the CPU.

    Raises:
        UsageError: The content is something else, or is damaged; the message names the path.
    """
    import torch

    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and hostile pickles raise anything; torch's message explains how to run them
        raise UsageError(f"{path}: is not plain tensor data ({type(error).__name__}); encode the clip again") from None
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.dtype not in floats:
        raise UsageError(f"{path}: is not one tensor in fp32, bf16 or fp16; encode the clip again")
    if tensor.is_meta or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UsageError(f"{path}: is larger than its data; encode the clip again")
    if not torch.isfinite(tensor).all():
        raise UsageError(f"{path}: holds NaN or infinity; encode the clip again, in bf16 or fp32")
    return tensor.detach().contiguous().clone()


def _check_shape(kind: str, path: Path, shape: tuple[int, ...], geometry: Geometry) -> None:
    """Checks the shape of a tensor.

    Raises:
        UsageError: The model does not accept the shape.
    """
    if kind == EMBEDS:
        wanted = (geometry.max_text_seq_length, geometry.text_embed_dim)
        if shape != wanted:
            raise UsageError(f"{path}: has shape {shape}, this model takes {wanted}; encode the captions again for it")
        return
    channels = 2 * geometry.latent_channels
    frames = "1" if kind == IMAGES else "F"
    if len(shape) != 4 or shape[0] != channels or 0 in shape or frames not in ("F", str(shape[1])):
        rule = f"this model takes ({channels}, {frames}, H, W), mean and log variance; encode the clips again for it"
        raise UsageError(f"{path}: has shape {shape}, {rule}")
    for side, size in zip(("height", "width"), shape[2:], strict=True):
        pixels = size * geometry.spatial_compression
        if problem := geometry.problem(side, pixels):
            raise UsageError(f"{path}: its {side} is {pixels} pixels: {problem}")
