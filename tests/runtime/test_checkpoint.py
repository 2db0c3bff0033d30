"""Checkpoints are complete or absent, the newest complete one is resumed, and none is removed early."""

from __future__ import annotations

import copy
import errno
import functools
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine, FakeMethod, edit_json, flip_byte, listing, options_of, run_alone, save_steps, saver_of
from running import (
    LORA_SCRIPT,
    PROMPT,
    equal,
    finish,
    fork_ranks,
    lora_flags,
    losses,
    metrics,
    python,
    train,
    weights,
)

from cogvideox import tensor_files
from cogvideox.data.cache import hash_of
from cogvideox.errors import DiskError, NonFiniteError, UsageError
from cogvideox.runtime import checkpoint, checkpoint_files
from cogvideox.runtime.checkpoint import replaced_by
from cogvideox.runtime.checkpoint_files import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    checkpoints,
    damage_of,
    restart_hint,
    resume_hint,
    safe_text,
)
from cogvideox.runtime.resume import find_start


def names(output: Path) -> list[str]:
    """Returns the names of the checkpoints in a folder, newest first."""
    return [path.name for path in checkpoints(output)]


def resumed(output: Path, *flags: object) -> tuple[int, float]:
    """Resumes, and returns the step of the checkpoint and the step that its tensor contains."""
    engine: Any = FakeEngine()
    run = run_alone(output)
    start = find_start(run, {"seed": 1}, options_of(output, "--max_train_steps", 1000, *flags))
    start.load(run, engine, FakeMethod())
    return start.step, engine.weight[0].item()


def truncate(folder: Path) -> str:
    with open(folder / "optimizer.safetensors", "r+b") as file:
        file.truncate(20)
    return "optimizer.safetensors is not what was written"


def flip(folder: Path) -> str:
    flip_byte(folder / "lora.safetensors")
    return "lora.safetensors is not what was written"


def lose(folder: Path) -> str:
    (folder / "optimizer.safetensors").unlink()
    return "optimizer.safetensors is missing"


def tear_progress(folder: Path) -> str:
    (folder / PROGRESS_NAME).write_text('{"step": 4,')
    return "progress.json is not what was written"


def tear_manifest(folder: Path) -> str:
    (folder / MANIFEST_NAME).write_text("")
    return "JSONDecodeError in its json files"


def lose_manifest(folder: Path) -> str:
    (folder / MANIFEST_NAME).unlink()
    return "manifest.json is missing"


def another_step(folder: Path) -> str:
    edit_json(folder / PROGRESS_NAME, step=5)
    return "progress.json is not what was written"


DAMAGES = [truncate, flip, lose, tear_progress, tear_manifest, lose_manifest, another_step]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.fault("checkpoints: the newest checkpoint is damaged")
def test_damage_is_found_and_the_one_before_is_resumed(
    tmp_path: Path, damage: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    assert damage_of(tmp_path / "checkpoint-4") is None
    assert resumed(tmp_path) == (4, 4.0)
    why = damage(tmp_path / "checkpoint-4")
    assert damage_of(tmp_path / "checkpoint-4") == why
    capfd.readouterr()
    assert resumed(tmp_path) == (2, 2.0)
    shown = capfd.readouterr().err
    assert f"{tmp_path / 'checkpoint-4'}: {why}; trying the one before" in shown
    assert "checkpoint-2 after step 2" in shown


@pytest.mark.parametrize("damage", [flip, lose_manifest])
@pytest.mark.fault("checkpoints: a run ends before it has replaced a damaged checkpoint")
def test_messages_name_the_newest_checkpoint_without_known_damage(
    tmp_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    damage(tmp_path / "checkpoint-4")
    resumed(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "file_hash", None)  # the files are not read again
        assert safe_text(tmp_path) == "checkpoint-2, the newest intact checkpoint, is safe"
        assert "continues from checkpoint-2 (" in restart_hint(tmp_path)
        assert "--resume_from_checkpoint checkpoint-2," in resume_hint(tmp_path, 5)
    save_steps(run_alone(tmp_path), 4)
    assert safe_text(tmp_path) == "checkpoint-4, the newest checkpoint, is safe"
    for name in names(tmp_path):
        damage(tmp_path / name)
    resumed_nothing = find_start(run_alone(tmp_path), {"seed": 1}, options_of(tmp_path))
    assert resumed_nothing.folder is None
    assert safe_text(tmp_path) == "there is no intact checkpoint yet"


def test_a_requested_checkpoint_that_is_damaged_is_refused(tmp_path: Path) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    lose(tmp_path / "checkpoint-4")
    with pytest.raises(UsageError, match=r"optimizer\.safetensors is missing.*checkpoint-4, checkpoint-2"):
        resumed(tmp_path, "--resume_from_checkpoint", "checkpoint-4")


def test_a_checkpoint_in_another_folder_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    """The output folder has a checkpoint of the same name."""
    save_steps(run_alone(tmp_path / "own"), 2)
    engine = FakeEngine()
    engine.weight = torch.full((8,), 7.0)
    saver_of(run_alone(tmp_path / "other"), engine).save(2)
    assert resumed(tmp_path / "own", "--resume_from_checkpoint", tmp_path / "other" / "checkpoint-2") == (2, 7.0)


def test_a_rank_that_does_not_see_the_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank has found a folder that exists on its machine only."""
    save_steps(run_alone(tmp_path / "first"), 2)
    there, run = tmp_path / "first" / "checkpoint-2", run_alone(tmp_path / "own")
    seen_by_first = {f"in {tmp_path / 'missing'} the manifest": checkpoint_files.file_hash(there / MANIFEST_NAME)}
    monkeypatch.setattr(run.ranks, "is_main_process", False)
    monkeypatch.setattr(run.ranks, "from_main", lambda _: (tmp_path / "missing", None, set()))
    monkeypatch.setattr(run.ranks, "gather", lambda values: [seen_by_first, *values])
    with pytest.raises(UsageError, match=r"process 1 has in .*missing the manifest None, .*that all machines share"):
        find_start(run, {"seed": 1}, options_of(tmp_path / "own"))


@pytest.mark.fault("checkpoints: all checkpoints are damaged")
def test_training_starts_at_step_0_if_all_are_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    for folder in checkpoints(tmp_path):
        lose(folder)
    before = {path.name: listing(path) for path in checkpoints(tmp_path)}
    assert resumed(tmp_path) == (0, 0.0)
    said = capfd.readouterr().err
    assert f"{tmp_path}: all 2 checkpoints are damaged, so training starts at step 0; damaged checkpoints" in said
    assert {path.name for path in tmp_path.iterdir()} == {f"damaged-{name}" for name in (*before, "metrics.jsonl")}
    save_steps(run_alone(tmp_path), 2, 4, limit=1)
    assert {name: listing(tmp_path / f"damaged-{name}") for name in before} == before
    lose(tmp_path / "checkpoint-4")
    assert resumed(tmp_path) == (0, 0.0)
    assert (tmp_path / "damaged-checkpoint-4.2").is_dir()


def test_a_single_damaged_checkpoint_is_reported_as_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_steps(run_alone(tmp_path), 2)
    lose(tmp_path / "checkpoint-2")
    assert resumed(tmp_path) == (0, 0.0)
    assert f"{tmp_path}: its only checkpoint is damaged, so training starts at step 0" in capfd.readouterr().err


def old_format(manifest: Any) -> Any:
    """Returns a manifest as older versions wrote it, without a checksum of its entries."""
    return manifest["files"]


ALL_BITS = pytest.param(1, marks=[pytest.mark.long, pytest.mark.fault("checkpoints: a changed bit", times=3500)])
SOME_BITS = pytest.param(13, marks=pytest.mark.fault("checkpoints: a changed bit", times=270))


@pytest.mark.parametrize("stride", [SOME_BITS, ALL_BITS])
@pytest.mark.parametrize("older", [False, True], ids=["newest format", "without a checksum"])
def test_every_bit_of_the_json_files(tmp_path: Path, older: bool, stride: int) -> None:
    """A changed bit either does not change the JSON value, or is found as damage."""
    save_steps(run_alone(tmp_path), 2, 4)
    newest = tmp_path / "checkpoint-4"
    if older:
        rewrite(newest, old_format)
    flips = 0
    for name in (MANIFEST_NAME, PROGRESS_NAME):
        content = (newest / name).read_bytes()
        for bit in range(0, 8 * len(content), stride):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            (newest / name).write_bytes(damaged)
            assert damage_of(newest) or json.loads(damaged) == json.loads(content), damaged
            flips += 1
        (newest / name).write_bytes(content)
    assert flips > 3000 // stride
    assert damage_of(newest) is None


def rewrite(folder: Path, change: Any) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Yields the path of keys to every value inside a JSON value, including the value itself."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    changed = copy.deepcopy(value)
    inner = functools.reduce(lambda part, key: part[key], path[:-1], changed)
    inner[path[-1]] = other
    return changed


STRANGE = [None, [], {}, 0, -1, 10**30, 1.5, True, "", "x", "\ud800", [None], {"size": None}, float("inf")]


@pytest.mark.parametrize("older", [False, True], ids=["newest format", "without a checksum"])
@pytest.mark.fault("checkpoints: a changed value in a JSON file", times=300)
def test_every_value_of_the_json_files_in_every_type(tmp_path: Path, older: bool) -> None:
    save_steps(run_alone(tmp_path), 4)
    folder = tmp_path / "checkpoint-4"
    if older:
        rewrite(folder, old_format)
    for name in (MANIFEST_NAME, PROGRESS_NAME):
        text = (folder / name).read_text()
        value = json.loads(text)
        for path, other in itertools.product(places(value), STRANGE):
            (folder / name).write_text(json.dumps(replaced(value, path, other)))
            assert damage_of(folder), (name, path, other)
        (folder / name).write_text(text)
    assert damage_of(folder) is None


NAMES = ["../x", "/etc/hostname", "a/../../x", "..", ".", "", "\0", "x" * 5000, "\ud800", "C:\\x"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.fault("checkpoints: a manifest that names a file outside the checkpoint")
def test_a_file_name_outside_the_folder_is_damage(tmp_path: Path, name: str) -> None:
    save_steps(run_alone(tmp_path), 4)
    folder = tmp_path / "checkpoint-4"
    (tmp_path / "x").write_bytes((folder / "lora.safetensors").read_bytes())

    def add(manifest: Any) -> Any:
        files = manifest["files"] | {name: manifest["files"]["lora.safetensors"]}
        return manifest | {"files": files, "sha256": hash_of(files)}

    rewrite(folder, add)
    assert damage_of(folder)


@pytest.mark.parametrize("content", [b"[" * 100000, b"\xff\xfe", b'{"a": ' * 30000, b"1" * 9999], ids=range(4))
@pytest.mark.parametrize("name", [MANIFEST_NAME, PROGRESS_NAME])
@pytest.mark.fault("checkpoints: JSON files with unexpected content")
def test_strange_json_is_damage(tmp_path: Path, name: str, content: bytes) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    (tmp_path / "checkpoint-4" / name).write_bytes(content)
    assert damage_of(tmp_path / "checkpoint-4")
    assert resumed(tmp_path) == (2, 2.0)


@pytest.mark.fault("checkpoints: a checkpoint of a later version")
def test_a_checkpoint_of_a_later_version_is_skipped_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    rewrite(tmp_path / "checkpoint-4", lambda manifest: manifest | {"format": 3})
    assert resumed(tmp_path) == (2, 2.0)
    assert "was written by another version (format 3); trying the one before" in capfd.readouterr().err
    save_steps(run_alone(tmp_path), 3, limit=1)
    assert names(tmp_path) == ["checkpoint-3"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "damaged-checkpoint-4"]


@pytest.mark.fault("checkpoints: a damaged checkpoint whose step is saved again")
def test_a_damaged_checkpoint_is_kept_if_its_step_is_saved_again(tmp_path: Path) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    lose(tmp_path / "checkpoint-4")
    before = listing(tmp_path / "checkpoint-4")
    save_steps(run_alone(tmp_path), 4)
    assert listing(tmp_path / "damaged-checkpoint-4") == before
    assert damage_of(tmp_path / "checkpoint-4") is None


@pytest.mark.fault("checkpoints: a file cannot be read")
def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    real = checkpoint_files.file_hash

    def broken(path: Path) -> str:
        if path.parent.name == "checkpoint-4":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint_files, "file_hash", broken)
    assert resumed(tmp_path) == (2, 2.0)


def test_steps_are_numbers_not_text(tmp_path: Path) -> None:
    save_steps(run_alone(tmp_path), 9, 10, 100)
    (tmp_path / "checkpoint-last").mkdir()
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize(
    ("step", "there", "limit", "gone"),
    [
        (6, [6, 4, 2], None, []),
        (6, [6, 4, 2], 1, [4, 2]),
        (6, [6, 4, 2], 2, [2]),
        (3, [4, 3, 2], None, [4]),
        (3, [4, 3, 2], 1, [4, 2]),
        (2, [8, 6, 2], 1, [8, 6]),
        (2, [8, 6, 2], 9, [8, 6]),
    ],
)
def test_which_checkpoints_are_replaced(step: int, there: list[int], limit: int | None, gone: list[int]) -> None:
    found = [Path(f"checkpoint-{number}") for number in there]
    assert replaced_by(step, found, limit) == [Path(f"checkpoint-{number}") for number in gone]


@pytest.mark.fault("checkpoints: a damaged checkpoint whose step is not saved again")
@pytest.mark.parametrize("is_damaged", [True, False])
def test_checkpoints_of_repeated_steps_do_not_count_for_the_limit(tmp_path: Path, is_damaged: bool) -> None:
    """If one were kept in place of the checkpoint that was used, a kill could leave none that is intact."""
    save_steps(run_alone(tmp_path), 2, 4, 6)
    if is_damaged:
        lose(tmp_path / "checkpoint-6")
    before = listing(tmp_path / "checkpoint-6")
    saver = saver_of(run_alone(tmp_path), FakeEngine(), limit=2, first=4)
    saver.trim(7)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    saver.save(8)
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-4"]
    kept = tmp_path / "damaged-checkpoint-6"
    assert (listing(kept) == before) if is_damaged else not kept.exists()


def test_the_last_checkpoint_before_skipped_steps_is_kept_until_they_end(tmp_path: Path) -> None:
    saver = saver_of(run_alone(tmp_path), FakeEngine(), limit=1)
    for step, good_until in ((2, None), (4, None), (6, 5), (8, 5)):
        saver.good_until = good_until
        saver.save(step)
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-4"]
    saver.trim(8)
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-4"]
    saver.good_until = None
    saver.save(10)
    assert names(tmp_path) == ["checkpoint-10"]


@pytest.mark.fault("numbers: infinity in a tensor that a checkpoint would save")
def test_a_tensor_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    engine = FakeEngine()
    saver = saver_of(run_alone(tmp_path), engine, limit=1)
    engine.weight[3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^checkpoint-2 is not saved: weight holds .*no checkpoint was saved bef"):
        saver.save(2)
    engine.weight[3] = 0.0
    saver.save(2)
    before = listing(tmp_path)
    engine.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the last good checkpoint is .*/checkpoint-2: resume with --resume"):
        saver.save(4)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("complete", [[], [2]])
def test_with_a_limit_of_one_a_damaged_newest_checkpoint_is_replaced(tmp_path: Path, complete: list[int]) -> None:
    run = run_alone(tmp_path)
    save_steps(run, *complete, 8)
    truncate(tmp_path / "checkpoint-8")
    first = resumed(tmp_path)[0]
    save_steps(run, first + 2, limit=1)
    assert names(tmp_path) == [f"checkpoint-{first + 2}"]
    assert resumed(tmp_path) == (first + 2, first + 2.0)


def test_the_limit_keeps_the_newest(tmp_path: Path) -> None:
    save_steps(run_alone(tmp_path), 2, 4, 6, 8, limit=2)
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-6"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    engine = FakeEngine()
    engine.weight = torch.full((8,), 44.0)
    saver_of(run_alone(tmp_path), engine).save(4)
    assert resumed(tmp_path) == (4, 44.0)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]


def fails(*_: Any) -> None:
    raise OSError("no space left on device")


def test_nothing_is_deleted_before_the_new_one_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(run_alone(tmp_path), 2, 4, 8)
    monkeypatch.setattr(checkpoint, "seal", fails)
    with pytest.raises(OSError, match="no space"):
        save_steps(run_alone(tmp_path), 4, limit=1)
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-4", "checkpoint-2"]
    assert resumed(tmp_path) == (8, 8.0)


@pytest.mark.parametrize("function", ["fsync", "write_atomically", "damage_of"])
@pytest.mark.fault("disk: a write, an fsync or a rename fails while a checkpoint is saved")
def test_a_failing_disk_keeps_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    broken = (lambda folder: "torn") if function == "damage_of" else fails
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, function, broken)
        with pytest.raises((OSError, DiskError), match=r"no space|torn; is the disk full, or"):
            save_steps(run_alone(tmp_path), 4, limit=1)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-2"]
    assert resumed(tmp_path) == (4, 4.0)


def test_seal_finds_a_file_that_changes_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(run_alone(tmp_path), 2)
    before = checkpoint_files.fsync
    monkeypatch.setattr(checkpoint_files, "fsync", lambda path: (before(path), path.is_dir() and lose(path)))
    with pytest.raises(DiskError, match=r"optimizer.safetensors is missing; is the disk full, or does it fail"):
        save_steps(run_alone(tmp_path), 4, limit=1)
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.fault("disk: it stores something else than what was written")
def test_a_file_that_is_not_what_was_to_be_written_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """The manifest has the hash of the tensors in memory, not of what the disk returned."""
    save_steps(run_alone(tmp_path), 2)
    real = tensor_files.write_hashed

    def other(file: Any, content: memoryview, digest: Any) -> None:
        real(file, content, digest)
        file.seek(-1, os.SEEK_CUR)
        file.write(b"x")

    monkeypatch.setattr(tensor_files, "write_hashed", other)
    saver = saver_of(run_alone(tmp_path), FakeEngine(), num_bytes=100, copy_bytes=100, in_background=in_background)

    def save() -> None:
        saver.save(4)
        saver.finish()

    with pytest.raises(DiskError, match=r"safetensors is not what was written; is the disk full, or does it fail"):
        save()
    assert names(tmp_path) == ["checkpoint-2"]


def test_leftovers_are_removed_at_the_start(tmp_path: Path) -> None:
    save_steps(run_alone(tmp_path), 2)
    for name in (".checkpoint-4.tmp", ".checkpoint-1.old.tmp", ".checkpoint-30.tmp"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    (tmp_path / ".checkpoint-5.tmp").mkdir()
    assert resumed(tmp_path) == (2, 2.0)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_differences_are_listed_name_by_name(tmp_path: Path) -> None:
    run, engine, options = run_alone(tmp_path), FakeEngine(), options_of(tmp_path)
    then = {"seed": 1, "rank": 4, "targets": ("a", "b"), "gone": 3, "schedule": {"snr": 1.0}}
    saver_of(run, engine, then).save(2)
    assert find_start(run, then, options).step == 2
    now = {"seed": 2, "rank": 4, "targets": ("a", "b"), "schedule": {"snr": 3.0}, "new": True}
    with pytest.raises(UsageError) as error:
        find_start(run, now, options)
    rule, *differences = error.value.problems
    assert "checkpoint-2: was made with other settings" in rule
    assert sorted(differences) == [
        "  --pretrained_model_name_or_path (schedule): {'snr': 1.0} there, {'snr': 3.0} now",
        "  --seed: 1 there, 2 now",
        "  gone: 3 there, not set now",
        "  new: not set there, True now",
    ]


def test_a_checkpoint_of_an_earlier_version_that_names_the_engine(tmp_path: Path) -> None:
    """The checkpoints of DeepSpeed's engine were other files, so they are refused."""
    saver = saver_of(run_alone(tmp_path), FakeEngine())
    saver.recipe["engine"] = "local"
    saver.save(2)
    assert find_start(run_alone(tmp_path), {"seed": 1}, options_of(tmp_path)).step == 2
    saver.recipe["engine"] = "DeepSpeed x 2"
    saver.save(4)
    with pytest.raises(UsageError, match="engine: DeepSpeed x 2 there, not set now"):
        find_start(run_alone(tmp_path), {"seed": 1}, options_of(tmp_path))


def test_a_checkpoint_of_an_earlier_version_that_lacks_a_switch(tmp_path: Path) -> None:
    run, options = run_alone(tmp_path), options_of(tmp_path)
    saver_of(run, FakeEngine(), {"seed": 1}).save(2)
    assert find_start(run, {"seed": 1, "use_bf16_moments": False}, options).step == 2
    with pytest.raises(UsageError, match="--use_bf16_moments: not set there, True now"):
        find_start(run, {"seed": 1, "use_bf16_moments": True}, options)


def test_a_checkpoint_of_an_earlier_version_that_names_the_place_of_the_state(tmp_path: Path) -> None:
    run = run_alone(tmp_path)
    saver_of(run, FakeEngine(), {"seed": 1, "use_cpu_offload_optimizer": True, "offload_gradients": False}).save(2)
    assert find_start(run, {"seed": 1}, options_of(tmp_path)).step == 2


# -- in complete runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def again(reference: Path, tmp_path: Path) -> Path:
    """Returns a copy of the folder of a finished run."""
    return Path(shutil.copytree(reference, tmp_path / "again"))


def refused(flags: list[str]) -> str:
    with pytest.raises(UsageError) as error:
        train(flags)
    return str(error.value)


def test_a_checkpoint_holds_only_safetensors_and_json(reference: Path) -> None:
    files = [path for folder in checkpoints(reference) for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "optimizer.safetensors",
        "pytorch_lora_weights.safetensors",
        PROGRESS_NAME,
        MANIFEST_NAME,
    }
    assert all(damage_of(folder) is None for folder in checkpoints(reference))
    manifest = json.loads((reference / "checkpoint-6" / MANIFEST_NAME).read_text())
    assert manifest["files"].keys() == {path.name for path in files} - {MANIFEST_NAME}


def test_a_run_from_an_older_checkpoint_removes_the_later_ones_at_its_first_save(
    model: Path, tensors: Path, reference: Path, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    save = checkpoint.Saver.save
    monkeypatch.setattr(
        checkpoint.Saver,
        "save",
        lambda self, step: (seen.append(names(again)), save(self, step), seen.append(names(again))),
    )
    flags = lora_flags(model, tensors, again, "--load_tensors", "--validation_prompt", PROMPT)
    assert train([*flags, "--resume_from_checkpoint", "checkpoint-2", "--checkpointing_steps", "3"]) == 0
    assert seen[:2] == [["checkpoint-6", "checkpoint-4", "checkpoint-2"], ["checkpoint-3", "checkpoint-2"]]
    assert equal(weights(again), weights(reference))
    assert losses(again) == losses(reference)


def test_every_rank_refuses_a_damaged_checkpoint_that_is_requested(model: Path, tensors: Path, again: Path) -> None:
    flip_byte(again / "checkpoint-6" / "optimizer.safetensors")
    flags = lora_flags(model, tensors, again, "--load_tensors", "--resume_from_checkpoint", "checkpoint-6")
    for rank in fork_ranks(2, python(LORA_SCRIPT, *flags)):
        said = finish(rank, 2)
        assert "--resume_from_checkpoint checkpoint-6: optimizer.safetensors is not what was written; in" in said


@pytest.mark.fault("checkpoints: the newest checkpoint is damaged")
def test_a_damaged_checkpoint_ends_in_the_same_lora(
    model: Path, tensors: Path, reference: Path, again: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flip_byte(again / "checkpoint-6" / "optimizer.safetensors")
    flags = lora_flags(model, tensors, again, "--load_tensors", "--validation_prompt", PROMPT)
    assert train([*flags, "--checkpoints_total_limit", "1"]) == 0
    assert (
        "checkpoint-6: optimizer.safetensors is not what was written; trying the one before" in capfd.readouterr().err
    )
    assert names(again) == ["checkpoint-6"]
    assert damage_of(again / "checkpoint-6") is None
    assert equal(weights(again), weights(reference))


def test_fewer_steps_than_the_checkpoint_has_are_refused(model: Path, tensors: Path, again: Path) -> None:
    flags = lora_flags(model, tensors, again, "--load_tensors", "--max_train_steps", 3)
    text = refused(flags)
    assert "--max_train_steps 3" in text
    assert "is at step 6 already" in text
    assert train([*flags, "--resume_from_checkpoint", "checkpoint-2"]) == 0
    assert names(again) == ["checkpoint-3", "checkpoint-2"]


def test_a_finished_run_is_extended(model: Path, tensors: Path, reference: Path, again: Path) -> None:
    flags = lora_flags(model, tensors, again, "--load_tensors", "--max_train_steps", 8)
    assert train(flags) == 0
    assert [line["step"] for line in metrics(again) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert losses(again)[:6] == losses(reference)
    assert not equal(weights(again), weights(reference))
    assert json.loads((again / "recipe.json").read_text())["step"] == 8
    assert names(again)[0] == "checkpoint-8"


@pytest.mark.parametrize(
    ("part", "name"), [("scheduler/scheduler_config.json", "snr_shift_scale"), ("vae/config.json", "scaling_factor")]
)
def test_a_changed_number_of_the_model_is_refused(
    model: Path, tensors: Path, again: Path, tmp_path: Path, part: str, name: str
) -> None:
    changed = Path(shutil.copytree(model, tmp_path / "model"))
    flags = lora_flags(changed, tensors, again, "--load_tensors", "--max_train_steps", 8)
    then = json.loads((changed / part).read_text())[name]
    edit_json(changed / part, **{name: then * 2})
    text = refused(flags)
    assert "made with other settings" in text
    assert name in text
    assert str(then * 2) in text
    edit_json(changed / part, **{name: then})
    assert train(flags) == 0


def test_an_extended_run_reports_a_jump_of_its_learning_rate(
    model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--lr_scheduler", "linear")
    for steps, said in ((2, False), (2, False), (6, True)):
        assert train([*flags, "--max_train_steps", str(steps), "--lr_warmup_steps", "0"]) == 0
        text = capsys.readouterr().err
        assert ("the learning rate jumps from 0.005 at step 2 to 0.00667 at step 3" in text) == said
        assert "never reaches" not in text


def test_a_run_that_is_shorter_than_its_warm_up_says_so(
    model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--load_tensors", "--lr_scheduler", "linear", "--max_train_steps", 2)
    assert train(lora_flags(model, tensors, tmp_path / "lora", *flags)) == 0
    assert "the learning rate rises to 2e-05 and never reaches 0.01: --lr_warmup_steps 500" in capsys.readouterr().err
