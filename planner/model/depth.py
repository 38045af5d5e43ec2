"""A model's config with its first layers only: every key that says something of each layer is cut along.

Field names are those of config.json (transformers models/*/configuration_*.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names that the number of layers has; a config that has none gets the first."""
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Lists with one entry for every layer."""
INDEX_KEYS = ("moe_layers", "mlp_only_layers")
"""Lists of the layers that something holds for (llama4: with experts; qwen2_moe and qwen3_moe: without)."""
PATTERN_KEY = "attention_types"
"""gpt_neo: [[[kind, ...], times], ...], together as long as the model is deep."""
FIRST_LAYERS_KEYS = ("max_window_layers", "first_k_dense_replace")
"""How many of the first layers something holds for: at most all of them."""


def first_layers(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """The config of the first `layers` decoder layers (of the language model, where it is nested); None: all."""
    made = dict(config)
    if layers is None:
        return made
    if isinstance(made.get("text_config"), Mapping) and "hidden_size" not in made:
        return {**made, "text_config": first_layers(made["text_config"], layers)}
    depths = [key for key in DEPTH_KEYS if key in made] or [DEPTH_KEYS[0]]
    made |= dict.fromkeys(depths, layers)
    for key in PER_LAYER_KEYS:
        if isinstance(made.get(key), (list, tuple)):
            made[key] = list(made[key][:layers])
    for key in INDEX_KEYS:
        if isinstance(made.get(key), (list, tuple)):
            made[key] = [index for index in made[key] if index < layers]
    for key in FIRST_LAYERS_KEYS:
        if isinstance(made.get(key), int):
            made[key] = min(made[key], layers)
    if isinstance(made.get(PATTERN_KEY), (list, tuple)):
        kinds = [kind for pattern, times in made[PATTERN_KEY] for kind in list(pattern) * times]
        made[PATTERN_KEY] = [[[kind], 1] for kind in kinds[:layers]]
    return made


def lists_layers(config: Mapping[str, Any]) -> bool:
    """Whether a config says something of each layer, so that another depth takes more than one number."""
    return any(config.get(key) for key in (*PER_LAYER_KEYS, *INDEX_KEYS, PATTERN_KEY, "text_config"))
