"""Gemma and its successors: RMSNorm with (1 + weight), scaled embeddings, wide heads, later soft caps and windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.base.config_values import boolean, integer
from planner.model.families.parts import (
    Config,
    Sizes,
    activation,
    attention_bias,
    causal_lm,
    gated_mlp,
    head_norms,
    optional_integer,
    pre_norm_layer,
    sizes,
    stack,
    standard_attention,
    uniform,
    windows_from_types,
)
from planner.model.spec import Layer, ModelSpec, Norm


def _norm(name: str, size: int) -> Norm:
    return Norm(name=name, size=size, kind="rms_gemma")


def gemma(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=16, head_dim=256)
    attention = standard_attention(s, bias=attention_bias(config))
    act = activation(config, default="gelu_pytorch_tanh")
    # the first release wrote "gelu"; transformers takes it for the tanh form
    mlp = gated_mlp(s.hidden, s.intermediate, act="gelu_tanh" if act == "gelu" else act)
    layers = uniform(s, pre_norm_layer(attention, mlp, s, kind="rms_gemma"))
    final = _norm("model.norm", s.hidden)
    return causal_lm(config, model_id, s, layers, final_norm=final, tied=True, embedding_scale=True)


def _capped(config: Config, key: str, default: float | None) -> bool:
    """Return whether a soft cap is on: null switches it off, absent means the class default."""
    return config.get(key, default) is not None


def _sandwich(
    config: Config, model_id: str, s: Sizes, windows: Sequence[int], *, cap: float | None, **attention: Any
) -> ModelSpec:
    """Gemma 2 and 3: norms before and after both branches; `cap` is the class default of the cap on the logits."""
    act = activation(config, "hidden_activation", default="gelu_pytorch_tanh")

    def make(window: int) -> Layer:
        return Layer(
            mixer=standard_attention(s, bias=attention_bias(config), sliding_window=window, **attention),
            mlp=gated_mlp(s.hidden, s.intermediate, act=act),
            input_norm=_norm("input_layernorm", s.hidden),
            post_attention_norm=_norm("post_attention_layernorm", s.hidden),
            pre_mlp_norm=_norm("pre_feedforward_layernorm", s.hidden),
            post_mlp_norm=_norm("post_feedforward_layernorm", s.hidden),
        )

    return causal_lm(
        config,
        model_id,
        s,
        stack(windows, make),
        final_norm=_norm("model.norm", s.hidden),
        tied=True,
        embedding_scale=True,
        logit_softcap=_capped(config, "final_logit_softcapping", cap),
    )


def gemma2(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=4, head_dim=256)
    window = optional_integer(config, "sliding_window", 4096)
    windows = windows_from_types(config, s.layers, window, lambda i: (i + 1) % 2 != 0)
    capped = _capped(config, "attn_logit_softcapping", 50.0)
    return _sandwich(config, model_id, s, windows, cap=30.0, logit_softcap=capped, sdpa=False)


def gemma3_text(config: Config, model_id: str) -> ModelSpec:
    # the text_config of a multimodal file leaves out what equals the class defaults
    s = sizes(
        config,
        vocab_size=262208,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        intermediate_size=9216,
        max_position_embeddings=131072,
    )
    pattern = integer(config, "sliding_window_pattern", "_sliding_window_pattern", default=6)
    window = optional_integer(config, "sliding_window", 4096)
    if boolean(config, "use_bidirectional_attention", default=False):
        window = window // 2 + 1
    windows = windows_from_types(config, s.layers, window, lambda i: (i + 1) % pattern != 0)
    return _sandwich(config, model_id, s, windows, cap=None, **head_norms(s, "rms_gemma"))
