"""Units: the one place that parses and prints bytes, counts and seconds.

GiB is 2**30 bytes, GB is 10**9 bytes. Bytes are int, seconds are float.
"""

from __future__ import annotations

import re
from typing import Any

from planner.base.errors import InvalidInput, one_line

KiB = 2**10
MiB = 2**20
GiB = 2**30
GB = 10**9

_FACTORS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12,
    "KIB": KiB, "MIB": MiB, "GIB": GiB, "TIB": 2**40,
}  # fmt: skip
_SIZE = r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]{0,3})\s*"


def parse_bytes(text: str) -> int:
    """Parse `24GiB`, `24 GB`, `25769803776` into bytes. A bare number is bytes.

    Raises:
        InvalidInput: if the text is not a positive size.
    """
    match = re.fullmatch(_SIZE, text)
    factor = _FACTORS.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise InvalidInput(f"not a size: {one_line(text)!r}; write for example 24GiB or 24GB")
    value = int(float(match.group(1)) * factor)
    if not 0 < value < 2**60:
        raise InvalidInput(f"size out of range: {one_line(text)!r}; write for example 24GiB")
    return value


_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_COUNT = r"\s*(\d{1,18}(?:[_,]\d{3}){0,6}(?:\.\d{1,18})?(?:[eE]\+?\d{1,2})?)\s*([KMBGTkmbgt]?)\s*"


def parse_count(text: str) -> float:
    """Parse `10M`, `1.5B`, `2e6` or `1,000,000` into a number.

    Raises:
        InvalidInput: if the text is not a positive count.
    """
    match = re.fullmatch(_COUNT, text)
    value = float(re.sub("[_,]", "", match.group(1))) * _COUNTS[match.group(2).upper()] if match else 0.0
    if not 1 <= value < 1e18:
        raise InvalidInput(f"not a count: {one_line(text)!r}; write for example 10M or 2000000")
    return value


def seconds(value: float) -> str:
    """Print seconds with three significant digits and a unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= factor:
            digits = 2 if abs(value) < 10 * factor else 1 if abs(value) < 100 * factor else 0
            return f"{value / factor:,.{digits}f} {unit}"
    return f"{value * 1e6:,.0f} us"


def gib(value: float) -> str:
    """Print bytes as GiB with two decimals and without the unit."""
    return f"{value / GiB:,.2f}"


def human_bytes(value: float) -> str:
    """Print bytes in the binary unit that leaves one to four digits before the point."""
    for unit, factor in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(value) >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value:,.0f} B"


def count(value: int) -> str:
    """Print a count with thousands separators."""
    return f"{value:,}"


def plain(value: Any) -> str:
    """Print one cell for people: fractions with two decimals, nothing for None, no control characters."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        text = f"{value:,.2f}"
        return "0.00" if text == "-0.00" else text
    return one_line(str(value), 500)
