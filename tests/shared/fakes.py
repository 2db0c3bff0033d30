"""Imitates the parts of a run, so that tests need no model."""

from __future__ import annotations

import json
import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from running import lora_flags
from safetensors.torch import load_file

from cogvideox.config import args
from cogvideox.config.options import LoraOptions
from cogvideox.data.cache import TensorCache
from cogvideox.finite import not_finite
from cogvideox.optimizer.engine import Hashes
from cogvideox.runtime.checkpoint import Saver
from cogvideox.runtime.ranks import Ranks
from cogvideox.runtime.run import Run
from cogvideox.tensor_files import WriteTensors, pieces_of, write_tensors


def run_alone(output: Path, logged: list[Any] | None = None) -> Run:
    """Returns a run of one process on the CPU with this output folder. Its metrics are appended to ``logged``."""
    output.mkdir(parents=True, exist_ok=True)
    alone = {"process_index": 0, "num_processes": 1, "is_main_process": True}
    ranks = Ranks(SimpleNamespace(**alone, device=torch.device("cpu")))
    log = (lambda values, step: logged.append((step, values))) if logged is not None else lambda values, step: None
    accelerator = SimpleNamespace(
        log=log, trackers=[], is_main_process=True, num_processes=1, state=SimpleNamespace(deepspeed_plugin=None)
    )
    return Run(accelerator, ranks, output, "no", compiled=False)


def options_of(output: Path, *more: object) -> Any:
    """Returns the options of a small LoRA run, without opening a file."""
    return args.parse(LoraOptions, None, lora_flags(Path("model"), Path("data"), output, *more))


class FakeEngine:
    """Imitates an engine that has one tensor."""

    ema, refers, shares_files = None, False, False

    def __init__(self) -> None:
        self.weight = torch.arange(8.0)

    def save(self, folder: Path, write: WriteTensors = write_tensors) -> Hashes:
        write(folder / "optimizer.safetensors", pieces_of({"weight": self.weight}), {})
        return {}

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save_weights(self, method: Any, folder: Path, write: WriteTensors = write_tensors) -> Hashes:
        method.save(folder, write)
        return {}

    def not_finite(self) -> list[str]:
        return not_finite({"weight": self.weight})

    def load(self, folder: Path) -> None:
        self.weight = load_file(folder / "optimizer.safetensors")["weight"]


PLAIN: Any = SimpleNamespace(ignores_positions=False)  # in place of a Lora, for the code that inference.py needs


class FakeMethod:
    """Imitates a method that writes one tensor."""

    result = "lora.safetensors"

    def save(self, folder: Path, write: WriteTensors = write_tensors) -> None:
        folder.mkdir(exist_ok=True)
        write(folder / self.result, pieces_of({"lora": torch.ones(4)}), {})

    def resume(self, folder: Path) -> None:
        """Does nothing, because only the engine has state."""


def saver_of(
    run: Run, engine: FakeEngine, recipe: dict[str, Any] | None = None, limit: int | None = None, **more: Any
) -> Saver:
    """Returns a Saver that saves ``engine`` into the run's folder; ``more`` are further fields of it."""
    return Saver(run, engine, FakeMethod(), recipe or {"seed": 1}, every=2, limit=limit, **more)  # type: ignore[arg-type]


def save_steps(run: Run, *steps: int, limit: int | None = None) -> None:
    """Saves a checkpoint of each step. The values of the engine's tensor are the number of the step."""
    engine = FakeEngine()
    for step in steps:
        engine.weight = torch.full((8,), float(step))
        saver_of(run, engine, limit=limit).save(step)


def edit_json(path: Path, **values: Any) -> None:
    """Changes some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip_byte(path: Path, place: int = -1) -> None:
    """Changes one byte of a file, but not its size."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55
    path.write_bytes(content)


def poison(path: Path, value: float = float("nan")) -> None:
    """Sets one number of each tensor of a cached file, and updates its checksum as if the number had been encoded."""
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.view(-1)[tensor.numel() // 2] = value
    TensorCache(path.parent.parent.parent).write(path.stem, tensors)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns size and modification time of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def state_of(transformer: Any) -> dict[str, Any]:
    """Returns everything that validation must not change."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "gradients": torch.is_grad_enabled(),
        "modes": {name: module.training for name, module in transformer.named_modules()},
        "trainable": {name: p.requires_grad for name, p in transformer.named_parameters()},
        "left": {name: p.grad is None for name, p in transformer.named_parameters()},
        "weights": {name: p.detach().cpu().numpy().tobytes() for name, p in transformer.named_parameters()},
    }
