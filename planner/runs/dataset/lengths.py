"""Row lengths of a data set, in tokens: percentiles, truncation, histogram."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cached_property

PERCENTILES = (50, 90, 95, 99)


class Lengths:
    """The length of every row in file order, four bytes a row."""

    def __init__(self, values: Iterable[int] = ()) -> None:
        self.values = array("I", values)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """(length, rows of that length), shortest first. Read it when all rows are in."""
        found: dict[int, int] = {}
        for value in self.values:
            found[value] = found.get(value, 0) + 1
        return tuple(sorted(found.items()))

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return sum(length * rows for length, rows in self.counts)

    @property
    def mean(self) -> float:
        """Tokens of the mean row."""
        return self.total / len(self) if len(self) else 0.0

    @property
    def shortest(self) -> int:
        """Tokens of the shortest row."""
        return self.counts[0][0] if self.counts else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.counts[-1][0] if self.counts else 0

    def percentile(self, percent: float) -> int:
        """The shortest length that at least `percent` of the rows do not exceed (nearest rank)."""
        wanted, seen = percent / 100 * len(self), 0
        for length, rows in self.counts:
            seen += rows
            if seen >= wanted:
                return length
        return self.longest

    def clipped(self, limit: int) -> Lengths:
        """Rows cut to `limit` tokens."""
        return Lengths(min(value, limit) for value in self.values)

    def truncated(self, limit: int) -> tuple[int, int]:
        """(rows longer than `limit`, tokens that cutting them loses)."""
        rows = sum(n for length, n in self.counts if length > limit)
        lost = sum((length - limit) * n for length, n in self.counts if length > limit)
        return rows, lost

    def histogram(self, bins: int = 12) -> list[tuple[int, int, int]]:
        """(from, to, rows) of about equally wide ranges, both ends inside; the last holds the longest row."""
        if not self.counts:
            return []
        width = max(-(-(self.longest - self.shortest + 1) // bins), 1)
        rows = [0] * -(-(self.longest - self.shortest + 1) // width)
        for length, number in self.counts:
            rows[(length - self.shortest) // width] += number
        first = self.shortest
        return [(first + i * width, first + (i + 1) * width - 1, number) for i, number in enumerate(rows)]
