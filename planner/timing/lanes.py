"""Lanes: queues of work that run side by side, each in order. Events on them, with what they wait for, become times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.base.records import NamedTuple
from planner.step.kernels import Lane
from planner.timing.arrays import Number, maximum


class Event(NamedTuple):
    """Work on a lane."""

    lane: Lane
    seconds: Number
    after: tuple[int, ...] = ()
    """Numbers of the earlier events whose ends it waits for, beside the one before it on its lane."""


class Span(NamedTuple):
    """When an event begins and ends, in seconds since the first."""

    start: Number
    end: Number


def schedule(events: Iterable[Event]) -> list[Span]:
    """When each event runs: as soon as its lane is free and all that it waits for has ended.

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
            end = spans[other].end
            start = end if start is None else maximum(start, end)
        free[lane] = end = seconds if start is None else start + seconds
        spans.append(Span(0.0 if start is None else start, end))
    return spans


def end(spans: Sequence[Span]) -> Number:
    """When the last of the events has ended."""
    latest = spans[0].end
    for span in spans[1:]:
        latest = maximum(latest, span.end)
    return latest


def beside(stream: Number, lane: Lane, seconds: Number) -> Number:
    """How much longer than `stream` seconds of kernels a stretch takes that work on another lane begins and ends with.

    Of equal layers, each of which waits for its own piece of that work, all together wait for what the work of all
    takes longer than the kernels of all.
    """
    spans = schedule((Event("compute", stream), Event(lane, seconds)))
    return end(spans) - spans[0].end


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
    first = end(schedule(_phases((*micro_batch, (hosts, devices), last))))
    later = end(schedule(_phases(((hosts, 0.0), *micro_batch, last))))  # the device's own way is in the first
    return maximum(first, later)


def _phases(phases: Iterable[Phase]) -> Iterable[Event]:
    """Each phase on both lanes: the device's waits for the host to have launched all phases before it."""
    launched: tuple[int, ...] = ()
    for number, (host, device) in enumerate(phases):
        yield Event("host", host)
        yield Event("compute", device, launched)
        launched = (2 * number,)
