"""DeepSeek V2 and V3: multi-head latent attention and experts."""

from __future__ import annotations

from planner.base.config_values import boolean, integer
from planner.model.families.moe import dense_then_experts
from planner.model.families.parts import MAX_WIDTH, Config, Sizes, attention_bias, optional_integer, sizes
from planner.model.spec import Attention, Linear, ModelSpec, Norm


def latent_attention(config: Config, s: Sizes) -> Attention:
    """Queries (optionally) and keys/values go through a low-rank bottleneck; one rotary key head is shared."""
    bias = attention_bias(config)
    q_rank = optional_integer(config, "q_lora_rank", 1536)
    kv_rank = integer(config, "kv_lora_rank", default=512, high=MAX_WIDTH)
    nope = integer(config, "qk_nope_head_dim", default=128, high=MAX_WIDTH)
    rope = integer(config, "qk_rope_head_dim", default=64, high=MAX_WIDTH)
    value = integer(config, "v_head_dim", default=128, high=MAX_WIDTH)

    def linear(name: str, width: int, out: int, with_bias: bool = False) -> Linear:
        return Linear(name=f"self_attn.{name}", in_features=width, out_features=out, bias=with_bias)

    queries: tuple[Linear, ...] = (linear("q_proj", s.hidden, s.heads * (nope + rope)),)
    if q_rank:
        queries = (
            linear("q_a_proj", s.hidden, q_rank, bias),
            linear("q_b_proj", q_rank, s.heads * (nope + rope)),
        )
    return Attention(
        kind="mla",
        num_heads=s.heads,
        num_kv_heads=s.heads,
        head_dim=nope + rope,
        v_head_dim=value,
        projections=(
            *queries,
            linear("kv_a_proj_with_mqa", s.hidden, kv_rank + rope, bias),
            linear("kv_b_proj", kv_rank, s.heads * (nope + value)),
        ),
        output=linear("o_proj", s.heads * value, s.hidden, bias),
        q_a_norm=Norm(name="self_attn.q_a_layernorm", size=q_rank) if q_rank else None,
        kv_a_norm=Norm(name="self_attn.kv_a_layernorm", size=kv_rank),
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_rope_head_dim=rope,
        rotary_dim=rope,
        dropout=s.attention_dropout,
    )


def _sizes(config: Config, kv_heads: int) -> Sizes:
    # head_dim in these files is the rotary part only and decides nothing here
    return sizes({**config, "head_dim": None}, num_key_value_heads=kv_heads)


def deepseek_v2(config: Config, model_id: str) -> ModelSpec:
    s = _sizes(config, 0)
    return dense_then_experts(
        config,
        model_id,
        s,
        latent_attention(config, s),
        first_dense=0,
        count=64,
        top_k=6,
        width=1407,
        shared=2,
        corrects_scores=False,
        mlp_bias=boolean(config, "mlp_bias", default=False),
    )


def deepseek_v3(config: Config, model_id: str) -> ModelSpec:
    s = _sizes(config, 0)
    attention = latent_attention(config, s)
    return dense_then_experts(
        config, model_id, s, attention, first_dense=3, count=256, top_k=8, width=2048, shared=1, corrects_scores=True
    )
