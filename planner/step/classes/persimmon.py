"""Persimmon (models/persimmon/modeling_persimmon.py)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "persimmon": Habits(tables_per_layer_before=(4, 45)),
}
