"""MPT (models/mpt/modeling_mpt.py): own eager attention with fp32 ALiBi and a bool mask; the MLP adds the residual."""

from __future__ import annotations

from planner.model.spec import Attention
from planner.step import layers, ops
from planner.step.context import Step
from planner.step.engine import FP32, Tensor
from planner.step.habits import OWN_LOSS, Habits, last_patch_casts
from planner.step.modules import eager
from planner.step.modules.weights import LayerWeights


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """MptBlock: the MLP takes the residual and adds it before it returns."""
    return layers.named_layer(step, held, x, names_normed=True, adds_in_mlp=True)


def _eager(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> eager.Attended:
    """MptAttention: fp32 ALiBi makes the scores fp32, a bool mask fills them."""
    eng = step.eng
    values = v.dtype
    numel = step.batch * spec.num_heads * step.seq * step.seq
    scores = ops.scale(eng, eager.score_product(step, spec, q, k, (False, False)), "scores")
    assert step.alibi is not None and step.mask is not None
    scores = ops.add(eng, scores, step.alibi, "scores", numel)
    scores = ops.masked_fill(eng, scores, step.mask, "scores")
    probs = ops.cast(eng, eager.softmax_of(step, scores, FP32), values, "probabilities")
    if spec.dropout:
        probs = ops.dropout(eng, probs, eager.DROPOUT, "attention_dropout")
    eager.keep_probabilities(step, probs)
    out = ops.contiguous(eng, eager.value_product(step, spec, probs, v), "attention")
    return out, (scores, probs)


HABITS = {
    "mpt": Habits(
        layer=_layer,
        eager=_eager,
        returns_probabilities_since=(4, 54),
        boolean_mask=True,
        alibi_of_longest=True,
        upcasts_since=OWN_LOSS,
        doubts=last_patch_casts,
        slices_hidden_since=(5, 0),  # not in 4.57
    )
}
