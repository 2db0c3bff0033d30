"""Defines what is trained: which parameters are added or made trainable, and how the result is saved and loaded.

``Method`` lists what the training loop needs of a method. The methods are ``Lora``, a PEFT LoRA on a frozen
transformer, and ``FullFinetune``, which trains all weights of the transformer.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from cogvideox.config.lora_file import (
    CONFIG_KEY,
    NOT_FOLDED,
    TRAINING_KEY,
    TRANSFORMER_PREFIX,
    WEIGHTS_NAME,
    Training,
    lora_file,
    read_header,
    scale_of,
)
from cogvideox.config.options import LoraOptions, SftOptions, ignores_positions
from cogvideox.errors import UsageError, first_of, plural
from cogvideox.model.lora import (
    PissaMatrix,
    SampleDropout,
    StepPosition,
    fold_scale,
    lora_targets,
    start_from_principal,
    trained_matrices,
)
from cogvideox.model.models import ignore_learned_positions, load_complete, load_transformer
from cogvideox.model.transformer_files import create_folder, file_names, groups_of
from cogvideox.tensor_files import WriteTensors, pieces_of, size_of, write_tensors

ADAPTER = "default"


class Method(Protocol):
    """Defines the interface of a training method.

    Attributes:
        transformer: The model that is trained.
        result: The file or folder name of what ``save`` and ``export`` write.
    """

    transformer: Any
    result: str

    def __init__(self, transformer: Any, options: Any) -> None:
        """Prepares a loaded transformer for training, by the options of the scripts that use this method."""

    @staticmethod
    def recipe(options: Any, /) -> dict[str, Any]:
        """Returns the flags of this method that decide the result; they are compared when a run is resumed."""

    def parameters(self) -> dict[str, Parameter]:
        """Returns the trainable parameters by name."""

    def draw_for(self, step: int, first: int) -> None:
        """Seeds dropout for the next forward pass.

        Args:
            step: The optimizer step, counted from 0.
            first: The position of the pass's first sample in the global batch of that step.
        """

    def resume(self, folder: Path) -> None:
        """Loads this method's part of a checkpoint, after the engine has loaded the parameters."""

    def base_weights(self, folder: Path, /) -> AbstractContextManager[None]:
        """Restores the weights from before training for the duration of a ``with`` block.

        Args:
            folder: The folder that ``save`` or ``export`` wrote, from which the trained weights may be loaded
                afterwards.
        """

    def save(self, folder: Path, write: WriteTensors = write_tensors) -> dict[str, Any]:
        """Writes the weights of a checkpoint into a folder; returns what recipe.json records about the file.

        Args:
            folder: The folder.
            write: Writes each file of tensors.
        """

    def export(self, folder: Path) -> dict[str, Any]:
        """Writes the weights of the result into a folder; returns what recipe.json records about the file."""

    def reload(self, pipeline: Any, folder: Path, /) -> None:
        """Loads the weights of a folder into the transformer, as a user of the diffusers pipeline would."""

    def new_transformer(self, pipeline_of: Callable[[Any], Any], folder: Path, /) -> Any:
        """Returns a new transformer on the CPU with the weights of a folder.

        Args:
            pipeline_of: A function that builds the diffusers pipeline around a transformer.
            folder: The folder that ``save`` or ``export`` wrote.
        """

    def inference(self, dtype: str, strength: str = "1.0") -> tuple[str, str]:
        """Returns code for inference.py: an argument of from_pretrained that loads the result, and the lines after it.

        Args:
            dtype: The name of a torch dtype, such as "bfloat16".
            strength: The code of the factor by which a LoRA is scaled.
        """


class Lora:
    """Trains a LoRA of PEFT on a frozen transformer. The matrices have the transformer's floating-point type."""

    result = WEIGHTS_NAME

    def __init__(self, transformer: Any, options: LoraOptions) -> None:
        self.transformer = transformer
        self.flags = options.lora
        self.ignores_positions = ignores_positions(options)
        self.pissa = self.flags.init_lora_weights.startswith("pissa")
        self.model = options.model
        self.position = StepPosition()
        self._attach(options.data.seed)
        if self.flags.lora_path is not None:
            self._start_from(self.flags.lora_path)

    def _attach(self, seed: int) -> None:
        """Adds the LoRA to the transformer, with its initialization and dropout."""
        from peft import LoraConfig

        flags = self.flags
        config = LoraConfig(
            r=flags.rank,
            lora_alpha=flags.lora_alpha,
            init_lora_weights="gaussian" if flags.init_lora_weights == "gaussian" else True,
            target_modules=lora_targets(self.transformer, flags.target_modules),
            use_rslora=flags.use_rslora,
            use_dora=flags.use_dora,
            lora_dropout=flags.lora_dropout,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # PEFT draws the initial matrices from the global generator of the CPU
            self.transformer.add_adapter(config, adapter_name=ADAPTER)
        if self.pissa:
            start_from_principal(self._layers(), ADAPTER, flags.rank, flags.init_lora_weights, seed)
        if flags.lora_dropout:
            for name, layer in self._layers().items():
                layer.lora_dropout[ADAPTER] = SampleDropout(flags.lora_dropout, name, seed, self.position)

    def _layers(self) -> dict[str, Any]:
        """Returns the layers that PEFT has given a LoRA, by name."""
        return {name: module for name, module in self.transformer.named_modules() if hasattr(module, "lora_A")}

    @torch.no_grad()
    def _start_from(self, given: str) -> None:
        """Loads the matrices of the LoRA file from which training starts.

        config.lora_file has already compared the file's header with the flags.

        Raises:
            UsageError: The file has other layers, or layers of other sizes, than this model.
        """
        found = trained_matrices(read_header(given))
        own = self.state()
        odd = [name for name in {**own, **found} if name not in own or name not in found]
        odd += [name for name in own if name in found and own[name].shape != found[name].shape]
        if odd:
            rule = f"{odd[0]} differs between the file and this model ({plural(len(odd), 'such tensor')})"
            raise UsageError(f"--lora_path {given}: {rule}; give a LoRA for this model, and its own --target_modules")
        for name, tensor in own.items():
            tensor.copy_(found[name])

    def draw_for(self, step: int, first: int) -> None:
        """Sets the position from which dropout derives its masks in the next forward pass.

        Args:
            step: The optimizer step, counted from 0.
            first: The position of the micro-batch's first sample in the global batch.
        """
        self.position.step, self.position.first = step, first

    def resume(self, folder: Path) -> None:
        """Restores PiSSA's initial matrices from a checkpoint.

        They are not trained, so the engine does not save them, and they are not recomputed, because the SVD of another
        machine may differ.
        """
        if self.pissa:
            saved = trained_matrices(read_header(str(folder / self.result)))
            for name, matrix in self._pissa_matrices().items():
                matrix.load_initial(saved[name])

    def _pissa_matrices(self) -> dict[str, PissaMatrix]:
        """Returns PiSSA's matrices by the names that PEFT gives them in a file; empty without PiSSA."""
        pairs = [(f"{n}.{part}", getattr(m, part)) for n, m in self._layers().items() for part in ("lora_A", "lora_B")]
        return {f"{name}.weight": part[ADAPTER] for name, part in pairs if ADAPTER in part} if self.pissa else {}

    def parameters(self) -> dict[str, Parameter]:
        """Returns the trainable parameters by name."""
        return trainable(self.transformer)

    @staticmethod
    def recipe(options: LoraOptions) -> dict[str, Any]:
        """Returns the flags of this method that decide the result.

        A LoRA to start from is represented by the hash of its content, so that the file may be moved.
        """
        path, precision = options.lora.lora_path, options.plan.base_precision
        content = None if path is None else hashlib.sha256(lora_file(path).read_bytes()).hexdigest()
        base = {} if precision == "auto" else {"base_precision": precision}
        flags = {name: value for name, value in asdict(options.lora).items() if name != "fold_lora_scale"}
        return flags | {"lora_path": content} | base

    @contextmanager
    def base_weights(self, _folder: Path) -> Iterator[None]:
        """Disables the LoRA within the context, which restores the transformer before training."""
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def state(self) -> dict[str, Tensor]:
        """Returns the LoRA's matrices by PEFT's names.

        With PiSSA they have twice the rank, so that they apply to the original base model.
        """
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER)
        return state | {name: matrix.concatenated().detach() for name, matrix in self._pissa_matrices().items()}

    def scaling(self) -> Training:
        """Returns the rank, alpha and scale with which the matrices of ``state`` must be applied."""
        flags = self.flags
        scale = scale_of(flags.rank, flags.lora_alpha, flags.use_rslora)
        if not self.pissa:
            return Training(flags.rank, flags.lora_alpha, flags.use_rslora, scale)
        # Twice the rank with the same scale: the scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        growth = math.sqrt(2.0) if flags.use_rslora else 2.0
        return Training(2 * flags.rank, growth * flags.lora_alpha, flags.use_rslora, scale)

    def config(self, training: Training) -> dict[str, Any]:
        """Returns the fields of PEFT's LoraConfig for a saved file. Dropout is 0, because the file is for inference."""
        alpha, rslora = float(training.rank), False
        if training.scale_folded == NOT_FOLDED:
            alpha, rslora = training.lora_alpha, training.use_rslora
        fields = self.transformer.peft_config[ADAPTER].to_dict() | {"lora_dropout": 0.0}
        fields |= {"r": training.rank, "lora_alpha": alpha, "use_rslora": rslora}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    def save(self, folder: Path, write: WriteTensors = write_tensors) -> dict[str, Any]:
        """Writes the LoRA to a folder, in the format that load_lora_weights of diffusers reads.

        Loaders that ignore a file's metadata assume a scale of 1. A scale that is a power of two is therefore
        multiplied into B, which is exact.

        Returns:
            The scale and how it was folded into B, for recipe.json.
        """
        return self._save(folder, write, rounded=False)

    def export(self, folder: Path) -> dict[str, Any]:
        """Writes the final LoRA as ``save`` does; with --fold_lora_scale, any scale is folded into B, with rounding."""
        return self._save(folder, write_tensors, rounded=self.flags.fold_lora_scale)

    def _save(self, folder: Path, write: WriteTensors, rounded: bool) -> dict[str, Any]:
        """Writes the LoRA and its metadata; ``rounded`` allows folding a scale that rounds the matrices."""
        training = self.scaling()
        state, folded = fold_scale(self.state(), training.scale, rounded)
        training = replace(training, scale_folded=folded)
        config = {f"{TRANSFORMER_PREFIX}{name}": value for name, value in self.config(training).items()}
        metadata = {CONFIG_KEY: json.dumps(config, indent=2, sort_keys=True)}
        metadata |= {TRAINING_KEY: json.dumps(asdict(training))}
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / WEIGHTS_NAME, pieces_of(with_prefix(state)), metadata)
        return {"lora_scale": training.scale, "lora_scale_folded": folded}

    def load_folded(self, pipeline: Any) -> None:
        """Replaces the trained LoRA by the matrices that ``export`` writes if it folds the scale into them.

        The pipeline's own loader gets them from memory, without a file.
        """
        state, _ = fold_scale(self.state(), self.scaling().scale, rounded=True)
        self.transformer.delete_adapters(ADAPTER)
        pipeline.load_lora_weights(with_prefix(state), adapter_name=ADAPTER)

    def reload(self, pipeline: Any, folder: Path) -> None:
        """Deletes the trained LoRA and loads the saved one with the pipeline's own loader."""
        self.transformer.delete_adapters(ADAPTER)
        load_saved(pipeline, folder)

    def new_transformer(self, pipeline_of: Callable[[Any], Any], folder: Path) -> Any:
        """Returns a new transformer on the CPU into which the pipeline's own loader has loaded the saved LoRA.

        Both are in the type of training, because the loader rounds a LoRA to the type of its base. If the model's files
        have that type, their weights are memory-mapped and not copied.

        Args:
            pipeline_of: A function that constructs a pipeline around a transformer.
            folder: The folder to which ``save`` or ``export`` has written the LoRA.
        """
        transformer = load_transformer(self.model, self.transformer.dtype, self.ignores_positions)
        load_saved(pipeline_of(transformer), folder)
        return transformer

    def inference(self, dtype: str, strength: str = "1.0") -> tuple[str, str]:
        """Returns code for inference.py that loads the result from the folder ``here``."""
        name = f'"{WEIGHTS_NAME}"'
        load = f'pipe.load_lora_weights(str(here), weight_name={name}, adapter_name="cogvideox-lora")\n'
        if self.ignores_positions:  # the base model that inference.py loads still has learned positions
            function = inspect.getsource(ignore_learned_positions)
            load = f"\n\n{function}\n\nignore_learned_positions(pipe.transformer)\n{load}"
        return "", load + f'pipe.set_adapters(["cogvideox-lora"], [{strength}])  # 1: the strength of training'


class FullFinetune:
    """Trains all weights of the transformer. They stay in the floating-point type in which it was loaded."""

    result = "transformer"

    def __init__(self, transformer: Any, options: SftOptions) -> None:
        self.transformer = transformer.requires_grad_(True)
        self.load = partial(load_transformer, options.model, transformer.dtype, ignores_positions(options))

    def parameters(self) -> dict[str, Parameter]:
        """Returns the trainable parameters by name."""
        return trainable(self.transformer)

    @staticmethod
    def recipe(_options: SftOptions) -> dict[str, Any]:
        """Returns the flags of this method that decide the result: there are none."""
        return {}

    def draw_for(self, step: int, first: int) -> None:
        """Does nothing: no part of this method is random."""

    def resume(self, folder: Path) -> None:
        """Does nothing: the engine's checkpoint contains all state."""

    @contextmanager
    def base_weights(self, folder: Path) -> Iterator[None]:
        """Loads the original weights within the context; afterwards, loads those that ``save`` wrote to a folder.

        Both are read from files instead of copying the trained weights, because the host may have no room for a copy.
        """
        load_values(self.transformer, self.load().state_dict())
        try:
            yield
        finally:
            self.reload(None, folder)

    def save(self, folder: Path, write: WriteTensors = write_tensors) -> dict[str, Any]:
        """Writes the transformer to a subfolder, in the format that from_pretrained of diffusers reads.

        save_pretrained would copy files of 5 GB to the host as a whole; here tensor after tensor is copied.
        """
        tensors = sharing_tensors(self.transformer).state_dict()
        sizes = {name: size_of(tensor) for name, tensor in tensors.items()}
        files = file_names(list(groups_of(sizes)))
        create_folder(self.transformer, folder / self.result, files, sizes)
        for file, names in files.items():
            write(folder / self.result / file, pieces_of({name: tensors[name] for name in names}), {})
        return {}

    export = save

    def new_transformer(self, _pipeline_of: Callable[[Any], Any] | None, folder: Path) -> Any:
        """Returns a new transformer on the CPU, loaded from the saved folder."""
        return load_complete(type(self.transformer), folder / self.result, self.transformer.dtype)

    def reload(self, _pipeline: Any, folder: Path) -> None:
        """Loads the weights that unmodified diffusers reads from the saved folder.

        Raises:
            RuntimeError: The names or shapes of the saved weights differ from those of the transformer.
        """
        with torch.no_grad():
            for parameter in self.parameters().values():
                parameter.fill_(torch.nan)  # so that a weight that is missing in the files is noticed
        load_values(self.transformer, self.new_transformer(None, folder).state_dict())

    def inference(self, dtype: str, strength: str = "1.0") -> tuple[str, str]:
        """Returns code for inference.py that loads the result from the folder ``here``."""
        name = type(self.transformer).__name__
        return f'transformer=diffusers.{name}.from_pretrained(here / "{self.result}", dtype=torch.{dtype}),', ""


def empty_transformer(transformer: Any) -> Any:
    """Returns a new transformer of the same config whose tensors have shapes but no memory."""
    with torch.device("meta"):
        return type(transformer).from_config(transformer.config)


def sharing_tensors(transformer: Any) -> Any:
    """Returns a new transformer with the same tensors.

    FSDP2 hooks into ``state_dict`` of what it shards, also while all weights are gathered; a new module has no hooks.
    """
    new = empty_transformer(transformer)
    tensors = dict(transformer.named_buffers()) | dict(transformer.named_parameters())
    new.load_state_dict({name: tensors[name] for name in new.state_dict()}, assign=True)
    return new


@torch.no_grad()
def load_values(transformer: Any, values: dict[str, Tensor]) -> None:
    """Copies values into the tensors that ``sharing_tensors`` would share.

    Raises:
        RuntimeError: Names or shapes differ.
    """
    own = sharing_tensors(transformer).state_dict()
    shapes, found = ({name: tensor.shape for name, tensor in state.items()} for state in (own, values))
    if shapes != found:
        different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise RuntimeError(f"the weights differ in name or shape: {first_of(different)}")
    for name, tensor in own.items():
        tensor.copy_(values[name])


def with_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns matrices by the names that diffusers gives them."""
    return {f"{TRANSFORMER_PREFIX}{name}": tensor for name, tensor in state.items()}


def load_saved(pipeline: Any, folder: Path) -> None:
    """Loads a saved LoRA into a pipeline as a user of diffusers does."""
    pipeline.load_lora_weights(str(folder), weight_name=WEIGHTS_NAME, adapter_name=ADAPTER, use_safetensors=True)


def trainable(module: nn.Module) -> dict[str, Parameter]:
    """Returns the trainable parameters of a module by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
