"""The settings of a training run: keys, allowed values, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.base.config_values import names
from planner.base.errors import InvalidInput, one_line, unknown
from planner.base.records import NamedTuple, fields, record
from planner.training.choices import CHOICES
from planner.training.quantizations import QUANTIZATIONS
from planner.training.spec import Versions
from planner.training.versions import parse_versions

KEYS: tuple[str, ...] = (
    "method", "versions", "quantization", "double_quant", "base_dtype", "autocast", "compute_dtype", "adapter_dtype",
    "kbit_preparation", "fp32_norms_only", "quantized_modules", "skip_modules", "group_size", "r", "lora_alpha",
    "lora_dropout", "target_modules", "target_slices", "modules_to_save", "use_dora", "use_rslora",
    "micro_batch_size", "seq_len", "gradient_accumulation_steps", "gradient_checkpointing", "use_reentrant",
    "attention", "padded", "kernels", "loss", "optimizer", "optimizer_in_backward", "max_grad_norm", "keeps_outputs",
    "outputs_to_fp32", "compile", "tf32", "untied_head", "longest_first", "added_tokens", "device_map",
)  # fmt: skip
"""Option keys in the order they are resolved: a default may depend on keys to its left only."""

ADAPTER_KEYS = frozenset(
    {"r", "lora_alpha", "lora_dropout", "target_modules", "target_slices", "modules_to_save", "use_dora", "use_rslora"}
    | {"adapter_dtype"}
)

QUANTIZATION_KEYS = frozenset(
    {"double_quant", "compute_dtype", "kbit_preparation", "fp32_norms_only", "quantized_modules", "skip_modules"}
    | {"group_size"}
)

_BOOLEANS = frozenset(
    {"double_quant", "kbit_preparation", "fp32_norms_only", "use_dora", "use_rslora", "use_reentrant", "padded"}
    | {"optimizer_in_backward", "keeps_outputs", "outputs_to_fp32", "compile", "tf32", "untied_head", "device_map"}
) | {"longest_first"}

_CHOSEN = {
    "method": "method", "quantization": "quantization", "base_dtype": "dtype", "compute_dtype": "dtype",
    "adapter_dtype": "dtype", "gradient_checkpointing": "checkpointing", "attention": "attention",
    "kernels": "kernels", "loss": "loss", "optimizer": "optimizer",
}  # fmt: skip

_FIXED = {"autocast": ("none", "bf16", "fp16"), "quantized_modules": ("linears", "adapted-only", "none")}

_NUMBERS = frozenset({"lora_alpha", "lora_dropout", "max_grad_norm"})

_NAME_LISTS = frozenset({"target_modules", "modules_to_save", "skip_modules"})


class Setting(NamedTuple):
    """A resolved value and where it came from: "given", "file NAME:LINE KEY", "stack NAME: SOURCE", ... ."""

    value: object
    origin: str

    @property
    def is_given(self) -> bool:
        """Whether the user stated it, typed or in a config file."""
        return self.origin == "given" or self.origin.startswith("file ")


@record
class Resolved:
    """Every option of one run with its origin."""

    stack: str
    settings: Mapping[str, Setting]
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.settings[key].value

    def applies(self, key: str) -> bool:
        """Whether the run uses `key` at all (a full fine-tuning has no rank, an unquantized base no group size)."""
        if key in ADAPTER_KEYS:
            return bool(self["method"] != "full")
        if key in QUANTIZATION_KEYS:
            return bool(self["quantization"] != "none") and (
                key != "group_size" or QUANTIZATIONS[self["quantization"]].grouped
            )
        return key != "use_reentrant" or self["gradient_checkpointing"] != "none"

    def defaults_used(self) -> dict[str, Setting]:
        """The settings that apply and that the user did not give, in a fixed order."""
        return {k: s for k, s in self.settings.items() if not s.is_given and self.applies(k)}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return value and origin of every setting as plain JSON values."""
        return {key: {"value": _plain(s.value), "origin": s.origin} for key, s in self.settings.items()}


def _checked(given: Mapping[str, object]) -> dict[str, object]:
    """Drop what is not given and bring each value into its one form."""
    chosen: dict[str, object] = {}
    for key, value in given.items():
        if key not in KEYS:
            raise unknown("option", key, KEYS)
        if value is not None:
            chosen[key] = _normal(key, value)
    return chosen


def _normal(key: str, value: Any) -> object:
    if key in _CHOSEN and value not in CHOICES[_CHOSEN[key]]:
        raise unknown(key, value, CHOICES[_CHOSEN[key]])
    if key in _FIXED and value not in _FIXED[key]:
        raise unknown(key, value, _FIXED[key])
    if key in _BOOLEANS and not isinstance(value, bool):
        raise InvalidInput(f"{key} is {one_line(value)!r}; must be true or false")
    if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9):
        raise InvalidInput(f"{key} is {one_line(value)!r}; must be a number from 0 to 1e9")
    if key in _NAME_LISTS:
        return names(key, value)
    if key == "target_slices":
        return _slices(value)
    if key == "versions":
        return value if isinstance(value, Versions) else parse_versions(value)
    return value


def _slices(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(type(part) is int and 0 <= part < 8 for part in value):
        raise InvalidInput(f"target_slices is {one_line(value)!r}; must be a list of part numbers, for example [0, 2]")
    return tuple(value)


def _plain(value: object) -> Any:
    if isinstance(value, Versions):
        return {f.name: ".".join(map(str, getattr(value, f.name))) for f in fields(Versions)}
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


_DTYPES = {
    "float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "no": "none",
}  # fmt: skip

_ATTENTION = {"flash_attention_2": "flash2", "flash-attention-2": "flash2", "flash": "flash2", "fa2": "flash2"}

_CHECKPOINTING = {"true": "full", "on": "full", "false": "none", "off": "none", "unsloth": "offload"}
