"""ema.py: the average equals that of diffusers' EMAModel, and a run validates and exports the average."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from fakes import options_of
from running import PROMPT, equal, lora_flags, losses, sft_flags, train, train_all, weights
from safetensors.torch import load_file
from torch.nn import Parameter

from cogvideox.errors import UsageError
from cogvideox.evaluation.held_out import HeldOut
from cogvideox.optimizer.adam import Adam, split
from cogvideox.optimizer.adam_groups import Group, Masters
from cogvideox.optimizer.ema import STEPS_NAME, Ema
from cogvideox.optimizer.engine import EMA_NAME
from cogvideox.optimizer.rule import make_masters
from cogvideox.runtime.checkpoint_files import damage_of

SHAPES = {"down": (8, 5), "up": (6, 8), "bias": (7,)}
YES, NO = torch.ones(()), torch.zeros(())
EMA = ("--load_tensors", "--use_ema", "--ema_decay", 0.5)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def masters_of(params: dict[str, Parameter]) -> dict[str, Parameter]:
    """Returns masters as MasterWeights has them: an fp32 parameter is its own master."""
    return {n: p if p.dtype == torch.float32 else Parameter(p.detach().float()) for n, p in params.items()}


@torch.no_grad()
def move(params: dict[str, Parameter], masters: dict[str, Parameter], step: int) -> None:
    """Changes the masters as an optimizer step would, and rounds them into the model."""
    generator = torch.Generator().manual_seed(step)
    for name, master in masters.items():
        master += 0.1 * torch.randn(master.shape, generator=generator)
        params[name].copy_(master)


def trained(dtype: torch.dtype, steps: int, decay: float = 0.9) -> tuple[Ema, dict[str, Parameter]]:
    params = parameters(dtype)
    ema = Ema(params, masters_of(params), decay)
    for step in range(steps):
        move(params, ema.masters, step)
        ema.update(NO)
    return ema, params


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_the_average_is_diffusers(decay: float) -> None:
    """The warm-up reaches a decay of 0.5 after 8 steps, and 0.9999 never."""
    params = parameters()
    ema, theirs = Ema(params, masters_of(params), decay), EMAModel(params.values(), decay)
    for step in range(20):
        move(params, ema.masters, step)
        ema.update(NO)
        theirs.step(params.values())
        for ours, reference in zip(ema.averages.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    if decay:
        assert not ema.averages["up"].equal(params["up"])


def test_the_warm_up_follows_the_formula_of_the_module() -> None:
    """The weight is the number of the step, so the average can be computed by hand."""
    weight = {"w": Parameter(torch.zeros(()))}
    ema, expected = Ema(weight, weight, 0.3), 0.0
    for step in range(1, 8):
        weight["w"].data.fill_(float(step))
        ema.update(NO)
        decay = min(0.3, step / (9 + step)) if step > 1 else 0.0  # n = step - 1
        expected = decay * expected + (1 - decay) * step
        assert ema.averages["w"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_nothing(dtype: torch.dtype) -> None:
    plain, _ = trained(dtype, 6)
    params = parameters(dtype)
    ema = Ema(params, masters_of(params), 0.9)
    ema.update(YES)
    for step in range(6):
        move(params, ema.masters, step)
        ema.update(NO)
        ema.update(YES)
    assert equal(ema.state(), plain.state())
    assert ema.steps == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_has_the_average_in_the_context_and_its_weights_after(dtype: torch.dtype) -> None:
    ema, params = trained(dtype, 5)
    before = {name: p.detach().clone() for name, p in params.items()}
    averages, addresses = ema.state(), {name: p.data_ptr() for name, p in params.items()}
    masters = {name: m.detach().clone() for name, m in ema.masters.items()}
    with suppress(KeyError), ema.applied():
        for name, parameter in params.items():
            assert parameter.dtype == dtype
            assert parameter.equal(averages[f"average/{name}"].to(dtype))
            assert not parameter.equal(before[name])
        raise KeyError  # The weights are restored after an error too.
    assert equal(dict(params), before)
    assert equal(dict(ema.masters), masters)
    assert equal(ema.state(), averages)
    assert {name: p.data_ptr() for name, p in params.items()} == addresses
    assert all(average.dtype == torch.float32 for average in ema.averages.values())


def stored(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a master as the model stores it; torch rounds it to another number if two are equally near."""
    return split(master)[0] if dtype == torch.bfloat16 else master.to(dtype, copy=True)


@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)],
)
def test_evaluations_change_no_bit_of_averages_and_weights(dtype: torch.dtype, masters: bool) -> None:
    """Weights without masters cannot hold all bits of an average."""
    found = []
    for evaluates in (False, True):
        params = parameters(dtype)
        weights = make_masters(params, Adam(0.9, 0.95, 1e-8, 0.01, True, masters=masters), 0.0, False)
        ema = Ema(params, weights.named_masters(), 0.999)
        for _ in range(20):
            weights.backward(sum((p.float() - 1).square().mean() for p in params.values()))
            ema.update(weights.step(1e-2).skipped)
            rounded = {name: stored(average, dtype) for name, average in ema.averages.items()}
            if evaluates:
                with ema.applied():
                    assert equal(dict(params), rounded)
        found.append(ema.state() | weights.state())
    assert equal(*found)


def test_a_small_share_is_not_lost_to_bf16() -> None:
    params = parameters(torch.bfloat16)
    ema = Ema(params, masters_of(params), 0.9999)
    ema.steps.fill_(1e6)
    before = ema.averages["up"].clone()
    move(params, ema.masters, 0)
    ema.update(NO)
    torch.testing.assert_close(ema.averages["up"] - before, 1e-4 * (ema.masters["up"] - before), rtol=1e-2, atol=1e-7)


def test_a_loaded_average_continues_bit_for_bit() -> None:
    reference, params = trained(torch.bfloat16, 4)
    again, _ = trained(torch.bfloat16, 1)
    again.load_state(reference.state())
    again.masters = reference.masters
    for step in range(4, 8):
        move(params, reference.masters, step)
        reference.update(NO)
        again.update(NO)
    assert equal(reference.state(), again.state())
    assert reference.state()[STEPS_NAME] == 8


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run of six steps with an average and a video. Tests must not change it."""
    output = tmp_path_factory.mktemp("averaged") / "lora"
    assert train(lora_flags(model, tensors, output, *EMA, "--validation_prompt", PROMPT)) == 0
    return output


def exported(average: dict[str, Any]) -> dict[str, Any]:
    """Returns the averages with the names and the scale of the LoRA's file: B is multiplied by alpha / rank = 8 / 4."""
    named = {n.removeprefix("average/").replace(".default", ""): t for n, t in average.items() if n != STEPS_NAME}
    return {f"transformer.{name}": 2 * tensor if "lora_B" in name else tensor for name, tensor in named.items()}


def test_the_average_is_exported_and_the_training_is_the_same(averaged: Path, reference: Path) -> None:
    checkpoint = averaged / "checkpoint-6"
    assert damage_of(checkpoint) is None
    assert equal(weights(averaged), exported(load_file(checkpoint / EMA_NAME)))
    assert equal(weights(averaged), weights(checkpoint))  # The checkpoint has the result so far.
    assert losses(averaged) == losses(reference)
    state = "optimizer.safetensors"
    assert equal(load_file(checkpoint / state), load_file(reference / "checkpoint-6" / state))
    assert not equal(weights(averaged), weights(reference))


def test_validation_uses_the_average(averaged: Path, reference: Path) -> None:
    def videos(output: Path, step: int) -> list[bytes]:
        return [path.read_bytes() for path in sorted((output / "validation").glob(f"step-{step:06d}*.mp4"))]

    assert len(videos(averaged, 6)) == 1
    assert videos(averaged, 0) == videos(reference, 0)  # Nothing is trained yet.
    assert videos(averaged, 6) != videos(reference, 6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_exports_the_same(model: Path, tensors: Path, tmp_path: Path, precision: str) -> None:
    more = (*EMA, "--mixed_precision", precision)
    assert train(lora_flags(model, tensors, tmp_path / "uninterrupted", *more)) == 0
    resumed = lora_flags(model, tensors, tmp_path / "resumed", *more)
    assert train([*resumed, "--max_train_steps", "3"]) == 0
    assert train(resumed) == 0
    assert equal(weights(tmp_path / "resumed"), weights(tmp_path / "uninterrupted"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "uninterrupted")


def test_all_weights_are_averaged_too(model: Path, tensors: Path, tmp_path: Path) -> None:
    more = (*EMA, "--learning_rate", "1e-3", "--max_train_steps", 3, "--mixed_precision", "bf16")
    assert train_all(sft_flags(model, tensors, tmp_path, *more)) == 0
    saved = load_file(next((tmp_path / "transformer").glob("*.safetensors")))
    average = load_file(tmp_path / "checkpoint-3" / EMA_NAME)
    assert all(saved[name].equal(split(average[f"average/{name}"])[0]) for name in saved)
    masters = load_file(tmp_path / "checkpoint-3" / "optimizer.safetensors")
    assert any(not saved[name].equal(masters[f"master/{name}"].bfloat16()) for name in saved)


def test_the_held_out_loss_is_measured_on_the_average(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, dict[str, Any]] = {}

    def look(self: HeldOut, step: int) -> None:
        seen[step] = {n: p.detach().clone() for n, p in self.transformer.named_parameters() if p.requires_grad}

    monkeypatch.setattr(HeldOut, "__bool__", lambda self: True)
    monkeypatch.setattr(HeldOut, "measure", look)
    assert train(lora_flags(model, tensors, tmp_path, *EMA, "--max_train_steps", 4)) == 0
    for step in (2, 4):
        average = load_file(tmp_path / f"checkpoint-{step}" / EMA_NAME)
        assert equal(seen[step], {name: average[f"average/{name}"] for name in seen[step]})


def test_another_decay_is_another_run(model: Path, tensors: Path, averaged: Path) -> None:
    with pytest.raises(UsageError, match=r"--ema_decay: 0\.5 there, 0\.6 now"):
        train(lora_flags(model, tensors, averaged, *EMA, "--ema_decay", 0.6))


def test_off_by_default() -> None:
    assert not options_of(Path("x")).loss.use_ema


def test_the_average_of_weights_without_masters_is_where_the_weights_are() -> None:
    """Also if their moments are on the host. Here the meta device stands for a GPU."""
    device = torch.device("meta")
    params = {"weight": Parameter(torch.zeros(16, 16, dtype=torch.bfloat16, device=device))}
    adam = Adam(0.9, 0.999, 1e-8, 0.0, decoupled=True, masters=False)
    group = Group(params, adam, device, state_on_host=True)
    assert {array.device.type for array in group.arrays.values()} == {"cpu"}
    assert Ema(params, Masters({"weight": group}), 0.5).averages["weight"].device == device
    assert adam.weight_is_master(torch.bfloat16)
