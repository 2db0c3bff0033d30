"""cache.py: a read returns what was written or raises an error, whenever a process dies."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from cogvideox.config.buckets import Bucket
from cogvideox.data import cache as module
from cogvideox.data.cache import CachedSample, CacheError, CacheIndex, Ledger, TensorCache, hash_of, open_index
from cogvideox.errors import UsageError
from cogvideox.files import remove_stale_temporaries, write_atomically

KEY = hash_of("key")
TRAINING = Path(module.__file__).parents[2]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "moments_CFHW": torch.randn(4, 3, 2, 2, generator=generator),
        "prompt_LD": torch.randn(5, 3, generator=generator).bfloat16(),
        "half": torch.randn(3, generator=generator).half(),
        "scalar": torch.tensor(7),
    }


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    cache = TensorCache(tmp_path)
    cache.write(KEY, tensors())
    return cache


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_a_read_returns_what_was_written(cache: TensorCache) -> None:
    found = cache.read(KEY)
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert cache.has(KEY)
    assert not cache.has(hash_of("other"))
    assert files(cache.folder) == [f"tensors/{KEY[:2]}/{KEY}.safetensors"]


def test_write_returns_the_number_of_bytes(cache: TensorCache) -> None:
    assert cache.write(KEY, tensors()) == cache.path(KEY).stat().st_size


def test_the_order_of_tensors_does_not_change_the_file(cache: TensorCache) -> None:
    content = cache.path(KEY).read_bytes()
    cache.write(KEY, dict(reversed(tensors().items())))
    assert cache.path(KEY).read_bytes() == content


@pytest.mark.fault("data: one byte of a cached tensor is changed")
def test_every_flipped_byte_is_found(cache: TensorCache) -> None:
    path = cache.path(KEY)
    content = path.read_bytes()
    for position in range(len(content)):
        for bits in (0x01, 0x20, 0x80):
            path.write_bytes(content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :])
            with pytest.raises(CacheError, match="prepare again, which encodes it anew"):
                cache.read(KEY)
            assert not cache.has(KEY)  # it was renamed, so that the next preparation encodes it anew
    path.write_bytes(content)
    cache.read(KEY)


def test_every_incomplete_file_is_found(cache: TensorCache) -> None:
    path = cache.path(KEY)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CacheError, match=KEY):
            cache.read(KEY)


def test_a_missing_file_is_a_cache_error(cache: TensorCache) -> None:
    cache.path(KEY).unlink()
    with pytest.raises(CacheError, match="prepare again"):
        cache.read(KEY)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"moments_CFHW": t["moments_CFHW"].reshape(4, 3, 4)},
        lambda t: t | {"moments_CFHW": t["moments_CFHW"].view(torch.int32)},
        lambda t: {("renamed" if name == "half" else name): value for name, value in t.items()},
        lambda t: t | {"more": torch.zeros(1)},
        lambda t: {name: value for name, value in t.items() if name != "half"},
        lambda t: t | {"half": t["prompt_LD"].flatten()[:3].clone()},
    ],
    ids=["shape", "dtype", "name", "added", "removed", "swapped"],
)
def test_the_checksum_covers_names_shapes_and_types(
    cache: TensorCache, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = cache.path(KEY)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    path.write_bytes(save(load(path.read_bytes()), metadata))
    cache.read(KEY)
    path.write_bytes(save(change(tensors()), metadata))
    with pytest.raises(CacheError, match="checksum"):
        cache.read(KEY)


def test_a_file_without_checksum_is_refused(cache: TensorCache) -> None:
    cache.path(KEY).write_bytes(save(tensors()))
    with pytest.raises(CacheError, match="checksum"):
        cache.read(KEY)


# -- atomic writes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.fault("kills: an interruption while a tensor or an index is written")
def test_a_kill_while_writing_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    cache = TensorCache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, killed)
        with pytest.raises(KeyboardInterrupt):
            cache.write(KEY, tensors())
        assert not cache.has(KEY)
        assert not cache.path(KEY).exists()
        assert not list(tmp_path.rglob("*.safetensors"))
    cache.write(KEY, tensors())
    cache.read(KEY)


@pytest.mark.fault("kills: an interruption while a tensor or an index is written")
def test_a_kill_while_writing_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bytes]] = []
    replace, fsync = os.replace, os.fsync

    def seen_replace(source: Path, target: Path) -> None:
        calls.append(("replace", Path(source).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(("fsync", b"")), fsync(handle)))
    monkeypatch.setattr(os, "replace", seen_replace)
    write_atomically(tmp_path / "a" / "b.json", b"content")
    assert calls == [("fsync", b""), ("replace", b"content")]
    assert files(tmp_path) == ["a/b.json"]


def leave_temporary(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, pid: int) -> Path:
    """Creates the file that a process with this id leaves behind when it dies between write and rename."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid)
        patch.setattr(os, "replace", lambda *_: None)
        write_atomically(folder / "sub" / name, b"half")
    (temporary,) = [path for path in (folder / "sub").iterdir() if path.name.endswith(f".{pid}.tmp")]
    return temporary


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_temporaries_of_ended_processes_are_deleted_and_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = leave_temporary(tmp_path, monkeypatch, f"{KEY}.safetensors", dead_process())
    living = leave_temporary(tmp_path, monkeypatch, "index.json", os.getppid())
    with monkeypatch.context() as patch:
        # Containers may share the name of the host, and number their processes alike.
        patch.setattr("cogvideox.files.machine_id", lambda: "another container")
        elsewhere = leave_temporary(tmp_path, monkeypatch, "index.json", dead_process())
    finished = tmp_path / "sub" / "kept.safetensors"
    finished.write_bytes(b"")
    remove_stale_temporaries(tmp_path)
    assert not dead.exists()
    assert living.exists()
    assert elsewhere.exists()
    assert finished.exists()


# -- the ledger --------------------------------------------------------------------------------------------------------


def record(name: str, **more: object) -> dict[str, object]:
    return {"request": name, "status": "ok", "path": f"videos/{name} é\n.mp4", **more}


def test_ledger_round_trip_and_the_newest_wins(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "folder")
    assert ledger.read() == {}
    ledger.append([])
    assert not ledger.path.exists()
    ledger.append([record("a"), record("b")])
    ledger.append([record("a", status="failed")])
    assert ledger.read() == {"a": record("a", status="failed"), "b": record("b")}


def test_a_ledger_of_other_records(tmp_path: Path) -> None:
    health = Ledger(tmp_path, "health.jsonl", "tensor")
    health.append([{"tensor": "a", "motion": 0.5}, {"tensor": "b", "motion": 0.25}, {"request": "a"}])
    assert health.read({"a"}) == {"a": {"tensor": "a", "motion": 0.5}}
    assert Ledger(tmp_path).read() == {}


@pytest.mark.fault("data: a truncated ledger")
def test_an_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append([record("a"), record("b")])
    content = ledger.path.read_bytes()
    second = content.index(b"\n") + 1
    for length in range(second, len(content)):
        ledger.path.write_bytes(content[:length])
        # If only the newline is missing, the last record is complete.
        survivors = {"a", "b"} if length == len(content) - 1 else {"a"}
        assert set(ledger.read()) == survivors
        ledger.append([record("c")])
        assert set(ledger.read()) == survivors | {"c"}


@pytest.mark.parametrize("line", [b"[]", b"1", b"null", b"{}", b'{"request": []}', b"\xff\xfe", b"", b"\0\0\0"])
def test_lines_that_are_not_records_are_skipped(tmp_path: Path, line: bytes) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.write_bytes(line + b"\n")
    ledger.append([record("a")])
    assert ledger.read() == {"a": record("a")}


@pytest.mark.fault("ranks: several processes write to one ledger")
def test_processes_that_append_together_lose_nothing(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(TRAINING)!r})
from pathlib import Path
from cogvideox.data.cache import Ledger
ledger, me = Ledger(Path({str(tmp_path)!r})), sys.argv[1]
print("ready", flush=True); sys.stdin.readline()
for k in range(40):
    ledger.append([dict(request=f"{{me}}-{{k}}-{{part}}", padding="x" * 3000) for part in range(3)])
"""
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen([*command, str(k)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for k in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=60)
        assert process.returncode == 0
    ledger = Ledger(tmp_path)
    assert set(ledger.read()) == {f"{me}-{k}-{part}" for me in range(4) for k in range(40) for part in range(3)}
    assert len(ledger.path.read_bytes().splitlines()) == 4 * 40 * 3


# -- the index ---------------------------------------------------------------------------------------------------------


def index() -> CacheIndex:
    samples = (
        CachedSample("a.mp4", "a café", Bucket(9, 64, 96), (hash_of(1), hash_of(2)), hash_of("a")),
        CachedSample("b.mp4#2", "b", Bucket(49, 480, 720), (hash_of(3),), hash_of("b")),
    )
    return CacheIndex(samples, hash_of(""), 8.0, "vae", "t5", {"vae": "bf16", "text_encoder": "fp32"}, 226)


def test_index_round_trip(tmp_path: Path) -> None:
    index().save(tmp_path)
    assert open_index(tmp_path) == index()
    assert files(tmp_path) == ["index.json"]


def test_fingerprint_changes_with_any_key_and_not_with_captions() -> None:
    def changed(**values: object) -> str:
        whole = index()
        first = CachedSample(**vars(whole.samples[0]) | values)
        return CacheIndex(**vars(whole) | {"samples": (first, *whole.samples[1:])}).fingerprint

    same = index().fingerprint
    assert changed() == same
    others = [changed(id="c.mp4"), changed(video_keys=(hash_of(2), hash_of(1))), changed(prompt_key=hash_of("c"))]
    others.append(CacheIndex(**vars(index()) | {"empty_prompt_key": hash_of("x")}).fingerprint)
    others.append(CacheIndex(**vars(index()) | {"samples": index().samples[:1]}).fingerprint)
    assert len({same, *others}) == 6


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no index.json; give the --output_dir of prepare_dataset.py"),
        ("{", "is not valid JSON"),
        ('{"format": 0}', "another version"),
        ("{}", "another version"),
    ],
)
def test_a_folder_that_is_not_prepared(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(UsageError, match=reason):
        open_index(tmp_path)


def test_hash_of_does_not_depend_on_the_order_of_names() -> None:
    assert hash_of({"a": 1, "b": [1.5, "x"]}) == hash_of({"b": [1.5, "x"], "a": 1})
    assert len({hash_of(value) for value in ([], {}, None, 0, 1, 1.0, "1", [1], ["1"], [[1]], "", "é")}) == 12


def test_a_file_that_cannot_be_opened_is_not_renamed(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(KEY, tensors())

    def too_many(self: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", too_many)
        with pytest.raises(UsageError, match="Too many open files") as caught:
            cache.read(KEY)
    assert not isinstance(caught.value, CacheError)
    assert cache.read(KEY).keys() == tensors().keys()


@pytest.mark.fault("data: a cached tensor under the name of another")
def test_a_file_of_another_key_is_found(cache: TensorCache) -> None:
    cache.write(KEY, tensors())
    other = KEY[::-1]
    cache.path(other).parent.mkdir(parents=True, exist_ok=True)
    cache.path(KEY).rename(cache.path(other))
    with pytest.raises(CacheError, match="holds the tensors of another key"):
        cache.examine(other)
    assert cache.has(other)  # examining a file does not change it
    with pytest.raises(CacheError):
        cache.read(other)
    assert not cache.has(other)


def test_equal_tensors_make_equal_files(cache: TensorCache) -> None:
    written = set()
    for _ in range(20):
        cache.write(KEY, tensors())
        written.add(cache.path(KEY).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("content", ['{"format": 2}', "[]", '{"format": 2, "samples": [{}], "validation": []}', "x"])
@pytest.mark.fault("data: an index that is damaged")
def test_a_damaged_index_is_reported_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UsageError, match=r"run prepare_dataset\.py again"):
        open_index(tmp_path)


OUTSIDE = "../mine/my-lora"


def as_written_by_others(folder: Path, **changes: Any) -> None:
    """Writes an index.json with values that a preparation never writes, in its first sample or at the top level."""
    index().save(folder)
    values = json.loads((folder / "index.json").read_text())
    whole = {name: changes.pop(name) for name in list(changes) if name in values}
    values["samples"][0] |= changes
    (folder / "index.json").write_text(json.dumps(values | whole))


@pytest.mark.fault("security: a foreign index.json whose keys lead outside its folder")
@pytest.mark.parametrize(
    "changes",
    [
        {"video_keys": [OUTSIDE]},
        {"image_keys": [OUTSIDE]},
        {"prompt_key": OUTSIDE},
        {"empty_prompt_key": OUTSIDE},
        {"video_keys": [KEY.upper()]},
        {"video_keys": [f"{KEY}\n"]},
        {"video_keys": [7]},
    ],
)
def test_a_foreign_index_names_nothing_outside_its_folder(tmp_path: Path, changes: dict[str, Any]) -> None:
    as_written_by_others(tmp_path, **changes)
    with pytest.raises(
        UsageError, match=r"is not the key of a tensor, so it was changed; run prepare_dataset\.py again"
    ):
        open_index(tmp_path)


@pytest.mark.fault("security: a key of a tensor file that leads outside the folder")
def test_a_file_outside_the_folder_is_neither_read_nor_renamed(tmp_path: Path) -> None:
    """Otherwise it would be renamed, as every file is whose content is not what was written."""
    mine = tmp_path / "mine" / "my-lora.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    (tmp_path / "foreign" / "tensors").mkdir(parents=True)
    cache = TensorCache(tmp_path / "foreign")
    for ask in (cache.read, cache.examine, cache.has, cache.remove):
        for key in (OUTSIDE, f"../{OUTSIDE}", f"../../{OUTSIDE}", str(mine.with_suffix(""))):
            with pytest.raises(CacheError, match="is not the key of a tensor"):
                ask(key)
    assert mine.read_bytes() == b"precious"
    assert files(mine.parent) == [mine.name]
