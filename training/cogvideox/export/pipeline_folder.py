"""Writes the folder of --save_pipeline, a complete pipeline for from_pretrained, without loading any model.

``write_pipeline`` combines model_index.json, tokenizer, text encoder, VAE and scheduler of the base model with the
trained transformer in OUTPUT_DIR/pipeline. Weights are linked if the file system allows it, and copied otherwise.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cogvideox import stopping
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import INDEX_NAME, PARTS, read_model_index, saves_pipeline
from cogvideox.config.options import TrainOptions
from cogvideox.files import disk_errors_converted, fsync, removed_on_failure
from cogvideox.model.models import part_folder, weight_files
from cogvideox.runtime.run import Run

PIPELINE_NAME = "pipeline"
PARTS_WITH_WEIGHTS = ("text_encoder", "vae")
CONFIG_SUFFIXES = (".json", ".model", ".txt")


def fetch_parts(run: Run, options: TrainOptions) -> None:
    """Downloads the parts of a hub model that the folder needs, before training, so that it cannot fail afterwards."""
    if saves_pipeline(options):
        if run.is_main:
            for part in PARTS:
                part_folder(options.model, part)
        run.barrier()


def remove_pipeline(folder: Path) -> None:
    """Removes the pipeline folder of an earlier result, whose transformer is outdated."""
    with stopping.disk_work():
        shutil.rmtree(folder / PIPELINE_NAME, ignore_errors=True)


def write_pipeline(model: ModelFlags, pipeline: str, transformer: Path) -> Path:
    """Writes the pipeline folder next to the trained transformer's folder, completely or not at all.

    Args:
        model: The base model.
        pipeline: Class name of the diffusers pipeline.
        transformer: Folder of the trained transformer.

    Returns:
        The pipeline folder.
    """
    temporary, target = transformer.parent / f".{PIPELINE_NAME}.tmp", transformer.parent / PIPELINE_NAME
    with stopping.disk_work():
        shutil.rmtree(temporary, ignore_errors=True)
        with disk_errors_converted(transformer.parent), removed_on_failure(temporary):
            fill_pipeline(temporary, model, pipeline, transformer)
        remove_pipeline(transformer.parent)
        os.replace(temporary, target)
    return target


def fill_pipeline(temporary: Path, model: ModelFlags, pipeline: str, transformer: Path) -> None:
    """Writes all files of a pipeline into a new folder and flushes them to disk."""
    temporary.mkdir()
    index = read_model_index(model) | {"_class_name": pipeline}
    (temporary / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for part in PARTS:
        (temporary / part).mkdir()
        for name, source in files_of_part(model, part):
            link_or_copy(source, temporary / part / name, model.variant)
    (temporary / transformer.name).mkdir()
    for source in sorted(transformer.iterdir()):
        link_trained(source, temporary / transformer.name / source.name)
    for path in (*temporary.rglob("*"), temporary):
        fsync(path)


def files_of_part(model: ModelFlags, part: str) -> Iterator[tuple[str, Path]]:
    """Yields (new name, file) for each file of a part of the base model.

    New names lack the variant, such as fp16, so that from_pretrained finds them without its variant argument.
    """
    variant = f".{model.variant}" if model.variant else ""
    weights = weight_files(model, part) if part in PARTS_WITH_WEIGHTS else []
    for path in sorted(part_folder(model, part).iterdir()):
        config = path.suffix in CONFIG_SUFFIXES and ".index." not in path.name
        index = len(weights) > 1 and path.name.endswith(f".safetensors.index{variant}.json")
        if path in weights or config or index:
            yield path.name.replace(variant, "") if path in weights or index else path.name, path


def link_or_copy(source: Path, target: Path, variant: str | None) -> None:
    """Puts a file of the base model under a new name: weights as a link if possible, small files as copies.

    Configurations are copied so that editing one does not change the base model's. An index of shards is rewritten,
    because the new names of the shards lack the variant.
    """
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)  # files in the hub's cache are symbolic links, which are resolved first
        except OSError:  # another file system, one without hard links, or a file of another user
            shutil.copyfile(source, target)
    elif variant and ".safetensors.index." in source.name:
        index = json.loads(source.read_text(encoding="utf-8"))
        shards = {tensor: shard.replace(f".{variant}", "") for tensor, shard in index["weight_map"].items()}
        target.write_text(json.dumps(index | {"weight_map": shards}, indent=2), encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def link_trained(source: Path, target: Path) -> None:
    """Gives a file of the trained transformer a second name. It is only copied if the file system has no links."""
    for link, place in ((os.link, source), (os.symlink, Path("..", "..", source.parent.name, source.name))):
        with suppress(OSError):
            link(place, target)
            return
    shutil.copyfile(source, target)
