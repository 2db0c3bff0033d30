"""Fixtures that the tests share, each made once a session: tiny pipelines, synthetic clips, clips of real footage."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chaos
import pytest
import quick_pictures

if TYPE_CHECKING:
    import numpy as np

# Before any library is imported, and inherited by the scripts that tests start.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
# What one run of the tests leaves makes the next one faster, but it does not belong among the caches of the user.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parents[1] / ".cache")
os.environ["MKL_CBWR"] = "AUTO"  # as the scripts do, before these tests call them in this process
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; threads that wait for each other cost more
if "COGVIDEOX_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the references are exact on a CPU only

# A shell ignores Ctrl-C for what it runs in the background, and what is ignored stays so in every process started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup for a closed terminal.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# What is imported stays; to look through it for garbage again and again takes a tenth of the time of an import.
gc.disable()

FAULTS = pytest.StashKey[dict[str, Any]]()  # of all collected tests, those too that pytest leaves out


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: one that begins last keeps one process busy while the others have nothing left.

    The tests of a file stay together, because each process that runs some of them makes what their fixtures share.
    """
    slow = {item.path for item in items if item.get_closest_marker("long") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    config.stash[FAULTS] = chaos.rows_of(items)
    for item in items:
        item.user_properties += [(chaos.FAULT, fault) for fault in chaos.faults_of(item)]


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """injected(n): the test injects its fault n times more than its mark says."""
    return lambda number: request.node.user_properties.append((chaos.MORE, number))


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Each part that is freed, and each script that ends, collects garbage. What is there by now would be looked
    through each time, for a quarter of the time of a run: half a million objects, most of them of libraries.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick_png() -> None:
    """Compresses PNG files lightly, here and in forked scripts."""
    quick_pictures.compress_lightly()


@pytest.fixture
def rendered() -> None:
    """For tests that look at the picture of a run's curves."""


@pytest.fixture(autouse=True)
def unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps runs in this process from drawing their curves, as forked ones do.

    Tests that look at the picture, and processes that are started and not forked, draw them.
    """
    if "cogvideox.runtime.curves" in sys.modules and "rendered" not in request.fixturenames:
        quick_pictures.leave_curves_blank(monkeypatch.setattr)


def schedule_as_usual() -> None:
    """SVT-AV1, with which tests encode, makes the process that calls it a real-time one where it may. Children inherit
    that, and a few that are busy then keep everything else from the cores.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    schedule_as_usual()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    schedule_as_usual()


# number of clips, width, height, frames per second, frames
SYNTHETIC = ((3, 96, 64, 8, 17), (2, 128, 96, 25, 60), (1, 64, 96, 30, 50))
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 210, 50),
    "white": (240, 240, 240),
    "purple": (150, 60, 180),
}


@pytest.fixture
def suspended() -> Iterator[Callable[[Any], Any]]:
    """suspended(process) waits until a process is stopped by SIGSTOP, and kills it at the end if it still runs."""
    from waiting import eventually

    processes: list[Any] = []

    def wait(process: Any) -> Any:
        processes.append(process)
        stat = Path(f"/proc/{process.pid}/stat")
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        return process

    yield wait
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """Connects this process with itself only, for code that needs the groups of torch.distributed."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that creates a tiny pipeline of a kind on first use. The session shares its folder."""
    from tiny_cogvideox import make_tiny

    root = tmp_path_factory.mktemp("tiny")
    return functools.cache(lambda kind: make_tiny(root / kind, kind))


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Returns the data set of examples/real_clips.py, cached between sessions. Fails if it cannot be downloaded."""
    from real_clips import DownloadError, make_clips

    cache = Path(os.environ.get("COGVIDEOX_TEST_CACHE") or Path.home() / ".cache" / "cogvideox-tests")
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with open(cache / ".lock", "w") as lock:  # parallel test processes share the cache
            fcntl.flock(lock, fcntl.LOCK_EX)
            return make_clips(cache / "real_clips")
    except DownloadError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a data set of six moving shapes (see SYNTHETIC): videos/00000.mp4 and so on, prompts.txt, videos.txt."""
    from real_clips import write_video

    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    sizes = [rest for number, *rest in SYNTHETIC for _ in range(number)]
    names = [f"videos/{index:05d}.mp4" for index in range(len(sizes))]
    for index, (name, color, (width, height, fps, frames)) in enumerate(zip(names, COLORS, sizes, strict=True)):
        write_video(folder / name, moving_shape(COLORS[color], index % 2 == 0, width, height, frames), fps)
    shapes = [f"A {color} {'square' if i % 2 == 0 else 'disc'} moves to the right." for i, color in enumerate(COLORS)]
    (folder / "prompts.txt").write_text("".join(f"{line}\n" for line in shapes))
    (folder / "videos.txt").write_text("".join(f"{line}\n" for line in names))
    return folder


def moving_shape(
    color: tuple[int, int, int], square: bool, width: int, height: int, frames: int
) -> Iterator[np.ndarray]:
    """Yields frames (H, W, 3) of a square or disc that crosses the picture from left to right on a gray slope."""
    import numpy as np

    rows, columns = np.mgrid[:height, :width]
    background = np.repeat((60 + 60 * rows / height).astype(np.uint8)[..., None], 3, axis=2)
    radius = min(width, height) // 5
    for index in range(frames):
        x = radius + (width - 2 * radius) * index / max(1, frames - 1)
        across, down = np.abs(columns - x), np.abs(rows - height / 2)
        inside = np.maximum(across, down) < radius if square else np.hypot(across, down) < radius
        yield np.where(inside[..., None], np.array(color, np.uint8), background)


@pytest.fixture(scope="session")
def model(tiny: Callable[[str], Path]) -> Path:
    """The tiny CogVideoX-5b. Read only."""
    return tiny("5b")


@pytest.fixture(scope="session")
def tensors(model: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of the synthetic clips. Read only."""
    from running import prepare

    folder = tmp_path_factory.mktemp("tensors")
    assert prepare(model, clips, folder, "--id_token", "TOKEN") == 0
    return folder


@pytest.fixture(scope="session")
def image_tensors(
    tiny: Callable[[str], Path], tensors: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same with two encodings of each first frame. All tiny models have one VAE and one T5. Read only."""
    from running import prepare

    folder = Path(shutil.copytree(tensors, tmp_path_factory.mktemp("image_tensors") / "out"))
    assert prepare(tiny("5b-i2v"), clips, folder, "--id_token", "TOKEN", "--num_image_noise_variants", 2) == 0
    return folder


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of another size than the tiny models'. Read only."""
    from PIL import Image

    path = tmp_path_factory.mktemp("image") / "an image.jpg"
    Image.effect_mandelbrot((150, 100), (-2, -1.2, 1, 1.2), 20).convert("RGB").save(path)
    return path


@pytest.fixture(scope="session")
def reference(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with a validation video. Read only."""
    from running import PROMPT, lora_flags, train

    output = tmp_path_factory.mktemp("reference") / "lora"
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT)) == 0
    return output


@pytest.fixture(scope="session")
def forking_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that runs a script as Python does, but in a forked process. It starts Python for code and modules."""
    import forked_python
    import running

    running.server()
    path = tmp_path_factory.mktemp("forking") / "python"
    forked = f"{sys.executable} {forked_python.__file__} {running.server_name()}"
    path.write_text(f'#!/bin/sh\ncase "$1" in -*) exec {sys.executable} "$@" ;; esac\nexec {forked} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """The tiny models are slower on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The frames of validation videos, uint8 (F, H, W, 3), by the "step-000000" of their names."""
    from cogvideox.evaluation import validation

    frames_of: dict[str, np.ndarray] = {}
    write = validation.write_video

    def kept(path: Path, frames: np.ndarray, fps: float) -> None:
        frames_of[path.name[:11]] = frames
        write(path, frames, fps)

    monkeypatch.setattr(validation, "write_video", kept)
    return frames_of


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Media files are read in this process: worker processes take half a second each to start."""
    from preparing import InlineWorkers

    from cogvideox.preparation import prepare

    monkeypatch.setattr(prepare, "worker_pool", lambda data, limits: InlineWorkers())
