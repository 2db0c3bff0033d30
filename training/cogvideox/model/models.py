"""Finds, identifies and loads the parts of a CogVideoX pipeline: tokenizer, T5, VAE, transformer and scheduler.

``text_encoder`` and ``video_encoder`` are contexts: T5 and the VAE are freed at the end of the ``with`` block, so that
only one large model is in memory at a time. ``weight_fingerprint`` identifies weights for cache keys. Floating-point
types are read from the safetensors headers and never inferred from a model's name.
"""

import gc
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.caches import remembered
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import NO_PICKLES, SCHEDULERS, damaged_files, download_fix, downloading, missing_files
from cogvideox.errors import UsageError, first_line, plural
from cogvideox.files import disk_errno
from cogvideox.model import t5_stream, vae_encoder
from cogvideox.model.vae_decoder import default_tile

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STORED = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # safetensors' names of the types
LAYER = re.compile(r"\.\d+\.")  # in the names of the weights of numbered layers
SAMPLES, SAMPLE_BYTES = 16, 4096  # samples of each tensor that a fingerprint reads, and bytes per sample
T5_MARGIN = 2 * 2**30  # bytes that must stay free on the device in addition to T5's weights


def part_folder(model: ModelFlags, part: str) -> Path:
    """Returns the folder of one part, after downloading it if the model is given by its id on the Hugging Face hub.

    Args:
        model: The flags that name the model.
        part: The part's name: transformer, vae, text_encoder, tokenizer or scheduler.

    Raises:
        UsageError: The model has no such folder, or it cannot be downloaded.
    """
    folder = Path(model.pretrained_model_name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = [f"{part}/*.json", f"{part}/*.safetensors", f"{part}/*.model", f"{part}/*.txt"]
        repo = model.pretrained_model_name_or_path
        with downloading(model):
            folder = Path(
                snapshot_download(repo, revision=model.revision, cache_dir=model.cache_dir, allow_patterns=patterns)
            )
    if not (folder / part).is_dir():
        raise UsageError(f"--pretrained_model_name_or_path {folder}: has no folder {part}")
    return folder / part


def on_this_machine(model: ModelFlags) -> ModelFlags:
    """Returns the flags with the folder of a hub model in the cache, which may lack files. Nothing is downloaded.

    They are unchanged if the cache has nothing of it.
    """
    name = model.pretrained_model_name_or_path
    if Path(name).is_dir():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    where: dict[str, Any] = {"revision": model.revision, "cache_dir": model.cache_dir}
    try:
        return replace(model, pretrained_model_name_or_path=snapshot_download(name, local_files_only=True, **where))
    except LocalEntryNotFoundError:
        return model


def has_weights(model: ModelFlags, part: str) -> bool:
    """Returns whether all weights of a part in a folder are there, of the variant that --variant names."""
    folder = Path(model.pretrained_model_name_or_path, part)
    if not folder.is_dir():
        return False
    try:
        weight_files(model, part)
    except UsageError:
        return False
    return not any(missing_files(folder))


def weight_files(model: ModelFlags, part: str) -> list[Path]:
    """Returns the safetensors files of a part, of the variant that --variant names.

    Raises:
        UsageError: There are no such files, one is damaged, or some are missing, as in the cache of the hub after an
            interrupted download, if there is no network.
    """
    files = sorted(part_folder(model, part).glob("*.safetensors"))
    variants = {path: (path.name.split(".")[1:-1] or [""])[0] for path in files}
    chosen = [path for path in files if variants[path].split("-")[0] == (model.variant or "")]
    name = model.pretrained_model_name_or_path
    fix = "download the model again" if Path(name).is_dir() else download_fix(model)
    if not chosen:
        has = ", ".join(path.name for path in files) or f"none; if the model has some, {fix}"
        subject = f"--variant {model.variant}" if model.variant else f"{name}, no --variant"
        raise UsageError(f"{subject}: {part} has no such safetensors file (there: {has}); of .bin files, {NO_PICKLES}")
    numbered = (re.search(r"-of-(\d+)", path.name) for path in chosen)
    total = max((int(match[1]) for match in numbered if match), default=1)
    if len(chosen) < total:
        raise UsageError(f"{name}: {part} has {len(chosen)} of {total} weight files; {fix}")
    if damaged := list(damaged_files(chosen)):  # the files of a hub model were not there when the flags were checked
        raise UsageError(damaged)
    return chosen


def stored_tensors(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the type, as safetensors names it, and the number of elements of each tensor in a file."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict: the file itself cannot be iterated
            tensor = file.get_slice(name)
            yield tensor.get_dtype(), math.prod(tensor.get_shape())


def read_tensor_entries(path: Path) -> tuple[dict[str, Any], int]:
    """Reads the header of a safetensors file, because ``safe_open`` does not tell where in the file a tensor is stored.

    Returns:
        Entries with dtype, shape and data_offsets by tensor name, and the offset in bytes at which the data begins.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def stored_dtype(model: ModelFlags, part: str) -> str:
    """Returns the type in which most bytes of the weights are stored: fp32, fp16 or bf16.

    Raises:
        UsageError: Most bytes have another type.
    """
    bytes_of: Counter[str] = Counter()
    for path in weight_files(model, part):
        for kind, numbers in stored_tensors(path):
            bits = re.search(r"\d+", kind)  # as in F32, BF16 and F8_E4M3; a BOOL takes a byte
            bytes_of[kind] += numbers * (int(bits[0]) if bits else 8) // 8
    stored = bytes_of.most_common(1)[0][0]
    if stored not in STORED:
        raise UsageError(f"{part_folder(model, part)}: weights are {stored}; give fp32, fp16 or bf16 weights")
    return STORED[stored]


def default_dtype(model: ModelFlags, part: str, device: torch.device) -> str:
    """Returns the precision in which a part encodes if --dtype is not given: that of its weights; on a CPU, fp32.

    A CPU without instructions for fp16 or bf16 emulates them: the VAE then takes about 60 times as long in fp16, and
    90 times in bf16. All CPUs use fp32, because the precision is part of the keys of cached tensors.
    """
    stored = stored_dtype(model, part)
    return "fp32" if device.type == "cpu" else stored


def weight_fingerprint(model: ModelFlags, part: str) -> str:
    """Returns a hash that identifies the weights of a part.

    It covers the name, shape and type of each tensor, and 16 samples of 4 KiB spread from its first to its last byte.
    Hashing all of T5 would take longer than most runs of prepare_dataset.py, and training or merging changes every
    sample. The hash is remembered for as long as the files do not change.
    """
    files = weight_files(model, part)
    return remembered("fingerprints", files, partial(sampled_hash, files))


def sampled_hash(files: Sequence[Path]) -> str:
    """Computes the hash that ``weight_fingerprint`` describes, of safetensors files in this order."""
    digest = hashlib.sha256()
    for path in files:
        header, start = read_tensor_entries(path)
        with open(path, "rb") as file:
            for name, entry in sorted(header.items()):
                digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                begin, end = entry["data_offsets"]
                last = max(begin, end - SAMPLE_BYTES)
                for offset in sorted({begin + (last - begin) * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                    file.seek(start + offset)
                    digest.update(file.read(min(SAMPLE_BYTES, end - offset)))
    return digest.hexdigest()


def load_weights(of: Any, model: ModelFlags, part: str, dtype: torch.dtype) -> Any:
    """Loads a part of a pipeline from safetensors files. No weights in any other format are opened.

    Args:
        of: The class of the part in diffusers or transformers.
        model: The flags that name the model and its variant.
        part: The name of the part's folder.
        dtype: The type of the loaded weights.

    Raises:
        UsageError: There are no files of the variant that --variant names, or they do not have the weights of the part.
    """
    return load_complete(of, weight_files(model, part)[0].parent, dtype, model.variant)


def load_complete(of: Any, folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """Loads a model whose safetensors files have exactly the weights that its config.json asks for.

    diffusers and transformers only warn about other files. They draw the weights that are missing at random, or leave
    them without memory, and ignore layers beyond those of config.json.

    Args:
        of: The class of the model in diffusers or transformers.
        folder: The folder of the model.
        dtype: The type of the loaded weights.
        variant: The variant in the names of the files, if any.

    Raises:
        UsageError: A file is damaged, weights are missing or have another shape, or there are further layers.
    """
    fix = "get the folder again"
    more: dict[str, Any] = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        loaded, found = of.from_pretrained(folder, dtype=dtype, variant=variant, **more)
    except (OSError, ValueError, SafetensorError) as error:
        if disk_errno(error) is not None:
            raise
        raise UsageError(f"{folder}: cannot be loaded ({first_line(error)}); {fix}") from None
    faults = (
        ("lack {} that config.json describes", found["missing_keys"]),
        ("have {} in another shape than config.json describes", [name for name, *_ in found["mismatched_keys"]]),
        # Names without a number may be those of buffers that earlier versions of diffusers saved.
        ("have {} in layers that config.json does not describe", filter(LAYER.search, found["unexpected_keys"])),
    )
    listed = [(fault, sorted(names)) for fault, names in faults]
    problems = [f"{fault.format(plural(len(names), 'weight'))}, such as {names[0]}" for fault, names in listed if names]
    if problems:
        raise UsageError([f"{folder}: its files {problem}; {fix}" for problem in problems])
    return loaded


def free_weights(module: torch.nn.Module) -> None:
    """Frees the memory of a model's weights at once, even if other references to the model exist."""
    module.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def text_fingerprint(model: ModelFlags) -> str:
    """Returns a hash that identifies the weights of T5 and the files of its tokenizer."""
    digest = hashlib.sha256(weight_fingerprint(model, "text_encoder").encode())
    for path in sorted(path for path in part_folder(model, "tokenizer").iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def load_tokenizer(model: ModelFlags) -> Any:
    """Loads the tokenizer of T5."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(part_folder(model, "tokenizer"), trust_remote_code=False)


def free_device_bytes(device: torch.device) -> float:
    """Returns how many bytes may still be allocated on a device; infinity without a GPU."""
    if device.type != "cuda":
        return float("inf")
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction() * total  # below 1 if --vram_budget is given
    return float(min(free + reserved, allowed) - allocated)


def weight_bytes(model: ModelFlags, part: str, dtype: str) -> int:
    """Returns the bytes that the weights of a part take in a precision, computed from the headers of its files."""
    numbers = sum(numbers for path in weight_files(model, part) for _, numbers in stored_tensors(path))
    return numbers * DTYPES[dtype].itemsize


def resolve_t5_on(model: ModelFlags, dtype: str, device: torch.device, t5_on: str) -> str:
    """Resolves --t5_on to "host" or "device"; "auto" is the host if the weights do not fit on the device."""
    if t5_on != "auto":
        return t5_on
    fits = weight_bytes(model, "text_encoder", dtype) + T5_MARGIN <= free_device_bytes(device)
    return "device" if fits else "host"


@contextmanager
def text_encoder(
    model: ModelFlags, dtype: str, device: torch.device, place: str = "device", rows: int = 1
) -> Iterator[tuple[Any, Any]]:
    """Yields (tokenizer, T5 encoder that runs on the device), and frees the encoder afterwards.

    Args:
        model: The flags that name the model.
        dtype: One of "fp32", "fp16" and "bf16".
        device: The device on which the encoder runs.
        place: "host" or "device": the memory in which the weights of its blocks are stored.
        rows: The number of captions that are computed at a time if the place is "host".
    """
    from transformers import T5EncoderModel

    tokenizer = load_tokenizer(model)
    encoder = load_weights(T5EncoderModel, model, "text_encoder", DTYPES[dtype])
    encoder.requires_grad_(False).eval()
    try:
        with t5_stream.streamed(encoder, device, rows) if place == "host" else nullcontext():
            yield tokenizer, encoder if place == "host" else encoder.to(device)
    finally:
        free_weights(encoder)


def load_vae(model: ModelFlags, dtype: torch.dtype) -> Any:
    """Loads the VAE to the CPU, frozen."""
    from diffusers import AutoencoderKLCogVideoX

    return load_weights(AutoencoderKLCogVideoX, model, "vae", dtype).requires_grad_(False).eval()


@contextmanager
def video_encoder(model: ModelFlags, dtype: str, device: torch.device, tiling: bool) -> Iterator[Any]:
    """Yields the VAE on the device, with an optimized encoder on a GPU, and frees it afterwards."""
    vae = load_vae(model, DTYPES[dtype]).to(device)
    if tiling:
        vae.enable_tiling(*default_tile(vae))
    if device.type == "cuda":
        try_to_optimize_encoder(vae)
    try:
        # By default, torch lets cuDNN round fp32 convolutions to TF32.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield vae
    finally:
        free_weights(vae)


def try_to_optimize_encoder(vae: Any) -> None:
    """Optimizes the VAE's encoder in place; where that fails, prints a warning and leaves the encoder unchanged.

    Optimizing fails if no compiler is installed, or if the VAE is not built like that of CogVideoX.
    """
    try:
        vae_encoder.optimize_encoder(vae)
    except Exception as error:
        if stopping.speaks():
            tqdm.write(f"the VAE uses the encoder of diffusers, which is slower: {first_line(error)}", file=sys.stderr)


def load_transformer(model: ModelFlags, dtype: torch.dtype, without_positions: bool = False) -> Any:
    """Loads the transformer to the CPU, frozen; without its learned positions if ``without_positions`` is set."""
    from diffusers import CogVideoXTransformer3DModel

    transformer = load_weights(CogVideoXTransformer3DModel, model, "transformer", dtype)
    if without_positions:
        ignore_learned_positions(transformer)
    return transformer.requires_grad_(False)


# Lora.inference copies the source of this function into inference.py.
def ignore_learned_positions(transformer: "CogVideoXTransformer3DModel") -> None:
    """Removes the learned positional embedding, which fits one video size only; the rotary embedding stays."""
    del transformer.patch_embed.pos_embedding
    transformer.patch_embed.use_learned_positional_embeddings = False
    transformer.register_to_config(use_learned_positional_embeddings=False)


def load_scheduler(model: ModelFlags) -> Any:
    """Loads the scheduler that the pipeline's scheduler_config.json names.

    Raises:
        UsageError: The file names a scheduler that CogVideoX does not use.
    """
    import diffusers

    folder = part_folder(model, "scheduler")
    name = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    if name not in SCHEDULERS:
        raise UsageError(f"{folder}: names the scheduler {name}; CogVideoX has {' or '.join(SCHEDULERS)}")
    return getattr(diffusers, name).from_pretrained(folder)
