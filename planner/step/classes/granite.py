"""Granite and its experts (models/granite, granitemoe)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "granite": Habits(upcasts_in_forward_before=(4, 48), slices_hidden_since=(4, 48)),
    "granitemoe": Habits(
        router_dtype="hidden",
        repeats_in_module_before=(4, 53),
        copies_for_sdpa_since=(4, 53),  # called it itself before
        upcasts_in_forward_before=(5, 0),
        slices_hidden_since=(4, 53),
    ),
}
