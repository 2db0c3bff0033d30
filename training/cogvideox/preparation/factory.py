"""The prepared folders of CogVideoX-Factory, which --load_tensors takes too: converted once into our cache.

    prompts.txt, videos.txt    line n of each is one clip (or a table); videos/NAME.mp4 need not be there any more
    video_latents/NAME.pt      beside videos/: the VAE's posterior, unscaled: mean and log variance, (2C, F, H, W)
    prompt_embeds/NAME.pt      T5's embedding of the caption, id token included, (L, D)
    image_latents/NAME.pt      the posterior of the first frame without noise, (2C, 1, H, W): for image-to-video

Each .pt is read as plain data: what else a pickle asks for is refused, nothing of it is run. A tensor's key is the hash
of its file, and the ledger has the key of each path, size and time, so a second start reads no .pt.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import DataFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.options import image_flags, resolutions
from cogvideox.config.prepared_flags import MOMENTS, is_factory_layout
from cogvideox.data.cache import CachedSample, CacheIndex, Ledger, TensorCache, hash_of, is_key, open_index, sole_writer
from cogvideox.data.forms.columns import Columns, Problems, is_unicode
from cogvideox.data.forms.folders import read_columns
from cogvideox.data.forms.paths import PathRules
from cogvideox.data.forms.samples import unique_id
from cogvideox.errors import UsageError
from cogvideox.files import stamp_of

EMBEDS, IMAGES = "prompt_embeds", "image_latents"  # the folders beside MOMENTS
NAMES = {MOMENTS: "moments_CFHW", EMBEDS: "prompt_LD", IMAGES: "image_moments_KCHW"}  # the tensors in the cache


@dataclass(frozen=True)
class Row:
    """One clip of the lists, and the files with its tensors."""

    id: str
    caption: str
    moments: Path
    embeds: Path
    image: Path | None = None  # for image-to-video

    def files(self) -> tuple[tuple[str, Path], ...]:
        """(folder's name, path) of each."""
        images = () if self.image is None else ((IMAGES, self.image),)
        return (MOMENTS, self.moments), (EMBEDS, self.embeds), *images


def check_tensors(options: Any) -> Iterator[str]:
    """Problems of the folder that is given with --load_tensors, for args.parse; no tensor is read."""
    folder = Path(options.data.data_root[0])
    if options.loader.load_tensors and is_factory_layout(folder):
        if len(options.data.repeats) > 1:
            yield f"--repeats {' '.join(map(str, options.data.repeats))}: there is one folder; give one number"
        try:
            read_rows(folder, options.data, image_flags(options) is not None)
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
    encoders: Any,
    embed_empty: Callable[[], None],
    ranks: Any,
    say: Callable[[str], None],
    images: bool = False,
) -> CacheIndex:
    """The index of a factory's folder, its tensors in ``cache``: the main process converts, the others wait for it.

    ``encoders`` is a prepare.Encoders, the model's: a .pt does not tell what made it. ``embed_empty`` puts the empty
    caption into the cache, where it is needed; ``ranks`` is a Ranks. ``images``: with the first frames.

    Raises:
        UsageError: everything that is wrong with the lists and the files.
    """
    rows = read_rows(folder, data, images)
    if ranks.is_main_process:
        with sole_writer(cache.folder, say):
            convert(rows, geometry, cache)
            embed_empty()
    ranks.wait_for_everyone()
    say(f"{folder}: that its .pt files were made with this VAE and T5 cannot be checked")
    if images:
        say(
            f"{folder}: its first frames are without the noise that models are trained with; prepare_dataset.py adds it"
        )
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
        index.save(cache.folder)  # from now on the cache can be given in the folder's place
    return index


# -- the lists ---------------------------------------------------------------------------------------------------------


def read_rows(folder: Path, data: DataFlags, images: bool = False) -> list[Row]:
    """The clips that the lists name, as often as --repeats says, each with its files, which may be read.

    Raises:
        UsageError: all problems of the lists and of the paths.
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
    """The rows of columns that have no problems, with their own ones added; ids may not be unique."""
    captions, videos = columns.captions, columns.videos
    assert captions is not None
    assert videos is not None
    owners: dict[Path, str] = {}
    for number, (caption, path) in enumerate(zip(captions.texts(), videos.texts(), strict=True)):
        video = os.path.normpath(os.path.join(videos.folder, path))
        row = Row(os.path.relpath(video, root).replace(os.sep, "/"), caption, *_files_of(video, images))
        if not is_unicode(caption):
            problems.add("not UTF-8", f"{captions.place(number)}: is no Unicode text; write the characters themselves")
        if owners.setdefault(row.moments, video) != video:
            whole = os.path.splitext(os.path.basename(video))[0]
            fix = f"name the tensors after the whole name, {whole}.pt, or rename the clip and them"
            both = f"{owners[row.moments]} and {video} would share {row.moments}"
            problems.add("two clips, one file", f"{videos.place(number)}: {both}; {fix}")
        for _, file in row.files():
            if (verdict := rules.verdict(os.path.relpath(file, root), root, "tensor")) is not None:
                problems.add(verdict[0], f"{videos.place(number)}: {verdict[1]}")
        yield row


def _files_of(video: str, images: bool) -> tuple[Path, ...]:
    """The tensors of a clip. The factory cuts its name at the first dot; a file of the whole name goes before."""
    folder, name = os.path.split(video)
    beside = Path(os.path.dirname(folder))
    whole, cut = os.path.splitext(name)[0], name.split(".")[0]
    stem = whole if os.path.lexists(beside / MOMENTS / f"{whole}.pt") else cut
    kinds = (MOMENTS, EMBEDS, IMAGES) if images else (MOMENTS, EMBEDS)
    return tuple(beside / kind / f"{stem}.pt" for kind in kinds)


# -- the tensors -------------------------------------------------------------------------------------------------------


def convert(rows: Sequence[Row], geometry: Geometry, cache: TensorCache) -> None:
    """Puts into the cache what is not there yet; a file that is good stays converted, whatever the others are.

    Raises:
        UsageError: what is wrong with each file.
    """
    ledger, problems = Ledger(cache.folder), Problems()
    known = ledger.read()
    files = list(dict.fromkeys(file for row in rows for file in row.files()))
    todo = sum(_record(known, path, cache) is None for _, path in files)
    with tqdm(total=todo, desc="converting tensors", unit="file", disable=not todo) as bar:
        for kind, path in files:
            record = _record(known, path, cache)
            try:
                if record is None:
                    record = _convert_file(kind, path, cache)
                    ledger.append([record])
                    bar.update()
                _check_shape(kind, path, tuple(record["shape"]), geometry)
            except UsageError as error:
                problems.add(kind, str(error))
    if problems:
        raise UsageError(problems.lines())


def cached_samples(
    rows: Sequence[Row], geometry: Geometry, cache: TensorCache, data: DataFlags
) -> tuple[CachedSample, ...]:
    """The converted rows as the index has them."""
    known = Ledger(cache.folder).read()
    samples = []
    for row in rows:
        moments, embeds, *images = (known[_request(path)] for _, path in row.files())
        sizes = {tuple(record["shape"][2:]) for record in (moments, *images)}
        if len(sizes) > 1:
            raise UsageError(f"{row.image}: has another size than {row.moments.name} of its clip; encode both again")
        bucket = bucket_of(tuple(moments["shape"]), geometry, data)
        image_keys = tuple(image["key"] for image in images)
        samples.append(CachedSample(row.id, row.caption, bucket, (moments["key"],), embeds["key"], image_keys))
    return tuple(samples)


def bucket_of(shape: tuple[int, ...], geometry: Geometry, data: DataFlags) -> Bucket:
    """The bucket of (2C, F, H, W) moments. F does not tell the number of frames: a listed number that becomes F latent
    frames is taken, else the one that the factory makes of F.
    """
    _, latents, height, width = shape
    compression = geometry.temporal_compression
    usual = (latents - 1) * compression + 1 if latents % 2 else latents * compression
    listed = [frames for frames, _, _ in resolutions(data)] or data.frame_buckets
    frames = next((count for count in listed if geometry.latent_frames(count) == latents), usual)
    return Bucket(frames, height * geometry.spatial_compression, width * geometry.spatial_compression)


def _request(path: Path) -> str:
    return hash_of(["factory", str(path), *stamp_of(path)])


def _record(known: dict[str, dict[str, Any]], path: Path, cache: TensorCache) -> dict[str, Any] | None:
    """What the ledger has on a file as it is now, if its tensor is in the cache."""
    record = known.get(_request(path))
    return record if record is not None and is_key(record.get("key")) and cache.has(record["key"]) else None


def _convert_file(kind: str, path: Path, cache: TensorCache) -> dict[str, Any]:
    request = _request(path)  # before reading: a later change gives another one
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
    return {"request": request, "path": str(path), "key": key, "shape": list(tensor.shape)}


def read_tensor(path: Path, content: bytes) -> Any:
    """The one tensor of a .pt, finite floats on the CPU; ``path`` is for messages.

    Raises:
        UsageError: it holds something else, or is damaged.
    """
    import torch

    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damage and hostile pickles raise anything; torch's text tells how to run them
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
    """Raises UsageError for a shape that the model does not take."""
    if kind == EMBEDS:
        wanted = (geometry.max_text_seq_length, geometry.text_embed_dim)
        if shape != wanted:
            raise UsageError(f"{path}: is {shape}, this model takes {wanted}; encode the captions again for it")
        return
    channels = 2 * geometry.latent_channels
    frames = "1" if kind == IMAGES else "F"
    if len(shape) != 4 or shape[0] != channels or 0 in shape or frames not in ("F", str(shape[1])):
        rule = f"this model takes ({channels}, {frames}, H, W), mean and log variance; encode the clips again for it"
        raise UsageError(f"{path}: is {shape}, {rule}")
    for side, size in zip(("height", "width"), shape[2:], strict=True):
        pixels = size * geometry.spatial_compression
        if problem := geometry.problem(side, pixels):
            raise UsageError(f"{path}: its {side} is {pixels} pixels: {problem}")
