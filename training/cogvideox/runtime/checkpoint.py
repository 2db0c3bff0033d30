"""Writes checkpoints that are either complete or absent, finds the newest one, and compares its settings.

    .checkpoint-N.tmp/   written   ->   fsync, hashes verified   ->   renamed to checkpoint-N/   ->   older ones removed

A kill at any moment leaves the old checkpoints or the new one, because the rename is the only visible change.
checkpoint-N/ holds the engine's state, the result so far, progress.json (step and recipe) and manifest.json, which has
the size and SHA-256 of every other file and a checksum of that list. A damaged checkpoint is never deleted; it is
renamed so that a person can inspect it. ``Saver`` writes checkpoints and ``find_start`` finds the one to resume from.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from cogvideox.config.flags import CHANGEABLE, PLACES_OF_STATE
from cogvideox.config.options import LoraOptions, SftOptions, TrainOptions
from cogvideox.data.cache import CacheIndex, hash_of
from cogvideox.errors import DiskError, NonFiniteError, UsageError, first_line
from cogvideox.files import check_room, disk_errors_converted, fsync, removed_on_failure, size_text, write_atomically
from cogvideox.host_memory import free_host_bytes
from cogvideox.model.methods import Method
from cogvideox.optimizer.engine import STATE_NAME, Engine
from cogvideox.optimizer.zero_weights import num_elements
from cogvideox.runtime.background import Reserve, Snapshot, Writing
from cogvideox.runtime.disk_room import (
    DiskNeeds,
    check_disk,
    checkpoint_bytes,
    copy_bytes,
    new_at_once,
    seconds_to_write,
)
from cogvideox.runtime.run import METRICS_NAME, Run
from cogvideox.tensor_files import Pieces, WriteTensors, write_tensors

CHECKPOINT_PREFIX, PROGRESS_NAME, MANIFEST_NAME = "checkpoint-", "progress.json", "manifest.json"
MANIFEST_FORMAT = 2
DAMAGED = "damaged-"  # prefix of the new names of checkpoints that could not be used
SAMPLES_NAME = "samples.json"
DATA = "data"  # the entry of a recipe that names the samples
NAMES_SHOWN = 5
COPY_SHARE = 0.9  # largest share of the free host memory that the copy of a checkpoint may take


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Returns why a checkpoint cannot be used, or None if it is complete.

    No content of its files makes this raise an exception.
    """
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


def read_checkpoint_json(path: Path) -> Any:
    """Returns the value in a JSON file of a checkpoint. Raises Damage if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
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


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, newest first."""
    prefixed = output_dir.glob(f"{CHECKPOINT_PREFIX}*")
    found = [path for path in prefixed if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def safe_text(output_dir: Path) -> str:
    """Returns which checkpoint is safe, for the message of a run that ends because of the disk."""
    newest = next(iter(checkpoints(output_dir)), None)
    return "there is no checkpoint yet" if newest is None else f"{newest.name}, the newest checkpoint, is safe"


def restart_hint(output_dir: Path) -> str:
    """Returns how a run continues that lost a process, for a message."""
    newest = next(iter(checkpoints(output_dir)), None)
    if newest is None:
        return "no checkpoint was saved; the same command starts again"
    return f"the same command continues from {newest.name} (--resume_from_checkpoint latest)"


def step_of(checkpoint: Path) -> int:
    """Returns the optimizer step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


@dataclass
class Saver:
    """Writes the checkpoints of a run and removes those beyond the limit. ``save`` is called on all ranks.

    Attributes:
        run: The run.
        engine: What writes and reads its part of a checkpoint.
        method: What writes the trained weights.
        recipe: The settings that a resumed run must share, written to progress.json.
        every: Optimizer steps between checkpoints.
        limit: How many checkpoints remain; None keeps all.
        every_minutes: Largest number of minutes between checkpoints; None sets no such limit.
        kept: The step of a checkpoint that the limit does not remove, the best one.
        num_bytes: The expected size of a checkpoint, if known.
        copy_bytes: The expected size of a copy of it in host memory, if known.
        saved_at: The monotonic time of the last checkpoint, or of the start.
        good_until: While steps are skipped, the step before the first of them; its last checkpoint is not removed.
        weights_only: Whether checkpoints have only the weights, without the engine's state.
        in_background: Whether checkpoints are copied to host memory and written while training goes on, where there is
            room. Only for a single process, because an error of the thread ends only its own process.
        spare: The bytes of host memory that are expected to be free while training; infinite if that is not known.
        reserve: The memory of copies, after the first step; empty if there was no room.
        writing: The checkpoint that a thread writes.
        afterwards: What waits for its end.
    """

    run: Run
    engine: Engine
    method: Method
    recipe: dict[str, Any]
    every: int
    limit: int | None
    every_minutes: float | None = None
    kept: int | None = None
    num_bytes: int | None = None
    copy_bytes: int | None = None
    saved_at: float = field(default_factory=time.monotonic)
    good_until: int | None = None
    weights_only: bool = False
    in_background: bool = False
    spare: float = field(default=math.inf, init=False)
    reserve: Reserve | None = field(default=None, init=False)
    writing: Writing | None = field(default=None, init=False)
    afterwards: list[Callable[[], None]] = field(default_factory=list, init=False)

    def due(self, step: int) -> bool:
        """Returns whether a checkpoint is due after this optimizer step."""
        return step % self.every == 0

    def overdue(self) -> bool:
        """Returns whether --save_every_minutes have passed since the last checkpoint or the start."""
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes

    def save(self, step: int) -> None:
        """Saves a complete checkpoint of ``step``, then removes those beyond the limit.

        In the background, this returns when the state is copied to host memory, and a thread writes the copy; ``check``
        and ``finish`` raise its errors. Where host memory has no room for a copy, this returns when all is written.

        Raises:
            NonFiniteError: A tensor that would be saved is not finite; nothing is written or removed.
        """
        self.finish()
        copied = self.in_background and self._has_room() and self._start_writing(step)
        if not copied:
            self._check_finite(step)
            hashes: dict[Path, str] = {}

            def write(path: Path, pieces: Pieces, metadata: Mapping[str, str]) -> None:
                hashes[path] = write_tensors(path, pieces, metadata)

            with self._guarded(step):
                self._make_files(step, write)
                self._publish(step, hashes)
            self.run.barrier()
        self.saved_at = time.monotonic()

    def _has_room(self) -> bool:
        """Returns whether there is host memory for a copy of a checkpoint."""
        return bool(self.reserve and self.reserve.num_bytes) or self._copy_fits(free_host_bytes())

    def _copy_fits(self, free: float) -> bool:
        # More may be free now than later: a larger bucket than those of the first steps needs larger buffers.
        return self.copy_bytes is not None and self.copy_bytes <= COPY_SHARE * min(free, self.spare)

    @contextmanager
    def _guarded(self, step: int) -> Iterator[None]:
        """Removes an unfinished checkpoint after an error, and converts errors of the disk."""
        cleans = removed_on_failure(self._temporary(step)) if self.run.is_main else nullcontext()
        with disk_errors_converted(self.run.output_dir, self.num_bytes), cleans:
            yield

    def _temporary(self, step: int) -> Path:
        return self.run.output_dir / f".{CHECKPOINT_PREFIX}{step}.tmp"

    def _make_files(self, step: int, write: WriteTensors) -> None:
        """Makes the temporary folder; ``write`` writes the files of the engine and the method, now or later."""
        folder = self._temporary(step)
        if self.run.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            check_room(self.run.output_dir, self.num_bytes or 0)
            folder.mkdir()
        self.run.barrier()
        if not self.weights_only:
            self.engine.save(folder, write)
        self.engine.save_weights(self.method, folder, write)
        self.run.barrier()

    def _publish(self, step: int, hashes: Mapping[Path, str]) -> None:
        """Gives the checkpoint its final name, on the main process, and removes those beyond the limit."""
        if self.run.is_main:
            folder = self._temporary(step)
            progress = {"step": step, "recipe": self.recipe}
            (folder / PROGRESS_NAME).write_text(json.dumps(progress, indent=1))
            seal(folder, self.run.output_dir / f"{CHECKPOINT_PREFIX}{step}", hashes)
            self._remove_replaced(step, checkpoints(self.run.output_dir))

    # -- in the background --

    def _start_writing(self, step: int) -> bool:
        """Copies a checkpoint and starts the thread that writes it; returns whether the system gave memory for that."""
        started, memory = time.monotonic(), self.reserve.memory() if self.reserve else None
        snapshot = Snapshot(shares=self.engine.ema is None, memory=memory)
        try:
            with self._guarded(step):
                self._make_files(step, snapshot.add)
        except OSError as error:
            if error.errno != errno.ENOMEM:  # a limit of the process, such as ulimit -v
                raise
            self.run.say(f"{CHECKPOINT_PREFIX}{step}: no host memory for a copy ({error}), so training waits")
            return False
        self.writing = Writing(step, time.monotonic() - started, partial(self._write_snapshot, step, snapshot))
        return True

    def _write_snapshot(self, step: int, snapshot: Snapshot) -> None:
        """Writes a copied checkpoint; a thread runs this."""
        with self._guarded(step):
            if bad := snapshot.not_finite():
                raise self._not_finite_error(step, bad)
            self._publish(step, snapshot.write())

    def check(self) -> None:
        """Does what ``finish`` does if the background thread has ended. Called after each step; does not wait.

        After the first step, when training has all of its memory, this reserves what is left for copies.
        """
        if self.in_background and self.reserve is None:
            self.reserve = Reserve(self.copy_bytes or 0 if self._copy_fits(free_host_bytes()) else 0)
        if self.writing and not self.writing.runs:
            self.finish()

    def finish(self) -> None:
        """Waits until the checkpoint that a thread writes is complete, and does what waited for that.

        Raises:
            DiskError: The disk is full, fails or refuses to be written; older checkpoints are untouched.
            NonFiniteError: A tensor of the checkpoint is not finite; older checkpoints are untouched.
        """
        writing, self.writing = self.writing, None
        if writing:
            seconds = writing.result()
            waited = f"training waited {writing.waited:.1f} s while it was copied to host memory"
            self.run.say(f"{CHECKPOINT_PREFIX}{writing.step}: {waited}, and it was written in {seconds:.0f} s")
        while self.afterwards:
            self.afterwards.pop(0)()

    def after_writing(self, action: Callable[[], None]) -> None:
        """Does something that needs the newest checkpoint: at once, or when the thread that writes it has ended."""
        self.afterwards.append(action)
        if not self.writing:
            self.finish()

    def close(self) -> None:
        """Waits for the background thread after an error of training, without raising that of the thread as well.

        The memory of copies is freed.
        """
        if self.writing:
            self.writing.thread.join()
            self.writing = None
        if self.reserve:
            self.reserve.memory()
            self.reserve = None

    def check_disk(self, options: TrainOptions, first: int, total: int) -> None:
        """Predicts what the steps from ``first`` to ``total`` write; raises DiskError if the disk has less room."""
        run, there = self.run, len(checkpoints(self.run.output_dir))
        weights = sum(map(num_elements, self.method.parameters().values()))
        self.num_bytes = checkpoint_bytes(options, weights, run.dtype, run.device, self.engine.refers)
        self.copy_bytes = copy_bytes(options, weights, run.dtype, run.device)
        new = new_at_once(options.train, first, total, there)
        shortage = None
        if run.is_main:
            try:
                may_shrink = isinstance(options, SftOptions) and not (self.weights_only or options.loss.use_ema)
                needs = DiskNeeds(self.num_bytes, weights * run.dtype.itemsize, new, may_shrink)
                check_disk(run.output_dir, needs, options.train, there)
            except DiskError as error:
                shortage = error
        shortage = run.from_main(shortage)
        if shortage is not None:
            raise shortage

    def announce(self, spare: int) -> None:
        """Prints how long saving a checkpoint will take, which is also how long a stopped run needs to end.

        All ranks call this, because all may take part in saving.

        Args:
            spare: The bytes of host memory that are expected to be free while training.
        """
        self.spare = spare
        if self.num_bytes is None:
            return
        with disk_errors_converted(self.run.output_dir):
            seconds = seconds_to_write(self.run, self.num_bytes, self.engine.shares_files)
        size, rate = f"{self.num_bytes / 2**30:.3g} GiB", size_text(int(self.num_bytes / seconds))
        how = f"takes {seconds:.0f} s ({rate} a second were measured)"
        if self.in_background and self._copy_fits(spare):
            how += f", while training goes on; {size_text(self.copy_bytes or 0)} of host memory are reserved for copies"
        elif self.in_background:
            needed = size_text(self.copy_bytes or 0)
            how += (
                f", during which training waits: a copy needs {needed} of host memory, and {size_text(spare)} are free"
            )
        else:
            how += ", during which training waits"
        self.run.say(f"estimate: saving a checkpoint, also when stopped, writes {size} and {how}")
        if self.weights_only and self.run.is_main:
            lost = state_after_loss(self.run, self.recipe)
            self.run.say(f"--checkpoint_weights_only: a run that is stopped or killed resumes {lost}")

    def _check_finite(self, step: int) -> None:
        bad = self.run.ranks.gather(self.engine.not_finite())
        if bad:
            raise self._not_finite_error(step, bad)

    def _not_finite_error(self, step: int, bad: list[str]) -> NonFiniteError:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        hint = resume_hint(self.run.output_dir, step if self.good_until is None else self.good_until)
        rule = f"{bad[0]}{more} holds numbers that are not finite; older checkpoints are untouched"
        return NonFiniteError(f"{CHECKPOINT_PREFIX}{step} is not saved: {rule}; {hint}")

    def trim(self, step: int) -> None:
        """Removes checkpoints beyond the limit, but none later than ``step``. Called on the main process."""
        self._remove_replaced(step, [path for path in checkpoints(self.run.output_dir) if step_of(path) <= step])

    def _remove_replaced(self, step: int, found: list[Path]) -> None:
        before = None if self.good_until is None else newest_until(found, self.good_until)
        kept = {self.kept, None if before is None else step_of(before)}
        for old in replaced_by(step, found, self.limit, kept):
            if step_of(old) > step and damage_of(old):
                keep_damaged(old)
            else:
                remove(old)


def replaced_by(step: int, found: list[Path], limit: int | None, kept: Container[int | None] = ()) -> list[Path]:
    """Returns the checkpoints that a new one of ``step`` makes obsolete.

    These are all later ones, which are damaged or belong to steps that are repeated, and the oldest beyond the limit.

    Args:
        step: The step of the new checkpoint.
        found: All checkpoints, newest first.
        limit: How many checkpoints remain; None or 0 keeps all.
        kept: Steps of checkpoints that the limit does not remove.
    """
    later = [path for path in found if step_of(path) > step]
    rest = [path for path in found if step_of(path) <= step]
    return later + [path for path in (rest[limit:] if limit else []) if step_of(path) not in kept]


def newest_until(found: list[Path], step: int) -> Path | None:
    """Returns the newest of the checkpoints, given newest first, that is not later than ``step``."""
    return next((path for path in found if step_of(path) <= step), None)


def resume_hint(output_dir: Path, step: int) -> str:
    """Returns, for a message, how to resume from the last checkpoint up to ``step``, the last step before NaN."""
    good = newest_until(checkpoints(output_dir), step)
    if good is None:
        return "no checkpoint was saved before; start again with a lower --learning_rate"
    lower = "a lower --learning_rate and --allow_changed learning_rate"
    return f"the last good checkpoint is {good}: resume with --resume_from_checkpoint {good.name}, {lower}"


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
        fix = "is the disk full, or does it fail? find out and run the same command again"
        raise DiskError(f"{temporary}: was written, but {problem}", fix)
    if target.exists() and damage_of(target):
        keep_damaged(target)
    old = move_aside(target)
    os.rename(temporary, target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that a kill in between leaves nothing that looks complete."""
    shutil.rmtree(move_aside(folder), ignore_errors=True)


def keep_damaged(path: Path) -> Path:
    """Renames a damaged checkpoint or its metrics so that nothing reads or deletes it, and returns the new path."""
    other = path.with_name(f"{DAMAGED}{path.name}")
    numbers = itertools.count(2)
    while other.exists():
        other = path.with_name(f"{DAMAGED}{path.name}.{next(numbers)}")
    os.rename(path, other)
    return other


def keep_all_damaged(output_dir: Path) -> None:
    """Renames all checkpoints, none of which is usable, and their metrics, before a run starts at step 0."""
    found = checkpoints(output_dir)
    metrics = output_dir / METRICS_NAME
    if found and metrics.exists():
        keep_damaged(metrics)  # This comes first, so that a start after a kill in between still finds the checkpoints.
    for folder in found:
        keep_damaged(folder)


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


@dataclass(frozen=True)
class StartPoint:
    """Describes where training starts: at step 0, or from a complete checkpoint.

    Attributes:
        folder: The checkpoint; None if the run is new.
        step: Optimizer steps that are done.
        recipe: The settings that the checkpoint was made with.
    """

    folder: Path | None = None
    step: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def weights_only(self) -> bool:
        """Returns whether the checkpoint has only the weights; then the engine must be made from these."""
        return self.folder is not None and not (self.folder / STATE_NAME).exists()

    def load(self, run: Run, engine: Engine, method: Method) -> None:
        """Loads the checkpoint, if there is one, into the engine and the method; otherwise renames damaged ones."""
        if self.folder is None:
            if run.is_main:
                keep_all_damaged(run.output_dir)
        elif self.weights_only:
            lost = state_after_loss(run, self.recipe)
            run.say(f"resuming from the weights in {self.folder} after step {self.step}, {lost}")
        else:
            engine.load(self.folder)
            method.resume(self.folder)
            run.say(f"resuming from {self.folder} after step {self.step}")


def state_after_loss(run: Run, recipe: Mapping[str, object]) -> str:
    """Returns, for a message, with what a run of this recipe resumes from a checkpoint that has only the weights."""
    rounded = ""
    if run.precision != "no" and not recipe.get("use_stochastic_rounding"):
        rounded = f", and with master weights that were rounded to {run.precision}"
    return f"with fresh optimizer state{rounded}, so not as if it had not been interrupted"


def find_start(run: Run, recipe: dict[str, Any], options: TrainOptions) -> StartPoint:
    """Finds the newest complete checkpoint, or the requested one, and compares its recipe with this run's.

    This needs no model. ``recipe`` has everything but the data, which ``check_same_samples`` compares once they are
    known. Only the main process reads all files to verify them; of a sharded checkpoint, the others load a part.

    Raises:
        UsageError: The requested checkpoint does not exist, is damaged, or was made with other settings, or a process
            does not see it. Every rank raises it.
    """
    if run.is_main:
        for leftover in run.output_dir.glob(f".{CHECKPOINT_PREFIX}*.tmp"):
            shutil.rmtree(leftover)
    run.barrier()
    folder, problem = None, None
    if run.is_main:
        try:
            folder = find_checkpoint(run, options.train.resume_from_checkpoint)
        except UsageError as error:
            problem = error
    folder, problem = run.from_main((folder, problem))
    if problem is not None:
        raise problem
    if folder is None:
        return StartPoint()
    seen = file_hash(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).exists() else None
    run.ranks.check_agreement({f"in {folder} the manifest": seen}, "give a folder that all machines share")
    progress = json.loads((folder / PROGRESS_NAME).read_text())
    start = StartPoint(folder, progress["step"], progress["recipe"])
    check_recipe(start, recipe, options)
    check_length(start, options.train.max_train_steps, run.output_dir)
    return start


def find_checkpoint(run: Run, wanted: str | None) -> Path | None:
    """Returns the checkpoint to start from, or None if the run starts at step 0."""
    if wanted not in (None, "latest"):
        folder = Path(str(wanted))
        folder = folder if folder.is_dir() else run.output_dir / folder
        problem = damage_of(folder) if folder.is_dir() else "the folder does not exist"
        if problem:
            there = ", ".join(path.name for path in checkpoints(run.output_dir)) or "none"
            raise UsageError(f"--resume_from_checkpoint {wanted}: {problem}; in {run.output_dir}: {there}")
        return folder
    found = checkpoints(run.output_dir)
    for folder in found:
        problem = damage_of(folder)
        if problem is None:
            return folder
        run.say(f"{folder}: {problem}; trying the one before")
    if found:
        run.say(
            f"{run.output_dir}: all {len(found)} checkpoints are damaged, so training starts at step 0; they and the "
            f"metrics are kept as {DAMAGED}*; if there is an intact copy elsewhere, stop this run and give "
            "--resume_from_checkpoint FOLDER"
        )
    return None


# -- settings and data that a resumed run must share with the interrupted one ------------------------------------------


def check_length(start: StartPoint, total_steps: int | None, output_dir: Path) -> None:
    """Raises UsageError if a run has passed its last step already. ``total_steps`` is None if it is not known yet."""
    if total_steps is not None and start.step > total_steps:
        raise UsageError(
            f"--max_train_steps {total_steps}: {output_dir} is at step {start.step} already; "
            "give more, or --resume_from_checkpoint with an earlier one"
        )


def check_recipe(start: StartPoint, now: Mapping[str, object], options: TrainOptions) -> None:
    """Raises UsageError if settings differ from those of the checkpoint, unless --allow_changed permits it."""
    now = json.loads(json.dumps(now))  # The checkpoint went through JSON too, which turns tuples into lists.
    then = as_written_now(start.recipe, now)
    free = {DATA, *options.train.allow_changed}
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name) and name not in free]
    if changed:
        differences = [f"  {name}: {then.get(name)} there, {now.get(name)} now" for name in changed]
        hint = continue_hint(start, changed, options)
        raise UsageError([f"{start.folder}: was made with other settings; give them again, or {hint}", *differences])


def as_written_now(then: Mapping[str, object], now: Mapping[str, object]) -> dict[str, object]:
    """Returns a recipe that an earlier version may have written as this version writes it.

    Args:
        then: The recipe that was written.
        now: A recipe of this version.
    """
    # Earlier versions did not have some of the switches, and trained as this version does where those are off.
    found = {name: False for name, value in now.items() if value is False} | dict(then)
    # They named the places of state, and the engine. Checkpoints of DeepSpeed's engine were other files then.
    found = {name: value for name, value in found.items() if name not in PLACES_OF_STATE}
    return {name: value for name, value in found.items() if (name, value) != ("engine", "local")}


def check_same_samples(start: StartPoint, index: CacheIndex, options: TrainOptions) -> None:
    """Raises UsageError if a checkpoint was trained on other samples, unless --allow_changed permits it."""
    same = start.folder is None or start.recipe.get(DATA) == index.fingerprint
    if same or DATA in options.train.allow_changed:
        return
    assert start.folder is not None
    difference = data_difference(start, index)
    hint = continue_hint(start, [DATA], options)
    raise UsageError(f"{start.folder}: was trained on other data: {difference}; give the same data, or {hint}")


def data_difference(start: StartPoint, index: CacheIndex) -> str:
    """Returns, for a message, how the samples differ from those of a checkpoint, as far as samples.json has them."""
    assert start.folder is not None
    try:
        written = json.loads((start.folder.parent / SAMPLES_NAME).read_text(encoding="utf-8"))
        then: dict[str, str] = dict(written["samples"])
        known = written["fingerprint"] == start.recipe.get(DATA)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        return "clips or captions differ"  # samples.json is missing, or belongs to another checkpoint
    now = index.digests
    groups = {
        "added": [name for name in now if name not in then],
        "removed": [name for name in then if name not in now],
        "changed": [name for name in now if name in then and now[name] != then[name]],
    }
    parts = [f"{count(len(names), 'clip')} {what} ({listed(names)})" for what, names in groups.items() if names]
    return ", ".join(parts) or "the clips come in another order, or another text encoder embedded them"


def continue_hint(start: StartPoint, changed: list[str], options: TrainOptions) -> str:
    """Returns, for a message, the flags that allow a changed setting or that start a new run from the weights."""
    allowed = "add --allow_changed " + " ".join(changed) + ", or " if set(changed) <= set(CHANGEABLE) else ""
    if isinstance(options, LoraOptions):
        weights = f"--lora_path {quote(str(start.folder))} continues with its weights"
    else:
        weights = "--pretrained_model_name_or_path with the folder of --save_pipeline continues with its weights"
    return f"{allowed}start a new run with another --output_dir ({weights})"


def count(number: int, what: str) -> str:
    """Returns a number with its noun, in the plural if needed."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def listed(names: list[str]) -> str:
    """Returns the first NAMES_SHOWN names, separated by commas."""
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def write_samples(output_dir: Path, index: CacheIndex) -> None:
    """Writes samples.json, the samples that a run is trained on, so that a resumed run can report changes."""
    captions = {sample.id: sample.caption for sample in index.samples}
    content = {"fingerprint": index.fingerprint, "samples": index.digests, "captions": captions}
    write_atomically(output_dir / SAMPLES_NAME, json.dumps(content, ensure_ascii=False, indent=0).encode())
