"""A step on a toy card, worked by hand: what host and device do when, copies beside kernels, bounds and intervals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.device.hardware import CPU
from planner.timing import step_time
from tests.helpers.timing_toy import CARD, coefficients, kernel, record, training

SLOW_HOST = {"launch_forward": 1.0, "launch_recomputation": 1.0, "launch_backward": 1.0, "launch_optimizer": 1.0,
             "kernel_latency": 0.0}  # fmt: skip
"""A launch takes a second: the counts below are the host's seconds."""


def seconds(op: str, on_device: float, launches: float, segment: int, **values: Any) -> Any:
    """A kernel of so many seconds on the device (0.5 GB/s) that the host launches for so many seconds."""
    rate = 0.25e9 if "transfer" in op else 0.5e9
    return kernel(op, nbytes=on_device * rate, count=launches, segment=segment, elements=0.0, **values)


PHASES = (("forward", 0, 1), ("backward", 0, 1), ("optimizer", -1, 1))


def step(
    forward: tuple[float, float], backward: tuple[float, float], optimizer: tuple[float, float], accumulation: int = 1,
    card: Any = CARD,
) -> step_time.StepTime:  # fmt: skip
    """Three kernels of (device, host) seconds; the optimizer's host also touches its one tensor for a second."""
    run = record(
        seconds("elementwise", *forward, segment=1),
        seconds("elementwise", *backward, segment=2),
        seconds("optimizer", optimizer[0], optimizer[1] - 1, segment=3),
        phases=PHASES,
    )
    settings = training(gradient_accumulation_steps=accumulation)
    return step_time.step_time(run, settings, card, coefficients(SLOW_HOST))


@pytest.mark.parametrize(
    ("forward", "backward", "optimizer", "accumulation", "total"),
    [  # (device, host) seconds; the framework's own half second comes on top
        ((5, 2), (6, 2), (3, 2), 1, 14.0),  # the device is behind from the start: 5 + 6 + 3
        ((1, 5), (4, 1), (1, 1), 1, 10.0),  # the backward cannot begin before the host does, after 5: 5 + 4 + 1
        ((2, 5), (1, 3), (4, 1), 1, 12.0),  # nor the optimizer: 5 + 3 + 4
        ((1, 5), (1, 4), (1, 3), 1, 12.0),  # the host decides all the way
        ((1, 2), (1, 2), (9, 1), 1, 13.0),  # the end of the step is the end of both: 2 + 2 + 9
        ((5, 2), (6, 2), (3, 2), 3, 36.0),  # 3 * (5 + 6) + 3
        ((1, 5), (4, 1), (1, 1), 3, 22.0),  # 2 * (5 + 1) launched first, then 5 + 4 + 1: the device has caught up
        ((1, 3), (7, 1), (1, 1), 2, 19.0),  # launched 3, then 7 + 1 + 7 + 1 without a gap
        ((6, 1), (1, 8), (1, 1), 2, 19.0),  # the host launches 9 + 9 while the device runs 7 + 7, then 1
    ],
)
def test_three_kernels_and_one_host(
    forward: tuple[float, float], backward: tuple[float, float], optimizer: tuple[float, float], accumulation: int,
    total: float,
) -> None:  # fmt: skip
    found = step(forward, backward, optimizer, accumulation)
    assert found.step_s.expected == pytest.approx(total + 0.5)
    device = accumulation * (forward[0] + backward[0]) + optimizer[0]
    assert found.launch_wait_s == pytest.approx(total - device)


def test_a_cpu_does_both_in_turn() -> None:
    """No queue: 5 + 6 + 3 on the device and 2 + 2 + 1 launches (no second touch of the optimizer's tensor)."""
    found = step((5, 2), (6, 2), (3, 2), card=replace(CARD, vendor=CPU, compute_capability=None))
    assert found.step_s.expected == pytest.approx(14 + 5 + 0.5)


def test_parts_share_the_wait_by_their_launches() -> None:
    """5 + 4 + 1 where the device works 1 + 4 + 1: the wait of 4 goes 5 : 1 : 1 to the parts."""
    found = step((1, 5), (4, 1), (1, 1))
    assert found.launch_wait_s == pytest.approx(4.0)
    assert found.forward_s == pytest.approx(1 + 4 * 5 / 7)
    assert found.backward_s == pytest.approx(4 + 4 / 7)
    assert found.optimizer_s == pytest.approx(1 + 4 / 7)
    assert found.overhead_s == 0.5


def test_a_segment_counts_as_often_as_it_stands_for_layers() -> None:
    run = record(seconds("elementwise", 2.0, 1.0, segment=1), phases=(("forward", 0, 7),))
    found = step_time.step_time(run, training(gradient_accumulation_steps=2), CARD, coefficients(SLOW_HOST))
    assert found.forward_s == pytest.approx(14.0)
    assert found.step_s.expected == pytest.approx(28.5)
    (line,) = found.ledger
    assert (line.name, line.seconds, line.launches) == ("element-wise", pytest.approx(28.0), pytest.approx(14.0))
    assert line.bytes == pytest.approx(14e9)


def test_the_ledger_counts_the_optimizer_once() -> None:
    """Four micro batches of 2 + 1 s, then one optimizer of 3 s, whose tensor the host touches once."""
    found = step((2, 0), (1, 0), (3, 1), 4)
    lines = {line.name: line for line in found.ledger}
    assert lines["element-wise"].seconds == pytest.approx(12.0)
    assert lines["optimizer"].seconds == pytest.approx(3.0)
    assert lines["optimizer"].bytes == pytest.approx(1.5e9)


def test_no_overlap_is_better_than_the_longest_of_all() -> None:
    """The host launches for 5 + 4 + 3 s: more than the 3 s of traffic, so the step cannot be shorter."""
    assert step((1, 5), (1, 4), (1, 3)).perfect_overlap_s == pytest.approx(12.0)
    assert step((5, 2), (6, 2), (3, 2)).perfect_overlap_s == pytest.approx(14.0)


def test_what_bounds_a_step() -> None:
    assert step((1, 5), (4, 1), (1, 1)).bound == "kernel launch"  # 4 of 10 seconds
    assert step((5, 2), (6, 2), (3, 2)).bound == "memory bandwidth"
    assert step((3, 4), (3, 1), (3, 1)).bound == "memory bandwidth"  # waits 1 of 10
    busy = record(seconds("indexed", 1.0, 1.0, segment=1), phases=(("forward", 0, 1),))
    busy.kernels[0].elements = 8e9  # 4 s of 2e9 elements a second
    found = step_time.step_time(busy, training(), CARD, coefficients(SLOW_HOST))
    assert (found.bound, found.ledger[0].bound) == ("compute", "compute")
    copies = record(
        seconds("elementwise", 1.0, 1.0, segment=1), seconds("host_transfer", 2.0, 1.0, segment=1), phases=PHASES
    )
    assert step_time.step_time(copies, training(), CARD, coefficients(SLOW_HOST)).bound == "host transfer"


def test_bounds_of_perfect_and_of_no_overlap() -> None:
    """Arithmetic 4, traffic 1 + 2, launches 1 + 1: at best 4 s, one after another 9.5 with the framework."""
    run = record(seconds("indexed", 1.0, 1.0, segment=1), seconds("elementwise", 2.0, 1.0, segment=1), phases=PHASES)
    run.kernels[0].elements = 8e9
    found = step_time.step_time(run, training(), CARD, coefficients(SLOW_HOST))
    assert found.perfect_overlap_s == pytest.approx(4.0)
    assert found.no_overlap_s == pytest.approx(9.5)
    assert found.step_s.expected == pytest.approx(6.5)


# --- copies between card and host ----------------------------------------------------------------------------------


def layered(op: str, copy: float, repeat: int = 4, accumulation: int = 1) -> step_time.StepTime:
    """Layers of 3 s forward, 3 s recomputation and 5 s backward, each with a copy of `copy` s to the host and back."""
    run = record(
        seconds(op, copy, 0.0, segment=1),
        seconds("elementwise", 3.0, 0.0, segment=1),
        seconds("elementwise", 10.0, 0.0, segment=2),  # the loss: copies do not run beside it
        seconds(op, copy, 0.0, segment=3, recomputed=True),
        seconds("elementwise", 3.0, 0.0, segment=3, recomputed=True),
        seconds("elementwise", 5.0, 0.0, segment=3),
        phases=(("forward", 0, repeat), ("loss", -1, 1), ("backward", 0, repeat)),
    )
    settings = training(gradient_accumulation_steps=accumulation)
    values = coefficients({"kernel_latency": 0.0, "framework_step": 0.0})
    return step_time.step_time(run, settings, CARD, values)


@pytest.mark.parametrize(
    ("op", "copy", "forward", "recomputation"),
    [
        ("host_transfer", 2.0, 4 * (3 + 2) + 10, 4 * (3 + 2)),  # one after the other
        ("overlapped_transfer", 2.0, 4 * 3 + 10, 4 * 3),  # 2 s hide behind 3, and behind 3 + 5
        ("overlapped_transfer", 4.0, 4 * 4 + 10, 4 * 3),  # the forward waits 1 s a layer
        ("overlapped_transfer", 9.0, 4 * 9 + 10, 4 * (3 + 1)),  # 9 beside 3 + 5
    ],
)
def test_copies_run_after_or_beside_the_layers(op: str, copy: float, forward: float, recomputation: float) -> None:
    found = layered(op, copy)
    assert found.forward_s == pytest.approx(forward)
    assert found.recomputation_s == pytest.approx(recomputation)
    assert found.backward_s == pytest.approx(4 * 5.0)
    assert found.step_s.expected == pytest.approx(forward + recomputation + 20)
    lines = {line.name: line for line in found.ledger}
    assert lines["host transfer"].seconds == pytest.approx(found.step_s.expected - 4 * 11 - 10)
    assert lines["host transfer"].bytes == pytest.approx(8 * copy * 0.25e9)
    assert found.perfect_overlap_s <= found.step_s.expected <= found.no_overlap_s
    assert found.no_overlap_s == pytest.approx(4 * 11 + 10 + 8 * copy)


def test_copies_repeat_with_the_micro_batches() -> None:
    one, three = (layered("overlapped_transfer", 9.0, accumulation=n) for n in (1, 3))
    assert three.step_s.expected == pytest.approx(3 * one.step_s.expected)
    assert sum(line.seconds for line in three.ledger) == pytest.approx(three.step_s.expected)
    assert one.perfect_overlap_s == pytest.approx(8 * 9)  # the link's seconds, above the card's 54


@pytest.mark.parametrize(
    ("room", "moves"),
    [(None, False), (1e9, False), (0.5e9, False), (0.49e9, True), (-1.0, True)],
)
def test_managed_memory_moves_where_it_has_no_room(room: float | None, moves: bool) -> None:
    """0.5 GB of state: 1 GB in and out at 0.25 GB/s takes 4 s, once in an optimizer step."""
    run = record(
        seconds("elementwise", 3.0, 0.0, segment=1), seconds("optimizer", 1.0, 0.0, segment=3),
        kernel("paged_transfer", nbytes=1e9, segment=3), phases=PHASES,
    )  # fmt: skip
    values = coefficients({"kernel_latency": 0.0, "framework_step": 0.0})
    found = step_time.step_time(run, training(gradient_accumulation_steps=2), CARD, values, room)
    assert found.step_s.expected == pytest.approx(7.0 + 4.0 * moves, abs=1e-4)
    assert found.optimizer_s == pytest.approx(1.0 + 4.0 * moves, abs=1e-4)
    assert [line.bytes for line in found.ledger if line.name == "host transfer"] == ([1e9] if moves else [])


# --- intervals -----------------------------------------------------------------------------------------------------


def interval(formula_error: float | None, origin: str = "assumed") -> step_time.StepTime:
    """8 s of memory traffic, 1 s of copies, 1 s of waiting; errors of a fifth, a half and a tenth of each."""
    run = record(
        seconds("elementwise", 8.0, 2.0, segment=1), seconds("host_transfer", 1.0, 8.0, segment=1), phases=PHASES
    )
    errors = {"bandwidth": 0.1, "host_link": 0.125e9, "launch_forward": 0.1, "kernel_latency": 1.0}
    found = coefficients({**SLOW_HOST, "framework_step": 0.0}, errors, origin)
    found.formula_error = formula_error
    return step_time.step_time(run, training(), CARD, found)


def test_the_interval_is_the_root_of_the_squares_of_what_is_not_sure() -> None:
    """Of 10 s: 0.10 formulas, 0.8 * 0.2 bandwidth, 0.1 * 0.5 link, 0.1 * 0.1 launches; times 1.645."""
    found = interval(None)
    assert dict(found.uncertainty) == pytest.approx(
        {"formulas": 0.10, "bandwidth": 0.16, "host_link": 0.05, "launch_forward": 0.01}
    )
    spread = 1.645 * (0.10**2 + 0.16**2 + 0.05**2 + 0.01**2) ** 0.5
    assert found.step_s.expected == pytest.approx(10.0)
    assert found.step_s.high == pytest.approx(10.0 * (1 + spread))
    assert found.step_s.low == pytest.approx(10.0 / (1 + spread))


def test_held_out_errors_contain_those_of_fitted_coefficients() -> None:
    assert dict(interval(0.04, "fitted").uncertainty) == {"formulas": 0.04}
    assert set(dict(interval(0.04, "borrowed").uncertainty)) == {
        "formulas", "bandwidth", "host_link", "launch_forward"
    }  # fmt: skip


def test_an_anchor_shifts_what_two_runs_have_in_common() -> None:
    """Shared: 0.1 * 0.1 * 0.5 of the formulas and 0.2 * 0.3; own: 0.1^2 + 0.2^2 + 0.05^2 of measuring."""
    anchor = (("formulas", 0.1), ("matmul", 0.2))
    target = (("formulas", 0.1), ("matmul", 0.3), ("bandwidth", 0.4))
    assert step_time.anchor_factor(anchor, target, 1.5) == pytest.approx(1.5 ** (0.065 / 0.0525))
    assert step_time.anchor_factor(anchor, (("bandwidth", 0.4),), 1.5) == 1.0


def test_waiting_for_copies_is_as_sure_as_the_link() -> None:
    """9 s of copies beside 3 s of kernels: 6 of 9 s follow the link, whose error is a half."""
    run = record(
        seconds("overlapped_transfer", 9.0, 0.0, segment=1), seconds("elementwise", 3.0, 0.0, segment=1), phases=PHASES
    )
    values = coefficients({"kernel_latency": 0.0, "framework_step": 0.0}, {"host_link": 0.125e9})
    found = step_time.step_time(run, training(), CARD, values)
    assert dict(found.uncertainty) == pytest.approx({"formulas": 0.10, "host_link": 0.5 * 6 / 9})


def test_the_models_own_flops_leave_recomputation_out() -> None:
    """Two micro batches of 10^9 FLOPs forward, again, and backward; the toy card offers 10^12 a second."""
    run = record(
        seconds("elementwise", 1.0, 0.0, segment=1), seconds("elementwise", 1.0, 0.0, segment=2, recomputed=True),
        seconds("elementwise", 1.0, 0.0, segment=2), phases=PHASES,
    )  # fmt: skip
    values = coefficients({"kernel_latency": 0.0, "framework_step": 0.0})
    found = step_time.step_time(run, training(gradient_accumulation_steps=2), CARD, values)
    assert (found.model_flops, found.hardware_flops) == (4e9, 6e9)
    assert found.step_s.expected == pytest.approx(6.0)
    assert found.model_flops_utilization == pytest.approx(4e9 / 6e12)
    assert found.hardware_flops_utilization == pytest.approx(1e-3)
    assert (found.tokens, found.tokens_per_s) == (600, pytest.approx(100.0))
