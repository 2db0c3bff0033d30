"""Tests that every stream has a hardware queue of its own."""

from __future__ import annotations

import importlib.util

import pytest

from cogvideox.memory import streaming

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize("given", [None, "1"])
def test_cuda_gets_enough_queues_unless_the_user_decides(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUEUES, raising=False)
    if given:
        monkeypatch.setenv(QUEUES, given)
    spec = importlib.util.find_spec(streaming.__name__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # a copy: the module itself stays as it is
    assert streaming.os.environ[QUEUES] == (given or "32")
