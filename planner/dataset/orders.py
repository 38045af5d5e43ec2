"""In which order micro batches of unequal length arrive: what the size of the allocator's cache depends on.

A micro batch that is longer than all before it finds no cached block of its size, so the cache grows; a shorter one
finds room. Only the growing micro batches of an epoch therefore matter: a handful, and fewer the earlier the longest
comes. If S is the share of the micro batches that are longer than one of them, then -ln(S) of the growing ones are the
arrivals of a Poisson process of rate 1 (records of a random sequence; Renyi 1962), whatever the lengths are.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from planner.dataset.batches import Batching, longest_batch
from planner.dataset.lengths import Lengths

Order = tuple[tuple[int, int], ...]
"""(number of the micro batch, its padded length): each longer than all before it, the last the longest of all."""

TYPICAL = 1.0
"""Distance of growing micro batches in -ln(S) in a typical order."""
SLOW = 0.5
"""The same in an order that grows in steps half as large and leaves more unusable blocks behind."""


class Orders(NamedTuple):
    """Orders of one data set."""

    typical: Order
    slow: Order
    second: int
    """Tokens of the longest micro batch but those of the greatest length."""


def orders(seen: Lengths, how: Batching) -> Orders | None:
    """Orders of a shuffled epoch of the rows that the model sees; None where all micro batches are equally long.

    Grouping by length puts the longest micro batch first (transformers' LengthGroupedSampler).
    """
    if how.padding != "longest" or seen.shortest == longest_batch(seen, how):
        return None
    return Orders(growing(seen, how.batch, TYPICAL), growing(seen, how.batch, SLOW), seen.counts[-2][0])


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
