"""Summary: what a trace says about its last step, segment by segment, small enough to print and to extrapolate.

Bytes are blocks of 512, as torch.cuda.max_memory_allocated counts them, or requested bytes (block=1); FLOPs are those
of one micro batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from calibrate.oracle import alike, ledger
from calibrate.oracle.result import STEPS, TraceResult
from calibrate.oracle.trace import trace
from planner.device.cuda_rules import Architecture
from planner.memory.owners import CATEGORIES
from planner.memory.walk import BLOCK
from planner.training.spec import TrainingSpec

Counts = dict[str, int]

SHALLOW, DEEP = 3, 4
"""Repetitions traced: a first, a last, and one or two between them."""

_LAYER = re.compile(r"layer\.(\d+) (forward|backward)")
_WRAPPERS = re.compile(r"^(base_model\.model\.)+")
_INNER = re.compile(r"\.(base_layer|lora_\w+|modules_to_save)\b.*")
_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A named stretch of the step: its levels, what is alive at its highest, and its FLOPs."""

    name: str
    start: int
    peak: int
    end: int
    op: str
    module: str
    """The operation, and the module it ran in, that reached the peak."""
    ledger: Counts
    """Bytes alive at the peak by category."""
    modules: Counts
    """Bytes alive at the peak by the module that made them, layer numbers replaced by a star."""
    flops: dict[str, Counts]
    """By phase (forward, recompute, backward) and operation."""

    @property
    def layer(self) -> int:
        """Number of the decoder layer; -1 outside the layers."""
        match = _LAYER.fullmatch(self.name)
        return int(match[1]) if match else -1

    def describe(self) -> dict[str, Any]:
        """Return the segment as plain JSON values (without modules and FLOPs, which are reported as totals)."""
        return {
            "name": self.name, "layer": self.layer, "start": self.start, "peak": self.peak, "end": self.end,
            "op": self.op, "module": self.module, "ledger": self.ledger,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One configuration's step at the model's own depth."""

    layers: int
    traced: tuple[int, ...]
    """Depths that were run."""
    static_bytes: int
    """Alive before the step: weights, adapters, optimizer state, workspaces."""
    parameters: int
    trainable_parameters: int
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def peak(self) -> Segment:
        """The segment that reaches the highest level."""
        return max(self.segments, key=lambda s: s.peak)

    @property
    def flops(self) -> dict[str, Counts]:
        """FLOPs of one micro batch by phase and operation."""
        return _added(s.flops for s in self.segments)

    def describe(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        top = self.peak
        return {
            "layers": self.layers,
            "traced_layers": list(self.traced),
            "static_bytes": self.static_bytes,
            "peak_bytes": top.peak,
            "peak_segment": top.name,
            "ledger": top.ledger,
            "modules": dict(sorted(top.modules.items(), key=lambda item: -item[1])),
            "segments": [s.describe() for s in self.segments],
            "flops": self.flops,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "notes": list(self.notes),
            "versions": self.versions,
        }


def summarise(
    config: dict[str, Any],
    training: TrainingSpec,
    *,
    layers: int | None = None,
    arch: Architecture | None = None,
    block: int = BLOCK,
) -> Summary:
    """Trace two shallow stacks and extrapolate to the model's depth (or to `layers`), where its layers repeat.

    Otherwise, or where that would save nothing, every layer is traced.
    """
    kinds = alike.layer_kinds(config, layers)
    pattern = alike.pattern(kinds)
    few, more = (pattern.depth(repetitions) for repetitions in (SHALLOW, DEEP))
    if few + more >= len(kinds) or not all(_starts_alike(config, kinds, pattern, n) for n in (few, more)):
        return of_trace(trace(config, training, layers=layers, arch=arch), block)
    shallow, deep = (of_trace(trace(config, training, layers=number, arch=arch), block) for number in (few, more))
    return extrapolated(shallow, deep, pattern)


def _starts_alike(config: dict[str, Any], kinds: list[int], pattern: alike.Pattern, layers: int) -> bool:
    """Whether the model cut to `layers` starts, repeats and ends as the whole one."""
    end = pattern.period + pattern.rest
    return alike.layer_kinds(config, layers) == [*kinds[: layers - end], *kinds[-end:]]


# --- from one trace ------------------------------------------------------------------------------------------------


def of_trace(result: TraceResult, block: int = BLOCK) -> Summary:
    """Summarise one trace at the depth it was run."""
    sizes = [rounded(event.nbytes, block) for event in result.events]
    levels = _levels(result, sizes)
    alive = _alive_at(result, sizes, {segment.peak_event for segment in levels.values()})
    flops = _flops_by_segment(result)
    segments = []
    for name, level in levels.items():
        event = result.events[level.peak_event]
        owners, modules = alive[level.peak_event]
        segments.append(
            Segment(
                name=name, start=level.start, peak=level.peak, end=level.end, op=event.op,
                module=result.blocks[event.id].module, ledger=owners, modules=modules, flops=flops.get(name, {}),
            )
        )  # fmt: skip
    return Summary(
        layers=result.layers,
        traced=(result.layers,),
        static_bytes=segments[0].start,
        parameters=result.parameters,
        trainable_parameters=result.trainable_parameters,
        segments=tuple(segments),
        notes=tuple(result.notes),
        versions=result.versions,
    )


def rounded(nbytes: int, block: int) -> int:
    """Whole blocks of the allocator, for allocations (positive) and releases (negative) alike."""
    return -(-nbytes // block) * block if nbytes > 0 else nbytes // block * block


@dataclass(slots=True)
class _Level:
    start: int
    peak: int
    end: int
    peak_event: int


def _levels(result: TraceResult, sizes: list[int]) -> dict[str, _Level]:
    """Start, highest and last level of every segment of the last step, in order of first appearance."""
    found: dict[str, _Level] = {}
    level = 0
    for index, event in enumerate(result.events):
        before, level = level, level + sizes[index]
        if event.step != STEPS:
            continue
        at = found.get(event.segment)
        if at is None:
            found[event.segment] = at = _Level(before, before, level, index)
        at.end = level
        if level > at.peak:
            at.peak, at.peak_event = level, index
    return found


def _alive_at(result: TraceResult, sizes: list[int], moments: set[int]) -> dict[int, tuple[Counts, Counts]]:
    """Bytes alive right after some events, by category and by module."""
    lives = ledger._Lifetimes(result)
    owners: Counts = dict.fromkeys(CATEGORIES, 0)
    modules: Counts = {}
    labels: dict[int, tuple[str, str]] = {}
    found = {}
    for index, event in enumerate(result.events):
        block = result.blocks[event.id]
        if event.id not in labels:
            labels[event.id] = ledger.category(result, block, lives), module_name(block.module, block.segment)
        owner, module = labels[event.id]
        owners[owner] = owners.get(owner, 0) + sizes[index]
        modules[module] = modules.get(module, 0) + sizes[index]
        if index in moments:
            found[index] = _nonzero(owners), _nonzero(modules)
    return found


def module_name(path: str, segment: str) -> str:
    """Name a module for all layers at once (`model.layers.*.mlp.up_proj`); what ran outside modules by its segment."""
    if not path:
        return re.sub(r"\.\d+", ".*", segment)
    return _NUMBER.sub(r"\1*", _INNER.sub("", _WRAPPERS.sub("", path)))


def _flops_by_segment(result: TraceResult) -> dict[str, dict[str, Counts]]:
    found: dict[str, dict[str, Counts]] = {}
    for (phase, segment, op), number in result.segment_flops.items():
        counts = found.setdefault(segment, {}).setdefault("forward" if phase == "loss" else phase, {})
        counts[op] = counts.get(op, 0) + number
    return found


def _nonzero(counts: Counts) -> Counts:
    return {name: number for name, number in counts.items() if number}


def _added(parts: Iterable[dict[str, Counts]]) -> dict[str, Counts]:
    total: dict[str, Counts] = {"forward": {}, "recompute": {}, "backward": {}}
    for part in parts:
        for phase, counts in part.items():
            into = total.setdefault(phase, {})
            for op, number in counts.items():
                into[op] = into.get(op, 0) + number
    return total


# --- from two traces -----------------------------------------------------------------------------------------------


def extrapolated(shallow: Summary, deep: Summary, pattern: alike.Pattern) -> Summary:
    """Return the summary of a deep stack from stacks with SHALLOW and DEEP repetitions of its pattern.

    Every quantity of a segment is linear in the number of repetitions and, for the layers between the first and the
    last repetition, in the number of the repetition: the level a segment starts from changes, not what happens in it.
    This holds for bytes by category and module too, because a segment peaks at the same operation in both stacks.
    Requested bytes are exact; a buffer that spans all layers (norms of all gradients) may be a block off when rounded.
    """
    more = (pattern.layers - pattern.depth(DEEP)) // pattern.period
    thin = {s.name: s for s in shallow.segments}
    thick = {s.name: s for s in deep.segments}
    segments: list[Segment] = []
    for segment in deep.segments:
        if segment.layer < 0:
            segments.append(_combined(segment.name, ((1 + more, segment), (-more, thin[segment.name]))))
            continue
        direction = segment.name.rpartition(" ")[2]
        if segment.layer == (0 if direction == "forward" else deep.layers - 1):  # the first of its direction to run
            order = range(pattern.layers) if direction == "forward" else reversed(range(pattern.layers))
            segments += [_layer(thin, thick, index, pattern, direction) for index in order]

    def linear(few: int, many: int) -> int:
        return many + more * (many - few)

    return Summary(
        layers=pattern.layers,
        traced=(shallow.layers, deep.layers),
        static_bytes=linear(shallow.static_bytes, deep.static_bytes),
        parameters=linear(shallow.parameters, deep.parameters),
        trainable_parameters=linear(shallow.trainable_parameters, deep.trainable_parameters),
        segments=tuple(segments),
        notes=deep.notes,
        versions=deep.versions,
    )


def _layer(
    thin: dict[str, Segment], thick: dict[str, Segment], index: int, pattern: alike.Pattern, direction: str
) -> Segment:
    """One layer's segment: like one of the first repetition, of the last, or of the second and third."""
    more = (pattern.layers - pattern.depth(DEEP)) // pattern.period
    begin, end = pattern.prefix + pattern.period, pattern.layers - pattern.period - pattern.rest
    repetition = 0
    if index < begin:
        here = there = index
    elif index >= end:
        here, there = (pattern.depth(n) - pattern.layers + index for n in (DEEP, SHALLOW))
    else:
        repetition, place = divmod(index - begin, pattern.period)
        here = there = begin + place
    first = thick[f"layer.{here} {direction}"]
    terms: Terms = ((1 + more, first), (-more, thin[f"layer.{there} {direction}"]))
    if repetition:
        terms = (*terms, (repetition, thick[f"layer.{here + pattern.period} {direction}"]), (-repetition, first))
    return _combined(f"layer.{index} {direction}", terms)


Terms = tuple[tuple[int, Segment], ...]


def _combined(name: str, terms: Terms) -> Segment:
    """The weighted sum of segments; operation and module are those of the first."""
    like, match = terms[0][1], _LAYER.fullmatch(name)
    phases = dict.fromkeys(phase for _, s in terms for phase in s.flops)
    return Segment(
        name=name,
        start=sum(w * s.start for w, s in terms),
        peak=sum(w * s.peak for w, s in terms),
        end=sum(w * s.end for w, s in terms),
        op=like.op,
        module=_NUMBER.sub(rf"\g<1>{match[1]}", like.module, count=1) if match else like.module,
        ledger=_weighted([(w, s.ledger) for w, s in terms]),
        modules=_weighted([(w, s.modules) for w, s in terms]),
        flops={phase: _weighted([(w, s.flops.get(phase, {})) for w, s in terms]) for phase in phases},
    )


def _weighted(terms: list[tuple[int, Counts]]) -> Counts:
    names = dict.fromkeys(name for _, counts in terms for name in counts)
    return _nonzero({name: sum(w * counts.get(name, 0) for w, counts in terms) for name in names})
