"""Tests the scripts that merge, extract and convert a LoRA, and the checks of a LoRA file against the flags."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_lora
import extract_lora
import merge_lora
import pytest
import torch
from lora_tools import NOISY, stored_dtype, transformer_folder
from running import ROOT, WEIGHTS, equal
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvideox.checks import TRAINING_CHECKS
from cogvideox.config import args
from cogvideox.config.flags import LoraFlags, ModelFlags
from cogvideox.config.lora_file import check_lora, misfits, read_header
from cogvideox.config.options import LoraOptions, SftOptions
from cogvideox.errors import UsageError
from cogvideox.model.methods import WEIGHTS_NAME
from cogvideox.model.models import load_transformer

NAMES = ["to_q", "to_out.0", "ff.net.0.proj", "proj_out"]


def stock(model: Path) -> Any:
    return load_transformer(ModelFlags(str(model)), torch.float32)


def make_lora(folder: Path, model: Path, **config: Any) -> Any:
    """Writes a LoRA of random numbers into a folder, and returns the transformer with it."""
    from diffusers import CogVideoXPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    fields = {"r": 4, "lora_alpha": 6, "target_modules": NAMES} | config
    transformer = stock(model)
    transformer.add_adapter(LoraConfig(**fields))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        elif "lora_magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
    CogVideoXPipeline.save_lora_weights(
        str(folder),
        {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(transformer).items()},
        weight_name=WEIGHTS_NAME,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return transformer.eval()


def with_lora(model: Path, lora: Path) -> Any:
    """Returns the transformer with a LoRA that stock diffusers has loaded."""
    from diffusers import CogVideoXPipeline

    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CogVideoXPipeline(**parts, transformer=stock(model))
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return pipeline.transformer.eval()


def outputs(transformer: Any) -> Tensor:
    """Returns the output of a transformer for fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 3, 16, 8, 12, generator=generator)
    prompt = torch.randn(1, 32, 32, generator=generator)
    rotary = (torch.ones(72, 32), torch.zeros(72, 32))
    with torch.no_grad():
        return transformer(latents, prompt, torch.tensor([500]), image_rotary_emb=rotary, return_dict=False)[0]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def fails(capsys: pytest.CaptureFixture[str], main: Callable[..., None], *argv: object) -> str:
    """Returns the message with which a command line is refused."""
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in argv])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# -- merged ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}])
def test_the_merged_model_gives_what_the_adapter_gives(model: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    from diffusers import CogVideoXTransformer3DModel

    adapted = outputs(make_lora(tmp_path / "lora", model, **config))
    given = ["--base_model", model, "--lora", tmp_path / "lora", "--output_dir", tmp_path / "merged"]
    merge_lora.main([str(part) for part in given])
    merged = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "merged")
    assert set(merged.state_dict()) == set(stock(model).state_dict())
    torch.testing.assert_close(outputs(merged), adapted, rtol=1e-5, atol=2e-5)
    assert (outputs(stock(model)) - adapted).abs().max() > 1e-2


def test_strength_and_type_of_the_merged_weights(model: Path, tmp_path: Path) -> None:
    make_lora(tmp_path / "lora", model)
    lora = load_file(tmp_path / "lora" / WEIGHTS)
    given = ["--base_model", model, "--lora", tmp_path / "lora" / WEIGHTS, "--output_dir", tmp_path / "merged"]
    merge_lora.main([*map(str, given), "--lora_scale", "0.5", "--dtype", "bf16"])
    assert stored_dtype(transformer_folder(str(tmp_path / "merged"))) == "bf16"
    (path,) = (tmp_path / "merged").glob("*.safetensors")
    name = "transformer_blocks.1.attn1.to_q"
    change = lora[f"transformer.{name}.lora_B.weight"] @ lora[f"transformer.{name}.lora_A.weight"]
    wanted = stock(model).state_dict()[f"{name}.weight"] + 0.5 * 6 / 4 * change
    torch.testing.assert_close(load_file(path)[f"{name}.weight"].float(), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [
        ("transformer_blocks.0.attn1.to_q.lora_A", (4, 48), "has another size"),
        ("transformer_blocks.0.attn1.to_q.lora_B", (48, 4), "has another size"),
        ("transformer_blocks.99.attn1.to_q.lora_A", (4, 64), "is missing"),
    ],
)
def test_a_lora_of_another_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, shape: tuple[int, int], rule: str
) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({f"transformer.{name}.weight": torch.ones(shape)}, lora)
    message = fails(capsys, merge_lora.main, "--base_model", model, "--lora", lora, "--output_dir", tmp_path / "merged")
    layer = name.rpartition(".")[0]
    assert f"{lora}: does not fit, because layer {layer} of the base model {rule}; give the model that" in message
    lora.write_bytes(b"torn")
    message = fails(capsys, merge_lora.main, "--base_model", model, "--lora", lora, "--output_dir", tmp_path / "merged")
    assert f"{lora}: is not a complete safetensors file" in message
    assert not (tmp_path / "merged").exists()


def test_what_is_no_transformer_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a run has a config.json, but that has the flags of the run."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_lora(tmp_path / "run", model)
    given = ["--base_model", model, "--output_dir", tmp_path / "new", "--tuned_model"]
    for text in ('{"rank": 4}', "[]", "torn"):
        (tmp_path / "run" / "config.json").write_text(text)
        message = fails(capsys, extract_lora.main, *given, tmp_path / "run")
        assert (
            f"{tmp_path}/run: has no transformer/config.json of CogVideoX; give a pipeline, or its transformer"
            in message
        )
    for missing in ("nobody/nothing", tmp_path / "nothing"):
        message = fails(capsys, extract_lora.main, *given, missing)
        assert f"{missing}: no such folder, and it cannot be downloaded from the hub (" in message


# -- extracted ---------------------------------------------------------------------------------------------------------


def tune(model: Path, folder: Path, rank: int | None = None, more: tuple[str, ...] = ()) -> Any:
    """Writes a model whose linear weights differ by matrices of low rank, as do other parameters that are named."""
    tuned, generator = stock(model), torch.Generator().manual_seed(2)
    for name, parameter in tuned.named_parameters():
        if name.endswith(("to_q.weight", "net.2.weight")):
            rows, columns = parameter.shape
            inner = rank or min(rows, columns)
            left, right = (
                torch.randn(rows, inner, generator=generator),
                torch.randn(inner, columns, generator=generator),
            )
            parameter += 0.02 * left @ right
        elif name in more:
            parameter += 0.1
    tuned.save_pretrained(folder)
    return tuned


def test_the_full_rank_reproduces_the_fine_tune(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tune(model, tmp_path / "tuned")
    given = [
        "--base_model",
        model,
        "--tuned_model",
        tmp_path / "tuned",
        "--rank",
        64,
        "--output_dir",
        tmp_path / "lora",
    ]
    extract_lora.main([str(part) for part in given])
    assert "rank 64 holds 100.00% of the change of 4 layers" in capsys.readouterr().out
    again = outputs(with_lora(model, tmp_path / "lora" / WEIGHTS))
    torch.testing.assert_close(again, outputs(tuned), rtol=1e-4, atol=1e-4)
    assert (outputs(stock(model)) - again).abs().max() > 1e-2
    flags = LoraFlags(rank=64, lora_alpha=64.0, target_modules=("attn1.to_q", "ff.net.2"))
    assert list(misfits(read_header(str(tmp_path / "lora")), flags)) == []


def test_a_rank_holds_what_its_singular_values_hold(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tune(model, tmp_path, rank=5, more=("proj_out.bias",))
    base = stock(model)
    full_rank = extract_lora.extract(base, tuned, 5)
    assert "rank 5 holds 100.00% of the change of 4 layers" in capsys.readouterr().out
    extract_lora.extract(base, tuned, 2, r".*\.0\..*to_q")
    shown = capsys.readouterr().out
    name = "transformer_blocks.0.attn1.to_q"
    change = tuned.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(
        full_rank[f"{name}.lora_B.weight"] @ full_rank[f"{name}.lora_A.weight"], change, rtol=0, atol=1e-5
    )
    energy = torch.linalg.svdvals(change).square()
    assert f"rank 2 holds {energy[:2].sum() / energy.sum():.2%} of the change of 1 layers" in shown
    every = sum((t - b).square().sum() for t, b in zip(tuned.parameters(), base.parameters(), strict=True))
    assert f"{1 - energy.sum() / every:.2%} of all changes are in other parameters" in shown


def test_what_cannot_be_extracted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--base_model", model, "--tuned_model", model, "--output_dir", tmp_path / "lora")
    assert "has changed; is --tuned_model the fine-tune?" in fails(capsys, extract_lora.main, *given)
    assert "--rank 0: must be at least 1" in fails(capsys, extract_lora.main, *given, "--rank", 0)
    assert "--layers (: is not a valid regular expression" in fails(capsys, extract_lora.main, *given, "--layers", "(")
    assert "has no transformer/config.json" in fails(capsys, extract_lora.main, *given, "--tuned_model", tmp_path)
    assert not list(tmp_path.iterdir())


# -- converted ---------------------------------------------------------------------------------------------------------


def there_and_back(lora: Path, folder: Path, target: str = "comfyui") -> tuple[Path, Path]:
    comfy, again = folder / "comfy.safetensors", folder / "again"
    convert_lora.main([str(lora), str(comfy), "--to", target])
    convert_lora.main([str(comfy), str(again), "--to", "diffusers"])
    return comfy, again / WEIGHTS


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}}]
)
@pytest.mark.parametrize("target", ["comfyui", "videox-fun"])
@pytest.mark.fault("export: a LoRA is converted to another format and back")
def test_converting_there_and_back_is_bit_exact(
    model: Path, tmp_path: Path, config: dict[str, Any], target: str
) -> None:
    make_lora(tmp_path, model, **config)
    comfy, again = there_and_back(tmp_path, tmp_path, target)
    assert equal(load_file(again), load_file(tmp_path / WEIGHTS))
    assert header(again) == header(tmp_path / WEIGHTS)
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in load_file(comfy))


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}}])
def test_comfyui_s_numbers_alone_give_the_same_change(model: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """ComfyUI computes alpha / rank * up @ down. A file without metadata is converted back too."""
    adapted = make_lora(tmp_path, model, **config)
    comfy, _ = there_and_back(tmp_path, tmp_path)
    tensors = load_file(comfy)
    for name, layer in adapted.named_modules():
        if hasattr(layer, "lora_A"):
            down, up, alpha = (
                tensors[f"lora_unet_{convert_lora.flattened(name, 'comfyui')}.{part}"]
                for part in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            torch.testing.assert_close(alpha / len(down) * up @ down, layer.get_delta_weight("default"))
    save_file(tensors, tmp_path / "foreign.safetensors")
    convert_lora.main([str(tmp_path / "foreign.safetensors"), str(tmp_path / "d.safetensors"), "--to", "diffusers"])
    torch.testing.assert_close(
        outputs(with_lora(model, tmp_path / "d.safetensors")), outputs(adapted), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
def test_every_linear_layer_has_its_name_back(tiny: Callable[[str], Path], kind: str) -> None:
    layers = [n for n, m in stock(tiny(kind)).named_modules() if type(m) is torch.nn.Linear]
    assert len(layers) > 20
    for target in ("comfyui", "videox-fun"):
        assert [convert_lora.dotted(convert_lora.flattened(name, target)) for name in layers] == layers


def test_what_cannot_be_converted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_lora(tmp_path, model, use_dora=True)
    output = tmp_path / "x.safetensors"
    assert "ComfyUI computes DoRA differently" in fails(capsys, convert_lora.main, tmp_path, output, "--to", "comfyui")
    assert "is not of the form lora_unet_" in fails(capsys, convert_lora.main, tmp_path, output, "--to", "diffusers")
    assert "is neither a .safetensors file nor" in fails(
        capsys, convert_lora.main, tmp_path / "no", output, "--to", "comfyui"
    )
    save_file({"transformer.attn9.lora_A.weight": torch.ones(1, 2)}, tmp_path / "odd.safetensors")
    message = fails(capsys, convert_lora.main, tmp_path / "odd.safetensors", output, "--to", "comfyui")
    assert "is not a linear layer of CogVideoX" in message
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    fails(capsys, convert_lora.main, tmp_path / "torn.safetensors", output, "--to", "comfyui")
    assert not output.exists()


def linked(place: Path, target: Path) -> Path:
    place.symlink_to(target)
    return place


@pytest.mark.fault("flags: an output that is the input", times=11)
def test_no_script_replaces_what_it_reads(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The input is refused by its name and through a link, and an unwritable output is reported before any work."""
    make_lora(tmp_path / "lora", model)
    file = tmp_path / "lora" / WEIGHTS
    before = file.read_bytes()
    hard = tmp_path / "hard.safetensors"
    hard.hardlink_to(file)
    outputs = [file, tmp_path / "lora", linked(tmp_path / "link.safetensors", file)]
    outputs += [linked(tmp_path / "folder", tmp_path / "lora"), hard, tmp_path / "lora" / ".." / "lora" / WEIGHTS]
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    message = fails(capsys, convert_lora.main, file, other, "--to", "comfyui")
    assert f"{other}: has no metadata of a LoRA of this project and would be replaced; move it away" in message
    assert list(load_file(other)) == ["weight"]
    for output in outputs:
        message = fails(capsys, convert_lora.main, tmp_path / "lora", output, "--to", "comfyui")
        assert f"is the same as the input {file}; give another output" in message
    (tmp_path / "x.safetensors").mkdir()
    message = fails(capsys, convert_lora.main, file, tmp_path / "x.safetensors", "--to", "comfyui")
    assert "is a folder; give another output" in message
    merge = ("--base_model", model, "--lora", file, "--output_dir")
    extract = ("--base_model", model, "--tuned_model", model, "--output_dir")
    for main, given in ((merge_lora.main, merge), (extract_lora.main, extract)):
        for output in (model / "transformer", linked(tmp_path / main.__module__, model / "transformer")):
            message = fails(capsys, main, *given, output)
            assert f"is the same as the input {model / 'transformer'}; give another output" in message
        assert "is a folder that is not empty" in fails(capsys, main, *given, tmp_path / "lora")
        assert "is a file; give a new folder" in fails(capsys, main, *given, model / "model_index.json")
    assert "is the same as the input" in fails(capsys, merge_lora.main, *merge, file)
    assert file.read_bytes() == before


@pytest.mark.fault("disk: a LoRA script's output cannot be written", times=3)
def test_a_full_disk_is_one_line_and_keeps_the_old_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lora(tmp_path / "lora", model)
    output = tmp_path / "out" / "x.safetensors"
    output.parent.mkdir()
    save_file({"weight": torch.zeros(1)}, output, {"cogvideox_training": "{}"})
    old = output.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for name, fails_so in (("safetensors.torch.serialize_file", full), ("os.fsync", broken), ("os.replace", broken)):
        with monkeypatch.context() as patch:
            patch.setattr(name, fails_so)
            message = fails(capsys, convert_lora.main, tmp_path / "lora", output, "--to", "comfyui")
        assert f"{output}: cannot be written (" in message
        assert [(path.name, path.read_bytes()) for path in output.parent.iterdir()] == [("x.safetensors", old)]


def test_a_link_as_output_stays_one(model: Path, tmp_path: Path) -> None:
    make_lora(tmp_path / "lora", model)
    (tmp_path / "empty").mkdir()
    link = linked(tmp_path / "link", tmp_path / "empty")
    merge_lora.main(["--base_model", str(model), "--lora", str(tmp_path / "lora"), "--output_dir", str(link)])
    assert link.is_symlink()
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("script", ["merge_lora.py", "extract_lora.py", "convert_lora.py"])
def test_help_needs_nothing_but_python(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(ROOT / "scripts" / script), "--help"]  # -S: no installed packages
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python scripts/{script}" in done.stdout


def test_packages_that_are_not_used_warn_of_nothing(model: Path, tmp_path: Path) -> None:
    assert [*NOISY, "matplotlib"] == list(args.NOISY)
    make_lora(tmp_path / "lora", model)
    flags = ["--base_model", str(model), "--lora", str(tmp_path / "lora"), "--output_dir", str(tmp_path / "merged")]
    command = [sys.executable, str(ROOT / "scripts" / "merge_lora.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


# -- the header of a LoRA and the flags --------------------------------------------------------------------------------


def fit(**more: Any) -> LoraFlags:
    return LoraFlags(**{"rank": 4, "lora_alpha": 6.0, "target_modules": tuple(NAMES)} | more)


def test_each_flag_that_does_not_fit_a_lora_is_named_with_its_fix(model: Path, tmp_path: Path) -> None:
    make_lora(tmp_path, model)
    file = read_header(str(tmp_path))
    assert list(misfits(file, fit())) == []
    assert list(misfits(file, fit(target_modules=(r"proj_out|.*(to_q|to_out\.0|net\.0\.proj)",)))) == []
    wrong = fit(rank=8, lora_alpha=8.0, use_rslora=True, use_dora=True, target_modules=("to_q", "to_k"))
    assert list(misfits(file, wrong)) == [
        "--rank 8: the LoRA of --lora_path has another rank; give --rank 4",
        "--lora_alpha 8: the LoRA of --lora_path has another alpha; give --lora_alpha 6",
        "--use_rslora: the LoRA of --lora_path was trained without it; leave it out",
        "--use_dora: the LoRA of --lora_path was trained without it; leave it out",
        "--target_modules to_q to_k: the LoRA of --lora_path changes other layers; "
        "give --target_modules attn1.to_out.0 attn1.to_q ff.net.0.proj proj_out",
    ]
    make_lora(tmp_path / "dora", model, use_dora=True)
    assert [line.split(":")[0] for line in misfits(read_header(str(tmp_path / "dora")), fit())] == ["--use_dora"]


def test_a_lora_that_does_not_fit_is_found_with_the_other_problems(model: Path, tmp_path: Path) -> None:
    make_lora(tmp_path, model)
    given = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--lora_path", str(tmp_path), "--rank", "4"]
    with pytest.raises(UsageError) as caught:
        args.parse(LoraOptions, None, [*given, "--use_dora"], (check_lora,))
    flags = [line.split(" ")[0].rstrip(":") for line in caught.value.problems]
    assert flags == ["--lora_alpha", "--use_dora", "--target_modules"]
    assert check_lora in TRAINING_CHECKS
    assert list(check_lora(args.parse(SftOptions, None, given[:4]))) == []


def test_a_lora_that_names_no_alpha_has_its_rank_as_diffusers_reads_it(model: Path, tmp_path: Path) -> None:
    make_lora(tmp_path, model)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / "bare.safetensors")
    (line,) = misfits(read_header(str(tmp_path / "bare.safetensors")), fit())
    assert line.endswith("give --lora_alpha 4")


@pytest.mark.fault("security: a LoRA that is not a safetensors file")
def test_files_that_are_no_lora_are_refused(model: Path, tmp_path: Path) -> None:
    make_lora(tmp_path, model, rank_pattern={"to_q": 2})
    (line,) = misfits(read_header(str(tmp_path)), fit())
    assert "its layers differ in rank or alpha" in line
    convert_lora.main([str(tmp_path), str(tmp_path / "comfy.safetensors"), "--to", "comfyui"])
    (line,) = misfits(read_header(str(tmp_path / "comfy.safetensors")), fit())
    assert "scripts/convert_lora.py" in line
    contents = {
        "torn": b"\x10\0\0\0\0\0\0\0{",
        "huge": b"\xff" * 8 + b"{}",
        "list": (2).to_bytes(8, "little") + b"[]",
        "shape": (10).to_bytes(8, "little") + json.dumps({"a": {}}).encode() + b"  ",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(UsageError, match="is damaged, or not a safetensors file"):
            read_header(str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(UsageError, match="there is no"):
        read_header(str(tmp_path / "none.safetensors"))
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"only \.safetensors files are read"):
        read_header(str(tmp_path / "lora.bin"))
