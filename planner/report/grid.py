"""Rows of a table in blocks: selecting, sorting and turning them; every output format, streamed where it can be.

Names and cells may be hostile: each format writes them so that nothing runs them (formulas, markup, commands).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from planner.base.errors import InvalidInput, MissingDependency, one_line
from planner.base.units import plain
from planner.plan.rows import RESULTS, SHOWN, Block, Caption, Shown
from planner.plan.verdict import CLOSE, NO, Verdict
from planner.report.pages import html_page, html_table, latex
from planner.report.tables import aligned, csv_cell, markdown, wrapped

FORMATS = ("table", "json", "jsonl", "csv", "markdown", "latex", "html", "parquet")
SUFFIXES = {
    ".txt": "table", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".md": "markdown",
    ".markdown": "markdown", ".tex": "latex", ".html": "html", ".htm": "html", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
STREAMED = ("csv", "jsonl", "parquet")
MOST_SHOWN = 50_000
"""Rows of the formats that are laid out as a whole."""


_LEAST = ("step_low_s", "step_high_s", "allocated_bytes", "device_low_bytes", "device_high_bytes", "step_s", "hours")
"""Columns that a narrow terminal leaves out, first to last."""


# --- formats ------------------------------------------------------------------------------------------------------


class Out(Protocol):
    """A text or binary file."""

    def write(self, text: Any, /) -> Any: ...


def write_streamed(style: str, out: Out, columns: Sequence[str], blocks: Iterable[Block], caption: Caption) -> int:
    """Write blocks as they come, in csv, jsonl or parquet; return the number of rows."""
    if style == "parquet":
        return _parquet(out, columns, blocks, caption)
    count = 0
    if style == "csv":
        out.write(",".join(columns) + "\n")
    for block in blocks:
        texts = [_texts(block, name, style) for name in columns]
        if style == "csv":
            lines = [",".join(cells) for cells in zip(*texts, strict=True)]
        else:
            keys = [f"{json.dumps(name)}: " for name in columns]
            lines = [
                "{" + ", ".join(k + c for k, c in zip(keys, cells, strict=True)) + "}"
                for cells in zip(*texts, strict=True)
            ]
        if lines:
            out.write("\n".join(lines) + "\n")
        count += block.size
    return count


def _texts(block: Block, name: str, style: str) -> list[str]:
    """A column as texts: numbers in full, a constant written once."""
    encode = _csv_text if style == "csv" else _json_text
    values = block.arrays.get(name)
    if name in block.constant or values is None:
        return [encode(block.constant.get(name))] * block.size
    kind = values.dtype.kind if hasattr(values, "dtype") else ""
    if kind == "i":
        return list(map(str, values.tolist()))
    if kind == "f":
        missing = "" if style == "csv" else "null"
        return [repr(value) if value == value else missing for value in values.tolist()]
    known: dict[Any, str] = {}
    return [known.get(value) or known.setdefault(value, encode(value)) for value in block.values(name)]


def _json_text(value: Any) -> str:
    return json.dumps(None if isinstance(value, float) and math.isnan(value) else value)


def _csv_text(value: Any) -> str:
    cell = csv_cell(value)
    text = repr(cell) if isinstance(cell, float) else str(cell)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\n\r') else text


def _parquet(out: Out, columns: Sequence[str], blocks: Iterable[Block], caption: Caption) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependency("parquet needs pyarrow; pip install 'loraplan[tables]'") from error
    writer: Any = None
    schema: Any = None
    count = 0
    for block in blocks:
        data = [_arrow(pa, block, name) for name in columns]
        if schema is None:
            schema = pa.schema([(name, part.type) for name, part in zip(columns, data, strict=True)])
            schema = schema.with_metadata({"loraplan": json.dumps(dict(caption.data))})
            writer = pq.ParquetWriter(out, schema)
        data = [part.cast(field.type) for part, field in zip(data, schema, strict=True)]
        writer.write_table(pa.Table.from_arrays(data, schema=schema))
        count += block.size
    if writer is None:
        raise InvalidInput("no rows: nothing to write")
    writer.close()
    return count


def _arrow(pa: Any, block: Block, name: str) -> Any:
    """A column of fixed type, whatever its first values are."""
    texts = name in ("model", "gpu", "verdict") or (name not in RESULTS and name not in _WHOLE)
    if texts:
        values = [None if value is None else plain_text(value) for value in block.values(name)]
        return pa.array(values, type=pa.string())
    whole = name in _WHOLE or name.endswith("_bytes")
    return pa.array(block.values(name), type=pa.int64() if whole else pa.float64())


_WHOLE = ("micro_batch_size", "seq_len", "r", "gradient_accumulation_steps")


def plain_text(value: Any) -> str:
    """A setting as a word."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def whole(style: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], caption: Caption, width: int = 0) -> str:
    """Return a table that is laid out as a whole: table, markdown, latex, html or json.

    `width`: characters of the terminal, which lose the less important columns first; 0 keeps all.
    """
    if style == "json":
        document = {
            "schema_version": 1, **caption.data, "columns": list(columns),
            "rows": [dict(zip(columns, row, strict=True)) for row in rows],
        }  # fmt: skip
        return json.dumps(document, indent=2, allow_nan=False) + "\n"
    if style == "table":
        return _terminal(columns, rows, caption, width)
    headings, cells = shown(columns, rows)
    if style == "markdown":
        notes = "\n".join(f"- {markdown_text(line)}" for line in caption.lines)
        return f"{markdown(headings, cells)}\n{notes}\n"
    if style == "latex":
        return latex(headings, cells, caption)
    return html_page(html_table(headings, cells, caption), "loraplan table")


def shown(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> tuple[list[str], list[list[Any]]]:
    """Headings and cells for people: sizes in GiB, rounded."""
    kinds = [SHOWN.get(name, Shown(name)) for name in columns]
    cells = [[figure(value, kind) for value, kind in zip(row, kinds, strict=True)] for row in rows]
    return [kind.heading for kind in kinds], cells


class Figure(float):
    """A number that knows its digits, and a mark before it."""

    digits = 2
    mark = ""

    def __format__(self, spec: str) -> str:
        return self.mark + super().__format__(spec.replace(".2f", f".{self.digits}f"))


def figure(value: Any, kind: Shown) -> Any:
    """A number as people see it; anything else as it is."""
    if isinstance(value, Figure):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if kind.scale == 1.0 and isinstance(value, int):
        return value
    made = Figure(value / kind.scale)
    made.digits = kind.digits
    return made


MARKS: dict[Verdict, str] = {NO: "!", CLOSE: "?"}


def marked(value: Any, kind: Shown, verdict: Any) -> Any:
    """A figure with the mark of its verdict."""
    made = figure(value, kind)
    if verdict in MARKS and isinstance(made, (int, float)) and not isinstance(made, bool):
        digits = 0 if isinstance(made, int) else kind.digits
        made = Figure(made)
        made.digits, made.mark = digits, MARKS[verdict]
    return made


def _terminal(columns: Sequence[str], rows: Sequence[tuple[Any, ...]], caption: Caption, width: int) -> str:
    """The table, without columns that are the same in every row (they are named below) and what does not fit."""
    listed = list(columns[:2]) == ["model", "gpu"]  # a pivoted table's headings are values: all stay
    kept, fixed = _varying(columns, rows) if listed else (list(columns), [])
    text = _laid_out(kept, columns, rows)
    for name in _LEAST:
        if not width or max(len(line) for line in text.splitlines()) <= width:
            break
        if name in kept and len(kept) > 2:
            kept = [other for other in kept if other != name]
            text = _laid_out(kept, columns, rows)
    notes = [f"every row: {', '.join(fixed)}"] if fixed else []
    below = "\n".join(wrapped(line, min(width or 100, 100), "  ") for line in (*notes, *caption.lines))
    return f"{text}\n{below}\n"


def _varying(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> tuple[list[str], list[str]]:
    kept, fixed = [], []
    for number, name in enumerate(columns):
        values = {plain(row[number]) for row in rows}
        if len(rows) > 1 and len(values) == 1 and name not in RESULTS and name != "model":
            fixed.append(f"{SHOWN.get(name, Shown(name)).heading} {next(iter(values))}")
        elif not (rows and values == {""}):
            kept.append(name)
    return kept, fixed


def _laid_out(kept: Sequence[str], columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    numbers = [columns.index(name) for name in kept]
    headings, cells = shown(kept, [tuple(row[n] for n in numbers) for row in rows])
    return aligned(headings, cells)


def markdown_text(text: str) -> str:
    """A line that Markdown reads as text."""
    from planner.report.tables import escape

    return escape(one_line(text, 2000))
