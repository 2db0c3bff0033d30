"""What is trained: which parameters are added or freed, and how the result is written and read back.

A method is made of (transformer, options). It has ``transformer``, ``result`` (the name of what ``save`` writes),
``parameters()``, ``recipe()``, ``save``, ``reload``, ``off()`` and ``inference(dtype)``: an argument of from_pretrained
that brings in what was trained, and the lines after it, for inference.py.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.args import LoraOptions, SftOptions, ignores_positions
from cogvideox.errors import UsageError
from cogvideox.models import ignore_learned_positions, load_transformer

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


class Lora:
    """A PEFT LoRA on a frozen transformer, its matrices in the transformer's own type."""

    result = WEIGHTS_NAME

    def __init__(self, transformer: Any, options: LoraOptions) -> None:
        self.transformer = transformer
        self.flags = options.lora
        self.ignores_positions = ignores_positions(options)
        self.config = self._attach(options.data.seed)

    def _attach(self, seed: int) -> Any:
        from peft import LoraConfig

        names = [name for name, module in self.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in self.flags.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                endings = sorted({".".join(name.split(".")[-2:]) for name in names if "blocks" in name})
                raise UsageError(f"--target_modules {target}: no linear layer has this name; there are {endings}")
        config = LoraConfig(
            r=self.flags.rank,
            lora_alpha=self.flags.lora_alpha,
            init_lora_weights=True,
            target_modules=list(self.flags.target_modules),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # PEFT draws the initial matrices from the global generator of the CPU
            self.transformer.add_adapter(config, adapter_name=ADAPTER)
        return config

    def parameters(self) -> dict[str, Parameter]:
        """The trainable parameters by name."""
        return trainable(self.transformer)

    def recipe(self) -> dict[str, Any]:
        """What decides the result."""
        return asdict(self.flags)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The transformer as it was before training."""
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def state(self) -> dict[str, Tensor]:
        """The LoRA in PEFT's names, as validation runs it."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER)

    def save(self, folder: Path) -> None:
        """Writes the LoRA as stock diffusers loads it, rank and alpha in the file's metadata."""
        from diffusers import CogVideoXPipeline

        CogVideoXPipeline.save_lora_weights(
            str(folder),
            transformer_lora_layers={name: tensor.contiguous() for name, tensor in self.state().items()},
            weight_name=WEIGHTS_NAME,
            transformer_lora_adapter_metadata=self.transformer.peft_config[ADAPTER].to_dict(),
        )

    def reload(self, pipeline: Any, folder: Path) -> None:
        """Drops the trained adapter and loads the saved one through the pipeline's own loader."""
        self.transformer.delete_adapters(ADAPTER)
        pipeline.load_lora_weights(str(folder), weight_name=WEIGHTS_NAME, adapter_name=ADAPTER)

    def inference(self, dtype: str) -> tuple[str, str]:
        """Code that loads the result from the folder ``here``."""
        name = f'"{WEIGHTS_NAME}"'
        load = f'pipe.load_lora_weights(str(here), weight_name={name}, adapter_name="cogvideox-lora")\n'
        if self.ignores_positions:  # the base model has them
            function = inspect.getsource(ignore_learned_positions)
            load = f"{function}\n\nignore_learned_positions(pipe.transformer)\n{load}"
        return "", load + 'pipe.set_adapters(["cogvideox-lora"], [1.0])  # rank and alpha come from the file'


class FullFinetune:
    """All weights of the transformer, in its own type."""

    result = "transformer"

    def __init__(self, transformer: Any, options: SftOptions) -> None:
        self.transformer = transformer.requires_grad_(True)
        self.load = partial(load_transformer, options.model, transformer.dtype, ignores_positions(options))

    def parameters(self) -> dict[str, Parameter]:
        """The trainable parameters by name."""
        return trainable(self.transformer)

    def recipe(self) -> dict[str, Any]:
        """What decides the result: no flag of its own."""
        return {}

    @contextmanager
    def off(self) -> Iterator[None]:
        """The transformer as it was before training, read from its files again."""
        trained = {name: tensor.to("cpu", copy=True) for name, tensor in self.transformer.state_dict().items()}
        self.transformer.load_state_dict(self.load().state_dict())
        try:
            yield
        finally:
            self.transformer.load_state_dict(trained)

    def save(self, folder: Path) -> None:
        """Writes the transformer as from_pretrained reads it, in shards of 5 GB, into a folder of the result's name."""
        self.transformer.save_pretrained(folder / self.result, max_shard_size="5GB")

    def reload(self, _pipeline: Any, folder: Path) -> None:
        """Takes up the weights that stock diffusers reads from the saved folder.

        Raises:
            RuntimeError: they do not fit.
        """
        with torch.no_grad():
            for parameter in self.parameters().values():
                parameter.fill_(torch.nan)  # so that only the files can bring them back
        saved = type(self.transformer).from_pretrained(folder / self.result, dtype=self.transformer.dtype)
        self.transformer.load_state_dict(saved.state_dict())

    def inference(self, dtype: str) -> tuple[str, str]:
        """Code that loads the result from the folder ``here``."""
        name = type(self.transformer).__name__
        return f'transformer=diffusers.{name}.from_pretrained(here / "{self.result}", dtype=torch.{dtype}),', ""


def trainable(module: Any) -> dict[str, Parameter]:
    """The trainable parameters of a module by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
