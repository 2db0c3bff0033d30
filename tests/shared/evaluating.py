"""Creates the parts of held-out losses and validation that tests of several folders need."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from fakes import options_of, run_alone
from torch import Tensor

from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.data.cache import TensorCache, open_index
from cogvideox.data.dataset import Batch
from cogvideox.evaluation.held_out import HeldOut
from cogvideox.evaluation.validation import Prompts, Validator


def split(tensors: Path, folder: Path, *validation: int, train: slice = slice(None)) -> Path:
    """Copies a prepared folder, and makes the clips with the given numbers its validation clips."""
    shutil.copytree(tensors, folder)
    index = open_index(folder)
    held = tuple(index.samples[number] for number in validation)
    dataclasses.replace(index, samples=index.samples[train], validation=held).save(folder)
    return folder


class Alone:
    """Measures held-out losses without a model. The loss depends on the batch only. The module is dropout."""

    def __init__(self, model: Path, folder: Path, output: Path, seed: int = 0) -> None:
        self.module = torch.nn.Dropout(0.5)
        self.seen: list[Batch] = []
        self.run = run_alone(output)
        tensors: Any = type("Tensors", (), {})()
        tensors.cache, tensors.index = TensorCache(folder), open_index(folder)
        tensors.geometry = read_geometry(ModelFlags(str(model)))
        self.held_out = HeldOut(self.run, tensors, seed, self.module, self.loss)

    def loss(self, batch: Batch) -> Tensor:
        assert not self.module.training
        assert not torch.is_grad_enabled()
        self.seen.append(batch)
        return (batch.x0_BFCHW - batch.noise_BFCHW).square().mean(dim=(1, 2, 3, 4)) + batch.timestep_B / 1000


def bare(output: Path, *flags: object, texts: list[str] | None = None, order: Any = None, fps: float = 8) -> Validator:
    """Returns a validator without a model."""
    validator: Any = object.__new__(Validator)
    validator.run, validator.options = run_alone(output), options_of(output, "--validation_prompt", "a", *flags)
    validator.flags = validator.options.validation
    validator.prompts = Prompts(texts or ["a"], [], None)
    validator.order, validator.fps = order, fps
    return validator
