"""OLMo 1 to 3 and OLMoE (models/olmo, olmo2, olmo3, olmoe): fp32 rotary tables."""

from __future__ import annotations

from planner.step.habits import ALWAYS, NEVER, Habits

HABITS = {
    "olmo": Habits(
        fp32_tables_since=(4, 52),
        tables_per_layer_before=(4, 48),
        loaded_tables_before=(4, 41),
        computes_beside_loaded=True,  # 4.38 to 4.40
    ),
    "olmo2": Habits(fp32_tables_since=(4, 52), tables_per_layer_before=(4, 48), slices_hidden_since=(4, 47)),
    "olmo3": Habits(fp32_tables_since=ALWAYS, tables_by_window=True),
    "olmoe": Habits(
        router_dtype="logits",
        repeats_in_module_before=(5, 0),
        copies_for_sdpa_since=NEVER,  # calls it itself
    ),
}
