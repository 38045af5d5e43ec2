"""Summaries of a trace: FLOPs by hand, stacks extrapolated to the byte, which layers are alike."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for _library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(_library)

from calibrate.oracle import alike, flops, summary  # noqa: E402
from calibrate.oracle.trace import trace  # noqa: E402
from planner.model.families import build_spec  # noqa: E402
from planner.training.spec import (  # noqa: E402
    LoraSpec,
    QuantizationSpec,
    TrainingSpec,
)

pytestmark = pytest.mark.oracle

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA = {**SIZES, "model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False}
DEEPSEEK = {
    **SIZES, "model_type": "deepseek_v2", "num_hidden_layers": 10, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "kv_lora_rank": 32, "q_lora_rank": None,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
GPT_OSS = {
    **SIZES, "model_type": "gpt_oss", "num_hidden_layers": 16, "head_dim": 32, "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": 32,
}  # fmt: skip
QLORA = TrainingSpec(
    lora=LoraSpec(r=8),
    quantization=QuantizationSpec(kind="nf4"),
    micro_batch_size=2,
    seq_len=64,
    gradient_checkpointing="none",
)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


# --- FLOPs ---------------------------------------------------------------------------------------------------------

TOKENS, HIDDEN, INNER, LAYERS, VOCAB, KV, HEADS, RANK = 2 * 64, 128, 320, 2, 512, 64, 4, 8
LINEAR = 2 * TOKENS * LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * INNER)
ADAPTER = 2 * TOKENS * LAYERS * RANK * (4 * HIDDEN + 2 * (HIDDEN + KV) + 3 * (HIDDEN + INNER))
HEAD = 2 * TOKENS * HIDDEN * VOCAB
ATTENTION = 4 * TOKENS * 64 * HIDDEN * LAYERS  # every head against every token: the causal half is not taken off


def total(counts: dict[str, int]) -> int:
    return sum(counts.values())


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_flops_are_the_formulas(kind: Any) -> None:
    method: Any = "lora" if kind == "none" else "qlora"
    training = dataclasses.replace(QLORA, method=method, quantization=QuantizationSpec(kind=kind))
    result = trace(LLAMA, training)
    assert total(result.flops["forward"]) == LINEAR + ADAPTER + HEAD + ATTENTION
    # backward: the gradient of every input but those of the first q, k, v (nothing before them trains), of adapter
    # weights, and attention with its scores recomputed (five products instead of two)
    unneeded = 2 * TOKENS * (HIDDEN * HIDDEN + 2 * HIDDEN * KV) + 2 * TOKENS * RANK * 3 * HIDDEN
    assert total(result.flops["backward"]) == LINEAR + 2 * ADAPTER + HEAD - unneeded + ATTENTION * 5 // 2
    assert not result.flops["recompute"]
    assert result.parameters == build_spec(LLAMA, model_id="m").num_parameters
    assert result.trainable_parameters == ADAPTER // (2 * TOKENS)


def test_recomputation_is_counted_apart() -> None:
    plain = trace(LLAMA, QLORA).flops
    checkpointed = trace(LLAMA, dataclasses.replace(QLORA, gradient_checkpointing="full", use_reentrant=True)).flops
    assert checkpointed["forward"] == plain["forward"]
    assert total(checkpointed["recompute"]) == LINEAR + ADAPTER + ATTENTION
    early = trace(LLAMA, dataclasses.replace(QLORA, gradient_checkpointing="full")).flops
    stopped = 2 * TOKENS * RANK * HIDDEN * LAYERS  # the last adapter product saves nothing that the backward needs
    assert total(checkpointed["recompute"]) - total(early["recompute"]) == stopped


def test_flops_are_those_of_one_micro_batch() -> None:
    several = trace(LLAMA, dataclasses.replace(QLORA, gradient_accumulation_steps=4))
    assert several.flops == trace(LLAMA, QLORA).flops


def test_grouped_products_of_experts_are_counted() -> None:
    rows, weights = torch.empty(10, 16, device="meta"), torch.empty(3, 16, 5, device="meta")
    formula = flops.formula(torch.ops.aten._grouped_mm.default)
    assert formula is not None
    assert formula((rows, weights), {}, None) == 2 * 10 * 16 * 5
    assert flops.formula(torch.ops.aten.add.Tensor) is None


# --- extrapolation -------------------------------------------------------------------------------------------------

STACKS = {
    "alike": ({**LLAMA, "num_hidden_layers": 8}, {"gradient_checkpointing": "full"}, (3, 4)),
    "dense first": (DEEPSEEK, {"lora": LoraSpec(target_modules=("attention",))}, (4, 5)),
    "alternating": (GPT_OSS, {"lora": LoraSpec(target_modules=("attention",))}, (6, 8)),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_few_layers_tell_all_of_them(name: str) -> None:
    config, settings, traced = STACKS[name]
    training = dataclasses.replace(QLORA, **settings)
    guess = summary.summarise(config, training, block=1)
    full = summary.of_trace(trace(config, training), block=1)
    assert guess.traced == traced
    assert guess.segments == full.segments  # levels, owners, modules, operations, FLOPs of every part of the step
    assert dataclasses.replace(guess, traced=full.traced) == full
    assert sum(guess.peak.ledger.values()) == sum(guess.peak.modules.values()) == guess.peak.peak


def test_a_stack_that_repeats_nothing_is_traced_in_full() -> None:
    config = {**GPT_OSS, "num_hidden_layers": 5}
    training = dataclasses.replace(QLORA, lora=LoraSpec(target_modules=("attention",)))
    assert summary.summarise(config, training).traced == (5,)


@pytest.mark.parametrize(
    ("kinds", "prefix", "period"),
    [
        ([0] * 5, 0, 1),
        ([0, 1, 1, 1, 1], 1, 1),
        ([0, 1, 0, 1, 0], 0, 2),
        ([2, 0, 1, 0, 1, 0], 1, 2),
        ([0, 0, 0, 1, 0, 0, 0, 1, 0, 0], 0, 4),
        ([0, 1, 2], 0, 3),
    ],
)
def test_patterns(kinds: list[int], prefix: int, period: int) -> None:
    found = alike.pattern(kinds)
    assert (found.layers, found.prefix, found.period) == (len(kinds), prefix, period)
    assert found.depth((len(kinds) - prefix) // period) == len(kinds)


def test_layers_differ_by_what_their_classes_hold() -> None:
    assert alike.layer_kinds(DEEPSEEK) == [0] + [1] * 9
    assert alike.layer_kinds(GPT_OSS) == [0, 1] * 8
    assert len(set(alike.layer_kinds({**LLAMA, "num_hidden_layers": 6}))) == 1
    assert len(set(alike.layer_kinds({**GPT_OSS, "model_type": "gemma3_text", "num_hidden_layers": 12}))) == 2
