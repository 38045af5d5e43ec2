"""What batching makes of row lengths: positions computed when rows are padded, grouped by length or packed.

Expected values over the trainer's shuffles, in closed form; packing is computed as it is done. Group by length is
transformers' LengthGroupedSampler (trainer_pt_utils.get_length_grouped_indices), packing TRL's best-fit decreasing
(trl data_utils._pack_bfd), in the 1,000 rows that `datasets` maps at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

from planner.base.errors import unknown
from planner.base.records import record
from planner.runs.dataset.lengths import Lengths

Padding = Literal["max", "longest", "grouped", "packed"]
PADDINGS: tuple[str, ...] = get_args(Padding)

MEGABATCH = 50
"""Batches that are sorted together when grouping by length (trainer_pt_utils: min(n // (4 b), 50))."""
MAP_ROWS = 1000
"""Rows packed together: `datasets` maps batches of 1,000."""
_GRID = 1024
"""Distinct lengths up to which expectations are exact; beyond, lengths are rounded up to this many steps."""


Cost = Callable[[int, int], float]
"""What a batch of so many rows of so many tokens costs (positions, seconds); 0 for no tokens."""


def positions(rows: int, length: int) -> float:
    """Positions that the model computes for a batch."""
    return float(rows * length)


@record
class Batching:
    """How rows become micro batches: so many rows, cut to a limit, padded or packed."""

    batch: int
    limit: int
    padding: Padding

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise unknown("padding", self.padding, PADDINGS)


@record
class Padded:
    """One way of making batches, over one epoch."""

    padding: Padding
    rows: int
    """Rows the model sees: the data's, or packed ones."""
    batches: int
    useful_tokens: int
    computed_tokens: float
    """Positions the model computes, padding included (expected value)."""

    @property
    def waste(self) -> float:
        """Share of computed positions that are padding."""
        return 1 - self.useful_tokens / self.computed_tokens if self.computed_tokens else 0.0


def padded(lengths: Lengths, batch: int, limit: int, padding: Padding) -> Padded:
    """One epoch of rows cut to `limit` tokens, in batches of `batch` rows."""
    how = Batching(batch=batch, limit=limit, padding=padding)
    seen = seen_lengths(lengths, how)
    return Padded(
        padding=padding,
        rows=len(seen),
        batches=math.ceil(len(seen) / batch),
        useful_tokens=seen.total,
        computed_tokens=expected_cost(seen, how, positions),
    )


def seen_lengths(lengths: Lengths, how: Batching) -> Lengths:
    """Useful tokens of the rows that the model sees: cut to the limit, or packed."""
    if how.padding == "packed":
        return Lengths(pack(lengths, how.limit))
    return lengths.clipped(how.limit)


def longest_batch(seen: Lengths, how: Batching) -> int:
    """Tokens of the longest row as it is padded: what decides memory."""
    return how.limit if how.padding in ("max", "packed") else seen.longest


# --- expected cost of an epoch --------------------------------------------------------------------------------------


def expected_cost(seen: Lengths, how: Batching, cost: Cost, rows_used: int | None = None) -> float:
    """Expected cost of one shuffled epoch over the rows that the model sees.

    Args:
        rows_used: rows after which the epoch ends (the rest is dropped); all by default.
    """
    n = len(seen)
    used = n if rows_used is None else rows_used
    if not used:
        return 0.0
    if how.padding in ("max", "packed"):
        whole, rest = divmod(used, how.batch)
        return whole * cost(how.batch, how.limit) + (cost(rest, how.limit) if rest else 0.0)
    if how.padding == "longest":
        return _over_megabatches(seen.counts, how.batch, how.batch, used, cost)
    if n <= FEW_BATCHES * how.batch:
        return _averaged(seen, how, cost, used)
    return _over_megabatches(seen.counts, how.batch, megabatch_rows(n, how.batch), used, cost)


def megabatch_rows(n: int, batch: int) -> int:
    """Rows that are sorted together when grouping by length."""
    return max(min(n // (batch * 4), MEGABATCH), 1) * batch


FEW_BATCHES = 200
"""Below, moving the longest row to the front matters when grouping, and shuffles are averaged instead."""


def _averaged(seen: Lengths, how: Batching, cost: Cost, used: int) -> float:
    rng, shuffles = random.Random(0), max(64, 20_000 // len(seen))
    total = 0.0
    for _ in range(shuffles):
        left = used
        for rows, length, _ in epoch(seen, how, rng):
            if left <= 0:
                break
            total += cost(min(rows, left), length)
            left -= rows
    return total / shuffles


def _over_megabatches(counts: Sequence[tuple[int, int]], batch: int, megabatch: int, used: int, cost: Cost) -> float:
    """Expected cost when every `megabatch` shuffled rows are sorted and cut into batches.

    A batch costs what its longest row makes it. Over a random megabatch, the number of full batches whose longest row
    reaches x is ceil(H(x) / batch), where H(x), the rows of the megabatch that reach x, is hypergeometric; summing the
    cost's increments over x gives the sum over the batches. With megabatch = batch this is padding to the longest
    without grouping.
    """
    n = sum(rows for _, rows in counts)
    counts = _coarse(counts)
    whole, rest = divmod(used, megabatch)
    total = whole * _megabatch_cost(counts, n, batch, megabatch, cost) if whole else 0.0
    return total + (_megabatch_cost(counts, n, batch, rest, cost) if rest else 0.0)


def _coarse(counts: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Round lengths up to a grid where there are very many different ones."""
    if len(counts) <= _GRID:
        return counts
    step = -(-counts[-1][0] // _GRID)
    found: dict[int, int] = {}
    for length, rows in counts:
        key = min(-(-length // step) * step, counts[-1][0])
        found[key] = found.get(key, 0) + rows
    return sorted(found.items())


def _megabatch_cost(counts: Sequence[tuple[int, int]], n: int, batch: int, rows: int, cost: Cost) -> float:
    """Expected cost of the batches of one megabatch of `rows` rows; its last batch may be smaller."""
    full, last = divmod(rows, batch)
    total, reaching = 0.0, n
    before_full = before_last = 0.0
    for length, number in counts:
        batches = ends = 0.0
        for k, probability in _hypergeometric(n, reaching, rows):
            batches += probability * min(-(-k // batch), full)
            ends += probability if k > full * batch else 0.0
        now_full = cost(batch, length) if full else 0.0
        now_last = cost(last, length) if last else 0.0
        total += (now_full - before_full) * batches + (now_last - before_last) * ends
        before_full, before_last, reaching = now_full, now_last, reaching - number
    return total


def _hypergeometric(n: int, marked: int, drawn: int) -> Iterator[tuple[int, float]]:
    """(k, probability) of k marked ones among `drawn` of `n`; values below 1e-12 of the mode are left out."""
    low, high = max(0, drawn - (n - marked)), min(drawn, marked)
    mode = min(max((drawn + 1) * (marked + 1) // (n + 2), low), high)
    peak = math.exp(_log_choose(marked, mode) + _log_choose(n - marked, drawn - mode) - _log_choose(n, drawn))
    yield mode, peak
    p = peak
    for k in range(mode, high):
        p *= (marked - k) * (drawn - k) / ((k + 1) * (n - marked - drawn + k + 1))
        if p < peak * 1e-12:
            break
        yield k + 1, p
    p = peak
    for k in range(mode, low, -1):
        p *= k * (n - marked - drawn + k) / ((marked - k + 1) * (drawn - k + 1))
        if p < peak * 1e-12:
            break
        yield k - 1, p


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# --- packing --------------------------------------------------------------------------------------------------------


def pack(lengths: Lengths, limit: int) -> list[int]:
    """Tokens in every packed row: best-fit decreasing within each 1,000 rows, rows cut to `limit`."""
    fills: list[int] = []
    for start in range(0, len(lengths), MAP_ROWS):
        rows = sorted((min(v, limit) for v in lengths.values[start : start + MAP_ROWS] if v), reverse=True)
        fills += _best_fit(rows, limit)
    return fills


def _best_fit(rows: Sequence[int], limit: int) -> list[int]:
    """Put each row, longest first, where it leaves the least space."""
    from bisect import bisect_left, insort

    spaces: list[tuple[int, int]] = []  # (space left, which packed row), ascending
    fills: list[int] = []
    for row in rows:
        place = bisect_left(spaces, (row, -1))
        if place < len(spaces):
            space, number = spaces.pop(place)
        else:
            space, number = limit, len(fills)
            fills.append(0)
        fills[number] += row
        if space > row:
            insort(spaces, (space - row, number))
    return fills


# --- the batches themselves -----------------------------------------------------------------------------------------


def epoch(seen: Lengths, how: Batching, rng: random.Random) -> Iterator[tuple[int, int, int]]:
    """Yield (rows, padded length, useful tokens) of every micro batch of one shuffled epoch of the rows seen."""
    order = list(seen.values)
    rng.shuffle(order)
    if how.padding == "grouped":
        order = _grouped(order, how.batch)
    fixed = how.padding in ("max", "packed")
    for start in range(0, len(order), how.batch):
        part = order[start : start + how.batch]
        yield len(part), how.limit if fixed else max(part), sum(part)


def _grouped(order: list[int], batch: int) -> list[int]:
    """Sort every megabatch, longest first, and put the longest row of all in front."""
    size = megabatch_rows(len(order), batch)
    parts = [sorted(order[start : start + size], reverse=True) for start in range(0, len(order), size)]
    longest = max(range(len(parts)), key=lambda i: parts[i][0])
    parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    return [value for part in parts for value in part]
