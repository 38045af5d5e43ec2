"""The report of `loraplan lora`: what a configuration trains and stores, how it is scaled, what others would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.base.errors import InvalidInput, one_line
from planner.base.units import GB, human_bytes
from planner.course.beside import LoraAnswer, Rival
from planner.course.rivals import ENTRENAR_BATCH, ENTRENAR_LENGTH
from planner.model.adapter import AdapterFacts
from planner.plan.verdict import FITS, NO
from planner.report.tables import aligned, csv_text, escape, json_text, markdown, wrapped

SCHEMA_VERSION = 1


def render(answer: LoraAnswer, style: str) -> str:
    """Return the report as table, json, csv or markdown."""
    if style == "json":
        return json_text(document(answer))
    if style == "csv":
        return csv_text(_MODULE_HEADERS, _module_rows(answer.facts))
    return _markdown(answer) if style == "markdown" else _text(answer)


_MODULE_HEADERS = ("module", "in", "out", "r", "times", "each", "parameters")


def _module_rows(facts: AdapterFacts) -> list[tuple[Any, ...]]:
    return [(m.name, m.in_features, m.out_features, m.rank, m.count, m.each, m.total) for m in facts.modules]


def summary(answer: LoraAnswer) -> list[tuple[str, str]]:
    """(name, value with its unit) of everything but the modules."""
    f, lora = answer.facts, answer.training.lora
    assert lora is not None
    lines = [
        (
            "trainable",
            f"{f.trainable_parameters:,} of {f.model_parameters:,} parameters ({100 * f.trainable_share:.3f} %)",
        ),
        ("scaling", f"{f.scaling:.4g} ({f.scaling_rule}, alpha {lora.lora_alpha:g}, r {lora.r})"),
        ("adapter file", f"{human_bytes(f.file_bytes)} ({f.file_bytes:,} bytes, {f.file_dtype})"),
    ]
    if f.saved_module_parameters:
        lines.insert(1, ("modules to save", f"{f.saved_module_parameters:,} parameters, trained in full"))
    base, kind = f.base, answer.training.quantization.kind
    if base.quantized_elements:
        bits = f"{base.bits_per_weight:.10g} bits a weight" if base.bits_per_weight else kind
        lines += [
            (
                "quantized base",
                f"{base.quantized_elements:,} weights as {kind}, {bits}: {base.quantized_bytes / GB:.3f} GB",
            ),
            ("rest of the base", f"{base.other_elements:,} weights: {base.other_bytes / GB:.3f} GB"),
        ]  # fmt: skip
    lines.append(("base", f"{base.total_bytes:,} bytes ({base.bits_overall:.2f} bits a weight over the whole model)"))
    return lines


def _text(answer: LoraAnswer) -> str:
    blocks = [
        aligned(_MODULE_HEADERS, _module_rows(answer.facts)),
        "".join(f"{wrapped(f'{name:<18}{value}', 80, ' ' * 18)}\n" for name, value in summary(answer)),
        "by other formulas, for the same configuration:\n" + aligned(_FORMULA_HEADERS, _formula_rows(answer)),
        "".join(f"{wrapped(f'{c.what}: {c.why}', 80, '  ')}\n" for c in answer.comparisons if c.why),
    ]
    if answer.rival:
        blocks.append(rival_text(answer.rival))
    blocks.append("".join(f"{wrapped(f'warning: {note}', 80, '  ')}\n" for note in answer.warnings))
    return "\n".join(block for block in blocks if block)


_FORMULA_HEADERS = ("formula", "says", "exact", "unit", "ratio")


def _formula_rows(answer: LoraAnswer) -> list[tuple[Any, ...]]:
    return [(c.what, _number(c.theirs), _number(c.exact), c.unit, f"{c.ratio:.3g}") for c in answer.comparisons]


def _number(value: float) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _rival_rows(rival: Rival) -> list[tuple[Any, ...]]:
    plan = rival.plan
    words: dict[str, str] = {FITS: "yes", NO: "no"}
    ours, own = words.get(rival.verdict or "", "unclear"), words.get(rival.own_verdict or "", "unclear")
    asked = "as asked"
    return [
        ("fits", "yes" if plan.fits else "no", ours, own),
        ("memory (GB)", _gb(plan.memory_bytes), _gb(rival.memory_bytes), _gb(rival.own_memory_bytes)),
        ("rank", str(plan.rank), str(plan.rank), asked),
        ("trainable", f"{plan.trainable_parameters:,}", f"{rival.exact_trainable:,}", ""),
        ("rows x tokens", _ENTRENAR_BATCH, _ENTRENAR_BATCH, asked),
    ]


_ENTRENAR_BATCH = f"{ENTRENAR_BATCH} x {ENTRENAR_LENGTH}"
_RIVAL_HEADERS = ("", "entrenar says", "its plan, here", "your run, here")


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:.2f}"


def rival_text(rival: Rival) -> str:
    """The answers side by side, and why they differ."""
    title = f"entrenar-lora plan, method {rival.plan.method}, for this model's size and card:\n"
    table = aligned(_RIVAL_HEADERS, _rival_rows(rival))
    return title + table + "".join(f"{wrapped(f'- {note}', 80, '  ')}\n" for note in rival.notes)


def document(answer: LoraAnswer) -> dict[str, Any]:
    """Everything as plain JSON values."""
    f = answer.facts
    return {
        "schema_version": SCHEMA_VERSION,
        "model": answer.model_id,
        "modules": [
            {
                "name": m.name, "in_features": m.in_features, "out_features": m.out_features, "r": m.rank,
                "count": m.count, "parameters_each": m.each, "parameters": m.total,
            }
            for m in f.modules
        ],
        "trainable_parameters": f.trainable_parameters,
        "saved_module_parameters": f.saved_module_parameters,
        "model_parameters": f.model_parameters,
        "scaling": f.scaling,
        "scaling_rule": f.scaling_rule,
        "adapter_file_bytes": f.file_bytes,
        "base": {
            "quantized_elements": f.base.quantized_elements,
            "quantized_bytes": f.base.quantized_bytes,
            "bits_per_weight": f.base.bits_per_weight or None,
            "other_elements": f.base.other_elements,
            "other_bytes": f.base.other_bytes,
            "bytes": f.base.total_bytes,
        },
        "formulas": [
            {"formula": c.what, "says": c.theirs, "exact": c.exact, "unit": c.unit, "why": c.why or None}
            for c in answer.comparisons
        ],
        "entrenar": rival_document(answer.rival),
        "warnings": list(answer.warnings),
    }  # fmt: skip


def rival_document(rival: Rival | None) -> dict[str, Any] | None:
    """The same as plain JSON values."""
    if rival is None:
        return None
    plan = rival.plan
    return {
        "method": plan.method, "rank": plan.rank, "alpha": plan.alpha, "fits": plan.fits,
        "trainable_parameters": plan.trainable_parameters, "memory_bytes": plan.memory_bytes,
        "utilization": plan.utilization, "speedup": plan.speedup,
        "ours": {
            "verdict": rival.verdict, "memory_bytes": rival.memory_bytes,
            "trainable_parameters": rival.exact_trainable,
        },
        "asked_for": {"verdict": rival.own_verdict, "memory_bytes": rival.own_memory_bytes},
        "notes": list(rival.notes),
    }  # fmt: skip


def _markdown(answer: LoraAnswer) -> str:
    blocks = [
        f"## {escape(one_line(answer.model_id))}",
        markdown(_MODULE_HEADERS, _module_rows(answer.facts)).rstrip(),
        markdown(("", ""), summary(answer)).rstrip(),
        markdown((*_FORMULA_HEADERS, "why"), [
            (*row, c.why) for row, c in zip(_formula_rows(answer), answer.comparisons, strict=True)
        ]).rstrip(),
    ]  # fmt: skip
    if answer.rival:
        blocks.append(markdown(_RIVAL_HEADERS, _rival_rows(answer.rival)).rstrip())
        blocks.append("\n".join(f"- {escape(note)}" for note in answer.rival.notes))
    blocks.append("\n".join(f"- Warning: {escape(note)}" for note in answer.warnings))
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_rivals(found: Sequence[tuple[str, Rival]], style: str, warnings: Sequence[str]) -> str:
    """Return the answers of several configurations as a table or json.

    Raises:
        InvalidInput: another format.
    """
    if style == "json":
        answers = [{"configuration": label, **(rival_document(rival) or {})} for label, rival in found]
        return json_text({"schema_version": 1, "entrenar": answers, "warnings": list(warnings)})
    if style != "table":
        raise InvalidInput(f"--with is printed as table or json, not as {style}")
    return "".join(f"{label}: {rival_text(rival)}\n" for label, rival in found)
