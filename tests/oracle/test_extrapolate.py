"""Peaks extrapolated from a few layers equal those of a trace of every layer, to the byte."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest

pytest.importorskip("torch")
for _library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(_library)

from calibrate.oracle.extrapolate import extrapolate  # noqa: E402
from calibrate.oracle.summary import of_trace  # noqa: E402
from calibrate.oracle.trace import trace  # noqa: E402
from planner.training.spec import training_from_dict  # noqa: E402

pytestmark = pytest.mark.oracle

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 8, "moe_intermediate_size": 64, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "head_dim": 16,
}  # fmt: skip

LORA = {"r": 4, "target_modules": ["attention"], "dtype": "fp32"}
STEP = {"micro_batch_size": 2, "seq_len": 64, "optimizer": "adamw"}
QLORA = {**STEP, "method": "qlora", "lora": LORA, "quantization": {"kind": "nf4"}, "gradient_checkpointing": "full"}
LORA_KEPT = {**STEP, "method": "lora", "lora": LORA, "gradient_checkpointing": "none"}
FULL_TUNING = {**STEP, "method": "full", "autocast": "none", "gradient_checkpointing": "full", "use_reentrant": True}


def _case(model_type: str, depth: int, training: dict[str, Any], **config: Any) -> tuple[dict[str, Any], Any]:
    return {"model_type": model_type, **SIZES, "num_hidden_layers": depth, **config}, training


CASES = {
    "uniform, kept": _case("qwen3", 8, LORA_KEPT),
    "uniform, reentrant": _case("olmo2", 8, FULL_TUNING),
    "int8 keeps its inputs": _case("llama", 8, {**QLORA, "quantization": {"kind": "int8"}}),
    "probabilities returned": _case("bloom", 8, {**QLORA, "use_reentrant": True}, n_layer=8, n_head=4),
    "dense first": _case("deepseek_v3", 12, QLORA, first_k_dense_replace=2, **MLA),
    "dense layers listed": _case("qwen3_moe", 15, LORA_KEPT, mlp_only_layers=[0, 1, 2], **EXPERTS),
    "alternating": _case("gemma2", 16, LORA_KEPT, sliding_window=16, layer_types=[SLIDING, FULL] * 8),
    "three to one": _case("olmo3", 32, FULL_TUNING, sliding_window=16, layer_types=([SLIDING] * 3 + [FULL]) * 8),
}
"""Four more are in test_trace_summary.py."""


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", CASES)
def test_extrapolation_equals_full_depth(name: str) -> None:
    config, values = CASES[name]
    training = training_from_dict(values)
    traced = trace(config, training)
    full = of_trace(traced, block=1)
    guess = extrapolate(config, training)
    assert max(guess.traced) < full.layers
    assert guess.layers == full.layers
    assert guess.static_bytes == full.static_bytes
    assert guess.segment_peaks == {segment.name: segment.peak for segment in full.segments}
    assert guess.peak_bytes == traced.peak_bytes
