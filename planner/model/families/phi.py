"""Microsoft's Phi families."""

from __future__ import annotations

from typing import Any

from planner.base.config_values import boolean
from planner.model.families.parts import (
    Config,
    activation,
    causal_lm,
    drops,
    fused_attention,
    fused_gated_mlp,
    layer_norm,
    optional_integer,
    plain_mlp,
    pre_norm_layer,
    rotary_width,
    sizes,
    standard_attention,
    uniform,
)
from planner.model.spec import Layer, ModelSpec, Norm


def phi(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    norms: dict[str, Any] = {}
    if boolean(config, "qk_layernorm", default=False):
        norms = {f"{x}_norm": layer_norm(f"self_attn.{x}_layernorm", s.head_dim) for x in ("q", "k")}
    layer = Layer(
        mixer=standard_attention(
            s,
            out="dense",
            bias=True,
            rotary_dim=rotary_width(config, s.head_dim, 0.5),
            **norms,
        ),
        mlp=plain_mlp(
            s.hidden, s.intermediate, up="mlp.fc1", down="mlp.fc2", act=activation(config, default="gelu_new")
        ),
        input_norm=layer_norm("input_layernorm", s.hidden),
        parallel=True,
        hidden_dropout=drops(config, "resid_pdrop"),
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=layer_norm("model.final_layernorm", s.hidden),
        tied=False,
        head_bias=True,
        embedding_dropout=drops(config, "embd_pdrop"),
    )


def phi3(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    attention = fused_attention(
        s,
        qkv="self_attn.qkv_proj",
        out="self_attn.o_proj",
        sliding_window=optional_integer(config, "sliding_window"),
        rotary_dim=rotary_width(config, s.head_dim),
        sdpa_since=(4, 45),  # Phi3SdpaAttention is there before, _supports_sdpa is not (modeling_phi3.py v4.44.2)
    )
    mlp = fused_gated_mlp(s.hidden, s.intermediate, act=activation(config))
    layer = pre_norm_layer(attention, mlp, s, hidden_dropout=drops(config, "resid_pdrop"))
    return causal_lm(
        config, model_id, s, uniform(s, layer), final_norm=Norm(name="model.norm", size=s.hidden), tied=False
    )
