"""Calibrations as text and data: the list, the fit report, two side by side, a check against other bursts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from planner.base.errors import one_line
from planner.report.tables import aligned, csv_text, json_text, markdown, wrapped
from planner.timing.coefficients import Calibration, Coefficient

Rows = list[list[Any]]
LIST_HEADERS = ("id", "device", "bursts", "held out %", "made", "formula")
COEFFICIENT_HEADERS = ("coefficient", "value", "+/- %", "unit", "origin", "note")
ROW_HEADERS = ("model", "burst", "measured s", "predicted s", "error %")


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def percent(value: Any) -> str:
    """One decimal and a sign; nothing for a missing figure."""
    return f"{value:+.1f}" if isinstance(value, (int, float)) else ""


def tables(style: str, headers: Sequence[str], rows: Rows) -> str:
    """Rows in one of the formats csv, markdown or table."""
    if style == "csv":
        return csv_text(headers, rows)
    return markdown(headers, rows) if style == "markdown" else aligned(headers, rows)


# --- list ----------------------------------------------------------------------------------------------------------


def listing(calibrations: Sequence[Calibration], notes: Sequence[str], style: str) -> str:
    """Every calibration there is."""
    if style == "json":
        items = [_short(c) for c in calibrations]
        return json_text({"schema_version": 1, "calibrations": items, "notes": list(notes)})
    rows: Rows = []
    for c in calibrations:
        error = c.coefficients.formula_error
        rows.append([_stem(c), c.device.get("name", c.gpu_id), c.bursts,
                     round(100 * error, 1) if error else None, c.created[:10], c.formula_version])  # fmt: skip
    text = tables(style, LIST_HEADERS, rows) if rows else "no calibration yet: loraplan calibrate run\n"
    return text + "".join(f"warning: {note}\n" for note in notes if style == "table")


def _stem(c: Calibration) -> str:
    return c.path.rpartition("/")[2].removesuffix(".json")


def _short(c: Calibration) -> dict[str, Any]:
    return {
        "id": _stem(c), "path": c.path, "gpu_id": c.gpu_id, "device": dict(c.device), "created": c.created,
        "formula_version": c.formula_version, "versions": dict(c.versions), "bursts": c.bursts,
        "formula_error": c.coefficients.formula_error, "repeatability": c.repeatability,
    }  # fmt: skip


# --- fit report ----------------------------------------------------------------------------------------------------


def fit_report(c: Calibration, style: str, rows: bool = False) -> str:
    """Coefficients with their errors, what was held out, what to be careful with; `rows`: every burst too."""
    if style == "json":
        coefficients = [_coefficient_data(item) for item in c.coefficients.values()]
        return json_text({"schema_version": 1, **_short(c), "coefficients": coefficients, "report": dict(c.report)})
    burst_rows = _burst_rows(c.report["rows"])
    if style == "csv":
        return csv_text(ROW_HEADERS, burst_rows) if rows else csv_text(COEFFICIENT_HEADERS, _coefficient_rows(c))
    blocks = ["\n".join(_headline(c)) + "\n", tables(style, COEFFICIENT_HEADERS, _coefficient_rows(c))]
    blocks.append(tables(style, ("bursts", "number", "mean error %", "bias %", "worst %"), _summaries(c)))
    blocks.append("".join(f"{wrapped(line, 80, '  ')}\n" for line in _remarks(c)))
    if rows:
        blocks.append(tables(style, ROW_HEADERS, burst_rows))
    return "\n".join(block for block in blocks if block)


def _headline(c: Calibration) -> Iterator[str]:
    stack = ", ".join(f"{name} {value}" for name, value in c.versions.items() if value)
    yield f"{c.label}, formula version {c.formula_version}"
    yield wrapped(f"  {stack}", 80, "  ")


def _coefficient_data(c: Coefficient) -> dict[str, Any]:
    return {
        "name": c.name, "value": c.value, "standard_error": c.standard_error, "unit": c.unit, "origin": c.origin,
        "source": c.source, "low": c.low, "high": c.high,
    }  # fmt: skip


def _coefficient_rows(c: Calibration) -> Rows:
    bound, loose = c.report.get("at_bound", ()), c.report.get("not_determined", ())
    rows: Rows = []
    for item in c.coefficients.values():
        if item.origin != "fitted" and item.name not in loose:
            continue
        note = "at its bound" if item.name in bound else "not determined by the bursts" if item.name in loose else ""
        rows.append([item.name, number(item.value), round(100 * item.relative_error, 1), item.unit, item.origin, note])
    return rows


def _summaries(c: Calibration) -> Rows:
    named = {"all, as fitted": c.report["fitted"]}
    named |= {f"left out by {name}": found for name, found in c.report["held_out"].items()}
    named |= {f"{name} memory, not fitted": found for name, found in c.report.get("memory", {}).items()}
    return [[name, *_summary_cells(found)] for name, found in named.items()]


def _summary_cells(found: Mapping[str, Any]) -> list[Any]:
    figures = (found.get("mean_error_pct"), found.get("bias_pct"), found.get("worst_pct"))
    return [found["bursts"], *(round(value, 1) if value is not None else None for value in figures)]


def _remarks(c: Calibration) -> Iterator[str]:
    report, error = c.report, c.coefficients.formula_error or 0.0
    interval = 100 * math.expm1(1.645 * error)
    covered = report.get("coverage")
    inside = f", which held {100 * covered:.0f} % of the held-out bursts" if covered is not None else ""
    yield f"interval of a prediction: +/- {interval:.0f} %{inside}"
    if report.get("repeats"):
        repeated = f"{report['repeats']} repeats of a burst"
        yield f"repeats: 9 of 10 differ by less than {100 * c.repeatability:.0f} % ({repeated})"
    if report.get("not_reached"):
        yield f"left at their priors, no burst depends on them: {', '.join(report['not_reached'])}"
    if report.get("not_determined"):
        yield f"warning: the bursts do not determine {', '.join(report['not_determined'])}; left at their priors"
    if report.get("at_bound"):
        yield f"warning: at a physical bound: {', '.join(report['at_bound'])}; the formulas miss something there"
    for first, second, value in report.get("correlations", ()):
        yield f"correlated {value:+.2f}: {first} and {second}; their sum is known better than each"
    for line in (*report.get("hosts", ()), *(f"not used: {text}" for text in report.get("skipped", ()))):
        yield f"warning: {one_line(line, 300)}"


def _burst_rows(rows: Sequence[Mapping[str, Any]]) -> Rows:
    found: Rows = []
    for row in rows:
        error = 100 * (row["predicted_s"] / row["measured_s"] - 1)
        found.append(
            [row["model"], row["what"], number(row["measured_s"]), number(row["predicted_s"]), round(error, 1)]
        )
    return found


# --- check and compare ---------------------------------------------------------------------------------------------


def check_report(found: Mapping[str, Any], c: Calibration, style: str, rows: bool) -> str:
    """How well a calibration predicts bursts that it was not fitted to."""
    if style == "json":
        return json_text({"schema_version": 1, "calibration": _short(c), **found})
    burst_rows = _burst_rows(found["rows"])
    if style == "csv":
        return csv_text(ROW_HEADERS, burst_rows)
    total = found["summary"]
    unseen = f"{found['unseen']} of them of configurations that the fit did not see"
    lines = [f"{c.label}:", f"  {total['bursts']} bursts, {unseen}"]
    if total["bursts"]:
        lines.append(
            f"  step time: mean error {total['mean_error_pct']:.1f} %, bias {total['bias_pct']:+.1f} %, "
            f"worst {total['worst_pct']:+.1f} %"
        )
        lines.append(
            f"  {found['inside']} of {total['bursts']} inside the interval (+/- {found['interval_pct']:.0f} %)"
        )
    for name, memory in found["memory"].items():
        figures = f"mean error {memory['mean_error_pct']:.1f} %, worst {memory['worst_pct']:+.1f} %"
        lines.append(f"  {name} memory: {figures} (nothing fitted)")
    if found["repeats"]:
        lines.append(
            f"  {found['repeats_within']} of {found['repeats']} repeats within {found['repeat_interval_pct']:.0f} %"
        )
    lines += [f"  not used: {one_line(text, 200)}" for text in found["skipped"]]
    text = "\n".join(lines) + "\n"
    return text + ("\n" + tables(style, ROW_HEADERS, burst_rows) if rows else "")


def comparison(first: Calibration, second: Calibration, style: str) -> str:
    """Two calibrations side by side; the last column is their difference in joint standard errors."""
    headers = ("coefficient", _stem(first) or "first", _stem(second) or "second", "ratio", "standard errors")
    rows: Rows = []
    for name, a in first.coefficients.items():
        b = second.coefficients.get(name)
        if b is None or "fitted" not in (a.origin, b.origin):
            continue
        joint = (a.standard_error**2 + b.standard_error**2) ** 0.5
        apart = round((b.value - a.value) / joint, 1) if joint else None
        rows.append([name, number(a.value), number(b.value), round(b.value / a.value, 2) if a.value else None, apart])
    if style == "json":
        keys = ("name", "first", "second", "ratio", "standard_errors")
        found = [dict(zip(keys, row, strict=True)) for row in rows]
        return json_text({"schema_version": 1, "first": _short(first), "second": _short(second), "coefficients": found})
    return tables(style, headers, rows)


def findings(rows: Sequence[tuple[str, str, bool, str]], style: str) -> str:
    """What doctor saw: (what, value, ok, remedy)."""
    if style == "json":
        keys = ("what", "value", "ok", "remedy")
        return json_text({"schema_version": 1, "findings": [dict(zip(keys, row, strict=True)) for row in rows]})
    if style != "table":
        return tables(style, ("what", "found", "ok", "remedy"), [list(row) for row in rows])
    lines = []
    for what, value, ok, remedy in rows:
        mark = "ok" if ok and not remedy else "!" if ok else "NO"
        lines.append(wrapped(f"{mark:<3} {what:<17} {one_line(value, 200)}", 80, " " * 22))
        if remedy:
            lines.append(f"{'':<22}{remedy}")
    return "\n".join(lines) + "\n"
