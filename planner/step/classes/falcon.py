"""Falcon (models/falcon/modeling_falcon.py): shared heads expanded early, own eager attention, ALiBi in the mask."""

from __future__ import annotations

from planner.model.spec import Attention
from planner.step import layers, ops
from planner.step.context import Step
from planner.step.engine import FP32, INT64, Tensor
from planner.step.habits import ALWAYS, NEVER, OWN_LOSS, Habits, last_patch_casts
from planner.step.modules import eager, picking
from planner.step.modules.attention import attention
from planner.step.modules.weights import LayerWeights


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """FalconDecoderLayer; in parallel: mlp_output += attention_output, then one dropout."""
    eng, spec = step.eng, held.spec
    if not spec.parallel:
        return layers.named_layer(step, held, x, names_normed=True)
    residual = x
    normed = layers.layer_norm(step, held, spec.input_norm, x)
    second = layers.layer_norm(step, held, spec.pre_mlp_norm, x) if spec.pre_mlp_norm else normed
    attended = attention(step, held, normed)
    fed = layers.feed_forward(step, held, second)
    out = ops.add(eng, residual, layers.branch(step, held, ops.add_in_place(eng, fed, attended)), "residual")
    del normed, second
    return out


def _split(step: Step, spec: Attention, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """_split_heads: q, k, v by indexing, each with a gradient of the whole; shared heads are copied by indices."""
    eng, t = step.eng, step.tokens
    q = ops.narrow(eng, fused, t * spec.q_size)
    groups = spec.num_heads // spec.num_kv_heads
    if groups == 1:
        return q, ops.narrow(eng, fused, t * spec.kv_size), ops.narrow(eng, fused, t * spec.kv_size)
    k = picking.gather(eng, fused, eng.empty(1, INT64, "split"), t * spec.kv_size, "split")
    v = picking.gather(eng, fused, eng.empty(1, INT64, "split"), t * spec.kv_size, "split")
    if spec.num_kv_heads == 1:
        return q, k, v
    return ops.contiguous(eng, q, "split"), ops.expand_copy(eng, k, groups), ops.expand_copy(eng, v, groups)


def _eager(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> eager.Attended:
    """FalconAttention.forward without SDPA."""
    return (_with_alibi if spec.position == "alibi" else _without_alibi)(step, spec, q, k, v, source)


def _without_alibi(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> eager.Attended:
    """FalconAttention without ALiBi: scores scaled in place, softmax in the dtype of the layer's input."""
    eng = step.eng
    numel = step.batch * spec.num_heads * step.seq * step.seq
    scores = ops.scale_in_place(eng, _score_product(step, spec, q, k))
    assert step.mask is not None
    probs = eager.softmax_of(step, ops.add(eng, scores, step.mask, "scores", numel), source)
    del scores
    eager.keep_probabilities(step, probs)
    out = ops.contiguous(eng, _value_product(step, spec, probs, v), "attention")
    return out, (probs,)


def _with_alibi(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> eager.Attended:
    """FalconAttention with ALiBi: fp32 scores beside the product, scaled in place; the mask holds ALiBi again."""
    eng = step.eng
    numel = step.batch * spec.num_heads * step.seq * step.seq
    product = _score_product(step, spec, q, k)
    scores = ops.cast(eng, product, FP32, "scores_fp32")
    assert step.alibi is not None and step.mask is not None
    logits = ops.scale_in_place(eng, ops.add(eng, scores, step.alibi, "scores", numel))
    probs = eager.softmax_of(step, ops.add(eng, logits, step.mask, "scores", numel), source)
    if spec.dropout:
        probs = ops.dropout(eng, probs, eager.DROPOUT, "attention_dropout")
    eager.keep_probabilities(step, probs)
    out = ops.contiguous(eng, _value_product(step, spec, probs, v), "attention")
    return out, (product, scores, logits, probs)


def _score_product(step: Step, spec: Attention, q: Tensor, k: Tensor) -> Tensor:
    right = ops.autocast_half(step.eng, k)
    left = ops.autocast_half(step.eng, q)
    folded = eager.fold(step, left, False), _as_taken(step, spec, right)
    return ops.bmm(step.eng, *folded, eager.shapes(step, spec)[0], "scores", "nt")


def _value_product(step: Step, spec: Attention, probs: Tensor, v: Tensor) -> Tensor:
    right = ops.autocast_half(step.eng, v)
    left = ops.autocast_half(step.eng, probs)
    return ops.bmm(step.eng, left, _as_taken(step, spec, right), eager.shapes(step, spec)[1], "attention")


def _as_taken(step: Step, spec: Attention, x: Tensor) -> Tensor:
    """Keys or values as torch.matmul takes them: one head is expanded, a view for one row, a copy for several."""
    groups = spec.num_heads // spec.num_kv_heads
    if groups == 1:
        return eager.fold(step, x, False)
    return eager.broadcast(step, x, groups) if step.batch == 1 else ops.expand_copy(step.eng, x, groups)


HABITS = {
    "falcon": Habits(
        layer=_layer,
        splits_projection=_split,
        expands_heads=True,
        repeats_in_module_before=ALWAYS,
        copies_for_sdpa_since=NEVER,  # calls it itself
        eager=_eager,
        returns_probabilities_since=(4, 54),
        always_masks_since=(5, 2),  # allow_is_causal_skip=False
        alibi_in_mask=True,
        tables_beside_alibi=True,
        tables_per_layer_before=(4, 45),
        loaded_tables_before=(4, 45),
        upcasts_since=OWN_LOSS,
        doubts=last_patch_casts,
        slices_hidden_since=(4, 47),
    )
}
