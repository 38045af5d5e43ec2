"""Families whose classes come with the checkpoint, not transformers: Qwen (first), Baichuan 2, InternLM 2, MiMo."""

from __future__ import annotations

from planner.base.config_values import boolean, integer
from planner.base.errors import InvalidInput
from planner.model.families.llama_like import qwen_windows, spec
from planner.model.families.parts import (
    MAX_WIDTH,
    Config,
    activation,
    attention_bias,
    causal_lm,
    fused_attention,
    gated_mlp,
    pre_norm_layer,
    sizes,
    uniform,
)
from planner.model.spec import Layer, ModelSpec, Norm


def qwen(config: Config, model_id: str) -> ModelSpec:
    s = sizes({**config, "head_dim": integer(config, "kv_channels", default=128, high=MAX_WIDTH)})
    if s.intermediate % 2:
        raise InvalidInput(
            f"config key intermediate_size is {s.intermediate}; a first-generation Qwen writes twice the width of "
            "one branch, an even number; correct config.json"
        )
    # the file's no_bias leaves the fused projection's bias alone
    biased = not boolean(config, "no_bias", default=True)
    layer = Layer(
        mixer=fused_attention(s, qkv="attn.c_attn", out="attn.c_proj", bias=True, out_bias=biased),
        mlp=gated_mlp(s.hidden, s.intermediate // 2, names=("w2", "w1", "c_proj"), bias=biased),
        input_norm=Norm(name="ln_1", size=s.hidden),
        pre_mlp_norm=Norm(name="ln_2", size=s.hidden),
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=Norm(name="transformer.ln_f", size=s.hidden),
        tied=False,
        embedding="transformer.wte",
        layer_prefix="transformer.h",
        remote_code=True,
    )


def baichuan(config: Config, model_id: str) -> ModelSpec:
    s = sizes({**config, "num_key_value_heads": None})
    # only the 7B class rotates; the 13B file has no max_position_embeddings and its class uses ALiBi
    rotates = config.get("max_position_embeddings") is not None
    attention = fused_attention(
        s, qkv="self_attn.W_pack", out="self_attn.o_proj", position="rope" if rotates else "alibi"
    )
    mlp = gated_mlp(s.hidden, s.intermediate, act=activation(config))
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, pre_norm_layer(attention, mlp, s)),
        final_norm=Norm(name="model.norm", size=s.hidden),
        tied=False,
        remote_code=True,
        notes=("Baichuan 2 normalises the head's weight in every training step; that copy is not counted",),
    )


def internlm2(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    bias = boolean(config, "bias", default=True)
    layer = Layer(
        mixer=fused_attention(s, qkv="attention.wqkv", out="attention.wo", bias=bias),
        mlp=gated_mlp(
            s.hidden, s.intermediate, prefix="feed_forward", names=("w1", "w3", "w2"), act=activation(config)
        ),
        input_norm=Norm(name="attention_norm", size=s.hidden),
        pre_mlp_norm=Norm(name="ffn_norm", size=s.hidden),
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=Norm(name="model.norm", size=s.hidden),
        tied=False,
        embedding="model.tok_embeddings",
        head="output",
        remote_code=True,
    )


def mimo(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    return spec(
        config,
        model_id,
        s,
        windows=qwen_windows(config, s.layers),
        bias=attention_bias(config, True),
        out_bias=False,
        remote_code=True,
        notes=("the checkpoint's multi-token-prediction layers are not counted: fine-tuning does not use them",),
    )
