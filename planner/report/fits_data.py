"""The answer of `loraplan fits` for machines and documents: one JSON document, one CSV row, a Markdown page."""

from __future__ import annotations

from typing import Any

from planner.base.units import GiB, gib
from planner.memory.owners import CATEGORIES
from planner.plan.answer import Answer, components, context_name
from planner.plan.intervals import Range
from planner.plan.search import Change
from planner.plan.verdict import ANSWERS
from planner.report.answer import card_words, peak_words, run_words, value_words, via_words
from planner.report.tables import csv_text, escape, json_text, markdown
from planner.report.time_text import PARTS, parts_of, run_block, run_data, time_data

SCHEMA_VERSION = 1
COUNTERS = ("allocated", "reserved", "device")


def render(answer: Answer, style: str) -> str:
    """Return the answer as json, csv or markdown."""
    if style == "json":
        return json_text(document(answer))
    return _csv(answer) if style == "csv" else _markdown(answer)


def document(answer: Answer) -> dict[str, Any]:
    """Return the whole answer as plain JSON values; bytes are whole numbers."""
    p = answer.prediction
    moment = p.breakdown.moment
    whole: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "verdict": p.verdict,
        "via": p.via,
        "versions": dict(p.libraries),
        "model": _model(answer),
        "gpu": _gpu(answer),
        **{counter: _range(getattr(p, counter)) for counter in COUNTERS},
        "capacity_bytes": p.capacity_bytes if p.gpu else None,
        "headroom_bytes": p.headroom_bytes if p.gpu else None,
        "margin_bytes": answer.margin_bytes,
        "peak": {
            "phase": moment.phase,
            "layer": moment.layer if moment.layer >= 0 else None,
            "op": moment.op,
            "words": peak_words(answer),
        },
        "components": [
            {"name": c.name, "bytes": c.nbytes, "counter": c.counter, "origin": c.origin} for c in components(answer)
        ],
        "time": time_data(answer),
        "run": run_data(answer.run),
        "data": _data(answer),
        "configuration": _configuration(answer),
        "uncertainty": [{"reason": reason, "share": share} for reason, share in p.uncertainty],
        "warnings": [*p.warnings, *answer.notes],
        "changes": [_change(change) for change in answer.changes],
    }
    if answer.explain:
        whole["segments"] = [
            {"phase": s.phase, "layer": s.layer if s.layer >= 0 else None, "bytes": s.bytes}
            for s in p.breakdown.segments
        ]
    return whole


def _model(answer: Answer) -> dict[str, Any]:
    model, record = answer.prediction.model, answer.loaded.record
    return {
        "id": model.model_id,
        "type": model.model_type,
        "parameters": model.num_parameters,
        "parameters_in_files": model.exact_parameters or None,
        "trainable_parameters": answer.prediction.trainable_parameters,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "origin": answer.loaded.origin,
        "source": record.source if record else answer.loaded.origin,
        "confidence": record.confidence if record else None,
    }


def _gpu(answer: Answer) -> dict[str, Any] | None:
    gpu = answer.prediction.gpu
    if gpu is None:
        return None
    return {
        "id": gpu.gpu_id,
        "name": gpu.name,
        "memory_bytes": gpu.memory_bytes,
        "memory_basis": gpu.memory_basis,
        "used_by_others_bytes": gpu.used_by_others_bytes - answer.margin_bytes,
        "compute_capability": ".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else None,
        "sources": list(gpu.sources),
    }


def _range(value: Range) -> dict[str, int]:
    return {"low": value.low, "expected": value.expected, "high": value.high}


def _configuration(answer: Answer) -> dict[str, Any]:
    """Return every setting with its origin and whether the run uses it."""
    settings: dict[str, Any] = {"stack": {"value": answer.resolved.stack, "origin": answer.stack_origin, "used": True}}
    for key, setting in answer.resolved.describe().items():
        settings[key] = {**setting, "used": answer.resolved.applies(key)}
    return settings


def _change(change: Change) -> dict[str, Any]:
    return {
        "change": change.text,
        "option": change.option,
        "settings": {key: _plain(value) for key, value in change.settings},
        "gpu": change.gpu.gpu_id if change.gpu else None,
        "allocated": _range(change.allocated),
        "device": _range(change.device),
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _csv(answer: Answer) -> str:
    found = row(answer)
    return csv_text(list(found), [list(found.values())])


def row(answer: Answer) -> dict[str, Any]:
    """One row with the same columns for every run, so that answers can be stacked."""
    p, t = answer.prediction, answer.prediction.training
    sizes = {c.name: c.nbytes for c in components(answer)}
    cells: dict[str, Any] = {
        "model": p.model.model_id,
        "gpu": p.gpu.gpu_id if p.gpu else "",
        "verdict": p.verdict or "",
        "via": p.via,
        **{f"{c}_{end}_bytes": getattr(getattr(p, c), end) for c in COUNTERS for end in ("low", "expected", "high")},
        "capacity_bytes": p.capacity_bytes if p.gpu else None,
        "headroom_bytes": p.headroom_bytes if p.gpu else None,
        "peak": peak_words(answer),
        "parameters": p.model.num_parameters,
        "trainable_parameters": p.trainable_parameters,
        "stack": answer.resolved.stack,
        **{key: _cell(key, value) for key, value in t.describe().items()},
    }
    for name in (*CATEGORIES, "allocator cache"):
        cells[f"{name.replace(' ', '_').lower()}_bytes"] = sizes.get(name, 0)
    cells["cuda_context_bytes"] = sizes[context_name(p.gpu)]
    cells.update(_time_cells(answer))
    cells["warnings"] = "; ".join((*p.warnings, *answer.notes))
    return cells


def _data(answer: Answer) -> dict[str, Any] | None:
    if answer.data is None:
        return None
    from planner.report.data_run import data_document

    return data_document(answer.data)


def _time_markdown(answer: Answer) -> str:
    t = answer.prediction.time
    assert t is not None
    rows: list[tuple[Any, ...]] = [(name, value) for name, value in parts_of(t)]
    rows.append((f"optimizer step ({t.step_s.low:.4g} to {t.step_s.high:.4g})", t.step_s.expected))
    text = f"{t.tokens_per_s:,.0f} tokens/s, MFU {t.model_flops_utilization * 100:.0f} %, bound by {t.bound}."
    blocks = [markdown(("time", "s"), rows).rstrip(), text]
    if answer.run:
        blocks.append(escape(" ".join(run_block(answer.run).split())))
    return "\n\n".join(blocks)


def _time_cells(answer: Answer) -> dict[str, Any]:
    t, run = answer.prediction.time, answer.run
    return {
        **{f"step_s_{end}": getattr(t.step_s, end) if t else None for end in ("low", "expected", "high")},
        **{f"{part}_s": getattr(t, f"{part}_s") if t else None for part in PARTS},
        "tokens_per_s": t.tokens_per_s if t else None,
        "model_flops_utilization": t.model_flops_utilization if t else None,
        "bound": t.bound if t else None,
        "hours": run.hours.expected if run else None,
        "usd": run.usd.expected if run and run.usd else None,
    }


def _cell(key: str, value: Any) -> Any:
    if key.startswith("versions."):
        return ".".join(map(str, value))
    return value_words(value) if isinstance(value, (list, tuple, dict)) else value


def _markdown(answer: Answer) -> str:
    p = answer.prediction
    blocks = [f"## {ANSWERS[p.verdict]}: {escape(run_words(answer))}"]
    if p.gpu is not None:
        left = f"{gib(abs(p.headroom_bytes))} GiB {'left over' if p.headroom_bytes >= 0 else 'missing'}"
        blocks.append(f"On {escape(card_words(answer))}, of which {gib(p.capacity_bytes)} GiB may be used: {left}.")
    rows: list[tuple[Any, ...]] = []
    for counter in COUNTERS:
        total: Range = getattr(p, counter)
        rows += [(c.name, c.nbytes / GiB, None, None, c.origin) for c in components(answer) if c.counter == counter]
        rows.append((counter, total.expected / GiB, total.low / GiB, total.high / GiB, "total"))
    blocks.append(markdown(("memory at the peak", "GiB", "low", "high", "origin"), rows).rstrip())
    blocks.append(f"Peak {escape(peak_words(answer))}.")
    if p.via != "program":
        blocks.append(f"{escape(via_words(answer)).capitalize()}.")
    if answer.changes:
        changed = [(c.text, c.option, c.device.expected / GiB, c.device.high / GiB) for c in answer.changes]
        table = markdown(("what would fit", "options", "device GiB", "high"), changed).rstrip()
        blocks.append(table)
    if p.time is not None:
        blocks.append(_time_markdown(answer))
    if p.warnings or answer.notes:
        blocks.append("\n".join(f"- Warning: {escape(text)}" for text in (*p.warnings, *answer.notes)))
    if answer.explain:
        settings = [(key, value_words(s["value"]), s["origin"]) for key, s in _configuration(answer).items()]
        blocks.append(markdown(("setting", "value", "origin"), settings).rstrip())
        reasons = [(reason, f"{share * 100:.1f} %") for reason, share in p.uncertainty]
        blocks.append(markdown(("why the interval", "share"), reasons).rstrip())
    return "\n\n".join(blocks) + "\n"
