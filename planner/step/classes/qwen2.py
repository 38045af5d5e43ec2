"""Qwen 2 and the experts of Qwen 2 and 3 (models/qwen2, qwen2_moe, qwen3_moe)."""

from __future__ import annotations

from planner.base.records import replace
from planner.step.habits import NEVER, Habits

_QWEN2 = Habits(repeats_for_flash=True, tables_per_layer_before=(4, 45), loaded_tables_before=(4, 45))

HABITS = {
    "qwen2": _QWEN2,
    "qwen2_moe": replace(
        _QWEN2,
        repeats_in_module_before=(5, 0),
        copies_for_sdpa_since=NEVER,  # calls it itself
        shared_first=True,
        router_dtype="logits",
    ),
    "qwen3_moe": Habits(router_dtype="logits"),
}
