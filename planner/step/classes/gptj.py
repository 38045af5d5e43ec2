"""GPT-J and CodeGen (models/gptj/modeling_gptj.py, models/codegen/modeling_codegen.py): rotation of tokens first."""

from __future__ import annotations

from planner.base.records import replace
from planner.model.spec import Attention
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, Tensor
from planner.step.habits import ALWAYS, Habits
from planner.step.modules import eager, positions


def _embed_positions(step: Step) -> list[Tensor]:
    """The table of every position, a buffer (embed_positions)."""
    spec = step.model.attentions()[0]
    entries = step.model.max_position_embeddings * (spec.rotary_dim or spec.head_dim)
    return [step.eng.empty(entries, FP32, "weight")]


def _rotate(step: Step, spec: Attention, q: Tensor, k: Tensor, dtype: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """k first, each with its own copies of the tables; the frame names every part. codegen's tables are fp32."""
    eng, t = step.eng, step.tokens
    assert step.cos_sin is not None
    cos, sin = step.cos_sin
    part = spec.rotary_dim or spec.head_dim
    rest = spec.head_dim - part

    def turned(x: Tensor, heads: int) -> Tensor:
        tables = eng.empty(step.seq * part, cos.dtype, "rotary"), eng.empty(step.seq * part, sin.dtype, "rotary")
        return positions.rotary(step, ops.narrow(eng, x, t * heads * part), t * heads * part, 0, tables)

    k_turned = turned(k, spec.num_kv_heads)
    q_turned = turned(q, spec.num_heads)
    key = ops.cat_half(eng, k_turned, ops.narrow(eng, k, t * spec.num_kv_heads * rest), "rotary")
    query = ops.cat_half(eng, q_turned, ops.narrow(eng, q, t * spec.num_heads * rest), "rotary")
    parts = (q, k, q_turned, k_turned)
    return ops.cast(eng, query, dtype, "rotary"), ops.cast(eng, key, dtype, "rotary"), parts


def _split_copied(step: Step, spec: Attention, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CodeGen's q, k and v lie in four parts: each is copied."""
    eng, t = step.eng, step.tokens
    q, k, v = ops.split(eng, fused, (t * spec.q_size, t * spec.kv_size, t * spec.kv_size))
    return ops.contiguous(eng, q, "split"), ops.contiguous(eng, k, "split"), ops.contiguous(eng, v, "split")


_GPTJ = Habits(
    makes_buffers=_embed_positions,
    rotate=_rotate,
    rotates_tokens_first=True,
    splits_heads=False,
    half_tables=True,
    names_score_casts=False,
    keeps_scores_dtype=True,
    makes_layer_buffer=eager.mask_buffer,
    mask_buffers_before=(4, 45),
    upcasts_in_forward_before=(5, 0),
    slices_hidden_since=(5, 0),  # not in 4.57
)

HABITS = {"gptj": _GPTJ, "codegen": replace(_GPTJ, splits_projection=_split_copied, fp32_tables_since=ALWAYS)}
