"""Weights that transformers keeps in fp32: what the families say equals the installed classes, and the bytes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from planner.device import cuda_rules
from planner.model.adapter import base_weights
from planner.model.families import build_spec, known_families
from planner.model.spec import ModelSpec
from planner.step import program
from planner.training.choices import Dtype
from planner.training.spec import DTYPE_BYTES, LoraSpec, QuantizationSpec, TrainingSpec, Versions

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1000,
    "n_routed_experts": 32, "num_local_experts": 32, "first_k_dense_replace": 1, "moe_intermediate_size": 64,
    "num_key_value_heads": 4, "num_experts_per_tok": 2, "head_dim": 64,
}  # fmt: skip
ROUTER = 32 * 256
"""Elements of a router of SIZES: experts x hidden size."""


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", known_families())
def test_families_keep_in_fp32_what_the_classes_keep(model_type: str) -> None:
    """Oracle: the lists of the class that AutoModelForCausalLM takes, and of those parts that have lists."""
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if model_type not in CONFIG_MAPPING:
        assert not build_spec({"model_type": model_type, **REMOTE, **SIZES}, model_id="toy").keep_in_fp32
        return
    config = CONFIG_MAPPING[model_type]()
    real: set[tuple[str, bool]] = set()
    for kind in _classes(config, MODEL_FOR_CAUSAL_LM_MAPPING):
        real |= {(name, False) for name in kind._keep_in_fp32_modules_strict or ()}
        real |= {(name, True) for name in kind._keep_in_fp32_modules or ()}
    assert {(rule.name, rule.fp16_only) for rule in build_spec(config.to_dict(), model_id="toy").keep_in_fp32} == real


def _classes(config: Any, mapping: Any) -> Iterator[Any]:
    """The causal language model of a config, or every class of the module where there is none (vision models)."""
    if type(config) in mapping:
        yield mapping[type(config)]
        return
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    yield from (kind for kind in vars(module).values() if hasattr(kind, "_keep_in_fp32_modules_strict"))


REMOTE = {"num_layers": 3, "ffn_hidden_size": 512, "padded_vocab_size": 1000, "kv_channels": 64, "seq_length": 128}


def spec_of(model_type: str) -> ModelSpec:
    return build_spec({"model_type": model_type, **SIZES}, model_id="toy")


def loaded(spec: ModelSpec, dtype: Dtype, *, full: bool = False, release: tuple[int, int] = (5, 24)) -> int:
    """Bytes of all weights after loading, adapters and rotary tables left out."""
    training = TrainingSpec(
        method="full" if full else "lora", lora=None if full else LoraSpec(r=1), base_dtype=dtype, seq_len=8,
        autocast="none", optimizer="sgd", versions=Versions(transformers=release),
    )  # fmt: skip
    record = program.run(spec, training, cuda_rules.Architecture(), full_depth=True).record
    sizes = {index: size for index, size in record.events if size > 0}
    return sum(sizes[i] for i, op in enumerate(record.ops) if op == "weight")


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("full", [False, True])
def test_routers_are_fp32(model_type: str, full: bool) -> None:
    """Two layers of three have experts: their routers take 4 bytes an element where everything else takes 2."""
    spec = spec_of(model_type)
    for dtype in ("bf16", "fp16"):
        assert loaded(spec, dtype, full=full) == 2 * spec.num_parameters + 2 * (2 * ROUTER)
    assert loaded(spec, "fp32", full=full) == 4 * spec.num_parameters
    assert loaded(spec, "bf16", full=full, release=(5, 23)) == 2 * spec.num_parameters


def test_gpt_oss_keeps_its_norms_in_fp32_when_loaded_in_fp16_only() -> None:
    """Three layers with two norms each and the last: 7 x 256 elements. The sinks (4 a layer) are not in the program."""
    spec = spec_of("gpt_oss")
    counted = spec.num_parameters - 3 * 4
    assert loaded(spec, "bf16") == 2 * counted
    assert loaded(spec, "fp16") == 2 * counted + 2 * (7 * 256)


def test_a_dense_model_keeps_nothing() -> None:
    spec = spec_of("llama")
    assert loaded(spec, "fp16") == 2 * spec.num_parameters


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp32", 4)])
def test_the_base_of_an_adapter_counts_them(dtype: Dtype, width: int) -> None:
    spec = spec_of("deepseek_v3")
    training = TrainingSpec(method="lora", lora=LoraSpec(r=1), base_dtype=dtype)
    wider = 2 * ROUTER * (4 - width)
    assert base_weights(spec, training, ()).other_bytes == DTYPE_BYTES[dtype] * spec.num_parameters + wider


def test_k_bit_preparation_widens_the_rest_only_and_litgpt_has_its_own_modules() -> None:
    spec = spec_of("deepseek_v3")
    quant = QuantizationSpec(kind="nf4")
    training = TrainingSpec(lora=LoraSpec(r=1), quantization=quant, kbit_preparation=True)
    facts = base_weights(spec, training, ())
    assert facts.other_bytes == 4 * facts.other_elements
    own = TrainingSpec(method="lora", lora=LoraSpec(r=1), own_modules="litgpt")
    assert base_weights(spec, own, ()).other_bytes == 2 * spec.num_parameters
