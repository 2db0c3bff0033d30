"""Divides the tokens of a sample between ranks, and compares output and gradients with those of one process.

    python divided_tokens.py HEADS FOLDER [compile]    writes FOLDER/RANK.json: the errors by what was computed

The mean of the gradients over the ranks is compared, as engines compute it. Finally, the check before training runs,
and once more while the parts of tensors arrive in the wrong order.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox.model import sequence
from cogvideox.model.sequence import SequenceGroup, make_sequence_group
from cogvideox.planning.plan import DEVICE, HOST, LEVELS, BlockPlan, ExecutionPlan
from cogvideox.planning.stack import ModuleStack, Stack

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from tiny_transformers import arguments_of, make_trainable, make_with_lora

CPU = torch.device("cpu")
KINDS = ("2b", "1.5-5b-i2v")


def outcome(transformer: Any, kind: str) -> dict[str, Tensor]:
    """Returns the output, one without gradients, and the gradients of all trained parameters."""
    arguments = arguments_of(kind)
    output = transformer(**arguments)[0]
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output - target).square().mean().backward()
    gradients = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    with torch.no_grad():
        sample = transformer(**arguments)[0]
    return {"output": output.detach(), "sample": sample, **gradients}


def divided(transformer: Any, level: str, group: SequenceGroup, modules: bool, compiled: bool) -> Any:
    """Returns the transformer after a stack is installed that divides tokens."""
    blocks = tuple(BlockPlan(DEVICE, level, place) for place in (DEVICE, HOST, DEVICE))
    plan = ExecutionPlan(blocks, compiled, "cpu", sequence_parallel=group.size)
    if modules:
        ModuleStack(transformer, plan, CPU, group)
    else:
        Stack(transformer, plan, CPU, group=group).install()
    return transformer


def error(found: dict[str, Tensor], right: dict[str, Tensor], ranks: int) -> dict[str, float]:
    """Returns the largest relative error of outputs, and of the mean gradients."""
    assert found.keys() == right.keys()
    errors = {"outputs": 0.0, "gradients": 0.0}
    for name, tensor in right.items():
        kind = "outputs" if name in ("output", "sample") else "gradients"
        own = found[name].clone()
        if kind == "gradients":
            dist.all_reduce(own)
            own /= ranks
        largest = max(float(tensor.abs().max()), 1e-5)  # some are zero but for rounding
        errors[kind] = max(errors[kind], float((own - tensor).abs().max()) / largest)
    return errors


if __name__ == "__main__":
    heads, folder, compiled = int(sys.argv[1]), Path(sys.argv[2]), "compile" in sys.argv
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    group = make_sequence_group(ranks, timedelta(seconds=60))
    assert group is not None
    found = {}
    for kind in KINDS[-1:] if compiled else KINDS:
        for make in (make_with_lora, make_trainable):
            right = outcome(make(kind, heads=heads), kind)
            for number, level in enumerate(LEVELS[:1] if compiled else LEVELS):
                modules = number % 2 == 1
                own = outcome(divided(make(kind, heads=heads), level, group, modules, compiled), kind)
                found[f"{kind} {make.__name__} {level}"] = error(own, right, ranks)
    found["check"] = {"error": sequence.division_error(group, "cpu", CPU, torch.float32)}
    exchange = sequence.exchange
    sequence.exchange = lambda *arguments: exchange(*arguments)[::-1]
    found["faulty check"] = {"error": sequence.division_error(group, "cpu", CPU, torch.float32)}
    (folder / f"{group.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
