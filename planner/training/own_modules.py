"""OWN_MODULES: whose modules are trained, transformers' classes or a framework's own, one row each.

What such modules do otherwise in a step is in `planner.step.classes`, in a file of the row's name; here is what the
count of parameters, the warnings and the intervals need to know.
"""

from __future__ import annotations

import typing
from typing import Literal

from planner.base.records import Rows, record

ModulesOf = Literal["none", "litgpt"]


@record
class OwnModules:
    """Modules that a framework trains. All fields are required: what is forgotten fails at import, by name."""

    ties_head: bool
    """The head is the embedding's weight where the model ties them."""
    exact_linears: bool
    """Every linear module is exactly nn.Linear, which bitsandbytes converts (it leaves a class's subclasses alone)."""
    keeps_fp32: bool
    """Parameters that transformers' class keeps in fp32 are kept so."""
    takes_kernels: bool
    """Fused kernels (liger, unsloth, fms) can replace them."""
    takes_eager: bool
    """They have an eager attention, which materializes the scores."""
    knows_chunks: bool
    """How many chunks the head and the loss work in, and how long they live, was read."""


OWN_MODULES = Rows(
    "own modules",
    typing.get_args(ModulesOf),
    (
        ("none", OwnModules(
            ties_head=True, exact_linears=False, keeps_fp32=True, takes_kernels=True, takes_eager=True,
            knows_chunks=False,
        )),
        # Lightning-AI/litgpt@2685705 model.py (its own GPT: lm_head apart from wte, SDPA only), finetune/lora.py
        ("litgpt", OwnModules(
            ties_head=False, exact_linears=True, keeps_fp32=False, takes_kernels=False, takes_eager=False,
            knows_chunks=True,
        )),
    ),
)  # fmt: skip
