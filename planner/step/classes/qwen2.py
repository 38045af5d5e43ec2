"""Qwen 2 and the experts of Qwen 2 and 3 (models/qwen2, qwen2_moe, qwen3_moe)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "qwen2": Habits(repeats_for_flash=True, tables_per_layer_before=(4, 45)),
    "qwen2_moe": Habits(
        repeats_for_flash=True, tables_per_layer_before=(4, 45), shared_first=True, router_dtype="logits"
    ),
    "qwen3_moe": Habits(router_dtype="logits"),
}
