"""The table that `loraplan trace` prints: peak, who owns it, the step's timeline, FLOPs, what ran."""

from __future__ import annotations

from collections.abc import Iterator

from planner.base.errors import one_line
from planner.base.units import GiB, gib
from planner.device.cuda_rules import rules
from planner.report.answer import value_words
from planner.report.tables import aligned, wrapped
from planner.report.trace_view import (
    TraceView,
    card_words,
    depth_words,
    differences,
    operations,
    peak_words,
    program_peak_words,
    run_words,
    stretches,
    version_words,
)

MODULES = 12
"""Modules listed; the rest share a line."""
BAR = 24


def render(view: TraceView) -> str:
    """Return the whole report."""
    blocks = [_headline(view)]
    blocks.append(_comparison(view) if view.program else _ledger(view))
    blocks += [_modules(view), _timeline(view), _flops(view)]
    if view.explain:
        blocks += [_rules(view), _settings(view)]
    blocks.append(_origin(view))
    blocks.append("".join(f"{wrapped(f'warning: {one_line(note, 1000)}', indent='  ')}\n" for note in view.warnings))
    return "\n".join(block for block in blocks if block)


def _headline(view: TraceView) -> str:
    top = view.traced.peak
    where = f"peak {peak_words(view)} (operation {top.op}{f' of {one_line(top.module)}' if top.module else ''})"
    lines = (f"{run_words(view)}, {card_words(view)}", f"peak {gib(top.peak)} GiB allocated", where)
    return f"{'TRACED':<7}" + "\n       ".join(wrapped(line, 73).replace("\n", "\n       ") for line in lines) + "\n"


def _ledger(view: TraceView) -> str:
    rows = [(name, size / GiB) for name, size in view.traced.peak.ledger]
    return "alive at the peak:\n" + aligned(("owner", "GiB"), [*rows, ("total", view.traced.peak.peak / GiB)])


def _comparison(view: TraceView) -> str:
    rows = [(d.name, d.trace / GiB, d.program / GiB, (d.program - d.trace) / 2**20) for d in differences(view)]
    assert view.program is not None
    said = f"the program's peak is {program_peak_words(view)} (operation {view.program.moment.op})"
    moments = wrapped(said, indent="  ") + "\n"
    head = ("owner", "trace GiB", "program GiB", "difference MiB")
    return "alive at the peak, trace and loraplan's program:\n" + aligned(head, rows) + moments


def _modules(view: TraceView) -> str:
    modules = view.traced.modules
    rows = [(name, size / GiB) for name, size in modules[:MODULES]]
    if len(modules) > MODULES:
        rows.append((f"{len(modules) - MODULES} others", sum(size for _, size in modules[MODULES:]) / GiB))
    return "by the module that made it (* is every layer):\n" + aligned(("module", "GiB"), rows, limit=60)


def _timeline(view: TraceView) -> str:
    top = view.traced.peak.peak
    rows = [
        (s.name, s.start / GiB, s.peak / GiB, s.end / GiB, "#" * max(1, round(BAR * s.peak / top)))
        for s in stretches(view.traced.segments)
    ]
    return "memory through the step (GiB at the start, the highest, at the end):\n" + aligned(
        ("part of the step", "start", "highest", "end", ""), rows
    )


def _flops(view: TraceView) -> str:
    phases = [phase for phase, counts in view.traced.flops.items() if counts]
    rows = [
        (name.removeprefix("aten."), *(counts[phase] / 1e12 for phase in phases)) for name, counts in operations(view)
    ]
    total = ("total", *(sum(view.traced.flops[phase].values()) / 1e12 for phase in phases))
    title = "TFLOP of one micro batch (matrix products, and attention without its causal saving):\n"
    return title + aligned(("operation", *phases), [*rows, total])


def _rules(view: TraceView) -> str:
    lines = ["CUDA rules that the fake tensors follow:"]
    for rule in rules(view.arch):
        state = "" if rule.applied else "off: "
        lines.append(f"  {wrapped(f'{state}{rule.name}: {rule.what} [{rule.source}]', 78, '      ')}")
    return "\n".join(lines) + "\n"


def _settings(view: TraceView) -> str:
    lines = [f"settings (stack {view.resolved.stack}):"]
    for key, setting in view.resolved.describe().items():
        idle = "" if view.resolved.applies(key) else " (not used by this run)"
        text = f"{key} = {value_words(setting['value'])}  [{setting['origin']}]{idle}"
        lines.append(f"  {wrapped(text, 78, '      ')}")
    return "\n".join(lines) + "\n"


def _origin(view: TraceView) -> str:
    return "".join(f"{line}\n" for line in _origin_lines(view))


def _origin_lines(view: TraceView) -> Iterator[str]:
    model = view.traced.model
    yield f"trains {view.traced.trainable_parameters:,} of {model.num_parameters:,} parameters"
    yield wrapped(f"{depth_words(view)}: {version_words(view)}", indent="  ")
