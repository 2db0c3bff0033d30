"""tests/shared/forking.py: a forked script behaves like a started process, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import running
from running import LORA_SCRIPT, Forked, Process, fork_ranks, python, server, start

ENDS = {
    "success": ("print('done')", 0, "done\n"),
    "status": ("import sys; print('to stderr', file=sys.stderr); sys.exit(75)", 75, "to stderr\n"),
    "message": ("raise SystemExit('no such file')", 1, "no such file\n"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    "at the end": ("import atexit; atexit.register(print, 'bye')", 0, "bye\n"),
    "arguments": ("import sys; print(sys.argv[1:], __name__)", 0, "['a b', '7'] __main__\n"),
    "environment": ("import os; print(os.environ['GIVEN'], os.getcwd() == os.environ['PWD'])", 0, "value True\n"),
    "session": ("import os; print(os.getsid(0) == os.getpid() == os.getpgrp())", 0, "True\n"),
    "interrupt": ("import signal; print(signal.getsignal(signal.SIGINT).__name__)", 0, "default_int_handler\n"),
    "garbage": ("import gc; print(gc.isenabled())", 0, "True\n"),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("make", [Forked, start])
def test_a_forked_script_ends_like_a_started_process(how: str, make: type[Forked], tmp_path: Path) -> None:
    code, status, said = ENDS[how]
    script = tmp_path / "script.py"
    script.write_text(code)
    process = make(python(script, "a b", 7), GIVEN="value", PWD=str(LORA_SCRIPT.parents[1]))
    assert process.communicate(timeout=60)[0] == said
    assert process.returncode == status
    assert process.poll() == process.wait() == status


def test_a_traceback_is_printed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("raise ValueError('seven')")
    process = Forked(python(tmp_path / "script.py"))
    assert "ValueError: seven" in process.communicate()[0]
    assert process.returncode == 1


def test_signals_reach_one_process_only(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys, time\nprint('began', flush=True)\ntime.sleep(60)")
    processes = [Forked(python(tmp_path / "script.py")) for _ in range(3)]
    assert all(process.poll() is None for process in processes)
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(10) for process in processes[:2]] == [-signal.SIGKILL, -signal.SIGTERM]
    assert processes[2].poll() is None
    processes[2].send_signal(signal.SIGINT)
    assert processes[2].wait(10) != 0


def test_torch_is_imported_and_its_seed_is_unused(tmp_path: Path) -> None:
    code = "import sys\nfor name in ('torch', 'diffusers', 'peft'): print(name in sys.modules)\n"
    (tmp_path / "script.py").write_text(code + "import torch; print(torch.initial_seed(), torch.rand(1).item())")
    texts = [Forked(python(tmp_path / "script.py")).communicate()[0].splitlines() for _ in range(2)]
    assert texts[0][:3] == ["True"] * 3
    assert texts[0] == texts[1]


def test_ranks_know_each_other(tmp_path: Path) -> None:
    code = "import os; print(*(os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_PORT')))"
    (tmp_path / "script.py").write_text(code)
    ranks: list[Process] = [*fork_ranks(3, [sys.executable, tmp_path / "script.py"])]
    said = [rank.communicate()[0].split() for rank in ranks]
    assert [words[:3] for words in said] == [[str(k), str(k), "3"] for k in range(3)]
    assert len({words[3] for words in said}) == 1


def test_processes_of_a_session_share_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text("import os; print(os.getppid())")
    first = Forked(python(tmp_path / "script.py")).communicate()[0]
    with server.__wrapped__() as another:
        monkeypatch.setattr(running, "server", lambda: another)
        assert Forked(python(tmp_path / "script.py")).communicate()[0] == first
    monkeypatch.undo()
    assert Forked(python(tmp_path / "script.py")).communicate()[0] == first


def test_a_program_that_starts_python_can_fork_instead(forking_python: Path, tmp_path: Path) -> None:
    """Standard output and standard error stay apart, and the exit status is that of the script."""
    code = "import os, sys\nprint(sys.argv[1:], os.environ['GIVEN'])\nsys.exit('no such file')"
    (tmp_path / "script.py").write_text(code)
    command = [forking_python, tmp_path / "script.py", "a b"]
    done = subprocess.run(command, env=os.environ | {"GIVEN": "7"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "['a b'] 7\n", "no such file\n")
    (tmp_path / "script.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run(command).returncode == -signal.SIGKILL
    done = subprocess.run([forking_python, "-c", "import sys; print('torch' in sys.modules)"], stdout=subprocess.PIPE)
    assert done.stdout == b"False\n"
