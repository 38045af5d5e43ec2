"""Mixture-of-experts families with standard attention, and the builders that other expert families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.base.config_values import boolean, integer, integer_list
from planner.model.families.parts import (
    MAX_LAYERS,
    MAX_WIDTH,
    Config,
    Sizes,
    activation,
    attention_bias,
    causal_lm,
    gated_mlp,
    head_norms,
    layer_norm,
    optional_integer,
    pre_norm_layer,
    rotary_width,
    sizes,
    stack,
    standard_attention,
    uniform,
    windows_from_types,
)
from planner.model.spec import Activation, Attention, Experts, KeptInFp32, Layer, Linear, Mlp, ModelSpec, Norm

MAX_EXPERTS = 65_536

FP32_GATE = KeptInFp32(name="gate.weight", fp16_only=False, since=(5, 24))
"""The router's weight in the classes of DeepSeek and of GLM-4 MoE (_keep_in_fp32_modules_strict, read in 5.24; the
modeling files of 4.52 to 4.57 have no such list, the releases between were not read)."""
FP32_SCORES = KeptInFp32(name="e_score_correction_bias", fp16_only=False, since=(5, 24))
"""The correction of the router's scores: a buffer of one number an expert, not a parameter."""


def experts(
    config: Config,
    s: Sizes,
    *,
    counts: tuple[str, ...] = ("num_local_experts", "num_experts"),
    count: int,
    top_k: int,
    width: int,
    prefix: str = "mlp",
    router: str = "gate",
    router_bias: bool = False,
    linear: bool = False,
    act: Activation | None = None,
    **rest: Any,
) -> Experts:
    """A block of fused experts; `count` and `top_k` are class defaults, `linear`: the router is an nn.Linear."""
    number = integer(config, *counts, default=count, high=MAX_EXPERTS)
    return Experts(
        num_experts=number,
        top_k=integer(config, "num_experts_per_tok", default=top_k, high=number),
        hidden_size=s.hidden,
        intermediate_size=width,
        name=f"{prefix}.experts",
        router=Linear(
            name=f"{prefix}.{router}",
            in_features=s.hidden,
            out_features=number,
            bias=router_bias,
            cls="subclass" if linear else "Linear",
        ),
        router_is_linear=linear,
        activation=act or activation(config),
        **rest,
    )


def _all_experts(config: Config, model_id: str, s: Sizes, layer: Layer, **rest: Any) -> ModelSpec:
    final = Norm(name="model.norm", size=s.hidden)
    return causal_lm(config, model_id, s, uniform(s, layer), final_norm=final, tied=False, **rest)


def mixtral(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8)
    attention = standard_attention(s, sliding_window=optional_integer(config, "sliding_window"))
    block = experts(config, s, count=8, top_k=2, width=s.intermediate)
    return _all_experts(config, model_id, s, pre_norm_layer(attention, block, s))


def olmoe(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    attention = standard_attention(
        s,
        bias=attention_bias(config),
        q_norm=Norm(name="self_attn.q_norm", size=s.q_size),
        k_norm=Norm(name="self_attn.k_norm", size=s.kv_size),
        clips_qkv=bool(config.get("clip_qkv")),
    )
    block = experts(config, s, count=64, top_k=8, width=s.intermediate)
    return _all_experts(config, model_id, s, pre_norm_layer(attention, block, s))


def granitemoe(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    attention = standard_attention(s, bias=attention_bias(config))
    block = experts(config, s, count=8, top_k=2, width=s.intermediate, prefix="block_sparse_moe", router="router")
    layer = pre_norm_layer(attention, block, s, residual_multiplier=True)
    return _all_experts(config, model_id, s, layer, embedding_scale=True, logit_scale=True)


def gpt_oss(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8, head_dim=64)
    window = optional_integer(config, "sliding_window", 128)
    block = experts(
        config,
        s,
        count=128,
        top_k=4,
        width=s.intermediate,
        router="router",
        router_bias=True,
        bias=True,
        act="clamped_swiglu",
    )

    def make(sliding: int) -> Layer:
        attention = standard_attention(
            s, bias=attention_bias(config, True), sliding_window=sliding, sinks=True, sdpa=False
        )
        return pre_norm_layer(attention, block, s, kind="rms_fp32_weight")

    return causal_lm(
        config,
        model_id,
        s,
        stack(windows_from_types(config, s.layers, window, lambda i: (i + 1) % 2 != 0), make),
        final_norm=Norm(name="model.norm", size=s.hidden, kind="rms_fp32_weight"),
        tied=False,
        keep_in_fp32=tuple(
            KeptInFp32(name=name, fp16_only=True, since=(4, 55))  # read in 4.57; 4.53 has no such class
            for name in ("input_layernorm", "post_attention_layernorm", "norm")
        ),
    )


def _every_nth(config: Config, layers: int) -> tuple[bool, ...]:
    """Qwen: a layer has experts unless mlp_only_layers lists it or decoder_sparse_step skips it."""
    step = integer(config, "decoder_sparse_step", default=1, high=MAX_LAYERS)
    dense = set(integer_list(config, "mlp_only_layers", default=(), low=0, high=MAX_LAYERS))
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def _mixed(
    config: Config,
    model_id: str,
    s: Sizes,
    kinds: tuple[tuple[int, bool], ...],
    attend: Callable[[int], Attention],
    block: Experts,
    dense: Mlp,
    **rest: Any,
) -> ModelSpec:
    """A stack with one (window, has experts) per layer."""

    def make(key: tuple[int, bool]) -> Layer:
        return pre_norm_layer(attend(key[0]), block if key[1] else dense, s)

    final = Norm(name="model.norm", size=s.hidden)
    return causal_lm(config, model_id, s, stack(kinds, make), final_norm=final, tied=False, **rest)


def qwen2_moe(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=16)
    act = activation(config)
    shared = integer(config, "shared_expert_intermediate_size", default=5632, high=MAX_WIDTH)
    block = experts(
        config,
        s,
        counts=("num_experts",),
        count=60,
        top_k=4,
        width=integer(config, "moe_intermediate_size", default=1408, high=MAX_WIDTH),
        shared=gated_mlp(s.hidden, shared, prefix="mlp.shared_expert", act=act),
        shared_gate=Linear(name="mlp.shared_expert_gate", in_features=s.hidden, out_features=1),
    )
    used = boolean(config, "use_sliding_window", default=False)
    window = optional_integer(config, "sliding_window", 4096) if used else 0
    last = integer(config, "max_window_layers", default=28, low=0)
    windows = windows_from_types(config, s.layers, window, lambda i: bool(window) and i % 2 == 0 and i < last)
    bias = boolean(config, "qkv_bias", default=True)

    def attend(sliding: int) -> Attention:
        return standard_attention(s, bias=bias, out_bias=False, sliding_window=sliding)

    kinds = tuple(zip(windows, _every_nth(config, s.layers), strict=True))
    return _mixed(config, model_id, s, kinds, attend, block, gated_mlp(s.hidden, s.intermediate, act=act))


def qwen3_moe(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=4)
    width = integer(config, "moe_intermediate_size", default=768, high=MAX_WIDTH)
    block = experts(config, s, count=128, top_k=8, width=width)
    used = boolean(config, "use_sliding_window", default=False)
    window = optional_integer(config, "sliding_window", 4096) if used else 0

    def attend(sliding: int) -> Attention:
        return standard_attention(s, bias=attention_bias(config), sliding_window=sliding, **head_norms(s))

    kinds = tuple((window, sparse) for sparse in _every_nth(config, s.layers))
    dense = gated_mlp(s.hidden, s.intermediate, act=activation(config))
    return _mixed(config, model_id, s, kinds, attend, block, dense)


def dense_then_experts(
    config: Config,
    model_id: str,
    s: Sizes,
    attention: Attention,
    *,
    first_dense: int,
    count: int,
    top_k: int,
    width: int,
    shared: int,
    corrects_scores: bool,
    mlp_bias: bool = False,
) -> ModelSpec:
    """DeepSeek and GLM-4 MoE: first_k_dense_replace dense layers, then experts with shared ones beside them.

    The numbers are the class defaults; the router computes in fp32. `corrects_scores`: it has a buffer for them.
    """
    act = activation(config)
    width = integer(config, "moe_intermediate_size", default=width, high=MAX_WIDTH)
    shared = integer(config, "n_shared_experts", default=shared, high=MAX_EXPERTS)
    block = experts(
        config,
        s,
        counts=("n_routed_experts", "num_local_experts", "num_experts"),
        count=count,
        top_k=top_k,
        width=width,
        router_fp32=True,
        shared=gated_mlp(s.hidden, width * shared, prefix="mlp.shared_experts", bias=mlp_bias, act=act),
    )
    dense = integer(config, "first_k_dense_replace", default=first_dense, low=0, high=MAX_LAYERS)
    kinds = tuple((0, i >= dense) for i in range(s.layers))
    mlp = gated_mlp(s.hidden, s.intermediate, bias=mlp_bias, act=act)
    kept = (FP32_SCORES, FP32_GATE) if corrects_scores else (FP32_GATE,)
    return _mixed(config, model_id, s, kinds, lambda _: attention, block, mlp, keep_in_fp32=kept)


def llama4_text(config: Config, model_id: str) -> ModelSpec:
    s = sizes(
        config,
        vocab_size=202048,
        hidden_size=5120,
        intermediate_size=8192,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
    )
    interval = integer(config, "no_rope_layer_interval", default=4)
    every = [int((i + 1) % interval != 0) for i in range(s.layers)]
    rotates = every
    if config.get("no_rope_layers"):  # empty means the default, too
        rotates = list(integer_list(config, "no_rope_layers", low=0, high=1, length=s.layers))
    chunk = optional_integer(config, "attention_chunk_size", 8192)
    step = integer(config, "interleave_moe_layer_step", default=1, high=MAX_LAYERS)
    listed = range(step - 1, s.layers, step)
    sparse = set(integer_list(config, "moe_layers", default=listed, low=0, high=MAX_LAYERS))
    normed = boolean(config, "use_qk_norm", default=True)
    bias, act = attention_bias(config), activation(config)
    block = experts(
        config,
        s,
        count=16,
        top_k=1,
        width=s.intermediate,
        prefix="feed_forward",
        router="router",
        linear=True,
        every_token=True,
        shared=gated_mlp(s.hidden, s.intermediate, prefix="feed_forward.shared_expert", act=act),
    )
    wide = integer(config, "intermediate_size_mlp", default=16384, high=MAX_WIDTH)
    dense = gated_mlp(s.hidden, wide, prefix="feed_forward", act=act)

    def make(key: tuple[int, bool]) -> Layer:
        rotated, is_sparse = key
        norm = Norm(name="self_attn.qk_norm", size=s.head_dim, weight=False) if normed and rotated else None
        attention = standard_attention(
            s,
            bias=bias,
            sliding_window=chunk if rotated else 0,
            position="rope" if rotated else "none",
            q_norm=norm,
            k_norm=norm,
            qk_norm_after_rope=True,
        )
        return pre_norm_layer(attention, block if is_sparse else dense, s)

    kinds = ((rotates[i], i in sparse) for i in range(s.layers))
    final = Norm(name="model.norm", size=s.hidden)
    return causal_lm(config, model_id, s, stack(kinds, make), final_norm=final, tied=False)


def phimoe(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8)
    attention = standard_attention(
        s, bias=attention_bias(config), sliding_window=optional_integer(config, "sliding_window")
    )
    block = experts(
        config, s, counts=("num_local_experts",), count=16, top_k=2, width=s.intermediate, router="router", linear=True
    )
    return causal_lm(
        config,
        model_id,
        s,
        uniform(s, pre_norm_layer(attention, block, s, kind="layernorm")),
        final_norm=layer_norm("model.norm", s.hidden),
        tied=False,
        head_bias=boolean(config, "lm_head_bias", default=False),
    )


def glm4_moe(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config, num_key_value_heads=8)
    norms = head_norms(s) if boolean(config, "use_qk_norm", default=False) else {}
    attention = standard_attention(
        s,
        bias=attention_bias(config),
        out_bias=False,
        rotary_dim=rotary_width(config, s.head_dim, 0.5),
        **norms,
    )
    return dense_then_experts(
        config, model_id, s, attention, first_dense=1, count=128, top_k=8, width=1408, shared=1, corrects_scores=True
    )
