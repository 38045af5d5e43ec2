"""An answer in a line and as HTML for a notebook."""

from __future__ import annotations

import html

from planner.base.errors import one_line
from planner.base.units import GiB, gib
from planner.plan.answer import Answer, components
from planner.plan.rows import Caption
from planner.plan.verdict import ANSWERS
from planner.report.answer import peak_words, run_words
from planner.report.pages import html_table


def answer_line(answer: Answer) -> str:
    """The verdict, the run, and its peak with the interval that holds 90 %, in one line."""
    p = answer.prediction
    size = f"{gib(p.device.expected)} GiB ({gib(p.device.low)} to {gib(p.device.high)})"
    where = f" of {gib(p.capacity_bytes)} on {p.gpu.name}" if p.gpu is not None else ""
    return one_line(f"{ANSWERS[p.verdict]}: {run_words(answer)}: peak {size}{where}", 300)


def answer_html(answer: Answer) -> str:
    """The same with what the memory is, the time, the warnings and what would fit, as elements for a page."""
    p = answer.prediction
    parts = [f"<p><b>{html.escape(answer_line(answer))}</b><br>{html.escape(peak_words(answer))}</p>"]
    cells = [[part.name, part.nbytes / GiB, part.counter, part.origin] for part in components(answer)]
    notes = [f"warning: {note}" for note in (*p.warnings, *answer.notes)]
    parts.append(html_table(["memory at the peak", "GiB", "counter", "origin"], cells, Caption(tuple(notes), {})))
    if p.time is not None:
        t = p.time
        speed = [["seconds per optimizer step", t.step_s.low, t.step_s.expected, t.step_s.high]]
        lines = (f"{t.tokens_per_s:,.0f} tokens/s",)
        parts.append(html_table(["time", "low", "expected", "high"], speed, Caption(lines, {})))
    if answer.changes:
        changes = [[c.text, c.device.expected / GiB, c.gpu.name if c.gpu else ""] for c in answer.changes]
        parts.append(html_table(["what would fit", "peak GiB", "card"], changes, Caption((), {})))
    return "\n".join(parts)
