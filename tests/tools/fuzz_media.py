"""Damages media files at random. Each must give the right frames or a reason in one line, without a crash or a hang.

Small valid files are mutated. A child process with limits reads each of them, and the frames are compared with a plain
decode of the same file. `python tests/tools/fuzz_media.py --count 500 --seed 1` prints the outcomes, keeps the files
that failed, and exits with 1 if there are any.
"""

import argparse
import collections
import functools
import io
import multiprocessing
import random
import re
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import av
from av.stream import Disposition

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("training", "tests/shared")]

from numbered import COUNT, differ, encode, keyframes, number_in, plain, sequential, shown
from odd_files import CLIP_FRAMES, SIZE, Outcome, outcome_of, still, transparent, two_streams
from old_avi import dropped_by_encoder, packed, repeated

from cogvideox.data.media.pixels.decode import probe
from cogvideox.data.records import UNREADABLE
from cogvideox.errors import UsageError

SECONDS, MEMORY = 20, 2 << 30  # limits: seconds for one file, bytes for its process
BASES: dict[str, Callable[[], bytes]] = {
    "h264.mp4": lambda: plain("mp4", "libx264"),
    "h264.mkv": lambda: plain("matroska", "libx264"),
    "hevc.mp4": lambda: plain("mp4", "libx265"),
    "vp9.webm": lambda: plain("webm", "libvpx-vp9"),
    "av1.mp4": lambda: plain("mp4", "libsvtav1"),
    "mpeg4.avi": lambda: plain("avi", "mpeg4"),
    "mpeg2.ts": lambda: plain("mpegts", "mpeg2video"),
    "mjpeg.avi": lambda: plain("avi", "mjpeg"),
    # vp8 is left out: its decoder notices hardly any damage and keeps state over a seek, so damaged frames vary.
    "animated.gif": lambda: plain("gif", "gif"),
    "h264.3gp": lambda: plain("3gp", "libx264"),
    "h264.m2ts": lambda: encode("mpegts", muxer={"mpegts_m2ts_mode": "1"}),
    "h264.mts": lambda: encode("mpegts", sound=True),
    "mpeg2.vob": lambda: plain("vob", "mpeg2video"),
    "packed.avi": packed,
    "dropped.avi": dropped_by_encoder,
    "n_vops.avi": lambda: dropped_by_encoder(fill=True),
    "second_stream.mkv": lambda: two_streams("matroska", flags=(0, Disposition.default)),
    "alpha.mov": lambda: transparent("mov", "prores_ks", pix_fmt="yuva444p10le", options={"profile": "4444"}),
    "still.png": lambda: still("PNG"),
    "still.jpg": lambda: still("JPEG", quality=95),
}

BASES = {name: functools.cache(make) for name, make in BASES.items()}  # some encoders give different bytes each time
# The number that each picture shows, for containers whose packets have no times.
PLACES = {
    "packed.avi": range(COUNT),
    "dropped.avi": [repeated(place) for place in range(COUNT)],
    "n_vops.avi": [repeated(place) for place in range(COUNT)],
}
FIRST_NUMBER = {"second_stream.mkv": 100}

Mutation = Callable[[bytearray, random.Random], bytes | bytearray]
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
HEADER = 1024  # bytes


def span(data: bytearray, rng: random.Random, most: int = 256) -> tuple[int, int]:
    """Returns a random range of up to `most` bytes."""
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.randint(1, most))


def flip(data: bytearray, rng: random.Random, count: int, end: int) -> bytearray:
    """Changes one bit or more of `count` bytes before `end`."""
    for _ in range(count):
        data[rng.randrange(min(end, len(data)))] ^= rng.randint(1, 255)
    return data


def zero(data: bytearray, rng: random.Random) -> bytearray:
    """Overwrites a range with zeros."""
    start, end = span(data, rng)
    data[start:end] = bytes(end - start)
    return data


def repeat(data: bytearray, rng: random.Random) -> bytearray:
    """Repeats a range."""
    start, end = span(data, rng)
    return data[:end] + data[start:]


def remove(data: bytearray, rng: random.Random) -> bytearray:
    """Removes a range."""
    start, end = span(data, rng)
    return data[:start] + data[end:]


def insert(data: bytearray, rng: random.Random) -> bytearray:
    """Inserts random bytes."""
    start, end = span(data, rng, 64)
    return data[:start] + rng.randbytes(end - start) + data[start:]


def set_extreme(data: bytearray, rng: random.Random) -> bytearray:
    """Sets up to three numbers of a header to their smallest or largest value."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, min(HEADER, len(data)) - 4))
        size, order = rng.choice("HI"), rng.choice("<>")
        struct.pack_into(order + size, data, at, rng.choice(EXTREMES) & (0xFFFF if size == "H" else 0xFFFFFFFF))
    return data


MUTATIONS: dict[str, Mutation] = {
    "flip one": lambda data, rng: flip(data, rng, 1, len(data)),
    "flip some": lambda data, rng: flip(data, rng, rng.randint(2, 20), len(data)),
    "flip many": lambda data, rng: flip(data, rng, len(data) // 50 + 1, len(data)),
    "flip in header": lambda data, rng: flip(data, rng, rng.randint(1, 8), HEADER),
    "set in header": set_extreme,
    "cut off": lambda data, rng: data[: rng.randrange(len(data))],
    "zero": zero,
    "repeat": repeat,
    "remove": remove,
    "insert": insert,
    "swap halves": lambda data, rng: data[len(data) // 2 :] + data[: len(data) // 2],
}


@dataclass(frozen=True)
class Mutant:
    """One damaged file: its path, and how it was made."""

    path: Path
    base: str
    mutation: str

    @property
    def num_frames(self) -> int:
        return 1 if self.base.startswith("still") else CLIP_FRAMES


def mutants(count: int, seed: int, folder: Path) -> Iterator[Mutant]:
    """Yields `count` damaged files, with every base and mutation equally often. The seed determines them."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        base = list(BASES)[number % len(BASES)]
        mutation = list(MUTATIONS)[sum(divmod(number, len(BASES))) % len(MUTATIONS)]
        path = folder / f"{seed}_{number}_{base}"
        path.write_bytes(MUTATIONS[mutation](bytearray(BASES[base]()), rng))
        yield Mutant(path, base, mutation)


# In the child process


def serve(pipe: Connection) -> None:
    """Judges files from the pipe until there are no more."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while mutant := pipe.recv():
        kind, problem, outcome = read(mutant)
        pipe.send((kind, problem))  # the time that follows belongs to the reference, not to the reader
        if outcome is not None:
            pipe.send(judge(mutant, outcome))


def read(mutant: Mutant) -> tuple[str, str, Outcome | None]:
    """Reads one file. Returns the kind of outcome, its problem, and the outcome if it has frames to compare."""
    try:
        outcome = outcome_of(mutant.path, mutant.num_frames)
    except (MemoryError, UsageError) as error:  # the pool of workers reports the former
        is_memory = isinstance(error, MemoryError) or "Cannot allocate memory" in str(error)
        return ("no memory", "", None) if is_memory else ("stops the run", f"stops the run: {error}", None)
    except BaseException as error:
        return "raises", f"raises {type(error).__name__}: {error}", None
    if outcome.frames_FHWC is None:
        return kind_of(outcome.line, mutant.path), problem_of_line(outcome, mutant.path), None
    if outcome.frames_FHWC.shape != (mutant.num_frames, *SIZE, 3):
        return "frames", f"frames have the shape {outcome.frames_FHWC.shape}", None
    return "frames", "", outcome


def kind_of(line: str, path: Path) -> str:
    """Returns a reason without the file name and numbers, so that equal reasons can be counted."""
    reason = line.replace(f"{path}: ", "").replace(str(path), "FILE")
    return "line: " + re.sub(r"\(.*|b'.*|[\d.]+", "N", reason)[:60]


def problem_of_line(outcome: Outcome, path: Path) -> str:
    """Returns what is wrong with an error line."""
    if outcome.status == UNREADABLE and "Cannot allocate memory" not in outcome.line:
        return f"blames the file system: {outcome.line}"
    if not outcome.line.isprintable() or not outcome.line.startswith(f"{path}: "):
        return f"not one line that names the file: {outcome.line!r}"
    return ""


def judge(mutant: Mutant, outcome: Outcome) -> tuple[str, str]:
    """Compares frames with a plain decode of the same file. Returns what they are, and what is wrong with them."""
    assert outcome.frames_FHWC is not None
    numbers = [number_in(frame) for frame in outcome.frames_FHWC]
    kind = "frames as they were" if -1 not in numbers else "frames with damage that the codec does not see"
    if mutant.num_frames == 1:
        return kind, ""
    try:
        wrong = wrong_frames(mutant, outcome)
    except (av.FFmpegError, MemoryError) as error:
        return "frames without a reference", f"the reference fails: {error}"
    shows = ", ".join(f"frame {index} shows {number}" for index, number in zip(outcome.indices, numbers, strict=True))
    return kind, f"frames {wrong} are not those of a plain decode ({shows})" if wrong else ""


def wrong_frames(mutant: Mutant, outcome: Outcome) -> list[int]:
    """Returns the indices of frames that a plain decode, from the start or a keyframe, does not give at their times.

    Decoding from a keyframe counts because damage may make a frame refer to one before its keyframe. The number that
    the valid file shows at that time is right too, because damage may confuse only the plain decode. If packets have no
    times, a plain decode has none either, and its frames count at any time. A frame with pixels that the decoder leaves
    out, without an error, shows what was in memory before, and is not compared.
    """
    assert outcome.frames_FHWC is not None
    stream, in_places = stream_of(mutant.path), mutant.base in PLACES
    times, number_at = range(COUNT) if in_places else shown(mutant.path, stream), numbers_by_time(mutant.base)
    left = {
        index: frame
        for index, frame in zip(outcome.indices, outcome.frames_FHWC, strict=True)
        if number_in(frame) != number_at.get(times[index], -1)
    }
    for start in (0, *keyframes(mutant.path, stream)):
        decoded, again = (
            sequential(mutant.path, *SIZE, start, stream=stream, on_black=True, new_memory=new_memory) if left else []
            for new_memory in (False, True)
        )
        for index, frame in list(left.items()):
            unwritten = any(
                pts == times[index] and differ(pixels, others)
                for (pts, pixels), (_, others) in zip(decoded, again, strict=True)
            )
            equal = any((in_places or pts == times[index]) and not differ(frame, pixels) for pts, pixels in decoded)
            if unwritten or equal:
                del left[index]
    return list(left)


@functools.cache
def numbers_by_time(base: str) -> dict[int, int]:
    """Returns the number that the valid file shows at each timestamp or place."""
    if base in PLACES:
        return dict(enumerate(PLACES[base]))
    return {pts: number for number, pts in enumerate(shown(io.BytesIO(BASES[base]())), FIRST_NUMBER.get(base, 0))}


def stream_of(path: Path) -> int:
    """Returns the video stream that the library reads."""
    packets = probe(path).packets
    assert packets is not None
    return packets.stream


# In the parent process


class Judge:
    """Runs a child process that judges files, and replaces it when a file ends it."""

    def __init__(self) -> None:
        self.process: BaseProcess | None = None
        self.pipe: Connection

    def __call__(self, mutant: Mutant) -> tuple[str, str]:
        """Returns the kind of outcome, and what is wrong with it or an empty text."""
        if self.process is None:
            self._start()
        with suppress(ConnectionError):  # the answer shows whether the child has ended
            self.pipe.send(mutant)
        kind, problem = self._answer(SECONDS, "reader")
        if kind == "frames" and not problem:
            return self._answer(3 * SECONDS, "reference")
        return kind, problem

    def close(self) -> None:
        """Ends the child."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def _answer(self, seconds: float, who: str) -> tuple[str, str]:
        assert self.process is not None
        with suppress(EOFError, ConnectionError):
            if self.pipe.poll(seconds):
                kind, problem = self.pipe.recv()
                return kind, problem
            self.close()
            return f"{who} hangs", f"the {who} takes more than {seconds:g} s"
        self.process.join()
        code = self.process.exitcode or 0
        self.process = None
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return f"{who} crashes", f"the {who} ends its process by {name}"


def fuzz_media(count: int, seed: int, folder: Path, counts: collections.Counter[str] | None = None) -> list[str]:
    """Returns the problems of `count` damaged files. These files stay in `folder`, and `counts` gets the outcomes."""
    problems = []
    judge_one = Judge()
    try:
        for mutant in mutants(count, seed, folder):
            kind, problem = judge_one(mutant)
            if counts is not None:
                counts[kind] += 1
            if problem:
                problems.append(f"{mutant.path} ({mutant.base}, {mutant.mutation}): {problem}")
            else:
                mutant.path.unlink()
    finally:
        judge_one.close()
    return problems


def main() -> int:
    """Prints the counts and the problems. Returns 1 if there are problems."""
    parser = argparse.ArgumentParser(description="Damages media files at random and reads them.")
    parser.add_argument("--count", type=int, default=500, help="files")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other files")
    parser.add_argument("--folder", type=Path, help="where the files that fail are kept; a new one if not given")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fuzz_media_"))
    folder.mkdir(parents=True, exist_ok=True)
    counts: collections.Counter[str] = collections.Counter()
    problems = fuzz_media(arguments.count, arguments.seed, folder, counts)
    for kind, number in counts.most_common():
        print(f"{number:6} {kind}")
    print(*problems, f"{len(problems)} problems in {arguments.count} files; those are in {folder}", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
