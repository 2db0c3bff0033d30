"""Creates the optimizer that the flags name, and checks what it needs and whether it supports this run.

The flags name an algorithm, the precision of its moments and the package that implements it, or the dotted name of any
optimizer class. ``make_optimizer`` creates the optimizer. The modules in optimizer/ pass fp32 master weights and their
gradients to it and set the learning rate. ``check_optimizer`` finds problems before the run starts. Importing torch
takes seconds, so only the functions that need it import it, and a missing package is reported at once.
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

from cogvideox.config.flags import NAMED_CLASS, OptimizerFlags
from cogvideox.config.options import (
    TrainOptions,
    trains_on_host,
    under_deepspeed,
    under_fsdp,
    wanted_places,
)
from cogvideox.errors import UsageError

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

ADAM_NAMES = {"adam": "Adam", "adamw": "AdamW"}
USUAL_BETAS = (0.9, 0.999)  # used for a class whose argument "betas" has no default
NOT_OF_TORCH = ("use_torchao", "use_8bit", "use_bf16_moments", "use_stochastic_rounding")  # flags of Adam
COMPILERS = ("c++", "g++", "clang++")


def make_optimizer(flags: OptimizerFlags, parameters: "Sequence[Parameter]") -> "Optimizer":
    """Returns the optimizer that the flags name. The modules in optimizer/ set its learning rate before every step.

    Raises:
        UsageError: The optimizer does not accept the parameters or the arguments.
    """
    kind, arguments = optimizer_class(flags)
    try:
        with redirect_stdout(io.StringIO()):  # Prodigy prints to stdout when it is created.
            return kind(parameters, lr=1.0, **arguments)  # Prodigy and CAME refuse a learning rate of 0.
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"--optimizer {flags.optimizer}: {error or 'does not take these parameters'}") from error


def optimizer_class(flags: OptimizerFlags) -> tuple[Any, dict[str, Any]]:
    """Returns the class of the optimizer and its arguments, except for the parameters and the learning rate.

    Raises:
        UsageError: A class that is given by its dotted name does not exist or does not accept the arguments.
    """
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
    if flags.use_torchao:
        return getattr(importlib.import_module("torchao.optim"), ADAM_NAMES[flags.kind] + bits_of(flags)), adam
    # The fused kernel reads the divisor of the gradients, and whether to skip the step, from tensors on the device.
    # Without it, the host would wait for both in every step.
    return getattr(importlib.import_module("torch.optim"), ADAM_NAMES[flags.kind]), adam | {"fused": True}


def bits_of(flags: OptimizerFlags) -> str:
    """Returns the precision of the moments as class names in torchao end with it, or "" for fp32."""
    return "8bit" if flags.use_8bit else "4bit" if flags.use_4bit else "Fp8" if flags.use_fp8 else ""


# -- a class by its dotted name ----------------------------------------------------------------------------------------


def named_class(name: str) -> Any:
    """Imports the optimizer class with this dotted name.

    Raises:
        UsageError: There is no such class. The message names the most similar class of the module.
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
    """Returns the constructor arguments that the flags set.

    Raises:
        UsageError: The constructor does not have an argument, or needs another type, or two flags set it. The error has
            all such problems.
    """
    taken = inspect.signature(kind).parameters
    problems: list[str] = []
    arguments = dict(shared_arguments(taken, flags, problems))
    for text in flags.optimizer_args:
        key, _, value = text.partition("=")
        if key in arguments:
            problems.append(f"--optimizer_args {text}: {key} is set twice; set it once, here or by its own flag")
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
    """Yields (argument, value) for --weight_decay, --epsilon and the betas, if they are given.

    Args:
        taken: The arguments of the constructor.
        flags: The flags of the optimizer.
        problems: A list to which a message is added for each given flag that the constructor does not support.
    """
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
    """Converts one item of --optimizer_args, key=text, and returns the Python value of the text.

    Args:
        taken: The arguments of the constructor.
        key: The name of the argument.
        text: The value, as a Python literal.

    Raises:
        UsageError: The constructor does not accept the argument or the value. The message suggests a fix.
    """
    names = [name for name, item in taken.items() if name not in ("params", "lr") and item.kind != item.VAR_KEYWORD]
    if key == "lr":
        raise UsageError("the learning rate follows --learning_rate and --lr_scheduler; give those flags")
    if key not in names and not any(item.kind == item.VAR_KEYWORD for item in taken.values()):
        near = difflib.get_close_matches(key, names, 1)
        raise UsageError("no such argument; " + (f"nearest: {near[0]}" if near else f"give one of {', '.join(names)}"))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        rule = "must be key=value with a Python literal, such as 0.9, True, (0.9, 0.99) or 'text'"
        raise UsageError(rule) from None
    wanted = misfit(taken[key].default, value) if key in taken else None
    if wanted:
        raise UsageError(f"takes {wanted}")
    return value


def misfit(default: object, value: object) -> str | None:
    """Returns None if the value is of the same kind as the default, or else a text that says what is accepted."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(default, (int, float)):
        return None if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
    if isinstance(default, (tuple, list)):
        fits = isinstance(value, (tuple, list)) and len(value) == len(default)
        return None if fits else f"{len(default)} values, such as {default}"
    return "text in quotes" if isinstance(default, str) and not isinstance(value, str) else None


# -- checks of packages, devices and other flags -----------------------------------------------------------------------


def check_optimizer(options: TrainOptions) -> Iterator[str]:
    """Yields a message for each missing package, bad argument, and setting that the optimizer does not support."""
    flags = options.optimizer
    package = package_of(flags)
    if package and importlib.util.find_spec(package) is None:
        yield f"{flag_of(flags)}: needs {package}, which is not installed; pip install {package}"
    elif flags.kind == NAMED_CLASS:
        yield from class_problems(flags)
    if flags.use_torchao and not any(map(shutil.which, (os.environ.get("CXX", COMPILERS[0]), *COMPILERS))):
        yield "--use_torchao: compiles its step, which needs a C++ compiler; install g++, or leave the flag out"
    for launcher in ["DeepSpeed"] * under_deepspeed() + ["FSDP"] * under_fsdp():
        with suppress(ImportError, UsageError):
            yield from sharded_state_problems(flags, launcher)


def check_state_place(options: TrainOptions) -> Iterator[str]:
    """Yields a message if the flags place the optimizer state in host memory and the optimizer does not support it.

    Errors in creating the optimizer are ignored here, because check_optimizer reports them.
    """
    wanted = wanted_places(options)
    if wanted.optimizer_state_on == "host" or trains_on_host(options):
        name = "--optimizer_state_on host"
        if options.optimizer.use_cpu_offload_optimizer:
            name = "--use_cpu_offload_optimizer"
        elif wanted.optimizer_state_on != "host":
            name = "--weights_on host" if wanted.weights_on == "host" else "--plan lean"
        with suppress(ImportError, UsageError):
            yield from host_state_problems(options.optimizer, under_deepspeed(), name)


def package_of(flags: OptimizerFlags) -> str | None:
    """Returns the package that provides the optimizer, or None if torch does."""
    if flags.use_torchao:
        return "torchao"
    return {"prodigy": "prodigyopt", "came": "came_pytorch"}.get(flags.kind)


def flag_of(flags: OptimizerFlags) -> str:
    """Returns the flag by which the user selected the optimizer, for messages, such as "--use_8bit"."""
    return next((f"--{name}" for name in NOT_OF_TORCH if getattr(flags, name)), f"--optimizer {flags.optimizer}")


def class_problems(flags: OptimizerFlags) -> Iterator[str]:
    """Creates an optimizer of the class with the dotted name for a small parameter, and yields the problems found."""
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
        yield f"--optimizer {flags.optimizer}: its step needs a closure, which is not supported; give another"


def sharded_state_problems(flags: OptimizerFlags, launcher: str) -> Iterator[str]:
    """Yields why an optimizer's state cannot be sharded.

    A process has only some elements of a weight. Adam treats each element on its own, but other optimizers need the
    shapes of the weights or all elements at once, and low-bit moments are quantized in blocks of elements.

    Args:
        flags: The flags of the optimizer.
        launcher: What shards the state, "DeepSpeed" or "FSDP".
    """
    if not steps_on_device(flags):
        yield (
            f"accelerate launch ({launcher}): {flag_of(flags)} needs more than the part of a weight that a process "
            "has; give --optimizer adam or adamw without low bits"
        )
    elif flags.use_cpu_offload_optimizer and launcher == "DeepSpeed":
        yield (
            "--use_cpu_offload_optimizer: does not run under DeepSpeed; set offload_optimizer_device: cpu in its "
            "configuration"
        )


def host_state_problems(
    flags: OptimizerFlags, deepspeed: bool, name: str = "--optimizer_state_on host"
) -> Iterator[str]:
    """Yields a message if the state of the optimizer cannot be stored in host memory between steps.

    Such state is streamed through the device for each step, and a step with gradients that are not finite must be
    skipped without waiting for the host. Only Adam and AdamW of optimizer/adam.py support this.

    Args:
        flags: The flags of the optimizer.
        deepspeed: Whether the run is under DeepSpeed.
        name: What asks for the state in host memory. Messages begin with it.
    """
    if deepspeed:
        yield f"{name}: DeepSpeed places the state; set offload_optimizer_device: cpu in its configuration"
    elif not is_adam(flags):
        yield (
            f"{name}: {flag_of(flags)} cannot keep its state in host memory, which only Adam and AdamW can; "
            "give --optimizer adam or adamw without --use_torchao, or keep its state on the device"
        )


def is_adam(flags: OptimizerFlags) -> bool:
    """Returns whether the flags select Adam or AdamW as optimizer/adam.py implements them, not those of torchao."""
    return flags.kind in ADAM_NAMES and not flags.use_torchao


def steps_on_device(flags: OptimizerFlags) -> bool:
    """Returns whether the flags select the fused Adam of torch, which can skip a step without waiting for the host."""
    from torch.optim import Adam, AdamW

    if any(getattr(flags, name) for name in NOT_OF_TORCH):
        return False  # torch has no such Adam
    kind, arguments = optimizer_class(flags)
    return issubclass(kind, (Adam, AdamW)) and bool(arguments.get("fused"))
