"""validation.py: when, under which names, the same draws at every step, nothing of the run changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluating import bare
from fakes import listing, state_of
from running import LORA_SCRIPT, PROMPT, Forked, finish, fork_ranks, lora_flags, losses, metrics, python, train

from cogvideox.config.flags import ValidationFlags
from cogvideox.data.sampler import Order
from cogvideox.evaluation import validation
from cogvideox.evaluation.before_after import SHEET_NAME
from cogvideox.evaluation.validation import (
    DECIDING_FLAGS,
    FOLDER,
    SETTINGS_NAME,
    Prompts,
    Validator,
    evaluation_mode,
)
from cogvideox.model import models
from cogvideox.runtime.checkpoint_files import checkpoints

HOSTILE = [
    "two\nlines\r\n\tand more",
    "/etc/passwd",
    "../../up and away",
    "C:\\windows\\system32",
    "\U0001f525\U0001f43c",
    "word " * 60,
    "x" * 300,
    "$(touch PWNED) `touch PWNED`; rm -rf *",
    "-rf --help",
    "nul\x00byte",
    ".",
    "日本語の文",
]
SAFE = re.compile(r"step-\d{6}_prompt-\d+_[A-Za-z0-9-]*_\d+\.mp4")


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clips", "batch", "epochs", "steps"),
    [
        (6, 8, 4, [3, 6, 9, 12]),
        (7, 8, 8, [7, 14]),
        (1, 4, 10, [3, 5, 8, 10, 13]),
        (6, 2, 1, [3, 6, 9, 12]),
        (6, 1, 2, [12]),
        (2, 8, 1, list(range(1, 15))),
    ],
)
def test_due_by_epochs(tmp_path: Path, clips: int, batch: int, epochs: int, steps: list[int]) -> None:
    order = Order([f"clip-{k}" for k in range(clips)], ["9x64x96"] * clips, batch, seed=0)
    validator = bare(tmp_path, "--validation_epochs", epochs, order=order)
    assert [step for step in range(15) if validator.due(step)] == steps


def test_due_by_steps(tmp_path: Path) -> None:
    assert [s for s in range(13) if bare(tmp_path, "--validation_steps", 4).due(s)] == [4, 8, 12]
    assert not any(bare(tmp_path).due(step) for step in range(13))


# -- names -------------------------------------------------------------------------------------------------------------


def test_prompts_give_safe_names(tmp_path: Path) -> None:
    validator = bare(tmp_path, texts=HOSTILE)
    paths = [validator.path(7, p, k) for p in range(len(HOSTILE)) for k in range(2)]
    assert len(set(paths)) == 2 * len(HOSTILE)
    for path in paths:
        assert path.parent == tmp_path / FOLDER
        assert SAFE.fullmatch(path.name), path.name
        assert len(path.name) <= 100
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        assert path.resolve().parent == (tmp_path / FOLDER).resolve()


def test_prompts_with_the_same_words_have_their_own_files(tmp_path: Path) -> None:
    validator = bare(tmp_path, texts=["a cat!", "a cat?", "\U0001f525", "\U0001f43c"])
    assert len({validator.path(0, p, 0) for p in range(4)}) == 4
    assert validator.path(0, 0, 0).name == "step-000000_prompt-0_a-cat_0.mp4"


# -- other settings ----------------------------------------------------------------------------------------------------


def fill(output: Path, *steps: int) -> None:
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    for step in steps:
        (output / FOLDER / f"step-{step:06d}_prompt-0_a_0.mp4").write_text(f"{step}")


def videos(output: Path) -> dict[str, list[int]]:
    """Returns the steps of the videos, by folder."""
    found: dict[str, list[int]] = {}
    for path in sorted((output / FOLDER).rglob("step-*.mp4")):
        found.setdefault(path.parent.name, []).append(int(path.name[5:11]))
    return found


OTHERS = {
    "guidance": (("--guidance_scale", 3.0), {"learning_rate": 1.0}, 8.0),
    "sampling steps": (("--num_inference_steps", 7), {"learning_rate": 1.0}, 8.0),
    "negative prompt": (("--negative_prompt", "blurred"), {"learning_rate": 1.0}, 8.0),
    "seed": (("--seed", 7), {"learning_rate": 1.0}, 8.0),
    "rate": ((), {"learning_rate": 1.0}, 16.0),
    "recipe": ((), {"learning_rate": 2.0}, 8.0),
}


@pytest.mark.parametrize("other", OTHERS)
def test_videos_of_other_settings_are_moved_away(tmp_path: Path, other: str) -> None:
    fill(tmp_path, 0, 2, 4)
    first = bare(tmp_path)
    first.set_aside_stale(4, 4, {"learning_rate": 1.0})
    assert videos(tmp_path) == {"older-0": [0, 2, 4]}  # Their settings are unknown.
    fill(tmp_path, 0, 2, 4)
    first.set_aside_stale(4, 4, {"learning_rate": 1.0})
    assert videos(tmp_path) == {"older-0": [0, 2, 4], FOLDER: [0, 2, 4]}
    flags, recipe, fps = OTHERS[other]
    bare(tmp_path, *flags, fps=fps).set_aside_stale(4, 4, recipe)
    assert videos(tmp_path) == {"older-0": [0, 2, 4], "older-1": [0, 2, 4]}


ONLY_WHICH_AND_WHEN = {
    "do_validation": True,
    "validation_prompt": "a :",
    "validation_prompt_separator": ":",
    "validation_dir": "prompts",
    "validation_prompts": "list.txt",
    "num_validation_videos": 2,
    "validation_steps": 1,
    "validation_epochs": 1,
    "validation_fps": 8.0,  # which the videos have anyway
    "enable_slicing": True,
}


def test_every_flag_decides_what_videos_show_or_does_not() -> None:
    assert {*DECIDING_FLAGS, *ONLY_WHICH_AND_WHEN} == {item.name for item in fields(ValidationFlags)}


@pytest.mark.parametrize("flag", ONLY_WHICH_AND_WHEN)
def test_videos_that_another_command_would_make_alike_stay(tmp_path: Path, flag: str) -> None:
    bare(tmp_path).set_aside_stale(0, 8, {})
    fill(tmp_path, 0, 2)
    validator = bare(tmp_path)
    validator.flags = replace(validator.flags, **{flag: ONLY_WHICH_AND_WHEN[flag]})
    validator.set_aside_stale(2, 8, {})
    assert videos(tmp_path) == {FOLDER: [0, 2]}


def test_videos_of_an_earlier_version_stay(tmp_path: Path) -> None:
    """It named all flags of validation and where the state was stored, and lacked a switch."""
    bare(tmp_path).set_aside_stale(4, 4, {"seed": 1, "offload_gradients": True})
    settings = json.loads((tmp_path / FOLDER / SETTINGS_NAME).read_text())
    settings["validation"] = asdict(bare(tmp_path).flags) | settings["validation"]
    (tmp_path / FOLDER / SETTINGS_NAME).write_text(json.dumps(settings))
    fill(tmp_path, 0, 4)
    bare(tmp_path).set_aside_stale(4, 4, {"seed": 1, "use_bf16_moments": False})
    assert videos(tmp_path) == {FOLDER: [0, 4]}
    bare(tmp_path).set_aside_stale(4, 4, {"seed": 1, "use_bf16_moments": True})
    assert videos(tmp_path) == {"older-0": [0, 4]}


def test_videos_of_another_prompt_with_the_same_words_are_moved_away(tmp_path: Path) -> None:
    """A prompt that is read from a file is not among the flags."""
    bare(tmp_path, texts=["a"]).set_aside_stale(4, 4, {})
    fill(tmp_path, 4)
    bare(tmp_path, texts=["a!"]).set_aside_stale(4, 4, {})
    assert videos(tmp_path) == {"older-0": [4]}


def test_videos_of_a_prompt_stay_if_others_are_added_or_removed(tmp_path: Path) -> None:
    bare(tmp_path, texts=["a"]).set_aside_stale(0, 4, {})
    fill(tmp_path, 0, 2)
    both = bare(tmp_path, texts=["a", "b"])
    both.set_aside_stale(2, 4, {})
    assert videos(tmp_path) == {FOLDER: [0, 2]}
    both.path(4, 1, 0).touch()
    bare(tmp_path, texts=["a"]).set_aside_stale(2, 4, {})
    assert videos(tmp_path) == {FOLDER: [0, 2], "older-0": [4]}
    bare(tmp_path, texts=["b", "a"]).set_aside_stale(2, 4, {})  # The number of the prompt is part of the names.
    assert videos(tmp_path) == {"older-0": [4], "older-1": [0, 2]}


def test_videos_of_another_image_are_moved_away(tmp_path: Path) -> None:
    """The content of the image counts, not its name."""
    image = tmp_path / "image-0.png"
    image.write_bytes(b"one")
    validator = bare(tmp_path)
    validator.prompts = Prompts(["a"], [], None, [image])
    validator.set_aside_stale(0, 4, {})
    fill(tmp_path, 0, 4)
    validator.set_aside_stale(4, 4, {})
    assert videos(tmp_path) == {FOLDER: [0, 4]}
    image.write_bytes(b"two")
    validator.set_aside_stale(4, 4, {})
    assert videos(tmp_path) == {"older-0": [0, 4]}


def test_a_run_that_exports_an_earlier_checkpoint_moves_no_video(tmp_path: Path) -> None:
    bare(tmp_path).set_aside_stale(0, 4, {})
    fill(tmp_path, 0, 2, 4)
    for _ in range(2):
        bare(tmp_path).set_aside_stale(2, 2, {})
        assert videos(tmp_path) == {FOLDER: [0, 2, 4]}
    bare(tmp_path).set_aside_stale(4, 4, {})
    assert videos(tmp_path) == {FOLDER: [0, 2, 4]}


def test_videos_that_another_schedule_made_after_the_step_are_moved_away(tmp_path: Path) -> None:
    bare(tmp_path).set_aside_stale(0, 4, {})
    fill(tmp_path, 0, 2, 4)
    bare(tmp_path).set_aside_stale(2, 4, {})  # The same training gives the same videos.
    assert videos(tmp_path) == {FOLDER: [0, 2, 4]}
    bare(tmp_path).set_aside_stale(2, 8, {})  # This changes the learning rate of steps 3 and 4.
    assert videos(tmp_path) == {FOLDER: [0, 2], "older-0": [4]}


@pytest.mark.parametrize("moved", [1, 2, 3])
@pytest.mark.fault("kills: an interruption while outdated validation videos are moved away")
def test_killed_while_moving_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    """The process is killed after the first, second or last video, before settings.json is written."""
    bare(tmp_path).set_aside_stale(4, 4, {"learning_rate": 1.0})
    fill(tmp_path, 0, 2, 4)
    other = bare(tmp_path, "--guidance_scale", 3.0)
    rename, count = validation.os.rename, iter(range(99))

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(validation.os, "rename", lambda a, b: rename(a, b) if next(count) < moved else die())
        patch.setattr(validation, "write_atomically", die)
        with pytest.raises(Killed):
            other.set_aside_stale(4, 4, {"learning_rate": 1.0})
    other.set_aside_stale(4, 4, {"learning_rate": 1.0})
    found = videos(tmp_path)
    assert FOLDER not in found
    assert sorted(step for steps in found.values() for step in steps) == [0, 2, 4]
    fill(tmp_path, 0, 2, 4)
    other.set_aside_stale(4, 4, {"learning_rate": 1.0})
    assert videos(tmp_path)[FOLDER] == [0, 2, 4]


# -- who renders what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_videos_are_shared_out_over_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    made: list[list[Path]] = [[] for _ in range(world)]
    monkeypatch.setattr(Validator, "_vae_on_device", lambda self: nullcontext())
    monkeypatch.setattr(Validator, "sample", lambda self, prompt, number: torch.zeros(1, 1, 3, 8, 8))
    for rank in range(world):
        validator = bare(tmp_path, "--num_validation_videos", 2, texts=["a", "b", "c"])
        validator.transformer = torch.nn.Linear(1, 1)
        validator.run.ranks.process_index, validator.run.ranks.num_processes = rank, world
        monkeypatch.setattr(validation, "write_video", lambda path, *_, rank=rank: made[rank].append(path))
        paths = validator.render(3)
    assert len(paths) == 6
    assert sorted(path for share in made for path in share) == sorted(paths)
    assert max(map(len, made)) - min(map(len, made)) <= 1


@pytest.fixture(scope="module")
def validated_by_one(model: Path, tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process, which renders two videos before and after a step that changes nothing."""
    output = tmp_path_factory.mktemp("one") / "lora"
    finish(Forked(rendering(model, tensors, output, ranks=1)))
    return output


def rendering(model: Path, tensors: Path, output: Path, ranks: int) -> list[object]:
    """Returns the command of a run that renders a video for each of two prompts."""
    flags = ["--load_tensors", "--validation_prompt", f"{PROMPT}:::a disc", "--max_train_steps", 1]
    flags += ["--learning_rate", 0, "--num_inference_steps", 2, "--gradient_accumulation_steps", 6 // ranks]
    return python(LORA_SCRIPT, *lora_flags(model, tensors, output, *flags))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.fault("ranks: two processes in place of one")
def test_ranks_render_the_videos_of_one_process(
    model: Path, tensors: Path, validated_by_one: Path, tmp_path: Path, ranks: int
) -> None:
    """One of three ranks has no video to render. What rank 0 makes of the videos is the same, too."""
    output = tmp_path / "lora"
    for rank in fork_ranks(ranks, rendering(model, tensors, output, ranks)):
        finish(rank)
    videos = [{path.name: path.read_bytes() for path in run.rglob("*.mp4")} for run in (output, validated_by_one)]
    assert videos[0] == videos[1]
    assert len(videos[0]) == 4
    for name in (SHEET_NAME, "inference.py"):
        assert (output / name).read_bytes() == (validated_by_one / name).read_bytes()
    assert losses(output) == pytest.approx(losses(validated_by_one), rel=1e-5)  # the mean over ranks and micro-batches
    health = [[line for line in metrics(run) if "validation_motion" in line] for run in (output, validated_by_one)]
    assert health[0] == health[1]
    assert len(health[0]) == 2


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_of_a_video_is_the_run_s_and_its_number(tmp_path: Path, seed: int) -> None:
    used: list[int] = []

    def pipeline(generator: torch.Generator, **_: Any) -> Any:
        used.append(generator.initial_seed())
        return SimpleNamespace(frames=torch.zeros(1, 1, 3, 8, 8))

    validator = bare(tmp_path, "--seed", seed)
    validator.pipeline, validator.sampling = pipeline, {}
    validator.prompts = Prompts(["a"], [torch.zeros(1)], torch.zeros(1))
    for number in range(2):
        validator.sample(0, number)
    assert used == [seed, seed + 1]


# -- what it leaves behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_puts_mode_and_gradients_back(training: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train(training)

    def fail() -> None:
        with evaluation_mode(module):
            assert not module.training
            assert not module[1].training
            assert not torch.is_grad_enabled()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert module.training == module[1].training == training
    assert torch.is_grad_enabled()


@pytest.mark.fault("numbers: validation in the middle of training")
def test_nothing_of_the_run_is_changed(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    render = Validator.render

    def watched(self: Validator, step: int) -> list[Path]:
        self.transformer.train(step != 0)  # Both modes are tested.
        before = state_of(self.transformer)
        paths = render(self, step)
        after = state_of(self.transformer)
        assert [name for name in before if before[name] != after[name]] == []
        seen.append((step, len(paths), all(path.stat().st_size > 0 for path in paths)))
        return paths

    monkeypatch.setattr(Validator, "render", watched)
    flags = ["--load_tensors", "--validation_prompt", PROMPT, "--validation_steps", 1, "--max_train_steps", 2]
    assert train(lora_flags(model, tensors, tmp_path / "lora", *flags, "--enable_tiling", "--enable_slicing")) == 0
    assert seen == [(0, 1, True), (1, 1, True), (2, 1, True)]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, torch.Tensor]]:
    """Records (prompt, number, frames) of every sampled video."""
    found: list[tuple[int, int, torch.Tensor]] = []
    sample = Validator.sample

    def watched(self: Validator, prompt: int, number: int) -> torch.Tensor:
        found.append((prompt, number, sample(self, prompt, number)))
        return found[-1][2]

    monkeypatch.setattr(Validator, "sample", watched)
    return found


def test_an_unchanged_model_gives_the_same_frames_at_every_step(
    model: Path, tensors: Path, tmp_path: Path, sampled: list[tuple[int, int, torch.Tensor]]
) -> None:
    flags = ["--load_tensors", "--validation_prompt", f"{PROMPT}:::a disc", "--num_validation_videos", 2]
    flags += ["--validation_steps", 1, "--max_train_steps", 2, "--learning_rate", 0, "--num_inference_steps", 1]
    assert train(lora_flags(model, tensors, tmp_path / "lora", *map(str, flags))) == 0
    assert [(p, k) for p, k, _ in sampled] == [(0, 0), (0, 1), (1, 0), (1, 1)] * 3
    first, second, third = (sampled[i : i + 4] for i in (0, 4, 8))
    for one, two, three in zip(first, second, third, strict=True):
        assert one[2].equal(two[2])
        assert one[2].equal(three[2])
    frames = [frames for _, _, frames in first]
    assert not any(frames[i].equal(frames[j]) for i in range(4) for j in range(i))


@pytest.mark.fault("security: paths and shell commands in validation prompts")
def test_hostile_prompts_are_rendered_into_the_folder(
    model: Path, tensors: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hostile = ":::".join(text for text in HOSTILE if "\x00" not in text)
    output, before = tmp_path / "lora", listing(tensors)
    flags = ["--load_tensors", "--validation_prompt", hostile, "--max_train_steps", 1]
    flags += ["--num_inference_steps", 1, "--validation_frames", 1]
    assert train(lora_flags(model, tensors, output, *flags)) == 0
    assert "characters are unknown: " in capfd.readouterr().err  # the prompts have emoji, which T5 does not know
    made = sorted(path.name for path in (output / FOLDER).glob("*.mp4"))
    assert len(made) == 2 * (len(HOSTILE) - 1)
    assert all(SAFE.fullmatch(name) for name in made)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    # The run stores the prompts' embeddings in its output folder, because --data_root may be read-only and shared.
    assert listing(tensors) == before
    assert len(list((output / FOLDER / "tensors").rglob("*.safetensors"))) == len(HOSTILE)  # including the empty prompt


def test_videos_of_the_same_settings_are_not_made_again(
    model: Path, tensors: Path, reference: Path, tmp_path: Path, sampled: list[tuple[int, int, torch.Tensor]]
) -> None:
    output = Path(shutil.copytree(reference, tmp_path / "lora"))
    before = listing(output / FOLDER)
    flags = lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT)
    assert train(flags) == 0
    assert sampled == []
    assert {n: v for n, v in listing(output / FOLDER).items() if n.endswith(".mp4")} == {
        n: v for n, v in before.items() if n.endswith(".mp4")
    }
    next((output / FOLDER).glob("step-000006*")).unlink()
    assert train(flags) == 0
    assert len(sampled) == 1


def test_videos_of_other_settings_are_made_again(
    model: Path, tensors: Path, reference: Path, tmp_path: Path, sampled: list[tuple[int, int, torch.Tensor]]
) -> None:
    """Guidance changes in a finished run; the learning rate changes in a run killed before its first checkpoint."""
    output = Path(shutil.copytree(reference, tmp_path / "lora"))
    flags = lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", PROMPT)
    assert train([*flags, "--guidance_scale", "2"]) == 0
    assert videos(output) == {FOLDER: [6], "older-0": [0, 6]}
    for folder in checkpoints(output):
        shutil.rmtree(folder)
    assert train([*flags, "--guidance_scale", "2", "--learning_rate", "1e-3", "--max_train_steps", "1"]) == 0
    assert videos(output) == {FOLDER: [0, 1], "older-0": [0, 6], "older-1": [6]}
    assert len(sampled) == 3


def test_a_prompt_that_is_added_to_a_finished_run_gets_its_video(
    model: Path, tensors: Path, reference: Path, tmp_path: Path, sampled: list[tuple[int, int, torch.Tensor]]
) -> None:
    output = Path(shutil.copytree(reference, tmp_path / "lora"))
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--validation_prompt", f"{PROMPT}:::a disc")) == 0
    assert videos(output) == {FOLDER: [0, 6, 6]}
    assert [prompt for prompt, *_ in sampled] == [1]


def test_a_run_without_prompts_loads_neither_t5_nor_the_vae(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_vae", lambda *_: pytest.fail("the VAE was loaded"))
    monkeypatch.setattr(models, "text_encoder", lambda *_: pytest.fail("T5 was loaded"))
    assert train(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 1)) == 0
    assert not list((tmp_path / "lora").rglob("*.mp4"))


class Loads(Exception):
    """Ends a run at the moment when it would load the transformer."""


def test_t5_and_vae_are_gone_before_the_transformer_is_loaded(
    model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    places: list[str] = []
    text_encoder, video_encoder = models.text_encoder, models.video_encoder

    @contextmanager
    def watched_text(*arguments: Any) -> Iterator[Any]:
        places.append(arguments[3])
        with text_encoder(*arguments) as (tokenizer, encoder):
            held.append(encoder)
            yield tokenizer, encoder

    @contextmanager
    def watched_video(*arguments: Any) -> Iterator[Any]:
        with video_encoder(*arguments) as vae:
            held.append(vae)
            yield vae

    def load_transformer(*_: Any) -> None:
        raise Loads([all(tensor.is_meta for tensor in module.parameters()) for module in held])

    monkeypatch.setattr(models, "text_encoder", watched_text)
    monkeypatch.setattr(models, "video_encoder", watched_video)
    monkeypatch.setattr(models, "load_transformer", load_transformer)
    flags = lora_flags(
        *(model, clips, tmp_path / "lora", "--tensor_cache", tmp_path / "cache", "--validation_prompt", "a"),
        *("--t5_on", "host"),
    )
    with pytest.raises(Loads) as reached:
        train(flags)
    assert places == ["host", "host"]
    assert [type(module).__name__ for module in held] == ["T5EncoderModel", "AutoencoderKLCogVideoX", "T5EncoderModel"]
    assert reached.value.args[0] == [True] * 3
