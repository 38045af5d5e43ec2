"""What a LoRA or QLoRA configuration is: parameters per module, scaling, adapter file, bits and bytes of the base.

Elements and bytes come from the model's shapes by the rules of PEFT 0.21, safetensors and bitsandbytes 0.50.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from planner.base.records import record
from planner.model import lora as adapters
from planner.model.lora import Adapted
from planner.model.spec import Linear, ModelSpec
from planner.model.storage import is_quantized, quantized_bytes
from planner.training.own_modules import OWN_MODULES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import DTYPE_BYTES, LoraSpec, QuantizationSpec, TrainingSpec

BLOCK = 64
"""Weights that share one scale (bitsandbytes functional.quantize_4bit's default)."""
NESTED_BLOCK = 256
"""Scales that share one scale of their own under double quantization."""

_DTYPE_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@record
class ModuleRow:
    """The adapters of one module, everywhere in the model."""

    name: str
    in_features: int
    out_features: int
    rank: int
    count: int
    each: int
    """Trainable parameters of one occurrence."""
    weight_elements: int
    """Elements of the weight that is adapted, of one occurrence."""

    @property
    def total(self) -> int:
        """Trainable parameters of all occurrences."""
        return self.each * self.count


@record
class BaseWeights:
    """How the frozen base lies on the card."""

    quantized_elements: int
    quantized_bytes: int
    """Packed values and their scales; the code tables and offsets, 64 bytes to 1 KiB a module, are left out."""
    bits_per_weight: float
    """Of the quantized weights, by the format's definition; 0 where nothing is quantized."""
    other_elements: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all base weights."""
        return self.quantized_bytes + self.other_bytes

    @property
    def bits_overall(self) -> float:
        """Mean bits per weight of the whole model."""
        return 8 * self.total_bytes / (self.quantized_elements + self.other_elements)


@record
class AdapterFacts:
    """A LoRA configuration on a model."""

    modules: tuple[ModuleRow, ...]
    adapter_parameters: int
    saved_module_parameters: int
    """Copies that modules_to_save trains in full."""
    model_parameters: int
    scaling: float
    scaling_rule: Literal["alpha / r", "alpha / sqrt(r)"]
    file_bytes: int
    """adapter_model.safetensors."""
    file_dtype: str
    base: BaseWeights
    warnings: tuple[str, ...]

    @property
    def trainable_parameters(self) -> int:
        """Everything that is trained."""
        return self.adapter_parameters + self.saved_module_parameters

    @property
    def trainable_share(self) -> float:
        """Trainable over all parameters of the base."""
        return self.trainable_parameters / self.model_parameters


def facts(model: ModelSpec, training: TrainingSpec) -> AdapterFacts:
    """Describe the adapter and the base of one training configuration (which must have an adapter)."""
    lora = training.lora
    assert lora is not None, "facts() is for configurations with an adapter"
    adapted = adapters.resolve_targets(model, lora)
    rows = tuple(_rows(adapted))
    return AdapterFacts(
        modules=rows,
        adapter_parameters=sum(row.total for row in rows),
        saved_module_parameters=adapters.saved_module_parameters(model, lora),
        model_parameters=model.num_parameters,
        scaling=scaling(lora),
        scaling_rule="alpha / sqrt(r)" if lora.use_rslora else "alpha / r",
        file_bytes=adapter_file_bytes(model, lora),
        file_dtype=lora.dtype,
        base=base_weights(model, training, adapted),
        warnings=tuple(oversized(rows)),
    )


def scaling(lora: LoraSpec) -> float:
    """The factor on B A x: lora_alpha / r; with rsLoRA lora_alpha / sqrt(r) (peft tuners/lora/layer.py)."""
    return float(lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r))


def oversized(rows: tuple[ModuleRow, ...]) -> Iterator[str]:
    """Warn of adapters that hold at least as many parameters as the weight they adapt: they save nothing."""
    for row in rows:
        if row.each >= row.weight_elements:
            yield (
                f"the adapter of {row.name} has {row.each:,} parameters, the weight it adapts {row.weight_elements:,}: "
                f"rank {row.rank} is too high for {row.in_features} x {row.out_features}"
            )


def _rows(adapted: tuple[Adapted, ...]) -> Iterator[ModuleRow]:
    """One row per module name and shape, over all kinds of layers."""
    found: dict[tuple[str, int, int, int], tuple[Adapted, int]] = {}
    for item in adapted:
        key = (item.name, item.in_features, item.out_features, item.rank)
        found[key] = (item, found[key][1] + item.count if key in found else item.count)
    for item, count in found.values():
        yield ModuleRow(
            name=item.name,
            in_features=item.in_features,
            out_features=item.out_features,
            rank=item.rank,
            count=count,
            each=item.num_parameters,
            weight_elements=item.in_features * item.out_features * item.experts,
        )


# --- the base -----------------------------------------------------------------------------------------------------


def bits_per_weight(quantization: QuantizationSpec) -> float:
    """Bits that one quantized weight takes, its share of the scales included.

    NF4 and FP4: 4 + 32/64; double quantization: 4 + 8/64 + 32/(64 * 256) (QLoRA, arXiv 2305.14314, section 3).
    Other formats depend on a module's shape and have no one number: 0.
    """
    if not QUANTIZATIONS[quantization.kind].packed_4bit:
        return 0.0
    if quantization.double_quant:
        return 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK)
    return 4 + 32 / BLOCK


_TABLES = ("code", "state2.code", "offset")
"""Constants of a 4-bit weight that do not grow with it."""


def base_weights(model: ModelSpec, training: TrainingSpec, adapted: tuple[Adapted, ...]) -> BaseWeights:
    """Sort the base weights into quantized ones and the rest, as they lie on the card while training.

    After k-bit preparation every 16-bit parameter that is not quantized is fp32 (peft utils/other.py).
    """
    quant = training.quantization
    targets = {(id(item.layer), item.name) for item in adapted}
    elements = nbytes = 0
    for linear, layer_id, count in _linears(model):
        if is_quantized(linear, training, (layer_id, linear.name) in targets):
            elements += linear.weight_elements * count
            nbytes += count * sum(size for name, size in quantized_bytes(linear, quant) if name not in _TABLES)
    other = model.num_parameters - elements
    width = 4 if training.kbit_preparation else DTYPE_BYTES[training.base_dtype]
    return BaseWeights(
        quantized_elements=elements,
        quantized_bytes=nbytes,
        bits_per_weight=bits_per_weight(quant),
        other_elements=other,
        other_bytes=other * width + (4 - width) * _kept_in_fp32(model, training),
    )


def _kept_in_fp32(model: ModelSpec, training: TrainingSpec) -> int:
    """Elements that transformers' class keeps in fp32 beside a 16-bit base."""
    if not OWN_MODULES[training.own_modules].keeps_fp32:
        return 0
    return model.elements_kept_in_fp32(training.base_dtype, training.versions.transformers)


def _linears(model: ModelSpec) -> Iterator[tuple[Linear, int, int]]:
    """Yield (module, id of its layer, occurrences); outside the layers the id is that of None."""
    for layer, count in model.distinct_layers():
        for linear in layer.linears:
            yield linear, id(layer), count
    for linear in model.embedding_projections:
        yield linear, id(None), 1
    if not model.tied:
        yield model.head, id(None), 1


# --- the file -----------------------------------------------------------------------------------------------------


def adapter_file_bytes(model: ModelSpec, lora: LoraSpec) -> int:
    """Size of adapter_model.safetensors: the tensors and the header that names them.

    The header is JSON padded with blanks to a multiple of 8, after 8 bytes of its length (safetensors
    tensor.rs prepare). Embedding layers that PEFT adds when they are targets are not counted.
    """
    tensors = sorted(_tensors(model, lora))
    width = DTYPE_BYTES[lora.dtype]
    place = 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, shape in tensors:
        size = width
        for side in shape:
            size *= side
        header[name] = {"dtype": _DTYPE_NAMES[lora.dtype], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = len(json.dumps(header, separators=(",", ":")).encode())
    saved = adapters.saved_module_parameters(model, lora) * width
    return 8 + -(-text // 8) * 8 + place + saved


def _tensors(model: ModelSpec, lora: LoraSpec) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor that PEFT saves."""
    by_layer: dict[int, list[Adapted]] = {}
    for item in adapters.resolve_targets(model, lora):
        by_layer.setdefault(id(item.layer), []).append(item)
    for number, layer in enumerate(model.layers):
        for item in by_layer.get(id(layer), ()):
            yield from _pair(f"base_model.model.{model.layer_prefix}.{number}.{item.name}", item)
    for item in by_layer.get(id(None), ()):
        inside = item.name == model.head.name or "." in item.name
        prefix = "" if inside else model.layer_prefix.rpartition(".")[0] + "."
        yield from _pair(f"base_model.model.{prefix}{item.name}", item)


def _pair(path: str, item: Adapted) -> Iterator[tuple[str, list[int]]]:
    a, b = ("lora_embedding_A", "lora_embedding_B") if item.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    rows = item.a_elements // item.in_features
    yield f"{path}.{a}", [rows, item.in_features]
    yield f"{path}.{b}", [item.b_elements // item.rank, item.rank]
    if item.dora:
        yield f"{path}.lora_magnitude_vector", [item.out_features]
