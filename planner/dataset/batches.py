"""What batching makes of row lengths: positions computed when rows are padded, grouped by length or packed.

Expected values over the trainer's shuffles, in closed form; packing is computed as it is done. Group by length is
transformers' LengthGroupedSampler (trainer_pt_utils.get_length_grouped_indices), packing TRL's best-fit decreasing
(trl data_utils._pack_bfd), in the 1,000 rows that `datasets` maps at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from planner.dataset.lengths import Lengths
from planner.records import record

Padding = Literal["max", "longest", "grouped", "packed"]
PADDINGS: tuple[str, ...] = get_args(Padding)

MEGABATCH = 50
"""Batches that are sorted together when grouping by length (trainer_pt_utils: min(n // (4 b), 50))."""
MAP_ROWS = 1000
"""Rows packed together: `datasets` maps batches of 1,000."""
_GRID = 1024
"""Distinct lengths up to which expectations are exact; beyond, lengths are rounded up to this many steps."""


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
    counts = _clipped(lengths, limit)
    useful = sum(length * rows for length, rows in counts)
    n = len(lengths)
    if padding == "packed":
        fills = pack(lengths, limit)
        return Padded(
            padding=padding,
            rows=len(fills),
            batches=math.ceil(len(fills) / batch),
            useful_tokens=sum(fills),
            computed_tokens=float(len(fills) * limit),
        )
    computed = {
        "max": lambda: float(n * limit),
        "longest": lambda: expected_tokens(counts, batch, batch),
        "grouped": lambda: _grouped_tokens(lengths, counts, batch, limit),
    }[padding]()
    return Padded(
        padding=padding, rows=n, batches=math.ceil(n / batch), useful_tokens=useful, computed_tokens=computed
    )


FEW_BATCHES = 200
"""Below, moving the longest row to the front matters when grouping, and shuffles are averaged instead."""


def _grouped_tokens(lengths: Lengths, counts: Sequence[tuple[int, int]], batch: int, limit: int) -> float:
    n = len(lengths)
    if n > FEW_BATCHES * batch:
        return expected_tokens(counts, batch, megabatch_rows(n, batch))
    rng, shuffles = random.Random(0), max(64, 20_000 // max(n, 1))
    total = sum(
        rows * length for _ in range(shuffles) for rows, length, _ in epoch(lengths, batch, limit, "grouped", rng)
    )
    return total / shuffles


def _clipped(lengths: Lengths, limit: int) -> list[tuple[int, int]]:
    kept = [(length, rows) for length, rows in lengths.counts if length < limit]
    at_limit = len(lengths) - sum(rows for _, rows in kept)
    return [*kept, (limit, at_limit)] if at_limit else kept


def megabatch_rows(n: int, batch: int) -> int:
    """Rows that are sorted together when grouping by length."""
    return max(min(n // (batch * 4), MEGABATCH), 1) * batch


def expected_tokens(counts: Sequence[tuple[int, int]], batch: int, megabatch: int) -> float:
    """Expected positions of one epoch when every `megabatch` shuffled rows are sorted and cut into batches.

    A batch of k rows costs k times its longest. Over a random megabatch, the number of full batches whose longest row
    reaches x is ceil(H(x) / batch), where H(x), the rows of the megabatch that reach x, is hypergeometric; summing over
    x gives the sum of the longest rows. With megabatch = batch this is padding to the longest without grouping.
    """
    n = sum(rows for _, rows in counts)
    if not n:
        return 0.0
    counts = _coarse(counts)
    whole, rest = divmod(n, megabatch)
    total = whole * _megabatch_tokens(counts, n, batch, megabatch) if whole else 0.0
    return total + (_megabatch_tokens(counts, n, batch, rest) if rest else 0.0)


def _coarse(counts: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Round lengths up to a grid where there are very many different ones."""
    if len(counts) <= _GRID:
        return counts
    step = -(-counts[-1][0] // _GRID)
    found: dict[int, int] = {}
    for length, rows in counts:
        key = -(-length // step) * step
        found[key] = found.get(key, 0) + rows
    return sorted(found.items())


def _megabatch_tokens(counts: Sequence[tuple[int, int]], n: int, batch: int, rows: int) -> float:
    """Expected positions of the batches of one megabatch of `rows` rows; its last batch may be smaller."""
    last = rows % batch
    full = rows // batch
    total, before, reaching = 0.0, 0, n
    for length, number in counts:
        tokens = 0.0
        for k, probability in _hypergeometric(n, reaching, rows):
            batches = min(-(-k // batch), full)
            tokens += probability * (batch * batches + (last if k > full * batch else 0))
        total += (length - before) * tokens
        before, reaching = length, reaching - number
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


def epoch(
    lengths: Lengths, batch: int, limit: int, padding: Padding, rng: random.Random
) -> Iterator[tuple[int, int, int]]:
    """Yield (rows, padded length, useful tokens) of every micro batch of one shuffled epoch."""
    if padding == "packed":
        fills = pack(lengths, limit)
        rng.shuffle(fills)
        for start in range(0, len(fills), batch):
            part = fills[start : start + batch]
            yield len(part), limit, sum(part)
        return
    order = [min(value, limit) for value in lengths.values]
    rng.shuffle(order)
    if padding == "grouped":
        order = _grouped(order, batch)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        yield len(part), limit if padding == "max" else max(part), sum(part)


def _grouped(order: list[int], batch: int) -> list[int]:
    """Sort every megabatch, longest first, and put the longest row of all in front."""
    size = megabatch_rows(len(order), batch)
    parts = [sorted(order[start : start + size], reverse=True) for start in range(0, len(order), size)]
    longest = max(range(len(parts)), key=lambda i: parts[i][0]) if parts else 0
    if parts:
        parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    return [value for part in parts for value in part]
