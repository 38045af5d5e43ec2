"""StableLM (models/stablelm/modeling_stablelm.py): attention and first norm have names of their own."""

from __future__ import annotations

from planner.step import layers
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.habits import NEVER, Habits
from planner.step.modules.weights import LayerWeights


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """StableLmDecoderLayer."""
    if held.spec.parallel:
        return layers.parallel_layer(step, held, x)
    return layers.named_layer(step, held, x, names_normed=True, forgets_second=True)


HABITS = {
    "stablelm": Habits(
        layer=_layer,
        tables_per_layer_before=(4, 45),
        loaded_tables_before=(4, 45),
        repeats_in_module_before=(5, 0),
        copies_for_sdpa_since=NEVER,  # calls it itself
        upcasts_since=(4, 48),
    ),
}
