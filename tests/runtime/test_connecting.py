"""ranks.py: how processes find each other, what they say if they do not, and what they know about their machine."""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from cogvideox.runtime import ranks as module
from cogvideox.runtime.ranks import agree_on_attempt, connection_url

LIMIT = timedelta(seconds=20)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Each test has an environment of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "ACCELERATE_", "NCCL_"))}
    monkeypatch.setattr(os, "environ", own)
    return own


# -- a launcher that starts processes again ----------------------------------------------------------------------------


def test_the_processes_of_an_attempt_agree_on_its_name() -> None:
    """What killed processes of former attempts have asked is answered, too, but nobody waits for these."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key, value in {"ask/1": "former", "answer/former": "other", "other/joined/1": "", "ask/2": "late"}.items():
        server.set(key, value)
    names: dict[int, str] = {}

    def join(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        names[rank] = agree_on_attempt(store, rank, 3, LIMIT)

    threads = [threading.Thread(target=join, args=[rank]) for rank in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 3
    assert len(set(names.values())) == 1
    assert "other" not in names.values()


def test_process_0_does_not_wait_forever() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistStoreError, match="1 of 3 processes came"):
        agree_on_attempt(server, 0, 3, timedelta(seconds=0.1))


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, f"{module.OF_ATTEMPT}://"),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, None),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, None),
        ({"WORLD_SIZE": "1"}, None),
    ],
)
def test_an_attempt_has_a_name_only_if_its_launcher_may_restart_it(
    given: dict[str, str], url: str | None, environment: dict[str, str]
) -> None:
    environment.update({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2"})
    environment.update(given)
    assert connection_url() == url
