"""Tests plans in runs of the scripts: results equal those without a plan, and impossible requests are refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from mappings import shared_mappings
from running import (
    LORA_SCRIPT,
    PROMPT,
    SFT_SCRIPT,
    Forked,
    equal,
    finish,
    fork_ranks,
    frames_of,
    lora_flags,
    losses,
    python,
    safetensors_of,
    sft_flags,
    train,
    train_all,
    train_image,
    weights,
)
from safetensors.torch import load_file
from sizes_of_5b import SFT

from cogvideox.config import args
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import ModelFlags, PlanFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.config.options import LoraOptions, SftOptions, samples_per_step
from cogvideox.errors import UsageError
from cogvideox.memory.shared import Neighbors
from cogvideox.model.models import load_transformer
from cogvideox.planning import choice, costs, execution, plan
from cogvideox.planning.costs import Costs
from cogvideox.planning.plan import FRAGMENTS, GIB, BlockPlan, ExecutionPlan, Machine, NoPlanError, Sizes
from cogvideox.planning.stack import Stack
from cogvideox.runtime.ranks import alone
from cogvideox.runtime.run import Run

Tiny = Callable[[str], Path]
LEAN = ("--plan", "lean")
pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list of the plans that have been used so far."""
    found: list[Any] = []
    install = Stack.install

    def noting(self: Stack) -> None:
        found.append(self.plan)
        install(self)

    monkeypatch.setattr(Stack, "install", noting)
    return found


def run(model: Path, tensors: Path, output: Path, *more: object, script: Callable[[list[str]], int] = train) -> Path:
    assert script(lora_flags(model, tensors, output, "--load_tensors", *more)) == 0
    return output


def verification(output: Path) -> float:
    return json.loads((output / "recipe.json").read_text())["verification"]["max_difference"]


def test_a_run_under_lean_is_complete(
    model: Path,
    tensors: Path,
    reference: Path,
    tmp_path: Path,
    plans: list[Any],
    validated: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = run(model, tensors, tmp_path / "lean", *LEAN, "--validation_prompt", PROMPT)
    assert {(b.weights, b.keep, b.kept) for plan in plans for b in plan.blocks} == {("host", "attention", "host")}
    assert plans[0].state == "host"
    assert losses(output) == pytest.approx(losses(reference), rel=1e-5)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(tensor, weights(reference)[name], rtol=1e-2, atol=1e-4)
    assert verification(output) == 0
    stock = frames_of(output / "inference.py", monkeypatch).numpy()
    assert (
        abs(stock.astype(int) - validated["step-000006"]).max() <= 1
    )  # a plan samples one video at a time, and the reference both at once


@pytest.mark.fault("checkpoints: a checkpoint of a run with another plan")
def test_every_plan_makes_the_same_weights_and_they_resume_each_other(
    model: Path, tensors: Path, tmp_path: Path
) -> None:
    lean = run(model, tensors, tmp_path / "lean", *LEAN)
    fast = run(model, tensors, tmp_path / "fast", "--plan", "fast")
    mixed = tmp_path / "mixed"
    run(model, tensors, mixed, "--plan", "balanced")
    shutil.rmtree(mixed / "checkpoint-6")
    shutil.rmtree(mixed / "checkpoint-4")
    (mixed / "recipe.json").unlink()
    run(model, tensors, mixed, "--weights_on", "host", "--keep", "linear", "--kept_on", "host")
    assert equal(weights(lean), weights(fast))
    assert equal(weights(lean), weights(mixed))
    assert losses(lean) == losses(fast) == losses(mixed)


def test_dropout_masks_are_the_same_with_and_without_a_plan(model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = ("--lora_dropout", 0.5, "--train_batch_size", 2)
    plain = run(model, tensors, tmp_path / "plain", *flags)
    lean = run(model, tensors, tmp_path / "lean", *flags, *LEAN)
    assert losses(lean) == pytest.approx(losses(plain), rel=1e-5)
    for name, tensor in weights(lean).items():
        torch.testing.assert_close(tensor, weights(plain)[name], rtol=1e-2, atol=1e-4)
    assert losses(run(model, tensors, tmp_path / "none", *LEAN, *flags[2:])) != pytest.approx(losses(plain), rel=1e-4)
    assert verification(lean) == 0


def mapped_by(ranks: list[Forked]) -> list[set[str]]:
    """Returns, for each rank, the shared weights that it has mapped, as soon as all have or one has ended."""
    while True:
        found = [shared_mappings(rank.pid) for rank in ranks]
        if all(found) or any(rank.poll() is not None for rank in ranks):
            return found
        time.sleep(0.01)


@pytest.mark.parametrize("precision", ["auto", "nf4"])
def test_processes_of_a_machine_share_streamed_weights(
    precision: str, model: Path, tensors: Path, tmp_path: Path
) -> None:
    flags = ("--load_tensors", *LEAN, "--base_precision", precision, "--gradient_accumulation_steps")
    ranks = fork_ranks(2, python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "two", *flags, 1)))
    first, second = mapped_by(ranks)
    said, _ = [finish(rank) for rank in ranks]
    assert len(first) == 1
    assert first == second
    assert "one copy in host memory for the 2 processes of this machine" in said
    one = run(model, tensors, tmp_path / "one", *flags[1:], 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, weights(one)[name], rtol=1e-2, atol=1e-4)


def test_a_machine_that_cannot_share_weights_says_what_copies_cost(
    model: Path, tensors: Path, tmp_path: Path, plans: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two processes pins all of the streamed weights, of which the plan counts one half."""
    said: list[str] = []
    here = Neighbors(first=0, number=2, own=0, gather=lambda items: items * 2)
    monkeypatch.delattr("cogvideox.memory.shared.os.memfd_create")
    monkeypatch.setattr(execution, "neighbors_of", lambda _: here)
    monkeypatch.setattr(Run, "say", lambda _, line: said.append(line))  # on stderr, as all lines of a run
    monkeypatch.setattr(plan, "GIB", 2**10)
    run(model, tensors, tmp_path / "lora", *LEAN)
    (line,) = (line for line in said if line.startswith("streamed weights"))
    block = load_transformer(ModelFlags(pretrained_model_name_or_path=str(model)), torch.float32).transformer_blocks[0]
    own = len(plans[0].blocks) * sum(parameter.numel() * 4 for parameter in block.parameters())
    assert "each of the 2 processes of this machine has a copy in host memory" in line
    assert float(line.split(" GiB more than planned")[0].split()[-1]) == pytest.approx(
        own / 2 / 2**10, rel=0.05
    )  # aligned


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_leaves_no_shared_weights(killed: int, model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = ("--load_tensors", *LEAN, "--dataloader_num_workers", 1)
    ranks = fork_ranks(2, python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "run", *flags)))
    ((inode,), _) = mapped_by(ranks)
    ranks[killed].send_signal(signal.SIGKILL)
    assert [rank.wait() == 0 for rank in ranks] == [False, False]
    processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    assert not [process for process in processes if inode in shared_mappings(process)]


def test_processes_share_weights_although_each_is_the_first_of_its_launcher(
    model: Path, tensors: Path, tmp_path: Path
) -> None:
    """A launcher may show each process its own GPU only."""
    flags = ("--load_tensors", *LEAN, "--max_train_steps", 1, "--gradient_accumulation_steps", 1)
    command = python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "two", *flags))
    ranks = fork_ranks(2, command, LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    first, second = mapped_by(ranks)
    assert len(first) == 1
    assert first == second
    for rank in ranks:
        finish(rank)


@pytest.mark.parametrize(
    ("machines", "firsts"),
    [("aabb", [0, 0, 2, 2]), ("aaaa", [0] * 4), ("aaabb", [0, 0, 0, 3, 3]), ("aaab", None), ("abab", None)],
)
def test_which_ranks_are_on_the_machine(
    machines: str, firsts: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks find the same, because they share weights or not together."""
    for rank, machine in enumerate(machines):
        monkeypatch.setattr(execution, "machine_id", lambda machine=machine: machine)
        ranks: Any = SimpleNamespace(process_index=rank, gather=lambda own, at=rank: gathered(machines, own, at))
        found = execution.neighbors_of(ranks)
        expected = (firsts[rank], machines.count(machine), rank) if firsts else None
        assert (found and (found.first, found.number, found.own)) == expected


def gathered(machines: str, own: list[str], rank: int) -> list[str]:
    """Returns what all ranks have sent."""
    assert own == [machines[rank]]
    return list(machines)


def test_image_to_video(tiny: Tiny, image_tensors: Path, image: Path, tmp_path: Path, plans: list[Any]) -> None:
    more = ["--validation_prompt", PROMPT, "--validation_images", image, "--max_train_steps", 2]
    output = run(tiny("1.5-5b-i2v"), image_tensors, tmp_path / "run", *LEAN, *more, script=train_image)
    plain = run(tiny("1.5-5b-i2v"), image_tensors, tmp_path / "plain", *more, script=train_image)
    assert len(plans) == 1
    assert losses(output) == pytest.approx(losses(plain), rel=1e-5)
    assert verification(output) == 0


def test_on_a_cpu_nothing_is_planned_unless_asked(
    reference: Path, model: Path, tensors: Path, tmp_path: Path, plans: list[Any]
) -> None:
    output = run(model, tensors, tmp_path / "run", "--gradient_checkpointing")
    assert not plans
    assert losses(output) == pytest.approx(losses(reference), rel=1e-6)


def test_an_optimizer_that_cannot_be_on_the_host_stays_on_the_device(
    model: Path, tensors: Path, tmp_path: Path, plans: list[Any]
) -> None:
    """--plan lean is compatible with such an optimizer; --optimizer_state_on host is not."""
    flags = (*LEAN, "--optimizer", "came", "--max_train_steps", 1)
    run(model, tensors, tmp_path / "run", *flags)
    assert plans[0].state == "device"
    with pytest.raises(UsageError, match=r"--optimizer_state_on host: .*came"):
        run(model, tensors, tmp_path / "other", *flags, "--optimizer_state_on", "host")


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantized_base(
    precision: str,
    model: Path,
    tensors: Path,
    reference: Path,
    tmp_path: Path,
    plans: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training, reloading and comparing use the same quantized base. A run cannot be resumed with another one."""
    flags = (*LEAN, "--base_precision", precision)
    output = run(model, tensors, tmp_path / "lean", *flags, "--validation_prompt", PROMPT)
    assert plans[0].base_precision == precision
    said = re.search(
        rf"base in {precision}: gradients of 2 sample blocks: cosine (.*) to those in float32(; this is low)?",
        capsys.readouterr().err,
    )
    assert said is not None
    assert (float(said[1]) < 0.999) == (said[2] is not None) == (precision == "nf4")
    assert verification(output) == 0
    assert losses(output) != losses(reference)
    assert losses(output) == pytest.approx(losses(reference), rel=1e-2)
    fast = run(model, tensors, tmp_path / "fast", "--plan", "fast", *flags[2:])
    assert equal(weights(output), weights(fast))
    assert set(weights(output)) == set(weights(reference))
    run(model, tensors, tmp_path / "whole", "--plan", "fast", "--max_train_steps", 1)
    assert plans[-1].blocks == plans[-2].blocks
    assert plans[-1].peak > plans[-2].peak
    with pytest.raises(UsageError, match=rf"--base_precision: {precision} there, not set now"):
        run(model, tensors, output, *LEAN, "--max_train_steps", 8)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--base_precision", "nf4", "--use_dora"), "--base_precision nf4: contradicts --use_dora"),
        (("--plan", "lean", "--lora_dropout", "0.1", "--compile_blocks", "yes"), "dropout cannot be compiled"),
        (("--weights_on", "host", "--target_modules", "proj_out"), "--weights_on host: supports only LoRAs"),
        (("--plan", "lean", "--attention_backend", "cudnn"), "--attention_backend cudnn: cudnn needs a GPU"),
        (("--plan", "fast", "--vram_budget", "0.6001"), "--vram_budget"),
        (("--plan", "fast", "--vram_budget", "1", "--rank", "60000"), "the smallest allowed plan needs"),
        (
            ("--plan", "fast", "--vram_budget", "1", "--rank", "60000"),
            "leave out --plan fast, --vram_budget 1.0, or give",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(
    model: Path, tensors: Path, tmp_path: Path, flags: tuple[str, ...], told: str
) -> None:
    with pytest.raises(UsageError, match=r"--") as caught:
        train(lora_flags(model, tensors, tmp_path / "run", "--load_tensors", *flags))
    assert told in str(caught.value)


def test_gradient_checkpointing_keeps_attention_outputs_at_most(
    model: Path, tensors: Path, tmp_path: Path, plans: list[Any]
) -> None:
    run(model, tensors, tmp_path / "kept", "--weights_on", "device", "--max_train_steps", 1)
    run(model, tensors, tmp_path / "not", "--weights_on", "device", "--max_train_steps", 1, "--gradient_checkpointing")
    assert {block.keep for block in plans[0].blocks} <= {"linear", "all"}
    assert {block.keep for block in plans[1].blocks} == {"attention"}


@pytest.mark.parametrize(("variable", "ranks"), [("LOCAL_WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 4), ("WORLD_SIZE", 4)])
def test_processes_share_host_memory_but_not_device_memory(
    variable: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that does not say how many processes are on this machine may have started all of them here."""
    free, available = 50 * GIB, 10 * GIB
    monkeypatch.setenv(variable, str(ranks))
    monkeypatch.setattr(execution, "free_device_bytes", lambda device: float(free))
    monkeypatch.setattr(execution, "with_rates", lambda machine, *_: machine)
    monkeypatch.setattr(execution, "free_host_bytes", lambda: available)
    sizes: Any = None  # the probes are not run in this test
    machine = execution.measure_machine(torch.device("cuda"), torch.bfloat16, "flash", sizes, None)
    assert machine.device_bytes == int(free * FRAGMENTS)
    assert machine.host_bytes == available // ranks


@pytest.mark.parametrize(("given", "planned"), [(None, 50), (8.0, 4), (200.0, 50)])
def test_a_run_plans_with_the_host_memory_that_it_may_use(
    given: float | None, planned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that start at the same time both find the same memory free."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(execution, "measure_machine", lambda *_: Machine(GIB, 50 * GIB))
    run: Any = SimpleNamespace(barrier=lambda: None, device=torch.device("cpu"), dtype=torch.float32, ranks=alone())
    sizes: Any = None  # the probes are not run in this test
    machine = execution.measure_all_ranks(run, "cpu", sizes, PlanFlags(host_memory=given))
    assert machine.host_bytes == planned * GIB


def test_without_a_plan_nothing_limits_host_memory(model: Path, tensors: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--host_memory 8.0: contradicts --plan off; leave one of them out"):
        run(model, tensors, tmp_path / "run", "--max_train_steps", 1, "--host_memory", 8, "--plan", "off")


def test_ranks_plan_for_the_minimum_of_each_figure() -> None:
    """A plan that fits one of two different cards might not fit the other."""
    first, second = Machine(8, 20, copies=3.0), Machine(9, 10, copies=2.0)
    assert execution.minimum_over_ranks([first, second]) == Machine(8, 10, copies=2.0)
    assert execution.minimum_over_ranks([first]) == first


# -- all weights -------------------------------------------------------------------------------------------------------


def run_whole(model: Path, tensors: Path, output: Path, *more: object) -> Path:
    flags = (
        "--load_tensors",
        "--learning_rate",
        "1e-3",
        "--max_grad_norm",
        0.1,
    )  # so low that every gradient is clipped
    assert train_all(sft_flags(model, tensors, output, *flags, *more)) == 0
    return output


def whole(output: Path) -> dict[str, Any]:
    """Returns the tensors of the exported transformer."""
    return safetensors_of(output / "transformer")


def test_all_weights_are_trained_alike_under_every_plan(
    model: Path, tensors: Path, tmp_path: Path, plans: list[Any]
) -> None:
    """Gradients of two passes are summed in fp32 under every plan. Averaging, clipping and resuming are included."""
    more = ("--use_ema", "--max_train_steps", 4, "--validation_prompt", PROMPT)
    off = run_whole(model, tensors, tmp_path / "off", *more)
    assert not plans
    lean = run_whole(model, tensors, tmp_path / "lean", *more, *LEAN)
    assert {(b.weights, b.keep, b.kept) for plan in plans for b in plan.blocks} == {("host", "attention", "host")}
    assert plans[0].state == "host"
    fast = run_whole(model, tensors, tmp_path / "fast", *more, "--plan", "fast")
    mixed = tmp_path / "mixed"
    run_whole(model, tensors, mixed, *more, *LEAN, "--max_train_steps", 2)
    run_whole(model, tensors, mixed, *more, "--plan", "fast", "--optimizer_state_on", "host")
    assert losses(fast) == losses(lean) == losses(mixed)
    assert equal(whole(lean), whole(fast))
    assert equal(whole(lean), whole(mixed))
    assert losses(lean) == pytest.approx(losses(off), rel=1e-4)
    assert verification(lean) == verification(mixed) == 0
    for name, tensor in whole(off).items():
        torch.testing.assert_close(whole(lean)[name], tensor, rtol=1e-2, atol=1e-3)


def test_state_of_some_blocks_stays_on_the_device(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run uses accumulation and an average, and is resumed with its optimizer state on the other device."""
    more = ("--use_ema", *LEAN, "--max_train_steps")
    lean = run_whole(model, tensors, tmp_path / "lean", *more, 4)
    choose = choice.choose_plan

    def here(*arguments: Any) -> Any:
        chosen = choose(*arguments)
        first, *others = chosen.blocks
        return replace(chosen, blocks=(replace(first, state="device"), *others))

    monkeypatch.setattr(choice, "choose_plan", here)
    run_whole(model, tensors, tmp_path / "here", *more, 2)
    monkeypatch.setattr(choice, "choose_plan", choose)
    assert losses(run_whole(model, tensors, tmp_path / "here", *more, 4)) == losses(lean)
    assert equal(whole(tmp_path / "here"), whole(lean))
    assert equal(*(load_file(tmp_path / run / "checkpoint-4" / "optimizer.safetensors") for run in ("here", "lean")))


def test_all_weights_in_bf16(model: Path, tensors: Path, tmp_path: Path) -> None:
    more = ("--mixed_precision", "bf16", "--max_train_steps", 3, "--gradient_accumulation_steps", 1)
    lean, fast = (run_whole(model, tensors, tmp_path / plan, *more, "--plan", plan) for plan in ("lean", "fast"))
    assert equal(whole(lean), whole(fast))
    assert {tensor.dtype for tensor in whole(lean).values()} == {torch.bfloat16}
    states = [load_file(output / "checkpoint-2" / "optimizer.safetensors") for output in (lean, fast)]
    assert equal(*states)


@pytest.mark.long
def test_two_processes_train_all_weights_under_a_plan_as_one_does(model: Path, tensors: Path, tmp_path: Path) -> None:
    more = ("--load_tensors", "--learning_rate", "1e-3", "--plan", "fast", "--gradient_accumulation_steps")
    ranks = fork_ranks(2, python(SFT_SCRIPT, *sft_flags(model, tensors, tmp_path / "two", *more, 1)))
    said = [finish(rank) for rank in ranks]
    assert "plan: 2 blocks eager, 2 on the device" in said[0]
    assert train_all(sft_flags(model, tensors, tmp_path / "one", *more, 2)) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            (*LEAN, "--optimizer", "adamw", "--use_8bit", "--use_torchao"),
            "--plan lean: --use_torchao cannot keep its state in host memory",
        ),
        (("--weights_on", "host", "--optimizer", "came"), "--weights_on host: --optimizer came cannot keep its state"),
        ((*LEAN, "--plan", "off", "--keep", "input"), "--keep input: contradicts --plan off"),
    ],
)
def test_weights_that_cannot_be_trained_on_the_host(
    flags: tuple[str, ...], told: str, model: Path, tensors: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        run_whole(model, tensors, tmp_path / "run", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        (*LEAN, "--weights_on", "device", "--optimizer_state_on", "device", "--optimizer", "came"),
        ("--plan", "fast", "--weights_on", "host"),
        (*LEAN, "--optimizer_state_on", "device"),
    ],
)
def test_a_flag_takes_precedence_over_the_preset(
    flags: tuple[str, ...], model: Path, tensors: Path, tmp_path: Path, plans: list[Any]
) -> None:
    run_whole(model, tensors, tmp_path / "run", "--max_train_steps", 1, *flags)
    weights_on = flags[flags.index("--weights_on") + 1] if "--weights_on" in flags else "host"
    assert {block.weights for block in plans[0].blocks} == {weights_on}
    if weights_on == "device" or "--optimizer_state_on" in flags:
        assert plans[0].state == "device"
    if weights_on == "host":
        assert {block.state for block in plans[0].blocks} == {"device"}


def test_the_error_names_what_stays_on_the_device(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "measure_machine", lambda *_: Machine(1000, 1000))
    found = []
    for flags in ((), ("--optimizer", "came")):
        with pytest.raises(UsageError) as caught:
            run_whole(model, tensors, tmp_path / "run", "--keep", "input", *flags)
        found.append(str(caught.value))
    assert "--rank" not in "".join(found)
    assert "what stays on the device: masters and moments: --optimizer came cannot keep its state" in found[1]
    assert "stays on the device" not in found[0]


@pytest.mark.parametrize(("flags", "names"), [((), False), (("--use_8bit",), True)])
def test_the_error_names_the_flag_with_which_state_is_not_sharded(
    flags: tuple[str, ...], names: bool, model: Path, tensors: Path, tmp_path: Path
) -> None:
    options, sizes = args.parse(SftOptions, None, sft_flags(model, tensors, tmp_path, *flags), ()), SimpleNamespace()
    sizes.samples = 1
    rule = "all weights and their state, which --use_8bit cannot shard; adam and adamw without such a flag can"
    assert (rule in execution._smaller(options, sizes, 2)) == names  # type: ignore[arg-type]
    assert rule not in execution._smaller(options, sizes, 1)  # type: ignore[arg-type]
    assert " or give " not in execution._smaller(options, sizes, 1, resumes=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "dtype", "expected"),
    [
        ((), torch.float32, (8, 0, True)),
        (("--use_ema",), torch.bfloat16, (10, 4, False)),
        (("--use_ema",), torch.float16, (12, 4, False)),
        (("--use_ema", "--use_stochastic_rounding", "--mixed_precision", "bf16"), torch.bfloat16, (8, 4, True)),
        (("--use_8bit",), torch.float32, (2 + 8 / 256, 0, True)),
    ],
)
def test_bytes_of_optimizer_state_per_element(
    flags: tuple[str, ...],
    dtype: torch.dtype,
    expected: tuple[float, int, bool],
    model: Path,
    tensors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    options = args.parse(SftOptions, None, sft_flags(model, tensors, tmp_path, "--optimizer", "adamw", *flags), ())
    transformer = load_transformer(options.model, torch.float32)
    run = SimpleNamespace(device=torch.device("cpu"), dtype=dtype, world=1)
    geometry = read_geometry(options.model)
    sizes = execution.sizes_from_options(run, options, geometry, [Bucket(9, 64, 96)], transformer)  # type: ignore[arg-type]
    assert (sizes.state_bytes, sizes.average_bytes, sizes.average_follows_weight) == expected
    assert sizes.ranks == 2


def test_processes_that_divide_a_sample_count_as_one(model: Path, tensors: Path, tmp_path: Path) -> None:
    """Each of them has a part of the tokens, rounded up, and the global batch is that of the groups."""
    transformer, bucket = load_transformer(ModelFlags(str(model)), torch.float32), Bucket(9, 64, 96)
    run: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, world=6)
    geometry = read_geometry(ModelFlags(str(model)))
    for parallel, samples in ((1, 12), (3, 4)):
        flags = sft_flags(model, tensors, tmp_path, "--sequence_parallel", parallel)
        options = args.parse(SftOptions, None, flags, ())
        sizes = execution.sizes_from_options(run, options, geometry, [bucket], transformer)
        assert (sizes.sequence_parallel, sizes.tokens) == (parallel, -(-geometry.tokens(bucket) // parallel))
        assert samples_per_step(options, 6) == samples


OFFLOADED = ("--use_cpu_offload_optimizer", "--offload_gradients")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--optimizer_state_on", "device"), "--use_cpu_offload_optimizer: contradicts --optimizer_state_on device"),
        (("--weights_on", "device"), "--offload_gradients: contradicts --weights_on device"),
        (("--plan", "off"), "--offload_gradients: contradicts --plan off"),
    ],
)
def test_flags_of_the_optimizer_that_contradict_those_of_the_plan(
    flags: tuple[str, ...], told: str, model: Path, tensors: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{told}; leave one of them out"):
        args.parse(SftOptions, None, sft_flags(model, tensors, tmp_path, *OFFLOADED, *flags), ())


def test_gradients_that_a_run_cannot_send_to_the_host_are_refused(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "obstacle_to_plan", lambda *_: "requires --mixed_precision bf16 on a GPU")
    with pytest.raises(UsageError, match="--offload_gradients: requires --mixed_precision bf16 on a GPU"):
        run_whole(model, tensors, tmp_path / "run", *OFFLOADED)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--offload_gradients: only one GPU can train weights that are stored on the"):
        args.parse(SftOptions, None, sft_flags(model, tensors, tmp_path, *OFFLOADED), ())


def test_a_run_continues_with_its_state_in_another_memory(model: Path, tensors: Path, tmp_path: Path) -> None:
    fast = ("--plan", "fast", "--max_train_steps")
    here = run_whole(model, tensors, tmp_path / "here", *fast, 4)
    run_whole(model, tensors, tmp_path / "moved", *fast, 2)
    moved = run_whole(model, tensors, tmp_path / "moved", *fast, 4, *OFFLOADED)
    assert losses(moved) == losses(here)
    assert equal(whole(moved), whole(here))


def test_a_lora_says_that_its_gradients_are_not_sent_to_the_host(
    model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args.parse(LoraOptions, None, lora_flags(model, tensors, tmp_path, *OFFLOADED), ())
    assert "--offload_gradients: has no effect on a LoRA" in capsys.readouterr().err


def test_weights_are_trained_on_the_host_by_one_process(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = args.parse(SftOptions, None, sft_flags(model, tensors, tmp_path), ())
    assert [execution.axes_of(options, world).weights for world in (1, 2)] == [("device", "host"), ("device",)]
    assert list(execution.host_restrictions(options, 2)) == [
        "weights can be trained on the host only with a single GPU"
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--plan lean: only one GPU can train weights that are stored on the host"):
        args.parse(SftOptions, None, sft_flags(model, tensors, tmp_path, *LEAN), ())


@pytest.mark.parametrize(
    ("wanted", "device", "compiled"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("yes", "cpu", True), ("no", "cuda", False)],
)
def test_blocks_are_compiled_on_a_gpu_except_with_dropout(wanted: str, device: str, compiled: bool) -> None:
    run: Any = SimpleNamespace(device=torch.device(device), compiled=False)
    assert execution.compiles(run, wanted, drops=False) is compiled
    assert not execution.compiles(run, "auto", drops=True)
    with pytest.raises(UsageError, match="--compile_blocks yes: dropout"):
        execution.compiles(run, "yes", drops=True)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "the GPU's memory does not suffice; give --plan",
        ),
        (
            MemoryError("the system does not allow 3.0 GiB more to be pinned"),
            "the host's memory does not suffice: the system",
        ),
    ],
)
@pytest.mark.fault("memory: out of memory in training")
def test_out_of_memory_is_reported(
    error: Exception, told: str, model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("cogvideox.loop.losses_of", fails)
    with pytest.raises(UsageError) as caught:
        train(lora_flags(model, tensors, tmp_path / "run", "--load_tensors"))
    assert str(caught.value).startswith(told)


def test_a_resumed_run_is_not_told_to_change_what_its_checkpoint_has(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank of a LoRA and the buckets are those of the checkpoint, and the samples of a step must stay as many."""
    flags = (model, tensors, tmp_path / "run", "--load_tensors", "--train_batch_size", 2)
    steps = ("--gradient_accumulation_steps", 1, "--plan", "lean")
    assert train(lora_flags(*flags, *steps, "--max_train_steps", 1)) == 0
    with monkeypatch.context() as patched:
        patched.setattr(execution, "measure_machine", lambda *_: Machine(1000, 1000))
        with pytest.raises(UsageError) as unplanned:
            train(lora_flags(*flags, *steps))
    monkeypatch.setattr("cogvideox.loop.losses_of", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(UsageError) as full:
        train(lora_flags(*flags, *steps))
    assert "give a --train_batch_size below 2 with more --gradient_accumulation_steps, or free" in str(unplanned.value)
    assert "a smaller --train_batch_size with more --gradient_accumulation_steps, or a larger" in str(full.value)
    for error in (unplanned, full):
        assert "--rank" not in str(error.value)
        assert "bucket" not in str(error.value)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = FSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}


def chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: int, world: int, env: dict[str, str], *flags: object
) -> ExecutionPlan:
    """Returns the plan for all weights of 5b on some processes with that much device memory each."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    options = args.parse(SftOptions, None, sft_flags(tmp_path, tmp_path, tmp_path, *flags), ())
    run = cast(Any, SimpleNamespace(world=world))
    sizes = replace(SFT, device_gradient_bytes=4 if world > 1 else 2)
    return execution.choose(run, options, sizes, Machine(gib * GIB, 200 * GIB), True, "cudnn")


@pytest.mark.parametrize(
    ("gib", "world", "env", "shards", "state"),
    [
        (110, 4, {}, 1, "device"),  # a copy on each GPU
        (78, 4, {}, 4, "device"),
        (48, 2, {}, 2, "device"),
        (36, 2, {}, 1, "host"),  # shards do not fit, but a copy without optimizer state does
        (110, 4, FSDP, 4, "device"),  # asked for
        (110, 4, HSDP, 2, "device"),
        (16, 4, FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, 4, "device"),
        (78, 1, {}, 1, "host"),
    ],
)
def test_weights_are_sharded_where_a_copy_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: int, world: int, env: dict[str, str], shards: int, state: str
) -> None:
    found = chosen(monkeypatch, tmp_path, gib, world, env)
    assert found.shards == shards
    used = {found.state, *(place for block in found.blocks for place in (block.state, block.weights))}
    assert world == 1 or (plan.HOST in used) == (state == plan.HOST)
    assert found.peak <= gib * GIB
    assert ("sharded over" in str(found)) == (shards > 1)
    offloads = "FSDP_OFFLOAD_PARAMS" in env
    assert (f"sharded over {shards} processes in host memory;" in str(found)) == offloads
    assert shards == 1 or f"optimizer state on the {plan.HOST if offloads else plan.DEVICE}" in str(found)


@pytest.mark.parametrize(
    "flags",
    [("--plan", "fast"), ("--optimizer", "prodigy"), ("--optimizer_state_on", "device")],
    ids=lambda flags: flags[0],
)
def test_weights_are_sharded_only_if_no_flag_asks_for_something_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    with pytest.raises(NoPlanError):
        chosen(monkeypatch, tmp_path, 78, 4, {}, *flags)


def test_offloaded_shards_that_do_not_fit_on_the_host_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(NoPlanError, match="host memory"):
        chosen(monkeypatch, tmp_path, 8, 2, FSDP | {"FSDP_OFFLOAD_PARAMS": "true"})


@pytest.mark.parametrize(
    ("world", "environment"), [(4, {}), (1, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"})]
)
def test_under_zero_2_each_process_has_all_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: int, environment: dict[str, str]
) -> None:
    """On one process with offloading, the device has no optimizer state."""
    found = chosen(monkeypatch, tmp_path, 78, world, {"ACCELERATE_USE_DEEPSPEED": "true"} | environment)
    assert (found.shards, found.deepspeed, found.sharded) == (world, True, False)
    assert "42 on the device" in str(found)
    assert f"optimizer state sharded by DeepSpeed on the {plan.HOST if environment else plan.DEVICE}" in str(found)
    assert found.peak <= 78 * GIB
    with pytest.raises(NoPlanError):
        chosen(monkeypatch, tmp_path, 24 if world == 4 else 10, world, {})


def test_the_peak_of_the_last_process_under_zero_2() -> None:
    """5b on four H100 with cuDNN's attention.

    The first process peaked at 63.86 GiB when backward starts. The peak of the last process, which was not measured, is
    at the first full bucket: 5.2 GiB of fp32 gradients and 3.7 GiB of buckets, without the activations of four blocks.
    """
    sizes = replace(SFT, state_bytes=12, shards=4, deepspeed=True, units_kept=(1, 2, 12, 20))
    linear = {BlockPlan(keep="linear"): 27, BlockPlan(keep="linear", kept=plan.HOST): 15}
    assert Costs(linear, plan.DEVICE, True, sizes).peak_bytes / GIB == pytest.approx(67.8, rel=0.005)


WHOLE_2B = Sizes(  # all weights of CogVideoX-2b, 49x480x720
    blocks=30,
    block_bytes=112_166_912,
    rest_bytes=273_039_360,  # positions, in fp64
    trained=11_337_792,
    item_bytes=2,
    samples=1,
    tokens=17776,
    width=1920,
    heads=30,
    units_kept=(1, 2, 12, 20),
    state_bytes=12,
    block_trained=56_081_536,
    deepspeed=True,
)


def test_the_peak_measured_under_zero_2_with_the_optimizer_on_the_host() -> None:
    """2b on one H200: the first bucket is full, and the fp32 gradients of all weights are on the GPU."""
    sizes, attention = replace(WHOLE_2B, shards_on_host=True), {BlockPlan(keep="attention"): 30}
    summed = Costs(attention, plan.DEVICE, True, replace(sizes, passes=2)).peak_bytes / GIB
    assert summed == pytest.approx(16.34, rel=0.005)
    # Gradients of one pass are not summed, so that they go to the host at once.
    assert Costs(attention, plan.DEVICE, True, sizes).peak_bytes / GIB == pytest.approx(9.52, rel=0.02)


def test_of_large_clips_a_block_needs_more_than_the_copies_of_the_first_full_bucket_of_zero_2() -> None:
    """Then 21 of 30 blocks are left."""
    attention = {BlockPlan(keep="attention"): 30}
    peaks = [Costs(attention, plan.DEVICE, True, replace(WHOLE_2B, tokens=n * 17776)).peak_bytes for n in (4, 5)]
    units = 2 * 21 + costs.TRAINED_UNITS[True]["attention"][0] + costs.ENDS_UNITS
    assert peaks[1] - peaks[0] == pytest.approx(units * WHOLE_2B.unit_bytes + 21 * 4 * 17776 * 30, rel=0.001)


def test_the_peak_measured_under_zero_2_on_two_gpus() -> None:
    """2b on two H200 that keep all activations: when backward starts."""
    sizes, everything = replace(WHOLE_2B, shards=2), {BlockPlan(keep="all"): 30}
    assert Costs(everything, plan.DEVICE, True, sizes).peak_bytes / GIB == pytest.approx(52.80, rel=0.005)


def test_a_small_model_needs_a_small_bucket_under_zero_2() -> None:
    tiny = replace(WHOLE_2B, blocks=1, block_bytes=20, block_trained=10, rest_bytes=0, trained=5, tokens=1, width=1)
    assert Costs({BlockPlan(): 1}, plan.DEVICE, True, tiny).peak_bytes < 1000
