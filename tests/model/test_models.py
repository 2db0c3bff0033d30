"""Tests models.py: parts are identified by their weights, and freed at the end of their ``with`` block."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from hub_stand_in import in_hub_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from cogvideox.config.flags import ModelFlags
from cogvideox.errors import UsageError
from cogvideox.model import models
from cogvideox.model.encode import prompt_embeds

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
VAE = "vae/diffusion_pytorch_model.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def flags(folder: Path, variant: str | None = None) -> ModelFlags:
    return ModelFlags(str(folder), variant=variant)


@pytest.fixture
def own(tiny: Tiny, tmp_path: Path) -> Path:
    """Returns a copy of the VAE, T5 and tokenizer that a test may change."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny("5b") / part, tmp_path / "model" / part)
    return tmp_path / "model"


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change({name: tensor.clone() for name, tensor in load_file(path).items()}), path, {"format": "pt"})


# -- files and types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_dtype_is_read_from_the_weights(own: Path, dtype: str) -> None:
    rewrite(own / VAE, lambda t: {name: tensor.to(DTYPES[dtype]) for name, tensor in t.items()})
    assert models.stored_dtype(flags(own), "vae") == dtype
    assert models.stored_dtype(flags(own), "text_encoder") == "fp32"


@pytest.mark.parametrize("name", ["cogvideox-2b", "CogVideoX-5b", "my-bf16-model"])
def test_the_folder_s_name_says_nothing(own: Path, name: str) -> None:
    rewrite(own / VAE, lambda t: {key: tensor.half() for key, tensor in t.items()})
    assert models.stored_dtype(flags(own.rename(own.with_name(name))), "vae") == "fp16"


PARTS = {
    "transformer": (CogVideoXTransformer3DModel, "transformer_blocks.1.", "attn1.to_k.weight"),
    "text_encoder": (T5EncoderModel, "encoder.block.1.", "layer.0.SelfAttention.k.weight"),
    "vae": (AutoencoderKLCogVideoX, "decoder.up_blocks.1.", "resnets.0.conv1.conv.weight"),
}
Weights = dict[str, torch.Tensor]


def without(weights: Weights, layer: str, _name: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(layer)}


def with_another(weights: Weights, layer: str, _name: str) -> Weights:
    other = layer.replace("1", "9")
    return weights | {n.replace(layer, other): t.clone() for n, t in weights.items() if n.startswith(layer)}


def with_fewer_rows(weights: Weights, layer: str, name: str) -> Weights:
    return weights | {f"{layer}{name}": weights[f"{layer}{name}"][:-1].clone()}


@pytest.mark.fault("data: weights of a model that do not belong to its config.json")
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (without, "its files lack [0-9]+ weights that config.json describes, such as {1}"),
        (with_another, "its files have [0-9]+ weights in layers that config.json does not describe, such as {9}"),
        (with_fewer_rows, "its files have 1 weight in another shape than config.json describes, such as {1}"),
    ],
)
@pytest.mark.parametrize("part", PARTS)
def test_weights_that_do_not_belong_to_their_config_are_refused(
    tiny: Tiny, tmp_path: Path, part: str, change: Callable[..., Weights], rule: str
) -> None:
    """The libraries warn, and draw what is missing at random: a T5 without a block encodes captions as noise."""
    shutil.copytree(tiny("5b") / part, tmp_path / part)
    of, layer, name = PARTS[part]
    models.load_weights(of, flags(tmp_path), part, torch.float32)
    (path,) = (tmp_path / part).glob("*.safetensors")
    rewrite(path, lambda weights: change(weights, layer, name))
    with pytest.raises(UsageError) as caught:
        models.load_weights(of, flags(tmp_path), part, torch.float32)
    names = rule.replace("{1}", re.escape(layer)).replace("{9}", re.escape(layer.replace("1", "9")))
    assert re.fullmatch(f"{re.escape(str(tmp_path / part))}: {names}.*; get the folder again", str(caught.value))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            HTTPError("timed out"),
            r"--pre\S+ me/x: no such folder, and it cannot be downloaded .*\(timed out\); run .* me/x .*",
        ),
        (
            HfHubHTTPError("no", response=cast(Any, SimpleNamespace(status_code=401, headers={}, request=None))),
            r"--pre\S+ me/x: no such folder, and it .*\(.*\); check the name, the login .* HF_TOKEN.*",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "CACHE: No space left on device, .*"),
        (OSError(errno.ENOSPC, "No space left on device"), "CACHE: No space left on device, .*"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            "CACHE: Permission denied; make it writable and run.*",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory"),
            r"--pre\S+ me/x: no such folder, and it cannot .*",
        ),
    ],
)
def test_a_download_of_weights_that_fails_is_reported_in_one_line(
    error: Exception, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UsageError) as caught:
        models.part_folder(ModelFlags("me/x", cache_dir=str(tmp_path)), "vae")
    assert re.fullmatch(line.replace("CACHE", str(tmp_path)), str(caught.value))


@pytest.mark.parametrize("size", [-100, 20, 0])
@pytest.mark.parametrize("read", [models.stored_dtype, models.weight_fingerprint])
def test_a_file_of_a_hub_model_that_is_cut_off_is_named(
    own: Path, tmp_path: Path, read: Callable[[ModelFlags, str], str], size: int
) -> None:
    in_hub_cache(tmp_path / "cache", "x", own)
    (path,) = (tmp_path / "cache").glob(f"*/snapshots/*/{VAE}")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))}: is damaged or incomplete .*; download this file"):
        read(ModelFlags("me/x", cache_dir=str(tmp_path / "cache")), "vae")


def test_an_exported_file_that_is_cut_off_is_named(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("5b") / "transformer", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=f"^{re.escape(str(tmp_path / 'out'))}: cannot be loaded .*; get the folder"):
        models.load_complete(CogVideoXTransformer3DModel, tmp_path / "out", torch.float32)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_has_its_embedding_under_either_name_and_may_have_a_decoder(own: Path, name: str) -> None:
    path = own / "text_encoder" / "model.safetensors"
    more = {"lm_head.weight": torch.ones(2, 2), "decoder.block.0.layer.0.SelfAttention.k.weight": torch.ones(2, 2)}
    rewrite(path, lambda weights: {name if n == "shared.weight" else n: t for n, t in weights.items()} | more)
    models.load_weights(T5EncoderModel, flags(own), "text_encoder", torch.float32)


def test_a_buffer_of_an_earlier_version_is_ignored(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("5b") / "transformer", tmp_path / "transformer")
    (path,) = (tmp_path / "transformer").glob("*.safetensors")
    rewrite(path, lambda weights: weights | {"patch_embed.pos_embedding": torch.ones(1, 2, 2)})
    models.load_transformer(flags(tmp_path), torch.float32)


def test_most_bytes_decide(own: Path) -> None:
    def mixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        large = max(tensors, key=lambda name: tensors[name].numel())
        return {name: tensor if name == large else tensor[:1].half() for name, tensor in tensors.items()}

    rewrite(own / VAE, mixed)
    assert models.stored_dtype(flags(own), "vae") == "fp32"


def test_other_types_are_refused(own: Path) -> None:
    rewrite(own / VAE, lambda t: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in t.items()})
    with pytest.raises(UsageError, match="weights are F8_E4M3; give fp32, fp16 or bf16"):
        models.stored_dtype(flags(own), "vae")


def test_tensor_entries_are_those_of_the_library(own: Path) -> None:
    header, start = models.read_tensor_entries(own / VAE)
    with safe_open(own / VAE, "pt") as file:
        assert set(header) == set(file.keys())
        for name, entry in header.items():
            assert entry["shape"] == list(file.get_tensor(name).shape)
            begin, end = entry["data_offsets"]
            content = (own / VAE).read_bytes()[start + begin : start + end]
            assert content == file.get_tensor(name).numpy().tobytes()


@pytest.mark.parametrize(
    ("variant", "chosen"),
    [
        (None, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("fp16", ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]),
        ("bf16", ["model.bf16.safetensors"]),
    ],
)
def test_variant_files(tmp_path: Path, variant: str | None, chosen: list[str]) -> None:
    (tmp_path / "vae").mkdir()
    names = [f"model{part}-0000{k}-of-00002.safetensors" for part in ("", ".fp16") for k in (1, 2)]
    for name in (*names, "model.bf16.safetensors"):
        save_file({}, tmp_path / "vae" / name)
    for name in ("config.json", "model.safetensors.index.json", "model.bin"):
        (tmp_path / "vae" / name).touch()
    assert [path.name for path in models.weight_files(flags(tmp_path, variant), "vae")] == chosen


def test_a_variant_is_loaded_with_its_own_type_and_fingerprint(own: Path) -> None:
    plain = models.weight_fingerprint(flags(own), "vae")
    half = own / "vae/diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(own / VAE, half)
    assert models.weight_fingerprint(flags(own, "fp16"), "vae") == plain
    rewrite(half, lambda t: {name: tensor.half() for name, tensor in t.items()})
    assert models.weight_fingerprint(flags(own), "vae") == plain
    assert models.weight_fingerprint(flags(own, "fp16"), "vae") != plain
    assert models.stored_dtype(flags(own, "fp16"), "vae") == "fp16"
    (own / VAE).unlink()
    assert models.load_vae(flags(own, "fp16"), torch.float16).dtype == torch.float16


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_variant_that_is_not_there_is_named(own: Path, part: str) -> None:
    with pytest.raises(UsageError, match=rf"--variant fp8: {part} has no such safetensors file \(there: .*safetensors"):
        models.weight_files(flags(own, "fp8"), part)


@pytest.mark.fault("data: a model of the hub of which a part of the weights was downloaded, without a network", times=2)
def test_weights_that_are_not_in_the_cache_are_named_with_what_downloads_them(own: Path, tmp_path: Path) -> None:
    """Without a network, the client of the hub returns the folder of what was downloaded before."""
    shards = [own / "vae" / f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    (own / VAE).rename(shards[0])
    shards[1].write_bytes(b"")
    cache = tmp_path / "a cache"
    in_hub_cache(cache, "model", own)
    model = ModelFlags("me/model", revision="main", cache_dir=str(cache))
    fix = f"run where there is a network: hf download me/model --revision main --cache-dir '{cache}'"
    with pytest.raises(UsageError) as error:
        models.weight_files(model, "vae")
    assert str(error.value) == f"me/model: vae has 2 of 3 weight files; {fix}"
    (weights,) = cache.rglob("text_encoder/*.safetensors")
    weights.unlink()
    with pytest.raises(UsageError) as error:
        models.weight_files(model, "text_encoder")
    assert f"(there: none; if the model has some, {fix})" in str(error.value)


def test_a_part_that_is_not_there_is_named(own: Path) -> None:
    with pytest.raises(UsageError, match="has no folder transformer"):
        models.part_folder(flags(own), "transformer")


# -- fingerprints ------------------------------------------------------------------------------------------------------


def nudge(name: str, place: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[place] += 1.0
        return tensors

    return change


def test_fingerprint_changes_with_one_weight_of_any_tensor(own: Path) -> None:
    whole = load_file(own / VAE)
    seen = {models.weight_fingerprint(flags(own), "vae")}
    for name in list(whole)[::5]:
        rewrite(own / VAE, nudge(name, 0))
        seen.add(models.weight_fingerprint(flags(own), "vae"))
    assert len(seen) == 1 + len(list(whole)[::5])


def test_fingerprint_changes_with_the_last_weight_of_a_large_tensor(own: Path) -> None:
    path = own / "text_encoder/model.safetensors"
    before = models.weight_fingerprint(flags(own), "text_encoder")
    rewrite(path, nudge("shared.weight", -1))
    assert models.weight_fingerprint(flags(own), "text_encoder") != before


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {name: tensor.bfloat16() for name, tensor in t.items()},
        lambda t: {f"x{name}": tensor for name, tensor in t.items()},
        lambda t: {name: tensor.unsqueeze(0).contiguous() for name, tensor in t.items()},
        lambda t: dict(list(t.items())[1:]),
    ],
    ids=["type", "name", "shape", "fewer"],
)
def test_fingerprint_covers_types_names_and_shapes(own: Path, change: Any) -> None:
    before = models.weight_fingerprint(flags(own), "vae")
    rewrite(own / VAE, change)
    assert models.weight_fingerprint(flags(own), "vae") != before


def test_fingerprint_does_not_depend_on_where_the_model_is_stored(own: Path, tiny: Tiny) -> None:
    moved = own.rename(own.with_name("elsewhere"))
    (moved / VAE).touch()
    assert models.weight_fingerprint(flags(moved), "vae") == models.weight_fingerprint(flags(tiny("5b")), "vae")
    assert models.text_fingerprint(flags(moved)) == models.text_fingerprint(flags(tiny("5b")))


def test_checkpoints_with_the_same_vae_share_its_fingerprint(tiny: Tiny) -> None:
    prints = {kind: models.weight_fingerprint(flags(tiny(kind)), "vae") for kind in ("2b", "5b")}
    assert prints["2b"] == prints["5b"]
    assert models.weight_fingerprint(flags(tiny("5b")), "transformer") != prints["5b"]


def test_text_fingerprint_covers_the_tokenizer(own: Path) -> None:
    before = models.text_fingerprint(flags(own))
    assert before != models.weight_fingerprint(flags(own), "text_encoder")
    path = sorted((own / "tokenizer").glob("*.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"changed": 1}))
    assert models.text_fingerprint(flags(own)) != before


def test_a_folder_next_to_the_tokenizer_s_files_is_ignored(own: Path) -> None:
    before = models.text_fingerprint(flags(own))
    (own / "tokenizer" / ".ipynb_checkpoints").mkdir()
    assert models.text_fingerprint(flags(own)) == before


# -- loading -----------------------------------------------------------------------------------------------------------


@contextmanager
def text_encoder(folder: Path) -> Iterator[Any]:
    with models.text_encoder(flags(folder), "bf16", CPU) as (tokenizer, encoder):
        assert tokenizer("A red square").input_ids
        yield encoder


@contextmanager
def streamed_text_encoder(folder: Path) -> Iterator[Any]:
    with models.text_encoder(flags(folder), "bf16", CPU, "host") as (_, encoder):
        yield encoder


@contextmanager
def video_encoder(folder: Path) -> Iterator[Any]:
    with models.video_encoder(flags(folder), "bf16", CPU, tiling=False) as vae:
        yield vae


@pytest.mark.parametrize("block", [text_encoder, streamed_text_encoder, video_encoder])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_freed_when_the_block_ends(tiny: Tiny, block: Any, fails: bool) -> None:
    held = None
    try:
        with block(tiny("5b")) as held:
            inside = [*held.parameters(), *held.buffers()]
            assert {tensor.device for tensor in inside} == {CPU}
            assert {parameter.dtype for parameter in held.parameters()} == {torch.bfloat16}
            assert not any(parameter.requires_grad for parameter in held.parameters())
            assert not held.training
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert held is not None
    assert all(tensor.is_meta for tensor in (*held.parameters(), *held.buffers()))


@pytest.mark.parametrize("tiling", [False, True])
def test_tiling_follows_the_flag(tiny: Tiny, tiling: bool) -> None:
    with models.video_encoder(flags(tiny("5b")), "fp32", CPU, tiling) as vae:
        assert vae.use_tiling is tiling


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_t5_on_the_host_gives_the_embeddings_of_the_device(tiny: Tiny, dtype: str, rows: int) -> None:
    captions = ["A red square moves to the right.", "", "word " * 200]
    with models.text_encoder(flags(tiny("5b")), dtype, CPU) as (tokenizer, encoder):
        parts = [captions[start : start + rows] for start in range(0, 3, rows)]
        wanted = torch.cat([prompt_embeds(tokenizer, encoder, part, 32) for part in parts])
    with models.text_encoder(flags(tiny("5b")), dtype, CPU, "host", rows) as (tokenizer, encoder):
        assert {block.rows for block in encoder.encoder.block} == {
            rows
        }  # on a CPU, other batch sizes round in the same way
        assert torch.equal(prompt_embeds(tokenizer, encoder, captions, 32), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_the_weights_are_those_in_memory(tiny: Tiny, dtype: str) -> None:
    vae = models.load_vae(flags(tiny("5b")), DTYPES[dtype])
    held = sum(parameter.numel() * parameter.element_size() for parameter in vae.parameters())
    assert models.weight_bytes(flags(tiny("5b")), "vae", dtype) == held


def test_t5_is_on_the_host_if_less_than_2_gib_would_stay_free(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = flags(tiny("5b")), models.weight_bytes(flags(tiny("5b")), "text_encoder", "bf16")
    assert models.resolve_t5_on(model, "bf16", CPU, "auto") == "device"
    for spare, place in ((0, "device"), (-1, "host")):
        monkeypatch.setattr(models, "free_device_bytes", lambda device, spare=spare: size + 2 * 2**30 + spare)
        assert models.resolve_t5_on(model, "bf16", CPU, "auto") == place
        assert models.resolve_t5_on(model, "fp32", CPU, "auto") == "host"
        assert [models.resolve_t5_on(model, "bf16", CPU, given) for given in ("host", "device")] == ["host", "device"]


def test_an_encoder_that_cannot_be_optimized_is_unchanged(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = models.load_vae(flags(tiny("5b")), torch.float32)
    monkeypatch.setattr(vae.encoder.mid_block.resnets[0], "nonlinearity", torch.nn.ReLU())
    models.try_to_optimize_encoder(vae)
    assert "which is slower: the encoder's resnets are not those of CogVideoX" in capsys.readouterr().err
    assert not any("forward" in vars(module) for module in vae.modules())


def test_on_a_cpu_the_encoder_is_that_of_diffusers(tiny: Tiny) -> None:
    with video_encoder(tiny("5b")) as vae:
        assert not any("forward" in vars(module) for module in vae.modules())
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformer_has_the_type_and_is_frozen(tiny: Tiny, dtype: str) -> None:
    transformer = models.load_transformer(flags(tiny("5b")), DTYPES[dtype])
    assert {parameter.dtype for parameter in transformer.parameters()} == {DTYPES[dtype]}
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


@pytest.mark.parametrize(("kind", "name"), [("2b", "CogVideoXDDIMScheduler"), ("5b", "CogVideoXDPMScheduler")])
def test_the_scheduler_is_the_config_s(tiny: Tiny, kind: str, name: str) -> None:
    scheduler = models.load_scheduler(flags(tiny(kind)))
    assert type(scheduler).__name__ == name
    assert scheduler.config.snr_shift_scale == (3.0 if kind == "2b" else 1.0)


@pytest.mark.fault("security: a scheduler_config.json that names another class of diffusers")
def test_a_scheduler_of_another_class_is_not_made(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("5b") / "scheduler", tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "DDPMScheduler"}))
    with pytest.raises(UsageError, match="names the scheduler DDPMScheduler; CogVideoX has CogVideoXDDIMScheduler or"):
        models.load_scheduler(flags(tmp_path))
