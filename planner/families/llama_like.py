"""Families with the llama layer: RMSNorm, rotary attention with separate projections, gated feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.config_values import boolean, integer
from planner.families.parts import (
    Config,
    Sizes,
    activation,
    causal_lm,
    gated_mlp,
    optional_integer,
    pre_norm_layer,
    sizes,
    stack,
    standard_attention,
    windows_from_types,
)
from planner.model import Layer, ModelSpec, Norm


def _spec(
    config: Config,
    model_id: str,
    s: Sizes,
    *,
    windows: Sequence[int] = (),
    tied: bool = False,
    bias: bool = False,
    out_bias: bool | None = None,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    layer: dict[str, Any] | None = None,
    **rest: Any,
) -> ModelSpec:
    """A stack of llama layers; `windows` has one entry per layer (empty: full attention everywhere)."""

    def make(window: int) -> Layer:
        norms = {n: Norm(name=f"self_attn.{n}", size=s.head_dim) for n in ("q_norm", "k_norm")} if qk_norm else {}
        attention = standard_attention(s, bias=bias, out_bias=out_bias, sliding_window=window, **norms)
        mlp = gated_mlp(s.hidden, s.intermediate, bias=mlp_bias, act=activation(config))
        return pre_norm_layer(attention, mlp, s, **(layer or {}))

    return causal_lm(
        config,
        model_id,
        s,
        stack(windows or (0,) * s.layers, make),
        final_norm=Norm(name="model.norm", size=s.hidden),
        tied=tied,
        **rest,
    )


def llama(config: Config, model_id: str) -> ModelSpec:
    bias = boolean(config, "attention_bias", default=False)
    return _spec(config, model_id, sizes(config), bias=bias, mlp_bias=boolean(config, "mlp_bias", default=False))


def mistral(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8)
    return _spec(config, model_id, s, windows=(optional_integer(config, "sliding_window", 4096),) * s.layers)


def ministral3(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8, head_dim=128)
    return _spec(config, model_id, s, windows=(optional_integer(config, "sliding_window"),) * s.layers)


def qwen_windows(config: Config, layers: int) -> tuple[int, ...]:
    """Qwen2 and Qwen3: layers from max_window_layers on slide, if use_sliding_window says so."""
    used = boolean(config, "use_sliding_window", default=False)
    window = optional_integer(config, "sliding_window", 4096) if used else 0
    first = integer(config, "max_window_layers", default=28, low=0)
    return windows_from_types(config, layers, window, lambda i: bool(window) and i >= first)


def qwen2(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=32)
    return _spec(config, model_id, s, windows=qwen_windows(config, s.layers), bias=True, out_bias=False)


def qwen3(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=32, head_dim=128)
    windows = qwen_windows(config, s.layers)
    bias = boolean(config, "attention_bias", default=False)
    return _spec(config, model_id, s, windows=windows, bias=bias, qk_norm=True)
