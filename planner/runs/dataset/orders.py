"""In which order micro batches of unequal length arrive: what the size of the allocator's cache depends on.

A micro batch that is longer than all before it finds no cached block of its size, so the cache grows; a shorter one
finds room. Only the growing micro batches of an epoch therefore matter: a handful, and fewer the earlier the longest
comes. If S is the share of the micro batches that are longer than one of them, then -ln(S) of the growing ones are the
arrivals of a Poisson process of rate 1 (records of a random sequence; Renyi 1962), whatever the lengths are.

Whole epochs, replayed micro batch by micro batch, add three things: where kernels pad odd lengths, what counts is not
the length but the memory that it needs (`Orders.order`); gradients of more than 1 MiB that wait for the end of their
step lie in the way of later micro batches (`Orders.starts`); and the optimizer's first state takes what the first step
left, so growth begins anew (`sequence.unequal`).
"""

from __future__ import annotations

import math
import random

from planner.base.records import record
from planner.runs.dataset.batches import Batching, longest_batch
from planner.runs.dataset.lengths import Lengths

Order = tuple[tuple[int, int], ...]
"""(number of the micro batch, its padded length): each longer than all before it, the last the longest of all."""

TYPICAL = 1.0
"""Distance of growing micro batches in -ln(S) in a typical order."""
SLOW = (2 / 3, 1 / 3)
"""The same in orders that grow in smaller steps and leave more unusable blocks behind: about nine of ten orders reserve
less than the larger of the two (tests/memory/test_orders.py)."""
_NEAR = 5
"""A step that begins with a row within 2**-5 of the longest is the nearest that is looked for."""


@record
class Orders:
    """In which orders the micro batches of one data set may come."""

    seen: Lengths
    """Tokens of the rows that the model sees."""
    batch: int
    """Rows of a micro batch."""

    @property
    def second(self) -> int:
        """Tokens of the longest micro batch but those of the greatest length."""
        return self.seen.counts[-2][0]

    def order(self, distance: float, alike: int | None = None) -> Order:
        """Micro batches that need more memory than all before.

        Args:
            distance: `TYPICAL` or one of `SLOW`.
            alike: length of the micro batches that need as much as those of the greatest length, where kernels pad
                odd lengths, so that longer ones need more; None: the greatest length needs most.
        """
        if alike is None:
            return growing(self.seen, self.batch, distance)
        longest = self.seen.longest
        by_need = Lengths(alike if length == longest else length for length in self.seen.values)
        found = growing(by_need, self.batch, distance)
        return tuple((number, longest if length == alike else length) for number, length in found)

    def starts(self, accumulation: int) -> tuple[int, ...]:
        """Lengths of micro batches that begin a step, one for each halving of the distance to the longest.

        Only such as begin at least one of an epoch's steps in the mean.
        """
        steps = len(self.seen) / (self.batch * accumulation)
        found, longest = [], self.seen.longest
        for k in range(1, _NEAR + 1):
            low, high = (longest * (1 - 2.0**-n) for n in (k - 1, k))
            share = (self._shorter(high) - self._shorter(low)) / len(self.seen)
            if share * steps >= 1:
                found.append(round(high))
        return tuple(found)

    def _shorter(self, length: float) -> int:
        return sum(rows for tokens, rows in self.seen.counts if tokens < length)


def orders(seen: Lengths, how: Batching) -> Orders | None:
    """Orders of a shuffled epoch of the rows that the model sees; None where all micro batches are equally long.

    Grouping by length puts the longest micro batch first (transformers' LengthGroupedSampler).
    """
    if how.padding != "longest" or seen.shortest == longest_batch(seen, how):
        return None
    return Orders(seen=seen, batch=how.batch)


def growing(seen: Lengths, batch: int, distance: float) -> Order:
    """Micro batches of `batch` rows that are longer than all before, each at the median of its place.

    The k-th arrival of a Poisson process is later than k - 1/3 in about half of all cases (median of a gamma variable).
    """
    kept: list[tuple[int, int]] = []
    number = 0.0
    for k in range(1, len(seen) + 1):
        longer = math.exp(-distance * (k - 1 / 3))
        if longer * len(seen) < batch:
            break
        length = seen.percentile(100 * (1 - longer) ** (1 / batch))  # a micro batch is as long as its longest row
        if not kept or length > kept[-1][1]:
            kept.append((round(number), length))
        number += 1 / longer
    if not kept or kept[-1][1] < seen.longest:
        kept.append((round(number), seen.longest))
    return tuple(kept)


def drawn(mean: float, deviation: float, shortest: int, rows: int = 10_000, seed: int = 0) -> Lengths:
    """Row lengths of which only moments are published: a gamma distribution, cut off below."""
    shape = (mean / deviation) ** 2
    rng = random.Random(seed)
    return Lengths(max(shortest, round(rng.gammavariate(shape, mean / shape))) for _ in range(rows))
