"""Linear modules: their weights as they lie on the GPU, the quantized and plain products, and the LoRA paths.

A `LinearWeights` is one module of one layer. The forward functions follow, line by line in what they allocate:
bitsandbytes nn/modules.py and autograd/_functions.py (0.50), peft tuners/lora/{layer,bnb,gptq,variants,dora}.py (0.21).
"""

from __future__ import annotations

import typing
from collections.abc import Callable

from planner.base.records import Rows
from planner.model.spec import Linear
from planner.model.storage import is_quantized
from planner.step import ops
from planner.step.context import Step
from planner.step.engine import FP16, MATRIX, Size, Tensor
from planner.step.modules.quantized import _forward_4bit, _forward_8bit, _forward_gptq, _quantized
from planner.step.modules.weights import LinearWeights
from planner.training.quantizations import QUANTIZATIONS, Storing
from planner.training.spec import LoraSpec


def load_base(step: Step, spec: Linear, adapted: bool) -> LinearWeights:
    """Allocate a module's frozen (or, in full fine-tuning, trainable) weights."""
    eng, train = step.eng, step.train
    held = LinearWeights(spec)
    quant = train.quantization
    if is_quantized(spec, step.train, adapted):
        held.kind = quant.kind
        held.packed = _quantized(step, spec, quant)
    else:
        held.weight = step.weight(f"{spec.name}.weight", (spec.out_features, spec.in_features))
    held.dtype = FP16 if step.habits.halves_quantized and held.kind != "none" else train.base_dtype
    if spec.bias and QUANTIZATIONS[held.kind].packed_4bit:
        # Linear4bit's first forward leaves it in the compute dtype (bitsandbytes nn/modules.py)
        bias = eng.empty((spec.out_features,), train.quantization.compute_dtype, "weight")
        held.bias = step.owned(bias, f"{spec.name}.bias")
    elif spec.bias:
        held.bias = step.weight(f"{spec.name}.bias", (spec.out_features,))
    return held


def load_adapter(step: Step, held: LinearWeights, lora: LoraSpec) -> None:
    """Allocate LoRA A, B (and the DoRA magnitude) on a module; one pair per adapted slice of a fused projection."""
    spec = held.spec
    parts: tuple[int, ...] = (spec.out_features,)
    if lora.target_slices and spec.parts:
        parts = tuple(spec.parts[i] for i in lora.target_slices if i < len(spec.parts))
    held.rank = lora.r
    for width in parts:
        a = step.trainable(f"{spec.name}.lora_A", (lora.r, spec.in_features), lora.dtype, "adapter")
        b = step.trainable(f"{spec.name}.lora_B", (width, lora.r), lora.dtype, "adapter")
        held.lora.append((a, b, lora.r, width))
    if lora.use_dora:
        held.dora = step.trainable(f"{spec.name}.lora_magnitude_vector", (spec.out_features,), lora.dtype, "adapter")


# --- forward -------------------------------------------------------------------------------------------------------


def forward(step: Step, held: LinearWeights, x: Tensor, rows: Size | None = None) -> Tensor:
    """Run the module: plain, quantized, with or without adapters; `rows` of x where it is not made of whole ones."""
    m = rows_of(held, x) if rows is None else rows
    if not held.lora:
        return base_forward(step, held, x, m)
    if QUANTIZATIONS[held.kind].by_bitsandbytes:
        return _lora_bnb(step, held, x, m)
    return _lora_plain(step, held, x, m)


def rows_of(held: LinearWeights, x: Tensor) -> Size:
    """Rows that the product runs over: a matrix has its own (attention may have padded them), else elements tell."""
    return x.shape[0] if len(x.shape) == MATRIX else x.rows(held.spec.in_features)


def base_forward(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """The base layer alone, on the m rows of x."""
    return _BY_STORING[QUANTIZATIONS[held.kind].storing](step, held, x, m)


def _forward_plain(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """A weight that is not quantized."""
    spec = held.spec
    assert held.weight is not None
    n, k = spec.out_features, spec.in_features
    if spec.cls == "subclass" and held.bias is not None and step.habits.adds_bias_apart:
        arg = x  # FalconLinear: x @ weight.T, then + bias into a new tensor (modeling_falcon.py)
        out = ops.linear(step.eng, x, held.weight, m, n, k)
        out = ops.add(step.eng, out, held.bias, "linear")
        del arg
        return out
    return ops.linear(step.eng, x, held.weight, m, n, k, held.bias, _matmul_name(spec))


def head_chunk(step: Step, held: LinearWeights, hidden: Tensor, rows: Size, chunks: int) -> Tensor:
    """The head on one of `chunks` slices of the positions; the slice's gradient lands in a full-size tensor.

    `rows` of the longest; a slice is an equal part of the elements, even where that is no whole number of rows.
    """
    part = ops.narrow(step.eng, hidden, hidden.numel // chunks, "lm_head_grad")
    return forward(step, held, part, rows)


def _matmul_name(spec: Linear) -> str:
    return "lm_head" if spec.name == "lm_head" else "linear"


def _adapter_product(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """lora_B(lora_A(dropout(x))) * scaling over all adapted slices (one slice: no concatenation)."""
    eng = step.eng
    p = step.lora_dropout
    k = held.spec.in_features
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


def _lora_plain(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """peft lora.Linear.forward (and GPTQ's): x is cast to the adapter's dtype even under autocast."""
    eng = step.eng
    arg = x  # nn.Module.__call__ keeps its arguments alive
    result = base_forward(step, held, x, m)
    dtype = result.dtype
    x = ops.cast(eng, x, held.lora[0][0].dtype, "lora_input_cast")
    if held.dora is not None:
        result = _dora(step, held, x, result, m)
    else:
        result = ops.add(eng, result, _adapter_product(step, held, x, m), "lora_add")
    result = ops.cast(eng, result, dtype, "lora_result_cast")
    del arg
    return result


def _lora_bnb(step: Step, held: LinearWeights, x: Tensor, m: Size) -> Tensor:
    """peft Linear4bit/Linear8bitLt.forward: 4-bit clones the base output; x is cast only without autocast."""
    eng = step.eng
    arg = x
    result = base_forward(step, held, x, m)
    if QUANTIZATIONS[held.kind].packed_4bit:
        result = ops.contiguous(eng, result, "lora_clone")
    dtype = result.dtype
    convert = eng.autocast is None
    if convert:
        x = ops.cast(eng, x, held.lora[0][0].dtype, "lora_input_cast")
    if held.dora is not None:
        result = _dora(step, held, x, result, m)
        if convert:
            result = ops.cast(eng, result, dtype, "lora_result_cast")
    else:
        output = _adapter_product(step, held, x, m)
        if convert:
            output = ops.cast(eng, output, dtype, "lora_result_cast")
        result = ops.add(eng, result, output, "lora_add")
    del arg
    return result


def _dora(step: Step, held: LinearWeights, x: Tensor, result: Tensor, m: Size) -> Tensor:
    """DoraLinearVariant.forward (peft variants.py): the scaled difference is added to the base result."""
    eng = step.eng
    base = None if step.lora_dropout else result
    x = ops.dropout(eng, x, step.lora_dropout, "lora_dropout")
    return ops.add(eng, result, _dora_layer(step, held, x, base, m), "lora_add")


def _dora_layer(step: Step, held: LinearWeights, x: Tensor, base: Tensor | None, m: Size) -> Tensor:
    """DoraLinearLayer.forward (peft dora.py): magnitude / norm of (W + scaled B A), both products rescaled.

    With dropout there is no `base`: the base product is made again from the dropped input.
    """
    eng, spec = step.eng, held.spec
    n, k = spec.out_features, spec.in_features
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


_BY_STORING: Rows[Callable[[Step, LinearWeights, Tensor, Size], Tensor]] = Rows(
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
