"""Multi-head latent attention: its projections; then the kernel of any attention."""

from __future__ import annotations

from planner.model.spec import Attention
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.modules import attention, eager, linears, positions
from planner.step.modules.feed_forward import Finish
from planner.step.modules.norms import norm
from planner.step.modules.weights import LayerWeights


def latent_attention(step: Step, held: LayerWeights, x: Tensor, finish: Finish | None = None) -> Tensor:
    """Latent attention module; `finish` is what follows inside it."""
    return attention.mixed(step, held, x, _project, finish)


def _project(step: Step, held: LayerWeights, spec: Attention, x: Tensor) -> attention.Projected:
    """DeepSeek multi-head latent attention: compressed q and kv, one shared rotary key head (deepseek_v3)."""
    eng = step.eng
    t = x.rows(spec.projections[0].in_features)
    heads, rope = spec.num_heads, spec.qk_rope_head_dim
    nope = spec.head_dim - rope
    v_dim = spec.v_head_dim or spec.head_dim
    names = [p.name for p in spec.projections]
    if spec.q_lora_rank:
        low = linears.forward(step, held.linears[names[0]], x)
        assert spec.q_a_norm is not None
        low = norm(step, spec.q_a_norm, held.norms[spec.q_a_norm.name], low)
        q = linears.forward(step, held.linears[names[1]], low)
        del low
        names = names[2:]
    else:
        q = linears.forward(step, held.linears[names[0]], x)
        names = names[1:]
    q_pass, q_rot = ops.split(eng, q, (t * heads * nope, t * heads * rope))
    del q
    compressed = linears.forward(step, held.linears[names[0]], x)
    kv_low, k_rot = ops.split(eng, compressed, ((t, spec.kv_lora_rank), (t, rope)))
    del compressed
    assert spec.kv_a_norm is not None
    kv = linears.forward(
        step, held.linears[names[1]], norm(step, spec.kv_a_norm, held.norms[spec.kv_a_norm.name], kv_low)
    )
    del kv_low
    k_pass, value = ops.split(eng, kv, (t * heads * nope, t * heads * v_dim))
    del kv
    q_rot = positions.rotary(step, q_rot, t * heads * rope, 0)
    k_rot = positions.rotary(step, k_rot, t * rope, 0)
    q_out = ops.cat_half(eng, q_pass, q_rot, "mla_cat")
    k_out = ops.cat_half(eng, k_pass, eager.broadcast(step, k_rot, heads), "mla_cat")
    return (), q_out, k_out, value
