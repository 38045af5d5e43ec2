"""Lanes: queues of work that run side by side, each in order. Events on them, with what they wait for, become times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.step.kernels import Lane
from planner.timing.arrays import Number, maximum

Event = tuple[Lane, Number, tuple[int, ...]]
"""Work on a lane, its seconds, and the numbers of the earlier events whose ends it waits for, beside the one before it
on its lane."""

Span = tuple[Number, Number]
"""When an event begins and ends, in seconds since the first."""


def schedule(events: Iterable[Event]) -> tuple[list[Span], dict[Lane, Number]]:
    """When each event runs, and when each lane is done: as soon as a lane is free and all that it waits for has ended.

    Raises:
        ValueError: an event waits for one that is not before it.
    """
    spans: list[Span] = []
    free: dict[Lane, Number] = {}
    for number, (lane, seconds, after) in enumerate(events):
        start = free.get(lane)
        for other in after:
            if not 0 <= other < number:
                raise ValueError(f"event {number} waits for {other}, which is not before it")
            ended = spans[other][1]
            start = ended if start is None else maximum(start, ended)
        free[lane] = ended = seconds if start is None else start + seconds
        spans.append((0.0 if start is None else start, ended))
    return spans, free


def duration(events: Iterable[Event]) -> Number:
    """When the last of some events has ended."""
    first, *others = schedule(events)[1].values()
    for ended in others:
        first = maximum(first, ended)
    return first


def beside(stream: Number, lane: Lane, seconds: Number) -> Number:
    """How much longer than `stream` seconds of kernels a stretch takes that work on another lane begins and ends with.

    Of equal layers, each of which waits for its own piece of that work, all together wait for what the work of all
    takes longer than the kernels of all.
    """
    return duration((("compute", stream, ()), (lane, seconds, ()))) - stream


Phase = tuple[Number, Number]
"""(seconds of the host, of the device): the host launches what the device runs."""


def launched_ahead(micro_batch: Sequence[Phase], times: Number, last: Phase) -> Number:
    """Seconds of a step whose host launches ahead: `times` micro batches of some phases, and a last phase.

    The device begins a phase when the host does, not before, and the host never waits until the step ends. What is
    repeated makes the step as long as the first of it and all others at once, or all others at once and the last of
    it: the slowest way is up to some phase the host's and from there on the device's, and between equal micro batches
    it is longest where it changes in the first or the last.
    """
    hosts, devices = (sum(seconds) * (times - 1) for seconds in zip(*micro_batch, strict=True))
    first = duration(_phases((*micro_batch, (hosts, devices), last)))
    later = duration(_phases(((hosts, 0.0), *micro_batch, last)))  # the device's own way is in the first
    return maximum(first, later)


def _phases(phases: Iterable[Phase]) -> Iterable[Event]:
    """Each phase on both lanes: the device's waits for the host to have launched all phases before it."""
    launched: tuple[int, ...] = ()
    for number, (host, device) in enumerate(phases):
        yield "host", host, ()
        yield "compute", device, launched
        launched = (2 * number,)
