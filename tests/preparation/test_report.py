"""Tests of report.py: what a preparation reports is compared with what it then does."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import prepare_dataset
import pytest
from PIL import Image
from preparing import preparation, tensor_files

from cogvideox.config.args import parse
from cogvideox.config.options import PrepareOptions
from cogvideox.data.cache import open_index
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.errors import UsageError
from cogvideox.preparation import pictures as pictures_module
from cogvideox.preparation import report

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("threads")
SIZE = ("--height_buckets", "32", "--width_buckets", "48")


@pytest.fixture
def configs(tiny: Tiny, tmp_path: Path) -> Path:
    """Makes a model folder without any weights."""
    for part in ("transformer", "vae", "scheduler", "tokenizer"):
        (tmp_path / "model" / part).mkdir(parents=True)
        for path in (tiny("5b") / part).glob("*[!s]"):
            shutil.copy(path, tmp_path / "model" / part)
    return tmp_path / "model"


@pytest.fixture
def data(clips: Path, tmp_path: Path) -> Path:
    """Returns a copy of the six clips, which a test may change."""
    return Path(shutil.copytree(clips, tmp_path / "data"))


def run(model: Path, data: Path, output: Path, *more: str) -> int:
    """Runs prepare_dataset.py without the checks of its flags, and returns the exit status."""
    argv = ["--model_id", str(model), "--data_root", str(data), "--output_dir", str(output), *SIZE, *more]
    return prepare_dataset.main(parse(PrepareOptions, None, argv))


def described(model: Path, data: Path, output: Path, costs: bool = False, **changes: Any) -> list[str]:
    """Returns the lines of the report on a data set."""
    made = preparation(model, data, output, **changes)
    return report.describe(made, made.plan(), costs).splitlines()


def test_a_dry_run_reads_no_weights_and_encodes_nothing(
    configs: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(configs, clips, tmp_path / "out", "--dry_run", "--frame_buckets", "9", "17") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["bucket", "clips", "variants", "enlarged", "stretched", "by", "cut", "off", "MiB"],
        ["9x32x48", "1", "1", "0", "125%", "0%", "0.0"],
        ["17x32x48", "5", "5", "0", "12%", "0%", "0.0"],
    ]
    assert lines[-2].startswith("hours are not known: ")
    assert lines[-1] == "next: the same command without --dry_run encodes this"
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_announced_bytes_are_written(
    tiny: Tiny, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny("5b"), clips, tmp_path, "--dry_run", "--frame_buckets", "5") == 0
    line = capsys.readouterr().out.splitlines()[-2]
    match = re.fullmatch(
        r"to encode: 6 variants of clips and 7 captions, ([\d.]+) MiB; the clips take about \d+ s on one cpu", line
    )
    assert match
    assert run(tiny("5b"), clips, tmp_path, "--frame_buckets", "5") == 0
    written = sum(map(len, tensor_files(tmp_path).values())) - 13 * 400  # headers
    assert float(match[1]) == pytest.approx(written / 2**20, abs=0.06)
    assert run(tiny("5b"), clips, tmp_path, "--dry_run", "--frame_buckets", "5") == 0
    assert capsys.readouterr().out.splitlines()[-2] == "to encode: 0 variants of clips and 0 captions, 0.0 MiB"


def test_the_costs_of_first_frames(tiny: Tiny, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image-to-video model gets first frames without a flag, another model with it; "false" omits them."""
    flags = ("--frame_buckets", "5", "--num_image_noise_variants", "3")
    assert run(tiny("5b"), clips, tmp_path, *flags) == 0
    capsys.readouterr()
    written = sum(map(len, tensor_files(tmp_path).values()))
    assert run(tiny("5b"), clips, tmp_path, *flags, "--save_image_latents", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(
        r"to encode: 0 variants of clips, 6 first frames 3 times each and 0 captions, [\d.]+ MiB", lines[-2]
    )
    size = float(lines[-2].split(" captions, ")[1].split()[0])
    plain, many = (described(tiny("5b-i2v"), clips, tmp_path, image_variants=k)[1].split()[-1] for k in (0, 300))
    assert float(many) - float(plain) == pytest.approx(100 * size, rel=0.5)
    assert run(tiny("5b-i2v"), clips, tmp_path, *flags) == 0
    added = sum(map(len, tensor_files(tmp_path).values())) - written - 6 * 400
    assert size == pytest.approx(added / 2**20, abs=0.06)
    assert open_index(tmp_path).image_variants == 3
    assert run(tiny("5b-i2v"), clips, tmp_path, *flags, "--save_image_latents", "false") == 0
    assert open_index(tmp_path).image_variants == 0
    assert len(open_index(tmp_path).samples) == 6


def test_the_table_shows_how_clips_are_resized(configs: Path, data: Path, tmp_path: Path) -> None:
    changes = {"height_buckets": (96,), "width_buckets": (96,), "video_reshape_mode": "center"}
    lines = described(configs, data, tmp_path / "out", **changes, num_augmentations=2)
    # The clips are 96x64, 128x96 and 64x96 (width x height); all but the second are enlarged 1.5 times.
    assert lines[1].split() == ["5x96x96", "6", "12", "4", "0%", "33%", "0.1"]


def test_dropped_clips_have_a_status_and_a_reason(configs: Path, data: Path, tmp_path: Path) -> None:
    (data / "videos/00000.mp4").write_text("not a video")
    lines = described(configs, data, tmp_path / "out", frame_buckets=(17,), height_buckets=(80,), width_buckets=(112,))
    assert "4 of 6 clips are used, and these are not:" in lines
    assert "1 cannot be read or trained on:" in lines
    assert "1 too short:" in lines
    assert any(re.match(r"  \S+00000.mp4: .*Invalid data", line) for line in lines)
    assert any(
        re.match(r"  \S+00005.mp4: 1.67 s give 14 frames .* but the shortest bucket has 17; add a shorter bucket", line)
        for line in lines
    )
    lines = described(configs, data, tmp_path / "out", height_buckets=(128,), width_buckets=(160,))
    assert "3 too small:" in lines
    wanted = "/videos/00001.mp4: 96x64 pixels would be enlarged 2.00 times, but --max_upscale allows 1.5; add a"
    assert any(wanted in line for line in lines)
    lines = described(configs, data, tmp_path / "out", height_buckets=(128,), width_buckets=(160,), max_upscale=2.5)
    assert lines[1].split()[:4] == ["5x128x160", "5", "5", "5"]


def test_captions_that_are_cut_are_named_the_longest_first(configs: Path, data: Path, tmp_path: Path) -> None:
    captions = (data / "prompts.txt").read_text().splitlines()
    captions[1], captions[4] = "a red square " * 20, "a red square " * 40
    (data / "prompts.txt").write_text("\n".join(captions))
    lines = described(configs, data, tmp_path / "out")
    (at,) = (number for number, line in enumerate(lines) if "captions are cut" in line)
    assert lines[at].startswith("2 captions are cut after 32 tokens")
    found = [re.fullmatch(r"  (\S+): (\d+) tokens", line) for line in lines[at + 1 : at + 3]]
    assert [match[1] for match in found if match] == ["videos/00004.mp4", "videos/00001.mp4"]
    assert all(match and int(match[2]) > 32 for match in found)
    assert not any("tokens" in line for line in lines[at + 3 :])


def test_frame_counts_that_inference_changes_are_reported(configs: Path, clips: Path, tmp_path: Path) -> None:
    lines = described(configs, clips, tmp_path / "out", frame_buckets=(8,))
    assert "8 frames are 2 latent frames, of which inference makes 8 frames" in lines


def test_a_validation_clip_that_is_trained_on_is_reported(
    configs: Path, clips: Path, data: Path, tmp_path: Path
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), np.uint8)
    write_video(data / "videos/00003.mp4", frames, 8)
    lines = described(configs, clips, tmp_path / "out", validation_data_root=(str(data),))
    assert "--validation_data_root: 5 clips are trained on too, so the loss is not a held-out loss:" in lines
    assert f"  {data / 'videos/00000.mp4'}" in lines
    assert not any("00003" in line for line in lines)


# -- what helps --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wall(tmp_path: Path) -> Path:
    """Makes 15 files without captions: 8 long clips, 5 clips of 7 frames, and 2 files that are not videos."""
    folder = tmp_path / "wall"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(13):
        shape = (64, 96, 3) if k % 3 else (96, 64, 3)
        frames = np.repeat(rng.integers(0, 256, (1, *shape), np.uint8), 20 if k < 8 else 7, axis=0)
        write_video(folder / f"IMG_{k:02d}.mp4", frames, 8)
    for k in (1, 2):
        (folder / f"junk{k}.mp4").write_text("not a video")
    return folder


def checked(model: Path, data: Path, output: Path, *more: str) -> int:
    """Runs prepare_dataset.py with the checks of its flags, and returns the exit status."""
    argv = ["--model_id", str(model), "--data_root", str(data), "--output_dir", str(output), *more]
    return prepare_dataset.main(parse(PrepareOptions, None, argv, prepare_dataset.CHECKS))


def test_a_dry_run_needs_no_captions(
    configs: Path, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table comes first, then each cause once, then what to do. Following the advice works."""
    flags = ("--train_resolution", "17x64x96")
    with pytest.raises(UsageError, match="has no caption; write it next to the clip"):
        checked(configs, wall, tmp_path / "out", *flags)
    with pytest.raises(UsageError) as caught:
        checked(configs, wall, tmp_path / "out", *flags, "--dry_run")
    (rule,) = caught.value.problems
    assert rule.startswith("--max_bad_fraction 0: 7 of 15 clips cannot be used; ")
    allowed = rule.rpartition(" ")[2]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["17x64x96", "8"]
    assert lines[2] == "8 of 15 clips are used, and these are not:"
    assert lines[3] == "5 too short:"
    assert sum("IMG_" in line for line in lines) == 3
    assert lines[7] == "  ... and 2 more for the same reason"
    assert lines[9] == "2 cannot be read or trained on:"
    steps = [line for line in lines if line.startswith("next: ")]
    assert [step.split(": ")[1] for step in steps] == [
        "write the captions, or let caption_dataset.py write them",
        "other buckets",
        "fix or remove the 7 clips that are not used, or continue without",
    ]
    assert "15 of 15 clips have none" in steps[0]
    shorter = lines[8].removeprefix("  to use them: ").split()
    assert shorter == ["--train_resolution", "17x64x96", "5x64x96"]
    assert checked(configs, wall, tmp_path / "out", *shorter, "--dry_run", "--max_bad_fraction", "0.2") == 0
    assert "13 of 15 clips are used, and these are not:" in capsys.readouterr().out.splitlines()
    assert checked(configs, wall, tmp_path / "out", *flags, "--dry_run", "--max_bad_fraction", allowed) == 0


def test_a_picture_among_videos_is_called_a_picture(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no duration that could be too short."""
    (tmp_path / "clips").mkdir()
    Image.new("RGB", (96, 64)).save(tmp_path / "clips" / "a.png")
    with pytest.raises(UsageError, match="no clip is left"):
        checked(configs, tmp_path / "clips", tmp_path / "out", "--train_resolution", "9x64x96", "--dry_run")
    rule = "is a single picture, but the shortest bucket has 9 frames; add a bucket of one frame"
    assert f"  {tmp_path}/clips/a.png: {rule}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("files", "where"),
    [
        ({}, "a file of the clip's name that ends in .txt, next to it, or into a table (docs/data.md)"),
        ({"metadata.csv": "video,start,end\n{0},0,1\n{0},1,2\n"}, "its row of {root}/metadata.csv"),
        ({"prompts.txt": "a cat\n\n", "videos.txt": "{0}\n{0}\n"}, "its row of {root}/prompts.txt"),
        ({"videos.txt": "{0}\n{0}\n"}, "its row of {root}/prompts.txt"),
    ],
    ids=["text files", "table", "list", "list that does not exist"],
)
def test_a_dry_run_says_where_the_captions_of_this_folder_belong(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], where: str
) -> None:
    """A text file next to a clip has no effect if the folder has a table or lists."""
    root = tmp_path / "clips"
    root.mkdir()
    write_video(root / "a.mp4", np.zeros((20, 64, 96, 3), np.uint8), 8)
    for name, text in files.items():
        (root / name).write_text(text.format("a.mp4"))
    checked(configs, root, tmp_path / "out", "--train_resolution", "1x64x96", "--dry_run")
    (step,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("next: write the captions, or let ")
    ]
    assert step.endswith(f" none; each goes into {where.format(root=root)}")


def test_suggested_buckets_fit_as_many_clips_as_announced(
    configs: Path, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(configs, wall, tmp_path / "out", "--suggest_buckets", "4") == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "13 of 15 clips fit these buckets; give this to prepare_dataset.py:"
    flags = said.out.split()
    assert flags[0] == "--train_resolution"
    assert 2 <= len(flags) - 1 <= 4
    assert not (tmp_path / "out").exists()
    assert checked(configs, wall, tmp_path / "out", *flags, "--dry_run", "--max_bad_fraction", "0.2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "13 of 15 clips are used, and these are not:" in lines
    assert not any("too" in line or "other buckets" in line for line in lines)


def test_small_clips_are_used_with_the_proposed_flag(
    configs: Path, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="no clip is left to train on; see the table"):
        checked(configs, wall, tmp_path / "out", "--train_resolution", "5x256x384", "--dry_run")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "  to use them: " in line]
    flags = line.removeprefix("  to use them: ").split()[:2]
    assert flags == ["--max_upscale", "6"]
    more = ("--train_resolution", "5x256x384", "--dry_run", "--max_bad_fraction", "0.2")
    assert checked(configs, wall, tmp_path / "out", *more, *flags) == 0


def test_the_table_is_shown_where_no_clip_is_left(configs: Path, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = preparation(configs, data, tmp_path / "out", frame_buckets=(49,), max_bad_fraction=1.0)
    with pytest.raises(UsageError, match="no clip is left"), report.failures_explained(made, said.append):
        made.check(made.plan())
    lines = said[0].splitlines()
    assert lines[0].split()[0] == "bucket"
    assert lines[1] == "0 of 6 clips are used, and these are not:"
    assert lines[-1].startswith("next: other buckets: 6 of 6 clips fit --train_resolution ")


# -- pictures ----------------------------------------------------------------------------------------------------------


def pictures(lines: list[str]) -> list[Path]:
    """Returns the paths of the contact sheets that a report names."""
    return [Path(line.removeprefix("picture: ")) for line in lines if line.startswith("picture: ")]


def test_one_contact_sheet_per_bucket_is_drawn_once(configs: Path, clips: Path, tmp_path: Path) -> None:
    first = pictures(described(configs, clips, tmp_path, frame_buckets=(9, 17)))
    assert [path.name.split("-")[0] for path in first] == ["9x32x48", "17x32x48"]
    for path in first:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 20
    before = {path: path.stat().st_mtime_ns for path in first}
    assert pictures(described(configs, clips, tmp_path, frame_buckets=(9, 17))) == first
    assert {path: path.stat().st_mtime_ns for path in first} == before
    (other,) = pictures(described(configs, clips, tmp_path, frame_buckets=(9,)))
    assert set((tmp_path / "preview").glob("*.png")) == {
        other,
        first[1],
    }  # the outdated sheet of the bucket was removed


def test_a_changed_caption_changes_the_contact_sheet(configs: Path, data: Path, tmp_path: Path) -> None:
    (first,) = pictures(described(configs, data, tmp_path / "out"))
    (data / "prompts.txt").write_text((data / "prompts.txt").read_text().replace("A ", "The "))
    (second,) = pictures(described(configs, data, tmp_path / "out"))
    assert first != second


def test_other_files_in_the_preview_folder_stay(configs: Path, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "preview").mkdir()
    (tmp_path / "preview" / "mine.png").write_bytes(b"mine")
    described(configs, clips, tmp_path)
    assert (tmp_path / "preview" / "mine.png").read_bytes() == b"mine"


def test_duration() -> None:
    assert [report.duration(s) for s in (0.4, 59, 60, 192, 3600, 8640)] == [
        *("0 s", "59 s", "1.0 min", "3.2 min", "1.0 hours", "2.4 hours")
    ]


def test_clips_that_do_not_decode_are_left_out_of_the_picture(
    configs: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        pictures_module, "contact_sheet", lambda rows, path, title: drawn.extend(row.label for row in rows)
    )
    real = pictures_module.draw_strip
    monkeypatch.setattr(
        pictures_module, "draw_strip", lambda path, variant: "damaged" if "00002" in str(path) else real(path, variant)
    )
    described(configs, data, tmp_path / "out")
    assert (tmp_path / "out/report.html").read_text().count("no picture: it does not decode") == 1
    assert [label.split(":")[0] for label in drawn] == [f"videos/0000{k}.mp4" for k in (0, 1, 3, 4, 5)]


def test_copies_and_repeats_share_their_bytes(configs: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "videos/00000.mp4", data / "videos/00001.mp4")
    size = {"height_buckets": (128,), "width_buckets": (192,), "max_upscale": 10.0, "frame_buckets": (9,)}
    once = described(configs, data, tmp_path / "out", **size)[1].split()
    thrice = described(configs, data, tmp_path / "out", **size, repeats=(3,))[1].split()
    assert (once[1], thrice[1]) == ("6", "18")
    assert once[-1] == thrice[-1] == f"{5 * 32 * 3 * 16 * 24 * 2 / 2**20:.1f}"


def test_videos_that_become_stills_are_reported(configs: Path, clips: Path, tmp_path: Path) -> None:
    lines = described(configs, clips, tmp_path / "out", frame_buckets=(1,))
    assert "1x32x48: 6 videos give one frame each; to train on motion give longer buckets too" in lines


def test_clips_of_which_little_is_trained_on_are_reported(configs: Path, data: Path, tmp_path: Path) -> None:
    """Of 100 frames at 8 per second, 9 are less than a tenth; 25 are not, nor 9 of them in each of two variants."""
    write_video(data / "videos/00001.mp4", np.zeros((100, 64, 96, 3), np.uint8), 8)
    flags: list[dict[str, Any]] = [{"frame_buckets": (9,)}, {"frame_buckets": (25, 9)}, {"frame_selection": "uniform"}]
    flags += [{"frame_buckets": (9,), "frame_selection": "random", "num_augmentations": 2}, {"frame_buckets": (1,)}]
    found = [
        [line for line in described(configs, data, tmp_path / "out", **given) if "is trained on" in line]
        for given in flags
    ]
    rule = "1 clip is much longer than what is trained on, which is less than 10% of the clip"
    fix = "split_scenes.py --max_scene_seconds 3 makes several clips of one"
    assert found == [[f"{rule}; {fix}"], [], [], [], []]
    rows = "".join(f"videos/00001.mp4,{start},{start + 2},a\n" for start in range(0, 12, 2))
    (data / "t.csv").write_text(f"video,start,end,caption\n{rows}")
    sections = described(configs, data, tmp_path / "out", frame_buckets=(9,), dataset_file="t.csv")
    assert not any("is trained on" in line for line in sections)


def test_clips_slower_than_the_sampled_rate_are_reported(configs: Path, data: Path, tmp_path: Path) -> None:
    """A clip with 6 frames per second repeats frames at 16. At --fps 6, or if spread over the clip, it repeats none."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), np.uint8)
    write_video(data / "videos/00001.mp4", frames, 6)
    (data / "prompts.txt").write_text("\n".join(f"A red square {number}." for number in range(6)))
    note = next(line for line in described(configs, data, tmp_path / "out", fps=16.0) if "frames are repeated" in line)
    assert note.startswith("3 clips have only 6 to 8 frames per second, and clips are sampled at 16, so ")
    assert "--fps 6 repeats none" in note
    for changes in ({"fps": 6.0}, {"frame_selection": "uniform"}, {"frame_buckets": (1,)}):
        assert not any("repeated" in line for line in described(configs, data, tmp_path / "out", **changes))


def test_captions_that_were_misread_are_reported(configs: Path, data: Path, tmp_path: Path) -> None:
    captions = ["a caf\u00c3\u00a9", *(f"A red square {number}." for number in range(5))]
    (data / "prompts.txt").write_text("\n".join(captions), encoding="utf-8")
    lines = described(configs, data, tmp_path / "out")
    assert '  videos/00000.mp4: "a caf\u00c3\u00a9" may mean "a caf\u00e9"' in lines


def test_notes_on_captions_count_used_clips_only(configs: Path, data: Path, tmp_path: Path) -> None:
    """A copy of a clip with the same caption is not counted, and neither is a clip that cannot be used."""
    shutil.copy(data / "videos/00000.mp4", data / "videos/00002.mp4")
    (data / "videos/00005.mp4").write_text("not a video")
    captions = ["A red square.", "\u732b", "A red square.", "\u72d7", "A blue disc.", "A blue disc."]
    (data / "prompts.txt").write_text("\n".join(captions))
    lines = described(configs, data, tmp_path / "out")
    assert any(line.startswith("2 captions have characters that T5 does not know") for line in lines)
    assert any(line.startswith("2 captions are written differently") for line in lines)
    assert not any("share" in line for line in lines)
    shutil.copy(data / "videos/00004.mp4", data / "videos/00005.mp4")
    write_video(data / "videos/00005.mp4", np.zeros((20, 64, 96, 3), np.uint8), 8)
    lines = described(configs, data, tmp_path / "out")
    assert '  "A blue disc.": 2 clips: videos/00004.mp4, videos/00005.mp4' in lines
