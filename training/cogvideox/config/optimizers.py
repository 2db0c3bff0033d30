"""Creates the optimizer that the flags name, and checks what each optimizer needs and does not support.

``make_optimizer`` returns a combination of algorithm, precision of the moments and library, or any class by its dotted
name; the modules in optimizer/ give it fp32 master weights, gradients and a learning rate. ``check_optimizer`` reports
missing packages before anything heavy is imported, so torch is imported inside functions.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

from cogvideox.config.flags import ADAMS, NAMED_CLASS, OptimizerFlags
from cogvideox.config.options import TrainOptions, launched_processes, precision_of, trains_on_host, under_deepspeed
from cogvideox.errors import UsageError

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

ADAM_NAMES = {"adam": "Adam", "adamw": "AdamW"}
USUAL_BETAS = (0.9, 0.999)  # used if a class has betas without a default
COMPILERS = ("c++", "g++", "clang++")


def make_optimizer(flags: OptimizerFlags, parameters: "Sequence[Parameter]") -> "Optimizer":
    """Returns the optimizer that the flags name. Its learning rate is set before every step.

    Raises:
        UsageError: The class does not accept these parameters.
    """
    kind, arguments = optimizer_class(flags)
    try:
        with redirect_stdout(io.StringIO()):  # Prodigy prints its arguments.
            return kind(parameters, lr=1.0, **arguments)  # Prodigy and CAME refuse a learning rate of 0.
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"--optimizer {flags.optimizer}: {error or 'does not take these parameters'}") from error


def optimizer_class(flags: OptimizerFlags) -> tuple[Any, dict[str, Any]]:
    """Returns the class of the optimizer and its arguments, except for the parameters and the learning rate."""
    if flags.kind == NAMED_CLASS:
        kind = named_class(flags.optimizer)
        return kind, class_arguments(kind, flags)
    betas, decay = (flags.beta1, flags.beta2), {"weight_decay": flags.weight_decay}
    if flags.kind == "prodigy":
        switches = {
            "decouple": flags.prodigy_decouple,
            "use_bias_correction": flags.prodigy_use_bias_correction,
            "safeguard_warmup": flags.prodigy_safeguard_warmup,
        }
        prodigy = importlib.import_module("prodigyopt").Prodigy
        return prodigy, decay | switches | {"betas": betas, "beta3": flags.beta3, "eps": flags.epsilon}
    if flags.kind == "came":
        came = importlib.import_module("came_pytorch").CAME
        third = inspect.signature(came).parameters["betas"].default[2] if flags.beta3 is None else flags.beta3
        return came, decay | {"betas": (*betas, third)}
    adam = decay | {"betas": betas, "eps": flags.epsilon}
    if bits := bits_of(flags):
        library = importlib.import_module("torchao.optim" if flags.use_torchao else "bitsandbytes.optim")
        return getattr(library, ADAM_NAMES[flags.kind] + bits), adam
    # The fused kernel takes the clipping factor and the non-finite flag as tensors, so the host never waits for them.
    return getattr(importlib.import_module("torch.optim"), ADAM_NAMES[flags.kind]), adam | {"fused": True}


def bits_of(flags: OptimizerFlags) -> str:
    """Returns the suffix by which bitsandbytes and torchao name the precision of the moments; empty for fp32."""
    return "8bit" if flags.use_8bit else "4bit" if flags.use_4bit else "Fp8" if flags.use_fp8 else ""


# -- a class by its dotted name ----------------------------------------------------------------------------------------


def named_class(name: str) -> Any:
    """Returns the optimizer class of a dotted name.

    Raises:
        UsageError: There is no such class; the message has the most similar one.
    """
    from torch.optim import Optimizer

    path, _, last = name.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise UsageError(f"--optimizer {name}: {error}; give MODULE.CLASS of an installed package") from None
    found = getattr(module, last, None)
    if isinstance(found, type) and issubclass(found, Optimizer):
        return found
    classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Optimizer)]
    near = difflib.get_close_matches(last, classes, 1, 0.4)
    raise UsageError(
        f"--optimizer {name}: is not an optimizer class" + (f"; nearest: {path}.{near[0]}" if near else "")
    )


def class_arguments(kind: Any, flags: OptimizerFlags) -> dict[str, Any]:
    """Returns the constructor arguments that the flags set; --optimizer_args take precedence.

    Raises:
        UsageError: The constructor lacks an argument or needs another type; it lists all such arguments.
    """
    taken = inspect.signature(kind).parameters
    problems: list[str] = []
    arguments = dict(shared_arguments(taken, flags, problems))
    for text in flags.optimizer_args:
        key, _, value = text.partition("=")
        try:
            arguments[key] = typed_argument(taken, key, value)
        except UsageError as error:
            problems.append(f"--optimizer_args {text}: {error}")
    if problems:
        raise UsageError(problems)
    return arguments


def shared_arguments(
    taken: Mapping[str, inspect.Parameter], flags: OptimizerFlags, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yields (argument, value) for the flags that many optimizers share, and adds what does not fit to ``problems``."""
    for flag, key in (("weight_decay", "weight_decay"), ("epsilon", "eps")):
        value = getattr(flags, flag)
        if value is not None and key in taken:
            yield key, value
        elif value is not None:
            problems.append(f"--{flag}: {flags.optimizer} has no {key}; leave it out")
    given = {index: beta for index, beta in enumerate((flags.beta1, flags.beta2)) if beta is not None}
    if given and "betas" in taken:
        usual = taken["betas"].default
        betas = list(usual if isinstance(usual, tuple) else USUAL_BETAS)
        for index, beta in given.items():
            betas[index] = beta
        yield "betas", tuple(betas)
    elif given:
        problems.append(f"--beta{min(given) + 1}: {flags.optimizer} has no betas; leave it out")


def typed_argument(taken: Mapping[str, inspect.Parameter], key: str, text: str) -> Any:
    """Returns the value of one of --optimizer_args.

    Raises:
        UsageError: The argument or its value is not accepted; the message has the rule and the nearest fix.
    """
    names = [name for name, item in taken.items() if name not in ("params", "lr") and item.kind != item.VAR_KEYWORD]
    if key == "lr":
        raise UsageError("the learning rate follows --learning_rate and --lr_scheduler; give those flags")
    if key not in names and not any(item.kind == item.VAR_KEYWORD for item in taken.values()):
        near = difflib.get_close_matches(key, names, 1)
        raise UsageError(f"no such argument; nearest: {near[0]}" if near else f"is one of {', '.join(names)}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        rule = "must be key=value with a Python literal, such as 0.9, True, (0.9, 0.99) or 'text'"
        raise UsageError(rule) from None
    wanted = misfit(taken[key].default, value) if key in taken else None
    if wanted:
        raise UsageError(f"takes {wanted}")
    return value


def misfit(default: Any, value: Any) -> str | None:
    """Returns what an argument with this default accepts if the value is of another kind, or else None."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(default, (int, float)):
        return None if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
    if isinstance(default, (tuple, list)):
        fits = isinstance(value, (tuple, list)) and len(value) == len(default)
        return None if fits else f"{len(default)} values, such as {default}"
    return "text in quotes" if isinstance(default, str) and not isinstance(value, str) else None


# -- problems that need more than the flags ----------------------------------------------------------------------------


def check_optimizer(options: TrainOptions) -> Iterator[str]:
    """Yields missing packages, bad arguments, and what the optimizer does not support in this run."""
    flags = options.optimizer
    package = package_of(flags)
    if package and importlib.util.find_spec(package) is None:
        yield f"{flag_of(flags)}: needs {package}, which is not installed; pip install {package}"
    elif flags.kind == NAMED_CLASS:
        yield from class_problems(flags)
    if flags.use_torchao and not any(map(shutil.which, (os.environ.get("CXX", COMPILERS[0]), *COMPILERS))):
        yield "--use_torchao: compiles its step and finds no C++ compiler; install g++, or leave the flag out"
    if flags.use_cpu_offload_optimizer:
        yield from offload_machine_problems(options)
    if under_deepspeed():
        yield from deepspeed_problems(flags)


def check_state_place(options: TrainOptions) -> Iterator[str]:
    """Yields problems of optimizer state in host memory. check_optimizer reports optimizers that cannot be created."""
    if options.plan.optimizer_state_on == "host" or trains_on_host(options):
        name = "--optimizer_state_on host"
        if options.plan.optimizer_state_on != "host":
            name = "--weights_on host" if options.plan.weights_on == "host" else "--plan lean"
        with suppress(ImportError, UsageError):
            yield from host_state_problems(options.optimizer, under_deepspeed(), name)


def package_of(flags: OptimizerFlags) -> str | None:
    """Returns the package that provides the optimizer, or None if torch does."""
    if flags.use_torchao or flags.use_cpu_offload_optimizer:
        return "torchao"
    if bits_of(flags):
        return "bitsandbytes"
    return {"prodigy": "prodigyopt", "came": "came_pytorch"}.get(flags.kind)


def flag_of(flags: OptimizerFlags) -> str:
    """Returns the flag that selects an optimizer outside torch, as it is typed."""
    names = ("use_torchao", "use_cpu_offload_optimizer", "use_8bit")
    return next((f"--{name}" for name in names if getattr(flags, name)), f"--optimizer {flags.optimizer}")


def class_problems(flags: OptimizerFlags) -> Iterator[str]:
    """Yields problems of a class by its dotted name, found by creating it for a small test parameter."""
    import torch

    try:
        kind, arguments = optimizer_class(flags)
    except UsageError as error:
        yield from error.problems
        return
    try:
        kind([torch.nn.Parameter(torch.zeros(2, 2))], lr=1.0, **arguments)
    except Exception as error:  # a constructor may raise any error
        yield f"--optimizer {flags.optimizer}: {error}; see --optimizer_args"
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        yield f"--optimizer {flags.optimizer}: its step runs the model itself, which is not supported; give another"


def offload_machine_problems(options: TrainOptions) -> Iterator[str]:
    """Yields what the CPU optimizer of torchao does not support on this machine."""
    import torch

    name = "--use_cpu_offload_optimizer"
    if not torch.cuda.is_available():
        yield f"{name}: torchao needs a CUDA device, and torch finds none; leave the flag out"
    if launched_processes() > 1:
        yield f"{name}: torchao supports only one GPU; launch one process, or use accelerate_configs/deepspeed.yaml"
    if options.train.mixed_precision is None and precision_of(None) == "fp16":
        yield f"{name}: torchao does not support loss scaling, which fp16 needs; give --mixed_precision bf16"


def deepspeed_problems(flags: OptimizerFlags) -> Iterator[str]:
    """Yields a problem for optimizers that ZeRO cannot run, because it steps flat shards of the parameters alone."""
    if flags.kind not in ADAMS:
        yield f"--optimizer {flags.optimizer}: gets flat shards of the weights under DeepSpeed; give adam or adamw"
    if flags.use_torchao:
        yield "--use_torchao: does not run under DeepSpeed; give only --use_8bit"
    if flags.use_cpu_offload_optimizer:
        yield (
            "--use_cpu_offload_optimizer: does not run under DeepSpeed; set offload_optimizer_device: cpu in its "
            "configuration"
        )


def host_state_problems(
    flags: OptimizerFlags, deepspeed: bool, name: str = "--optimizer_state_on host"
) -> Iterator[str]:
    """Yields why the state of the optimizer cannot be in host memory between steps; only that of fused Adam can.

    Args:
        flags: The flags of the optimizer.
        deepspeed: Whether the run is under DeepSpeed.
        name: The flag that asks for the state in host memory, as it is typed.
    """
    if deepspeed:
        yield f"{name}: DeepSpeed places the state; set offload_optimizer_device: cpu in its configuration"
    elif flags.use_cpu_offload_optimizer:
        yield f"{name}: contradicts --use_cpu_offload_optimizer, whose state is always there; give one of them"
    elif not steps_on_device(flags):
        yield (
            f"{name}: {flag_of(flags)} cannot skip a step on the device, or keeps more than plain moments; "
            "give --optimizer adam or adamw without low bits, or keep its state on the device"
        )


def steps_on_device(flags: OptimizerFlags) -> bool:
    """Returns whether the flags select the fused Adam of torch, which can skip a step without waiting for the host."""
    from torch.optim import Adam, AdamW

    kind, arguments = optimizer_class(flags)
    return issubclass(kind, (Adam, AdamW)) and bool(arguments.get("fused"))
