"""Tests of prepare.py with the tiny model: nothing is encoded twice or lost, and bad clips are reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import torch
from PIL import Image
from preparing import InlineWorkers, complete, preparation, tensor_files

from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import DataFlags, EncodeFlags, ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.data import clips as clips_module
from cogvideox.data.cache import Ledger, TensorCache, open_index
from cogvideox.data.clips import decode_variant
from cogvideox.data.health import Health, health_of
from cogvideox.data.media import workers
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.data.media.transforms import Fit
from cogvideox.data.media.workers import Killed, Workers
from cogvideox.data.records import FAILED, KILLED, OK, SHORT, UNREADABLE, Variant
from cogvideox.errors import UsageError
from cogvideox.files import machine_name
from cogvideox.model import encode, models
from cogvideox.preparation import encoding, prepare
from cogvideox.preparation.encoding import Encoders
from cogvideox.preparation.unusable import UnusableClips, check_bad

Tiny = Callable[[str], Path]
NUM_CLIPS = 6  # of the fixture `clips`
pytestmark = pytest.mark.usefixtures("small")


@dataclass
class Encoded:
    """Counts what was encoded while a test ran."""

    clips: int = 0
    captions: list[str] = field(default_factory=list)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    """Counts the clips and captions that this process encodes."""
    counts = Encoded()
    video, prompt = encode.video_moments, encode.prompt_embeds

    def count_clip(vae: Any, frames: np.ndarray) -> torch.Tensor:
        counts.clips += 1
        return video(vae, frames)

    def count_captions(tokenizer: Any, encoder: Any, captions: list[str], length: int) -> torch.Tensor:
        counts.captions += captions
        return prompt(tokenizer, encoder, captions, length)

    monkeypatch.setattr(encode, "video_moments", count_clip)
    monkeypatch.setattr(encode, "prompt_embeds", count_captions)
    return counts


@pytest.fixture
def data(clips: Path, tmp_path: Path) -> Path:
    """Returns a copy of the six clips, which a test may change."""
    return Path(shutil.copytree(clips, tmp_path / "data"))


@pytest.fixture(scope="module")
def prepared(tiny: Tiny, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepares the six clips with real worker processes. Tests must not change the folder; they copy it."""
    folder = tmp_path_factory.mktemp("prepared")
    complete(tiny("5b"), clips, folder)
    return folder


@pytest.fixture
def output(prepared: Path, tmp_path: Path) -> Path:
    """Returns a copy of the prepared cache, which a test may change."""
    return Path(shutil.copytree(prepared, tmp_path / "output"))


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a model whose weights are stored in bf16."""
    from tiny_cogvideox import make_tiny

    return make_tiny(tmp_path_factory.mktemp("half") / "model", "5b", dtype=torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_precision_is_that_of_the_weights_but_fp32_on_a_cpu(half: Path, device: str) -> None:
    flags = ModelFlags(str(half))
    geometry, on = read_geometry(flags), torch.device(device)
    encoders = Encoders.of(flags, EncodeFlags(), geometry, on)
    wanted = "fp32" if device == "cpu" else "bf16"
    assert (encoders.vae_dtype, encoders.text_dtype) == (wanted, wanted)
    asked = Encoders.of(flags, EncodeFlags(dtype="fp16"), geometry, on)
    assert (asked.vae_dtype, asked.text_dtype) == ("fp16", "fp16")


def test_a_folder_keeps_its_precision_on_another_device(
    half: Path, clips: Path, tmp_path: Path, encoded: Encoded, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that a GPU prepared is continued on this CPU: nothing is encoded again, and a line explains why."""
    on_gpu = complete(half, clips, tmp_path / "bf16", encode_flags=EncodeFlags(dtype="bf16"))
    assert on_gpu.dtypes == {"vae": "bf16", "text_encoder": "bf16"}
    encoded.clips, encoded.captions = 0, []
    capsys.readouterr()
    here = complete(half, clips, tmp_path / "bf16")
    assert encoded == Encoded()
    assert (here.samples, here.dtypes) == (on_gpu.samples, on_gpu.dtypes)
    note = f"encoding in bf16, like the tensors in {tmp_path / 'bf16'}, although the default on this device is fp32"
    assert f"{note}; --dtype fp32 encodes everything anew" in capsys.readouterr().err
    anew = complete(half, clips, tmp_path / "bf16", encode_flags=EncodeFlags(dtype="fp32"))
    assert (encoded.clips, anew.dtypes["vae"]) == (NUM_CLIPS, "fp32")
    assert "encoding in" not in capsys.readouterr().err
    made = preparation(half, clips, tmp_path / "new")
    assert made.encoders.vae_dtype == "fp32"
    assert str(made.precision_note()).startswith("encoding in fp32 on a CPU, not in bf16 as the weights are stored")


# -- what is written ---------------------------------------------------------------------------------------------------


def test_the_index_and_its_tensors(prepared: Path, clips: Path, tiny: Tiny) -> None:
    index, cache = open_index(prepared), TensorCache(prepared)
    assert [sample.id for sample in index.samples] == (clips / "videos.txt").read_text().split()
    assert [sample.caption for sample in index.samples] == (clips / "prompts.txt").read_text().splitlines()
    assert {sample.bucket for sample in index.samples} == {Bucket(5, 32, 48)}
    assert (index.fps, index.text_length) == (8.0, 32)
    assert index.dtypes == {"vae": "fp32", "text_encoder": "fp32"}
    keys = {key for sample in index.samples for key in (*sample.video_keys, sample.prompt_key)}
    assert len(keys) == 2 * NUM_CLIPS
    assert set(tensor_files(prepared)) == {f"{key}.safetensors" for key in (*keys, index.empty_prompt_key)}
    for sample in index.samples:
        assert cache.read(sample.video_keys[0])["moments_CFHW"].shape == (32, 2, 4, 6)
        assert cache.read(sample.prompt_key)["prompt_LD"].shape == (32, 32)
    files = [".claims", "health.jsonl", "index.json", "ledger.jsonl", "tensors"]
    assert sorted(path.name for path in prepared.iterdir()) == files


def test_the_tensors_are_those_of_the_clips_and_captions(prepared: Path, clips: Path, tiny: Tiny) -> None:
    index, cache, model = open_index(prepared), TensorCache(prepared), ModelFlags(str(tiny("5b")))
    record = preparation(tiny("5b"), clips, prepared).plan()[3]
    frames = decode_variant(record.path, record.cuts[0].variants[0])
    sample, cpu = index.samples[3], torch.device("cpu")
    with models.video_encoder(model, "fp32", cpu, tiling=False) as vae:
        moments = encode.video_moments(vae, frames)
    assert torch.equal(cache.read(sample.video_keys[0])["moments_CFHW"], moments)
    with models.text_encoder(model, "fp32", cpu) as (tokenizer, encoder):
        for caption, key in ((sample.caption, sample.prompt_key), ("", index.empty_prompt_key)):
            wanted = encode.prompt_embeds(tokenizer, encoder, [caption], 32)[0]
            torch.testing.assert_close(cache.read(key)["prompt_LD"], wanted, rtol=1e-4, atol=1e-5)


def test_the_frames_of_each_clip_are_measured(prepared: Path, framed: Path, clips: Path, tiny: Tiny) -> None:
    index, found = open_index(prepared), Ledger(prepared, "health.jsonl", "tensor").read()
    assert set(found) == {sample.video_keys[0] for sample in index.samples}
    record = preparation(tiny("5b"), clips, prepared).plan()[3]
    frames = decode_variant(record.path, record.cuts[0].variants[0])
    assert isinstance(frames, np.ndarray)
    measured = [found[index.samples[3].video_keys[0]][name] for name in Health._fields]
    assert measured == pytest.approx(health_of(frames), abs=1e-5)
    assert min(measured) > 0
    assert Ledger(framed, "health.jsonl", "tensor").read() == found  # first frames are not measured


def test_t5_is_freed_before_the_vae_is_loaded(
    tiny: Tiny, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    held: list[Any] = []
    text_encoder, video_encoder = models.text_encoder, models.video_encoder

    def watched(open_part: Any) -> Any:
        def part(*arguments: Any) -> Any:
            assert all(tensor.is_meta for module in held for tensor in module.parameters())
            block = open_part(*arguments)
            enter = block.__enter__

            class Watched:
                def __enter__(self) -> Any:
                    value = enter()
                    held.append(value[1] if isinstance(value, tuple) else value)
                    return value

                def __exit__(self, *error: Any) -> Any:
                    return block.__exit__(*error)

            return Watched()

        return part

    monkeypatch.setattr(models, "text_encoder", watched(text_encoder))
    monkeypatch.setattr(models, "video_encoder", watched(video_encoder))
    complete(tiny("5b"), clips, tmp_path)
    assert [type(module).__name__ for module in held] == ["T5EncoderModel", "AutoencoderKLCogVideoX"]
    assert all(tensor.is_meta for module in held for tensor in module.parameters())


# -- a second run ------------------------------------------------------------------------------------------------------


def test_a_second_run_encodes_and_loads_nothing(
    tiny: Tiny, clips: Path, output: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError(f"called with {arguments}")

    before, index = tensor_files(output), open_index(output)
    for name in ("text_encoder", "video_encoder"):
        monkeypatch.setattr(models, name, never)
    monkeypatch.setattr(Workers, "run", never)
    assert complete(tiny("5b"), clips, output) == index
    assert encoded == Encoded()
    assert tensor_files(output) == before


@pytest.mark.fault("kills: an interruption of the preparation")
def test_an_interrupted_run_continues(
    tiny: Tiny,
    clips: Path,
    prepared: Path,
    tmp_path: Path,
    encoded: Encoded,
    monkeypatch: pytest.MonkeyPatch,
    threads: None,
) -> None:
    write = TensorCache.write

    def killed(self: TensorCache, key: str, tensors: dict[str, Any]) -> int:
        if encoded.clips == 3:
            raise KeyboardInterrupt
        return write(self, key, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(TensorCache, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            complete(tiny("5b"), clips, tmp_path)
    assert not (tmp_path / "index.json").exists()
    index = complete(tiny("5b"), clips, tmp_path)
    assert (
        encoded.clips == 3 + NUM_CLIPS - 1
    )  # a clip is written while the next one is encoded, so one of the three was not written
    assert len(encoded.captions) == NUM_CLIPS + 1
    assert index == open_index(prepared)
    assert tensor_files(tmp_path) == tensor_files(prepared)


def test_temporary_files_of_killed_processes_are_deleted(
    tiny: Tiny, clips: Path, output: Path, encoded: Encoded
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    tensor = next(output.rglob("*.safetensors"))
    left, used = (tensor.with_name(f".x.{machine_name()}.{pid}.tmp") for pid in (ended.pid, os.getppid()))
    left.write_bytes(b"half")
    used.write_bytes(b"half")
    complete(tiny("5b"), clips, output)
    assert not left.exists()
    assert used.exists()


@pytest.mark.fault("data: a cached tensor is deleted")
def test_a_deleted_tensor_is_made_again(tiny: Tiny, clips: Path, output: Path, encoded: Encoded, threads: None) -> None:
    before, index = tensor_files(output), open_index(output)
    TensorCache(output).path(index.samples[2].video_keys[0]).unlink()
    assert complete(tiny("5b"), clips, output) == index
    assert encoded == Encoded(1, [])
    assert tensor_files(output) == before


def test_only_an_edited_caption_is_encoded_again(
    tiny: Tiny, data: Path, output: Path, encoded: Encoded, threads: None
) -> None:
    before = open_index(output)
    lines = (data / "prompts.txt").read_text().splitlines()
    lines[4] = "Something else."
    (data / "prompts.txt").write_text("\n".join(lines))
    index = complete(tiny("5b"), data, output)
    assert encoded == Encoded(0, ["Something else."])
    assert [s.prompt_key == t.prompt_key for s, t in zip(before.samples, index.samples, strict=True)] == [
        number != 4 for number in range(NUM_CLIPS)
    ]
    assert open_index(output).samples[4].caption == "Something else."


def test_the_id_token_is_part_of_the_caption(
    tiny: Tiny, clips: Path, output: Path, encoded: Encoded, threads: None
) -> None:
    index = complete(tiny("5b"), clips, output, id_token="TOY_STYLE")
    assert encoded.clips == 0
    assert len(encoded.captions) == NUM_CLIPS
    assert all(sample.caption.startswith("TOY_STYLE A ") for sample in index.samples)


def test_a_touched_file_is_not_encoded_again(
    tiny: Tiny, data: Path, output: Path, encoded: Encoded, threads: None
) -> None:
    index = complete(tiny("5b"), data, output)
    for path in (data / "videos").iterdir():
        os.utime(path, ns=(1, 1))
    assert complete(tiny("5b"), data, output) == index
    assert encoded == Encoded()


@pytest.mark.fault("data: captions or clips are edited after they were prepared")
def test_only_a_changed_clip_is_encoded_again(
    tiny: Tiny, data: Path, output: Path, encoded: Encoded, threads: None
) -> None:
    before, old = open_index(output), tensor_files(output)
    frames = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), np.uint8)
    write_video(data / "videos/00001.mp4", frames, 8)
    index = complete(tiny("5b"), data, output)
    assert encoded == Encoded(1, [])
    pairs = zip(before.samples, index.samples, strict=True)
    assert [s.video_keys == t.video_keys for s, t in pairs] == [number != 1 for number in range(NUM_CLIPS)]
    assert old.items() <= tensor_files(output).items()


@pytest.mark.parametrize(
    ("changes", "clips_again", "captions_again"),
    [
        ({"height_buckets": (16,)}, NUM_CLIPS, 0),
        ({"frame_selection": "head"}, NUM_CLIPS - 3, 0),
        ({"video_reshape_mode": "center"}, NUM_CLIPS - 3, 0),
        ({"random_flip": 1.0}, NUM_CLIPS, 0),
        ({"max_bad_fraction": 0.5, "dataloader_num_workers": 2}, 0, 0),
        ({"encode_flags": EncodeFlags(dtype="bf16")}, NUM_CLIPS, NUM_CLIPS + 1),
        ({"encode_flags": EncodeFlags(encode_tiling=True)}, NUM_CLIPS, 0),
    ],
    ids=["size", "window", "crop", "flip", "what decides nothing", "dtype", "tiling"],
)
def test_another_recipe_encodes_only_what_it_changes(
    tiny: Tiny,
    clips: Path,
    output: Path,
    encoded: Encoded,
    threads: None,
    changes: dict[str, Any],
    clips_again: int,
    captions_again: int,
) -> None:
    if "frame_selection" in changes:
        # The first three clips have exactly 17 frames at 8 frames per second, so their window cannot move.
        complete(tiny("5b"), clips, output, frame_buckets=(9, 17), max_num_frames=17)
        encoded.clips = 0
        changes = changes | {"frame_buckets": (9, 17), "max_num_frames": 17}
    complete(tiny("5b"), clips, output, **changes)
    assert encoded.clips == clips_again
    assert len(encoded.captions) == captions_again


def test_models_with_the_same_weights_share_the_cache(
    tiny: Tiny, clips: Path, output: Path, encoded: Encoded, threads: None
) -> None:
    assert complete(tiny("2b"), clips, output).samples == open_index(output).samples
    assert encoded == Encoded()


def test_augmentations_are_variants(tiny: Tiny, clips: Path, tmp_path: Path, encoded: Encoded, threads: None) -> None:
    index = complete(
        tiny("5b"), clips, tmp_path, num_augmentations=3, random_flip=0.5, video_reshape_mode="random", seed=1
    )
    records = preparation(
        tiny("5b"), clips, tmp_path, num_augmentations=3, random_flip=0.5, video_reshape_mode="random", seed=1
    ).plan()
    assert {len(sample.video_keys) for sample in index.samples} == {3}
    flips = [variant.fit.flip for record in records for variant in record.cuts[0].variants]
    assert len(flips) == 3 * NUM_CLIPS
    assert set(flips) == {True, False}
    assert encoded.clips == len({key for sample in index.samples for key in sample.video_keys})


# -- bad clips ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("data: a clip that is shorter than its bucket")
def test_a_short_clip_goes_to_a_smaller_bucket(tiny: Tiny, clips: Path, tmp_path: Path) -> None:
    records = preparation(tiny("5b"), clips, tmp_path, frame_buckets=(5, 17, 81)).plan()
    # At 8 frames per second, the clips give 17 or 19 frames, and the last one gives 14, so it goes to 5.
    assert [record.cuts[0].bucket.frames for record in records] == [17, 17, 17, 17, 17, 5]
    assert {record.status for record in records} == {OK}


def test_a_clip_too_short_for_all_stops_the_run(tiny: Tiny, clips: Path, tmp_path: Path, threads: None) -> None:
    with pytest.raises(UsageError) as caught:
        complete(tiny("5b"), clips, tmp_path, frame_buckets=(17,))
    assert caught.value.problems == (
        "--max_bad_fraction 0: 1 of 6 clips cannot be used; fix or remove them, see the table (ledger.jsonl has all), "
        "or continue without: --max_bad_fraction 0.167",
    )
    assert not (tmp_path / "index.json").exists()


@pytest.mark.fault("data: a clip that is shorter than its bucket")
def test_a_short_clip_is_dropped_where_that_is_allowed(
    tiny: Tiny, clips: Path, tmp_path: Path, encoded: Encoded, threads: None
) -> None:
    index = complete(tiny("5b"), clips, tmp_path, frame_buckets=(17,), max_bad_fraction=0.167)
    assert [sample.id for sample in index.samples] == [f"videos/0000{k}.mp4" for k in range(5)]
    assert encoded.clips == 5
    assert len(encoded.captions) == 6
    with pytest.raises(UsageError, match=r"--max_bad_fraction 0\.16: 1 of 6"):
        complete(tiny("5b"), clips, tmp_path, frame_buckets=(17,), max_bad_fraction=0.16)


def test_a_data_set_without_usable_clips_is_an_error(tiny: Tiny, clips: Path, tmp_path: Path, threads: None) -> None:
    with pytest.raises(UsageError, match="no clip is left to train on"):
        complete(tiny("5b"), clips, tmp_path, frame_buckets=(81,), max_num_frames=81, max_bad_fraction=1.0)


@pytest.mark.fault("data: files that are not videos")
def test_files_that_are_not_videos_are_listed_with_the_reason(
    tiny: Tiny, data: Path, tmp_path: Path, threads: None
) -> None:
    (data / "videos/00000.mp4").write_text("not a video")
    (data / "videos/00002.mp4").write_bytes(b"")
    records = preparation(tiny("5b"), data, tmp_path / "out").plan()
    assert [record.status for record in records] == [FAILED, OK, FAILED, OK, OK, OK]
    assert "Invalid data found" in records[0].reason
    assert "is empty; download it again" in records[2].reason
    with pytest.raises(UsageError, match="2 of 6 clips cannot be used"):
        check_bad(records, 0.3)
    check_bad(records, 0.34)


def cut_in_the_middle(path: Path) -> None:
    """Overwrites the last coded pictures with zeros; the header and the first frame stay good."""
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    middle = start + (len(content) - start) // 2
    content[middle:] = bytes(len(content) - middle)
    path.write_bytes(content)


def damaged_video(path: Path) -> None:
    """Writes a video whose header is good and whose last frames do not decode."""
    frames = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), np.uint8)
    write_video(path, frames, 8)
    cut_in_the_middle(path)


@pytest.mark.fault("data: a clip that does not decode")
def test_a_clip_that_does_not_decode_is_found_and_recorded(
    tiny: Tiny, data: Path, tmp_path: Path, encoded: Encoded, threads: None
) -> None:
    damaged_video(data / "videos/00003.mp4")
    made = preparation(
        tiny("5b"), data, tmp_path / "out", frame_buckets=(17,), frame_selection="head", max_bad_fraction=0.5
    )
    records = made.plan()
    assert records[3].status == OK
    index, _ = made.encode(records, 4)
    assert [sample.id for sample in index.samples] == [f"videos/0000{k}.mp4" for k in (0, 1, 2, 4)]
    after = made.plan()
    assert [record.status for record in after] == [OK, OK, OK, FAILED, OK, SHORT]
    assert "00003.mp4" in after[3].reason
    with pytest.raises(UsageError, match="2 of 6"):
        check_bad(after, 0.0)


def test_copies_of_a_clip_that_does_not_decode_are_all_dropped(
    tiny: Tiny, data: Path, tmp_path: Path, threads: None
) -> None:
    damaged_video(data / "videos/00003.mp4")
    shutil.copy(data / "videos/00003.mp4", data / "videos/00004.mp4")
    made = preparation(
        tiny("5b"), data, tmp_path / "out", frame_buckets=(17,), frame_selection="head", max_bad_fraction=0.5
    )
    index, _ = made.encode(made.plan(), 4)
    cache = TensorCache(tmp_path / "out")
    assert all(cache.has(key) for sample in index.samples for key in sample.video_keys)


def test_copies_of_a_clip_are_encoded_once(
    tiny: Tiny, data: Path, tmp_path: Path, encoded: Encoded, threads: None
) -> None:
    shutil.copy(data / "videos/00000.mp4", data / "videos/00001.mp4")
    lines = (data / "videos.txt").read_text().splitlines()
    (data / "videos.txt").write_text("\n".join([*lines[:5], lines[0]]))
    index = complete(tiny("5b"), data, tmp_path / "out")
    assert encoded.clips == 4
    assert len(index.samples) == 6
    assert index.samples[0].video_keys == index.samples[1].video_keys == index.samples[5].video_keys
    assert len({sample.id for sample in index.samples}) == 6


@pytest.mark.fault("numbers: an encoding that is not finite")
def test_moments_that_are_not_finite_stop_the_run(
    tiny: Tiny, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    monkeypatch.setattr(encode, "video_moments", lambda vae, frames: torch.full((2, 1, 1, 1), float("inf")))
    with pytest.raises(UsageError, match=r"--dtype fp16: the VAE overflows on .*00000.mp4; give bf16 or fp32"):
        complete(tiny("5b"), clips, tmp_path, encode_flags=EncodeFlags(dtype="fp16"))
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 80), (64, 96)])
def test_tiles_give_latents_of_the_bucket_s_size(
    tiny: Tiny, clips: Path, tmp_path: Path, threads: None, height: int, width: int
) -> None:
    """Half of 64x96, the default tile of diffusers for this VAE, ends in an error or in latents of another size."""
    size = {"height_buckets": (height,), "width_buckets": (width,)}
    index = complete(tiny("5b"), clips, tmp_path, encode_flags=EncodeFlags(encode_tiling=True), **size)
    moments = TensorCache(tmp_path).read(index.samples[0].video_keys[0])["moments_CFHW"]
    assert moments.shape == (32, 2, height // 8, width // 8)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (False, r"--encode_tiling false: .* too little free memory to encode 5x32x48; give --encode_tiling true"),
        (True, r"--encode_tiling true: .* too little free memory to encode 5x32x48; give smaller buckets"),
    ],
)
@pytest.mark.fault("memory: out of memory while a clip is encoded")
def test_a_clip_that_does_not_fit_on_the_device_names_the_flag(
    tiny: Tiny,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: None,
    tiling: bool,
    message: str,
) -> None:
    def full(vae: Any, frames: np.ndarray) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encode, "video_moments", full)
    with pytest.raises(UsageError, match=message):
        complete(tiny("5b"), clips, tmp_path, encode_flags=EncodeFlags(encode_tiling=tiling))


def test_a_clip_is_stored_while_the_next_is_encoded(
    tiny: Tiny, clips: Path, tmp_path: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    write, begun = TensorCache.write, []

    def watched(self: TensorCache, key: str, tensors: dict[str, Any]) -> int:
        if "moments_CFHW" in tensors:
            begun.append(encoded.clips)
        return write(self, key, tensors)

    monkeypatch.setattr(TensorCache, "write", watched)
    complete(tiny("5b"), clips, tmp_path)
    assert begun == [2, 3, 4, 5, 6, 6]


# -- where T5 runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_t5_on_the_host_makes_the_same_embeddings(
    tiny: Tiny,
    clips: Path,
    tmp_path: Path,
    encoded: Encoded,
    monkeypatch: pytest.MonkeyPatch,
    threads: None,
    batch: int,
) -> None:
    text_encoder, opened = models.text_encoder, []

    def watched(*arguments: Any) -> Any:
        opened.append(arguments[3:])
        return text_encoder(*arguments)

    monkeypatch.setattr(models, "text_encoder", watched)
    monkeypatch.setattr(encoding, "BATCHES_PER_PASS", 2)
    folders = {place: tmp_path / place for place in ("device", "host")}
    for place, folder in folders.items():
        complete(tiny("5b"), clips, folder, encode_flags=EncodeFlags(t5_on=place), caption_batch=batch)
    assert opened == [("device", batch), ("host", batch)]
    assert len(encoded.captions) == 2 * (NUM_CLIPS + 1)
    assert tensor_files(folders["device"]) == tensor_files(folders["host"])


@pytest.mark.fault("memory: out of memory while T5 is loaded")
def test_t5_that_does_not_fit_on_the_device_names_the_flag(
    tiny: Tiny, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encode, "prompt_embeds", full)
    for place, fix in (("device", "give --t5_on host"), ("host", "stop other programs that use it")):
        with pytest.raises(UsageError, match=f"--t5_on {place}: .* too little free memory for T5; {fix}"):
            complete(tiny("5b"), clips, tmp_path, encode_flags=EncodeFlags(t5_on=place))


@pytest.mark.fault("numbers: an encoding that is not finite")
def test_a_caption_whose_embedding_is_not_finite_is_named(
    tiny: Tiny, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    def overflowing(tokenizer: Any, encoder: Any, captions: list[str], length: int) -> torch.Tensor:
        return torch.tensor([float("inf") if "green" in caption else 0.0 for caption in captions])[:, None, None]

    monkeypatch.setattr(encode, "prompt_embeds", overflowing)
    with pytest.raises(
        UsageError, match=r"--dtype fp16: T5 overflows on 'A green disc moves to the right.'; give bf16"
    ):
        complete(tiny("5b"), clips, tmp_path, encode_flags=EncodeFlags(dtype="fp16"))


# -- first frames ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def framed(tiny: Tiny, clips: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adds two encodings of each first frame to a copy of the prepared cache. Tests must not change the folder."""
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("framed") / "out"))
    complete(tiny("5b-i2v"), clips, folder, image_variants=2)
    return folder


def write_image(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Writes an image of noise and returns its pixels, uint8 (H, W, 3)."""
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(frame).save(path)
    return frame


def with_images(data: Path, sizes: Sequence[tuple[int, int]]) -> list[Path]:
    """Keeps one clip for each size, the first ones (three are 96x64), and lists an image of that size for each."""
    for name in ("prompts.txt", "videos.txt"):
        lines = (data / name).read_text().splitlines()[: len(sizes)]
        (data / name).write_text("".join(f"{line}\n" for line in lines))
    paths = [data / f"{number}.png" for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        write_image(path, *size, seed=number)
    (data / "images.txt").write_text("".join(f"{path.name}\n" for path in paths))
    return paths


SHAPES = [(64, 96)] * 3


def test_first_frames_are_added_to_what_is_there(prepared: Path, framed: Path) -> None:
    before, after = open_index(prepared), open_index(framed)
    assert after.without_images() == before
    assert (before.image_variants, after.image_variants) == (0, 2)
    keys = {key for sample in after.samples for key in sample.image_keys}
    assert len(keys) == NUM_CLIPS
    assert keys <= after.keys
    assert set(tensor_files(framed)) - set(tensor_files(prepared)) == {f"{key}.safetensors" for key in keys}
    assert {k: v for k, v in tensor_files(framed).items() if k in tensor_files(prepared)} == tensor_files(prepared)
    assert after.fingerprint != before.fingerprint == after.without_images().fingerprint


def images_of(folder: Path, number: int) -> list[torch.Tensor]:
    """Returns the encodings of a clip's first frame, one tensor per variant of the clip."""
    sample = open_index(folder).samples[number]
    return [TensorCache(folder).read(key)["image_moments_KCHW"] for key in sample.image_keys]


def test_a_first_frame_is_cropped_as_its_clip(
    tiny: Tiny, clips: Path, tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each variant, the first frame has the window, resize, crop and flip of the clip."""
    clips_seen: list[bytes] = []
    images_seen: list[bytes] = []
    image, video = encode.image_moments, encode.video_moments
    monkeypatch.setattr(encode, "video_moments", lambda *a: (clips_seen.append(a[1][0].tobytes()), video(*a))[1])
    monkeypatch.setattr(encode, "image_moments", lambda *a: (images_seen.append(a[1].tobytes()), image(*a))[1])
    changes = {"num_augmentations": 3, "random_flip": 0.5, "video_reshape_mode": "random", "frame_selection": "random"}
    index = complete(tiny("5b-i2v"), clips, tmp_path, image_variants=2, **changes)
    assert set(clips_seen) == set(images_seen)
    assert len(set(images_seen)) > NUM_CLIPS
    assert {len(sample.image_keys) for sample in index.samples} == {3}
    assert {image.shape for image in images_of(tmp_path, 0)} == {(2, 32, 4, 6)}


def test_a_listed_image_is_cropped_as_its_clip(
    tiny: Tiny, data: Path, tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image may have any size, but must have the aspect ratio of its clip."""
    with_images(data, [(128, 192)])
    picture = np.asarray(Image.open(data / "0.png"))
    seen: list[np.ndarray] = []
    image = encode.image_moments
    monkeypatch.setattr(encode, "image_moments", lambda *a: (seen.append(a[1]), image(*a))[1])
    changes = {"random_flip": 1.0, "video_reshape_mode": "center", "height_buckets": (64,)}
    complete(tiny("5b-i2v"), data, tmp_path / "out", image_variants=1, num_augmentations=1, **changes)
    half = picture.reshape(64, 2, 96, 2, 3).mean(axis=(1, 3))
    assert np.abs(seen[0] - half[:, 24:72][:, ::-1]).max() <= 1


def test_a_second_run_encodes_no_first_frame(
    tiny: Tiny, clips: Path, framed: Path, tmp_path: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(framed, tmp_path / "out"))
    monkeypatch.setattr(Workers, "run", lambda *_: pytest.fail("a file was opened"))
    assert complete(tiny("5b-i2v"), clips, output, image_variants=2) == open_index(framed)
    assert complete(tiny("5b"), clips, output) == open_index(framed).without_images()
    assert encoded == Encoded()


@pytest.mark.parametrize("changes", [{"image_variants": 3}, {"seed": 7}], ids=["more noises", "seed"])
def test_other_noise_encodes_only_the_first_frames_again(
    tiny: Tiny, clips: Path, framed: Path, tmp_path: Path, encoded: Encoded, threads: None, changes: dict[str, Any]
) -> None:
    output = Path(shutil.copytree(framed, tmp_path / "out"))
    complete(tiny("5b-i2v"), clips, output, **{"image_variants": 2} | changes)
    assert encoded == Encoded()
    one, other = images_of(framed, 0)[0], images_of(output, 0)[0]
    assert torch.equal(one[:2], other[:2]) == ("image_variants" in changes)


def test_only_an_edited_image_is_encoded_again(
    tiny: Tiny, data: Path, tmp_path: Path, encoded: Encoded, threads: None
) -> None:
    paths = with_images(data, SHAPES)
    before = complete(tiny("5b-i2v"), data, tmp_path, image_variants=1)
    encoded.clips = 0
    write_image(paths[2], *SHAPES[2], seed=99)
    after = complete(tiny("5b-i2v"), data, tmp_path, image_variants=1)
    assert encoded.clips == 0
    pairs = list(zip(before.samples, after.samples, strict=True))
    assert [one.image_keys == other.image_keys for one, other in pairs] == [True, True, False]
    assert [one.video_keys == other.video_keys for one, other in pairs] == [True] * 3


def test_one_clip_with_two_images(tiny: Tiny, data: Path, tmp_path: Path, encoded: Encoded, threads: None) -> None:
    with_images(data, SHAPES)
    lines = (data / "videos.txt").read_text().splitlines()
    (data / "videos.txt").write_text("\n".join([lines[0], lines[0], lines[1]]))
    index = complete(tiny("5b-i2v"), data, tmp_path, image_variants=1)
    first, second, third = index.samples
    assert first.video_keys == second.video_keys != third.video_keys
    assert len({first.image_keys, second.image_keys, third.image_keys}) == 3
    assert all(TensorCache(tmp_path).has(key) for key in index.keys)


def test_images_are_ignored_for_text_to_video(tiny: Tiny, data: Path, tmp_path: Path, threads: None) -> None:
    with_images(data, [(10, 10)])
    assert len(complete(tiny("5b"), data, tmp_path).samples) == 1


@pytest.mark.fault("data: images that cannot be used")
def test_bad_images_are_listed_and_their_clips_dropped(
    tiny: Tiny, data: Path, tmp_path: Path, encoded: Encoded, threads: None
) -> None:
    """The images are: not an image, cut off in the middle, and of another aspect ratio than the clip."""
    paths = with_images(data, [*SHAPES[:2], (64, 64), (96, 128)])
    paths[0].write_text("not an image")
    with Image.open(paths[1]) as picture:
        picture.convert("RGB").save(paths[1], "JPEG")  # a header of JPEG can be read although the file is cut off
    paths[1].write_bytes(paths[1].read_bytes()[:-2000])
    made = preparation(tiny("5b-i2v"), data, tmp_path, image_variants=1, max_bad_fraction=0.75)
    records = made.plan()
    assert [record.status for record in records] == [FAILED, OK, FAILED, OK]
    assert records[0].path == str(paths[0])
    assert records[2].reason.startswith(
        "is 64x64, but its clip is 96x64: a first frame must have the aspect ratio of its clip; "
    )
    index, after = made.encode(records, 4)
    assert [record.status for record in after] == [FAILED, FAILED, FAILED, OK]
    assert "1.png" in after[1].reason
    assert [sample.id for sample in index.samples] == ["videos/00003.mp4"]
    assert made.plan() == after  # the ledger remembers the failures
    assert len(complete(tiny("5b"), data, tmp_path).samples) == 4


def test_a_video_is_not_a_first_frame(tiny: Tiny, clips: Path, data: Path, tmp_path: Path, threads: None) -> None:
    (image,) = with_images(data, SHAPES[:1])
    shutil.copy(clips / "videos" / "00000.mp4", image)
    (record,) = preparation(tiny("5b-i2v"), data, tmp_path, image_variants=1).plan()
    rule = "is a video of 17 frames, but a first frame must be a still image"
    assert record.status == FAILED
    assert record.reason == f"{rule}; list an image, or no images to take the first frames of the clips"


def test_an_image_that_changes_during_the_preparation_is_skipped_once(
    tiny: Tiny, data: Path, tmp_path: Path, threads: None
) -> None:
    paths = with_images(data, SHAPES)
    made = preparation(tiny("5b-i2v"), data, tmp_path, image_variants=1, max_bad_fraction=0.5)
    records = made.plan()
    write_image(paths[1], *SHAPES[1], seed=99)
    os.utime(paths[1], ns=(1, 1))
    index, after = made.encode(records, 4)
    assert [record.status for record in after] == [OK, UNREADABLE, OK]
    assert len(complete(tiny("5b-i2v"), data, tmp_path, image_variants=1).samples) == len(index.samples) + 1


# -- processes -------------------------------------------------------------------------------------------------------


def test_nothing_is_probed_or_decoded_in_this_process(
    tiny: Tiny, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: Encoded
) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("in the main process")

    for name in ("read_frames", "probe_once", "file_hash"):
        monkeypatch.setattr(clips_module, name, never)
    with pytest.raises(AssertionError, match="in the main process"):
        decode_variant(clips / "videos/00000.mp4", Variant((0,), Fit(8, 8, 0, 0, 8, 8, False), "pyav"))
    complete(tiny("5b"), clips, tmp_path, dataloader_num_workers=2)
    assert encoded.clips == NUM_CLIPS


# -- moved data --------------------------------------------------------------------------------------------------------


def test_a_cache_can_be_used_when_the_data_has_moved(
    tiny: Tiny, data: Path, output: Path, encoded: Encoded, threads: None
) -> None:
    assert complete(tiny("5b"), data, output).samples == open_index(output).samples
    assert encoded == Encoded()


# -- while others change things ----------------------------------------------------------------------------------------


def during_encoding(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Calls ``act`` once, between planning and the decoding of clips."""
    real, done = models.video_encoder, []

    def encoder(*arguments: Any) -> Any:
        if not done:
            done.append(act())
        return real(*arguments)

    monkeypatch.setattr(models, "video_encoder", encoder)


@pytest.mark.fault("data: a media file that changes while it is prepared")
def test_a_clip_that_changes_after_planning_is_not_stored_under_its_old_key(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    clip, output = data / "videos/00001.mp4", tmp_path / "out"
    original = clip.read_bytes()
    with monkeypatch.context() as patch:
        during_encoding(patch, lambda: shutil.copy(data / "videos/00004.mp4", clip))
        with pytest.raises(UnusableClips) as caught:
            complete(tiny("5b"), data, output)
    assert "has changed while it was prepared" in caught.value.records[1].reason
    clip.write_bytes(original)
    index = complete(tiny("5b"), data, output)
    reference = complete(tiny("5b"), data, tmp_path / "fresh")
    assert index.samples == reference.samples
    assert tensor_files(output) == tensor_files(tmp_path / "fresh")


def test_a_clip_that_is_missing_for_a_while_is_not_recorded_as_failed(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    clip, away, output = data / "videos/00001.mp4", tmp_path / "away.mp4", tmp_path / "out"
    with monkeypatch.context() as patch:
        during_encoding(patch, lambda: os.rename(clip, away))
        with pytest.raises(UnusableClips) as caught:
            complete(tiny("5b"), data, output)
    assert "has changed while it was prepared" in caught.value.records[1].reason
    os.rename(away, clip)
    assert len(complete(tiny("5b"), data, output).samples) == NUM_CLIPS


@pytest.mark.fault("ranks: two jobs prepare the same folder")
def test_a_tensor_that_is_removed_during_the_preparation_is_encoded_again(
    tiny: Tiny, clips: Path, output: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    made, index = preparation(tiny("5b"), clips, output), open_index(output)
    records, key = made.plan(), index.samples[0].video_keys[0]
    encode_clips, passes = made._encode_clips, []

    def removing(*arguments: Any) -> None:
        encode_clips(*arguments)
        passes.append(made.cache.has(key))
        if len(passes) == 1:
            made.cache.remove(key)

    monkeypatch.setattr(made, "_encode_clips", removing)
    assert made.encode(records)[0] == index
    assert (passes, encoded.clips) == ([True, True], 1)


def test_a_validation_set_without_usable_clips_is_an_error(
    tiny: Tiny, clips: Path, tmp_path: Path, threads: None
) -> None:
    held = tmp_path / "held"
    (held / "videos").mkdir(parents=True)
    shutil.copy(clips / "videos/00005.mp4", held / "videos")
    (held / "prompts.txt").write_text("short\n")
    (held / "videos.txt").write_text("videos/00005.mp4\n")
    flags = {"validation_data_root": (str(held),), "frame_buckets": (17,), "max_bad_fraction": 0.5}
    with pytest.raises(UsageError, match="no clip is left to measure on"):
        complete(tiny("5b"), clips, tmp_path / "out", **flags)


@pytest.mark.parametrize(
    ("asked", "cores", "gib", "processes", "expected"),
    [
        (0, 32, 64, 1, 4),
        (0, 8, 64, 4, 2),
        (0, 2, 64, 1, 2),
        (0, 2, 64, 8, 1),
        (0, 32, 14, 1, 3),
        (0, 32, 24, 2, 3),
        (0, 32, 2, 1, 1),
        (6, 2, 2, 8, 6),
    ],
)
def test_as_many_clips_are_decoded_at_a_time_as_the_machine_allows(
    asked: int, cores: int, gib: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process decodes a clip of 49x480x720 in 0.9 s, and a GPU encodes it in 0.5 s."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(workers, "free_host_bytes", lambda: gib * 2**30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    flags = DataFlags(data_root=("clips",), dataloader_num_workers=asked)
    assert prepare.worker_pool(flags, workers.Limits(1.0, 4 * 2**30)).number == expected


@pytest.mark.fault("data: a file that kills the process that reads it")
def test_files_of_killed_workers_are_tried_again_under_other_limits(
    tiny: Tiny, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Killing(InlineWorkers):
        def run(self, jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
            for function, path, *rest in jobs:
                asked.append(Path(path).name)
                killed = Killed("no result after 9 s"), Killed("its worker was killed", transient=True)
                number = {"00001.mp4": 0, "00002.mp4": 1}.get(asked[-1])
                yield function(path, *rest) if number is None else killed[number]

    monkeypatch.setattr(prepare, "worker_pool", lambda data, limits: Killing())
    statuses = [record.status for record in preparation(tiny("5b"), clips, tmp_path).plan()]
    assert statuses == [OK, KILLED, UNREADABLE, OK, OK, OK]
    asked.clear()
    preparation(tiny("5b"), clips, tmp_path).plan()
    assert asked == ["00002.mp4"]  # its worker was killed from outside, so the file is tried again
    asked.clear()
    preparation(tiny("5b"), clips, tmp_path, decode_timeout=500.0).plan()
    assert sorted(asked) == ["00001.mp4", "00002.mp4"]


@pytest.mark.parametrize("change", [{"status": "odd"}, {"cuts": None}, {"content": None}])
def test_a_malformed_ledger_line_is_ignored(
    tiny: Tiny, clips: Path, output: Path, encoded: Encoded, threads: None, change: dict[str, Any]
) -> None:
    index, path = open_index(output), output / "ledger.jsonl"
    records = [json.loads(line) | change for line in path.read_text().splitlines()]
    records = [{name: value for name, value in record.items() if value is not None} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert complete(tiny("5b"), clips, output) == index
    assert encoded == Encoded()


@pytest.mark.parametrize("dry_run", [False, True])
def test_all_stages_share_their_worker_processes(
    tiny: Tiny, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    """Each worker spends a third of a second on imports, which would be a third of the time of a small preparation."""
    started: list[Any] = []
    spawn = workers._spawn
    monkeypatch.setattr(workers, "_spawn", lambda *given: started.append(spawn(*given)) or started[-1])
    assert running.prepare(tiny("5b"), clips, tmp_path, *["--dry_run"] * dry_run) == 0
    assert (tmp_path / "report.html").is_file()
    assert len(started) == workers.usual_number(workers.Limits(1.0, 4 * 2**30))
    assert started[0].returncode is not None


def test_flags_of_first_frames_that_are_not_encoded_are_remarked(
    tiny: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_images(data, SHAPES)
    flags = ("--num_image_noise_variants", 2, "--image_column", "images.txt", "--dry_run")
    for more, number in (((), 2), (("--save_image_latents",), 0)):
        running.prepare(tiny("5b"), data, tmp_path / "tensors", *flags, *more)
        found = [line for line in capsys.readouterr().err.splitlines() if "no first frames are encoded" in line]
        assert len(found) == number


@pytest.mark.parametrize(
    "name", ["index.json", "report.html", "ledger.jsonl", "health.jsonl", "preview/strips/photo.jpg"]
)
@pytest.mark.fault("flags: files of other programs that a script would replace", times=2)
def test_files_of_other_programs_are_not_replaced(name: str, tiny: Tiny, clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tensors"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("{}")
    rule = f"{name.removesuffix('/photo.jpg')}: was not written by this script and would be replaced; move it away"
    with pytest.raises(UsageError, match=f"{rule}, or give another --output_dir"):
        running.prepare(tiny("5b"), clips, folder, "--dry_run")
    flags = running.lora_flags(tiny("5b"), clips, tmp_path / "lora", "--tensor_cache", folder)
    with pytest.raises(UsageError, match=f"{rule}, or give another --tensor_cache"):
        running.train(flags)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["{}"]


def test_a_damaged_index_and_other_files_of_a_preparation_are_replaced(tiny: Tiny, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.html").touch()
    assert running.prepare(tiny("5b"), clips, tmp_path) == 0
    for name in ("index.json", "report.html"):
        (tmp_path / name).write_text("torn")
    assert running.prepare(tiny("5b"), clips, tmp_path) == 0
    assert len(open_index(tmp_path).samples) == len(list(clips.glob("videos/*.mp4")))
    assert (tmp_path / "notes.txt").read_text() == "mine"
