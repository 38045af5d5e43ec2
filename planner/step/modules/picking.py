"""Operations that pick or bound elements: indexing, maxima, clamps (forms as in planner.step.ops)."""

from __future__ import annotations

from planner.step import ops
from planner.step.engine import INT64, Engine, Grads, Node, Size, Tensor


def gather(eng: Engine, x: Tensor, index: Tensor, numel: Size, op: str) -> Tensor:
    """Indexing by a tensor or a list: a copy; saves the index, the backward puts rows into zeros."""
    full = x.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [scattered(eng, ops._grad(grads), full, f"{op}_grad")]

    made = eng.begin((x,), backward, (index,))
    out = eng.empty(numel, x.dtype, op)
    eng.kernel("elementwise", x.dtype, 2 * out.nbytes)
    eng.finish(made, out)
    return out


def scattered(eng: Engine, grad: Tensor, numel: Size, op: str) -> Tensor:
    """Rows put into zeros: out of place under a dispatch mode (FunctionsManual.cpp index_backward)."""
    zeros = eng.empty(numel, grad.dtype, op)
    return zeros if eng.accumulates_in_place else ops.unary(eng, zeros, op)


def subtract_maximum(eng: Engine, x: Tensor, rows: Size, op: str) -> Tensor:
    """x - x.max(-1, keepdim=True).values: the maximum's gradient is a whole tensor of zeros with one entry a row."""
    full, dtype = x.numel, x.dtype
    most, index = eng.empty(rows, dtype, op), eng.empty(rows, INT64, op)
    eng.kernel("reduce", dtype, x.nbytes + most.nbytes)

    def maximum_backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [scattered(eng, ops._grad(grads), full, f"{op}_grad")]

    eng.link(most, (x,), maximum_backward, (index,))
    return ops.subtract(eng, x, most, op)


def clamp(eng: Engine, x: Tensor, bounds: int) -> Tensor:
    """x.clamp(...) with one bound or two: saves x; the backward makes a mask of bools for each."""

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        masks = [eng.empty(ops._grad(grads).numel, "int8", "clamp_grad") for _ in range(bounds)]
        return [ops._last(ops.unary(eng, ops._grad(grads), "clamp_grad"), *masks)]

    made = eng.begin((x,), backward, (x,))
    out = ops.unary(eng, x, "clamp")
    eng.finish(made, out)
    return out


def clamp_in_place(eng: Engine, x: Tensor) -> Tensor:
    """x.clamp_(low, high): keeps a copy of what x was."""
    kept = ops.unary(eng, x, "clamp") if eng.needs_grad(x) else x
    eng.kernel("elementwise", x.dtype, 2 * x.nbytes)

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        masks = [eng.empty(ops._grad(grads).numel, "int8", "clamp_grad") for _ in range(2)]
        return [ops._last(ops.unary(eng, ops._grad(grads), "clamp_grad"), *masks)]

    out = x.view()
    eng.link(out, (x,), backward, (kept,))
    return out
