"""The report of `loraplan validate`: errors by source and quantity, verdicts, and what was left out."""

from __future__ import annotations

from typing import Any

from planner.base.errors import one_line
from planner.plan.validation import Comparison, Report
from planner.plan.verdict import CLOSE
from planner.report.tables import csv_text, json_text, table, wrapped

_GROUP = ("source", "quantity", "n", "mean_abs_pct", "median_abs_pct", "worst_under_pct", "worst_over_pct", "coverage")
_GROUP_HEADERS = ("source", "quantity", "n", "mean %", "median %", "under %", "over %", "inside %")
_ROW = ("id", "source", "quantity", "predicted", "low", "high", "error_pct", "covered")
_ROW_HEADERS = ("id", "source", "quantity", "predicted", "low", "high", "error %", "inside")


def render(report: Report, style: str, *, rows: bool) -> str:
    """Return the report as table, json, csv or markdown."""
    if style == "json":
        return json_text(document(report, rows=rows))
    if style == "csv":
        return _csv(report, rows=rows)
    heading = "## " if style == "markdown" else ""
    blocks = [
        f"{heading}Errors by source (percent; source * is the mean over sources)\n\n"
        + table(style, _GROUP_HEADERS, [_group_row(group) for group in report.groups()]),
        (verdict_sentence(report) if style == "markdown" else wrapped(verdict_sentence(report))) + "\n",
    ]
    if rows:
        compared = [_comparison_row(item) for item in report.comparisons]
        blocks.insert(1, f"{heading}Rows (GiB)\n\n" + table(style, _ROW_HEADERS, compared))
    for title, items in (("Skipped", report.skipped), ("Scored under an assumption or with a warning", report.flagged)):
        if items:
            blocks.append(f"{heading}{title}: {len(items)}\n\n{_reasons(items, style, rows)}")
    return "\n".join(blocks)


def document(report: Report, *, rows: bool) -> dict[str, Any]:
    """Return the report as plain JSON values; with `rows` each compared figure too."""
    whole = report.to_json()
    if rows:
        whole["rows"] = [item._asdict() for item in report.comparisons]
    return whole


def _csv(report: Report, *, rows: bool) -> str:
    if rows:
        return csv_text(_ROW, [tuple(item) for item in report.comparisons])
    return csv_text(_GROUP, [[group[key] for key in _GROUP] for group in report.groups()])


def _group_row(group: dict[str, Any]) -> list[Any]:
    return [*(group[key] for key in _GROUP[:-1]), 100 * group["coverage"]]


def _comparison_row(item: Comparison) -> tuple[Any, ...]:
    scale = 1.0 if item.quantity == "time" else 2.0**30
    sizes = (item.predicted / scale, item.low / scale, item.high / scale)
    return (item.id, item.source, item.quantity, *sizes, item.error_pct, item.covered)


def verdict_sentence(report: Report) -> str:
    """How often the verdict that is printed was right."""
    v, judged = report.verdicts, report.judged()
    ends = {"oom": "out of memory", "ok": "ran"}
    parts = [
        f"{words} {v[f'{end}_right']} right, {v[f'{end}_wrong']} wrong, {v[f'{end}_undecided']} too close"
        for end, words in ends.items()
    ]
    return (
        f"Of {sum(judged.values())} runs that say whether they fitted, the verdict is right for {judged['right']}, "
        f'wrong for {judged["wrong"]} and "{CLOSE}" for {judged["undecided"]}: {"; ".join(parts)}.'
    )


def _reasons(items: Any, style: str, every: bool) -> str:
    """Reasons with the rows they concern; few ids unless every row was asked for."""
    by_reason: dict[str, list[str]] = {}
    for item in items:
        by_reason.setdefault(item.reason, []).append(item.id)
    if style == "markdown":
        cut = {r: " ".join(ids if every else ids[:3]) for r, ids in by_reason.items()}
        rows = [(r, len(ids), cut[r] + (" ..." if not every and len(ids) > 3 else "")) for r, ids in by_reason.items()]
        return table(style, ("reason", "n", "rows"), rows)
    lines = []
    for reason, ids in by_reason.items():
        shown = ids if every else ids[:3]
        more = f" and {len(ids) - len(shown)} more" if len(ids) > len(shown) else ""
        names = ", ".join(one_line(name, 60) for name in shown)
        lines.append(wrapped(f"  {len(ids):>4}  {one_line(reason, 400)}: {names}{more}", 80, " " * 8))
    return "\n".join(lines) + "\n"
