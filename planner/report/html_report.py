"""The page of `loraplan report`: verdicts, a comparison, figures as inline SVG, assumptions and sources."""

from __future__ import annotations

import html
from collections.abc import Sequence

from planner import __version__
from planner.base.errors import one_line
from planner.base.units import gib
from planner.plan.compared import Compared
from planner.plan.rows import Caption
from planner.report.answer import value_words
from planner.report.comparison import sentences, shown_rows, warnings
from planner.report.figures import Picture
from planner.report.pages import html_page, html_table


def page(items: Sequence[Compared], pictures: Sequence[Picture], title: str) -> str:
    """Return the whole page; it loads nothing and runs nothing."""
    parts = [f"<h1>{_text(title)}</h1>", _summary(items)]
    parts += [_figure(picture) for picture in pictures if picture.name == "memory"]
    parts.append("<h2>By component</h2>" + _comparison(items))
    parts.append("<h2>Through the step</h2>")
    parts += [_figure(picture) for picture in pictures if picture.name != "memory"]
    parts += ["<h2>Assumptions</h2>", _assumptions(items), "<h2>Sources</h2>", _sources(items)]
    parts.append(f"<p class=notes>loraplan {__version__}. GiB is 2<sup>30</sup> bytes; intervals hold 90 %.</p>")
    return html_page("\n".join(parts), title)


def comparison_table(items: Sequence[Compared]) -> str:
    """Configurations side by side as elements for a page: what each is, the components, the differences in words."""
    return _summary(items) + _comparison(items)


def _text(value: object, limit: int = 1000) -> str:
    return html.escape(one_line(str(value), limit))


def _figure(picture: Picture) -> str:
    return f"<figure>{picture.svg()}<figcaption>{_text(picture.caption)}</figcaption></figure>"


def _summary(items: Sequence[Compared]) -> str:
    headings = ["", "model", "card", "verdict", "peak GiB", "low to high", "of GiB", "s/step", "tokens/s"]
    cells = []
    for item in items:
        p = item.prediction
        cells.append([
            item.label, p.model.model_id, p.gpu.name if p.gpu else "", p.verdict or "", p.device.expected / 2**30,
            f"{gib(p.device.low)} to {gib(p.device.high)}", p.capacity_bytes / 2**30 if p.gpu else None,
            f"{p.time.step_s.expected:,.3f}" if p.time else "", int(p.time.tokens_per_s) if p.time else None,
        ])  # fmt: skip
    return html_table(headings, cells, Caption(tuple(warnings(items)), {}))


def _comparison(items: Sequence[Compared]) -> str:
    headings = ["", *(item.label for item in items), "differs"]
    cells = [[*row[:-1], "yes" if row[-1] else ""] for row in shown_rows(items)]
    if len(items) == 1:
        headings, cells = headings[:-1], [row[:-1] for row in cells]
    return html_table(headings, cells, Caption(tuple(sentences(items)), {}))


def _assumptions(items: Sequence[Compared]) -> str:
    """Every setting of every configuration with where its value comes from."""
    blocks = []
    for item in items:
        rows = [
            [key, value_words(setting.value), setting.origin]
            for key, setting in item.resolved.settings.items()
            if item.resolved.applies(key)
        ]
        table = html_table(["setting", "value", "origin"], rows, Caption((), {}))
        blocks.append(f"<details><summary>{_text(item.label)}: every setting and its origin</summary>{table}</details>")
        reasons = [[reason, f"{share * 100:.1f} %"] for reason, share in item.prediction.uncertainty]
        blocks.append(html_table(["why allocated memory may be off", "share"], reasons, Caption((), {})))
    return "\n".join(blocks)


def _sources(items: Sequence[Compared]) -> str:
    lines: dict[str, None] = {}
    for item in items:
        gpu, time = item.prediction.gpu, item.prediction.time
        if gpu is not None:
            lines.update({f"{gpu.name}: {source}": None for source in gpu.sources})
        if time is not None:
            for name, share in time.uncertainty:
                if name in time.coefficients and share > 0:
                    c = time.coefficients[name]
                    lines[f"{name} {c.value:.3g} {c.unit} ({c.origin}): {c.source}"] = None
    return "<ul class=notes>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"
