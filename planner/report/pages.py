"""Tables as HTML and LaTeX."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from planner.base.errors import one_line
from planner.base.units import plain
from planner.plan.rows import Caption
from planner.plan.verdict import ANSWERS, VERDICTS

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Escape what LaTeX would read as a command."""
    return "".join(_LATEX.get(mark, mark) for mark in one_line(text, 500))


def latex(headings: Sequence[str], cells: Sequence[Sequence[Any]], caption: Caption) -> str:
    """A table environment of plain LaTeX; needs no package."""
    right = [
        all(value is None or isinstance(value, (int, float)) for value in column) for column in zip(*cells, strict=True)
    ]
    right = right or [False] * len(headings)
    lines = [r"\begin{table}", r"\begin{tabular}{" + "".join("r" if r else "l" for r in right) + "}", r"\hline"]
    lines.append(" & ".join(map(latex_text, headings)) + r" \\ \hline")
    lines += [" & ".join(latex_text(plain(value)) for value in row) + r" \\" for row in cells]
    lines += [r"\hline", r"\end{tabular}", r"\caption{" + latex_text(" ".join(caption.lines)) + "}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def html_table(headings: Sequence[str], cells: Sequence[Sequence[Any]], caption: Caption) -> str:
    """A table element with everything escaped; verdicts are marked by class and by their words."""
    head = "".join(f"<th scope=col>{html.escape(one_line(text, 200))}</th>" for text in headings)
    body = []
    for row in cells:
        inside = []
        for value in row:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            number = number or (isinstance(value, str) and _NUMERIC.fullmatch(value) is not None)
            kind = " class=n" if number else f" class={_VERDICT_CLASS[value]}" if value in _VERDICT_CLASS else ""
            inside.append(f"<td{kind}>{html.escape(plain(value))}</td>")
        body.append(f"<tr>{''.join(inside)}</tr>")
    notes = "".join(f"<p>{html.escape(one_line(line, 2000))}</p>" for line in caption.lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(body)}\n</tbody></table>"
    return f"<div class=scroll>{table}</div>\n<div class=notes>{notes}</div>\n"


_NUMERIC = re.compile(r"[-+]?[\d,]+(\.\d+)?")

_VERDICT_CLASS: dict[str, str] = {word: ANSWERS[word].lower() for word in VERDICTS}

STYLE = """
:root{color-scheme:light}
body{font:15px/1.45 system-ui,sans-serif;color:#1a1a1a;background:#fff;
margin:1.2rem auto;max-width:1200px;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid #ccc;text-align:left;white-space:nowrap}
th{border-bottom:2px solid #444}td.n{text-align:right}
td.yes::before{content:"\\2713\\a0"}td.no::before{content:"\\2717\\a0"}td.maybe::before{content:"?\\a0"}
td.no{font-weight:600}td.maybe{font-style:italic}
.notes{color:#444;font-size:.85rem}.notes p{margin:.2rem 0;overflow-wrap:anywhere}
figure{margin:1rem 0;overflow-x:auto}figure svg{max-width:100%;min-width:620px;height:auto}
figcaption{color:#444;font-size:.85rem}
@media print{body{max-width:none;margin:0}h2{break-after:avoid}figure{break-inside:avoid}}
"""


def html_page(body: str, title: str) -> str:
    """A whole page that loads nothing: no script, no font, no image from elsewhere."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        '<meta name=viewport content="width=device-width,initial-scale=1"><link rel=icon href="data:,">'
        f"<title>{html.escape(one_line(title, 200))}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}</body></html>\n"
    )
