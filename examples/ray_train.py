"""Starts a training script on the GPUs of a Ray cluster, with Ray Train, which restarts it after a failure.

The repository, the data and the output folder must have the same paths on all machines. Ray is not one of the
requirements of this project.

    python examples/ray_train.py --workers 16 training/cogvideox_text_to_video_sft.py --output_dir my-sft ...
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="the number of processes, one for each GPU")
    parser.add_argument("--max_failures", type=int, default=3, help="how many times the run is started again")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a script in training/ and its flags")
    return parser


def free_port() -> int:
    """Returns a port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
    return port


def run_script(config: dict[str, list[str]]) -> None:
    """Runs the script as one process of the run. Ray has set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR.

    MASTER_PORT is in use by Ray's own process group, through which the first process tells the others another port.
    """
    port = [free_port()]
    dist.broadcast_object_list(port)
    environment = os.environ | {"MASTER_PORT": str(port[0])}
    subprocess.run([sys.executable, *config["command"]], cwd=ROOT, env=environment, check=True)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if not args.command:
        parser.error("give a script in training/ and its flags")
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ModuleNotFoundError as error:
        parser.error(f"{error}; run: pip install 'ray[train]'")

    trainer = TorchTrainer(
        run_script,
        train_loop_config={"command": args.command},
        torch_config=TorchConfig(backend="gloo"),  # only sends the port
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=True),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=args.max_failures)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
