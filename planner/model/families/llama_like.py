"""Families with the llama layer: RMSNorm, rotary attention with separate projections, gated feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.base.config_values import boolean, integer, integer_list
from planner.model.families.parts import (
    Config,
    Sizes,
    activation,
    attention_bias,
    causal_lm,
    drops,
    gated_mlp,
    head_norms,
    mlp_bias,
    optional_integer,
    pre_norm_layer,
    sizes,
    stack,
    standard_attention,
    windows_from_types,
)
from planner.model.spec import Layer, ModelSpec, Norm, NormKind


def spec(
    config: Config,
    model_id: str,
    s: Sizes,
    *,
    windows: Sequence[int] = (),
    rotates: Sequence[bool] = (),
    tied: bool = False,
    bias: bool = False,
    out_bias: bool | None = None,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    kind: NormKind = "rms",
    attention: dict[str, Any] | None = None,
    layer: dict[str, Any] | None = None,
    **rest: Any,
) -> ModelSpec:
    """A stack of llama layers.

    `windows` and `rotates` have one entry per layer (empty: full attention, rotary positions everywhere);
    `attention`, `layer` and `rest` are further fields of Attention, Layer and ModelSpec.
    """

    def make(key: tuple[int, bool]) -> Layer:
        window, rotated = key
        norms = head_norms(s, kind) if qk_norm else {}
        position = "rope" if rotated else "none"
        more: dict[str, Any] = {"sliding_window": window, "position": position, **norms, **(attention or {})}
        attends = standard_attention(s, bias=bias, out_bias=out_bias, **more)
        mlp = gated_mlp(s.hidden, s.intermediate, bias=mlp_bias, act=activation(config))
        return pre_norm_layer(attends, mlp, s, kind=kind, **(layer or {}))

    keys = zip(windows or (0,) * s.layers, rotates or (True,) * s.layers, strict=True)
    final = Norm(name="model.norm", size=s.hidden, kind=kind)
    return causal_lm(config, model_id, s, stack(keys, make), final_norm=final, tied=tied, **rest)


def llama(config: Config, model_id: str) -> ModelSpec:
    return spec(config, model_id, sizes(config), bias=attention_bias(config), mlp_bias=mlp_bias(config))


def mistral(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8)
    return spec(config, model_id, s, windows=(optional_integer(config, "sliding_window", 4096),) * s.layers)


def ministral3(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8, head_dim=128)
    return spec(config, model_id, s, windows=(optional_integer(config, "sliding_window"),) * s.layers)


def qwen_windows(config: Config, layers: int) -> tuple[int, ...]:
    """Qwen2 and Qwen3: layers from max_window_layers on slide, if use_sliding_window says so."""
    used = boolean(config, "use_sliding_window", default=False)
    window = optional_integer(config, "sliding_window", 4096) if used else 0
    first = integer(config, "max_window_layers", default=28, low=0)
    return windows_from_types(config, layers, window, lambda i: bool(window) and i >= first)


def qwen2(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=32)
    return spec(config, model_id, s, windows=qwen_windows(config, s.layers), bias=True, out_bias=False)


def qwen3(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=32, head_dim=128)
    windows = qwen_windows(config, s.layers)
    return spec(config, model_id, s, windows=windows, bias=attention_bias(config), qk_norm=True)


def granite(config: Config, model_id: str) -> ModelSpec:
    return spec(
        config,
        model_id,
        sizes(config),
        bias=attention_bias(config),
        mlp_bias=mlp_bias(config),
        layer={"residual_multiplier": True},
        embedding_scale=True,
        logit_scale=True,
    )


def smollm3(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=4)
    interval = integer(config, "no_rope_layer_interval", default=4)
    every = [int((i + 1) % interval != 0) for i in range(s.layers)]
    rotates = integer_list(config, "no_rope_layers", default=every, low=0, high=1, length=s.layers)
    used = boolean(config, "use_sliding_window", default=False)
    window = optional_integer(config, "sliding_window") if used else 0
    return spec(
        config,
        model_id,
        s,
        windows=windows_from_types(config, s.layers, window, lambda i: bool(window) and not rotates[i]),
        rotates=[bool(r) for r in rotates],
        tied=True,
        bias=attention_bias(config),
        mlp_bias=mlp_bias(config),
    )


def seed_oss(config: Config, model_id: str) -> ModelSpec:
    return spec(
        config,
        model_id,
        sizes(config, num_key_value_heads=8, head_dim=128, attention_dropout=0.1),
        bias=attention_bias(config, True),
        out_bias=boolean(config, "attention_out_bias", default=False),
        mlp_bias=mlp_bias(config),
        layer={"hidden_dropout": drops(config, "residual_dropout", default=0.1)},
    )


def ernie4_5(config: Config, model_id: str) -> ModelSpec:
    bias = boolean(config, "use_bias", default=False)
    s = sizes(config, num_key_value_heads=2, head_dim=128)
    return spec(config, model_id, s, tied=True, bias=bias, mlp_bias=bias)


def helium(config: Config, model_id: str) -> ModelSpec:
    return spec(
        config,
        model_id,
        sizes(config, num_key_value_heads=20, head_dim=128),
        bias=attention_bias(config),
        out_bias=False,
        mlp_bias=mlp_bias(config),
        kind="rms_fp32_weight",
    )
