"""Writes checkpoints that are either complete or absent, at once or in the background, and removes old ones.

    .checkpoint-N.tmp/   written   ->   fsync, hashes verified   ->   renamed to checkpoint-N/   ->   older ones removed

A kill at any moment leaves the old checkpoints or the new one, because the rename is the only visible change.
"""

import errno
import json
import math
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cogvideox import stopping
from cogvideox.config.options import SftOptions, TrainOptions
from cogvideox.errors import DiskError, NonFiniteError
from cogvideox.files import check_room, disk_errors_converted, removed_on_failure, size_text
from cogvideox.host_memory import free_host_bytes
from cogvideox.model.methods import Method
from cogvideox.optimizer.engine import Engine, Hashes
from cogvideox.optimizer.zero_weights import num_elements
from cogvideox.runtime.background import Reserve, Snapshot, Writing
from cogvideox.runtime.checkpoint_files import (
    CHECKPOINT_PREFIX,
    PROGRESS_NAME,
    checkpoints,
    damage_of,
    keep_damaged,
    newest_until,
    remove,
    resume_hint,
    seal,
    step_of,
)
from cogvideox.runtime.disk_room import (
    DiskNeeds,
    bytes_left_out,
    check_disk,
    checkpoint_bytes,
    copy_bytes,
    new_at_once,
    result_bytes,
    seconds_to_write,
)
from cogvideox.runtime.resume import state_after_loss
from cogvideox.runtime.run import Run
from cogvideox.tensor_files import Pieces, WriteTensors, write_tensors

COPY_SHARE = 0.9  # largest share of the free host memory that the copy of a checkpoint may take
PART_SHARE = 0.75  # the share that the copy of a part takes, if that of a whole has no room
LEAST_COPIED = 0.5  # smallest share of a checkpoint that is copied; for less, memory would be taken for little


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
        bytes_left_out: How many bytes may be left out of a copy.
        saved_at: The monotonic time of the last checkpoint, or of the start.
        good_until: While steps are skipped, the step before the first of them; its last checkpoint is not removed.
        first: The step after which this process continues; infinite if that is not known.
        weights_only: Whether checkpoints have only the weights, without the engine's state.
        in_background: Whether checkpoints are copied to host memory and written while training goes on, where there is
            room. Only for a single process, because an error of the thread ends only its own process, and for an
            engine that does not share files, because one that does writes them without the given function.
        spare: The bytes of host memory that are expected to be free while training; infinite if that is not known.
        reserve: The memory of copies, after the first step; empty if there was no room.
        writing: The checkpoint that a thread writes.
        afterwards: What waits for its end.
        saved: The steps of the checkpoints that this process has saved.
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
    bytes_left_out: float = math.inf
    saved_at: float = field(default_factory=time.monotonic)
    good_until: int | None = None
    first: float = math.inf
    weights_only: bool = False
    in_background: bool = False
    spare: float = field(default=math.inf, init=False)
    reserve: Reserve | None = field(default=None, init=False)
    writing: Writing | None = field(default=None, init=False)
    afterwards: list[Callable[[], None]] = field(default_factory=list, init=False)
    saved: set[int] = field(default_factory=set, init=False)

    def due(self, step: int) -> bool:
        """Returns whether a checkpoint is due after this optimizer step."""
        return step % self.every == 0

    def overdue(self) -> bool:
        """Returns whether --save_every_minutes have passed since the last checkpoint or the start."""
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes

    def save(self, step: int) -> None:
        """Saves a complete checkpoint of ``step``, then removes those beyond the limit.

        In the background, this returns when the state is copied to host memory, and a thread writes the copy. If host
        memory has no room for a copy, this returns when all is written, and a thread verifies it. ``check`` and
        ``finish`` raise the errors of the thread.

        Raises:
            NonFiniteError: A tensor that would be saved is not finite; no checkpoint is added or removed.
        """
        self.finish()
        room = self._room_of_copies() if self.in_background else 0
        if not (room and self._copy(step, room)):
            self._write(step)
        self.saved_at = time.monotonic()

    def _write(self, step: int) -> None:
        """Writes a checkpoint while training waits; in the background, a thread then verifies and publishes it."""
        started = time.monotonic()
        self._check_finite(step)
        hashes: Hashes = {}

        def write(path: Path, pieces: Pieces, metadata: Mapping[str, str]) -> None:
            hashes[path] = write_tensors(path, pieces, metadata)

        with self._guarded(step):
            hashes |= self._make_files(step, write)
        publish = partial(self._publish, step, hashes)
        if self.in_background:
            waited = f"training waited {time.monotonic() - started:.1f} s while it was written"
            self.writing = Writing(step, publish, f"{waited}, and it was verified")
        else:
            publish()
            self.run.barrier()

    def _room_of_copies(self) -> int:
        """Returns the bytes of a checkpoint that are copied to host memory; 0 if there is no room."""
        reserved = self.reserve.num_bytes if self.reserve else 0
        return reserved or self._room(free_host_bytes())

    def _room(self, free: float) -> int:
        """Returns the bytes of a checkpoint that are copied if host memory has some free bytes."""
        if self.copy_bytes is None:
            return 0
        # More may be free now than later: a larger bucket than those of the first steps needs larger buffers.
        usable = max(0.0, min(free, self.spare))
        if self.copy_bytes <= COPY_SHARE * usable:
            return self.copy_bytes
        # Weights in whose place there is an average while they are saved cannot be written later without a copy.
        part = int(PART_SHARE * usable) if self.engine.ema is None else 0
        least = max(LEAST_COPIED * self.copy_bytes, self.copy_bytes - self.bytes_left_out)
        return part if part >= least else 0

    @contextmanager
    def _guarded(self, step: int) -> Iterator[None]:
        """Removes an unfinished checkpoint after an error, and converts errors of the disk."""
        cleans = removed_on_failure(self._temporary(step)) if self.run.is_main else nullcontext()
        with disk_errors_converted(self.run.output_dir, self.num_bytes), cleans:
            yield

    def _temporary(self, step: int) -> Path:
        return self.run.output_dir / f".{CHECKPOINT_PREFIX}{step}.tmp"

    def _make_files(self, step: int, write: WriteTensors) -> Hashes:
        """Makes the temporary folder; ``write`` writes the files of the engine and the method, now or later.

        Returns:
            The hashes of the files that the ranks have written together.
        """
        folder = self._temporary(step)
        if self.run.is_main:
            with stopping.disk_work():
                shutil.rmtree(folder, ignore_errors=True)
                check_room(self.run.output_dir, self.num_bytes or 0)
                folder.mkdir()
        self.run.barrier()
        hashes = {} if self.weights_only else self.engine.save(folder, write)
        hashes |= self.engine.save_weights(self.method, folder, write)
        self.run.barrier()
        return hashes

    def _publish(self, step: int, hashes: Mapping[Path, str]) -> None:
        """Gives the checkpoint its final name, on the main process, and removes those beyond the limit."""
        if not self.run.is_main:
            return
        with self._guarded(step), stopping.disk_work():
            folder = self._temporary(step)
            progress = {"step": step, "recipe": self.recipe}
            (folder / PROGRESS_NAME).write_text(json.dumps(progress, indent=1))
            seal(folder, self.run.output_dir / f"{CHECKPOINT_PREFIX}{step}", hashes)
            self.saved.add(step)
            self._remove_replaced(step, checkpoints(self.run.output_dir))

    # -- in the background --

    def _copy(self, step: int, room: int) -> bool:
        """Copies a checkpoint, or the part for which there is room, and starts the thread that writes it.

        Returns:
            Whether the system gave memory for that.
        """
        started, memory = time.monotonic(), self.reserve.memory() if self.reserve else None
        left_out = (self.copy_bytes or 0) - room
        snapshot = Snapshot(self.engine.ema is None, memory, left_out)
        try:
            with self._guarded(step):
                self._make_files(step, snapshot.add)
        except OSError as error:
            if error.errno != errno.ENOMEM:  # a limit of the process, such as ulimit -v
                raise
            self.run.say(f"{CHECKPOINT_PREFIX}{step}: no host memory for a copy ({error}), so training waits")
            return False
        self.writing = Writing(step, partial(self._write_snapshot, step, snapshot))
        how = "it was copied to host memory, and it"
        if left_out:
            self.writing.wait_for(snapshot.only_copies)
            how = f"{size_text(room)} of it were copied to host memory and the rest was written, and all"
        self.writing.said = f"training waited {time.monotonic() - started:.1f} s while {how} was written"
        return True

    def _write_snapshot(self, step: int, snapshot: Snapshot) -> None:
        """Writes a copied checkpoint; a thread runs this."""
        with self._guarded(step):
            hashes = snapshot.write()
            if snapshot.not_finite:
                raise self._not_finite_error(step, snapshot.not_finite)
        self._publish(step, hashes)

    def check(self) -> None:
        """Does what ``finish`` does if the background thread has ended. Called after each step; does not wait.

        After the first step, when training has all of its memory, this reserves what is left for copies.
        """
        if self.in_background and self.reserve is None:
            self.reserve = Reserve(self._room(free_host_bytes()))
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
            self.run.say(f"{CHECKPOINT_PREFIX}{writing.step}: {writing.said} in {seconds:.0f} s")
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

    def check_disk(self, options: TrainOptions, first: int, total: int, seconds: float = 0.0) -> None:
        """Checks that the disk has room for what a run will write.

        Args:
            options: The flags.
            first: Optimizer steps that are done.
            total: Optimizer steps of the complete run.
            seconds: The predicted time of a step; 0 if it is not known.

        Raises:
            DiskError: It has less room. Every rank raises it.
        """
        run, there = self.run, len(checkpoints(self.run.output_dir))
        weights = sum(map(num_elements, self.method.parameters().values()))
        self.num_bytes = checkpoint_bytes(options, weights, run.dtype, run.device, self.engine.refers)
        self.copy_bytes = copy_bytes(options, weights, run.dtype, run.device)
        self.bytes_left_out = bytes_left_out(options, weights, run.dtype, run.device)
        new = new_at_once(options.train, first, total, there, seconds)
        shortage = None
        if run.is_main:
            try:
                may_shrink = isinstance(options, SftOptions) and not (self.weights_only or options.loss.use_ema)
                needs = DiskNeeds(self.num_bytes, result_bytes(options, weights, run.dtype), new, may_shrink)
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
        room, needed = self._room(spare) if self.in_background else 0, self.copy_bytes or 0
        if room:
            how += f", while training goes on; {size_text(room)} of host memory are reserved for copies"
            if room < needed:
                waits = seconds * (needed - room) / self.num_bytes
                how += f", and training waits for the rest, {waits:.0f} s: a complete copy needs {size_text(needed)}"
        elif self.in_background:
            how += "; training waits until it is written, and goes on while it is verified: "
            how += f"a copy needs {size_text(needed)} of host memory, and {size_text(spare)} are free"
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
        # The checkpoint of a step that this process repeats is damaged, or the user chose an earlier one. It does not
        # count for the limit, and goes once this process has saved another.
        repeated = [path for path in found if step_of(path) > self.first and step_of(path) not in self.saved]
        others = [path for path in found if path not in repeated]
        before = None if self.good_until is None else newest_until(others, self.good_until)
        kept = {self.kept, None if before is None else step_of(before)}
        for old in replaced_by(step, others, self.limit, kept) + (repeated if self.saved else []):
            if (old in repeated or step_of(old) > step) and damage_of(old):
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
