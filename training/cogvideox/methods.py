"""What is trained: which parameters are added or freed, and how the result is written and read back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.args import LoraFlags
from cogvideox.errors import UsageError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


class Lora:
    """A PEFT LoRA on a frozen transformer, its matrices in the transformer's own type."""

    weights_name = WEIGHTS_NAME

    def __init__(self, transformer: Any, flags: LoraFlags, seed: int) -> None:
        self.transformer = transformer
        self.flags = flags
        self.config = self._attach(seed)

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
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

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
