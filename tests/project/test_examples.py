"""Tests examples/: every command in the shell scripts parses and names files that exist. Also tests first_frame.py."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import first_frame
import numpy as np
import pytest
import real_clips
import train_tiny_cogvideox
from PIL import Image
from real_clips import write_video
from running import ROOT
from script_options import OPTIONS

from cogvideox.config import args

SCRIPTS = {
    "demo.sh": ("prepare_dataset.py", "cogvideox_text_to_video_lora.py"),
    "full_finetune.sh": ("prepare_dataset.py", "cogvideox_text_to_video_sft.py"),
    "image_to_video.sh": ("prepare_dataset.py", "cogvideox_image_to_video_lora.py"),
}
RECORD = '#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done >> "$CALLS"; echo >> "$CALLS"\n'


def run(script: str, folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    """Runs a script with a stand-in for Python that records its arguments."""
    stand_in = folder / "python"
    stand_in.write_text(RECORD)
    stand_in.chmod(0o755)
    paths = {"PYTHON": stand_in, "CALLS": folder / "calls", "DEMO_DIR": folder / "out"}
    environment = os.environ | {name: str(path) for name, path in paths.items()}
    command = [str(word) for word in (ROOT / "examples" / script, *words)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def calls(folder: Path) -> list[list[str]]:
    """Returns the command lines that the stand-in recorded."""
    return [call.splitlines() for call in (folder / "calls").read_text().strip().split("\n\n")]


def read(call: list[str]) -> Any:
    """Returns the options of a recorded call of a training script."""
    return args.parse(OPTIONS[Path(call[0]).name], None, call[1:])


@pytest.mark.parametrize(
    ("script", "result"), [("demo.sh", "lora"), ("full_finetune.sh", "sft"), ("image_to_video.sh", "i2v-lora")]
)
def test_the_printed_command_can_be_typed_if_the_folder_has_a_space(script: str, result: str, tmp_path: Path) -> None:
    folder = tmp_path / "my folder"
    folder.mkdir()
    done = run(script, folder, *([ROOT / "examples" / "model"] if script == "image_to_video.sh" else []))
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[2:4] == [str(folder / "python"), str(folder / "out" / result / "inference.py")]
    assert script != "image_to_video.sh" or words[-2] == str(folder / "out" / "rabbit_yawns.png")


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_of_a_script_parse(script: str, tmp_path: Path) -> None:
    more = [ROOT / "examples" / "model"] if script == "image_to_video.sh" else []
    done = run(script, tmp_path, *more)
    assert done.returncode == 0, done.stderr
    made = calls(tmp_path)
    assert all((ROOT / call[0]).is_file() for call in made if not call[0].startswith("/"))
    prepared, trained = (call for call in made if call[0].startswith("training/"))
    assert (Path(prepared[0]).name, Path(trained[0]).name) == SCRIPTS[script]
    read(prepared)
    options = read(trained)
    assert options.data.data_root == (prepared[prepared.index("--output_dir") + 1],)
    assert f"{options.train.output_dir}/contact_sheet.png" in done.stdout


def test_the_pictures_are_those_that_validation_takes(tmp_path: Path) -> None:
    run("image_to_video.sh", tmp_path, ROOT / "examples" / "model")
    pictures = [call[2] for call in calls(tmp_path) if call[0] == "examples/first_frame.py"]
    trained = calls(tmp_path)[-1]
    assert trained[trained.index("--validation_images") + 1].split(":::") == pictures
    assert len(trained[trained.index("--validation_prompt") + 1].split(":::")) == len(pictures) == 2


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    done = run("image_to_video.sh", tmp_path, tmp_path / "nothing")
    assert done.returncode == 1
    assert str(tmp_path / "nothing") in done.stderr
    assert not (tmp_path / "calls").exists()


def test_a_first_frame_is_cut_to_the_middle(tmp_path: Path) -> None:
    frames = np.zeros((5, 64, 160, 3), np.uint8)
    frames[0, :, 32:128] = 200  # only the first frame, and its middle 96 columns
    write_video(tmp_path / "clip.mp4", frames, 8)
    picture = np.array(first_frame.first_frame(tmp_path / "clip.mp4", 64, 96), int)
    assert picture.shape == (64, 96, 3)
    assert abs(picture[:, 2:-2] - 200).max() < 12


def test_the_first_frame_of_a_scene(tmp_path: Path) -> None:
    frames = np.full((8, 64, 96, 3), 30, np.uint8)
    frames[4:] = 200
    write_video(tmp_path / "clip.mp4", frames, 8)
    means = [np.array(first_frame.first_frame(tmp_path / "clip.mp4", 64, 96, start)).mean() for start in (0, 0.5)]
    assert np.abs(np.array(means) - (30, 200)).max() < 12


def test_the_examples_replace_no_file_of_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prompts.txt", "README.md", "frame.png"):
        (tmp_path / name).write_text("mine")
    folder = str(tmp_path)
    for main, words in (
        (real_clips.main, ("--output_dir", folder)),
        (train_tiny_cogvideox.main, ("--work_dir", str(tmp_path / "work"), "--output_dir", folder)),
        (first_frame.main, ("clip.mp4", str(tmp_path / "frame.png"))),
    ):
        monkeypatch.setattr("sys.argv", ["script.py", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("prompts.txt", "README.md", "frame.png"), "mine"
    )


def test_first_frame_writes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "clip.mp4", np.full((2, 64, 96, 3), 90, np.uint8), 8)
    words = ["first_frame.py", str(tmp_path / "clip.mp4"), str(tmp_path / "clip.png"), "--size", "32x48"]
    monkeypatch.setattr("sys.argv", words)
    first_frame.main()
    assert Image.open(tmp_path / "clip.png").size == (48, 32)
