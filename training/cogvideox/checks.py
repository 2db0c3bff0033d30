"""Lists the checks that a training script makes before it imports torch.

``TRAINING_CHECKS`` is the list. A check takes the options and yields all problems that it finds, one line each.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cogvideox.config.conflicts import check_launcher, check_trackers
from cogvideox.config.flags import TENSOR_FOLDER
from cogvideox.config.geometry import check_heads, check_model, check_pipeline
from cogvideox.config.hub import check_hub
from cogvideox.config.lora_file import check_lora
from cogvideox.config.optimizers import check_optimizer, check_state_place
from cogvideox.config.options import TrainOptions, image_flags, is_url
from cogvideox.config.prepared_flags import is_factory_layout
from cogvideox.config.prompts import check_prompts, images_of, link_problems, prompts_of
from cogvideox.data.cache import foreign_files
from cogvideox.data.forms.samples import check_data_roots
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels.decord_reader import check_reader
from cogvideox.errors import plural, public_urls
from cogvideox.files import nearest_folder
from cogvideox.preparation.factory import check_tensors


def check_images(options: TrainOptions) -> Iterator[str]:
    """Yields the problems of --validation_images: a wrong number of images, and unusable files.

    URLs are only checked for their form; they are downloaded when the run starts.
    """
    flags = image_flags(options)
    if flags is None or any(check_prompts(options)):
        return
    try:
        images, prompts = images_of(options), len(prompts_of(options.validation))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        yield f"--validation_images {flags.validation_images}: {reason}; give a list in --validation_dir"
        return
    if options.validation.validation_dir and flags.validation_images:
        folder = Path(options.validation.validation_dir)
        yield from link_problems(folder, folder / flags.validation_images, options.data.allow_path)
    if len(images) != prompts:
        yield f"--validation_images: {plural(len(images), 'image')} for {plural(prompts, 'prompt')}; give one for each"
    for text in images:
        if not is_url(text):
            yield from image_problems(text)
        elif len(text.split()) > 1 or not text.isprintable():
            yield f"--validation_images {public_urls(text.split()[0])}: ends at a space; write %20 instead"


def image_problems(path: str) -> Iterator[str]:
    """Yields what is wrong with a file that should be a still image."""
    from cogvideox.data.media.pixels.pictures import is_picture, probe_picture, read_picture

    try:
        if not is_picture(path):
            yield f"--validation_images {path}: is not a png, jpeg, webp, avif, bmp or tiff image; give a still image"
            return
        info = probe_picture(path)
        read_picture(path, info, 1, info.height, info.width)
    except (OSError, VideoError) as error:
        yield f"--validation_images {getattr(error, 'strerror', None) or error}"


def check_tensor_cache(options: TrainOptions) -> Iterator[str]:
    """Yields the problems of the folder into which a run has to encode or convert tensors."""
    root = Path(options.data.data_root[0])
    if not root.is_dir() or (options.loader.load_tensors and not is_factory_layout(root)):
        return
    folder = Path(options.loader.tensor_cache or root / TENSOR_FOLDER)
    if not os.access(nearest_folder(folder), os.W_OK | os.X_OK):
        yield f"--tensor_cache {folder}: cannot be written; give a folder in which the tensors can be written"
    yield from foreign_files("--tensor_cache", folder)


def check_workers(options: TrainOptions) -> Iterator[str]:
    """Yields a problem if worker processes of the loader could not send batches, for which they need a socket.

    The path of the socket is as long as that of multiprocessing, and the system allows only 107 characters.
    """
    workers = options.data.dataloader_num_workers
    if workers == 0:
        return
    try:
        with tempfile.TemporaryDirectory(prefix="pymp-") as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/listener-12345678")
    except OSError as error:
        rule = f"its processes cannot use the folder for temporary files ({error.strerror or error})"
        fix = "set TMPDIR to a folder that can be written and has a short path, or give --dataloader_num_workers 0"
        yield f"--dataloader_num_workers {workers}: {rule}; {fix}"


DATA_CHECKS = (check_data_roots, check_reader, check_tensors, check_tensor_cache)
TRAINING_CHECKS = (
    check_model,
    *DATA_CHECKS,
    check_optimizer,
    check_state_place,
    check_lora,
    check_prompts,
    check_images,
    check_trackers,
    check_hub,
    check_pipeline,
    check_heads,
    check_launcher,
    check_workers,
)
