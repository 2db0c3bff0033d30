"""--save_pipeline: a whole pipeline beside the result, put together from files. No model is loaded for it.

model_index.json, tokenizer, text_encoder, vae, scheduler of the base; the trained transformer -> OUTPUT_DIR/pipeline,
which from_pretrained reads alone. Weights get a second name (a hard link), not a second copy: those of the base where
the file system allows it, the trained ones always.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import INDEX_NAME, PARTS, read_model_index, saves_pipeline
from cogvideox.config.options import TrainOptions
from cogvideox.files import disk_errors_told, fsync, removed_on_failure
from cogvideox.model.models import part_folder, weight_files
from cogvideox.runtime.run import Run

PIPELINE_NAME = "pipeline"
WITH_WEIGHTS = ("text_encoder", "vae")
CONFIG_SUFFIXES = (".json", ".model", ".txt")


def fetch_parts(run: Run, options: TrainOptions) -> None:
    """Downloads what the folder will need, where the model is a hub id: before training, not after it."""
    if saves_pipeline(options):
        if run.is_main:
            for part in PARTS:
                part_folder(options.model, part)
        run.barrier()


def remove_pipeline(folder: Path) -> None:
    """Takes away the pipeline of an earlier result, whose transformer is not the one that comes now."""
    shutil.rmtree(folder / PIPELINE_NAME, ignore_errors=True)


def write_pipeline(model: ModelFlags, pipeline: str, transformer: Path) -> Path:
    """The pipeline's folder beside the trained transformer's, whole or not there."""
    temporary, target = transformer.parent / f".{PIPELINE_NAME}.tmp", transformer.parent / PIPELINE_NAME
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors_told(transformer.parent), removed_on_failure(temporary):
        fill(temporary, model, pipeline, transformer)
    remove_pipeline(transformer.parent)
    os.replace(temporary, target)
    return target


def fill(temporary: Path, model: ModelFlags, pipeline: str, transformer: Path) -> None:
    """All files of a pipeline into a folder that is not there yet, and onto the disk."""
    temporary.mkdir()
    index = read_model_index(model) | {"_class_name": pipeline}
    (temporary / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for part in PARTS:
        (temporary / part).mkdir()
        for name, source in files_of_part(model, part):
            place(source, temporary / part / name, model.variant)
    (temporary / transformer.name).mkdir()
    for source in sorted(transformer.iterdir()):
        link(source, temporary / transformer.name / source.name)
    for path in (*temporary.rglob("*"), temporary):
        fsync(path)


def files_of_part(model: ModelFlags, part: str) -> Iterator[tuple[str, Path]]:
    """(name without the variant, which from_pretrained would have to be told; file) of a part of the base."""
    variant = f".{model.variant}" if model.variant else ""
    weights = weight_files(model, part) if part in WITH_WEIGHTS else []
    for path in sorted(part_folder(model, part).iterdir()):
        config = path.suffix in CONFIG_SUFFIXES and ".index." not in path.name
        index = len(weights) > 1 and path.name.endswith(f".safetensors.index{variant}.json")
        if path in weights or config or index:
            yield path.name.replace(variant, "") if path in weights or index else path.name, path


def place(source: Path, target: Path, variant: str | None) -> None:
    """A file of the base under its new name: weights as a link if that can be, small files as copies.

    Whoever edits a copied config does not edit the base's. An index of shards names them without the variant.
    """
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)  # of a hub's cache, what the link there leads to
        except OSError:  # another file system, one without links, or somebody else's file
            shutil.copyfile(source, target)
    elif variant and ".safetensors.index." in source.name:
        index = json.loads(source.read_text(encoding="utf-8"))
        shards = {tensor: shard.replace(f".{variant}", "") for tensor, shard in index["weight_map"].items()}
        target.write_text(json.dumps(index | {"weight_map": shards}, indent=2), encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def link(source: Path, target: Path) -> None:
    """A second name for a file of the trained transformer; it is never stored twice."""
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        target.symlink_to(Path("..", "..", source.parent.name, source.name))
