"""Rows of a table: conditions, sorting, fronts, pivots."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from planner.base.errors import InvalidInput, one_line, unknown
from planner.base.units import GiB, plain

MOST_SORTED = 200_000
"""Rows held to be sorted: with 20 columns some 250 MB of Python objects."""

RESULTS = (
    "verdict", "allocated_bytes", "device_low_bytes", "device_bytes", "device_high_bytes", "headroom_bytes", "step_s",
    "step_low_s", "step_high_s", "tokens_per_s", "hours", "usd",
)  # fmt: skip


class Shown(NamedTuple):
    """How people see a column: its heading, what its value is divided by, and its digits after the point."""

    heading: str
    scale: float = 1.0
    digits: int = 2


SHOWN: dict[str, Shown] = {
    "micro_batch_size": Shown("batch"),
    "seq_len": Shown("length"),
    "r": Shown("r"),
    "gradient_accumulation_steps": Shown("accum"),
    "gradient_checkpointing": Shown("checkpointing"),
    "target_modules": Shown("targets"),
    "allocated_bytes": Shown("allocated GiB", GiB),
    "device_low_bytes": Shown("low", GiB),
    "device_bytes": Shown("peak GiB", GiB),
    "device_high_bytes": Shown("high", GiB),
    "headroom_bytes": Shown("left GiB", GiB),
    "step_s": Shown("s/step", digits=3),
    "step_low_s": Shown("from s", digits=3),
    "step_high_s": Shown("to s", digits=3),
    "tokens_per_s": Shown("tokens/s", digits=0),
    "hours": Shown("hours"),
    "usd": Shown("USD"),
    "usd_per_hour": Shown("USD/h"),
    "probability": Shown("probability", digits=3),
}

ALIASES = {
    "peak": "device_bytes", "low": "device_low_bytes", "high": "device_high_bytes", "allocated": "allocated_bytes",
    "headroom": "headroom_bytes", "left": "headroom_bytes", "step": "step_s", "tokens_s": "tokens_per_s",
    "batch": "micro_batch_size", "length": "seq_len", "rank": "r", "accum": "gradient_accumulation_steps",
    "checkpointing": "gradient_checkpointing", "targets": "target_modules",
}  # fmt: skip
"""Words for columns in --where, --sort, --show; sizes are then in GiB."""

_OPERATORS = re.compile(r"\s*([\w]+)\s*(<=|>=|!=|==|=|<|>)\s*(.+?)\s*")


class Block(NamedTuple):
    """Rows that were evaluated together: columns with one value each, and arrays or lists of `size` values."""

    constant: Mapping[str, Any]
    arrays: Mapping[str, Any]
    size: int

    def column(self, name: str) -> Any:
        """The values of a column: an array, a list, or one value for all rows."""
        return self.constant.get(name) if name in self.constant else self.arrays.get(name)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The rows as plain Python values; nan becomes None."""
        return zip(*(self.values(name) for name in columns), strict=True)

    def values(self, name: str) -> list[Any]:
        """A column as a list of plain values."""
        if name in self.constant or name not in self.arrays:
            return [self.constant.get(name)] * self.size
        values = self.arrays[name]
        if not hasattr(values, "tolist"):
            return list(values)
        found: list[Any] = values.tolist()
        if values.dtype.kind == "f":
            return [None if value != value else value for value in found]
        return found


class Condition(NamedTuple):
    """One --where: a column compared with a value."""

    column: str
    operator: str
    value: Any

    def holds(self, values: list[Any]) -> list[bool]:
        """Whether each value meets the condition; a missing one does not."""
        compare = _COMPARE[self.operator]
        return [value is not None and bool(compare(value, self.value)) for value in values]


_COMPARE: dict[str, Any] = {
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
}  # fmt: skip


def column_of(word: str, columns: Sequence[str]) -> str:
    """Return the column that a word names.

    Raises:
        UnknownName: it names none of this table.
    """
    name = "hours" if word == "time" and "hours" in columns else {"time": "step_s"}.get(word, ALIASES.get(word, word))
    if name not in columns:
        hint = "(hours and usd need --tokens or --rows)" if name in ("hours", "usd") else ""
        raise unknown("column", word, [*columns, *ALIASES], hint)
    return name


def condition(text: str, columns: Sequence[str]) -> Condition:
    """Parse one --where such as peak<24 or verdict=fits.

    Raises:
        PlannerError: it is none.
    """
    match = _OPERATORS.fullmatch(text[:500])
    if match is None:
        raise InvalidInput(f"--where {one_line(text)!r} is no condition; write for example peak<24 or verdict=fits")
    word, operator, value = match.groups()
    column = column_of(word, columns)
    scale = SHOWN[column].scale if column in SHOWN else 1.0
    try:
        number = float(value.replace(",", ""))
        if not math.isnan(number):  # compares with nothing
            return Condition(column, operator, number * scale)
    except ValueError:
        pass
    if operator in ("<", "<=", ">", ">=") or (column in RESULTS and column != "verdict"):
        raise InvalidInput(f"--where {one_line(text)!r} compares with no number")
    words = {"true": True, "false": False, "yes": True, "no": False}
    return Condition(column, operator, words.get(value.lower(), value.strip("'\"")))


def select(block: Block, conditions: Sequence[Condition]) -> Block:
    """The rows of a block that meet every condition."""
    if not conditions:
        return block
    keep = [True] * block.size
    for item in conditions:
        keep = [a and b for a, b in zip(keep, item.holds(block.values(item.column)), strict=True)]
    arrays = {
        name: [value for value, wanted in zip(block.values(name), keep, strict=True) if wanted] for name in block.arrays
    }
    return Block(block.constant, arrays, sum(keep))


def sort_key(value: Any) -> tuple[bool, Any]:
    """Order numbers by size and words by the alphabet; what is missing comes last."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True, 0
    return False, value


def kept_sorted(rows: Iterable[tuple[Any, ...]], keys: Sequence[tuple[int, bool]], top: int) -> list[tuple[Any, ...]]:
    """Sort rows by columns (number, descending); of a long table only the first `top` are ever held.

    Raises:
        InvalidInput: too many rows to sort without a top.
    """
    held: list[tuple[Any, ...]] = []
    limit = 2 * top + 10_000 if top else MOST_SORTED
    for row in rows:
        held.append(row)
        if len(held) >= limit:
            if not top:
                raise InvalidInput(f"more than {limit:,} rows to sort; add --top or --where")
            held = _sorted(held, keys)[:top]
    held = _sorted(held, keys)
    return held[:top] if top else held


def _sorted(rows: list[tuple[Any, ...]], keys: Sequence[tuple[int, bool]]) -> list[tuple[Any, ...]]:
    for number, descending in reversed(keys):
        missing = [row for row in rows if sort_key(row[number])[0]]
        present = [row for row in rows if not sort_key(row[number])[0]]
        try:
            present.sort(key=lambda row: row[number], reverse=descending)
        except TypeError:
            present.sort(key=lambda row: str(row[number]), reverse=descending)
        rows = present + missing
    return rows


def pareto(rows: Iterable[tuple[Any, ...]], numbers: Sequence[int]) -> list[tuple[Any, ...]]:
    """Rows that no other row beats: at most as much of every column, and less of one. Missing values never win."""
    front: list[tuple[Any, ...]] = []
    for row in rows:
        mine = [row[n] for n in numbers]
        if any(value is None for value in mine):
            continue
        if any(_beats([other[n] for n in numbers], mine) for other in front):
            continue
        front = [other for other in front if not _beats(mine, [other[n] for n in numbers])]
        front.append(row)
    return front


def _beats(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return list(one) != list(other) and all(a <= b for a, b in zip(one, other, strict=True))


def pivot(
    rows: Iterable[tuple[Any, ...]], columns: Sequence[str], down: str, across: str, show: str
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Turn rows into a matrix of one column.

    Raises:
        InvalidInput: two rows for one place of the matrix.
    """
    d, a, s = columns.index(down), columns.index(across), columns.index(show)
    cells: dict[tuple[Any, Any], Any] = {}
    heads: dict[Any, None] = {}
    sides: dict[Any, None] = {}
    for row in rows:
        place = (row[d], row[a])
        if place in cells:
            other = ", ".join(name for name in columns if name not in (down, across, *RESULTS))
            raise InvalidInput(
                f"several rows for {one_line(plain(place[0]), 60)} and {one_line(plain(place[1]), 60)}: "
                f"give {other or 'the rest'} one value each, or pick with --where"
            )
        cells[place] = row[s]
        sides[place[0]] = heads[place[1]] = None
    turned = [(side, *(cells.get((side, head)) for head in heads)) for side in sides]
    return [down, *(plain(head) for head in heads)], turned


class Caption(NamedTuple):
    """What stands below a table: lines of text, and the same as data."""

    lines: tuple[str, ...]
    data: Mapping[str, Any]
