"""Tests methods.py: which parameters a LoRA adds, their initialization from the seed, saving and loading."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import options_of
from running import equal, lora_flags, sft_flags, train, weights
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_loras import disturb, lora, outputs, stock

from cogvideox.config import args
from cogvideox.config.options import SftOptions
from cogvideox.errors import UsageError
from cogvideox.model.lora import broadcast_from_first, principal_matrices
from cogvideox.model.methods import WEIGHTS_NAME, FullFinetune, Lora
from cogvideox.model.models import load_transformer


def lora_recipe(model: Path, *flags: object) -> dict[str, Any]:
    return Lora.recipe(options_of(Path("x"), "--pretrained_model_name_or_path", model, *flags))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_lora_is_trainable(model: Path, dtype: torch.dtype) -> None:
    method = lora(model, dtype=dtype)
    parameters = method.parameters()
    assert len(parameters) == 2 * 4 * 2
    assert {name.split(".")[-2].removesuffix(".default") for name in parameters} == {"default"}
    assert all("lora_" in name for name in parameters)
    assert {p.dtype for p in parameters.values()} == {dtype}
    assert {min(p.shape) for p in parameters.values()} == {4}
    frozen = [name for name, p in method.transformer.named_parameters() if not p.requires_grad]
    assert len(frozen) + len(parameters) == len(list(method.transformer.named_parameters()))


def test_the_start_is_a_function_of_the_seed(model: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = lora(model).state()
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(6)
    assert equal(lora(model).state(), one)
    assert not equal(lora(model, seed=2).state(), one)
    assert all(not tensor.any() for name, tensor in one.items() if "lora_B" in name)


def test_target_modules(model: Path) -> None:
    method = lora(model, "--target_modules", "attn1.to_q", "ff.net.2")
    assert len(method.parameters()) == 2 * 2 * 2
    assert all("attn1.to_q" in name or "ff.net.2" in name for name in method.parameters())


@pytest.mark.parametrize("target", ["to_x", "o_q", "attn1", "transformer_blocks", "to_q.weight"])
def test_an_unknown_target_names_what_there_is(model: Path, target: str) -> None:
    with pytest.raises(UsageError) as error:
        lora(model, "--target_modules", "to_k", target)
    (line,) = error.value.problems
    assert line.startswith(f"--target_modules {target}: ")
    for there in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "to_out.0", "net.2"):
        assert there in line
    assert "\n" not in line


def test_a_regular_expression_is_matched_with_whole_names(model: Path) -> None:
    method = lora(model, "--target_modules", r".*\.0\.attn1\.to_[qk]")
    layers = {name.rsplit(".lora_", 1)[0] for name in method.parameters()}
    assert layers == {"transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k"}
    everywhere = lora(model, "--target_modules", ".*")
    linear = [m for m in stock(model).modules() if type(m) is torch.nn.Linear]
    assert len(everywhere.parameters()) == 2 * len(linear) > 20
    with pytest.raises(UsageError) as error:
        lora(model, "--target_modules", "to_[qk]")
    (line,) = error.value.problems
    assert line.startswith("--target_modules to_[qk]: matches no linear layer's full name; there are ['")
    assert "'attn1.to_k'" in line


# -- variants ----------------------------------------------------------------------------------------------------------

VARIANTS = {
    "PiSSA": ["--init_lora_weights", "pissa"],
    "fast PiSSA, rsLoRA, dropout": ["--init_lora_weights", "pissa_niter_2", "--use_rslora", "--lora_dropout", "0.2"],
    "DoRA, rsLoRA, dropout": ["--use_dora", "--use_rslora", "--lora_dropout", "0.2"],
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.fault("export: every kind of LoRA is reloaded and resumed")
def test_each_variant_is_published_and_resumed_exactly(
    model: Path, tensors: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing compares outputs, and requires a difference of 0 in fp32 on a CPU.

    A resumed run uses the initial matrices of PiSSA that it started with, even if the SVD now gives others.
    """
    flags = lora_flags(model, tensors, tmp_path, "--load_tensors", "--max_train_steps", 2, *VARIANTS[name])
    assert train([*flags, "--checkpointing_steps", "1"]) == 0
    made = json.loads((tmp_path / "recipe.json").read_text())
    assert made["verification"]["max_difference"] == 0
    first = weights(tmp_path)
    assert not equal(first, weights(tmp_path / "checkpoint-1"))
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / WEIGHTS_NAME).unlink()
    monkeypatch.setattr(
        "cogvideox.model.lora.principal_matrices", lambda *given: [-1.5 * part for part in principal_matrices(*given)]
    )
    assert train(flags) == 0
    assert equal(weights(tmp_path), first)


def test_pissa_starts_as_the_model_and_from_its_largest_singular_values(model: Path) -> None:
    method = lora(model, "--init_lora_weights", "pissa", "--rank", 3)
    with method.base_weights(Path()):
        base = outputs(method.transformer)
    torch.testing.assert_close(outputs(method.transformer), base, rtol=0, atol=1e-5)
    disturb(method)
    assert not torch.allclose(outputs(method.transformer), base, rtol=0, atol=1e-2)
    layer = method.transformer.transformer_blocks[1].attn1.to_v
    weight = layer.get_base_layer().weight
    down, up = layer.lora_A["default"].start, layer.lora_B["default"].start
    values = torch.linalg.svdvals(weight)
    rest = torch.linalg.svdvals(weight - 8 / 3 * up @ down)
    torch.testing.assert_close(rest[: len(values) - 3], values[3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(down @ down.T, torch.diag(values[:3] * 3 / 8), rtol=1e-4, atol=1e-5)


def test_the_faster_svd_finds_nearly_the_same_part(model: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 8, generator=generator), torch.randn(8, 40, generator=generator)
    weight = left @ torch.diag(torch.arange(8.0, 0, -1) ** 3) @ right
    exact, fast = (
        [a.double() for a in principal_matrices(weight, 3, 2.0, init, 1)] for init in ("pissa", "pissa_niter_4")
    )
    torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], rtol=1e-3, atol=1e-3 * weight.abs().max().item())
    state = torch.get_rng_state()
    again = principal_matrices(weight, 3, 2.0, "pissa_niter_4", 1)
    assert again[0].double().equal(fast[0])
    assert torch.get_rng_state().equal(state)


def test_pissa_is_the_same_gradient_as_with_a_changed_base(model: Path) -> None:
    """Compares with PEFT, which subtracts the principal part from the base."""
    from peft import LoraConfig

    ours = lora(model, "--init_lora_weights", "pissa").transformer
    theirs = stock(model)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights="pissa"))
    gradients = []
    for transformer in (ours, theirs):
        layer = transformer.transformer_blocks[0].attn1.to_k
        x = torch.linspace(-1, 1, 3 * layer.in_features).view(1, 3, -1)
        layer(x).square().sum().backward()
        gradients.append([layer.lora_A["default"].weight, layer.lora_B["default"].weight])
    for own, their in zip(*gradients, strict=True):
        torch.testing.assert_close(own, their)
        torch.testing.assert_close(own.grad, their.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_reloads_on_the_original_base(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    import diffusers

    method = lora(model, "--init_lora_weights", "pissa", "--use_rslora", dtype=dtype)
    disturb(method)
    trained = method.transformer.transformer_blocks[0].attn1.to_q(torch.ones(1, 2, 64, dtype=dtype))
    method.save(tmp_path)
    assert {min(t.shape) for t in load_file(tmp_path / WEIGHTS_NAME).values()} == {8}
    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    base = stock(model, dtype)
    diffusers.CogVideoXPipeline(**parts, transformer=base).load_lora_weights(str(tmp_path))
    assert base.transformer_blocks[0].attn1.to_q(torch.ones(1, 2, 64, dtype=dtype)).equal(trained)


def test_pissa_starts_without_a_gpu_though_torch_is_built_for_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel of PyPI names CUDA unless it is asked what is available."""

    def current(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("xpu")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert len(lora(model, "--init_lora_weights", "pissa").state()) == 16


@pytest.mark.parametrize(("backend", "through"), [("nccl", "meta"), ("gloo", "cpu")])
def test_ranks_share_a_start_through_memory_that_their_backend_knows(
    backend: str, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are on the host, but NCCL sends only device memory. The meta device replaces a GPU."""
    sent: list[str] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.device.type))
    with contextlib.suppress(NotImplementedError):  # the meta device has no values
        broadcast_from_first(torch.ones(2))
    assert sent == [through]


def test_a_rank_beyond_the_layers_is_refused_for_pissa(model: Path) -> None:
    with pytest.raises(UsageError, match=r"--rank 65: .* has 64 singular values .*; give at most --rank 64"):
        lora(model, "--init_lora_weights", "pissa", "--rank", 65)


def test_dora_trains_and_saves_a_length_for_every_output_channel(model: Path) -> None:
    method = lora(model, "--use_dora", "--target_modules", "attn1.to_q", "ff.net.0.proj")
    lengths = {name: tensor for name, tensor in method.state().items() if name.endswith(".lora_magnitude_vector")}
    assert len(lengths) == 4
    assert len(method.parameters()) == 3 * 4
    for name, tensor in lengths.items():
        weight = stock(model).get_submodule(name.removesuffix(".lora_magnitude_vector")).weight
        torch.testing.assert_close(tensor, weight.norm(dim=1))


def test_rslora_and_gaussian(model: Path) -> None:
    assert scales(lora(model, "--use_rslora").transformer, "default") == {8 / 4**0.5}
    drawn = torch.cat(
        [t.flatten() for n, t in lora(model, "--init_lora_weights", "gaussian").state().items() if "_A" in n]
    )
    assert drawn.std().item() == pytest.approx(1 / 4, rel=0.1)
    assert drawn.abs().max() > 0.6  # the default is uniform


# -- dropout -----------------------------------------------------------------------------------------------------------


def masks(method: Lora, samples: int, layer: str = "to_q") -> torch.Tensor:
    """Returns the output of a layer's dropout for an input of ones."""
    dropout = getattr(method.transformer.transformer_blocks[0].attn1, layer).lora_dropout["default"]
    return dropout(torch.ones(samples, 200, 64))


def test_dropout_is_a_function_of_seed_step_position_and_layer(model: Path) -> None:
    method = lora(model, "--lora_dropout", 0.25)
    method.transformer.train()
    method.draw_for(5, 2)
    both = masks(method, 2)
    assert masks(method, 2).equal(both)
    assert both.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert both.mean().item() == pytest.approx(1, abs=0.02)
    method.draw_for(5, 3)
    assert masks(method, 1).equal(both[1:])
    others = [masks(method, 1, "to_k"), masks(lora_in_training(model, 2, 5, 3), 1)]
    for place in ((6, 3), (5, 4)):
        method.draw_for(*place)
        others.append(masks(method, 1))
    assert not any(other.equal(both[1:]) for other in others)
    method.transformer.eval()
    assert masks(method, 1).equal(torch.ones(1, 200, 64))


def lora_in_training(model: Path, seed: int, step: int, first: int) -> Lora:
    method = lora(model, "--lora_dropout", 0.25, seed=seed)
    method.transformer.train()
    method.draw_for(step, first)
    return method


def test_dropout_is_the_same_with_another_batch_size_and_with_recomputation(
    model: Path, tensors: Path, tmp_path: Path
) -> None:
    shapes: dict[str, Sequence[object]] = {
        "accumulated": ["--train_batch_size", 1, "--gradient_accumulation_steps", 2],
        "at once": ["--train_batch_size", 2, "--gradient_accumulation_steps", 1],
        "recomputed": ["--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--gradient_checkpointing"],
        "without": ["--lora_dropout", 0],
    }
    found = {}
    for name, flags in shapes.items():
        output = tmp_path / name.replace(" ", "_")
        # A small epsilon would let AdamW enlarge the rounding of gradients that are almost zero.
        more = ["--load_tensors", "--max_train_steps", 2, "--lora_dropout", 0.5, "--epsilon", 1e-4, *flags]
        assert train(lora_flags(model, tensors, output, *more)) == 0
        found[name] = weights(output)
    assert equal(found["recomputed"], found["accumulated"])
    for name, tensor in found["accumulated"].items():
        torch.testing.assert_close(found["at once"][name], tensor, rtol=1e-3, atol=1e-6)
    assert not all(torch.allclose(found["without"][n], t, rtol=1e-3, atol=1e-4) for n, t in found["at once"].items())


# -- from a LoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [[], ["--use_dora", "--use_rslora"]])
def test_a_lora_goes_on_from_a_file_or_its_folder(model: Path, tmp_path: Path, variant: list[str]) -> None:
    first = lora(model, *variant)
    disturb(first)
    first.save(tmp_path)
    for given in (tmp_path, tmp_path / WEIGHTS_NAME):
        assert equal(lora(model, *variant, "--lora_path", given).state(), first.state())
    recipe = lora_recipe(model, *variant, "--lora_path", tmp_path)
    assert len(recipe["lora_path"]) == 64
    assert recipe == lora_recipe(model, *variant, "--init_lora_from", tmp_path / WEIGHTS_NAME)
    disturb(first)
    first.parameters().popitem()[1].data.zero_()
    first.save(tmp_path)
    assert lora_recipe(model, *variant, "--lora_path", tmp_path) != recipe


def test_a_lora_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    first = lora(model, "--target_modules", r".*\.0\.attn1\.to_q")
    first.save(tmp_path)
    with pytest.raises(UsageError, match=r"--lora_path .*: transformer_blocks\.1\.attn1\.to_q.*give a LoRA for this"):
        lora(model, "--target_modules", "to_q", "--lora_path", tmp_path)


def test_saved_with_rank_and_alpha_and_read_back(model: Path, tmp_path: Path) -> None:
    import diffusers

    method = lora(model, "--target_modules", "to_q", "ff.net.2")
    disturb(method)
    trained = {n: tensor * (2 if "lora_B" in n else 1) for n, tensor in method.state().items()}  # alpha / rank is 2
    method.save(tmp_path)
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 4.0)
    assert all(name.startswith("transformer.") for name in load_file(tmp_path / WEIGHTS_NAME))
    assert scales(method.transformer, "default") == {2.0}
    with torch.no_grad():
        for parameter in method.parameters().values():
            parameter.zero_()  # so that the values can come only from the file
    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = diffusers.CogVideoXPipeline(**parts, transformer=method.transformer)
    method.reload(pipeline, tmp_path)
    assert list(method.transformer.peft_config) == [pipeline.get_list_adapters()["transformer"][0]]
    (name,) = method.transformer.peft_config
    from peft import get_peft_model_state_dict

    assert equal(get_peft_model_state_dict(method.transformer, adapter_name=name), trained)
    assert scales(method.transformer, name) == {1.0}


def scales(transformer: Any, adapter: str) -> set[float]:
    """Returns alpha / rank of every layer."""
    return {module.scaling[adapter] for module in transformer.modules() if hasattr(module, "scaling")}


# -- all weights -------------------------------------------------------------------------------------------------------


def full(model: Path, dtype: torch.dtype = torch.float32) -> FullFinetune:
    options = args.parse(SftOptions, None, sft_flags(model, Path("data"), Path("x")))
    return FullFinetune(load_transformer(options.model, dtype), options)


def test_every_weight_is_trainable(model: Path) -> None:
    method = full(model)
    assert len(method.parameters()) == len(list(method.transformer.named_parameters())) > 20
    assert FullFinetune.recipe(None) == {}  # type: ignore[arg-type]


def test_base_weights_are_restored_and_then_the_saved_ones(model: Path, tmp_path: Path) -> None:
    method = full(model, torch.bfloat16)
    base = {name: tensor.clone() for name, tensor in method.transformer.state_dict().items()}
    disturb(method)
    trained = {name: tensor.clone() for name, tensor in method.transformer.state_dict().items()}
    method.save(tmp_path)
    with method.base_weights(tmp_path):
        assert equal(method.transformer.state_dict(), base)
        assert not equal(base, trained)
    assert equal(method.transformer.state_dict(), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_are_saved_as_stock_diffusers_reads_them(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from diffusers import CogVideoXTransformer3DModel

    method = full(model, dtype)
    disturb(method)
    trained = {name: tensor.clone() for name, tensor in method.transformer.state_dict().items()}
    method.save(tmp_path)
    stock = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer", dtype=dtype)
    assert equal(stock.state_dict(), trained)
    assert {path.suffix for path in (tmp_path / "transformer").iterdir()} == {".json", ".safetensors"}
    method.reload(None, tmp_path)
    assert equal(method.transformer.state_dict(), trained)
