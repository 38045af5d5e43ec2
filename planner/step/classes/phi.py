"""Phi 1 to 3 and Phi-MoE (models/phi, phi3, phimoe)."""

from __future__ import annotations

from planner.step import layers
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.habits import NEVER, Habits
from planner.step.modules.weights import LayerWeights

NAMES_ATTENTION_BEFORE = (4, 48)
"""Before: Phi3DecoderLayer names the attention's output apart (attn_outputs in modeling_phi3.py v4.47.1)."""


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """Phi3DecoderLayer."""
    if step.train.versions.transformers >= NAMES_ATTENTION_BEFORE:
        return layers.sequential_layer(step, held, x)
    return layers.named_layer(step, held, x, forgets_second=True)


HABITS = {
    "phi": Habits(tables_per_layer_before=(4, 45), loaded_tables_before=(4, 45)),
    "phi3": Habits(
        layer=_layer,
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
