"""Gemma and its successors: RMSNorm with (1 + weight), scaled embeddings, wide heads, later soft caps and windows."""

from __future__ import annotations

from planner.config_values import boolean
from planner.families.parts import Config, activation, causal_lm, gated_mlp, pre_norm_layer, sizes, stack, standard_attention
from planner.model import Layer, ModelSpec, Norm


def _norm(name: str, size: int) -> Norm:
    return Norm(name=name, size=size, kind="rms_gemma")


def gemma(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=16, head_dim=256)

    def make(_: int) -> Layer:
        attention = standard_attention(s, bias=boolean(config, "attention_bias", default=False))
        # the first releases wrote hidden_act "gelu"; transformers reads it as it stands
        mlp = gated_mlp(s.hidden, s.intermediate, act=activation(config, default="gelu_pytorch_tanh"))
        return pre_norm_layer(attention, mlp, s, kind="rms_gemma")

    return causal_lm(
        config,
        model_id,
        s,
        stack((0,) * s.layers, make),
        final_norm=_norm("model.norm", s.hidden),
        tied=True,
        embedding_scale=True,
    )
