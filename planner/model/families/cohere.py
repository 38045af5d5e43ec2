"""Cohere's Command families: one norm feeds both branches, LayerNorm without bias in fp32, scaled logits."""

from __future__ import annotations

from typing import Any

from planner.base.config_values import boolean, integer
from planner.model.families.parts import (
    Config,
    Sizes,
    activation,
    attention_bias,
    causal_lm,
    gated_mlp,
    optional_integer,
    sizes,
    stack,
    standard_attention,
    windows_from_types,
)
from planner.model.spec import Layer, ModelSpec, Norm


def _norm(name: str, size: int, elements: int = 0) -> Norm:
    return Norm(name=name, size=size, kind="layernorm_fp32", weight_elements=elements)


def _spec(config: Config, model_id: str, s: Sizes, kinds: tuple[tuple[int, bool], ...], qk_norm: bool) -> ModelSpec:
    """A stack with one (window, rotated) per layer."""
    widths = {"q_norm": s.q_size, "k_norm": s.kv_size} if qk_norm else {}
    norms: dict[str, Any] = {name: _norm(f"self_attn.{name}", s.head_dim, width) for name, width in widths.items()}

    def make(key: tuple[int, bool]) -> Layer:
        return Layer(
            mixer=standard_attention(
                s,
                bias=attention_bias(config),
                sliding_window=key[0],
                position="rope" if key[1] else "none",
                **norms,
            ),
            mlp=gated_mlp(s.hidden, s.intermediate, act=activation(config)),
            input_norm=_norm("input_layernorm", s.hidden),
            parallel=True,
        )

    final = _norm("model.norm", s.hidden)
    return causal_lm(config, model_id, s, stack(kinds, make), final_norm=final, tied=True, logit_scale=True)


def cohere(config: Config, model_id: str) -> ModelSpec:
    s = sizes(config)
    return _spec(config, model_id, s, ((0, True),) * s.layers, boolean(config, "use_qk_norm", default=False))


def cohere2(config: Config, model_id: str) -> ModelSpec:
    s = sizes({**config, "head_dim": None})
    window = optional_integer(config, "sliding_window", 4096)
    pattern = integer(config, "sliding_window_pattern", "_sliding_window_pattern", default=4)
    windows = windows_from_types(config, s.layers, window, lambda i: (i + 1) % pattern != 0)
    # full-attention layers have no positions
    return _spec(config, model_id, s, tuple((w, w > 0) for w in windows), False)
