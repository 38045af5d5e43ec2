"""Steps and learning rates of a run, worked by hand after transformers' Trainer and optimization.py."""

from __future__ import annotations

import math

import pytest

from planner.runs.schedule import Schedule, count_steps, warmup_of, warnings


@pytest.mark.parametrize(
    ("drop_last", "micro", "per_epoch", "total"),
    [  # 1001 rows by 2: 501 micro batches, by 4: 126 steps, 3 epochs; or 125 whole batches of 8
        (False, 501, 126, 378),
        (True, 500, 125, 375),
    ],
)
def test_steps_of_an_epoch(drop_last: bool, micro: int, per_epoch: int, total: int) -> None:
    found = count_steps(1001, 2, 4, 3.0, drop_last=drop_last)
    assert (found.micro_batches, found.per_epoch, found.total) == (micro, per_epoch, total)
    assert (found.per_epoch_floor, found.per_epoch_ceil, found.floor_total, found.ceil_total) == (125, 126, 375, 378)
    assert found.drops_last == drop_last


def test_part_of_an_epoch_is_rounded_up() -> None:
    assert count_steps(1001, 2, 4, 0.5).total == 63


@pytest.mark.parametrize(
    ("shape", "rates"),
    [  # of 1.0 at steps 0, 5, 10 (the end of the warm-up), 60 (its middle), 110 (the end)
        ("constant", (0.0, 0.5, 1.0, 1.0, 1.0)),
        ("linear", (0.0, 0.5, 1.0, 0.5, 0.0)),
        ("cosine", (0.0, 0.5, 1.0, 0.5, 0.0)),
    ],
)
def test_learning_rates(shape: str, rates: tuple[float, ...]) -> None:
    schedule = Schedule(peak=1.0, shape=shape, warmup_steps=10, total_steps=110)  # type: ignore[arg-type]
    assert [schedule.rate(step) for step in (0, 5, 10, 60, 110)] == pytest.approx(list(rates), abs=1e-12)
    quarter = {"constant": 1.0, "linear": 0.75, "cosine": 0.5 + math.sqrt(0.125)}[shape]
    assert schedule.rate(35) == pytest.approx(quarter)
    assert schedule.peak_reached == 1.0


def test_a_share_of_the_run_warms_up() -> None:
    assert warmup_of(101, None, 0.03) == 4  # rounded up
    assert warmup_of(101, 7, None) == 7
    assert warmup_of(101, None, None) == 0


def test_what_goes_wrong_in_silence_is_told() -> None:
    few = count_steps(7, 2, 4, 1.0, drop_last=True)
    (line,) = warnings(few, Schedule(total_steps=0), 2, 4)
    assert line.startswith("zero steps")
    steps = count_steps(800, 2, 4, 1.0)
    assert list(warnings(steps, Schedule(warmup_steps=20, total_steps=100), 2, 4)) == []
    (line,) = warnings(steps, Schedule(warmup_steps=21, total_steps=100), 2, 4)
    assert "21 % of the run" in line
    assert len(list(warnings(steps, Schedule(warmup_steps=100, total_steps=100), 2, 4))) == 2  # and its peak is missed
