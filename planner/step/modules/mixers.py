"""Mixers: what a layer has between its tokens (attention, latent attention, ...), one row for each kind.

A model's layer holds the record of a mixer (`planner.model.spec.Mixer`): its linear modules, norms and other weights,
which loading, quantization, adapters and counts read from there. What it computes and keeps is `forward` here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

from planner.base.records import Rows, record
from planner.model.spec import MixerKind
from planner.step.context import Step
from planner.step.engine import Tensor
from planner.step.modules.attention import attention
from planner.step.modules.feed_forward import Finish
from planner.step.modules.latent_attention import latent_attention
from planner.step.modules.weights import LayerWeights


@record
class MixerRow:
    """How one kind of mixer runs and what is said of it."""

    forward: Callable[[Step, LayerWeights, Tensor, Finish | None], Tensor]
    """The module: [tokens, hidden] to the same; the last argument, if any, is what follows inside the module.

    Rotary tables and masks are made for the layers whose mixer is an `Attention`; other mixers get none.
    """
    label: str
    """Its name in lists of a model's layers."""
    in_own_modules: bool
    """Whether a framework with modules of its own (litgpt) has it; else transformers' layer runs there."""
    uncertainty: tuple[tuple[str, float], ...]
    """Why the allocated figure of a model with it may be off, each with its relative share."""


MIXERS: Rows[MixerRow] = Rows(
    "mixer",
    typing.get_args(MixerKind),
    (
        (
            "standard",
            MixerRow(forward=attention, label="standard attention", in_own_modules=True, uncertainty=()),
        ),
        (
            "mla",
            MixerRow(forward=latent_attention, label="mla attention", in_own_modules=False, uncertainty=()),
        ),
    ),
)
"""Kind of mixer -> its row."""
