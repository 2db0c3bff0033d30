"""The training loop that all four training scripts share, from the parsed flags to the published result.

``fine_tune`` is the entry point. ``run_stages`` shows the order of a run: prepare the data, load the model, choose a
memory plan, train, publish. ``Trainer._run_steps`` is the loop, in which one optimizer step is:

1. ``_compute_gradients``: the loss and its gradients, for each micro-batch of this rank;
2. ``_commit``: all ranks agree to take the step, or to stop before it;
3. ``engine.step``: sum the gradients over the ranks, clip them, and update the weights;
4. ``_save`` and ``_evaluate``, when they are due: a checkpoint; the held-out loss and validation videos.

The loop never waits for the device within a step. Losses and norms are copied to the host in the background, and are
written to metrics.jsonl when they arrive.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import torch
from torch.utils.data import DataLoader

from cogvideox import stopping
from cogvideox.config.geometry import read_geometry
from cogvideox.config.hub import upload
from cogvideox.config.options import TrainOptions, ignores_positions, image_flags, local_processes, samples_per_step
from cogvideox.data.cache import hash_of
from cogvideox.data.dataset import Batch, LatentDataset, batches_of, build_loader, trained_timesteps
from cogvideox.data.sampler import BucketBatchSampler, Order
from cogvideox.data.shared_memory import batch_bytes, choose_workers
from cogvideox.errors import DiskError, UsageError, first_line, plural
from cogvideox.evaluation.before_after import SHEET_NAME, BeforeAfter
from cogvideox.evaluation.health import report_health
from cogvideox.evaluation.held_out import HeldOut
from cogvideox.evaluation.images import fetch_images
from cogvideox.evaluation.parity import check_parity
from cogvideox.evaluation.validation import Prompts, Validator, embed_prompts
from cogvideox.export.pipeline_folder import fetch_parts
from cogvideox.export.publish import publish
from cogvideox.files import what_is_safe
from cogvideox.host_memory import free_host_bytes
from cogvideox.memory.streaming import TrainedBlocks
from cogvideox.model import diffusion, models
from cogvideox.model.diffusion import NoiseSchedule
from cogvideox.model.methods import FullFinetune, Method
from cogvideox.model.tasks import Task, losses_of
from cogvideox.optimizer.engine import make_engine
from cogvideox.optimizer.schedule import learning_rate, rate_jump, warm_up_note
from cogvideox.planning.block_check import check_blocks
from cogvideox.planning.dry_run import dry_run
from cogvideox.planning.execution import Plan, apply_plan, apply_vram_budget, make_plan, measured_line
from cogvideox.planning.plan import HOST, ExecutionPlan
from cogvideox.planning.warm_up import has_no_bound, warm_up
from cogvideox.preparation.tensors import Tensors, open_tensors
from cogvideox.runtime.bad_clips import BadClips, check_same_clips
from cogvideox.runtime.best import BestCheckpoint
from cogvideox.runtime.checkpoint import Saver
from cogvideox.runtime.checkpoint_files import PROGRESS_NAME, read_checkpoint_json, restart_hint, safe_text
from cogvideox.runtime.curves import CURVES_NAME, draw_curves
from cogvideox.runtime.disk_room import saves_weights_only
from cogvideox.runtime.metrics import column, read_records
from cogvideox.runtime.ranks import lost_ranks_reported
from cogvideox.runtime.report import write_report
from cogvideox.runtime.resume import (
    DATA,
    EARLIER,
    StartPoint,
    changes,
    check_length,
    check_same_samples,
    common_settings,
    earlier_values,
    find_start,
    recipe_of,
    write_samples,
)
from cogvideox.runtime.run import METRICS_NAME, Metrics, Run, TrainedSample, start_run, write_config
from cogvideox.runtime.skipped import SkippedSteps
from cogvideox.runtime.trackers import log_media, start_trackers

# After this many steps everything is compiled and all memory is allocated, so step times can be measured.
STEADY_STEPS = 6
# How torch.compile and Triton say that there is no C++ compiler, or that it fails, as without the headers of Python.
NO_COMPILER = re.compile(r".*(No working C\+\+ compiler|Failed to find C compiler|Command '\['\S*(cc|clang|\+\+)').*")


@dataclass(frozen=True)
class Steps:
    """Describes the optimizer steps of a run.

    Attributes:
        order: Assigns the samples of the data to optimizer steps.
        total: Number of optimizer steps in the complete run.
        recipe: Every setting that decides the result, including the fingerprint of the data.
        start: The checkpoint from which this process continues, or step 0.
    """

    order: Order
    total: int
    recipe: dict[str, Any]
    start: StartPoint

    @property
    def first(self) -> int:
        """Returns the number of steps that were finished before this process started."""
        return self.start.step


def plan_steps(run: Run, options: TrainOptions, tensors: Tensors, recipe: dict[str, Any], start: StartPoint) -> Steps:
    """Plans the optimizer steps of a run on its data.

    Args:
        run: The processes and the output folder.
        options: The flags.
        tensors: The prepared data.
        recipe: The settings that decide the result, from ``recipe_of``.
        start: The checkpoint to continue from, or step 0.

    Raises:
        UsageError: The checkpoint was trained on other data or is past the last step, or the processes do not see the
            same data.
    """
    index, train = tensors.index, options.train
    held_out = {"the held-out clips": hash_of([sample.clip for sample in index.validation])}
    fix = "give all processes one --data_root (and --tensor_cache) that they share, or equal copies"
    run.ranks.check_agreement({"the training data": index.fingerprint} | held_out, fix)
    check_same_samples(start, index, options)
    stratified = options.loss.timestep_sampling == "stratified"
    ids, buckets = [s.id for s in index.samples], [s.bucket for s in index.samples]
    order = Order(ids, buckets, samples_per_step(options, run.world), options.data.seed, stratified)
    total = order.total_steps(train.max_train_steps, train.num_train_epochs)
    check_length(start, total, options.train)
    recipe = recipe | {DATA: index.fingerprint}
    changed = changes(start.recipe, recipe)
    if start.step < total:
        if line := warm_up_note(options.optimizer, total, order.global_batch):
            run.say(line)
    elif changed:
        rule = f"has no effect; {start.folder} has all {plural(total, 'step')}; give a larger --max_train_steps"
        run.say(f"--allow_changed {' '.join(changed)}: {rule}")
        recipe |= {name: then for name, (then, _) in changed.items()}  # The result was made with these.
        changed = {}
    if earlier := earlier_values(start, changed):
        recipe[EARLIER] = earlier
    return Steps(order, total, recipe, start)


class Trainer:
    """Trains a model on prepared data: ``train`` runs the loop, then ``finish`` publishes the result.

    The constructor builds the optimizer engine, loads the checkpoint if there is one, and prepares checkpoints,
    validation videos, the held-out loss and the choice of the best checkpoint.

    Args:
        run: The processes and the output folder.
        options: The flags.
        tensors: The prepared data.
        prompts: The validation prompts.
        task: What is generated from what.
        method: What is trained. Its transformer has been placed as the plan says.
        plan: How the transformer is executed.
        trained_blocks: The blocks of which all weights are trained, if the plan places them.
        steps: The optimizer steps of the run.
    """

    def __init__(
        self,
        run: Run,
        options: TrainOptions,
        tensors: Tensors,
        prompts: Prompts,
        task: Task,
        method: Method,
        plan: Plan,
        trained_blocks: TrainedBlocks | None,
        steps: Steps,
    ) -> None:
        self.run, self.options, self.task, self.method = run, options, task, method
        method.transformer.train()  # from_pretrained returns it in evaluation mode, which disables dropout
        self.needs_warm_up = has_no_bound(plan, run.device)
        on_host = plan.state == HOST if isinstance(plan, ExecutionPlan) else options.optimizer.use_cpu_offload_optimizer
        self.plan = plan
        self.engine = make_engine(
            run.accelerator,
            method.transformer,
            method,
            options,
            run.dtype,
            on_host,
            trained_blocks,
            run.gather_or_raise,
        )
        self.schedule = NoiseSchedule.from_config(tensors.geometry.schedule).to(run.device)
        self.weights_T = diffusion.loss_weights(self.schedule, options.loss)
        self.dataset = self._make_dataset(tensors)
        self.bad_clips = BadClips(options.data.max_bad_fraction, len(tensors.index.samples))
        self.steps = steps
        steps.start.load(run, self.engine, method)
        if run.is_main:
            write_config(run, options, str(plan))
            if steps.recipe[DATA] == tensors.index.fingerprint:  # otherwise no step is trained on these samples
                write_samples(run.output_dir, tensors.index)
        self.skipped = SkippedSteps(run, steps.first)
        self.saver = self._make_saver()
        self.validator = Validator(run, options, task.pipeline, method.transformer, prompts, tensors, steps.order)
        self.before_after = BeforeAfter(run, tensors, self.validator)
        losses = partial(losses_of, task, self.schedule, method.transformer)
        self.held_out = HeldOut(run, tensors, options.data.seed, method.transformer, losses)
        self.best = BestCheckpoint(self.saver, options.train.keep_best, self.held_out.grid)
        self.last_step = steps.total  # lower once --stop_when_worse has ended the run
        self.rendered: int | None = None  # the newest step whose videos have been rendered

    def train(self) -> None:
        """Trains until the last step and saves it.

        An optimizer step consists of --gradient_accumulation_steps micro-batches on every rank, all from one bucket.
        "loss" in metrics.jsonl is the mean over all of their samples, weighted by timestep.

        Raises:
            Stopped: A signal asked the run to end; all finished steps are saved.
        """
        if self.needs_warm_up:
            samples = self.options.train.train_batch_size
            warm_up(self.run, self.engine, self.dataset, samples, partial(losses_of, self.task, self.schedule))
        metrics = Metrics(self.run, self.steps.first, self.steps.total, self._on_metrics)
        self._report_rate_jump()
        self._report_few_measurements()
        self._report_unsaved_measurements()
        self.best.start(self.steps.first, self.options.train.export_best)
        self.validator.set_aside_stale(self.steps.first, self.steps.total, self.steps.recipe)
        if self._evaluation_due(self.steps.first):
            # A run that was killed between a checkpoint and its evaluation has some results. Only the others are made.
            with metrics.paused():
                self._evaluate(self.steps.first)
            metrics.forget_peaks()
        if self.steps.first < self.steps.total:
            seconds = self.plan.mean_seconds if isinstance(self.plan, ExecutionPlan) else 0.0
            self.saver.check_disk(self.options, self.steps.first, self.steps.total, seconds)
        if self.options.method == "sft":  # a LoRA is saved so fast that it needs no announcement
            self.saver.announce(self.plan.spare_host if isinstance(self.plan, ExecutionPlan) else free_host_bytes())
        self.run.startup.done("evaluation")
        with closing(metrics.bar), closing(self.saver), batches_of(self._make_loader()) as batches:
            self._run_steps(metrics, batches)
        metrics.close()

    def _run_steps(self, metrics: Metrics, batches: Iterator[Batch]) -> None:
        """Takes one optimizer step after another until the last one, or until a signal asks the run to stop."""
        step = saved = self.steps.first
        if self.run.world > 1:
            # If a rank stopped at once, the others would wait for its gradients forever. So signals are deferred, and
            # all ranks agree in ``_commit`` on the step before which they stop.
            stopping.defer()
        try:
            while step < self.last_step:
                with stopping.phase(f"step {step + 1}"):
                    save = self._compute_gradients(step, metrics, batches)
                    rate = learning_rate(self.options.optimizer, step, self.steps.total, self.steps.order.global_batch)
                    with stopping.waiting():
                        result = self.engine.step(rate, metrics.of_rank())
                        step += 1
                        metrics.push(step, rate, result)
                self.saver.check()
                if step == self.steps.first + STEADY_STEPS:
                    self.run.say(measured_line(metrics.seconds))
                if save or self.saver.due(step):
                    with metrics.paused():
                        self._save(step)
                    saved = step
                if self._evaluation_due(step) and step < self.last_step:
                    with metrics.paused():
                        self._evaluate(step)
        except stopping.Stopped:
            # Every rank stops before the same step. The weights are those of the last finished step, and the gradients
            # of the unfinished step are dropped.
            pass
        metrics.flush()
        if saved < step:
            self._save(step)
        self.saver.finish()
        stopping.allow(self._describe_progress(step))

    def _compute_gradients(self, step: int, metrics: Metrics, batches: Iterator[Batch]) -> bool:
        """Computes this rank's gradients for an optimizer step. They are summed over the ranks later.

        Args:
            step: Number of finished optimizer steps.
            metrics: Receives the loading time and the samples.
            batches: Yields this rank's micro-batches.

        Returns:
            Whether a checkpoint is due after the step because --save_every_minutes have passed.

        Raises:
            Stopped: A rank was asked to stop, so no rank takes this step.
        """
        train, ranks = self.options.train, self.run.ranks
        if self.engine.reduces_in_backward or ranks.sequence:
            # The passes themselves communicate, so the ranks must agree before them. Otherwise a rank that stops would
            # leave the others waiting in theirs.
            self._commit(step)
        for micro in range(train.gradient_accumulation_steps):
            ranks.consensus.may_stop(step)
            with metrics.loading():
                batch = next(batches)
            if ranks.sequence and self.dataset.replace_bad:
                check_same_clips(ranks, ranks.sequence.size, batch.ids)
            bad_clips = self.bad_clips.count(batch.replaced)
            if not ranks.sequence or ranks.sequence.rank == 0:  # the others have the same samples
                metrics.bad_clips = bad_clips
                metrics.samples += batch.samples()
            self.method.draw_for(step, (micro * ranks.data_number + ranks.data_index) * len(batch.ids))
            batch = batch.to(self.run.device)
            losses_B = losses_of(self.task, self.schedule, self.engine.model, batch)
            losses_B = losses_B * self.weights_T[batch.timestep_B]
            self.engine.backward(losses_B.mean() / train.gradient_accumulation_steps)
            stopping.unit("micro-batch")
        return self._commit(step)

    def _commit(self, step: int) -> bool:
        """Agrees with all ranks to take a step, unless a rank was asked to stop.

        Stop signals are deferred from here until the next checkpoint, so that the step is not lost.

        Returns:
            Whether a checkpoint is due after the step because --save_every_minutes have passed.

        Raises:
            Stopped: A rank was asked to stop, so no rank takes this step.
        """
        stopping.defer()
        return self.run.ranks.consensus.commit(step, self.saver.overdue())

    def _save(self, step: int) -> None:
        """Saves a checkpoint. A single process can be stopped at once from here on, unless a thread still writes it."""
        with stopping.phase(f"the checkpoint of step {step}"):
            self.saver.save(step)
        if self.run.world == 1 and not self.saver.writing:
            stopping.allow(self._describe_progress(step))

    def _describe_progress(self, step: int) -> str:
        """Returns what the message about a stopped run says about its last checkpoint."""
        return f"and saved after step {step} of {self.steps.total}" if step else ""

    def _on_metrics(self, step: int, numbers: dict[str, float], samples: list[TrainedSample]) -> None:
        """Receives the metrics of a finished step from the device, and ends the run if too much went wrong."""
        if step == self.steps.first + 1:
            self.run.startup.done("first step")
            self.run.say(self.run.startup.line())
        self.bad_clips.check_all(self.run.ranks, int(numbers["bad_clips"]))
        self.skipped.add(step, numbers, samples)
        self.saver.good_until = self.skipped.good_until

    def _report_rate_jump(self) -> None:
        """Prints a line if the learning rate jumps because the schedule changed since the run was interrupted."""
        steps, (numbers, rates) = self.steps, column(read_records(self.run.output_dir / METRICS_NAME), "lr")
        then = rates[numbers == steps.first]
        if len(then):
            batch = steps.order.global_batch
            if line := rate_jump(self.options.optimizer, then[-1], steps.first, steps.total, batch):
                self.run.say(line)

    def _report_few_measurements(self) -> None:
        """Prints a line if --stop_when_worse cannot end the run, because too few measurements come before its end."""
        limit = self.options.train.stop_when_worse
        if limit is None:
            return
        number = len(list(islice(filter(self._held_out_due, range(1, self.steps.total)), limit)))
        if number < limit:
            times = plural(number, "time")
            rule = f"has no effect; the held-out loss is measured {times} between the first and the last step"
            self.run.say(f"--stop_when_worse {limit}: {rule}; give a smaller number, or measure more often")

    def _report_unsaved_measurements(self) -> None:
        """Prints a line if --keep_best or --export_best has less to choose from than the flags suggest.

        Only a checkpoint can be kept. With --save_every_minutes, it is not known which steps have one.
        """
        train, first, total = self.options.train, self.steps.first, self.steps.total
        if not train.keep_best or train.save_every_minutes is not None:
            return
        measured = filter(self._held_out_due, range(first + 1, total))
        unsaved = next((step for step in measured if not self.saver.due(step)), None)
        if unsaved is not None:
            every = self.options.validation.validation_steps
            rule = f"cannot keep every measured step; there is no checkpoint of step {unsaved}, for example"
            fix = f"--checkpointing_steps {every}" if every else "--validation_steps in place of --validation_epochs"
            self.run.say(f"--keep_best: {rule}; give {fix}")
        elif train.export_best and not first and total <= train.checkpointing_steps:
            rule = f"has no effect; there is no checkpoint before that of the last step, {total}"
            self.run.say(f"--export_best: {rule}; give a smaller --checkpointing_steps")

    def _evaluation_due(self, step: int) -> bool:
        """Returns whether the weights are evaluated after a step: always before the first and after the last."""
        return step in (0, self.last_step) or self.validator.due(step) or self._held_out_due(step)

    def _held_out_due(self, step: int) -> bool:
        """Returns whether the held-out loss is measured after a step.

        It follows the validation flags; without them, or with --keep_best, it is measured at each checkpoint.
        """
        flags = self.options.validation
        scheduled = bool(flags.validation_steps or flags.validation_epochs)
        with_checkpoint = self.saver.due(step) and (self.options.train.keep_best or not scheduled)
        return bool(self.held_out) and (with_checkpoint or self.validator.due(step))

    def _evaluate(self, step: int) -> None:
        """Measures the held-out loss and renders the validation videos due after a step, unless they exist."""
        ends = step in (0, self.last_step)
        with stopping.phase(f"the evaluation after step {step}"), self.engine.averaged():
            if ends or self._held_out_due(step):
                self.held_out.measure(step)
                self.saver.after_writing(partial(self.best.update, step))
                self._end_if_worse(step)
            if ends or self.validator.due(step):
                if step != self.rendered:  # The last step may have been evaluated before the loop, or as its last one.
                    self._draw(step, self.validator.render(step))
                self.rendered = step
            else:
                self._draw(step, [])

    def _end_if_worse(self, step: int) -> None:
        """Makes a step the last one if the held-out loss has not improved for long enough."""
        limit = self.options.train.stop_when_worse
        if limit is not None and step < self.last_step and self.best.has_worsened(step, limit):
            self.last_step = step
            rule = f"the held-out loss has not improved in {plural(limit, 'measurement')}"
            self.run.say(f"--stop_when_worse {limit}: {rule}; training ends after step {step} of {self.steps.total}")

    def _draw(self, step: int, videos: Sequence[Path]) -> None:
        """Draws the pictures up to a step, measures its videos, sends both to the trackers, and writes the report."""
        folder = self.run.output_dir
        name, weighting = folder.resolve().name, self.options.loss.loss_weighting
        with self.run.ranks.together():
            if self.run.is_main:
                if step:  # before the first step there is nothing to draw, and importing matplotlib takes a second
                    try:
                        draw_curves(folder / METRICS_NAME, folder / CURVES_NAME, name, weighting)
                    except DiskError:
                        raise
                    except Exception as error:  # a picture is not worth the run
                        self.run.say(f"{folder / CURVES_NAME}: matplotlib cannot draw it ({first_line(error)})")
                self.before_after.draw(step)
                report_health(self.run, step, videos, self.before_after.health_of_clips())
                log_media(self.run, step, videos, [folder / SHEET_NAME, folder / CURVES_NAME])
                write_report(folder)

    def _make_dataset(self, tensors: Tensors) -> LatentDataset:
        """Returns the training samples, with the timesteps that the loss trains."""
        options, images = self.options, image_flags(self.options)
        return LatentDataset(
            tensors.cache,
            tensors.index,
            tensors.geometry,
            options.data.seed,
            options.loader.caption_dropout,
            replace_bad=options.data.max_bad_fraction > 0,
            timesteps=trained_timesteps(options.loss, len(self.schedule)),
            image_dropout=images.noised_image_dropout if images is not None else 0.0,
        )

    def _make_saver(self) -> Saver:
        """Returns what saves checkpoints of the engine as the flags ask for."""
        train = self.options.train
        return Saver(
            self.run,
            self.engine,
            self.method,
            self.steps.recipe,
            train.checkpointing_steps,
            train.checkpoints_total_limit,
            train.save_every_minutes,
            good_until=self.skipped.good_until,
            first=self.steps.first,
            weights_only=saves_weights_only(self.options),
            # A LoRA is saved so fast that a copy would gain nothing, and DeepSpeed's engine writes without a copy.
            in_background=self.options.method == "sft" and self.run.world == 1 and not self.engine.shares_files,
        )

    def _make_loader(self) -> DataLoader[Batch]:
        """Returns a loader of this rank's micro-batches from the first step on, and prints how many steps there are."""
        run, train, loader = self.run, self.options.train, self.options.loader
        order = self.steps.order
        sampler = BucketBatchSampler(
            order,
            train.train_batch_size,
            train.gradient_accumulation_steps,
            run.ranks.data_index,
            run.ranks.data_number,
            self.steps.first,
            self.steps.total,
        )
        run.say(
            f"{plural(len(order.sample_ids), 'clip')} in {plural(len(order.members), 'bucket')}, "
            f"{plural(order.global_batch, 'sample')} per optimizer step: "
            f"{plural(order.steps_through(0), 'step')} in epoch 1, {self.steps.total} in total"
            f"{self._describe_filled()}"
        )
        pin = loader.pin_memory and torch.cuda.is_available()
        return build_loader(self.dataset, sampler, *self._workers(), pin)

    def _workers(self) -> tuple[int, int]:
        """Returns (number of loader workers, batches that each prefetches), limited by the free space in /dev/shm."""
        dataset = self.dataset
        batch = batch_bytes(dataset.geometry, dataset.index, self.options.train.train_batch_size)
        asked = self.options.data.dataloader_num_workers
        workers, prefetch, line = choose_workers(asked, batch, local_processes())
        if line:
            self.run.say(line)
        return workers, prefetch

    def _describe_filled(self) -> str:
        """Returns how many samples of the next epoch fill the last batches of --num_train_epochs, as text or empty."""
        if self.options.train.max_train_steps:
            return ""
        filled = self.steps.order.num_fill_samples(self.options.train.num_train_epochs)
        return f"; {plural(filled, 'sample')} of the next epoch complete the last batches" if filled else ""

    def finish(self) -> int:
        """Evaluates the last step, publishes the result and uploads it if asked; returns the script's exit status."""
        step = self.last_step
        if summary := self.skipped.summary():
            self.run.say(summary)
        self._evaluate(step)
        run, options = self.run, self.options
        recipe = self.steps.recipe
        if options.train.export_best:
            step = self._restore_best(step)
            recipe = read_checkpoint_json(self.best.path(step) / PROGRESS_NAME)["recipe"]
        self.best.report_harm(step)
        with stopping.phase("the export"), self.engine.averaged():
            files = publish(run, options, self.task, self.method, self.validator, self.dataset, recipe, step)
        if run.is_main:
            run.say(f"report: {write_report(run.output_dir)}")
        run.disconnect()
        if run.repository:  # set on the main process only, so that the other ranks end without waiting for the upload
            upload(run.repository, options.hub, run.id, run.output_dir, files, run.say)
        return 0

    def _restore_best(self, last: int) -> int:
        """Loads the weights of the best checkpoint, renders its missing videos, and returns its step.

        Args:
            last: The last step, whose weights are loaded now.
        """
        step = self.best.step()
        if step != last:
            self.run.say(f"the result is the best checkpoint, of step {step}, not of the last step, {last}")
            self.engine.load(self.best.path(step))
            with self.engine.averaged():
                self._draw(step, self.validator.render(step))
        return step


def fine_tune(options: TrainOptions, task_type: type[Task], method_type: type[Method]) -> int:
    """Runs a training script: prepares the data, loads the model, trains, and publishes the result.

    Args:
        options: The flags of the script.
        task_type: The class of the task, TextToVideo or ImageToVideo.
        method_type: The class of the method, Lora or FullFinetune.

    Returns:
        The exit status: 0, or 1 if --dry_run finds that the run does not fit.

    Raises:
        Stopped: A signal ended the run early; everything is saved.
        DiskError: The disk is full, failed or refused a write; the message says what is safe.
        LostRankError: Another process of the run has ended.
    """
    if options.forecast.dry_run:
        return dry_run(options, task_type, method_type)
    folder = Path(options.train.output_dir)
    with what_is_safe(folder, partial(safe_text, folder)), lost_ranks_reported(partial(restart_hint, folder)):
        return run_stages(options, task_type, method_type)


def run_stages(options: TrainOptions, task_type: type[Task], method_type: type[Method]) -> int:
    """Runs the stages of a training run in order, and returns the exit status.

    Stages that can fail because of the flags or the data come before the model is loaded, where possible. The ranks
    compare their settings before they depend on them, because a rank that had decided differently would leave the
    others waiting.
    """
    run = start_run(options)
    apply_vram_budget(run, options)
    geometry = read_geometry(options.model)
    recipe = recipe_of(options, geometry, task_type, method_type)
    same = "give all processes the same command and folders"
    run.ranks.check_agreement(common_settings(options, recipe), same)
    start = find_start(run, recipe, options)
    run.ranks.check_agreement({"the first step": start.step}, same)
    start_trackers(run, options)
    run.startup.done("imports and processes")
    images = fetch_images(run, options)
    tensors = open_tensors(run, options)
    steps = plan_steps(run, options, tensors, recipe, start)
    fetch_parts(run, options)
    run.startup.done("data")
    prompts = embed_prompts(run, options, tensors, images)
    run.startup.done("prompts")
    transformer = models.load_transformer(options.model, run.dtype, ignores_positions(options))
    method = method_type(transformer, options)
    if start.folder is not None and start.weights_only and isinstance(method, FullFinetune):
        transformer = method.new_transformer(None, start.folder)
        method = method_type(transformer, options)
    run.startup.done("model")
    plan = make_plan(run, options, tensors, transformer, steps.total, start.folder is not None)
    run.ranks.check_agreement({"the plan": str(plan)}, "give all of them GPUs of one kind, or --plan and its axes")
    run.say(f"plan: {plan}")
    run.startup.done("plan")
    with explain_machine_errors(start.folder is not None):
        check_blocks(run, options.train.train_batch_size, tensors, transformer, plan)
        run.startup.done("block check")
        trained_blocks = apply_plan(transformer, plan, run.device, run)
        run.startup.done("placing weights")
        task = task_type(options, tensors.geometry, run.device, run.dtype)
        check_parity(run, options, tensors, task, transformer)
        run.startup.done("pipeline check")
        trainer = Trainer(run, options, tensors, prompts, task, method, plan, trained_blocks, steps)
        run.startup.done("optimizer and checkpoint")
        trainer.train()
        return trainer.finish()


@contextmanager
def explain_machine_errors(resumes: bool = False) -> Iterator[None]:
    """Turns an error that memory does not suffice, or that there is no compiler, into a UsageError that names a fix.

    Args:
        resumes: Whether this process continues from a checkpoint, whose rank and buckets the run must keep.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = first_line(error)
        smaller = "a smaller bucket, --train_batch_size or --rank (of a LoRA)"
        if resumes:
            smaller = "a smaller --train_batch_size with more --gradient_accumulation_steps"
        fix = f"give --plan lean, {smaller}, or a larger --vram_budget"
        raise UsageError(f"the GPU's memory does not suffice; {fix} ({line})") from None
    except MemoryError as error:
        fix = "free some memory, or give --weights_on, --kept_on or --optimizer_state_on device"
        raise UsageError(f"the host's memory does not suffice: {error}; {fix}") from None
    except (RuntimeError, CalledProcessError) as error:
        found = NO_COMPILER.search(str(error))
        if found is None:
            raise
        fix = "it needs a C++ compiler and the headers of Python, as from apt-get install g++ python3-dev"
        raise UsageError(f"torch.compile fails: {found[0].strip()}; {fix}") from None
