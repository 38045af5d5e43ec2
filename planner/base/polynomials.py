"""Sizes of a whole sweep at once: integer polynomials in micro batch, length and rank, evaluated only when needed.

The program of a step runs on them as on ints: `+ - * // %` give new polynomials, comparisons give plain bools and
`range` takes a plain int as long as all active cells agree. Where they do not, `Mixed` says which cells part ways, and
the sweep runs the program once for each side: a rounding, a threshold, a choice of kernel or a number of chunks is
therefore exact in every cell, and the program never asks whether a size is a number.

Equal polynomials are one object (hash-consing), so that a program asks for each operation once. Values are int64 arrays
[pairs, ranks] of length 1 where they do not depend on an axis; what could pass 2**62 is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Union

from planner.base.errors import InvalidInput

Monomial = tuple[int, ...]
"""Numbers of the atoms that are multiplied, sorted; () is the constant term."""
Number = int | float
Operand = Union["Polynomial", int, float]

LARGEST = 2**62
"""int64 would overflow silently above 2**63."""


class Mixed(Exception):
    """A comparison or a count that does not come out equally in all active cells.

    `holds`: what comes out in every cell of the grid, [pairs, ranks] of bool or int, of length 1 where independent.
    """

    def __init__(self, holds: Any) -> None:
        super().__init__("cells differ")
        self.holds = holds


class _Atom:
    """Something a polynomial is made of: an axis, or a rounded or divided polynomial."""

    __slots__ = ("compute", "high", "low", "name", "value")

    def __init__(self, name: str, low: Number, high: Number, compute: Callable[[], Any]) -> None:
        self.name = name
        self.low = low
        self.high = high
        self.compute = compute
        self.value: Any = None


class Grid:
    """The cells of a sweep: pairs of (micro batch, length) by ranks, and which of them are active in this run."""

    def __init__(self, batch: Any, length: Any, rank: Any) -> None:
        import numpy as np

        self.np = np
        self.pairs, self.ranks = len(batch), len(rank)
        self.active_pairs: Any = np.arange(self.pairs)
        self.active_ranks: Any = np.arange(self.ranks)
        self.atoms: list[_Atom] = []
        self.known: dict[Any, Polynomial] = {}
        self.results: dict[tuple[Any, ...], Any] = {}
        """Memo of every operation by the numbers of its operands."""
        self.compared: dict[tuple[Any, ...], bool] = {}
        """Memo of the comparisons among the active cells."""
        self.batch = self._axis("batch", np.asarray(batch, dtype=np.int64)[:, None])
        self.length = self._axis("length", np.asarray(length, dtype=np.int64)[:, None])
        self.rank = self._axis("rank", np.asarray(rank, dtype=np.int64)[None, :])

    def activate(self, pairs: Any, ranks: Any) -> None:
        """Restrict comparisons to these pairs and ranks (index arrays)."""
        self.active_pairs, self.active_ranks = pairs, ranks
        self.compared = {}

    def _axis(self, name: str, values: Any) -> Operand:
        low, high = int(values.min()), int(values.max())
        if low == high:
            return low  # a constant needs no symbol
        return self.atom(("axis", name), name, low, high, lambda: values)

    def atom(
        self, key: tuple[Any, ...], name: str, low: Number, high: Number, compute: Callable[[], Any]
    ) -> Polynomial:
        """Return the polynomial that is one atom; `key` says what it is made of."""
        found = self.results.get(key)
        if found is None:
            self.atoms.append(_Atom(name, low, high, compute))
            found = self.results[key] = self.make({(len(self.atoms) - 1,): 1})
        result: Polynomial = found
        return result

    def make(self, terms: dict[Monomial, Number]) -> Any:
        """Return the one polynomial with these terms; a number where nothing depends on the cells.

        Raises:
            InvalidInput: it could pass 2**62.
        """
        terms = {monomial: factor for monomial, factor in terms.items() if factor}
        if not terms:
            return 0
        if len(terms) == 1 and () in terms:
            return terms[()]
        key = frozenset(terms.items())
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = Polynomial(self, terms, len(self.known))
        return found

    def bounds(self, terms: Mapping[Monomial, Number]) -> tuple[Number, Number]:
        """The interval that contains every cell's value (atoms are not negative)."""
        low: Number = 0
        high: Number = 0
        for monomial, factor in terms.items():
            least: Number = factor
            most: Number = factor
            for number in monomial:
                least *= self.atoms[number].low
                most *= self.atoms[number].high
            if factor < 0:
                least, most = most, least
            low += least
            high += most
        return low, high

    def value_of(self, monomial: Monomial) -> Any:
        """The product of a monomial's atoms as an array [pairs or 1, ranks or 1]."""
        key = ("monomial", monomial)
        found = self.results.get(key)
        if found is None:
            most = math.prod(self.atoms[number].high for number in monomial)
            found = self._atom_value(monomial[0])
            if most > LARGEST:  # only FLOPs come here: bytes are refused before
                found = found.astype(self.np.float64)
            for number in monomial[1:]:
                found = found * self._atom_value(number)
            self.results[key] = found
        return found

    def _atom_value(self, number: int) -> Any:
        atom = self.atoms[number]
        if atom.value is None:
            atom.value = atom.compute()
        return atom.value

    def among_active(self, values: Any) -> Any:
        """The active cells of an array that may have length 1 along an axis."""
        if values.shape[0] > 1:
            values = values[self.active_pairs]
        if values.shape[1] > 1:
            values = values[:, self.active_ranks]
        return values


class Polynomial:
    """A polynomial over the grid's atoms; behaves as an int towards the program."""

    __slots__ = ("_times", "_value", "grid", "high", "low", "number", "terms")

    def __init__(self, grid: Grid, terms: dict[Monomial, Number], number: int) -> None:
        self.grid = grid
        self.terms = terms
        self.number = number
        self.low, self.high = grid.bounds(terms)
        self._value: Any = None
        self._times: dict[int, Any] = {}
        if max(abs(self.low), abs(self.high)) > LARGEST and not self.is_float:
            raise InvalidInput("a size of this sweep passes 2**62 bytes; shorten the rows or the batches")

    @property
    def is_float(self) -> bool:
        """Whether it counts something that need not be whole (FLOPs)."""
        return any(isinstance(factor, float) for factor in self.terms.values()) or any(
            isinstance(self.grid.atoms[n].high, float) for monomial in self.terms for n in monomial
        )

    @property
    def value(self) -> Any:
        """int64 (or float64) array [pairs or 1, ranks or 1]."""
        if self._value is None:
            self._value = evaluate(self.grid, self.terms)
        return self._value

    def extremes(self) -> tuple[Number, Number]:
        """Bounds of the values in all cells, without evaluating them."""
        return self.low, self.high

    def exact_extremes(self) -> tuple[Number, Number]:
        """Least and largest value of all cells."""
        return self.value.min().item(), self.value.max().item()

    # --- arithmetic -------------------------------------------------------------------------------------------

    def _memo(self, name: str, other: Operand, build: Callable[[Operand], Any]) -> Any:
        key = (name, self.number, other.number if isinstance(other, Polynomial) else (other, type(other)))
        results = self.grid.results
        found = results.get(key)
        if found is None:
            found = results[key] = build(other)
        return found

    def __add__(self, other: Operand) -> Any:
        return self._memo("+", other, self._add)

    def _add(self, other: Operand) -> Any:
        terms = dict(self.terms)
        for monomial, factor in terms_of(other).items():
            terms[monomial] = terms.get(monomial, 0) + factor
        return self.grid.make(terms)

    def __mul__(self, other: Operand) -> Any:
        if type(other) is int:  # most operations of a program: no key to build
            found = self._times.get(other)
            if found is None:
                found = self._times[other] = self._mul(other)
            return found
        return self._memo("*", other, self._mul)

    def _mul(self, other: Operand) -> Any:
        terms: dict[Monomial, Number] = {}
        for left, one in self.terms.items():
            for right, two in terms_of(other).items():
                monomial = tuple(sorted(left + right))
                terms[monomial] = terms.get(monomial, 0) + one * two
        return self.grid.make(terms)

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Any:
        return self * -1

    def __sub__(self, other: Operand) -> Any:
        return self + other * -1

    def __rsub__(self, other: Operand) -> Any:
        return self * -1 + other

    def __floordiv__(self, other: Operand) -> Any:
        return self._memo("//", other, self._floor)

    def _floor(self, other: Operand) -> Any:
        exact = _exact_quotient(self.terms, terms_of(other))
        if exact is not None:
            return self.grid.make(exact)
        least, most = self.exact_extremes()
        if most <= 0:  # -(-a // b) is how the program rounds up: keep the atom positive
            return -self._atom("ceiling", other, -most, -least, lambda a, b: -(a // b), lambda a, b: -(-a // b))
        return self._atom("floor", other, least, most, lambda a, b: a // b, lambda a, b: a // b)

    def _atom(
        self,
        name: str,
        other: Operand,
        low: Number,
        high: Number,
        compute: Callable[[Any, Any], Any],
        bound: Callable[[Any, Any], Any],
    ) -> Polynomial:
        """An atom made of this polynomial and another: `bound` gives its extremes from theirs."""
        least, most = other.exact_extremes() if isinstance(other, Polynomial) else (other, other)
        key = (name, self.number, other.number if isinstance(other, Polynomial) else (other, type(other)))
        return self.grid.atom(
            key, name, bound(low, most), bound(high, least), lambda: compute(self.value, value_of(other))
        )

    def __mod__(self, other: Operand) -> Any:
        return self - self // other * other

    def __truediv__(self, other: Operand) -> Any:
        return self._memo("/", other, self._divide)

    def _divide(self, other: Operand) -> Any:
        """An atom of its own: a quotient of the factors would round otherwise than the quotient of the values."""
        return self._atom("ratio", other, *self.exact_extremes(), lambda a, b: a / b, lambda a, b: a / b)

    def next_power_of_two(self) -> Any:
        """The smallest power of two that is not smaller; 1 for what is below."""
        np = self.grid.np
        low, high = (int(bound) for bound in self.exact_extremes())

        def compute() -> Any:
            _, exponent = np.frexp((self.value - 1).astype(np.float64))  # exact: below 2**53 by the bounds
            return np.where(self.value <= 1, 1, np.int64(1) << exponent.astype(np.int64))

        bounds = (1 << max(low - 1, 0).bit_length(), 1 << max(high - 1, 0).bit_length())
        return self.grid.atom(("power", self.number), "power", *bounds, compute)

    # --- comparisons and counts -------------------------------------------------------------------------------

    def __index__(self) -> int:
        """The number that all active cells have, so that `range` counts.

        Raises:
            Mixed: they have several.
        """
        values = self.grid.among_active(self.value)
        first = values.flat[0].item()
        if not (values == first).all():
            raise Mixed(self.value)
        return int(first)

    def _holds(self, name: str, other: Operand, test: Callable[[Any], Any]) -> bool:
        """Whether `test(self - other)` holds in all active cells.

        Raises:
            Mixed: in some of them.
        """
        difference = self - other
        if not isinstance(difference, Polynomial):
            return bool(test(difference))
        key = (name, difference.number)
        compared = self.grid.compared
        if key not in compared:
            holds = test(self.grid.among_active(difference.value))
            if not holds.all() and holds.any():
                raise Mixed(test(difference.value))
            compared[key] = bool(holds.all())
        return compared[key]

    def __lt__(self, other: Operand) -> bool:
        return self._holds("<", other, lambda d: d < 0)

    def __le__(self, other: Operand) -> bool:
        return self._holds("<=", other, lambda d: d <= 0)

    def __gt__(self, other: Operand) -> bool:
        return self._holds(">", other, lambda d: d > 0)

    def __ge__(self, other: Operand) -> bool:
        return self._holds(">=", other, lambda d: d >= 0)

    def __eq__(self, other: object) -> bool:
        if other is self:
            return True
        if not isinstance(other, (Polynomial, int, float)):
            return NotImplemented
        return self._holds("==", other, lambda d: d == 0)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return self != 0


def terms_of(operand: Operand) -> Mapping[Monomial, Number]:
    """The terms of a polynomial or a number."""
    return operand.terms if isinstance(operand, Polynomial) else {(): operand}


def next_power_of_two(size: Operand) -> Any:
    """The smallest power of two that is not smaller than a polynomial or a whole number; 1 for what is below."""
    if isinstance(size, Polynomial):
        return size.next_power_of_two()
    return 1 << (max(int(size), 1) - 1).bit_length()


def value_of(operand: Operand) -> Any:
    """The array of a polynomial, or the number."""
    return operand.value if isinstance(operand, Polynomial) else operand


def evaluate(grid: Grid, terms: Mapping[Monomial, Number]) -> Any:
    """Sum the terms as an array."""
    total: Any = terms.get((), 0)
    for monomial, factor in terms.items():
        if monomial:
            total = total + grid.value_of(monomial) * factor
    return total if hasattr(total, "shape") else grid.np.full((1, 1), total)


def _exact_quotient(
    terms: Mapping[Monomial, Number], divisor: Mapping[Monomial, Number]
) -> dict[Monomial, Number] | None:
    """terms / divisor where it is a polynomial with whole factors, else None."""
    if len(divisor) != 1:
        return None
    ((monomial, factor),) = divisor.items()
    quotient: dict[Monomial, Number] = {}
    for left, amount in terms.items():
        rest = _without(left, monomial)
        if rest is None or amount % factor:
            return None
        quotient[rest] = amount // factor
    return quotient


def _without(monomial: Monomial, taken: Monomial) -> Monomial | None:
    rest = list(monomial)
    for number in taken:
        if number not in rest:
            return None
        rest.remove(number)
    return tuple(rest)
