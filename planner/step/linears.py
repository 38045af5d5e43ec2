"""Linear modules: their weights as they lie on the GPU, the quantized and plain products, and the LoRA paths.

A `LinearWeights` is one module of one layer. The forward functions follow, line by line in what they allocate:
bitsandbytes nn/modules.py and autograd/_functions.py (0.50), peft tuners/lora/{layer,bnb,gptq,variants,dora}.py (0.21).
"""

from __future__ import annotations

import typing
from collections.abc import Callable

from planner.base.records import Rows
from planner.device import cuda_rules
from planner.model.spec import Layer, Linear
from planner.model.storage import is_quantized, quantized_bytes
from planner.quantizations import QUANTIZATIONS, Storing
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP16, FP32, ITEMSIZE, Grads, Node, Size, Storage, Tensor
from planner.training import LoraSpec, QuantizationSpec

FUSED_4BIT = (0, 50)
"""bitsandbytes release whose forward is one gemm_4bit operation (autograd/_functions.py)."""
KEEPS_NO_INPUT = (0, 43)
"""Before (and in 0.43.0): MatMul4Bit keeps its input in ctx.tensors (autograd/_functions.py 0.41.1, 0.42.0)."""


class LinearWeights:
    """The tensors of one linear module."""

    __slots__ = ("bias", "dora", "dtype", "kind", "lora", "packed", "rank", "spec", "state_bytes", "weight")

    def __init__(self, spec: Linear) -> None:
        self.spec = spec
        self.kind = "none"
        self.dtype = FP32
        self.weight: Tensor | None = None
        self.packed: list[Tensor] = []
        self.bias: Tensor | None = None
        self.lora: list[tuple[Tensor, Tensor, Size, Size]] = []
        """(A [r, in], B [out, r], rank, out) of each adapter on this module; several for fused slices."""
        self.rank: Size = 0
        self.dora: Tensor | None = None


class LayerWeights:
    """The tensors of one decoder layer, by module name."""

    __slots__ = ("buffer", "expert_adapters", "experts", "linears", "norms", "router", "spec")

    def __init__(self, spec: Layer) -> None:
        self.spec = spec
        self.linears: dict[str, LinearWeights] = {}
        self.norms: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.experts: list[Tensor] = []
        self.router: Tensor | None = None
        self.buffer: Tensor | None = None
        """What the class registers in every layer beside its parameters."""
        self.expert_adapters: dict[str, tuple[Tensor, Tensor]] = {}
        """Fused parameter -> its (A, B), stacked over the experts (peft lora.ParamWrapper)."""


def load_base(step: Step, spec: Linear, adapted: bool) -> LinearWeights:
    """Allocate a module's frozen (or, in full fine-tuning, trainable) weights."""
    eng, train = step.eng, step.train
    held = LinearWeights(spec)
    quant = train.quantization
    if is_quantized(spec, quant, adapted, step.habits.quantizes_subclasses):
        held.kind = quant.kind
        held.packed = _quantized(step, spec, quant)
    else:
        held.weight = step.weight(f"{spec.name}.weight", spec.weight_elements, spec.out_features + spec.in_features)
    held.dtype = FP16 if step.habits.halves_quantized and held.kind != "none" else train.base_dtype
    if spec.bias and QUANTIZATIONS[held.kind].packed_4bit:
        # Linear4bit's first forward leaves it in the compute dtype (bitsandbytes nn/modules.py)
        held.bias = eng.parameter(spec.out_features, train.quantization.compute_dtype, "weight")
    elif spec.bias:
        held.bias = step.weight(f"{spec.name}.bias", spec.out_features)
    return held


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
    return [eng.empty(n, "int8", f"weight_{name}") for name, n in quantized_bytes(spec, quant)]


def load_adapter(step: Step, held: LinearWeights, lora: LoraSpec) -> None:
    """Allocate LoRA A, B (and the DoRA magnitude) on a module; one pair per adapted slice of a fused projection."""
    spec = held.spec
    parts: tuple[int, ...] = (spec.out_features,)
    if lora.target_slices and spec.parts:
        parts = tuple(spec.parts[i] for i in lora.target_slices if i < len(spec.parts))
    held.rank = lora.r
    for width in parts:
        a = step.trainable(lora.r * spec.in_features, lora.dtype, "adapter", lora.r + spec.in_features)
        b = step.trainable(width * lora.r, lora.dtype, "adapter", width + lora.r)
        held.lora.append((a, b, lora.r, width))
    if lora.use_dora:
        held.dora = step.trainable(spec.out_features, lora.dtype, "adapter")


# --- forward -------------------------------------------------------------------------------------------------------


def forward(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """Run the module: plain, quantized, with or without adapters."""
    if not held.lora:
        return base_forward(step, held, x)
    if QUANTIZATIONS[held.kind].by_bitsandbytes:
        return _lora_bnb(step, held, x)
    return _lora_plain(step, held, x)


def base_forward(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """The base layer alone."""
    return _BY_STORING[QUANTIZATIONS[held.kind].storing](step, held, x)


def _forward_plain(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """A weight that is not quantized."""
    spec = held.spec
    assert held.weight is not None
    m, n, k = step.tokens, spec.out_features, spec.in_features
    if spec.cls == "subclass" and held.bias is not None and step.habits.adds_bias_apart:
        arg = x  # FalconLinear: x @ weight.T, then + bias into a new tensor (modeling_falcon.py)
        out = ops.linear(step.eng, x, held.weight, m, n, k)
        out = ops.add(step.eng, out, held.bias, "linear")
        del arg
        return out
    return ops.linear(step.eng, x, held.weight, m, n, k, held.bias, _matmul_name(spec))


def head_chunk(step: Step, held: LinearWeights, hidden: Tensor, rows: Size, chunks: int) -> Tensor:
    """The head on one of `chunks` slices of the positions; the slice's gradient lands in a full-size tensor."""
    part = ops.narrow(step.eng, hidden, hidden.numel // chunks, "lm_head_grad")
    whole, step.tokens = step.tokens, rows
    try:
        return forward(step, held, part)
    finally:
        step.tokens = whole


def _matmul_name(spec: Linear) -> str:
    return "lm_head" if spec.name == "lm_head" else "linear"


def _adapter_product(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """lora_B(lora_A(dropout(x))) * scaling over all adapted slices (one slice: no concatenation)."""
    eng = step.eng
    p = step.lora_dropout
    m, k = step.tokens, held.spec.in_features
    outs = []
    for a, b, rank, width in held.lora:
        low = ops.linear(eng, ops.dropout(eng, x, p, "lora_dropout"), a, m, rank, k, op="lora_a")
        product = ops.linear(eng, low, b, m, width, rank, op="lora_b")
        del low
        outs.append(ops.scale(eng, product, "lora_scale"))
        del product
    out = outs[0]
    for other in outs[1:]:
        out = ops.cat_half(eng, out, other, "lora_slices")
    return out


def _lora_plain(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """peft lora.Linear.forward (and GPTQ's): x is cast to the adapter's dtype even under autocast."""
    eng = step.eng
    arg = x  # nn.Module.__call__ keeps its arguments alive
    result = base_forward(step, held, x)
    dtype = result.dtype
    x = ops.cast(eng, x, held.lora[0][0].dtype, "lora_input_cast")
    if held.dora is not None:
        result = _dora(step, held, x, result)
    else:
        result = ops.add(eng, result, _adapter_product(step, held, x), "lora_add")
    result = ops.cast(eng, result, dtype, "lora_result_cast")
    del arg
    return result


def _lora_bnb(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """peft Linear4bit/Linear8bitLt.forward: 4-bit clones the base output; x is cast only without autocast."""
    eng = step.eng
    arg = x
    result = base_forward(step, held, x)
    if QUANTIZATIONS[held.kind].packed_4bit:
        result = ops.contiguous(eng, result, "lora_clone")
    dtype = result.dtype
    convert = eng.autocast is None
    if convert:
        x = ops.cast(eng, x, held.lora[0][0].dtype, "lora_input_cast")
    if held.dora is not None:
        result = _dora(step, held, x, result)
        if convert:
            result = ops.cast(eng, result, dtype, "lora_result_cast")
    else:
        output = _adapter_product(step, held, x)
        if convert:
            output = ops.cast(eng, output, dtype, "lora_result_cast")
        result = ops.add(eng, result, output, "lora_add")
    del arg
    return result


def _dora(step: Step, held: LinearWeights, x: Tensor, result: Tensor) -> Tensor:
    """DoraLinearVariant.forward (peft variants.py): the scaled difference is added to the base result."""
    eng = step.eng
    base = None if step.lora_dropout else result
    x = ops.dropout(eng, x, step.lora_dropout, "lora_dropout")
    return ops.add(eng, result, _dora_layer(step, held, x, base), "lora_add")


def _dora_layer(step: Step, held: LinearWeights, x: Tensor, base: Tensor | None) -> Tensor:
    """DoraLinearLayer.forward (peft dora.py): magnitude / norm of (W + scaled B A), both products rescaled.

    With dropout there is no `base`: the base product is made again from the dropped input.
    """
    eng, spec = step.eng, held.spec
    m, n, k = step.tokens, spec.out_features, spec.in_features
    a, b, rank, _ = held.lora[0]
    delta = _dora_weight(step, held)
    delta = ops.cast(eng, delta, x.dtype, "dora_weight")
    weight = plain_weight(step, held, x.dtype)
    with eng.no_grad():
        scaled = ops.unary(eng, delta, "dora_norm")
        total = ops.unary(eng, scaled, "dora_norm")
        del scaled
        norm = eng.empty(n, total.dtype, "dora_norm")
        del total
    assert held.dora is not None
    ratio = ops.mul(eng, held.dora, norm, "dora_ratio")
    low = ops.linear(eng, x, a, m, rank, k, op="lora_a")
    lora_result = ops.linear(eng, low, b, m, n, rank, op="lora_b")
    del low
    if base is None:
        base = ops.linear(eng, x, weight, m, n, k)
    elif held.bias is not None:
        base = ops.subtract_bias(eng, base)
    first = ops.mul(eng, ops.shift(eng, ratio), base, "dora_mul")
    second = ops.scale(eng, ops.mul(eng, ratio, lora_result, "dora_mul"), "lora_scale")
    out = ops.add(eng, first, second, "dora_add")
    del first, second, weight, delta
    return out


def _dora_weight(step: Step, held: LinearWeights) -> Tensor:
    """get_lora_weight: both adapter products applied to an identity matrix."""
    eng, spec = step.eng, held.spec
    a, b, rank, _ = held.lora[0]
    n, k = spec.out_features, spec.in_features
    eye = eng.empty(k * k, a.dtype, "dora_eye")
    low = ops.linear(eng, eye, a, k, rank, k, op="dora_weight")
    return ops.linear(eng, low, b, k, n, rank, op="dora_weight")


def plain_weight(step: Step, held: LinearWeights, dtype: str) -> Tensor:
    """The base weight as a plain tensor of `dtype` (dequantize_module_weight, then .to)."""
    if held.weight is not None and held.weight.requires_grad:
        return held.weight
    if held.weight is not None:
        return ops.cast(step.eng, held.weight, dtype, "dequantize")
    return step.eng.empty(held.spec.weight_elements, dtype, "dequantize")


def _forward_4bit(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """bitsandbytes Linear4bit.forward: compute dtype in, matmul_4bit, input dtype out."""
    eng, spec, train = step.eng, held.spec, step.train
    arg = x
    source = x.dtype
    x = ops.cast(eng, x, train.quantization.compute_dtype, "compute_dtype_cast")
    m, n, k = step.tokens, spec.out_features, spec.in_features
    nested = train.quantization.double_quant
    weights = spec.weight_elements
    release = train.versions.bitsandbytes
    if release < FUSED_4BIT:
        work = _dequantize_first(step, held, x.dtype)
    else:
        work = [eng.workspace(size, "dequantize") for size in step.arch_4bit_forward(m, n, k, ITEMSIZE[x.dtype])]
    if work:
        eng.kernel("dequantize", x.dtype, weights // 2 + sum(w.nbytes for w in work), count=3 if nested else 1)
    out = eng.empty(m * n, x.dtype, "linear_4bit")
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


def _forward_8bit(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """MatMul8bitLt: int8 copy of the input, int8 product; keeps the input; backward dequantizes the weight."""
    eng, spec = step.eng, held.spec
    m, n, k = step.tokens, spec.out_features, spec.in_features
    if not step.arch.int8_kernels:
        return _forward_8bit_cpu(step, held, x)
    half = ops.unary(eng, x, "int8_input_cast", FP16) if x.dtype != FP16 else x
    quantized = eng.empty(x.numel, "int8", "int8_quantize")
    scales = eng.empty(m, FP32, "int8_quantize")
    del half
    product = eng.workspace(m * n * 4, "int8_product")
    # int8_scaled_mm writes fp16, then casts inside itself (backends/cuda/ops.py)
    out = eng.empty(m * n, FP16, "linear_8bit" if x.dtype == FP16 else "int8_product")
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
        return [_backward_8bit(step, spec, numel, dtype)]

    eng.link(out, (x,), backward, (x,), hooked=False)
    return out


def _backward_8bit(step: Step, spec: Linear, numel: Size, dtype: str) -> Tensor:
    """The input's gradient: the weight is dequantized in two passes, then one product."""
    eng = step.eng
    weight = _dequantize_8bit(step, spec, dtype)
    result = eng.empty(numel, dtype, "linear_8bit_grad")
    eng.matmul("matmul", dtype, step.tokens, spec.in_features, spec.out_features, layout="nn")
    del weight
    return result


def _dequantize_8bit(step: Step, spec: Linear, dtype: str) -> Tensor:
    """CB.to(dtype).mul_(scales)."""
    elements = spec.weight_elements
    weight = step.eng.empty(elements, dtype, "dequantize")
    step.eng.indexed(dtype, elements + weight.nbytes, elements)  # a conversion and a broadcast product, both of torch
    step.eng.indexed(dtype, 2 * weight.nbytes, ops.MIXED * elements)
    return weight


def _forward_8bit_cpu(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """MatMul8bitFp, bitsandbytes' function on CPUs: the weight is dequantized for the forward product too."""
    eng, spec = step.eng, held.spec
    numel, dtype = x.numel, x.dtype
    weight = _dequantize_8bit(step, spec, dtype)
    product = eng.autocast or dtype
    if product != dtype:
        x, weight = ops.unary(eng, x, "autocast", product), ops.unary(eng, weight, "autocast_weight", product)
    out = eng.empty(step.tokens * spec.out_features, product, "linear_8bit")
    eng.matmul("matmul", product, step.tokens, spec.out_features, spec.in_features)
    del weight

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        return [_backward_8bit(step, spec, numel, dtype)]

    eng.link(out, (x,), backward, (x,), hooked=False)
    return out


def _forward_gptq(step: Step, held: LinearWeights, x: Tensor) -> Tensor:
    """GPTQ/AWQ linear in training: the weight is dequantized to fp16 for the product, forward and backward."""
    eng, spec = step.eng, held.spec
    m, n, k = step.tokens, spec.out_features, spec.in_features
    source = x.dtype
    target = eng.autocast or step.train.quantization.compute_dtype
    x = ops.cast(eng, x, target, "compute_dtype_cast")
    weight = eng.empty(spec.weight_elements, x.dtype, "dequantize")
    out = eng.empty(m * n, x.dtype, "linear_gptq")
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


_BY_STORING: Rows[Callable[[Step, LinearWeights, Tensor], Tensor]] = Rows(
    "way to store weights",
    typing.get_args(Storing),
    (
        ("plain", _forward_plain),
        ("blocks-of-4-bit", _forward_4bit),
        ("rows-of-8-bit", _forward_8bit),
        ("groups", _forward_gptq),
    ),
)
"""The product of each way to store weights (QUANTIZATIONS)."""


# --- fms-acceleration's fused LoRA ---------------------------------------------------------------------------------


def fused_lora(step: Step, group: list[LinearWeights], x: Tensor) -> list[Tensor]:
    """Projections that share an input, with their adapters, as one autograd function.

    Saves x and, with dropout, one dropped copy of x per projection; no adapter outputs, no masks. The base weights
    are dequantized one at a time (GPTQ: all of the group before the first product). The 4-bit backward writes the
    input's gradient over x. Source: fms-acceleration plugins/fused-ops-and-kernels fused_ops/unsloth_lora
    {bnb,gptq}/fast_lora.py at 24bdadb2.
    """
    eng, m = step.eng, step.tokens
    k = group[0].spec.in_features
    all_first = QUANTIZATIONS[group[0].kind].grouped
    weights = [_fused_weight(step, held, x.dtype) for held in group] if all_first else []
    outs, kept = [], [x]
    for held in group:
        weight = None if all_first else _fused_weight(step, held, x.dtype)
        n = held.spec.out_features
        out = eng.empty(m * n, x.dtype, "linear_4bit")
        eng.matmul("matmul", x.dtype, m, n, k)
        del weight
        if step.lora_dropout:
            noise = eng.empty(m * k, x.dtype, "lora_dropout")
            kept.append(eng.empty(m * k, x.dtype, "lora_dropout"))
            del noise
        low = eng.empty(m * held.rank, x.dtype, "lora_a")
        product = eng.empty(m * n, x.dtype, "lora_b")
        eng.matmul("lora", x.dtype, m, held.rank, k)
        eng.matmul("lora", x.dtype, m, n, held.rank)
        del low, product
        outs.append(out)
    del weights, out
    adapters = [t for held in group for pair in held.lora for t in pair[:2]]
    in_place = not all_first
    numel, dtype = x.numel, x.dtype
    numels = [t.numel for t in adapters]

    def backward(node: Node, grads: Grads) -> list[Tensor | None]:
        gradients: list[Tensor | None] = [eng.empty(n, dtype, "weight_grad") for n in numels]
        result = node.saved[0].view() if in_place else eng.empty(numel, dtype, "linear_4bit_grad")
        for held in group:
            weight = _fused_weight(step, held, dtype)
            eng.matmul("matmul", dtype, m, k, held.spec.out_features)
            del weight
            if step.lora_dropout:
                mask = eng.empty(numel, "int8", "lora_dropout_grad")
                product = eng.empty(numel, dtype, "lora_dropout_grad")
                masked = eng.empty(numel, dtype, "lora_dropout_grad")
                del mask, product, masked
            # dB and dA, the gradient through B, the result's share, and x A^T anew (it was not kept)
            n, r = held.spec.out_features, held.rank
            for rows, columns, inner in ((r, n, m), (m, r, n), (k, r, m), (m, k, r), (m, r, k)):
                eng.matmul("lora", dtype, rows, columns, inner)
        return [result, *gradients]

    eng.link(outs, (x, *adapters), backward, tuple(kept))
    return outs


def _fused_weight(step: Step, held: LinearWeights, dtype: str) -> Tensor:
    """The dequantized weight; 4-bit: with its fp32 absmax, freed when the weight exists. GPTQ: always fp16."""
    eng, n = step.eng, held.spec.weight_elements
    gptq = QUANTIZATIONS[held.kind].grouped
    absmax = None if gptq else eng.workspace(4 * cuda_rules.absmax_blocks(n), "dequantize")
    weight = eng.empty(n, FP16 if gptq else dtype, "dequantize")
    eng.kernel("dequantize", dtype, n // 2 + weight.nbytes, count=2)
    del absmax
    return weight
