"""Whose a parameter is: the unit it is gathered, trained and freed with, its module, its name there."""

from __future__ import annotations

from planner.base.records import NamedTuple


class Unit(NamedTuple):
    """What a strategy gathers, frees, recomputes and steps as one: a decoder layer, or all that is outside them."""

    layer: int
    """Of the record: an emulated layer or pattern of layers; -1: outside."""
    sublayer: int = 0
    """Which layer of a pattern."""


OUTSIDE = Unit(-1)
"""Embeddings, final norm and head."""


class Owner(NamedTuple):
    """Whose a parameter is."""

    unit: Unit
    module: str
    """Path of the module inside its decoder layer, or in the model for what is outside ("self_attn.q_proj")."""
    role: str
    """Name of the parameter in the module: weight, bias, lora_A, lora_B, ...; of a quantized weight the part."""
    trainable: bool
