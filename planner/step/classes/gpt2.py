"""GPT-2, GPT-BigCode and GPT-Neo (models/gpt2, gpt_bigcode, gpt_neo): named attention outputs, mask buffers."""

from __future__ import annotations

from planner.base.records import replace
from planner.step import layers
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.habits import ALWAYS, NEVER, OWN_LOSS, Habits, last_patch_casts
from planner.step.modules import eager
from planner.step.modules.weights import LayerWeights


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """GPT2Block: the attention's output has a name of its own."""
    return layers.parallel_layer(step, held, x) if held.spec.parallel else layers.named_layer(step, held, x)


def _masks(step: Step) -> list[Tensor]:
    return [eager.causal_mask(step)]


_GPT2 = Habits(
    layer=_layer,
    keeps_scores_dtype=True,
    makes_layer_buffer=eager.mask_buffer,
    mask_buffers_before=(5, 2),
    adds_mask_since=(4, 52),  # _update_causal_mask; not in 4.51.3
    upcasts_since=OWN_LOSS,
    doubts=last_patch_casts,
    slices_hidden_since=(4, 53),
)

HABITS = {
    "gpt2": _GPT2,
    "gpt_bigcode": replace(
        _GPT2,
        keeps_scores_dtype=False,
        makes_buffers=_masks,
        makes_layer_buffer=None,
        mask_buffers_before=ALWAYS,
        slices_hidden_since=(5, 0),  # not in 4.57
        repeats_in_module_before=ALWAYS,
        passes_groups_since=ALWAYS,  # expands its one head: a view
        copies_for_sdpa_since=NEVER,  # calls it itself
        hands_on_mask_before=(4, 54),  # v4.53.3
        positions_of_rows_before=(4, 54),  # of the mask that the trainer hands on
        # no _gradient_checkpointing_func and no GradientCheckpointingLayer in v4.54.1 to 4.57.1
        ignores_checkpoints=((4, 54), (5, 0)),
        fuses_lora=False,
        # views of the whole fused projection stayed in the outputs (modeling_gpt_bigcode.py v4.48.1)
        caches_before=(4, 53),
    ),
    "gpt_neo": Habits(
        layer=_layer,
        makes_layer_buffer=eager.causal_mask,  # local layers add it to the common mask
        masks_by_window=False,
        keeps_scores_dtype=True,
        returns_probabilities_since=(4, 54),
        slices_hidden_since=(5, 0),  # not in 4.57
    ),
}
