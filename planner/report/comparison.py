"""Two or more configurations side by side: what differs, and which components the difference of memory and time is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from planner.base.errors import one_line
from planner.base.units import GiB
from planner.plan.compared import Compared
from planner.report.answer import value_words
from planner.report.tables import escape, json_text, table, wrapped

SMALL_BYTES = 10 * 2**20
SMALL_SHARE = 0.01
"""Differences below these are left out of the sentences."""


class Part(NamedTuple):
    """One component over all configurations; None where a configuration has no such part."""

    section: str
    name: str
    values: tuple[Any, ...]

    @property
    def differs(self) -> bool:
        """Whether not all configurations have the same."""
        return any(value != self.values[0] for value in self.values[1:])


def warnings(items: Sequence[Compared]) -> list[str]:
    """Distinct warnings, with the configurations that each concerns."""
    found: dict[str, list[str]] = {}
    for item in items:
        for note in item.prediction.warnings:
            found.setdefault(note, []).append(item.label)
    return [f"{', '.join(labels)}: {note}" for note, labels in found.items()]


def settings(items: Sequence[Compared]) -> list[Part]:
    """The settings that all configurations use and that are not the same in all."""
    parts = [
        Part("settings", "model", tuple(one_line(item.prediction.model.model_id, 60) for item in items)),
        Part("settings", "gpu", tuple(item.prediction.gpu.gpu_id if item.prediction.gpu else "" for item in items)),
        Part("settings", "stack", tuple(item.resolved.stack for item in items)),
    ]
    for key in items[0].resolved.settings:
        values = tuple(value_words(i.resolved[key]) if i.resolved.applies(key) else "" for i in items)
        parts.append(Part("settings", key, values))
    return [part for part in parts if part.differs and "" not in part.values]


def memory_parts(items: Sequence[Compared]) -> list[Part]:
    """Bytes of every component at the peak, and the three totals; the components sum to the device total."""
    ledgers = [dict(item.prediction.breakdown.ledger) for item in items]
    names = list(dict.fromkeys(name for ledger in ledgers for name in ledger))
    parts = [Part("memory", name, tuple(ledger.get(name, 0) for ledger in ledgers)) for name in names]
    found = [item.prediction for item in items]
    parts.append(Part("memory", "allocator cache", tuple(p.reserved.expected - p.allocated.expected for p in found)))
    parts.append(Part("memory", "CUDA context", tuple(p.device.expected - p.reserved.expected for p in found)))
    return parts


def time_parts(items: Sequence[Compared]) -> list[Part]:
    """Seconds of a step by class of operation; what is left is the host's. Empty where a card's rates are not known."""
    times = [item.prediction.time for item in items]
    if any(time is None for time in times):
        return []
    ledgers = [{line.name: line.seconds for line in time.ledger} for time in times if time is not None]
    names = list(dict.fromkeys(name for ledger in ledgers for name in ledger))
    parts = [Part("time", name, tuple(ledger.get(name, 0.0) for ledger in ledgers)) for name in names]
    waits = tuple(time.launch_wait_s for time in times if time is not None)
    rest = tuple(time.overhead_s for time in times if time is not None)
    return [*parts, Part("time", "waiting for launches", waits), Part("time", "training loop", rest)]


def sentences(items: Sequence[Compared]) -> list[str]:
    """What each configuration needs more or less than the first, by component, largest first."""
    lines = []
    memory, time = memory_parts(items), time_parts(items)
    for number, item in enumerate(items[1:], start=1):
        first = items[0]
        gap = item.prediction.device.expected - first.prediction.device.expected
        why = _contributions(memory, number, SMALL_BYTES, lambda v: f"{v / GiB:+,.2f}")
        more = f"{abs(gap) / GiB:,.2f} GiB {'more' if gap >= 0 else 'less'}"
        lines.append(f"{item.label} needs {more} than {first.label}{': ' if why else ''}{why}")
        a, b = first.prediction.time, item.prediction.time
        if a is None or b is None:
            continue
        gap_s = b.step_s.expected - a.step_s.expected
        why = _contributions(time, number, SMALL_SHARE * a.step_s.expected, lambda v: f"{v:+,.3f}")
        slower = f"{abs(gap_s):,.3f} s {'slower' if gap_s >= 0 else 'faster'} per step than"
        if abs(gap_s) < SMALL_SHARE * a.step_s.expected:
            slower = "about as fast as"
        lines.append(f"{item.label} is {slower} {first.label}{': ' if why else ''}{why}")
    return lines


def _contributions(parts: Sequence[Part], number: int, small: float, show: Any) -> str:
    changes = [(part.values[number] - part.values[0], part.name) for part in parts]
    wanted = sorted((c for c in changes if abs(c[0]) >= small), key=lambda change: -abs(change[0]))
    return ", ".join(f"{name} {show(value)}" for value, name in wanted)


def rows(items: Sequence[Compared]) -> list[tuple[Any, ...]]:
    """(section, name, value of each, "*" where they differ), numbers in bytes and seconds."""
    found = [item.prediction for item in items]
    parts = settings(items)
    parts.append(Part("answer", "verdict", tuple(p.verdict or "" for p in found)))
    parts += memory_parts(items)
    parts += [
        Part("memory", name, tuple(getattr(p, name).expected for p in found))
        for name in ("allocated", "reserved", "device")
    ]
    times = [p.time for p in found]
    parts += time_parts(items)
    if all(time is not None for time in times):
        parts.append(Part("time", "step", tuple(t.step_s.expected for t in times if t is not None)))
        parts.append(Part("speed", "tokens/s", tuple(float(t.tokens_per_s) for t in times if t is not None)))
        mfu = tuple(100 * float(t.model_flops_utilization) for t in times if t is not None)
        parts.append(Part("speed", "MFU %", mfu))
    return [(part.section, part.name, *part.values, "*" if part.differs else "") for part in parts]


def shown_rows(items: Sequence[Compared]) -> list[tuple[Any, ...]]:
    """The rows for people: GiB, seconds with three digits."""
    lines = []
    for section, name, *values, mark in rows(items):
        unit = {"memory": "GiB", "time": "s"}.get(section, "")
        cells = [_shown(section, value) for value in values]
        lines.append((f"{name} {unit}".rstrip() if unit else name, *cells, mark))
    return lines


def _shown(section: str, value: Any) -> str:
    if section == "memory":
        return f"{value / GiB:,.2f}"
    if section == "time":
        return f"{value:,.3f}"
    return f"{value:,.1f}" if isinstance(value, float) else one_line(str(value), 60)


def render(items: Sequence[Compared], style: str) -> str:
    """Return the comparison as table, json, csv or markdown; csv has no place for the warnings."""
    labels = [item.label for item in items]
    if style == "json":
        return json_text(document(items))
    if style == "csv":
        return table("csv", ("section", "name", *labels, "differs"), rows(items))
    lines = [f"- {line}" if style == "markdown" else wrapped(line, 80, "  ") for line in sentences(items)]
    for note in warnings(items):
        line = f"warning: {one_line(note, 1000)}"
        lines.append(f"- {escape(line)}" if style == "markdown" else wrapped(line, 80, "  "))
    return table(style, ["", *labels, ""], shown_rows(items)) + "\n" + "".join(f"{line}\n" for line in lines)


def document(items: Sequence[Compared]) -> dict[str, Any]:
    """Return the comparison as plain JSON values."""
    labels = [item.label for item in items]
    return {
        "schema_version": 1,
        "configurations": labels,
        "rows": [
            {"section": s, "name": n, **dict(zip(labels, values, strict=True)), "differs": mark == "*"}
            for s, n, *values, mark in rows(items)
        ],
        "differences": sentences(items),
        "warnings": warnings(items),
    }
