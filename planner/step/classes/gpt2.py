"""GPT-2, GPT-BigCode and GPT-Neo (models/gpt2, gpt_bigcode, gpt_neo): named attention outputs, mask buffers."""

from __future__ import annotations

from planner.base.records import replace
from planner.step import layers
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.habits import Habits
from planner.step.modules.weights import LayerWeights


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """GPT2Block: the attention's output has a name of its own."""
    return layers.parallel_layer(step, held, x) if held.spec.parallel else layers.named_layer(step, held, x)


def _mask(step: Step) -> Tensor:
    """A causal mask [positions, positions] of bools."""
    return step.eng.empty(step.model.max_position_embeddings**2, "int8", "weight")


def _masks(step: Step) -> list[Tensor]:
    return [_mask(step)]


_GPT2 = Habits(
    layer=_layer,
    keeps_scores_dtype=True,
    upcasts_since=(4, 49),
    slices_hidden_since=(5, 0),  # not in 4.48, in 5.24
)

HABITS = {
    "gpt2": _GPT2,
    "gpt_bigcode": replace(
        _GPT2,
        keeps_scores_dtype=False,
        makes_buffers=_masks,
        repeats_in_module=False,
        fuses_lora=False,
        # views of the whole fused projection stayed in the outputs (modeling_gpt_bigcode.py v4.48.1)
        caches_before=(4, 53),
    ),
    "gpt_neo": Habits(
        layer=_layer,
        makes_layer_buffer=_mask,  # local layers add it to the common mask
        masks_by_window=False,
        keeps_scores_dtype=True,
        returns_probabilities=True,
        slices_hidden_since=(5, 0),  # not in 4.48, in 5.24
    ),
}
