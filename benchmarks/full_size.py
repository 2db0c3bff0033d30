"""Trains full-size CogVideoX configs with random weights on a GPU: seconds a step and peak memory, ours beside stock.

    python benchmarks/full_size.py --kinds 2b 5b --steps 8 --work_dir /tmp/full_size --results benchmarks/results

For each kind a pipeline folder with random weights and a prepared folder with random tensors are made (weights decide
neither time nor memory), then the real training script runs on them, and then the stock arm: diffusers and PEFT with
accelerate's autocast, torch.optim.AdamW and full checkpointing, as the published trainers do it. Each arm is a process
of its own. One JSON file a kind is written.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FRAMES, HEIGHT, WIDTH = 49, 480, 720
COMMON = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "2b": COMMON | {"num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False},
    "5b": COMMON | {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}
VAE = {
    "block_out_channels": (128, 256, 256, 512),
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "latent_channels": 16,
    "layers_per_block": 3,
    "sample_height": 480,
    "sample_width": 720,
    "temporal_compression_ratio": 4,
}


def make_pipeline(kind: str, folder: Path) -> None:
    """A pipeline folder with random bf16 weights; T5 has its real width, but one layer."""
    import torch
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from tiny_cogvideox import make_tokenizer
    from transformers import T5Config, T5EncoderModel

    if (folder / "model_index.json").is_file():
        return
    tokenizer = make_tokenizer()
    scheduler = CogVideoXDPMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale={"2b": 3.0, "5b": 1.0}[kind],
        timestep_spacing="trailing",
    )
    config = T5Config(d_model=4096, num_layers=1, d_kv=64, num_heads=64, d_ff=10240, vocab_size=len(tokenizer))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = CogVideoXTransformer3DModel(**TRANSFORMERS[kind])
        vae = AutoencoderKLCogVideoX(**VAE, scaling_factor={"2b": 1.15258426, "5b": 0.7}[kind])
        text_encoder = T5EncoderModel(config)
    torch.set_default_dtype(torch.float32)
    CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)


def make_tensors(pipeline: Path, folder: Path, samples: int = 2) -> None:
    """A prepared folder with random moments and embeddings."""
    import torch

    from cogvideox.data.buckets import Bucket
    from cogvideox.data.cache import CachedSample, CacheIndex, TensorCache
    from cogvideox.flags import EncodeFlags, ModelFlags
    from cogvideox.geometry import read_geometry
    from cogvideox.prepare import Encoders

    model = ModelFlags(str(pipeline))
    geometry = read_geometry(model)
    encoders = Encoders.of(model, EncodeFlags(), geometry)
    cache, bucket = TensorCache(folder), Bucket(FRAMES, HEIGHT, WIDTH)
    frames, channels, height, width = geometry.latent_shape(bucket)
    cached = []
    for i in range(samples):
        sample = CachedSample(f"{i}.mp4", f"clip {i}", bucket, (f"aa{i}",), f"bb{i}")
        cache.write(sample.video_keys[0], {"moments_CFHW": torch.randn(2 * channels, frames, height, width).bfloat16()})
        cached.append(sample)
    for key in [sample.prompt_key for sample in cached] + ["bbempty"]:
        shape = (geometry.max_text_seq_length, geometry.text_embed_dim)
        cache.write(key, {"prompt_LD": torch.randn(shape).bfloat16()})
    dtypes = {"vae": "bf16", "text_encoder": "bf16"}
    length = geometry.max_text_seq_length
    CacheIndex(tuple(cached), "bbempty", 8.0, encoders.vae, encoders.text_encoder, dtypes, length).save(folder)


def ours(pipeline: Path, tensors: Path, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The training script, as a user runs it; figures from its metrics.jsonl."""
    command = [sys.executable, str(ROOT / "training/cogvideox_text_to_video_lora.py")]
    command += ["--pretrained_model_name_or_path", str(pipeline), "--data_root", str(tensors), "--load_tensors"]
    command += ["--output_dir", str(output), "--height_buckets", str(HEIGHT), "--width_buckets", str(WIDTH)]
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
        rotary = pipe._prepare_rotary_positional_embeddings(HEIGHT, WIDTH, 13, accelerator.device)
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


def device_and_versions() -> dict[str, Any]:
    """What a result was measured with."""
    from cogvideox.run import environment

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = os.environ.get("COMMIT") or git.stdout.strip()  # COMMIT where the tree travels without its history
    return environment() | {"commit": commit, "command": " ".join(sys.argv)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=TRANSFORMERS, default=list(TRANSFORMERS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--mixed_precision", default="bf16")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--stock_pipeline", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "training"), str(ROOT / "examples")]
    if args.stock_pipeline:
        print(json.dumps(stock(args.stock_pipeline, args.steps, args.rank)))
        return
    for kind in args.kinds:
        pipeline, tensors = args.work_dir / kind, args.work_dir / f"{kind}-tensors"
        make_pipeline(kind, pipeline)
        make_tensors(pipeline, tensors)
        row = {"kind": kind, "work": f"text-to-video LoRA, {FRAMES}x{HEIGHT}x{WIDTH}, batch 1, gradient checkpointing"}
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
