"""Checkpoints that are whole or not there: written aside, verified, renamed; older ones go afterwards.

checkpoint-N/ holds the engine's state, the result so far, progress.json (step and recipe) and manifest.json with the
size and SHA-256 of every other file.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox.engine import Engine
from cogvideox.errors import UsageError
from cogvideox.files import write_atomically
from cogvideox.options import TrainOptions
from cogvideox.run import Run

PREFIX, PROGRESS_NAME, MANIFEST_NAME = "checkpoint-", "progress.json", "manifest.json"


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file under a folder but the manifest itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    return {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": file_hash(p)} for p in files}


def fsync(path: Path) -> None:
    """Asks the disk to have a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used; None: it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        json.loads((folder / PROGRESS_NAME).read_text())
    except (OSError, ValueError) as error:
        return f"{type(error).__name__} in its json files"
    if not isinstance(manifest, dict) or PROGRESS_NAME not in manifest:
        return f"{MANIFEST_NAME} lists no {PROGRESS_NAME}"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"] or file_hash(path) != entry["sha256"]:
            return f"{name} is not what was written"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


@dataclass
class Saver:
    """Writes the checkpoints of a run. ``save`` is called on all ranks."""

    run: Run
    engine: Engine
    method: Any
    recipe: dict[str, Any]
    every: int
    limit: int | None
    kept: int | None = None  # the step of a checkpoint that the limit does not concern

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this optimizer step."""
        return step % self.every == 0

    def save(self, step: int) -> None:
        """Leaves a whole checkpoint of ``step``, then removes those beyond the limit."""
        target = self.run.output_dir / f"{PREFIX}{step}"
        temporary = self.run.output_dir / f".{target.name}.tmp"
        if self.run.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.run.barrier()
        self.engine.save(temporary)
        self.run.barrier()
        if self.run.is_main:
            with self.engine.averaged():
                self.method.save(temporary)
            progress = {"step": step, "recipe": self.recipe}
            (temporary / PROGRESS_NAME).write_text(json.dumps(progress, indent=1))
            seal(temporary, target)
            self._remove_replaced(step, checkpoints(self.run.output_dir))
        self.run.barrier()

    def trim(self, step: int) -> None:
        """Removes checkpoints up to a step that the limit has no room for; later ones stay. On the main process."""
        self._remove_replaced(step, [path for path in checkpoints(self.run.output_dir) if step_of(path) <= step])

    def _remove_replaced(self, step: int, found: list[Path]) -> None:
        for old in replaced_by(step, found, self.limit, self.kept):
            remove(old)


def replaced_by(step: int, found: list[Path], limit: int | None, kept: int | None = None) -> list[Path]:
    """Of the checkpoints (newest first), those that a new one of ``step`` makes obsolete: later ones, which are damaged
    or of a future that was given up, and the oldest beyond the limit but the one ``kept``.
    """
    later = [path for path in found if step_of(path) > step]
    rest = [path for path in found if step_of(path) <= step]
    return later + [path for path in (rest[limit:] if limit else []) if step_of(path) != kept]


def seal(temporary: Path, target: Path) -> None:
    """Gives a finished folder its name; a folder of that name (of the same step, or torn) makes room."""
    write_atomically(temporary / MANIFEST_NAME, json.dumps(manifest_of(temporary), indent=1).encode())
    for path in (*temporary.rglob("*"), temporary):
        fsync(path)
    problem = fault(temporary)
    if problem:
        raise OSError(f"{temporary}: {problem}; is the disk full?")
    old = aside(target)
    os.rename(temporary, target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a checkpoint; a kill in between leaves nothing that looks like one."""
    shutil.rmtree(aside(folder), ignore_errors=True)


def aside(folder: Path) -> Path:
    """Takes a checkpoint's name away from a folder, if it is there; the next start deletes what has the new name."""
    other = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(other, ignore_errors=True)
    if folder.exists():
        os.rename(folder, other)
    return other


def resume(run: Run, engine: Engine, method: Any, recipe: dict[str, Any], options: TrainOptions) -> int:
    """Takes up the newest whole checkpoint, or the one asked for; returns its step, 0 where there is none.

    Raises:
        UsageError: the checkpoint asked for is not there or not whole, or was made with another recipe.
    """
    if run.is_main:
        for leftover in run.output_dir.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(leftover)
    run.barrier()
    folder = find_checkpoint(run, options.train.resume_from_checkpoint)
    if folder is None:
        return 0
    progress = json.loads((folder / PROGRESS_NAME).read_text())
    check_recipe(folder, progress["recipe"], recipe)
    if not engine.safe_to_load and folder.resolve().parent != run.output_dir.resolve():
        rule = "DeepSpeed's files can run code, so only those of this --output_dir are loaded"
        raise UsageError(f"--resume_from_checkpoint {folder}: {rule}")
    engine.load(folder)
    method.resume(folder)
    run.say(f"resuming from {folder} after step {progress['step']}")
    return progress["step"]


def find_checkpoint(run: Run, wanted: str | None) -> Path | None:
    """The checkpoint to start from."""
    if wanted not in (None, "latest"):
        folder = Path(str(wanted))
        folder = folder if folder.is_dir() else run.output_dir / folder
        problem = fault(folder) if folder.is_dir() else "there is no such folder"
        if problem:
            there = ", ".join(path.name for path in checkpoints(run.output_dir)) or "none"
            raise UsageError(f"--resume_from_checkpoint {wanted}: {problem}; in {run.output_dir}: {there}")
        return folder
    for folder in checkpoints(run.output_dir):
        problem = fault(folder)
        if problem is None:
            return folder
        run.say(f"{folder}: {problem}; trying the one before")
    return None


def check_recipe(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UsageError where the run that wrote the checkpoint was another one."""
    now = json.loads(json.dumps(now))  # as it would have been written: tuples are lists
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if changed:
        differences = [f"  {name}: {then.get(name)} there, {now.get(name)} now" for name in changed]
        rule = f"{folder}: was made with other settings; give them again, or start anew with another --output_dir"
        raise UsageError([rule, *differences])
