"""Positions: the tables of the rotary embedding, and the rotation of queries and keys by them."""

from __future__ import annotations

from planner.loss_kinds import KERNEL_SETS
from planner.model import Attention
from planner.step import eager, ops
from planner.step.context import Step
from planner.step.engine import FP32, Grads, Node, Size, Tensor

OWN_CODE = "qwen"
"""First-generation Qwen: modeling_qwen.py comes with the checkpoint, and this file follows it where it differs."""

FP32_TABLES = ("codegen", "ernie4_5", "olmo", "olmo2", "olmo3")
"""Model types whose rotary embedding leaves cos and sin in fp32 (models/olmo2/modeling_olmo2.py): so are products with
them, and apply_rotary_pos_emb casts both results back at its end; ernie4_5 casts q and k in each product itself."""

FP32_ROTARY = ("cohere", "cohere2")
"""Model types whose apply_rotary_pos_emb casts q and k to fp32 first, and back at its end (modeling_cohere.py)."""

INTERLEAVES_TABLES = ("ernie4_5", "glm", "glm4", "helium")
"""Model types that copy cos and sin in every layer, each entry twice (models/glm/modeling_glm.py)."""

HALF_TABLES = ("codegen", "gpt_oss", "gptj")
"""Model types whose rotary tables hold each angle once."""

ROTATES_HALVES = ("gpt_oss",)
"""Model types that rotate both halves apart and join them (models/gpt_oss/modeling_gpt_oss.py _apply_rotary_emb)."""

TABLES_PER_LAYER_BEFORE: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("gemma", "gemma2", "mistral", "mixtral", "olmo", "phi3"), (4, 48)),
    **dict.fromkeys(("cohere", "persimmon", "phi", "qwen2", "qwen2_moe", "stablelm", "starcoder2"), (4, 45)),
    "llama": (4, 43),
}
"""model_type -> release before which every layer makes its own tables (modeling files of 4.43 to 4.48: rotary_emb is
called in the attention module, its results are names of the module's frame)."""


def tables_per_layer(step: Step) -> bool:
    """Whether every attention module makes its own rotary tables."""
    limit = TABLES_PER_LAYER_BEFORE.get(step.model.model_type, (0, 0))
    return step.train.versions.transformers < limit and not step.train.uses_own_modules


def tables(step: Step, spec: Attention, dtype: str) -> tuple[Tensor, Tensor]:
    """cos and sin of every position (modeling_llama.py LlamaRotaryEmbedding.forward); `dtype`: that of the layer."""
    eng = step.eng
    width = (spec.qk_rope_head_dim if spec.kind == "mla" else spec.rotary_dim) or spec.head_dim
    numel = step.seq * (width // 2 if step.model.model_type in HALF_TABLES else width)
    dtype = FP32 if step.model.model_type in FP32_TABLES else dtype
    angles = eng.empty(numel // 2, FP32, "rotary_tables")
    eng.calls_blas()
    both = eng.empty(numel, FP32, "rotary_tables")
    cos, sin = (ops.unary(eng, both, "rotary_tables") for _ in range(2))
    if not tables_per_layer(step):  # attention_scaling came with the tables in the model
        cos, sin = (ops.scale(eng, table, "rotary_tables") for table in (cos, sin))
    cos, sin = (ops.cast(eng, table, dtype, "rotary_tables") for table in (cos, sin))
    del angles, both
    return cos, sin


def rotate(step: Step, spec: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb on q and k."""
    eng, t, kind = step.eng, step.tokens, step.model.model_type
    assert step.cos_sin is not None
    source, tables = q.dtype, step.cos_sin
    fused = KERNEL_SETS[step.train.kernels].fuses_rotary
    if kind in INTERLEAVES_TABLES and not fused:
        tables = ops.unary(eng, tables[0], "rotary"), ops.unary(eng, tables[1], "rotary")
    if kind in FP32_ROTARY and not fused:
        q, k = ops.cast(eng, q, FP32, "rotary"), ops.cast(eng, k, FP32, "rotary")
    part = spec.rotary_dim or spec.head_dim
    rest = spec.head_dim - part
    q_turned = rotary(step, q, t * spec.num_heads * part, t * spec.num_heads * rest, tables)
    k_turned = rotary(step, k, t * spec.num_kv_heads * part, t * spec.num_kv_heads * rest, tables)
    if kind not in (*FP32_ROTARY, *FP32_TABLES):
        return q_turned, k_turned
    return ops.cast(eng, q_turned, source, "rotary"), ops.cast(eng, k_turned, source, "rotary")


def rotate_tokens_first(step: Step, spec: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """gptj and codegen: k first, each with its own copies of the tables; the frame names every part."""
    eng, t = step.eng, step.tokens
    assert step.cos_sin is not None
    cos, sin = step.cos_sin
    part = spec.rotary_dim or spec.head_dim
    rest = spec.head_dim - part

    def turned(x: Tensor, heads: int) -> Tensor:
        tables = eng.empty(step.seq * part, cos.dtype, "rotary"), eng.empty(step.seq * part, sin.dtype, "rotary")
        return rotary(step, ops.narrow(eng, x, t * heads * part), t * heads * part, 0, tables)

    k_turned = turned(k, spec.num_kv_heads)
    q_turned = turned(q, spec.num_heads)
    key = ops.cat_half(eng, k_turned, ops.narrow(eng, k, t * spec.num_kv_heads * rest), "rotary")
    query = ops.cat_half(eng, q_turned, ops.narrow(eng, q, t * spec.num_heads * rest), "rotary")
    return query, key, (q, k, q_turned, k_turned)


def rotary(step: Step, x: Tensor, rotated: Size, rest: Size, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x*cos + rotate_half(x)*sin for one of q, k, with a pass-through part when partial."""
    eng = step.eng
    tables = tables or step.cos_sin
    assert tables is not None
    cos, sin = tables
    if KERNEL_SETS[step.train.kernels].fuses_rotary:
        return _fused_rotary(step, x)
    if step.model.model_type in ROTATES_HALVES:
        return _rotary_halves(step, x)
    kept: Tensor | None = None
    source = x.dtype
    own = step.model.model_type == OWN_CODE
    if own:
        x = ops.cast(eng, x, FP32, "rotary")
    if own and step.train.attention == "flash2":
        return ops.cast(eng, _triton_rotary(step, x), source, "rotary")
    if own or not (isinstance(rest, int) and rest == 0):  # its own code appends the rest even where there is none
        full = x
        x = ops.narrow(eng, full, rotated)
        kept = ops.narrow(eng, full, rest)
        del full
    dtype = cos.dtype if step.model.model_type == "ernie4_5" else x.dtype
    first = ops.mul(eng, ops.cast(eng, x, dtype, "rotary"), cos, "rotary")
    half = x.numel // 2
    x1, x2 = ops.narrow(eng, x, half), ops.narrow(eng, x, half)
    turned = ops.cat_half(eng, ops.negate(eng, x2, strided=True), x1, "rotary")
    turned = ops.cast(eng, turned, dtype, "rotary")
    second = ops.mul(eng, turned, sin, "rotary")
    del turned, x1, x2
    out = ops.add(eng, first, second, "rotary", strided=True)  # first has q's strides, second those of a new tensor
    del first, second
    if kept is not None:
        out = ops.cat_half(eng, out, kept, "rotary")
    elif step.model.model_type in eager.JOINS_NOTHING:
        out = ops.contiguous(eng, out, "rotary")
    return ops.cast(eng, out, source, "rotary") if own else out


def _rotary_halves(step: Step, x: Tensor) -> Tensor:
    """cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin), with tables of half a head."""
    eng = step.eng
    assert step.cos_sin is not None
    cos, sin = step.cos_sin
    half = x.numel // 2
    x1, x2 = ops.split(eng, x, (half, half), "rotary_grad")
    first = ops.subtract(eng, ops.mul(eng, x1, cos, "rotary"), ops.mul(eng, x2, sin, "rotary"), "rotary")
    second = ops.add(eng, ops.mul(eng, x2, cos, "rotary"), ops.mul(eng, x1, sin, "rotary"), "rotary")
    return ops.cat_half(eng, first, second, "rotary")


def _triton_rotary(step: Step, x: Tensor) -> Tensor:
    """flash-attn's ApplyRotaryEmb out of place: a new tensor; the backward clones the gradient first (2.3.4)."""
    eng = step.eng
    out = ops.unary(eng, x, "rotary")

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        cloned = ops.unary(eng, ops._grad(grads), "rotary_grad")
        return [ops.unary(eng, cloned, "rotary_grad")]

    eng.link(out, (x,), backward)
    return out


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
