"""The modules of a decoder layer, written as transformers writes them, against the symbolic engine.

Local names, their lifetimes and the order of calls follow the classes in transformers 5.23 (models/*/modeling_*.py):
what a frame still holds when an allocation happens is part of the peak. `arg` names stand for the arguments that
nn.Module.__call__ keeps alive while a module runs.
"""

from __future__ import annotations

from planner import cuda_rules
from planner.model import Attention, Experts, Layer, Mlp, Norm
from planner.step import linears, ops
from planner.step.context import Step
from planner.step.engine import FP32, INT64, ITEMSIZE, Grads, Node, Size, Tensor
from planner.step.linears import LinearWeights


REPEATS_BEFORE_FLASH = (4, 48)
"""Before: flash attention got key/value heads repeated to all query heads (modeling_mistral.py v4.45.2)."""


FP32_ROTARY = ("cohere", "cohere2", "ernie4_5")
"""Model types whose apply_rotary_pos_emb casts q and k to fp32 (models/cohere/modeling_cohere.py)."""

DROPOUT = 0.1
"""The p of dropouts a class applies unless its config says 0; only whether it is 0 matters for memory."""


class LayerWeights:
    """The tensors of one decoder layer, by module name."""

    __slots__ = ("expert_adapters", "experts", "linears", "norms", "router", "spec")

    def __init__(self, spec: Layer) -> None:
        self.spec = spec
        self.linears: dict[str, LinearWeights] = {}
        self.norms: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.experts: list[Tensor] = []
        self.router: Tensor | None = None
        self.expert_adapters: dict[str, tuple[Tensor, Tensor]] = {}
        """Fused parameter -> its (A, B), stacked over the experts (peft lora.ParamWrapper)."""


# --- norms ---------------------------------------------------------------------------------------------------------


def norm(step: Step, spec: Norm, weights: tuple[Tensor | None, Tensor | None], x: Tensor, rows: Size) -> Tensor:
    """A normalisation module of the kind `spec` names; `rows` is the number of normalised vectors."""
    arg = x
    weight = weights[0]
    if spec.kind in ("layernorm", "layernorm_upcast", "layernorm_1p"):
        out = _torch_layer_norm(step, spec, weights, x, rows)
    elif spec.kind == "layernorm_per_head":
        out = _layer_norm_per_head(step, spec, weights, x, rows)
    elif _fuses_norms(step):
        out = _fused_rms_norm(step, weight, x, rows)
    elif spec.kind == "rms":
        out = _rms_norm(step, weight, x, rows)
    elif spec.kind == "layernorm_fp32":
        out = _layer_norm_fp32(step, weight, x, rows)
    else:
        out = _rms_norm_fp32(step, spec, weight, x, rows)
    del arg
    return out


def _torch_layer_norm(
    step: Step, spec: Norm, weights: tuple[Tensor | None, Tensor | None], x: Tensor, rows: Size
) -> Tensor:
    """torch's LayerNorm; olmo upcasts around it, nemotron makes weight + 1 anew and leaves autocast's fp32 list."""
    eng = step.eng
    weight, bias = weights
    if spec.kind == "layernorm_upcast":
        source = x.dtype
        out = ops.layer_norm(eng, ops.cast(eng, x, FP32, "norm_input_fp32"), None, None, rows)
        return ops.cast(eng, out, source, "norm_cast")
    if spec.kind == "layernorm_1p":
        assert weight is not None
        shifted = ops.shift(eng, weight, "norm_weight")
        x = ops.autocast_half(eng, x)
        with eng.autocasting(None):
            return ops.layer_norm(eng, x, shifted, bias, rows)
    return ops.layer_norm(eng, x, weight, bias, rows)


def _layer_norm_per_head(
    step: Step, spec: Norm, weights: tuple[Tensor | None, Tensor | None], x: Tensor, rows: Size
) -> Tensor:
    """One LayerNorm per head, concatenated (stablelm-2-12b): the outputs of all heads, then their copy."""
    out = ops.layer_norm(step.eng, x, weights[0], weights[1], rows)
    return ops.contiguous(step.eng, out, "norm")


def _fuses_norms(step: Step) -> bool:
    """Whether a Triton RMSNorm replaces the class's own."""
    return step.train.kernels in ("liger", "unsloth", "fms-fused")


def _rms_core(step: Step, x: Tensor, rows: Size) -> Tensor:
    """x * rsqrt(mean(x^2) + eps), in fp32."""
    eng = step.eng
    variance = ops.mean_last(eng, ops.square(eng, x), rows)
    return ops.mul(eng, x, ops.rsqrt(eng, ops.shift(eng, variance)), "norm")


def _rms_norm(step: Step, weight: Tensor | None, x: Tensor, rows: Size) -> Tensor:
    """LlamaRMSNorm: the weight multiplies after the cast back."""
    eng = step.eng
    source = x.dtype
    x = ops.cast(eng, x, FP32, "norm_input_fp32")
    x = _rms_core(step, x, rows)
    x = ops.cast(eng, x, source, "norm_cast")
    return x if weight is None else ops.mul(eng, weight, x, "norm")


def _rms_norm_fp32(step: Step, spec: Norm, weight: Tensor | None, x: Tensor, rows: Size) -> Tensor:
    """Olmo2 and Gemma RMSNorm: the weight (gemma: 1 + weight) multiplies in fp32, the cast comes last."""
    eng = step.eng
    arg = x
    source = x.dtype
    if spec.kind == "rms_gemma":
        out = _rms_core(step, ops.cast(eng, x, FP32, "norm_input_fp32"), rows)
        assert weight is not None
        out = ops.mul(eng, out, ops.shift(eng, ops.cast(eng, weight, FP32, "norm_weight")), "norm")
    else:
        x = ops.cast(eng, x, FP32, "norm_input_fp32")
        x = _rms_core(step, x, rows)
        out = x if weight is None else ops.mul(eng, weight, x, "norm")
    del arg
    return ops.cast(eng, out, source, "norm_cast")


def _layer_norm_fp32(step: Step, weight: Tensor | None, x: Tensor, rows: Size) -> Tensor:
    """CohereLayerNorm: mean and variance written out in fp32."""
    eng = step.eng
    source = x.dtype
    x = ops.cast(eng, x, FP32, "norm_input_fp32")
    mean = ops.mean_last(eng, x, rows)
    centred = ops.add(eng, x, ops.negate(eng, mean), "norm", x.numel)
    variance = ops.mean_last(eng, ops.square(eng, centred), rows)
    centred = ops.add(eng, x, ops.negate(eng, mean), "norm", x.numel)
    x = ops.mul(eng, centred, ops.rsqrt(eng, ops.shift(eng, variance)), "norm")
    if weight is not None:
        x = ops.mul(eng, ops.cast(eng, weight, FP32, "norm_weight"), x, "norm")
    return ops.cast(eng, x, source, "norm_cast")


def _fused_rms_norm(step: Step, weight: Tensor | None, x: Tensor, rows: Size) -> Tensor:
    """A Triton RMSNorm (Liger, unsloth, fms): one output, keeps the input and one fp32 value a row."""
    eng = step.eng
    out = ops.unary(eng, x, "norm")
    inverse = eng.empty(rows, FP32, "norm")
    needs_weight = weight is not None and weight.requires_grad
    size = weight.numel if weight is not None else 0
    wtype = weight.dtype if weight is not None else x.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        # Liger and fms write dX over dY; the kernel still needs dY's storage only
        grad = ops._grad(grads)
        out = grad if step.train.kernels != "unsloth" else ops.unary(eng, grad, "norm_grad")
        return [out, eng.empty(size, wtype, "norm_grad") if needs_weight else None]

    eng.link(out, (x, weight), backward, tuple(t for t in (x, inverse, weight) if t is not None))
    return out


# --- positions -----------------------------------------------------------------------------------------------------


def rotary(step: Step, x: Tensor, rotated: Size, rest: Size) -> Tensor:
    """apply_rotary_pos_emb for one of q, k: x*cos + rotate_half(x)*sin, with a pass-through part when partial."""
    eng = step.eng
    assert step.cos_sin is not None
    cos, sin = step.cos_sin
    if step.train.kernels in ("unsloth", "fms-fused", "liger"):
        return _fused_rotary(step, x)
    kept: Tensor | None = None
    source = x.dtype
    wide = step.model.model_type in FP32_ROTARY
    if wide:
        x = ops.cast(eng, x, FP32, "rotary")
    if not (isinstance(rest, int) and rest == 0):
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
    return ops.cast(eng, out, source, "rotary") if wide else out


def _fused_rotary(step: Step, x: Tensor) -> Tensor:
    """A Triton rotary: in place on q and k, forward and backward (Liger, unsloth, fms fast rope)."""
    out = x.view()
    step.eng.kernel("elementwise", x.dtype, 2 * x.nbytes)
    step.eng.link(out, (x,), lambda node, grads: [grads[0]])
    return out


# --- attention -----------------------------------------------------------------------------------------------------


def attention(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """Self-attention module: projections, positions, kernel, output projection."""
    spec = held.spec.attention
    arg = x
    if spec.kind == "mla":
        q, k, v = _project_mla(step, held, x)
    else:
        q, k, v = _project(step, held, x)
    out = _attend(step, spec, q, k, v)
    del q, k, v
    last = held.linears[spec.output.name]
    result = linears.fused_lora(step, [last], out)[0] if _fuses_lora(step, [last]) else linears.forward(step, last, out)
    del arg, out
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
        early = None if spec.qk_norm_after_rope else spec
        q = _projected_norm(step, held, early and early.q_norm, linears.forward(step, group[0], x))
        k = _projected_norm(step, held, early and early.k_norm, linears.forward(step, group[1], x))
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
    reaches = step.seq >= spec.sliding_window
    return bool(reaches if isinstance(reaches, bool) else reaches.any())


def sdpa_kernel(step: Step, spec: Attention, dtype: str) -> cuda_rules.SdpaKernel:
    """The kernel torch's scaled_dot_product_attention picks (planner.cuda_rules.sdpa_kernel)."""
    if _broadcasts_heads(step, spec):
        return "math"
    masked = step.mask is not None or needs_window_mask(step, spec)
    return cuda_rules.sdpa_kernel(
        dtype, has_mask=masked, head_dim=spec.head_dim, v_head_dim=spec.v_head_dim or spec.head_dim, arch=step.arch,
        grouped=_passes_groups(spec, masked),
    )  # fmt: skip


def _passes_groups(spec: Attention, masked: bool) -> bool:
    """transformers leaves grouped heads to SDPA only without a mask (integrations/sdpa_attention.py use_gqa_in_sdpa)."""
    equal = spec.v_head_dim in (0, spec.head_dim) and spec.head_dim <= 256
    return spec.num_kv_heads != spec.num_heads and equal and not masked


def _attend(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention kernel that the settings, the dtypes and the GPU select."""
    eng = step.eng
    arg = (q, k, v)
    if spec.sinks and (step.train.attention == "eager" or not spec.sdpa):
        out = _eager_sinks(step, spec, q, k, v)
    elif step.train.attention == "eager" or (step.train.attention == "sdpa" and not spec.sdpa):
        out = _eager(step, spec, q, k, v)
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
    del arg
    return out


def _broadcasts_heads(step: Step, spec: Attention) -> bool:
    """Falcon hands SDPA one key/value head beside many query heads; no fused kernel takes that (sdp_utils.cpp)."""
    own_classes = step.train.untied_head  # litgpt's own modules expand the heads instead
    return step.model.model_type == "falcon" and spec.num_kv_heads == 1 and not own_classes


def _math(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA's math kernel: scaled copies of q and broadcast k, v, whole scores, softmax in their dtype."""
    eng = step.eng
    arg = (q, k, v)
    source = q.dtype
    scores_numel = step.batch * spec.num_heads * step.seq * step.seq
    flops = 2.0 * scores_numel * spec.head_dim
    mask = eng.empty(step.seq * step.seq, q.dtype, "attention_mask")
    groups = spec.num_heads // spec.num_kv_heads
    q, k, v = (ops.cast(eng, t, FP32, "attention_fp32") for t in (q, k, v))  # 16-bit inputs are computed in fp32
    scaled = ops.scale(eng, q, "attention")
    keys, values = ops.expand_copy(eng, k, groups), ops.expand_copy(eng, v, groups)
    scores = ops.bmm(eng, scaled, ops.scale(eng, keys, "attention"), scores_numel, flops, "scores")
    scores = ops.add(eng, scores, mask, "scores", scores_numel)
    probs = ops.softmax_same(eng, scores, writes_product=step.arch.softmax_backward_product)
    del scores, mask
    returned = ops.unary(eng, probs, "probabilities", source)
    out = ops.bmm(eng, probs, values, step.tokens * spec.q_size, flops, "attention")
    out = ops.cast(eng, out, source, "attention")
    del arg, returned, scaled, keys, values
    return ops.contiguous(eng, out, "attention")


def _flash_dtype(step: Step) -> str:
    """transformers casts fp32 q, k, v for flash attention to the autocast or the stored dtype."""
    if step.autocast:
        return step.autocast
    return step.train.base_dtype if step.train.base_dtype != FP32 else step.train.quantization.compute_dtype


def _attention_flops(step: Step, spec: Attention) -> Size:
    """Causal scores and values: 2 products of b*H*s*s*d, half of them masked away."""
    v_dim = spec.v_head_dim or spec.head_dim
    window = spec.sliding_window
    keys = step.seq if not window or hasattr(step.seq, "shape") else min(window, step.seq)
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
    """Memory-efficient attention: key/value heads are repeated first where SDPA does not take groups; a 4-D mask is
    kept as attention bias."""
    eng = step.eng
    masked = step.mask is not None or needs_window_mask(step, spec)
    kv_heads = spec.num_kv_heads
    arg = (k, v)
    if not _passes_groups(spec, masked):
        groups, kv_heads = spec.num_heads // spec.num_kv_heads, spec.num_heads
        k, v = ops.expand_copy(eng, k, groups), ops.expand_copy(eng, v, groups)
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


def _eager(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """eager_attention_forward: whole score matrices, softmax in fp32, cast back."""
    eng = step.eng
    groups = spec.num_heads // spec.num_kv_heads
    values = q.dtype
    k, v = ops.expand_copy(eng, k, groups), ops.expand_copy(eng, v, groups)
    if spec.scores_fp32:
        q, k = ops.cast(eng, q, FP32, "scores_fp32"), ops.cast(eng, k, FP32, "scores_fp32")
    scores_numel = step.batch * spec.num_heads * step.seq * step.seq
    v_dim = spec.v_head_dim or spec.head_dim
    flops = 2.0 * scores_numel * spec.head_dim
    scores = ops.bmm(eng, q, k, scores_numel, flops, "scores")
    scores = ops.scale(eng, scores, "scores")
    if spec.logit_softcap:
        scores = ops.scale(eng, ops.pointwise(eng, ops.scale(eng, scores, "scores"), "tanh", False), "scores")
    if step.mask is not None:
        scores = ops.add(eng, scores, step.mask, "scores", scores_numel)
    inside = step.arch.fused_softmax_cast and cuda_rules.softmax_casts_inside(scores.dtype, FP32)
    product = step.arch.softmax_backward_product
    probs = ops.softmax_fp32(eng, scores, casts_inside=inside, writes_product=product)
    del scores
    probs = ops.cast(eng, probs, values, "probabilities")
    if spec.dropout:
        probs = ops.dropout(eng, probs, DROPOUT, "attention_dropout")
    out = ops.bmm(eng, probs, v, step.tokens * spec.num_heads * v_dim, 2.0 * scores_numel * v_dim, "attention")
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
    flops = 2.0 * scores_numel * spec.head_dim
    scores = ops.scale(eng, ops.bmm(eng, q, k, scores_numel, flops, "scores"), "scores")
    assert step.mask is not None
    scores = ops.add(eng, scores, step.mask, "scores", scores_numel)
    sink = eng.empty(rows, scores.dtype, "scores")
    wide = ops.cat_half(eng, scores, sink, "scores")
    index = eng.empty(rows, INT64, "scores")
    wide = ops.add(eng, wide, eng.empty(rows, wide.dtype, "scores"), "scores", wide.numel)
    probs = ops.softmax_same(eng, wide, writes_product=step.arch.softmax_backward_product)
    kept = ops.narrow(eng, probs, scores_numel, "scores_grad")
    out = ops.bmm(eng, kept, v, step.tokens * spec.q_size, flops, "attention")
    held = ops.contiguous(eng, out, "attention")
    del out, index, wide, scores, probs, kept
    return held


# --- feed-forward --------------------------------------------------------------------------------------------------


def mlp(step: Step, held: LayerWeights, spec: Mlp, x: Tensor) -> Tensor:
    """Feed-forward module: gated (separate or fused gate and up) or plain."""
    eng, t = step.eng, step.tokens
    arg = x
    if not spec.gated:
        hidden = _activate(step, spec, linears.forward(step, held.linears[spec.up.name], x))
    elif spec.gate is not None and step.train.kernels in ("liger", "unsloth"):
        hidden = _fused_swiglu(step, held, spec, x)
    elif spec.gate is not None:
        gate = _activate(step, spec, linears.forward(step, held.linears[spec.gate.name], x))
        up = linears.forward(step, held.linears[spec.up.name], x)
        hidden = ops.mul(eng, gate, up, "mlp")
        del gate, up
    else:
        fused = linears.forward(step, held.linears[spec.up.name], x)
        gate, up = ops.split(eng, fused, (t * spec.intermediate_size, t * spec.intermediate_size))
        hidden = ops.mul(eng, up, _activate(step, spec, gate), "mlp")
        del fused, gate, up
    out = linears.forward(step, held.linears[spec.down.name], hidden)
    del arg, hidden
    return out


def _fused_swiglu(step: Step, held: LayerWeights, spec: Mlp, x: Tensor) -> Tensor:
    """LigerSiLUMulFunction: keeps gate and up outputs only; the backward writes their gradients over them."""
    eng = step.eng
    assert spec.gate is not None
    gate = linears.forward(step, held.linears[spec.gate.name], x)
    up = linears.forward(step, held.linears[spec.up.name], x)
    out = ops.unary(eng, up, "mlp")
    eng.link(out, (gate, up), lambda node, grads: [node.saved[0].view(), node.saved[1].view()], (gate, up))
    return out


def _activate(step: Step, spec: Mlp, x: Tensor) -> Tensor:
    """The activation function: one fused kernel, or the written-out forms of older models."""
    eng = step.eng
    arg = x
    if spec.activation == "gelu_new":  # NewGELUActivation: 0.5 * x * (1 + tanh(c * (x + 0.044715 * x^3)))
        cube = ops.pointwise(eng, ops.autocast_fp32(eng, x), "gelu_new")
        inner = ops.scale(eng, ops.add(eng, x, ops.scale(eng, cube, "gelu_new"), "gelu_new"), "gelu_new")
        del cube
        curve = ops.shift(eng, ops.pointwise(eng, inner, "gelu_new", False), "gelu_new")
        del inner
        out = ops.mul(eng, ops.scale(eng, x, "gelu_new"), curve, "gelu_new")
    elif spec.activation == "relu2":  # torch.square is on autocast's fp32 list: the result is fp32 there
        out = ops.square(eng, ops.pointwise(eng, x, "relu", False))
    elif spec.activation == "xielu":
        out = _xielu(step, x)
    else:
        out = ops.pointwise(eng, x, spec.activation, spec.activation != "relu")
    del arg
    return out


def _xielu(step: Step, x: Tensor) -> Tensor:
    """XIELUActivation._xielu_python: both branches are computed whole, expm1 in fp32 under autocast."""
    eng = step.eng
    positive = ops.add(eng, ops.pointwise(eng, ops.scale(eng, x, "xielu"), "xielu"), ops.scale(eng, x, "xielu"), "xielu")
    condition = eng.empty(x.numel, "int8", "xielu")
    least = ops.pointwise(eng, x, "xielu")
    curve = ops.pointwise(eng, ops.autocast_fp32(eng, least), "xielu", False)
    negative = ops.scale(eng, ops.add(eng, curve, x, "xielu"), "xielu")
    negative = ops.add(eng, negative, ops.scale(eng, x, "xielu"), "xielu")
    dtype = ops.promote(positive.dtype, negative.dtype)
    out = eng.empty(x.numel, dtype, "xielu")

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [ops.unary(eng, ops._grad(grads), "xielu_grad"), ops.unary(eng, ops._grad(grads), "xielu_grad")]

    eng.link(out, (positive, negative), backward, (condition,))
    return out


def experts(step: Step, held: LayerWeights, spec: Experts, x: Tensor) -> Tensor:
    """A mixture of experts: router, sorted tokens, grouped products, weighted sum (integrations/moe.py)."""
    eng, t = step.eng, step.tokens
    arg = x
    pairs = t * (spec.num_experts if spec.every_token else spec.top_k)
    weights = _route(step, held, spec, x)
    order = eng.empty(2 * pairs, INT64, "router")
    chosen = _gather_tokens(step, x, pairs * spec.hidden_size)
    gate_up = _adapted_parameter(step, held, spec.gate_up_name, held.experts[0])
    down = _adapted_parameter(step, held, spec.down_name, held.experts[1])
    fused = _grouped(step, chosen, gate_up, pairs, 2 * spec.intermediate_size, spec.hidden_size, spec.bias)
    gate, up = ops.split(eng, fused, (pairs * spec.intermediate_size, pairs * spec.intermediate_size))
    del fused
    hidden = _gate_experts(step, spec, gate, up)
    del gate, up
    out = _grouped(step, hidden, down, pairs, spec.hidden_size, spec.intermediate_size, spec.bias)
    del hidden
    weighted = ops.mul(eng, out, weights, "experts")
    del out
    result = _sum_pairs(step, weighted, t * spec.hidden_size, x.dtype)
    del weighted, order, chosen
    if spec.shared is not None:
        shared = mlp(step, held, spec.shared, x)
        if spec.shared_gate is not None:
            logits = linears.forward(step, held.linears[spec.shared_gate.name], x)
            shared = ops.mul(eng, ops.pointwise(eng, logits, "sigmoid", False), shared, "experts")
        result = ops.add(eng, result, shared, "experts")
    del arg
    return result


def _gate_experts(step: Step, spec: Experts, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up; gpt_oss clamps both and writes its swish out."""
    eng = step.eng
    if spec.activation != "clamped_swiglu":
        return ops.mul(eng, ops.pointwise(eng, gate, spec.activation), up, "experts")
    gate = ops.pointwise(eng, gate, "clamp")
    up = ops.pointwise(eng, up, "clamp")
    glu = ops.mul(eng, gate, ops.pointwise(eng, ops.scale(eng, gate, "experts"), "sigmoid", False), "experts")
    return ops.mul(eng, ops.shift(eng, up, "experts"), glu, "experts")


def _adapted_parameter(step: Step, held: LayerWeights, name: str, weight: Tensor) -> Tensor:
    """baddbmm(weight, B, A) over all experts, made whole in every forward (peft lora.ParamWrapper, factors proxy)."""
    pair = next((p for key, p in held.expert_adapters.items() if key.endswith(name)), None)
    if pair is None:
        return weight
    eng = step.eng
    a, b = (ops.cast(eng, t, weight.dtype, "lora_factor") for t in pair)
    rank = step.train.lora.r if step.train.lora else 1
    numels, dtype, flops = (b.numel, a.numel), weight.dtype, 2.0 * weight.numel * rank

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        eng.kernel("bmm", dtype, 2 * ops._grad(grads).nbytes, 2 * flops)
        return [eng.empty(numels[0], dtype, "lora_b_grad"), eng.empty(numels[1], dtype, "lora_a_grad")]

    made = eng.begin((b, a), backward, (a, b))
    out = eng.empty(weight.numel, weight.dtype, "lora_weight")
    eng.kernel("bmm", dtype, 2 * out.nbytes, flops)
    eng.finish(made, out)
    return out


def _route(step: Step, held: LayerWeights, spec: Experts, x: Tensor) -> Tensor:
    """Router logits, softmax in fp32, the top-k weights."""
    eng, t = step.eng, step.tokens
    if spec.router_is_linear:
        logits = linears.forward(step, held.linears[spec.router.name], x)
    else:
        assert held.router is not None
        source = ops.cast(eng, x, FP32, "router") if spec.router_fp32 else x
        weight = ops.cast(eng, held.router, FP32, "router") if spec.router_fp32 else held.router
        logits = ops.linear(eng, source, weight, t, spec.num_experts, spec.hidden_size, op="router")
    probs = ops.softmax_fp32(eng, logits, casts_inside=False, writes_product=True)
    top = eng.empty(t * spec.top_k, FP32, "router")
    index = eng.empty(t * spec.top_k, INT64, "router")
    full = probs.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [eng.empty(full, FP32, "router_grad")]

    eng.link(top, (probs,), backward, (index,))
    if spec.activation == "clamped_swiglu":  # gpt_oss keeps its router in the model's dtype
        return ops.cast(eng, top, x.dtype, "router")
    return top


def _gather_tokens(step: Step, x: Tensor, numel: Size) -> Tensor:
    """hidden_states[perm // top_k]: a copy per chosen expert; the backward scatters into zeros."""
    eng = step.eng
    out = eng.empty(numel, x.dtype, "experts")
    eng.kernel("elementwise", x.dtype, 2 * out.nbytes)
    small = x.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [eng.empty(small, ops._grad(grads).dtype, "experts_grad")]

    eng.link(out, (x,), backward)
    return out


def _grouped(step: Step, x: Tensor, weight: Tensor, rows: Size, n: int, k: int, bias: bool = False) -> Tensor:
    """torch._grouped_mm over experts: like a linear, one product per expert; a bias is gathered per row first."""
    eng = step.eng
    x = ops.autocast_half(eng, x)
    w = ops.autocast_half(eng, weight, cache=True)
    gathered = eng.empty(rows * n, x.dtype, "experts") if bias else None
    out = eng.empty(rows * n, x.dtype, "experts")
    flops = ops.matmul_flops(rows, n, k)
    eng.kernel("matmul", x.dtype, x.nbytes + w.nbytes + out.nbytes, flops)
    del gathered
    need_x, need_w = x.requires_grad, w.requires_grad
    x_numel, w_numel, dtype = x.numel, w.numel, x.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        eng.kernel("matmul", dtype, ops._grad(grads).nbytes, flops * (int(need_x) + int(need_w)))
        return [
            eng.empty(x_numel, dtype, "experts_grad") if need_x else None,
            eng.empty(w_numel, dtype, "weight_grad") if need_w else None,
        ]

    saved = ((x,) if need_w else ()) + ((w,) if need_x else ())
    eng.link(out, (x, w), backward, saved)
    return out


def _sum_pairs(step: Step, x: Tensor, numel: Size, dtype: str) -> Tensor:
    """Undo the sort and sum each token's experts: an index copy, then a reduction."""
    eng = step.eng
    unsorted = ops.unary(eng, x, "experts")
    eng.link(unsorted, (x,), lambda node, grads: [ops.unary(eng, ops._grad(grads), "experts_grad")])
    out = eng.empty(numel, x.dtype, "experts")
    eng.kernel("reduce", x.dtype, unsorted.nbytes + out.nbytes)
    eng.link(out, (unsorted,), lambda node, grads: [ops._grad(grads).view(unsorted_numel)])
    unsorted_numel = unsorted.numel
    del unsorted
    return ops.cast(eng, out, dtype, "experts")


# --- the layer -----------------------------------------------------------------------------------------------------


def decoder_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """One decoder layer: norms, attention, feed-forward, residuals in the class's order."""
    spec = held.spec
    arg = x
    out = _parallel_layer(step, held, x) if spec.parallel else _sequential_layer(step, held, x)
    del arg
    return out


def _layer_norm(step: Step, held: LayerWeights, spec: Norm | None, x: Tensor) -> Tensor:
    return x if spec is None else norm(step, spec, held.norms[spec.name], x, step.tokens)


def _feed_forward(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    if held.spec.experts is not None:
        return experts(step, held, held.spec.experts, x)
    assert held.spec.mlp is not None
    return mlp(step, held, held.spec.mlp, x)


def _branch(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """What happens to a branch's output before the addition."""
    if held.spec.hidden_dropout:
        x = ops.dropout(step.eng, x, DROPOUT, "hidden_dropout")
    return ops.scale(step.eng, x, "residual") if held.spec.residual_multiplier else x


def _sequential_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    eng, spec = step.eng, held.spec
    late = spec.norm_after_residual
    residual = x
    x = x if late else _layer_norm(step, held, spec.input_norm, x)
    x = attention(step, held, x)
    x = _layer_norm(step, held, spec.post_attention_norm, x)
    x = ops.add(eng, residual, _branch(step, held, x), "residual")
    if late:
        x = _layer_norm(step, held, spec.input_norm, x)
    residual = x
    x = x if late else _layer_norm(step, held, spec.pre_mlp_norm, x)
    x = _feed_forward(step, held, x)
    x = _layer_norm(step, held, spec.post_mlp_norm, x)
    x = ops.add(eng, residual, _branch(step, held, x), "residual")
    return _layer_norm(step, held, spec.pre_mlp_norm, x) if late else x


def _parallel_layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    eng, spec = step.eng, held.spec
    residual = x
    normed = _layer_norm(step, held, spec.input_norm, x)
    attended = _branch(step, held, attention(step, held, normed))
    second = normed if spec.pre_mlp_norm is None else _layer_norm(step, held, spec.pre_mlp_norm, x)
    fed = _branch(step, held, _feed_forward(step, held, second))
    out = ops.add(eng, ops.add(eng, fed, attended, "residual"), residual, "residual")
    del normed, second
    return out
