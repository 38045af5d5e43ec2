"""Mixture-of-experts families with standard attention."""

from __future__ import annotations

from typing import Any

from planner.config_values import integer
from planner.families.parts import (
    Config,
    Sizes,
    activation,
    causal_lm,
    optional_integer,
    pre_norm_layer,
    sizes,
    stack,
    standard_attention,
)
from planner.model import Experts, Layer, Linear, ModelSpec, Norm


def experts(
    config: Config, s: Sizes, *, count: int, top_k: int, width: int, prefix: str = "mlp", router: str = "gate", **rest: Any
) -> Experts:
    """A block of fused experts behind a bare-weight router."""
    bias = bool(rest.pop("router_bias", False))
    return Experts(
        num_experts=count,
        top_k=top_k,
        hidden_size=s.hidden,
        intermediate_size=width,
        name=f"{prefix}.experts",
        router=Linear(name=f"{prefix}.{router}", in_features=s.hidden, out_features=count, bias=bias),
        activation=activation(config),
        **rest,
    )


def mixtral(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8)
    block = experts(
        config,
        s,
        count=integer(config, "num_local_experts", "num_experts", default=8),
        top_k=integer(config, "num_experts_per_tok", default=2),
        width=s.intermediate,
    )

    def make(window: int) -> Layer:
        return pre_norm_layer(standard_attention(s, sliding_window=window), block, s)

    return causal_lm(
        config,
        model_id,
        s,
        stack((optional_integer(config, "sliding_window"),) * s.layers, make),
        final_norm=Norm(name="model.norm", size=s.hidden),
        tied=False,
    )
