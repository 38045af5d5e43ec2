"""Self-attention: projections, positions, and the kernel that settings, dtypes and GPU select.

The order of calls and the lifetimes of local names follow transformers 5.23 and 5.24 (models/*/modeling_*.py).
"""

from __future__ import annotations

from planner import cuda_rules
from planner.model import Attention, Norm
from planner.step import linears, ops
from planner.step.context import Step
from planner.step.engine import FP32, INT64, ITEMSIZE, Grads, Node, Shape, Size, Tensor
from planner.step.linears import LayerWeights, LinearWeights
from planner.step.norms import norm

REPEATS_BEFORE_FLASH = (4, 48)
"""Before: flash attention got key/value heads repeated to all query heads (modeling_mistral.py v4.45.2)."""


FP32_ROTARY = ("cohere", "cohere2", "ernie4_5")
"""Model types whose apply_rotary_pos_emb casts q and k to fp32 (models/cohere/modeling_cohere.py)."""


BOOLEAN_MASKS = ("mpt",)
"""Model types whose eager attention fills by a bool mask (modeling_mpt.py) instead of adding one."""

ROTATES_TOKENS_FIRST = ("gptj", "codegen")
"""Model types that rotate [batch, tokens, heads, size] before they turn it (models/gptj/modeling_gptj.py)."""

RETURNS_PROBABILITIES = ("bloom", "mpt", "falcon", "gpt_neo")
"""Model types whose decoder layer returns the attention probabilities (models/bloom/modeling_bloom.py BloomBlock)."""

OWN_CODE = "qwen"
"""First-generation Qwen: modeling_qwen.py comes with the checkpoint, and this file follows it where it differs."""

DROPOUT = 0.1
"""The p of dropouts a class applies unless its config says 0; only whether it is 0 matters for memory."""


def attention(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """Self-attention module: projections, positions, kernel, output projection."""
    spec = held.spec.attention
    arg = x
    if spec.kind == "mla":
        q, k, v = _project_mla(step, held, x)
    else:
        q, k, v = _project(step, held, x)
    out = _attend(step, spec, q, k, v, x.dtype)
    last = held.linears[spec.output.name]
    result = linears.fused_lora(step, [last], out)[0] if _fuses_lora(step, [last]) else linears.forward(step, last, out)
    del arg, out, q, k, v  # names of the module's frame
    return result


def _project(step: Step, held: LayerWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v from separate or fused projections, with their norms and rotary."""
    eng, spec, t = step.eng, held.spec.attention, step.tokens
    sizes = (t * spec.q_size, t * spec.kv_size, t * spec.kv_size)
    group = [held.linears[p.name] for p in spec.projections]
    if len(group) > 1 and _fuses_lora(step, group):
        q, k, v = linears.fused_lora(step, group, x)
    elif len(spec.projections) == 1:
        fused = linears.forward(step, held.linears[spec.projections[0].name], x)
        if _caches_keys(step):
            step.cache.append((eng.layer, fused.view()))
        q, k, v = ops.split(eng, fused, sizes)
        del fused
    else:
        late = spec.qk_norm_after_rope
        q = _projected_norm(step, held, None if late else spec.q_norm, linears.forward(step, group[0], x))
        k = _projected_norm(step, held, None if late else spec.k_norm, linears.forward(step, group[1], x))
        v = linears.forward(step, group[2], x)
    if len(group) == 1 and not spec.qk_norm_after_rope:
        q = _projected_norm(step, held, spec.q_norm, q)
        k = _projected_norm(step, held, spec.k_norm, k)
    if spec.position == "rope":
        part = spec.rotary_dim or spec.head_dim
        rest = spec.head_dim - part
        q_turned = rotary(step, q, t * spec.num_heads * part, t * spec.num_heads * rest)
        k_turned = rotary(step, k, t * spec.num_kv_heads * part, t * spec.num_kv_heads * rest)
        q, k = q_turned, k_turned
    if spec.qk_norm_after_rope:
        q = _projected_norm(step, held, spec.q_norm, q)
        k = _projected_norm(step, held, spec.k_norm, k)
    return q, k, v


CACHES_BEFORE: dict[str, tuple[int, int]] = {"gpt_bigcode": (4, 53)}
"""model_type -> release before which checkpointing left use_cache on: the keys and values of every layer, views of
the whole fused projection, stay in the outputs until the loss is taken from them (modeling_gpt_bigcode.py v4.48.1)."""


def _caches_keys(step: Step) -> bool:
    limit = CACHES_BEFORE.get(step.model.model_type)
    in_forward = not step.backward_began
    return limit is not None and step.train.versions.transformers < limit and in_forward


def _fuses_lora(step: Step, group: list[LinearWeights]) -> bool:
    """fms replaces a group of quantized projections by one function when every one of them is adapted."""
    fused = step.train.kernels == "fms-fused" and step.model.model_type != "gpt_bigcode"
    return fused and all(held.lora and held.kind != "none" and held.dora is None for held in group)


def _projected_norm(step: Step, held: LayerWeights, spec: Norm | None, x: Tensor) -> Tensor:
    """q_norm / k_norm over heads or over the whole projection."""
    if spec is None:
        return x
    return norm(step, spec, held.norms[spec.name], x, x.numel // spec.size)


def _project_mla(step: Step, held: LayerWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek multi-head latent attention: compressed q and kv, one shared rotary key head (deepseek_v3)."""
    eng, spec, t = step.eng, held.spec.attention, step.tokens
    heads, rope = spec.num_heads, spec.qk_rope_head_dim
    nope = spec.head_dim - rope
    v_dim = spec.v_head_dim or spec.head_dim
    names = [p.name for p in spec.projections]
    if spec.q_lora_rank:
        low = linears.forward(step, held.linears[names[0]], x)
        assert spec.q_a_norm is not None
        low = norm(step, spec.q_a_norm, held.norms[spec.q_a_norm.name], low, t)
        q = linears.forward(step, held.linears[names[1]], low)
        del low
        names = names[2:]
    else:
        q = linears.forward(step, held.linears[names[0]], x)
        names = names[1:]
    q_pass, q_rot = ops.split(eng, q, (t * heads * nope, t * heads * rope))
    del q
    compressed = linears.forward(step, held.linears[names[0]], x)
    kv_low, k_rot = ops.split(eng, compressed, (t * spec.kv_lora_rank, t * rope))
    del compressed
    assert spec.kv_a_norm is not None
    kv = linears.forward(
        step, held.linears[names[1]], norm(step, spec.kv_a_norm, held.norms[spec.kv_a_norm.name], kv_low, t)
    )
    del kv_low
    k_pass, value = ops.split(eng, kv, (t * heads * nope, t * heads * v_dim))
    del kv
    q_rot = rotary(step, q_rot, t * heads * rope, 0)
    k_rot = rotary(step, k_rot, t * rope, 0)
    q_out = ops.cat_half(eng, q_pass, q_rot, "mla_cat")
    k_out = ops.cat_half(eng, k_pass, _broadcast(step, k_rot, heads), "mla_cat")
    return q_out, k_out, value


def _broadcast(step: Step, x: Tensor, factor: int) -> Tensor:
    """expand() of the single rotary key head: a view; its gradient is summed over the heads."""
    out = x.view(x.numel * factor)
    small, eng = x.numel, step.eng

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [eng.empty(small, ops._grad(grads).dtype, "expand_grad")]

    eng.link(out, (x,), backward)
    return out


def needs_window_mask(step: Step, spec: Attention) -> bool:
    """Whether SDPA gets a 4-D mask for a sliding window: the length reaches the window (masking_utils.py)."""
    if not spec.sliding_window or step.train.attention != "sdpa":
        return False
    return bool(step.seq >= spec.sliding_window)


def always_masks(step: Step) -> bool:
    """Whether the class asks for a 4-D mask where SDPA's causal flag would do (falcon: allow_is_causal_skip=False)."""
    return step.model.model_type == "falcon" and step.train.attention == "sdpa" and not step.train.uses_own_modules


def sdpa_kernel(step: Step, spec: Attention, dtype: str) -> cuda_rules.SdpaKernel:
    """The kernel torch's scaled_dot_product_attention picks (planner.cuda_rules.sdpa_kernel)."""
    if not step.arch.sdpa_kernels:
        return "flash"  # a CPU has one fused kernel, for every dtype and mask (cpu/FlashAttentionKernel.cpp)
    if _broadcasts_heads(step, spec):
        return "math"
    masked = step.mask is not None or needs_window_mask(step, spec) or always_masks(step)
    return cuda_rules.sdpa_kernel(
        dtype, has_mask=masked, head_dim=spec.head_dim, v_head_dim=spec.v_head_dim or spec.head_dim, arch=step.arch,
        grouped=_passes_groups(spec, masked),
    )  # fmt: skip


def _passes_groups(spec: Attention, masked: bool) -> bool:
    """transformers leaves grouped heads to SDPA only without a mask (sdpa_attention.py use_gqa_in_sdpa)."""
    equal = spec.v_head_dim in (0, spec.head_dim) and spec.head_dim <= 256
    return spec.num_kv_heads != spec.num_heads and equal and not masked


def _attend(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> Tensor:
    """The attention kernel that the settings, the dtypes and the GPU select; `source`: dtype of the layer's input."""
    eng = step.eng
    arg = (q, k, v)
    has_sdpa = spec.has_sdpa(step.train.versions.transformers)
    if step.model.model_type == OWN_CODE:
        out = _unpadded_flash(step, spec, q, k, v) if step.train.attention == "flash2" else _masked(step, spec, q, k, v)
    elif spec.sinks and (step.train.attention == "eager" or not has_sdpa):
        out = _eager_sinks(step, spec, q, k, v)
    elif step.train.attention == "eager" or (step.train.attention == "sdpa" and not has_sdpa):
        falcon = step.model.model_type == "falcon" and spec.position == "rope"
        out = _eager_falcon(step, spec, q, k, v, source) if falcon else _eager(step, spec, q, k, v)
    else:
        q, k, v = (ops.autocast_half(eng, t) for t in (q, k, v))
        if step.train.attention == "flash2":
            q, k, v = (ops.cast(eng, t, _flash_dtype(step), "flash_cast") for t in (q, k, v))
        kernel = "flash" if step.train.attention == "flash2" else sdpa_kernel(step, spec, q.dtype)
        if kernel == "math":
            out = _math(step, spec, q, k, v)
        elif kernel == "efficient":
            out = _efficient(step, spec, q, k, v)
        else:
            out = _flash(step, spec, q, k, v)
            if _leads_with_heads(step, spec) and step.train.attention == "sdpa":
                out = ops.contiguous(eng, out, "attention")
    del arg
    return out


def _leads_with_heads(step: Step, spec: Attention) -> bool:
    """Whether q and k lie in memory head by head, not token by token as their projection wrote them.

    Partial rotary positions end in a torch.cat, whose result is contiguous as [batch, heads, tokens, size]; q * cos
    keeps the projection's layout. Flash attention's output lies as q does and is then copied back (flash_api.cpp
    mha_fwd: empty_like).
    """
    partial = spec.position == "rope" and 0 < spec.rotary_dim < spec.head_dim
    partial = (partial and step.model.model_type not in ROTATES_TOKENS_FIRST) or _joins_nothing(step, spec)
    return spec.kind == "mla" or partial


def _joins_nothing(step: Step, spec: Attention) -> bool:
    """phi3 appends what is not rotated even where that is nothing: a copy (modeling_phi3.py apply_rotary_pos_emb)."""
    return step.model.model_type == "phi3" and spec.position == "rope" and spec.rotary_dim in (0, spec.head_dim)


def _broadcasts_heads(step: Step, spec: Attention) -> bool:
    """Falcon hands SDPA one key/value head beside many query heads; no fused kernel takes that (sdp_utils.cpp)."""
    own = step.train.uses_own_modules  # litgpt's modules expand the heads instead
    return step.model.model_type == "falcon" and spec.num_kv_heads == 1 and not own


def _math(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA's math kernel: scaled copies of q and broadcast k, v, whole scores, softmax in their dtype."""
    eng = step.eng
    arg = (q, k, v)
    source = q.dtype
    scores_numel = step.batch * spec.num_heads * step.seq * step.seq
    score_shape, value_shape = _eager_shapes(step, spec)
    mask = eng.empty(step.seq * step.seq, q.dtype, "attention_bias")
    groups = spec.num_heads // spec.num_kv_heads
    q, k, v = (ops.cast(eng, t, FP32, "attention_fp32") for t in (q, k, v))  # 16-bit inputs are computed in fp32
    scaled = ops.scale(eng, q, "attention")
    keys, values = ops.expand_copy(eng, k, groups), ops.expand_copy(eng, v, groups)
    scores = ops.bmm(eng, scaled, ops.scale(eng, keys, "attention"), score_shape, "scores", "nt")
    scores = ops.add(eng, scores, mask, "scores", scores_numel)
    probs = ops.softmax_same(eng, scores, writes_product=step.arch.softmax_backward_product)
    del scores, mask
    if spec.dropout:
        probs = ops.dropout(eng, probs, DROPOUT, "attention_dropout")
    returned = ops.unary(eng, probs, "probabilities", source)
    out = ops.bmm(eng, probs, values, value_shape, "attention")
    out = ops.cast(eng, out, source, "attention")
    del arg, returned, scaled, keys, values
    return ops.contiguous(eng, out, "attention")


def _eager_shapes(step: Step, spec: Attention) -> tuple[Shape, Shape]:
    """Batched products of a whole score matrix: q k^T and probabilities times v, for every row and head."""
    matrices, s = step.batch * spec.num_heads, step.seq
    return (matrices, s, s, spec.head_dim), (matrices, s, spec.v_head_dim or spec.head_dim, s)


def _flash_dtype(step: Step) -> str:
    """transformers casts fp32 q, k, v for flash attention to the autocast or the stored dtype."""
    if step.autocast:
        return step.autocast
    return step.train.base_dtype if step.train.base_dtype != FP32 else step.train.quantization.compute_dtype


def _attention_flops(step: Step, spec: Attention) -> Size:
    """Causal scores and values: 2 products of b*H*s*s*d, half of them masked away."""
    v_dim = spec.v_head_dim or spec.head_dim
    window = spec.sliding_window
    keys = min(window, step.seq) if window else step.seq
    share = 0.5 if keys is step.seq else 1.0
    return 2.0 * step.batch * step.seq * keys * spec.num_heads * (spec.head_dim + v_dim) * share


def _flash(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2: keeps q, k, v, output and logsumexp."""
    b, s, heads = step.batch, step.seq, spec.num_heads
    if step.train.versions.transformers < REPEATS_BEFORE_FLASH:
        groups = heads // spec.num_kv_heads
        k, v = ops.expand_copy(step.eng, k, groups), ops.expand_copy(step.eng, v, groups)
    buffers = cuda_rules.flash_backward_workspace(b, s, s, heads, spec.num_kv_heads, spec.head_dim)
    return ops.fused_attention(
        step.eng, q, k, v, out_numel=step.tokens * spec.q_size, logsumexp_numel=b * heads * s,
        workspace_bytes=sum(n for _, n in buffers), flops=_attention_flops(step, spec), op="flash_attention",
    )  # fmt: skip


def _efficient(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Memory-efficient attention: key/value heads repeated where SDPA takes no groups, a 4-D mask kept as bias."""
    eng = step.eng
    masked = step.mask is not None or needs_window_mask(step, spec) or always_masks(step)
    kv_heads = spec.num_kv_heads
    arg = (k, v)
    if not _passes_groups(spec, masked):
        kv_heads = spec.num_heads
        k, v = _repeat_heads(step, spec, k), _repeat_heads(step, spec, v)
    mask: Tensor | None = None
    if masked:  # the bool mask becomes an additive bias in q's dtype, written out for every row of the batch
        mask = eng.empty(step.batch * step.seq * step.seq, q.dtype, "attention_bias")
    v_dim = spec.v_head_dim or spec.head_dim
    b, s, heads = step.batch, step.seq, spec.num_heads
    buffers = cuda_rules.efficient_backward_workspace(b, s, s, heads, kv_heads, spec.head_dim, ITEMSIZE[q.dtype])
    out = ops.fused_attention(
        eng, q, k, v, out_numel=step.tokens * heads * v_dim, logsumexp_numel=b * heads * cuda_rules.round_up(s, 32),
        workspace_bytes=sum(n for _, n in buffers), flops=_attention_flops(step, spec), op="efficient_attention",
        mask=mask,
    )  # fmt: skip
    del arg
    return out


def _unpadded_flash(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashSelfAttention of modeling_qwen.py: more than one row is packed for the kernel and spread out again.

    Trainers always pass an attention mask, so rows are packed even where none is shorter.
    """
    eng = step.eng
    arg = (q, k, v)
    several = step.batch > 1
    if several:
        k, q, v = (ops.scale(eng, t, "unpad") for t in (k, q, v))
    out = _flash(step, spec, q, k, v)
    if several:
        out = ops.scale(eng, out, "pad")
    del arg
    return out


def _masked(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """QWenAttention without flash-attn, torch 2: every layer makes its causal mask and hands SDPA an additive one."""
    eng, s, b = step.eng, step.seq, step.batch
    arg = (q, k, v)
    ones = eng.empty(s * s, "int8", "attention_mask")
    causal = eng.empty(s * s, "int8", "attention_mask")  # torch.tril of it
    del ones
    inverse = eng.empty(s * s, "int8", "attention_mask")
    mask = eng.empty(b * s * s, step.train.base_dtype, "attention_mask")
    del inverse
    bias = mask
    if step.arch.sdpa_kernels and not _aligned(s):
        spread = spec.num_heads if step.arch.torch < SPREADS_BEFORE_PADDING else 1
        bias = eng.empty(b * spread * s * cuda_rules.round_up(s, MASK_ALIGNMENT), mask.dtype, "attention_bias")
    buffers = cuda_rules.efficient_backward_workspace(
        b, s, s, spec.num_heads, spec.num_kv_heads, spec.head_dim, ITEMSIZE[q.dtype]
    )
    rows = b * spec.num_heads * cuda_rules.round_up(s, 32)
    out = ops.fused_attention(
        eng, q, k, v, out_numel=step.tokens * spec.q_size, logsumexp_numel=rows,
        workspace_bytes=sum(n for _, n in buffers), flops=_attention_flops(step, spec), op="efficient_attention",
        mask=bias,
    )  # fmt: skip
    del arg, causal, mask, bias
    return out


MASK_ALIGNMENT = 16
"""SDPA pads a mask whose rows are no multiple of this (ATen/native/transformers/attention.cpp preprocess_mask)."""
SPREADS_BEFORE_PADDING = (2, 2)
"""Before: it expands the mask to all heads first, so the padded copy is written out for each of them (v2.1)."""


def _aligned(length: Size) -> bool:
    return not isinstance(length, int) or length % MASK_ALIGNMENT == 0


def _eager(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """eager_attention_forward: whole score matrices, softmax in fp32, cast back."""
    eng = step.eng
    groups = spec.num_heads // spec.num_kv_heads
    values = q.dtype
    arg = (q, k, v)
    heads_first = _leads_with_heads(step, spec)
    copied = groups > 1 and spec.num_kv_heads > 1
    k, v = _repeat_heads(step, spec, k), _repeat_heads(step, spec, v)
    if spec.scores_fp32:
        q, k = ops.cast(eng, q, FP32, "scores_fp32"), ops.cast(eng, k, FP32, "scores_fp32")
    scores_numel = step.batch * spec.num_heads * step.seq * step.seq
    score_shape, value_shape = _eager_shapes(step, spec)
    k_copied = copied or (heads_first and groups == 1)
    scores = ops.bmm(eng, _folded(step, q, heads_first), _folded(step, k, k_copied), score_shape, "scores", "nt")
    scores = ops.scale(eng, scores, "scores")
    if spec.logit_softcap:
        scores = ops.scale(eng, ops.pointwise(eng, ops.scale(eng, scores, "scores"), "tanh", False), "scores")
    if step.mask is not None and step.model.model_type in BOOLEAN_MASKS:
        scores = ops.masked_fill(eng, scores, step.mask, "scores")
    elif step.mask is not None:
        scores = ops.add(eng, scores, step.mask, "scores", scores_numel)
    inside = step.arch.fused_softmax_cast and cuda_rules.softmax_casts_inside(scores.dtype, FP32)
    product = step.arch.softmax_backward_product
    probs = ops.softmax_fp32(eng, scores, casts_inside=inside, writes_product=product)
    probs = ops.cast(eng, probs, values, "probabilities")  # attn_weights names the scores until this is assigned
    del scores
    if spec.dropout:
        probs = ops.dropout(eng, probs, DROPOUT, "attention_dropout")
    if step.model.model_type in RETURNS_PROBABILITIES:
        step.probabilities = probs
    step.unused_probabilities = probs
    out = ops.bmm(eng, probs, _folded(step, v, copied), value_shape, "attention")
    held = ops.contiguous(eng, out, "attention")
    del out, arg
    return held


def _repeat_heads(step: Step, spec: Attention, x: Tensor) -> Tensor:
    """repeat_kv: expand and reshape; the reshape of a single head is a view, of several a copy."""
    groups = spec.num_heads // spec.num_kv_heads
    if spec.num_kv_heads == 1 and groups > 1:
        return _broadcast(step, x, groups)
    return ops.expand_copy(step.eng, x, groups)


def _folded(step: Step, x: Tensor, heads_first: bool) -> Tensor:
    """torch.matmul folds batch and heads into one dimension: a copy of what lies token by token, if rows are many."""
    copies = not heads_first and step.batch > 1
    return ops.contiguous(step.eng, x, "matmul_copy") if copies else x


def _eager_falcon(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> Tensor:
    """FalconAttention without ALiBi: scores scaled in place, softmax in the dtype of the layer's input."""
    eng = step.eng
    groups = spec.num_heads // spec.num_kv_heads
    numel = step.batch * spec.num_heads * step.seq * step.seq
    score_shape, value_shape = _eager_shapes(step, spec)
    scores = ops.bmm(eng, q, ops.expand_copy(eng, k, groups), score_shape, "scores", "nt")
    scores = ops.scale_in_place(eng, scores)
    assert step.mask is not None
    scores = ops.cast(eng, ops.add(eng, scores, step.mask, "scores", numel), source, "softmax_cast")
    probs = ops.softmax_same(eng, scores, writes_product=step.arch.softmax_backward_product)
    del scores
    step.probabilities = probs
    out = ops.bmm(eng, probs, ops.expand_copy(eng, v, groups), value_shape, "attention")
    held = ops.contiguous(eng, out, "attention")
    del out
    return held


def _eager_sinks(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt_oss: one more column of scores for the sinks, the row maximum subtracted, softmax in the scores' dtype."""
    eng = step.eng
    groups = spec.num_heads // spec.num_kv_heads
    k, v = ops.expand_copy(eng, k, groups), ops.expand_copy(eng, v, groups)
    rows = step.batch * spec.num_heads * step.seq
    scores_numel = rows * step.seq
    score_shape, value_shape = _eager_shapes(step, spec)
    scores = ops.scale(eng, ops.bmm(eng, q, k, score_shape, "scores", "nt"), "scores")
    assert step.mask is not None
    scores = ops.add(eng, scores, step.mask, "scores", scores_numel)
    sink = eng.empty(rows, scores.dtype, "scores")
    wide = ops.cat_half(eng, scores, sink, "scores")
    index = eng.empty(rows, INT64, "scores")
    wide = ops.add(eng, wide, eng.empty(rows, wide.dtype, "scores"), "scores", wide.numel)
    probs = ops.softmax_same(eng, wide, writes_product=step.arch.softmax_backward_product)
    kept = ops.narrow(eng, probs, scores_numel, "scores_grad")
    step.unused_probabilities = kept
    out = ops.bmm(eng, kept, v, value_shape, "attention")
    held = ops.contiguous(eng, out, "attention")
    del out, index, wide, scores, probs, kept
    return held


def rotary(step: Step, x: Tensor, rotated: Size, rest: Size) -> Tensor:
    """apply_rotary_pos_emb for one of q, k: x*cos + rotate_half(x)*sin, with a pass-through part when partial."""
    eng = step.eng
    assert step.cos_sin is not None
    cos, sin = step.cos_sin
    if step.train.kernels in ("unsloth", "fms-fused", "liger"):
        return _fused_rotary(step, x)
    kept: Tensor | None = None
    source = x.dtype
    own = step.model.model_type == OWN_CODE
    wide = step.model.model_type in FP32_ROTARY or own
    if wide:
        x = ops.cast(eng, x, FP32, "rotary")
    if own and step.train.attention == "flash2":
        return ops.cast(eng, _triton_rotary(step, x), source, "rotary")
    if own or not (isinstance(rest, int) and rest == 0):  # its own code appends the rest even where there is none
        full = x
        x = ops.narrow(eng, full, rotated)
        kept = ops.narrow(eng, full, rest)
        del full
    first = ops.mul(eng, x, cos, "rotary")
    half = x.numel // 2
    x1, x2 = ops.narrow(eng, x, half), ops.narrow(eng, x, half)
    turned = ops.cat_half(eng, ops.negate(eng, x2), x1, "rotary")
    second = ops.mul(eng, turned, sin, "rotary")
    del turned, x1, x2
    out = ops.add(eng, first, second, "rotary")
    del first, second
    if kept is not None:
        out = ops.cat_half(eng, out, kept, "rotary")
    elif step.model.model_type == "phi3":
        out = ops.contiguous(eng, out, "rotary")
    return ops.cast(eng, out, source, "rotary") if wide else out


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
