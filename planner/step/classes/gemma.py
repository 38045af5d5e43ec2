"""Gemma 1 to 3 (models/gemma, gemma2, gemma3): the embedding module scales its output."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "gemma": Habits(scales_in_embedding=True, tables_per_layer_before=(4, 48)),
    "gemma2": Habits(scales_in_embedding=True, tables_per_layer_before=(4, 48)),
    "gemma3": Habits(scales_in_embedding=True),
    "gemma3_text": Habits(scales_in_embedding=True, tables_by_window=True),
}
