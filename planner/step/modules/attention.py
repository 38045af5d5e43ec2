"""Self-attention: projections, positions, and the kernel that settings, dtypes and GPU select.

The order of calls and the lifetimes of local names follow transformers 5.23 and 5.24 (models/*/modeling_*.py).
"""

from __future__ import annotations

from collections.abc import Callable

from planner.base.records import replace
from planner.device import cuda_rules
from planner.model.spec import Attention, Norm
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, INT64, ITEMSIZE, Dimensions, Engine, Grads, Node, Size, Tensor
from planner.step.modules import eager, fused_lora, linears, picking, positions
from planner.step.modules.feed_forward import Finish
from planner.step.modules.norms import norm
from planner.step.modules.weights import LayerWeights, LinearWeights
from planner.training.losses import KERNEL_SETS

BOOLEAN_MASKS_SINCE = (4, 53)
"""Since: SDPA gets a mask of bools (masking_utils.py); before, one to add, in the dtype of the embedding's output
(modeling_attn_mask_utils.py, _update_causal_mask of the models)."""
COPIES_FOR_SDPA_BEFORE = (4, 56)
"""Before: SDPA got contiguous copies of q, k, v (integrations/sdpa_attention.py), in classes that call that function
(`Habits.copies_for_sdpa_since`)."""


def attention(step: Step, held: LayerWeights, x: Tensor, finish: Finish | None = None) -> Tensor:
    """Self-attention module: projections, positions, kernel, output projection; `finish` is what follows inside it."""
    return mixed(step, held, x, _project, finish)


def mixed(step: Step, held: LayerWeights, x: Tensor, project: Project, finish: Finish | None) -> Tensor:
    """Attention of any kind, given how it projects its input."""
    spec = _heads_after_projection(step, held.attention)
    arg = x
    named, q, k, v = project(step, held, spec, x)
    if _repeats_in_module(step, spec):
        k = eager.repeat_heads(step, spec, k)
        v = eager.repeat_heads(step, spec, v)
        spec = replace(spec, num_kv_heads=spec.num_heads)
    out, names = _attend(step, spec, q, k, v, x.dtype)
    last = held.linears[spec.output.name]
    result = (
        fused_lora.fused_lora(step, [last], out)[0] if _fuses_lora(step, [last]) else linears.forward(step, last, out)
    )
    if finish is not None:
        result = finish(result)
    del arg, out, named, q, k, v, names  # names of the module's frame
    return result


def _heads_after_projection(step: Step, spec: Attention) -> Attention:
    """A class that copies every key/value head to its query heads does so before anything else."""
    if step.habits.expands_heads and 1 < spec.num_kv_heads < spec.num_heads:
        return replace(spec, num_kv_heads=spec.num_heads)
    return spec


def _repeats_in_module(step: Step, spec: Attention) -> bool:
    """Whether q, k, v leave the projections of an old release with equally many heads."""
    train, habits = step.train, step.habits
    if train.versions.transformers >= habits.repeats_in_module_before or spec.kind == "mla":
        return False
    if spec.num_kv_heads == spec.num_heads or runs_eager(step, spec):
        return False
    return train.attention == "sdpa" or habits.repeats_for_flash


Projected = tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]
"""What the module's frame names to its end beside q, k, v; and those."""
Project = Callable[[Step, LayerWeights, Attention, Tensor], Projected]


def _project(step: Step, held: LayerWeights, spec: Attention, x: Tensor) -> Projected:
    """q, k, v from separate or fused projections, with their norms and rotary."""
    eng, habits = step.eng, step.habits
    t = x.rows(spec.projections[0].in_features)
    named: tuple[Tensor, ...] = ()
    sizes = ((t, spec.q_size), (t, spec.kv_size), (t, spec.kv_size))
    group = [held.linears[p.name] for p in spec.projections]
    if len(group) > 1 and _fuses_lora(step, group):
        q, k, v = fused_lora.fused_lora(step, group, x)
    elif len(spec.projections) == 1:
        fused = linears.forward(step, held.linears[spec.projections[0].name], x)
        if _caches_keys(step):
            step.cache.append((eng.layer, fused.view()))
        if spec.clips_qkv:
            fused = picking.clamp(eng, fused, 2)
        if habits.splits_projection is not None:
            q, k, v = habits.splits_projection(step, held.attention, fused)
            named = (fused,)
        else:
            q, k, v = ops.split(eng, fused, sizes)
        del fused
    else:
        late = spec.qk_norm_after_rope
        q = _by_heads(step, spec, linears.forward(step, group[0], x), spec.num_heads)
        q = _projected_norm(step, held, None if late else spec.q_norm, q)
        if habits.scales_query:
            q = ops.scale(eng, q, "query")
        k = _by_heads(step, spec, linears.forward(step, group[1], x), spec.num_kv_heads)
        k = _projected_norm(step, held, None if late else spec.k_norm, k)
        v = linears.forward(step, group[2], x)
        if spec.clips_qkv:
            q, k, v = (picking.clamp_in_place(eng, y) for y in (q, k, v))
    if len(group) == 1 and not spec.qk_norm_after_rope:
        q = _projected_norm(step, held, spec.q_norm, q)
        k = _projected_norm(step, held, spec.k_norm, k)
    if spec.position == "rope":
        if habits.rotate is not None:
            q, k, parts = habits.rotate(step, spec, q, k, v.dtype)
            named += parts
        else:
            if positions.tables_per_layer(step):
                step.cos_sin, kept = positions.layer_tables(step, spec, v.dtype)
                named += kept
            q, k = positions.rotate(step, spec, q, k)
            if positions.tables_per_layer(step):
                step.cos_sin = None
    if spec.qk_norm_after_rope:
        q = _projected_norm(step, held, spec.q_norm, q)
        k = _projected_norm(step, held, spec.k_norm, k)
    return named, q, k, v


def _by_heads(step: Step, spec: Attention, x: Tensor, heads: int) -> Tensor:
    """A projection's output by heads, where rotate_half follows."""
    turns = spec.position == "rope" and step.habits.splits_heads
    if not turns or heads == 1 or KERNEL_SETS[step.train.kernels].fuses_rotary:
        return x
    return ops.split_heads(step.eng, x)


def _caches_keys(step: Step) -> bool:
    """Whether the outputs hold the keys and values of every layer until the loss is taken from them."""
    return step.train.versions.transformers < step.habits.caches_before and not step.backward_began


def _fuses_lora(step: Step, group: list[LinearWeights]) -> bool:
    """fms replaces a group of quantized projections by one function when every one of them is adapted."""
    fused = KERNEL_SETS[step.train.kernels].fuses_lora and step.habits.fuses_lora
    return fused and all(held.lora and held.kind != "none" and held.dora is None for held in group)


def _projected_norm(step: Step, held: LayerWeights, spec: Norm | None, x: Tensor) -> Tensor:
    """q_norm / k_norm over heads or over the whole projection."""
    if spec is None:
        return x
    return norm(step, spec, held.norms[spec.name], x)


def needs_window_mask(step: Step, spec: Attention) -> bool:
    """Whether SDPA gets a 4-D mask for a sliding window: the length reaches the window (masking_utils.py)."""
    if not spec.sliding_window or step.train.attention != "sdpa":
        return False
    return bool(step.seq >= spec.sliding_window)


def always_masks(step: Step) -> bool:
    """Whether the class asks for a 4-D mask of bools where SDPA's causal flag would do."""
    return step.train.attention == "sdpa" and step.train.versions.transformers >= step.habits.always_masks_since


def hands_on_mask(step: Step) -> bool:
    """Whether the model makes an additive mask for SDPA though nothing is padded."""
    return step.train.attention == "sdpa" and step.train.versions.transformers < step.habits.hands_on_mask_before


def takes_boolean_mask(step: Step) -> bool:
    """Whether SDPA's mask is one of bools, not one to add."""
    return step.train.versions.transformers >= BOOLEAN_MASKS_SINCE and not hands_on_mask(step)


def sdpa_kernel(step: Step, spec: Attention, dtype: str) -> cuda_rules.SdpaKernel:
    """The kernel torch's scaled_dot_product_attention picks (planner.device.cuda_rules.sdpa_kernel)."""
    if not step.arch.sdpa_kernels:
        return "flash"  # a CPU has one fused kernel, for every dtype and mask (cpu/FlashAttentionKernel.cpp)
    if _broadcasts_heads(step, spec):
        return "math"
    masked = _masked(step, spec)
    return cuda_rules.sdpa_kernel(
        dtype, has_mask=masked, head_dim=spec.head_dim, v_head_dim=spec.v_head_dim or spec.head_dim, arch=step.arch,
        grouped=_passes_groups(step, spec, masked),
    )  # fmt: skip


def _passes_groups(step: Step, spec: Attention, masked: bool) -> bool:
    """transformers leaves grouped heads to SDPA only without a mask (sdpa_attention.py use_gqa_in_sdpa)."""
    if step.train.versions.transformers < step.habits.passes_groups_since:
        return False
    equal = spec.v_head_dim in (0, spec.head_dim) and spec.head_dim <= 256
    return spec.num_kv_heads != spec.num_heads and equal and not masked


def _attend(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> eager.Attended:
    """The attention kernel that the settings, the dtypes and the GPU select; `source`: dtype of the layer's input."""
    eng = step.eng
    arg = (q, k, v)
    names: tuple[Tensor, ...] = ()
    if step.habits.attend is not None:
        out = step.habits.attend(step, spec, q, k, v)
    elif runs_eager(step, spec):
        out, names = eager.eager(step, spec, q, k, v, source)
    else:
        copies, repeated = _copies_for_sdpa(step), False
        if _repeats_heads(step, spec):  # before autocast casts them (integrations/sdpa_attention.py)
            k, v = (eager.repeat_heads(step, spec, t, copies=copies) for t in (k, v))
            repeated, spec = True, replace(spec, num_kv_heads=spec.num_heads)
        if copies:
            q, k, v = _contiguous(step, spec, (q, k, v), repeated)
        named = (k, v)
        q, k, v = (ops.autocast_half(eng, t) for t in (q, k, v))
        if step.train.attention == "flash2":
            q, k, v = (ops.cast(eng, t, _flash_dtype(step), "flash_cast") for t in (q, k, v))
        by_heads = copies or (step.train.attention == "sdpa" and eager.leads_with_heads(step, spec))
        out = fused(step, spec, q, k, v, by_heads)
        del named
    del arg
    return out, names


def _copies_for_sdpa(step: Step) -> bool:
    """Whether SDPA gets contiguous copies of q, k and v."""
    called = step.train.attention == "sdpa" and step.arch.sdpa_kernels
    return called and step.habits.copies_for_sdpa_since <= step.train.versions.transformers < COPIES_FOR_SDPA_BEFORE


def _contiguous(
    step: Step, spec: Attention, parts: tuple[Tensor, Tensor, Tensor], repeated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v head by head; what was repeated or joined lies so already."""
    q, k, v = parts
    joined = eager.leads_with_heads(step, spec)
    if not joined:
        q = ops.contiguous(step.eng, q, "attention")
    if not (joined or repeated):
        k = ops.contiguous(step.eng, k, "attention")
    return q, k, v if repeated else ops.contiguous(step.eng, v, "attention")


def fused(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, by_heads: bool) -> Tensor:
    """FlashAttention where it is asked for, else the kernel that scaled_dot_product_attention picks.

    by_heads: q lies in memory head by head, and so does a flash kernel's output, which is then copied.
    """
    kernel = "flash" if step.train.attention == "flash2" else sdpa_kernel(step, spec, q.dtype)
    if kernel == "math":
        return _math(step, spec, q, k, v)
    if kernel == "efficient" or (kernel == "cudnn" and _masked(step, spec)):
        return _efficient(step, spec, q, k, v, "cudnn_attention" if kernel == "cudnn" else "efficient_attention")
    arg = q, k, v
    out = flash(step, spec, q, k, v, "cudnn_attention" if kernel == "cudnn" else "flash_attention")
    if by_heads:
        out = ops.contiguous(step.eng, out, "attention")
    del arg
    return out


def _repeats_heads(step: Step, spec: Attention) -> bool:
    """Whether SDPA gets key/value heads repeated to all query heads; falcon calls it with what it has."""
    if step.train.attention != "sdpa" or not step.arch.sdpa_kernels or spec.num_kv_heads == spec.num_heads:
        return False
    return not _broadcasts_heads(step, spec) and not _passes_groups(step, spec, _masked(step, spec))


def _masked(step: Step, spec: Attention) -> bool:
    """Whether SDPA gets a 4-D mask."""
    return step.mask is not None or needs_window_mask(step, spec) or always_masks(step)


def runs_eager(step: Step, spec: Attention) -> bool:
    """Whether whole score matrices are made: asked for, or the class has no other path."""
    chosen = step.train.attention
    return chosen == "eager" or (chosen == "sdpa" and not spec.has_sdpa(step.train.versions.transformers))


def _broadcasts_heads(step: Step, spec: Attention) -> bool:
    """Whether SDPA gets one key/value head beside many query heads; no fused kernel takes that (sdp_utils.cpp)."""
    return step.habits.expands_heads and spec.num_kv_heads == 1


def _math(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA's math kernel: scaled copies of q and broadcast k, v, whole scores, softmax in their dtype.

    SDPA is in autocast's own list, which rules autocast out for what is inside (ATen/autocast_mode.h WrapFunction_):
    products stay fp32.
    """
    with step.eng.autocasting(None):
        return ops.contiguous(step.eng, _math_product(step, spec, q, k, v), "attention")


def _math_product(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    eng = step.eng
    arg = (q, k, v)
    source = q.dtype
    scores_numel = step.batch * spec.num_heads * step.seq * step.seq
    score_shape, value_shape = eager.shapes(step, spec)
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
        probs = ops.dropout(eng, probs, eager.DROPOUT, "attention_dropout")
    returned = ops.unary(eng, probs, "probabilities", source)
    out = ops.bmm(eng, probs, values, value_shape, "attention")
    out = ops.cast(eng, out, source, "attention")
    del arg, returned, scaled, keys, values
    return out


def _flash_dtype(step: Step) -> str:
    """transformers casts fp32 q, k, v for flash attention to the autocast or the stored dtype."""
    if step.autocast:
        return step.autocast
    return step.train.base_dtype if step.train.base_dtype != FP32 else step.train.quantization.compute_dtype


ATTENTION_BACKWARD = 2.5
"""Products of a fused attention's backward over its forward's: scores anew, dV, dP, dQ, dK against two."""


def fused_attention(
    eng: Engine,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out_shape: Dimensions,
    logsumexp_numel: Size,
    workspace_bytes: Size,
    flops: Size,
    op: str,
    mask: Tensor | None = None,
    padding: float = 1.0,
) -> Tensor:
    """One fused attention kernel: saves q, k, v, output and logsumexp; dq, dk, dv and workspaces in backward.

    out_shape: rows, and what lies in each, padded where the kernel pads heads.
    padding: FLOPs that the kernel does over those that count.
    """
    out = eng.empty(out_shape, q.dtype, op)
    lse = eng.empty(logsumexp_numel, FP32, f"{op}_logsumexp")
    rng = eng.empty(2, INT64, f"{op}_rng")
    eng.kernel(op, q.dtype, q.nbytes + k.nbytes + v.nbytes + out.nbytes, flops, elements=flops * padding)
    saved = (q, k, v, out.view(), lse, rng) + ((mask,) if mask is not None else ())
    numels, dtype, written = (q.numel, k.numel, v.numel), q.dtype, out.nbytes

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        results: list[Tensor | None] = [eng.empty(n, dtype, f"{op}_grad") for n in numels]
        work = eng.workspace(workspace_bytes, f"{op}_workspace")
        moved = 2 * sum(n * ITEMSIZE[dtype] for n in numels) + 2 * written
        again = flops * ATTENTION_BACKWARD
        eng.kernel(f"{op}_backward", dtype, moved, again, count=3, elements=again * padding)
        del work
        return results

    eng.link(out, (q, k, v), backward, saved)
    return out


FLASH_HEADS = (32, 64, 96, 128, 192, 256)
"""Head sizes that FlashAttention-2 has kernels for (flash_attn/src/flash_fwd_launch_template.h); others are padded."""
CUDNN_HEADS = 64
"""cuDNN's kernels on Hopper take multiples of this (an H200 ran tiles of 128 for heads of 96)."""
MASKED_CUDNN = 1.3
"""How much longer cuDNN's kernel takes that reads a bias for every score (H200: 1.26 with heads of 128, 1.36 of 96)."""


def _padding(step: Step, spec: Attention, op: str, masked: bool = False) -> float:
    """FLOPs that a GPU's fused kernel does, its heads padded, over those that count."""
    size = spec.head_dim
    if step.arch.on_cpu:
        return 1.0
    if op == "cudnn_attention":
        return cuda_rules.round_up(size, CUDNN_HEADS) / size * (MASKED_CUDNN if masked else 1.0)
    if op == "flash_attention":
        return next((known for known in FLASH_HEADS if known >= size), size) / size
    return 1.0


def attention_flops(step: Step, spec: Attention, masked: bool = False) -> Size:
    """Causal scores and values: 2 products of b*H*s*s*d, half of them left out; with a `masked` tensor none is.

    A window as long as the row is none (transformers 5.24 modeling_flash_attention_utils.py: key_length > window).
    """
    v_dim = spec.v_head_dim or spec.head_dim
    window = 0 if masked else spec.sliding_window
    cut = bool(window) and window < step.seq
    keys = window if cut else step.seq
    share = 1.0 if cut or masked else 0.5
    return 2.0 * step.batch * step.seq * keys * spec.num_heads * (spec.head_dim + v_dim) * share


def flash(
    step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, op: str = "flash_attention"
) -> Tensor:  # fmt: skip
    """FlashAttention-2: keeps q, k, v, output and logsumexp; so does cuDNN's kernel."""
    b, s, heads = step.batch, step.seq, spec.num_heads
    rule = cuda_rules.flash_backward_workspace if op == "flash_attention" else cuda_rules.cudnn_backward_workspace
    buffers = rule(b, s, s, heads, spec.num_kv_heads, spec.head_dim)
    return fused_attention(
        step.eng, q, k, v, out_shape=(b * s, spec.q_size), logsumexp_numel=b * heads * s,
        workspace_bytes=sum(n for _, n in buffers), flops=attention_flops(step, spec), op=op,
        padding=_padding(step, spec, op),
    )  # fmt: skip


def _efficient(
    step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, op: str = "efficient_attention"
) -> Tensor:  # fmt: skip
    """Memory-efficient attention, and cuDNN's with a mask: a 4-D mask is kept as a bias."""
    eng = step.eng
    masked, kv_heads = _masked(step, spec), spec.num_kv_heads
    mask: Tensor | None = None
    if masked and step.mask is not None and step.habits.alibi_in_mask and spec.position == "alibi":
        mask = ops.cast(eng, step.mask, q.dtype, "attention_bias")  # ALiBi is in it: a bias already
    elif masked and step.mask is not None and not takes_boolean_mask(step):
        mask = ops.cast(eng, step.mask, q.dtype, "attention_bias")
    elif masked:  # the bool mask becomes an additive bias in q's dtype, written out for every row of the batch
        mask = eng.empty(step.batch * step.seq * step.seq, q.dtype, "attention_bias")
    v_dim = spec.v_head_dim or spec.head_dim
    b, s, heads = step.batch, step.seq, spec.num_heads
    buffers = cuda_rules.efficient_backward_workspace(b, s, s, heads, kv_heads, spec.head_dim, ITEMSIZE[q.dtype])
    rows = cuda_rules.round_up(s, 32)
    if op == "cudnn_attention":
        buffers, rows = cuda_rules.cudnn_backward_workspace(b, s, s, heads, kv_heads, spec.head_dim), s
    return fused_attention(
        eng, q, k, v, out_shape=(b * s, heads * v_dim), logsumexp_numel=b * heads * rows,
        workspace_bytes=sum(n for _, n in buffers), flops=attention_flops(step, spec, masked), op=op, mask=mask,
        padding=_padding(step, spec, op, masked),
    )  # fmt: skip
