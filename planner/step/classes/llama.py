"""Llama and the text model of Llama 4 (models/llama, models/llama4)."""

from __future__ import annotations

from planner.step import layers
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.habits import Habits
from planner.step.modules.weights import LayerWeights


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """Llama4TextDecoderLayer: the attention's output has a name of its own."""
    return layers.parallel_layer(step, held, x) if held.spec.parallel else layers.named_layer(step, held, x)


HABITS = {
    "llama": Habits(
        tables_per_layer_before=(4, 43),
        loaded_tables_before=(4, 41),
        computes_beside_loaded=True,  # 4.38 to 4.40
    ),
    "llama4_text": Habits(layer=_layer),
}
