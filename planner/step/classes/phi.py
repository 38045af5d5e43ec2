"""Phi 1 to 3 and Phi-MoE (models/phi, phi3, phimoe)."""

from __future__ import annotations

from planner.step.habits import NEVER, Habits

HABITS = {
    "phi": Habits(tables_per_layer_before=(4, 45), loaded_tables_before=(4, 45)),
    "phi3": Habits(
        joins_nothing_since=(4, 49),  # modeling_phi3.py v4.49.0
        repeats_for_flash=True,
        tables_per_layer_before=(4, 48),
    ),
    "phimoe": Habits(
        router_dtype="logits",
        repeats_in_module_before=(5, 0),
        copies_for_sdpa_since=NEVER,  # calls it itself
    ),
}
