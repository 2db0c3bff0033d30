"""Tests of factory.py: folders that CogVideoX-Factory prepared are read as data, checked, and converted once."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import listing, options_of
from running import lora_flags
from torch import Tensor

from cogvideox.config import args
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import DataFlags, ModelFlags
from cogvideox.config.geometry import Geometry, read_geometry
from cogvideox.config.options import ImageLoraOptions
from cogvideox.data.cache import CacheIndex, TensorCache, hash_of, open_index
from cogvideox.data.dataset import LatentDataset
from cogvideox.data.sampler import Visit
from cogvideox.errors import UsageError
from cogvideox.preparation import factory
from cogvideox.preparation.factory import bucket_of, check_tensors, is_factory_layout, open_factory, read_tensor_rows

NAMES = ("00000", "00001", "00002")
Make = Callable[..., Path]


def moments(number: int, frames: int = 3) -> Tensor:
    """Returns the moments of a clip, (32, frames, 8, 12)."""
    return torch.randn(32, frames, 8, 12, generator=torch.Generator().manual_seed(number))


def embeds(number: int) -> Tensor:
    """Returns the embedding of a caption, bf16 (32, 32)."""
    return torch.randn(32, 32, generator=torch.Generator().manual_seed(100 + number)).bfloat16()


@pytest.fixture
def geometry(model: Path) -> Geometry:
    return read_geometry(ModelFlags(str(model)))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(*names: str, videos: tuple[str, ...] = ()) -> Path:
        """Makes a folder as the factory's prepare_dataset.py does, but without the videos."""
        folder = tmp_path / "factory"
        names = names or NAMES
        for kind, tensor in ((factory.MOMENTS, moments), (factory.EMBEDS, embeds)):
            (folder / kind).mkdir(parents=True)
            for number, name in enumerate(names):
                torch.save(tensor(number).clone(), folder / kind / f"{name}.pt")
        videos = videos or tuple(f"videos/{name}.mp4" for name in names)
        (folder / "prompts.txt").write_text("".join(f"TOKEN clip {number}\n" for number in range(len(videos))))
        (folder / "videos.txt").write_text("".join(f"{video}\n" for video in videos))
        return folder

    return make


def flags_of(folder: Path, **values: Any) -> DataFlags:
    return DataFlags(data_root=(str(folder),), **values)


class Opened:
    """Opens a folder as a run does, and counts the embeddings of the empty caption."""

    def __init__(self, folder: Path, geometry: Geometry, **flags: Any) -> None:
        self.cache, self.geometry = TensorCache(folder / "cogvideox_tensors"), geometry
        self.folder, self.data = folder, flags_of(folder, **flags)
        self.said: list[str] = []
        self.empty = 0

    def __call__(self, main: bool = True, images: bool = False) -> CacheIndex:
        encoders = SimpleNamespace(
            vae="V", text_encoder="T", vae_dtype="fp32", text_dtype="bf16", text_length=32, prompt_key=hash_of
        )
        ranks = SimpleNamespace(
            is_main_process=main, wait_for_everyone=lambda: None, from_main=lambda value: value if main else True
        )
        said, embed = self.said.append, self.embed_empty
        return open_factory(self.folder, self.data, self.geometry, self.cache, encoders, embed, ranks, said, images)

    def embed_empty(self) -> None:
        self.empty += 1
        self.cache.write(hash_of(""), {"prompt_LD": torch.zeros(32, 32)})

    def refused(self) -> tuple[str, ...]:
        """Returns the problems with which the folder is refused."""
        with pytest.raises(UsageError) as error:
            self()
        assert all(line.isprintable() for line in error.value.problems)
        return error.value.problems


# -- results of the conversion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [True, False])
def test_tensors_are_converted_bit_by_bit(make: Make, geometry: Geometry, main: bool) -> None:
    opened = Opened(make(), geometry, id_token="TOKEN")
    index = opened()
    assert opened(main) == index  # the other ranks get the same after the main process
    assert opened.empty == 1 + main
    assert [sample.id for sample in index.samples] == [f"videos/{name}.mp4" for name in NAMES]
    assert [sample.caption for sample in index.samples] == [f"TOKEN clip {k}" for k in range(3)]
    for number, sample in enumerate(index.samples):
        assert sample.bucket == Bucket(9, 64, 96)
        stored = opened.cache.read(sample.video_keys[0])["moments_CFHW"], opened.cache.read(sample.prompt_key)
        assert stored[0].equal(moments(number))
        assert stored[1]["prompt_LD"].equal(embeds(number))
        assert stored[1]["prompt_LD"].dtype == torch.bfloat16
    assert (index.vae, index.text_encoder, index.text_length, index.fps) == ("V", "T", 32, 8.0)
    assert index.dtypes == {"vae": "fp32", "text_encoder": "bf16"}
    assert open_index(opened.cache.folder) == index
    assert "cannot be checked" in opened.said[-1]


def test_files_that_are_added_are_published_whichever_run_ends_last(
    make: Make, geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(make(), geometry)
    other = Opened(opened.folder, geometry)

    def add_and_convert() -> None:
        if not other.said:
            for kind, tensor in ((factory.MOMENTS, moments), (factory.EMBEDS, embeds)):
                torch.save(tensor(9).clone(), opened.folder / kind / "added.pt")
            for name, line in (("videos.txt", "videos/added.mp4"), ("prompts.txt", "TOKEN added")):
                with open(opened.folder / name, "a") as lines:
                    lines.write(f"{line}\n")
            assert len(other().samples) == 4
        other.embed_empty()

    monkeypatch.setattr(opened, "embed_empty", add_and_convert)
    index = opened()
    assert index.samples[-1].id == "videos/added.mp4"
    assert open_index(opened.cache.folder) == index


def test_samples_of_it_are_trained_on(make: Make, geometry: Geometry) -> None:
    opened = Opened(make(), geometry)
    mean = moments(1)[:16]
    certain = torch.cat([mean, torch.full_like(mean, -30.0)])
    torch.save(certain, opened.folder / factory.MOMENTS / "00001.pt")
    batch = LatentDataset(opened.cache, opened(), geometry, 0, 0.0)[Visit(1, 0)]
    torch.testing.assert_close(batch.x0_BFCHW, mean.transpose(0, 1) * geometry.scaling_factor, atol=1e-5, rtol=0)
    assert batch.prompt_BLD.equal(embeds(1))
    assert LatentDataset(opened.cache, opened(), geometry, 0, 1.0)[Visit(1, 0)].prompt_BLD.eq(0).all()


@pytest.mark.parametrize(
    ("latents", "flags", "frames"),
    [
        (13, {}, 49),
        (3, {}, 9),
        (1, {}, 1),
        (12, {}, 48),
        (6, {}, 24),
        (14, {}, 56),
        (14, {"frame_buckets": (9, 53)}, 53),
        (14, {"train_resolution": ("53x64x96",)}, 53),
        (13, {"frame_buckets": (9, 52)}, 52),
        (13, {"frame_buckets": (9,)}, 49),
    ],
)
def test_the_number_of_frames(geometry: Geometry, latents: int, flags: dict[str, Any], frames: int) -> None:
    bucket = bucket_of((32, latents, 8, 12), geometry, flags_of(Path("x"), **flags))
    assert bucket == Bucket(frames, 64, 96)
    assert geometry.moments_shape(bucket) == (32, latents, 8, 12)


def test_the_bucket_depends_on_the_compression_of_the_model(make: Make, geometry: Geometry) -> None:
    other = replace(geometry, spatial_compression=16, temporal_compression=8)
    assert bucket_of((32, 3, 8, 12), other, flags_of(Path("x"))) == Bucket(17, 128, 192)


def test_repeats_and_rows_of_one_clip_have_their_own_ids(make: Make) -> None:
    folder = make("a", videos=("videos/a.mp4", "./videos/a.mp4"))
    ids = [row.id for row in read_tensor_rows(folder, flags_of(folder, repeats=(2,)))]
    assert ids == ["videos/a.mp4", "videos/a.mp4#2", "videos/a.mp4#3", "videos/a.mp4#4"]


def test_lists_with_other_names_and_tensors_in_a_subfolder(make: Make, geometry: Geometry) -> None:
    folder = make()
    for name in (factory.MOMENTS, factory.EMBEDS):
        (folder / "sub").mkdir(exist_ok=True)
        os.rename(folder / name, folder / "sub" / name)
    os.rename(folder / "prompts.txt", folder / "text")
    (folder / "videos.txt").unlink()
    (folder / "video").write_text("".join(f"sub/videos/{name}.mp4\n" for name in NAMES))
    assert is_factory_layout(folder)
    index = Opened(folder, geometry, caption_column="text", video_column="video")()
    assert [sample.id for sample in index.samples] == [f"sub/videos/{name}.mp4" for name in NAMES]


# -- a file is converted once ------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets the name of each .pt file that is read."""
    names: list[str] = []
    read = factory.read_tensor
    monkeypatch.setattr(factory, "read_tensor", lambda path, content: (names.append(path.name), read(path, content))[1])
    return names


def test_a_second_start_reads_nothing_and_an_edited_file_is_seen(
    make: Make, geometry: Geometry, loaded: list[str]
) -> None:
    opened = Opened(make(), geometry)
    first = opened()
    assert len(loaded) == 6
    opened.embed_empty = lambda: None  # type: ignore[method-assign]
    before = listing(opened.cache.folder / "tensors")
    assert opened() == first
    assert len(loaded) == 6
    assert listing(opened.cache.folder / "tensors") == before
    torch.save(moments(7), opened.folder / factory.MOMENTS / "00001.pt")
    second = opened()
    assert loaded[6:] == ["00001.pt"]
    assert second.fingerprint != first.fingerprint
    assert opened.cache.read(second.samples[1].video_keys[0])["moments_CFHW"].equal(moments(7))
    assert [second.samples[k] for k in (0, 2)] == [first.samples[k] for k in (0, 2)]


def test_an_interrupted_conversion_continues(
    make: Make, geometry: Geometry, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(make(), geometry)
    write, written = TensorCache.write, list[str]()

    class Killed(BaseException):
        pass

    def dying(self: TensorCache, key: str, tensors: dict[str, Any]) -> int:
        if len(written) == 3:
            raise Killed
        written.append(key)
        return write(self, key, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(TensorCache, "write", dying)
        with pytest.raises(Killed):
            opened()
    assert len(loaded) == 4
    opened()
    assert len(loaded) == 7  # the tensor that was being written, and the two that were left


def test_a_tensor_that_the_cache_has_lost_is_converted_again(make: Make, geometry: Geometry, loaded: list[str]) -> None:
    opened = Opened(make(), geometry)
    key = opened().samples[2].prompt_key
    opened.cache.path(key).unlink()
    opened()
    assert loaded[6:] == ["00002.pt"]
    assert opened.cache.read(key)["prompt_LD"].equal(embeds(2))


# -- recognizing the layout --------------------------------------------------------------------------------------------


def test_which_folders_have_the_factory_layout(make: Make, tensors: Path, clips: Path, tmp_path: Path) -> None:
    folder = make()
    assert is_factory_layout(folder)
    assert not is_factory_layout(tensors)
    assert not is_factory_layout(clips)
    assert not is_factory_layout(tmp_path / "missing")
    (folder / "index.json").write_text("{}")
    assert not is_factory_layout(folder)


def test_the_check_of_the_flags_reads_the_lists_only(make: Make, tensors: Path, clips: Path, loaded: list[str]) -> None:
    folder = make()

    def problems(root: Path, *more: object) -> list[str]:
        return list(check_tensors(options_of(Path("out"), "--data_root", root, *more)))

    assert problems(folder, "--load_tensors") == []
    assert problems(tensors, "--load_tensors") == []
    assert problems(clips) == []
    with pytest.raises(UsageError, match=r"has no index\.json"):
        problems(clips, "--load_tensors")
    (folder / factory.EMBEDS / "00001.pt").unlink()
    (line,) = problems(folder, "--load_tensors")
    assert line.startswith(f"{folder}/videos.txt:2: prompt_embeds/00001.pt: no such file in {folder}")
    assert not loaded


# -- faulty files and lists --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tensor", "says"),
    [
        (
            factory.MOMENTS,
            torch.zeros(16, 3, 8, 12),
            "has shape (16, 3, 8, 12), this model takes (32, F, H, W), mean and",
        ),
        (factory.MOMENTS, torch.zeros(3, 32, 8, 12), "has shape (3, 32, 8, 12), this model takes (32, F, H, W)"),
        (factory.MOMENTS, torch.zeros(1, 32, 3, 8, 12), "has shape (1, 32, 3, 8, 12), this model takes (32, F, H, W)"),
        (factory.MOMENTS, torch.zeros(32, 0, 8, 12), "has shape (32, 0, 8, 12), this model takes (32, F, H, W)"),
        (
            factory.MOMENTS,
            torch.zeros(32, 3, 8, 11),
            "its width is 88 pixels: must be a multiple of 16; nearest:",
        ),
        (factory.MOMENTS, torch.full((32, 3, 8, 12), float("nan")), "holds NaN or infinity; encode the clip again"),
        (factory.MOMENTS, torch.zeros(32, 3, 8, 12).int(), "is not one tensor in fp32, bf16 or fp16; encode"),
        (factory.MOMENTS, torch.zeros(1).expand(32, 3, 8, 12), "is larger than its data; encode the clip again"),
        (factory.MOMENTS, torch.zeros(32, 3, 8, 12, device="meta"), "is larger than its data; encode the clip again"),
        (factory.MOMENTS, {"moments": torch.zeros(32, 3, 8, 12)}, "is not one tensor in fp32, bf16 or fp16; encode"),
        (
            factory.EMBEDS,
            torch.zeros(226, 32),
            "has shape (226, 32), this model takes (32, 32); encode the captions again",
        ),
        (factory.EMBEDS, torch.zeros(1, 32, 32), "has shape (1, 32, 32), this model takes (32, 32)"),
        (factory.EMBEDS, torch.full((32, 32), float("inf")), "holds NaN or infinity"),
    ],
)
def test_a_tensor_that_does_not_fit(make: Make, geometry: Geometry, kind: str, tensor: Any, says: str) -> None:
    folder = make()
    path = folder / kind / "00001.pt"
    torch.save(tensor, path)
    (line,) = Opened(folder, geometry).refused()
    assert line.startswith(f"{path}: {says}")


def test_sizes_beyond_the_positions_of_1_5_are_refused(make: Make, tiny: Callable[[str], Path]) -> None:
    folder = make()
    geometry = read_geometry(ModelFlags(str(tiny("1.5-5b"))))
    torch.save(torch.zeros(32, 3, 2 * geometry.sample_height, 12), folder / factory.MOMENTS / "00001.pt")
    (line,) = Opened(folder, geometry).refused()
    assert "pixels: this model's positions end at" in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"torn" * 99, None])
def test_damaged_files(make: Make, geometry: Geometry, content: bytes | None) -> None:
    folder = make()
    path = folder / factory.EMBEDS / "00000.pt"
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    (line,) = Opened(folder, geometry).refused()
    assert line.startswith(f"{path}: is not plain tensor data (")
    assert "weights_only" not in line


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "legacy", "inside"])
@pytest.mark.fault("security: a pickle that runs code, in a folder of tensors")
def test_no_code_in_a_file_is_run(make: Make, geometry: Geometry, tmp_path: Path, how: str) -> None:
    folder, canary = make(), tmp_path / "canary"
    path = folder / factory.MOMENTS / "00002.pt"
    hostile = Hostile(canary)
    if how == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:
        content = {"x": torch.zeros(1), "y": [hostile]} if how == "inside" else hostile
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    (line,) = Opened(folder, geometry).refused()
    assert line == f"{path}: is not plain tensor data (UnpicklingError); encode the clip again"
    assert not canary.exists()
    pickle.loads(path.read_bytes()) if how == "pickle" else torch.load(path, weights_only=False)
    assert canary.exists()  # the file is really hostile


def test_all_bad_files_are_listed_and_good_ones_stay_converted(
    make: Make, geometry: Geometry, loaded: list[str]
) -> None:
    folder = make()
    bad = [folder / factory.MOMENTS / "00000.pt", folder / factory.EMBEDS / "00002.pt"]
    kept = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_bytes(b"torn")
    opened = Opened(folder, geometry)
    assert [line.split(": ")[0] for line in opened.refused()] == [str(path) for path in bad]
    assert not (opened.cache.folder / "index.json").exists()
    for path, content in zip(bad, kept, strict=True):
        path.write_bytes(content)
    loaded.clear()
    opened()
    assert loaded == [path.name for path in bad]


def test_clips_that_would_share_their_tensors(make: Make, geometry: Geometry) -> None:
    videos = ("videos/a.v1.mp4", "videos/a.v2.mp4", "videos/b.mp4")
    folder = make("a", "b", videos=videos)
    (line,) = Opened(folder, geometry).refused()
    shared = folder / factory.MOMENTS / "a.pt"
    assert line.startswith(f"{folder}/videos.txt:2: {folder}/videos/a.v1.mp4 and {folder}/videos/a.v2.mp4 would share")
    assert f"{shared}; give the tensors the full name of the clip, a.v2.pt" in line
    for kind in (factory.MOMENTS, factory.EMBEDS):
        for name in ("a.v1.pt", "a.v2.pt"):
            shutil.copy(folder / kind / "a.pt", folder / kind / name)
    rows = read_tensor_rows(folder, flags_of(folder))
    assert [row.moments.name for row in rows] == ["a.v1.pt", "a.v2.pt", "b.pt"]
    assert [row.embeds.name for row in rows] == ["a.v1.pt", "a.v2.pt", "b.pt"]


def test_a_clip_with_dots_in_its_name_uses_the_shortened_name(make: Make) -> None:
    folder = make("a", videos=("videos/a.v1.mp4",))
    assert [row.moments.name for row in read_tensor_rows(folder, flags_of(folder))] == ["a.pt"]


@pytest.mark.fault("security: paths and links out of the data root")
def test_files_outside_the_folder_are_not_read(make: Make, tmp_path: Path, loaded: list[str]) -> None:
    folder = make()
    (tmp_path / "secret.pt").write_bytes((folder / factory.MOMENTS / "00000.pt").read_bytes())
    (folder / factory.MOMENTS / "00000.pt").unlink()
    (folder / factory.MOMENTS / "00000.pt").symlink_to(tmp_path / "secret.pt")
    (folder / "videos.txt").write_text("videos/00000.mp4\n../x/videos/1.mp4\n2.mp4\n")
    with pytest.raises(UsageError) as error:
        read_tensor_rows(folder, flags_of(folder))
    lines = error.value.problems
    assert all("leads outside the data root, to " in line for line in lines[:3])
    assert lines[3:] == ("... and 2 more (5 in all): outside the data root",)
    (folder / "videos.txt").write_text("videos/00000.mp4\nvideos/00001.mp4\nvideos/00002.mp4\n")
    assert len(read_tensor_rows(folder, flags_of(folder, allow_path=(str(tmp_path),)))) == 3


def test_a_pipe_does_not_block(make: Make) -> None:
    folder = make()
    (folder / factory.EMBEDS / "00000.pt").unlink()
    os.mkfifo(folder / factory.EMBEDS / "00000.pt")
    with pytest.raises(UsageError, match=r"prompt_embeds/00000\.pt: is a pipe"):
        read_tensor_rows(folder, flags_of(folder))


def test_lists_of_unequal_length(make: Make) -> None:
    folder = make()
    (folder / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match=r"videos\.txt:3: first line without a caption"):
        read_tensor_rows(folder, flags_of(folder))


# -- first frames ------------------------------------------------------------------------------------------------------


def image(number: int) -> Tensor:
    """Returns the moments of a first frame, (32, 1, 8, 12)."""
    return torch.randn(32, 1, 8, 12, generator=torch.Generator().manual_seed(200 + number))


@pytest.fixture
def with_images(make: Make) -> Path:
    """Makes a folder that has first frames, too."""
    folder = make()
    (folder / factory.IMAGES).mkdir()
    for number, name in enumerate(NAMES):
        torch.save(image(number), folder / factory.IMAGES / f"{name}.pt")
    return folder


def test_first_frames_are_converted(with_images: Path, geometry: Geometry) -> None:
    opened = Opened(with_images, geometry)
    index = opened(images=True)
    assert opened(main=False, images=True) == index
    assert index.image_variants == 1
    for number, sample in enumerate(index.samples):
        (key,) = sample.image_keys
        assert opened.cache.read(key)["image_moments_KCHW"].equal(image(number).transpose(0, 1))
    batch = LatentDataset(opened.cache, index, geometry, 0, 0.0)[Visit(1, 3)]
    assert batch.image_BCHW is not None
    assert batch.image_BCHW.shape == (16, 8, 12)
    assert any("without the noise" in line for line in opened.said)
    assert opened().samples == index.without_images().samples


@pytest.mark.parametrize(
    ("tensor", "rule"),
    [
        (torch.zeros(32, 2, 8, 12), "takes (32, 1, H, W)"),
        (torch.zeros(16, 1, 8, 12), "takes (32, 1, H, W)"),
        (torch.zeros(32, 1, 8, 8), "has another size than 00001.pt of its clip"),
    ],
)
def test_first_frames_of_another_shape_are_refused(
    with_images: Path, geometry: Geometry, tensor: Tensor, rule: str
) -> None:
    torch.save(tensor, with_images / factory.IMAGES / "00001.pt")
    with pytest.raises(UsageError, match=re.escape(rule)):
        Opened(with_images, geometry)(images=True)


def test_missing_first_frames_are_named_before_anything_is_loaded(make: Make, model: Path, loaded: list[str]) -> None:
    folder = make()
    flags = lora_flags(model, folder, Path("out"), "--load_tensors")
    options = args.parse(ImageLoraOptions, None, flags)
    lines = list(check_tensors(options))
    assert len(lines) == 3
    assert "image_latents/00000.pt: no such file" in lines[0]
    assert list(check_tensors(options_of(Path("out"), "--load_tensors", "--data_root", folder))) == []
