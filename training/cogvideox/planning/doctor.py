"""Checks the machine, and optionally the files of a model, for doctor.py.

``examine`` runs all checks and yields the lines of a page. The checks are independent: one that fails is reported in
one line, and the others still run. The page is meant to be pasted into an issue, so ``Redaction`` removes paths and
tokens from each line.
"""

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from cogvideox import __version__
from cogvideox.config.flags import HIDDEN, HubFlags, ModelFlags
from cogvideox.config.geometry import geometry_of, read_geometry, weight_problems
from cogvideox.config.hub import token_of
from cogvideox.config.options import DoctorOptions
from cogvideox.data.shared_memory import SHM_FOLDER, free_shared_memory
from cogvideox.errors import UsageError, one_line, plural, public_urls
from cogvideox.files import nearest_folder, size_text
from cogvideox.host_memory import free_host_bytes
from cogvideox.memory.buffers import pinned
from cogvideox.model.attention import choose_backend
from cogvideox.model.models import load_tokenizer, stored_dtype, weight_files
from cogvideox.model.rope import RotaryTables
from cogvideox.planning.block_check import compare_block, random_inputs, require_agreement
from cogvideox.planning.plan import DEVICE, GIB, HOST, BlockPlan, ExecutionPlan
from cogvideox.planning.probes import COPY_BYTES, seconds_per_call
from cogvideox.planning.trial_training import try_training
from cogvideox.runtime.run import environment

Check = Callable[[], Iterator[str]]

DISK_BYTES, DISK_PIECE = 2**28, 2**24  # bytes that are written and read, and bytes of one write
LIMITS = {"open files": "RLIMIT_NOFILE", "locked memory": "RLIMIT_MEMLOCK", "processes": "RLIMIT_NPROC"}
WEIGHTED_PARTS = ("transformer", "vae", "text_encoder")
LATENT_SHAPE, TEXT_LENGTH = (3, 8, 12), 32  # frames, height and width, and text tokens, of the compared block
TINY = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 1, "time_embed_dim": 64, "text_embed_dim": 32}
_PATH = re.compile(r"(?<![\w./:~>])(?:/[^\s/:;,'\"()]+)+/([^\s/:;,'\"()]+)")  # group 1 is the last component
_TOKEN = re.compile(r"\b(?:hf_|sk-)\w{8,}")


class Redaction:
    """Replaces private paths and tokens in a text.

    Args:
        options: The options, whose model and folder are replaced by the names of their flags.
    """

    def __init__(self, options: DoctorOptions) -> None:
        named = {
            options.model.pretrained_model_name_or_path: "MODEL",
            options.model.cache_dir: "CACHE_DIR",
            options.doctor.output_dir: "FOLDER",
            os.path.expanduser("~"): "~",
            token_of(HubFlags()): HIDDEN,
        }
        resolved = {str(Path(text).resolve()): name for text, name in named.items() if text and Path(text).is_dir()}
        names = {text: name for text, name in named.items() if text and len(text) > 1} | resolved
        ordered = sorted(names, key=len, reverse=True)  # a folder comes before the one that contains it
        self.replacements = [(re.compile(rf"(?<!\w){re.escape(text)}(?!\w)"), names[text]) for text in ordered]

    def __call__(self, text: str) -> str:
        """Returns the text as one line. Of an absolute path, only its last component remains."""
        for private, name in self.replacements:
            text = private.sub(name, text)
        return one_line(_PATH.sub(r".../\1", _TOKEN.sub(HIDDEN, public_urls(text))))


def examine(options: DoctorOptions, checks: dict[str, Check]) -> Iterator[tuple[str, bool]]:
    """Yields the lines of the page, and for each whether it is about something that is usable."""
    redacted = Redaction(options)
    for name, check in checks.items():
        try:
            for line in check():
                yield f"{name:14} {redacted(line)}", True
        except Exception as error:  # any failure of one check is a finding
            text = "; ".join(str(error).split("\n")) or type(error).__name__
            kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
            yield f"{name:14} FAILED: {redacted(kind + text)}", False


def checks_of(options: DoctorOptions) -> dict[str, Check]:
    """Returns the checks by the name that the page shows. A model and training are checked if they are asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = nearest_folder(Path(options.doctor.output_dir))
    checks: dict[str, Check] = {
        "versions": describe_versions,
        "device": describe_devices,
        "attention": partial(check_attention, device),
        "block": partial(check_block, device),
        "copies": partial(measure_copies, device),
        "disk": partial(measure_disk, folder),
        "host memory": describe_host_memory,
        "shared memory": describe_shared_memory,
        "limits": describe_limits,
    }
    if options.model.pretrained_model_name_or_path:
        checks["model"] = partial(check_model, options.model)
    if options.doctor.try_training:
        checks["training"] = partial(try_training, options.model, folder, compute_dtype(device))
    return checks


def describe_versions() -> Iterator[str]:
    """Yields the versions of this project, Python, the system and the libraries."""
    made = environment()
    yield f"cogvideox {__version__}, Python {made['python']}, {platform.system()} {platform.release()}"
    yield ", ".join(f"{name} {number}" for name, number in made["versions"].items())


def describe_devices() -> Iterator[str]:
    """Yields a line with the name, compute capability and memory of each GPU, or one line without a GPU."""
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if not torch.cuda.is_available():
        yield f"CPU with {plural(os.cpu_count() or 1, 'core')}; no GPU is found, and {built}"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        capability = ".".join(map(str, torch.cuda.get_device_capability(number)))
        name = torch.cuda.get_device_name(number)
        memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield f"GPU {number}: {name}, compute capability {capability}, {memory}; {built}"


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns the type in which training usually computes on a device."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def check_attention(device: torch.device) -> Iterator[str]:
    """Yields the attention backend that --attention_backend auto chooses, and why."""
    backend, reason = choose_backend(device, compute_dtype(device))
    yield f"{backend} ({reason})"


def check_block(device: torch.device) -> Iterator[str]:
    """Compares a tiny random block, on the device and streamed from the host, with diffusers' own.

    Yields:
        The lowest cosine for each place of the weights.

    Raises:
        BlockError: An output or a gradient differs.
    """
    from diffusers import CogVideoXTransformer3DModel

    config = TINY | {"use_rotary_positional_embeddings": True, "max_text_seq_length": TEXT_LENGTH}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(**config)
    geometry = geometry_of(dict(transformer.config), {}, {})
    rotary = RotaryTables(geometry, device)(*LATENT_SHAPE)
    assert rotary is not None
    block = transformer.transformer_blocks[0].to(compute_dtype(device))
    backend, _ = choose_backend(device, compute_dtype(device))
    for place, text in ((DEVICE, "on the device"), (HOST, "streamed from the host")):
        plan = ExecutionPlan((BlockPlan(place, "attention", place),), False, backend)
        inputs = random_inputs(block, 1, len(rotary[0]), TEXT_LENGTH, rotary, device)
        cosine = require_agreement(compare_block(block, plan, 0, inputs, device), plan, block, f"a block {text}")
        yield f"{text}: computes the same as diffusers, cosine at least {cosine:.6f}"


def measure_copies(device: torch.device) -> Iterator[str]:
    """Yields the rates of copies between page-locked host memory and the GPU."""
    if device.type != "cuda":
        yield "none, because there is no GPU"
        return
    host, here = pinned(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    to_device = COPY_BYTES / seconds_per_call(lambda: here.copy_(host, non_blocking=True))
    to_host = COPY_BYTES / seconds_per_call(lambda: host.copy_(here, non_blocking=True))
    yield f"host to device {to_device / GIB:.1f} GiB/s, device to host {to_host / GIB:.1f} GiB/s"


def measure_disk(folder: Path) -> Iterator[str]:
    """Yields the free space of a folder, and the rates at which a temporary file there is written and read.

    The file is synchronized, and its pages are dropped from the cache of the system before it is read. A network file
    system may still read from the cache of its server.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * DISK_BYTES:
        raise UsageError(f"only {free / GIB:.2f} GiB are free; give another --output_dir, or free space there")
    piece = os.urandom(DISK_PIECE)  # random, because some file systems compress
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.perf_counter()
        for _ in range(DISK_BYTES // DISK_PIECE):
            file.write(piece)
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(DISK_PIECE):
            pass
        read = time.perf_counter() - started
    rates = f"writes {DISK_BYTES / 2**20 / (written - began):.0f} MiB/s, reads {DISK_BYTES / 2**20 / read:.0f} MiB/s"
    yield f"{rates}, {free / GIB:.1f} GiB free in --output_dir"


def describe_host_memory() -> Iterator[str]:
    """Yields the host memory that a run may allocate, within the limits of the container."""
    yield f"{free_host_bytes() / GIB:.1f} GiB free"


def describe_shared_memory() -> Iterator[str]:
    """Yields the free shared memory, through which the workers of the loader send batches."""
    free = free_shared_memory()
    yield "not limited" if free == sys.maxsize else f"{free / GIB:.2f} GiB free in {Path(SHM_FOLDER).name}"


def describe_limits() -> Iterator[str]:
    """Yields the limits of this process (ulimit)."""
    import resource

    def shown(name: str) -> str:
        value = resource.getrlimit(getattr(resource, name))[0]
        if value == resource.RLIM_INFINITY:
            return "unlimited"
        return size_text(value) if name == "RLIMIT_MEMLOCK" else str(value)

    yield ", ".join(f"{text} {shown(name)}" for text, name in LIMITS.items() if hasattr(resource, name))


# -- the files of a model ----------------------------------------------------------------------------------------------


def check_model(model: ModelFlags) -> Iterator[str]:
    """Checks the files of a model, without loading weights. Of a hub model, only the configs are read.

    Raises:
        UsageError: Files are missing, damaged or of a wrong type.
    """
    geometry = read_geometry(model)
    task = "image-to-video" if geometry.image_to_video else "text-to-video"
    yield f"{task}, {geometry.in_channels} input channels, made for {geometry.own_bucket}"
    if not Path(model.pretrained_model_name_or_path).is_dir():
        yield "its weights are not checked, because it is not a folder"
        return
    if problems := list(weight_problems(model, WEIGHTED_PARTS)):
        raise UsageError(problems)
    for part in WEIGHTED_PARTS:
        files = weight_files(model, part)
        size = sum(path.stat().st_size for path in files)
        yield f"{part}: {size / 2**20:.0f} MiB of weights in {stored_dtype(model, part)}"
    load_tokenizer(model)
