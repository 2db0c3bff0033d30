"""Measures the two arms of bench.py: a plain loop of diffusers and PEFT, and this project's training step under a plan.

``Work`` describes the task, and ``stock`` and ``ours`` return the figures of an arm for it. No files are read or
written: weights, latents and prompts are random, which affects neither time nor memory. ``Training``, which
guide_memory.py uses too, is built from the parts of the library that loop.Trainer uses, without data and checkpoints.
"""

import gc
import math
import statistics
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import psutil
import random_models
import torch
from profiling import shares_of, trace_of
from torch import Tensor

from cogvideox.config import args
from cogvideox.config.buckets import Bucket
from cogvideox.config.geometry import Geometry
from cogvideox.config.options import LoraOptions, SftOptions
from cogvideox.data.dataset import Batch
from cogvideox.evaluation.validation import evaluation_mode
from cogvideox.memory.streaming import TRANSFER_SLOTS
from cogvideox.model import attention
from cogvideox.model.diffusion import NoiseSchedule, loss_weights
from cogvideox.model.methods import FullFinetune, Lora, Method
from cogvideox.model.tasks import TextToVideo, losses_of
from cogvideox.model.vae_decoder import Decoder
from cogvideox.optimizer.engine import make_engine
from cogvideox.optimizer.schedule import learning_rate
from cogvideox.optimizer.step import StepResult
from cogvideox.planning import execution, plan
from cogvideox.planning.dry_run import PlannedRun
from cogvideox.planning.plan import ExecutionPlan
from cogvideox.runtime.run import PRECISIONS, TimeMark, use_growing_segments

GIB = 2**30
NO_MEMORY = "out of memory"
LEFT = GIB // 4  # bytes that may stay allocated between arms, for the workspaces of cuBLAS
SAMPLING_STEPS, GUIDANCE = 2, 6.0
SMALLEST_CARD = 4.0  # GiB; decoding by the VAE needs more memory than training of 2b
PLAN_FLAGS = {  # flags of the training script for each plan
    "fast": ("--plan", "fast"),
    "auto": ("--plan", "auto"),
    "80gb": ("--vram_budget", "80"),
    "24gb": ("--vram_budget", "24"),
    "12gb": ("--vram_budget", "12"),
    "8gb": ("--vram_budget", "8"),
    "lean": ("--plan", "lean"),
    "lean-int8": ("--plan", "lean", "--base_precision", "int8"),
    "lean-nf4": ("--plan", "lean", "--base_precision", "nf4"),
}
PLAN_FLAGS |= {f"{name}-8bit": (*PLAN_FLAGS[name], "--use_8bit") for name in ("auto", "80gb", "24gb", "lean")}
PLAN_FLAGS["80gb-device-8bit"] = ("--plan", "fast", *PLAN_FLAGS["80gb-8bit"])  # nothing is stored on the host
LOCAL = SimpleNamespace(deepspeed_plugin=None)  # accelerate's state in a run without a launcher


@dataclass(frozen=True)
class Work:
    """Describes what both arms do: text-to-video steps with clips of one size on one device."""

    kind: str
    rank: int  # rank of the LoRA; 0: all weights are trained
    batch: int
    device: torch.device
    precision: str = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """Returns the compute type."""
        return PRECISIONS[self.precision]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Returns the config of the transformer."""
        return random_models.TRANSFORMERS[self.kind]

    @cached_property
    def scheduler(self) -> Any:
        """Returns the scheduler of the pipeline."""
        from tiny_cogvideox import make_scheduler

        return make_scheduler(self.kind)

    @cached_property
    def geometry(self) -> Geometry:
        """Returns the geometry of the published model."""
        return random_models.geometry_of_kind(self.kind)

    @cached_property
    def bucket(self) -> Bucket:
        """Returns the size of the clips."""
        return Bucket(*random_models.clip_size(self.kind))

    def options(self, flags: Sequence[str]) -> LoraOptions | SftOptions:
        """Returns the options that the training script would parse for this work with some flags of the plan."""
        argv = ["--pretrained_model_name_or_path", self.kind, "--data_root", self.kind, "--load_tensors"]
        argv += ["--mixed_precision", self.precision, "--optimizer", "adamw", "--learning_rate", "1e-4"]
        argv += ["--train_batch_size", str(self.batch), *flags]
        if not self.rank:
            return args.parse(SftOptions, argv=argv)
        return args.parse(LoraOptions, argv=[*argv, "--rank", str(self.rank), "--lora_alpha", str(self.rank)])

    @property
    def width(self) -> int:
        """Returns the number of channels of the transformer, D."""
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def tokens(self) -> int:
        """Returns the number of text and video tokens of a sample."""
        return self.geometry.tokens(self.bucket)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns normal random numbers on the device, (B, *shape), by default in the compute type."""
        return torch.randn(self.batch, *shape, device=self.device, dtype=dtype or self.dtype)

    def random_prompt(self) -> Tensor:
        """Returns random embeddings of prompts, (B, L, D)."""
        return self.random(self.geometry.max_text_seq_length, self.geometry.text_embed_dim)

    def random_timestep(self) -> Tensor:
        """Returns random timesteps, (B,)."""
        return torch.randint(0, len(self.scheduler.alphas_cumprod), (self.batch,), device=self.device)

    def random_batch(self) -> Batch:
        """Returns a random batch on the device, in the form that the loader yields."""
        x0, noise = (self.random(*self.geometry.latent_shape(self.bucket), dtype=torch.float32) for _ in range(2))
        ids = tuple(map(str, range(self.batch)))
        return Batch(x0, noise, self.random_timestep(), self.random_prompt(), ids)

    def make_transformer(self) -> Any:
        """Returns a frozen random transformer on the device."""
        return random_models.make_transformer(self.kind, str(self.device), self.dtype).requires_grad_(False)


# -- figures -----------------------------------------------------------------------------------------------------------


def peak_gib(device: torch.device) -> dict[str, float | None]:
    """Returns the peak memory since the last call, in GiB, and resets it. The values are None without a GPU."""
    if device.type != "cuda":
        return {"allocated": None, "reserved": None}
    peaks = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    torch.cuda.reset_peak_memory_stats(device)
    return {name: round(value / GIB, 3) for name, value in peaks.items()}


def make_room(device: torch.device, keeps_graphs: bool = False) -> None:
    """Frees the memory of an earlier arm, and its compiled graphs unless the next arm needs them.

    Raises:
        RuntimeError: Some memory is still in use, which would count for the next arm.
    """
    use_growing_segments()  # as the training scripts do
    if not keeps_graphs:
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free_pinned_memory()
        torch.cuda.set_per_process_memory_fraction(1.0)
        left = torch.cuda.memory_allocated(device)
        if left > LEFT:
            raise RuntimeError(f"{left / GIB:.2f} GiB of the previous arm are still allocated on the device")
        peak_gib(device)


def free_pinned_memory() -> None:
    """Frees the pinned memory that torch keeps for later tensors.

    That of torchao's optimizer takes 36 GiB for all weights of 5b, which later arms would find missing.
    """
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    else:  # in versions before 2.12
        torch._C._host_emptyCache()


def attempt(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Returns the figures, or the error, so that a failure does not end the process."""
    try:
        return measure(*arguments)
    except Exception as error:
        traceback.print_exc()
        return {"failed": NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else str(error) or repr(error)}


def forget_hooks(parameters: Iterable[Tensor]) -> None:
    """Removes the hooks of an engine or an optimizer, which keep gradients and weights alive."""
    for parameter in parameters:
        (parameter._post_accumulate_grad_hooks or {}).clear()


class Meter:
    """Measures seconds and peak memory of steps. As in training, the host is at most one step ahead of the device."""

    def __init__(self, device: torch.device) -> None:
        """Empties the device's caches and starts the measurement of the first step.

        Args:
            device: The device whose time and peak memory are measured.
        """
        self.device = device
        self.losses: list[Tensor] = []
        self.peaks: list[dict[str, float | None]] = []
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # frees what creating the model needed
        peak_gib(device)
        self.marks = [TimeMark(device)]

    def step_ended(self, loss: Tensor) -> None:
        """Records a step that was submitted to the device."""
        self.marks.append(TimeMark(self.device))
        self.losses.append(loss.detach())
        self.peaks.append(peak_gib(self.device))
        self.marks[-2].reached()

    def figures(self) -> dict[str, Any]:
        """Returns the figures of at least two steps. The peaks include the first step and its compilation."""
        self.marks[-1].reached()
        seconds = [end.seconds_since(start) for start, end in pairwise(self.marks)]
        peaks = {name: [peak[name] for peak in self.peaks] for name in self.peaks[0]}
        return {
            "seconds_per_step": round(statistics.median(seconds[2:] or seconds[1:]), 4),
            "first_step_seconds": round(seconds[0], 2),
            "peak_gib": {name: max(filter(None, values), default=None) for name, values in peaks.items()},
            "first_step_peak_gib": self.peaks[0],
            "seconds": [round(value, 4) for value in seconds],
            "losses": [float(loss) for loss in self.losses],
        }


# -- the stock arm -----------------------------------------------------------------------------------------------------


def stock_optimizer(parameters: list[Tensor], offloads: bool) -> torch.optim.Optimizer:
    """Returns AdamW of torch, or torchao's, which makes AdamW's steps on the host."""
    values: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 1e-4}
    if not offloads:
        return torch.optim.AdamW(parameters, **values)
    from torchao.optim import CPUOffloadOptimizer

    optimizer: torch.optim.Optimizer = CPUOffloadOptimizer(
        parameters, torch.optim.AdamW, offload_gradients=True, **values
    )
    return optimizer


def stock(work: Work, steps: int, offloads: bool = False) -> dict[str, Any]:
    """Trains as published trainers do: diffusers, PEFT, accelerate's autocast, full checkpointing, AdamW, clipping.

    Args:
        work: What is trained.
        steps: The number of steps.
        offloads: Whether torchao's CPUOffloadOptimizer has weights, gradients and moments on the host and makes AdamW's
            steps there, so that gradients are not clipped.
    """
    from accelerate import Accelerator
    from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    device = work.device
    accelerator = Accelerator(mixed_precision=work.precision, cpu=device.type == "cpu")
    if accelerator.state.deepspeed_plugin is not None:  # scale.py launches this loop with ZeRO
        clipped = {"train_micro_batch_size_per_gpu": work.batch, "gradient_clipping": 1.0}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(clipped)
    transformer = work.make_transformer()
    if work.rank:
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        transformer.add_adapter(LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=targets))
    else:
        transformer.requires_grad_(True)  # in bf16, with moments in bf16, as published trainers do it
    if work.precision == "fp16":  # accelerate's loss scale needs gradients in fp32
        cast_training_params(transformer)
    transformer.enable_gradient_checkpointing()
    scheduler = CogVideoXDPMScheduler.from_config(work.scheduler.config)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = CogVideoXPipeline(**parts, transformer=transformer, scheduler=scheduler)
    frames, *rest = work.geometry.latent_shape(work.bucket)
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(work.bucket.height, work.bucket.width, frames, device)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    try:
        model, optimizer = accelerator.prepare(transformer, stock_optimizer(parameters, offloads))
        clean, prompt = work.random(frames, *rest), work.random_prompt()
        meter = Meter(device)
        for _ in range(steps):
            noise, timestep = torch.randn_like(clean), work.random_timestep()
            noisy = scheduler.add_noise(clean, noise, timestep)
            output = model(noisy, prompt, timestep, image_rotary_emb=rotary, return_dict=False)[0]
            predicted = scheduler.get_velocity(output, noisy, timestep)
            weight = 1 / (1 - scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1))
            loss = (weight * (predicted - clean) ** 2).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            meter.step_ended(loss)
        return meter.figures()
    finally:
        accelerator.free_memory()
        forget_hooks(parameters)


# -- our arm -----------------------------------------------------------------------------------------------------------


def choose_plan(
    transformer: Any, options: LoraOptions | SftOptions, work: Work
) -> tuple[ExecutionPlan, dict[str, Any]]:
    """Moves the transformer to the host; returns the plan that the flags ask for, and figures to record."""
    transformer.to("cpu")  # training starts with the transformer on the host
    flags = options.plan
    if work.device.type == "cuda":
        torch.cuda.empty_cache()
        if flags.vram_budget is not None:
            execution.limit_device_memory(flags.vram_budget)
    backend, why = attention.choose_backend(work.device, work.dtype, flags.attention_backend)
    precision = execution.base_precision(options)
    run = PlannedRun(work.geometry, Lora if work.rank else FullFinetune, work.device, work.dtype, 1, compiled=False)
    sizes = execution.sizes_from_options(run, options, work.geometry, [work.bucket], transformer)
    machine = execution.measure_machine(work.device, work.dtype, backend, sizes, flags.vram_budget)
    compiled = execution.compiles(run, flags.compile_blocks, execution.drops_out(options))
    chosen = execution.choose(run, options, sizes, machine, compiled, backend)
    chosen = replace(chosen, base_precision=precision)
    predicted = {"peak_gib": round(chosen.peak / GIB, 3), "seconds_per_step": round(chosen.seconds, 3)}
    predicted["pinned_gib"] = round(chosen.pinned / GIB, 3)
    measured = {field: float(f"{value:.4g}") for field, value in asdict(machine).items()}
    record: dict[str, Any] = {
        "execution": str(chosen),
        "attention": f"{backend}: {why}",
        "machine": measured,
        "predicted": predicted,
    }
    # Of what these predictions were made, so that a test can repeat them with later constants.
    kinds = [[asdict(kind), count] for kind, count in Counter(chosen.blocks).items()]
    record |= {"sizes": asdict(sizes), "kinds": kinds, "state": chosen.state, "compiled": compiled}
    record["slots"] = TRANSFER_SLOTS
    if precision != plan.AUTO:
        record["fidelity"] = execution.quantization_report(transformer, precision, work.device, backend)
    return chosen, record


class Training:
    """Trains a random transformer under a plan, as the training script does with the same flags.

    Attributes:
        record: The plan, its predictions and the measured machine, for the JSON of a result.
    """

    def __init__(self, work: Work, flags: Sequence[str]) -> None:
        """Makes the transformer and the engine, and moves them to where the plan wants them.

        Args:
            work: What is trained.
            flags: The flags that choose the plan and the optimizer.
        """
        self.work, self.options = work, work.options(flags)
        self.transformer, options = work.make_transformer(), self.options
        self.method: Method = (
            Lora(self.transformer, options)
            if isinstance(options, LoraOptions)
            else FullFinetune(self.transformer, options)
        )
        chosen, self.record = choose_plan(self.transformer, options, work)
        trained = execution.apply_plan(self.transformer, chosen, work.device)
        self.task = TextToVideo(options, work.geometry, work.device, work.dtype)
        self.schedule = NoiseSchedule.from_config(work.geometry.schedule).to(work.device)
        self.weights_T = loss_weights(self.schedule, options.loss)
        launched: Any = SimpleNamespace(state=LOCAL, device=work.device, is_main_process=True)
        on_host = chosen.state == plan.HOST
        self.engine = make_engine(launched, self.transformer, self.method, options, work.dtype, on_host, trained)

    def step(self, number: int, steps: int) -> StepResult:
        """Runs one optimizer step on a random batch, with the learning rate of step ``number`` of ``steps``."""
        batch = self.work.random_batch()
        self.method.draw_for(number, 0)
        losses_B = losses_of(self.task, self.schedule, self.transformer, batch) * self.weights_T[batch.timestep_B]
        self.engine.backward(losses_B.mean())
        return self.engine.step(learning_rate(self.options.optimizer, number, steps, self.work.batch))

    def measure(self, steps: int) -> dict[str, Any]:
        """Runs steps, and returns their figures and the record of the plan.

        Raises:
            RuntimeError: A loss is NaN or infinite.
        """
        meter, values = Meter(self.work.device), []
        for number in range(steps):
            result = self.step(number, steps)
            values.append(result.values)
            meter.step_ended(result.values[0])
        figures = meter.figures() | scaling_figures(torch.stack(values).cpu())
        if not all(map(math.isfinite, figures["losses"])):
            raise RuntimeError(f"losses are not finite: {figures['losses']}")
        return figures | self.record

    def sample(self, reserved_gib: float | None = None) -> dict[str, Any]:
        """Measures validation while all memory of training is still allocated; see ``sample``."""
        with self.engine.averaged():
            return sample(self.work, self.transformer, reserved_gib)

    def end(self) -> None:
        """Frees gradients, master weights and moments. Afterwards the transformer can only sample."""
        with self.engine.averaged():
            pass  # the host has all weights by now
        del self.engine
        forget_hooks(self.transformer.parameters())
        gc.collect()


def scaling_figures(values: Tensor) -> dict[str, Any]:
    """Returns how many steps were skipped, and the loss scale of the last one.

    Args:
        values: StepResult.values of each step, (steps, 8).
    """
    column = StepResult.NAMES.index
    return {
        "skipped_steps": int(values[:, column("skipped")].sum()),
        "loss_scale": float(values[-1, column("loss_scale")]),
    }


def host_bytes() -> int:
    """Returns the host memory that this process uses."""
    return int(psutil.Process().memory_info().rss)


def ours(work: Work, flags: Sequence[str], steps: int, validates: bool = False, traces: bool = False) -> dict[str, Any]:
    """Measures training steps under a plan, and then, if asked for, a traced step and validation."""
    before = host_bytes()
    training = Training(work, flags)
    figures = training.measure(steps)
    figures["host_gib"] = round((host_bytes() - before) / GIB, 2)
    if work.device.type == "cuda":
        figures["kernels_ms"] = attempt(shares_of, lambda: training.step(steps - 1, steps))
    if traces:
        figures["trace"] = attempt(trace_of, lambda: training.step(steps - 1, steps))
    if validates:
        figures["validation"] = attempt(training.sample, figures["peak_gib"]["reserved"])
    return figures


def sample(work: Work, transformer: Any, reserved_gib: float | None = None) -> dict[str, Any]:
    """Measures sampling by the stock pipeline and decoding, with whatever else is allocated.

    If the memory that training reserved is given, the process is limited to it, or to SMALLEST_CARD if that is more.
    """
    from diffusers import CogVideoXPipeline

    if reserved_gib is not None:
        torch.cuda.empty_cache()
        execution.limit_device_memory(max(reserved_gib + plan.CONTEXT / GIB, SMALLEST_CARD))
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = CogVideoXPipeline(**parts, transformer=transformer, scheduler=work.scheduler)
    pipe.set_progress_bar_config(disable=True)
    size = {"num_frames": work.bucket.frames, "height": work.bucket.height, "width": work.bucket.width}
    size |= {"max_sequence_length": work.geometry.max_text_seq_length}
    prompts = {name: work.random_prompt()[:1] for name in ("prompt_embeds", "negative_prompt_embeds")}
    many = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    peak_gib(work.device)
    start = TimeMark(work.device)
    with evaluation_mode(transformer):
        latents_BFCHW = pipe(**prompts, **size, **many).frames
    end = TimeMark(work.device)
    end.reached()
    sampling = peak_gib(work.device)
    vae = random_models.make_vae(work.kind, str(work.device), work.dtype)
    Decoder(vae, print)
    padding = work.geometry.padding_frames(work.geometry.latent_frames(work.bucket.frames))
    with torch.no_grad():
        vae.decode(latents_BFCHW[:, padding:].transpose(1, 2) / work.geometry.scaling_factor)
    return {
        "sampling_steps": SAMPLING_STEPS,
        "sampling_seconds": round(end.seconds_since(start), 2),
        "sampling_peak_gib": sampling,
        "decoding_peak_gib": peak_gib(work.device),
        "tile": vae.decode.attempts[0],
    }
