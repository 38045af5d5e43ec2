"""Recent families with rotary attention and an ungated feed-forward: Arcee, Apertus, Nemotron, StarCoder 2."""

from __future__ import annotations

from planner.base.config_values import boolean
from planner.model.families.parts import (
    Config,
    activation,
    attention_bias,
    causal_lm,
    drops,
    layer_norm,
    mlp_bias,
    optional_integer,
    plain_mlp,
    pre_norm_layer,
    rotary_width,
    sizes,
    standard_attention,
    uniform,
)
from planner.model.spec import Layer, ModelSpec, Norm


def arcee(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    mlp = plain_mlp(
        s.hidden,
        s.intermediate,
        up="mlp.up_proj",
        down="mlp.down_proj",
        bias=mlp_bias(config),
        act=activation(config, default="relu2"),
    )
    layer = pre_norm_layer(standard_attention(s, bias=attention_bias(config)), mlp, s)
    final = Norm(name="model.norm", size=s.hidden)
    return causal_lm(config, model_id, s, uniform(s, layer), final_norm=final, tied=False)


def apertus(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=32)
    act = activation(config, default="xielu")
    layer = Layer(
        mixer=standard_attention(
            s,
            bias=attention_bias(config),
            q_norm=Norm(name="self_attn.q_norm", size=s.head_dim),
            k_norm=Norm(name="self_attn.k_norm", size=s.head_dim),
        ),
        mlp=plain_mlp(
            s.hidden,
            s.intermediate,
            up="mlp.up_proj",
            down="mlp.down_proj",
            bias=False,
            act=act,
            extra_parameters=2 if act == "xielu" else 0,
        ),
        input_norm=Norm(name="attention_layernorm", size=s.hidden),
        pre_mlp_norm=Norm(name="feedforward_layernorm", size=s.hidden),
    )
    final = Norm(name="model.norm", size=s.hidden)
    return causal_lm(config, model_id, s, uniform(s, layer), final_norm=final, tied=False)


def nemotron(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    rotary = rotary_width(config, s.head_dim, 0.5)

    def norm(name: str) -> Norm:
        return Norm(name=name, size=s.hidden, kind="layernorm_1p", bias=True)

    layer = Layer(
        mixer=standard_attention(s, bias=attention_bias(config), rotary_dim=rotary),
        mlp=plain_mlp(
            s.hidden,
            s.intermediate,
            up="mlp.up_proj",
            down="mlp.down_proj",
            bias=mlp_bias(config),
            act=activation(config, default="relu2"),
        ),
        input_norm=norm("input_layernorm"),
        pre_mlp_norm=norm("post_attention_layernorm"),
    )
    return causal_lm(config, model_id, s, uniform(s, layer), final_norm=norm("model.norm"), tied=False)


def starcoder2(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=2)
    bias = boolean(config, "use_bias", default=True)
    window = optional_integer(config, "sliding_window")
    mlp = plain_mlp(
        s.hidden,
        s.intermediate,
        up="mlp.c_fc",
        down="mlp.c_proj",
        bias=bias,
        act=activation(config, default="gelu_pytorch_tanh"),
    )
    layer = pre_norm_layer(
        standard_attention(s, bias=bias, sliding_window=window),
        mlp,
        s,
        kind="layernorm",
        hidden_dropout=drops(config, "residual_dropout"),
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=layer_norm("model.norm", s.hidden),
        tied=True,
        embedding_dropout=drops(config, "embedding_dropout"),
    )
