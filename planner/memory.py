"""Walk a program's allocations: bytes alive at every moment, the peak, the moment it happens and who owns it.

Allocated memory counts blocks of 512 bytes, as torch.cuda.max_memory_allocated does (c10 CUDACachingAllocator
kMinBlockSize).
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.records import record
from planner.step.engine import Record, Segment

BLOCK = 512  # CUDACachingAllocator.h kMinBlockSize

CATEGORIES = (
    "base weights", "adapters", "gradients", "optimizer state", "activations", "checkpoints", "logits and loss",
    "activation gradients", "dequantized weights", "workspaces", "inputs",
)  # fmt: skip
"""Owners of memory in the ledger, in the order they are printed."""

_BY_OP = {
    "weight": "base weights",
    "adapter": "adapters",
    "gradient": "gradients",
    "optimizer_state": "optimizer state",
    "optimizer_temporary": "workspaces",
    "checkpoint": "checkpoints",
    "checkpoint_reload": "checkpoints",
    "dequantize": "dequantized weights",
    "cublas": "workspaces",
    "input_ids": "inputs",
    "attention_mask": "inputs",
    "positions": "inputs",
    "rotary_tables": "inputs",
}
_LOGIT_OPS = ("lm_head", "log", "nll", "loss", "outputs_to_fp32")


@record
class Moment:
    """A place in the step: its phase and the decoder layer (-1: outside the layers; index in the emulated stack)."""

    phase: str
    layer: int
    op: str

    def __str__(self) -> str:
        where = {"loss": "head and loss"}.get(self.phase, self.phase)
        return where if self.layer < 0 else f"{where}, layer {self.layer}"


@record
class SegmentPeak:
    """The highest level inside one segment of the step."""

    phase: str
    layer: int
    bytes: int


@record
class MemoryBreakdown:
    """Allocated memory of one step: the peak, its moment, its owners, and the level through the step."""

    peak_allocated_bytes: int
    moment: Moment
    ledger: tuple[tuple[str, int], ...]
    """(category, bytes) alive at the peak; sums to peak_allocated_bytes."""
    static_bytes: int
    """Alive before the forward: weights, adapters, optimizer state, workspaces."""
    segments: tuple[SegmentPeak, ...]


def rounded(size: int, block: int = BLOCK) -> int:
    """Whole blocks of a request (positive), or what its end gives back (negative)."""
    return -(-size // block) * block if size > 0 else size // block * block


def peak_bytes(record: Record, block: int = BLOCK) -> int:
    """Return only the peak. block=1 counts requested bytes."""
    level = peak = 0
    for segment in record.segments:
        start, inner = level, level
        for _, size in record.events[segment.start : segment.end]:
            level += rounded(size, block)
            if level > inner:
                inner = level
        extra = (segment.repeat - 1) * (level - start)
        peak = max(peak, inner + max(extra, 0))
        level += extra
    return peak


def breakdown(record: Record, layer_names: dict[int, int] | None = None) -> MemoryBreakdown:
    """Walk one configuration: its peak, moment and ledger.

    `layer_names` maps emulated layers to real ones for the moment's label.
    """
    level = peak = static = 0
    best: tuple[Segment, int, int, int] | None = None  # segment, event position, repetitions before it, its level
    segments: list[SegmentPeak] = []
    for segment in record.segments:
        start, inner, position = level, level, segment.start
        for offset, (_, size) in enumerate(record.events[segment.start : segment.end]):
            level += rounded(size)
            if level > inner:
                inner, position = level, segment.start + offset
        extra = (segment.repeat - 1) * (level - start)
        top = inner + max(extra, 0)
        if top > peak:
            peak, best = top, (segment, position, segment.repeat if extra > 0 else 1, top)
        if segment.end > segment.start:
            segments.append(SegmentPeak(phase=segment.phase, layer=segment.layer, bytes=top))
        level += extra
        if segment.phase in ("load", "state"):
            static = level
    assert best is not None
    segment, position, repetitions, _ = best
    names = layer_names or {}
    moment = Moment(
        phase=segment.phase,
        layer=names.get(segment.layer, segment.layer),
        op=record.ops[record.events[position][0]],
    )
    ledger = _ledger(record, segment, position, repetitions)
    return MemoryBreakdown(
        peak_allocated_bytes=peak, moment=moment, ledger=ledger, static_bytes=static, segments=tuple(segments)
    )


def _ledger(record: Record, at: Segment, position: int, repetitions: int) -> tuple[tuple[str, int], ...]:
    """Sum what is alive at one event by category; repeated segments before it count as often as they run."""
    totals = dict.fromkeys(CATEGORIES, 0)
    for segment, events, times in _until(record, at, position, repetitions):
        for index, size in events:
            totals[category(record, index)] += rounded(size) * times
        del segment
    return tuple((name, totals[name]) for name in CATEGORIES if totals[name])


def _until(
    record: Record, at: Segment, position: int, repetitions: int
) -> Iterator[tuple[Segment, list[tuple[int, int]], int]]:
    for segment in record.segments:
        if segment is at:
            if repetitions > 1:
                yield segment, record.events[segment.start : segment.end], repetitions - 1
            yield segment, record.events[segment.start : position + 1], 1
            return
        yield segment, record.events[segment.start : segment.end], segment.repeat


def category(record: Record, index: int) -> str:
    """The owner of a storage: by the operation that made it and the phase it was made in."""
    op = record.ops[index]
    known = _BY_OP.get(op)
    if known:
        return known
    if op.startswith("weight_") and op != "weight_grad":
        return "base weights"
    phase = record.segments[record.segment_of[index]].phase
    if phase == "loss" or op.startswith(_LOGIT_OPS):
        return "logits and loss"
    if op.endswith("_workspace"):
        return "workspaces"
    if op.endswith("_grad") or op in ("mul_grad", "accumulate_grad", "sum_to"):
        return "activation gradients"
    return "activations"
