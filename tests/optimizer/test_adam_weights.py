"""adam_weights.py, adam_groups.py: state on the host gives the same bits as on the device, and the same checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import late_streams
import pytest
import torch
from stepping import ADAM_CLASSES, SHAPES, loss_of, parameters, rate, state_equal, train
from torch.nn import Parameter

from cogvideox.config.flags import OptimizerFlags
from cogvideox.memory.streaming import STAGES
from cogvideox.optimizer import adam_groups
from cogvideox.optimizer import step as step_module
from cogvideox.optimizer.adam import MOMENTS, Adam, is_compiled, read_moments, update, update_on
from cogvideox.optimizer.ema import Ema
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.rule import make_masters, rule_of

SMALL = 12 * 512  # bytes of a range
RANGES = {"many": SMALL, "few": 8 * 2500, "one": 64 * 2**20}  # bytes of a range, by the number of ranges
FLAGS = OptimizerFlags(weight_decay=0.01)


def pair(
    dtype: torch.dtype, device: str = "cpu", rule: str = "adamw", shapes: dict[str, tuple[int, ...]] = SHAPES
) -> list[tuple[MasterWeights, dict[str, Parameter]]]:
    """Returns the same weights twice: with masters on the device, and with masters on the host."""
    flags = OptimizerFlags(optimizer=rule, weight_decay=0.01)
    made = []
    for on_host in (False, True):
        start = parameters(dtype, shapes=shapes)
        params = {name: Parameter(p.detach().to(device)) for name, p in start.items()}
        scale = dtype == torch.float16
        engine = make_masters(params, rule_of(flags), 5.0, scale, state_on_host=on_host, passes=2)
        made.append((engine, params))
    return made


def eventful_step(engine: MasterWeights, params: dict[str, Parameter], step: int) -> torch.Tensor:
    """Makes a step of two micro-batches. Gradients of steps 6 and 7 are not finite; every third norm is not clipped."""
    for part in range(2):
        engine.backward(loss_of(params, 2 * step + part) * (1e-3 if step % 3 == 0 else 0.5))
    if step in (6, 7):
        engine.backward(params["bias"][3].float() * float("inf" if step == 6 else "nan"))
    return engine.step(rate(step)).values


def assert_alike(resident: tuple[MasterWeights, Any], hosted: tuple[MasterWeights, Any]) -> None:
    assert state_equal(resident[0].state(), hosted[0].state())
    assert all(p.equal(hosted[1][name]) and p.device == hosted[1][name].device for name, p in resident[1].items())


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("rule", ADAM_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_host_is_the_same_bit_for_bit(
    dtype: torch.dtype, rule: str, ranges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps include clipped, unclipped and skipped ones, and with fp16 a loss scale that changes."""
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", RANGES[ranges])
    monkeypatch.setattr(step_module, "GROWTH_INTERVAL", 5)
    resident, hosted = pair(dtype, rule=rule)
    count = len(hosted[0].passing[0]._ranges)
    assert count > STAGES if ranges == "many" else count == 1 if ranges == "one" else 1 < count <= STAGES
    norms, skipped, scales = [], [], []
    for step in range(20):
        wanted, found = eventful_step(*resident, step), eventful_step(*hosted, step)
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0, equal_nan=True)
        assert_alike(resident, hosted)
        norms.append(wanted[1].item())
        skipped += [step] if wanted[2] else []
        scales.append(hosted[0].scale.value.item())
    assert min(norms) < 5.0 < max(n for n in norms if n < float("inf"))
    assert skipped == [6, 7] if dtype != torch.float16 else {6, 7} < set(skipped)  # The first scale is too large.
    assert len(set(scales)) == 1 if dtype != torch.float16 else sorted(scales, reverse=True) != scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_differ_by_rounding_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, torch rounds the remainder of a vector loop differently than the full vectors before it."""
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", SMALL)
    resident, hosted = pair(dtype, shapes={"odd": (37, 31), "one": (1,), "bias": (7,)})
    for engine, params in (resident, hosted):
        for step in range(4):
            engine.backward(torch.stack([(p.float() - step).square().sum() for p in params.values()]).sum())
            engine.step(rate(step))
    for name, master in resident[0].named_masters().items():
        torch.testing.assert_close(hosted[0].named_masters()[name], master, rtol=1e-6, atol=1e-6, check_device=False)
        assert hosted[1][name].equal(hosted[0].named_masters()[name].to(dtype))


def test_a_range_is_in_host_memory_between_steps_and_on_the_device_during_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few slots on the device serve all ranges, and each update sees the state in one of them."""
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", SMALL)
    (_, (engine, params)) = pair(torch.bfloat16)
    (hosted,) = engine.passing
    homes = {key: array.data_ptr() for key, array in hosted.arrays.items()}
    assert homes.keys() == {"low", "exp_avg", "exp_avg_sq"}
    seen: list[int] = []
    update = adam_groups.update_on

    def watched(device: str, settings: Adam) -> Any:
        def call(weight: Any, gradient: Any, state: dict[str, torch.Tensor], scalars: Any) -> None:
            assert state.keys() == homes.keys()
            # torch.compile refuses to change tensors of several types in one memory.
            assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
            seen.append(state["low"].data_ptr())
            update(device, settings)(weight, gradient, state, scalars)

        return call

    monkeypatch.setattr(adam_groups, "update_on", watched)
    train(engine, params, 0, 1)
    assert len(seen) == len(hosted._ranges) > STAGES
    assert seen == (seen[:STAGES] * len(seen))[: len(seen)]
    assert len(set(seen)) == STAGES
    assert {key: array.data_ptr() for key, array in hosted.arrays.items()} == homes
    state = engine.state()
    for name, start in hosted.starts.items():
        for key in ("exp_avg", "exp_avg_sq"):
            array = hosted.arrays[key]
            assert array[start : start + params[name].numel()].equal(state[f"{key}/{name}"].flatten())


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.fault("memory: copies to and from the device that are late")
def test_late_copies_change_nothing(ranges: str, seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated streams delay each copy until something waits for it, so a missing wait would change the numbers."""
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", RANGES[ranges])
    late_streams.use(monkeypatch, seed)
    resident, hosted = pair(torch.bfloat16)
    for step in range(4):
        for engine, params in (resident, hosted):
            engine.backward(torch.stack([(p.float() - step).square().sum() for p in params.values()]).sum())
            engine.step(rate(step))
        assert_alike(resident, hosted)


@pytest.mark.parametrize("name", ["into", "work", "out"])
def test_a_missing_wait_of_the_transfers_changes_the_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transfers wait for copies to the device, for the update, and for copies to the host."""
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", SMALL)
    late_streams.use(monkeypatch, None)
    resident, hosted = pair(torch.bfloat16)
    transfers = hosted[0].transfers
    assert transfers is not None
    monkeypatch.setattr(getattr(transfers, name), "record_event", lambda: None)
    for engine, params in (resident, hosted):
        train(engine, params, 0, 2)
    with pytest.raises(AssertionError):
        assert_alike(resident, hosted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("steps", [0, 5])
def test_either_placement_resumes_from_the_state_of_the_other(
    dtype: torch.dtype, first: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", SMALL)
    (source, reference), (target, again) = pair(dtype)[:: -1 if first else 1]
    train(target, again, 40, 42)  # Loading must overwrite this state.
    train(source, reference, 0, steps)
    target.load_state(source.state())
    assert_alike((source, reference), (target, again))
    train(source, reference, steps, steps + 5)
    train(target, again, steps, steps + 5)
    assert_alike((source, reference), (target, again))


def test_the_average_is_the_same_with_masters_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", SMALL)
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        for engine, params in pair(dtype):
            ema = Ema(params, engine.named_masters(), 0.5)
            before = ema.state()
            for step in range(8):
                ema.update(eventful_step(engine, params, step)[2])
            with ema.applied():
                applied = {name: p.detach().clone() for name, p in params.items()}
            states.append({**ema.state(), **engine.state(), **applied})
            assert not state_equal(before, ema.state())
    assert state_equal(states[0], states[1])
    assert state_equal(states[2], states[3])


def test_masters_and_moments_are_written_before_they_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning creates the pages of an empty buffer one after another, which takes longer than writing to them."""
    pinned: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", SMALL)
    monkeypatch.setattr(adam_groups, "pin", lambda array: pinned.update({array.data_ptr(): array.clone()}))
    engine = pair(torch.float16)[1][0]
    (group,) = engine.passing
    assert len(group._ranges) > 1
    assert pinned.keys() == {array.data_ptr() for array in group.arrays.values()}
    assert all(array.equal(pinned[array.data_ptr()]) for array in group.arrays.values())
    assert group.arrays["master"].any()


BIG = {
    "first": (700, 1000),
    "second": (900, 1000),
    "bias": (7,),
    "last": (1100, 1000),
}  # 6 to 9 MB of state each, or more


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ADAM_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.fault("memory: master weights in host memory, compared with those on the GPU")
def test_on_a_gpu_the_host_never_waits_and_the_numbers_are_the_same(
    dtype: torch.dtype, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are so large that a copy without a wait would not have finished yet."""
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", 6 * 2**20)
    resident, hosted = pair(dtype, "cuda", rule, BIG)
    assert len(hosted[0].passing[0]._ranges) > 2
    assert all(array.device.type == "cpu" for array in hosted[0].passing[0].arrays.values())
    for step in range(20):
        results = []
        for engine, params in (resident, hosted):
            for name, parameter in params.items():
                bad = float("inf") if step == 6 and name == "bias" else 1.0
                engine.backward((parameter.float() * bad - step).square().mean() * (1e-3 if step % 3 else 1.0))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # The first step compiles, which waits.
            try:
                results.append(engine.step(rate(step)).values)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(*results, rtol=0.0, atol=0.0, equal_nan=True)
        # fp16 overflows until its scale is low enough.
        assert results[0][2].item() == (step == 6) or (dtype == torch.float16 and step != 6)
        for name, parameter in resident[1].items():
            assert parameter.equal(hosted[1][name])
        if step % 5 == 4:
            assert_alike(resident, hosted)
    again = pair(dtype, "cuda", rule, BIG)
    again[0][0].load_state(hosted[0].state())
    again[1][0].load_state(resident[0].state())
    assert_alike(*again)
    assert_alike(resident, again[1])


@pytest.mark.gpu
@pytest.mark.fault("memory: master weights in host memory, compared with those on the GPU")
def test_on_a_gpu_the_device_holds_three_ranges_and_only_during_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_groups, "RANGE_BYTES", 12 * 2**20)
    params = {str(number): Parameter(torch.randn(1000, 1000, device="cuda")) for number in range(16)}
    bare = torch.cuda.memory_allocated()
    engine = make_masters(params, rule_of(FLAGS), 0.0, False, state_on_host=True)
    assert torch.cuda.memory_allocated() - bare < 1.05 * sum(p.nbytes for p in params.values())
    engine.step(0.1)  # The first step compiles the update, for which torch tries it on memory of its own.
    engine.wait()  # As before a backward pass, which frees the ranges too.
    rest = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine.step(0.1)
    engine.wait()
    assert 2.9 * 12 * 2**20 < torch.cuda.max_memory_allocated() - rest < 3.3 * 12 * 2**20
    assert torch.cuda.memory_allocated() - rest < 10**4


def test_without_triton_an_update_on_a_gpu_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert [is_compiled(device) for device in ("cpu", "cuda")] == [False, True]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not is_compiled("cuda")
    assert update_on.__wrapped__("cuda", Adam(0.9, 0.99, 1e-8, 0.0, decoupled=True)).func is update  # type: ignore[attr-defined]


@pytest.mark.parametrize("moments", MOMENTS)
def test_moments_of_bitsandbytes_are_loaded(moments: str) -> None:
    """Checkpoints of earlier versions have them. Those of large tensors have 8 bits, those of small ones 32."""
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.optim import AdamW8bit

    shapes = {"large": (70, 77), "small": (6, 8)}
    first = parameters(torch.bfloat16, shapes=shapes)
    then = make_masters(first, partial(AdamW8bit, lr=1.0), 0.0, False)
    for step in range(3):
        then.backward(torch.stack([(p.float() - step).square().sum() for p in first.values()]).sum())
        then.step(rate(step))
    state = then.state()
    assert state["state1/large"].dtype == torch.uint8
    assert state["state1/small"].dtype == torch.float32
    params = parameters(torch.bfloat16, seed=1, shapes=shapes)
    now = make_masters(params, Adam(0.9, 0.999, 1e-8, 0.0, decoupled=True, moments=moments), 0.0, False)
    now.load_state(state)
    assert now.steps == 3
    assert all(now.named_masters()[name].equal(state[f"master/{name}"]) for name in shapes)
    for name, group in now.owners.items():
        _, kept = group._of(name)
        for number, moment in enumerate(read_moments(kept), start=1):
            right = state[f"state{number}/{name}"]
            if name == "large":
                scales, table = (state[f"{part}{number}/{name}"] for part in ("absmax", "qmap"))
                right = dequantize_blockwise(right, absmax=scales, code=table, blocksize=256)
            found = moment.flatten()[: right.numel()].view(right.shape)
            share = {"fp32": 0.0, "bf16": 2**-7, "8bit": 8 / 255}[moments]  # the largest error, of the largest value
            torch.testing.assert_close(found, right, rtol=0.0, atol=share * right.abs().max().item())
