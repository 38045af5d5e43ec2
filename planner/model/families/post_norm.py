"""Families that normalise a branch's output instead of its input (OLMo 2 and 3, EXAONE 4), and OLMo before them."""

from __future__ import annotations

from collections.abc import Sequence

from planner.base.config_values import integer
from planner.model.families.parts import (
    Config,
    Sizes,
    activation,
    attention_bias,
    causal_lm,
    gated_mlp,
    optional_integer,
    sizes,
    stack,
    standard_attention,
    uniform,
    windows_from_types,
)
from planner.model.spec import Layer, ModelSpec, Norm, NormKind


def olmo(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)

    def norm(name: str) -> Norm:
        return Norm(name=name, size=s.hidden, kind="layernorm_upcast", weight=False)

    layer = Layer(
        mixer=standard_attention(s, bias=attention_bias(config), clips_qkv=bool(config.get("clip_qkv"))),
        mlp=gated_mlp(s.hidden, s.intermediate, act=activation(config)),
        input_norm=norm("input_layernorm"),
        pre_mlp_norm=norm("post_attention_layernorm"),
    )
    return causal_lm(config, model_id, s, uniform(s, layer), final_norm=norm("model.norm"), tied=False)


def _post_norm(
    config: Config,
    model_id: str,
    s: Sizes,
    kinds: Sequence[tuple[int, bool]],
    *,
    kind: NormKind,
    bias: bool,
    full: bool,
) -> ModelSpec:
    """A stack of post-norm layers, one (window, rotated) per layer; `full`: q and k norms span the projection."""

    def norm(name: str, size: int) -> Norm:
        return Norm(name=name, size=size, kind=kind)

    def make(key: tuple[int, bool]) -> Layer:
        return Layer(
            mixer=standard_attention(
                s,
                bias=bias,
                sliding_window=key[0],
                position="rope" if key[1] else "none",
                q_norm=norm("self_attn.q_norm", s.q_size if full else s.head_dim),
                k_norm=norm("self_attn.k_norm", s.kv_size if full else s.head_dim),
            ),
            mlp=gated_mlp(s.hidden, s.intermediate, act=activation(config)),
            post_attention_norm=norm("post_attention_layernorm", s.hidden),
            post_mlp_norm=norm("post_feedforward_layernorm", s.hidden),
        )

    final = norm("model.norm", s.hidden)
    return causal_lm(config, model_id, s, stack(kinds, make), final_norm=final, tied=False)


def olmo2(config: Config, model_id: str) -> ModelSpec:
    s, bias = sizes(config), attention_bias(config)
    return _post_norm(config, model_id, s, ((0, True),) * s.layers, kind="rms_fp32_weight", bias=bias, full=True)


def olmo3(config: Config, model_id: str) -> ModelSpec:
    s, bias = sizes(config), attention_bias(config)
    window = optional_integer(config, "sliding_window", 4096)
    windows = windows_from_types(config, s.layers, window, lambda i: (i + 1) % 4 != 0)
    kinds = [(w, True) for w in windows]
    return _post_norm(config, model_id, s, kinds, kind="rms_fp32_weight", bias=bias, full=True)


def exaone4(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=32)
    window = optional_integer(config, "sliding_window", 4096)
    # published files also write the pattern as letters ("LLLG") beside the layer_types that decide
    listed = config.get("layer_types") is not None
    pattern = integer(config, "sliding_window_pattern", default=4, low=0) if window and not listed else 0
    windows = windows_from_types(config, s.layers, window, lambda i: bool(pattern) and (i + 1) % pattern != 0)
    # only sliding layers rotate, unless no layer slides
    kinds = [(w, bool(w) or not window) for w in windows]
    return _post_norm(config, model_id, s, kinds, kind="rms", bias=False, full=False)
