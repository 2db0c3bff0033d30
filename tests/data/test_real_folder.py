"""Prepares a folder of real clips of mixed size, rate and codec; interrupts, edits, verifies and trains on it.

The cache is right after each step, and no tensor is ever made twice.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import prepare_dataset
import pytest
from PIL import Image
from preparing import tensor_files
from running import (
    PREPARE_SCRIPT,
    SIZE,
    Forked,
    finish,
    fork_ranks,
    in_process,
    lora_flags,
    losses,
    metrics,
    prepare,
    python,
    train,
)

from cogvideox.config.options import PrepareOptions
from cogvideox.data.cache import CacheIndex, open_index

# name, container, codec, frames per second, height and width
MIXED = (
    ("rabbit_crawls", "mp4", "libx264", 25, 270, 480),
    ("rabbit_stands", "webm", "libvpx-vp9", 15, 136, 240),
    ("rabbit_yawns", "mkv", "libx265", 30, 180, 320),
    ("city_four_towers", "avi", "mpeg4", 12, 160, 120),
    ("city_balconies", "mp4", "libsvtav1", 24, 96, 144),
)
BUCKETS = ("--train_resolution", "9x64x96", "9x96x64", "5x64x96", "9x48x64", "1x64x96", "--bucket_choice", "every")
CUT = ("--video_reshape_mode", "center", "--dataloader_num_workers", "2")


def frames_of(path: Path, height: int, width: int) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.reformat(width, height, "rgb24").to_ndarray() for frame in container.decode(video=0)]


def transcode(frames: Sequence[np.ndarray], target: Path, codec: str, rate: int) -> None:
    with av.open(str(target), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def mixed(real_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with clips in five codecs, an animated GIF and a photograph, each with its caption next to it.

    Tests must not change it but copy it.
    """
    folder = tmp_path_factory.mktemp("mixed")
    captions = (real_clips / "prompts.txt").read_text().splitlines()
    names = [Path(line).stem for line in (real_clips / "videos.txt").read_text().splitlines()]
    caption_of = dict(zip(names, captions, strict=True))
    for name, container, codec, rate, height, width in MIXED:
        frames = frames_of(real_clips / f"videos/{name}.mp4", height, width)
        transcode(frames, folder / f"{name}.{container}", codec, rate)
        (folder / f"{name}.txt").write_text(caption_of[name])
    pictures = [Image.fromarray(frame) for frame in frames_of(real_clips / "videos/rabbit_rubs_brow.mp4", 90, 160)]
    pictures[0].save(folder / "loop.gif", save_all=True, append_images=pictures[1:30], duration=60)
    pictures[0].save(folder / "still.png")
    for name in ("loop", "still"):
        (folder / f"{name}.txt").write_text(caption_of["rabbit_rubs_brow"])
    return folder


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns (inode, time of writing) of every tensor file, by its name."""
    files = (path for path in folder.rglob("*.safetensors"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def keys(index: CacheIndex) -> set[str]:
    """Returns the names of the files that an index refers to."""
    entries = (*index.samples, *index.validation)
    names = {key for entry in entries for key in (*entry.video_keys, entry.prompt_key)} | {index.empty_prompt_key}
    return {f"{name}.safetensors" for name in names}


def again(flags: Sequence[object]) -> int:
    """Runs prepare_dataset.py in this process, and returns its exit status."""
    return in_process(prepare_dataset, PrepareOptions, [str(flag) for flag in flags])


def test_interrupted_edited_extended_verified_trained(
    mixed: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(mixed, tmp_path / "data"))
    output = tmp_path / "tensors"
    flags = ["--model_id", model, "--data_root", data, "--output_dir", output, *BUCKETS, *CUT]

    # The preparation is killed with kill -9 while it encodes.
    process = Forked(python(PREPARE_SCRIPT, *flags), (r"rename .*\.safetensors", 13))
    assert process.wait() == -signal.SIGKILL
    before = written(output)
    assert len(before) == 12
    assert not (output / "index.json").exists()

    # The same command continues.
    text = finish(Forked(python(PREPARE_SCRIPT, *flags)))
    index, after = open_index(output), written(output)
    assert before.items() <= after.items()
    assert keys(index) == set(after)
    assert {sample.id.split("@")[0] for sample in index.samples} == {
        *(f"{name}.{container}" for name, container, *_ in MIXED),
        *("loop.gif", "still.png"),
    }
    buckets = {str(sample.bucket) for sample in index.samples}
    assert buckets == {"9x64x96", "9x96x64", "5x64x96", "9x48x64", "1x64x96"}
    assert {line.split()[0] for line in text.splitlines() if line.strip()} >= buckets  # rows of the table
    assert len(list((output / "preview").glob("*.png"))) == len(buckets)
    assert [str(s.bucket) for s in index.samples if s.id.startswith("still.png")] == ["1x64x96"]

    # Repeating the command changes nothing.
    assert again(flags) == 0
    assert written(output) == after
    assert open_index(output) == index

    # One caption is edited, one clip is replaced, one is added, and one is removed.
    (data / "loop.txt").write_text("A rabbit, edited.")
    shutil.copy(data / "rabbit_crawls.mp4", data / "city_balconies.mp4")  # a copy of a known clip is not encoded again
    frames = frames_of(data / "rabbit_yawns.mkv", 128, 192)[::-1]
    transcode(frames, data / "backwards.mp4", "libx264", 30)
    (data / "backwards.txt").write_text("Backwards.")
    for suffix in ("webm", "txt"):
        (data / f"rabbit_stands.{suffix}").unlink()
    assert again(flags) == 0
    edited, now = open_index(output), written(output)
    assert after.items() <= now.items()  # no tensor was encoded twice, and none was lost
    new = set(now) - set(after)
    assert new == keys(edited) - keys(index)
    added = [sample for sample in edited.samples if sample.id.startswith("backwards.mp4")]
    assert len(new) == sum(len(sample.video_keys) for sample in added) + 2  # plus two captions
    assert not any(sample.id.startswith("rabbit_stands") for sample in edited.samples)

    # The folder is verified.
    assert again([*flags, "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "faults: 0"
    assert written(output) == now

    # Training draws batches from every bucket, and every loss is finite.
    run = tmp_path / "lora"
    assert train(without_lists(lora_flags(model, output, run, "--load_tensors", "--max_train_steps", "8"))) == 0
    assert len(losses(run)) == 8
    assert np.isfinite(losses(run)).all()


def without_lists(flags: list[str]) -> list[str]:
    """Returns the flags without the three lists of buckets, which together name a single bucket."""
    kept: list[str] = []
    names = iter(flags)
    for name in names:
        if name in ("--frame_buckets", "--height_buckets", "--width_buckets", "--max_num_frames"):
            next(names)
        else:
            kept.append(name)
    return [*kept, "--height", "64", "--width", "96", "--validation_frames", "9"]


def test_folders_repeats_and_a_validation_set(mixed: Path, clips: Path, model: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    for suffix in ("mkv", "txt"):
        shutil.copy(mixed / f"rabbit_yawns.{suffix}", held)
    more = ("--repeats", 1, 3, "--validation_data_root", held, "--max_upscale", 4)
    assert prepare(model, clips, tmp_path / "tensors", "--data_root", clips, mixed, *more, "--frame_buckets", 9, 1) == 0
    index = open_index(tmp_path / "tensors")
    ids = [sample.id for sample in index.samples]
    assert len(ids) == len(set(ids)) == 6 + 3 * 7
    assert [sample.id for sample in index.validation] == ["rabbit_yawns.mkv"]
    assert len(tensor_files(tmp_path / "tensors")) == len(keys(index))
    flags = lora_flags(model, tmp_path / "tensors", tmp_path / "lora", "--load_tensors", "--frame_buckets", 9, 1)
    assert train(flags) == 0
    assert any("held_out_loss" in line for line in metrics(tmp_path / "lora"))


def test_two_processes_verify_together(model: Path, clips: Path, tensors: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(tensors, tmp_path / "tensors"))
    for path in sorted(output.glob("tensors/*/*"))[:5]:
        path.write_bytes(path.read_bytes()[:-1])
    flags = ["--model_id", model, "--data_root", clips, "--output_dir", output, "--id_token", "TOKEN", *SIZE]
    ranks = fork_ranks(2, python(PREPARE_SCRIPT, *flags, "--verify"))
    lines = [
        line for rank in ranks for line in finish(rank, status=1).splitlines()
    ]  # lines of both processes; each must occur once
    assert len([line for line in lines if line.endswith("is incomplete")]) == 5
    assert [line for line in lines if line.startswith("faults")] == ["faults: 5"]
    assert prepare(model, clips, output, "--id_token", "TOKEN", "--repair") == 0
    assert tensor_files(output).keys() == tensor_files(tensors).keys()
    assert prepare(model, clips, output, "--id_token", "TOKEN", "--verify") == 0
