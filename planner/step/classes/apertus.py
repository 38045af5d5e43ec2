"""Apertus (models/apertus/modeling_apertus.py): the xIELU activation (activations.py)."""

from __future__ import annotations

from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, Grads, Node, Tensor
from planner.step.habits import Habits


def _xielu(step: Step, x: Tensor) -> Tensor:
    """XIELUActivation._xielu_python: both branches are computed whole, expm1 in fp32 under autocast."""
    eng = step.eng
    dtype = FP32 if eng.autocast else step.unquantized_dtype  # softplus of the parameters is on autocast's fp32 list
    alpha_p, alpha_n = eng.empty(1, dtype, "xielu"), eng.empty(1, dtype, "xielu")
    alpha_p.requires_grad = alpha_n.requires_grad = eng.grad_enabled and step.train.method == "full"
    condition = eng.empty(x.numel, "int8", "xielu")
    squared = ops.mul(eng, ops.mul(eng, alpha_p, x, "xielu"), x, "xielu")
    positive = ops.add(eng, squared, ops.scale(eng, x, "xielu"), "xielu")
    del squared
    curve = ops.expm1(eng, ops.minimum(eng, x, "xielu"), "xielu")
    negative = ops.mul(eng, ops.subtract(eng, curve, x, "xielu"), alpha_n, "xielu")
    del curve
    negative = ops.add(eng, negative, ops.scale(eng, x, "xielu"), "xielu")
    dtype = ops.promote(positive.dtype, negative.dtype)
    out = eng.empty(x.numel, dtype, "xielu")

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [ops.unary(eng, ops._grad(grads), "xielu_grad"), ops.unary(eng, ops._grad(grads), "xielu_grad")]

    eng.link(out, (positive, negative), backward, (condition,))
    return out


HABITS = {"apertus": Habits(activation=_xielu)}
