"""The head and the loss: whole logits (with or without the fp32 upcast), chunks, or a fused kernel."""

from __future__ import annotations

from planner.step import linears, ops
from planner.step.context import Step
from planner.step.engine import FP32, ITEMSIZE, Engine, Grads, Node, Size, Tensor
from planner.step.linears import LinearWeights


def head_and_loss(step: Step, head: LinearWeights, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the loss and the logits the caller can still reach (None when they never exist whole)."""
    if step.train.loss == "fused":
        return _fused_linear_cross_entropy(step, head, hidden), None
    if step.train.loss == "chunked":
        return _chunked(step, head, hidden), None
    return _full_logits(step, head, hidden)


def _full_logits(step: Step, head: LinearWeights, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """ForCausalLMLoss of transformers: logits of every position, one cross entropy."""
    eng, model, train = step.eng, step.model, step.train
    logits = linears.forward(step, head, hidden)
    if model.logit_scale:
        logits = ops.scale(eng, logits, "logits_scale")
    if model.logit_softcap:
        logits = ops.scale(eng, logits, "logits_softcap")
        logits = ops.scale(eng, ops.pointwise(eng, logits, "logits_softcap", False), "logits_softcap")
    if train.kernels in ("unsloth", "fms-fused") and train.loss == "full-logits":
        return _triton_cross_entropy(step, logits), logits
    if train.loss == "full-logits":
        return ops.cross_entropy(eng, logits, step.tokens), logits
    upcast = ops.cast(eng, logits, FP32, "logits_fp32")
    if train.versions.transformers < (4, 45):  # the upcast took the place of the 16-bit logits in the outputs
        logits = upcast
    if train.versions.transformers < (4, 49):  # shift_logits = logits[..., :-1, :].contiguous()
        upcast = ops.contiguous(eng, upcast, "logits_shifted")
    return ops.cross_entropy(eng, upcast, step.tokens), logits


def _triton_cross_entropy(step: Step, logits: Tensor) -> Tensor:
    """unsloth's kernel (also in fms): reads 16-bit logits, keeps them, writes the gradient over them."""
    eng = step.eng
    loss_rows = eng.empty(step.tokens, FP32, "loss")
    lse = eng.empty(step.tokens, FP32, "loss")
    eng.kernel("softmax", logits.dtype, logits.nbytes)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [node.saved[0].view()]

    loss = eng.empty(1, FP32, "loss")
    eng.link(loss, (logits,), backward, (logits, lse))
    del loss_rows
    return loss


def fused_chunk_rows(tokens: Size, vocab: int, hidden: int) -> Size:
    """Rows of a chunk of Liger's fused linear cross entropy (liger_kernel/ops/fused_linear_cross_entropy.py).

    chunk = next_power_of_2(ceil(tokens / ceil(vocab / hidden)))
    """
    wanted = -(-tokens // -(-vocab // hidden))
    if hasattr(wanted, "shape"):
        import numpy as np

        return (2 ** np.ceil(np.log2(wanted))).astype(np.int64)
    return 1 << (int(wanted) - 1).bit_length()


def _fused_linear_cross_entropy(step: Step, head: LinearWeights, hidden: Tensor) -> Tensor:
    """Liger: per chunk 16-bit logits, whose storage becomes the gradient; the input's gradient exists whole."""
    eng, model = step.eng, step.model
    assert head.weight is not None
    hidden = ops.autocast_half(eng, hidden)
    weight = ops.autocast_half(eng, head.weight)
    t, h, v = step.tokens, model.hidden_size, model.vocab_size
    grad_input = eng.empty(t * h, hidden.dtype, "loss_input_grad")
    grad_weight = eng.empty(v * h, FP32 if step.autocast else weight.dtype, "weight_grad") if weight.requires_grad else None
    losses = eng.empty(t, FP32, "loss")
    rows = fused_chunk_rows(t, v, h)
    chunk = eng.empty(rows * v, hidden.dtype, "logits_chunk")
    eng.kernel("matmul", hidden.dtype, 3 * t * h * ITEMSIZE[hidden.dtype], 2 * ops.matmul_flops(t, v, h))
    product = eng.empty(rows * h, hidden.dtype, "logits_chunk")
    del chunk, product
    loss = eng.empty(1, FP32, "loss")
    del losses

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        saved = list(node.saved)
        return [saved[0].view(), saved[1].view() if len(saved) > 1 else None]

    saved = (grad_input,) if grad_weight is None else (grad_input, grad_weight)
    eng.link(loss, (hidden, weight), backward, saved)
    return loss


CHUNKS = 8
"""Chunks of torchtune's CEWithChunkedOutputLoss and of the generic chunked loss."""


def _chunked(step: Step, head: LinearWeights, hidden: Tensor) -> Tensor:
    """Logits in chunks along the tokens: 16-bit logits exist whole, the fp32 softmax only per chunk.

    Every chunk's log_softmax stays for its backward (torchtune loss/ce_chunked_output_loss.py, litgpt
    chunked_cross_entropy): the saving is the missing whole fp32 upcast.
    """
    eng, v = step.eng, step.model.vocab_size
    logits = linears.forward(step, head, hidden)
    rows = -(-step.tokens // CHUNKS)
    parts = _chunk_views(eng, logits, rows * v)
    total: Tensor | None = None
    for part in parts:
        loss = ops.cross_entropy(eng, ops.cast(eng, part, FP32, "logits_fp32"), rows)
        total = loss if total is None else ops.add(eng, total, loss, "loss")
    assert total is not None
    return total


def _chunk_views(eng: Engine, logits: Tensor, numel: Size) -> list[Tensor]:
    return ops.split(eng, logits, [numel] * CHUNKS, "logits_grad")
