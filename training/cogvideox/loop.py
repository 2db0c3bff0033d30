"""What every training script does, and its one loop: batches in, optimizer steps out, nothing waits for the device."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.config.geometry import Geometry, read_geometry
from cogvideox.config.hub import upload
from cogvideox.config.options import TrainOptions, ignores_positions, image_flags, local_processes
from cogvideox.data.cache import hash_of
from cogvideox.data.clips import max_bad
from cogvideox.data.dataset import Batch, LatentDataset, batches_of, build_loader, timesteps_of
from cogvideox.data.sampler import BucketBatchSampler, Order
from cogvideox.data.shared_memory import batch_bytes, choose_workers
from cogvideox.errors import UsageError, first_line, first_of
from cogvideox.evaluation.before_after import BeforeAfter
from cogvideox.evaluation.held_out import HeldOut
from cogvideox.evaluation.images import take_images
from cogvideox.evaluation.parity import check_parity
from cogvideox.evaluation.validation import Prompts, Validator, embed_prompts
from cogvideox.export.pipeline_folder import fetch_parts
from cogvideox.export.publish import publish
from cogvideox.files import what_is_safe
from cogvideox.memory.streaming import HostTrainedBlocks
from cogvideox.model import diffusion, models
from cogvideox.model.diffusion import NoiseSchedule
from cogvideox.model.methods import Method
from cogvideox.model.tasks import Task, losses_of
from cogvideox.optimizer.engine import engine_name, make_engine
from cogvideox.optimizer.optim import learning_rate, rate_jump
from cogvideox.planning.block_check import check_blocks
from cogvideox.planning.execution import Plan, keep_to_budget, make_plan, measured, place
from cogvideox.planning.plan import HOST, ExecutionPlan
from cogvideox.planning.warm_up import has_no_bound, warm_up
from cogvideox.preparation.tensors import Tensors, open_tensors
from cogvideox.runtime.best import Best
from cogvideox.runtime.checkpoint import (
    DATA,
    Saver,
    StartPoint,
    check_data,
    check_length,
    find_start,
    safe_text,
    write_samples,
)
from cogvideox.runtime.curves import CURVES_NAME, column, draw_curves, read_records
from cogvideox.runtime.run import METRICS_NAME, Metrics, Run, Sample, start_run, start_trackers, write_config
from cogvideox.runtime.skipped import SkippedSteps

STEADY_STEPS = 6  # after so many of a run, one is like the next: everything is compiled and has its memory


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run: what each is made of, how many there are, and where this process begins."""

    order: Order  # which samples belong to which step
    total: int
    recipe: dict[str, Any]  # all that decides the result
    start: StartPoint

    @property
    def first(self) -> int:
        """The step that has been reached before this process started."""
        return self.start.step


def recipe_of(
    run: Run, options: TrainOptions, geometry: Geometry, task_type: type[Task], method_type: type[Method]
) -> dict[str, Any]:
    """All that decides the result but the data, whatever the number of processes. Compared when a run is resumed."""
    return {
        "task": task_type.__name__,
        "method": method_type.__name__,
        "transformer": models.fingerprint(options.model, "transformer"),
        "precision": run.precision,
        "engine": engine_name(run.accelerator),
        "seed": options.data.seed,
        "samples_per_step": samples_per_step(run, options),
        "caption_dropout": options.loader.caption_dropout,
        "max_grad_norm": options.train.max_grad_norm,
        **asdict(geometry),
        **asdict(options.loss),
        **asdict(options.optimizer),
        **task_type.recipe(options, geometry),
        **method_type.recipe(options),
    }


def samples_per_step(run: Run, options: TrainOptions) -> int:
    """Samples that one optimizer step averages over, on all processes and micro-batches."""
    return options.train.train_batch_size * options.train.gradient_accumulation_steps * run.world


def plan_steps(run: Run, options: TrainOptions, tensors: Tensors, recipe: dict[str, Any], start: StartPoint) -> Steps:
    """The steps of a run on its data.

    Raises:
        UsageError: the checkpoint was trained on other data or is further than the last step, or the processes do not
            see the same data.
    """
    index, train = tensors.index, options.train
    held_out = {"the held-out clips": hash_of([sample.clip for sample in index.validation])}
    fix = "give all processes one --data_root (and --tensor_cache) that they share, or equal copies"
    run.ranks.check_agreement({"the training data": index.fingerprint} | held_out, fix)
    check_data(start, index, options)
    stratified = options.loss.timestep_sampling == "stratified"
    ids, buckets = [s.id for s in index.samples], [s.bucket for s in index.samples]
    order = Order(ids, buckets, samples_per_step(run, options), options.data.seed, stratified)
    total = train.max_train_steps or order.steps_through(train.num_train_epochs - 1)
    check_length(start, total, run.output_dir)
    return Steps(order, total, recipe | {DATA: index.fingerprint}, start)


class BadClips:
    """Clips that others had to replace, each counted once; says each, and ends the run where they are too many."""

    def __init__(self, max_fraction: float, num_clips: int) -> None:
        self.max_fraction, self.num_clips = max_fraction, num_clips
        self.reasons: dict[str, str] = {}

    def count(self, replaced: Sequence[tuple[str, str]]) -> int:
        """How many there are, these (id, reason) included.

        Raises:
            UsageError: more than the flag allows, with all of them listed.
        """
        for clip, reason in replaced:
            if clip not in self.reasons:
                self.reasons[clip] = reason
                tqdm.write(f"{clip}: cannot be read, another clip takes its place; {reason}", file=sys.stderr)
        bad = len(self.reasons)
        if bad > max_bad(self.max_fraction, self.num_clips):
            rule = f"--max_bad_fraction {self.max_fraction:g}: {bad} of {self.num_clips} clips cannot be read"
            listed = first_of([f"{clip}: {reason}" for clip, reason in self.reasons.items()])
            raise UsageError([*listed, f"{rule}; mend them, or allow it with a larger fraction"])
        return bad


class Trainer:
    """Everything of a run between its data and its result: ``train`` and ``finish``."""

    def __init__(
        self,
        run: Run,
        options: TrainOptions,
        tensors: Tensors,
        prompts: Prompts,
        task: Task,
        method: Method,
        plan: Plan,
        host_trained: HostTrainedBlocks | None,
        steps: Steps,
    ) -> None:
        self.run, self.options, self.task, self.method = run, options, task, method
        train, seed = options.train, options.data.seed
        method.transformer.train()  # as loaded it is in evaluation mode, in which there is no dropout
        self.unbounded = has_no_bound(plan, run.device)
        on_host = isinstance(plan, ExecutionPlan) and plan.state == HOST
        self.engine = make_engine(
            run.accelerator, method.transformer, method, options, run.dtype, on_host, host_trained
        )
        self.schedule = NoiseSchedule.from_config(tensors.geometry.schedule).to(run.device)
        self.weights_T = diffusion.loss_weights(self.schedule, options.loss)
        bad_fraction = options.data.max_bad_fraction
        images = image_flags(options)
        self.dataset = LatentDataset(
            tensors.cache,
            tensors.index,
            tensors.geometry,
            seed,
            options.loader.caption_dropout,
            replace_bad=bad_fraction > 0,
            timesteps=timesteps_of(options.loss, len(self.schedule)),
            image_dropout=images.noised_image_dropout if images is not None else 0.0,
        )
        self.bad_clips = BadClips(bad_fraction, len(tensors.index.samples))
        self.steps = steps
        steps.start.load(run, self.engine, method)
        if run.is_main:
            write_config(run, options)
            write_samples(run.output_dir, tensors.index)
        self.skipped = SkippedSteps(run, steps.first)
        self.saver = Saver(
            run,
            self.engine,
            method,
            steps.recipe,
            train.checkpointing_steps,
            train.checkpoints_total_limit,
            train.save_every_minutes,
            good_until=self.skipped.good_until,
        )
        self.validator = Validator(run, options, task.pipeline, method.transformer, prompts, tensors, steps.order)
        self.before_after = BeforeAfter(run, tensors, self.validator)
        self.held_out = HeldOut(
            run, tensors, seed, method.transformer, partial(losses_of, task, self.schedule, method.transformer)
        )
        self.best = Best(self.saver, train.keep_best, self.held_out.grid)

    def train(self) -> None:
        """Trains up to the last step, which is then saved.

        An optimizer step is made of --gradient_accumulation_steps batches of every rank, all of one bucket. Its loss
        is the mean over all of their samples, weighted by timestep; metrics.jsonl has that as "loss".

        Raises:
            Stopped: a signal asked for the end; the steps up to then are saved.
        """
        if self.unbounded:
            samples = self.options.train.train_batch_size
            warm_up(self.run, self.engine, self.dataset, samples, partial(losses_of, self.task, self.schedule))
        metrics = Metrics(self.run, self.steps.first, self.steps.total, self._watch)
        self._tell_rate_jump()
        self.best.start(self.steps.first)
        self.validator.set_aside(self.steps.first, self.steps.total, self.steps.recipe)
        if self._looks_due(self.steps.first):
            with metrics.paused():
                self._look(self.steps.first)  # only what is not there: a kill may have come in between
            metrics.forget_peaks()
        if self.steps.first < self.steps.total:
            self.saver.foresee(self.options)
        if self.options.method == "sft":
            self.saver.announce()  # a LoRA is saved in a moment
        with closing(metrics.bar), closing(batches_of(self._loader())) as batches:
            self._train(metrics, batches)
        metrics.close()

    def _train(self, metrics: Metrics, batches: Iterator[Batch]) -> None:
        step = saved = self.steps.first
        if self.run.world > 1:
            stopping.defer()  # a rank that left at once would leave the others waiting for its gradients
        try:
            while step < self.steps.total:
                save = self._accumulate(step, metrics, batches)
                rate = learning_rate(self.options.optimizer, step, self.steps.total, self.steps.order.global_batch)
                result = self.engine.step(rate)
                step += 1
                metrics.push(step, rate, result)
                if step == self.steps.first + STEADY_STEPS:
                    self.run.say(measured(metrics.seconds))
                if save or self.saver.due(step):
                    with metrics.paused():
                        self._save(step)
                    saved = step
                if self._looks_due(step) and step < self.steps.total:
                    with metrics.paused():
                        self._look(step)
        except stopping.Stopped:
            pass  # on every rank before the same step, of which nothing but gradients exists yet
        metrics.flush()
        if saved < step:
            self._save(step)
        stopping.allow(self._achieved(step))

    def _accumulate(self, step: int, metrics: Metrics, batches: Iterator[Batch]) -> bool:
        """The gradients of an optimizer step, as far as no rank sums them yet; whether it is to be saved.

        Raises:
            Stopped: a rank was asked to stop, and no rank takes this step.
        """
        train = self.options.train
        if self.engine.reduces_in_backward:
            self._commit(step)
        for micro in range(train.gradient_accumulation_steps):
            self.run.ranks.consensus.may_stop(step)
            with metrics.loading():
                batch = next(batches)
            metrics.bad_clips = self.bad_clips.count(batch.replaced)
            metrics.samples += batch.samples()
            self.method.draw_for(step, (micro * self.run.world + self.run.ranks.process_index) * len(batch.ids))
            batch = batch.to(self.run.device)
            losses_B = losses_of(self.task, self.schedule, self.engine.model, batch)
            losses_B = losses_B * self.weights_T[batch.timestep_B]
            self.engine.backward(losses_B.mean() / train.gradient_accumulation_steps)
            stopping.unit("micro-batch")
        return self._commit(step)

    def _commit(self, step: int) -> bool:
        """Takes a step on all ranks, unless one was asked to stop; returns whether it is saved. From now on there is
        something to lose.
        """
        stopping.defer()
        return self.run.ranks.consensus.commit(step, self.saver.overdue())

    def _save(self, step: int) -> None:
        self.saver.save(step)
        if self.run.world == 1:
            stopping.allow(self._achieved(step))

    def _achieved(self, step: int) -> str:
        return f"and saved after step {step} of {self.steps.total}" if step else ""

    def _watch(self, step: int, numbers: dict[str, float], samples: list[Sample]) -> None:
        """Each step whose numbers have arrived: ends the run where too many were skipped."""
        self.skipped.add(step, numbers, samples)
        self.saver.good_until = self.skipped.good_until

    def _tell_rate_jump(self) -> None:
        """Says where the schedule is not what it was when the run was interrupted, or ended."""
        steps, (numbers, rates) = self.steps, column(read_records(self.run.output_dir / METRICS_NAME), "lr")
        then = rates[numbers == steps.first]
        if len(then):
            batch = steps.order.global_batch
            if line := rate_jump(self.options.optimizer, then[-1], steps.first, steps.total, batch):
                self.run.say(line)

    def _looks_due(self, step: int) -> bool:
        """Whether the weights are to be looked at after a step: always before the first and after the last."""
        return step in (0, self.steps.total) or self.validator.due(step) or self._held_out_due(step)

    def _held_out_due(self, step: int) -> bool:
        """As often as the flags say for validation, else with each checkpoint, as --keep_best always needs it."""
        flags = self.options.validation
        scheduled = bool(flags.validation_steps or flags.validation_epochs)
        with_checkpoint = self.saver.due(step) and (self.options.train.keep_best or not scheduled)
        return bool(self.held_out) and (with_checkpoint or self.validator.due(step))

    def _look(self, step: int) -> None:
        """The held-out loss and the videos that belong after a step and are not there yet, and pictures of them."""
        ends = step in (0, self.steps.total)
        with self.engine.averaged():
            if ends or self._held_out_due(step):
                self.held_out.measure(step)
                self.best.update(step)
            if ends or self.validator.due(step):
                self.validator.render(step)
            self._draw(step)

    def _draw(self, step: int) -> None:
        """The run's curves and its contact sheet, as of a step."""
        folder = self.run.output_dir
        name, weighting = folder.resolve().name, self.options.loss.loss_weighting
        with self.run.ranks.together():
            if self.run.is_main:
                draw_curves(folder / METRICS_NAME, folder / CURVES_NAME, name, weighting)
                self.before_after.draw(step)

    def _loader(self) -> Any:
        run, train, loader = self.run, self.options.train, self.options.loader
        order = self.steps.order
        sampler = BucketBatchSampler(
            order,
            train.train_batch_size,
            train.gradient_accumulation_steps,
            run.ranks.process_index,
            run.world,
            self.steps.first,
            self.steps.total,
        )
        run.say(
            f"{len(order.sample_ids)} clips in {len(order.members)} buckets, {order.global_batch} samples an "
            f"optimizer step: {order.steps_through(0)} steps in epoch 1, {self.steps.total} in all" + self._filled()
        )
        pin = loader.pin_memory and torch.cuda.is_available()
        return build_loader(self.dataset, sampler, *self._workers(), pin)

    def _workers(self) -> tuple[int, int]:
        """(workers of the loader, batches that each has ready), for which /dev/shm has room."""
        dataset = self.dataset
        batch = batch_bytes(dataset.geometry, dataset.index, self.options.train.train_batch_size)
        asked = self.options.data.dataloader_num_workers
        workers, prefetch, line = choose_workers(asked, batch, local_processes())
        if line:
            self.run.say(line)
        return workers, prefetch

    def _filled(self) -> str:
        """How many samples come early to fill the last batches of --num_train_epochs, if any."""
        if self.options.train.max_train_steps:
            return ""
        filled = self.steps.order.filled(self.options.train.num_train_epochs)
        return f"; {filled} samples come early to fill last batches" if filled else ""

    def finish(self) -> int:
        """The last validation and the result; returns the script's exit status."""
        step = self.steps.total
        if summary := self.skipped.summary():
            self.run.say(summary)
        self._look(step)
        run, options = self.run, self.options
        if options.train.export_best:
            step = self._take_best(step)
        with self.engine.averaged():
            files = publish(run, options, self.task, self.method, self.validator, self.dataset, self.steps.recipe, step)
        run.accelerator.end_training()
        if run.repository:  # on the main process, for which nobody waits any more
            upload(run.repository, options.hub, run.output_dir, files, run.say)
        return 0

    def _take_best(self, last: int) -> int:
        """Takes up the weights of the best checkpoint, makes the videos that it lacks, and returns its step."""
        step = self.best.step()
        if step != last:
            self.run.say(f"the result is the best checkpoint, of step {step}, not of the last step, {last}")
            self.engine.load(self.best.path(step))
            with self.engine.averaged():
                self.validator.render(step)
                self._draw(step)
        return step


def fine_tune(options: TrainOptions, task_type: type[Task], method_type: type[Method]) -> int:
    """What every training script does: data, then the model, then training, then the result.

    Returns the exit status, 0.

    Raises:
        Stopped: a signal ended the run early with everything saved.
        DiskError: the disk is full, fails or refuses; it says what is safe.
    """
    folder = Path(options.train.output_dir)
    with what_is_safe(folder, partial(safe_text, folder)):
        return run_through(options, task_type, method_type)


def run_through(options: TrainOptions, task_type: type[Task], method_type: type[Method]) -> int:
    """The parts of a run in their order."""
    run = start_run(options)
    keep_to_budget(run, options)
    geometry = read_geometry(options.model)
    recipe = recipe_of(run, options, geometry, task_type, method_type)
    start = find_start(run, recipe, options)
    run.ranks.check_agreement(
        {"the first step": start.step} | recipe, "give all processes the same command and folders"
    )
    start_trackers(run, options)
    images = take_images(run, options)
    tensors = open_tensors(run, options)
    steps = plan_steps(run, options, tensors, recipe, start)
    fetch_parts(run, options)
    prompts = embed_prompts(run, options, tensors, images)
    transformer = models.load_transformer(options.model, run.dtype, ignores_positions(options))
    method = method_type(transformer, options)
    plan = make_plan(run, options, tensors, transformer)
    run.ranks.check_agreement({"the plan": str(plan)}, "give all of them GPUs of one kind, or --plan and its axes")
    run.say(f"plan: {plan}")
    with memory_errors_told():
        check_blocks(run, options.train.train_batch_size, tensors, transformer, plan)
        host_trained = place(transformer, plan, run.device)
        task = task_type(options, tensors.geometry, run.device, run.dtype)
        check_parity(run, options, tensors, task, transformer)
        trainer = Trainer(run, options, tensors, prompts, task, method, plan, host_trained, steps)
        trainer.train()
        return trainer.finish()


@contextmanager
def memory_errors_told() -> Iterator[None]:
    """Out of memory, on the device or for pinned memory of the host, becomes a UsageError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = first_line(error)
        fix = "give --plan lean, a smaller bucket, --train_batch_size, or --rank of a LoRA, or a larger --vram_budget"
        raise UsageError(f"the GPU's memory does not suffice; {fix} ({line})") from None
    except MemoryError as error:
        fix = "free some, or give --weights_on, --kept_on or --optimizer_state_on device"
        raise UsageError(f"the host's memory does not suffice: {error}; {fix}") from None
