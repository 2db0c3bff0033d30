"""held_out.py: every step and number of ranks measures the same grid, and the run itself does not change."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import Alone, split
from fakes import flip_byte, state_of
from running import LORA_SCRIPT, PROMPT, equal, finish, fork_ranks, lora_flags, metrics, python, train, weights

from cogvideox.config.buckets import Bucket
from cogvideox.data.cache import CachedSample, CacheError, TensorCache, open_index
from cogvideox.data.dataset import sample_posterior, standard_normal
from cogvideox.evaluation import held_out
from cogvideox.evaluation.held_out import TIMESTEP_PARTS, HeldOut, average_by_clip, mean_and_error
from cogvideox.runtime.run import METRICS_NAME

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def prepared(tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepares four training clips and two held-out clips. Tests must not change the folder."""
    return split(tensors, tmp_path_factory.mktemp("held") / "out", 4, 5, train=slice(4))


@pytest.fixture(scope="module")
def measured_run(model: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains six steps with the held-out loss. Tests must not change the folder."""
    output = tmp_path_factory.mktemp("measured_run") / "lora"
    assert train(lora_flags(model, prepared, output, "--load_tensors")) == 0
    return output


def lines(output: Path) -> dict[int, tuple[float, float]]:
    """Returns (loss, error) by step, and checks that each step has one line."""
    found = [line for line in metrics(output) if "held_out_loss" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {int(line["step"]): (line["held_out_loss"], line["held_out_error"]) for line in found}


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_each_eighth_of_the_schedule_has_a_timestep_and_noise(model: Path, prepared: Path, tmp_path: Path) -> None:
    alone = Alone(model, prepared, tmp_path)
    losses = alone.held_out.losses()
    assert losses.shape == (2, TIMESTEP_PARTS)
    assert losses.dtype == torch.float64
    assert [int(batch.timestep_B) * TIMESTEP_PARTS // 1000 for batch in alone.seen] == [*range(TIMESTEP_PARTS)] * 2
    # They are not at fixed places within the eighths.
    assert len({int(batch.timestep_B) % 125 for batch in alone.seen}) > 8
    noises = [batch.noise_BFCHW for batch in alone.seen]
    assert not any(noises[i].equal(noises[j]) for i in range(len(noises)) for j in range(i))
    ids = [sample.id for sample in open_index(prepared).validation]
    assert [batch.ids for batch in alone.seen] == [(name,) for name in ids for _ in range(TIMESTEP_PARTS)]
    shape = tuple(noises[3].shape[1:])
    assert noises[TIMESTEP_PARTS + 3][0].equal(standard_normal(shape, 0, "held_out", ids[1], 3, "noise"))
    captions = [sample.prompt_key for sample in open_index(prepared).validation]
    assert alone.seen[-1].prompt_BLD[0].equal(TensorCache(prepared).read(captions[1])["prompt_LD"])


def test_each_timestep_has_its_noise_of_the_first_frame(tiny: Tiny, image_tensors: Path, tmp_path: Path) -> None:
    folder = split(image_tensors, tmp_path / "split", 5)
    alone = Alone(tiny("5b-i2v"), folder, tmp_path)
    alone.held_out.losses()
    (sample,) = open_index(folder).validation
    moments = TensorCache(folder).read(sample.image_keys[0])["image_moments_KCHW"]
    for place, batch in enumerate(alone.seen):
        noise = standard_normal((16, 8, 12), 0, "held_out", sample.id, place, "image posterior")
        assert batch.image_BCHW is not None
        assert batch.image_BCHW[0].equal(sample_posterior(moments[place % 2], noise))


def test_a_clip_in_several_variants_is_measured_in_the_first(tiny: Tiny, image_tensors: Path, tmp_path: Path) -> None:
    """--num_augmentations prepares such clips. All parts of the schedule use the first variant and its first frames."""
    folder = split(image_tensors, tmp_path / "split", 5)
    index = open_index(folder)
    (sample,), other = index.validation, index.samples[0]
    both = {"video_keys": sample.video_keys + other.video_keys, "image_keys": sample.image_keys + other.image_keys}
    dataclasses.replace(index, validation=(dataclasses.replace(sample, **both),)).save(folder)
    several = Alone(tiny("5b-i2v"), folder, tmp_path / "several")
    alone = Alone(tiny("5b-i2v"), split(image_tensors, tmp_path / "alone", 5), tmp_path)
    assert several.held_out.losses().equal(alone.held_out.losses())
    for batch, wanted in zip(several.seen, alone.seen, strict=True):
        assert batch.image_BCHW is not None
        assert wanted.image_BCHW is not None
        assert batch.image_BCHW.equal(wanted.image_BCHW)


def test_the_same_grid_every_time_and_another_one_for_another_seed(model: Path, prepared: Path, tmp_path: Path) -> None:
    alone = Alone(model, prepared, tmp_path)
    first = alone.held_out.losses()
    torch.rand(7)
    assert first.equal(alone.held_out.losses())
    assert not first.equal(Alone(model, prepared, tmp_path, seed=1).held_out.losses())


def test_a_clip_s_losses_do_not_depend_on_the_others(
    model: Path, tensors: Path, prepared: Path, tmp_path: Path
) -> None:
    both = Alone(model, prepared, tmp_path).held_out.losses()
    alone = Alone(model, split(tensors, tmp_path / "one", 5), tmp_path).held_out.losses()
    assert alone[0].equal(both[1])


def test_the_fingerprint_changes_with_whatever_decides_a_loss(
    model: Path, tiny: Tiny, prepared: Path, tmp_path: Path
) -> None:
    def grid(seed: int = 0, of: Path = model, **changed: Any) -> str:
        alone = Alone(of, prepared, tmp_path, seed)
        alone.held_out.samples = tuple(dataclasses.replace(s, **changed) for s in alone.held_out.samples)
        return alone.held_out._fingerprint()

    alone = Alone(model, prepared, tmp_path).held_out
    assert grid() == alone.grid
    others = [grid(seed=1), grid(id="a"), grid(video_keys=("a",)), grid(prompt_key="a"), grid(image_keys=("a",))]
    others += [grid(of=tiny("2b"))]  # The 2b model has another scaling factor and another schedule.
    assert len({*others, grid()}) == len(others) + 1
    assert grid(caption="a") == grid()
    alone.samples = alone.samples[::-1]
    assert alone._fingerprint() == grid()
    alone.samples = alone.samples[:1]
    assert alone._fingerprint() != grid()


def test_a_step_is_measured_again_on_other_clips(model: Path, tensors: Path, prepared: Path, tmp_path: Path) -> None:
    first = Alone(model, prepared, tmp_path / "out").held_out
    other = Alone(model, split(tensors, tmp_path / "other", 3, 4), tmp_path / "out").held_out
    for grid in (first, other, first, other):
        grid.measure(4)
    assert [line["held_out_grid"] for line in metrics(tmp_path / "out")] == [first.grid, other.grid]
    (tmp_path / "out" / METRICS_NAME).write_text('{"step": 4, "held_out_loss": 1.0}\n')  # as an older version wrote it
    first.measure(4)
    assert len(metrics(tmp_path / "out")) == 2


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_ranks_shares_add_up_to_the_same(
    model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    expected = Alone(model, prepared, tmp_path).held_out.losses()
    # The last element counts the ranks that lacked memory.
    total = torch.zeros(expected.numel() + 1, dtype=expected.dtype)
    monkeypatch.setattr(held_out.dist, "all_reduce", total.add_)
    counts = []
    for rank in range(world):
        alone = Alone(model, prepared, tmp_path)
        alone.run.ranks.process_index, alone.run.ranks.num_processes = rank, world
        alone.held_out.losses()
        counts.append(len(alone.seen))
    assert total[:-1].view_as(expected).equal(expected)
    assert total[-1] == 0
    assert sum(counts) == expected.numel()
    assert max(counts) - min(counts) <= 1


def test_mean_and_error_are_over_clips() -> None:
    # The means of the clips are 2, 4 and 6.
    losses = torch.tensor([[1.0, 3.0], [4.0, 4.0], [2.0, 10.0]], dtype=torch.float64)
    assert mean_and_error(losses, ["a", "b", "c"]) == (4.0, pytest.approx(2.0 / math.sqrt(3)))
    mean, error = mean_and_error(losses[:1], ["a"])
    assert mean == 2.0
    assert math.isnan(error)


def test_a_clip_in_two_buckets_counts_once() -> None:
    losses = torch.tensor([[1.0], [3.0], [6.0]], dtype=torch.float64)
    assert mean_and_error(losses, ["a", "a", "b"]) == (4.0, pytest.approx(2.0))
    bucket = Bucket(9, 64, 96)
    assert CachedSample("x@y.mp4@9x64x96", "", bucket, (), "").clip == "x@y.mp4"
    assert CachedSample("x@y.mp4", "", bucket, (), "").clip == "x@y.mp4"


def test_means_by_timestep_count_each_clip_once(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = torch.tensor([[1.0, 2.0], [3.0, 6.0], [6.0, 0.0]], dtype=torch.float64)
    assert average_by_clip(losses, ["a", "a", "b"]).tolist() == [[2.0, 4.0], [6.0, 0.0]]
    alone = Alone(model, split(tensors, tmp_path / "two", 4, 5), tmp_path / "out")
    alone.held_out.measure(7)
    record = json.loads((tmp_path / "out" / METRICS_NAME).read_text())
    expected = alone.held_out.losses()
    assert record["held_out_by_timestep"] == expected.mean(dim=0).tolist()
    assert record["held_out_loss"] == pytest.approx(sum(record["held_out_by_timestep"]) / TIMESTEP_PARTS)


def test_without_validation_clips_nothing_is_measured(model: Path, tensors: Path, tmp_path: Path) -> None:
    alone = Alone(model, tensors, tmp_path)
    alone.held_out.measure(0)
    assert not alone.held_out
    assert not alone.seen
    assert not (tmp_path / METRICS_NAME).exists()


def test_one_clip_has_no_error(model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = Alone(model, split(tensors, tmp_path / "one", 5), tmp_path)
    alone.held_out.measure(3)
    (line,) = (tmp_path / METRICS_NAME).read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 3
    assert record["held_out_loss"] > 0
    assert record["held_out_error"] is None
    assert "held-out loss after step 3: " in capsys.readouterr().err


def test_a_step_is_measured_once(model: Path, prepared: Path, tmp_path: Path) -> None:
    alone = Alone(model, prepared, tmp_path)
    (tmp_path / METRICS_NAME).write_text('{"step": 3, "loss": 1.0}\n')
    for _ in range(2):
        alone.held_out.measure(3)
    assert len(alone.seen) == 2 * TIMESTEP_PARTS
    alone.held_out.measure(4)
    assert list(lines(tmp_path)) == [3, 4]


@pytest.mark.parametrize("part", ["video", "prompt"])
@pytest.mark.fault("data: a tensor of a held-out clip is damaged")
def test_a_damaged_clip_stops_at_the_start(
    model: Path, prepared: Path, measured_run: Path, tmp_path: Path, part: str
) -> None:
    """A resumed run checks all held-out clips at its start, and does not encode the damaged one again."""
    folder = Path(shutil.copytree(prepared, tmp_path / "tensors"))
    output = Path(shutil.copytree(measured_run, tmp_path / "lora"))
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(output / name)
    sample: CachedSample = open_index(folder).validation[1]
    path = TensorCache(folder).path(sample.video_keys[0] if part == "video" else sample.prompt_key)
    flip_byte(path)
    before = (output / METRICS_NAME).read_bytes()
    with pytest.raises(CacheError) as error:
        train(lora_flags(model, folder, output, "--load_tensors", "--max_bad_fraction", 1))
    (line,) = error.value.problems
    assert line.startswith(f"{path}: its checksum is wrong; prepare again")
    assert (output / METRICS_NAME).read_bytes() == before


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_measured_before_with_each_checkpoint_and_after(measured_run: Path) -> None:
    assert list(lines(measured_run)) == [0, 2, 4, 6]
    assert all(error > 0 for _, error in lines(measured_run).values())


@pytest.mark.parametrize(("flags", "steps"), [(("--validation_steps", 3), [0, 3, 4]), ((), [0, 2, 4])])
def test_measured_when_the_flags_say(
    model: Path, prepared: Path, tmp_path: Path, flags: tuple[object, ...], steps: list[int]
) -> None:
    more = ["--validation_prompt", PROMPT, "--num_inference_steps", 1, "--max_train_steps", 4, *flags]
    assert train(lora_flags(model, prepared, tmp_path / "lora", "--load_tensors", *more)) == 0
    assert list(lines(tmp_path / "lora")) == steps
    videos = {int(path.name[5:11]) for path in (tmp_path / "lora").rglob("step-*.mp4")}
    assert videos == ({*steps} if flags else {0, 4})


def test_training_is_the_same_without_it(model: Path, prepared: Path, measured_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    dataclasses.replace(open_index(folder), validation=()).save(folder)
    assert train(lora_flags(model, folder, tmp_path / "lora", "--load_tensors")) == 0
    assert not lines(tmp_path / "lora")
    assert equal(weights(tmp_path / "lora"), weights(measured_run))


def test_the_weights_of_the_training_loss_do_not_apply(
    model: Path, prepared: Path, measured_run: Path, tmp_path: Path
) -> None:
    """The loss also covers timesteps that are not trained, and ignores how the samples of a step share timesteps."""
    more = ["--loss_weighting", "min_snr", "--max_timestep", 500, "--timestep_sampling", "stratified"]
    assert train(lora_flags(model, prepared, tmp_path, "--load_tensors", *more, "--max_train_steps", 2)) == 0
    assert lines(tmp_path)[0] == lines(measured_run)[0]
    assert lines(tmp_path)[2] != lines(measured_run)[2]


@pytest.mark.fault("numbers: a held-out loss in the middle of training", times=2)
def test_nothing_of_the_run_is_changed(
    model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    measure = HeldOut.measure

    def watched(self: HeldOut, step: int) -> None:
        self.transformer.train(step != 0)  # Both modes are tested.
        before = state_of(self.transformer)
        measure(self, step)
        after = state_of(self.transformer)
        assert [name for name in before if before[name] != after[name]] == []
        seen.append(step)

    monkeypatch.setattr(HeldOut, "measure", watched)
    assert train(lora_flags(model, prepared, tmp_path / "lora", "--load_tensors", "--max_train_steps", 2)) == 0
    assert seen == [0, 2]


def test_the_loss_is_constant_without_learning(model: Path, prepared: Path, tmp_path: Path) -> None:
    flags = ["--load_tensors", "--learning_rate", 0, "--max_train_steps", 4]
    assert train(lora_flags(model, prepared, tmp_path / "lora", *flags)) == 0
    assert len(lines(tmp_path / "lora")) == 3
    assert len(set(lines(tmp_path / "lora").values())) == 1


@pytest.mark.parametrize("batch", [2, 4])
def test_the_batch_size_has_no_effect(
    model: Path, prepared: Path, measured_run: Path, tmp_path: Path, batch: int
) -> None:
    flags = ["--load_tensors", "--train_batch_size", batch, "--max_train_steps", 1]
    assert train(lora_flags(model, prepared, tmp_path / "lora", *flags)) == 0
    assert lines(tmp_path / "lora")[0] == lines(measured_run)[0]


def test_two_ranks_measure_the_same_before_training(
    model: Path, prepared: Path, measured_run: Path, tmp_path: Path
) -> None:
    flags = lora_flags(model, prepared, tmp_path / "lora", "--load_tensors", "--gradient_accumulation_steps", 1)
    for rank in fork_ranks(2, python(LORA_SCRIPT, *flags)):
        finish(rank)
    two, one = lines(tmp_path / "lora"), lines(measured_run)
    assert list(two) == list(one)
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4)  # The number of threads affects rounding.


def test_the_loss_falls_on_training_clips(model: Path, tensors: Path, tmp_path: Path) -> None:
    folder = split(tensors, tmp_path / "same", *range(6))
    flags = ["--load_tensors", "--max_train_steps", 20, "--checkpointing_steps", 20]
    assert train(lora_flags(model, folder, tmp_path / "lora", *flags)) == 0
    (first, _), (last, _) = lines(tmp_path / "lora").values()
    assert last < 0.9 * first


def test_a_resumed_run_has_the_same_lines_and_measures_only_what_is_missing(
    model: Path, prepared: Path, measured_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(measured_run, tmp_path / "lora"))
    for name in ("checkpoint-6", "checkpoint-4"):
        shutil.rmtree(output / name)
    measured: list[int] = []
    write = held_out.write_metrics
    monkeypatch.setattr(held_out, "write_metrics", lambda run, r: (measured.append(r["step"]), write(run, r))[1])
    assert train(lora_flags(model, prepared, output, "--load_tensors")) == 0
    assert measured == [4, 6]
    assert lines(output) == lines(measured_run)
    # The run was killed between checkpoint 6 and its measurement.
    text = (output / METRICS_NAME).read_text().splitlines()
    (output / METRICS_NAME).write_text("\n".join(line for line in text if '"step": 6, "held' not in line))
    assert train(lora_flags(model, prepared, output, "--load_tensors")) == 0
    assert measured == [4, 6, 6]
    assert lines(output) == lines(measured_run)


def test_the_line_of_a_run_without_checkpoint_is_replaced(
    model: Path, prepared: Path, measured_run: Path, tmp_path: Path
) -> None:
    """The first run saved no checkpoint, so the next run may use other flags, here another seed."""
    output = Path(shutil.copytree(measured_run, tmp_path / "lora"))
    for path in output.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert train(lora_flags(model, prepared, output, "--load_tensors", "--seed", 1, "--max_train_steps", 1)) == 0
    assert list(lines(output)) == [0, 1]
    assert lines(output)[0] != lines(measured_run)[0]
