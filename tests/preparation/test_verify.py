"""Tests of verify.py: each fault of a cache is found and named, and only what is faulty is encoded again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prepare_dataset
import pytest
import torch
from PIL import Image
from preparing import complete, preparation, tensor_files

from cogvideox.config.args import parse
from cogvideox.config.options import PrepareOptions
from cogvideox.data.cache import TensorCache, open_index
from cogvideox.errors import UsageError
from cogvideox.model import encode, models
from cogvideox.preparation.verify import check_flags, find_faults, repair

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def prepared(tiny: Tiny, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a data set with its cache in the folder "tensors". Tests change it only through the fixture data."""
    folder = tmp_path_factory.mktemp("verify") / "data"
    shutil.copytree(clips, folder)
    complete(tiny("5b"), folder, folder / "tensors")
    return folder


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    """Returns the data set at the same path, so that the ledger finds its files, and undoes changes afterwards."""
    shutil.copytree(prepared, tmp_path / "copy")
    yield prepared
    shutil.rmtree(prepared)
    shutil.copytree(tmp_path / "copy", prepared)


def faults(tiny: Tiny, data: Path, kind: str = "5b", **changes: Any) -> list[str]:
    """Returns the sorted lines of all faults of the cache."""
    made = preparation(tiny(kind), data, data / "tensors", **changes)
    return sorted(fault.text for fault in find_faults(made, made.plan()))


def run_repair(tiny: Tiny, data: Path) -> tuple[int, int]:
    """Repairs the cache, and returns how many clips and captions were encoded."""
    counts = [0, 0]
    video, prompt = encode.video_moments, encode.prompt_embeds

    def count_video(*arguments: Any) -> Any:
        counts[0] += 1
        return video(*arguments)

    def count_prompt(tokenizer: Any, encoder: Any, captions: list[str], length: int) -> Any:
        counts[1] += len(captions)
        return prompt(tokenizer, encoder, captions, length)

    made = preparation(tiny("5b"), data, data / "tensors")
    records = made.plan()
    repair(made, find_faults(made, records), records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "video_moments", count_video)
        patch.setattr(encode, "prompt_embeds", count_prompt)
        index, _ = made.encode(made.plan(), 4)
        assert made.publish(index)
    return counts[0], counts[1]


def first_clip(data: Path) -> Path:
    """Returns the path of the tensor of the first clip."""
    index = open_index(data / "tensors")
    return TensorCache(data / "tensors").path(index.samples[0].video_keys[0])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def swap_in_a_foreign_one(path: Path) -> None:
    other = next(other for other in path.parents[1].rglob("*.safetensors") if other != path)
    shutil.copy(other, path)


def test_a_good_cache_has_no_faults_and_is_not_touched(tiny: Tiny, data: Path) -> None:
    before = tensor_files(data)
    assert faults(tiny, data) == []
    assert run_repair(tiny, data) == (0, 0)
    assert tensor_files(data) == before


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (flip_a_bit, "its checksum is wrong"),
        (tear, "is incomplete"),
        (lambda path: path.write_bytes(b""), "is incomplete"),
        (swap_in_a_foreign_one, "holds the tensors of another key"),
        (Path.unlink, "does not exist"),
    ],
    ids=["bit", "torn", "empty", "foreign", "missing"],
)
@pytest.mark.fault("data: a cached tensor is damaged, and verified")
def test_a_damaged_tensor_is_named_and_alone_encoded_anew(
    tiny: Tiny, data: Path, damage: Callable[[Path], Any], what: str
) -> None:
    path, before = first_clip(data), tensor_files(data)
    damage(path)
    (found,) = faults(tiny, data)
    assert found.startswith(f"{path}: ")
    assert what in found
    if damage is not Path.unlink:
        assert path.exists()  # verification changes nothing
    assert run_repair(tiny, data) == (1, 0)
    assert tensor_files(data) == before
    assert faults(tiny, data) == []


@pytest.mark.parametrize(
    ("shape", "value", "what"),
    [((32, 3, 4, 6), 0.0, "its bucket needs (32, 2, 4, 6)"), ((32, 2, 4, 6), float("nan"), "not finite")],
)
@pytest.mark.fault("data: a cached tensor of a wrong type, shape, or value")
def test_complete_tensors_of_a_wrong_shape_or_value(
    tiny: Tiny, data: Path, shape: tuple[int, ...], value: float, what: str
) -> None:
    path = first_clip(data)
    TensorCache(data / "tensors").write(path.stem, {"moments_CFHW": torch.full(shape, value)})
    (found,) = faults(tiny, data)
    assert found.startswith(f"{path}: ")
    assert what in found
    assert run_repair(tiny, data) == (1, 0)
    assert faults(tiny, data) == []


def test_an_edited_caption_a_new_and_a_removed_clip(tiny: Tiny, data: Path) -> None:
    prompts, videos = data / "prompts.txt", data / "videos.txt"
    captions, paths = prompts.read_text().splitlines(), videos.read_text().splitlines()
    shutil.copy(data / paths[1], data / "videos/new.mp4")
    captions[0] = "Edited."
    prompts.write_text("\n".join([*captions[:-1], "A new one."]))
    videos.write_text("\n".join([*paths[:-1], "videos/new.mp4"]))
    assert faults(tiny, data) == [
        f"{paths[0]}: its caption has changed since it was encoded",
        f"{paths[-1]}: is in the cache, but is no longer listed or cannot be used",
        "videos/new.mp4: is not in the cache yet",
    ]
    assert run_repair(tiny, data) == (0, 2)  # the new clip is a copy
    assert faults(tiny, data) == []


@pytest.mark.fault("data: captions or clips are edited after they were prepared")
def test_an_edited_clip(tiny: Tiny, data: Path) -> None:
    shutil.copy(data / "videos/00004.mp4", data / "videos/00001.mp4")
    assert faults(tiny, data) == [
        "videos/00001.mp4: the clip, or a flag that cuts it, has changed since it was encoded"
    ]


def test_an_edit_that_keeps_size_and_time_is_found_by_content(tiny: Tiny, data: Path) -> None:
    path = data / "videos/00001.mp4"
    status, content = path.stat(), bytearray(path.read_bytes())
    at = content.index(b"x264")  # the name of the encoder, which decoders ignore
    content[at : at + 4] = b"X264"
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (found,) = faults(tiny, data)
    assert found == f"{path}: its content has changed since it was planned"
    assert run_repair(tiny, data) == (1, 0)
    assert faults(tiny, data) == []


@pytest.mark.fault("data: tensors of another model, or made with other flags", times=2)
def test_other_flags_and_other_weights_are_named(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    assert len(faults(tiny, data, height_buckets=(16,))) == 6
    model = Path(shutil.copytree(tiny("5b"), tmp_path / "model"))
    vae = models.load_vae(preparation(model, data, tmp_path).model, torch.float32)
    with torch.no_grad():
        next(vae.parameters()).add_(1.0)
    vae.save_pretrained(model / "vae")
    found = faults(lambda kind: model, data)
    assert "index.json: its tensors were made with another VAE" in found
    assert len(found) == 7


def test_an_empty_folder_says_what_to_do(tiny: Tiny, clips: Path, tmp_path: Path) -> None:
    made = preparation(tiny("5b"), clips, tmp_path)
    (fault,) = find_faults(made, made.plan())
    assert "has no index.json" in fault.text


def test_damage_is_found_and_repaired_without_an_index(tiny: Tiny, data: Path) -> None:
    path = first_clip(data)
    flip_a_bit(path)
    (data / "tensors" / "index.json").unlink()
    found = faults(tiny, data)
    assert len(found) == 2
    assert any("its checksum is wrong" in text for text in found)
    assert run_repair(tiny, data) == (1, 0)
    assert faults(tiny, data) == []


@pytest.mark.fault("data: clips of the same name in two folders")
def test_a_validation_clip_of_the_same_name_hides_no_fault(tiny: Tiny, data: Path, clips: Path) -> None:
    held = {"validation_data_root": (str(clips),)}
    complete(tiny("5b"), data, data / "tensors", **held)
    lines = (data / "prompts.txt").read_text().splitlines()
    (data / "prompts.txt").write_text("\n".join(["Edited.", *lines[1:]]))
    assert faults(tiny, data, **held) == ["videos/00000.mp4: its caption has changed since it was encoded"]


def test_the_flags(tiny: Tiny, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(*more: str) -> int:
        argv = ["--model_id", str(tiny("5b")), "--data_root", str(data), "--output_dir", str(data / "tensors")]
        argv += ["--height_buckets", "32", "--width_buckets", "48", "--frame_buckets", "5", *more]
        return prepare_dataset.main(parse(PrepareOptions, None, argv))

    assert script("--verify") == 0
    assert capsys.readouterr().out == "faults: 0\n"
    flip_a_bit(first_clip(data))
    assert script("--verify") == 1
    assert script("--verify") == 1
    assert "faults: 1" in capsys.readouterr().out
    assert script("--repair") == 0
    assert script("--verify") == 0


@pytest.mark.fault("data: tensors of another model, or made with other flags")
def test_other_flags_are_named_and_nothing_is_repaired(tiny: Tiny, data: Path) -> None:
    """Otherwise, each clip would be outdated, and be encoded again with flags that were only forgotten."""

    def check(*more: str) -> None:
        argv = ["--model_id", str(tiny("5b")), "--data_root", str(data), "--output_dir", str(data / "tensors"), *more]
        assert prepare_dataset.main(parse(PrepareOptions, None, argv)) == 0

    flags = ["--train_resolution", "5x32x48", "9x32x48", "--id_token", "TOKEN"]
    check(*flags)
    before, index = tensor_files(data), (data / "tensors/index.json").read_bytes()
    for how in ("--verify", "--repair"):
        with pytest.raises(UsageError) as error:
            check(how)
        rule, *lines = error.value.problems
        assert rule.startswith(f"{data / 'tensors'}: was prepared with other flags; give them to --verify and --repair")
        assert lines == [
            "  --id_token: TOKEN there, not set now",
            "  --train_resolution: 5x32x48 9x32x48 there, not set now",
        ]
    assert (tensor_files(data), (data / "tensors/index.json").read_bytes()) == (before, index)
    check("--verify", "--train_resolution", "9x32x48", "5x32x48", "--id_token", " TOKEN", "--dtype", "fp32")


# -- first frames ------------------------------------------------------------------------------------------------------


@pytest.fixture
def framed(tiny: Tiny, clips: Path, tmp_path: Path) -> Path:
    """Prepares two clips with listed images, each of which is encoded twice."""
    data = tmp_path / "framed"
    shutil.copytree(clips, data)
    for name in ("prompts.txt", "videos.txt"):
        (data / name).write_text("".join((data / name).read_text().splitlines(keepends=True)[:2]))
    for number in range(2):
        Image.new("RGB", (96, 64), (number * 100, 50, 50)).save(data / f"{number}.png")
    (data / "images.txt").write_text("0.png\n1.png\n")
    complete(tiny("5b-i2v"), data, data / "tensors", image_variants=2)
    return data


def test_damaged_first_frames_are_found_and_alone_encoded_anew(tiny: Tiny, framed: Path) -> None:
    before, index = tensor_files(framed), open_index(framed / "tensors")
    cache = TensorCache(framed / "tensors")
    assert faults(tiny, framed, "5b-i2v", image_variants=2) == []
    torn, foreign = (cache.path(sample.image_keys[0]) for sample in index.samples)
    tear(torn)
    cache.write(index.samples[1].image_keys[0], {"image_moments_KCHW": torch.zeros(3, 32, 4, 6)})
    found = faults(tiny, framed, "5b-i2v", image_variants=2)
    shapes = "has shape (3, 32, 4, 6), its bucket needs (2, 32, 4, 6)"
    assert found == sorted([f"{torn}: is incomplete", f"{foreign}: {shapes}"])
    made = preparation(tiny("5b-i2v"), framed, framed / "tensors", image_variants=2)
    records = made.plan()
    repair(made, find_faults(made, records), records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "video_moments", lambda *_: pytest.fail("a clip was encoded"))
        made.encode(made.plan(), 4)
    assert tensor_files(framed) == before


def test_a_changed_image_is_found(tiny: Tiny, framed: Path) -> None:
    """The change is found although size and time are the same, and the image is encoded again."""
    path = framed / "1.png"
    status = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (found,) = faults(tiny, framed, "5b-i2v", image_variants=2)
    assert found == f"{path}: its content has changed since it was planned"
    made = preparation(tiny("5b-i2v"), framed, framed / "tensors", image_variants=2)
    repair(made, find_faults(made, made.plan()), made.plan())
    keys = {sample.image_keys for sample in open_index(framed / "tensors").samples}
    index, _ = made.encode(made.plan(), 4)
    assert len(keys & {sample.image_keys for sample in index.samples}) == 1


def test_another_number_of_noises_is_found(tiny: Tiny, framed: Path) -> None:
    for variants in (0, 3):
        found = faults(tiny, framed, "5b-i2v", image_variants=variants)
        rule = "its first frame, or a flag for it, has changed since it was encoded"
        assert found == [f"videos/0000{number}.mp4: {rule}" for number in range(2)]


def test_a_forgotten_number_of_noises_is_named(tiny: Tiny, framed: Path) -> None:
    """Otherwise, --repair would encode each first frame again, with the default number of noises."""
    with pytest.raises(UsageError) as error:
        check_flags(preparation(tiny("5b-i2v"), framed, framed / "tensors", image_variants=8))
    assert error.value.problems[1:] == ("  --num_image_noise_variants: 2 there, 8 now",)
    check_flags(preparation(tiny("5b"), framed, framed / "tensors"))  # which has no first frames
