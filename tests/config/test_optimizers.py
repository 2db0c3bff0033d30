"""Tests optimizers.py: each optimizer equals its library, resumes bit for bit, and can skip a step."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from running import equal, lora_flags, losses, train, weights
from safetensors.torch import load_file, save_file
from stepping import loss_of, rate, state_equal, values
from stepping import parameters as all_parameters
from stepping import train as advance
from torch.nn import Parameter

from cogvideox.checks import TRAINING_CHECKS
from cogvideox.config import args
from cogvideox.config.flags import OptimizerFlags
from cogvideox.config.optimizers import (
    check_optimizer,
    check_state_place,
    host_state_problems,
    make_optimizer,
    optimizer_class,
    steps_on_device,
)
from cogvideox.config.options import LoraOptions
from cogvideox.errors import UsageError
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.resident_weights import ResidentWeights, is_fused, set_rate
from cogvideox.optimizer.rule import make_masters, rule_of, state_bytes
from cogvideox.optimizer.state_tensors import as_tensor, plain_tensors

BETAS, EPSILON, DECAY = (0.9, 0.95), 1e-8, 1e-4  # the defaults of the flags
ADAM = {"betas": BETAS, "eps": EPSILON, "weight_decay": DECAY}

# The flags of each case, and the optimizer of the library that they mean.
ON_THE_CPU: dict[str, tuple[str, dict[str, Any]]] = {
    "--optimizer bitsandbytes.optim.AdamW8bit --optimizer_args betas=(0.8,0.9)": (
        "bitsandbytes.optim.AdamW8bit",
        {"betas": (0.8, 0.9)},
    ),
    "--optimizer Prodigy": ("prodigyopt.Prodigy", {**ADAM, "decouple": False}),
    "--optimizer prodigy --prodigy_decouple --prodigy_use_bias_correction --prodigy_safeguard_warmup --beta3 0.9": (
        "prodigyopt.Prodigy",
        {**ADAM, "decouple": True, "use_bias_correction": True, "safeguard_warmup": True, "beta3": 0.9},
    ),
    "--optimizer came": ("came_pytorch.CAME", {"betas": (*BETAS, 0.9999), "weight_decay": DECAY}),
    "--optimizer CAME --beta3 0.99 --weight_decay 0.1": (
        "came_pytorch.CAME",
        {"betas": (*BETAS, 0.99), "weight_decay": 0.1},
    ),
    "--optimizer torch.optim.RAdam": ("torch.optim.RAdam", {}),
    "--optimizer torch.optim.SGD --weight_decay 0.01 --optimizer_args momentum=0.9 nesterov=True": (
        "torch.optim.SGD",
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "--optimizer torch.optim.SGD --optimizer_args momentum=0.9 fused=True": (
        "torch.optim.SGD",
        {"momentum": 0.9, "fused": True},
    ),
    "--optimizer torch.optim.NAdam --beta2 0.99": ("torch.optim.NAdam", {"betas": (0.9, 0.99)}),
    "--optimizer bitsandbytes.optim.Lion8bit --optimizer_args betas=(0.8,0.9)": (
        "bitsandbytes.optim.Lion8bit",
        {"betas": (0.8, 0.9)},
    ),
    "--optimizer bitsandbytes.optim.AdEMAMix8bit --epsilon 1e-6": ("bitsandbytes.optim.AdEMAMix8bit", {"eps": 1e-6}),
}
TORCHAO: dict[str, tuple[str, dict[str, Any]]] = {
    "--optimizer adamw --use_8bit --use_torchao": ("torchao.optim.AdamW8bit", ADAM),
    "--optimizer adam --use_4bit --use_torchao": ("torchao.optim.Adam4bit", ADAM),
    "--optimizer adamw --use_fp8 --use_torchao": ("torchao.optim.AdamWFp8", ADAM),
}
compiled = pytest.param  # torchao compiles its step, which takes half a minute per case.
PAGED = "--optimizer bitsandbytes.optim.PagedAdamW8bit"
EVERY = [*ON_THE_CPU, *(compiled(command, marks=pytest.mark.slow) for command in TORCHAO)]
EIGHT_BIT = ("--optimizer adam --use_8bit", "--optimizer adamw --use_8bit_adam")  # not of a library
EACH_KIND = [*EVERY, *EIGHT_BIT]


def flags_of(command: str) -> OptimizerFlags:
    options: Any = args.parse(LoraOptions, None, [*lora_flags_without_optimizer(), *command.split()])
    return options.optimizer


def lora_flags_without_optimizer() -> list[str]:
    return ["--pretrained_model_name_or_path", "m", "--data_root", "d"]


def parameters(command: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Parameter]:
    """Returns one parameter for torchao, which compiles its step once for each shape, and several for others."""
    params = all_parameters(dtype, seed)
    return {"down": params["down"]} if command in TORCHAO else params


def engine_of(command: str, params: dict[str, Parameter], norm: float = 0.0, scale: bool = False) -> MasterWeights:
    return make_masters(params, rule_of(flags_of(command)), norm, scale, passes=2)


def library_s(command: str, params: dict[str, Parameter]) -> torch.optim.Optimizer:
    name, arguments = {**ON_THE_CPU, **TORCHAO, PAGED: ("bitsandbytes.optim.PagedAdamW8bit", {})}[command]
    module, _, kind = name.rpartition(".")
    made: torch.optim.Optimizer = getattr(importlib.import_module(module), kind)(params.values(), lr=1.0, **arguments)
    return made


# -- against the libraries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", EVERY)
@pytest.mark.parametrize("norm", [0.0, 5.0])
def test_equals_its_library(command: str, norm: float) -> None:
    """Weights and moments are bit-identical, except for the rounding of clipping: torch multiplies, we divide."""
    ours, theirs = parameters(command), parameters(command)
    engine, reference = engine_of(command, ours, norm), library_s(command, theirs)
    assert isinstance(engine, ResidentWeights)
    assert type(engine.resident.optimizer) is type(reference)
    for step in range(6):
        engine.backward(loss_of(ours, step))
        result = values(engine.step(rate(step)))
        reference.zero_grad()
        loss_of(theirs, step).backward()
        length = torch.nn.utils.clip_grad_norm_(theirs.values(), norm or float("inf"))
        assert result["grad_norm"] == pytest.approx(length.item(), rel=1e-5)
        set_rate(reference, rate(step))
        reference.step()
    for name, start in parameters(command).items():
        moved = (theirs[name] - start).abs().mean()
        assert moved > 0
        if norm:
            assert (ours[name] - theirs[name]).abs().mean() < 1e-3 * moved
        else:
            assert ours[name].equal(theirs[name])
            state = engine.state()
            assert all(state[f"{key}/{name}"].equal(t) for key, t in plain_tensors(reference.state[theirs[name]]))


# -- resuming, and skipping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", EACH_KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit_from_a_safetensors_file(command: str, dtype: torch.dtype, tmp_path: Path) -> None:
    uninterrupted, again = parameters(command, dtype), parameters(command, dtype, seed=1)
    engine, resumed = engine_of(command, uninterrupted, 5.0), engine_of(command, again, 5.0)
    advance(engine, uninterrupted, 0, 4)
    save_file(engine.state(), tmp_path / "state.safetensors")
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    assert state_equal(engine.state(), resumed.state())
    assert kinds(engine) == kinds(resumed)
    advance(engine, uninterrupted, 4, 8)
    advance(resumed, again, 4, 8)
    assert state_equal(engine.state(), resumed.state())
    assert all(uninterrupted[name].equal(again[name]) for name in uninterrupted)
    assert not state_equal(engine.state(), load_file(tmp_path / "state.safetensors"))


def kinds(engine: MasterWeights) -> list[dict[str, type]]:
    """Returns the types of the state of an optimizer."""
    if not isinstance(engine, ResidentWeights):
        return [{name: type(tensor) for name, tensor in engine.state().items()}]
    optimizer = engine.resident.optimizer
    kept = [optimizer.state[master] for master in engine.resident.masters] + optimizer.param_groups
    return [{key: type(value) for key, value in values.items()} for values in kept]


def test_a_run_resumed_before_its_first_step() -> None:
    command = "--optimizer prodigy"
    uninterrupted, again = parameters(command), parameters(command, seed=1)
    engine, resumed = engine_of(command, uninterrupted), engine_of(command, again)
    resumed.load_state(engine.state())
    advance(engine, uninterrupted, 0, 3)
    advance(resumed, again, 0, 3)
    assert state_equal(engine.state(), resumed.state())


def test_prodigy_stores_one_number_for_a_parameter_of_zeros() -> None:
    """Prodigy stores a single number for a parameter that starts as zeros, as half of every LoRA does."""
    started, again = {"up": Parameter(torch.zeros(6, 8))}, {"up": Parameter(torch.ones(6, 8))}
    engine, resumed = engine_of("--optimizer prodigy", started), engine_of("--optimizer prodigy", again)
    engine.backward((started["up"] - 1.0).square().sum())
    engine.step(1.0)
    assert engine.state()["p0/up"].shape == ()
    resumed.load_state(engine.state())
    assert state_equal(engine.state(), resumed.state())


@pytest.mark.parametrize("command", [*EACH_KIND, "--optimizer adamw"])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.fault("numbers: a gradient that is not finite")
def test_a_step_that_is_not_finite_changes_nothing(command: str, first: int) -> None:
    params, undisturbed = parameters(command, torch.bfloat16), parameters(command, torch.bfloat16)
    engine, reference = engine_of(command, params, 5.0), engine_of(command, undisturbed, 5.0)
    advance(engine, params, 0, first)
    advance(reference, undisturbed, 0, first)
    engine.backward(loss_of(params, 0))
    engine.backward(params["down"][5, 5].float() * float("nan"))
    assert values(engine.step(0.1))["skipped"] == 1
    assert all(params[name].equal(undisturbed[name]) for name in params)
    if first:
        assert state_equal(engine.state(), reference.state())
    advance(engine, params, first, first + 3)
    advance(reference, undisturbed, first, first + 3)
    assert state_equal(engine.state(), reference.state())


def test_gradients_are_divided_by_the_loss_scale() -> None:
    command = "--optimizer adamw --use_8bit"
    scaled, plain = parameters(command), parameters(command)
    one, other = engine_of(command, scaled, 5.0, scale=True), engine_of(command, plain, 5.0)
    advance(one, scaled, 0, 4)
    advance(other, plain, 0, 4)
    assert state_equal(one.state(), other.state(), ignore=("loss_scale", "good_steps"))


def test_numbers_keep_every_digit() -> None:
    for number in (1 / 3, 2**53 - 1, True):
        kept = as_tensor(number).item()
        assert (kept, type(kept)) == (number, type(number))


def test_fused_optimizers_never_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other optimizers wait once in each step, to know whether to skip it."""

    def waits(command: str, on_host: bool = False) -> bool:
        params = parameters(command)
        engine = make_masters(params, rule_of(flags_of(command)), 0.0, False, on_host)
        engine.backward(loss_of(params, 0))
        asked = []
        item = torch.Tensor.item
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", lambda tensor: (asked.append(1), item(tensor))[1])
            engine.step(0.1)
        return bool(asked)

    assert [waits(f"--optimizer {rule}") for rule in ("adam", "adamw", "came")] == [False, False, True]
    assert not waits("--optimizer adam", on_host=True)


LARGE = (512, 512)  # bitsandbytes pages out tensors of more than 100,000 elements.


@pytest.mark.gpu
@pytest.mark.parametrize("command", [*EVERY, PAGED])
def test_on_a_gpu(command: str, tmp_path: Path) -> None:
    """The result equals that of the library bit for bit, and a resumed run equals one that was not stopped."""
    start, targets = torch.randn(LARGE, device="cuda"), torch.randn(8, *LARGE, device="cuda")
    ours, again, theirs = ({"down": Parameter(start.clone())} for _ in range(3))
    engine, resumed = engine_of(command, ours), engine_of(command, again)
    reference = library_s(command, theirs)

    def step(number: int, *engines: tuple[MasterWeights, dict[str, Parameter]]) -> None:
        for each, params in engines:
            each.backward((params["down"] - targets[number]).square().sum())
            each.step(rate(number))

    for number in range(8):
        if number == 4:
            save_file(engine.state(), tmp_path / "state.safetensors")
            resumed.load_state(load_file(tmp_path / "state.safetensors"))
        step(number, (engine, ours), *([(resumed, again)] if number >= 4 else []))
        reference.zero_grad()
        (theirs["down"] - targets[number]).square().sum().backward()
        set_rate(reference, rate(number))
        reference.step()
        assert ours["down"].equal(theirs["down"])
    assert again["down"].equal(ours["down"])
    assert state_equal(engine.state(), resumed.state())


# -- state on the host -------------------------------------------------------------------------------------------------

FUSED = "--optimizer torch.optim.AdamW --optimizer_args fused=True amsgrad=True"


@pytest.mark.parametrize(
    ("command", "fused"),
    [
        *((command, False) for command in (*ON_THE_CPU, *TORCHAO, *EIGHT_BIT, "--optimizer torch.optim.AdamW")),
        *((command, True) for command in ("--optimizer adam", "--optimizer adamw", FUSED)),
    ],
)
def test_steps_on_device_agrees_with_is_fused(command: str, fused: bool) -> None:
    """The flags show it before there is any parameter."""
    flags = flags_of(command)
    made = make_optimizer(flags, list(parameters(command).values()))
    assert steps_on_device(flags) == fused
    assert is_fused(made) == (fused or command in EIGHT_BIT)
    can_be_on_the_host = command in ("--optimizer adam", "--optimizer adamw") or command in EIGHT_BIT
    assert bool(list(host_state_problems(flags, deepspeed=False))) == (not can_be_on_the_host)


@pytest.mark.parametrize("command", ["--optimizer came", "--optimizer adam --use_8bit", "--optimizer adamw", ""])
def test_state_that_cannot_be_on_the_host_is_refused_before_anything_is_loaded(command: str) -> None:
    flags = [*lora_flags_without_optimizer(), *command.split(), "--optimizer_state_on"]
    found = [list(check_state_place(args.parse(LoraOptions, None, [*flags, place]))) for place in ("host", "auto")]
    assert [len(problems) for problems in found] == [1 if "came" in command else 0, 0]
    assert check_state_place in TRAINING_CHECKS


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--optimizer adamw", 10),
        ("--optimizer adamw --use_8bit", 4 + 8 / 256),
        ("--optimizer adamw --use_bf16_moments", 6),
        ("--optimizer adamw --use_stochastic_rounding --mixed_precision bf16", 8),
        ("--optimizer adamw --use_8bit --use_stochastic_rounding --mixed_precision bf16", 2 + 8 / 256),
        pytest.param("--optimizer adamw --use_8bit --use_torchao", 6, marks=pytest.mark.long),  # It compiles.
        ("--optimizer came", 8),
        ("--optimizer prodigy --learning_rate 1", 20),
        ("--optimizer torch.optim.SGD", 4),
    ],
)
def test_state_bytes_per_parameter_element(command: str, expected: int) -> None:
    """The number includes what a bf16 weight needs for its fp32 master."""
    assert state_bytes(flags_of(command), torch.bfloat16, torch.device("cpu")) == expected


# -- through the script ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ("--use_8bit",),
        ("--use_bf16_moments", "--use_stochastic_rounding", "--mixed_precision", "bf16"),
        ("--optimizer", "prodigy", "--learning_rate", "1"),
        ("--optimizer", "torch.optim.RAdam"),
    ],
)
@pytest.mark.fault("checkpoints: a run is resumed, with every optimizer")
def test_a_run_that_stopped_ends_with_the_same_lora(
    model: Path, tensors: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    def run(name: str, steps: int) -> dict[str, Any]:
        flags = lora_flags(model, tensors, tmp_path / name, "--load_tensors", "--rank", 64, *more)
        assert train([*flags, "--max_train_steps", str(steps)]) == 0
        return weights(tmp_path / name)

    run("stopped", 2)
    assert equal(run("stopped", 4), run("uninterrupted", 4))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "uninterrupted")
    saved = load_file(tmp_path / "uninterrupted" / "checkpoint-4" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in saved.values()) == ("--use_8bit" in more)


# -- flags -------------------------------------------------------------------------------------------------------------


def problems(*given: object, checks: bool = True) -> tuple[str, ...]:
    argv = [*lora_flags_without_optimizer(), *map(str, given)]
    with pytest.raises(UsageError) as caught:
        args.parse(LoraOptions, None, argv, [check_optimizer] if checks else [])
    return caught.value.problems


@pytest.mark.parametrize(
    ("given", "start", "fix"),
    [
        ("--optimizer adamw --prodigy_decouple", "--prodigy_decouple: has no effect with --optimizer adamw", "prodigy"),
        ("--optimizer adamw --prodigy_beta3 0.9", "--beta3: has no effect with --optimizer adamw", "prodigy or came"),
        ("--optimizer came --epsilon 1e-8", "--epsilon: has no effect with --optimizer came", "adam or adamw or"),
        ("--optimizer prodigy --use_8bit", "--use_8bit: has no effect with --optimizer prodigy", "adam or adamw"),
        ("--optimizer_args a=1", "--optimizer_args: has no effect with --optimizer adam", "a class by its dotted name"),
        ("--use_8bit --use_4bit --use_torchao", "--use_8bit: contradicts --use_4bit", "one of them"),
        ("--use_4bit", "--use_4bit: only torchao has such an optimizer", "--use_torchao"),
        ("--use_8bit --use_bf16_moments", "--use_8bit: contradicts --use_bf16_moments", "one of them"),
        ("--use_bf16_moments --use_fp8", "--use_bf16_moments: contradicts --use_fp8", "one of them"),
        ("--use_stochastic_rounding", "--use_stochastic_rounding: concerns weights in bf16 only", "leave it out"),
        (
            "--use_stochastic_rounding --mixed_precision bf16 --use_8bit --use_torchao",
            "--use_stochastic_rounding: torchao's optimizers do not have this",
            "leave --use_torchao out",
        ),
        ("--use_fp8", "--use_fp8: only torchao has such an optimizer", "--use_torchao"),
        ("--use_torchao", "--use_torchao: chooses the library for low-bit moments", "--use_8bit"),
        (
            "--offload_gradients",
            "--offload_gradients: needs optimizer state in host memory",
            "--use_cpu_offload_optimizer",
        ),
    ],
)
def test_flags_that_contradict_each_other(given: str, start: str, fix: str) -> None:
    (found,) = problems(*given.split(), checks=False)
    assert found.startswith(start)
    assert fix in found.split("; ")[-1]


@pytest.mark.parametrize("launcher", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_torchao_without_low_bits_is_refused_under_every_launcher(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchao has no class of this name."""
    monkeypatch.setenv(launcher, "true")
    assert any(line.startswith("--use_torchao: chooses the library for low-bit") for line in problems("--use_torchao"))


def test_flags_without_effect_that_say_so_are_no_problem() -> None:
    assert not flags_of("--optimizer adamw --prodigy_decouple false --use_8bit false").use_8bit


NOT_LITERAL = "must be key=value with a Python literal, such as 0.9, True, (0.9, 0.99) or 'text'"
UNFIT = {
    "torch.optim.RAdm": ["--optimizer torch.optim.RAdm: is not an optimizer class; nearest: torch.optim.RAdam"],
    "torch.nn.Linear": ["--optimizer torch.nn.Linear: is not an optimizer class"],
    "nowhere.Adam": [
        "--optimizer nowhere.Adam: No module named 'nowhere'; give MODULE.CLASS of an installed package",
    ],
    "torch.optim.SGD --beta1 0.9 --epsilon 1e-6": [
        "--epsilon: torch.optim.SGD has no eps; leave it out",
        "--beta1: torch.optim.SGD has no betas; leave it out",
    ],
    "torch.optim.SGD --optimizer_args momentm=0.9 nesterov=1 dampening lr=1": [
        "--optimizer_args momentm=0.9: no such argument; nearest: momentum",
        "--optimizer_args nesterov=1: takes True or False",
        f"--optimizer_args dampening: {NOT_LITERAL}",
        "--optimizer_args lr=1: the learning rate follows --learning_rate and --lr_scheduler; give those flags",
    ],
    "torch.optim.RAdam --optimizer_args betas=0.9 decoupled_weight_decay=yes eps=True": [
        "--optimizer_args betas=0.9: takes 2 values, such as (0.9, 0.999)",
        f"--optimizer_args decoupled_weight_decay=yes: {NOT_LITERAL}",
        "--optimizer_args eps=True: takes a number",
    ],
    "torch.optim.RAdam --weight_decay 0.1 --beta1 0.5 --optimizer_args weight_decay=1 betas=(0.3,0.4) eps=1e-3 eps=1": [
        "--optimizer_args weight_decay=1: weight_decay is set twice; set it once, here or by its own flag",
        "--optimizer_args betas=(0.3,0.4): betas is set twice; set it once, here or by its own flag",
        "--optimizer_args eps=1: eps is set twice; set it once, here or by its own flag",
    ],
    "torch.optim.RAdam --optimizer_args betas=(0.9,2.0)": [
        "--optimizer torch.optim.RAdam: Invalid beta parameter at index 1: 2.0; see --optimizer_args",
    ],
    "torch.optim.LBFGS": [
        "--optimizer torch.optim.LBFGS: its step needs a closure, which is not supported; give another",
    ],
}


@pytest.mark.parametrize("given", UNFIT)
def test_a_class_that_does_not_fit_is_named(given: str) -> None:
    assert list(problems("--optimizer", *given.split())) == UNFIT[given]


def test_a_class_with_its_library_s_own_values() -> None:
    """Arguments without a given flag have the defaults of the class, and --print_config shows that."""
    flags = flags_of("--optimizer torch.optim.RAdam --beta1 0.8")
    assert (flags.beta1, flags.beta2, flags.epsilon, flags.weight_decay) == (0.8, None, None, None)
    assert optimizer_class(flags) == (torch.optim.RAdam, {"betas": (0.8, 0.999)})
    assert flags_of("--optimizer came").epsilon is None


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problems("--optimizer", "came") == (
        "--optimizer came: needs came_pytorch, which is not installed; pip install came_pytorch",
    )
    (found,) = problems("--use_8bit", "--use_torchao")
    assert found == "--use_torchao: needs torchao, which is not installed; pip install torchao"
    args.parse(LoraOptions, None, lora_flags_without_optimizer(), [check_optimizer])


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (found,) = problems("--use_8bit", "--use_torchao")
    assert found.startswith("--use_torchao: compiles its step")


@pytest.mark.parametrize(("launcher", "variable"), [("DeepSpeed", "USE_DEEPSPEED"), ("FSDP", "USE_FSDP")])
def test_an_optimizer_whose_state_cannot_be_sharded_is_named(
    launcher: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", "true")
    for given in ("--optimizer prodigy", "--optimizer came", "--optimizer torch.optim.RAdam", "--use_8bit"):
        (found,) = problems(*given.split())
        assert found.startswith(f"accelerate launch ({launcher}): {given} needs more than the part of a weight")
    for runs in ("--optimizer adam", "--optimizer adamw"):
        args.parse(LoraOptions, None, [*lora_flags_without_optimizer(), *runs.split()], [check_optimizer])


def test_parameters_that_a_class_does_not_take() -> None:
    with pytest.raises(UsageError, match="Muon only supports 2D"):
        make_optimizer(flags_of("--optimizer torch.optim.Muon"), list(all_parameters().values()))
