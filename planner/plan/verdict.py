"""Whether a run fits a card: the one rule behind every verdict that is printed or scored, and its words.

The rule takes numbers or arrays of one shape, so that a sweep judges its cells as `predict` judges one run.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

Verdict = Literal["fits", "too close to call", "does not fit"]

FITS: Verdict = "fits"
CLOSE: Verdict = "too close to call"
NO: Verdict = "does not fit"
VERDICTS: tuple[Verdict, ...] = (FITS, CLOSE, NO)
"""Best first; a verdict's place is its number."""

ANSWERS: dict[Verdict | None, str] = {FITS: "YES", NO: "NO", CLOSE: "MAYBE", None: "NEEDS"}
"""Verdict -> the first word of an answer; NEEDS where no card was named."""

Rooms = tuple[Any, Any, Any]
"""Bytes left beside a small, an expected and a large context (`Gpu.rooms`); numbers or arrays."""


class Bounds(Protocol):
    """Bytes that live tensors take at the peak: ints, or arrays of one shape."""

    @property
    def low(self) -> Any: ...
    @property
    def expected(self) -> Any: ...
    @property
    def high(self) -> Any: ...


def judge(allocated: Bounds, rooms: Rooms, cache_missing: Any) -> Any:
    """The number in VERDICTS of a run: only live memory decides, since the allocator's cache shrinks on a full card.

    2, does not fit: the lower end is above the room beside a small context, or the expected bytes are above the
    expected room and the allocator, which then gives its cache back, failed too. 1, too close to call: the allocator
    failed (or is not known to succeed), or the upper end is above the room beside a large context. 0, fits: neither.

    Args:
        cache_missing: whether the allocator ran out of the expected room, its cache given back (a replay's answer), or
            where none was made whether there is no room for the whole expected cache: bool, or an array of them.

    Returns:
        An int, or an array of ints of the broadcast shape.
    """
    small, middle, large = rooms
    refused = (allocated.low > small) | (cache_missing & (allocated.expected > middle))
    doubtful = cache_missing | (allocated.high > large)
    return 1 * refused + 1 * (refused | doubtful)


def verdict_of(allocated: Bounds, rooms: Rooms, cache_missing: bool) -> Verdict:
    """The word for one run; see `judge`."""
    return VERDICTS[int(judge(allocated, rooms, cache_missing))]
