"""A trace for machines and documents: one JSON document, CSV rows of one shape, a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.base.units import GiB
from planner.device.cuda_rules import rules
from planner.report.tables import csv_text, escape, json_text, markdown
from planner.report.trace_view import (
    TraceView,
    card_words,
    depth_words,
    differences,
    operations,
    peak_words,
    run_words,
    stretches,
    version_words,
)

SCHEMA_VERSION = 1


def render(view: TraceView, style: str) -> str:
    """Return the trace as json, csv or markdown."""
    if style == "json":
        return json_text(document(view))
    return _csv(view) if style == "csv" else _markdown(view)


def document(view: TraceView) -> dict[str, Any]:
    """Return everything as plain JSON values; bytes and FLOPs are whole numbers."""
    t, top = view.traced, view.traced.peak
    whole: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "via": "trace",
        "versions": dict(t.versions),
        "model": {
            "id": t.model.model_id,
            "type": t.model.model_type,
            "parameters": t.model.num_parameters,
            "trainable_parameters": t.trainable_parameters,
            "layers": t.model.num_layers,
            "traced_layers": list(t.traced_layers),
            "origin": view.loaded.origin,
        },
        "gpu": view.gpu.gpu_id if view.gpu else None,
        "peak_allocated_bytes": top.peak,
        "static_bytes": t.static_bytes,
        "peak": {
            "phase": top.phase,
            "layer": _layer(top.layer),
            "op": top.op,
            "module": top.module,
            "words": peak_words(view),
        },
        "ledger": [{"name": name, "bytes": size} for name, size in top.ledger],
        "modules": [{"name": name, "bytes": size} for name, size in t.modules],
        "timeline": [
            {
                "name": s.name, "phase": s.phase, "layer": _layer(s.layer), "start_bytes": s.start,
                "peak_bytes": s.peak, "end_bytes": s.end, "ledger": dict(s.ledger),
            }
            for s in t.segments
        ],
        "flops": {phase: {op: int(n) for op, n in counts.items()} for phase, counts in t.flops.items()},
        "configuration": {
            key: {**setting, "used": view.resolved.applies(key)} for key, setting in view.resolved.describe().items()
        },
        "rules": [rule.describe() for rule in rules(view.arch)],
        "warnings": list(view.warnings),
    }  # fmt: skip
    if view.program is not None:
        whole["comparison"] = [
            {
                "name": d.name,
                "trace_bytes": d.trace,
                "program_bytes": d.program,
                "difference_bytes": d.program - d.trace,
            }
            for d in differences(view)
        ]
        moment = view.program.moment
        whole["program_peak"] = {"phase": moment.phase, "layer": _layer(moment.layer), "op": moment.op}
    return whole


def _layer(number: int) -> int | None:
    return number if number >= 0 else None


def _csv(view: TraceView) -> str:
    """Rows (section, name, phase, unit, trace, program); the same columns for every trace."""
    return csv_text(("section", "name", "phase", "unit", "trace", "program"), _csv_rows(view))


def _csv_rows(view: TraceView) -> Iterator[tuple[Any, ...]]:
    t, program = view.traced, dict(view.program.ledger) if view.program else None
    yield "peak", "allocated", t.peak.phase, "bytes", t.peak.peak, view.program and view.program.peak_allocated_bytes
    for name, size in t.peak.ledger:
        yield "ledger", name, "", "bytes", size, program.get(name, 0) if program is not None else None
    if program is not None:
        for name in program.keys() - dict(t.peak.ledger).keys():
            yield "ledger", name, "", "bytes", 0, program[name]
    for name, size in t.modules:
        yield "module", name, "", "bytes", size, None
    for s in t.segments:
        yield "timeline", s.name, s.phase, "bytes", s.peak, None
    for op, counts in operations(view):
        for phase, number in counts.items():
            yield "flops", op, phase, "FLOP", int(number), None


def _markdown(view: TraceView) -> str:
    t = view.traced
    blocks = [
        f"## Trace: {escape(run_words(view))}",
        f"{escape(card_words(view).capitalize())}. Peak {t.peak.peak / GiB:,.2f} GiB, {escape(peak_words(view))}.",
    ]
    if view.program is None:
        rows: list[tuple[Any, ...]] = [(name, size / GiB) for name, size in t.peak.ledger]
        blocks.append(markdown(("alive at the peak", "GiB"), rows).rstrip())
    else:
        rows = [(d.name, d.trace / GiB, d.program / GiB, (d.program - d.trace) / 2**20) for d in differences(view)]
        blocks.append(markdown(("alive at the peak", "trace GiB", "program GiB", "difference MiB"), rows).rstrip())
    timeline = [(s.name, s.start / GiB, s.peak / GiB, s.end / GiB) for s in stretches(t.segments)]
    blocks.append(markdown(("part of the step", "start GiB", "highest", "end"), timeline).rstrip())
    phases = [phase for phase, counts in t.flops.items() if counts]
    work = [(op, *(counts[phase] / 1e12 for phase in phases)) for op, counts in operations(view)]
    blocks.append(markdown(("TFLOP of one micro batch", *phases), work).rstrip())
    if view.explain:
        table = [(rule.name, rule.applied, rule.what, rule.source) for rule in rules(view.arch)]
        blocks.append(markdown(("CUDA rule", "applied", "what", "source"), table).rstrip())
    blocks.append(f"{escape(depth_words(view)).capitalize()}: {escape(version_words(view))}.")
    if view.warnings:
        blocks.append("\n".join(f"- Warning: {escape(text)}" for text in view.warnings))
    return "\n\n".join(blocks) + "\n"
