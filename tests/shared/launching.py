"""Reads what `accelerate launch` would start with a configuration, without starting it."""

import argparse
from pathlib import Path

import pytest


def parsed_launch(path: Path, *flags: str) -> argparse.Namespace:
    """Returns what `accelerate launch` gives its launchers: its arguments together with those of a configuration."""
    from accelerate.commands import launch

    caught: list[argparse.Namespace] = []
    with pytest.MonkeyPatch.context() as patch:
        for launcher in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
            patch.setattr(launch, launcher, caught.append)
        launch.launch_command(
            launch.launch_command_parser().parse_args(["--config_file", str(path), *flags, "script.py"])
        )
    return caught[0]


def launched_environment(path: Path, *flags: str) -> dict[str, str]:
    """Returns the environment that `accelerate launch` sets for each script, with the number of processes."""
    from accelerate.utils import launch

    parsed = parsed_launch(path, *flags)
    if parsed.multi_gpu or parsed.use_fsdp:
        environment = launch.prepare_multi_gpu_env(parsed)
    elif parsed.use_deepspeed:
        environment = launch.prepare_deepspeed_cmd_env(parsed)[1]
    else:
        environment = launch.prepare_simple_launcher_cmd_env(parsed)[1]
    return environment | {"WORLD_SIZE": str(parsed.num_processes)}
