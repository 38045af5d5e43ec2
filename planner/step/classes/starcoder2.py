"""StarCoder 2 (models/starcoder2/modeling_starcoder2.py)."""

from __future__ import annotations

from planner.step.habits import Habits

HABITS = {
    "starcoder2": Habits(
        repeats_for_flash=True,
        tables_per_layer_before=(4, 45),
        loaded_tables_before=(4, 45),
        # no _gradient_checkpointing_func and no GradientCheckpointingLayer in v4.48.3 to 4.51.3
        ignores_checkpoints=((4, 48), (4, 52)),
        upcasts_in_forward_before=(4, 47),
    ),
}
