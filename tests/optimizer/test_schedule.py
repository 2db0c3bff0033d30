"""schedule.py: learning rates equal those of diffusers' get_scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch.nn import Parameter

from cogvideox.config.flags import SCHEDULES, OptimizerFlags
from cogvideox.optimizer.schedule import learning_rate, rate_jump, warm_up_note

TOTAL, PEAK = 100, 3e-4


def rates_of_diffusers(flags: OptimizerFlags, total: int, steps: int) -> list[float]:
    """Returns the rate of each optimizer step in the usual loop: optimizer.step(), then scheduler.step()."""
    optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(
        flags.lr_scheduler,
        optimizer,
        num_warmup_steps=flags.lr_warmup_steps,
        num_training_steps=total,
        num_cycles=flags.lr_num_cycles,
        power=flags.lr_power,
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 10, 99, 150])
@pytest.mark.parametrize(("cycles", "power"), [(1, 1.0), (3, 2.0), (4, 0.5)])
def test_learning_rate_is_that_of_diffusers(name: str, warmup: int, cycles: int, power: float) -> None:
    flags = OptimizerFlags(
        learning_rate=PEAK, lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=cycles, lr_power=power
    )
    wanted = rates_of_diffusers(flags, TOTAL, TOTAL + 5)
    found = [learning_rate(flags, step, TOTAL, 1) for step in range(TOTAL + 5)]
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15)


def test_the_schedules_differ() -> None:
    curves = set()
    for name in SCHEDULES:
        flags = OptimizerFlags(learning_rate=PEAK, lr_scheduler=name, lr_warmup_steps=10, lr_num_cycles=2, lr_power=2)
        curves.add(tuple(round(learning_rate(flags, step, TOTAL, 1), 12) for step in range(TOTAL)))
    assert len(curves) == len(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scale_lr(name: str) -> None:
    """The schedule is that of the scaled peak rate, as trainers give it to get_scheduler."""
    plain = OptimizerFlags(learning_rate=PEAK, lr_scheduler=name, lr_warmup_steps=10)
    scaled = OptimizerFlags(learning_rate=PEAK / 8, lr_scheduler=name, lr_warmup_steps=10, scale_lr=True)
    for step in range(TOTAL):
        assert learning_rate(scaled, step, TOTAL, 8) == pytest.approx(learning_rate(plain, step, TOTAL, 8), rel=1e-9)
        assert learning_rate(plain, step, TOTAL, 8) == learning_rate(plain, step, TOTAL, 1)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "polynomial"])
def test_a_rate_of_zero(name: str) -> None:
    flags = OptimizerFlags(learning_rate=0.0, lr_scheduler=name, lr_warmup_steps=10)
    assert {learning_rate(flags, step, TOTAL, 1) for step in range(TOTAL)} == {0.0}


def test_a_rate_of_zero_with_polynomial() -> None:
    flags = OptimizerFlags(learning_rate=0.0, lr_scheduler="polynomial", lr_warmup_steps=0)
    assert learning_rate(flags, 5, TOTAL, 1) == 0.0


def test_a_schedule_that_is_not_continued_is_reported_with_both_rates() -> None:
    """A finished run of six steps with a cosine schedule is extended by six steps."""
    flags = OptimizerFlags(learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=0)
    last = learning_rate(flags, 5, 6, 1)
    line = rate_jump(flags, last, 6, 12, 1) or ""
    assert line.startswith("the learning rate jumps from 6.7e-05 at step 6 to 0.0005 at step 7: --lr_scheduler cosine")
    assert rate_jump(flags, last, 6, 6, 1) is None  # No step is left.
    assert rate_jump(flags, learning_rate(flags, 2, 6, 1), 3, 6, 1) is None  # The run was only interrupted.
    assert rate_jump(flags, learning_rate(flags, 2999, 6000, 1), 3000, 6001, 1) is None
    constant = OptimizerFlags(learning_rate=1e-3, lr_scheduler="constant")
    assert rate_jump(constant, 1e-3, 6, 12, 1) is None
    assert "from 0.002 at step 6 to 0.001 at step 7" in (rate_jump(constant, 2e-3, 6, 12, 1) or "")
    restarted = OptimizerFlags(
        learning_rate=1e-3, lr_scheduler="cosine_with_restarts", lr_num_cycles=2, lr_warmup_steps=0
    )
    assert rate_jump(restarted, 1e-3, 2, 4, 1) is None  # The schedule is another one, but the next rate is the same.


def test_a_warm_up_that_is_longer_than_the_run_is_reported() -> None:
    flags = OptimizerFlags(learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=500)
    line = warm_up_note(flags, 100, 1) or ""
    assert line.startswith("the learning rate rises to 0.000198 and never reaches 0.001: --lr_warmup_steps 500 is not")
    assert line.endswith("the 100 steps of this run; give --lr_warmup_steps 10")
    assert warm_up_note(flags, 500, 1) is not None
    assert max(learning_rate(flags, step, 500, 1) for step in range(500)) < 1e-3
    assert warm_up_note(flags, 501, 1) is None
    assert max(learning_rate(flags, step, 501, 1) for step in range(501)) == 1e-3
    constant = OptimizerFlags(learning_rate=1e-3, lr_scheduler="constant", lr_warmup_steps=500)
    assert warm_up_note(constant, 100, 1) is None
