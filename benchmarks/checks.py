"""Measures the checks at the start and the end of a run at full size on a GPU: cosines, seconds, memory.

    python benchmarks/checks.py --results benchmarks/results
    python benchmarks/checks.py --whole --results benchmarks/results

By default, single blocks with random weights run under the lean plan, which has the least memory. Measured are the
cosine of each quantity that block_check.py compares, seconds with and without compilation, and the peak memory of the
check next to the predicted peak of the plan. With --whole, all blocks make a forward pass, by a Stack and by diffusers,
with and without a LoRA. The difference between the two in bf16, and of each from fp32, is what the comparison at the
export must allow.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from one_block import make_block
from random_models import KINDS, TRANSFORMERS, clip_size, geometry_of_kind, make_transformer
from record import device_and_versions, write_result
from torch import Tensor

from cogvideox.config.buckets import Bucket
from cogvideox.model import attention
from cogvideox.model.rope import RotaryTables
from cogvideox.planning.block_check import BlockError, check_block, compare_block, cosine_between, random_inputs
from cogvideox.planning.costs import Costs
from cogvideox.planning.plan import AUTO, DEVICE, HOST, BlockPlan, ExecutionPlan, Sizes
from cogvideox.planning.stack import Stack, base_bytes, base_parameters, unquantized_matrix_bytes

GPU = torch.device("cuda")
MIB = 2**20
REST_BYTES = 60 * MIB  # roughly what is needed before and after the blocks
CASES = (("auto", 128), ("auto", 0), ("int8", 128), ("nf4", 128))  # precision of the base, rank


def lean(kind: str, block: Any, precision: str, backend: str) -> ExecutionPlan:
    """Returns the lean plan for one sample of a kind's usual size, with its predicted peak."""
    blocks, config = TRANSFORMERS[kind]["num_layers"], TRANSFORMERS[kind]
    trained = sum(p.numel() for p in base_parameters(block) if p.requires_grad)
    sizes = Sizes(
        blocks=blocks,
        block_bytes=base_bytes(block, precision),
        rest_bytes=REST_BYTES,
        trained=blocks * sum(p.numel() for p in block.parameters() if p.requires_grad and not trained),
        item_bytes=2,
        samples=1,
        tokens=geometry_of_kind(kind).tokens(Bucket(*clip_size(kind))),
        width=config["num_attention_heads"] * config["attention_head_dim"],
        heads=config["num_attention_heads"],
        matrix_bytes=unquantized_matrix_bytes(block) if precision != AUTO else 0,
        block_trained=trained,
    )
    kind_of_block = BlockPlan(HOST, "attention", HOST, HOST if trained else None)
    plan = ExecutionPlan((kind_of_block,) * blocks, True, backend, HOST, base_precision=precision)
    return replace(plan, peak=Costs({kind_of_block: blocks}, HOST, True, sizes).peak_bytes)


def row_of(kind: str, precision: str, rank: int, backend: str) -> dict[str, Any]:
    """Measures the check at the start of a run for one case, twice, so that nothing is compiled the second time."""
    block = make_block(kind, rank).cpu()
    torch.cuda.empty_cache()
    plan = lean(kind, block, precision, backend)
    bucket = Bucket(*clip_size(kind))
    tensors: Any = SimpleNamespace(
        geometry=geometry_of_kind(kind), index=SimpleNamespace(samples=(SimpleNamespace(bucket=bucket),))
    )
    row: dict[str, Any] = {"base": precision, "rank": rank, "backend": backend}
    for name in ("first_s", "second_s"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        try:
            row["tokens"], row["cosine"] = check_block(GPU, 1, tensors, [block], 0, plan)
        except BlockError as error:
            row["error"] = str(error)
        torch.cuda.synchronize()
        row[name] = round(time.perf_counter() - begun, 2)
        row["peak_mib"] = torch.cuda.max_memory_reserved() // MIB
    row["plan_mib"] = plan.peak // MIB
    row["cosines"] = cosines(kind, block, replace(plan, compiled=True))
    return row


def cosines(kind: str, block: Any, plan: ExecutionPlan) -> dict[str, float]:
    """Returns 1 - cosine of each quantity at full length."""
    shape = geometry_of_kind(kind)
    frames, _, height, width = shape.latent_shape(Bucket(*clip_size(kind)))
    tables, length = RotaryTables(shape, GPU)(frames, height, width), shape.max_text_seq_length
    inputs = random_inputs(block, 1, shape.tokens(Bucket(*clip_size(kind))) - length, length, tables, GPU)
    found = compare_block(block, plan, 0, inputs, GPU)
    return {what: float(f"{1 - cosine:.2e}") for what, cosine in found.items()}


@torch.no_grad()
def compare_model(kind: str, backend: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Compares the outputs of a complete transformer, run by a Stack and by diffusers, in bf16 and fp32."""
    from peft import LoraConfig

    shape = geometry_of_kind(kind)
    frames, _, height, width = shape.latent_shape(Bucket(*size))
    transformer = make_transformer(kind).requires_grad_(False).eval()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=1e-3)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, frames, shape.in_channels, height, width, device=GPU).bfloat16(),
        "encoder_hidden_states": torch.randn(1, shape.max_text_seq_length, shape.text_embed_dim, device=GPU).bfloat16(),
        "timestep": torch.tensor([500], device=GPU),
        "image_rotary_emb": RotaryTables(shape, GPU)(frames, height, width),
        "return_dict": False,
    }

    def outputs() -> dict[str, Tensor]:
        """Returns the outputs with and without the LoRA, and their difference."""
        with_lora = transformer(**inputs)[0].float()
        transformer.disable_adapters()
        without = transformer(**inputs)[0].float()
        transformer.enable_adapters()
        return {"lora": with_lora, "base": without, "effect": with_lora - without}

    stock = outputs()
    floats = {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    narrow, inputs = inputs, floats
    transformer.float()
    exact = outputs()
    inputs = narrow
    transformer.bfloat16()
    blocks = (BlockPlan(DEVICE, "attention", DEVICE),) * len(transformer.transformer_blocks)
    Stack(transformer, ExecutionPlan(blocks, True, backend), GPU).install()
    ours = outputs()
    pairs = {"stack_and_stock": (ours, stock), "stack_and_fp32": (ours, exact), "stock_and_fp32": (stock, exact)}
    row: dict[str, Any] = {"whole": kind, "size": size, "backend": backend}
    row["effect"] = float((exact["effect"].norm() / exact["lora"].norm()).item())
    for name, (first, second) in pairs.items():
        row[name] = {what: float(f"{1 - cosine_between(first[what], second[what], GPU):.2e}") for what in exact}
    return row


def backends() -> list[str]:
    """Returns the attention backends that this GPU supports."""
    found = []
    for backend in attention.BACKENDS:
        try:
            found.append(attention.choose_backend(GPU, torch.bfloat16, backend)[0])
        except ValueError as error:
            print(error, flush=True)
    return found


def main() -> int:
    """Checks the gradients of all cases, or one complete model; prints each result and writes them to a file.

    Returns:
        The exit status. If a check found an error, it is 1, and no file is written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="5b")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    available = backends()
    rows: list[dict[str, Any]] = []
    if args.whole:
        runs = [partial(compare_model, args.kind, available[0], (17, 480, 720))]
    else:
        cases = [(*case, available[0]) for case in CASES] + [(*CASES[0], backend) for backend in available[1:]]
        runs = [partial(row_of, args.kind, *case) for case in cases]
    for run in runs:
        rows.append(run())
        print(json.dumps(rows[-1]), flush=True)
    if any("error" in row for row in rows):
        return 1
    if args.results:
        name = f"checks_{args.kind}{'_whole' if args.whole else ''}.json"
        write_result(args.results / name, {"kind": args.kind, **device_and_versions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
