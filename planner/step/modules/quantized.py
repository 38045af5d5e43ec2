"""Quantized linear layers: what bitsandbytes and GPTQ make and keep."""

from __future__ import annotations

from planner.device import cuda_rules
from planner.model.spec import Linear
from planner.model.storage import quantized_bytes
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP16, FP32, ITEMSIZE, Grads, Node, Size, Storage, Tensor
from planner.step.modules.weights import LinearWeights
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import QuantizationSpec

FUSED_4BIT = (0, 50)
"""bitsandbytes release whose forward is one gemm_4bit operation (autograd/_functions.py)."""

KEEPS_NO_INPUT = (0, 43)
"""Before (and in 0.43.0): MatMul4Bit keeps its input in ctx.tensors (autograd/_functions.py 0.41.1, 0.42.0)."""


def _quantized(step: Step, spec: Linear, quant: QuantizationSpec) -> list[Tensor]:
    """What is kept of a weight; bitsandbytes gets it whole, on the GPU, and leaves holes in the cache behind.

    Source: functional.py quantize_4bit: the weight, its scales, the packed weight; nested: scales less their mean.
    """
    eng = step.eng
    whole: list[Tensor] = []
    if QUANTIZATIONS[quant.kind].packed_4bit and not step.arch.on_cpu:
        whole.append(eng.read(spec.weight_elements, step.train.base_dtype, "loading"))
        if quant.double_quant:
            scales = cuda_rules.absmax_blocks(spec.weight_elements)
            whole += [eng.empty(scales, FP32, "loading"), eng.empty(scales, FP32, "loading")]
    packed = [eng.empty(n, "int8", f"weight_{part}") for part, n in quantized_bytes(spec, quant)]
    return step.owned_together(packed, spec.name)


def _forward_4bit(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """bitsandbytes Linear4bit.forward: compute dtype in, matmul_4bit, input dtype out."""
    eng, spec, train = step.eng, held.spec, step.train
    arg = x
    source = x.dtype
    x = ops.cast(eng, x, train.quantization.compute_dtype, "compute_dtype_cast")
    n, k = spec.out_features, spec.in_features
    nested = train.quantization.double_quant
    weights = spec.weight_elements
    release = train.versions.bitsandbytes
    if release < FUSED_4BIT:
        work = _dequantize_first(step, held, x.dtype)
    else:
        work = [eng.workspace(size, "dequantize") for size in step.arch_4bit_forward(m, n, k, ITEMSIZE[x.dtype])]
    if work:
        eng.kernel("dequantize", x.dtype, weights // 2 + sum(w.nbytes for w in work), count=3 if nested else 1)
    out = eng.empty((m, n), x.dtype, "linear_4bit")
    eng.matmul("matmul", x.dtype, m, n, k)
    del work
    dtype, numel = x.dtype, x.numel

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        grad = ops._grad(grads)
        # functional.dequantize_4bit: absmax in fp32 (plus its in-place offset), then the weight in its load dtype
        work = [eng.workspace(4 * cuda_rules.absmax_blocks(weights), "dequantize")] if nested else []
        weight = eng.empty(weights, held.dtype, "dequantize")
        eng.kernel("dequantize", held.dtype, weights // 2 + weight.nbytes, count=3 if nested else 1)
        del work
        if held.dtype != grad.dtype:
            weight = ops.unary(eng, weight, "dequantize", grad.dtype)
        result = eng.empty(numel, grad.dtype, "linear_4bit_grad")
        eng.matmul("matmul", dtype, m, k, n, layout="nn")
        del weight
        return [result]

    if release < KEEPS_NO_INPUT:
        step.kept_inputs[id(x.storage)] = (eng.layer, x.storage.nbytes)
    eng.link(out, (x,), backward, (x,) if release < KEEPS_NO_INPUT else (), hooked=False)
    converted = ops.cast(eng, out, source, "input_dtype_cast")
    del x, out, arg  # names of the module's frame
    return converted


def _dequantize_first(step: Step, held: LinearWeights, dtype: str) -> list[Storage]:
    """Releases before 0.50 dequantize in Python for any number of rows: absmax first, then the weight alone."""
    eng, n = step.eng, held.spec.weight_elements
    nested = step.train.quantization.double_quant
    absmax = eng.workspace(4 * cuda_rules.absmax_blocks(n), "dequantize") if nested else None
    weight = eng.workspace(n * ITEMSIZE[held.dtype], "dequantize")
    del absmax
    if held.dtype != dtype:
        weight = eng.workspace(n * ITEMSIZE[dtype], "dequantize")
    return [weight]


def _forward_8bit(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """MatMul8bitLt: int8 copy of the input, int8 product; keeps the input; backward dequantizes the weight."""
    eng, spec = step.eng, held.spec
    n, k = spec.out_features, spec.in_features
    if not step.arch.int8_kernels:
        return _forward_8bit_cpu(step, held, x, m)
    half = ops.unary(eng, x, "int8_input_cast", FP16) if x.dtype != FP16 else x
    quantized = eng.empty(x.numel, "int8", "int8_quantize")
    scales = eng.empty(m, FP32, "int8_quantize")
    del half
    product = eng.workspace(m * n * 4, "int8_product")
    # int8_scaled_mm writes fp16, then casts inside itself (backends/cuda/ops.py)
    out = eng.empty((m, n), FP16, "linear_8bit" if x.dtype == FP16 else "int8_product")
    if x.dtype != FP16:
        out = ops.unary(eng, out, "linear_8bit", x.dtype)
    eng.kernel("int8_quantize", FP16, 5 * x.numel)  # a row is read for its maximum, then again
    eng.matmul("matmul", "int8", m, n, k)
    eng.kernel("int8_dequantize", FP16, m * n * 6)
    if held.bias is not None and held.bias.dtype != FP16:  # not fused into that kernel (backends/cuda/ops.py)
        eng.indexed(FP16, m * n * 4, ops.MIXED * m * n)
    del product, quantized, scales
    numel, dtype = x.numel, x.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [_backward_8bit(step, spec, (numel, m), dtype)]

    eng.link(out, (x,), backward, (x,), hooked=False)
    return out


def _backward_8bit(step: Step, spec: Linear, sizes: tuple[Size, Size], dtype: str) -> Tensor:
    """The input's gradient, given its elements and rows: the weight is dequantized in two passes, then one product."""
    eng, (numel, m) = step.eng, sizes
    weight = _dequantize_8bit(step, spec, dtype)
    result = eng.empty(numel, dtype, "linear_8bit_grad")
    eng.matmul("matmul", dtype, m, spec.in_features, spec.out_features, layout="nn")
    del weight
    return result


def _dequantize_8bit(step: Step, spec: Linear, dtype: str) -> Tensor:
    """CB.to(dtype).mul_(scales)."""
    elements = spec.weight_elements
    weight = step.eng.empty(elements, dtype, "dequantize")
    step.eng.indexed(dtype, elements + weight.nbytes, elements)  # a conversion and a broadcast product, both of torch
    step.eng.indexed(dtype, 2 * weight.nbytes, ops.MIXED * elements)
    return weight


def _forward_8bit_cpu(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """MatMul8bitFp, bitsandbytes' function on CPUs: the weight is dequantized for the forward product too."""
    eng, spec = step.eng, held.spec
    numel, dtype = x.numel, x.dtype
    weight = _dequantize_8bit(step, spec, dtype)
    product = eng.autocast or dtype
    if product != dtype:
        x, weight = ops.unary(eng, x, "autocast", product), ops.unary(eng, weight, "autocast_weight", product)
    out = eng.empty((m, spec.out_features), product, "linear_8bit")
    eng.matmul("matmul", product, m, spec.out_features, spec.in_features)
    del weight

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [_backward_8bit(step, spec, (numel, m), dtype)]

    eng.link(out, (x,), backward, (x,), hooked=False)
    return out


def _forward_gptq(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """GPTQ/AWQ linear in training: the weight is dequantized to fp16 for the product, forward and backward."""
    eng, spec = step.eng, held.spec
    n, k = spec.out_features, spec.in_features
    source = x.dtype
    target = eng.autocast or step.train.quantization.compute_dtype
    x = ops.cast(eng, x, target, "compute_dtype_cast")
    weight = eng.empty(spec.weight_elements, x.dtype, "dequantize")
    out = eng.empty((m, n), x.dtype, "linear_gptq")
    eng.kernel("dequantize", x.dtype, spec.weight_elements // 2 + weight.nbytes, count=2)
    eng.matmul("matmul", x.dtype, m, n, k)
    del weight
    numel, dtype = x.numel, x.dtype

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        weight = eng.empty(spec.weight_elements, dtype, "dequantize")
        eng.kernel("dequantize", dtype, spec.weight_elements // 2 + weight.nbytes, count=2)
        result = eng.empty(numel, dtype, "linear_gptq_grad")
        eng.matmul("matmul", dtype, m, k, n, layout="nn")
        del weight
        return [result]

    eng.link(out, (x,), backward, hooked=False)
    return ops.cast(eng, out, source, "input_dtype_cast") if not eng.autocast else out
