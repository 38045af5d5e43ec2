"""PRICES: the ways of pricing a kernel, one row each. A kind of kernel names its way (`planner.step.kernels`)."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable

from planner.base.records import Rows, record
from planner.step.kernels import COMPILED, KERNELS, LINK_COEFFICIENT, Kernel, KernelKind, Price
from planner.timing.arrays import Number
from planner.timing.coefficients import NAMES

if typing.TYPE_CHECKING:
    from planner.timing.rates import Rates

Seconds = tuple[Number, Number]
"""Of arithmetic and of memory traffic: a kernel takes the longer of both."""
Shares = tuple[tuple[str, Number], ...]
"""The coefficients that a kernel's seconds are proportional to, and which share of them follows each."""


@record
class PriceWay:
    """One way of pricing kernels."""

    seconds: Callable[[Rates, Kernel, Number], Seconds]
    """Of a kernel, in rows of some tokens."""
    follows: Callable[[Rates, Kernel, Number], Shares]
    """Which coefficients; given 1 where the kernel is bound by arithmetic, else 0."""
    proportional: bool
    """Seconds are proportional to bytes and depend on nothing else of the kernel: those of a kind can be added up."""
    over_link: bool
    """Moves bytes between the card and its host instead of working on the card."""
    coefficients: tuple[str | None, ...] | None
    """Which ones a kind may name (None in it: that of the dtype's products); None: any."""


def _product(rates: Rates, kernel: Kernel, tokens_per_row: Number) -> Seconds:
    """Whole tiles in whole waves of multiprocessors, beside operands and result once."""
    assert kernel.shape is not None
    return rates.matmul_s(kernel.shape, kernel.dtype, kernel.layout)


def _product_follows(rates: Rates, kernel: Kernel, bound: Number) -> Shares:
    own = ((rates.product_name(kernel.dtype), bound), ("bandwidth", 1.0 - bound))
    if kernel.layout != "nt" and rates.portable(kernel.dtype):
        return (*own, (f"portable_{kernel.layout}", bound))
    return own


def _attention(rates: Rates, kernel: Kernel, tokens_per_row: Number) -> Seconds:
    """FLOPs at the kernel's own rate, beside its bytes."""
    return rates.attention_s(kernel, tokens_per_row), kernel.bytes / rates.bytes_per_s


def _attention_follows(rates: Rates, kernel: Kernel, bound: Number) -> Shares:
    return ((rates.attention_name(kernel), 1.0),)


def _moved(rates: Rates, kernel: Kernel, coefficient: str) -> Number:
    """Seconds of a kernel's traffic at the bandwidth of a coefficient; what torch.compile leaves of it."""
    kind = kernel.kind
    rate = rates.traffic_rate(coefficient)
    if kind.bandwidth_share != 1.0:
        rate = rate * kind.bandwidth_share
    seconds = kernel.bytes / rate
    if kind.gpu_passes != 1.0 and not rates.gpu.synchronous:
        seconds = seconds * kind.gpu_passes
    left = COMPILED[kind.compiled].traffic
    return seconds * rates.c[left] if rates.compiled and left is not None else seconds


def _traffic(rates: Rates, kernel: Kernel, tokens_per_row: Number) -> Seconds:
    """Bytes over the bandwidth that the kind reaches."""
    assert kernel.kind.coefficient is not None
    return 0.0, _moved(rates, kernel, kernel.kind.coefficient)


def _traffic_follows(rates: Rates, kernel: Kernel, bound: Number) -> Shares:
    assert kernel.kind.coefficient is not None
    return ((kernel.kind.coefficient, 1.0),)


def _index(rates: Rates, kernel: Kernel, tokens_per_row: Number) -> Seconds:
    """An index computed for each element, beside its bytes; a CPU and torch.compile's kernels have bytes only."""
    computes = rates.indexed_per_s is not None and not rates.compiled
    return (kernel.elements / rates.indexed_per_s if computes else 0.0), _moved(rates, kernel, "bandwidth")


def _index_follows(rates: Rates, kernel: Kernel, bound: Number) -> Shares:
    if rates.indexed_per_s is None:
        return (("bandwidth", 1.0),)
    return (("indexed", bound), ("bandwidth", 1.0 - bound))


def _link(rates: Rates, kernel: Kernel, tokens_per_row: Number) -> Seconds:
    """Bytes over the host's link; on a CPU both ends are the same memory."""
    link = rates.bytes_per_s / 2 if rates.gpu.synchronous else rates.c[LINK_COEFFICIENT]
    return 0.0, kernel.bytes / link


def _link_follows(rates: Rates, kernel: Kernel, bound: Number) -> Shares:
    return (("bandwidth" if rates.gpu.synchronous else LINK_COEFFICIENT, 1.0),)


PRICES: Rows[PriceWay] = Rows(
    "way of pricing",
    typing.get_args(Price),
    (
        ("product", PriceWay(
            seconds=_product, follows=_product_follows, proportional=False, over_link=False, coefficients=(None,),
        )),
        ("attention", PriceWay(
            seconds=_attention, follows=_attention_follows, proportional=False, over_link=False, coefficients=None,
        )),
        ("traffic", PriceWay(
            seconds=_traffic, follows=_traffic_follows, proportional=True, over_link=False, coefficients=None,
        )),
        ("index", PriceWay(
            seconds=_index, follows=_index_follows, proportional=False, over_link=False, coefficients=("indexed",),
        )),
        ("link", PriceWay(
            seconds=_link, follows=_link_follows, proportional=True, over_link=True, coefficients=(LINK_COEFFICIENT,),
        )),
    ),
)  # fmt: skip


def check(kinds: Iterable[KernelKind]) -> None:
    """Whether every kind can be priced: its coefficients exist, and its way of pricing reads them.

    Raises:
        TypeError: naming the kind and the coefficient.
    """
    for kind in kinds:
        special = (kind.attention.hopper, kind.attention.short_rows) if kind.attention is not None else ()
        for name in (kind.coefficient, kind.call_cost, COMPILED[kind.compiled].traffic, *special):
            if name is not None and name not in NAMES:
                raise TypeError(f"kernel {kind.name}: there is no coefficient {name}")
        allowed = PRICES[kind.price].coefficients
        if allowed is not None and kind.coefficient not in allowed:
            raise TypeError(f"kernel {kind.name}: the way {kind.price} of pricing does not read {kind.coefficient}")


check(KERNELS.values())
