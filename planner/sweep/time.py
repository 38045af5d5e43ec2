"""Seconds of a program over all cells of a sweep and several cards: `timing.step_time`'s prices on stacked arrays.

Arrays are [cards, pairs, ranks, accumulations], of length 1 where they do not depend on an axis. Kernels whose price
is proportional to their bytes are added up before they are priced; matrix products of one dtype are priced together,
once per grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from planner.base.polynomials import Grid, Monomial, Number, Polynomial, terms_of, value_of
from planner.device.hardware import Gpu
from planner.step.engine import Record
from planner.step.kernels import Kernel, Layout
from planner.timing.coefficients import Coefficients
from planner.timing.prices import PRICES
from planner.timing.rates import Rates
from planner.timing.step_time import PARTS, Sums, WholeStep, part_of, shares_of
from planner.training.spec import TrainingSpec

MOST_ELEMENTS = 1 << 20
"""Elements of one stack of prices: its temporaries then stay in the cache or at least small."""


class Error(NamedTuple):
    """Relative standard error of a coefficient, per card, and where the coefficient is from."""

    relative_error: Any
    origin: str


class Errors(dict[str, Error]):
    """By coefficient; `formula_error` as `planner.timing.coefficients.Coefficients` has it, per card."""

    formula_error: Any = None


class CardRates(Rates):
    """The rates of several cards whose kernels follow the same rules, stacked along the first axis."""

    def __init__(self, cards: Sequence[tuple[Gpu, Coefficients]], training: TrainingSpec) -> None:
        self.each = [Rates(gpu, coefficients, training) for gpu, coefficients in cards]
        first = self.each[0]
        self.c = {name: self._stacked([rates.c[name] for rates in self.each]) for name in first.c}
        self.capability, self.compiled, self.gpu = first.capability, first.compiled, first.gpu
        self.multiprocessors = self._stacked([rates.multiprocessors for rates in self.each])
        self.bytes_per_s = self._stacked([rates.bytes_per_s for rates in self.each])
        self.bandwidths = {
            name: self._stacked([rates.bandwidths[name] for rates in self.each]) for name in self.each[0].bandwidths
        }
        rates = [rates.indexed_per_s for rates in self.each if rates.indexed_per_s is not None]
        self.indexed_per_s = self._stacked(rates) if rates else None
        self._tiles = self._tile_rates()
        self.products: dict[str, Any] = {}
        names = cards[0][1]
        self.errors = Errors(
            {n: Error(self._stacked([c[n].relative_error for _, c in cards]), names[n].origin) for n in names}
        )
        if names.formula_error is not None:
            self.errors.formula_error = self._stacked([c.formula_error or 0.0 for _, c in cards])

    @staticmethod
    def _stacked(values: Sequence[float]) -> Any:
        import numpy as np

        return np.array(values, dtype=np.float64).reshape(-1, 1, 1, 1)

    def product(self, dtype: str) -> Any:
        """FLOP/s that a large product reaches, per card."""
        if dtype not in self.products:
            self.products[dtype] = self._stacked([rates.product(dtype) for rates in self.each])
        return self.products[dtype]

    def simt(self, dtype: str) -> bool:
        """Whether products of `dtype` run without matrix units (on all of these cards)."""
        return self.each[0].simt(dtype)


def signature(gpu: Gpu, coefficients: Coefficients, training: TrainingSpec) -> tuple[object, ...]:
    """What must be equal for two cards to be stacked: the rules that their prices follow."""
    rates = Rates(gpu, coefficients, training)
    return (
        gpu.synchronous,
        coefficients.formula_error is None,
        tuple(name for name, item in coefficients.items() if item.origin == "fitted"),
        rates.capability >= (9, 0),
        *((rates.simt(dtype), rates.portable(dtype)) for dtype in ("bf16", "fp16", "fp32", "int8")),
    )


class Group:
    """Kernels of one part of the step that are priced together."""

    __slots__ = ("bytes", "calls", "count", "in_layers", "kernel", "one_by_one", "part")

    def __init__(self, part: str, kernel: Kernel, one_by_one: bool, in_layers: bool = False) -> None:
        self.part = part
        self.in_layers = in_layers
        """Whether they run in decoder layers; told apart only where copies run beside those."""
        self.kernel = kernel
        self.one_by_one = one_by_one
        """Whether all are the same kernel, whose price is not proportional to its bytes (products, attention)."""
        self.bytes: dict[Monomial, Number] = {}
        self.count: dict[Monomial, Number] = {}
        self.calls = 0

    def add(self, kernel: Kernel, times: int) -> None:
        """Count a kernel that runs `times` times."""
        self.calls += times
        _add_terms(self.count, kernel.count, times)
        if not self.one_by_one:
            _add_terms(self.bytes, kernel.bytes, times)


def _add_terms(into: dict[Monomial, Number], amount: Polynomial | Number, times: int) -> None:
    for monomial, factor in terms_of(amount).items():
        into[monomial] = into.get(monomial, 0) + factor * times


class _Total:
    """A sum of arrays that vary over different axes: each shape is added up by itself."""

    def __init__(self) -> None:
        self.parts: dict[Any, Any] = {}

    def add(self, amount: Any) -> None:
        """Add an array or a number."""
        shape = getattr(amount, "shape", ())
        held = self.parts.get(shape)
        self.parts[shape] = amount if held is None else held + amount

    def whole(self) -> Any:
        """The sum, broadcast."""
        total: Any = 0.0
        for part in sorted(self.parts.values(), key=lambda value: getattr(value, "size", 1)):
            total = total + part
        return total


Prices = tuple[Any, Any]
"""(seconds without latency, 1 where by arithmetic)"""


class Clock:
    """Prices kernels on a grid for stacked cards; products are priced once for all programs on the grid."""

    def __init__(self, grid: Grid, rates: CardRates) -> None:
        self.grid = grid
        self.rates = rates
        self.known: dict[Any, Prices] = {}

    def step(self, groups: Sequence[Group], training: TrainingSpec, accumulation: Any, room: Any = None) -> WholeStep:
        """One optimizer step in the active cells for each number of accumulated micro batches.

        room: bytes that each card has left for managed memory in each of them; None: enough.
        """
        self._price_products([g.kernel for g in groups if g.kernel.shape is not None])
        sums = Sums(self.rates, training)
        sums.accumulation = accumulation.reshape(1, 1, 1, -1)
        sums.room = room
        device, host, in_layers, aside = ({part: _Total() for part in PARTS} for _ in range(4))
        shares: dict[tuple[str, bool], _Total] = {}
        for group in groups:
            seconds, bound, launches = self._seconds(group)
            kind = group.kernel.kind
            if kind.only_without_room:
                sums.paged = sums.paged[0] + self._sum(group.bytes), sums.paged[1] + seconds
                continue
            calls = group.calls
            host[group.part].add(self.rates.host_s(kind, group.part, launches, calls))
            if kind.lane == "copy":
                aside[group.part].add(seconds)
                continue
            device[group.part].add(seconds)
            if group.in_layers:
                in_layers[group.part].add(seconds)
            for name, share in shares_of(self.rates, group.kernel, bound):
                shares.setdefault((name, group.part == "optimizer"), _Total()).add(seconds * share)
        for part in PARTS:
            sums.device[part], sums.host[part] = device[part].whole(), host[part].whole()
            sums.in_layers[part], sums.aside[part] = in_layers[part].whole(), aside[part].whole()
        for (name, once), total in shares.items():
            amount = total.whole() if once else total.whole() * sums.accumulation
            sums.by_coefficient[name] = sums.by_coefficient.get(name, 0.0) + amount
        return sums.whole_step(self.rates.errors)

    def _seconds(self, group: Group) -> tuple[Any, Any, Any]:
        """Seconds of a group in the active cells, its arithmetic share, and its launches."""
        count = self._sum(group.count)
        kernel = group.kernel
        if kernel.shape is not None:
            seconds, bound = (self._active(values) for values in self.known[_product_key(kernel)])
        else:
            moved = self._values(kernel.bytes) if group.one_by_one else self._sum(group.bytes)
            made = Kernel(
                kernel.op, kernel.dtype, self._values(kernel.flops), moved, 0.0, 0, None, False,
                elements=self._values(kernel.elements),
            )  # fmt: skip
            price = self.rates.price(made, self._values(self.grid.length))
            seconds = self.grid.np.maximum(price.compute, price.memory)
            bound = (price.compute > price.memory) * 1.0 if group.one_by_one else 0.0
        times = group.calls if group.one_by_one else 1
        latency = self.rates.c["kernel_latency"] * count * self.rates.latency_share(kernel)
        return seconds * times + latency, bound, count * self.rates.launched(kernel)

    def _sum(self, terms: dict[Monomial, Number]) -> Any:
        made = self.grid.make(terms)
        return self._values(made)

    def _values(self, amount: Any) -> Any:
        """A size in the active cells, with an axis before and after."""
        if not isinstance(amount, Polynomial):
            return amount
        return self.grid.among_active(amount.value)[None, :, :, None]

    def _active(self, values: Any) -> Any:
        if values.shape[1] > 1:
            values = values[:, self.grid.active_pairs]
        if values.shape[2] > 1:
            values = values[:, :, self.grid.active_ranks]
        return values

    # --- matrix products ----------------------------------------------------------------------------------------

    def _price_products(self, kernels: Sequence[Kernel]) -> None:
        """Price the products that are not known yet, on the whole grid, stacked by dtype and by the axes they have."""
        np = self.grid.np
        stacks: dict[Any, list[tuple[Any, Any]]] = {}
        for kernel in kernels:
            key = _product_key(kernel)
            if key in self.known:
                continue
            self.known[key] = ((), ())  # asked for once
            sizes = [np.asarray(value_of(size), dtype=np.float64) for size in kernel.shape or ()]
            shape = np.broadcast_shapes((1, 1), *(size.shape for size in sizes))
            stack = stacks.setdefault((kernel.dtype, kernel.layout, shape), [])
            stack.append((key, [np.broadcast_to(s, shape) for s in sizes]))
        for (dtype, layout, shape), members in stacks.items():
            each = shape[0] * shape[1] * len(self.rates.each)
            for some in _pieces(members, max(MOST_ELEMENTS // each, 1)):
                self._price_stack(dtype, layout, some)

    def _price_stack(self, dtype: str, layout: Layout, members: Sequence[tuple[Any, Any]]) -> None:
        np = self.grid.np
        sizes = [np.stack([values[i] for _, values in members])[:, None, :, :, None] for i in range(4)]
        compute, memory = self.rates.matmul_s((sizes[0], sizes[1], sizes[2], sizes[3]), dtype, layout)
        seconds, bound = np.maximum(compute, memory), (compute > memory) * 1.0
        for number, (key, _) in enumerate(members):
            self.known[key] = (seconds[number], bound[number])


def _pieces(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _product_key(kernel: Kernel) -> Any:
    return (kernel.dtype, kernel.layout, *(_key(size) for size in kernel.shape or ()))


def _key(size: Any) -> Any:
    return size.number if isinstance(size, Polynomial) else (size,)


def kernel_groups(record: Record) -> list[Group]:
    """The kernels of the step by what they are priced by."""
    counted: dict[Any, int] = {}
    some: dict[Any, Kernel] = {}
    for kernel in record.kernels:
        key = (
            kernel.segment, kernel.recomputed, kernel.op, kernel.dtype, kernel.shape, kernel.bytes, kernel.flops,
            kernel.count, kernel.layout, kernel.elements,
        )  # fmt: skip
        counted[key] = counted.get(key, 0) + 1
        some[key] = kernel
    groups: dict[Any, Group] = {}
    aside = any(kernel.kind.lane == "copy" for kernel in some.values())
    for key, number in counted.items():
        kernel, segment = some[key], record.segments[key[0]]
        part = part_of(segment.phase, kernel.recomputed)
        if part is None:
            continue
        one_by_one = not PRICES[kernel.kind.price].proportional
        in_layers = aside and segment.layer >= 0
        place = (part, in_layers, kernel.op, *(key[3:] if one_by_one else ()))
        if place not in groups:
            groups[place] = Group(part, kernel, one_by_one, in_layers)
        groups[place].add(kernel, number * segment.repeat)
    return list(groups.values())
