"""BLOOM (models/bloom/modeling_bloom.py): fused projections indexed apart, own eager attention and GELU, ALiBi."""

from __future__ import annotations

from planner.model.spec import Attention
from planner.step import layers, ops
from planner.step.context import Step
from planner.step.engine import FP32, Grads, Node, Tensor
from planner.step.habits import OWN_LOSS, Habits, last_patch_casts
from planner.step.modules import eager
from planner.step.modules.weights import LayerWeights


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """BloomBlock: both modules take the residual and add it before they return."""
    return layers.named_layer(step, held, x, names_normed=True, adds_in_attention=True, adds_in_mlp=True)


def _split(step: Step, spec: Attention, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BloomAttention._reshape indexes q, k and v out of the projection: each gets a gradient of the whole."""
    eng, t = step.eng, step.tokens
    return (
        ops.narrow(eng, fused, t * spec.q_size),
        ops.narrow(eng, fused, t * spec.kv_size),
        ops.narrow(eng, fused, t * spec.kv_size),
    )


def _eager(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> eager.Attended:
    """BloomAttention: the scores are a product added onto ALiBi, scaled inside the product."""
    eng = step.eng
    values = q.dtype
    numel = step.batch * spec.num_heads * step.seq * step.seq
    score_shape, value_shape = eager.shapes(step, spec)
    q, k, v = eager.fold(step, q, False), eager.fold(step, k, False), eager.fold(step, v, False)
    scores = ops.bmm(eng, q, k, score_shape, "scores", "nt", scales=True)
    assert step.mask is not None
    masked = ops.add(eng, scores, step.mask, "scores", numel)
    probs = ops.cast(eng, eager.softmax_of(step, masked, FP32), values, "probabilities")
    if spec.dropout:
        probs = ops.dropout(eng, probs, eager.DROPOUT, "attention_dropout")
    eager.keep_probabilities(step, probs)
    out = ops.contiguous(eng, ops.bmm(eng, probs, v, value_shape, "attention"), "attention")
    return out, (q, k, v, scores, masked, probs)


def _bloom_gelu(step: Step, x: Tensor) -> Tensor:
    """GeLUFunction: the tanh form written out, forward and backward; keeps only its input (modeling_bloom.py)."""
    eng = step.eng

    def one(x: Tensor, op: str = "bloom_gelu") -> Tensor:
        return ops.unary(eng, x, op)

    def curve(x: Tensor, op: str) -> Tensor:
        """tanh(0.79788456 * x * (1 + 0.044715 * x * x)): one tensor a pass, the last operand until the next exists."""
        inner = one(x, op)
        ratio = one(one(one(x, op), op), op)
        inner = one(inner, op)
        del ratio
        return one(inner, op)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        (x,) = node.saved
        op = "bloom_gelu_grad"
        tanh = curve(x, op)
        half = one(x, op)
        slope = one(one(tanh, op), op)  # 1 - tanh * tanh
        ratio = one(one(one(x, op), op), op)  # 0.79788456 + 0.1070322243 * x * x
        slope = one(slope, op)
        del ratio
        half = one(half, op)
        del slope
        rest = one(one(tanh, op), op)
        derivative = one(half, op)
        del half, rest
        return [one(derivative, op)]

    half = one(x)
    rest = one(curve(x, "bloom_gelu"))
    out = one(half)
    del half, rest
    eng.link(out, (x,), backward, (x,))
    return out


HABITS = {
    "bloom": Habits(
        layer=_layer,
        splits_projection=_split,
        eager=_eager,
        activation=_bloom_gelu,
        returns_probabilities_since=(4, 54),
        upcasts_since=OWN_LOSS,
        doubts=last_patch_casts,
        slices_hidden_since=(5, 0),  # not in 4.57
    )
}
