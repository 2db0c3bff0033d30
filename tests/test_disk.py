"""Disks that are full, fail, or cannot do all that others can: whole scripts, in processes of their own."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from disk_faults import NO_LOCKS
from running import (
    LORA_SCRIPT,
    PREPARE_SCRIPT,
    PROMPT,
    SIZE,
    Forked,
    equal,
    finish,
    lora_flags,
    losses,
    python,
    weights,
)

from cogvideox.data.cache import open_index


@pytest.mark.fault("disk: no POSIX locks, and folders that cannot be fsynced", times=2)
def test_a_poor_file_system_serves_as_well(
    model: Path, clips: Path, tensors: Path, reference: Path, tmp_path: Path
) -> None:
    """As CIFS, 9p, some FUSE, and Lustre without locks answer. Each is said once."""
    output, prepared = tmp_path / "out", tmp_path / "prepared"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT)
    no_fsync = (r"fsync \S*/(out|\.checkpoint-\d+\.tmp)$", 0, errno.EINVAL)
    run = Forked(python(LORA_SCRIPT, *flags), disk=[NO_LOCKS, no_fsync])
    prepare = ["--model_id", model, "--data_root", clips, "--output_dir", prepared, "--id_token", "TOKEN", *SIZE]
    job = Forked(python(PREPARE_SCRIPT, *prepare), disk=[NO_LOCKS])
    said = finish(run)
    assert [said.count(text) for text in ("cannot fsync a folder", "has no locks")] == [1, 1]
    assert losses(output) == losses(reference)
    assert equal(weights(output), weights(reference))
    assert finish(job).count("has no locks") == 1
    assert open_index(prepared).samples == open_index(tensors).samples
    assert not [*tmp_path.rglob("*.owner*"), *tmp_path.rglob("*.now")]
