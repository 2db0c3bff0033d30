"""Writes the result of a run, reloads it with stock diffusers, and checks that it computes what was trained.

``publish`` writes the weights, inference.py (a script that uses them), README.md (the model card) and, with
--save_pipeline, the complete pipeline into OUTPUT_DIR. recipe.json (how the weights were made) is written last: a
folder that has it is finished and verified.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox import stopping
from cogvideox.config.args import config_dict
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import saves_pipeline
from cogvideox.config.hub import RECIPE_NAME
from cogvideox.config.lora_file import FOLDED_EXACTLY, FOLDED_ROUNDED, NOT_FOLDED
from cogvideox.config.options import TrainOptions
from cogvideox.data.dataset import Batch, LatentDataset, collate
from cogvideox.data.sampler import Visit
from cogvideox.errors import UsageError, plural
from cogvideox.evaluation.validation import Validator, evaluation_mode
from cogvideox.export.card import write_card
from cogvideox.export.inference_code import inference_script
from cogvideox.export.pipeline_folder import remove_pipeline, write_pipeline
from cogvideox.files import disk_errors_converted, fsync, removed_on_failure, write_atomically
from cogvideox.model.methods import Lora, Method
from cogvideox.model.tasks import IMAGE_NAME, Task
from cogvideox.planning.execution import base_precision
from cogvideox.planning.layerwise import run_layer_by_layer
from cogvideox.runtime.run import Run, environment

INFERENCE_NAME = "inference.py"
MIN_COSINE = 0.9999  # between the outputs of the trained and the reloaded transformer
MAX_EFFECT_ERROR = 0.01  # largest error of reloading, relative to the change of the output by training
ROUNDING = 1e-6  # largest error of rounding, relative to the output
# Training's blocks and diffusers' blocks compute in another order. In fp32 on a CPU, the error relative to the output
# is limited. In 16 bits the cosine is; rounding in 42 blocks alone lowers it to 0.9999 (benchmarks/checks.py --whole).
ROUNDING_OF_BLOCKS = 1e-5
MIN_COSINE_OF_BLOCKS = 0.999


def publish(
    run: Run,
    options: TrainOptions,
    task: Task,
    method: Method,
    validator: Validator,
    dataset: LatentDataset,
    recipe: dict[str, Any],
    step: int,
) -> list[Path]:
    """Writes and verifies the result of a finished run. The main process does the work, and the others wait.

    Args:
        run: The processes and the output folder.
        options: The flags.
        task: What is generated from what.
        method: What was trained.
        validator: Has the settings and the videos of validation.
        dataset: The training data; its first sample is used for the comparison.
        recipe: The settings that decide the result.
        step: The optimizer step of the weights.

    Returns:
        The files to upload; an empty list except on the main process.

    Raises:
        RuntimeError: The weights that were written do not compute what was trained; see ``verify``.
    """
    files: list[Path] = []
    if run.is_main:
        folder = run.output_dir
        (folder / RECIPE_NAME).unlink(missing_ok=True)  # the folder is unfinished until the new weights are verified
        remove_pipeline(folder)
        about = write_weights(method, folder)
        if about.get("lora_scale_folded") == NOT_FOLDED and about["lora_scale"] != 1:
            run.say(scale_warning(about["lora_scale"]))
        folded = about.get("lora_scale_folded")
        # A power of two is folded exactly, but rounds the products of a LoRA that are too small for fp16.
        rounds = folded == FOLDED_ROUNDED or (folded == FOLDED_EXACTLY and run.dtype == torch.float16)
        verification = verify(run, task, method, collate([dataset[Visit(0, 0)]]), base_precision(options), rounds)
        write_atomically(folder / INFERENCE_NAME, inference_script(options, task, method, validator, run).encode())
        if validator.whole_fps != validator.fps:
            why = f"because diffusers takes whole numbers only; validation videos have {validator.fps:g}"
            run.say(f"{INFERENCE_NAME} writes {plural(validator.whole_fps, 'frame')} per second, {why}")
        made = {"step": step, "run": run.id, **recipe, **about, "flags": config_dict(options), **environment()}
        made["prepared"] = dataset.index.recipe  # the flags of the preparation, which has another seed
        made["verification"] = verification
        shown = write_card(run, options, task, method, validator, dataset.index, made)
        if saves_pipeline(options):
            complete = write_pipeline(options.model, task.pipeline, folder / method.result)
            run.say(f"a complete pipeline, for {task.pipeline}.from_pretrained: {complete}")
        write_atomically(folder / RECIPE_NAME, json.dumps(made, indent=1, ensure_ascii=False).encode())
        command = command_of(options.model, task, folder / INFERENCE_NAME)
        run.say(f"finished: {folder / method.result}; to use it: {command}")
        files = [*files_of(folder / method.result), folder / INFERENCE_NAME, folder / RECIPE_NAME, *shown]
    run.barrier()
    return files


def command_of(model: ModelFlags, task: Task | type[Task], script: Path) -> str:
    """Returns the command that makes a video with the base model from the folder that the run has read it from.

    For image-to-video, it names a first frame if the run had no validation image, which is the default one.
    """
    cache = model.cache_dir if not Path(model.pretrained_model_name_or_path).is_dir() else None
    where = f"HF_HUB_CACHE={quote(cache)} " if cache else ""
    lacks_image = "image" in task.inference["names"] and not (script.parent / IMAGE_NAME.format(0)).is_file()
    return f"{where}python {quote(str(script))}" + (" --image first_frame.png" if lacks_image else "")


def files_of(result: Path) -> list[Path]:
    """Returns a file, or all files of a folder."""
    return sorted(path for path in (result, *result.rglob("*")) if path.is_file())


def scale_warning(scale: float) -> str:
    """Warns that some loaders ignore the scale of a LoRA that is stored only in the metadata."""
    return (
        f"the LoRA's scale, {scale:g}, is only in the file's metadata: diffusers 0.34 and newer reads it there; older "
        "ones, load_lora_weights of a dict, and ComfyUI without scripts/convert_lora.py take 1. The same command with "
        "--fold_lora_scale multiplies the matrices by it, with rounding"
    )


def write_weights(method: Method, folder: Path) -> dict[str, Any]:
    """Writes the weights atomically under their final name, as a file or a folder.

    Returns:
        The facts about the file that ``method.export`` returns, for recipe.json.
    """
    temporary, target = folder / ".weights.tmp", folder / method.result
    needed = sum(parameter.nbytes for parameter in method.parameters().values())
    with disk_errors_converted(folder, needed), removed_on_failure(temporary), stopping.disk_work():
        shutil.rmtree(temporary, ignore_errors=True)
        about: dict[str, Any] = method.export(temporary)
        for path in temporary.rglob("*"):
            fsync(path)
        if target.is_dir():
            shutil.rmtree(target)  # os.replace replaces only empty folders; recipe.json, which marks a result, is gone
        os.replace(temporary / method.result, target)
        shutil.rmtree(temporary)
    return about


def verify(run: Run, task: Task, method: Method, batch: Batch, precision: str, rounds: bool) -> dict[str, float]:
    """Checks that the weights in the output folder compute what was trained.

    The transformer's output is computed four times: as trained, after reloading the weights, without training, and by
    diffusers alone in a new transformer. If folding a scale rounds, the reloaded weights are compared with the folded
    ones in memory, because rounding may change the output as much as little training does.

    Args:
        run: The processes and the output folder.
        task: What is generated from what.
        method: What was trained.
        batch: The training sample on which outputs are compared.
        precision: In which precision training computed the weights that were not trained.
        rounds: Whether the weights in the folder are those of a LoRA whose scale was folded, which may round.

    Returns:
        The differences, for recipe.json.

    Raises:
        RuntimeError: The reloaded weights, or diffusers alone, give another output than the trained weights.
        UsageError: The output of the trained weights is not finite.
    """
    folder = run.output_dir
    before = written = compute_output(task, method.transformer, batch, run)
    if not before.isfinite().all():
        rule = "the trained weights give NaN or infinite numbers, because training has diverged"
        fix = "start again in another --output_dir with a lower --learning_rate"
        raise UsageError(f"{folder / method.result}: {rule}; {fix}")
    if rounds and isinstance(method, Lora):
        method.load_folded(pipeline_with(task, method.transformer))
        written = compute_output(task, method.transformer, batch, run)
    after = compute_reloaded_output(method, folder, task, batch, run)
    with method.base_weights(folder):
        base = compute_output(task, method.transformer, batch, run)
    stock = compute_output_by_diffusers(method, folder, task, batch, run, precision)
    difference, cosine = compare_outputs(before, after)
    run.say(f"reloaded in {task.pipeline}: max |difference| {difference:.3g}, cosine {cosine:.7f}")
    # Each comparison is false for NaN.
    same = preserves_effect(base, written, after) and compare_outputs(written, after)[1] >= MIN_COSINE
    exact = run.device.type == "cpu" and run.dtype == torch.float32
    if not same or not agree_within_rounding(before, written, run) or (exact and not written.equal(after)):
        raise RuntimeError(f"{folder / method.result}: reloaded, it gives another output; please report this")
    apart, likeness = compare_outputs(after, stock)
    run.say(f"run by diffusers alone, in a new transformer: max |difference| {apart:.3g}, cosine {likeness:.7f}")
    if not agree_within_rounding(after, stock, run):
        raise RuntimeError(
            f"{folder / method.result}: diffusers' own blocks give another output than those of training, cosine "
            f"{likeness:.6f}; please report this"
        )
    found = {"max_difference": difference, "cosine": cosine}
    return found | {"diffusers_max_difference": apart, "diffusers_cosine": likeness}


def compute_output(task: Task, transformer: nn.Module, batch: Batch, run: Run) -> Tensor:
    """Computes the transformer's output for one batch; returns it in fp32 on the CPU."""
    batch = batch.to(run.device)
    with evaluation_mode(transformer):
        return task.predictor(transformer, batch)(batch.x0_BFCHW, batch.timestep_B).float().cpu()


def pipeline_with(task: Task, transformer: nn.Module) -> Any:
    """Returns the stock pipeline with a transformer and without other models."""
    import diffusers

    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    return getattr(diffusers, task.pipeline)(**parts, transformer=transformer)


def compute_reloaded_output(method: Method, folder: Path, task: Task, batch: Batch, run: Run) -> Tensor:
    """Computes the output after the stock classes have reloaded the trained weights from their files."""
    method.reload(pipeline_with(task, method.transformer), folder)
    return compute_output(task, method.transformer, batch, run)


def compute_output_by_diffusers(
    method: Method, folder: Path, task: Task, batch: Batch, run: Run, precision: str
) -> Tensor:
    """Computes the output with a new transformer that diffusers loads and runs, in the precision of training."""
    transformer = method.new_transformer(partial(pipeline_with, task), folder)
    run_layer_by_layer(transformer, run.device, run.dtype, precision)
    return compute_output(task, transformer, batch, run)


def agree_within_rounding(training: Tensor, other: Tensor, run: Run) -> bool:
    """Returns whether the outputs of training's blocks and of others differ by no more than rounding in all blocks."""
    if run.device.type == "cpu" and run.dtype == torch.float32:
        return bool((other - training).norm() <= ROUNDING_OF_BLOCKS * training.norm())
    return compare_outputs(training, other)[1] >= MIN_COSINE_OF_BLOCKS


def compare_outputs(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Returns (largest absolute difference, cosine similarity) of two tensors of one shape."""
    cosine = torch.nn.functional.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0)
    return (first - second).abs().max().item(), cosine.item()


def preserves_effect(base: Tensor, trained: Tensor, reloaded: Tensor) -> bool:
    """Returns whether reloading changed the output much less than training did.

    A LoRA changes the output only a little, so even a wrong scale of the LoRA hardly lowers the cosine similarity of
    the outputs. This check is therefore relative to the effect of training.

    Args:
        base: Output without training.
        trained: Output of the trained weights.
        reloaded: Output of the reloaded weights.
    """
    error, effect = (reloaded - trained).norm(), (trained - base).norm()
    return bool(error <= MAX_EFFECT_ERROR * effect + ROUNDING * trained.norm())
