"""Lanes: when events run, worked by hand; a step of many micro batches is the step with each of them written out."""

from __future__ import annotations

import random

import pytest

from planner.timing.lanes import Event, Phase, beside, duration, launched_ahead, schedule


def test_a_lane_works_in_order_and_waits_for_others() -> None:
    events: tuple[Event, ...] = (
        ("host", 2.0, ()),
        ("compute", 4.0, ()),
        ("communication", 3.0, (0,)),
        ("compute", 1.0, (0, 2)),  # the lane is free at 4, the collective has ended at 5
        ("copy", 4.0, (3,)),
        ("compute", 1.0, (2,)),
    )
    spans, done = schedule(events)
    assert spans == [(0.0, 2.0), (0.0, 4.0), (2.0, 5.0), (5.0, 6.0), (6.0, 10.0), (6.0, 7.0)]
    assert done == {"host": 2.0, "compute": 7.0, "communication": 5.0, "copy": 10.0}
    assert duration(events) == 10.0


@pytest.mark.parametrize("other", [1, 2, -1])
def test_an_event_waits_for_earlier_ones_only(other: int) -> None:
    with pytest.raises(ValueError, match=f"event 1 waits for {other}"):
        schedule((("host", 1.0, ()), ("compute", 1.0, (other,))))


def test_work_beside_the_layers_costs_what_it_takes_longer() -> None:
    assert beside(5.0, "copy", 3.0) == 0.0
    assert beside(5.0, "copy", 7.5) == 2.5
    assert beside(0.0, "communication", 2.0) == 2.0


def written_out(micro_batch: tuple[Phase, ...], times: int, last: Phase) -> float:
    """A phase's device begins when its host does and the device is free; the step ends when both have."""
    host = device = 0.0
    for launch, run in (*micro_batch * times, last):
        host, device = host + launch, max(host, device) + run
    return max(host, device)


@pytest.mark.parametrize("phases", [1, 2, 3])
def test_equal_micro_batches_need_not_be_written_out(phases: int) -> None:
    rng = random.Random(phases)
    for _ in range(300):
        micro = tuple((rng.choice((0.0, 1.0, rng.random())), rng.random() ** 3) for _ in range(phases))
        last, times = (rng.random(), rng.random()), rng.randint(1, 6)
        assert launched_ahead(micro, times, last) == pytest.approx(written_out(micro, times, last), rel=1e-12)


def test_a_host_that_decides() -> None:
    """It launches the backward from 1 to 5, when the device is done with 3 + 2, then the optimizer's second."""
    assert [launched_ahead(((1.0, 3.0), (4.0, 2.0)), times, (1.0, 1.0)) for times in (1, 2, 5)] == [6.0, 11.0, 26.0]


@pytest.mark.extra
def test_cells_of_a_sweep_are_scheduled_each_for_itself() -> None:
    import numpy as np

    hosts, devices, times = np.array([[1.0], [5.0]]), np.array([[3.0, 1.0]]), np.array([1, 4])
    found = launched_ahead(((hosts, devices), (devices, hosts)), times, (hosts, devices))
    assert found.shape == (2, 2)
    for place in np.ndindex(2, 2):
        host, device, number = float(hosts[place[0], 0]), float(devices[0, place[1]]), int(times[place[1]])
        expected = written_out(((host, device), (device, host)), number, (host, device))
        assert found[place] == pytest.approx(expected, rel=1e-12)
