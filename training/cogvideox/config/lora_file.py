"""Reads the header of a LoRA file and compares it with the flags, before anything heavy is imported.

``check_lora`` is the check for args.parse. Only safetensors files are read, because reading other formats can run code.
Their header has the names and shapes of the tensors, and metadata with the settings of the LoRA.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox.config.flags import LoraFlags
from cogvideox.config.options import LoraOptions, TrainOptions, target_pattern
from cogvideox.errors import UsageError
from cogvideox.files import check_readable, disk_errno

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
TRANSFORMER_PREFIX = "transformer."  # diffusers puts the name of the part of the pipeline before the names of PEFT
LORA_KEY = re.compile(rf"{re.escape(TRANSFORMER_PREFIX)}(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
CONFIG_KEY = "lora_adapter_metadata"  # entry of the metadata with the fields of LoraConfig of PEFT
TRAINING_KEY = "cogvideox_training"  # entry of the metadata with the fields of Training
# Whether the scale of the LoRA has been multiplied into its matrices, and whether that rounded them.
NOT_FOLDED, FOLDED_EXACTLY, FOLDED_ROUNDED = "no", "exactly", "with rounding"


@dataclass(frozen=True)
class Training:
    """The scale of a LoRA in training, and whether the matrices in its file already contain this scale.

    Attributes:
        rank: The rank of the matrices in the file. After PiSSA it is twice the trained rank, and alpha grows with it.
        lora_alpha: The value of --lora_alpha for that rank.
        use_rslora: Whether the scale is that of rsLoRA.
        scale: The factor by which the product of the two matrices was multiplied in training.
        scale_folded: NOT_FOLDED, FOLDED_EXACTLY or FOLDED_ROUNDED.
    """

    rank: int
    lora_alpha: float
    use_rslora: bool
    scale: float
    scale_folded: str = NOT_FOLDED


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """Returns the factor by which the product of the two LoRA matrices is multiplied, as PEFT computes it."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


@dataclass(frozen=True)
class LoraFile:
    """The header of a LoRA file.

    Attributes:
        path: The file.
        shapes: The shapes of the tensors, by name.
        config: The LoraConfig of PEFT, without the prefix of its keys. If the file has none it is empty, and diffusers
            assumes that alpha equals the rank.
        training: How the LoRA was scaled in training; None if another trainer wrote the file.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    training: Training | None = None

    @property
    def layers(self) -> list[str]:
        """The layers that the LoRA changes."""
        return sorted({match[1] for key in self.shapes if (match := LORA_KEY.fullmatch(key))})

    @property
    def ranks(self) -> list[int]:
        """The ranks of the matrices, without repeats."""
        return sorted({shape[0] for key, shape in self.shapes.items() if key.endswith("lora_A.weight")})

    @property
    def folded(self) -> str:
        """Whether the matrices contain the scale of training: NOT_FOLDED, FOLDED_EXACTLY or FOLDED_ROUNDED."""
        return self.training.scale_folded if self.training else NOT_FOLDED

    def scaling(self, rank: int) -> tuple[float, bool]:
        """Returns the alpha with which training continues, and whether rsLoRA is used.

        These are the values of training if folding can be undone exactly, and otherwise those of the LoraConfig.

        Args:
            rank: The rank of the matrices, which is also the default of alpha.
        """
        if self.training and self.folded == FOLDED_EXACTLY:
            return self.training.lora_alpha, self.training.use_rslora
        return self.config.get("lora_alpha", rank), bool(self.config.get("use_rslora"))


def check_lora(options: TrainOptions) -> Iterator[str]:
    """Yields problems of --lora_path, for args.parse."""
    if isinstance(options, LoraOptions) and options.lora.lora_path is not None:
        yield from misfits(read_header(options.lora.lora_path), options.lora)


def lora_file(given: str) -> Path:
    """Returns the file that --lora_path names, either directly or by its folder."""
    path = Path(given)
    return path / WEIGHTS_NAME if path.is_dir() else path


def read_header(given: str) -> LoraFile:
    """Returns the header of the file that --lora_path names.

    Args:
        given: The value of --lora_path, a file or its folder.

    Raises:
        UsageError: The file does not exist, or is not a valid safetensors file.
    """
    path, rule = lora_file(given), f"--lora_path {given}"
    if path.suffix != ".safetensors":
        raise UsageError(f"{rule}: only .safetensors files are read, because others can run code; convert it")
    if not path.is_file():
        raise UsageError(f"{rule}: there is no {path.name}; give a file, or a folder that a LoRA was saved to")
    from safetensors import SafetensorError, safe_open

    check_readable(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
        training = Training(**json.loads(metadata[TRAINING_KEY])) if TRAINING_KEY in metadata else None
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        if disk_errno(error) is not None:
            raise
        raise UsageError(f"{rule}: {path.name} is damaged, or not a safetensors file; get it again") from None
    config = {name.removeprefix(TRANSFORMER_PREFIX): value for name, value in config.items()}
    return LoraFile(path, shapes, config, training)


def misfits(file: LoraFile, lora: LoraFlags) -> Iterator[str]:
    """Yields a problem for each disagreement between a file and the flags, with the flag that would match."""
    strange = [key for key in file.shapes if not LORA_KEY.fullmatch(key)]
    if strange or not file.layers:
        has = f"has {strange[0]}" if strange else "is empty"
        rule = f"a LoRA for diffusers has {TRANSFORMER_PREFIX}LAYER.lora_A.weight"
        yield f"--lora_path {file.path}: {has}; {rule}; for the names of ComfyUI see scripts/convert_lora.py"
        return
    if len(file.ranks) > 1 or file.config.get("rank_pattern") or file.config.get("alpha_pattern"):
        yield f"--lora_path {file.path}: its layers differ in rank or alpha; give a LoRA with one rank and one alpha"
        return
    (rank,) = file.ranks
    if rank != lora.rank:
        yield f"--rank {lora.rank}: the LoRA of --lora_path has another rank; give --rank {rank}"
    yield from other_scaling(file, rank, lora)
    dora = any(key.endswith("lora_magnitude_vector") for key in file.shapes)
    yield from other_variant("use_dora", lora.use_dora, dora)
    if set(selected(lora.target_modules, file.layers)) != set(file.layers) or unused(lora.target_modules, file.layers):
        # All blocks have the same layers, so the number of the block is cut off.
        names = sorted({re.sub(r"^\w+\.\d+\.", "", layer) for layer in file.layers})
        rule = "the LoRA of --lora_path changes other layers"
        yield f"--target_modules {' '.join(lora.target_modules)}: {rule}; give --target_modules {' '.join(names)}"


def other_scaling(file: LoraFile, rank: int, lora: LoraFlags) -> Iterator[str]:
    """Yields problems if alpha or rsLoRA in the flags differ from those that the matrices in the file need."""
    alpha, rslora = file.scaling(rank)
    given = f"--lora_alpha {written(lora.lora_alpha)}"
    if file.training and file.folded == FOLDED_ROUNDED and (lora.lora_alpha, lora.use_rslora) != (alpha, rslora):
        rule = f"the matrices of --lora_path were multiplied by their scale, {file.training.scale:g}, with rounding"
        fix = f"give --lora_alpha {written(alpha)} without --use_rslora to continue from these matrices"
        yield f"{given}: {rule}; {fix}, or give a checkpoint of its training, whose matrices are not rounded"
        return
    if alpha != lora.lora_alpha:
        yield f"{given}: the LoRA of --lora_path has another alpha; give --lora_alpha {written(alpha)}"
    yield from other_variant("use_rslora", lora.use_rslora, rslora)


def written(number: float) -> str:
    """Returns the shortest text that represents a number exactly."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def other_variant(flag: str, given: bool, has: bool) -> Iterator[str]:
    """Yields a problem if a switch differs from that with which the file was trained."""
    if given != has:
        fix = f"give --{flag}" if has else "leave it out"
        yield f"--{flag}: the LoRA of --lora_path was trained {'with' if has else 'without'} it; {fix}"


def selected(target_modules: Sequence[str], layers: Iterable[str]) -> list[str]:
    """Returns the layers that --target_modules selects: by the ends of their names, or by a pattern for full names."""
    pattern = target_pattern(target_modules)
    if pattern is not None:
        return [layer for layer in layers if re.fullmatch(pattern, layer)]
    return [layer for layer in layers if any(is_called(layer, target) for target in target_modules)]


def unused(target_modules: Sequence[str], layers: Iterable[str]) -> list[str]:
    """Returns the values of --target_modules that select none of the layers."""
    known = list(layers)
    return [target for target in target_modules if not selected((target,), known)]


def is_called(layer: str, target: str) -> bool:
    """Returns whether a target selects a layer, by the rule of PEFT for lists of names."""
    return layer == target or layer.endswith(f".{target}")
