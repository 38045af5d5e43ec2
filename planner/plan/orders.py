"""Row orders: the peak over the orders in which unequal rows can come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.base.records import replace
from planner.base.units import GiB
from planner.device.hardware import Gpu
from planner.memory import allocator, sequence, walk
from planner.model.spec import ModelSpec
from planner.plan.intervals import Range, allocator_ranges
from planner.step import program
from planner.step.architecture import architecture
from planner.step.engine import Record
from planner.training.spec import TrainingSpec

if TYPE_CHECKING:
    from planner.runs.dataset.orders import Orders


def _neediest(
    run: program.Program, model: ModelSpec, training: TrainingSpec, orders: Orders, gpu: Gpu | None
) -> tuple[program.Program, int | None]:
    """The program of the micro batch that needs most: the longest, or the next where kernels pad an odd length.

    With the next comes the length that needs as much as the longest (`Orders.order`).
    """
    arch = architecture(gpu, training)

    def of(length: int) -> program.Program:
        return program.run(model, replace(training, seq_len=length), arch)

    most = walk.peak_bytes(run.record)
    short, needy = orders.seen.shortest, orders.second
    other = of(needy)
    if walk.peak_bytes(other.record) <= most:
        return run, None
    while needy - short > 2:
        middle = (short + needy) // 2 | 1  # an odd one is no multiple of what kernels want
        if middle == needy:
            break
        if walk.peak_bytes(of(middle).record) > most:
            needy = middle
        else:
            short = middle
    return other, short


def _over_orders(
    model: ModelSpec,
    training: TrainingSpec,
    orders: Orders,
    alike: int | None,
    equal: tuple[Range, bool],
    record: Record,
    reasons: tuple[tuple[str, float], ...],
    gpu: Gpu | None,
) -> tuple[Range, bool]:
    """Reserved memory, and whether the card is too small, where micro batches differ in length.

    Expected: the typical order; low: the longest micro batch first, as `equal`; high: the slowly growing orders.
    """
    from planner.runs.dataset.orders import SLOW, TYPICAL

    arch = architecture(gpu, training)
    peak, small = walk.peak_bytes(record), sequence.small_peak(record, allocator.SMALL_SIZE)
    known: dict[tuple[int, bool], Record] = {}

    def record_of(length: int, held: bool) -> Record:
        if (length, held) not in known:
            one = replace(training, seq_len=length, gradient_accumulation_steps=1 + held)
            known[length, held] = program.run(model, one, arch).record
        return known[length, held]

    accumulation = training.gradient_accumulation_steps
    starts = orders.starts(accumulation)

    def reserved_in(distance: float) -> tuple[Range, bool]:
        order = orders.order(distance, alike)
        events = sequence.unequal(order, accumulation, record_of, allocator.SMALL_SIZE, starts)
        return allocator_ranges(events, small, peak, reasons, gpu)[1:]

    typical, ran_out = reserved_in(TYPICAL)
    low, high = min(equal[0].low, typical.low), max(equal[0].high, typical.high)
    for distance in SLOW:
        if gpu is None or high < gpu.rooms[2]:  # else it says already that the card may be full
            high = max(high, reserved_in(distance)[0].high)
    return Range(low=low, expected=typical.expected, high=high), ran_out


def _about_orders(reserved: Range, equal: Range) -> str:
    return (
        f"rows of unequal length fragment PyTorch's cache: {reserved.expected / GiB:.1f} GiB are reserved when they "
        f"come in a typical order, {equal.expected / GiB:.1f} GiB when the longest comes first; grouping by length, "
        "packing or PYTORCH_ALLOC_CONF=expandable_segments:True avoids it"
    )
