"""quickstart.sh: its commands and where it stops, with a stand-in for Python; and one run from clips to a LoRA."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from caption_server import CaptionServer, says, serving
from running import ROOT, environment
from script_options import OPTIONS
from waiting import eventually

from cogvideox.config import args

SCRIPT = ROOT / "quickstart.sh"
ROWS = 'video,start,end,caption\na.mp4,,,\nb.mp4,1.5,3.5,"A dog, seen from above"\n'
# Records the words of each call. Its answers are those of a machine with a GPU.
STAND_IN = f"""#!/bin/sh
case "$*" in
    *find_spec*) exit 0 ;;
    *is_available*) echo bf16; exit ;;
    -c*) exec {sys.executable} "$@" ;;
    *--suggest_buckets*) echo "--train_resolution 17x64x96 9x96x64" ;;
esac
for word in "$@"; do printf '%s\\n' "$word"; done >> "$CALLS"
echo >> "$CALLS"
case "$*" in *"$FAILING"*) exit "${{STATUS:-0}}" ;; esac
"""

# Starts Python, except for the scripts that load models. These are forked, because each would spend seconds on imports.
FORKING = f"""#!/bin/sh
case "$*" in
    *--suggest_buckets*) ;;
    *prepare_dataset.py* | *_lora.py*) exec {{python}} "$@" ;;
esac
exec {sys.executable} "$@"
"""

# Before the first word of STAND_IN: waits for a signal in one call, and then saves something for a moment.
WAITS = """case "$*" in *"$WAITING"*)
    trap 'kill $!; sleep 0.5; touch "$CALLS.saved"; exit 75' INT TERM
    sleep 20 &
    touch "$CALLS.begun"
    wait; exit 1 ;;
esac
case"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Has a folder of clips, and the table that split_scenes.py would write."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips-lora").mkdir()
    (tmp_path / "clips-lora" / "clips.csv").write_text(ROWS)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return tmp_path


@pytest.fixture
def finished(folder: Path) -> Path:
    """Has what the fixture ``folder`` has, and a training that has finished."""
    (folder / "clips-lora" / "lora").mkdir()
    (folder / "clips-lora" / "lora" / "recipe.json").write_text('{\n "step": 400,\n "run": "1"\n}\n')
    return folder


def run(folder: Path, *words: object, status: int = 0, within: str = "", **more: str) -> str:
    """Runs quickstart.sh with the stand-in, ``within`` a folder in ``folder``, and returns what it prints."""
    paths = {"PYTHON": str(folder / "python"), "CALLS": str(folder / "calls"), "FAILING": "nothing"}
    done = subprocess.run(
        [str(SCRIPT), *map(str, words)],
        env=os.environ | paths | more,
        cwd=folder / within,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def test_the_last_command_can_be_typed_for_a_folder_with_a_space(folder: Path) -> None:
    (folder / "clips").rename(folder / "my clips")
    (folder / "clips-lora").rename(folder / "my clips-lora")
    printed = run(folder, "my clips", "--token", "MYSTYLE", "--yes")
    (line,) = (line for line in printed.splitlines() if line.startswith("a video "))
    words = ["my clips-lora/lora/inference.py", "MYSTYLE a lighthouse at dawn", "lighthouse.mp4"]
    assert shlex.split(line)[3:] == words


def calls(folder: Path) -> list[tuple[str, list[str]]]:
    """Returns the name of each script that was called, and its flags."""
    found = [call.splitlines() for call in (folder / "calls").read_text().strip().split("\n\n")]
    return [(Path(call[0]).name, call[1:]) for call in found]


def read(call: tuple[str, list[str]]) -> Any:
    """Returns the options that a script reads from a call."""
    return args.parse(OPTIONS[call[0]], None, call[1])


TEXT, IMAGE = "cogvideox_text_to_video_lora.py", "cogvideox_image_to_video_lora.py"
LOOK = ["split_scenes.py", "caption_dataset.py", "prepare_dataset.py", "prepare_dataset.py"]


def test_every_command_parses_and_hands_its_result_on(folder: Path) -> None:
    said = run(folder, "clips", "--token", "MYDOG", "--preset", "subject", "--yes", "--", "--rank", "8")
    made = calls(folder)
    assert [name for name, _ in made] == [*LOOK, TEXT, "prepare_dataset.py", TEXT]
    scenes, captions, buckets, look, predict, encode, train = map(read, made)
    table = "clips-lora/clips.csv"
    assert scenes.scenes.table == table
    assert {options.data.dataset_file for options in (captions, buckets, look, predict, encode)} == {table}
    assert (buckets.prepare.suggest_buckets, look.prepare.dry_run, encode.prepare.dry_run) == (4, True, False)
    assert predict.forecast.dry_run
    assert encode.data.train_resolution == ("17x64x96", "9x96x64")
    assert train.data.data_root == (encode.prepare.output_dir,) == ("clips-lora/tensors",)
    assert train.data.train_resolution == encode.data.train_resolution == predict.data.train_resolution
    assert (train.lora.rank, train.optimizer.learning_rate) == (8, 1e-4)
    assert train.validation.validation_prompt == "MYDOG A dog, seen from above"
    for name, flags in made:
        assert f"/training/{name} {flags[0]}" in said
    assert "--validation_prompt 'MYDOG A dog, seen from above'" in said  # as it can be typed
    assert "clips-lora/lora/report.html" in said


def test_image_to_video_begins_with_a_frame_of_a_clip(folder: Path) -> None:
    said = run(folder, "clips", "--token", "T", "--model", "THUDM/CogVideoX-5b-I2V", "--yes")
    made = calls(folder)
    assert said.endswith("/lora/inference.py 'T A dog, seen from above' clips-lora/first_frame.png video.mp4\n")
    assert [name for name, _ in made[4:]] == [IMAGE, "prepare_dataset.py", "first_frame.py", IMAGE]
    assert made[6][1] == ["clips/b.mp4", "clips-lora/first_frame.png", "--size", "64x96", "--start", "1.5"]
    assert read(made[7]).image.validation_images == "clips-lora/first_frame.png"


@pytest.mark.parametrize(("more", "captions"), [((), "repeat"), (("--endpoint", "http://localhost:8000/v1"), "blank")])
def test_scenes_keep_a_caption_unless_a_model_describes_them(
    more: tuple[str, ...], captions: str, folder: Path
) -> None:
    run(folder, "clips", "--token", "T", *more)
    assert read(calls(folder)[0]).scenes.scene_captions == captions


def test_nothing_is_encoded_before_an_answer(folder: Path) -> None:
    said = run(folder, "clips", "--token", "T")
    assert [name for name, _ in calls(folder)] == [*LOOK, TEXT]
    assert said.endswith("Nothing was encoded or trained. To do that, add --yes to the command.\n")


def test_edited_buckets_are_kept_and_a_begun_training_goes_on(folder: Path) -> None:
    (folder / "clips-lora" / "buckets.txt").write_text("--train_resolution 9x64x64\n")
    (folder / "clips-lora" / "lora").mkdir()
    run(folder, "clips", "--token", "T")
    made = calls(folder)
    assert [name for name, _ in made] == ["split_scenes.py", "caption_dataset.py", "prepare_dataset.py", TEXT]
    assert read(made[-1]).data.train_resolution == ("9x64x64",)


@pytest.mark.parametrize("text", ["--train_resolution 9x64x64 9x64x96", "--train_resolution 9x64x64\r\n9x64x96\r\n"])
def test_sizes_are_read_however_an_editor_ends_their_lines(text: str, folder: Path) -> None:
    (folder / "clips-lora" / "buckets.txt").write_bytes(text.encode())
    run(folder, "clips", "--token", "T", "--yes")
    assert read(calls(folder)[-1]).data.train_resolution == ("9x64x64", "9x64x96")


def test_the_table_may_be_saved_by_a_spreadsheet(folder: Path) -> None:
    table = 'video;start;end;caption;note\r\na.mp4;;;;\r\nb.mp4;1.5;3.5;"A dog,\r\nfrom above";good\r\n'
    (folder / "clips-lora" / "clips.csv").write_text(table, encoding="utf-8-sig", newline="")
    run(folder, "clips", "--token", "T", "--model", "THUDM/CogVideoX-5b-I2V", "--yes")
    made = calls(folder)
    assert made[6][1][-2:] == ["--start", "1.5"]
    assert read(made[7]).validation.validation_prompt == "T A dog, from above"


@pytest.mark.parametrize("place", [".", "./", "../clips/."])
def test_the_current_folder_may_be_the_one_of_the_clips(place: str, folder: Path) -> None:
    run(folder, place, "--token", "T", "--yes", within="clips")
    assert read(calls(folder)[0]).scenes.table == str(folder / "clips-lora" / "clips.csv")


@pytest.mark.parametrize(
    ("pipeline", "script"), [("CogVideoXPipeline", TEXT), ("CogVideoXImageToVideoPipeline", IMAGE)]
)
def test_the_files_of_a_model_tell_more_than_its_name(pipeline: str, script: str, folder: Path) -> None:
    model = folder / "i2v" / "model"
    model.mkdir(parents=True)
    (model / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')
    run(folder, "clips", "--token", "T", "--model", model)
    assert calls(folder)[-1][0] == script


@pytest.mark.parametrize("more", [(), ("--", "--rank", 8), ("--", "--max_train_steps", 400)])
def test_a_finished_training_is_named(more: tuple[object, ...], finished: Path) -> None:
    said = run(finished, "clips", "--token", "T", *more)
    assert "clips-lora/lora is finished after 400 steps; its report: clips-lora/lora/report.html" in said
    assert not (finished / "calls").exists()


@pytest.mark.parametrize("more", [("--max_train_steps", "401"), ("--max_train_steps=1000",)])
def test_more_steps_continue_a_finished_training(more: tuple[str, ...], finished: Path) -> None:
    run(finished, "clips", "--token", "T", "--", "--rank", 8, *more)
    script, words = calls(finished)[-1]
    assert script == TEXT
    assert tuple(words[-len(more) :]) == more


@pytest.mark.parametrize("failing", ["split_scenes", "caption_dataset", "suggest_buckets", "dry_run", "load_tensors"])
def test_a_failed_step_is_the_last_one(failing: str, folder: Path) -> None:
    said = run(folder, "clips", "--token", "T", "--yes", status=3, FAILING=failing, STATUS="3")
    assert failing in " ".join(calls(folder)[-1][0:1] + tuple(calls(folder)[-1][1]))
    assert said.endswith("this step failed. After the change that it names, give the same command.\n")
    assert not (folder / "clips-lora" / "buckets.txt").exists() or failing in ("dry_run", "load_tensors")


def test_a_stopped_training_is_not_a_failure(folder: Path) -> None:
    assert "failed" not in run(folder, "clips", "--token", "T", "--yes", status=75, FAILING="load_tensors", STATUS="75")


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
@pytest.mark.parametrize("waiting", ["suggest_buckets", "load_tensors"])
def test_a_signal_ends_the_command_that_runs_before_the_script(
    waiting: str, number: signal.Signals, to_all: bool, folder: Path
) -> None:
    """SIGTERM is what `docker stop` sends to the script alone, SIGINT what a terminal sends to all on Ctrl-C."""
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN.replace("case", WAITS, 1))
    paths = {"PYTHON": str(stand_in), "CALLS": str(folder / "calls"), "FAILING": "nothing", "WAITING": waiting}
    words = [str(SCRIPT), "clips", "--token", "T", "--yes"]
    script = subprocess.Popen(words, env=os.environ | paths, cwd=folder, start_new_session=True)
    begun, saved = folder / "calls.begun", folder / "calls.saved"
    eventually(begun.exists)
    (os.killpg if to_all else os.kill)(script.pid, number)
    assert script.wait(timeout=60) == 75
    assert saved.exists()
    assert not (folder / "clips-lora" / "buckets.txt").exists() or waiting == "load_tensors"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give the folder of your clips"),
        (("none",), "none: there is no such folder"),
        (("clips",), "--token: give a new word"),
        (("clips", "--token"), "--token: needs a value"),
        (("clips", "more"), "more: give one folder of clips; clips was given, too"),
        (("clips", "--token", "T", "--rank", "8"), "--rank: no such flag"),
        (("clips", "--token", "T", "--preset", "person"), "--preset person: must be one of style, subject, motion"),
        (
            ("clips", "--token", "T", "--output_dir", "clips/out"),
            "--output_dir clips/out: is inside the folder of clips",
        ),
    ],
)
def test_wrong_words_are_named(words: tuple[str, ...], message: str, folder: Path) -> None:
    assert f"quickstart.sh: {message}" in run(folder, *words, status=2)


def test_a_value_may_follow_an_equals_sign(folder: Path) -> None:
    run(folder, "clips", "--token=A=B", "--output_dir=clips-lora", "--yes", "--", "--rank=8")
    scenes, *_, encode, train = map(read, calls(folder))
    assert (scenes.scenes.table, encode.data.id_token, train.lora.rank) == ("clips-lora/clips.csv", "A=B", 8)


def test_the_shown_commands_of_the_help_run(folder: Path) -> None:
    shown = [line.split() for line in run(folder, "--help").splitlines() if line.startswith("  ./quickstart.sh")]
    assert len(shown) == 3
    for words in shown:
        shutil.copytree(folder / "clips", folder / "my-clips", dirs_exist_ok=True)
        output = folder / (words[words.index("--output_dir") + 1] if "--output_dir" in words else "my-clips-lora")
        shutil.copytree(folder / "clips-lora", output, dirs_exist_ok=True)
        run(folder, *words[1:])
        for call in calls(folder):
            read(call)


@pytest.mark.slow
def test_from_clips_without_captions_to_a_lora(clips: Path, forking_python: Path, tmp_path: Path) -> None:
    """Uses the embedded model and a server that imitates a vision-language model."""
    data, out = tmp_path / "my clips", tmp_path / "out"
    data.mkdir()
    for number in range(3):
        shutil.copy(clips / "videos" / f"{number:05d}.mp4", data / f"IMG {number}.mp4")
    python = tmp_path / "python"
    python.write_text(FORKING.format(python=forking_python))
    python.chmod(0o755)
    command = [SCRIPT, data, "--token", "MYSTYLE", "--model", ROOT / "examples" / "model", "--output_dir", out, "--yes"]

    def start(*more: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in (*command, *more)]
        named = environment(PYTHON=str(python))
        return subprocess.run(words, env=named, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    done = start()
    assert done.returncode == 2
    assert "3 of 3 clips have no caption" in done.stderr

    with serving(CaptionServer(answer=lambda number, body: says("A shape moves."))) as server:
        small = ("--max_train_steps", 2, "--num_inference_steps", 2, "--rank", 4, "--lora_alpha", 4)
        done = start("--endpoint", server.url, "--", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((out / "lora" / "validation").glob("*.mp4"))) == 2
    with open(out / "clips.csv", newline="") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == ["A shape moves."] * 3
    assert start().stdout.startswith(f"{out}/lora is finished after 2 steps")
    done = start("--", *small, "--max_train_steps", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert start().stdout.startswith(f"{out}/lora is finished after 3 steps")
