"""Write a program's allocations out for the whole depth and several steps, as the caching allocator would see them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

from planner.step.engine import Record, Segment
from planner.step.loading import overlap

_LOADING = ("load",)
_STATE = ("state",)


class _MicroBatch:
    """The phases of a micro batch: all but loading and what belongs to the optimizer."""

    def __contains__(self, phase: object) -> bool:
        return phase not in ("load", "state", "optimizer")


_MICRO_BATCH = _MicroBatch()

Template = list[tuple[int, int]]
"""Events of a segment: (bytes, name of the storage at layer 0); bytes > 0 allocates, else frees."""

_LAYER = 1 << 24  # names of storages: kind << 44 | (layer + _BASE) << 24 | ordinal
_KIND = 1 << 44
_LOCAL = 1 << 60  # of what dies in the segment that makes it; what lives on may have its name in another emulated layer
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
        arrivals = frozenset(record.arrivals)
        self.arrivals: dict[int, set[int]] = {}
        """Segment -> names, at layer 0, of the weights as they were read."""
        blas = [index for index, op in enumerate(record.ops) if op == "cublas"]
        self.late = dict(zip(blas, record.first_products.values(), strict=False))
        """cuBLAS workspaces, noted with the weights as every steady step has them -> (segment, events before it) of
        the product that asks for one in the first step: it may take, and keep, a piece of what was freed by then."""
        seen: dict[tuple[str, int], int] = {}
        for number, segment in enumerate(record.segments):
            times = seen.get((segment.phase, segment.layer), 0)
            seen[(segment.phase, segment.layer)] = times + 1
            key = (segment.phase, times, segment.layer >= 0)
            self.kind_of.append(self.kinds.setdefault(key, len(self.kinds)))
            place = 0
            for index, size in record.events[segment.start : segment.end]:
                if size > 0:
                    if index in arrivals:
                        self.arrivals.setdefault(number, set()).add(self._name(self.kind_of[-1], 0, place))
                    self.ordinal[index] = (number, place)
                    place += 1

    def template(self, number: int, smallest: int) -> Template:
        """The events of a segment above `smallest` bytes; names are relative to the segment's layer."""
        record, segment = self.record, self.record.segments[number]
        out: Template = []
        late = {at: place for place, (where, at) in enumerate(self.late.values()) if where == number}
        for position, (index, size) in enumerate(record.events[segment.start : segment.end], segment.start):
            if position in late:
                out.append(self._workspace(late.pop(position)))
            if -smallest <= size <= smallest or index in self.late:
                continue
            where, place = self.ordinal[index]
            owner = record.segments[where].layer
            if segment.layer >= 0 and owner >= 0:
                offset = owner - segment.layer
            else:
                offset = self.real[owner][-1] if owner >= 0 else 0
            out.append((size, self._name(self.kind_of[where], offset, place)))
        return out + [self._workspace(place) for place in late.values()]

    @staticmethod
    def _name(kind: int, offset: int, place: int) -> int:
        return kind * _KIND + (offset + _BASE) * _LAYER + place

    def loading(self, smallest: int) -> tuple[list[tuple[int, int]], dict[int, int]]:
        """Events above `smallest` bytes of the loading of all layers, and the storage of every name; from 1 on."""
        events: list[tuple[int, int]] = []
        names: dict[int, int] = {}
        arrivals: list[int] = []
        alone = not self.record.readers  # how long a weight takes to read decides what else is there, small or not
        for number, segment in enumerate(self.record.segments):
            if segment.phase not in _LOADING:
                continue
            template = self.template(number, smallest if alone else 0)
            read = self.arrivals.get(number, ())
            made = {name: number for number, name in enumerate((name for size, name in template if size > 0), 1)}
            own = [(made[name], size) for size, name in template if name in made]
            arrived = [number for name, number in made.items() if name in read]
            for layer in _layers_of(segment, self.real):
                shift = layer * _LAYER if segment.layer >= 0 else 0
                before = len(names)
                names.update({name + shift: before + number for name, number in made.items()})
                arrivals += [before + number for number in arrived]
                if len(own) == len(template):
                    events += [(before + number, size) for number, size in own]
                else:  # it frees what an earlier segment made
                    events += [(names[name + shift], size) for size, name in template]
        if not alone:
            events = overlap(events, arrivals, self.record.readers)
            events = [event for event in events if not -smallest <= event[1] <= smallest]
        return events, names

    def _workspace(self, place: int) -> tuple[int, int]:
        """The event that makes the first (0) or second workspace; a negative name: made once, kept."""
        index = list(self.late)[place]
        return next(size for made, size in self.record.events if made == index), -1 - place


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


class Events(list[tuple[int, int]]):
    """(storage, +-bytes) in order, and the peak of what is asked for in blocks of 512 bytes."""

    requested: int = 0


def expand(record: Record, steps: int = 2, smallest: int = 0) -> Events:
    """Return (storage, +-bytes) of loading and `steps` optimizer steps over all layers.

    The optimizer state appears where the first optimizer step creates it. What a step leaves behind (gradients)
    is freed at its end, as zero_grad(set_to_none=True) does. Requests of at most `smallest` bytes are left out.
    A number names one storage at a time: what dies in the segment that makes it has the same number in every layer.
    """
    layout = _Layout(record)
    loading, ids = layout.loading(smallest)
    out = Events(loading)
    level, top = _walked(out)
    templates = [
        _Compiled([] if segment.phase in _LOADING else layout.template(number, smallest))
        for number, segment in enumerate(record.segments)
    ]
    alive: dict[int, tuple[int, int]] = {}
    for number, in_step in _order(record, steps):
        if number < 0:  # the end of a step
            ended = [(storage, -size) for storage, size in alive.values()]
            level += _walked(ended)[0]
            out += ended
            alive.clear()
            continue
        template = templates[number]
        if not template.events:
            continue
        segment = record.segments[number]
        for layer in _layers_of(segment, layout.real):
            shift = layer * _LAYER if segment.layer >= 0 else 0
            events = template.events.copy()
            for place, size, name in template.kept:
                events[place] = made = (name + shift, size)
                ids[made[0]] = made[0]
                if in_step:
                    alive[made[0]] = made
            dropped = []
            for place, size, name in template.foreign:
                if name < 0 and name not in ids:
                    ids[name] = name
                    events[place] = (name, size)
                    continue
                storage = ids.pop(name + shift, 0) if name >= 0 else 0
                if storage:
                    alive.pop(name + shift, None)
                    events[place] = (storage, size)
                else:
                    dropped.append(place)
            for place in reversed(dropped):
                del events[place]
            net, highest = _walked(events) if dropped else template.walked
            top = max(top, level + highest)
            level += net
            out += events
    out.requested = top
    return out


def _walked(events: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """What events add to the level in blocks of 512 bytes, and the highest that they bring it to."""
    level = top = 0
    for _, size in events:
        level += -(-size // 512) * 512 if size > 0 else size // 512 * 512
        if level > top:
            top = level
    return level, top


class _Compiled:
    """A template sorted by what differs from layer to layer."""

    __slots__ = ("events", "foreign", "kept", "walked")

    def __init__(self, template: Template) -> None:
        self.events = [(name + _LOCAL, size) for size, name in template]
        self.kept: list[tuple[int, int, int]] = []
        """(place among the events, bytes, name) of what outlives the segment."""
        self.foreign: list[tuple[int, int, int]] = []
        """The same of what an earlier segment made, and of workspaces."""
        made: dict[int, tuple[int, int, int]] = {}
        for place, (size, name) in enumerate(template):
            if name >= 0 and size > 0:
                made[name] = (place, size, name)
            elif made.pop(name, None) is None:
                self.foreign.append((place, size, name))
        self.kept += made.values()
        self.walked = _walked(self.events)


RecordOf = Callable[[int, bool], Record]
"""record_of(length, held): the program of a micro batch of that length; `held`: an earlier one left its gradients."""


def unequal(
    order: Sequence[tuple[int, int]],
    accumulation: int,
    record_of: RecordOf,
    smallest: int = 0,
    starts: Sequence[int] = (),
) -> list[tuple[int, int]]:
    """Return (storage, +-bytes) of a run whose micro batches differ in length, as `expand` does of one length.

    `order` names the micro batches that need more than all before, (number, length); the others between them leave
    the cache as it is and are left out. Optimizer steps come where `accumulation` puts them. The optimizer's state
    takes what the first step left free, so the order begins anew after that step. The neediest micro batch comes once
    more in a step of its own, as in `expand`, and in one for each of `starts`, the lengths of micro batches that begin
    a step: the gradients that those leave where they found room may be in its way.
    """
    longest = order[-1][1]
    probe, out = _Writer(smallest), _Writer(smallest)
    record = record_of(longest, False)
    micro_batches = list(order)
    if probe.write(record, _STATE):
        micro_batches = [one for one in order if one[0] < accumulation]
        micro_batches += [(number + accumulation, length) for number, length in order]
    after = (micro_batches[-1][0] // accumulation + 1) * accumulation
    micro_batches += [(after + i, longest) for i in range(min(accumulation, 2))]
    if accumulation > 1 and probe.write(record, _MICRO_BATCH):
        for first in starts:
            after += accumulation
            micro_batches += [(after, first), (after + 1, longest)]
    out.load(record)
    gradients: list[tuple[int, int]] = []
    has_state = False
    for place, (number, length) in enumerate(micro_batches):
        record = record_of(length, bool(gradients))
        left = out.write(record, _MICRO_BATCH)
        if gradients:
            out.free(left)
        else:
            gradients = left
        following = micro_batches[place + 1][0] if place + 1 < len(micro_batches) else after + accumulation
        if following // accumulation == number // accumulation:
            continue
        record = record_of(length, False)
        if not has_state:
            out.write(record, _STATE)
            has_state = True
        out.free(out.write(record, ("optimizer",)))
        out.free(gradients)
        gradients = []
    return out.events


class _Writer:
    """Events of parts of programs one after another; what a part leaves alive is its caller's to free."""

    def __init__(self, smallest: int) -> None:
        self.smallest = smallest
        self.events: list[tuple[int, int]] = []
        self.number = 0
        self.known: dict[int, tuple[_Layout, list[Template]]] = {}
        self.workspaces: set[int] = set()

    def load(self, record: Record) -> None:
        """Write the loading, which comes first."""
        self.events, names = _Layout(record).loading(self.smallest)
        self.number = len(names)

    def write(self, record: Record, phases: Container[str]) -> list[tuple[int, int]]:
        """Write the segments of these phases; return the storages that live on, with their bytes."""
        if id(record) not in self.known:
            layout = _Layout(record)
            self.known[id(record)] = layout, [layout.template(n, self.smallest) for n in range(len(record.segments))]
        layout, templates = self.known[id(record)]
        alive: dict[int, tuple[int, int]] = {}
        for segment, template in zip(record.segments, templates, strict=True):
            if segment.phase not in phases or not template:
                continue
            for layer in _layers_of(segment, layout.real):
                shift = layer * _LAYER if segment.layer >= 0 else 0
                for size, name in template:
                    if name < 0:
                        if name not in self.workspaces:
                            self.number += 1
                            self.workspaces.add(name)
                            self.events.append((self.number, size))
                    elif size > 0:
                        self.number += 1
                        alive[name + shift] = (self.number, size)
                        self.events.append((self.number, size))
                    elif name + shift in alive:
                        self.events.append((alive.pop(name + shift)[0], size))
        return list(alive.values())

    def free(self, storages: list[tuple[int, int]]) -> None:
        """End the life of what a part left alive."""
        self.events += [(storage, -size) for storage, size in storages]


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
    """Segments after loading in the order of a run, with whether they belong to a step; -1 ends a step."""
    state = [i for i, s in enumerate(record.segments) if s.phase in _STATE]
    optimizer = [i for i, s in enumerate(record.segments) if s.phase == "optimizer"]
    rest = [i for i, s in enumerate(record.segments) if s.phase in _MICRO_BATCH]
    for step in range(steps):
        for number in rest:
            yield number, True
        if step == 0:
            for number in state:
                yield number, False
        for number in optimizer:
            yield number, True
        yield -1, True
