"""OPT (models/opt/modeling_opt.py): the layer calls fc1 and fc2 itself, the query is scaled before attention."""

from __future__ import annotations

from planner.model.spec import Attention
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP16, FP32, Tensor
from planner.step.habits import NEVER, OWN_LOSS, Habits, last_patch_casts
from planner.step.modules import eager, feed_forward, linears
from planner.step.modules.weights import LayerWeights

OWN_EAGER_BEFORE = (4, 49)
"""Before: OPTAttention writes its eager attention itself (v4.48.3); since then eager_attention_forward."""


def _inlined_mlp(step: Step, held: LayerWeights, given: list[Tensor]) -> Tensor:
    """fc1 and fc2: the first one's input loses its name when it is done."""
    spec = held.spec.mlp
    assert spec is not None
    hidden = linears.forward(step, held.linears[spec.up.name], given[0])
    given.clear()
    hidden = feed_forward.activate(step, spec, hidden)
    return linears.forward(step, held.linears[spec.down.name], hidden)


def _eager(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> eager.Attended:
    """OPTAttention of old releases: copies by head, masked scores not below the dtype's minimum (torch.max)."""
    if step.train.versions.transformers >= OWN_EAGER_BEFORE:
        return eager.standard(step, spec, q, k, v), ()
    eng = step.eng
    numel = step.batch * spec.num_heads * step.seq * step.seq
    score_shape, value_shape = eager.shapes(step, spec)
    k, v, q = (ops.contiguous(eng, part, "attention") for part in (k, v, q))  # _shape
    scores = ops.bmm(eng, q, k, score_shape, "scores", "nt")
    assert step.mask is not None
    scores = ops.add(eng, scores, step.mask, "scores", numel)
    scores = ops.minimum(eng, scores, "scores")  # torch.max saves and makes what torch.minimum does
    kind = scores.dtype
    probs = eager.softmax_of(step, scores, FP32 if eng.autocast or kind == FP16 else kind)
    if kind == FP16:
        probs = ops.cast(eng, probs, kind, "probabilities")
    del scores
    dropped = ops.dropout(eng, probs, eager.DROPOUT, "attention_dropout") if spec.dropout else probs
    out = ops.contiguous(eng, ops.bmm(eng, dropped, v, value_shape, "attention"), "attention")
    return out, (q, k, v, probs, dropped)


HABITS = {
    "opt": Habits(
        inlined_mlp=_inlined_mlp,
        scales_query=True,
        eager=_eager,
        positions_of_rows_before=NEVER,  # OPTLearnedPositionalEmbedding, to this day
        upcasts_since=OWN_LOSS,
        doubts=last_patch_casts,
        slices_hidden_since=(5, 0),  # not in 4.57
    )
}
