"""Cohere's Command R (models/cohere, cohere2): apply_rotary_pos_emb works in fp32."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "cohere": Habits(fp32_rotary=True, tables_per_layer_before=(4, 45)),
    "cohere2": Habits(fp32_rotary=True),
}
