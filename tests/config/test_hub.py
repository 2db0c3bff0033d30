"""Tests hub.py: the files on the disk are uploaded, a failure loses nothing, and the token is never shown."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import listing, options_of
from hub_stand_in import StandIn, stand_in
from running import (
    LORA_SCRIPT,
    PROMPT,
    WEIGHTS,
    Forked,
    equal,
    finish,
    fork_ranks,
    lora_flags,
    python,
    sft_flags,
    start,
    train,
    train_all,
    weights,
)

from cogvideox.config import hub as hub_module
from cogvideox.config.args import config_dict
from cogvideox.config.hub import WAITS, check_hub, open_repository, patiently, upload
from cogvideox.errors import UsageError

TOKEN = "hf_QkXw7ThisIsTheSecretOfTheTest"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Makes huggingface_hub in this process use a local server, without a saved login and without waits."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    requests: Any = importlib.import_module("huggingface_hub.utils._http")
    with stand_in(TOKEN) as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url())
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # The upload by plain HTTP is tested.
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        for module in (requests, hub_module):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield state


def environment(state: StandIn, home: Path) -> dict[str, str]:
    """Returns the environment of scripts that use the local server in place of the hub and have no login."""
    settings = {"HF_ENDPOINT": state.url(), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return settings | {"HF_TOKEN": "", "HF_HUB_DISABLE_TELEMETRY": "1"}


def shared(output: Path) -> dict[str, bytes]:
    """Returns the files of the folder of a run that belong on the hub."""
    names = ["README.md", "inference.py", "recipe.json", "contact_sheet.png", "curves.png"]
    steps = sorted({path.name[:11] for path in output.glob("validation/step-*.mp4")})
    videos = [path for step in {*steps[:1], *steps[-1:]} for path in output.glob(f"validation/{step}_*.mp4")]
    results = [output / WEIGHTS, *output.glob("transformer/*")]
    paths = [path for path in (*(output / name for name in names), *videos, *results) if path.is_file()]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}


def assert_kept_secret(state: StandIn, folder: Path | None = None, text: str = "") -> None:
    """Checks that the token is in one header of the requests to the hub and nowhere else."""
    secret = TOKEN.encode()
    assert {request.server for request in state.requests} <= {"hub", "storage"}
    for request in state.requests:
        headers = dict(request.headers)
        if request.server == "hub":
            assert headers.pop("authorization", None) in (f"Bearer {TOKEN}", None)
        assert TOKEN not in request.path + json.dumps(headers)
        assert secret not in request.body
    assert TOKEN not in text
    leaks = [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()] if folder else []
    assert leaks == []


# -- the flags ---------------------------------------------------------------------------------------------------------


def checked(*flags: object, output: Path = Path("my-lora")) -> list[str]:
    return list(check_hub(options_of(output, *flags)))


def test_without_push_to_hub_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert checked() == []


@pytest.mark.fault("export: no token, or no network to the hub", times=2)
def test_no_token_and_no_network_are_seen_before_anything_loads(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked("--push_to_hub", "--hub_token", TOKEN) == []
    (problem,) = checked("--push_to_hub")
    assert problem.startswith("--push_to_hub: there is no token; run `hf auth login`")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (problem,) = checked("--push_to_hub", "--hub_token", TOKEN)
    assert "HF_HUB_OFFLINE" in problem
    assert hub.requests == []


def test_a_saved_token_suffices(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    assert checked("--push_to_hub") == []
    assert open_repository(options_of(Path("my-lora"), "--push_to_hub"), "the run", print) == "someone/my-lora"
    assert_kept_secret(hub)


@pytest.mark.parametrize("name", ["a/b/c", "my lora", "-a", "a--b", "a..b", "a.git", "a/", "/a", "ä", "a" * 97])
def test_names_that_no_repository_can_have(hub: StandIn, name: str) -> None:
    push = ("--push_to_hub", "--hub_token", TOKEN)
    (problem,) = checked(*push, f"--hub_model_id={name}")
    assert problem.startswith(f"--hub_model_id {name}: ")
    if "/" not in name:
        (problem,) = checked(*push, output=Path("/x", name))
        assert problem.startswith(f"--output_dir /x/{name}: ")
        assert "--hub_model_id" in problem


@pytest.mark.parametrize("name", ["a", "user/a", "org/my-lora_1.5", "a" * 96])
def test_names_that_a_repository_can_have(hub: StandIn, name: str) -> None:
    assert checked("--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", name) == []


# -- at the start ------------------------------------------------------------------------------------------------------


def opened(*flags: object, said: list[str] | None = None) -> str | None:
    options = options_of(Path("out/my-lora"), "--push_to_hub", "--hub_token", TOKEN, *flags)
    return open_repository(options, "the run", (said if said is not None else []).append)


def refused(*flags: object) -> str:
    with pytest.raises(UsageError) as error:
        opened(*flags)
    assert TOKEN not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    return str(error.value)


def test_the_repository_is_made_or_found(hub: StandIn) -> None:
    assert opened() == "someone/my-lora"
    assert opened("--hub_model_id", "team/style", "--hub_private") == "team/style"
    assert opened("--hub_model_id", "someone/my-lora") == "someone/my-lora"
    assert set(hub.repositories) == {"someone/my-lora", "team/style"}
    assert hub.private == {"team/style"}
    assert_kept_secret(hub)


def test_without_push_to_hub_the_hub_is_not_contacted(hub: StandIn) -> None:
    assert open_repository(options_of(Path("my-lora")), "the run", print) is None
    assert hub.requests == []


def test_a_wrong_token_is_refused_at_once(hub: StandIn) -> None:
    hub.token = "another"
    text = refused()
    assert "the hub does not know this token" in text
    assert hub.asked("repos/create") == 1


def test_a_missing_right_is_refused_at_once(hub: StandIn) -> None:
    hub.writable = lambda repository: repository.startswith("someone/")
    assert opened() == "someone/my-lora"
    assert "this token may not write there" in refused("--hub_model_id", "team/style")
    hub.repositories["team/style"] = {}  # The repository can be read, which is not enough.
    text = refused("--hub_model_id", "team/style")
    assert "this token may not write there" in text
    assert "team/style" in text


def test_a_namespace_that_does_not_exist(hub: StandIn) -> None:
    hub.fail("repos/create", 404)
    assert "there is no such namespace" in refused("--hub_model_id", "nobody/style")


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.fault("export: the hub is unreachable for a while")
def test_a_short_outage_is_waited_for(hub: StandIn, status: int) -> None:
    hub.fail("repos/create", status, times=2)
    hub.fail("auth-check", status)
    said: list[str] = []
    assert opened(said=said) == "someone/my-lora"
    assert len(said) == 3
    assert all(f"({status})" in line and TOKEN not in line for line in said)


def test_a_long_outage_is_an_error_that_does_not_show_the_token(hub: StandIn) -> None:
    """The answer of the local server repeats the headers of the request, which include the token."""
    hub.fail("repos/create", 503, times=99)
    text = refused()
    assert "503" in text
    assert "(not shown)" in text
    assert hub.asked("repos/create") == 1 + len(WAITS)


def test_a_hub_that_cannot_be_reached(hub: StandIn) -> None:
    hub.close("hub")
    assert "the same command with it uploads" in refused()


def test_only_temporary_failures_are_retried_after_each_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(hub_module, "time", SimpleNamespace(sleep=slept.append))
    tries: list[int] = []

    def fails(error: Exception) -> Any:
        tries.append(1)
        raise error

    with pytest.raises(ConnectionError):
        patiently(lambda: fails(ConnectionError()), print)
    assert (len(tries), slept) == (4, list(WAITS))
    for error in (ValueError("no"), PermissionError(13, "no"), FileNotFoundError(2, "no"), KeyError("no")):
        tries.clear()
        with pytest.raises(type(error)):
            patiently(lambda error=error: fails(error), print)  # type: ignore[misc]
        assert len(tries) == 1


# -- at the end --------------------------------------------------------------------------------------------------------

FILES = {
    "model.safetensors": b"weights" * 1000,
    "inference.py": b"print()\n",
    "validation/a video.mp4": b"\x00\x01" * 500,
    "README.md": b"---\ntags:\n- a\n---\n\n# x\n",
    "recipe.json": b'{"run": "the run"}',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with a result and with files that must not be uploaded."""
    for name, content in (FILES | {"config.json": b"{}", "checkpoint-1/x.safetensors": b"x"}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def sent(folder: Path, said: list[str] | None = None, *more: object) -> None:
    options = options_of(folder, "--push_to_hub", "--hub_token", TOKEN, *more)
    opened("--hub_model_id", "team/style", *more)
    files = [folder / name for name in FILES]
    upload("team/style", options.hub, "the run", folder, files, (said if said is not None else []).append)


def test_existing_files_are_uploaded_in_one_commit(hub: StandIn, folder: Path) -> None:
    said: list[str] = []
    sent(folder, said)
    assert hub.repositories == {"team/style": FILES}
    assert len(hub.commits) == 1
    assert said == [f"uploaded: {hub.url()}/team/style"]
    assert {r.server for r in hub.requests} == {"hub", "storage"}
    assert_kept_secret(hub, folder)


def test_unchanged_files_are_not_sent_again(hub: StandIn, folder: Path) -> None:
    sent(folder)
    asked = len(hub.requests)
    sent(folder)
    again = {f"{r.server} {r.method} {r.path.rpartition('/')[2]}" for r in hub.requests[asked:]}
    assert not [line for line in again if "PUT" in line or "commit" in line]
    assert len(hub.commits) == 1
    (folder / "inference.py").write_text("new")
    sent(folder)
    assert hub.commits[1:] == [{"inference.py"}]
    assert hub.repositories["team/style"]["inference.py"] == b"new"


OTHERS = {
    "weights with a card": {"README.md": b"---\nlicense: mit\n---\n", "a.safetensors": b"x"},
    "another model": {"a.safetensors": b"x", "b.json": b"{}", "c.json": b"{}", "d.json": b"{}"},
    "another run": FILES | {"recipe.json": b'{"run": "another run"}'},
    "a run of an older version": FILES | {"recipe.json": b'{"step": 3}'},
    "another recipe": {"recipe.json": b"[]"},
}


@pytest.mark.parametrize("there", OTHERS.values(), ids=OTHERS)
@pytest.mark.fault("export: a repository with files of something else")
def test_a_repository_with_other_files_is_refused(hub: StandIn, folder: Path, there: dict[str, bytes]) -> None:
    hub.repositories["team/style"] = dict(there)
    names = sorted(there)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    rule = (
        f"team/style: has files that are not from this run ({shown}); give another --hub_model_id, or --hub_overwrite"
    )
    assert refused("--hub_model_id", "team/style").startswith(f"--push_to_hub: {rule}, which replaces its files of ")
    assert hub.asked("repos/create") == 1
    assert hub.repositories["team/style"] == there
    sent(folder, None, "--hub_overwrite")
    assert hub.repositories["team/style"] == there | FILES
    assert_kept_secret(hub)


def test_the_card_of_a_new_repository_is_replaced(hub: StandIn, folder: Path) -> None:
    """The form of the website writes a README.md with the license."""
    hub.repositories["team/style"] = {"README.md": b"---\nlicense: mit\n---\n"}
    said: list[str] = []
    assert opened("--hub_model_id", "team/style", said=said) == "team/style"
    assert said == ["team/style: the model card will replace its README.md, which stays in the history"]
    sent(folder)
    assert hub.repositories == {"team/style": FILES}
    said.clear()
    assert opened("--hub_model_id", "team/style", said=said) == "team/style"  # now it is that of this run
    assert said == []


@pytest.mark.fault("export: a repository with files of something else")
def test_files_that_another_run_has_uploaded_meanwhile_are_not_replaced(hub: StandIn, folder: Path) -> None:
    there = OTHERS["another run"]
    options = options_of(folder, "--push_to_hub", "--hub_token", TOKEN)
    assert opened("--hub_model_id", "team/style") == "team/style"
    hub.repositories["team/style"] = dict(there)
    with pytest.raises(UsageError) as error:
        upload("team/style", options.hub, "the run", folder, [folder / "recipe.json"], print)
    text = str(error.value)
    assert text.endswith("; then the same command only uploads")
    assert "is finished, but was not uploaded: team/style: has files that are not from this run (" in text
    assert hub.repositories == {"team/style": there}
    hub.repositories["team/style"] = {}
    sent(folder)
    sent(folder)
    assert hub.repositories == {"team/style": FILES}


@pytest.mark.parametrize("where", ["validate-yaml", "preupload", "objects/batch", "PUT /", "/commit/"])
@pytest.mark.fault("export: the hub is unreachable for a while")
def test_an_outage_at_any_request_is_waited_for(hub: StandIn, folder: Path, where: str) -> None:
    hub.fail(where, 503, times=2)
    sent(folder)
    assert hub.repositories == {"team/style": FILES}
    assert hub.asked(where) > 2


def unsent(folder: Path) -> str:
    before = listing(folder)
    with pytest.raises(UsageError) as error:
        sent(folder)
    assert listing(folder) == before
    assert TOKEN not in str(error.value)
    assert str(folder) in str(error.value)
    assert str(error.value).endswith("the same command again only uploads")
    return str(error.value)


@pytest.mark.parametrize("where", ["validate-yaml", "preupload", "objects/batch", "PUT /", "/commit/"])
@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.fault("export: the hub stays unreachable, or refuses the upload")
def test_a_failed_upload_says_why_and_touches_nothing(hub: StandIn, folder: Path, where: str, status: int) -> None:
    hub.fail(where, status, times=999)
    text = unsent(folder)
    assert str(status) in text or where == "validate-yaml"
    assert hub.commits == []
    hub.faults.clear()
    sent(folder)
    assert hub.repositories == {"team/style": FILES}


def test_a_card_that_the_hub_does_not_take(hub: StandIn, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
    assert "is not valid" in unsent(folder)


def test_a_storage_that_cannot_be_reached(hub: StandIn, folder: Path) -> None:
    """huggingface_hub closes its client when a connection fails, even if another thread is sending a file by it.

    It also sets its client to None, so another thread that has just created a client may get None in its place.
    """
    hub.close("storage")
    text = unsent(folder)
    assert any(reason in text for reason in ("refused", "closed", "'NoneType' object has no attribute 'request'"))
    assert hub.asked("objects/batch") == 1 + len(WAITS)


# -- complete runs -----------------------------------------------------------------------------------------------------

PUSH = ("--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "team/style")


@pytest.mark.fault("security: a token, searched for in every file and printed line")
def test_a_run_uploads_its_result_and_keeps_the_token_secret(
    hub: StandIn, model: Path, tensors: Path, tmp_path: Path
) -> None:
    """Runs the script as a user does, with trackers, which record flags and command lines."""
    output = tmp_path / "lora"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT, *PUSH)
    more = ["--validation_steps", 1, "--max_train_steps", 2, "--report_to", "all"]
    text = finish(start(python(LORA_SCRIPT, *flags, *more), **environment(hub, tmp_path / "home")))
    assert f"uploaded: {hub.url()}/team/style" in text
    assert hub.repositories == {"team/style": shared(output)}
    assert {"README.md", "inference.py", "recipe.json", WEIGHTS} < set(shared(output))
    assert len([name for name in shared(output) if name.endswith(".mp4")]) == 2
    assert len(hub.commits) == 1
    assert list(output.glob("wandb/offline-run-*/*.wandb"))
    assert list(output.rglob("events.out.tfevents*"))
    assert_kept_secret(hub, tmp_path, text)
    assert json.loads((output / "recipe.json").read_text())["flags"]["hub_token"] == "(not shown)"

    download = tmp_path / "download"
    for name, content in hub.repositories["team/style"].items():
        (download / name).parent.mkdir(parents=True, exist_ok=True)
        (download / name).write_bytes(content)
    video = tmp_path / "again.mp4"
    assert finish(Forked(python(download / "inference.py", PROMPT, video))).splitlines()[-1] == str(video)


def test_all_weights_are_uploaded_as_a_folder(hub: StandIn, model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = sft_flags(model, tensors, tmp_path / "full", "--load_tensors", "--max_train_steps", 1, *PUSH)
    assert train_all([*flags, "--save_pipeline"]) == 0
    assert (tmp_path / "full" / "pipeline" / "vae").is_dir()  # It is written but not uploaded.
    assert hub.repositories == {"team/style": shared(tmp_path / "full")}
    assert {name for name in hub.repositories["team/style"] if name.startswith("transformer/")} == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_only_one_of_two_processes_contacts_the_hub(hub: StandIn, model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 1, *PUSH)
    command, settings = python(LORA_SCRIPT, *flags), environment(hub, tmp_path / "home")
    for rank in fork_ranks(2, command, **settings):
        finish(rank)
    assert (hub.asked("repos/create"), len(hub.commits)) == (1, 1)
    assert hub.repositories == {"team/style": shared(tmp_path / "lora")}
    hub.writable = lambda repository: False
    for rank in fork_ranks(2, command, **settings):  # Each process ends without waiting for the other.
        text = finish(rank, status=2)
        assert text.count("this token may not write there") == 1
        assert_kept_secret(hub, tmp_path, text)


def test_a_refusal_comes_before_anything_loads(
    hub: StandIn, model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("cogvideox.loop.open_tensors", never)
    hub.writable = lambda repository: False
    with pytest.raises(UsageError, match="may not write there"):
        train(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", *PUSH))


@pytest.mark.fault("export: the hub becomes unreachable while training")
def test_a_hub_that_disappears_during_training_loses_nothing(
    hub: StandIn, model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "lora"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 2, *PUSH)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.create_commit", gone_before(hub, "huggingface_hub.HfApi.create_commit"))
        with pytest.raises(UsageError, match=r"is finished, but was not uploaded to team/style: .*refused"):
            train(flags)
    assert (output / "recipe.json").is_file()
    trained = weights(output)
    lines = (output / "metrics.jsonl").read_text()
    with stand_in(TOKEN) as back:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", back.url())
        assert train(flags) == 0
        assert back.repositories == {"team/style": shared(output)}
    assert (output / "metrics.jsonl").read_text() == lines
    assert equal(weights(output), trained)


def gone_before(state: StandIn, name: str) -> Any:
    """Returns the method of that name, which closes the hub before it runs."""
    module, kind, method = name.rsplit(".", 2)
    original = getattr(getattr(importlib.import_module(module), kind), method)

    def closed(*arguments: Any, **more: Any) -> Any:
        state.close("hub")
        return original(*arguments, **more)

    return closed


@pytest.mark.fault("kills: SIGKILL before the upload")
def test_killed_before_the_upload_the_same_command_uploads(
    hub: StandIn, model: Path, tensors: Path, tmp_path: Path
) -> None:
    output, reached, release = tmp_path / "lora", threading.Event(), threading.Event()
    hub.fail("preupload", lambda: (reached.set(), release.wait(60)))  # type: ignore[arg-type, func-returns-value]
    flags = lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 2, *PUSH)
    command, settings = python(LORA_SCRIPT, *flags), environment(hub, tmp_path / "home")
    process = Forked(command, **settings)
    try:
        assert reached.wait(120)
        assert (output / "recipe.json").is_file()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        release.set()
    assert hub.commits == []
    before = weights(output)
    assert "uploaded: " in finish(Forked(command, **settings))
    assert hub.repositories == {"team/style": shared(output)}
    assert equal(weights(output), before)


def test_a_finished_run_is_shared_by_the_same_command_with_the_flag(
    hub: StandIn, model: Path, tensors: Path, tmp_path: Path
) -> None:
    output = tmp_path / "my-lora"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1)
    assert train(flags) == 0
    assert hub.requests == []
    assert train([*flags, *PUSH[:3]]) == 0
    assert hub.repositories == {"someone/my-lora": shared(output)}
    assert 'snapshot_download("someone/my-lora")' in (output / "README.md").read_text()


def test_a_run_of_an_older_version_gets_an_id_that_stays(
    hub: StandIn, model: Path, tensors: Path, tmp_path: Path
) -> None:
    output = tmp_path / "my-lora"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1)
    assert train(flags) == 0
    config = json.loads((output / "config.json").read_text())
    del config["run"]
    (output / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        assert train([*flags, *PUSH[:3]]) == 0
    with pytest.raises(UsageError, match="has files that are not from this run"):
        train([*lora_flags(model, tensors, tmp_path / "new/my-lora", "--load_tensors"), *PUSH[:3]])


@pytest.mark.fault("security: a token, searched for in every file and printed line")
def test_a_token_in_a_bad_command_is_not_repeated(tmp_path: Path) -> None:
    flags = ["--hub_token", TOKEN, "x", f"--hub_tokn={TOKEN}", "--rank", "0", "--seed", "x"]
    for more in ([], ["--print_config"]):
        text = finish(start(python(LORA_SCRIPT, *flags, *more)), status=2)
        assert "--hub_token: takes one value" in text
        assert TOKEN not in text
    good = lora_flags(tmp_path, tmp_path, tmp_path / "out", *PUSH, "--print_config")
    text = finish(start(python(LORA_SCRIPT, *good)))
    assert TOKEN not in text
    assert "(not shown)" in text


def test_options_are_written_without_the_token(tmp_path: Path) -> None:
    options = options_of(tmp_path, *PUSH)
    assert options.hub.hub_token == TOKEN
    assert TOKEN not in repr(options)
    assert config_dict(options)["hub_token"] == "(not shown)"
    assert config_dict(options_of(tmp_path))["hub_token"] is None
