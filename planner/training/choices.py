"""Choices of a training run: the words that are allowed."""

from __future__ import annotations

import typing
from typing import Any, Literal

from planner.base.errors import InvalidInput, one_line, unknown
from planner.training.losses import KERNEL_SETS, LOSSES
from planner.training.optimizers import OPTIMIZERS
from planner.training.own_modules import OWN_MODULES
from planner.training.quantizations import QUANTIZATIONS

Dtype = Literal["fp32", "bf16", "fp16"]

Method = Literal["full", "lora", "qlora", "dora"]

Checkpointing = Literal["none", "full", "offload"]

AttentionKernel = Literal["eager", "sdpa", "flash2"]

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": typing.get_args(Dtype),
    "method": typing.get_args(Method),
    "quantization": tuple(QUANTIZATIONS),
    "checkpointing": typing.get_args(Checkpointing),
    "attention": typing.get_args(AttentionKernel),
    "loss": tuple(LOSSES),
    "optimizer": tuple(OPTIMIZERS),
    "kernels": tuple(KERNEL_SETS),
    "own modules": tuple(OWN_MODULES),
}


def choice(what: str, value: str) -> Any:
    """Return `value` if it is one of the known values of `what`, else raise UnknownName listing them."""
    if value not in CHOICES[what]:
        raise unknown(what, value, CHOICES[what])
    return value


def _positive(name: str, value: Any, lowest: int = 1, highest: int = 2**40) -> None:
    if hasattr(value, "extremes"):  # a polynomial of a sweep is checked by its extremes
        low, high = value.extremes()
    elif isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput(f"{name} must be a whole number, not {one_line(value)!r}")
    else:
        low = high = value
    if low < lowest or high > highest:
        raise InvalidInput(f"{name} is {low if low < lowest else high}; must be between {lowest} and {highest}")
