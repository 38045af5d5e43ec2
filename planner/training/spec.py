"""TrainingSpec: how a model is trained. Values use Hugging Face, PEFT and bitsandbytes words.

Defaults here are only the neutral ones; what a framework does unasked lives in `planner.training.stacks`.
"""

from __future__ import annotations

from typing import Any, Literal

from planner.base.errors import Contradiction, InvalidInput, unknown
from planner.base.records import field, fields, record
from planner.training.choices import AttentionKernel, Checkpointing, Dtype, Method, _positive, choice
from planner.training.losses import KERNEL_SETS, LOSSES, Kernels, Loss
from planner.training.optimizers import OPTIMIZERS, Optimizer
from planner.training.own_modules import ModulesOf
from planner.training.quantizations import QUANTIZATIONS, Quantization

DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@record
class LoraSpec:
    """A LoRA adapter, in PEFT's words."""

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    """Module names (suffixes), or one of the keywords all-linear, attention, mlp."""
    modules_to_save: tuple[str, ...] = ()
    use_dora: bool = False
    use_rslora: bool = False
    dtype: Dtype = "fp32"
    """dtype of the adapter weights (PEFT keeps fp32 unless told otherwise)."""
    target_slices: tuple[int, ...] = ()
    """Adapt only these parts of a fused projection, as litgpt adapts the q and v slices of one qkv module."""

    def __post_init__(self) -> None:
        _positive("LoRA rank r", self.r, highest=2**20)
        if not 0 <= self.lora_dropout < 1:
            raise InvalidInput(f"lora_dropout is {self.lora_dropout}; must be at least 0 and below 1")
        if not self.target_modules:
            raise InvalidInput("no target_modules; name at least one, for example all-linear")
        choice("dtype", self.dtype)


@record
class Versions:
    """Library releases that change the answer, as (major, minor) tuples."""

    torch: tuple[int, int] = (2, 13)
    transformers: tuple[int, int] = (5, 24)
    peft: tuple[int, int] = (0, 21)
    bitsandbytes: tuple[int, int] = (0, 50)


@record
class QuantizationSpec:
    """How the frozen base weights are stored."""

    kind: Quantization = "none"
    double_quant: bool = False
    quantized_modules: Literal["linears", "adapted-only", "none"] = "linears"
    skip_modules: tuple[str, ...] = ("lm_head",)
    """Modules left unquantized; bitsandbytes' default is the output embedding and what it is tied to."""
    group_size: int = 128
    """GPTQ and AWQ: weights that share one scale and zero point."""
    compute_dtype: Dtype = "bf16"

    def __post_init__(self) -> None:
        choice("quantization", self.kind)
        choice("dtype", self.compute_dtype)
        _positive("group_size", self.group_size, highest=2**20)
        if self.double_quant and not QUANTIZATIONS[self.kind].packed_4bit:
            raise Contradiction(f"double quantization exists for nf4 and fp4 only, not for {self.kind}; drop it")


@record
class TrainingSpec:
    """One fine-tuning configuration. In a sweep the sizes and the LoRA rank are polynomials of its cells."""

    method: Method = "qlora"
    lora: LoraSpec | None = None
    quantization: QuantizationSpec = field(default_factory=QuantizationSpec)
    micro_batch_size: int = 1
    seq_len: int = 2048
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: Checkpointing = "full"
    use_reentrant: bool = False
    attention: AttentionKernel = "sdpa"
    padded: bool = False
    """Rows carry a padding mask; SDPA then needs a 4-D mask and loses its flash kernel."""
    loss: Loss = "full-logits-fp32"
    optimizer: Optimizer = "adamw-fused"
    autocast: Literal["none", "bf16", "fp16"] = "bf16"
    base_dtype: Dtype = "bf16"
    """dtype of the base weights that are not quantized, as they lie on the GPU (before k-bit preparation)."""
    kbit_preparation: bool = False
    """PEFT's prepare_model_for_kbit_training: every unquantized 16-bit parameter becomes fp32."""
    fp32_norms_only: bool = False
    """Only the norms are fp32 (residual stream fp32), embeddings and head stay in base_dtype."""
    keeps_outputs: bool = False
    """The caller holds the model's outputs (logits) until after the backward."""
    outputs_to_fp32: bool = False
    """accelerate's convert_outputs_to_fp32 copies the logits to fp32 (prepared model under mixed precision)."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 switches it off."""
    kernels: Kernels = "none"
    compile: bool = False
    tf32: bool = False
    """fp32 products run on tensor cores (torch.set_float32_matmul_precision "high"; off in PyTorch by default)."""
    own_modules: ModulesOf = "none"
    """Whose modules are trained: transformers' classes, or a framework's own."""
    longest_first: bool = False
    """The longest micro batch is the first of the run: nothing of one before it is alive."""
    optimizer_in_backward: bool = False
    added_tokens: int = 0
    """Tokens that the framework adds to the vocabulary before training (resize_token_embeddings)."""
    device_map: bool = False
    """from_pretrained puts the weights on the GPU itself (a device map; always where it quantizes)."""
    versions: Versions = field(default_factory=Versions)

    def __post_init__(self) -> None:
        choice("method", self.method)
        choice("checkpointing", self.gradient_checkpointing)
        choice("attention", self.attention)
        choice("loss", self.loss)
        choice("optimizer", self.optimizer)
        choice("kernels", self.kernels)
        choice("own modules", self.own_modules)
        choice("dtype", self.base_dtype)
        if self.autocast not in ("none", "bf16", "fp16"):
            raise unknown("autocast", self.autocast, ("none", "bf16", "fp16"))
        _positive("micro_batch_size", self.micro_batch_size, highest=2**20)
        _positive("seq_len", self.seq_len, highest=2**27)
        _positive("gradient_accumulation_steps", self.gradient_accumulation_steps, highest=2**20)
        _positive("added_tokens", self.added_tokens, lowest=0, highest=2**20)
        quantized = self.quantization.kind != "none"
        if self.method == "full" and (self.lora or quantized):
            what = "a LoRA adapter" if self.lora else f"a {self.quantization.kind} base"
            raise Contradiction(f"method full trains every 16/32-bit weight and excludes {what}; use lora or qlora")
        if self.method != "full" and self.lora is None:
            raise Contradiction(f"method {self.method} needs a LoRA adapter (r, alpha, target_modules)")
        if self.method == "qlora" and not quantized:
            raise Contradiction("method qlora needs a quantized base; choose nf4, fp4, int8, ... or method lora")
        if self.method == "lora" and quantized:
            raise Contradiction(
                f"method lora has a 16/32-bit base, not {self.quantization.kind}; use method qlora or quantization none"
            )
        if self.kbit_preparation and not quantized:
            raise Contradiction("k-bit preparation belongs to a quantized base; drop it or use method qlora")

    @property
    def gradient_accumulation_steps_exceed_one(self) -> bool:
        """Whether gradients of an earlier micro batch are alive during the forward."""
        return self.gradient_accumulation_steps > 1

    @property
    def rows_tokens(self) -> Any:
        """Tokens in one micro batch: micro_batch_size * seq_len (a polynomial in a sweep)."""
        return self.micro_batch_size * self.seq_len

    def describe(self) -> dict[str, Any]:
        """Return every setting as plain JSON values, nested specs flattened with a dot."""
        flat: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if hasattr(value, "__dataclass_fields__"):
                for sub in fields(value):
                    part = getattr(value, sub.name)
                    flat[f"{item.name}.{sub.name}"] = list(part) if isinstance(part, tuple) else part
            else:
                flat[item.name] = value
        return flat


def training_from_dict(values: dict[str, Any]) -> TrainingSpec:
    """Build a TrainingSpec from nested values or from the flat form of `TrainingSpec.describe()`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        group, dot, leaf = name.partition(".")
        if dot:
            nested.setdefault(group, {})[leaf] = value
        elif not (value is None and group in nested):
            nested[name] = value
    if "untied_head" in nested:  # as files of earlier releases say it
        nested["own_modules"] = "litgpt" if nested.pop("untied_head") else "none"
    parts: tuple[tuple[str, Any], ...] = (
        ("lora", LoraSpec),
        ("quantization", QuantizationSpec),
        ("versions", Versions),
    )
    for name, kind in parts:
        if isinstance(nested.get(name), dict):
            known = {f.name for f in fields(kind)}
            inner = {k: tuple(v) if isinstance(v, list) else v for k, v in nested[name].items() if k in known}
            nested[name] = kind(**inner)
    return TrainingSpec(**nested)


__all__ = ["DTYPE_BYTES", "KERNEL_SETS", "LOSSES", "OPTIMIZERS", "QUANTIZATIONS", "Kernels", "LoraSpec", "Loss",
"Optimizer", "Quantization", "TrainingSpec", "Versions", "training_from_dict"]  # fmt: skip
