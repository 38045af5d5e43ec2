"""Eager attention: whole score matrices, as the classes write them.

Most classes call one `eager_attention_forward`; some write theirs into the module's forward (`Habits.eager`), whose
frame names what it made until the output projection has run. Every function returns the attention's output and those
names. Order of calls and lifetimes: transformers 5.23 and 5.24 (models/*/modeling_*.py).
"""

from __future__ import annotations

from planner.device import cuda_rules
from planner.model.spec import Attention
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, Grads, Node, Shape, Tensor
from planner.step.modules import picking

DROPOUT = 0.1
"""The p of dropouts a class applies unless its config says 0; only whether it is 0 matters for memory."""

Attended = tuple[Tensor, tuple[Tensor, ...]]
"""An attention's output, and what the module's frame still names while the output projection runs."""


def eager(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor, source: str) -> Attended:
    """The eager attention of the model's class; `source`: dtype of the attention module's input."""
    if spec.sinks:
        return _with_sinks(step, spec, q, k, v), ()
    if step.habits.eager is not None:
        return step.habits.eager(step, spec, q, k, v, source)
    return standard(step, spec, q, k, v), ()


def shapes(step: Step, spec: Attention) -> tuple[Shape, Shape]:
    """Batched products of a whole score matrix: q k^T and probabilities times v, for every row and head."""
    matrices, s = step.batch * spec.num_heads, step.seq
    return (matrices, s, s, spec.head_dim), (matrices, s, spec.v_head_dim or spec.head_dim, s)


def standard(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """eager_attention_forward: whole score matrices, softmax in fp32, cast back."""
    eng = step.eng
    groups = spec.num_heads // spec.num_kv_heads
    values = q.dtype
    arg = (q, k, v)
    heads_first = leads_with_heads(step, spec)
    # a single head stays expanded until something copies it: autocast's cast does
    copied = groups > 1 and (spec.num_kv_heads > 1 or eng.autocast not in (None, values))
    k, v = repeat_heads(step, spec, k), repeat_heads(step, spec, v)
    if spec.scores_fp32:
        q, k = ops.cast(eng, q, FP32, "scores_fp32"), ops.cast(eng, k, FP32, "scores_fp32")
    scores_numel = step.batch * spec.num_heads * step.seq * step.seq
    scores = score_product(step, spec, q, k, (heads_first, copied or (heads_first and groups == 1)))
    if spec.scores_fp32 and not step.habits.names_score_casts:
        del q, k
    scores = ops.scale(eng, scores, "scores")
    if spec.logit_softcap:
        scores = ops.scale(eng, ops.pointwise(eng, ops.scale(eng, scores, "scores"), "tanh", False), "scores")
    if masks_by_buffer(step):
        scores = _where(step, scores)
    if step.mask is not None:
        scores = ops.add(eng, scores, step.mask, "scores", scores_numel)
    names_dtype = not step.habits.keeps_scores_dtype or step.autocast is not None
    probs = softmax_of(step, scores, FP32 if names_dtype else scores.dtype)
    probs = ops.cast(eng, probs, values, "probabilities")  # attn_weights names the scores until this is assigned
    del scores
    if spec.dropout:
        probs = ops.dropout(eng, probs, DROPOUT, "attention_dropout")
    keep_probabilities(step, probs)
    step.unused_probabilities = probs
    out = value_product(step, spec, probs, v, copied)
    held = ops.contiguous(eng, out, "attention")
    del out, arg
    return held


def causal_mask(step: Step) -> Tensor:
    """A causal mask [positions, positions] of bools, a buffer."""
    return step.eng.empty(step.model.max_position_embeddings**2, "int8", "weight")


def mask_buffer(step: Step) -> Tensor | None:
    """That mask in a layer of the releases whose layers hold one (`Habits.mask_buffers_before`)."""
    return causal_mask(step) if masks_by_buffer(step) else None


def masks_by_buffer(step: Step) -> bool:
    """Whether the class takes the causal mask from a buffer (torch.where in _attn)."""
    return step.train.versions.transformers < step.habits.mask_buffers_before


def adds_mask(step: Step) -> bool:
    """Whether the model makes a mask of every pair of tokens to add to the scores."""
    return not masks_by_buffer(step) or step.train.versions.transformers >= step.habits.adds_mask_since


def _where(step: Step, scores: Tensor) -> Tensor:
    """torch.where(buffer, scores, minimum): a new tensor, whose gradient is masked into another."""
    eng = step.eng
    out = ops.unary(eng, scores, "scores")
    eng.link(out, (scores,), lambda node, grads: [ops.unary(eng, ops._grad(grads), "scores_grad")])
    return out


def score_product(step: Step, spec: Attention, q: Tensor, k: Tensor, heads_first: tuple[bool, bool]) -> Tensor:
    """torch.matmul(q, k^T): autocast casts the right side first, then both are folded."""
    right = ops.autocast_half(step.eng, k)
    left = ops.autocast_half(step.eng, q)
    folded = fold(step, left, heads_first[0]), fold(step, right, heads_first[1])
    return ops.bmm(step.eng, *folded, shapes(step, spec)[0], "scores", "nt")


def value_product(step: Step, spec: Attention, probs: Tensor, v: Tensor, heads_first: bool = False) -> Tensor:
    """torch.matmul(probs, v)."""
    right = ops.autocast_half(step.eng, v)
    left = ops.autocast_half(step.eng, probs)
    return ops.bmm(step.eng, left, fold(step, right, heads_first), shapes(step, spec)[1], "attention")


def keep_probabilities(step: Step, probs: Tensor) -> None:
    """A class whose layer returns the probabilities holds them beside its output."""
    if step.train.versions.transformers >= step.habits.returns_probabilities_since:
        step.probabilities = probs


def softmax_of(step: Step, scores: Tensor, dtype: str) -> Tensor:
    """F.softmax(scores, dtype=dtype); a cast from 16 bit to fp32 happens inside the CUDA kernel."""
    eng, product = step.eng, step.arch.softmax_backward_product
    if dtype == FP32:
        inside = step.arch.fused_softmax_cast and cuda_rules.softmax_casts_inside(scores.dtype, FP32)
        return ops.softmax_fp32(eng, scores, casts_inside=inside, writes_product=product)
    return ops.softmax_same(eng, ops.cast(eng, scores, dtype, "softmax_cast"), writes_product=product)


def _with_sinks(step: Step, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One more column of scores for the sinks, the row maximum subtracted, softmax in the scores' dtype."""
    eng = step.eng
    groups = spec.num_heads // spec.num_kv_heads
    k, v = ops.expand_copy(eng, k, groups), ops.expand_copy(eng, v, groups)
    rows = step.batch * spec.num_heads * step.seq
    scores_numel = rows * step.seq
    score_shape, value_shape = shapes(step, spec)
    scores = ops.scale(eng, ops.bmm(eng, q, k, score_shape, "scores", "nt"), "scores")
    assert step.mask is not None
    scores = ops.add(eng, scores, step.mask, "scores", scores_numel)
    wide = ops.cat_half(eng, scores, eng.empty(rows, scores.dtype, "scores"), "scores")
    wide = picking.subtract_maximum(eng, wide, rows, "scores")
    probs = ops.softmax_same(eng, wide, writes_product=step.arch.softmax_backward_product)
    kept = ops.cast(eng, ops.narrow(eng, probs, scores_numel, "scores_grad"), v.dtype, "probabilities")
    del scores  # attn_weights names them until the probabilities take the name
    step.unused_probabilities = kept
    out = ops.bmm(eng, kept, v, value_shape, "attention")
    held = ops.contiguous(eng, out, "attention")
    del out, wide, probs, kept
    return held


# --- heads and their layout ----------------------------------------------------------------------------------------


def leads_with_heads(step: Step, spec: Attention) -> bool:
    """Whether q and k lie in memory head by head, not token by token as their projection wrote them.

    Partial rotary positions end in a torch.cat, whose result is contiguous as [batch, heads, tokens, size]; q * cos
    keeps the projection's layout. Flash attention's output lies as q does and is then copied back (flash_api.cpp
    mha_fwd: empty_like).
    """
    partial = spec.position == "rope" and 0 < spec.rotary_dim < spec.head_dim
    partial = (partial and not step.habits.rotates_tokens_first) or _joins_nothing(step, spec)
    return spec.kind == "mla" or partial


def _joins_nothing(step: Step, spec: Attention) -> bool:
    whole = spec.position == "rope" and spec.rotary_dim in (0, spec.head_dim)
    return whole and joins_what_is_not_rotated(step)


def joins_what_is_not_rotated(step: Step) -> bool:
    """Whether the class appends the part that is not rotated whatever its size."""
    return step.train.versions.transformers >= step.habits.joins_nothing_since


def broadcast(step: Step, x: Tensor, factor: int) -> Tensor:
    """expand() of a single head: a view; its gradient is summed over the heads."""
    out = x.view(x.numel * factor)
    small, eng = x.numel, step.eng

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [eng.empty(small, ops._grad(grads).dtype, "expand_grad")]

    eng.link(out, (x,), backward)
    return out


def repeat_heads(step: Step, spec: Attention, x: Tensor, *, copies: bool = False) -> Tensor:
    """repeat_kv: expand and reshape; the reshape of a single head is a view (unless `copies`), of several a copy."""
    groups = spec.num_heads // spec.num_kv_heads
    if groups > 1:
        x = ops.colons(step.eng, x, 4)  # hidden_states[:, :, None, :, :]
    if spec.num_kv_heads == 1 and groups > 1 and not copies:
        return broadcast(step, x, groups)
    return ops.expand_copy(step.eng, x, groups)


def fold(step: Step, x: Tensor, heads_first: bool) -> Tensor:
    """torch.matmul folds batch and heads into one dimension: a copy of what lies token by token, if rows are many."""
    copies = not heads_first and step.batch > 1
    return ops.contiguous(step.eng, x, "matmul_copy") if copies else x
