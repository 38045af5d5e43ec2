"""Models of transformers without weights, and their modules beside those that a spec plans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from planner.model.spec import ModelSpec


def real_model(config: dict[str, Any]) -> Any:
    """Return transformers' model of a config, without memory for its weights."""
    rest = {k: v for k, v in config.items() if k != "model_type"}
    settings = transformers.AutoConfig.for_model(config["model_type"], **rest)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


def real_linears(model: Any) -> dict[str, tuple[str, int, int, bool]]:
    """Return every linear module: class, in, out, bias."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found[name] = ("Conv1D", *module.weight.shape, True)
        elif isinstance(module, torch.nn.Linear):
            kind = "Linear" if type(module) is torch.nn.Linear else "subclass"
            found[name] = (kind, module.in_features, module.out_features, module.bias is not None)
    return found


def planned_linears(spec: ModelSpec) -> dict[str, tuple[str, int, int, bool]]:
    """Return the same from the spec."""
    named = [(x.name, x) for x in (*spec.embedding_projections, spec.head)]
    for index, layer in enumerate(spec.layers):
        named += [(f"{spec.layer_prefix}.{index}.{x.name}", x) for x in layer.linears]
    return {name: (x.cls, x.in_features, x.out_features, x.bias) for name, x in named}


def planned_norms(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """Yield path and parameters of every normalisation."""
    for norm in (spec.embedding_norm, spec.final_norm):
        if norm is not None:
            yield norm.name, norm.num_parameters
    for index, layer in enumerate(spec.layers):
        for norm in (*layer.norms, *layer.mixer.norms):
            yield f"{spec.layer_prefix}.{index}.{norm.name}", norm.num_parameters
