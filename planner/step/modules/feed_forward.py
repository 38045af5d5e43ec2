"""The feed-forward modules: gated and plain MLPs, their activations, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

from planner.model.spec import Mlp
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import Engine, Grads, Node, Tensor
from planner.step.modules import linears
from planner.step.modules.weights import LayerWeights
from planner.training.losses import KERNEL_SETS

Finish = Callable[[Tensor], Tensor]
"""What a module does with its result before it returns: adds the residual, in classes that hand it in."""


def mlp(step: Step, held: LayerWeights, spec: Mlp, x: Tensor, finish: Finish | None = None) -> Tensor:
    """Feed-forward module: gated (separate or fused gate and up) or plain."""
    eng = step.eng
    arg = x
    if not spec.gated:
        hidden = activate(step, spec, linears.forward(step, held.linears[spec.up.name], x))
    elif spec.gate is not None and KERNEL_SETS[step.train.kernels].fuses_swiglu:
        hidden = _fused_swiglu(step, held, spec, x)
    elif spec.gate is not None and step.habits.up_first:
        up = linears.forward(step, held.linears[spec.up.name], x)
        gate = linears.forward(step, held.linears[spec.gate.name], x)
        hidden = ops.mul(eng, up, activate(step, spec, gate), "mlp")
        out = linears.forward(step, held.linears[spec.down.name], hidden)
        del arg, hidden, up, gate  # names of the module's frame
        return out
    elif spec.gate is not None:
        gate = activate(step, spec, linears.forward(step, held.linears[spec.gate.name], x))
        up = linears.forward(step, held.linears[spec.up.name], x)
        hidden = ops.mul(eng, gate, up, "mlp")
        del gate, up
    else:
        fused = linears.forward(step, held.linears[spec.up.name], x)
        gate, up = ops.split(eng, fused, [(fused.rows(spec.up.out_features), spec.intermediate_size)] * 2)
        hidden = ops.mul(eng, up, activate(step, spec, gate), "mlp")
        del fused, gate, up
    out = linears.forward(step, held.linears[spec.down.name], hidden)
    if finish is not None:
        out = finish(out)
    del arg, hidden
    return out


def _fused_swiglu(step: Step, held: LayerWeights, spec: Mlp, x: Tensor) -> Tensor:
    """LigerSiLUMulFunction: keeps gate and up outputs only; the backward writes their gradients over them."""
    eng = step.eng
    assert spec.gate is not None
    gate = linears.forward(step, held.linears[spec.gate.name], x)
    up = linears.forward(step, held.linears[spec.up.name], x)
    out = ops.unary(eng, up, "mlp")

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = ops._grad(grads)
        eng.kernel("elementwise", grad.dtype, 5 * grad.nbytes)
        return [node.saved[0].view(), node.saved[1].view()]

    eng.link(out, (gate, up), backward, (gate, up))
    return out


def activate(step: Step, spec: Mlp, x: Tensor) -> Tensor:
    """The activation function: one fused kernel, or the forms that transformers writes out (activations.py)."""
    eng = step.eng
    arg = x
    written = spec.activation if step.habits.writes_out_activations else ""
    if step.habits.activation is not None:
        out = step.habits.activation(step, x)
    elif written == "gelu_new":  # NewGELUActivation: 0.5 * x * (1 + tanh(c * (x + 0.044715 * x^3)))
        half = ops.scale(eng, x, "gelu_new")
        curve = _new_curve(eng, x)
        out = ops.mul(eng, half, curve, "gelu_new")
        del half, curve
    elif written == "gelu_fast":  # FastGELUActivation: 0.5 * x * (1 + tanh(x * c * (1 + 0.044715 * x * x)))
        half, inner = ops.scale(eng, x, "gelu"), ops.scale(eng, x, "gelu")
        ratio = ops.shift(eng, ops.mul(eng, ops.scale(eng, x, "gelu"), x, "gelu"), "gelu")
        inner = ops.pointwise(eng, ops.mul(eng, inner, ratio, "gelu"), "gelu", False)
        del ratio
        out = ops.mul(eng, half, ops.shift(eng, inner, "gelu"), "gelu")
        del half, inner
    elif written == "gelu_python":  # GELUActivation: x * 0.5 * (1 + erf(x / sqrt(2)))
        half = ops.scale(eng, x, "gelu")
        out = ops.mul(eng, half, ops.shift(eng, ops.erf(eng, ops.scale(eng, x, "gelu"), "gelu"), "gelu"), "gelu")
        del half
    elif written == "quick_gelu":  # QuickGELUActivation: x * sigmoid(1.702 * x)
        out = ops.mul(eng, x, ops.pointwise(eng, ops.scale(eng, x, "gelu"), "gelu", False), "gelu")
    elif spec.activation == "relu2":  # torch.square is on autocast's fp32 list: the result is fp32 there
        out = ops.power(eng, ops.pointwise(eng, x, "relu", False), "relu2")
    else:
        out = ops.pointwise(eng, x, spec.activation, spec.activation != "relu")
    del arg
    return out


def _new_curve(eng: Engine, x: Tensor) -> Tensor:
    """1 + tanh(c * (x + 0.044715 * x^3)): no pass has a name, each dies when the next exists."""
    op = "gelu_new"
    cube = ops.scale(eng, ops.power(eng, x, op), op)
    inner = [ops.add(eng, x, cube, op)]
    del cube
    tanh = [ops.pointwise(eng, ops.scale(eng, inner.pop(), op), op, False)]
    return ops.shift(eng, tanh.pop(), op)
