"""Amounts that are numbers in a prediction and numpy arrays in a sweep: the few operations that differ between them."""

from __future__ import annotations

from typing import Any

Number = Any
"""float, or a numpy array in a sweep."""


def is_array(value: Number) -> bool:
    """Whether a value is an array."""
    return hasattr(value, "shape")


def ceil(value: Number) -> Number:
    """The next whole number, as float."""
    if is_array(value):
        import numpy as np

        return np.ceil(value)
    return float(-(-value // 1))


def minimum(a: Number, b: Number) -> Number:
    """The lesser of both, cell by cell."""
    if is_array(a) or is_array(b):
        import numpy as np

        return np.minimum(a, b)
    return a if a <= b else b


def maximum(a: Number, b: Number) -> Number:
    """The greater of both, cell by cell."""
    if is_array(a) or is_array(b):
        import numpy as np

        return np.maximum(a, b)
    return a if a >= b else b


def is_more(a: Number, b: Number) -> Number:
    """1 where `a` is more than `b`, else 0."""
    return (a > b) * 1.0


def mean(value: Number) -> float:
    """The mean of the cells."""
    return float(value.mean()) if is_array(value) else float(value)


def mostly(share: Number) -> bool:
    """Whether a share is above a half, in the mean of the cells."""
    return mean(share) > 0.5


def some(value: Number) -> bool:
    """Whether there is any, in the mean of the cells."""
    return mean(value) > 0.0
