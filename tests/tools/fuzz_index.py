"""Damages data sets of every form at random. The library must agree with an independent reader, or report a problem.

python tests/tools/fuzz_index.py --count 5000 --seed 1
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("training", "tests/shared")]

from cogvideox.config.flags import DataFlags
from cogvideox.data.forms.samples import Sample, read_samples
from cogvideox.errors import UsageError

SECONDS = 20.0  # for one data set
CLIPS = tuple(f"clips/{k}.mp4" for k in range(8))
WORDS = ("dog", "caf\u00e9", "\U0001f436", "a, b", 'said "no"', "two\nlines", "tab\there", "$(x)", "#2", "nan", "1.5")
JUNK = (
    b"\0",
    b'"',
    b'"',
    b"\r",
    b"\n",
    b"\r\n",
    b'"',
    b",",
    b"\t",
    b"\xff\xfe",
    b"\xe9",
    b"\xef\xbb\xbf",
    b"\\ud83d",
    b"[",
    b"}",
)

Rows = list[tuple[str, str, str | None]]  # path, caption, image
Outcome = tuple[str, str | None]  # the outcome, and what is wrong with it


class TooSlow(BaseException):
    """Reports a timeout. It is not an Exception, so that the code under test cannot catch it."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TooSlow within the context after a number of seconds."""

    def ring(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- valid data sets: each writes its files and returns their names, and the flags --


def make_rows(draw: random.Random, one_line: bool) -> Rows:
    """Returns rows whose captions contain the number of the row, so that a caption in another row is noticed."""
    rows: Rows = []
    for row in range(draw.randint(1, 8)):
        words = " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))
        rows.append((draw.choice(CLIPS), f"{row} {words.replace(chr(10), ' ') if one_line else words}", "clips/0.mp4"))
    return rows


def write_lists(root: Path, draw: random.Random) -> tuple[list[str], dict[str, Any]]:
    rows = make_rows(draw, one_line=True)
    names = ["prompts.txt", "videos.txt", "images.txt"][: draw.choice((2, 3))]
    end = draw.choice(("\n", "\r\n"))
    for name, column in zip(names, (1, 0, 2), strict=False):
        (root / name).write_bytes("".join(f"{row[column]}{end}" for row in rows).encode())
    return names, draw.choice(({}, {"caption_column": "prompts.txt"}))


def write_csv(root: Path, draw: random.Random) -> tuple[list[str], dict[str, Any]]:
    name = draw.choice(("metadata.csv", "t.csv", "t.tsv"))
    text = io.StringIO(newline="")
    writer = csv.writer(
        text, delimiter="\t" if name.endswith("tsv") else ",", lineterminator=draw.choice(("\n", "\r\n"))
    )
    writer.writerows([("video", "text", "image"), *make_rows(draw, one_line=False)])
    (root / name).write_bytes(text.getvalue().encode())
    return [name], {} if name == "metadata.csv" else {"dataset_file": name}


def write_json(root: Path, draw: random.Random) -> tuple[list[str], dict[str, Any]]:
    name = draw.choice(("metadata.jsonl", "t.jsonl", "t.json"))
    rows = [{"n": 1, "video": video, "text": text} for video, text, _ in make_rows(draw, one_line=False)]
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows]
    (root / name).write_text("[" + ",\n".join(lines) + "]" if name == "t.json" else "\n".join(lines), encoding="utf-8")
    return [name], {} if name == "metadata.jsonl" else {"dataset_file": name}


def write_pairs(root: Path, draw: random.Random) -> tuple[list[str], dict[str, Any]]:
    names = [f"clips/{k}.txt" for k in range(len(CLIPS))]
    for name, (_, text, _) in zip(names, itertools.cycle(make_rows(draw, one_line=False)), strict=False):
        (root / name).write_bytes(f"{name} {text}\n".encode())
    return names, {}


# -- what an independent reader sees: raises where the files are not valid --


def text_of(file: Path) -> str:
    data = file.read_bytes()
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if marked else "utf-8-sig").replace("\r\n", "\n")


def see_lists(root: Path, names: list[str]) -> Rows:
    lists = [[line.strip() for line in text_of(root / name).rstrip().split("\n")] for name in names]
    captions, videos, *images = lists
    return list(zip(videos, captions, images[0] if images else [None] * len(videos), strict=True))


def see_table(root: Path, names: list[str]) -> Rows:
    (name,) = names
    text = text_of(root / name)
    if name.endswith(".json"):
        rows = json.loads(text, parse_float=str, parse_int=str)
    elif name.endswith(".jsonl"):
        rows = [json.loads(line, parse_float=str, parse_int=str) for line in text.split("\n") if line.strip()]
    else:
        header, *cells = [
            row
            for row in csv.reader(io.StringIO(text, newline=""), dialect_of(name), strict=True)
            if row not in ([], [" "])
        ]
        rows = [dict(zip([name.strip() for name in header], row, strict=True)) for row in cells]
    return [(cell(row, VIDEO), cell(row, CAPTION), cell(row, ("image",)) if "image" in row else None) for row in rows]


VIDEO, CAPTION = ("video", "file_name", "video_path", "path"), ("text", "caption", "prompt")


def dialect_of(name: str) -> str:
    return "excel-tab" if name.endswith(".tsv") else "excel"


def cell(row: dict[str, Any], names: tuple[str, ...]) -> str:
    value = next(row[name] for name in names if name in row)
    assert isinstance(value, str)
    return value.strip()


def see_pairs(root: Path, names: list[str]) -> Rows:
    return [(name.replace(".txt", ".mp4"), text_of(root / name).strip(), None) for name in names]


Writer = Callable[[Path, random.Random], tuple[list[str], dict[str, Any]]]
FORMS: tuple[tuple[Writer, Callable[[Path, list[str]], Rows]], ...] = (
    (write_lists, see_lists),
    (write_csv, see_table),
    (write_json, see_table),
    (write_pairs, see_pairs),
)


# -- damage --


def damage(data: bytes, draw: random.Random) -> bytes:
    """Applies one random change."""
    at, end = sorted(draw.choices(range(len(data) + 1), k=2))
    lines = data.split(b"\n")
    line, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(9)
    if kind == 0 and data:  # flip a bit
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:at] + draw.randbytes(draw.randint(1, 40)) + data[at:]
    if kind == 4:
        lines.insert(other, lines[line])
    elif kind == 5:
        lines.pop(line)
    elif kind == 6:
        lines[line], lines[other] = lines[other], lines[line]
    elif kind == 7 and draw.random() < 0.2:
        return draw.randbytes(draw.randint(0, 300))
    else:
        return data[:at] + draw.choice(JUNK) + data[at:]
    return b"\n".join(lines)


def make_case(root: Path, draw: random.Random) -> tuple[list[str], dict[str, Any], Callable[[], Rows], bool]:
    """Makes a data set. Returns its files, its flags, its independent reader, and whether it is damaged."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "clips").mkdir(parents=True)
    for clip in CLIPS:
        (root / clip).touch()
    write, see = draw.choice(FORMS)
    names, flags = write(root, draw)
    changes = draw.choice((0, 1, 1, 1, 2, 5))
    for _ in range(changes):
        file = root / draw.choice(names)
        file.write_bytes(damage(file.read_bytes(), draw))
    return names, flags, lambda: see(root, names), changes > 0


# -- the verdict --


def judge(root: Path, flags: dict[str, Any], see: Callable[[], Rows], damaged: bool) -> Outcome:
    """Reads one data set. Returns the outcome, and what is wrong with it."""
    try:
        with alarm(SECONDS):
            samples = read_samples(DataFlags(data_root=(str(root),), **flags))
    except UsageError as error:
        fault = judge_problems(error.problems, root)
        return "problems", fault if damaged else f"a valid data set is refused: {error.problems[0]}"
    except TooSlow:
        return "too slow", f"took more than {SECONDS} s"
    except Exception as error:
        return "crash", f"raised {error!r}"
    return "samples", judge_samples(samples, see, root)


def judge_problems(problems: tuple[str, ...], root: Path) -> str | None:
    if not any(str(root) in problem or "--" in problem for problem in problems):
        return f"no problem names a file or a flag: {problems}"
    bad = [problem for problem in problems if not problem or not problem.isprintable() or len(problem) > 500]
    return f"not one printable line: {bad[0][:600]!r}" if bad else None


def judge_samples(samples: list[Sample], see: Callable[[], Rows], root: Path) -> str | None:
    """Compares samples with the independent reader: each caption must belong to its clip. Clips are in lower case."""
    try:
        rows = see()
    except Exception as error:
        return f"{len(samples)} samples of a file that {error!r}"
    expected = [
        (root / video.lower(), caption, root / image.lower() if image else None) for video, caption, image in rows
    ]
    found = [(Path(sample.video), sample.caption, Path(sample.image) if sample.image else None) for sample in samples]
    if len({sample.id for sample in samples}) < len(samples):
        return "two samples have one id"
    if not all(os.path.isfile(sample.video) and sample.caption for sample in samples):
        return "a sample has no video or no caption"
    return None if found == expected else f"read {found}, but the files say {expected}"


def run_cases(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Yields the outcome of each case. A problem names the seed that reproduces it."""
    for case in range(seed, seed + count):
        root = folder / "data"
        names, flags, see, damaged = make_case(root, random.Random(case))
        outcome, fault = judge(root, flags, see, damaged)
        yield outcome, f"seed {case}: {' '.join(names)}: {fault}" if fault is not None else None


def fuzz_indexes(count: int, seed: int, folder: Path) -> list[str]:
    """Reads ``count`` damaged data sets, made in ``folder``, and returns the problems."""
    return [fault for _, fault in run_cases(count, seed, folder) if fault is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(run_cases(flags.count, flags.seed, Path(folder)))
    print(*(f"{name}: {number}" for name, number in Counter(name for name, _ in outcomes).items()), sep="\n")
    faults = [fault for _, fault in outcomes if fault is not None]
    print(*faults, f"faults: {len(faults)}", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
