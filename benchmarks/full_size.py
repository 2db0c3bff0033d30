"""Trains full-size CogVideoX configs with random weights on a GPU: seconds a step and peak memory, ours beside stock.

    python benchmarks/full_size.py --kinds 2b 5b --steps 8 --work_dir /tmp/full_size --results benchmarks/results

For each kind a pipeline folder with random weights and a prepared folder with random tensors are made (weights decide
neither time nor memory), then the real training script runs on them, and then the stock arm: diffusers and PEFT with
accelerate's autocast, torch.optim.AdamW and full checkpointing, as the published trainers do it. Each arm is a process
of its own. One JSON file a kind is written.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from random_models import ROOT, make_pipeline, make_tensors
from record import device_and_versions

KINDS = ("2b", "5b")


def ours(pipeline: Path, tensors: Path, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The training script, as a user runs it; figures from its metrics.jsonl."""
    command = [sys.executable, str(ROOT / "training/cogvideox_text_to_video_lora.py")]
    command += ["--pretrained_model_name_or_path", str(pipeline), "--data_root", str(tensors), "--load_tensors"]
    command += ["--output_dir", str(output), "--train_resolution", "49x480x720"]
    command += ["--rank", str(args.rank), "--lora_alpha", str(args.rank), "--mixed_precision", args.mixed_precision]
    command += ["--train_batch_size", "1", "--max_train_steps", str(args.steps), "--gradient_checkpointing"]
    command += ["--optimizer", "adamw", "--dataloader_num_workers", "2", "--pin_memory"]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]  # the others are of held-out clips
    recipe = json.loads((output / "recipe.json").read_text())
    steady = lines[2:] or lines  # the first two load kernels and fill the queue
    return {
        "seconds_per_step": statistics.median(line["seconds"] for line in steady),
        "loader_share": sum(x["loading_seconds"] for x in steady) / sum(x["seconds"] for x in steady),
        "peak_gib": lines[-1]["peak_gib"],
        "losses": [line["loss"] for line in lines],
        "verification": recipe["verification"],
        "whole_run_seconds": round(time.perf_counter() - started, 1),
        "command": " ".join(command),
    }


def stock(pipeline: Path, steps: int, rank: int) -> dict[str, Any]:
    """A plain loop: diffusers, PEFT, accelerate's autocast, AdamW; runs in this process."""
    import torch
    from accelerate import Accelerator
    from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from peft import LoraConfig

    accelerator = Accelerator(mixed_precision="bf16")
    transformer = CogVideoXTransformer3DModel.from_pretrained(pipeline / "transformer", dtype=torch.bfloat16)
    transformer.requires_grad_(False).to(accelerator.device)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    transformer.enable_gradient_checkpointing()
    scheduler = CogVideoXDPMScheduler.from_pretrained(pipeline / "scheduler")
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = CogVideoXPipeline(**parts, transformer=transformer, scheduler=scheduler)
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(480, 720, 13, accelerator.device)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    clean = torch.randn(1, 13, 16, 60, 90, device=accelerator.device, dtype=torch.bfloat16)
    prompt = torch.randn(1, 226, 4096, device=accelerator.device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        noise = torch.randn_like(clean)
        timestep = torch.randint(0, 1000, (1,), device=accelerator.device)
        noisy = scheduler.add_noise(clean, noise, timestep)
        output = model(noisy, prompt, timestep, image_rotary_emb=rotary, return_dict=False)[0]
        predicted = scheduler.get_velocity(output, noisy, timestep)
        weight = 1 / (1 - scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1))
        loss = (weight * (predicted - clean) ** 2).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds_per_step": statistics.median(seconds[2:] or seconds), "peak_gib": round(peak, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--mixed_precision", default="bf16")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--stock_pipeline", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stock_pipeline:
        print(json.dumps(stock(args.stock_pipeline, args.steps, args.rank)))
        return
    for kind in args.kinds:
        pipeline, tensors = args.work_dir / kind, args.work_dir / f"{kind}-tensors"
        make_pipeline(kind, pipeline)
        make_tensors(kind, pipeline, tensors)
        row = {"kind": kind, "work": "text-to-video LoRA, 49x480x720, batch 1, gradient checkpointing"}
        row |= {"rank": args.rank, "precision": args.mixed_precision, **device_and_versions()}
        row["ours"] = ours(pipeline, tensors, args.work_dir / f"{kind}-lora", args)
        again = [sys.executable, __file__, "--stock_pipeline", str(pipeline), "--work_dir", str(args.work_dir)]
        again += ["--steps", str(args.steps), "--rank", str(args.rank)]
        row["stock"] = json.loads(
            subprocess.run(again, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        row["speedup"] = row["stock"]["seconds_per_step"] / row["ours"]["seconds_per_step"]
        print(json.dumps(row, indent=1))
        if args.results:
            args.results.mkdir(parents=True, exist_ok=True)
            (args.results / f"full_size_lora_{kind}.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
