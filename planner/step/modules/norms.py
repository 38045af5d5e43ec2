"""Normalisation modules as the classes write them: what they compute in fp32, keep and cast."""

from __future__ import annotations

from planner.model.spec import Norm
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP32, Grads, Node, Size, Tensor
from planner.training.losses import KERNEL_SETS


def norm(step: Step, spec: Norm, weights: tuple[Tensor | None, Tensor | None], x: Tensor) -> Tensor:
    """A normalisation module of the kind `spec` names, over x's vectors of `spec.size` elements."""
    arg = x
    rows = x.rows(spec.size)
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
    return KERNEL_SETS[step.train.kernels].fuses_norms


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
    cast = ops.cast(eng, x, source, "norm_cast")
    out = cast if weight is None else ops.mul(eng, weight, cast, "norm")
    del cast, x  # hidden_states names the fp32 result until the weight has multiplied
    return out


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
        if KERNEL_SETS[step.train.kernels].norm_grad_in_place:
            out = grad
            eng.kernel("norm", grad.dtype, 3 * grad.nbytes)
        else:
            out = ops.unary(eng, grad, "norm_grad")
        return [out, eng.empty(size, wtype, "norm_grad") if needs_weight else None]

    eng.link(out, (x, weight), backward, tuple(t for t in (x, inverse, weight) if t is not None))
    return out
