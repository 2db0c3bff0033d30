import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from cogvideox.data.media.transforms import Fit, apply_fit, fit, fit_image, resize_factor, stretch

SIZES = [(720, 1280, 480, 720), (1280, 720, 480, 720), (480, 720, 480, 720), (33, 1001, 64, 64), (100, 150, 480, 720)]


def coordinates(num_frames: int, height: int, width: int) -> np.ndarray:
    """Returns frames in which each pixel holds its frame, row and column."""
    return np.stack(np.meshgrid(*map(np.arange, (num_frames, height, width)), indexing="ij"), -1).astype(np.uint8)


def test_none_resizes_to_the_bucket():
    assert fit(720, 1280, 480, 720, "none") == Fit(480, 720, 0, 0, 480, 720, False)


def test_center_covers_and_cuts_the_middle():
    assert fit(720, 1280, 480, 720, "center") == Fit(480, 853, 0, 66, 480, 720, False)
    assert fit(1280, 720, 480, 720, "center") == Fit(1280, 720, 400, 0, 480, 720, False)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 1e-12])
def test_the_crop_is_inside_and_one_side_fits_exactly(sizes, draw):
    plan = fit(*sizes, "random", draw, draw)
    assert plan.resize_height == sizes[2] or plan.resize_width == sizes[3]
    assert 0 <= plan.top <= plan.resize_height - plan.height
    assert 0 <= plan.left <= plan.resize_width - plan.width
    assert stretch(plan, *sizes[:2]) == pytest.approx(1, abs=0.01)


def test_random_reaches_both_edges_evenly():
    draws = [k / 1000 for k in range(1000)]
    tops = [fit(20, 10, 16, 10, "random", draw, 0.0).top for draw in draws]
    assert [tops.count(top) for top in range(5)] == [200] * 5


@pytest.mark.parametrize("draw", [-0.1, 1.0])
def test_draw_out_of_range(draw):
    with pytest.raises(ValueError, match="crop draw"):
        fit(20, 10, 16, 10, "random", draw, 0.0)


def test_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match="none, center, random"):
        fit(20, 10, 16, 10, "centre")


def test_stretch_and_resize_factor():
    plain = fit(720, 1280, 480, 720, "none")
    assert stretch(plain, 720, 1280) == pytest.approx(1280 / 720 / 1.5)
    assert stretch(plain, 1280, 720) == pytest.approx(1.5 / (720 / 1280))
    assert resize_factor(plain, 720, 1280) == pytest.approx(480 / 720)
    assert resize_factor(fit(240, 360, 480, 720, "center"), 240, 360) == 2


def test_a_fit_is_plain_json():
    plan = fit(720, 1280, 480, 720, "random", 0.3, 0.7, True)
    assert Fit(**json.loads(json.dumps(asdict(plan)))) == plan


@pytest.mark.parametrize("flip", [False, True])
def test_apply_fit_takes_the_right_pixels(flip):
    result = apply_fit(coordinates(2, 20, 30), Fit(20, 30, 3, 5, 10, 12, flip))
    columns = range(16, 4, -1) if flip else range(5, 17)
    assert result.shape == (2, 10, 12, 3)
    assert result.flags.c_contiguous
    assert result.dtype == np.uint8
    assert result[1, 0, :, 2].tolist() == list(columns)
    assert result[1, :, 0, 1].tolist() == list(range(3, 13))
    assert (result[1, :, :, 0] == 1).all()


@pytest.mark.parametrize("num_frames", [1, 5])
@pytest.mark.parametrize("flip", [False, True])
def test_all_frames_of_a_clip_are_cut_and_mirrored_alike(num_frames, flip):
    result = apply_fit(coordinates(num_frames, 20, 30), Fit(20, 30, 3, 5, 10, 12, flip))
    assert result.shape == (num_frames, 10, 12, 3)
    assert result[:, 0, 0, 0].tolist() == list(range(num_frames))
    assert (result[..., 1:] == result[0, ..., 1:]).all()
    assert result[0, 0, :, 2].tolist() == (list(range(16, 4, -1)) if flip else list(range(5, 17)))


@pytest.mark.parametrize("shape", [(2, 20, 31, 3), (20, 30, 3), (2, 20, 30, 4), (2, 3, 20, 30)])
def test_apply_fit_checks_the_size(shape):
    with pytest.raises(ValueError, match="expected"):
        apply_fit(np.zeros(shape, np.uint8), Fit(20, 30, 0, 0, 10, 10, False))


@pytest.mark.parametrize(
    ("image", "video", "box"),
    [
        ((200, 100), (100, 100), (50, 0, 150, 100)),
        ((100, 200), (100, 100), (0, 50, 100, 150)),
        ((64, 96), (96, 64), (0, 26, 64, 69)),
        ((1000, 1), (32, 96), (499, 0, 500, 1)),
    ],
)
def test_an_image_of_another_shape_loses_its_edges(image, video, box):
    noise = Image.effect_noise(image, 100)
    fitted, note = fit_image(noise, *video, crop=True, tolerance=1.03)
    assert fitted.tobytes() == noise.crop(box).tobytes()
    assert f"{fitted.width}x{fitted.height}" in note
    assert fit_image(noise, *video, crop=False, tolerance=1.03)[0] is noise


@pytest.mark.parametrize("crop", [True, False])
def test_an_image_of_nearly_the_same_shape_is_left_alone(crop):
    image = Image.new("RGB", (1920, 1080))
    assert fit_image(image, 1360, 768, crop, tolerance=1.03) == (image, None)
    assert fit_image(image, 720, 480, crop, tolerance=1.03)[1] is not None
