"""OLMo 1 to 3 and OLMoE (models/olmo, olmo2, olmo3, olmoe): fp32 rotary tables."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "olmo": Habits(fp32_tables=True, tables_per_layer_before=(4, 48)),
    "olmo2": Habits(fp32_tables=True, slices_hidden_since=(4, 47)),
    "olmo3": Habits(fp32_tables=True, tables_by_window=True),
    "olmoe": Habits(router_dtype="logits"),
}
