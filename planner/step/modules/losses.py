"""The head and the loss: whole logits (with or without the fp32 upcast), chunks, or a fused kernel.

What is kept differs between releases of transformers; the comments name the release. Sizes per token: V vocabulary.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

from planner.base.polynomials import next_power_of_two
from planner.base.records import Rows
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, ITEMSIZE, Engine, Grads, Node, Size, Tensor
from planner.step.modules import linears
from planner.step.modules.weights import LinearWeights
from planner.training.losses import KERNEL_SETS, LOSSES, Logits

SHIFTS_BY_COPY = (4, 49)
"""Before: the loss copies logits[..., :-1, :].contiguous(); since then the labels are padded (loss/loss_utils.py)."""


def _slices_hidden(step: Step) -> bool:
    return step.train.versions.transformers >= step.habits.slices_hidden_since


def head_and_loss(step: Step, head: LinearWeights, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the logits the caller can still reach (none when they never exist whole)."""
    logits = LOSSES[step.train.loss].logits
    if _slices_hidden(step):
        hidden = ops.colons(step.eng, hidden, 3)
    return _BY_LOGITS[logits](step, head, hidden)


def _full_logits(step: Step, head: LinearWeights, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The causal-LM loss of transformers: logits of every position, one cross entropy."""
    eng, model, train = step.eng, step.model, step.train
    release = train.versions.transformers
    logits = linears.forward(step, head, hidden)
    if model.logit_scale:
        logits = ops.scale(eng, logits, "logits_scale")
    if model.logit_softcap:
        logits = ops.scale(eng, logits, "logits_softcap")
        logits = ops.scale(eng, ops.pointwise(eng, logits, "logits_softcap", False), "logits_softcap")
    upcasts = release >= step.habits.upcasts_since and (
        LOSSES[train.loss].upcasts or KERNEL_SETS[train.kernels].upcasts_logits
    )
    wide = ops.cast(eng, logits, FP32, "logits_fp32") if upcasts else logits
    if upcasts and release < step.habits.upcasts_in_forward_before:
        logits = wide
    source = wide
    if release < SHIFTS_BY_COPY or step.habits.always_shifts:
        source = _all_but_last(step, wide, model.vocab_size, "logits")
        if step.batch != 1:  # one row is contiguous as it is
            source = ops.contiguous(eng, source, "logits_shifted")
    if KERNEL_SETS[train.kernels].loss_grad_in_place:
        loss = _triton_cross_entropy(step, source)
    else:
        loss = cross_entropy(eng, source, step.tokens)
    del wide, source
    return loss, [logits]


def _all_but_last(step: Step, x: Tensor, width: int, op: str) -> Tensor:
    """x[..., :-1, :]"""
    rows = step.batch * (step.seq - 1)
    return ops.colons(step.eng, ops.narrow(step.eng, x, rows * width, f"{op}_grad"), 1, f"{op}_grad")


def _triton_cross_entropy(step: Step, logits: Tensor) -> Tensor:
    """unsloth's kernel (also in fms): keeps the logits it was given and writes the gradient over them."""
    eng = step.eng
    rows = eng.empty(step.tokens, FP32, "loss")
    lse = eng.empty(step.tokens, FP32, "loss")
    eng.kernel("softmax", logits.dtype, logits.nbytes)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        eng.kernel("softmax", node.saved[0].dtype, 2 * node.saved[0].nbytes)
        return [node.saved[0].view()]

    loss = eng.empty(1, FP32, "loss")
    eng.link(loss, (logits,), backward, (logits, lse))
    del rows
    return loss


def fused_chunk_rows(tokens: Size, vocab: int, hidden: int) -> Size:
    """Rows of a chunk of Liger's fused linear cross entropy: next_power_of_2(ceil(tokens / ceil(vocab / hidden))).

    Source: liger_kernel/ops/fused_linear_cross_entropy.py.
    """
    return next_power_of_two(-(-tokens // -(-vocab // hidden)))


FUSED_CHUNK_BYTES = 8
"""Bytes per logit of a chunk at the worst moment: old gradient 2, new 16-bit logits 2, their fp32 copy 4."""


def _fused_linear_cross_entropy(step: Step, head: LinearWeights, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Liger: logits exist a chunk at a time and become their gradient in place; the input's gradient exists whole."""
    eng, model = step.eng, step.model
    hidden = ops.autocast_half(eng, hidden)
    weight = ops.autocast_half(eng, linears.plain_weight(step, head, hidden.dtype))
    h, v = model.hidden_size, model.vocab_size
    t = step.batch * (step.seq - 1)
    shifted = ops.contiguous(eng, _all_but_last(step, hidden, h, "loss_input"), "loss_input")
    grad_input = eng.empty(t * h, hidden.dtype, "loss_input_grad")
    grad_weight = eng.empty(v * h, weight.dtype, "weight_grad") if weight.requires_grad else None
    losses = eng.empty(t, FP32, "loss")
    rows = fused_chunk_rows(t, v, h)
    chunk = eng.workspace(rows * v * FUSED_CHUNK_BYTES, "logits_chunk")
    chunks = t / rows
    eng.matmul("matmul", hidden.dtype, rows, v, h, chunks)
    eng.kernel("softmax", FP32, t * v * (3 * ITEMSIZE[hidden.dtype] + 2 * ITEMSIZE[FP32]), count=2 * chunks)
    eng.matmul("matmul", hidden.dtype, rows, h, v, chunks)
    if grad_weight is not None:
        eng.matmul("matmul", hidden.dtype, v, h, rows, chunks)
    product = eng.empty(rows * h, hidden.dtype, "logits_chunk")
    del chunk, product
    loss = eng.empty(1, FP32, "loss")
    del losses

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        saved = list(node.saved)
        return [saved[0].view(), saved[1].view() if len(saved) > 1 else None]

    saved = (grad_input,) if grad_weight is None else (grad_input, grad_weight)
    eng.link(loss, (shifted, weight), backward, saved)
    return loss, []


CHUNKS = 8
"""torchtune's CEWithChunkedOutputLoss num_output_chunks (loss/ce_chunked_output_loss.py)."""


def _chunked(step: Step, head: LinearWeights, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits in chunks along the tokens: 16-bit logits exist whole, the fp32 copy only per chunk.

    Every chunk's log_softmax stays for its backward. With outputs_to_fp32 (litgpt under Fabric) every chunk is
    converted to fp32 before the loss and the caller keeps the list.
    """
    eng, v, train = step.eng, step.model.vocab_size, step.train
    rows = -(-step.tokens // CHUNKS)
    parts = [linears.head_chunk(step, head, hidden, rows, CHUNKS) for _ in range(CHUNKS)]
    if train.outputs_to_fp32:
        parts = [ops.cast(eng, part, FP32, "outputs_to_fp32") for part in parts]
    total: Tensor | None = None
    for part in parts:
        loss = _chunk_loss(step, part, rows)
        total = loss if total is None else ops.add(eng, total, loss, "loss")
    assert total is not None
    del part, v
    return total, parts if train.keeps_outputs else []


def _chunk_loss(step: Step, part: Tensor, rows: Size) -> Tensor:
    """One chunk's cross entropy; a compiled loss keeps the 16-bit logits and two numbers a row instead."""
    eng = step.eng
    if step.train.compile:
        return _triton_cross_entropy_rows(step, part, rows)
    return cross_entropy(eng, ops.cast(eng, part, FP32, "logits_fp32"), rows)


def _triton_cross_entropy_rows(step: Step, part: Tensor, rows: Size) -> Tensor:
    eng = step.eng
    stats = eng.empty(2 * rows, FP32, "loss")
    loss = eng.empty(1, FP32, "loss")
    eng.kernel("softmax", part.dtype, part.nbytes)
    eng.link(loss, (part,), lambda node, grads: [ops.unary(eng, node.saved[0], "logits_grad")], (part, stats))
    return loss


def cross_entropy(eng: Engine, logits: Tensor, tokens: Size) -> Tensor:
    """F.cross_entropy on [tokens, vocab] logits: log_softmax and nll_loss, both keep their input.

    cross_entropy names log_softmax's dtype itself, so CUDA autocast leaves 16-bit logits 16-bit there and casts only
    for nll_loss (ATen/native/LossNLL.cpp, autocast_mode.h fp32_set_opt_dtype).
    """
    dtype = logits.dtype
    log_probs = eng.empty(logits.numel, dtype, "log_softmax")
    eng.kernel("log_softmax", dtype, logits.nbytes + log_probs.nbytes)

    def softmax_backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = ops._grad(grads)
        out = eng.empty(grad.numel, grad.dtype, "log_softmax_grad")
        eng.kernel("log_softmax", grad.dtype, grad.nbytes + out.nbytes)
        return [out]

    eng.link(log_probs, (logits,), softmax_backward, (log_probs.view(),))
    picked = ops.cast(eng, log_probs, FP32, "nll_loss_cast") if eng.autocast else log_probs
    loss = eng.empty(1, picked.dtype, "loss")
    weight = eng.empty(1, picked.dtype, "loss")
    count, kind = picked.numel, picked.dtype

    def nll_backward(node: Node, grads: Grads) -> list[Tensor | None]:
        out = eng.empty(count, kind, "nll_loss_grad")
        eng.kernel("elementwise", kind, out.nbytes)
        return [out]

    eng.link(loss, (picked,), nll_backward, (picked, weight))
    return loss


_Computes = Callable[[Step, LinearWeights, Tensor], tuple[Tensor, list[Tensor]]]
_BY_LOGITS: Rows[_Computes] = Rows(
    "logits",
    typing.get_args(Logits),
    (("whole", _full_logits), ("chunks", _chunked), ("never", _fused_linear_cross_entropy)),
)
"""How each row of LOSSES is computed."""
