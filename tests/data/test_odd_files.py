import functools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import schedule_as_usual
from numbered import COUNT, HEIGHT, RATE, WIDTH, differ, number_in, picture, plain, sequential
from odd_files import (
    BASES,
    CASES,
    COLORS,
    RAISES,
    SECTIONS,
    SIZE,
    TABLE,
    THEORA,
    VVC,
    Case,
    Outcome,
    make_and_read,
    part,
    table,
)
from PIL import Image

from cogvideox.data.media.pixels.decode import VideoError, probe, read_frames
from cogvideox.data.records import UNREADABLE

Read = Callable[[Case], tuple[Path, Outcome]]
FIXES = "run|re-encode|convert|save|copy|download|fix|repairs|add|cut|use|remove|list|check|write|make|replace|leave"
CONVERTED = ("Still images", "Transparency", COLORS)
VIDEOS = [case for title, cases in SECTIONS.items() if title not in CONVERTED for case in cases]


def named(cases: list[Case]) -> list[object]:
    return [pytest.param(case, id=case.name.replace("\n", "\\n")) for case in cases]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Returns a function that makes and reads the file of a case once, and returns its path and the outcome."""
    folder = tmp_path_factory.mktemp("odd")
    return functools.cache(lambda case: make_and_read(case, folder))


def test_names_of_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", named([case for case in CASES if case.numbers]))
@pytest.mark.fault("data: unusual media files that are read")
def test_the_right_frames_are_read_upright(case: Case, read: Read) -> None:
    _, outcome = read(case)
    assert outcome.line == ""
    assert outcome.frames_FHWC is not None
    assert outcome.frames_FHWC.shape == (case.num_frames, *SIZE, 3)
    assert tuple(number_in(frame, gray=case.gray) for frame in outcome.frames_FHWC) == case.numbers
    for number, frame in zip(case.numbers, outcome.frames_FHWC, strict=True):
        drawn = Image.fromarray(picture(number)).resize(SIZE[::-1], Image.Resampling.BOX)
        expected = np.asarray(drawn.convert("L").convert("RGB") if case.gray else drawn, float)
        assert (
            np.abs(frame - expected).mean() < 14
        )  # coding changes up to 13 (gif), and another number differs by at least 18


@pytest.mark.parametrize("case", named([case for case in VIDEOS if case.numbers]))
def test_the_pixels_are_those_of_a_plain_decode(case: Case, read: Read) -> None:
    path, outcome = read(case)
    assert outcome.frames_FHWC is not None
    decoded = [pixels for _, pixels in sequential(path, *SIZE, stream=case.stream)]
    by_number = {number_in(pixels, gray=case.gray): pixels for pixels in decoded}
    for number, frame in zip(case.numbers, outcome.frames_FHWC, strict=True):
        assert not differ(frame, by_number[number])


@pytest.mark.parametrize("case", named([case for case in CASES if not case.numbers]))
@pytest.mark.fault("data: media files that cannot be used")
def test_unusable_files_are_reported_in_one_line(case: Case, read: Read) -> None:
    path, outcome = read(case)
    assert outcome.line, f"frames {[number_in(frame) for frame in outcome.frames_FHWC]}"  # type: ignore[union-attr]
    assert outcome.status != RAISES
    assert (
        outcome.status != UNREADABLE
    )  # this status means that the file system refused access; such files are tried again in each run
    assert outcome.line.isprintable()
    assert Path(path.name.split("\n")[0]).stem in outcome.line
    found = re.search(case.line, outcome.line)
    assert found, f"no {case.line!r} in {outcome.line!r}"


@pytest.mark.parametrize("case", named([case for case in CASES if not case.numbers]))
def test_the_line_ends_with_a_fix(case: Case, read: Read) -> None:
    _, outcome = read(case)
    *_, fix = outcome.line.split("; ")
    found = re.search(rf"\b({FIXES})\b", fix)
    assert fix != outcome.line, f"no fix in {outcome.line!r}"
    assert found, f"no verb in {fix!r}"


@pytest.mark.parametrize("case", named([case for case in CASES if not case.numbers]))
def test_commands_can_be_given_to_a_shell(case: Case, read: Read) -> None:
    _, outcome = read(case)
    for command in re.findall("`([^`]+)`", outcome.line):
        subprocess.run(["bash", "-n", "-c", command], check=True)
        assert re.search(r"\b(IN|OUT)\b", command)


CUTS = [*BASES.items(), ("hevc", ("mp4", "libx265")), ("av1", ("webm", "libsvtav1")), ("mpg", ("mpeg", "mpeg2video"))]


@pytest.mark.parametrize(("kind", "base"), CUTS, ids=[kind for kind, _ in CUTS])
@pytest.mark.fault("data: truncated media files")
def test_no_frame_is_wrong_wherever_a_file_is_cut_off(tmp_path: Path, kind: str, base: tuple[str, str]) -> None:
    path = tmp_path / "cut"
    lines, frames = 0, 0
    for share in np.linspace(0.05, 0.995, 16):
        path.write_bytes(part(plain(*base), share))
        try:
            info = probe(path)
            numbers = [number_in(frame) for frame in read_frames(path, info, range(info.num_frames), *SIZE)]
        except VideoError:
            lines += 1
        else:
            assert numbers == [round(time * RATE) for time in info.times]
            frames += len(numbers)
    assert lines or frames < 16 * COUNT


def test_the_numbers_are_read_from_the_pixels() -> None:
    for number in (0, 5, 170, 255):
        assert number_in(picture(number)) == number
        turns = [np.rot90(picture(number), quarters) for quarters in (1, 2, 3)]
        assert {number_in(pixels) for pixels in turns} == {-1}
        assert {number_in(pixels[:, ::-1]) for pixels in [picture(number), *turns]} == {-1}
    assert number_in(np.zeros((HEIGHT, WIDTH, 3), np.uint8)) == -1


@pytest.mark.parametrize("path", [THEORA, VVC], ids=["theora", "vvc"])
def test_the_stored_files_show_the_pictures(path: Path) -> None:
    assert [number_in(pixels) for _, pixels in sequential(path, *SIZE)] == list(range(COUNT))


def test_the_page_in_docs_is_up_to_date(read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = table(tmp_path, lambda case, _: read(case))
    with capsys.disabled():
        print(f"\n{now}\n{TABLE}")
    position = re.compile(r"\b\d{4}\b")  # a position in a file depends on the version of FFmpeg that wrote the file
    page = TABLE.read_text(encoding="utf-8")
    assert position.sub("N", page) == position.sub("N", now), "run: python tests/tools/odd_files.py --write"


def test_real_time_scheduling_of_an_encoder_is_undone() -> None:
    """Otherwise tests of busy workers that run in parallel would never end; see conftest.py."""
    plain("webm", "libsvtav1")  # the encoder switches this process to real-time scheduling, if that is permitted
    schedule_as_usual()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
