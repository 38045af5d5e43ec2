"""The bytes in which quantized weights are stored, and which modules are quantized."""

from __future__ import annotations

from planner.device import cuda_rules
from planner.model.spec import Linear
from planner.training.own_modules import OWN_MODULES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import QuantizationSpec, TrainingSpec


def quantized_bytes(spec: Linear, quant: QuantizationSpec) -> list[tuple[str, int]]:
    """Return the tensors that store a quantized weight, as (name, bytes).

    4-bit: see `cuda_rules.static_4bit_bytes`. int8: values and one fp32 scale per row
    (Int8Params.SCB). GPTQ: qweight, qzeros, fp16 scales, int32 g_idx (auto_gptq qlinear). AWQ: without g_idx.
    """
    n = spec.weight_elements
    row = QUANTIZATIONS[quant.kind]
    if row.storing == "plain":
        raise ValueError(f"{quant.kind} stores no weight otherwise")
    if row.storing == "blocks-of-4-bit":
        return list(cuda_rules.static_4bit_bytes(n, double_quant=quant.double_quant))
    if row.storing == "rows-of-8-bit":
        return [("values", n), ("scales", spec.out_features * 4)]
    bits = row.bits
    groups = -(-spec.in_features // quant.group_size)
    tensors = [
        ("qweight", n * bits // 8),
        ("qzeros", groups * spec.out_features * bits // 8),
        ("scales", groups * spec.out_features * 2),
    ]
    return [*tensors, ("g_idx", spec.in_features * 4)] if row.keeps_column_groups else tensors


def is_quantized(spec: Linear, training: TrainingSpec, adapted: bool) -> bool:
    """Whether the library that quantizes would convert this module."""
    quant, exact = training.quantization, OWN_MODULES[training.own_modules].exact_linears
    if quant.kind == "none" or quant.quantized_modules == "none":
        return False
    if spec.cls == "subclass" and QUANTIZATIONS[quant.kind].by_bitsandbytes and not exact:
        return False  # bitsandbytes converts exactly nn.Linear and Conv1D (transformers integrations/bitsandbytes.py)
    if quant.quantized_modules == "adapted-only" and not adapted:
        return False
    return not any(spec.name == skip or spec.name.endswith("." + skip) for skip in quant.skip_modules)
