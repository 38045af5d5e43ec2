"""Intervals of memory, worked by hand: allocated, reserved and device bytes around replayed allocations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.base.units import MiB
from planner.device.hardware import CPU, Gpu
from planner.facts import sources
from planner.model import families
from planner.plan.intervals import Range, allocator_ranges, uncertainty
from planner.training.spec import LoraSpec, TrainingSpec

CONTEXT = (50 * MiB, 100 * MiB, 200 * MiB)
EVENTS = [(0, 300 * MiB), (1, 500 * MiB), (0, -300 * MiB), (1, -500 * MiB)]
"""Two large blocks, each a segment of its own: 800 MiB are allocated and reserved at most."""
PEAK = 803 * MiB
SMALL = 3 * MiB  # beside them, in requests of up to 1 MiB: two segments of 2 MiB
REASONS = (("one", 0.03), ("two", 0.07))


def card(memory: int) -> Gpu:
    return Gpu(gpu_id="toy", name="toy", memory_bytes=memory * MiB, context_bytes=CONTEXT)


def test_without_a_card_the_shares_widen_both_ends() -> None:
    allocated, reserved, ran_out = allocator_ranges(EVENTS, SMALL, PEAK, REASONS, None)
    assert allocated == Range(low=int(PEAK * 0.9), expected=PEAK, high=int(PEAK * 1.1))
    assert reserved.low == allocated.low
    assert reserved.expected == 804 * MiB
    assert reserved.high == pytest.approx(804 * MiB * 1.15, abs=2)  # and 5 % for what is not replayed
    assert not ran_out


def test_the_replayed_peak_is_inside_the_interval() -> None:
    """Whole blocks: a request of 302 MiB less 100 bytes, and a peak that was counted lower."""
    allocated, _, _ = allocator_ranges(EVENTS, SMALL, 700 * MiB, (), None)
    assert (allocated.low, allocated.expected, allocated.high) == (700 * MiB, 700 * MiB, 803 * MiB)


def test_the_cache_cannot_outgrow_the_card() -> None:
    """1100 MiB: 900 beside a large context, 1000 beside the expected one."""
    allocated, reserved, ran_out = allocator_ranges(EVENTS, SMALL, PEAK, REASONS, card(1100))
    assert allocated.high == int(PEAK * 1.1)
    assert (reserved.expected, reserved.high, ran_out) == (804 * MiB, 900 * MiB, False)


def test_what_the_card_has_no_room_for_runs_out() -> None:
    _, reserved, ran_out = allocator_ranges(EVENTS, SMALL, PEAK, REASONS, card(850))
    assert ran_out
    assert reserved.expected == 804 * MiB
    assert reserved.high == pytest.approx(804 * MiB * 1.15, abs=2)


def test_a_cpu_has_no_blocks() -> None:
    """21.5 MiB lie in a segment of 22 MiB whose rest is too small to be split off; a CPU has what is asked for."""
    asked = 43 * MiB // 2
    on_gpu, _, _ = allocator_ranges([(0, asked)], 0, asked, (), card(2000))
    on_cpu, _, _ = allocator_ranges([(0, asked)], 0, asked, (), replace(card(2000), vendor=CPU))
    assert (on_gpu.expected, on_cpu.expected) == (22 * MiB, asked)


def test_amounts_are_added_end_by_end() -> None:
    assert Range(low=1, expected=2, high=3).shifted((10, 20, 40)) == Range(low=11, expected=22, high=43)


LLAMA = families.build_spec(sources.load_config("meta-llama/Llama-3.2-1B").config, model_id="meta-llama/Llama-3.2-1B")
PLAIN = TrainingSpec(method="lora", lora=LoraSpec(r=8))


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"derived": True}, 0.11), ({"remote_code": True}, 0.06), ({"derived": True, "remote_code": True}, 0.16)],
)
def test_what_is_not_known_of_a_class(changes: dict[str, Any], share: float) -> None:
    found = uncertainty(replace(LLAMA, **changes), PLAIN)
    assert sum(part for _, part in found) == pytest.approx(share)
