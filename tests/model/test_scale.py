"""Tests the scale that is folded into a LoRA: loaders with and without support for the metadata give the same."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import convert_lora
import pytest
import torch
from running import PROMPT, WEIGHTS, environment, equal, lora_flags, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_loras import disturb, lora, outputs, stock

from cogvideox.config.flags import LoraFlags
from cogvideox.config.lora_file import FOLDED_EXACTLY, FOLDED_ROUNDED, NOT_FOLDED, misfits, read_header
from cogvideox.errors import UsageError
from cogvideox.model.lora import fold_scale
from cogvideox.model.methods import Lora

RANK = ["--rank", 4]
EXACTLY: dict[str, list[object]] = {
    "2": ["--lora_alpha", 8],
    "a quarter": ["--lora_alpha", 1],
    "1": ["--lora_alpha", 4],
    "rsLoRA": ["--lora_alpha", 8, "--use_rslora"],
    "DoRA": ["--lora_alpha", 2, "--use_dora", "--use_rslora"],
    "PiSSA": ["--lora_alpha", 8, "--init_lora_weights", "pissa"],
    "PiSSA, rsLoRA": ["--lora_alpha", 8, "--init_lora_weights", "pissa", "--use_rslora"],
    "ends of names": ["--lora_alpha", 2, "--target_modules", "to_q", "ff.net.2", "proj_out"],
}


def trained(model: Path, *flags: object, dtype: torch.dtype = torch.float32) -> Lora:
    """Returns a LoRA with nonzero weights, as after training; initially, half of them are zero."""
    method = lora(model, *RANK, *flags, dtype=dtype)
    disturb(method)
    return method


def loaded(model: Path, given: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a LoRA, a folder or a dict of tensors, into a stock transformer through the pipeline's loader."""
    import diffusers

    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    base = stock(model, dtype)
    diffusers.CogVideoXPipeline(**parts, transformer=base).load_lora_weights(given)
    return base


def metadata_of(folder: Path) -> dict[str, Any]:
    """Returns the parsed JSON metadata of the LoRA in a folder."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}


@pytest.mark.parametrize("name", EXACTLY)
def test_without_its_metadata_the_file_gives_what_was_trained(model: Path, tmp_path: Path, name: str) -> None:
    method = trained(model, *EXACTLY[name])
    wanted = outputs(method.transformer)
    method.save(tmp_path)
    assert outputs(loaded(model, load_file(tmp_path / WEIGHTS))).equal(wanted)
    assert outputs(loaded(model, str(tmp_path))).equal(wanted)
    assert (wanted - outputs(stock(model))).abs().max() > 1e-2


@pytest.mark.parametrize("name", EXACTLY)
def test_a_new_run_continues_from_the_trained_matrices(model: Path, tmp_path: Path, name: str) -> None:
    method = trained(model, *EXACTLY[name])
    method.save(tmp_path)
    flags = [*RANK, *EXACTLY[name]]
    if method.pissa:  # it is saved as a plain LoRA of twice the rank
        alpha = 8 * math.sqrt(2) if method.flags.use_rslora else 16
        flags = ["--rank", 8, "--lora_alpha", alpha, *(["--use_rslora"] if method.flags.use_rslora else [])]
    again = lora(model, *flags, "--lora_path", tmp_path)
    assert list(misfits(read_header(str(tmp_path)), again.flags)) == []
    assert equal(again.state(), method.state())


def test_the_metadata_keep_the_training_s_own_alpha(model: Path, tmp_path: Path) -> None:
    trained(model, "--lora_alpha", 8, "--use_rslora").save(tmp_path)
    about = metadata_of(tmp_path)
    config = about["lora_adapter_metadata"]
    names = ("r", "lora_alpha", "use_rslora")
    assert [config[f"transformer.{name}"] for name in names] == [4, 4, False]
    wanted = {"rank": 4, "lora_alpha": 8, "use_rslora": True, "scale": 4.0, "scale_folded": FOLDED_EXACTLY}
    assert about["cogvideox_training"] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_that_is_no_power_of_two_stays_in_the_metadata(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    method = trained(model, "--lora_alpha", 6, dtype=dtype)
    assert method.save(tmp_path) == {"lora_scale": 1.5, "lora_scale_folded": NOT_FOLDED}
    assert equal({n.removeprefix("transformer."): t for n, t in load_file(tmp_path / WEIGHTS).items()}, method.state())
    x = torch.ones(1, 2, 64, dtype=dtype)
    layers = [
        transformer.transformer_blocks[0].attn1.to_q(x)
        for transformer in (method.transformer, loaded(model, str(tmp_path), dtype))
    ]
    assert layers[0].equal(layers[1])


@pytest.mark.parametrize("variant", [[], ["--use_dora"]])
def test_a_scale_folded_with_rounding_is_right_without_metadata(
    model: Path, tmp_path: Path, variant: list[str]
) -> None:
    method = trained(model, "--lora_alpha", 6, "--fold_lora_scale", *variant)
    wanted = outputs(method.transformer)
    assert method.export(tmp_path / "result") == {"lora_scale": 1.5, "lora_scale_folded": FOLDED_ROUNDED}
    assert method.save(tmp_path / "checkpoint") == {
        "lora_scale": 1.5,
        "lora_scale_folded": NOT_FOLDED,
    }  # from which the run can be resumed
    bare = outputs(loaded(model, load_file(tmp_path / "result" / WEIGHTS)))
    assert bare.equal(outputs(loaded(model, str(tmp_path / "result"))))
    torch.testing.assert_close(bare, wanted, rtol=1e-4, atol=1e-4)
    unscaled = outputs(loaded(model, load_file(tmp_path / "checkpoint" / WEIGHTS)))
    assert not torch.allclose(unscaled, wanted, rtol=1e-4, atol=1e-4)


def test_from_rounded_matrices_only_a_run_that_takes_them_as_they_are_goes_on(model: Path, tmp_path: Path) -> None:
    method = trained(model, "--lora_alpha", 6, "--use_rslora", "--fold_lora_scale")
    method.export(tmp_path)
    file = read_header(str(tmp_path))
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    (line,) = misfits(file, LoraFlags(4, 6.0, targets, use_rslora=True))
    assert line.startswith(
        "--lora_alpha 6: the matrices of --lora_path were multiplied by their scale, 3, with rounding;"
    )
    assert "give --lora_alpha 4 without --use_rslora" in line
    assert "a checkpoint" in line
    flags = LoraFlags(4, 4.0, targets)
    assert list(misfits(file, flags)) == []
    again = lora(model, *RANK, "--lora_alpha", 4, "--lora_path", tmp_path)
    assert outputs(again.transformer).equal(outputs(loaded(model, str(tmp_path))))


@pytest.mark.parametrize(
    ("value", "scale"),
    [(1e-7, 0.25), (6e4, 2.0), (math.nan, 2.0), (1.0, 1.5), (1.0, 0.0)],
)
@pytest.mark.fault("numbers: a LoRA scale that cannot be merged exactly")
def test_what_would_round_or_overflow_is_not_folded(value: float, scale: float) -> None:
    """In fp16, numbers below 6e-5 lose bits, and 65504 is the largest number."""
    state = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.tensor([[1.0], [value]])}
    state = {name: tensor.half() for name, tensor in state.items()}
    folded, how = fold_scale(state, scale)
    assert how == NOT_FOLDED
    assert all(folded[name] is state[name] for name in state)
    if value == 6e4:
        with pytest.raises(UsageError, match=r"--fold_lora_scale: a\.lora_B\.weight"):
            fold_scale(state, scale, rounded=True)


def test_a_run_prints_which_loaders_read_its_scale(
    model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load_tensors", "--max_train_steps", 1]
    output = tmp_path / "it's $mine"
    assert train(lora_flags(model, tensors, output, *flags, "--lora_alpha", 6)) == 0
    told = "the LoRA's scale, 1.5, is only in the file's metadata"
    said = capsys.readouterr().err
    assert told in said
    (command,) = re.findall("to use it: (.+)", said)
    assert shlex.split(command) == ["python", str(output / "inference.py")]
    made = json.loads((output / "recipe.json").read_text())
    assert (made["lora_alpha"], made["lora_scale"], made["lora_scale_folded"]) == (6, 1.5, NOT_FOLDED)
    assert "its scale, 1.5, is only in the file's metadata" in (output / "README.md").read_text()
    assert train(lora_flags(model, tensors, output, *flags, "--lora_alpha", 6, "--fold_lora_scale")) == 0
    assert told not in capsys.readouterr().err
    made = json.loads((output / "recipe.json").read_text())
    assert (made["lora_alpha"], made["lora_scale_folded"]) == (6, FOLDED_ROUNDED)
    assert read_header(str(output)).config["lora_alpha"] == 4
    assert "its scale, 1.5, is multiplied into its matrices" in (output / "README.md").read_text()


def test_conversion_to_comfyui_and_back_keeps_a_folded_file(model: Path, tmp_path: Path) -> None:
    trained(model, "--lora_alpha", 8).save(tmp_path)
    comfy, again = tmp_path / "comfy.safetensors", tmp_path / "again"
    convert_lora.main([str(tmp_path), str(comfy), "--to", "comfyui"])
    tensors = load_file(comfy)
    assert {tensors[name].item() for name in tensors if name.endswith(".alpha")} == {4.0}
    convert_lora.main([str(comfy), str(again), "--to", "diffusers"])
    assert equal(load_file(again / WEIGHTS), load_file(tmp_path / WEIGHTS))
    assert metadata_of(again) == metadata_of(tmp_path)


def test_numbers_that_another_program_changed_are_not_unfolded(model: Path, tmp_path: Path) -> None:
    """If another program keeps the metadata but changes alpha, the metadata no longer describe the matrices."""
    trained(model, "--lora_alpha", 8).save(tmp_path)
    comfy = tmp_path / "comfy.safetensors"
    convert_lora.main([str(tmp_path), str(comfy), "--to", "comfyui"])
    with safe_open(comfy, "pt") as file:
        metadata = file.metadata()
    changed = {name: 2 * t if name.endswith(".alpha") else t for name, t in load_file(comfy).items()}
    save_file(changed, comfy, metadata)
    convert_lora.main([str(comfy), str(tmp_path / "again"), "--to", "diffusers"])
    assert list(metadata_of(tmp_path / "again")) == ["lora_adapter_metadata"]


# -- the oldest diffusers that the project promises --------------------------------------------------------------------

OLD = """
import sys
import diffusers, torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
assert diffusers.__version__ == "0.40.0", diffusers.__version__
model, folder, made = sys.argv[1:]
results = {}
for name, given in {"file": folder, "dict": load_file(f"{folder}/pytorch_lora_weights.safetensors")}.items():
    base = CogVideoXTransformer3DModel.from_pretrained(f"{model}/transformer", dtype=torch.float32)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    CogVideoXPipeline(**parts, transformer=base).load_lora_weights(given)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 3, 16, 8, 12, generator=generator)
    prompt = torch.randn(2, 32, 32, generator=generator)
    rotary = (torch.ones(72, 32), torch.zeros(72, 32))
    with torch.no_grad():
        results[name] = base(latents, prompt, torch.tensor([5, 900]), image_rotary_emb=rotary, return_dict=False)[0]
save_file(results, made)
"""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns the environment of a process that imports diffusers 0.40.0, installed from the package index."""
    folder = tmp_path_factory.mktemp("diffusers")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, "diffusers==0.40.0"], check=True, timeout=300)
    return environment(PYTHONPATH=str(folder))


@pytest.mark.long
@pytest.mark.parametrize("name", EXACTLY)
def test_the_oldest_diffusers_gives_what_was_trained(
    model: Path, tmp_path: Path, oldest: dict[str, str], name: str
) -> None:
    method = trained(model, *EXACTLY[name])
    method.save(tmp_path)
    made = tmp_path / "made.safetensors"
    command = [sys.executable, "-c", OLD, str(model), str(tmp_path), str(made)]
    subprocess.run(command, check=True, env=oldest, timeout=300)
    wanted = outputs(method.transformer)
    assert all(found.equal(wanted) for found in load_file(made).values())


@pytest.mark.long
def test_inference_runs_in_the_oldest_diffusers(
    model: Path, tensors: Path, tmp_path: Path, oldest: dict[str, str]
) -> None:
    flags = ["--load_tensors", "--max_train_steps", 1, "--validation_prompt", PROMPT]
    assert train(lora_flags(model, tensors, tmp_path / "lora", *flags)) == 0
    script = tmp_path / "lora" / "inference.py"
    video = tmp_path / "video.mp4"
    subprocess.run([sys.executable, str(script), PROMPT, str(video)], check=True, env=oldest, timeout=300)
    assert video.stat().st_size > 0
