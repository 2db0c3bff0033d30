"""On unusual machines, a run works or reports what it needs."""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
from running import LORA_SCRIPT, environment, equal, finish, lora_flags, losses, python, start, train, weights

from cogvideox import loop
from cogvideox.errors import UsageError
from cogvideox.loop import explain_machine_errors
from cogvideox.runtime.curves import CURVES_NAME

SHORT = ("--load_tensors", "--max_train_steps", 2, "--dataloader_num_workers", 2)
ODD = "a folder, with 'quotes', ünïcode & $HOME \U0001f407"


def limited(command: list[object], limit: str) -> list[object]:
    """Returns a command that runs a command under a limit of the shell."""
    return ["bash", "-c", f"{limit}; exec {shlex.join(map(str, command))}"]


@pytest.fixture(scope="module")
def usual(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the output folder of a run under usual conditions."""
    output = tmp_path_factory.mktemp("usual") / "lora"
    assert train(lora_flags(model, tensors, output, *SHORT)) == 0
    return output


@pytest.mark.long
@pytest.mark.parametrize(
    ("limit", "variables"),
    [
        pytest.param(
            "true", {"HOME": "/proc/none"}, marks=pytest.mark.fault("disk: a home folder that cannot be written")
        ),
        pytest.param("true", {"TMPDIR": "/proc/none"}, marks=pytest.mark.fault("disk: no folder for temporary files")),
        pytest.param("ulimit -n 128", {}, marks=pytest.mark.fault("disk: a limit of 128 open files")),
        pytest.param(
            "true",
            {"LC_ALL": "C", "LANG": "C"},
            marks=pytest.mark.fault("flags: the locale C, and odd characters in paths"),
        ),
    ],
)
def test_the_result_is_the_usual_one(
    limit: str, variables: dict[str, str], model: Path, tensors: Path, usual: Path, tmp_path: Path
) -> None:
    folder = tmp_path / ODD
    data = Path(shutil.copytree(tensors, folder / "tensors"))
    own = Path(shutil.copytree(model, folder / "model"))
    command = python(LORA_SCRIPT, *lora_flags(own, data, folder / "lora", *SHORT))
    finish(start(limited(command, limit), **variables))
    assert losses(folder / "lora") == losses(usual)
    assert equal(weights(folder / "lora"), weights(usual))


@pytest.mark.fault("disk: a clock that jumps back and forth")
def test_a_clock_that_jumps(
    model: Path, tensors: Path, usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock jumps by a day at each reading. Nothing in a run depends on the time of day."""
    now: Callable[[], float] = time.time
    jumps = itertools.cycle((86_400.0, -86_400.0, 0.0))
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    assert train(lora_flags(model, tensors, tmp_path / "lora", *SHORT, "--dataloader_num_workers", 0)) == 0
    assert losses(tmp_path / "lora") == losses(usual)
    assert equal(weights(tmp_path / "lora"), weights(usual))


NO_COMPILER = (
    (RuntimeError, "Failed to find C compiler. Please specify via CC environment variable"),
    (RuntimeError, "SubprocException: Traceback\n  RuntimeError: Failed to find C compiler. Please specify"),
    (CalledProcessError, 1, ["/usr/bin/gcc", "/tmp/main.c", "-shared"]),
    (CalledProcessError, 1, ["c++", "/tmp/main.cpp"]),
)


@pytest.mark.parametrize(("kind", "arguments"), [(kind, arguments) for kind, *arguments in NO_COMPILER])
def test_a_compiler_that_a_gpu_needs_is_named(kind: Any, arguments: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"^torch\.compile fails: .*; it needs") as caught, explain_machine_errors():
        raise kind(*arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"^CUDA error$"), explain_machine_errors():
        raise RuntimeError("CUDA error")


@pytest.mark.slow
@pytest.mark.fault("flags: blocks that are to be compiled on a machine without a compiler")
def test_without_a_compiler_a_run_says_what_to_install(model: Path, tensors: Path, tmp_path: Path) -> None:
    flags = lora_flags(model, tensors, tmp_path / "lora", *SHORT, "--compile_blocks", "yes")
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels"), "XDG_CACHE_HOME": str(tmp_path / "caches")}
    said = finish(start(python(LORA_SCRIPT, *flags), PATH=str(tmp_path), **caches), 2)
    assert "Traceback" not in said
    assert "torch.compile fails: " in said
    assert "; it needs a C++ compiler and the headers of Python, as from apt-get install g++ python3-dev" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection",
    [
        pytest.param("2>/dev/full", marks=pytest.mark.fault("disk: full, where the log of a run is")),
        pytest.param("2>&-", marks=pytest.mark.fault("disk: a closed standard error")),
        pytest.param("2>&1 | head -n 1", marks=pytest.mark.fault("disk: the reader of the log ends")),
    ],
)
def test_a_run_whose_messages_cannot_be_written_finishes(
    redirection: str, model: Path, tensors: Path, usual: Path, tmp_path: Path
) -> None:
    command = shlex.join(map(str, python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "lora", *SHORT))))
    finish(start(["bash", "-c", f"set -o pipefail; {command} {redirection}"]))
    assert losses(tmp_path / "lora") == losses(usual)
    assert equal(weights(tmp_path / "lora"), weights(usual))


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("| true", 0, ""),
        (">&-", 0, ""),
        (">/dev/full", 2, f"{LORA_SCRIPT.name}: a part of the standard output is missing: No space left on device\n"),
    ],
)
def test_output_that_is_lost_is_reported_unless_nobody_reads_it(redirection: str, status: int, said: str) -> None:
    command = shlex.join(map(str, python(LORA_SCRIPT, "--help_all")))
    assert finish(start(["bash", "-c", f"set -o pipefail; {command} {redirection}"]), status) == said


def test_characters_that_the_output_cannot_encode_are_escaped(model: Path, tmp_path: Path) -> None:
    flags = ("--validation_prompt", "\u5154", "--print_config")
    said = finish(start(python(LORA_SCRIPT, *lora_flags(model, tmp_path, tmp_path, *flags)), PYTHONIOENCODING="ascii"))
    assert "\\u5154" in said


@pytest.mark.slow
@pytest.mark.fault("export: matplotlib with a backend of a notebook")
def test_the_settings_of_a_notebook(model: Path, tensors: Path, tmp_path: Path) -> None:
    variables = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "HOME": "/proc/none"}
    said = finish(start(python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "lora", *SHORT)), **variables))
    assert (tmp_path / "lora" / CURVES_NAME).exists()
    assert "atplotlib" not in said


@pytest.mark.fault("export: curves that cannot be drawn")
def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(
    model: Path,
    tensors: Path,
    usual: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to process string with tex because latex could not be found")

    monkeypatch.setattr(loop, "draw_curves", fail)
    flags = lora_flags(model, tensors, tmp_path / "lora", *SHORT, "--dataloader_num_workers", 0)
    assert train(flags) == 0
    assert equal(weights(tmp_path / "lora"), weights(usual))
    line = f"{tmp_path}/lora/curves.png: matplotlib cannot draw it (Failed to process string with tex because latex "
    assert line in capsys.readouterr().err


HOMELESS = """
import pwd, runpy, sys
pwd.getpwuid = lambda _: {}[0]
sys.path.insert(0, sys.argv[1])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_user_without_a_home_folder(tmp_path: Path) -> None:
    """In a container, a user may be a number that the system does not know, without a variable HOME."""
    flags = ["--pretrained_model_name_or_path", tmp_path / "missing", "--data_root", tmp_path, "--output_dir", tmp_path]
    environ = {name: value for name, value in environment().items() if name not in ("HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", HOMELESS, LORA_SCRIPT.parent, LORA_SCRIPT, *flags]
    ended = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_locale_without_utf8_is_named(model: Path, tmp_path: Path) -> None:
    """Otherwise the names of files would be blamed, or flags be misread without an error."""
    data = tmp_path / "ünïcode"
    data.mkdir()
    command = python(LORA_SCRIPT, *lora_flags(model, data, tmp_path, "--print_config"))
    plain = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    rule = "Python reads flags and the names of files as ascii, and they must be UTF-8; set the variable PYTHONUTF8=1"
    assert finish(start(command, **plain), 2) == f"{LORA_SCRIPT.name}: 1 problem\n  the locale: {rule}\n"
    assert "nïcode" in finish(start(command, **plain | {"PYTHONUTF8": "1"}))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a number; if another launcher left it"),
        ({"RANK": "1"}, "RANK=1: must be from 0 to WORLD_SIZE - 1, and WORLD_SIZE is 1; if another launcher left it"),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
            "environment has WORLD_SIZE=1, RANK=0, LOCAL_RANK=0; start all processes at the same time",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "run: unset OMPI_COMM_WORLD_SIZE"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "or run: unset ACCELERATE_USE_DEEPSPEED"),
    ],
)
@pytest.mark.slow
@pytest.mark.fault("ranks: variables of another launcher in the environment")
def test_variables_of_another_launcher_are_named(
    variables: dict[str, str], said: str, model: Path, tensors: Path, tmp_path: Path
) -> None:
    output = finish(start(python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "lora", *SHORT)), **variables), 2)
    assert said in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.fault("ranks: accelerate launch starts fewer processes than its flags say")
@pytest.mark.parametrize("name", ["cpu", "compiled_1"])
def test_a_launcher_that_starts_one_process_of_two_is_refused(
    name: str, model: Path, tensors: Path, tmp_path: Path
) -> None:
    launcher = f"-m accelerate.commands.launch --config_file accelerate_configs/{name}.yaml"
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--print_config")
    launch = [sys.executable, *launcher.split()]
    output = finish(start([*launch, "--num_processes", 2, LORA_SCRIPT, *flags]), 1)
    assert "accelerate launch: it was asked for several processes and started one" in output
    assert "uncompiled_2.yaml" in output
    # An address that the environment had before asks for nothing.
    finish(start([*launch, LORA_SCRIPT, *flags], MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"))


def test_a_folder_for_temporary_files_that_workers_cannot_use_is_named(
    model: Path, tensors: Path, tmp_path: Path
) -> None:
    """Batches are sent through a socket, whose path must not have more than 107 characters."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    said = finish(
        start(python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "lora", *SHORT)), TMPDIR=str(deep)), 2
    )
    assert "--dataloader_num_workers 2: its processes cannot use the folder for temporary files (AF_UNIX path" in said
    assert (
        "; set TMPDIR to a folder that can be written and has a short path, or give --dataloader_num_workers 0" in said
    )
    assert list(deep.iterdir()) == []
    assert not (tmp_path / "lora").exists()
