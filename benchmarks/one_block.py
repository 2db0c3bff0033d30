"""Measures one block of full width and length on a GPU: gradients against fp32, time, peak memory and kernels.

    python benchmarks/one_block.py --kind 5b --results benchmarks/results

The reference is diffusers' block in fp32, with PEFT's LoRA or with trainable weights. The stock arm is the same block
in bf16, eager, with autograd. The others are model/blocks.py with each attention backend and each level of saved
activations, compiled, or as --ways says. A step of the model takes about (forward + backward) x blocks.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from profiling import kernels_of
from random_models import KINDS, TRANSFORMERS, clip_size, geometry_of_kind
from record import device_and_versions, write_result
from torch import Tensor

from cogvideox.config.buckets import Bucket
from cogvideox.model import attention, blocks
from cogvideox.planning.stack import block_layers, block_weights, for_any_length

MIB = 2**20
compiled = partial(torch.compile, fullgraph=True, dynamic=False)
WAYS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda function: function,
    "compiled": compiled,
    "any_length": lambda function: for_any_length(compiled(function)),
}


def shape_of(kind: str) -> tuple[int, int]:
    """Returns (number of tokens, number of text tokens)."""
    geometry = geometry_of_kind(kind)
    return geometry.tokens(Bucket(*clip_size(kind))), geometry.max_text_seq_length


def make_block(kind: str, rank: int) -> Any:
    """Returns a random bf16 block on the GPU, with a LoRA or with trainable weights."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    from peft import LoraConfig, inject_adapter_in_model

    config = TRANSFORMERS[kind]
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    torch.manual_seed(0)
    with torch.device("cuda"):
        block = CogVideoXBlock(heads * size, heads, size, config["time_embed_dim"], attention_bias=True)
        if rank:
            block.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
            inject_adapter_in_model(config, block)
    return block.bfloat16()


def inputs_of(kind: str) -> dict[str, Any]:
    """Returns random inputs of a block and a random gradient of its output."""
    config = TRANSFORMERS[kind]
    tokens, text = shape_of(kind)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    x, dy = (torch.randn(1, tokens, width, device="cuda").bfloat16() for _ in range(2))
    temb = torch.randn(1, config["time_embed_dim"], device="cuda").bfloat16()
    rotary = None
    if config["use_rotary_positional_embeddings"]:
        angles = torch.rand(tokens, config["attention_head_dim"] // 2, device="cuda").repeat_interleave(2, -1) * 6.28
        angles[:text] = 0
        rotary = (angles.cos(), angles.sin())
    return {"x": x, "dy": dy, "temb": temb, "rotary": rotary, "text": text}


def stock_step(block: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Runs forward and backward of diffusers' block; returns the gradients by name."""
    text = inputs["text"]
    x = inputs["x"].detach().requires_grad_()
    rotary = inputs["rotary"] and tuple(table[text:] for table in inputs["rotary"])
    hidden, encoder = block(x[:, text:], x[:, :text], inputs["temb"], rotary)
    torch.autograd.backward([hidden, encoder], [inputs["dy"][:, text:], inputs["dy"][:, :text]])
    gradients = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    block.zero_grad(set_to_none=True)
    return gradients | {"x": x.grad}


def to_fp32(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs in fp32."""
    return {name: value.float() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def cosine(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Returns the lower of two cosines: of the input gradient, and of all parameter gradients together."""
    names = [name for name in right if name != "x"]
    trained = [torch.cat([g[name].flatten().double() for name in names]) for g in (found, right)]
    both = [(found["x"].flatten().double(), right["x"].flatten().double()), tuple(trained)]
    return min(float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in both)


def timed(run: Callable[[], Any], repeats: int = 7) -> float:
    """Returns the median milliseconds of a call."""
    seconds = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end))
    return statistics.median(seconds)


def peak_over(run: Callable[[], Any]) -> float:
    """Returns the peak memory of a call in MiB, in addition to the memory in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    del result
    return (torch.cuda.max_memory_allocated() - before) / MIB


def named(block: Any, gradients: dict[str, blocks.Gradients]) -> dict[str, Tensor]:
    """Returns gradients by the names of their parameters."""
    names = {p: name for name, p in block.named_parameters()}
    found: dict[str, Tensor] = {}
    for layer, piece in block_layers(block).items():
        trained = [names[p] for p in piece.parameters() if p.requires_grad]
        found |= zip(trained, gradients[layer], strict=True) if trained else {}
    return found


def ours(block: Any, inputs: dict[str, Any], backend: str, level: str, how: str, right: Any) -> dict[str, Any]:
    """Returns the row of one of WAYS."""
    p = block_weights(block)
    heads, keep = block.attn1.heads, blocks.kept_at(level, p)
    shared = blocks.Shared(inputs["temb"], inputs["rotary"], inputs["text"], heads, backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward, backward = (WAYS[how](function) for function in (blocks.forward, blocks.backward))
    x, dy = inputs["x"], inputs["dy"]

    def kept_of() -> dict[str, Tensor]:
        """Returns the activations that forward saves, and the input."""
        return forward(x, p, shared, keep)[1] | {"x": x}

    with torch.no_grad():
        begun = time.perf_counter()
        kept = kept_of()
        dx, _, gradients = backward(dy, p, shared, kept)
        torch.cuda.synchronize()
        first = time.perf_counter() - begun
        found = {"x": dx} | named(block, gradients)
        row: dict[str, Any] = {"backend": backend, "level": level, "how": how, "cosine": cosine(found, right)}
        row["first_s"] = round(first, 1)  # includes compilation, unless that was done before
        del dx, gradients, found
        row["kept_mib"] = round(sum(t.numel() * t.element_size() for t in kept.values()) / MIB, 1)
        row["forward_ms"], row["backward_ms"] = timed(kept_of), timed(lambda: backward(dy, p, shared, kept))
        row["backward_mib"] = round(peak_over(lambda: backward(dy, p, shared, kept)), 1)
        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if how == "compiled":
            row["kernels"] = {
                "forward": kernels_of(kept_of),
                "backward": kernels_of(lambda: backward(dy, p, shared, kept)),
            }
        kept.clear()
        row["forward_mib"] = round(peak_over(kept_of), 1)
    return row


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="5b")
    parser.add_argument(
        "--rank", type=int, default=128, help="rank of the LoRA; 0: the weights of the block are trained"
    )
    parser.add_argument("--levels", nargs="+", choices=blocks.KEPT, default=list(blocks.KEPT))
    parser.add_argument("--backends", nargs="+", default=list(attention.BACKENDS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["compiled"])
    parser.add_argument("--results", type=Path)
    return parser


def main() -> int:
    """Measures one block with stock code and with each backend and level; writes the results. Fails without any."""
    args = build_parser().parse_args()
    block, inputs = make_block(args.kind, args.rank), inputs_of(args.kind)
    right = stock_step(block.float(), to_fp32(inputs))
    right = {name: gradient.cpu() for name, gradient in right.items()}
    block.bfloat16()
    torch.cuda.empty_cache()
    right = {name: gradient.cuda() for name, gradient in right.items()}
    tokens, _ = shape_of(args.kind)
    rows: list[dict[str, Any]] = []
    stock = {"cosine": cosine(stock_step(block, inputs), right), "ms": timed(lambda: stock_step(block, inputs))}
    stock["mib"] = round(peak_over(lambda: stock_step(block, inputs)), 1)
    print(json.dumps({"stock": stock}), flush=True)
    for backend in args.backends:
        try:
            attention.choose_backend(torch.device("cuda"), torch.bfloat16, backend)
        except ValueError as error:
            print(error, flush=True)
            continue
        for level in args.levels:
            for how in args.ways:
                rows.append(ours(block, inputs, backend, level, how, right))
                print(json.dumps({key: value for key, value in rows[-1].items() if key != "kernels"}), flush=True)
    if args.results and rows:
        table = {"kind": args.kind, "rank": args.rank, "tokens": tokens, **device_and_versions()}
        table |= {"stock": stock, "rows": rows}
        name = f"one_block_{args.kind}{'' if args.rank else '_sft'}.json"
        write_result(args.results / name, table)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
