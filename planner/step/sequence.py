"""Write a program's allocations out for the whole depth and several steps, as the caching allocator would see them."""

from __future__ import annotations

from collections.abc import Iterator

from planner.step.engine import Record, Segment

_LOADING = ("load",)
_STATE = ("state",)

Template = list[tuple[int, int]]
"""Events of a segment: (bytes, name of the storage at layer 0); bytes > 0 allocates, else frees."""

_LAYER = 1 << 24  # names of storages: kind << 44 | (layer + _BASE) << 24 | ordinal
_KIND = 1 << 44
_BASE = 1 << 10


class _Layout:
    """Where every storage of the record comes from, in terms that repeat with the layers."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.kinds: dict[tuple[str, int, bool], int] = {}
        self.kind_of: list[int] = []
        self.ordinal: dict[int, tuple[int, int]] = {}
        """Per storage: (segment, position among the allocations of that segment)."""
        self.real = real_layers(record)
        seen: dict[tuple[str, int], int] = {}
        for number, segment in enumerate(record.segments):
            times = seen.get((segment.phase, segment.layer), 0)
            seen[(segment.phase, segment.layer)] = times + 1
            key = (segment.phase, times, segment.layer >= 0)
            self.kind_of.append(self.kinds.setdefault(key, len(self.kinds)))
            place = 0
            for index, size in record.events[segment.start : segment.end]:
                if size > 0:
                    self.ordinal[index] = (number, place)
                    place += 1

    def template(self, number: int, smallest: int) -> Template:
        """The events of a segment above `smallest` bytes; names are relative to the segment's layer."""
        record, segment = self.record, self.record.segments[number]
        out: Template = []
        for index, size in record.events[segment.start : segment.end]:
            if -smallest <= size <= smallest:
                continue
            where, place = self.ordinal[index]
            owner = record.segments[where].layer
            if segment.layer >= 0 and owner >= 0:
                offset = owner - segment.layer
            else:
                offset = self.real[owner][-1] if owner >= 0 else 0
            out.append((size, self.kind_of[where] * _KIND + (offset + _BASE) * _LAYER + place))
        return out


def real_layers(record: Record) -> dict[int, range]:
    """Real layer numbers of every emulated layer."""
    repeats: dict[int, int] = {}
    for segment in record.segments:
        if segment.layer >= 0:
            repeats[segment.layer] = segment.repeat
    real: dict[int, range] = {}
    start = 0
    for layer in sorted(repeats):
        real[layer] = range(start, start + repeats[layer])
        start += repeats[layer]
    return real


def expand(record: Record, steps: int = 2, smallest: int = 0) -> list[tuple[int, int]]:
    """Return (storage, +-bytes) of loading and `steps` optimizer steps over all layers.

    The optimizer state appears where the first optimizer step creates it. What a step leaves behind (gradients)
    is freed at its end, as zero_grad(set_to_none=True) does. Requests of at most `smallest` bytes are left out.
    """
    layout = _Layout(record)
    templates = [layout.template(number, smallest) for number in range(len(record.segments))]
    out: list[tuple[int, int]] = []
    ids: dict[int, int] = {}
    alive: dict[int, int] = {}
    counter = 0
    for number, in_step in _order(record, steps):
        if number < 0:  # the end of a step
            out += [(storage, -size) for storage, size in alive.items()]
            alive.clear()
            continue
        template = templates[number]
        if not template:
            continue
        segment = record.segments[number]
        for layer in _layers_of(segment, layout.real):
            shift = layer * _LAYER if segment.layer >= 0 else 0
            for size, name in template:
                if size > 0:
                    counter += 1
                    ids[name + shift] = counter
                    if in_step:
                        alive[counter] = size
                    out.append((counter, size))
                else:
                    storage = ids.pop(name + shift, 0)
                    if storage:
                        alive.pop(storage, None)
                        out.append((storage, size))
    return out


def small_peak(record: Record, largest: int) -> int:
    """Peak of the bytes alive in requests of at most `largest` bytes (the small pool), in blocks of 512."""
    level = peak = 0
    for segment in record.segments:
        start = level
        inner = 0
        for _, size in record.events[segment.start : segment.end]:
            if -largest <= size <= largest:
                level += -(-size // 512) * 512 if size > 0 else size // 512 * 512
                inner = max(inner, level)
        extra = (segment.repeat - 1) * (level - start)
        peak = max(peak, inner + max(extra, 0))
        level += extra
    return peak


def _layers_of(segment: Segment, real: dict[int, range]) -> range | list[int]:
    """Real layers a segment runs for, in running order (backward counts down)."""
    if segment.layer < 0:
        return [-1]
    layers = real[segment.layer]
    return layers[::-1] if segment.phase == "backward" else layers


def _order(record: Record, steps: int) -> Iterator[tuple[int, bool]]:
    """Segment numbers in the order of a run, with whether they belong to a step; -1 ends a step."""
    loading = [i for i, s in enumerate(record.segments) if s.phase in _LOADING]
    state = [i for i, s in enumerate(record.segments) if s.phase in _STATE]
    optimizer = [i for i, s in enumerate(record.segments) if s.phase == "optimizer"]
    rest = [i for i, s in enumerate(record.segments) if s.phase not in ("load", "state", "optimizer")]
    for number in loading:
        yield number, False
    for step in range(steps):
        for number in rest:
            yield number, True
        if step == 0:
            for number in state:
                yield number, False
        for number in optimizer:
            yield number, True
        yield -1, True
