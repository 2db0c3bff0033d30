"""Measures preparation at full size on a GPU: seconds per clip and caption, peak memory, differences in results.

    python benchmarks/prepare.py --results benchmarks/results
    python benchmarks/prepare.py --only ranks --gpus 1 2 --results benchmarks/results

A random VAE of the published size encodes a clip of 49x480x720, with diffusers' code and with the optimized code, with
and without tiles. The moments are compared with fp32 and with those of diffusers in bf16. One arm stores clips as
prepare_dataset.py does. A random T5-XXL embeds captions, on the device and streamed from the host. Each arm is printed
when it is finished. An arm that fails is recorded with its error, and an arm that would start too late is skipped. The
results are a JSON file only if no arm failed or was skipped; until then they are in a file that ends in .incomplete.

With --only ranks, prepare_dataset.py itself encodes clips from files, with as many processes as --gpus says, one after
the other. It takes more than three minutes for 1 and 2. "waited_for_clips" is the share of the time in which a process
waited for a decoded clip, so that its GPU had at most one clip to encode.
"""

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_models import ROOT, VAE, clip_size
from record import device_and_versions, write_result
from torch import Tensor

from cogvideox.data.cache import TensorCache
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.data.media.workers import Workers
from cogvideox.model import encode, models, t5_stream, vae_encoder
from cogvideox.preparation.encoding import one_behind

GIB = 2**30
DEVICE = torch.device("cuda")
TEXT_LENGTH, WIDTH = 226, 4096
T5_XXL = {"d_model": WIDTH, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
CAPTIONS = 64
CLIPS = 6  # number of clips of the arm that stores them
CLIPS_OF_RANK = 50  # number of clips for each process of the arms with several GPUs
VAE_ARMS = {  # name: (optimized, in tiles)
    "vae, stock": (False, False),
    "vae, optimized": (True, False),
    "vae, stock, tiled": (False, True),
    "vae, optimized, tiled": (True, True),
}


# -- arms --------------------------------------------------------------------------------------------------------------


class Arms:
    """Runs arms and records their figures."""

    def __init__(self, seconds: float, results: Path | None, name: str = "prepare") -> None:
        """Starts the clock of all arms.

        Args:
            seconds: No arm starts later than this after the first one.
            results: Folder for the results; None writes none.
            name: Name of the file of the results.
        """
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.begun, self.seconds, self.results = time.perf_counter(), seconds, results
        clip = "x".join(map(str, clip_size("5b")))
        self.table = {"clip": clip, "text_length": TEXT_LENGTH, **device_and_versions(), "arms": self.rows}

    def run(self, name: str, arm: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Runs an arm, unless no time is left."""
        row: dict[str, Any] = {"arm": name}
        elapsed = time.perf_counter() - self.begun
        if elapsed > self.seconds:
            row["error"] = f"left out: {elapsed:.0f} s have passed"
        else:
            try:
                row |= arm(*arguments)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            self._clean()
        row["at_s"] = round(time.perf_counter() - self.begun, 1)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.results:  # written after each arm, because compilation may use up the time
            write_result(self._incomplete(self.results), self.table)

    def finish(self) -> int:
        """Gives the results their name if all arms have succeeded; returns the exit status."""
        if any("error" in row for row in self.rows):
            return 1
        if self.results:
            self._incomplete(self.results).rename(self.results / f"{self.name}.json")
        return 0

    def _incomplete(self, results: Path) -> Path:
        """Returns the path of the results until all arms have succeeded."""
        return results / f"{self.name}.incomplete"

    def _clean(self) -> None:
        """Frees the memory and the compiled code of the previous arm."""
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def timed(run: Callable[[], Any], repeats: int = 5) -> dict[str, Any]:
    """Returns seconds of the first run, which compiles, and of later runs, and their peak memory in GiB."""
    first = seconds(run)
    torch.cuda.reset_peak_memory_stats()
    later = [seconds(run) for _ in range(repeats)]
    peak = {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "reserved_gib": torch.cuda.max_memory_reserved() / GIB}
    times = {"first_s": first, "median_s": statistics.median(later), "fastest_s": min(later)}
    return {name: round(value, 4) for name, value in (times | peak).items()}


def seconds(run: Callable[[], Any]) -> float:
    """Returns the seconds of a run, including the work of the device."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


# -- the VAE -----------------------------------------------------------------------------------------------------------


@contextmanager
def random_vae(dtype: torch.dtype, optimized: bool) -> Iterator[Any]:
    """Returns a VAE of the published size on the GPU, always with the same random weights."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    with DEVICE:
        vae = AutoencoderKLCogVideoX(**VAE).requires_grad_(False).eval()
    vae.to(dtype)
    torch.cuda.empty_cache()
    try:
        if optimized:
            vae_encoder.optimize_encoder(vae)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield vae
    finally:
        models.free_weights(vae)


def make_clip() -> np.ndarray:
    """Returns smooth moving colors with some noise, (F, H, W, 3), uint8."""
    frames, height, width = clip_size("5b")
    f, h, w = np.ogrid[:frames, :height, :width]
    waves = [np.sin(h / (40 + 9 * c) + w / (25 + 7 * c) + f / (5 + c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 8, (frames, height, width, 1))
    return (127.5 + 100 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


class VaeArms:
    """Runs the arms that encode one clip, and has the reference for their moments."""

    def __init__(self) -> None:
        """Creates the clip that all arms encode."""
        self.clip_FHWC = make_clip()
        self.known: dict[str, Tensor] = {}

    def reference(self) -> dict[str, Any]:
        """Returns the moments in fp32, encoded without tiles, which would change them."""
        with random_vae(torch.float32, optimized=False) as vae:
            return timed(lambda: self._keep("fp32", encode.video_moments(vae, self.clip_FHWC)), repeats=1)

    def arm(self, name: str) -> dict[str, Any]:
        """Runs one of VAE_ARMS in bf16."""
        optimized, tiled = VAE_ARMS[name]
        found: dict[str, Tensor] = {}
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with random_vae(torch.bfloat16, optimized) as vae:
            vae.use_tiling = tiled
            row = timed(lambda: found.update(moments=encode.video_moments(vae, self.clip_FHWC).cpu()))
        self._keep(name, found["moments"])
        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        return row | {f"from {other}": apart(found["moments"], of) for other, of in self.known.items() if other != name}

    def _keep(self, name: str, moments: Tensor) -> None:
        """Stores the moments of an arm on the host for comparison with others."""
        self.known[name] = moments.cpu()


def apart(moments: Tensor, reference: Tensor) -> dict[str, float]:
    """Returns the largest difference relative to the largest value, and the same ratio of root mean squares."""
    difference, reference = moments.double() - reference.double(), reference.double()
    largest = (difference.abs().max() / reference.abs().max()).item()
    return {"max": float(f"{largest:.3g}"), "rms": float(f"{(difference.norm() / reference.norm()).item():.3g}")}


def store(clip_FHWC: np.ndarray) -> dict[str, Any]:
    """Stores decoded clips in a cache; measures the device's time, and the host's time that it does not hide."""
    with tempfile.TemporaryDirectory() as folder, random_vae(torch.bfloat16, optimized=True) as vae:
        cache = TensorCache(Path(folder))

        def encoded(number: int) -> Iterator[encode.AsyncCopy]:
            """Encodes the clip a number of times; yields the copies to the host."""
            for _ in range(number):
                yield encode.AsyncCopy({"moments_CFHW": encode.video_moments(vae, clip_FHWC)})

        def stored(number: int) -> None:
            """Encodes the clip a number of times and stores each result in the cache."""
            for count, arriving in enumerate(one_behind(encoded(number))):
                cache.write(f"{count:04}", arriving.wait())

        stored(1)
        write = encode.AsyncCopy({"moments_CFHW": encode.video_moments(vae, clip_FHWC)}).wait()
        alone = seconds(lambda: cache.write("alone", write))
        row = timed(lambda: stored(CLIPS), repeats=1)
    return row | {"seconds_a_clip": round(row["median_s"] / CLIPS, 4), "write_s": round(alone, 4)}


# -- T5 ----------------------------------------------------------------------------------------------------------------


class Tokens:
    """Replaces a tokenizer: it returns random ids, padded as captions are."""

    def __init__(self) -> None:
        """Draws the token ids of all captions, (CAPTIONS, TEXT_LENGTH); later captions are longer."""
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 30000, (CAPTIONS, TEXT_LENGTH), generator=generator)
        for number in range(CAPTIONS):
            self.ids[number, 8 + 3 * number :] = 0

    def __call__(self, captions: list[str], **_: Any) -> Any:
        """Returns the token ids of captions, which are given by number."""
        return argparse.Namespace(input_ids=self.ids[[int(caption) for caption in captions]])


class T5Arms:
    """Runs the arms that embed captions with one encoder, first on the device, then streamed."""

    def __init__(self) -> None:
        """Creates T5-XXL with random bf16 weights on the device."""
        from transformers import T5Config, T5EncoderModel

        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with DEVICE:
                self.encoder = T5EncoderModel(T5Config(**T5_XXL, feed_forward_proj="gated-gelu"))
        finally:
            torch.set_default_dtype(torch.float32)
        self.encoder.requires_grad_(False).eval()
        self.tokens, self.known = Tokens(), torch.empty(0)

    def embed(self, number: int, at_once: int) -> Tensor:
        """Embeds the first captions."""
        names = [str(caption) for caption in range(number)]
        parts = [names[start : start + at_once] for start in range(0, number, at_once)]
        embeds = [encode.prompt_embeds(self.tokens, self.encoder, part, TEXT_LENGTH) for part in parts]
        return torch.cat(embeds)

    def arm(self, number: int, at_once: int) -> dict[str, Any]:
        """Embeds a number of captions in batches."""
        found: dict[str, Tensor] = {}
        row = timed(lambda: found.update(embeds=self.embed(number, at_once)), repeats=3)
        embeds = found["embeds"]
        if not len(self.known):
            self.known = embeds
        known = self.known[:number]
        row |= {"captions": number, "at_once": at_once, "finite": bool(torch.isfinite(embeds).all())}
        row |= {"seconds_a_caption": round(row["median_s"] / number, 5), "is_equal": torch.equal(embeds, known)}
        return row | {"from_one_by_one": apart(embeds, known)}

    def streamed(self, arms: Arms) -> dict[str, Any]:
        """Moves the blocks to the host, and runs the arms that stream them from there."""
        begun = time.perf_counter()
        with t5_stream.streamed(self.encoder, DEVICE, rows=1):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            move = time.perf_counter() - begun
            rest = torch.cuda.memory_allocated() / GIB
            arms.run("t5 streamed", self.arm, CAPTIONS, t5_stream.BATCHES_PER_PASS)
            arms.run("t5 streamed, one a pass", self.arm, 4, 1)
        return {"seconds_to_pin": round(move, 2), "resident_gib": round(rest, 3)}


def t5_arms(arms: Arms) -> dict[str, Any]:
    """Runs all arms of T5."""
    t5 = T5Arms()
    try:
        arms.run("t5 resident", t5.arm, CAPTIONS, 1)
        arms.run("t5 resident, 8 at once", t5.arm, CAPTIONS, 8)
        return t5.streamed(arms)
    finally:
        models.free_weights(t5.encoder)


# -- several GPUs ------------------------------------------------------------------------------------------------------


class RanksArms:
    """Runs the arms in which several processes prepare one folder, each on a GPU."""

    def __init__(self, folder: Path, vae: dict[str, Any] = VAE, size: tuple[int, int, int] | None = None) -> None:
        """Makes the tiny example pipeline with a VAE of the published size, and one clip.

        Args:
            folder: An empty folder for models, clips and tensors.
            vae: The config of the VAE.
            size: Frames, height and width of the clips.
        """
        from diffusers import AutoencoderKLCogVideoX

        self.folder, self.size = folder, size or clip_size("5b")
        self.rates: dict[int, float] = {}
        shutil.copytree(ROOT / "examples" / "model", folder / "model", ignore=lambda *_: ["vae"])
        torch.manual_seed(0)
        AutoencoderKLCogVideoX(**vae).to(torch.bfloat16).save_pretrained(folder / "model" / "vae")
        frames, height, width = self.size
        write_video(folder / "clip.mp4", make_clip()[:frames, :height, :width], 8)

    def arm(self, number: int) -> dict[str, Any]:
        """Prepares with a number of processes; returns the clips per second while all of them encode."""
        folder = self.folder / str(number)
        self._make_clips(folder, number * CLIPS_OF_RANK)
        spawn = multiprocessing.get_context("spawn")
        arguments = [(folder / f"{rank}.json", rank, number, self._flags(folder)) for rank in range(number)]
        processes = [spawn.Process(target=record_clips, args=given) for given in arguments]
        begun = time.perf_counter()
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        times, waits = zip(*(json.loads(path.read_text()) for path, *_ in arguments), strict=True)
        if sum(map(len, times)) != number * CLIPS_OF_RANK:
            raise RuntimeError(f"{sum(map(len, times))} of {number * CLIPS_OF_RANK} clips were encoded")
        self.rates[number] = rate = rate_together([*times])
        row = {"gpus": number, "clips": [len(own) for own in times], "clips_a_second": round(rate, 4)}
        waited = [share_inside(pauses, own) for pauses, own in zip(waits, times, strict=True)]
        row |= {"waited_for_clips": waited, "all_s": round(time.perf_counter() - begun, 1)}
        first = min(self.rates)
        return row | ({"times_as_fast": round(rate / self.rates[first], 4), "as": first} if number != first else {})

    def _make_clips(self, folder: Path, number: int) -> None:
        """Writes copies of the clip that differ in a box that decoders skip, so that each is encoded."""
        folder.mkdir()
        clip = (self.folder / "clip.mp4").read_bytes()
        for count in range(number):
            (folder / f"{count:03}.mp4").write_bytes(
                clip + (16).to_bytes(4, "big") + b"free" + count.to_bytes(8, "big")
            )
            (folder / f"{count:03}.txt").write_text("Waves of color.")

    def _flags(self, folder: Path) -> list[str]:
        """Returns the flags of prepare_dataset.py."""
        names = ("--frame_buckets", "--height_buckets", "--width_buckets")
        buckets = [text for name, value in zip(names, self.size, strict=True) for text in (name, str(value))]
        data = ["--model_id", self.folder / "model", "--data_root", folder, "--output_dir", folder / "tensors"]
        return [*map(str, data), *buckets, "--dtype", "bf16"]


def record_clips(path: Path, rank: int, number: int, flags: list[str]) -> None:
    """Runs prepare_dataset.py as one of a number of processes, and writes what it did when, in seconds.

    It writes when each clip was stored, and each time in which the process waited for a clip that workers decode.
    """
    import prepare_dataset

    from cogvideox import caches
    from cogvideox.config import args
    from cogvideox.config.options import PrepareOptions

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number))
    caches.use_caches()
    times: list[float] = []
    waits: list[tuple[float, float]] = []
    write, run = TensorCache.write, Workers.run

    def recorded(cache: TensorCache, key: str, tensors: dict[str, Tensor]) -> int:
        size = write(cache, key, tensors)
        if "moments_CFHW" in tensors:
            times.append(time.time())
        return size

    def waiting(workers: Workers, jobs: Iterable[tuple[object, ...]]) -> Iterator[Any]:
        results, end = run(workers, jobs), object()
        while True:
            begun = time.time()
            result = next(results, end)
            waits.append((begun, time.time()))
            if result is end:
                return
            yield result

    TensorCache.write, Workers.run = recorded, waiting  # type: ignore[method-assign,assignment]
    prepare_dataset.main(args.parse(PrepareOptions, None, flags, prepare_dataset.CHECKS))
    path.write_text(json.dumps([times, waits]))


def share_inside(pauses: list[list[float]], times: list[float]) -> float:
    """Returns the share of the time from the first to the last of some times that lies in pauses, given as pairs."""
    first, last = min(times), max(times)
    return round(sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in pauses) / (last - first), 3)


def rate_together(times: list[list[float]]) -> float:
    """Returns the sum of the rates of all processes in the time in which each of them encodes.

    Args:
        times: When each process stored its clips, in seconds.
    """
    begin, end = max(min(own) for own in times), min(max(own) for own in times)
    inside = [[when for when in own if begin <= when <= end] for own in times]
    return sum((len(own) - 1) / (max(own) - min(own)) for own in inside)


def ranks_arms(arms: Arms, numbers: list[int]) -> None:
    """Runs an arm for each number of GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = RanksArms(Path(folder))
        for number in numbers:
            arms.run(f"prepare_dataset.py on {number} GPUs", ranks.arm, number)


def main() -> int:
    """Runs the selected arms and writes their results; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=130, help="no arm starts after this time")
    parser.add_argument("--only", nargs="+", choices=("vae", "store", "t5", "ranks"), help="run only these arms")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs of the arm ranks")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    wanted = args.only or ("vae", "store", "t5")
    arms = Arms(args.seconds, args.results, "prepare_ranks" if wanted == ["ranks"] else "prepare")
    if "ranks" in wanted:
        ranks_arms(arms, args.gpus)
    vae = VaeArms() if {"vae", "store"} & set(wanted) else None
    if vae and "vae" in wanted:
        arms.run("vae, fp32", vae.reference)
        for name in VAE_ARMS:
            arms.run(name, vae.arm, name)
    if vae and "store" in wanted:
        arms.run("store", store, vae.clip_FHWC)
    if "t5" in wanted:
        arms.run("t5 on the host", t5_arms, arms)
    return arms.finish()


if __name__ == "__main__":
    sys.exit(main())
