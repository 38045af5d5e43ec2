"""Phi 1 to 3 and Phi-MoE (models/phi, phi3, phimoe)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "phi": Habits(tables_per_layer_before=(4, 45)),
    "phi3": Habits(joins_nothing=True, repeats_for_flash=True, tables_per_layer_before=(4, 48)),
    "phimoe": Habits(router_dtype="logits"),
}
