"""First-generation Qwen: modeling_qwen.py comes with the checkpoint, and this file follows it where it differs."""

from __future__ import annotations

from planner.device import cuda_rules
from planner.model.spec import Attention
from planner.step import layers, ops
from planner.step.context import Step
from planner.step.engine import FP32, ITEMSIZE, Grads, Node, Size, Tensor
from planner.step.habits import NEVER, Habits
from planner.step.modules import attention, positions
from planner.step.modules.weights import LayerWeights

LOGN_POSITIONS = 32767
"""Elements of the logn_tensor buffer that every attention holds."""
MASK_ALIGNMENT = 16
"""SDPA pads a mask whose rows are no multiple of this (ATen/native/transformers/attention.cpp preprocess_mask)."""
SPREADS_BEFORE_PADDING = (2, 2)
"""Before: it expands the mask to all heads first, so the padded copy is written out for each of them (v2.1)."""


def _aligned(length: Size) -> bool:
    return bool(length % MASK_ALIGNMENT == 0)


def _layer(step: Step, held: LayerWeights, x: Tensor) -> Tensor:
    """QWenBlock.forward: the usual order, but every result keeps a name until the layer returns."""
    eng, spec = step.eng, held.spec
    normed = layers.layer_norm(step, held, spec.input_norm, x)
    attended = attention.attention(step, held, normed)
    summed = ops.add(eng, attended, x, "residual")
    normed = layers.layer_norm(step, held, spec.pre_mlp_norm, summed)
    fed = layers.feed_forward(step, held, normed)
    out = ops.add(eng, summed, fed, "residual")
    del normed, attended, fed
    return out


def _rotary_buffers(step: Step) -> list[Tensor]:
    """RotaryEmbedding caches cos and sin of twice the longest row so far."""
    width = step.model.attentions()[0].head_dim
    return [step.eng.empty(2 * step.seq * width, FP32, "rotary_tables") for _ in range(2)]


def _logn(step: Step) -> Tensor:
    return step.eng.empty(LOGN_POSITIONS, step.train.base_dtype, "weight")


def _tables(step: Step, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The part of the cached tables that the row needs."""
    numel = step.seq * step.model.attentions()[0].head_dim
    return buffers[0].view(numel), buffers[1].view(numel)


def _turn(step: Step, x: Tensor, rotated: Size, rest: Size, tables: tuple[Tensor, Tensor]) -> Tensor:
    """apply_rotary_pos_emb in fp32; what is not rotated is appended even where that is nothing."""
    eng = step.eng
    source = x.dtype
    x = ops.cast(eng, x, FP32, "rotary")
    if step.train.attention == "flash2":
        return ops.cast(eng, _triton_rotary(step, x), source, "rotary")
    full = x
    x = ops.narrow(eng, full, rotated)
    kept = ops.narrow(eng, full, rest)
    del full
    out = ops.cat_half(eng, positions.turned(step, x, tables), kept, "rotary")
    return ops.cast(eng, out, source, "rotary")


def _triton_rotary(step: Step, x: Tensor) -> Tensor:
    """flash-attn's ApplyRotaryEmb out of place: a new tensor; the backward clones the gradient first (2.3.4)."""
    eng = step.eng
    out = ops.unary(eng, x, "rotary")

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        cloned = ops.unary(eng, ops._grad(grads), "rotary_grad")
        return [ops.unary(eng, cloned, "rotary_grad")]

    eng.link(out, (x,), backward)
    return out


def _attend(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """QWenAttention with flash-attn, or with what torch has."""
    return (_unpadded_flash if step.train.attention == "flash2" else _own_mask)(step, spec, q, k, v)


def _unpadded_flash(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashSelfAttention of modeling_qwen.py: more than one row is packed for the kernel and spread out again.

    Trainers always pass an attention mask, so rows are packed even where none is shorter.
    """
    eng = step.eng
    arg = (q, k, v)
    several = step.batch > 1
    if several:
        k, q, v = (ops.scale(eng, t, "unpad") for t in (k, q, v))
    out = attention.flash(step, spec, q, k, v)
    if several:
        out = ops.scale(eng, out, "pad")
    del arg
    return out


def _own_mask(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
    out = attention.fused_attention(
        eng, q, k, v, out_shape=(step.batch * step.seq, spec.q_size), logsumexp_numel=rows,
        workspace_bytes=sum(n for _, n in buffers), flops=attention.attention_flops(step, spec, masked=True),
        op="efficient_attention", mask=bias,
    )  # fmt: skip
    del arg, causal, mask, bias
    return out


HABITS = {
    "qwen": Habits(
        layer=_layer,
        makes_buffers=_rotary_buffers,
        makes_layer_buffer=_logn,
        layer_buffer_first=True,
        gives_tables=_tables,
        turn=_turn,
        splits_heads=False,
        attend=_attend,
        up_first=True,  # QWenMLP: a1 * silu(a2)
        upcasts_since=NEVER,  # QWenLMHeadModel.forward
        always_shifts=True,
        slices_hidden_since=NEVER,
    )
}
