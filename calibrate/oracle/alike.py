"""Which decoder layers of a model are alike: by the modules, shapes and plain settings of the real classes.

A family may vary its layers by any key of its config; the classes built on the meta device show what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibrate.model import fake_model
from calibrate.model.layer_paths import LAYER

_NUMBERS = ("layer_idx", "layer_index", "layer_id", "layer_number", "idx")
"""Attributes that count layers and say nothing else."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Pattern:
    """A stack that starts with `prefix` layers of their own, then repeats `period` layers up to its end."""

    layers: int
    prefix: int
    period: int

    @property
    def rest(self) -> int:
        """Layers of the last, incomplete repetition."""
        return (self.layers - self.prefix) % self.period

    def depth(self, repetitions: int) -> int:
        """Layers of a stack that starts and ends like this one, with that many repetitions."""
        return self.prefix + repetitions * self.period + self.rest


def pattern(kinds: list[int]) -> Pattern:
    """Return the pattern that repeats the fewest layers (the whole stack if none repeats)."""
    best = Pattern(len(kinds), 0, len(kinds))
    for period in range(1, len(kinds)):
        prefix = 0
        for place in range(len(kinds) - period):
            if kinds[place] != kinds[place + period]:
                prefix = place + 1
        if prefix + period < best.prefix + best.period:
            best = Pattern(len(kinds), prefix, period)
    return best


def layer_kinds(config: dict[str, Any], layers: int | None = None) -> list[int]:
    """Return a number for every decoder layer, in order; equal numbers are layers of equal structure."""
    with torch.device("meta"):
        model = fake_model.causal_model(fake_model.model_config(config, layers), "sdpa", torch.bfloat16)[0]
    seen: dict[Any, int] = {}
    return [
        seen.setdefault(_signature(module), len(seen)) for name, module in model.named_modules() if LAYER.match(name)
    ]


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """Modules by name, class and plain attributes; parameters and buffers by shape and dtype."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        settings = sorted(
            (key, repr(value))
            for key, value in vars(module).items()
            if key not in _NUMBERS and not key.startswith("_") and _is_plain(value)
        )
        parts.append((name, type(module).__qualname__, tuple(settings)))
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return (*parts, *((name, tuple(t.shape), str(t.dtype)) for name, t in tensors))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)
