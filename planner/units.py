"""Units: the one place that parses and prints bytes, counts and seconds.

GiB is 2**30 bytes, GB is 10**9 bytes. Bytes are int, seconds are float.
"""

from __future__ import annotations

import re

from planner.errors import InvalidInput, one_line

KiB = 2**10
MiB = 2**20
GiB = 2**30
GB = 10**9

_FACTORS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12,
    "KIB": KiB, "MIB": MiB, "GIB": GiB, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]{0,3})\s*")


def parse_bytes(text: str) -> int:
    """Parse `24GiB`, `24 GB`, `25769803776` into bytes. A bare number is bytes.

    Raises:
        InvalidInput: if the text is not a positive size.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise InvalidInput(f"not a size: {one_line(text)!r}; write for example 24GiB or 24GB")
    value = int(float(match.group(1)) * factor)
    if not 0 < value < 2**60:
        raise InvalidInput(f"size out of range: {one_line(text)!r}; write for example 24GiB")
    return value


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
