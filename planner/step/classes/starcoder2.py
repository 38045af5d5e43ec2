"""StarCoder 2 (models/starcoder2/modeling_starcoder2.py)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "starcoder2": Habits(repeats_for_flash=True, tables_per_layer_before=(4, 45)),
}
