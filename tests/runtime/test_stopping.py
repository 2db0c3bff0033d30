"""stopping.py: at any moment of a script, the first signal ends it in time and no work is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist
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
    free_port,
    lora_flags,
    losses,
    metrics,
    python,
    sft_flags,
    start,
    train,
    train_all,
    weights,
)
from waiting import eventually

from cogvideox import stopping
from cogvideox.runtime.metrics import read_records
from cogvideox.runtime.ranks import Consensus

SIGNALS = stopping.STOP_SIGNALS
HUP, INT, TERM, USR1 = SIGNALS
LINE = "the same command continues"
BEGIN = f"""
import hashlib, os, signal, sys, time
sys.path.insert(0, {str(ROOT / "training")!r})
from cogvideox import stopping
from cogvideox.config import args
ready = lambda: print("ready", flush=True)
def body():
"""
END = """
args.parse = lambda *_: None
args.hide_secrets = lambda _: None
args.run_script(lambda _: body(), None, None, ())
"""
IN_A_LIBRARY = "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes in C code
DEFERRED = "stopping.defer(); ready()\nend = time.monotonic() + 30\nwhile time.monotonic() < end: time.sleep(0.01)"


def script_of(code: str) -> str:
    """Returns the text of a script that has ``code`` in its main function."""
    return BEGIN + textwrap.indent(code, "    ") + END


class Script:
    """Runs a script of a few lines that handles its signals, in a new session."""

    def __init__(self, folder: Path, code: str, *launcher: object) -> None:
        path = folder / "script.py"
        path.write_text(script_of(code))
        self.process = launched([*launcher, sys.executable, path])

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, within: float = 10) -> tuple[int, str]:
        """Waits until the script ends by itself, and returns its status and its standard error."""
        _, said = self.process.communicate(timeout=within)
        return self.process.returncode, said


def launched(command: list[object]) -> subprocess.Popen[str]:
    """Starts a process, and returns it when it has printed "ready"."""
    pipe, words = subprocess.PIPE, [str(word) for word in command]
    process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_objects_are_not_freed_at_the_end(tmp_path: Path) -> None:
    """Freeing them takes seconds after torch is imported. Threads and exit handlers still finish their work."""
    code = """
        import atexit, threading
        class Freed:
            def __del__(self, write=os.write): write(1, b"freed")
        sys.kept = Freed()
        atexit.register(print, "handled")
        threading.Thread(target=lambda: (time.sleep(0.2), print("joined"))).start()
        ready()
        return 3
    """
    process = Script(tmp_path, textwrap.dedent(code)).process
    assert process.communicate(timeout=30) == ("joined\nhandled\n", "")
    assert process.returncode == 3


def test_handled_signals() -> None:
    assert set(SIGNALS) == {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@pytest.mark.fault("signals: a signal during a long call of a library")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_long_call_ends_the_script_soon(number: int, tmp_path: Path) -> None:
    script = Script(tmp_path, IN_A_LIBRARY)
    time.sleep(0.1)
    script.send(number)
    assert script.end(within=8) == (75, f"stopped; {LINE}\n")


def test_after_a_checkpoint_a_long_call_ends_as_soon_as_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_state", stopping._State())
    stopping.defer()
    stopping.allow("and saved after step 3 of 6")
    assert stopping._state.grace == stopping.UNWINDING
    stopping.defer()
    ask_to_stop()
    with pytest.raises(stopping.Stopped):
        stopping.allow("and saved after step 6 of 6")
    assert stopping._state.grace == stopping.FAREWELL


@pytest.mark.fault("signals: a signal between two bytecodes")
def test_the_main_thread_ends_by_itself_if_it_can(tmp_path: Path) -> None:
    code = "try: ready(); time.sleep(60)\nexcept Exception: print('swallowed')\nfinally: os.write(2, b'cleaned up\\n')"
    script = Script(tmp_path, code)
    script.send(TERM)
    assert script.end() == (75, f"cleaned up\nstopped; {LINE}\n")


@pytest.mark.fault("signals: a second signal")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once_unless_it_repeats_the_first(number: int, tmp_path: Path) -> None:
    script = Script(tmp_path, DEFERRED)
    script.send(TERM)
    time.sleep(0.3)
    script.send(number)  # A launcher may send the signal too.
    time.sleep(1.0)
    assert script.process.poll() is None
    script.send(number)
    assert script.end()[0] == 128 + number


@pytest.mark.fault("signals: a signal while work is unsaved")
def test_unsaved_work_is_saved_first(tmp_path: Path) -> None:
    code = """
stopping.defer(); ready()
while not stopping.requested(): time.sleep(0.01)
time.sleep(1.5)  # The watcher waits less than this if there is nothing to save.
stopping.allow("and saved after step 3 of 6")
"""
    script = Script(tmp_path, code)
    script.send(HUP)
    assert script.end() == (75, f"stopped and saved after step 3 of 6; {LINE}\n")


@pytest.mark.fault("signals: HUP to a run that was detached with nohup")
def test_a_detached_run_ignores_hup(tmp_path: Path) -> None:
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


def test_an_error_ends_a_script_with_status_1_while_its_watcher_is_in_a_library(tmp_path: Path) -> None:
    """When Python ends, it aborts the process if another thread returns to it from a library of torch."""
    code = """
        from datetime import timedelta
        import torch.distributed as dist
        store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)

        class Slow:
            def add(self, *_):
                with suppress(Exception): store.wait(["never"], timedelta(seconds=0.02))
                return 0

        stopping.PERIOD = 0  # so that the watcher always is in the library
        stopping.join_ranks(Slow(), 0, 2, 60)
        time.sleep(0.5)
        ready()
        raise RuntimeError("unknown")
    """
    status, said = Script(tmp_path, f"from contextlib import suppress\n{textwrap.dedent(code)}").end(within=30)
    assert (status, "RuntimeError: unknown\n" in said) == (1, True)


@pytest.mark.fault("signals: the parent process dies")
@pytest.mark.parametrize(("parent", "ends"), [("torchrun", True), ("accelerate", True), ("sweep.py", False)])
def test_the_end_of_a_launcher_stops_a_script_but_that_of_a_shell_does_not(
    parent: str, ends: bool, tmp_path: Path
) -> None:
    (tmp_path / parent).write_text(PARENT)
    done = tmp_path / "done"
    (tmp_path / "script.py").write_text(script_of(f"ready(); time.sleep(1.5)\nopen({str(done)!r}, 'w')"))
    process = launched([sys.executable, tmp_path / parent, tmp_path / "script.py"])
    process.kill()
    _, said = process.communicate(timeout=10)  # This returns when the child has closed its output.
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
    """Starts a process whose command line is ``python words...``."""
    process = subprocess.Popen(["python", "-c", "x=input()", *words], executable=sys.executable, stdin=subprocess.PIPE)
    eventually(lambda: b"-c" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
    return process


@pytest.mark.fault("signals: QUIT prints the stacks of all threads")
def test_quit_prints_all_stacks_and_ends_nothing(tmp_path: Path) -> None:
    code = "def find_me():\n    ready()\n    time.sleep(1)\nfind_me()"
    script = Script(tmp_path, code)
    script.send(signal.SIGQUIT)
    status, said = script.end()
    assert status == 0
    assert "in find_me" in said
    assert said.count("hread 0x") == 2  # These are the main thread and the watcher.


# -- scripts -----------------------------------------------------------------------------------------------------------


def small_flags(model: Path, data: Path, folder: Path, *more: object) -> list[str]:
    """Returns flags of a run of four steps with preparation, held-out loss, videos and two checkpoints."""
    own = ["--tensor_cache", folder / "cache", "--max_train_steps", 4, "--checkpointing_steps", 2]
    evaluation = ["--validation_data_root", data, "--validation_prompt", PROMPT, "--validation_steps", 3]
    return lora_flags(model, data, folder / "lora", *own, *evaluation, *more)


def assert_same_run(folder: Path, uninterrupted: Path) -> None:
    """Asserts that two runs have the same losses and weights, and the same files."""
    assert losses(folder) == losses(uninterrupted)
    assert held_out(folder) == held_out(uninterrupted)
    assert equal(weights(folder), weights(uninterrupted))
    names = [sorted(path.name for path in (run / "validation").glob("*.mp4")) for run in (folder, uninterrupted)]
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


def stop_at_every_moment(start_at: Callable[[Moment | None], list[Forked]], output: Path, shift: int = 0) -> None:
    """Stops a run again and again, once at each of MOMENTS, and finally lets it finish.

    Args:
        start_at: Starts all ranks, and sends a signal to some of them at a moment.
        output: The output folder of the run.
        shift: How many places later in SIGNALS the signal of each moment is.
    """
    for name, (moment, nth, number, saved) in MOMENTS.items():
        sent = SIGNALS[(SIGNALS.index(number) + shift) % len(SIGNALS)]
        texts = [finish(rank, 75) for rank in start_at((moment, nth, sent))]
        assert LINE in texts[0], name
        assert not any("Traceback" in text for text in texts), name
        if saved:
            assert f"stopped and saved after step {saved} of 4" in texts[0], name
            assert (output / f"checkpoint-{saved}").is_dir(), name
    for rank in start_at(None):
        finish(rank)
    assert not list(output.parent.rglob("*.tmp*"))


@pytest.mark.long
@pytest.mark.fault("signals: HUP, INT, TERM and USR1 at named moments of a run", times=len(MOMENTS))
def test_a_run_that_is_stopped_at_many_moments_has_the_same_result(model: Path, clips: Path, tmp_path: Path) -> None:
    assert train(small_flags(model, clips, tmp_path / "uninterrupted")) == 0
    command = python(LORA_SCRIPT, *small_flags(model, clips, tmp_path / "stopped"))
    output = tmp_path / "stopped" / "lora"
    stop_at_every_moment(lambda moment: [Forked(command, moment)], output)
    assert_same_run(output, tmp_path / "uninterrupted" / "lora")


@pytest.mark.long
@pytest.mark.fault("signals: each signal at each named moment of a run", times=len(MOMENTS))
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_every_signal_at_every_moment(model: Path, clips: Path, tmp_path: Path, shift: int) -> None:
    more = ["--lora_dropout", 0.5, "--dataloader_num_workers", 1, "--plan", "lean"]
    for rank in [Forked(python(LORA_SCRIPT, *small_flags(model, clips, tmp_path / "uninterrupted", *more)))]:
        finish(rank)
    command = python(LORA_SCRIPT, *small_flags(model, clips, tmp_path / "stopped", *more))
    output = tmp_path / "stopped" / "lora"
    stop_at_every_moment(lambda moment: [Forked(command, moment)], output, shift)
    assert_same_run(output, tmp_path / "uninterrupted" / "lora")


# Every rank reaches these moments, because there are a second video and enough clips for two ranks. How many clips a
# rank encodes beyond its first one depends on the other rank, which takes what nobody has begun.
IN_PREPARATION = (r"read .*/text_encoder/config\.json", "unit caption", "unit clip")
RANK_MOMENTS: list[tuple[str, int, int | None]] = [
    *((moment, 1, None) for moment in IN_PREPARATION),
    ("unit micro-batch", 1, None),
    ("unit micro-batch", 3, 1),
    ("unit denoising step", 1, 3),
    ("unit decoded tile", 1, None),
    ("unit held-out loss", 1, None),
]


def saved_after(text: str) -> int | None:
    """Returns the step after which a run printed that it stopped, or None if it has not saved."""
    found = re.search(rf"stopped and saved after step (\d+) of \d+; {LINE}", text)
    return int(found[1]) if found else None


def steps_at(step: int, moment: str, hit: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the steps after which two ranks may stop. If only one gets a signal, the other may have begun to sum."""
    return (step, step + 1) if moment == "unit micro-batch" and len(hit) == 1 else (step,)


def has_printed(rank: Forked, text: str) -> bool:
    return rank.output.exists() and text in rank.output.read_text()


@pytest.mark.long
@pytest.mark.fault("signals: a signal to one or both of two ranks at named moments", times=len(RANK_MOMENTS))
@pytest.mark.parametrize("hit", [(0,), (1,), (0, 1)])
def test_ranks_stop_together_at_every_moment(model: Path, clips: Path, tmp_path: Path, hit: tuple[int, ...]) -> None:
    def ranks_of(name: str, moments: dict[int, Moment] | None = None) -> list[Forked]:
        flags = small_flags(model, clips, tmp_path / name, "--num_validation_videos", 2)
        return fork_ranks(2, python(LORA_SCRIPT, *flags), moments)

    begun = 0
    for place, (moment, nth, saved) in enumerate(RANK_MOMENTS):
        if moment == "unit clip":  # A rank without a signal may have prepared all clips by now.
            shutil.rmtree(tmp_path / "stopped" / "cache")
        # One rank may prepare everything before the other one begins, so the first one that does so gets the signal.
        signaled = range(2) if moment in IN_PREPARATION else hit
        moments = dict.fromkeys(signaled, (moment, nth, SIGNALS[place % len(SIGNALS)]))
        texts = [finish(rank, 75) for rank in ranks_of("stopped", moments)]
        assert not any("Traceback" in text for text in texts), moment
        stopped = saved_after(texts[0])
        if saved:
            first = begun + saved if moment == "unit micro-batch" else saved
            assert stopped in steps_at(first, moment, hit), texts[0][-3000:]
        begun = stopped or begun
    for name in ("stopped", "uninterrupted"):
        for rank in ranks_of(name):
            finish(rank)
    assert_same_run(tmp_path / "stopped" / "lora", tmp_path / "uninterrupted" / "lora")


@pytest.mark.slow
@pytest.mark.fault("signals: a signal while torch is imported")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_torch_is_imported(number: int, model: Path, tensors: Path, tmp_path: Path) -> None:
    process = start(python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "lora", "--load_tensors")))
    eventually(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), 60)
    process.send_signal(number)
    assert finish(process, 75).endswith(f"stopped; {LINE}\n")


@pytest.mark.fault("signals: a signal to one of two ranks, in an unfinished step")
@pytest.mark.parametrize(
    ("possible", "more"), [(steps_at(1, "unit micro-batch", (1,)), ()), ((2,), ("--sequence_parallel", 2))]
)
def test_one_of_two_ranks_stops_both_before_the_same_step(
    model: Path, tensors: Path, tmp_path: Path, possible: tuple[int, ...], more: tuple[object, ...]
) -> None:
    """If they divide the tokens of a sample, both need each other for the unfinished step, so they finish it."""

    def ranks_of(name: str, moments: dict[int, Moment] | None = None) -> list[Forked]:
        flags = lora_flags(model, tensors, tmp_path / name, "--load_tensors", "--max_train_steps", 4, *more)
        return fork_ranks(2, python(LORA_SCRIPT, *flags), moments)

    texts = [finish(rank, 75) for rank in ranks_of("stopped", {1: ("unit micro-batch", 3, TERM)})]
    step = saved_after(texts[0])
    assert step in possible
    assert (tmp_path / "stopped" / f"checkpoint-{step}").is_dir()
    for name in ("stopped", "uninterrupted"):
        for rank in ranks_of(name):
            finish(rank)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "uninterrupted")
    assert equal(weights(tmp_path / "stopped"), weights(tmp_path / "uninterrupted"))


@pytest.mark.slow
@pytest.mark.fault("signals: TERM to accelerate launch, which does not pass it on")
def test_a_launcher_that_is_terminated_leaves_no_orphan(model: Path, tensors: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    launcher = "-m accelerate.commands.launch --config_file accelerate_configs/cpu.yaml"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--checkpointing_steps", 5000)
    process = start([sys.executable, *launcher.split(), LORA_SCRIPT, *flags, "--max_train_steps", 5000])
    eventually(lambda: len(read_records(output / "metrics.jsonl")) >= 2, 120)
    process.send_signal(TERM)
    text, _ = process.communicate(timeout=60)  # This returns when the trainer has closed its output.
    assert LINE in text
    assert "A traceback of the launcher follows" not in text  # it has ended without one
    eventually(lambda: not alive_in_session(process.pid), 10)
    steps = len(losses(output))
    assert (output / f"checkpoint-{steps}").is_dir()
    assert train([*flags, "--max_train_steps", str(steps + 1)]) == 0


@pytest.mark.slow
@pytest.mark.fault("ranks: the launcher of both is killed while they train")
@pytest.mark.parametrize("number", [TERM, signal.SIGKILL])
def test_a_launcher_of_two_leaves_no_orphan(number: int, model: Path, tensors: Path, tmp_path: Path) -> None:
    """It has the store through which both agree on a last step. If it is killed, they end without a checkpoint."""
    output = tmp_path / "lora"
    launcher = "-m accelerate.commands.launch --config_file accelerate_configs/uncompiled_2.yaml --main_process_port"
    flags = lora_flags(model, tensors, output, "--load_tensors", "--checkpoints_total_limit", 2)
    command = [sys.executable, *launcher.split(), free_port(), LORA_SCRIPT, *flags, "--max_train_steps", 5000]
    process = start(command, ACCELERATE_USE_CPU="true")
    eventually(lambda: (output / "checkpoint-2").is_dir(), 120)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)  # This returns when the trainers have closed their output.
    if number == TERM:
        before, _, _ = text.partition("Traceback")
        assert "(A traceback of the launcher follows. It only says that this script ended with 75.)" in before
        assert before.count(LINE) == 1
    else:
        assert text.count("because one of them, or the launcher, has ended") == 2
        assert "raceback" not in text
    eventually(lambda: not alive_in_session(process.pid), 10)
    steps = max(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))
    assert train([*flags, "--gradient_accumulation_steps", "4", "--max_train_steps", str(steps + 1)]) == 0


@pytest.mark.fault("signals: the training process is killed or stopped while loader processes work")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (TERM, 75)])
def test_no_loader_process_survives(model: Path, tensors: Path, tmp_path: Path, number: int, status: int) -> None:
    more = ["--load_tensors", "--dataloader_num_workers", 2, "--max_train_steps", 500]
    command = python(LORA_SCRIPT, *lora_flags(model, tensors, tmp_path / "lora", *more))
    process = Forked(command, ("unit micro-batch", 3, number))
    finish(process, status)
    eventually(lambda: not alive_in_session(process.pid), 60)  # forking.py keeps torch from ending them


def alive_in_session(session: int) -> list[str]:
    """Returns the entries in /proc of the processes of a session that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            text = path.read_text()
            state, _, _, its = text.rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append(text)
    return found


def test_checkpoints_are_saved_after_minutes_too(model: Path, tensors: Path, reference: Path, tmp_path: Path) -> None:
    more = ["--load_tensors", "--max_train_steps", 3, "--checkpointing_steps", 1000, "--checkpoints_total_limit", 2]
    assert train(lora_flags(model, tensors, tmp_path / "lora", *more, "--save_every_minutes", 0)) == 0
    assert sorted(path.name for path in tmp_path.glob("lora/checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert losses(tmp_path / "lora") == losses(reference)[:3]
    assert train(lora_flags(model, tensors, tmp_path / "late", *more, "--save_every_minutes", 60)) == 0
    assert [path.name for path in tmp_path.glob("late/checkpoint-*")] == ["checkpoint-3"]


# -- several ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> tuple[Consensus, Consensus]:
    """Returns the Consensus of two ranks that share a store. The state of stopping.py is restored after the test."""
    monkeypatch.setattr(stopping, "_state", stopping._State())
    store = dist.HashStore()
    return Consensus(store), Consensus(store)


def ask_to_stop(asked: bool = True) -> None:
    stopping._state.asked = asked


def test_the_first_rank_decides(two: tuple[Consensus, Consensus]) -> None:
    first, second = two
    for step, (mine, other) in enumerate([(False, True), (True, False), (False, False), (True, True)]):
        assert first.commit(step, mine) is second.commit(step, other) is mine
    assert second.commit(4, True) is first.commit(4, False) is True


def test_a_step_that_a_rank_has_taken_is_taken_by_all(two: tuple[Consensus, Consensus]) -> None:
    first, second = two
    assert first.commit(0, save=False) is second.commit(0, save=False) is False
    assert first.commit(1, save=True)
    ask_to_stop()
    second.may_stop(1)  # The first rank already waits for the gradients of this step.
    assert second.commit(1, save=False)
    with pytest.raises(stopping.Stopped):
        second.may_stop(2)
    ask_to_stop(False)
    with pytest.raises(stopping.Stopped):
        first.commit(2, save=False)
    assert stopping.requested()  # This is the same as after a signal to this rank.


def test_a_rank_that_is_asked_in_a_step_that_all_take_stops_before_the_next(two: tuple[Consensus, Consensus]) -> None:
    """Ranks that divide samples agree before each step, where the other rank may always be the faster one."""
    first, second = two
    assert first.commit(0, save=False) is second.commit(0, save=False) is False
    ask_to_stop()
    assert not second.commit(0, save=False)
    ask_to_stop(False)
    with pytest.raises(stopping.Stopped):
        first.commit(1, save=False)
    with pytest.raises(stopping.Stopped):
        second.commit(1, save=False)


def test_one_rank_alone_decides_for_itself(two: tuple[Consensus, Consensus]) -> None:
    alone = Consensus(None)
    alone.may_stop(0)
    assert not alone.commit(0, save=False)
    assert alone.commit(1, save=True)
    ask_to_stop()
    with pytest.raises(stopping.Stopped):
        alone.may_stop(2)


RANKS = """
from cogvideox.runtime.ranks import Ranks, start_processes
def wait_in_vain(): time.sleep(60)
ranks = Ranks(start_processes(), float(sys.argv[1]))
ranks.wait_for_everyone()
ready()
if ranks.process_index == 1 and sys.argv[2] == "hang":
    wait_in_vain()
if ranks.process_index == 1:
    for _ in range(8): time.sleep(0.5); stopping.unit("a clip")
with stopping.phase("the evaluation after step 3"):
    ranks.wait_for_everyone()
"""


def two_ranks(folder: Path, patience: float, how: str) -> list[Forked]:
    (folder / "ranks.py").write_text(script_of(RANKS))
    return fork_ranks(2, python(folder / "ranks.py", patience, how))


@pytest.mark.fault("ranks: one of two hangs while the other waits in a barrier")
def test_a_rank_that_hangs_ends_all_with_their_stacks(tmp_path: Path) -> None:
    texts = [finish(rank, 1) for rank in two_ranks(tmp_path, 2, "hang")]
    rule = "no rank made progress for 2 s (--nccl_timeout) during"
    assert f"rank 0: {rule} the evaluation after step 3; this one waits for the others; give more seconds" in texts[0]
    assert f"rank 1: {rule} the start; this one last finished: start; give more seconds" in texts[1]
    assert "in wait_for_everyone" in texts[0]
    assert "in wait_in_vain" in texts[1]
    assert not any("no answer" in text for text in texts)


@pytest.mark.fault("ranks: one of two is suspended while both train")
def test_a_suspended_rank_is_named_with_the_step(model: Path, tensors: Path, tmp_path: Path) -> None:
    """The other rank waits in the sum of the gradients, which would wait for ever."""
    flags = lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--nccl_timeout", 5)
    ranks = fork_ranks(2, python(LORA_SCRIPT, *flags), {1: ("^unit micro-batch", 4, signal.SIGSTOP)})
    text = finish(ranks[0], 1)
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].wait()
    rule = "no rank made progress for 5 s (--nccl_timeout) during step 2; this one waits for the others"
    assert f"rank 0: {rule}; give more seconds if the work is only slow. Its threads:" in text
    assert "no answer from rank 1" in text


FROM_MAIN = """
from datetime import timedelta
from accelerate import PartialState
from cogvideox.runtime.ranks import Ranks
ranks = Ranks(PartialState(cpu=True, timeout=timedelta(seconds=1)), 60)
if ranks.is_main_process:
    time.sleep(4)
print(ranks.from_main(f"by {ranks.process_index}"))
"""


def test_no_rank_waits_for_the_main_one_in_a_collective_operation_of_training(tmp_path: Path) -> None:
    """Rank 0 needs four seconds, and the operations of an optimizer step may take one."""
    (tmp_path / "ranks.py").write_text(script_of(FROM_MAIN))
    for rank in fork_ranks(2, python(tmp_path / "ranks.py")):
        assert "by 0" in finish(rank)


def test_a_rank_that_makes_progress_is_waited_for(tmp_path: Path) -> None:
    for rank in two_ranks(tmp_path, 2, "work"):
        finish(rank)


SLOW_DISK = """
import shutil, torch
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from cogvideox import files, tensor_files
from cogvideox.optimizer import shard_files
from cogvideox.runtime import checkpoint_files, run
from cogvideox.runtime.ranks import Ranks, start_processes
ranks = Ranks(start_processes(), 2)
ranks.wait_for_everyone()
path, one = Path(sys.argv[1]), torch.ones(1)
path.touch()
def slowly(*_, **__):
    if int(sys.argv[2]): os.kill(os.getpid(), int(sys.argv[2]))
    time.sleep(3)
os.fsync = shutil.rmtree = tensor_files.write_hashed = slowly
run.open = lambda *_: slowly() or open(os.devnull, "a")
main = SimpleNamespace(output_dir=path.parent, accelerator=SimpleNamespace(log=lambda *_, **__: None))
shards = {"a": shard_files.Shard(one, one.shape)}
shared = partial(shard_files.write_shards, path, shards, True, shard_files.own_or_raise)
for work in (
    partial(files.fsync, path),
    partial(files.write_atomically, path, b""),
    partial(tensor_files.write_tensors, path, tensor_files.pieces_of({"a": one})),
    shared,
    partial(checkpoint_files.remove, path.with_name("checkpoint-1")),
    partial(run.write_metrics, main, {"step": 1}),
):
    if ranks.process_index == 1:
        work()
    ranks.wait_for_everyone()
"""


def two_at_a_slow_disk(folder: Path, number: int = 0) -> list[Forked]:
    """Starts two ranks. One waits for the disk, in which it may get a signal, and the other waits for it."""
    (folder / "ranks.py").write_text(script_of(SLOW_DISK))
    return fork_ranks(2, python(folder / "ranks.py", folder / "file", number))


def test_a_rank_that_waits_for_a_slow_disk_is_waited_for(tmp_path: Path) -> None:
    """Each call of the system takes three seconds, and a rank may go without progress for two."""
    for rank in two_at_a_slow_disk(tmp_path):
        finish(rank)


@pytest.mark.fault("ranks: one of two is suspended or killed while it waits for a slow disk")
@pytest.mark.parametrize(("number", "said"), [(signal.SIGSTOP, "no answer from rank 1"), (signal.SIGKILL, "by peer")])
def test_a_rank_that_is_lost_at_a_slow_disk_ends_the_other(tmp_path: Path, number: int, said: str) -> None:
    ranks = two_at_a_slow_disk(tmp_path, number)
    text = finish(ranks[0], 1)
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].wait()
    assert said in text


@pytest.mark.fault("signals: a signal to one of two ranks, while the other waits in a barrier")
def test_quit_prints_the_stacks_of_both_ranks_and_term_ends_them(tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path, 60, "hang")
    eventually(lambda: all(has_printed(rank, "ready") for rank in ranks), 60)
    ranks[0].send_signal(signal.SIGQUIT)
    eventually(lambda: has_printed(ranks[1], "in wait_in_vain"), 10)
    ranks[0].send_signal(TERM)
    texts = [finish(rank, 75) for rank in ranks]
    assert "in wait_for_everyone" in texts[0]
    assert [LINE in text for text in texts] == [True, False]


@pytest.mark.parametrize("ema", [(), ("--use_ema",)])
def test_the_time_to_save_all_weights_is_predicted_for_the_right_size(
    model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ema: tuple[str, ...]
) -> None:
    output = tmp_path / "sft"
    assert train_all(sft_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1, *ema)) == 0
    said = capsys.readouterr().err
    printed = re.search(r"saving a checkpoint, also when stopped, writes (.*) GiB and takes (\d+) s", said)
    assert printed
    written = sum(path.stat().st_size for path in (output / "checkpoint-1").rglob("*.safetensors"))
    assert float(printed[1]) * 2**30 == pytest.approx(written, rel=0.05)
    assert not list(output.glob(".*.tmp"))
