"""Strict reading of single values from a parsed config.json: the value, or one line saying what is wrong with it.

A config is a stranger's file. Booleans are not integers here, strings are not numbers, and every size has bounds, so
that a wrong value stops at the reader and never becomes a wrong plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from planner.base.errors import InvalidInput, one_line


class _Missing:
    """The type of MISSING."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""Default of a key that must be present."""

T = TypeVar("T")

MAX_LIST_LENGTH = 65_536
"""No per-layer list of a real model comes near it."""


def present(config: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, Any] | None:
    """Return the first of `keys` whose value is not null, with that value; None when there is none."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            return key, value
    return None


def _absent(config: Mapping[str, Any], keys: Sequence[str], default: T | _Missing) -> T:
    """Return `default`, or raise for a key that has none."""
    if not isinstance(default, _Missing):
        return default
    kind = config.get("model_type")
    whose = f" of model_type {one_line(kind, 40)!r}" if isinstance(kind, str) else ""
    raise InvalidInput(f"config{whose} has no {' or '.join(keys)}; add it, or pass the model's own config.json")


def _wrong(key: str, value: Any, allowed: str) -> InvalidInput:
    return InvalidInput(f"config key {key} is {_quote(value)}; must be {allowed}; correct it in config.json")


def _quote(value: Any) -> str:
    """Return the value for a message; a huge integer is named by its size (printing it could itself fail)."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)} entries"
    return one_line(repr(value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(
    config: Mapping[str, Any], *keys: str, default: int | _Missing = MISSING, low: int = 1, high: int = 2**31
) -> int:
    """Return the first present key of `keys` as an int within [low, high].

    Raises:
        InvalidInput: missing without a default, not a whole number, or out of range. A default is not range-checked.
    """
    found = present(config, keys)
    if found is None:
        return _absent(config, keys, default)
    key, value = found
    if not _is_integer(value) or not low <= value <= high:
        raise _wrong(key, value, f"a whole number from {low} to {high}")
    return int(value)


def number(
    config: Mapping[str, Any],
    *keys: str,
    default: float | _Missing = MISSING,
    low: float = -1e30,
    high: float = 1e30,
) -> float:
    """Return the first present key of `keys` as a finite float within [low, high]."""
    found = present(config, keys)
    if found is None:
        return _absent(config, keys, default)
    key, value = found
    numeric = _is_integer(value) or (isinstance(value, float) and math.isfinite(value))
    if not numeric or not low <= value <= high:
        raise _wrong(key, value, f"a number from {low:g} to {high:g}")
    return float(value)


def boolean(config: Mapping[str, Any], *keys: str, default: bool | _Missing = MISSING) -> bool:
    """Return the first present key of `keys` as true or false (0, 1 and "true" are refused)."""
    found = present(config, keys)
    if found is None:
        return _absent(config, keys, default)
    key, value = found
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def text(
    config: Mapping[str, Any], *keys: str, default: str | _Missing = MISSING, allowed: Iterable[str] | None = None
) -> str:
    """Return the first present key of `keys` as a string, one of `allowed` when that is given."""
    found = present(config, keys)
    if found is None:
        return _absent(config, keys, default)
    key, value = found
    if not isinstance(value, str):
        raise _wrong(key, value, "a string")
    if allowed is not None:
        names = tuple(allowed)
        if value not in names:
            raise _wrong(key, value, "one of " + one_line(", ".join(names), 200))
    return value


def integer_list(
    config: Mapping[str, Any],
    *keys: str,
    default: Sequence[int] | _Missing = MISSING,
    low: int = 1,
    high: int = 2**31,
    length: int | None = None,
) -> tuple[int, ...]:
    """Return the first present key of `keys` as a tuple of ints within [low, high], of `length` when that is given."""
    found = present(config, keys)
    if found is None:
        return tuple(_absent(config, keys, default))
    key, value = found
    _check_list(key, value, length)
    for item in value:
        if not _is_integer(item) or not low <= item <= high:
            raise _wrong(f"{key} entry", item, f"a whole number from {low} to {high}")
    return tuple(value)


def text_list(
    config: Mapping[str, Any],
    *keys: str,
    default: Sequence[str] | _Missing = MISSING,
    length: int | None = None,
    allowed: Iterable[str] | None = None,
) -> tuple[str, ...]:
    """Return the first present key of `keys` as a tuple of strings (layer_types and the like)."""
    found = present(config, keys)
    if found is None:
        return tuple(_absent(config, keys, default))
    key, value = found
    _check_list(key, value, length)
    names = None if allowed is None else tuple(allowed)
    for item in value:
        if not isinstance(item, str):
            raise _wrong(f"{key} entry", item, "a string")
        if names is not None and item not in names:
            raise _wrong(f"{key} entry", item, "one of " + one_line(", ".join(names), 200))
    return tuple(value)


def mapping(config: Mapping[str, Any], *keys: str, default: Mapping[str, Any] | _Missing = MISSING) -> dict[str, Any]:
    """Return the first present key of `keys` as a dict (rope_scaling, quantization_config and the like)."""
    found = present(config, keys)
    if found is None:
        return dict(_absent(config, keys, default))
    key, value = found
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object {...}")
    return value


def _check_list(key: str, value: Any, length: int | None) -> None:
    if not isinstance(value, list):
        raise _wrong(key, value, "a list")
    if len(value) > MAX_LIST_LENGTH or (length is not None and len(value) != length):
        wanted = f"{length} entries" if length is not None else f"at most {MAX_LIST_LENGTH} entries"
        raise InvalidInput(f"config key {key} has {len(value)} entries; must have {wanted}; correct it in config.json")


def names(key: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """Return module names given as a list or as text separated by commas, semicolons or blanks."""
    parts = re.split(r"[,;\s]+", value) if isinstance(value, str) else list(value)
    if not all(isinstance(part, str) for part in parts):
        raise InvalidInput(f"{key} is {one_line(value)!r}; must be module names")
    return tuple(dict.fromkeys(part for part in parts if part))
