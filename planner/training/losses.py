"""LOSSES and KERNEL_SETS: the ways to compute the loss, and the sets of fused kernels, one row each.

Sources: transformers loss/loss_utils.py, torchtune loss/ce_chunked_output_loss.py, liger_kernel (transformers/ and
ops/), unsloth kernels/, fms-acceleration plugins/fused-ops-and-kernels.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, Literal

from planner.base.records import Rows, record

Loss = Literal["full-logits-fp32", "full-logits", "chunked", "fused"]
Kernels = Literal["none", "liger", "unsloth", "fms-fused"]

Logits = Literal["whole", "chunks", "never"]
"""Whether logits of all tokens exist at once; in chunks (the 16-bit ones do, their fp32 copy does not); or a part of
them at a time, which becomes its gradient in place."""


@record
class LossRow:
    """One way to compute the loss. All fields are required: what is forgotten fails at import, by name."""

    logits: Logits
    upcasts: bool
    """Whole logits are copied to fp32 before the cross entropy."""

    @property
    def traced(self) -> bool:
        """Whether a trace of transformers' own classes can run it."""
        return self.logits == "whole"


LOSSES = Rows(
    "loss",
    typing.get_args(Loss),
    (
        ("full-logits-fp32", LossRow(logits="whole", upcasts=True)),
        ("full-logits", LossRow(logits="whole", upcasts=False)),
        ("chunked", LossRow(logits="chunks", upcasts=False)),
        ("fused", LossRow(logits="never", upcasts=False)),
    ),
)

LEAST = LOSSES.where(lambda row: row.logits == "never")[0]
"""The loss that holds the least of the logits."""
UPCAST = LOSSES.where(lambda row: row.logits == "whole" and row.upcasts)[0]
"""Whole logits in fp32, as transformers, torchtune and litgpt compute them unless told."""


@record
class KernelSet:
    """One set of fused kernels. All fields are required: what is forgotten fails at import, by name."""

    fuses_rotary: bool
    """A Triton kernel rotates q and k in place."""
    fuses_norms: bool
    """A Triton RMSNorm takes the place of the class's own."""
    norm_grad_in_place: bool
    """Its backward writes the input's gradient over the output's (unsloth makes a new one)."""
    fuses_swiglu: bool
    """act(gate) * up is one function that keeps both and writes their gradients over them."""
    fuses_lora: bool
    """Projections that share an input are one autograd function with their adapters."""
    loss_grad_in_place: bool
    """unsloth's cross entropy: keeps the logits it was given and writes the gradient over them."""
    upcasts_logits: bool
    """The logits are copied to fp32 whatever the loss is called (fms runs transformers' own forward)."""
    offloads_aside: bool
    """Its checkpointing copies offloaded inputs in a stream of its own (unsloth_zoo/gradient_checkpointing.py)."""
    doubt: float
    """Share of allocated memory by which it may be off, as it is modelled coarsely."""
    transformers_argument: str
    """The argument of TrainingArguments that switches it on; empty: only its own trainer has it."""
    llama_factory_argument: str
    """The key of LLaMA-Factory that does; empty: none."""
    axolotl_values: Mapping[str, Any]
    """The keys of axolotl that do; empty: none."""
    default_loss: Loss | Literal[""]
    """The loss of a run with these kernels where nobody names one; empty: as without kernels."""


_AXOLOTL_LIGER = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_fused_linear_cross_entropy": True,
}  # fmt: skip

KERNEL_SETS = Rows(
    "kernels",
    typing.get_args(Kernels),
    (
        ("none", KernelSet(
            fuses_rotary=False, fuses_norms=False, norm_grad_in_place=False, fuses_swiglu=False, fuses_lora=False,
            loss_grad_in_place=False, upcasts_logits=False,
            offloads_aside=False, doubt=0.0, transformers_argument="",
            llama_factory_argument="", axolotl_values={}, default_loss="",
        )),
        ("liger", KernelSet(
            fuses_rotary=True, fuses_norms=True, norm_grad_in_place=True, fuses_swiglu=True, fuses_lora=False,
            loss_grad_in_place=False, upcasts_logits=False,
            offloads_aside=False, doubt=0.0, transformers_argument="use_liger_kernel",
            llama_factory_argument="enable_liger_kernel", axolotl_values=_AXOLOTL_LIGER, default_loss="fused",
        )),
        ("unsloth", KernelSet(
            fuses_rotary=True, fuses_norms=True, norm_grad_in_place=False, fuses_swiglu=True, fuses_lora=False,
            loss_grad_in_place=True, upcasts_logits=False,
            offloads_aside=True, doubt=0.06, transformers_argument="",
            llama_factory_argument="", axolotl_values={}, default_loss="fused",
        )),
        ("fms-fused", KernelSet(
            fuses_rotary=True, fuses_norms=True, norm_grad_in_place=True, fuses_swiglu=False, fuses_lora=True,
            loss_grad_in_place=True, upcasts_logits=True,
            offloads_aside=False, doubt=0.0, transformers_argument="",
            llama_factory_argument="", axolotl_values={}, default_loss="full-logits",
        )),
    ),
)  # fmt: skip
