"""Knows the folders of checkpoints: which there are, and whether one is complete.

checkpoint-N/ holds the state of the engine, the result so far, progress.json (step and recipe) and manifest.json, which
has the size and SHA-256 of every other file and a checksum of that list. A folder gets this name when it is complete
and verified, and loses it before it is deleted. A damaged checkpoint is renamed and not deleted, so that a person can
inspect it.
"""

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvideox import stopping
from cogvideox.data.cache import hash_of
from cogvideox.errors import DISK_LOSES, DiskError, first_line
from cogvideox.files import file_hash, fsync, stamp_of, write_atomically

CHECKPOINT_PREFIX, PROGRESS_NAME, MANIFEST_NAME = "checkpoint-", "progress.json", "manifest.json"
MANIFEST_FORMAT = 2
DAMAGED = "damaged-"  # prefix of the new names of checkpoints that could not be used
_known_damage: dict[Path, list[int]] = {}  # damaged checkpoints that were found, with the stamps of their manifests


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, newest first."""
    prefixed = output_dir.glob(f"{CHECKPOINT_PREFIX}*")
    found = [path for path in prefixed if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def newest_until(found: list[Path], step: int) -> Path | None:
    """Returns the newest of the checkpoints, given newest first, that is not later than ``step``."""
    return next((path for path in found if step_of(path) <= step), None)


# -- complete or damaged -----------------------------------------------------------------------------------------------


class Damage(ValueError):
    """Reports why a checkpoint cannot be used."""


def manifest_of(folder: Path, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """Returns the manifest of a folder: size and hash of every other file, and a checksum of that list.

    Args:
        folder: The folder.
        hashes: The hashes that are known; the other files are read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hashes.get(path) or file_hash(path)}
        for path in paths
    }
    return {"format": MANIFEST_FORMAT, "sha256": hash_of(files), "files": files}


def damage_of(folder: Path) -> str | None:
    """Returns why a checkpoint cannot be used, or None if it is complete. ``intact_checkpoints`` knows the damage then.

    No content of its files makes this raise an exception.
    """
    problem = _damage_of(folder)
    if problem is None:
        _known_damage.pop(folder.absolute(), None)
    else:
        remember_damage(folder)
    return problem


def _damage_of(folder: Path) -> str | None:
    try:
        for name, entry in listed_files(read_checkpoint_json(folder / MANIFEST_NAME)).items():
            check_file(folder, name, entry)
        progress = read_checkpoint_json(folder / PROGRESS_NAME)
        if type(progress["step"]) is not int or not isinstance(progress["recipe"], dict):
            raise Damage(f"{PROGRESS_NAME} has no step and recipe")
    except Damage as damage:
        return str(damage)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"cannot be read ({first_line(error)})"
    return None


def remember_damage(folder: Path) -> None:
    """Notes that a checkpoint is damaged, until another one is saved in its place."""
    _known_damage[folder.absolute()] = stamp_of(folder / MANIFEST_NAME)


def intact_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run in which no damage was found, newest first. Reads none of their files."""
    found = checkpoints(output_dir)
    return [path for path in found if _known_damage.get(path.absolute()) != stamp_of(path / MANIFEST_NAME)]


def read_checkpoint_json(path: Path) -> Any:
    """Returns the value in a JSON file of a checkpoint. Raises Damage if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Damage(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damage(f"{type(error).__name__} in its json files") from None


def listed_files(manifest: object) -> dict[str, Any]:
    """Returns the entries of a manifest by file name. Raises Damage if the manifest cannot be trusted."""
    if not isinstance(manifest, dict):
        raise Damage(f"{MANIFEST_NAME} is not a list of files")
    files: Any = manifest  # Earlier versions wrote only this dictionary.
    if "files" in manifest or "format" in manifest:
        if manifest.get("format") != MANIFEST_FORMAT:
            raise Damage(f"{MANIFEST_NAME} was written by another version (format {manifest.get('format')!r})")
        files = manifest.get("files")
        if not isinstance(files, dict) or manifest.get("sha256") != hash_of(files):
            raise Damage(f"{MANIFEST_NAME} is not what was written")
    if PROGRESS_NAME not in files:
        raise Damage(f"{MANIFEST_NAME} lists no {PROGRESS_NAME}")
    return files


def check_file(folder: Path, name: str, entry: object) -> None:
    """Raises Damage if a file of a checkpoint differs from its entry in the manifest."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Damage(f"{MANIFEST_NAME} names {name!r}, which is not inside the checkpoint")
    if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
        raise Damage(f"{MANIFEST_NAME} has no size and hash of {name}")
    path = folder / name
    if not path.is_file():
        raise Damage(f"{name} is missing")
    if path.stat().st_size != entry["size"] or file_hash(path) != entry["sha256"]:
        raise Damage(f"{name} is not what was written")


# -- names -------------------------------------------------------------------------------------------------------------


def seal(temporary: Path, target: Path, hashes: Mapping[Path, str]) -> None:
    """Verifies a written folder and renames it to its final name, replacing a folder that has this name.

    Args:
        temporary: The folder.
        target: Its final name.
        hashes: The hashes of what its files were to contain, as far as they are known.

    Raises:
        DiskError: What can be read from the disk is not what was written.
    """
    write_atomically(temporary / MANIFEST_NAME, json.dumps(manifest_of(temporary, hashes), indent=1).encode())
    for path in (*temporary.rglob("*"), temporary):
        fsync(path)
    problem = damage_of(temporary)
    if problem:
        raise DiskError(f"{temporary}: was written, but {problem}", DISK_LOSES)
    if target.exists() and damage_of(target):
        keep_damaged(target)
    old = move_aside(target)
    os.rename(temporary, target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that a kill in between leaves nothing that looks complete."""
    with stopping.disk_work():
        shutil.rmtree(move_aside(folder), ignore_errors=True)


def keep_damaged(path: Path) -> Path:
    """Renames a damaged checkpoint or its metrics so that nothing reads or deletes it, and returns the new path."""
    other = path.with_name(f"{DAMAGED}{path.name}")
    numbers = itertools.count(2)
    while other.exists():
        other = path.with_name(f"{DAMAGED}{path.name}.{next(numbers)}")
    os.rename(path, other)
    return other


def move_aside(folder: Path) -> Path:
    """Renames a checkpoint folder, if it exists, to a temporary name that the next start of the run deletes.

    Returns:
        The temporary name.
    """
    other = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(other, ignore_errors=True)
    if folder.exists():
        os.rename(folder, other)
    return other


# -- messages ----------------------------------------------------------------------------------------------------------


def safe_text(output_dir: Path) -> str:
    """Returns which checkpoint is safe, for the message of a run that ends because of the disk."""
    newest = next(iter(intact_checkpoints(output_dir)), None)
    if newest is None:
        return f"there is no {'intact ' if checkpoints(output_dir) else ''}checkpoint yet"
    which = "the newest checkpoint" if newest == checkpoints(output_dir)[0] else "the newest intact checkpoint"
    return f"{newest.name}, {which}, is safe"


def restart_hint(output_dir: Path) -> str:
    """Returns how a run continues that lost a process, for a message."""
    newest = next(iter(intact_checkpoints(output_dir)), None)
    if newest is None:
        return "no checkpoint was saved; the same command starts again"
    return f"the same command continues from {newest.name} (--resume_from_checkpoint latest)"


def resume_hint(output_dir: Path, step: int) -> str:
    """Returns, for a message, how to resume from the last checkpoint up to ``step``, the last step before NaN."""
    good = newest_until(intact_checkpoints(output_dir), step)
    if good is None:
        return "no checkpoint was saved before; start again with a lower --learning_rate"
    lower = "a lower --learning_rate and --allow_changed learning_rate"
    return f"the last good checkpoint is {good}: resume with --resume_from_checkpoint {good.name}, {lower}"
