"""Positions: the tables of the rotary embedding, and the rotation of queries and keys by them."""

from __future__ import annotations

from planner.model.spec import Attention
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, Grads, Node, Size, Tensor
from planner.step.modules.eager import joins_what_is_not_rotated
from planner.training.losses import KERNEL_SETS


def tables_per_layer(step: Step) -> bool:
    """Whether every attention module makes its own rotary tables."""
    return step.train.versions.transformers < step.habits.tables_per_layer_before


def wide_tables(step: Step) -> bool:
    """Whether the rotary embedding leaves its tables in fp32."""
    return step.train.versions.transformers >= step.habits.fp32_tables_since


def loads_tables(step: Step) -> bool:
    """Whether every attention module holds tables of all positions."""
    return step.train.versions.transformers < step.habits.loaded_tables_before


def load_tables(step: Step, spec: Attention) -> tuple[Tensor, Tensor] | None:
    """cos and sin of every position in a layer of an old release (_set_cos_sin_cache); None where it has none."""
    if not loads_tables(step) or spec.position != "rope":
        return None
    numel, dtype = step.model.max_position_embeddings * (spec.rotary_dim or spec.head_dim), _loaded_dtype(step)
    return step.eng.empty(numel, dtype, "weight"), step.eng.empty(numel, dtype, "weight")


def _loaded_dtype(step: Step) -> str:
    return FP32 if step.habits.loaded_tables_fp32 else step.train.base_dtype


def layer_tables(step: Step, spec: Attention, dtype: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """The tables that an attention module makes or looks up, and those of them that its frame names."""
    if not loads_tables(step) or step.habits.computes_beside_loaded:
        made = tables(step, spec, dtype)
        return made, made
    numel, held = step.seq * (spec.rotary_dim or spec.head_dim), _loaded_dtype(step)
    rows = step.eng.empty(numel, held, "rotary"), step.eng.empty(numel, held, "rotary")
    return (ops.cast(step.eng, rows[0], dtype, "rotary"), ops.cast(step.eng, rows[1], dtype, "rotary")), ()


def tables(step: Step, spec: Attention, dtype: str) -> tuple[Tensor, Tensor]:
    """cos and sin of every position (modeling_llama.py LlamaRotaryEmbedding.forward); `dtype`: that of the layer."""
    eng = step.eng
    width = spec.rotary_width
    numel = step.seq * (width // 2 if step.habits.half_tables else width)
    own = tables_per_layer(step)
    op = "layer_rotary_tables" if own else "rotary_tables"
    dtype = FP32 if wide_tables(step) or (own and step.habits.fp32_rotary) else dtype  # modeling_cohere.py v4.44.2
    angles = eng.empty(numel // 2, FP32, op)
    eng.calls_blas()
    both = eng.empty(numel, FP32, op)
    cos, sin = (ops.unary(eng, both, op) for _ in range(2))
    if not own:  # attention_scaling came with the tables in the model
        cos, sin = (ops.scale(eng, table, op) for table in (cos, sin))
    cos, sin = (ops.cast(eng, table, dtype, op) for table in (cos, sin))
    del angles, both
    return cos, sin


def rotate(step: Step, spec: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb on q and k."""
    eng, t, habits = step.eng, step.tokens, step.habits
    assert step.cos_sin is not None
    source, tables = q.dtype, step.cos_sin
    fused = KERNEL_SETS[step.train.kernels].fuses_rotary
    if habits.interleaves_tables and not fused:
        tables = ops.unary(eng, tables[0], "rotary"), ops.unary(eng, tables[1], "rotary")
    if habits.fp32_rotary and not fused:
        q, k = ops.cast(eng, q, FP32, "rotary"), ops.cast(eng, k, FP32, "rotary")
    part = spec.rotary_dim or spec.head_dim
    rest = spec.head_dim - part
    q_turned = rotary(step, q, t * spec.num_heads * part, t * spec.num_heads * rest, tables)
    k_turned = rotary(step, k, t * spec.num_kv_heads * part, t * spec.num_kv_heads * rest, tables)
    if not habits.fp32_rotary and not wide_tables(step):
        return q_turned, k_turned
    return ops.cast(eng, q_turned, source, "rotary"), ops.cast(eng, k_turned, source, "rotary")


def rotary(step: Step, x: Tensor, rotated: Size, rest: Size, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x*cos + rotate_half(x)*sin for one of q, k, with a pass-through part when partial."""
    eng = step.eng
    tables = tables or step.cos_sin
    assert tables is not None
    if KERNEL_SETS[step.train.kernels].fuses_rotary:
        return _fused_rotary(step, x)
    if step.habits.turn is not None:
        return step.habits.turn(step, x, rotated, rest, tables)
    kept: Tensor | None = None
    if rest != 0:
        full = x
        x = ops.narrow(eng, full, rotated)
        kept = ops.narrow(eng, full, rest)
        del full
    out = turned(step, x, tables)
    if kept is not None:
        return ops.cat_half(eng, out, kept, "rotary")
    return ops.contiguous(eng, out, "rotary") if joins_what_is_not_rotated(step) else out


def turned(step: Step, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x*cos + rotate_half(x)*sin of what is rotated."""
    eng = step.eng
    cos, sin = tables
    dtype = cos.dtype if step.habits.casts_in_products else x.dtype
    first = ops.mul(eng, ops.cast(eng, x, dtype, "rotary"), cos, "rotary")
    half = x.numel // 2
    x1, x2 = ops.narrow(eng, x, half), ops.narrow(eng, x, half)
    turned = ops.cat_half(eng, ops.negate(eng, x2, strided=True), x1, "rotary")
    turned = ops.cast(eng, turned, dtype, "rotary")
    second = ops.mul(eng, turned, sin, "rotary")
    del turned, x1, x2
    return ops.add(eng, first, second, "rotary", strided=True)  # first has q's strides, second those of a new tensor


def _fused_rotary(step: Step, x: Tensor) -> Tensor:
    """A Triton rotary: in place on q and k, forward and backward (Liger, unsloth, fms fast rope)."""
    out = x.view()
    eng = step.eng
    eng.kernel("elementwise", x.dtype, 2 * x.nbytes)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        eng.kernel("elementwise", ops._grad(grads).dtype, 2 * ops._grad(grads).nbytes)
        return [grads[0]]

    eng.link(out, (x,), backward)
    return out
