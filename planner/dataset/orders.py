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

DRAWS = 20
"""Random orders that are looked at; the same ones every time."""
CAUTIOUS = 0.9
"""Share of them that reserve no more than what is told. The distribution is skewed (half of all shuffles reserve little
more than equal rows do, some half as much again), and an estimate that is too low is what a plan must not be."""
STEPS = 16
"""Lengths are rounded up to so many parts of the longest: programs of equal lengths are written once."""


class Orders(NamedTuple):
    """Orders of one data set."""

    drawn: tuple[Order, ...]
    second: int
    """Tokens of the longest micro batch but those of the greatest length."""


def orders(seen: Lengths, how: Batching) -> Orders | None:
    """Orders of shuffled epochs of the rows that the model sees; None where all micro batches are equally long.

    Grouping by length puts the longest micro batch first (transformers' LengthGroupedSampler).
    """
    if how.padding != "longest" or seen.shortest == longest_batch(seen, how):
        return None
    rng = random.Random(0)
    return Orders(tuple(growing(seen, how.batch, rng) for _ in range(DRAWS)), seen.counts[-2][0])


def growing(seen: Lengths, batch: int, rng: random.Random) -> Order:
    """Micro batches of `batch` rows that are longer than all before, in a random order; lengths are rounded up."""
    part = -(-seen.longest // STEPS)
    kept: list[tuple[int, int]] = []
    number, longer = 0, 1.0
    while True:
        longer *= math.exp(-rng.expovariate(1.0))
        if longer * len(seen) < batch:
            break
        length = seen.percentile(100 * (1 - longer) ** (1 / batch))  # a micro batch is as long as its longest row
        length = min(-(-length // part) * part, seen.longest)
        if not kept or length > kept[-1][1]:
            kept.append((number, length))
        if length == seen.longest:
            break
        number += 1 + int(math.log(1 - rng.random()) / math.log1p(-longer))  # the wait for one that is longer
    if not kept or kept[-1][1] < seen.longest:
        kept.append((number, seen.longest))
    return tuple(kept)


def drawn(mean: float, deviation: float, shortest: int, rows: int = 10_000, seed: int = 0) -> Lengths:
    """Row lengths of which only moments are published: a gamma distribution, cut off below."""
    shape = (mean / deviation) ** 2
    rng = random.Random(seed)
    return Lengths(max(shortest, round(rng.gammavariate(shape, mean / shape))) for _ in range(rows))
