"""GPT-NeoX (models/gpt_neox/modeling_gpt_neox.py): parallel branches whose norms have no names."""

from __future__ import annotations

from planner.step import layers, ops
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.habits import Habits
from planner.step.modules import eager
from planner.step.modules.attention import attention
from planner.step.modules.weights import LayerWeights


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """GPTNeoXLayer: each norm's output dies with its branch."""
    eng, spec = step.eng, held.spec
    if not spec.parallel:
        return layers.sequential_layer(step, held, x)
    normed = [layers.layer_norm(step, held, spec.input_norm, x)]
    attended = layers.branch(step, held, attention(step, held, normed.pop()))
    normed = [layers.layer_norm(step, held, spec.pre_mlp_norm, x)]
    fed = layers.branch(step, held, layers.feed_forward(step, held, normed.pop()))
    return ops.add(eng, ops.add(eng, fed, attended, "residual"), x, "residual")


HABITS = {
    "gpt_neox": Habits(
        layer=_layer,
        makes_layer_buffer=eager.mask_buffer,
        mask_buffers_before=(4, 49),
        tables_per_layer_before=(4, 45),
        loaded_tables_before=(4, 45),
        loaded_tables_fp32=True,
        copies_for_sdpa_since=(4, 47),  # modeling_gpt_neox.py v4.47.1
        upcasts_since=(4, 49),
        slices_hidden_since=(4, 49),
    )
}
