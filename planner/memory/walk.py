"""Walk a program's allocations: bytes alive at every moment, the peak, the moment it happens and who owns it.

Allocated memory counts blocks of 512 bytes, as torch.cuda.max_memory_allocated does (c10 CUDACachingAllocator
kMinBlockSize).
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.base.records import record
from planner.memory.owners import CATEGORIES, OWNERS
from planner.step.engine import Record, Segment

BLOCK = 512  # CUDACachingAllocator.h kMinBlockSize


@record
class Moment:
    """A place in the step: its phase and the decoder layer (-1: outside the layers)."""

    phase: str
    layer: int
    op: str
    in_head: bool = False
    """Whether it is in a backward that has not reached the last layer; a trace has a phase of its own for that."""

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


def rounded(nbytes: int, block: int = BLOCK) -> int:
    """Round a request up to whole blocks; a release (negative) gives back as many blocks as its request took."""
    return -(-nbytes // block) * block if nbytes > 0 else nbytes // block * block


def peak_bytes(record: Record, block: int = BLOCK) -> int:
    """Return only the peak (planner.sweep.memory: of many configurations). block=1 counts requested bytes."""
    level = peak = 0
    for segment in record.segments:
        start, inner = level, level
        for _, size in record.events[segment.start : segment.end]:
            level += rounded(size, block)
            if level > inner:
                inner = level
        extra = (segment.repeat - 1) * (level - start)
        if segment.phase != "load":
            peak = max(peak, inner + max(extra, 0))
        level += extra
    return peak


def breakdown(record: Record, layer_names: dict[int, int] | None = None, block: int = BLOCK) -> MemoryBreakdown:
    """Walk one configuration: its peak, moment and ledger.

    `layer_names` maps units of the record to the model's layers for the moment's label (program.Program.layer_names);
    block=1 counts requested bytes.
    """
    level = peak = static = 0
    best: tuple[Segment, int, int, int] | None = None  # segment, event position, repetitions before it, its level
    segments: list[SegmentPeak] = []
    for segment in record.segments:
        start, inner, position = level, level, segment.start
        for offset, (_, size) in enumerate(record.events[segment.start : segment.end]):
            level += rounded(size, block)
            if level > inner:
                inner, position = level, segment.start + offset
        extra = (segment.repeat - 1) * (level - start)
        top = inner + max(extra, 0)
        if segment.phase == "load":  # what loading holds for a moment is the replay's: the peak is the step's
            top = level + max(extra, 0)
        elif top > peak:
            peak, best = top, (segment, position, segment.repeat if extra > 0 else 1, top)
        if segment.end > segment.start:
            segments.append(SegmentPeak(phase=segment.phase, layer=segment.layer, bytes=top))
        level += extra
        if segment.phase in ("load", "state"):
            static = level
    assert best is not None
    segment, position, repetitions, _ = best
    storage = record.events[position][0]
    sublayer = record.sublayer_of[storage] if segment.layer >= 0 else 0
    moment = Moment(
        phase=segment.phase,
        layer=(layer_names or {}).get(segment.layer, segment.layer) + sublayer,
        op=record.ops[storage],
        in_head=_in_head(record, record.segments.index(segment), _layers_backward_begins(record)),
    )
    ledger = _ledger(record, segment, position, repetitions, block)
    return MemoryBreakdown(
        peak_allocated_bytes=peak, moment=moment, ledger=ledger, static_bytes=static, segments=tuple(segments)
    )


def _ledger(record: Record, at: Segment, position: int, repetitions: int, block: int) -> tuple[tuple[str, int], ...]:
    """Sum what is alive at one event by category; repeated segments before it count as often as they run."""
    totals = dict.fromkeys(CATEGORIES, 0)
    layers_back = _layers_backward_begins(record)
    owners: dict[tuple[str, int], str] = {}  # per operation and segment that made a storage
    for _, events, times in _until(record, at, position, repetitions):
        for index, size in events:
            made = (record.ops[index], record.segment_of[index])
            owner = owners.get(made)
            if owner is None:
                owners[made] = owner = category(record, index, layers_back)
            totals[owner] += (-(-size // block) * block if size > 0 else size // block * block) * times
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


def _layers_backward_begins(record: Record) -> int:
    """Number of the first segment that belongs to the backward of a layer: before it lie loss and head."""
    for number, segment in enumerate(record.segments):
        if segment.phase == "backward" and segment.layer >= 0:
            return number
    return len(record.segments)


def _in_head(record: Record, number: int, layers_back: int) -> bool:
    """Whether a segment of the backward lies before the layers' backward."""
    return record.segments[number].phase == "backward" and number < layers_back


def category(record: Record, index: int, layers_back: int) -> str:
    """The owner of a storage: by the operation that made it and the place it was made in.

    `layers_back`: the first segment of the layers' backward.

    Raises:
        UnknownName: the operation has no row in OWNERS.
    """
    owner = OWNERS[record.ops[index]]
    number = record.segment_of[index]
    in_head = record.segments[number].phase == "loss" or _in_head(record, number, layers_back)
    return owner.in_head if in_head else owner.category
