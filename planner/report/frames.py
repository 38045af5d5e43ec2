"""Rows as a pandas DataFrame, where pandas is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.base.errors import MissingDependency


def frame(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """Return a pandas.DataFrame.

    Raises:
        MissingDependency: there is no pandas.
    """
    try:
        import pandas
    except ImportError:
        raise MissingDependency("to_frame() needs pandas; pip install pandas") from None
    return pandas.DataFrame([list(row) for row in rows], columns=list(columns))
