"""Families with LayerNorm and an ungated feed-forward: GPT-2, GPT-NeoX and relatives."""

from __future__ import annotations

from planner.config_values import boolean
from planner.families.parts import (
    Config,
    activation,
    causal_lm,
    fused_attention,
    layer_norm,
    optional_number,
    plain_mlp,
    pre_norm_layer,
    rotary_width,
    sizes,
    stack,
)
from planner.model import Layer, ModelSpec, Table


def gpt2(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, intermediate_size=4 * sizes(config, intermediate_size=1).hidden, max_position_embeddings=1024)

    def make(_: int) -> Layer:
        return Layer(
            attention=fused_attention(
                s,
                qkv="attn.c_attn",
                out="attn.c_proj",
                bias=True,
                cls="Conv1D",
                position="learned",
                dropout=optional_number(config, "attn_pdrop", 0.1) > 0,
            ),
            mlp=plain_mlp(
                s.hidden,
                s.intermediate,
                up="mlp.c_fc",
                down="mlp.c_proj",
                cls="Conv1D",
                act=activation(config, "activation_function", default="gelu_new"),
            ),
            input_norm=layer_norm("ln_1", s.hidden),
            pre_mlp_norm=layer_norm("ln_2", s.hidden),
            hidden_dropout=optional_number(config, "resid_pdrop", 0.1) > 0,
        )

    return causal_lm(
        config,
        model_id,
        s,
        stack((0,) * s.layers, make),
        final_norm=layer_norm("transformer.ln_f", s.hidden),
        tied=True,
        embedding="transformer.wte",
        position_embedding=Table(name="transformer.wpe", rows=s.positions, width=s.hidden),
        embedding_dropout=optional_number(config, "embd_pdrop", 0.1) > 0,
        layer_prefix="transformer.h",
    )


def gpt_neox(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    bias = boolean(config, "attention_bias", default=True)

    def make(_: int) -> Layer:
        attention = fused_attention(
            s,
            qkv="attention.query_key_value",
            out="attention.dense",
            bias=bias,
            rotary_dim=rotary_width(config, s.head_dim, 0.25),
            rope_style="neox",
        )
        mlp = plain_mlp(
            s.hidden,
            s.intermediate,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            act=activation(config, default="gelu"),
        )
        return pre_norm_layer(
            attention,
            mlp,
            s,
            kind="layernorm",
            parallel=boolean(config, "use_parallel_residual", default=True),
            hidden_dropout=optional_number(config, "hidden_dropout") > 0,
        )

    return causal_lm(
        config,
        model_id,
        s,
        stack((0,) * s.layers, make),
        final_norm=layer_norm("gpt_neox.final_layer_norm", s.hidden),
        tied=False,
        embedding="gpt_neox.embed_in",
        layer_prefix="gpt_neox.layers",
    )
