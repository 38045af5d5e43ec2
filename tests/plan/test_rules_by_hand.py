"""Rules of the plan on toy numbers, worked by hand: warnings, the odds that a run fits, contexts, what is proposed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from planner.base.units import MiB
from planner.device.hardware import CPU, Gpu
from planner.memory import allocator
from planner.model.families import build_spec
from planner.plan import largest, search
from planner.plan.intervals import allocator_ranges
from planner.plan.notes import lacks_bf16, training_warnings
from planner.plan.predict import predict
from planner.plan.verdict import CLOSE, FITS
from tests.helpers.step_toy import TOYS, toy, training
from tests.helpers.timing_toy import CARD

CONTEXT = (0, 10 * MiB, 20 * MiB)
WIDE = build_spec({**TOYS["llama"], "vocab_size": 200_000}, model_id="wide")
"""Memory grows with the tokens: 400 kB of logits each."""


def card(memory: int, **changes: Any) -> Gpu:
    return replace(CARD, memory_bytes=memory, context_bytes=CONTEXT, **changes)


# --- warnings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "vendor", "native", "lacks"),
    [
        ((7, 5), "NVIDIA", None, True),  # CUDA C++ Programming Guide: bf16 since compute capability 8.0
        ((7, 9), "NVIDIA", None, True),
        ((8, 0), "NVIDIA", None, False),
        ((9, 0), "AMD", None, False),
        ((7, 5), "AMD", None, False),
        (None, "NVIDIA", None, False),
        ((8, 0), "NVIDIA", False, True),
    ],
)
def test_cards_without_bf16_units(
    capability: tuple[int, int] | None, vendor: str, native: bool | None, lacks: bool
) -> None:
    made = card(2**34, compute_capability=capability, vendor=vendor, bf16_native=native)
    assert lacks_bf16(made) == lacks
    told = [note for note in training_warnings(None, training(autocast="bf16"), made) if "bf16 tensor cores" in note]
    assert bool(told) == lacks


def test_flash_attention_needs_ampere() -> None:
    for capability, told in (((7, 0), True), ((7, 5), True), ((8, 0), False), (None, False)):
        made = card(2**34, compute_capability=capability)
        notes = training_warnings(None, training(attention="flash2", autocast="fp16", base_dtype="fp16"), made)
        assert any("FlashAttention-2" in note for note in notes) == told, capability


def test_rows_longer_than_the_positions_are_told() -> None:
    for length, told in ((256, False), (257, True)):
        notes = training_warnings(toy("llama"), training(seq_len=length), None)
        assert any("positions" in note for note in notes) == told


# --- odds ----------------------------------------------------------------------------------------------------------


def test_the_odds_that_a_run_fits() -> None:
    """200 MiB are left, and errors of 80 and 75.

    1100 MiB less 100 of context and 800 allocated. Errors of 80 (10 %) and of (200 - 50) / 2 = 75 MiB are half-widths
    of 90 % intervals (1.645 standard deviations): 200 * 1.6448536 / hypot(80, 75) = 2.9999.
    """
    made = replace(card(1100 * MiB), context_bytes=(50 * MiB, 100 * MiB, 200 * MiB))
    assert largest.fit_probability(800 * MiB, 0.1, made) == pytest.approx(2.99995, rel=1e-5)
    assert largest.fit_probability(1000 * MiB, 0.1, made) == 0.0
    used = replace(made, used_by_others_bytes=200 * MiB)
    assert largest.fit_probability(800 * MiB, 0.1, used) == 0.0
    assert (used.free_bytes, used.rooms) == (900 * MiB, (850 * MiB, 800 * MiB, 700 * MiB))


def test_who_is_not_quite_sure_takes_close_runs() -> None:
    assert largest.allowed_verdicts(0.95) == largest.allowed_verdicts(0.9) == (FITS,)
    assert largest.allowed_verdicts(0.89) == (FITS, CLOSE)


# --- predictions ---------------------------------------------------------------------------------------------------


def test_the_device_holds_a_context_beside_what_is_reserved() -> None:
    found = predict(toy("llama"), training(), card(2**34))
    for end, context in zip(("low", "expected", "high"), CONTEXT, strict=True):
        assert getattr(found.device, end) - getattr(found.reserved, end) == context


def test_a_cpus_memory_has_no_cache() -> None:
    made = card(2**34, vendor=CPU, compute_capability=None, architecture="avx2")
    found = predict(toy("llama"), training(), made)
    assert found.reserved == found.allocated


@pytest.mark.parametrize(("missing", "moves"), [(0, False), (1, True)])
def test_paged_states_move_where_the_expected_context_leaves_no_room(missing: int, moves: bool) -> None:
    """Adapters of rank 1024 page 786,432 elements, two fp32 states: 6,291,456 bytes, once in and once out."""
    settings = training(optimizer="paged-adamw", lora={"r": 1024})
    peak = predict(toy("llama"), settings).breakdown.peak_allocated_bytes
    found = predict(toy("llama"), settings, card(peak + 6_291_456 + CONTEXT[1] - missing))
    assert found.time is not None
    moved = [line.bytes for line in found.time.ledger if line.name == "host transfer"]
    assert moved == ([12_582_912] if moves else [])


def test_the_allocator_has_the_room_beside_the_expected_context() -> None:
    """804 MiB reserved: more than beside a large context (750), less than beside the expected one (850)."""
    events = [(0, 300 * MiB), (1, 500 * MiB), (0, -300 * MiB), (1, -500 * MiB)]
    made = replace(card(950 * MiB), context_bytes=(50 * MiB, 100 * MiB, 200 * MiB))
    _, reserved, ran_out = allocator_ranges(events, 3 * MiB, 803 * MiB, (), made)
    assert (reserved.expected, ran_out) == (804 * MiB, False)


def test_one_layout_of_segments_that_works_is_enough() -> None:
    """Random orders on a card of 100 MiB: the answer is that of the better of falling and rising addresses."""
    seen = set()
    for seed in range(400):
        events = drawn(random.Random(seed))
        falling, rising = (runs_out(events, direction) for direction in (False, True))
        seen.add((falling, rising))
        made = replace(card(100 * MiB), context_bytes=(0, 0, 0))
        _, _, ran_out = allocator_ranges(events, 0, 0, (), made)
        assert ran_out == (falling and rising), seed
    assert (True, False) in seen


def drawn(rng: random.Random) -> list[tuple[int, int]]:
    """Requests of 2 to 40 MiB, freed in any order, that ask for at most 80 MiB at a time."""
    events, alive = [], {}
    for number in range(40):
        size = rng.randrange(2, 41) * MiB
        while alive and (sum(alive.values()) + size > 80 * MiB or rng.random() < 0.3):
            name = rng.choice(list(alive))
            events.append((name, -alive.pop(name)))
        alive[number] = size
        events.append((number, size))
    return events


def runs_out(events: list[tuple[int, int]], rising: bool) -> bool:
    if allocator.replay(events).peak_reserved <= 100 * MiB:
        return False
    try:
        allocator.replay(events, allocator.Settings(capacity=100 * MiB, rising=rising))
    except allocator.OutOfMemory:
        return True
    return False


# --- what is proposed ----------------------------------------------------------------------------------------------


def proposed(settings: Any, memory: int, key: str) -> list[object]:
    """What is proposed for one setting where the run has so much memory, changed alone."""
    found = predict(WIDE, settings, card(memory))
    assert found.verdict != FITS
    changes = [dict(change.settings) for change in search.nearest_changes(found)]
    return [change[key] for change in changes if set(change) <= {key, "gradient_accumulation_steps"} and key in change]


def enough(settings: Any) -> int:
    """The least memory, in steps of 2 MiB, on which a run fits."""
    memory = predict(WIDE, settings).allocated.expected // MiB // 2 * 2
    while predict(WIDE, settings, card(memory * MiB)).verdict != FITS:
        memory += 2
    return memory * MiB


def test_rows_are_cut_to_a_quarter_at_most_and_never_below_128() -> None:
    settings = training(micro_batch_size=1, seq_len=1024, loss="full-logits", gradient_checkpointing="full")
    assert proposed(settings, enough(replace(settings, seq_len=256)), "seq_len") == [256]
    assert proposed(settings, enough(replace(settings, seq_len=128)), "seq_len") == []
    short = replace(settings, seq_len=192)
    assert proposed(short, enough(replace(short, seq_len=128)), "seq_len") == [128]
    assert proposed(short, enough(replace(short, seq_len=64)), "seq_len") == []


def test_a_smaller_micro_batch_keeps_the_rows_of_a_step() -> None:
    """Five rows as two at a time need three micro batches."""
    settings = training(micro_batch_size=5, seq_len=256, loss="fused", gradient_checkpointing="full")
    smaller = replace(settings, micro_batch_size=2, gradient_accumulation_steps=3)
    found = predict(WIDE, settings, card(enough(smaller)))
    changes = [dict(change.settings) for change in search.nearest_changes(found)]
    assert {"micro_batch_size": 2, "gradient_accumulation_steps": 3} in changes
