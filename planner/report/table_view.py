"""How a table is shown: which rows and columns, in which format, on a terminal or in a file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from planner.base.errors import Contradiction, InvalidInput, one_line, unknown
from planner.base.outputs import whole_file
from planner.plan import rows as plan_rows
from planner.plan.rows import Block, Caption
from planner.plan.table import Tabulator
from planner.report import grid as report
from planner.report.grid import Out
from planner.report.table import caption_of, columns_of, kept, left_out, notes_of, warnings_of


def chosen_style(style: str | None, output: str | None) -> str:
    """The format that was named, else that of the file's suffix, else a table."""
    if style is not None:
        if style == "parquet" and output is None:
            raise Contradiction("parquet is not printed to a terminal; give a file with -o")
        return style
    suffix = Path(output).suffix.lower() if output else ".txt"
    if suffix not in report.SUFFIXES:
        raise unknown("suffix", suffix, report.SUFFIXES, "(or name a --format)")
    return report.SUFFIXES[suffix]


class View(NamedTuple):
    """Which rows and columns are shown, how, and where."""

    where: tuple[str, ...]
    sort: str | None
    top: int | None
    pareto: str | None
    pivot: tuple[str, str] | None
    show: str
    style: str
    output: str | None

    def write(
        self, made: Sequence[Tabulator], evaluated: Iterator[Block], out: Out, tell: Callable[[str], None],
        width: int = 0,
    ) -> int:  # fmt: skip
        """Evaluate, select, write; return the number of rows that were kept.

        Args:
            made: the tables.
            evaluated: their blocks, as they come.
            out: where the table goes, unless it goes to a file.
            tell: is told, a line each, what has no place in the format and which rows have no answer.
            width: columns that a table may take there; 0: any.

        Raises:
            PlannerError: an unknown column, too many rows, or no row has an answer.
        """
        columns = columns_of([one.wanted for one in made], made[0].run.budget)
        conditions = [plan_rows.condition(text, columns) for text in self.where]
        first = next(evaluated, None)
        if first is None:  # nothing has an answer: say why instead of an empty table
            raise InvalidInput(next((reason for one in made for reason in one.problems.reasons), "no rows"))
        blocks = (plan_rows.select(b, conditions) for b in itertools.chain([first], evaluated))
        reorders = self.sort or self.top or self.pareto or self.pivot
        if self.style in report.STREAMED and not reorders:
            count = self._stream(blocks, columns, caption_of(made, final=False), out)
            _tell_notes(made, tell)
        else:
            rows = kept((row for block in blocks for row in block.rows(columns)), columns, self)
            count = len(rows)
            caption = caption_of(made, final=True)
            if self.pivot:
                down, across, show = (plan_rows.column_of(word, columns) for word in (*self.pivot, self.show))
                headings, turned = plan_rows.pivot(rows, columns, down, across, show)
                _, verdicts = plan_rows.pivot(rows, columns, down, across, "verdict")
                rows, caption = self._marked(turned, verdicts, caption, show)
                columns = list(headings)
            self._whole(columns, rows, caption, out, width)
            if self.style in report.STREAMED:
                _tell_notes(made, tell)
        for line in left_out(made):
            tell(line)
        return count

    def _stream(self, blocks: Iterator[Block], columns: Sequence[str], caption: Caption, out: Out) -> int:
        if self.output is None:
            return report.write_streamed(self.style, out, columns, blocks, caption)
        if self.style == "parquet":
            with whole_file(self.output, "wb") as binary:
                return report.write_streamed(self.style, binary, columns, blocks, caption)
        with whole_file(self.output, newline="") as file:
            return report.write_streamed(self.style, file, columns, blocks, caption)

    def _marked(
        self, rows: Sequence[tuple[Any, ...]], verdicts: Sequence[tuple[Any, ...]], caption: Caption, show: str
    ) -> tuple[list[tuple[Any, ...]], Caption]:
        """A pivot; where people read it, figures in every column but the first are marked by their verdict."""
        if self.style not in report.STREAMED and self.style != "json":
            kind = plan_rows.SHOWN.get(show, plan_rows.Shown(show))
            present = {verdict for row in verdicts for verdict in row[1:]}
            used = [] if show == "verdict" else [word for word in report.MARKS if word in present]
            legend = ", ".join(f"{report.MARKS[word]} {word}" for word in used)
            rows = [
                (row[0], *(report.marked(value, kind, word) for value, word in zip(row[1:], words[1:], strict=True)))
                for row, words in zip(rows, verdicts, strict=True)
            ]
            caption = caption._replace(lines=(kind.heading + (f" ({legend})" if legend else ""), *caption.lines))
        return list(rows), caption

    def _whole(
        self, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], caption: Caption, out: Out, width: int
    ) -> None:
        if self.style in report.STREAMED:
            arrays = {name: [row[n] for row in rows] for n, name in enumerate(columns)}
            self._stream(iter([plan_rows.Block({}, arrays, len(rows))]), columns, caption, out)
            return
        width = width if self.output is None and self.style == "table" else 0
        text = report.whole(self.style, columns, rows, caption, width)
        if self.output is None:
            out.write(text)
        else:
            with whole_file(self.output) as file:
                file.write(text)


def _tell_notes(made: Sequence[Tabulator], tell: Callable[[str], None]) -> None:
    """Tell what formats of mere rows have no place for."""
    for line in warnings_of(notes_of(made), sum(one.evaluated for one in made)):
        tell(one_line(line, 1000))
