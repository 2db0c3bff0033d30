"""cogvideox/stopping.py: from any moment of a script the first signal ends it in time with nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from running import (
    LORA_SCRIPT,
    PROMPT,
    ROOT,
    WEIGHTS,
    Forked,
    Moment,
    environment,
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

from cogvideox import stopping

SIGNALS = stopping.STOP_SIGNALS
HUP, INT, TERM, USR1 = SIGNALS
LINE = "the same command continues"
BEGIN = f"""
import hashlib, os, signal, sys, time
sys.path.insert(0, {str(ROOT / "training")!r})
from cogvideox import args, stopping
ready = lambda: print("ready", flush=True)
def body():
"""
END = """
args.parse = lambda *_: None
args.hide_secrets = lambda _: None
args.run_script(lambda _: body(), None, None, ())
"""
IN_A_LIBRARY = "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes without a Python bytecode
DEFERRED = "stopping.defer(); ready()\nend = time.monotonic() + 30\nwhile time.monotonic() < end: time.sleep(0.01)"


def script_of(code: str) -> str:
    """A whole script with ``code`` in its main function."""
    return BEGIN + textwrap.indent(code, "    ") + END


class Script:
    """A script of a few lines that has taken over its signals, in a session of its own."""

    def __init__(self, folder: Path, code: str, *launcher: object) -> None:
        path = folder / "script.py"
        path.write_text(script_of(code))
        self.process = launched([*launcher, sys.executable, path])

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, within: float = 10) -> tuple[int, str]:
        """Its status and what it wrote to the standard error; it must end by itself."""
        _, said = self.process.communicate(timeout=within)
        return self.process.returncode, said


def launched(command: list[object]) -> subprocess.Popen[str]:
    """A process that has said that it is ready."""
    pipe, words = subprocess.PIPE, [str(word) for word in command]
    process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_handlers_are_those_of_the_issue_s_signals() -> None:
    assert set(SIGNALS) == {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@pytest.mark.fault("signals: in a long call of a library")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_long_call_ends_the_script_soon(number: int, tmp_path: Path) -> None:
    script = Script(tmp_path, IN_A_LIBRARY)
    time.sleep(0.1)
    script.send(number)
    assert script.end(within=8) == (75, f"stopped; {LINE}\n")


@pytest.mark.fault("signals: between two bytecodes")
def test_the_main_thread_ends_by_itself_where_it_can(tmp_path: Path) -> None:
    code = "try: ready(); time.sleep(60)\nexcept Exception: print('swallowed')\nfinally: os.write(2, b'cleaned up\\n')"
    script = Script(tmp_path, code)
    script.send(TERM)
    assert script.end() == (75, f"cleaned up\nstopped; {LINE}\n")


@pytest.mark.fault("signals: a second one")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once_unless_it_is_the_first_one_again(number: int, tmp_path: Path) -> None:
    script = Script(tmp_path, DEFERRED)
    script.send(TERM)
    time.sleep(0.3)
    script.send(number)  # a launcher's copy
    time.sleep(1.0)
    assert script.process.poll() is None
    script.send(number)
    assert script.end()[0] == 128 + number


@pytest.mark.fault("signals: while there is something to lose")
def test_what_exists_in_memory_only_is_saved_first(tmp_path: Path) -> None:
    code = """
stopping.defer(); ready()
while not stopping.requested(): time.sleep(0.01)
time.sleep(1.5)  # longer than the watcher waits where nothing is to be saved
stopping.allow("and saved after step 3 of 6")
"""
    script = Script(tmp_path, code)
    script.send(HUP)
    assert script.end() == (75, f"stopped and saved after step 3 of 6; {LINE}\n")


@pytest.mark.fault("signals: HUP to a run that was detached with nohup")
def test_a_detached_run_goes_on(tmp_path: Path) -> None:
    script = Script(tmp_path, "ready(); time.sleep(0.7)\nprint('finished', file=sys.stderr)", "nohup")
    script.send(HUP)
    status, said = script.end()
    assert (status, said.splitlines()[-1]) == (0, "finished")


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, sys.argv[1]])
print(child.pid, file=sys.stderr, flush=True)
child.wait()
"""


@pytest.mark.fault("signals: the parent dies")
@pytest.mark.parametrize(("parent", "ends"), [("torchrun", True), ("accelerate", True), ("sweep.py", False)])
def test_the_launcher_s_death_is_a_signal_and_that_of_a_shell_is_not(parent: str, ends: bool, tmp_path: Path) -> None:
    (tmp_path / parent).write_text(PARENT)
    done = tmp_path / "done"
    (tmp_path / "script.py").write_text(script_of(f"ready(); time.sleep(1.5)\nopen({str(done)!r}, 'w')"))
    process = launched([sys.executable, tmp_path / parent, tmp_path / "script.py"])
    process.kill()
    _, said = process.communicate(timeout=10)  # which ends when the child has closed its output
    assert done.exists() != ends
    assert (LINE in said) == ends


def test_which_processes_are_launchers() -> None:
    assert not stopping.is_launcher(os.getpid())
    assert not stopping.is_launcher(2**22 + 1)
    for words in (["-m", "accelerate.commands.launch", "x"], ["-m", "torch.distributed.run"], ["/bin/torchrun", "x"]):
        process = named(words)
        try:
            assert stopping.is_launcher(process.pid), words
        finally:
            process.kill()
            process.wait()


def named(words: list[str]) -> subprocess.Popen[bytes]:
    """A process whose command line is ``python words...``."""
    process = subprocess.Popen(["python", "-c", "x=input()", *words], executable=sys.executable, stdin=subprocess.PIPE)
    end = time.monotonic() + 5
    while b"-c" not in Path(f"/proc/{process.pid}/cmdline").read_bytes() and time.monotonic() < end:
        time.sleep(0.01)
    return process


@pytest.mark.fault("signals: QUIT prints the stacks of all threads")
def test_quit_prints_all_stacks_and_ends_nothing(tmp_path: Path) -> None:
    code = "ready()\ndef find_me(): time.sleep(1)\nfind_me()"
    script = Script(tmp_path, code)
    script.send(signal.SIGQUIT)
    status, said = script.end()
    assert status == 0
    assert "in find_me" in said
    assert said.count("hread 0x") == 2  # the main thread and the watcher


# -- scripts -----------------------------------------------------------------------------------------------------------


def small_flags(model: Path, data: Path, folder: Path, *more: object) -> list[str]:
    """A run of four steps that prepares, measures held-out clips, makes videos and saves at step 2 and at the end."""
    own = ["--tensor_cache", folder / "cache", "--max_train_steps", 4, "--checkpointing_steps", 2]
    looks = ["--validation_data_root", data, "--validation_prompt", PROMPT, "--validation_steps", 3]
    return lora_flags(model, data, folder / "lora", *own, *looks, *more)


def is_the_same(folder: Path, whole: Path) -> None:
    """Two runs have the same losses and weights, and the same files."""
    assert losses(folder) == losses(whole)
    assert held_out(folder) == held_out(whole)
    assert equal(weights(folder), weights(whole))
    names = [sorted(path.name for path in (run / "validation").glob("*.mp4")) for run in (folder, whole)]
    assert names[0] == names[1]


def held_out(folder: Path) -> dict[float, float]:
    return {line["step"]: line["held_out_loss"] for line in metrics(folder) if "held_out_loss" in line}


MOMENTS = {
    "while T5 is loaded": (r"read .*/text_encoder/config\.json", 1, HUP, None),
    "between captions": ("unit caption", 2, INT, None),
    "between clips": (r"rename .*/tensors/.*\.safetensors", 9, TERM, None),
    "before the first step is complete": ("unit micro-batch", 1, USR1, None),
    "in an unfinished step after one that is not saved": ("unit micro-batch", 3, HUP, 1),
    "between denoising steps of a video after steps that are not saved": ("unit denoising step", 1, INT, 3),
    "in decoding at the start of a resumed run": ("unit decoded tile", 1, TERM, None),
    "while a checkpoint is written": (r"rename .*/\.checkpoint-4\.tmp", 1, USR1, 4),
    "while the last held-out loss is measured": ("unit held-out loss", 5, HUP, None),
    "while the result is written": (rf"rename .*/{WEIGHTS}", 1, INT, None),
    "at the end": (r"rename .*/recipe\.json", 1, TERM, None),
}


@pytest.mark.slow
@pytest.mark.fault("signals: HUP, INT, TERM and USR1 at named moments of a run", times=len(MOMENTS))
def test_stopped_at_many_moments_a_run_ends_as_if_nothing_had_been(model: Path, clips: Path, tmp_path: Path) -> None:
    """One run that is stopped again and again; at each moment with the checkpoint that is due then."""
    (tmp_path / "whole").mkdir()
    assert train(small_flags(model, clips, tmp_path / "whole")) == 0
    output = tmp_path / "stopped" / "lora"
    command = python(LORA_SCRIPT, *small_flags(model, clips, tmp_path / "stopped"))
    for name, (moment, nth, number, saved) in MOMENTS.items():
        text = finish(Forked(command, (moment, nth, number)), status=75)
        assert LINE in text, name
        if saved:
            assert f"stopped and saved after step {saved} of 4" in text, name
            assert (output / f"checkpoint-{saved}").is_dir()
        assert "Traceback" not in text, name
    finish(Forked(command))
    is_the_same(output, tmp_path / "whole" / "lora")
    assert not list(tmp_path.joinpath("stopped").rglob("*.tmp*"))


@pytest.mark.fault("signals: one of two ranks, in an unfinished step")
def test_one_of_two_ranks_stops_both_before_the_same_step(model: Path, tensors: Path, tmp_path: Path) -> None:
    def ranks_of(name: str, moments: dict[int, Moment] | None = None) -> list[Forked]:
        flags = lora_flags(model, tensors, tmp_path / name, "--load_tensors", "--max_train_steps", 3)
        return fork_ranks(2, python(LORA_SCRIPT, *flags), moments)

    texts = [finish(rank, 75) for rank in ranks_of("stopped", {1: ("unit micro-batch", 3, TERM)})]
    assert f"stopped and saved after step 1 of 3; {LINE}" in texts[0]
    assert (tmp_path / "stopped" / "checkpoint-1").is_dir()
    for name in ("stopped", "whole"):
        for rank in ranks_of(name):
            finish(rank)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
