"""Tables of published measurements: columns and allowed values, and reading them with every cell checked.

The schema is that of data/README.md: one run a row, empty where its source does not say.
"""

from __future__ import annotations

import csv
import io
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.base.errors import InvalidInput, one_line, unknown
from planner.base.units import MiB
from planner.training.kinds import Choice, Number, Whole, YesNo
from planner.training.settings import LIBRARIES, SETTINGS, SettingRow

MAX_BYTES = 64 * MiB
MAX_CELL = 2000

COUNTERS = ("allocated", "reserved", "device", "unspecified")

SETTING_COLUMNS: dict[str, str] = {row.column: key for key, row in SETTINGS.items() if row.column}
"""Columns that hold a setting -> its key."""

COLUMNS: tuple[str, ...] = (
    "id", "source", "model", "framework", *SETTING_COLUMNS, "seq_len_max", "mean_tokens_per_row", "packing", "gpu",
    "num_gpus", "parallel", "cpu_offload", *LIBRARIES, "outcome",
    *(f"{counter}_bytes_{end}" for counter in COUNTERS for end in ("low", "high")),
    "micro_step_s", "optimizer_step_s", "tokens_per_s_per_gpu", "token_convention", "time_scope",
    "confidence_memory", "confidence_time", "notes",
)  # fmt: skip

_FLAGS = ("true", "false")


def _words(row: SettingRow) -> tuple[str, ...]:
    """The words that the column of a setting may hold; none: it holds a number or names."""
    if isinstance(row.kind, YesNo):
        return _FLAGS
    return (*row.kind.words, *row.column_words) if isinstance(row.kind, Choice) else ()


ENUMERATIONS: dict[str, tuple[str, ...]] = {
    **{row.column: _words(row) for row in SETTINGS.values() if row.column and _words(row)},
    "packing": _FLAGS,
    "parallel": ("single", "ddp", "fsdp", "fsdp2", "zero2", "zero3", "tp", "mixed"),
    "cpu_offload": _FLAGS,
    "outcome": ("ok", "oom"),
    "token_convention": ("computed", "useful", "unknown"),
    "time_scope": ("step", "fwd-bwd", "micro-avg", "train-loop", "with-warmup"),
    "confidence_memory": ("A", "B", "C"),
    "confidence_time": ("A", "B", "C"),
}
"""Allowed values of each enumerated column; an empty cell is always allowed."""


def _columns_of(kind: type[Whole] | type[Number]) -> tuple[str, ...]:
    return tuple(row.column for row in SETTINGS.values() if row.column and isinstance(row.kind, kind))


_WHOLE = (
    *_columns_of(Whole), "seq_len_max", "num_gpus",
    *(f"{counter}_bytes_{end}" for counter in COUNTERS for end in ("low", "high")),
)  # fmt: skip
_DECIMAL = (
    *_columns_of(Number), "mean_tokens_per_row", "micro_step_s", "optimizer_step_s", "tokens_per_s_per_gpu",
)  # fmt: skip
_WHOLE_NUMBER = re.compile(r"\d{1,15}")
_DECIMAL_NUMBER = re.compile(r"\d{1,12}(\.\d{1,12})?")
Row = Mapping[str, str]


def read_measurements(path: Path) -> list[dict[str, str]]:
    """Read a measurement table (CSV, UTF-8, at most 64 MiB).

    Raises:
        InvalidInput: naming the line, if the file, its header or a number in it cannot be read.
    """
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # opening a pipe waits for a writer, maybe for ever
            raise InvalidInput(f"{one_line(str(path))!r} is a pipe; write the table to a file and pass that")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"cannot read {one_line(str(path))!r}: {reason}; check the path") from None
    return parse_measurements(data, one_line(path.name, 60))


def parse_measurements(data: bytes, name: str = "table") -> list[dict[str, str]]:
    """Parse the bytes of a measurement table; see `read_measurements`."""
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{name} is larger than 64 MiB; split it by source")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"{name} line {line}: not UTF-8; save the table as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    header: list[str] | None = None
    for where, cells in _lines(reader, name):
        if header is None:
            header = _header(cells, where)
        elif cells:
            rows.append(_row(header, cells, where, seen))
    if header is None:
        raise InvalidInput(f"{name} is empty; the first line must name the columns of data/README.md")
    return rows


def _lines(reader: Any, name: str) -> Iterator[tuple[str, list[str]]]:
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidInput(f"{name} line {reader.line_num}: not CSV ({one_line(str(error))}); repair it") from None
        yield f"{name} line {reader.line_num}", cells


def _header(cells: list[str], where: str) -> list[str]:
    for cell in cells:
        if cell not in COLUMNS:
            raise InvalidInput(f"{where}: unknown column {one_line(cell, 40)!r}; allowed are those of data/README.md")
    missing = [column for column in COLUMNS if column not in cells]
    if missing:
        raise InvalidInput(f"{where}: column {missing[0]} is missing ({len(missing)} in all); add it, empty if unknown")
    if len(cells) != len(COLUMNS):
        twice = next(cell for cell in cells if cells.count(cell) > 1)
        raise InvalidInput(f"{where}: column {twice} occurs twice; keep one")
    return cells


def _row(header: list[str], cells: list[str], where: str, seen: set[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise InvalidInput(f"{where}: {len(cells)} cells, the header has {len(header)}; quote cells that hold commas")
    row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
    for column in ("id", "source", "model"):
        if not row[column]:
            raise InvalidInput(f"{where}: {column} is empty; every row needs one")
    if row["id"] in seen:
        raise InvalidInput(f"{where}: id {one_line(row['id'])!r} occurs twice; ids must be unique")
    seen.add(row["id"])
    for column, cell in row.items():
        if len(cell) > MAX_CELL or not cell.isprintable():
            raise InvalidInput(f"{where}: {column} is too long or not printable; at most {MAX_CELL} characters")
    _check_numbers(row, where)
    return row


def _check_numbers(row: Row, where: str) -> None:
    for columns, pattern, what in ((_WHOLE, _WHOLE_NUMBER, "whole"), (_DECIMAL, _DECIMAL_NUMBER, "decimal")):
        for column in columns:
            if row[column] and not (row[column].isascii() and pattern.fullmatch(row[column])):
                value = one_line(row[column], 40)
                raise InvalidInput(f"{where}: {column} is {value!r}; must be a {what} number or empty")
    for counter in COUNTERS:
        low, high = row[f"{counter}_bytes_low"], row[f"{counter}_bytes_high"]
        if bool(low) != bool(high) or (low and not 0 < int(low) <= int(high)):
            value = f"[{low}, {high}]"
            raise InvalidInput(f"{where}: {counter}_bytes is {value}; must be two numbers, 0 < low <= high, or empty")


def select(rows: Sequence[Row], sources: Collection[str] = (), where: Iterable[str] = ()) -> list[Row]:
    """Return the rows of the named sources that match every COLUMN=VALUE.

    Raises:
        UnknownName: for a source that no row has, or an unknown column.
        InvalidInput: for a filter that is not COLUMN=VALUE.
    """
    known = sorted({row["source"] for row in rows})
    for source in sources:
        if source not in known:
            raise unknown("source", source, known)
    filters = [_filter(text) for text in where]
    chosen = [row for row in rows if not sources or row["source"] in sources]
    return [row for row in chosen if all(row[column] == value for column, value in filters)]


def _filter(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals:
        raise InvalidInput(f"filter {one_line(text)!r} is not COLUMN=VALUE; write for example method=qlora")
    if column not in COLUMNS:
        raise unknown("column", column, COLUMNS)
    return column, value
