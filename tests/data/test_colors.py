"""HDR and wide-gamut clips come out as FFmpeg's zscale chain makes them; see hdr.py for how its pictures were made."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hdr import BT709, BT2020, HLG, PQ, TRANSFERS, lossless, reference, tagged_by_container, video
from numbered import HEIGHT, RATE, WIDTH, encode, number_in, plain, written
from PIL import Image

from cogvideox.config.buckets import Bucket
from cogvideox.data.clips import ClipRecipe, plan_clip
from cogvideox.data.media.colors.sdr import CONTAINER_MATRIX, ColorTags, SdrConverter
from cogvideox.data.media.faults import VideoError
from cogvideox.data.media.pixels.decode import probe, read_frames
from cogvideox.data.records import FAILED, ClipRecord
from cogvideox.preparation.report import color_notes, tag_command

LEVELS = 5  # of 255: the largest allowed difference in any channel of any pixel of a smooth picture
MEAN = 0.75


def placed(folder: Path, data: bytes) -> Path:
    path = folder / "clip"
    path.write_bytes(data)
    return path


def ffmpegs(name: str) -> np.ndarray:
    return np.asarray(Image.open(reference(name)))


@pytest.mark.parametrize("name", TRANSFERS)
@pytest.mark.parametrize("shrink", [1, 2, 4])
def test_pixels_are_those_of_ffmpeg(tmp_path: Path, name: str, shrink: int) -> None:
    """This holds at the size of the file and smaller; the unconverted picture differs far more."""
    path = placed(tmp_path, lossless(name))
    info = probe(path)
    height, width = info.height // shrink, info.width // shrink
    expected = np.asarray(Image.fromarray(ffmpegs(name)).resize((width, height), Image.Resampling.BOX)).astype(int)
    assert info.conversions == (name,)
    difference = np.abs(read_frames(path, info, [0], height, width)[0] - expected)
    assert difference.max() <= LEVELS
    assert difference.mean() <= MEAN
    plain_info = replace(info, conversions=())
    assert np.abs(read_frames(path, plain_info, [0], height, width)[0] - expected).mean() > 4 * MEAN


def test_white_and_half_white_have_the_levels_of_sdr(tmp_path: Path) -> None:
    """Gray of 203 cd/m2 and more is white; gray with half of that light has the SDR level of half the light."""
    for name in ("hlg", "pq"):
        for light, level in ((1.0, 255), (3.0, 255), (0.5, round(255 * 0.5 ** (1 / 2.4))), (0.0, 0)):
            path = placed(tmp_path, video(name, "matroska", "ffv1", [np.full((32, 32, 3), light)]))
            frame = read_frames(path, probe(path), [0], 32, 32)[0].astype(int)
            assert np.abs(frame - level).max() <= 1, (name, light)


def test_converting_in_strips_gives_the_same_pixels_as_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = placed(tmp_path, lossless("pq"))
    info = probe(path)
    in_strips = read_frames(path, info, [0], info.height, info.width)
    monkeypatch.setattr("cogvideox.data.media.colors.sdr._STRIP", 10_000)
    assert (read_frames(path, info, [0], info.height, info.width) == in_strips).all()


def test_light_is_clipped_before_it_is_averaged(tmp_path: Path) -> None:
    """If every second pixel is a bright glint, the average is that of the clipped light."""
    stripes = np.full((64, 64, 3), 0.1)
    stripes[:, ::2] = 40.0
    path = placed(tmp_path, video("pq", "matroska", "ffv1", [stripes], pix_fmt="yuv444p10le"))
    info = probe(path)
    full = read_frames(path, info, [0], 64, 64)[0].astype(float)
    half = read_frames(path, info, [0], 64, 32)[0]
    assert np.abs(half - (full[:, ::2] + full[:, 1::2]) / 2).max() <= 1


def test_enlarging_and_turning(tmp_path: Path) -> None:
    path = placed(tmp_path, video("hlg"))
    frame = read_frames(path, probe(path), [9], 2 * HEIGHT, 2 * WIDTH)[0]
    assert number_in(frame) == 9
    turned = replace(probe(path), rotation=90)
    assert number_in(np.rot90(read_frames(path, turned, [9], WIDTH, HEIGHT)[0], -1)) == 9


def test_conversions_of_color_tags() -> None:
    """Checks the names of conversions for sets of tags; 12 is P3, and 6 is SDR of standard definition."""
    named = {
        (HLG, BT2020): ("hlg",),
        (PQ, BT2020): ("pq",),
        (HLG, 2): ("hlg",),
        (PQ, 12): ("pq", "p3"),
        (PQ, BT709): ("pq", "bt709"),
        (14, BT2020): ("bt2020",),
        (1, BT2020): ("bt2020",),
        (13, 12): ("p3",),
        (1, BT709): (),
        (6, 6): (),
        (2, 2): (),
    }
    for (transfer, primaries), names in named.items():
        assert ColorTags(transfer, primaries, BT2020).conversions() == names


def test_gray_stays_gray_in_every_gamut() -> None:
    """White of each gamut becomes white, and colors of bt709 do not change."""
    frame = av.VideoFrame.from_ndarray(np.full((8, 8, 3), 128, np.uint8), format="rgb24")
    for names in (("bt2020",), ("p3",), ("pq", "bt709")):
        shown = SdrConverter(names)(frame, 8, 8).to_ndarray()
        assert np.ptp(shown) <= 1, names


def test_ordinary_files_are_left_alone(tmp_path: Path) -> None:
    path = placed(tmp_path, plain())
    assert probe(path).conversions == ()
    frame = av.VideoFrame(16, 16, "yuv420p")
    assert SdrConverter(())(frame, 8, 8) is frame
    assert SdrConverter(("alpha on black",))(frame, 8, 8) is frame


def test_the_matrix_of_the_container_is_used(tmp_path: Path) -> None:
    """It is used if the stream has no tags, for example because only the container was edited."""
    tagged = placed(tmp_path, video("hlg"))
    frames = read_frames(tagged, probe(tagged), range(3), HEIGHT, WIDTH)
    path = placed(tmp_path, tagged_by_container(video("hlg", tagged=False), "hlg"))
    info = probe(path)
    assert info.conversions == ("hlg", CONTAINER_MATRIX)
    assert (read_frames(path, info, range(3), HEIGHT, WIDTH) == frames).all()


@pytest.mark.parametrize("matrix", [14, 15])
def test_colors_of_dolby_are_refused(matrix: int) -> None:
    with pytest.raises(VideoError, match=r"Dolby Vision colors .*; convert it to HLG"):
        ColorTags(PQ, BT2020, matrix).check("hvc1")


@pytest.mark.parametrize("matrix", [8, 10, 11, 12, 13, 16, 17])
def test_matrices_that_are_not_converted_are_refused_with_the_fix(matrix: int) -> None:
    with pytest.raises(
        VideoError, match=r"has the color matrix .*; re-encode it: `ffmpeg .* zscale=matrix=709 OUT.mp4`"
    ):
        ColorTags(1, 1, matrix).check("avc1")


def test_pixels_that_do_not_convert_are_an_error_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise one file would end the preparation, because an error of the system may pass with another attempt."""
    monkeypatch.setattr(ColorTags, "check", lambda *_: None)
    path = placed(tmp_path, encode("mp4", options={"x264-params": "colormatrix=YCgCo"}, pix_fmt="yuv444p"))
    with pytest.raises(VideoError, match=rf"^{re.escape(str(path))}: cannot be read: .*; .* re-encode it$"):
        read_frames(path, probe(path), [0], HEIGHT, WIDTH)


def test_decord_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    path = placed(tmp_path, video("hlg", codec="libx265"))
    with pytest.raises(VideoError, match=r"decord does not do what its frames need \(hlg\); use --video_reader pyav"):
        read_frames(path, probe(path), [0], HEIGHT, WIDTH, reader="decord")


def planned(path: Path) -> ClipRecord:
    return plan_clip(path, ClipRecipe((Bucket(1, 32, 48),), RATE, "middle", 0, 0, "none", 0.0, 1, 0))


def large(codec: str = "libx264") -> bytes:
    """Returns a 720p picture without a color matrix."""
    return encode("mp4", codec, [np.full((720, 1280, 3), (200, 60, 40), np.uint8)] * 3)


def matrix_named(data: bytes, codec: str) -> bytes:
    """Returns what the command for a codec makes of an mp4."""
    filter_ = tag_command(codec).split("-bsf:v ")[1].split(" ")[0]

    def fill(output: Any) -> None:
        with av.open(io.BytesIO(data)) as source:
            stream = source.streams.video[0]
            out = output.add_stream_from_template(stream)
            filters = av.bitstream.BitStreamFilterContext(filter_, stream, out)
            for packet in source.demux(stream):
                for filtered in filters.filter(packet if packet.size else None):
                    filtered.stream = out
                    output.mux(filtered)

    return written("mp4", fill)


@pytest.mark.parametrize(("encoder", "codec"), [("libx264", "h264"), ("libx265", "hevc"), ("libvpx-vp9", "vp9")])
def test_files_without_a_matrix_are_counted_and_the_command_names_it(tmp_path: Path, encoder: str, codec: str) -> None:
    """bt601 is assumed for all sizes. Players assume it for standard definition too, so nothing is printed for that."""
    small = planned(placed(tmp_path, plain()))
    assert small.probed.matrix_is_assumed
    assert list(color_notes([small])) == []
    path = placed(tmp_path, large(encoder))
    record = planned(path)
    (line,) = color_notes([record, small])
    assert line.startswith("1 clip is of 720p or more without a color matrix: bt601 is assumed, as by decord")
    assert line.endswith(f"so name that: {tag_command(codec)}")
    assumed = read_frames(path, probe(path), [0], 32, 32)[0, 16, 16].astype(int)
    path.write_bytes(matrix_named(path.read_bytes(), codec))
    record = planned(path)
    assert not record.probed.matrix_is_assumed
    assert list(color_notes([record])) == []
    changed = read_frames(path, probe(path), [0], 32, 32)[0, 16, 16].astype(int)
    assert np.abs(changed - assumed).max() > 5
    assert np.abs(assumed - (200, 60, 40)).max() <= 3  # the encoder used bt601 without a tag, as many do


def test_the_command_encodes_again_where_no_filter_names_the_matrix() -> None:
    assert tag_command("mpeg4") == "`ffmpeg -i IN -vf setparams=colorspace=bt709 OUT.mp4` (mpeg4)"


def test_one_line_counts_what_is_converted(tmp_path: Path) -> None:
    records = [planned(placed(tmp_path, lossless(name))) for name in ("hlg", "hlg", "pq", "bt2020")]
    assert [record.probed.conversions for record in records[1:]] == [("hlg",), ("pq",), ("bt2020",)]
    done = "converted to SDR with 203 cd/m2 as white; brighter parts are clipped"
    assert list(color_notes(records)) == [
        f"3 clips are HDR (2 HLG, 1 PQ): {done}",
        "1 clip is SDR with colors of bt2020 or P3: converted to bt709",
    ]
    assert list(color_notes(records[:1])) == [f"1 clip is HDR (1 HLG): {done}"]
    assert list(color_notes([ClipRecord("", "", FAILED, "x")])) == []
