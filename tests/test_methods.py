"""cogvideox/methods.py: which parameters a LoRA adds, drawn from the seed alone, written and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import options_of
from running import equal, sft_flags
from safetensors import safe_open
from safetensors.torch import load_file

from cogvideox import args
from cogvideox.errors import UsageError
from cogvideox.methods import WEIGHTS_NAME, FullFinetune, Lora
from cogvideox.models import load_transformer


def lora(model: Path, *flags: object, seed: int = 1, dtype: torch.dtype = torch.float32) -> Lora:
    options = options_of(Path("x"), "--pretrained_model_name_or_path", model, "--seed", seed, *flags)
    return Lora(load_transformer(options.model, dtype), options)


def disturb(method: Any) -> None:
    """Weights as after training: at the start half of them are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


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


def test_saved_with_rank_and_alpha_and_read_back(model: Path, tmp_path: Path) -> None:
    import diffusers

    method = lora(model, "--target_modules", "to_q", "ff.net.2")
    disturb(method)
    trained = {name: tensor.clone() for name, tensor in method.state().items()}
    method.save(tmp_path)
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 8.0)
    assert all(name.startswith("transformer.") for name in load_file(tmp_path / WEIGHTS_NAME))
    scale = scales(method.transformer, "default")
    with torch.no_grad():
        for parameter in method.parameters().values():
            parameter.zero_()  # so that only the file can bring them back
    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = diffusers.CogVideoXPipeline(**parts, transformer=method.transformer)
    method.reload(pipeline, tmp_path)
    assert list(method.transformer.peft_config) == [pipeline.get_list_adapters()["transformer"][0]]
    (name,) = method.transformer.peft_config
    from peft import get_peft_model_state_dict

    assert equal(get_peft_model_state_dict(method.transformer, adapter_name=name), trained)
    assert scales(method.transformer, name) == scale == {2.0}


def scales(transformer: Any, adapter: str) -> set[float]:
    """alpha / rank of every layer."""
    return {module.scaling[adapter] for module in transformer.modules() if hasattr(module, "scaling")}


# -- all weights -------------------------------------------------------------------------------------------------------


def full(model: Path, dtype: torch.dtype = torch.float32) -> FullFinetune:
    options = args.parse(args.SftOptions, None, sft_flags(model, Path("data"), Path("x")))
    return FullFinetune(load_transformer(options.model, dtype), options)


def test_every_weight_is_trainable(model: Path) -> None:
    method = full(model)
    assert len(method.parameters()) == len(list(method.transformer.named_parameters())) > 20
    assert method.recipe() == {}


def test_off_is_the_model_before_training_and_is_undone(model: Path) -> None:
    method = full(model, torch.bfloat16)
    base = {name: tensor.clone() for name, tensor in method.transformer.state_dict().items()}
    disturb(method)
    trained = {name: tensor.clone() for name, tensor in method.transformer.state_dict().items()}
    with method.off():
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
