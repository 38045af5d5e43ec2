"""The peak of a program over all cells of a sweep: levels are polynomials, and only those that can be highest count.

A level is a sum of sizes, so every moment of the step is one row of factors over the monomials of the grid. The
rows that another row exceeds in every cell are dropped; what is left is one small matrix product per part of the
grid. All numbers are whole and below 2**53, so the product in float64 is exact.
"""

from __future__ import annotations

from typing import Any

from planner.base.errors import InvalidInput
from planner.base.polynomials import Grid, Monomial, terms_of
from planner.memory.walk import BLOCK
from planner.step.engine import Record

EXACT = 2**53
"""Whole numbers up to here are exact in float64, in any order of additions."""


class Levels:
    """What is alive at the moments of a step that can be its peak, over the active cells of a grid."""

    def __init__(self, record: Record, grid: Grid) -> None:
        self.grid = grid
        self.columns: dict[Monomial, int] = {(): 0}
        rows, static = self._rows(record)
        self.low, self.high = self._bounds()
        self.rows = self._highest(rows)
        self.static = static

    def peak(self) -> Any:
        """Bytes at the peak, int64 [pairs, ranks]."""
        return self._evaluate(self.rows)

    def static_bytes(self) -> Any:
        """Bytes alive before the forward, int64 [pairs, ranks]."""
        return self._evaluate(self.static[None, :])

    # --- rows of factors --------------------------------------------------------------------------------------

    def _rows(self, record: Record) -> tuple[Any, Any]:
        """Factors of the level at every local maximum, and of the level when the forward begins."""
        np = self.grid.np
        changes, table = self._changes(record)
        rows: list[Any] = []
        level = static = np.zeros(len(self.columns), dtype=np.int64)
        for segment in record.segments:
            signs = changes[segment.start : segment.end]
            if not len(signs):
                continue
            steps = table[np.abs(signs) - 1] * np.sign(signs)[:, None]
            levels = level + np.cumsum(steps, axis=0)
            grows = np.append(signs[1:] < 0, True) & (signs > 0)  # what follows frees, or the segment ends
            tops = levels[grows]
            change = levels[-1] - level
            if segment.phase != "load":  # as memory.peak_bytes
                rows.append(tops)
                if segment.repeat > 1:
                    rows.append(tops + (segment.repeat - 1) * change)
            level = level + segment.repeat * change
            if segment.phase in ("load", "state"):
                static = level
        return np.unique(np.concatenate(rows), axis=0), static

    def _changes(self, record: Record) -> tuple[Any, Any]:
        """Per event the number of its size (from 1, negative for a free), and the factors of each size."""
        np = self.grid.np
        numbers: dict[Any, int] = {}
        sizes: list[dict[Monomial, int]] = []
        made: dict[int, int] = {}
        changes = []
        for index, size in record.events:
            number = made.get(index)
            if number is not None:
                changes.append(-number)
                continue
            number = numbers.get(size)
            if number is None:
                number = numbers[size] = len(sizes) + 1
                blocks = dict(terms_of(-(-size // BLOCK) * BLOCK))
                for monomial in blocks:
                    self.columns.setdefault(monomial, len(self.columns))
                sizes.append(blocks)  # type: ignore[arg-type]
            made[index] = number
            changes.append(number)
        table = np.zeros((len(sizes), len(self.columns)), dtype=np.int64)
        for row, terms in enumerate(sizes):
            for monomial, factor in terms.items():
                table[row, self.columns[monomial]] = factor
        return np.array(changes, dtype=np.int64), table

    def _bounds(self) -> tuple[Any, Any]:
        """Least and largest value of every column among the active cells."""
        np = self.grid.np
        low, high = np.ones(len(self.columns)), np.ones(len(self.columns))
        for monomial, column in self.columns.items():
            if monomial:
                values = self.grid.among_active(self.grid.value_of(monomial))
                low[column], high[column] = values.min(), values.max()
        return low, high

    def _highest(self, rows: Any) -> Any:
        """Drop the rows that another row exceeds in every cell, by the bounds of the columns."""
        np = self.grid.np
        rows = rows.astype(np.float64)
        positive, negative = np.maximum(rows, 0), np.minimum(rows, 0)
        most = positive @ self.high + negative @ self.low
        least = positive @ self.low + negative @ self.high
        if most.max() > EXACT or not len(rows):
            raise InvalidInput("the memory of this sweep passes 2**53 bytes; shorten the rows or the batches")
        rows = rows[most >= least.max()]
        middle = (self.low + self.high) / 2
        rows = rows[np.argsort(-(rows @ middle))]
        kept = []
        while len(rows):
            kept.append(rows[0])
            excess = rows[0] - rows[1:]
            always = np.maximum(excess, 0) @ self.low + np.minimum(excess, 0) @ self.high
            rows = rows[1:][always < 0]
        return np.stack(kept)

    # --- values -----------------------------------------------------------------------------------------------

    def _evaluate(self, rows: Any) -> Any:
        """The largest of the rows in every active cell; one product for each part of the grid a column varies over."""
        np, grid = self.grid.np, self.grid
        parts: dict[tuple[bool, bool], list[tuple[int, Any]]] = {}
        for monomial, column in self.columns.items():
            values = grid.among_active(grid.value_of(monomial)) if monomial else np.ones((1, 1))
            parts.setdefault((values.shape[0] > 1, values.shape[1] > 1), []).append((column, values))
        best: Any = None
        sums = [
            (shape, rows[:, [c for c, _ in members]] @ np.stack([v.ravel() for _, v in members]).astype(np.float64))
            for shape, members in parts.items()
        ]
        pairs, ranks = len(grid.active_pairs), len(grid.active_ranks)
        for number in range(len(rows)):
            level = np.zeros((pairs, ranks))
            for (by_pair, by_rank), values in sums:
                level += values[number].reshape(pairs if by_pair else 1, ranks if by_rank else 1)
            best = level if best is None else np.maximum(best, level, out=best)
        return best.astype(np.int64)
