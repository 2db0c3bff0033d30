"""Compares a transformer under an execution plan with that of diffusers: outputs, samples and gradients.

Side streams are simulated on a CPU: late_streams.py delays their work, and stream_races.py finds missing waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from typing import Any

import late_streams
import pytest
import stream_races
import torch
from peft import LoraConfig
from tiny_transformers import TARGETS, arguments_of, make_trainable, make_with_lora
from torch import Tensor

from cogvideox.memory import streaming
from cogvideox.memory.buffers import Layout
from cogvideox.memory.graphs import MAX_GRAPHS
from cogvideox.memory.shared import Neighbors
from cogvideox.memory.streaming import HostGradients, TrainedBlocks
from cogvideox.model import blocks, quant
from cogvideox.model.quant import dequantize, quantize
from cogvideox.optimizer.adam import Adam
from cogvideox.optimizer.rule import make_masters
from cogvideox.planning import stack as stack_module
from cogvideox.planning.plan import AUTO, DEVICE, HOST, LEVELS, UNITS_KEPT, BlockPlan, ExecutionPlan
from cogvideox.planning.stack import (
    Stack,
    base_bytes,
    base_parameters,
    block_weights,
    gradient_cosine,
    plain_lora,
    quantization_kinds,
    unquantized_matrix_bytes,
)

CPU = torch.device("cpu")
MIXED = (BlockPlan(DEVICE, "linear", DEVICE), BlockPlan(HOST, "attention", HOST))
pytestmark = pytest.mark.usefixtures("small")


def outcome(transformer: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the output, a sample computed without gradients, and the gradients of all trained parameters."""
    output = transformer(**arguments)[0]
    with torch.no_grad():
        sample = transformer(**arguments)[0]
    output.square().mean().backward()
    gradients = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    for parameter in transformer.parameters():
        parameter.grad = None
    stack = getattr(transformer.transformer_blocks[0].forward, "__self__", None)
    if isinstance(stack, Stack) and stack.trained_blocks and stack.ring:
        names = {id(p): name for name, p in transformer.named_parameters()}
        for i, parameters in stack.trained_blocks.parameters.items():
            if not stack.trained_blocks.on_host(i):
                continue
            sums = of_host(stack.trained_blocks, i)
            gradients |= {names[id(p)]: g.clone() for p, g in zip(parameters, sums, strict=True)}
    return {"output": output.detach(), "sample": sample, **gradients}


def of_host(trained: TrainedBlocks, block: int) -> list[Tensor]:
    """Returns the gradients of a block, as views of the host buffer."""
    return Layout(trained.parameters[block]).views_of(trained.gradients.flat(block))


def installed(
    transformer: Any,
    kinds: tuple[BlockPlan, ...],
    compiled: bool = False,
    backend: str = "cpu",
    device: torch.device = CPU,
    **more: Any,
) -> Stack:
    """Installs and returns a Stack whose blocks use the given plans in turn."""
    count = len(transformer.transformer_blocks)
    blocks = tuple(kinds[i % len(kinds)] for i in range(count))
    stack = Stack(transformer, ExecutionPlan(blocks, compiled, backend, **more), device)
    stack.install()
    return stack


def under(transformer: Any, kinds: tuple[BlockPlan, ...], compiled: bool = False, **more: Any) -> Any:
    """Returns the transformer after a Stack is installed whose blocks use the given plans in turn."""
    installed(transformer, kinds, compiled, **more)
    return transformer


def check(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert tensor.abs().max() > 0, name
        # Softmax ignores a bias that all keys share, so without a rotary embedding the gradient of that bias is noise.
        assert (found[name] - tensor).abs().max() <= max(tolerance * tensor.abs().max(), 1e-10), name


def same(found: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return found.keys() == right.keys() and all(found[name].equal(right[name]) for name in right)


@pytest.mark.parametrize("made", [make_with_lora, make_trainable])
@pytest.mark.parametrize(
    "kind",  # The others have parts of these two in other combinations.
    ["2b", "1.5-5b-i2v", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("5b", "5b-i2v", "1.5-5b"))],
)
def test_every_plan_is_the_transformer_of_diffusers(kind: str, made: Callable[[str], Any]) -> None:
    arguments = arguments_of(kind)
    right = outcome(made(kind), arguments)
    plans = [(BlockPlan(*values),) for values in product((DEVICE, HOST), LEVELS, (DEVICE, HOST))]
    first = outcome(under(made(kind), plans[0]), arguments)
    check(first, right, tolerance=1e-5)
    for plan in [*plans[1:], MIXED]:
        assert same(outcome(under(made(kind), plan), arguments), first), plan


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_gradients_on_the_host_are_summed_in_fp32(passes: int) -> None:
    transformer = make_trainable("5b").bfloat16()
    stack = installed(transformer, (BlockPlan(HOST, "attention", HOST),))
    assert stack.trained_blocks
    arguments = {k: v.bfloat16() if k.endswith("states") else v for k, v in arguments_of("5b").items()}
    found: dict[int, list[Tensor]] = {}
    for number in range(passes):
        (transformer(**arguments)[0] * (1 + number)).square().mean().backward()
        norms = stack.trained_blocks.gradients.norms
        found = {i: of_host(stack.trained_blocks, i) for i in range(3)}
        assert {g.dtype for gradients in found.values() for g in gradients} == {
            torch.float32 if number else torch.bfloat16
        }
        assert all(norm.equal(g.float().norm()) for i in found for norm, g in zip(norms[i], found[i], strict=True))
    right = make_trainable("5b").bfloat16()
    installed(right, (BlockPlan(DEVICE, "attention", DEVICE),))
    for number in range(passes):
        (right(**arguments)[0] * (1 + number)).square().mean().backward()
        for parameter in right.parameters():
            earlier = getattr(parameter, "summed", 0.0)
            parameter.summed, parameter.grad = earlier + parameter.grad.float(), None
    for i, block in enumerate(right.transformer_blocks):
        assert all(g.float().equal(p.summed) for g, p in zip(found[i], base_parameters(block), strict=True))
    stack.trained_blocks.gradients.clear()
    transformer(**arguments)[0].square().mean().backward()
    assert all(of_host(stack.trained_blocks, i)[0].dtype == torch.bfloat16 for i in range(3))


def test_changed_weights_on_the_host_are_used() -> None:
    """The next pass must use the changed weights although the slots still have the old ones."""
    transformer = make_trainable("5b", depth=2)
    installed(transformer, (BlockPlan(HOST, "attention", HOST),))
    right, arguments = make_trainable("5b", depth=2), arguments_of("5b")
    with torch.no_grad():
        for scale in (1.0, 0.5):
            for parameter in (*transformer.parameters(), *right.parameters()):
                parameter.mul_(scale)
            torch.testing.assert_close(transformer(**arguments)[0], right(**arguments)[0])


def test_every_level_saves_its_activations() -> None:
    p = blocks.KEPT
    assert list(p) == list(LEVELS)
    for less, more in pairwise(LEVELS):
        assert set(p[less]) < set(p[more])
    kinds = [block_weights(made("5b", depth=1).transformer_blocks[0]) for made in (make_with_lora, make_trainable)]
    units = [{k: sum(blocks.UNITS[name] for name in blocks.kept_at(k, p)) for k in LEVELS} for p in kinds]
    assert units == [UNITS_KEPT, UNITS_KEPT | {"linear": 12, "all": 20}]


def test_inputs_of_layers_without_a_lora_are_not_saved() -> None:
    block = make_with_lora("5b", depth=1).transformer_blocks[0]
    p = block_weights(block)
    everything = set(blocks.KEPT["all"]) - {"a", "z"}  # a and z are needed only for gates, which are frozen
    assert p.ff1.a is not None
    assert set(blocks.kept_at("all", p)) == everything
    assert set(blocks.kept_at("all", p._replace(ff1=p.ff1._replace(a=None)))) == everything - {"n2"}
    assert set(blocks.kept_at("all", p._replace(ff2=p.ff2._replace(a=None)))) == everything - {"g"}
    bare = {name: getattr(p, name)._replace(a=None) for name in "qk"}
    assert set(blocks.kept_at("all", p._replace(**bare))) == everything
    assert set(blocks.kept_at("all", p._replace(**bare, v=p.v._replace(a=None)))) == everything - {"n1"}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("made", "layers"), [(make_with_lora, 5), (make_trainable, 6)])
def test_saved_activations_are_not_recomputed(
    made: Callable[..., Any], layers: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the matrix products and attentions that a backward pass recomputes.

    If all weights are trained, one linear layer more is recomputed, because its gate needs the output.
    """
    transformer = under(made("5b", depth=1), (BlockPlan(DEVICE, level, DEVICE),))
    counted: dict[str, int] = {"linears": 0, "attend": 0}
    output = transformer(**arguments_of("5b"))[0]
    for name in counted:
        function = getattr(blocks, name)

        def counting(*args: Any, name: str = name, function: Any = function) -> Any:
            counted[name] += len(args[1]) if name == "linears" else 1
            return function(*args)

        monkeypatch.setattr(blocks, name, counting)
    output.square().mean().backward()
    modulations = 2
    assert counted["linears"] - modulations == {"input": layers, "attention": layers, "linear": 0, "all": 0}[level]
    assert counted["attend"] == (level == "input")


@pytest.mark.parametrize("level", LEVELS)
def test_inputs_of_layers_without_a_lora_are_not_recomputed(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = under(make_with_lora("5b", depth=1, targets=TARGETS[:4]), (BlockPlan(DEVICE, level, DEVICE),))
    output = transformer(**arguments_of("5b"))[0]
    calls: list[str] = []
    for name in ("modulate", "gelu"):
        function = getattr(blocks, name)

        def recording(*args: Any, name: str = name, function: Any = function) -> Any:
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(blocks, name, recording)
    output.square().mean().backward()
    derivatives = {"modulate": 2, "gelu": 1}
    again = {"input": 2, "attention": 2, "linear": 1, "all": 0}[level]  # n1 is an input of LoRAs; n2 and g are not
    assert {name: calls.count(name) for name in derivatives} == {"modulate": 2 + again, "gelu": 1}


@pytest.mark.parametrize("level", LEVELS)
def test_frozen_parameters_get_no_gradient(level: str) -> None:
    p = block_weights(make_with_lora("5b", depth=1).transformer_blocks[0])
    generator = torch.Generator().manual_seed(0)
    x, dy, temb = (
        torch.randn(size, generator=generator)
        for size in ((1, 40, 64), (1, 40, 64), (1, p.modulation1.weight.shape[1]))
    )
    shared = blocks.Shared(temb, None, 8, 2, "cpu")
    kept = blocks.forward(x, p, shared, blocks.kept_at(level, p))[1] | {"x": x}
    _, dtemb, gradients = blocks.backward(dy, p, shared, kept)
    assert dtemb is None
    assert {name for name, found in gradients.items() if found} == set(blocks.LORA_LAYERS)


def test_saved_tensors_on_the_host_are_fetched_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved tensors must be fetched while the blocks in between run, and not afterwards."""
    there, away = BlockPlan(DEVICE, "attention", DEVICE), BlockPlan(DEVICE, "linear", HOST)
    transformer = make_with_lora("5b", depth=6)
    plan = ExecutionPlan((away, there, there, away, there, there), False, "cpu")
    stack = Stack(transformer, plan, CPU)
    stack.install()
    events: list[tuple[str, int]] = []
    fetch, weights = stack.store.fetch, stack.weights
    monkeypatch.setattr(stack.store, "fetch", lambda i: (events.append(("fetch", i)), fetch(i)))
    monkeypatch.setattr(stack, "weights", lambda i, *more: (events.append(("run", i)), weights(i, *more))[1])
    output = transformer(**arguments_of("5b"))[0]
    events.clear()
    output.square().mean().backward()
    assert events.index(("fetch", 3)) < events.index(("run", 5))
    assert events.index(("fetch", 0)) < events.index(("run", 3))


@pytest.mark.parametrize(
    ("made", "precision"),
    [
        (make_with_lora, AUTO),
        pytest.param(make_with_lora, "int8", marks=pytest.mark.long),
        (make_with_lora, "nf4"),
        (make_trainable, AUTO),
    ],
)
def test_compiled_blocks_use_one_graph_per_pass_with_equal_results(
    made: Callable[[str], Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions are traced but not compiled to kernels, which would take most of a minute on a CPU."""
    backend = "aot_eager" if precision == AUTO else "eager"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arguments = arguments_of("5b", samples=1)
    right = outcome(under(made("5b"), MIXED[1:], base_precision=precision), arguments)
    transformer = under(made("5b"), MIXED[1:], compiled=True, base_precision=precision)
    check(outcome(transformer, arguments), right, tolerance=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2  # one graph each for forward, which also samples, and backward serves all three blocks
    outcome(transformer, arguments)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_one_graph_per_pass_serves_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    transformer = under(make_with_lora("5b", depth=1), MIXED[:1], compiled=True, any_length=True)
    for frames in (4, 3, 5):
        arguments = arguments_of("5b", frames, samples=1)
        right = outcome(under(make_with_lora("5b", depth=1), MIXED), arguments)
        check(outcome(transformer, arguments), right, tolerance=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_backward_may_compile_as_many_graphs_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, autograd runs backward in a separate thread. Here, a thread that runs both passes replaces it."""
    limits: list[int] = []

    def compiler(graph: Any, _: Any) -> Any:
        limits.append(torch._dynamo.config.recompile_limit)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    torch._dynamo.reset()
    transformer = under(make_with_lora("5b", depth=1), MIXED[1:], compiled=True)
    thread = threading.Thread(target=lambda: outcome(transformer, arguments_of("5b", samples=1)))
    thread.start()
    thread.join()
    assert limits == [MAX_GRAPHS] * 2
    torch._dynamo.reset()


def test_accumulated_steps_of_several_shapes_are_those_of_resident_blocks() -> None:
    """The next forward pass overwrites the saved tensors on the host, whatever their shapes are."""
    sequence = [arguments_of("5b", frames, samples) for frames, samples in ((4, 2), (2, 1), (6, 1), (4, 2))]
    resident = under(make_with_lora("5b"), (BlockPlan(),))
    streamed = under(make_with_lora("5b"), (BlockPlan(HOST, "attention", HOST),))
    for arguments in sequence:
        assert same(outcome(streamed, arguments), outcome(resident, arguments))


@pytest.mark.parametrize("steps", [30, pytest.param(1000, marks=pytest.mark.long)])  # takes a minute on two busy cores
def test_many_steps_of_streamed_blocks_are_those_of_resident_ones(steps: int) -> None:
    """The results must be equal bit for bit, with buckets in turn."""
    ends = []
    for plans in ((BlockPlan(DEVICE, "attention", DEVICE),), (BlockPlan(HOST, "attention", HOST),)):
        transformer = under(make_with_lora("5b", depth=4), plans)
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in parameters]
        arguments = [arguments_of("5b", frames, samples=1) for frames in (1, 2)]
        for step in range(steps):
            transformer(**arguments[step % 2])[0].square().mean().backward()
            with torch.no_grad():
                for parameter in parameters:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        assert not any(p.equal(before) for p, before in zip(parameters, start, strict=True))
        ends.append(parameters)
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))


def test_parameters_keep_names_and_values() -> None:
    plain, streamed = make_with_lora("5b").state_dict(), under(make_with_lora("5b"), (BlockPlan(HOST),)).state_dict()
    assert plain.keys() == streamed.keys()
    assert all(plain[name].equal(streamed[name]) for name in plain)


def test_without_adapters_it_is_the_base_model() -> None:
    arguments = arguments_of("5b")
    plain, streamed = make_with_lora("5b"), under(make_with_lora("5b"), (BlockPlan(HOST),))
    outputs = []
    for transformer in (plain, streamed):
        trained = transformer(**arguments)[0].detach()
        transformer.disable_adapters()
        with torch.no_grad():
            outputs.append(transformer(**arguments)[0])
        assert not torch.allclose(outputs[-1], trained, atol=1e-3)
        transformer.enable_adapters()
        assert transformer(**arguments)[0].detach().equal(trained)
    torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize(
    ("targets", "lora", "plain"),
    [
        (TARGETS, {}, True),
        (["to_q"], {"use_rslora": True}, True),
        (["to_q"], {"use_dora": True}, False),
        (["to_q"], {"lora_dropout": 0.1}, False),
        (["to_q", "norm1.linear"], {}, False),
        (["to_q", "proj_out"], {}, False),
    ],
)
def test_which_loras_are_supported(targets: list[str], lora: dict[str, Any], plain: bool) -> None:
    assert plain_lora(make_with_lora("5b", targets=targets, **lora)) is plain


def test_a_lora_on_some_layers_only() -> None:
    arguments = arguments_of("5b")
    targets = ["to_v", "ff.net.2"]
    right = outcome(make_with_lora("5b", targets=targets), arguments)
    check(outcome(under(make_with_lora("5b", targets=targets), MIXED), arguments), right, tolerance=1e-5)


def test_blocks_before_the_first_lora_save_nothing() -> None:
    """No backward pass reaches these blocks, so their saved tensors would never be taken."""
    targets: Any = r"transformer_blocks\.2\.attn1\.to_q"
    transformer = make_with_lora("5b", targets=targets)
    stack = Stack(transformer, ExecutionPlan((BlockPlan(HOST, "attention", HOST),) * 3, False, "cpu"), CPU)
    stack.install()
    right = outcome(make_with_lora("5b", targets=targets), arguments_of("5b"))
    check(outcome(transformer, arguments_of("5b")), right, tolerance=1e-5)
    assert list(stack.store.buffers) == [2]
    assert not stack.store.layouts
    assert not stack.store.leaving


# -- a quantized base --------------------------------------------------------------------------------------------------


def rounded(transformer: Any, precision: str) -> Any:
    """Returns the transformer with its matrices rounded as quantization rounds them, in their original type."""
    for module in transformer.transformer_blocks:
        for matrix, kind in quantization_kinds(module, precision).items():
            matrix.data = dequantize(quantize(matrix.data, kind), matrix.dtype)
    return transformer


@pytest.mark.parametrize("precision", quant.KINDS)
def test_a_quantized_base_is_the_transformer_of_diffusers_with_its_values(precision: str) -> None:
    """This holds for streamed and resident blocks, with and without adapters."""
    arguments = arguments_of("5b")
    resident = under(make_with_lora("5b"), (BlockPlan(),), base_precision=precision)
    first = outcome(resident, arguments)
    check(first, outcome(rounded(make_with_lora("5b"), precision), arguments), tolerance=1e-5)
    assert not first["output"].equal(outcome(under(make_with_lora("5b"), (BlockPlan(),)), arguments)["output"])
    for plan in ((BlockPlan(HOST, "attention", HOST),), (BlockPlan(HOST, "input"),), MIXED):
        assert same(outcome(under(make_with_lora("5b"), plan, base_precision=precision), arguments), first), plan
    resident.disable_adapters()
    bare = rounded(make_with_lora("5b"), precision)
    bare.disable_adapters()
    with torch.no_grad():
        torch.testing.assert_close(resident(**arguments)[0], bare(**arguments)[0])


def test_quantized_matrices_have_no_other_copy() -> None:
    """A module's own weight is empty, so no code can use it by mistake, but PEFT still finds its type and device."""
    for plan in (BlockPlan(), BlockPlan(HOST)):
        transformer = under(make_with_lora("5b"), (plan,), base_precision="nf4")
        module = transformer.transformer_blocks[0]
        matrices = list(quantization_kinds(module, "nf4"))
        assert len(matrices) == 8
        assert all(m.numel() == 0 and m.dtype == torch.float32 for m in matrices)
        assert all(p.numel() for p in base_parameters(module) if all(p is not m for m in matrices))
        with pytest.raises(RuntimeError, match="must be a matrix"):
            module.attn1.to_q(torch.zeros(1, 64))


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.5), ("fp8", 0.5), ("nf4", 0.31)])
def test_the_buffer_of_a_full_size_block(precision: str, share: float) -> None:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    with torch.device("meta"):
        module = CogVideoXBlock(3072, 48, 64, 512).to(torch.bfloat16).requires_grad_(False)
    assert base_bytes(module, precision) / base_bytes(module) == pytest.approx(share, abs=0.01)
    assert unquantized_matrix_bytes(module) == pytest.approx(base_bytes(module), rel=0.01)


def test_stored_bytes_equal_the_predicted_ones() -> None:
    transformer = make_with_lora("5b")
    plan = ExecutionPlan((BlockPlan(HOST),) * 3, False, "cpu", base_precision="nf4")
    predicted, before = (base_bytes(transformer.transformer_blocks[0], kind) for kind in ("nf4", AUTO))
    ring = Stack(transformer, plan, CPU).ring
    assert ring is not None
    assert {host.numel() for host in ring.hosts.values()} == {predicted}
    assert predicted < before / 2


@pytest.mark.parametrize("precision", [AUTO, "int8"])
def test_weights_are_written_before_their_buffer_is_pinned(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning creates the pages of an empty buffer one after another, which takes longer than writing to them."""
    pinned: dict[int, Tensor] = {}
    monkeypatch.setattr(stack_module, "pin", lambda buffer: pinned.update({buffer.data_ptr(): buffer.clone()}))
    stack = installed(make_with_lora("5b"), (BlockPlan(HOST),), base_precision=precision)
    assert stack.ring
    assert pinned.keys() == {host.data_ptr() for host in stack.ring.hosts.values()}
    assert all(host.any() and host.equal(pinned[host.data_ptr()]) for host in stack.ring.hosts.values())


@pytest.mark.parametrize(("precision", "least"), [("int8", 0.9998), ("fp8", 0.999), ("nf4", 0.99)])
def test_a_quantized_base_hardly_changes_the_gradients(precision: str, least: float) -> None:
    def gradients(precision: str) -> Tensor:
        found = outcome(under(make_with_lora("5b"), (BlockPlan(),), base_precision=precision), arguments_of("5b"))
        return torch.cat([g.flatten() for name, g in found.items() if "lora" in name])

    cosine = torch.cosine_similarity(gradients(precision), gradients(AUTO), dim=0)
    assert least <= cosine < 1 - 1e-6
    sampled = [gradient_cosine(m, precision, CPU, "cpu") for m in make_with_lora("5b").transformer_blocks]
    assert least <= min(sampled) <= max(sampled) < 1 - 1e-6


def test_the_cosine_of_an_unquantized_base_is_1() -> None:
    assert gradient_cosine(make_with_lora("5b").transformer_blocks[0], AUTO, CPU, "cpu") == pytest.approx(
        1.0, abs=1e-12
    )


# -- copies that are late ----------------------------------------------------------------------------------------------

TURNS = (
    BlockPlan(HOST, "linear", HOST, HOST),
    BlockPlan(DEVICE, "attention", HOST),
    BlockPlan(HOST, "input", DEVICE, HOST),
)
AWAY = (BlockPlan(HOST, "attention", HOST, HOST),)
STATE_HERE = (BlockPlan(HOST, "attention", HOST, DEVICE), BlockPlan(HOST, "input", DEVICE, HOST), BlockPlan(DEVICE))
STATE_AWAY = (BlockPlan(DEVICE, state=DEVICE), BlockPlan(DEVICE, state=HOST), BlockPlan(HOST, state=HOST))
RESIDENT = (BlockPlan(DEVICE, "attention", DEVICE),)
ADAM = Adam(0.9, 0.999, 1e-8, 1e-2, decoupled=True)


def steps_of(
    made: Callable[..., Any], plans: tuple[BlockPlan, ...], accumulation: int, adam: Adam = ADAM
) -> dict[str, Tensor]:
    """Returns the trained weights, master weights and moments after steps of Adam with clipping, with buckets in turn.

    The gradients of one step are not finite. Between two steps, the state is saved and loaded and a video is sampled.
    """
    transformer = made("5b", depth=5).bfloat16()
    stack = installed(transformer, plans)
    parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    on_host = plans is not RESIDENT
    masters = make_masters(parameters, adam, 0.1, False, on_host, stack.trained_blocks, accumulation)
    found: dict[str, Tensor] = {}
    for step, (frames, samples) in enumerate([(4, 2), (2, 1), (6, 1), (4, 2), (2, 1)]):
        arguments = {
            name: value.bfloat16() if name.endswith("states") else value
            for name, value in arguments_of("5b", frames, samples).items()
        }
        for number in range(accumulation):
            loss = (transformer(**arguments)[0].float() * (number + 1)).square().mean()
            masters.backward(loss / accumulation * (torch.inf if step == 1 else 1.0))
        masters.step(1e-3)
        if step == 2:
            masters.load_state(masters.state())
            with torch.no_grad():
                found["sample"] = transformer(**arguments)[0]
    found |= masters.state() | {name: p.detach().clone() for name, p in parameters.items()}
    masters.wait()  # for the reads above, which simulated streams give to the device
    return found


@cache
def resident_steps_of(made: Callable[..., Any], accumulation: int) -> dict[str, Tensor]:
    """Returns the same of resident blocks. Tests must not change the tensors."""
    return steps_of(made, RESIDENT, accumulation)


def pass_in_ranges(monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]) -> None:
    """Makes transfers of state so small that a block takes several: two with a LoRA, else more than there are slots."""
    numbers = 3000 if made is make_with_lora else 12000
    monkeypatch.setattr("cogvideox.optimizer.adam_groups.RANGE_BYTES", 12 * numbers)


@pytest.mark.parametrize("made", [make_with_lora, make_trainable])
@pytest.mark.parametrize(
    ("plans", "accumulation"),
    [
        (AWAY, 1),
        pytest.param(TURNS, 2, marks=pytest.mark.long),
        pytest.param(STATE_HERE, 1, marks=pytest.mark.long),
        (STATE_AWAY, 1),
    ],
)
@pytest.mark.fault("memory: copies to and from the device that are late", times=2)
def test_late_copies_change_nothing(
    made: Callable[..., Any],
    plans: tuple[BlockPlan, ...],
    accumulation: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = resident_steps_of(made, accumulation)
    pass_in_ranges(monkeypatch, made)
    for seed in (None, 0):
        late_streams.use(monkeypatch, seed)
        assert same(steps_of(made, plans, accumulation), right), seed


@pytest.mark.parametrize("accumulation", [1, 2])
def test_padding_does_not_change_moments_of_8_bits(accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding shares a scale with the last elements of a parameter, so it is zero, also in memory that was used before.

    The decay of Adam, unlike that of AdamW, is part of the moments.
    """
    empty = torch.empty

    def used(*size: Any, **given: Any) -> Tensor:
        memory = empty(*size, **given)
        return memory.fill_(255) if memory.dtype == torch.uint8 else memory  # NaN in any type

    monkeypatch.setattr(torch, "empty", used)
    adam = replace(ADAM, decoupled=False, moments="8bit")
    right = steps_of(make_trainable, RESIDENT, accumulation, adam)
    assert all(tensor.isfinite().all() for tensor in right.values())
    assert same(steps_of(make_trainable, AWAY, accumulation, adam), right)


@pytest.mark.parametrize(
    ("owner", "name", "plans"),
    [
        (HostGradients, "finish_copies", AWAY),
        (TrainedBlocks, "use", STATE_AWAY),
        (streaming, "compute_waits_for", AWAY),
    ],
)
def test_a_missing_wait_is_detected(
    owner: Any, name: str, plans: tuple[BlockPlan, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removes one wait. With copies as late as possible or randomly late, at least one result must differ.

    A single order is not enough, because another wait may happen to come in time.
    """
    right = resident_steps_of(make_trainable, 2)

    def is_seen(seed: int | None) -> bool:
        with monkeypatch.context() as patch:
            late_streams.use(patch, seed)
            patch.setattr(owner, name, lambda *_: None)
            try:
                return not same(steps_of(make_trainable, plans, 2), right)
            except late_streams.Freed:
                return True

    assert any(map(is_seen, (None, 0, 1)))


@pytest.mark.parametrize(
    ("made", "plans", "accumulation"),
    [
        (make_with_lora, TURNS, 1),
        (make_trainable, AWAY, 2),
        pytest.param(make_trainable, STATE_HERE, 1, marks=pytest.mark.long),
        (make_trainable, STATE_AWAY, 1),
    ],
)
def test_every_stream_waits_for_what_it_touches(
    made: Callable[..., Any], plans: tuple[BlockPlan, ...], accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every access must be ordered by waits, on the compute stream as well as on the side streams."""
    pass_in_ranges(monkeypatch, made)
    with stream_races.watched(monkeypatch) as streams:
        steps_of(made, plans, accumulation)
    # HostGradients has two more side streams, and weights and state share the one into the device.
    assert len(streams.clocks) == 8 + (made is make_trainable)


@pytest.mark.parametrize("left_out", ["mark", "wait"])
@pytest.mark.fault("memory: a stream that does not wait for another")
def test_a_stream_that_does_not_wait_is_detected(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces all events by empty ones, or ignores all waits."""
    monkeypatch.setattr(stream_races.Streams, left_out, lambda *_: {})
    with pytest.raises(stream_races.Race), stream_races.watched(monkeypatch):
        steps_of(make_trainable, AWAY, 1)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def wide(
    plans: tuple[BlockPlan, ...],
    compiled: bool,
    backend: str,
    precision: str = AUTO,
    any_length: bool = False,
    whole: bool = False,
) -> tuple[Any, Stack]:
    """Returns four blocks of CogVideoX-5b in bf16 under plans in turn, with a LoRA unless all weights are trained."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=48, num_layers=4, use_rotary_positional_embeddings=True
        )
    transformer.to(torch.bfloat16).requires_grad_(whole)
    if not whole:
        transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS[:4], init_lora_weights=False))
    transformer.to("cpu", torch.bfloat16)
    more = {"any_length": any_length, "base_precision": precision}
    return transformer, installed(transformer, plans, compiled, backend, torch.device("cuda"), **more)


def delayed(stack: Stack) -> None:
    """Delays every copy of weights and of saved activations by a random time."""
    assert stack.ring is not None
    generator = torch.Generator().manual_seed(0)

    def late(function: Any) -> Any:
        def call(*args: Any) -> Any:
            torch.cuda._sleep(int(torch.randint(1, 20_000_000, (), generator=generator)))
            return function(*args)

        return call

    stack.ring.copy = late(stack.ring.copy)  # type: ignore[method-assign]
    stores = [stack.store, *([stack.trained_blocks.gradients.store] if stack.trained_blocks else [])]
    for side in (side for store in stores for side in (store.out, store.back)):
        side.record_event = late_event(side, generator)  # type: ignore[method-assign]


def late_event(side: Any, generator: torch.Generator) -> Any:
    """Returns a replacement for ``record_event`` of a stream that first issues a pause of random length."""
    record_event = side.record_event

    def call() -> Any:
        with torch.cuda.stream(side.stream):
            torch.cuda._sleep(int(torch.randint(1, 20_000_000, (), generator=generator)))
        return record_event()

    return call


def trained(
    plans: tuple[BlockPlan, ...],
    compiled: bool,
    steps: int,
    delays: bool = False,
    precision: str = AUTO,
    any_length: bool = False,
) -> dict[str, Tensor]:
    """Returns the LoRA after some steps of gradient descent, with two lengths in turn."""
    transformer, stack = wide(plans, compiled, "flash", precision, any_length)
    if delays:
        delayed(stack)
    parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for loss in random_losses(transformer, steps):
        loss.backward()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return {name: p.detach().cpu() for name, p in parameters.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("compiled", "any_length", "precision"),
    [
        (False, False, AUTO),
        (True, False, AUTO),
        (True, True, AUTO),
        (True, True, "int8"),
        (True, True, "fp8"),
        (True, True, "nf4"),
    ],
)
@pytest.mark.fault("memory: blocks that are streamed to a GPU, compared with resident ones")
def test_streamed_blocks_equal_resident_ones_bit_for_bit(compiled: bool, any_length: bool, precision: str) -> None:
    torch.use_deterministic_algorithms(True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = partial(trained, compiled=compiled, steps=50, precision=precision, any_length=any_length)
    try:
        resident = run((BlockPlan(DEVICE, "attention", DEVICE),))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled * (2 if any_length else 4)
        streamed = run((BlockPlan(HOST, "attention", HOST),))
        late = run((BlockPlan(HOST, "input", HOST), BlockPlan(HOST, "attention", HOST)), delays=True)
        start = trained((BlockPlan(),), compiled, steps=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not same(start, resident)
    assert same(streamed, resident)
    assert same(late, resident)


def random_losses(transformer: Any, count: int) -> Iterator[Tensor]:
    """Yields the losses of random inputs, with two lengths in turn; every call yields the same inputs."""
    generator = torch.Generator("cuda").manual_seed(1)
    for step in range(count):
        frames = (3, 5)[step % 2]
        angles = torch.rand(frames * 30 * 45, 64, generator=generator, device="cuda")
        x, prompt = (
            torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            for shape in ((1, frames, 16, 60, 90), (1, 226, 4096))
        )
        timestep, rotary = torch.tensor([500], device="cuda"), (angles.cos(), angles.sin())
        output = transformer(x, prompt, timestep, image_rotary_emb=rotary, return_dict=False)[0]
        yield output.float().square().mean()


def wholly_trained(
    plans: tuple[BlockPlan, ...], compiled: bool, steps: int, accumulation: int, delays: bool = False
) -> dict[str, Tensor]:
    """Returns all weights and master weights after some steps of AdamW with clipping."""
    transformer, stack = wide(plans, compiled, "flash", whole=True)
    parameters = dict(transformer.named_parameters())
    masters = make_masters(
        parameters, ADAM, 0.01, False, plans is not RESIDENT, stack.trained_blocks, passes=accumulation
    )
    if delays:
        delayed(stack)
        generator = torch.Generator().manual_seed(1)
        assert masters.transfers is not None
        for side in (masters.transfers.into, masters.transfers.work, masters.transfers.out):
            side.record_event = late_event(side, generator)  # type: ignore[method-assign]
    for number, loss in enumerate(random_losses(transformer, steps * accumulation), start=1):
        masters.backward(loss / accumulation)
        if number % accumulation == 0:
            masters.step(1e-4)
    masters.wait()
    return {name: p.detach().cpu() for name, p in parameters.items()} | masters.state()


@pytest.mark.gpu
@pytest.mark.parametrize(("compiled", "accumulation"), [(False, 2), (True, 1)])
@pytest.mark.fault("memory: blocks that are streamed to a GPU, compared with resident ones")
def test_training_all_weights_streamed_equals_resident_bit_for_bit(compiled: bool, accumulation: int) -> None:
    torch.use_deterministic_algorithms(True)
    torch._dynamo.reset()
    run = partial(wholly_trained, compiled=compiled, accumulation=accumulation)
    try:
        resident = run(RESIDENT, steps=10)
        streamed = run(AWAY, steps=10)
        others = BlockPlan(HOST, "attention", HOST, DEVICE), BlockPlan(DEVICE, "attention", HOST, HOST)
        late = run((*AWAY, *others), steps=10, delays=True)
        start = run(RESIDENT, steps=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not same(start, resident)
    assert same(streamed, resident)
    assert same(late, resident)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [AUTO, "nf4"])
def test_a_step_does_not_wait_for_the_device(precision: str) -> None:
    transformer, _ = wide((BlockPlan(HOST, "attention", HOST),), False, "cudnn", precision)
    x = torch.randn(1, 3, 16, 60, 90, device="cuda", dtype=torch.bfloat16)
    prompt = torch.randn(1, 226, 4096, device="cuda", dtype=torch.bfloat16)
    timestep, angles = torch.tensor([500], device="cuda"), torch.rand(3 * 30 * 45, 64, device="cuda")

    def step() -> None:
        rotary = (angles, angles)
        output = transformer(x, prompt, timestep, image_rotary_emb=rotary, return_dict=False)[0]
        output.float().square().mean().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- weights that processes share --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", "int8", "nf4"])
def test_processes_that_share_streamed_weights_compute_what_one_does(precision: str) -> None:
    """Two threads stand for two processes. The second never reads its own weights of streamed blocks."""
    right = outcome(under(make_with_lora("5b"), MIXED, base_precision=precision), arguments_of("5b"))
    models = [make_with_lora("5b") for _ in range(2)]
    streamed = [i for i in range(len(models[1].transformer_blocks)) if MIXED[i % 2].weights == HOST]
    for i in streamed:
        for parameter in base_parameters(models[1].transformer_blocks[i]):
            parameter.data.fill_(float("nan"))
    blocks = tuple(MIXED[i % 2] for i in range(len(models[0].transformer_blocks)))
    plan = ExecutionPlan(blocks, False, "cpu", base_precision=precision)
    barrier, given = threading.Barrier(2, timeout=60), [[None], [None]]

    def made(rank: int) -> Stack:
        def gather(items: list[Any]) -> list[Any]:
            given[rank] = items
            barrier.wait()
            found = [item for one in given for item in one]
            barrier.wait()
            return found

        return Stack(models[rank], plan, CPU, Neighbors(0, 2, rank, gather))

    with ThreadPoolExecutor() as threads:
        stacks = list(threads.map(made, range(2)))
    assert all(stack.shares for stack in stacks)
    for stack, model in zip(stacks, models, strict=True):
        stack.install()
        assert same(outcome(model, arguments_of("5b")), right)
    hosts, other = (stack.ring.hosts for stack in stacks if stack.ring)
    assert list(hosts) == streamed
    hosts[streamed[0]][0] += 1  # the pages are the same, at different addresses
    assert all(hosts[i].equal(other[i]) and hosts[i].data_ptr() != other[i].data_ptr() for i in streamed)


def test_trained_weights_are_not_shared() -> None:
    def gather(items: list[Any]) -> list[Any]:
        raise AssertionError("no process waits for another")

    model = make_trainable("5b")
    plan = ExecutionPlan((BlockPlan(HOST),) * len(model.transformer_blocks), False, "cpu")
    assert not Stack(model, plan, CPU, Neighbors(0, 2, 0, gather)).shares
