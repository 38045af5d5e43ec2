"""The traps of fine-tuning configs: settings that cost memory or time, or fail, without anybody having meant them.

Each trap is tested on a prediction and priced by predicting again with the one change that avoids it, in bytes of
device memory and seconds of an optimizer step. Nothing is priced by a formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from planner.base.errors import InvalidInput
from planner.base.records import replace
from planner.base.units import GiB
from planner.model import lora
from planner.model.spec import ModelSpec
from planner.plan.notes import lacks_bf16
from planner.plan.predict import Prediction, predict
from planner.training.optimizers import BNB_PAGED_ELEMENTS, OPTIMIZERS
from planner.training.quantizations import QUANTIZATIONS
from planner.training.settings import Setting
from planner.training.spec import QuantizationSpec, TrainingSpec

SERIOUS = 0.05
"""Share of the peak, or of a step's time, from which a trap is more than a remark."""


class Trap(NamedTuple):
    """One trap that a config is in."""

    name: str
    what: str
    option: str
    """The option of `planner.training.stacks` that springs it."""
    better: Any
    """The option's value that avoids it."""
    nbytes: int = 0
    """Device memory that the change gives back at the peak."""
    seconds: float = 0.0
    """Time of an optimizer step that the change gives back."""
    share: float = 0.0
    """The larger of both as a share of the peak and of the step."""
    fails: bool = False
    """The run does not start at all."""

    @property
    def serious(self) -> bool:
        """Whether it costs more than 5 percent, or everything."""
        return self.fails or self.share > SERIOUS


Finder = Callable[[Prediction, Mapping[str, Setting]], Iterator[Trap]]


def traps(prediction: Prediction, settings: Mapping[str, Setting]) -> tuple[Trap, ...]:
    """Return the traps of a run, the dearest first; `settings` say which values nobody asked for."""
    found = [trap for finder in _FINDERS for trap in finder(prediction, settings)]
    return tuple(sorted(found, key=lambda trap: (-trap.fails, -trap.share)))


def _priced(prediction: Prediction, trap: Trap, changed: TrainingSpec) -> Trap:
    """Add what the change gives back."""
    other = predict(_model(prediction), changed, prediction.gpu)
    nbytes = prediction.device.expected - other.device.expected
    share = nbytes / prediction.device.expected
    seconds = 0.0
    if prediction.step_s is not None and other.step_s is not None:
        seconds = float(prediction.step_s.expected - other.step_s.expected)
        share = max(share, seconds / float(prediction.step_s.expected))
    return trap._replace(nbytes=nbytes, seconds=seconds, share=share)


def _model(prediction: Prediction) -> ModelSpec:
    if not isinstance(prediction.model, ModelSpec):
        raise InvalidInput("traps are looked for in models of known families only")
    return prediction.model


def _half(prediction: Prediction) -> Any:
    return "fp16" if prediction.gpu is not None and lacks_bf16(prediction.gpu) else "bf16"


def _fp32_weights(prediction: Prediction, settings: Mapping[str, Setting]) -> Iterator[Trap]:
    t = prediction.training
    if t.base_dtype != "fp32" or t.method == "full":
        return
    half = _half(prediction)
    nbytes = 4 * prediction.model.num_parameters
    asked = "" if settings["base_dtype"].is_given else " because no dtype is set"
    what = f"the weights are loaded in fp32{asked}: {nbytes / GiB:.1f} GiB before any quantization"
    quantization = replace(t.quantization, compute_dtype=half)
    changed = replace(t, base_dtype=half, quantization=quantization)
    yield _priced(prediction, Trap("fp32-weights", what, "base_dtype", half), changed)


def _fp4(prediction: Prediction, settings: Mapping[str, Setting]) -> Iterator[Trap]:
    t = prediction.training
    kind = t.quantization.kind
    better = QUANTIZATIONS[kind].better
    if better:
        asked = "" if settings["quantization"].is_given else ", transformers' default,"
        what = f"{kind}{asked} is as large as {better} and less accurate"
        yield _priced(prediction, Trap(kind, what, "quantization", better), _quantized(t, kind=better))


def _single_quantization(prediction: Prediction, _: Mapping[str, Setting]) -> Iterator[Trap]:
    t = prediction.training
    if QUANTIZATIONS[t.quantization.kind].packed_4bit and not t.quantization.double_quant:
        what = "double quantization is off: the scales of 4-bit weights stay fp32"
        yield _priced(prediction, Trap("no-double-quant", what, "double_quant", True), _quantized(t, double_quant=True))


def _quantized(training: TrainingSpec, **changes: Any) -> TrainingSpec:
    quantization: QuantizationSpec = replace(training.quantization, **changes)
    return replace(training, quantization=quantization)


def _no_checkpointing(prediction: Prediction, settings: Mapping[str, Setting]) -> Iterator[Trap]:
    t = prediction.training
    if t.gradient_checkpointing == "none":
        asked = "off" if settings["gradient_checkpointing"].is_given else "off by default"
        what = f"gradient checkpointing is {asked}: every layer's activations are kept"
        changed = replace(t, gradient_checkpointing="full")
        yield _priced(prediction, Trap("no-checkpointing", what, "gradient_checkpointing", "full"), changed)


def _kbit_copies(prediction: Prediction, _: Mapping[str, Setting]) -> Iterator[Trap]:
    t = prediction.training
    if t.kbit_preparation:
        what = "k-bit preparation keeps fp32 copies of embeddings, head and norms"
        yield _priced(
            prediction, Trap("kbit-fp32-copies", what, "kbit_preparation", False), replace(t, kbit_preparation=False)
        )


def _plain_experts(prediction: Prediction, _: Mapping[str, Setting]) -> Iterator[Trap]:
    """Experts are fused parameters that bitsandbytes does not see: compared with 4 bits and a scale per 64 weights."""
    kind = prediction.training.quantization.kind
    layers = _model(prediction).distinct_layers()
    elements = sum(count * layer.experts.expert_elements for layer, count in layers if layer.experts)
    if not elements or not QUANTIZATIONS[kind].by_bitsandbytes:
        return
    four = QUANTIZATIONS[kind].packed_4bit
    bits = 4 + 32 / 64 if four else 8.0  # bitsandbytes functional.py quantize_4bit: blocksize 64, fp32 absmax
    nbytes = int(elements * (16 - bits) / 8)
    what = f"{elements / 1e9:.1f}e9 expert weights stay 16-bit: they are no linear modules, and {kind} passes over them"
    yield Trap("plain-experts", what, "experts", "quantized", nbytes=nbytes, share=nbytes / prediction.device.expected)


def _idle_paging(prediction: Prediction, _: Mapping[str, Setting]) -> Iterator[Trap]:
    t = prediction.training
    plain = OPTIMIZERS[t.optimizer].unpaged
    if not plain or t.lora is None:
        return
    adapted = lora.resolve_targets(_model(prediction), t.lora)
    largest = max((max(int(a.a_elements), int(a.b_elements)) for a in adapted), default=0)
    if largest >= BNB_PAGED_ELEMENTS or t.lora.modules_to_save:
        return
    what = (
        f"the paged optimizer pages nothing at rank {t.lora.r}: the largest adapter has {largest:,} elements, "
        f"and bitsandbytes pages from {BNB_PAGED_ELEMENTS:,}"
    )
    yield _priced(prediction, Trap("idle-paging", what, "optimizer", plain), replace(t, optimizer=plain))


def _truncation(prediction: Prediction, settings: Mapping[str, Setting]) -> Iterator[Trap]:
    t = prediction.training
    origin = settings["seq_len"]
    limit = prediction.model.max_position_embeddings or t.seq_len
    if origin.is_given or origin.origin == "loraplan default" or t.seq_len >= limit:
        return
    longer = min(2 * t.seq_len, limit)
    other = predict(_model(prediction), replace(t, seq_len=longer), prediction.gpu)
    more = (other.device.expected - prediction.device.expected) / GiB
    what = (
        f"no length is set, so rows are cut after {t.seq_len} tokens; twice that would take {more:.2f} GiB more"
        if longer == 2 * t.seq_len
        else f"no length is set, so rows are cut after {t.seq_len} tokens; {longer} would take {more:.2f} GiB more"
    )
    yield Trap("default-length", what, "seq_len", longer)


def _bf16(prediction: Prediction, _: Mapping[str, Setting]) -> Iterator[Trap]:
    t, gpu = prediction.training, prediction.gpu
    if gpu is None or not lacks_bf16(gpu):
        return
    if "bf16" not in (t.autocast, t.base_dtype, t.quantization.compute_dtype):
        return
    what = f"{gpu.name} has no bf16 units: bf16 is refused or computed at a fraction of the speed of fp16"
    halved: dict[str, Any] = {key: "fp16" for key in ("autocast", "base_dtype") if getattr(t, key) == "bf16"}
    changed = replace(t, **halved, quantization=replace(t.quantization, compute_dtype="fp16"))
    yield _priced(prediction, Trap("bf16", what, "autocast", "fp16", fails=t.autocast == "bf16"), changed)


def _flash(prediction: Prediction, _: Mapping[str, Setting]) -> Iterator[Trap]:
    gpu = prediction.gpu
    capability = gpu.compute_capability if gpu else None
    if prediction.training.attention == "flash2" and gpu and capability and capability < (8, 0):
        what = f"FlashAttention-2 needs compute capability 8.0 and {gpu.name} has {capability[0]}.{capability[1]}"
        changed = replace(prediction.training, attention="sdpa")
        yield _priced(prediction, Trap("flash-attention", what, "attention", "sdpa", fails=True), changed)


_FINDERS: tuple[Finder, ...] = (
    _fp32_weights, _fp4, _single_quantization, _no_checkpointing, _kbit_copies, _plain_experts, _idle_paging,
    _truncation, _bf16, _flash,
)  # fmt: skip
