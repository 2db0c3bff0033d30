"""before_after.py: each row has the right videos and clip, and drawing does not change the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from fakes import flip_byte, options_of, run_alone, state_of
from PIL import Image
from running import PROMPT, lora_flags, train

from cogvideox import loop
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import ModelFlags
from cogvideox.config.geometry import read_geometry
from cogvideox.data.cache import CachedSample, TensorCache, open_index
from cogvideox.data.dataset import read_moments
from cogvideox.data.media.pixels.decode import write_video
from cogvideox.evaluation import before_after
from cogvideox.evaluation.before_after import SHEET_NAME, BeforeAfter, nearest_samples
from cogvideox.evaluation.validation import FOLDER, Prompts, Validator
from cogvideox.files import REPORT_NAME
from cogvideox.preparation.tensors import Tensors
from cogvideox.runtime.curves import CURVES_NAME
from cogvideox.runtime.sheets import Panel, SheetRow

BLACK, GRAY, WHITE = 20, 128, 240


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[SheetRow]]]:
    """Records the title and rows of every sheet. The sheets are drawn as usual."""
    recorded: list[tuple[str, list[SheetRow]]] = []
    draw = before_after.contact_sheet

    def record(rows: list[SheetRow], path: Path, title: str) -> None:
        recorded.append((title, rows))
        draw(rows, path, title)

    monkeypatch.setattr(before_after, "contact_sheet", record)
    return recorded


class Decodes(Validator):
    """Replaces a validator: it has no model, and decodes every training clip as gray frames."""

    def __init__(self, output: Path, texts: list[str]) -> None:
        self.run, self.options = run_alone(output), options_of(output)
        self.prompts, self.decoded = Prompts(texts, [], None), 0

    def decode(self, moments_CFHW: torch.Tensor) -> np.ndarray:
        self.decoded += 1
        return np.full((9, 64, 96, 3), GRAY, np.uint8)


def opened(model: Path, folder: Path, **changes: Any) -> Tensors:
    geometry, index = read_geometry(ModelFlags(str(model))), replace(open_index(folder), **changes)
    return Tensors(geometry, TensorCache(folder), index, None)  # type: ignore[arg-type]


@pytest.fixture
def make(model: Path, tensors: Path, tmp_path: Path) -> Callable[..., BeforeAfter]:
    """Returns a function that makes the sheet of a run in tmp_path/lora without a model, given prompts."""

    def made(*texts: str) -> BeforeAfter:
        validator = Decodes(tmp_path / "lora", list(texts))
        return BeforeAfter(validator.run, opened(model, tensors), validator)

    return made


def video(sheet: BeforeAfter, step: int, prompt: int, *levels: int, size: tuple[int, int] = (64, 96)) -> Path:
    """Writes a video of plain frames into the validation folder."""
    path = sheet.validator.path(step, prompt, 0)
    path.parent.mkdir(exist_ok=True)
    write_video(path, np.stack([np.full((*size, 3), level, np.uint8) for level in levels]), 8)
    return path


def levels(panel: Panel) -> list[int]:
    """Returns the gray level of each frame."""
    near = {level: level for level in (BLACK, GRAY, WHITE)}
    return [min(near, key=lambda level: abs(level - frame.mean())) for frame in panel.frames]


# -- the nearest caption -----------------------------------------------------------------------------------------------


def sample(id: str, caption: str) -> CachedSample:
    return CachedSample(id, caption, Bucket(9, 64, 96), ("key",), "key")


def nearest(prompt: str, *captions: str) -> str:
    """Returns the caption of the chosen sample, and checks that the order of the samples does not matter."""
    samples = [sample(f"{number:02d}", caption) for number, caption in enumerate(captions)]
    (forward,), (backward,) = (nearest_samples([prompt], some) for some in (samples, samples[::-1]))
    assert forward == backward
    return forward.caption


def test_the_caption_that_shares_most_words_is_nearest() -> None:
    captions = ("A cat sleeps on a sofa.", "Two dogs run on a beach.", "The dog sleeps.")
    assert nearest("a cat runs on a BEACH", *captions) == captions[0]
    assert nearest("dogs, a beach!", *captions) == captions[1]
    assert nearest("DOG", *captions) == captions[2]


def test_additional_words_increase_the_distance() -> None:
    assert nearest("a dog", "a dog and a cat and a horse", "a dog runs", "two fish") == "a dog runs"


def test_the_id_token_counts_for_nothing() -> None:
    captions = ("MY STYLE a house", "MY STYLE my red car, in my style")
    assert nearest("MY STYLE a red car", *captions) == captions[1]
    # The overlap is 1 of 2 words against 2 of 5. If the three words of the token counted, the second would be nearer.
    captions = ("IN MY STYLE dog", "IN MY STYLE dog cat x y z", "IN MY STYLE fish")
    assert nearest("IN MY STYLE dog cat", *captions) == captions[0]
    # Without other shared words, the first id is chosen.
    assert nearest("MY STYLE", "MY STYLE two words more", "MY STYLE one") == "MY STYLE two words more"


def test_equal_captions_give_the_first_id() -> None:
    samples = [sample("b", "a dog"), sample("a", "a dog"), sample("c", "a cat")]
    assert [s.id for s in nearest_samples(["a dog", "nothing", ""], samples)] == ["a", "a", "a"]


def test_a_clip_for_each_prompt() -> None:
    samples = [sample("1", "a red square"), sample("2", "a green disc")]
    assert [s.id for s in nearest_samples(["disc", "square", "disc"], samples)] == ["2", "1", "2"]


# -- the decoded clip --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["2b", "5b", "1.5-5b"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def validator_of(folder: Path, model: Path, tensors: Tensors, *more: object) -> Validator:
    flags = ("--pretrained_model_name_or_path", model, "--validation_prompt", PROMPT, *more)
    transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(model / "transformer")
    prompts, order = Prompts([PROMPT], [], None), None
    return Validator(
        run_alone(folder), options_of(folder, *flags), "CogVideoXPipeline", transformer, prompts, tensors, order
    )  # type: ignore[arg-type]


def moments_of(tensors: Tensors) -> torch.Tensor:
    return read_moments(tensors.cache, tensors.index.samples[0], 0, tensors.geometry)


def test_a_clip_is_what_the_pipeline_decodes(
    kind: str, tiny: Callable[[str], Path], model: Path, tensors: Path, tmp_path: Path
) -> None:
    """The decoded clip equals what the stock pipeline decodes from the scaled mean."""
    moments = moments_of(opened(model, tensors))
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(tiny(kind))
    latents_BFCHW = moments[None, : len(moments) // 2].permute(0, 2, 1, 3, 4) * pipeline.vae.config.scaling_factor
    with torch.no_grad():
        decoded = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents_BFCHW), output_type="np")
    validator = validator_of(tmp_path, tiny(kind), opened(tiny(kind), tensors))
    video_FHWC = validator.decode(moments)
    assert video_FHWC.shape == (9, 64, 96, 3)
    assert video_FHWC.dtype == np.uint8
    assert (video_FHWC == (decoded[0] * 255).round().astype(np.uint8)).all()
    assert video_FHWC.std() > 1


@pytest.mark.parametrize(
    ("flags", "tiled"),
    [((), False), (("--enable_tiling",), True), (("--height", 32, "--width", 48), True), (("--height", 128), False)],
    ids=["as validated", "asked for", "larger than validated", "smaller"],
)
def test_larger_clips_are_decoded_in_tiles(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...], tiled: bool
) -> None:
    validator = validator_of(tmp_path, model, opened(model, tensors), *flags)
    vae, seen = validator.pipeline.vae, []
    decoder = vae.decode
    decode, left = decoder.decode, list(decoder.attempts)
    monkeypatch.setattr(decoder, "decode", lambda latents: (seen.append(vae.use_tiling), decode(latents))[1])
    validator.decode(moments_of(opened(model, tensors)))
    assert seen == [tiled]
    assert decoder.attempts == left
    assert not vae.use_tiling


def test_the_vae_leaves_the_device_whatever_happens(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validator = validator_of(tmp_path, model, opened(model, tensors), "--height", 32)
    vae, moves = validator.pipeline.vae, []
    left = list(vae.decode.attempts)
    monkeypatch.setattr(vae, "to", lambda device: moves.append(torch.device(device)) or vae)
    validator.run.ranks.device = torch.device("cpu", 0)
    monkeypatch.setattr(vae.decode, "decode", lambda latents: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        validator.decode(moments_of(opened(model, tensors)))
    assert moves == [torch.device("cpu", 0), torch.device("cpu")]
    assert vae.decode.attempts == left
    assert not vae.use_tiling


# -- the sheet ---------------------------------------------------------------------------------------------------------


def test_before_after_and_clip(make: Callable[..., BeforeAfter], sheets: list[tuple[str, list[SheetRow]]]) -> None:
    sheet = make("a red square", "a green disc")
    video(sheet, 0, 0, BLACK, WHITE, GRAY)
    video(sheet, 2, 0, GRAY, BLACK, WHITE)
    video(sheet, 4, 0, WHITE, GRAY, BLACK)
    video(sheet, 0, 1, WHITE, GRAY, WHITE)
    sheet.draw(4)
    sheet.draw(3)  # as in a run that was resumed from an earlier checkpoint
    sheet.draw(0)
    (title, rows), (_, at_3), (_, at_0) = sheets
    assert title == "lora: before and after training"
    assert [row.label for row in rows] == ["a red square", "a green disc"]
    first, second = ([(panel.label, levels(panel)) for panel in row.panels] for row in rows)
    clip = ("TRAINING CLIP, as the VAE sees it", [GRAY, GRAY])
    assert first == [("BEFORE: step 0", [BLACK, GRAY]), ("AFTER: step 4", [WHITE, BLACK]), clip]
    assert second == [("BEFORE: step 0", [WHITE, WHITE]), ("AFTER", []), clip]
    assert rows[1].panels[1].caption == "no video in the validation folder"
    assert [row.panels[2].caption for row in rows] == [
        "TOKEN A red square moves to the right.",
        "TOKEN A green disc moves to the right.",
    ]
    assert (at_3[0].panels[1].label, levels(at_3[0].panels[1])) == ("AFTER: step 2", [GRAY, WHITE])
    assert (at_0[0].panels[1].label, at_0[0].panels[1].frames) == ("AFTER", [])


def test_tall_videos_show_three_frames_in_a_row(
    make: Callable[..., BeforeAfter], sheets: list[tuple[str, list[SheetRow]]]
) -> None:
    sheet = make("a")
    video(sheet, 0, 0, BLACK, BLACK, WHITE, BLACK, GRAY, size=(96, 64))
    video(sheet, 1, 0, BLACK, BLACK, GRAY, size=(64, 64))
    sheet.draw(1)
    before, after, clip = sheets[0][1][0].panels
    assert (levels(before), before.stacked) == ([BLACK, WHITE, GRAY], False)
    assert (levels(after), after.stacked) == ([BLACK, GRAY], True)
    assert (len(clip.frames), clip.stacked) == (2, True)


def test_prompts_that_start_alike_have_their_own_videos(
    make: Callable[..., BeforeAfter], sheets: list[tuple[str, list[SheetRow]]]
) -> None:
    sheet = make(*(["a cat"] * 12))
    for prompt in range(12):
        video(sheet, 0, prompt, WHITE if prompt == 1 else BLACK)
    sheet.draw(0)
    title, rows = sheets[0]
    assert title == "lora: before and after training, 8 of 12 prompts"
    assert [levels(row.panels[0]) for row in rows] == [[BLACK], [WHITE], *[[BLACK]] * 6]


def test_unreadable_files_are_noted(
    make: Callable[..., BeforeAfter],
    model: Path,
    tensors: Path,
    tmp_path: Path,
    sheets: list[tuple[str, list[SheetRow]]],
) -> None:
    sheet = make("a red square")
    path = video(sheet, 0, 0, BLACK, WHITE)
    path.write_bytes(path.read_bytes()[:100])
    copy = Path(shutil.copytree(tensors, tmp_path / "copy"))
    sheet.tensors = opened(model, copy)
    flip_byte(sheet.tensors.cache.path(sheet.nearest[0].video_keys[0]))
    sheet.draw(0)
    before, _, clip = sheets[0][1][0].panels
    assert (before.frames, before.caption) == ([], f"{path.name} cannot be read")
    assert (clip.frames, clip.caption) == ([], "videos/00000.mp4 cannot be read")


def test_each_clip_is_decoded_once_and_its_other_frames_are_freed(make: Callable[..., BeforeAfter]) -> None:
    sheet = make("a red square", "the red square", "a green disc")
    sheet.draw(0)
    sheet.draw(1)
    assert sheet.validator.decoded == 2  # type: ignore[attr-defined]
    for panel in sheet.clips.values():
        base = panel.frames[0].base
        assert (len(base) if base is not None else 1) <= 2


# -- a run -------------------------------------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_a_run_leaves_both_pictures(reference: Path) -> None:
    assert png_size(reference / CURVES_NAME) == (1200, 800)
    width, height = png_size(reference / SHEET_NAME)
    assert width == 1200
    assert 500 < height < 1000
    page = (reference / REPORT_NAME).read_text()
    for text in ("6 of 6 optimizer steps", "; exported", 'src="contact_sheet.png"', 'src="curves.png"', "step-000006"):
        assert text in page, text


@pytest.mark.usefixtures("rendered")
def test_a_resumed_run_draws_the_same(
    model: Path, tensors: Path, reference: Path, tmp_path: Path, sheets: list[tuple[str, list[SheetRow]]]
) -> None:
    """The run is resumed from the middle, with videos of later steps present; then without the video of step 0."""
    output = Path(shutil.copytree(reference, tmp_path / "lora"))
    (output / SHEET_NAME).unlink()
    (output / CURVES_NAME).unlink()
    flags = lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT)
    assert train([*flags, "--resume_from_checkpoint", "checkpoint-4"]) == 0
    for name in (SHEET_NAME, CURVES_NAME):
        assert (output / name).read_bytes() == (reference / name).read_bytes()
    next((output / FOLDER).glob("step-000000*")).unlink()
    assert train(flags) == 0
    before, after, clip = sheets[-1][1][0].panels
    assert (before.frames, before.caption) == ([], "no video in the validation folder")
    assert [len(panel.frames) for panel in (after, clip)] == [2, 2]
    assert after.label == "AFTER: step 6"


def test_a_run_without_prompts_has_curves_only(
    model: Path, tensors: Path, tmp_path: Path, sheets: list[tuple[str, list[SheetRow]]]
) -> None:
    assert train(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 1)) == 0
    assert (tmp_path / "lora" / CURVES_NAME).is_file()
    assert not (tmp_path / "lora" / SHEET_NAME).exists()
    assert sheets == []


def test_nothing_of_the_run_is_changed(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each drawing, the videos and the lines of metrics.jsonl exist already."""
    seen = []
    draw = loop.Trainer._draw

    def watched(self: loop.Trainer, step: int, videos: list[Path]) -> None:
        transformer = self.validator.transformer
        before = state_of(transformer)
        draw(self, step, videos)
        after = state_of(transformer)
        assert [name for name in before if before[name] != after[name]] == []
        assert not self.validator.pipeline.vae.training
        pictures = [(self.run.output_dir / name).exists() for name in (SHEET_NAME, CURVES_NAME)]
        seen.append((step, len(self.validator.videos(0)), *pictures))

    monkeypatch.setattr(loop.Trainer, "_draw", watched)
    flags = ["--load_tensors", "--validation_prompt", PROMPT, "--validation_steps", 1, "--max_train_steps", 2]
    assert train(lora_flags(model, tensors, tmp_path / "lora", *flags)) == 0
    assert seen == [(0, 1, True, False), (1, 2, True, True), (2, 3, True, True)]
