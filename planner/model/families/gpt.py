"""GPT-2, its relatives with learned positions, and the GPT-J line with interleaved rotary positions."""

from __future__ import annotations

from typing import Any

from planner.base.config_values import boolean, integer, text_list
from planner.base.errors import InvalidInput
from planner.model.families.parts import (
    Config,
    Sizes,
    activation,
    causal_lm,
    drops,
    fused_attention,
    layer_norm,
    optional_integer,
    plain_mlp,
    pre_norm_layer,
    rotary_width,
    sizes,
    stack,
    standard_attention,
    uniform,
)
from planner.model.spec import Attention, Layer, LinearClass, Mlp, ModelSpec, Table


def _layer(config: Config, s: Sizes, attention: Attention, mlp: Mlp, **rest: Any) -> Layer:
    """The GPT-2 layer: ln_1, attention, ln_2, feed-forward."""
    return Layer(
        mixer=attention,
        mlp=mlp,
        input_norm=layer_norm("ln_1", s.hidden),
        hidden_dropout=drops(config, "resid_pdrop", "resid_dropout", default=rest.pop("dropout", 0.0)),
        **rest,
    )


def _mlp(config: Config, s: Sizes, up: str, down: str, default: str = "gelu_new", cls: LinearClass = "Linear") -> Mlp:
    act = activation(config, "activation_function", default=default)
    return plain_mlp(s.hidden, s.intermediate, up=f"mlp.{up}", down=f"mlp.{down}", act=act, cls=cls)


def _model(
    config: Config, model_id: str, s: Sizes, layers: tuple[Layer, ...], *, tied: bool, dropout: float, **rest: Any
) -> ModelSpec:
    """The GPT-2 model around a stack."""
    return causal_lm(
        config,
        model_id,
        s,
        layers,
        final_norm=layer_norm("transformer.ln_f", s.hidden),
        tied=tied,
        embedding="transformer.wte",
        embedding_dropout=drops(config, "embd_pdrop", "embed_dropout", default=dropout),
        layer_prefix="transformer.h",
        **rest,
    )


def _positions(s: Sizes) -> Table:
    return Table(name="transformer.wpe", rows=s.positions, width=s.hidden)


def gpt2(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, four_times=True, attention_dropout=0.1, max_position_embeddings=1024)
    attention = fused_attention(
        s,
        qkv="attn.c_attn",
        out="attn.c_proj",
        bias=True,
        cls="Conv1D",
        position="learned",
        sdpa_since=(4, 42),  # GPT2SdpaAttention; not in 4.41.2
    )
    mlp = _mlp(config, s, "c_fc", "c_proj", cls="Conv1D")
    layer = _layer(config, s, attention, mlp, pre_mlp_norm=layer_norm("ln_2", s.hidden), dropout=0.1)
    return _model(config, model_id, s, uniform(s, layer), tied=True, dropout=0.1, position_embedding=_positions(s))


def gpt_bigcode(config: Config, model_id: str) -> ModelSpec:
    one = boolean(config, "multi_query", default=True)
    config = {**config, "num_key_value_heads": 1 if one else None}
    s = sizes(config, four_times=True, attention_dropout=0.1, max_position_embeddings=1024)
    attention = fused_attention(s, qkv="attn.c_attn", out="attn.c_proj", bias=True, position="learned")
    mlp = _mlp(config, s, "c_fc", "c_proj", default="gelu_pytorch_tanh")
    layer = _layer(config, s, attention, mlp, pre_mlp_norm=layer_norm("ln_2", s.hidden), dropout=0.1)
    return _model(config, model_id, s, uniform(s, layer), tied=True, dropout=0.1, position_embedding=_positions(s))


def _global_or_local(config: Config, layers: int) -> tuple[str, ...]:
    """GPT-Neo's attention kind per layer, from attention_layers or the compressed attention_types."""
    if "attention_types" not in config:
        alternating = tuple(("global", "local")[i % 2] for i in range(layers))
        return text_list(config, "attention_layers", default=alternating, length=layers, allowed=("global", "local"))
    try:
        kinds = tuple(
            kind for names, times in config["attention_types"] for _ in range(min(times, layers)) for kind in names
        )
    except (TypeError, ValueError):
        kinds = ()
    if len(kinds) != layers or not set(kinds) <= {"global", "local"}:
        raise InvalidInput(
            f"config key attention_types does not name global or local for each of the {layers} layers; "
            'write it as [[["global", "local"], 12]]'
        )
    return kinds


def gpt_neo(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, four_times=True, max_position_embeddings=2048)
    window = integer(config, "window_size", default=256)
    mlp = _mlp(config, s, "c_fc", "c_proj")

    def make(kind: str) -> Layer:
        attention = standard_attention(
            s,
            prefix="attn.attention",
            out="out_proj",
            out_bias=True,
            position="learned",
            sliding_window=window if kind == "local" else 0,
            sdpa=False,
            scores_fp32=True,
        )
        return _layer(config, s, attention, mlp, pre_mlp_norm=layer_norm("ln_2", s.hidden))

    layers = stack(_global_or_local(config, s.layers), make)
    return _model(config, model_id, s, layers, tied=True, dropout=0.0, position_embedding=_positions(s))


def _gptj_like(config: Config, model_id: str, s: Sizes, attention: Attention) -> ModelSpec:
    """GPT-J and CodeGen: one norm feeds attention and feed-forward, the head has a bias."""
    layer = _layer(config, s, attention, _mlp(config, s, "fc_in", "fc_out"), parallel=True)
    return _model(config, model_id, s, uniform(s, layer), tied=False, dropout=0.0, head_bias=True)


def _interleaved(config: Config, s: Sizes, default: int) -> dict[str, Any]:
    rotary = optional_integer(config, "rotary_dim", default)
    return {
        "rotary_dim": min(rotary, s.head_dim),
        "sdpa_since": (5, 24),  # _supports_sdpa and ALL_ATTENTION_FUNCTIONS in modeling_gptj.py, modeling_codegen.py
        "scores_fp32": True,
    }


def gptj(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, four_times=True, max_position_embeddings=2048)
    attention = standard_attention(s, prefix="attn", out="out_proj", **_interleaved(config, s, 64))
    return _gptj_like(config, model_id, s, attention)


def codegen(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, four_times=True, max_position_embeddings=2048)
    attention = fused_attention(s, qkv="attn.qkv_proj", out="attn.out_proj", **_interleaved(config, s, 64))
    return _gptj_like(config, model_id, s, attention)


def gpt_neox(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    attention = fused_attention(
        s,
        qkv="attention.query_key_value",
        out="attention.dense",
        bias=boolean(config, "attention_bias", default=True),
        rotary_dim=rotary_width(config, s.head_dim, 0.25),
        sdpa_since=(4, 42),  # GPTNeoXSdpaAttention; not in 4.41.2
    )
    mlp = plain_mlp(
        s.hidden,
        s.intermediate,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        act=activation(config, default="gelu"),
    )
    dropout = drops(config, "hidden_dropout")
    parallel = boolean(config, "use_parallel_residual", default=True)
    layer = pre_norm_layer(attention, mlp, s, kind="layernorm", parallel=parallel, hidden_dropout=dropout)
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, layer),
        final_norm=layer_norm("gpt_neox.final_layer_norm", s.hidden),
        tied=False,
        embedding="gpt_neox.embed_in",
        embedding_dropout=dropout,
        layer_prefix="gpt_neox.layers",
    )
