"""Write a program's allocations out for the whole depth and several steps, as the caching allocator would see them."""

from __future__ import annotations

from collections.abc import Iterator

from planner.step.engine import Record, Segment

_LOADING = ("load",)
_STATE = ("state",)

Template = list[tuple[int, int, int, int]]
"""Events of a segment: (bytes, segment kind, layer offset, ordinal); bytes > 0 allocates, else frees."""


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

    def template(self, number: int) -> Template:
        """The events of a segment, with the storages they touch named relative to its layer."""
        record, segment = self.record, self.record.segments[number]
        out: Template = []
        for index, size in record.events[segment.start : segment.end]:
            if size == 0:
                continue
            where, place = self.ordinal.get(index, (-1, 0))
            if where < 0:
                continue  # a storage of no bytes
            owner = record.segments[where]
            if segment.layer >= 0 and owner.layer >= 0:
                offset = owner.layer - segment.layer
            else:
                offset = self.real[owner.layer][-1] if owner.layer >= 0 else 0
            out.append((size, self.kind_of[where], offset, place))
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


def expand(record: Record, steps: int = 2) -> Iterator[tuple[int, int]]:
    """Yield (storage, +-bytes) of loading and `steps` optimizer steps over all layers.

    The optimizer state appears where the first optimizer step creates it. What a step leaves behind (gradients)
    is freed at its end, as zero_grad(set_to_none=True) does.
    """
    layout = _Layout(record)
    ids: dict[tuple[int, int, int], int] = {}
    counter = 0
    alive: dict[int, int] = {}
    for number, in_step in _order(record, steps):
        if number < 0:  # the end of a step
            for storage, size in alive.items():
                yield storage, -size
            alive.clear()
            continue
        segment = record.segments[number]
        template = layout.template(number)
        for layer in _layers_of(segment, layout.real):
            for size, kind, offset, place in template:
                owner = offset if segment.layer < 0 else layer + offset
                key = (kind, owner, place)
                if size > 0:
                    counter += 1
                    ids[key] = counter
                    if in_step:
                        alive[counter] = size
                    yield counter, size
                else:
                    storage = ids.pop(key, 0)
                    if storage:
                        alive.pop(storage, None)
                        yield storage, size


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
