"""Families of 2022 and 2023 with LayerNorm, each with its own ways: OPT, BLOOM, MPT, Falcon, StableLM."""

from __future__ import annotations

from typing import Any

from planner.base.config_values import boolean, integer, mapping
from planner.base.records import replace
from planner.model.families.parts import (
    MAX_WIDTH,
    Config,
    activation,
    causal_lm,
    drops,
    fused_attention,
    gated_mlp,
    layer_norm,
    plain_mlp,
    rotary_width,
    sizes,
    standard_attention,
    uniform,
)
from planner.model.spec import Layer, Linear, ModelSpec, Norm, Table


def opt(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, max_position_embeddings=2048)
    bias = boolean(config, "enable_bias", default=True)
    first = boolean(config, "do_layer_norm_before", default=True)
    affine = boolean(config, "layer_norm_elementwise_affine", default=True)
    width = integer(config, "word_embed_proj_dim", default=s.hidden, high=MAX_WIDTH)

    def norm(name: str) -> Norm:
        return Norm(name=name, size=s.hidden, kind="layernorm", weight=affine, bias=affine)

    layer = Layer(
        # OptSdpaAttention; not in 4.45.2
        mixer=standard_attention(s, out="out_proj", bias=bias, position="learned", sdpa_since=(4, 46)),
        mlp=plain_mlp(
            s.hidden,
            s.intermediate,
            up="fc1",
            down="fc2",
            bias=bias,
            act=activation(config, "activation_function", default="relu"),
        ),
        input_norm=norm("self_attn_layer_norm"),
        pre_mlp_norm=norm("final_layer_norm"),
        norm_after_residual=not first,
        hidden_dropout=drops(config, "dropout", default=0.1),
    )
    final = first and not boolean(config, "_remove_final_layer_norm", default=False)
    projections = (
        Linear(name="model.decoder.project_in", in_features=width, out_features=s.hidden),
        Linear(name="model.decoder.project_out", in_features=s.hidden, out_features=width),
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=norm("model.decoder.final_layer_norm") if final else None,
        tied=True,
        embedding="model.decoder.embed_tokens",
        embedding_width=width,
        embedding_projections=projections if width != s.hidden else (),
        # positions are offset by 2
        position_embedding=Table(name="model.decoder.embed_positions", rows=s.positions + 2, width=s.hidden),
        layer_prefix="model.decoder.layers",
    )


def bloom(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, four_times=True)
    layer = Layer(
        mixer=fused_attention(
            s,
            qkv="self_attention.query_key_value",
            out="self_attention.dense",
            bias=True,
            position="alibi",
            sdpa=False,
        ),
        mlp=plain_mlp(s.hidden, 4 * s.hidden, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", act="bloom_gelu"),
        input_norm=layer_norm("input_layernorm", s.hidden),
        pre_mlp_norm=layer_norm("post_attention_layernorm", s.hidden),
        hidden_dropout=drops(config, "hidden_dropout"),
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=layer_norm("transformer.ln_f", s.hidden),
        tied=True,
        embedding="transformer.word_embeddings",
        embedding_norm=layer_norm("transformer.word_embeddings_layernorm", s.hidden),
        layer_prefix="transformer.h",
    )


def mpt(config: Config, model_id: str) -> ModelSpec:
    # transformers' class always uses ALiBi, no biases and four times the width, whatever the file says
    settings = mapping(config, "attn_config", default={})
    dropped = drops(settings, "attn_pdrop")
    s = replace(sizes(config, four_times=True), attention_dropout=dropped)
    layer = Layer(
        mixer=fused_attention(
            s,
            qkv="attn.Wqkv",
            out="attn.out_proj",
            position="alibi",
            sdpa=False,
            clips_qkv=bool(settings.get("clip_qkv")),
        ),
        mlp=plain_mlp(s.hidden, 4 * s.hidden, up="ffn.up_proj", down="ffn.down_proj", bias=False),
        input_norm=layer_norm("norm_1", s.hidden, bias=False),
        pre_mlp_norm=layer_norm("norm_2", s.hidden, bias=False),
        hidden_dropout=dropped,
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=layer_norm("transformer.norm_f", s.hidden, bias=False),
        tied=True,
        embedding="transformer.wte",
        layer_prefix="transformer.blocks",
    )


def _falcon_norms(config: Config, hidden: int, new: bool, parallel: bool) -> dict[str, Any]:
    """Falcon's norms: one shared by both branches, one for each, or the usual two in sequence."""
    count = integer(config, "num_ln_in_parallel_attn", default=2 if new else 1)
    if not parallel:
        return {
            "input_norm": layer_norm("input_layernorm", hidden),
            "pre_mlp_norm": layer_norm("post_attention_layernorm", hidden),
        }
    if count == 2:
        return {"input_norm": layer_norm("ln_attn", hidden), "pre_mlp_norm": layer_norm("ln_mlp", hidden)}
    return {"input_norm": layer_norm("input_layernorm", hidden)}


def falcon(config: Config, model_id: str) -> ModelSpec:
    new = boolean(config, "new_decoder_architecture", default=False)
    parallel = boolean(config, "parallel_attn", default=True)
    if not new:
        one = boolean(config, "multi_query", default=True)
        config = {**config, "num_key_value_heads": 1 if one else None}
    elif "num_kv_heads" in config:
        config = {**config, "num_key_value_heads": config["num_kv_heads"]}
    s = sizes(config, four_times=True)
    bias = boolean(config, "bias", default=False)
    layer = Layer(
        mixer=fused_attention(
            s,
            qkv="self_attention.query_key_value",
            out="self_attention.dense",
            bias=bias,
            cls="subclass",
            position="alibi" if boolean(config, "alibi", default=False) else "rope",
        ),
        mlp=plain_mlp(
            s.hidden,
            s.intermediate,
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            bias=bias,
            cls="subclass",
            act=activation(config, "activation", default="gelu"),
        ),
        parallel=parallel,
        hidden_dropout=drops(config, "hidden_dropout"),
        **_falcon_norms(config, s.hidden, new, parallel),
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=layer_norm("transformer.ln_f", s.hidden),
        tied=True,
        embedding="transformer.word_embeddings",
        layer_prefix="transformer.h",
    )


def stablelm(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=32)
    parallel = boolean(config, "use_parallel_residual", default=False)
    norms: dict[str, Any] = {}
    if boolean(config, "qk_layernorm", default=False):
        for letter, heads in (("q", s.heads), ("k", s.kv_heads)):
            norms[f"{letter}_norm"] = Norm(
                name=f"self_attn.{letter}_layernorm",
                size=s.head_dim,
                kind="layernorm_per_head",
                weight_elements=heads * s.head_dim,
            )
    layer = Layer(
        mixer=standard_attention(
            s,
            bias=boolean(config, "use_qkv_bias", default=False),
            out_bias=False,
            rotary_dim=rotary_width(config, s.head_dim, 0.25),
            **norms,
        ),
        mlp=gated_mlp(s.hidden, s.intermediate, act=activation(config)),
        input_norm=layer_norm("input_layernorm", s.hidden),
        pre_mlp_norm=None if parallel else layer_norm("post_attention_layernorm", s.hidden),
        parallel=parallel,
        hidden_dropout=drops(config, "hidden_dropout"),
    )
    final = layer_norm("model.norm", s.hidden)
    return causal_lm(config, model_id, s, uniform(s, layer), final_norm=final, tied=False)
