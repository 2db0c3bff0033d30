"""Finds the checkpoint from which a run continues, and compares its settings and its data with those of the run.

``recipe_of`` lists the settings. ``find_start`` compares them before a model is loaded, and ``check_same_samples``
compares the data when they are known. ``StartPoint.load`` loads the checkpoint.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shlex import quote
from typing import Any

from cogvideox import stopping
from cogvideox.config.flags import CHANGEABLE, OWN_OF_PROCESS, PLACES_OF_STATE, TrainFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.lora_file import misfits, read_header
from cogvideox.config.options import (
    SCRIPTS,
    LoraOptions,
    TrainOptions,
    fields_of,
    launched_processes,
    precision_of,
    samples_per_step,
)
from cogvideox.data.cache import CacheIndex
from cogvideox.errors import UsageError, first_names, plural
from cogvideox.files import file_hash, write_atomically
from cogvideox.model.methods import Method
from cogvideox.model.models import weight_fingerprint
from cogvideox.model.tasks import Task
from cogvideox.optimizer.engine import STATE_NAME, Engine
from cogvideox.runtime.checkpoint_files import (
    CHECKPOINT_PREFIX,
    DAMAGED,
    MANIFEST_NAME,
    PROGRESS_NAME,
    checkpoints,
    damage_of,
    intact_checkpoints,
    keep_damaged,
    read_checkpoint_json,
    remember_damage,
)
from cogvideox.runtime.run import METRICS_NAME, Run

SAMPLES_NAME = "samples.json"
PREPARED = "prepared"  # the entry of samples.json with the flags of the preparation
DATA = "data"  # the entry of a recipe that names the samples
# The entry of a recipe with what --allow_changed replaced: a list of {"until": step, name of an entry: its value then}.
EARLIER = "earlier"
NAMES_SHOWN = 5
# What decides the entries of a recipe that are not called like their flag.
MODEL_FLAG = "--pretrained_model_name_or_path"
DECIDED_BY = {
    "task": "the script (task)",
    "method": "the script (method)",
    "transformer": f"{MODEL_FLAG} (hash of the weights)",
    "precision": "--mixed_precision",
    "samples_per_step": "--train_batch_size x --gradient_accumulation_steps x processes",
    "image_scale": "--image_latent_scale",
    "lora_path": "--lora_path (hash of the file)",
    **{item.name: f"{MODEL_FLAG} ({item.name})" for item in fields(Geometry)},
}


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
    return f"with fresh optimizer state{rounded}, so the result differs from that of a run without a break"


def keep_all_damaged(output_dir: Path) -> None:
    """Renames all checkpoints, none of which is usable, and their metrics, before a run starts at step 0."""
    found = checkpoints(output_dir)
    metrics = output_dir / METRICS_NAME
    if found and metrics.exists():
        keep_damaged(metrics)  # This comes first, so that a start after a kill in between still finds the checkpoints.
    for folder in found:
        keep_damaged(folder)


def recipe_of(
    options: TrainOptions, geometry: Geometry, task_type: type[Task], method_type: type[Method]
) -> dict[str, Any]:
    """Returns the recipe of a run: every setting that decides the result, except the data.

    The recipe contains only the global batch size, not how it is split over processes and micro-batches. A run can be
    resumed only with an equal recipe.
    """
    optimizer = {name: value for name, value in asdict(options.optimizer).items() if name not in PLACES_OF_STATE}
    return {
        "task": task_type.__name__,
        "method": method_type.__name__,
        "transformer": weight_fingerprint(options.model, "transformer"),
        "precision": precision_of(options.train.mixed_precision),
        "seed": options.data.seed,
        "samples_per_step": samples_per_step(options, launched_processes()),
        "caption_dropout": options.loader.caption_dropout,
        "max_grad_norm": options.train.max_grad_norm,
        **asdict(geometry),
        **asdict(options.loss),
        **optimizer,
        **task_type.recipe(options, geometry),
        **method_type.recipe(options),
    }


def find_start(run: Run, recipe: dict[str, Any], options: TrainOptions) -> StartPoint:
    """Finds the newest complete checkpoint, or the requested one, and compares its recipe with this run's.

    This needs no model. ``recipe`` has everything but the data, which ``check_same_samples`` compares once they are
    known. Only the main process reads all files to verify them; of a sharded checkpoint, the others load a part.

    Raises:
        UsageError: The requested checkpoint does not exist, is damaged, or was made with other settings, or a process
            does not see it. Every rank raises it.
    """
    if run.is_main:
        with stopping.disk_work():
            for leftover in run.output_dir.glob(f".{CHECKPOINT_PREFIX}*.tmp"):
                shutil.rmtree(leftover)
    run.barrier()
    folder, problem = None, None
    damaged: set[Path] = set()
    if run.is_main:
        try:
            folder = find_checkpoint(run, options.train.resume_from_checkpoint)
        except UsageError as error:
            problem = error
        damaged = set(checkpoints(run.output_dir)) - set(intact_checkpoints(run.output_dir))
    folder, problem, damaged = run.from_main((folder, problem, damaged))
    for path in damaged:
        remember_damage(path)
    if problem is not None:
        raise problem
    if folder is None:
        return StartPoint()
    seen = file_hash(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).exists() else None
    run.ranks.check_agreement({f"in {folder} the manifest": seen}, "give a folder that all machines share")
    progress = json.loads((folder / PROGRESS_NAME).read_text())
    start = StartPoint(folder, progress["step"], progress["recipe"])
    check_recipe(start, recipe, options)
    check_length(start, options.train.max_train_steps, options.train)
    return start


def find_checkpoint(run: Run, wanted: str | None) -> Path | None:
    """Returns the checkpoint to start from, or None if the run starts at step 0."""
    if wanted not in (None, "latest"):
        folder = requested_folder(str(wanted), run.output_dir)
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
        everything = "its only checkpoint is" if len(found) == 1 else f"all {len(found)} checkpoints are"
        run.say(
            f"{run.output_dir}: {everything} damaged, so training starts at step 0; damaged checkpoints and the "
            f"metrics are kept as {DAMAGED}*; if there is an intact copy elsewhere, stop this run and give "
            "--resume_from_checkpoint FOLDER"
        )
    return None


def requested_folder(wanted: str, output_dir: Path) -> Path:
    """Returns the folder that --resume_from_checkpoint names: a path, or a name in the output folder."""
    return Path(wanted) if Path(wanted).is_dir() else output_dir / wanted


def expected_start(train: TrainFlags) -> StartPoint:
    """Returns where a run will start if its checkpoint is intact, for a prediction.

    Raises:
        UsageError: The requested checkpoint does not exist.
    """
    output_dir, wanted = Path(train.output_dir), train.resume_from_checkpoint
    newest = wanted in (None, "latest")
    folders = checkpoints(output_dir) if newest else [requested_folder(str(wanted), output_dir)]
    for folder in folders:
        with suppress(ValueError, LookupError, TypeError):
            progress = read_checkpoint_json(folder / PROGRESS_NAME)
            return StartPoint(folder, int(progress["step"]), dict(progress["recipe"]))
    if newest:
        return StartPoint()
    raise UsageError(f"--resume_from_checkpoint {wanted}: {folders[0]} has no {PROGRESS_NAME}; give another")


# -- settings that a resumed run shares with the interrupted one -------------------------------------------------------


def check_length(start: StartPoint, total_steps: int | None, train: TrainFlags) -> None:
    """Raises UsageError if a run has passed its last step already. ``total_steps`` is None if it is not known yet."""
    if total_steps is not None and start.step > total_steps:
        given = f"--max_train_steps {total_steps}"
        if train.max_train_steps is None:
            given = f"--num_train_epochs {train.num_train_epochs}, which are {plural(total_steps, 'step')}"
        raise UsageError(
            f"{given}: {train.output_dir} is at step {start.step} already; "
            "give more, or --resume_from_checkpoint with an earlier one"
        )


def changes(then: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Returns the entries of two recipes that differ, by name: the value that was written, and the current one."""
    now = json.loads(json.dumps(now))  # The checkpoint went through JSON too, which turns tuples into lists.
    then = as_written_now(then, now)
    pairs = {name: (then.get(name), now.get(name)) for name in {**then, **now} if name != EARLIER}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def earlier_values(start: StartPoint, changed: Mapping[str, tuple[object, object]]) -> list[dict[str, Any]]:
    """Returns the entry EARLIER of a run that continues with changed settings, which are given as by ``changes``."""
    then = {name: old for name, (old, _) in changed.items()}
    return [*start.recipe.get(EARLIER, []), *([{"until": start.step, **then}] if start.step and then else [])]


def earlier_lines(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yields, for the model card, a sentence about the settings of each group of steps before --allow_changed."""
    for entry in recipe.get(EARLIER, []):
        values = [
            "other data" if name == DATA else f"{setting(name)}: {shown(value)}"
            for name, value in entry.items()
            if name != "until"
        ]
        yield f"Settings up to step {entry['until']}: {'; '.join(values)}."


def check_recipe(start: StartPoint, now: Mapping[str, object], options: TrainOptions) -> None:
    """Raises UsageError if settings differ from those of the checkpoint, unless --allow_changed permits it."""
    free = {DATA, *options.train.allow_changed}
    changed = {name: pair for name, pair in changes(start.recipe, now).items() if name not in free}
    if changed:
        hint = continue_hint(start, list(changed), options)
        rule = f"{start.folder}: was made with other settings; give them again, or {hint}"
        raise UsageError([rule, *(f"  {line}" for line in there_and_now(changed))])


def there_and_now(changed: Mapping[str, tuple[object, object]]) -> Iterator[str]:
    """Yields, for a message, both values of each setting of ``changes``."""
    for name, (old, new) in changed.items():
        yield f"{setting(name)}: {shown(old)} there, {shown(new)} now"


def setting(name: str) -> str:
    """Returns what a user gives to change an entry of a recipe, for messages: the flag, if there is one."""
    flags = {item.name for script in SCRIPTS.values() for _, item, _ in fields_of(script)}
    return DECIDED_BY.get(name, f"--{name}" if name in flags else name)


def common_settings(options: TrainOptions, recipe: Mapping[str, object]) -> dict[str, object]:
    """Returns what the processes of a run must have in common, by what a user gives: the recipe, and when to do what.

    A process with another number of steps or another schedule would leave the others waiting.
    """
    flags = asdict(options.train) | asdict(options.validation)
    common = {f"--{name}": value for name, value in flags.items() if name not in OWN_OF_PROCESS}
    return common | {setting(name): value for name, value in recipe.items()}


def shown(value: object) -> str:
    """Returns a value of a recipe for messages."""
    if isinstance(value, list) and value:
        return " ".join(map(str, value))
    return "not set" if value in (None, []) else str(value)


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


def continue_hint(start: StartPoint, changed: list[str], options: TrainOptions) -> str:
    """Returns, for a message, the flags that allow a changed setting or that start a new run from the weights."""
    names = dict.fromkeys((*options.train.allow_changed, *changed))  # A second --allow_changed would replace the first.
    allowed = "add --allow_changed " + " ".join(names) + ", or " if set(changed) <= set(CHANGEABLE) else ""
    weights = weights_hint(start, changed, options)
    return f"{allowed}start a new run with another --output_dir{weights and f' ({weights})'}"


def weights_hint(start: StartPoint, changed: list[str], options: TrainOptions) -> str:
    """Returns, for a message, how a new run with the flags starts from the weights of a checkpoint; empty if none can.

    A LoRA keeps its rank, alpha and layers.
    """
    if isinstance(options, LoraOptions):
        with suppress(UsageError):  # a checkpoint of another script has no LoRA
            if not any(misfits(read_header(str(start.folder)), options.lora)):
                return f"--lora_path {quote(str(start.folder))} continues with its weights"
    elif "method" not in changed:
        return "--pretrained_model_name_or_path with the folder of --save_pipeline continues with its weights"
    return ""


# -- data --------------------------------------------------------------------------------------------------------------


def check_same_samples(start: StartPoint, index: CacheIndex, options: TrainOptions) -> None:
    """Raises UsageError if a checkpoint was trained on other samples, unless --allow_changed permits it."""
    same = start.folder is None or start.recipe.get(DATA) == index.fingerprint
    if same or DATA in options.train.allow_changed:
        return
    assert start.folder is not None
    written = recorded_samples(start)
    difference = data_difference(written["samples"], index) if written else "clips or captions differ"
    flags = changes(written.get(PREPARED, index.recipe), index.recipe)  # earlier versions did not write them
    other = "; they were prepared with other flags" if flags else ""
    rule = f"{start.folder}: was trained on other data: {difference}{other}; give the same data, or "
    raise UsageError([rule + continue_hint(start, [DATA], options), *(f"  {line}" for line in there_and_now(flags))])


def recorded_samples(start: StartPoint) -> dict[str, Any]:
    """Returns the content of samples.json; empty if it is missing, damaged, or belongs to another checkpoint."""
    assert start.folder is not None
    try:
        written: dict[str, Any] = json.loads((start.folder.parent / SAMPLES_NAME).read_text(encoding="utf-8"))
        known = isinstance(written["samples"], dict) and written["fingerprint"] == start.recipe.get(DATA)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return written if known else {}


def data_difference(then: Mapping[str, str], index: CacheIndex) -> str:
    """Returns, for a message, how the samples differ from those of a checkpoint, whose digests are given by id."""
    now = index.digests
    groups = {
        "added": [name for name in now if name not in then],
        "removed": [name for name in then if name not in now],
        "changed": [name for name in now if name in then and now[name] != then[name]],
    }
    parts = [
        f"{plural(len(names), 'clip')} {what} ({first_names(names, NAMES_SHOWN)})"
        for what, names in groups.items()
        if names
    ]
    return ", ".join(parts) or "the clips come in another order, or another text encoder embedded them"


def write_samples(output_dir: Path, index: CacheIndex) -> None:
    """Writes samples.json, the samples that a run is trained on and how they were prepared, to report changes later."""
    captions = {sample.id: sample.caption for sample in index.samples}
    content = {"fingerprint": index.fingerprint, "samples": index.digests, "captions": captions, PREPARED: index.recipe}
    write_atomically(output_dir / SAMPLES_NAME, json.dumps(content, ensure_ascii=False, indent=0).encode())
