"""Loads the LoRA of a run as users do: into diffusers, quantized or not, and by the key rules of ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_lora
import extract_lora
import merge_lora
import pytest
import torch
from lora_clients import load_in_wrapper, merge_in_comfyui, merged_by_diffusers
from running import WEIGHTS
from tiny_loras import lora, outputs, stock
from torch import Tensor

RANK, ALPHA = 4, 6  # the scale, 1.5, is not a power of two, so it is not folded into the matrices
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "rslora": ("--use_rslora",),
    "pissa": ("--init_lora_weights", "pissa"),
    "dora": ("--use_dora",),
    "every layer": ("--target_modules", ".*(attn1|ff|norm|proj|embedding).*"),
}
PLAIN = [kind for kind in KINDS if kind != "dora"]
ROUNDING = 1e-5  # largest error of another order of sums in fp32, relative to the output
EIGHT_BIT, FOUR_BIT = {"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """Returns a function: the folder with the exported LoRA of a kind, and the output of the model that was trained."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def export(kind: str) -> tuple[Path, Tensor]:
        if kind not in made:
            method = lora(model, "--rank", RANK, "--lora_alpha", ALPHA, *KINDS[kind])
            change(method)
            folder = tmp_path_factory.mktemp("lora")
            method.export(folder)
            made[kind] = folder, outputs(method.transformer.eval())
        return made[kind]

    return export


@torch.no_grad()
def change(method: Any) -> None:
    """Changes a LoRA as training would, but much more, so that its effect exceeds the errors of quantization."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in method.parameters().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter *= 1 + 0.3 * noise
        else:
            parameter += 0.3 * noise


def pipeline_of(transformer: Any) -> Any:
    """Returns a pipeline that has only a transformer."""
    from diffusers import CogVideoXPipeline

    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    return CogVideoXPipeline(**parts, transformer=transformer.eval())


def load(transformer: Any, folder: Path) -> Any:
    """Loads the LoRA of a folder as a user does, and returns the pipeline."""
    pipeline = pipeline_of(transformer)
    pipeline.load_lora_weights(str(folder))
    return pipeline


def error(output: Tensor, expected: Tensor) -> float:
    """Returns the error relative to what is expected."""
    return float((output - expected).norm() / expected.norm())


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_and_fuses(model: Path, exported: Any, kind: str) -> None:
    folder, trained = exported(kind)
    pipeline = load(stock(model), folder)
    assert outputs(pipeline.transformer).equal(trained)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    assert not [name for name in pipeline.transformer.state_dict() if "lora" in name]
    assert error(outputs(pipeline.transformer), trained) < ROUNDING
    assert error(outputs(stock(model)), trained) > 1000 * ROUNDING  # the effect of the LoRA


@torch.no_grad()
def dequantized(transformer: Any, model: Path) -> Any:
    """Returns a transformer whose weights in fp32 are those that a quantized one computes with."""
    plain = stock(model).eval()
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear):
            bias = 0 if layer.bias is None else layer.bias
            layer.weight.copy_((transformer.get_submodule(name)(torch.eye(layer.in_features)) - bias).T)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_torchao_s_int8_weights(model: Path, exported: Any, kind: str) -> None:
    from diffusers import CogVideoXTransformer3DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    folder, _ = exported(kind)
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        model / "transformer", quantization_config=config, dtype=torch.float32
    ).eval()
    plain = dequantized(transformer, model)
    assert 1e-4 < error(outputs(plain), outputs(stock(model))) < 0.1  # they are quantized
    output = outputs(load(transformer, folder).transformer)
    assert error(output, outputs(load(plain, folder).transformer)) < ROUNDING


def bitsandbytes_transformer(model: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> Any:
    """Returns a transformer that bitsandbytes has quantized, on the CPU.

    diffusers asks for a GPU before it calls bitsandbytes, which has kernels for the CPU, too.
    """
    from diffusers import BitsAndBytesConfig, CogVideoXTransformer3DModel
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda _, places: places or {"": "cpu"})
    # The embedding of captions is narrower than the groups of 64 numbers in which the kernel for the CPU computes.
    settings = BitsAndBytesConfig(llm_int8_skip_modules=["patch_embed"], **config)
    return CogVideoXTransformer3DModel.from_pretrained(
        model / "transformer", quantization_config=settings, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize(
    ("kind", "config"),
    [*((kind, EIGHT_BIT) for kind in PLAIN), *((kind, FOUR_BIT) for kind in KINDS)],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bitsandbytes(
    model: Path, exported: Any, monkeypatch: pytest.MonkeyPatch, kind: str, config: dict[str, Any]
) -> None:
    """DoRA in 8 bits is left out: on the CPU, PEFT loses the scales of the layer when it computes its norm."""
    folder, _ = exported(kind)
    transformer = bitsandbytes_transformer(model, monkeypatch, config)
    plain = dequantized(transformer, model)
    assert 1e-4 < error(outputs(plain), outputs(stock(model))) < 0.1  # they are quantized
    # In 8 bits, activations are quantized as well. The LoRA changes them, and with them the error.
    limit = 3 * error(outputs(transformer), outputs(plain)) + ROUNDING
    output = outputs(load(transformer, folder).transformer)
    assert error(output, outputs(load(plain, folder).transformer)) < limit


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layerwise_casting(model: Path, exported: Any, kind: str) -> None:
    """The LoRA is loaded before casting is enabled, and DoRA is merged as well, as docs/training.md says."""
    folder, _ = exported(kind)
    pipeline, rounded = load(stock(model), folder), load(stock(model), folder)
    if kind == "dora":
        for each in (pipeline, rounded):
            each.fuse_lora(components=["transformer"])
            each.unload_lora_weights()
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = dict(pipeline.transformer.named_parameters())
    cast = [name for name, parameter in stored.items() if parameter.dtype == torch.float8_e4m3fn]
    assert len(cast) > 20
    assert not [name for name in cast if "lora_" in name]
    for name, parameter in rounded.transformer.named_parameters():
        parameter.copy_(stored[name].float())
    assert error(outputs(pipeline.transformer), outputs(rounded.transformer)) < ROUNDING


# -- ComfyUI -----------------------------------------------------------------------------------------------------------


def convert(folder: Path, target: str) -> Path:
    """Converts the LoRA of a folder with the script, and returns the file."""
    file = folder / f"{target}.safetensors"
    convert_lora.main([str(folder), str(file), "--to", target])
    return file


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_comfyui_merges_the_same(model: Path, exported: Any, kind: str, strength: float) -> None:
    folder, _ = exported(kind)
    transformer = stock(model)
    assert merge_in_comfyui(transformer, convert(folder, "comfyui"), strength) == []
    expected = merged_by_diffusers(pipeline_of(stock(model)), folder, strength)
    torch.testing.assert_close(transformer.state_dict(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_comfyui_finds_every_layer_of_every_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """The layers include the embedding of the offset, which only 1.5-5b-i2v has."""
    for kind in ("2b", "1.5-5b-i2v"):
        method = lora(tiny(kind), "--target_modules", ".*(attn1|ff|norm|proj|embedding).*")
        method.export(tmp_path / kind)
        assert merge_in_comfyui(stock(tiny(kind)), convert(tmp_path / kind, "comfyui")) == []


@torch.no_grad()
def test_comfyui_does_not_find_diffusers_names_of_layers(model: Path, exported: Any) -> None:
    """Its CogVideoX has other names in blocks, so a file with diffusers' names would have no effect there."""
    folder, _ = exported("plain")
    file = convert(folder, "videox-fun")
    assert len(merge_in_comfyui(stock(model), file)) > 0
    assert len(merge_in_comfyui(stock(model), folder / WEIGHTS)) > 0


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_wrapper_loads_diffusers_file(model: Path, exported: Any, kind: str, fuse: bool) -> None:
    folder, trained = exported(kind)
    pipeline = pipeline_of(stock(model))
    load_in_wrapper(pipeline, folder / WEIGHTS, fuse=fuse)
    assert error(outputs(pipeline.transformer), trained) < ROUNDING


@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_the_wrapper_merges_the_names_of_videox_fun(model: Path, exported: Any, kind: str) -> None:
    folder, _ = exported(kind)
    pipeline = pipeline_of(stock(model))
    load_in_wrapper(pipeline, convert(folder, "videox-fun"), strength=0.5)
    expected = merged_by_diffusers(pipeline_of(stock(model)), folder, 0.5)
    torch.testing.assert_close(pipeline.transformer.state_dict(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dora_reaches_comfyui_as_the_lora_of_its_change(model: Path, exported: Any, tmp_path: Path) -> None:
    """The tools that convert_lora.py names lead there; with the full rank, without a loss."""
    folder, trained = exported("dora")
    base = ["--base_model", str(model)]
    merge_lora.main([*base, "--lora", str(folder), "--output_dir", str(tmp_path / "merged")])
    rank = ["--rank", "64", "--output_dir", str(tmp_path / "extracted")]
    extract_lora.main([*base, "--tuned_model", str(tmp_path / "merged"), *rank])
    transformer = stock(model)
    assert merge_in_comfyui(transformer, convert(tmp_path / "extracted", "comfyui")) == []
    assert error(outputs(transformer.eval()), trained) < 1e-4
