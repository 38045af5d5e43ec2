"""A table's columns, which of its rows are kept, and the words around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from planner.base.errors import InvalidInput, one_line
from planner.plan import rows as plan_rows
from planner.plan.rows import Caption
from planner.plan.table import Tabulator, Wanted
from planner.report.grid import MOST_SHOWN


class Kept(Protocol):
    """Which rows are kept, and in which order."""

    @property
    def sort(self) -> str | None: ...
    @property
    def top(self) -> int | None: ...
    @property
    def pareto(self) -> str | None: ...


class Look(NamedTuple):
    """Which rows are kept, and in which order."""

    where: tuple[str, ...] = ()
    sort: str | None = None
    top: int | None = None
    pareto: str | None = None


def laid_out(made: Sequence[Tabulator], how: Look) -> tuple[list[str], list[tuple[Any, ...]], Caption]:
    """Columns, rows and caption of tables that are evaluated as a whole.

    Raises:
        PlannerError: an unknown column, too many rows, or no row has an answer.
    """
    columns = columns_of([one.wanted for one in made], made[0].run.budget)
    conditions = [plan_rows.condition(text, columns) for text in how.where]
    blocks = [block for one in made for block in one.blocks()]
    if not blocks:
        raise InvalidInput(next((reason for one in made for reason in one.problems.reasons), "no rows"))
    some = (plan_rows.select(block, conditions) for block in blocks)
    rows = kept((row for block in some for row in block.rows(columns)), columns, how)
    caption = caption_of(made, final=True)
    return columns, rows, caption._replace(lines=(*caption.lines, *left_out(made)))


def left_out(made: Sequence[Tabulator]) -> list[str]:
    """Which combinations have no answer, and why, in lines."""
    problems: dict[str, int] = {}
    for one in made:
        for reason, number in one.problems.reasons.items():
            problems[reason] = problems.get(reason, 0) + number
    return [f"left out {number:,}: {one_line(reason, 300)}" for reason, number in problems.items()]


def kept(rows: Iterable[tuple[Any, ...]], columns: Sequence[str], how: Kept) -> list[tuple[Any, ...]]:
    """The rows that are kept, in their order.

    Raises:
        PlannerError: an unknown column, or more rows than can be shown.
    """
    found: Any = rows
    if how.pareto:
        found = plan_rows.pareto(found, [columns.index(plan_rows.column_of(w, columns)) for w in how.pareto.split(",")])
    if how.sort:
        keys = [w.strip() for w in how.sort.split(",")]
        numbers = [(columns.index(plan_rows.column_of(w.lstrip("-"), columns)), w.startswith("-")) for w in keys]
        return plan_rows.kept_sorted(found, numbers, how.top or 0)
    held: list[tuple[Any, ...]] = []
    for row in found:
        if how.top and len(held) >= how.top:
            break
        if len(held) >= MOST_SHOWN:
            raise InvalidInput(
                f"more than {MOST_SHOWN:,} rows; use csv, jsonl or parquet, or narrow with --where or --top"
            )
        held.append(row)
    return held


def columns_of(wanted: Sequence[Wanted], budget: bool) -> list[str]:
    """Columns of a table: model, card, the settings that were given, the numbers, the results."""
    from planner.plan.rows import RESULTS
    from planner.plan.sweep import NUMBERS

    settings = dict.fromkeys(key for one in wanted for key in one.values if key not in NUMBERS)
    results = [name for name in RESULTS if budget or name not in ("hours", "usd")]
    return ["model", "gpu", *settings, *NUMBERS, *results]


def caption_of(made: Sequence[Tabulator], *, final: bool) -> Caption:
    """Version, calibration, prices and their days, and the settings that all rows share."""
    from planner import __version__
    from planner.plan.money import ESTIMATED
    from planner.plan.rows import Caption
    from planner.report.answer import value_words
    from planner.timing.coefficients import time_words

    prices = [price for one in made for price in one.run.prices.values() if price is not None]
    days = sorted({price.date for price in prices if price.date})
    shared = dict(made[0].shared)
    for one in made[1:]:
        shared = {key: value for key, value in shared.items() if one.shared.get(key) == value}
    chosen = {name: item for one in made for name, item in one.run.chosen.items()}
    lines = [f"loraplan {__version__}; {made[0].basis}; {time_words(chosen)}"]
    if made[0].run.margin:
        lines.append(f"{made[0].run.margin:g} % of every card is kept free (--margin)")
    if final and any(scan.token_error for one in made for scan in one.known.scans.values()):
        lines.append(ESTIMATED)
    if made[0].run.budget and days:
        lines.append(f"prices on demand, read {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else ""))
    if final and shared:
        order = ("stack", "method", "quantization", "gradient_checkpointing", "attention", "loss", "optimizer",
                 "target_modules", "base_dtype", "autocast")  # fmt: skip
        words = [f"{key} {value_words(shared[key])}" for key in order if key in shared]
        lines.append(f"all rows: {'; '.join(words)}")
    data: dict[str, Any] = {
        "version": __version__, "basis": made[0].basis, "prices_read": days,
        "calibrated": sorted(name for name, item in chosen.items() if item.calibration and not item.borrowed),
        "borrowed": {n: i.calibration.label for n, i in sorted(chosen.items()) if i.calibration and i.borrowed},
        "shared": {key: value_words(value) for key, value in shared.items()},
    }  # fmt: skip
    if final:
        notes = notes_of(made)
        data["warnings"] = [{"text": text, "rows": rows} for text, rows in notes.items()]
        lines += warnings_of(notes, sum(one.evaluated for one in made))
    return Caption(tuple(lines), data)


def notes_of(made: Sequence[Tabulator]) -> dict[str, int]:
    """Distinct notes of the plans of all rows, with the number of rows that each concerns."""
    found: dict[str, int] = {}
    for one in made:
        for note, rows in one.notes.items():
            found[note] = found.get(note, 0) + rows
    return found


def warnings_of(notes: Mapping[str, int], rows: int) -> list[str]:
    """The notes as lines, with how many of the rows they concern."""
    return [f"warning{f' ({n:,} of {rows:,} rows)' if n < rows else ''}: {note}" for note, n in notes.items()]
