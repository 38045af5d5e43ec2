"""Rows and columns as aligned text, CSV or Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from planner.base.errors import one_line
from planner.base.units import plain

_ACTIVE = ("=", "+", "-", "@", "\t", "\r")
"""First characters that make a spreadsheet read a cell as a formula."""


def aligned(headers: Sequence[str], rows: Iterable[Sequence[Any]], limit: int = 0) -> str:
    """Return a table for a terminal: numbers to the right, text to the left; `limit` shortens the first column."""
    raw = [list(row) for row in rows]
    cells = [[one_line(plain(v), limit) if limit and i == 0 else plain(v) for i, v in enumerate(row)] for row in raw]
    widths = [max(len(h), *(len(row[i]) for row in cells), 0) for i, h in enumerate(headers)]
    right = [bool(raw) and all(_is_number(row[i]) for row in raw) for i in range(len(headers))]

    def line(texts: Sequence[str]) -> str:
        padded = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *(line(row) for row in cells)]) + "\n"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def csv_text(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return CSV with a header line; numbers in full, text that a spreadsheet would run made inert."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([csv_cell(value) for value in row] for row in rows)
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return value
    text = one_line(str(value), 2000)
    return f"'{text}" if text.startswith(_ACTIVE) else text


def markdown(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; cells cannot open a column, a link, code or HTML."""
    raw = [list(row) for row in rows]
    right = [bool(raw) and all(_is_number(row[i]) for row in raw) for i in range(len(headers))]
    lines = [_markdown_row(headers), _markdown_row(["---:" if r else "---" for r in right])]
    lines += [_markdown_row([escape(plain(value)) for value in row]) for row in raw]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Escape what Markdown would read as markup."""
    for mark in ("\\", "|", "`", "*", "_", "[", "]", "<"):
        text = text.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return text


def table(style: str, headers: Sequence[str], rows: Iterable[Sequence[Any]], limit: int = 0) -> str:
    """Return rows in one of the formats table, csv or markdown."""
    if style == "csv":
        return csv_text(headers, rows)
    if style == "markdown":
        return markdown(headers, rows)
    return aligned(headers, rows, limit)


def json_text(document: Any) -> str:
    """Return one JSON document with a final newline."""
    import json

    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def wrapped(text: str, width: int = 80, indent: str = "") -> str:
    """Break text into lines of at most `width` at single blanks; lines after the first start with `indent`."""
    lines: list[str] = []
    current: str | None = None  # leading blanks are words of no letters: an empty line is not yet a line
    for word in text.split(" "):
        candidate = word if current is None else f"{current} {word}"
        if current is not None and current.strip() and len(candidate) > width:
            lines.append(current.rstrip())
            candidate = indent + word
        current = candidate
    return "\n".join([*lines, (current or "").rstrip()])
