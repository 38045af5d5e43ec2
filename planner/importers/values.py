"""A value of a foreign config as an option of `planner.training.settings`: one strict conversion per kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planner.training.kinds import Names, Number, Whole, YesNo
from planner.training.settings import SETTINGS

MAX_NAMES = 500


def option_value(option: str, raw: Any, row: Mapping[str, Any]) -> Any:
    """Return `raw` as the option wants it; a row may round a length up to a multiple ("round_up").

    Raises:
        ValueError: saying what is allowed.
    """
    kind = SETTINGS[option].kind if option in SETTINGS else None
    if isinstance(kind, Whole):
        value = _whole(raw, kind)
        step = row.get("round_up", 1)
        return -(-value // step) * step
    if isinstance(kind, Number):
        return _number(raw, kind) * row.get("times", 1)
    if isinstance(kind, YesNo):
        return _flag(raw) is not row.get("invert", False)
    if isinstance(kind, Names):
        return _names(raw)
    if not isinstance(raw, str):
        raise ValueError("must be a word")
    return raw


def _whole(raw: Any, kind: Whole) -> int:
    value = _finite(raw)
    if value is None or value != int(value) or not kind.low <= value <= kind.high:
        raise ValueError(f"must be a whole number from {kind.low} to {kind.high}")
    return int(value)


def _number(raw: Any, kind: Number) -> float:
    value = _finite(raw)
    if value is None or not kind.holds(value):
        raise ValueError(kind.allowed)
    return value


def _finite(raw: Any) -> float | None:
    """The number that a value is or writes; None: it is none."""
    if isinstance(raw, str) and len(raw) < 40:
        try:
            raw = float(raw)
        except ValueError:
            return None
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or (isinstance(raw, int) and raw.bit_length() > 256):
        return None
    return float(raw) if math.isfinite(raw) else None


def _flag(raw: Any) -> bool:
    if isinstance(raw, str) and raw.strip().lower() in ("true", "false"):
        return raw.strip().lower() == "true"
    if not isinstance(raw, bool):
        raise ValueError("must be true or false")
    return raw


def _names(raw: Any) -> tuple[str, ...] | None:
    parts = raw.replace(",", " ").split() if isinstance(raw, str) and not is_pattern(raw) else raw
    if isinstance(parts, str):
        parts = [parts]
    if not isinstance(parts, list) or len(parts) > MAX_NAMES or not all(isinstance(p, str) for p in parts):
        raise ValueError("must be module names")
    names = ["all-linear" if part in ("all", "all-linear") else part for part in parts if part]
    return tuple(dict.fromkeys(names)) or None


def is_pattern(text: str) -> bool:
    """Whether a text of target modules is a regular expression, as PEFT takes a string that is no keyword."""
    return any(ch in text for ch in "\\()[]|*^$+?")
