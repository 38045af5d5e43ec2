"""A value of a foreign config as an option of `planner.training.stacks`: one strict conversion per kind of option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_WHOLE = {
    "r": (1, 2**20), "micro_batch_size": (1, 2**20), "seq_len": (1, 2**27), "gradient_accumulation_steps": (1, 2**20),
    "group_size": (1, 2**20),
}  # fmt: skip
"""Options that are whole numbers, with their bounds."""
_NUMBERS = {"lora_alpha": (0.0, 1e9), "lora_dropout": (0.0, 0.999_999), "max_grad_norm": (0.0, 1e9)}
_FLAGS = frozenset(
    {"double_quant", "use_dora", "use_rslora", "use_reentrant", "padded", "compile", "optimizer_in_backward"}
    | {"kbit_preparation", "fp32_norms_only"}
)
_LISTS = frozenset(("target_modules", "modules_to_save", "skip_modules"))
MAX_NAMES = 500


def option_value(option: str, raw: Any, row: Mapping[str, Any]) -> Any:
    """Return `raw` as the option wants it; a row may round a length up to a multiple ("round_up").

    Raises:
        ValueError: saying what is allowed.
    """
    if option in _WHOLE:
        value = _whole(raw, *_WHOLE[option])
        step = row.get("round_up", 1)
        return -(-value // step) * step
    if option in _NUMBERS:
        return _number(raw, *_NUMBERS[option]) * row.get("times", 1)
    if option in _FLAGS:
        return _flag(raw) is not row.get("invert", False)
    if option in _LISTS:
        return _names(raw)
    if not isinstance(raw, str):
        raise ValueError("must be a word")
    return raw


def _whole(raw: Any, low: int, high: int) -> int:
    value = _number(raw, -1e300, 1e300)
    if value != int(value) or not low <= value <= high:
        raise ValueError(f"must be a whole number from {low} to {high}")
    return int(value)


def _number(raw: Any, low: float, high: float) -> float:
    if isinstance(raw, str) and len(raw) < 40:
        try:
            raw = float(raw)
        except ValueError:
            raw = None
    if isinstance(raw, int) and raw.bit_length() > 256:
        raw = None
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not math.isfinite(raw) or not low <= raw <= high:
        raise ValueError(f"must be a number from {low:g} to {high:g}")
    return float(raw)


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
