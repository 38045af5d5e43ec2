"""Zhipu's GLM families: fused gate and up projections, half-rotated heads."""

from __future__ import annotations

from typing import Any

from planner.base.config_values import boolean, integer
from planner.model.families.parts import (
    MAX_WIDTH,
    Config,
    activation,
    attention_bias,
    causal_lm,
    fused_attention,
    fused_gated_mlp,
    pre_norm_layer,
    rotary_width,
    sizes,
    standard_attention,
    uniform,
)
from planner.model.spec import ModelSpec, Norm


def _dense(config: Config, model_id: str, **norms: str) -> ModelSpec:
    """GLM and GLM-4 (the latter adds norms after both branches)."""
    s = sizes(config, num_key_value_heads=2, head_dim=128)
    attention = standard_attention(
        s,
        bias=attention_bias(config, True),
        out_bias=False,
        rotary_dim=rotary_width(config, s.head_dim, 0.5),
    )
    mlp = fused_gated_mlp(s.hidden, s.intermediate, act=activation(config))
    after: dict[str, Any] = {field: Norm(name=name, size=s.hidden) for field, name in norms.items()}
    layer = pre_norm_layer(attention, mlp, s, **after)
    final = Norm(name="model.norm", size=s.hidden)
    return causal_lm(config, model_id, s, uniform(s, layer), final_norm=final, tied=False)


def glm(config: Config, model_id: str) -> ModelSpec:
    return _dense(config, model_id)


def glm4(config: Config, model_id: str) -> ModelSpec:
    return _dense(config, model_id, post_attention_norm="post_self_attn_layernorm", post_mlp_norm="post_mlp_layernorm")


def chatglm(config: Config, model_id: str) -> ModelSpec:
    """ChatGLM 2 and 3 (the model's own code)."""
    groups = boolean(config, "multi_query_attention", default=False)
    width = integer(config, "kv_channels", default=128, high=MAX_WIDTH)
    kv_heads = integer(config, "multi_query_group_num", default=1) if groups else None
    s = sizes({**config, "num_key_value_heads": kv_heads, "head_dim": width}, attention_dropout=0.0)
    bias = boolean(config, "add_bias_linear", default=False)
    attention = fused_attention(
        s,
        qkv="self_attention.query_key_value",
        out="self_attention.dense",
        bias=bias or boolean(config, "add_qkv_bias", default=False),
        out_bias=bias,
        rotary_dim=width // 2,
    )
    mlp = fused_gated_mlp(s.hidden, s.intermediate, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", bias=bias)
    layer = pre_norm_layer(attention, mlp, s, kind="rms_fp32_weight")
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=Norm(name="transformer.encoder.final_layernorm", size=s.hidden, kind="rms_fp32_weight"),
        tied=False,
        embedding="transformer.embedding.word_embeddings",
        head="transformer.output_layer",
        layer_prefix="transformer.encoder.layers",
        remote_code=True,
    )
