"""Mistral and Mixtral (models/mistral, mixtral)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "mistral": Habits(
        repeats_for_flash=True,
        tables_per_layer_before=(4, 48),
        loaded_tables_before=(4, 42),
        upcasts_in_forward_before=(4, 48),
    ),
    "mixtral": Habits(repeats_for_flash=True, tables_per_layer_before=(4, 48), loaded_tables_before=(4, 48)),
}
