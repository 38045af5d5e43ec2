"""The measuring side: the real libraries (torch, transformers, peft, bitsandbytes), run; `planner` never imports it."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`calibrate.PlannerCallback`, imported only when it is asked for (it needs transformers)."""
    if name == "PlannerCallback":
        from calibrate.measure.callback import PlannerCallback

        return PlannerCallback
    raise AttributeError(f"module 'calibrate' has no attribute {name!r}")
