"""Microsoft's Phi families."""

from __future__ import annotations

from planner.families.parts import (
    Config,
    activation,
    causal_lm,
    fused_attention,
    fused_gated_mlp,
    optional_integer,
    optional_number,
    pre_norm_layer,
    rotary_width,
    sizes,
    stack,
)
from planner.model import Layer, ModelSpec, Norm


def phi3(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    rotary = rotary_width(config, s.head_dim)

    def make(window: int) -> Layer:
        attention = fused_attention(
            s,
            qkv="self_attn.qkv_proj",
            out="self_attn.o_proj",
            sliding_window=window,
            rotary_dim=rotary if rotary < s.head_dim else 0,
        )
        mlp = fused_gated_mlp(s.hidden, s.intermediate, act=activation(config))
        dropout = optional_number(config, "resid_pdrop") > 0
        return pre_norm_layer(attention, mlp, s, hidden_dropout=dropout)

    return causal_lm(
        config,
        model_id,
        s,
        stack((optional_integer(config, "sliding_window"),) * s.layers, make),
        final_norm=Norm(name="model.norm", size=s.hidden),
        tied=False,
        embedding_dropout=optional_number(config, "embd_pdrop") > 0,
    )
