"""Granite's experts (models/granitemoe/modeling_granitemoe.py)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "granitemoe": Habits(router_dtype="hidden", slices_hidden_since=(5, 0)),  # not in 4.48, in 5.24
}
